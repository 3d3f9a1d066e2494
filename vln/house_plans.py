"""Houses as floor plans: rooms, corridors, stairs, things to see, and a navigation graph through them.

Every room is a box and so convex: two places in it see each other, and a sight line into the next room is
free exactly when it passes the doorway. What is visible from where is therefore geometry, not a guess.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vln.navgraph import NavGraph

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "purple")
CLASSES = (
    "chair", "sofa", "table", "lamp", "plant", "painting", "mirror", "bed", "bookshelf", "clock", "vase",
    "rug", "statue", "piano", "television", "fireplace", "cabinet", "bench", "basket", "curtain", "stool",
    "desk", "globe", "candle", "drum", "trunk", "guitar", "fountain", "easel", "bicycle", "bathtub", "stove",
)  # fmt: skip
ROOM_KINDS = (
    "hallway", "kitchen", "bedroom", "bathroom", "office", "lounge", "library", "studio", "landing",
)  # fmt: skip
STRUCTURES = ("door", "upstairs", "downstairs")
NOUNS = CLASSES + ROOM_KINDS + STRUCTURES
"""What a thing can be; a thing's noun is a place in this list."""

_USUAL = {
    "kitchen": ("stove", "table", "cabinet", "stool", "clock"),
    "bedroom": ("bed", "lamp", "curtain", "rug", "trunk"),
    "bathroom": ("bathtub", "mirror", "basket", "candle", "plant"),
    "office": ("desk", "chair", "globe", "bookshelf", "clock"),
    "lounge": ("sofa", "television", "fireplace", "piano", "rug"),
    "library": ("bookshelf", "globe", "desk", "statue", "bench"),
    "studio": ("easel", "guitar", "drum", "stool", "statue"),
}
"""Half of what stands in a room is usual there."""
_HEIGHTS = {"painting": 1.7, "mirror": 1.6, "clock": 2.0, "lamp": 1.4, "curtain": 1.5, "rug": 0.0}
_EYE, _STOREY = 1.5, 2.9
_FARTHEST_SIGHT = 9.0
_NARROWEST = math.radians(24)
"""Between the bearings of two edges, as a rule."""


class Room(NamedTuple):
    """A box on one floor."""

    kind: str
    floor: int
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Square metres."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)


class Doorway(NamedTuple):
    """A gap in the wall between two rooms."""

    first: int
    second: int
    x: float
    y: float
    across_x: bool
    """The wall runs along y, one walks through along x."""
    width: float


@dataclass(frozen=True, eq=False)
class House:
    """A house, what is in it, and what is visible from each of its viewpoints."""

    graph: NavGraph
    rooms: tuple[Room, ...]
    doorways: tuple[Doorway, ...]
    room_of: np.ndarray
    """int32 ``[V]``: room of a viewpoint; in a doorway the first of its two, on stairs the lower landing."""
    positions: np.ndarray
    """float64 ``[T, 3]`` of the things, metres."""
    nouns: np.ndarray
    """int32 ``[T]``, places in :data:`NOUNS`. A room or stairs is a thing that stands where one looks in."""
    colours: np.ndarray
    """int32 ``[T]``, places in :data:`COLOURS`; -1 for what is no landmark."""
    visible: np.ndarray
    """bool ``[V, T]``."""

    @property
    def scan_id(self) -> str:
        """The graph's."""
        return self.graph.scan_id


def build_house(scan_id: str, random: np.random.Generator) -> House:
    """Draw a house of 8 to 348 viewpoints, as the real scans have.

    Args:
        scan_id: its name; viewpoint ids derive from it and from the drawn numbers.
        random: source of all that is drawn.
    """
    while True:
        wanted = math.exp(random.normal(math.log(100), 0.66))
        house = _draw_house(scan_id, random, max(8, round(wanted)))
        if 8 <= len(house.room_of) <= 348:
            return house


def _draw_house(scan_id: str, random: np.random.Generator, num_viewpoints: int) -> House:
    """Draw a house of about that many viewpoints."""
    most = 1 if num_viewpoints < 40 else min(4, 1 + num_viewpoints // 45)
    floors = int(random.integers(1, most + 1))
    rooms, doorways, stairwells = _plan(random, floors, num_viewpoints * 4.0 / floors)
    spots = _Spots(random, rooms, doorways)
    for lower, upper in itertools.pairwise(stairwells):
        spots.climb(lower, upper)
    positions = np.array(spots.positions)
    positions[:, 2] += random.normal(0, 0.02, len(positions))
    salt = f"{scan_id}/{positions.tobytes().hex()}"
    names = tuple(
        hashlib.sha256(f"{number}/{salt}".encode()).hexdigest()[:32] for number in range(len(positions))
    )
    edges = sorted({edge for a, b in spots.edges for edge in ((a, b), (b, a))})
    graph = NavGraph(
        scan_id,
        names,
        positions,
        np.ones(len(names), dtype=bool),
        np.array(edges, dtype=np.int32).reshape(-1, 2),
    )
    furniture = _furnish(random, rooms, doorways, stairwells)
    return House(
        graph=graph,
        rooms=rooms,
        doorways=doorways,
        room_of=np.array([first for first, _ in spots.homes], dtype=np.int32),
        positions=np.array([thing.position for thing in furniture]),
        nouns=np.array([NOUNS.index(thing.noun) for thing in furniture], dtype=np.int32),
        colours=np.array([thing.colour for thing in furniture], dtype=np.int32),
        visible=_visible(positions, spots.homes, furniture, doorways),
    )


def _plan(
    random: np.random.Generator, floors: int, area: float
) -> tuple[tuple[Room, ...], tuple[Doorway, ...], list[int]]:
    """Rooms and doorways of all floors; the landings, from the ground up, if there are several."""
    ratio = random.uniform(0.6, 1.0)
    width, depth = max(4.0, math.sqrt(area / ratio)), max(4.0, math.sqrt(area * ratio))
    well = random.uniform(0, max(0.1, depth - 5.2))
    rooms: list[Room] = []
    doorways: list[Doorway] = []
    landings = []
    for floor in range(floors):
        first = len(rooms)
        rooms += [Room(kind, floor, *box) for kind, box in _split(random, (0.0, 0.0, width, depth))]
        if floors > 1:
            landings.append(len(rooms))
            rooms.append(Room("landing", floor, -2.4, well, 0.0, well + 5.2))
        doorways += _doorways(random, rooms, first)
    return tuple(rooms), tuple(doorways), landings


_Box = tuple[float, float, float, float]


def _split(random: np.random.Generator, box: _Box) -> list[tuple[str, _Box]]:
    """Rooms of a region: corridors through what is wide and deep, then cuts until rooms are left."""
    x0, y0, x1, y1 = box
    long_x = x1 - x0 >= y1 - y0
    longest, shortest = max(x1 - x0, y1 - y0), min(x1 - x0, y1 - y0)

    def cut(low: float, high: float) -> list[_Box]:
        """Three parts along the short side if ``high`` is farther than ``low``, else two along the long."""
        if high > low:
            edges = (y0, low, high, y1) if long_x else (x0, low, high, x1)
            pairs = list(itertools.pairwise(edges))
            return [(x0, a, x1, b) if long_x else (a, y0, b, y1) for a, b in pairs]
        return [(x0, y0, low, y1), (low, y0, x1, y1)] if long_x else [(x0, y0, x1, low), (x0, low, x1, y1)]

    if shortest > 7.0:
        base = y0 if long_x else x0
        middle, half = base + shortest * random.uniform(0.4, 0.6), random.uniform(0.7, 1.0)
        lower, corridor, upper = cut(middle - half, middle + half)
        return [*_split(random, lower), ("hallway", corridor), *_split(random, upper)]
    if longest > random.uniform(4.5, 7.5) and longest * shortest > 14:
        at = (x0 if long_x else y0) + longest * random.uniform(0.38, 0.62)
        return [room for part in cut(at, at) for room in _split(random, part)]
    return [(str(random.choice(list(_USUAL))), box)]


def _doorways(random: np.random.Generator, rooms: list[Room], first: int) -> list[Doorway]:
    """Doorways of a floor: a tree that prefers corridors, and some more."""
    found = []
    for a in range(first, len(rooms)):
        for b in range(a + 1, len(rooms)):
            doorway = _doorway_between(random, rooms, a, b)
            if doorway is not None:
                ways = (rooms[a].kind in ("hallway", "landing")) + (rooms[b].kind in ("hallway", "landing"))
                found.append((random.uniform() - 0.6 * ways, ways, doorway))
    group = {number: number for number in range(first, len(rooms))}
    chosen = []
    for _, ways, doorway in sorted(found):
        one, other = group[doorway.first], group[doorway.second]
        if one != other or random.uniform() < (0.22, 0.4, 0.8)[ways]:
            chosen.append(doorway)
            group = {room: one if name == other else name for room, name in group.items()}
    return chosen


def _doorway_between(random: np.random.Generator, rooms: list[Room], a: int, b: int) -> Doorway | None:
    one, other = rooms[a], rooms[b]
    for across_x in (True, False):
        if across_x:
            wall = one.x1 if one.x1 == other.x0 else one.x0 if one.x0 == other.x1 else None
            low, high = max(one.y0, other.y0), min(one.y1, other.y1)
        else:
            wall = one.y1 if one.y1 == other.y0 else one.y0 if one.y0 == other.y1 else None
            low, high = max(one.x0, other.x0), min(one.x1, other.x1)
        if wall is not None and high - low >= 1.2:
            width = random.uniform(0.8, 1.1)
            at = random.uniform(low + width / 2 + 0.05, high - width / 2 - 0.05)
            return Doorway(a, b, wall if across_x else at, at if across_x else wall, across_x, width)
    return None


class _Spots:
    """Viewpoints of a house and the edges between them."""

    def __init__(
        self, random: np.random.Generator, rooms: tuple[Room, ...], doorways: tuple[Doorway, ...]
    ) -> None:
        self.random, self.rooms = random, rooms
        self.positions: list[tuple[float, float, float]] = []
        self.homes: list[tuple[int, int]] = []
        """The room of a viewpoint, twice; of a doorway or of stairs the two that it joins."""
        self.edges: list[tuple[int, int]] = []
        members: list[list[int]] = [[] for _ in rooms]
        for doorway in doorways:
            for room in (doorway.first, doorway.second):
                members[room].append(len(self.positions))
            self._add(doorway.x, doorway.y, doorway.first, doorway.second)
        self.members = members
        for number in range(len(rooms)):
            self._fill(number)
            self._join(members[number])

    def _add(self, x: float, y: float, room: int, other: int) -> None:
        self.positions.append((float(x), float(y), self.rooms[room].floor * _STOREY + _EYE))
        self.homes.append((room, other))

    def _fill(self, number: int) -> None:
        """Viewpoints inside a room, none too near to another."""
        room, random = self.rooms[number], self.random
        narrow = min(room.x1 - room.x0, room.y1 - room.y0) < 2.5
        margin = 0.6
        wanted = max(1, round(room.area / (3.2 if narrow else 5.6)))
        apart = random.uniform(0.8, 1.6)
        inside = 0
        for _ in range(12 * wanted):
            x = random.uniform(room.x0 + margin, room.x1 - margin)
            y = random.uniform(room.y0 + margin, room.y1 - margin)
            near = [math.dist((x, y), self.positions[other][:2]) for other in self.members[number]]
            if not near or min(near) > apart or (inside == 0 and min(near) > 0.6):
                self.members[number].append(len(self.positions))
                self._add(x, y, number, number)
                inside += 1
            if inside == wanted:
                return

    def _join(self, members: list[int]) -> None:
        """Edges of a room, from the shortest on: a tree, and others where none leads the same way.

        A real scan rarely has an edge past another viewpoint, as one would walk there first.
        """
        pairs = [(a, b) for number, a in enumerate(members) for b in members[number + 1 :]]
        length = {pair: math.dist(self.positions[pair[0]], self.positions[pair[1]]) for pair in pairs}
        bearings: dict[int, list[float]] = {number: [] for number in members}
        group = {number: number for number in members}
        farthest, lax = self.random.uniform(4.4, 6.6), 0.8 * self.random.uniform() ** 3
        for pair in sorted(pairs, key=length.__getitem__):
            a, b = pair
            (ax, ay, _), (bx, by, _) = self.positions[a], self.positions[b]
            there = math.atan2(by - ay, bx - ax)
            free = all(
                abs(math.remainder(bearing - there - turn, 2 * math.pi)) > _NARROWEST
                for end, turn in ((a, 0.0), (b, math.pi))
                for bearing in bearings[end]
            )
            wanted = length[pair] < farthest and (free or self.random.uniform() < lax)
            if group[a] != group[b] or wanted:
                self.edges.append(pair)
                bearings[a].append(there)
                bearings[b].append(there + math.pi)
                old = group[b]
                group = {number: group[a] if name == old else name for number, name in group.items()}

    def climb(self, lower: int, upper: int) -> None:
        """Stairs from one landing to the next."""
        room = self.rooms[lower]
        x, y0, y1 = (room.x0 + room.x1) / 2, room.y0 + 0.5, room.y1 - 0.5
        steps = int(self.random.integers(2, 4))
        chain = []
        for step in range(steps):
            share = (step + 1) / (steps + 1)
            chain.append(len(self.positions))
            height = (room.floor + share) * _STOREY + _EYE
            self.positions.append((x, y0 + share * (y1 - y0), height))
            self.homes.append((lower, upper))
        self.edges += itertools.pairwise(chain)
        for room_number, y, end in ((lower, y0, chain[0]), (upper, y1, chain[-1])):
            near = min(self.members[room_number], key=lambda a: math.dist(self.positions[a][:2], (x, y)))
            self.edges.append((near, end))


class _Thing(NamedTuple):
    noun: str
    colour: int
    position: tuple[float, float, float]
    rooms: tuple[int, ...]
    """From which rooms it is seen whole."""
    through: bool
    """Seen through doorways as well."""


def _furnish(
    random: np.random.Generator,
    rooms: tuple[Room, ...],
    doorways: tuple[Doorway, ...],
    landings: list[int],
) -> list[_Thing]:
    things = []
    for number, room in enumerate(rooms):
        height, usual = room.floor * _STOREY, _USUAL.get(room.kind, CLASSES)
        for _ in range(2 + round(room.area / 4.0)):
            noun = str(random.choice(usual if random.uniform() < 0.5 else CLASSES))
            x, y = random.uniform(room.x0 + 0.2, room.x1 - 0.2), random.uniform(room.y0 + 0.2, room.y1 - 0.2)
            # Most stand along a wall.
            wall = random.integers(6)
            x = (room.x0 + 0.2, room.x1 - 0.2)[wall] if wall < 2 else x
            y = (room.y0 + 0.2, room.y1 - 0.2)[wall - 2] if 2 <= wall < 4 else y
            position = (float(x), float(y), height + _HEIGHTS.get(noun, 0.7))
            things.append(_Thing(noun, int(random.integers(len(COLOURS))), position, (number,), True))
    for doorway in doorways:
        height = rooms[doorway.first].floor * _STOREY
        both = (doorway.first, doorway.second)
        things.append(_Thing("door", -1, (doorway.x, doorway.y, height + 1.2), both, False))
        for into, seen_from in (both, both[::-1]):
            inside = 1.0 if (rooms[into].x1 > doorway.x + 1e-6 if doorway.across_x
                             else rooms[into].y1 > doorway.y + 1e-6) else -1.0  # fmt: skip
            x, y = doorway.x + inside * doorway.across_x, doorway.y + inside * (not doorway.across_x)
            things.append(_Thing(rooms[into].kind, -1, (x, y, height + 1.2), (seen_from,), False))
    for lower, upper in itertools.pairwise(landings):
        room = rooms[lower]
        x, low, high = (room.x0 + room.x1) / 2, room.y0 + 1.6, room.y1 - 1.6
        storey = room.floor * _STOREY
        things.append(_Thing("upstairs", -1, (x, low + 0.6, storey + _EYE + 1.0), (lower,), False))
        things.append(_Thing("downstairs", -1, (x, high - 0.6, storey + _STOREY + 0.5), (upper,), False))
    return things


def _visible(
    positions: np.ndarray,
    homes: list[tuple[int, int]],
    things: list[_Thing],
    doorways: tuple[Doorway, ...],
) -> np.ndarray:
    """bool ``[V, T]``: in one of the viewpoint's rooms or in the line of its doorway, and not too far."""
    home = np.array(homes)
    at = np.array([thing.position for thing in things])
    visible = np.zeros((len(positions), len(things)), dtype=bool)
    for room in range(int(home.max()) + 1):
        inside = (home == room).any(axis=1)
        visible |= inside[:, None] & np.array([room in thing.rooms for thing in things])
    for doorway in doorways:
        for here, there in ((doorway.first, doorway.second), (doorway.second, doorway.first)):
            rows = np.flatnonzero((home[:, 0] == here) & (home[:, 1] == here))
            columns = np.flatnonzero([thing.through and there in thing.rooms for thing in things])
            axis = 0 if doorway.across_x else 1
            wall, middle = (doorway.x, doorway.y) if doorway.across_x else (doorway.y, doorway.x)
            start, end = positions[rows][:, None, :], at[columns][None, :, :]
            run = end[..., axis] - start[..., axis]
            share = (wall - start[..., axis]) / np.where(run == 0, 1, run)
            passes = start[..., 1 - axis] + share * (end[..., 1 - axis] - start[..., 1 - axis])
            free = (run != 0) & (np.abs(passes - middle) < doorway.width / 2)
            visible[np.ix_(rows, columns)] |= free
    apart = np.linalg.norm(positions[:, None, :2] - at[None, :, :2], axis=2)
    return visible & (apart < _FARTHEST_SIGHT)
