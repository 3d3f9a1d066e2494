"""Walks of a teacher along shortest paths, or along paths as they are written, many at once.

Letters of shapes: B rows of a simulator or paths of a batch, P walks, N steps of all walks, S steps of the
longest, D width of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vln.candidates import Panorama, PanoramicSimulator
from vln.model import Orientation
from vln.orientation import candidate_views, with_panorama_angles
from vln.world import World

_BATCH = 1024
"""Walks rolled together."""


class PanoramaFeatures(Protocol):
    """Features of viewpoints, as a store gives them."""

    @property
    def width(self) -> int:
        """Numbers of a view."""

    def gather(self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str]) -> np.ndarray:
        """Features of viewpoints, ``[B, 36, width]``."""


class Walk(NamedTuple):
    """A path to walk: what R2R items and their like have."""

    scan_id: str
    path: tuple[str, ...]
    """Viewpoint ids; where shortest paths are walked only the ends count."""
    heading: float
    """At the start, radians."""
    num_texts: int = 1
    """Instructions for it; their rows follow each other in the order of the walks."""


def walks_of(items: Sequence[Any]) -> list[Walk]:
    """Walks of R2R items, or of whatever has their fields."""
    return [Walk(item.scan_id, tuple(item.path), item.heading, len(item.instructions)) for item in items]


class TeacherStep(NamedTuple):
    """One step of a batch under the teacher."""

    seen: Panorama
    action: np.ndarray
    """int64 ``[B]``: the teacher's choice; STOP for finished rows."""
    active: np.ndarray
    """bool ``[B]``: rows that had not stopped before."""


def roll_teacher(agents: PanoramicSimulator, starts: Any, goals: Any, headings: Any) -> Iterator[TeacherStep]:
    """Walk every row along a shortest path to its goal, STOP included, until all have stopped.

    Args:
        agents: in either order of choices; left where the walk ends.
        starts: the world's numbers of viewpoints, ``[B]``.
        goals: the same.
        headings: radians ``[B]``, at the start.

    Returns:
        One step at a time, as seen before the action.

    Raises:
        ValueError: a goal cannot be reached from its start.
    """
    hops, goals = NextHops(agents.world), np.asarray(goals, dtype=np.int64)
    return _roll(agents, starts, headings, lambda seen, _: hops.towards(seen.viewpoint, goals))


def roll_paths(agents: PanoramicSimulator, paths: np.ndarray, headings: Any) -> Iterator[TeacherStep]:
    """Walk every row along its own path, until all have stopped.

    Args:
        agents: in either order of choices; left where the walk ends.
        paths: the world's numbers of viewpoints, int64 ``[B, S]``; behind its end a row repeats the last.
        headings: radians ``[B]``, at the start.

    Returns:
        One step at a time, as seen before the action.

    Raises:
        ValueError: two viewpoints that follow each other are no neighbours.
    """
    last = paths.shape[1] - 1
    return _roll(agents, paths[:, 0], headings, lambda _, step: paths[:, min(step + 1, last)])


def _roll(
    agents: PanoramicSimulator, starts: Any, headings: Any, follow: Callable[[Panorama, int], np.ndarray]
) -> Iterator[TeacherStep]:
    now, step = agents.place(starts, headings), 0
    active = np.ones(agents.batch_size, dtype=bool)
    while active.any():
        action = np.where(active, teacher_actions(now, follow(now, step)), now.stop)
        yield TeacherStep(now, action, active)
        active = active & (action != now.stop)
        now, step = agents.choose(action), step + 1


def teacher_actions(seen: Panorama, following: np.ndarray) -> np.ndarray:
    """Choices that lead to given viewpoints.

    Args:
        seen: a batch's candidates.
        following: int64 ``[B]``: the viewpoint to go to; the own one for STOP.

    Returns:
        int64 ``[B]``.

    Raises:
        ValueError: a viewpoint is no candidate.
    """
    match = seen.candidate == following[:, None]
    stays = following == seen.viewpoint
    missing = ~match.any(axis=1)
    if missing.any():
        row = int(np.argmax(missing))
        raise ValueError(f"row {row}: viewpoint {following[row]} is no candidate of {seen.viewpoint[row]}")
    return np.where(stays, seen.stop, match.argmax(axis=1))


class NextHops:
    """First steps of shortest paths, in the world's numbers.

    Args:
        world: the scans.
    """

    def __init__(self, world: World) -> None:
        self._graphs = list(world.graphs.values())
        self._starts = np.array([world.starts[graph.scan_id] for graph in self._graphs])

    def towards(self, here: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """The next viewpoint of each row, the own one at the goal.

        Args:
            here: int64 ``[B]``.
            goals: int64 ``[B]``, of the same scans.

        Raises:
            ValueError: there is no way.
        """
        scan = np.searchsorted(self._starts, here, side="right") - 1
        found = np.full(len(here), -1, dtype=np.int64)
        for number in np.unique(scan):
            rows = np.flatnonzero(scan == number)
            hops, start = self._graphs[number].next_hops, self._starts[number]
            target = goals[rows] - start
            inside = (target >= 0) & (target < len(hops))
            step = hops[here[rows] - start, np.where(inside, target, 0)]
            found[rows] = np.where(inside & (step >= 0), step + start, -1)
        if (found < 0).any():
            row = int(np.argmax(found < 0))
            raise ValueError(f"row {row}: no way from viewpoint {here[row]} to {goals[row]}")
        return found


# ---- tables and batches


class WalkTable(NamedTuple):
    """Steps of walks, those of one walk consecutive, the last of each a STOP."""

    length: np.ndarray
    """int64 ``[P]``: steps, STOP included."""
    viewpoint: np.ndarray
    """int32 ``[N]``, the world's numbers."""
    view: np.ndarray
    """int16 ``[N]``: where the agent looks, 0 to 35."""
    action: np.ndarray
    """int16 ``[N]``: place in the follower's list of candidates, 0 for STOP."""
    target_view: np.ndarray
    """int16 ``[N]``: view of the candidate taken, -1 for STOP."""
    rel_heading: np.ndarray
    """float32 ``[N]``: of that candidate as the agent looks; 0 for STOP."""
    rel_elevation: np.ndarray
    """float32 ``[N]``: above the horizon; 0 for STOP."""

    @property
    def first(self) -> np.ndarray:
        """First step of each walk, int64 ``[P]``."""
        return np.cumsum(self.length) - self.length


def roll_walks(world: World, walks: Sequence[Walk], *, shortest: bool = True) -> WalkTable:
    """All steps of walks.

    Args:
        world: with all their scans.
        walks: of any number.
        shortest: along a shortest path between the ends, as the originals do; else along the path as written,
            for R4R and RxR, whose paths are not shortest.

    Raises:
        ValueError: a scan or viewpoint is unknown, or there is no way.
    """
    headings = np.array([walk.heading for walk in walks])
    parts: list[list[np.ndarray]] = []
    for first in range(0, len(walks), _BATCH):
        rows = walks[first : first + _BATCH]
        agents = PanoramicSimulator(world, batch_size=len(rows), order="follower")
        facing, paths = headings[first : first + _BATCH], _numbers(world, rows, ends_only=shortest)
        rolled = (
            roll_teacher(agents, paths[:, 0], paths[:, -1], facing)
            if shortest
            else roll_paths(agents, paths, facing)
        )
        for seen, action, active in rolled:
            row = np.flatnonzero(active)
            taken = (row, action[row])
            columns = (seen.point_id[taken], seen.rel_heading[taken], seen.rel_elevation[taken])
            parts.append([row + first, seen.viewpoint[row], seen.view[row], action[row], *columns])
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.zeros(0, np.int64)] * 7
    order = np.argsort(joined[0], kind="stable")  # from step by step to walk by walk
    kinds = (np.int32, np.int16, np.int16, np.int16, np.float32, np.float32)
    return WalkTable(
        np.bincount(joined[0], minlength=len(walks)),
        *(column[order].astype(kind) for column, kind in zip(joined[1:], kinds, strict=True)),
    )


def _numbers(world: World, walks: Sequence[Walk], *, ends_only: bool) -> np.ndarray:
    """Viewpoints of paths, int64 ``[P, S]``, the last one repeated behind the end."""
    # A viewpoint that stands twice in a row would look like a STOP.
    paths = [
        (walk.path[0], walk.path[-1])
        if ends_only
        else tuple(
            name for name, before in zip(walk.path, (None, *walk.path), strict=False) if name != before
        )
        for walk in walks
    ]
    longest = max(map(len, paths))
    return np.array(
        [
            [world.index(walk.scan_id, name) for name in (*path, *path[-1:] * (longest - len(path)))]
            for walk, path in zip(walks, paths, strict=True)
        ],
        dtype=np.int64,
    )


class PathBatch(NamedTuple):
    """Whole paths, as a speaker reads them."""

    actions: Tensor
    """float32 ``[B, S, D]``: views of the candidates taken; zeros for STOP and behind the end."""
    panoramas: Tensor
    """float32 ``[B, S, 36, D]``; zeros behind the end."""
    lengths: Tensor
    """int64 ``[B]``, STOP included."""


def path_batch(
    table: WalkTable, rows: Any, world: World, features: PanoramaFeatures, *, angle_size: int = 128,
    orientation: Orientation = "blocks",
) -> PathBatch:  # fmt: skip
    """Some walks with their views.

    Args:
        table: of `roll_walks`.
        rows: integers ``[B]``.
        world: that of the table.
        features: of its viewpoints.
        angle_size: orientation numbers of a view.
        orientation: their layout.
    """
    rows = np.asarray(rows, dtype=np.int64)
    length = table.length[rows]
    present = np.arange(length.max(initial=0)) < length[:, None]  # [B, S]
    steps = (table.first[rows][:, None] + np.arange(present.shape[1]))[present]
    places, back = np.unique(table.viewpoint[steps], return_inverse=True)
    scans, names = ([ids[place] for place in places] for ids in (world.scan_ids, world.viewpoint_ids))
    views = features.gather(scans, names)[back]  # [steps, 36, F]
    options: dict[str, Any] = {"size": angle_size, "layout": orientation}
    taken = candidate_views(
        views, table.target_view[steps][:, None], table.rel_heading[steps][:, None],
        table.rel_elevation[steps][:, None], **options,
    )[:, 0]  # fmt: skip
    seen = with_panorama_angles(views, table.view[steps], **options)
    actions = np.zeros((*present.shape, taken.shape[-1]), dtype=np.float32)
    panoramas = np.zeros((*present.shape, *seen.shape[1:]), dtype=np.float32)
    actions[present], panoramas[present] = taken, seen
    return PathBatch(torch.from_numpy(actions), torch.from_numpy(panoramas), torch.from_numpy(length))
