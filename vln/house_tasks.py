"""Which paths become items: groups that start alike and lead apart, so that only the words tell where to go.

Every group has one start pose, goals that no single place can serve, and paths of one number of edges. A
group is taken only if, over the split so far, simple habits that do not listen stay near pure chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vln.geometry import HEADING_STEP, NUM_HEADINGS, Camera
from vln.house_plans import House
from vln.world import World

SUCCESS_RADIUS = 3.0
"""Metres (R2R)."""
_APART = 2 * SUCCESS_RADIUS
_LONGEST_WALK = 10
"""Steps after which a walk that looks for a dead end gives up."""
_ALLOWED = 1.1
"""How much better than chance a habit may be before groups that help it are refused."""
GOAL_SHARES = (0.045, 0.235, 0.26, 0.19, 0.11, 0.16)
"""How often a goal has one neighbour, two, ..., six or more: as chance has it, and the same in all splits."""
_GOAL_SLACK = 3
"""Paths by which a split may exceed a share."""
_MOST_ATTEMPTS = 8000
"""To find a group."""
HABITS = (
    "candidate 1",
    *(f"straight on {steps} steps" for steps in range(1, 9)),
    "straight on to a dead end",
    "at random, but stop at dead ends",
)
"""The first is a share of teacher actions, the others are success rates."""


class Group(NamedTuple):
    """Paths from one pose to goals that lie apart, all of one number of edges."""

    scan_id: str
    heading: float
    """At the start, radians; the last digits are those that the files keep."""
    paths: tuple[tuple[int, ...], ...]
    """Viewpoint indices."""
    before: tuple[int, ...]
    """Shortest path that led to the start, which is its last viewpoint, and perhaps its only one."""

    @property
    def num_edges(self) -> int:
        """Of each path."""
        return len(self.paths[0]) - 1


class Walks:
    """What can be walked in one house, and how far chance and habit get there.

    Args:
        house: the house.
        edge_shares: how often the walk at random has so many edges.
        most_edges: of the paths that will be asked for.
    """

    def __init__(self, house: House, edge_shares: Mapping[int, float], *, most_edges: int) -> None:
        self.house = house
        graph = house.graph
        self.distances, self.hops = graph.distances, graph.next_hops
        table = World([graph])
        self._candidates, followers = table.candidates(Camera()), table.followers(Camera())
        self.degree = self._candidates.num_candidates
        self.goal_kind = np.clip(self.degree, 1, len(GOAL_SHARES)) - 1
        """int ``[V]``: place in :data:`GOAL_SHARES`."""
        row = np.arange(len(self.degree)).repeat(NUM_HEADINGS)
        place = followers.position[:, 0].reshape(len(self.degree), NUM_HEADINGS)
        self._ahead = self._candidates.viewpoint[row.reshape(place.shape), place]
        """int32 ``[V, 12]``: first candidate in the order of how far to turn."""
        self._arrival = np.zeros((len(self.degree), len(self.degree)), dtype=np.int64)
        real = self._candidates.viewpoint >= 0
        source = np.nonzero(real)[0]
        self._arrival[source, self._candidates.viewpoint[real]] = (
            self._candidates.point_id[real] % NUM_HEADINGS
        )
        self.edges, self._later, self.by_chance = self._count(most_edges)
        self._straight = self._straight_walks()
        within = (self.distances < SUCCESS_RADIUS).astype(np.float64)
        ends, dead = self._chance(edge_shares)
        self.chance, self.chance_at_dead_ends = ends @ within, dead @ within
        """float64 ``[V, V]``: chance that a random walk from the one ends near the other."""

    def _count(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all shortest paths ``[V, V]``: edges, at most ``most + 1``; first candidates taken after the
        first step; and how many a random choice would have taken, first step included.
        """
        size = len(self.degree)
        here, goal = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
        edges, ahead, chance = (np.zeros((size, size)) for _ in range(3))
        heading = None
        for _ in range(most + 1):
            going = here != goal
            there = self.hops[here, goal]
            edges += going
            chance += going / self.degree[here]
            if heading is not None:
                ahead += going & (self._ahead[here, heading] == there)
            here, heading = there, self._arrival[here, there]
        return edges.astype(np.int64), ahead, chance

    def _chance(self, edge_shares: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
        """Where walks at random end, ``[V, V]``: of lengths by the shares; and if dead ends stop them."""
        source, target = self.house.graph.edges.T.astype(np.int64)
        size = len(self.degree)
        step = np.zeros((size, size))
        step[source, target] = 1 / self.degree[source]
        closing = np.where((self.degree == 1)[:, None], np.eye(size), step)
        at, ends = np.eye(size), np.zeros((size, size))
        open_, early = step, np.zeros((size, size))
        for number in range(1, max(edge_shares) + 1):
            at, open_ = at @ step, open_ @ closing if number > 1 else open_
            ends += edge_shares.get(number, 0.0) * at
            early += edge_shares.get(number, 0.0) * open_
        return ends, early

    def path(self, start: int, goal: int) -> tuple[int, ...]:
        """Indices of the shortest path, both ends included."""
        path = [start]
        while path[-1] != goal:
            path.append(int(self.hops[path[-1], goal]))
        return tuple(path)

    def arrival(self, source: int, target: int) -> int:
        """Heading, a number of 12, with which one arrives from a neighbour."""
        return int(self._arrival[source, target])

    def straight(self, start: int, heading: float) -> np.ndarray:
        """Viewpoints of a walk that takes the first candidate every time, int64 ``[11]``."""
        return self._straight[start, _nearest(heading)]

    def _straight_walks(self) -> np.ndarray:
        """Of all starts and headings, int64 ``[V, 12, 11]``."""
        here, k = np.meshgrid(np.arange(len(self.degree)), np.arange(NUM_HEADINGS), indexing="ij")
        walks = [here]
        for _ in range(_LONGEST_WALK):
            there = self._ahead[here, k]
            here, k = there, self._arrival[here, there]
            walks.append(here)
        return np.stack(walks, axis=-1)

    def rank_one(self, start: int, goals: np.ndarray, heading: float) -> np.ndarray:
        """How many steps of the paths to goals take the first candidate, float64 ``[n]``."""
        first = self._ahead[start, _nearest(heading)] == self.hops[start, goals]
        return self._later[start, goals] + first

    def tally(self, group: Group) -> tuple[np.ndarray, np.ndarray]:
        """Hits of every habit on a group's paths, and what chance would hit, float64 ``[HABITS]`` each."""
        start = group.paths[0][0]
        goals = [path[-1] for path in group.paths]
        walk = self.straight(start, group.heading)
        dead = next((n for n in range(1, _LONGEST_WALK) if self.degree[walk[n]] == 1), _LONGEST_WALK)
        near = self.distances[np.ix_(walk, np.array(goals))] < SUCCESS_RADIUS
        chance = float(self.chance[start, goals].sum())
        hits = [
            float(self.rank_one(start, np.array(goals), group.heading).sum()),
            *near[1:9].sum(axis=1).tolist(),
            float(near[dead].sum()),
            float(self.chance_at_dead_ends[start, goals].sum()),
        ]
        return np.array(hits), np.array([self.by_chance[start, goals].sum(), *[chance] * (len(HABITS) - 1)])


def _nearest(heading: float) -> int:
    """Number of 12 of a heading in [0, 2 pi]."""
    return int(heading / HEADING_STEP + 0.5) % NUM_HEADINGS


def draw_groups(
    walks: Mapping[str, Walks],
    wanted: Sequence[int],
    random: np.random.Generator,
    *,
    group_size: int,
    longest_m: float,
    taken: set[tuple[str, int, int]],
    longest_before: int = 0,
) -> Iterator[Group]:
    """Groups of paths, spread over houses by their size.

    Goals are alike in all splits and habits near chance as long as there are houses enough; a world of a few
    houses takes what there is.

    Args:
        walks: scan ids to houses.
        wanted: edges of the paths of each group.
        random: source of all choices.
        group_size: paths of a group.
        longest_m: no path is longer.
        taken: scan, start and goal of paths that are in use; and scan, start and -1 minus the heading's
            number of 12, so that no two groups start alike; grows.
        longest_before: edges of the path that led to a start; the heading is then that of arrival. For a
            start without such a path headings are random.

    Raises:
        ValueError: the houses do not have so many groups.
    """
    names = list(walks)
    weight = np.array([len(walks[name].degree) for name in names], dtype=np.float64)
    hits, chance = np.zeros(len(HABITS)), np.zeros(len(HABITS))
    ends, share = np.zeros(len(GOAL_SHARES)), np.array(GOAL_SHARES)
    for number, num_edges in enumerate(wanted):
        room = share * group_size * (number + 1) + _GOAL_SLACK - ends
        for attempt in range(_MOST_ATTEMPTS):
            # A world of a few houses may have no such group left: then a few paths too many, then any.
            lax, desperate = 2 * attempt > _MOST_ATTEMPTS, 4 * attempt > 3 * _MOST_ATTEMPTS
            name = names[int(random.choice(len(names), p=weight / weight.sum()))]
            group = _draw_group(
                walks[name],
                num_edges,
                random,
                group_size,
                longest_m,
                longest_before,
                taken,
                np.full_like(room, np.inf) if lax else room,
            )
            if group is None:
                continue
            more, by_chance = walks[name].tally(group)
            limit = _ALLOWED * (chance + by_chance) + group_size * lax
            worse = (hits + more > limit) & (more > by_chance)
            if worse.any() and not desperate:
                continue
            hits, chance = hits + more, chance + by_chance
            np.add.at(ends, walks[name].goal_kind[[path[-1] for path in group.paths]], 1)
            taken |= {(name, path[0], path[-1]) for path in group.paths}
            taken.add((name, group.paths[0][0], -1 - _nearest(group.heading)))
            yield group
            break
        else:
            raise ValueError(
                f"found {number} of {len(wanted)} groups of {group_size} paths in {len(names)} houses: ask "
                "for fewer or for more houses"
            )


def _draw_group(
    walks: Walks,
    num_edges: int,
    random: np.random.Generator,
    group_size: int,
    longest_m: float,
    longest_before: int,
    taken: set[tuple[str, int, int]],
    room: np.ndarray,
) -> Group | None:
    scan_id, start = walks.house.scan_id, int(random.integers(len(walks.degree)))
    heading = round(float(random.uniform(0, 2 * np.pi)), 3)
    before: tuple[int, ...] = (start,)
    if longest_before and (edges := int(random.integers(longest_before + 1))):
        origins = np.flatnonzero(walks.edges[:, start] == edges)
        if not len(origins):
            return None
        before = walks.path(int(random.choice(origins)), start)
        heading = round(walks.arrival(*before[-2:]) * HEADING_STEP, 3)
    if (scan_id, start, -1 - _nearest(heading)) in taken:
        return None
    distance = walks.distances[start]
    fits = (walks.edges[start] == num_edges) & (distance >= 5.0) & (distance <= longest_m)
    goals: list[int] = []
    room = room.copy()
    for goal in _in_order(walks, start, heading, np.flatnonzero(fits), random):
        kind = walks.goal_kind[goal]
        if (
            room[kind] >= 1
            and (walks.distances[goal, goals] > _APART).all()
            and (scan_id, start, goal) not in taken
        ):
            goals.append(goal)
            room[kind] -= 1
            if len(goals) == group_size:
                return Group(scan_id, heading, tuple(walks.path(start, goal) for goal in goals), before)
    return None


def _in_order(
    walks: Walks, start: int, heading: float, goals: np.ndarray, random: np.random.Generator
) -> list[int]:
    """Goals at random, but rather those that one does not get to by walking straight on.

    Shortest paths run straight: left to themselves they take the first candidate twice as often as chance.
    """
    excess = walks.rank_one(start, goals, heading) - walks.by_chance[start, goals]
    met = walks.distances[np.ix_(walks.straight(start, heading), goals)].min(axis=0) < SUCCESS_RADIUS
    cost = np.maximum(excess, 0) + met + random.uniform(size=len(goals))
    return goals[np.argsort(cost)].tolist()


def edge_pattern(shares: Mapping[int, float], count: int, random: np.random.Generator) -> list[int]:
    """So many numbers of edges, in the very shares up to rounding, shuffled.

    Example:
        >>> sorted(edge_pattern({4: 0.5, 5: 0.5}, 4, np.random.default_rng(0)))
        [4, 4, 5, 5]
    """
    bounds = np.cumsum(list(shares.values())) / sum(shares.values())
    places = np.searchsorted(bounds, (np.arange(count) + 0.5) / count)
    return random.permutation(np.array(list(shares))[places]).tolist()
