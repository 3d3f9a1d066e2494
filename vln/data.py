"""Items of the tasks in their published formats: R2R paths, NDH dialogue items, HANNA tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vln.sources import Document, find_document, parse_json, read_document

_T = TypeVar("_T")


class R2RItem(NamedTuple):
    """A path with its instructions (Anderson et al., 2018); test items have its first viewpoint alone."""

    path_id: int | str
    scan_id: str
    heading: float
    """At the start, radians."""
    path: tuple[str, ...]
    """Viewpoint ids."""
    instructions: tuple[str, ...]
    distance: float | None
    """Length as stated, metres to two decimals; ``None`` in the test split."""

    @property
    def instruction_ids(self) -> tuple[str, ...]:
        """What a submission calls each instruction."""
        return tuple(f"{self.path_id}_{number}" for number in range(len(self.instructions)))


class NDHItem(NamedTuple):
    """A dialogue so far, and where it led (CVDN, Thomason et al., 2019); test items have no ends or paths."""

    inst_idx: int
    scan_id: str
    start: str
    """Viewpoint id."""
    heading: float
    """At the start, radians."""
    end_panos: tuple[str, ...]
    """Viewpoint ids of the goal region."""
    planner_path: tuple[str, ...]
    player_path: tuple[str, ...]

    @property
    def trusted_path(self) -> tuple[str, ...]:
        """The player's path if it passes the planner's last viewpoint after its start, else the planner's."""
        trusted = bool(self.planner_path) and self.planner_path[-1] in self.player_path[1:]
        return self.player_path if trusted else self.planner_path


class HannaTask(NamedTuple):
    """An object to find, with a path to each viewpoint that counts as finding it (Nguyen & Daumé, 2019)."""

    path_id: int | str
    scan_id: str
    heading: float
    """At the start, radians."""
    paths: tuple[tuple[str, ...], ...]
    """Viewpoint ids; all begin at the start."""
    instructions: tuple[str, ...]

    @property
    def instruction_ids(self) -> tuple[str, ...]:
        """What a submission calls each instruction."""
        return tuple(f"{self.path_id}_{number}" for number in range(len(self.instructions)))


def read_r2r(source: str | Path, split: str | None = None) -> list[R2RItem]:
    """R2R items.

    Args:
        source: the JSON file, or with a split a data folder: one with ``R2R_{split}.json`` in it, in ``r2r/``
            or in ``r2r.tar*``.
        split: ``train``, ``val_seen``, ``val_unseen`` or ``test``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or an item lacks a field; the text names file, item and field.
    """
    return _read(source, ("r2r", f"R2R_{split}.json") if split else None, _r2r_item)


def read_ndh(source: str | Path, split: str | None = None) -> list[NDHItem]:
    """NDH items.

    Args:
        source: the JSON file, or with a split a data folder: one with ``ndh/{split}.json`` or ``ndh.tar*``.
        split: ``train``, ``val_seen``, ``val_unseen`` or ``test``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or an item lacks a field; the text names file, item and field.
    """
    return _read(source, ("ndh", f"{split}.json") if split else None, _ndh_item)


def read_hanna(source: str | Path, split: str | None = None) -> list[HannaTask]:
    """HANNA tasks.

    Args:
        source: the JSON file, or with a split a data folder: one with ``hanna_{split}.json`` in it, in
            ``hanna/`` or in ``hanna.tar*``.
        split: such as ``val_seen_env``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or an item lacks a field; the text names file, item and field.
    """
    return _read(source, ("hanna", f"hanna_{split}.json") if split else None, hanna_task)


def _read(source: str | Path, member: tuple[str, str] | None, convert: Callable[[Any], _T]) -> list[_T]:
    place = Path(source)
    document = find_document(place, *member) if member else read_document(place)
    rows = parse_json(document)
    if not isinstance(rows, list):
        raise ValueError(f"{document.origin} holds a JSON {type(rows).__name__}, expected a list of items")
    return [_convert(document, number, row, convert) for number, row in enumerate(rows)]


def _convert(document: Document, number: int, row: Any, convert: Callable[[Any], _T]) -> _T:
    try:
        return convert(row)
    except KeyError as error:
        raise ValueError(f"{document.origin}: item {number} lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{document.origin}: item {number} is not as expected: {error}") from error


def _r2r_item(row: Any) -> R2RItem:
    distance = row.get("distance")
    return R2RItem(
        path_id=row["path_id"],
        scan_id=row["scan"],
        heading=float(row["heading"]),
        path=tuple(row["path"]),
        instructions=tuple(row["instructions"]),
        distance=None if distance is None else float(distance),
    )


def _ndh_item(row: Any) -> NDHItem:
    return NDHItem(
        inst_idx=int(row["inst_idx"]),
        scan_id=row["scan"],
        start=row["start_pano"]["pano"],
        heading=float(row["start_pano"]["heading"]),
        end_panos=tuple(row.get("end_panos", ())),
        planner_path=tuple(row.get("planner_path", ())),
        player_path=tuple(row.get("player_path", ())),
    )


def hanna_task(row: Any) -> HannaTask:
    """Task from its JSON object.

    Raises:
        KeyError: it lacks a field.
        TypeError: a field is of another kind.
        ValueError: the same.
    """
    return HannaTask(
        path_id=row["path_id"],
        scan_id=row["scan"],
        heading=float(row["heading"]),
        paths=tuple(tuple(path) for path in row["paths"]),
        instructions=tuple(row["instructions"]),
    )
