"""Floor plans of generated houses, for maps: rooms, doorways and what stands in them.

``vln.houses`` writes them as ``plans.json`` beside the graphs; real scans have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vln.sources import parse_json, read_document

FILE = "plans.json"


class Room(NamedTuple):
    """A rectangular room."""

    kind: str
    """Such as ``kitchen``."""
    floor: int
    """0 is the lowest."""
    box: tuple[float, float, float, float]
    """Left, bottom, right, top, metres."""


class Doorway(NamedTuple):
    """A gap in the wall between two rooms."""

    floor: int
    x: float
    y: float
    upright: bool
    """The wall runs along y."""
    width: float
    """Metres."""


class Landmark(NamedTuple):
    """A thing that instructions may name."""

    name: str
    """Colour and kind."""
    colour: str
    position: tuple[float, float, float]
    """Metres."""


class FloorPlan(NamedTuple):
    """A house."""

    rooms: tuple[Room, ...]
    doorways: tuple[Doorway, ...]
    landmarks: tuple[Landmark, ...]

    @property
    def num_floors(self) -> int:
        """Storeys."""
        return 1 + max(room.floor for room in self.rooms)


def read_plans(data: str | Path) -> dict[str, FloorPlan]:
    """Plans of the houses of a data folder by their scan ids; none if it has no ``plans.json``.

    Raises:
        ValueError: the file is damaged; the text names house and field.
    """
    path = Path(data) / FILE
    if not path.is_file():
        return {}
    rows = parse_json(read_document(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}, expected a list of houses")
    plans = {}
    for number, row in enumerate(rows):
        try:
            plans[str(row["scan"])] = _plan(row)
        except KeyError as error:
            raise ValueError(f"{path}: house {number} lacks the field {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: house {number} is not as expected: {error}") from error
    return plans


def _plan(row: Any) -> FloorPlan:
    rooms = tuple(
        Room(room["kind"], int(room["floor"]), tuple(float(room[side]) for side in ("x0", "y0", "x1", "y1")))  # type: ignore[arg-type]
        for room in row["rooms"]
    )
    doorways = tuple(
        Doorway(
            rooms[door["first"]].floor, float(door["x"]), float(door["y"]), bool(door["across_x"]),
            float(door["width"]),
        )
        for door in row["doorways"]
    )  # fmt: skip
    landmarks = []
    for thing in row["landmarks"]:
        x, y, z = (float(number) for number in thing["position"])
        landmarks.append(Landmark(f"{thing['colour']} {thing['noun']}", thing["colour"], (x, y, z)))
    if not rooms:
        raise ValueError("it has no rooms")
    return FloorPlan(rooms, doorways, tuple(landmarks))
