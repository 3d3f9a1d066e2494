"""All loaded scans in one numbering, and what is seen from each of their views, as tables to gather from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vln.geometry import (
    NUM_HEADINGS,
    NUM_VIEWS,
    VIEW_ELEVATIONS,
    VIEW_HEADINGS,
    Camera,
    Look,
    Offsets,
    look,
    offsets_between,
)
from vln.navgraph import NavGraph


class ViewTable(NamedTuple):
    """One record for every viewpoint and view, in that order."""

    records: np.ndarray
    """``[V * 36]`` of :func:`record_type`."""
    slots: int
    """Longest list of navigable locations, the own one included."""


class CandidateTable(NamedTuple):
    """For every viewpoint its neighbours, each with the view that shows it best; padded with -1 and 0.

    The order is that of first sight in a sweep through views 0 to 35 (EnvDrop, Tan et al., 2019).
    """

    num_candidates: np.ndarray
    """int32 ``[V]``."""
    viewpoint: np.ndarray
    """int32 ``[V, C]``."""
    point_id: np.ndarray
    """int32 ``[V, C]``: the view with the neighbour nearest to its middle."""
    slot: np.ndarray
    """int32 ``[V, C]``: the neighbour's place in the list of that view."""
    heading: np.ndarray
    """float64 ``[V, C]``, absolute and not wrapped: about -15° to 375°."""
    elevation: np.ndarray
    """float64 ``[V, C]``, absolute."""
    distance: np.ndarray
    """float64 ``[V, C]``, radians from the middle of the view."""


class FollowerTable(NamedTuple):
    """Order of the same candidates by |heading| as seen with each heading (speaker-follower, Fried et al.,
    2018).

    Row ``12 * viewpoint + k`` belongs to heading ``k * 30°``, where the sweep starts, so that ties may take
    another view.
    """

    position: np.ndarray
    """int32 ``[V * 12, C]``: place in the candidate table."""
    point_id: np.ndarray
    """int32 ``[V * 12, C]``."""
    slot: np.ndarray
    """int32 ``[V * 12, C]``."""


class World:
    """Scans and the numbering of their viewpoints: a scan's viewpoints are consecutive, in the order of its
    file.

    Tables are built on first use, for each camera once, and shared by all simulators of the world. For the 90
    scans of Matterport3D the view table takes 81 MB (restricted) or 120 MB.

    Args:
        graphs: of the scans; a mapping's keys are not looked at.

    Raises:
        ValueError: there is no graph, or two of one scan.
    """

    def __init__(self, graphs: Mapping[str, NavGraph] | Iterable[NavGraph]) -> None:
        listed = list(graphs.values() if isinstance(graphs, Mapping) else graphs)
        self.graphs: dict[str, NavGraph] = {graph.scan_id: graph for graph in listed}
        if not listed or len(self.graphs) != len(listed):
            raise ValueError(
                f"{len(listed)} graphs of {len(self.graphs)} scans: give one for each scan, at least one"
            )
        sizes = [len(graph.viewpoint_ids) for graph in listed]
        self.starts = dict(zip(self.graphs, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        """Scan ids to the number of their first viewpoint."""
        self.viewpoint_ids: tuple[str, ...] = tuple(name for graph in listed for name in graph.viewpoint_ids)
        self.scan_ids: tuple[str, ...] = tuple(
            graph.scan_id for graph, size in zip(listed, sizes, strict=True) for _ in range(size)
        )
        """Of every viewpoint."""
        self.included = np.concatenate([graph.included for graph in listed])
        """bool ``[V]``."""
        self._views: dict[Camera, ViewTable] = {}
        self._candidates: dict[Camera, CandidateTable] = {}
        self._followers: dict[Camera, FollowerTable] = {}

    def graph(self, scan_id: str) -> NavGraph:
        """Graph of a scan.

        Raises:
            ValueError: no such scan is loaded.
        """
        if scan_id not in self.graphs:
            raise ValueError(f"scan {scan_id} is not loaded: there are {len(self.graphs)} others")
        return self.graphs[scan_id]

    def index(self, scan_id: str, viewpoint_id: str) -> int:
        """Number of a viewpoint one can be at.

        Raises:
            ValueError: scan or viewpoint is unknown, or the viewpoint is excluded.
        """
        number = self.starts.get(scan_id, 0) + self.graph(scan_id).index(viewpoint_id)
        if not self.included[number]:
            raise ValueError(f"viewpoint {viewpoint_id} of scan {scan_id} is excluded: nobody can be there")
        return number

    @cached_property
    def _positions(self) -> np.ndarray:
        """float32 ``[V, 3]``, as the simulator rounds them."""
        return np.concatenate([graph.positions for graph in self.graphs.values()]).astype(np.float32)

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of every edge in the common numbering, int64 ``[E]``, ascending."""
        parts = [graph.edges.astype(np.int64) + self.starts[name] for name, graph in self.graphs.items()]
        edges = np.concatenate(parts)
        return edges[:, 0], edges[:, 1]

    @cached_property
    def neighbours(self) -> np.ndarray:
        """int32 ``[V, K]``: numbers of the viewpoints one can walk to, ascending, then -1."""
        source, target = self._edges
        degree = np.bincount(source, minlength=len(self.viewpoint_ids))
        table = np.full((len(degree), max(1, degree.max(initial=0))), -1, dtype=np.int32)
        table[source, _ranks(source)] = target
        return table

    @cached_property
    def neighbour_offsets(self) -> Offsets:
        """Ways to the neighbours, ``[V, K]``; those of -1 mean nothing."""
        here = self._positions[:, None, :]
        return offsets_between(here, self._positions[self.neighbours])

    def views(self, camera: Camera) -> ViewTable:
        """Records of all 36 views of all viewpoints."""
        if camera not in self._views:
            self._views[camera] = self._build_views(camera)
        return self._views[camera]

    def _sweep(self, camera: Camera) -> tuple[Offsets, Look]:
        """Every edge from every view, ``[E, 36]``."""
        source, target = self._edges
        offsets = offsets_between(self._positions[source], self._positions[target])
        column = Offsets(*(field[:, None] for field in offsets))
        # The heading alone decides on all but the elevation: 12 of them do for 36 views.
        headings = look(column, VIEW_HEADINGS[:NUM_HEADINGS], np.zeros(NUM_HEADINGS), camera)
        rel_elevation = offsets.elevation[:, None] - VIEW_ELEVATIONS
        return offsets, Look(np.tile(headings.rel_heading, 3), rel_elevation, np.tile(headings.navigable, 3))

    def _build_views(self, camera: Camera) -> ViewTable:
        source, target = self._edges
        offsets, seen = self._sweep(camera)
        edge, view = np.nonzero(seen.navigable)
        state = source[edge] * NUM_VIEWS + view
        rel_heading, rel_elevation = seen.rel_heading[edge, view], seen.rel_elevation[edge, view]
        order = np.lexsort((target[edge], _deviation(rel_heading, rel_elevation), state))
        state, edge = state[order], edge[order]
        place = _ranks(state) + 1  # the own location comes first
        size = len(self.viewpoint_ids)
        count = 1 + np.bincount(state, minlength=size * NUM_VIEWS)
        slots = int(count.max())
        records = np.zeros(size * NUM_VIEWS, dtype=record_type(slots))
        records["viewpoint"] = np.repeat(np.arange(size), NUM_VIEWS)
        records["view"] = np.tile(np.arange(NUM_VIEWS), size)
        records["heading"] = np.tile(VIEW_HEADINGS, size)
        records["elevation"] = np.tile(VIEW_ELEVATIONS, size)
        records["num_navigable"] = count
        records["neighbour"] = -1
        records["neighbour"][:, 0] = records["viewpoint"]
        records["neighbour"][state, place] = target[edge]
        records["rel_heading"][state, place] = rel_heading[order]
        records["rel_elevation"][state, place] = rel_elevation[order]
        records["rel_distance"][state, place] = offsets.distance[edge]
        return ViewTable(records, slots)

    def candidates(self, camera: Camera) -> CandidateTable:
        """Neighbours of all viewpoints with the views that show them best, in closed form.

        A neighbour that none of the 36 views shows (a camera narrower than 30°) is no candidate.
        """
        if camera not in self._candidates:
            self._candidates[camera] = self._build_candidates(camera)
        return self._candidates[camera]

    def _build_candidates(self, camera: Camera) -> CandidateTable:
        source, target = self._edges
        _, seen = self._sweep(camera)
        edge, point_id, _ = self._first_sight(seen, 0)
        place = _ranks(source[edge])
        size = len(self.viewpoint_ids)
        count = np.bincount(source[edge], minlength=size).astype(np.int32)
        rel_heading, rel_elevation = seen.rel_heading[edge, point_id], seen.rel_elevation[edge, point_id]
        table = CandidateTable(
            count,
            *(np.full((size, max(1, count.max(initial=0))), -1, dtype=np.int32) for _ in range(3)),
            *(np.zeros((size, max(1, count.max(initial=0)))) for _ in range(3)),
        )
        values = (
            target[edge],
            point_id,
            self._slots(camera, source[edge], target[edge], point_id),
            VIEW_HEADINGS[point_id] + rel_heading,
            VIEW_ELEVATIONS[point_id] + rel_elevation,
            _deviation(rel_heading, rel_elevation),
        )
        for field, value in zip(table[1:], values, strict=True):
            field[source[edge], place] = value
        return table

    def followers(self, camera: Camera) -> FollowerTable:
        """The order of the candidates for every heading."""
        if camera not in self._followers:
            self._followers[camera] = self._build_followers(camera)
        return self._followers[camera]

    def _build_followers(self, camera: Camera) -> FollowerTable:
        source, target = self._edges
        table = self.candidates(camera)
        _, seen = self._sweep(camera)
        size, width = table.viewpoint.shape
        in_table = np.zeros(len(source), dtype=np.int64)
        base_edges = self._first_sight(seen, 0)[0]
        in_table[base_edges] = _ranks(source[base_edges])
        result = FollowerTable(*(np.full((size * NUM_HEADINGS, width), -1, dtype=np.int32) for _ in range(3)))
        for k in range(NUM_HEADINGS):
            edge, point_id, turn = self._first_sight(seen, k)
            relative = turn + seen.rel_heading[edge, point_id]
            relative = np.abs(np.where(relative > np.pi, relative - 2 * np.pi, relative))
            order = np.lexsort((relative, source[edge]))  # stable: ties keep the order of first sight
            edge, point_id = edge[order], point_id[order]
            row, place = source[edge] * NUM_HEADINGS + k, _ranks(source[edge])
            result.position[row, place] = in_table[edge]
            result.point_id[row, place] = point_id
            result.slot[row, place] = self._slots(camera, source[edge], target[edge], point_id)
        return result

    def _first_sight(self, seen: Look, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges in the order in which a sweep sees them, with their best views.

        The sweep begins with heading ``start`` of the lowest row and passes that row's twelve headings, then
        the next.

        Returns:
            Edges by source and then by first sight; the best view of each; the right turn from the sweep's
            first heading to it.
        """
        source, target = self._edges
        row, turn = np.divmod(np.arange(NUM_VIEWS), NUM_HEADINGS)
        swept = NUM_HEADINGS * row + (start + turn) % NUM_HEADINGS
        deviation = _deviation(seen.rel_heading[:, swept], seen.rel_elevation[:, swept])
        deviation = np.where(seen.navigable[:, swept], deviation, np.inf)
        first, best = seen.navigable[:, swept].argmax(axis=1), deviation.argmin(axis=1)
        at_first = np.take_along_axis(deviation, first[:, None], axis=1)[:, 0]
        edges = np.lexsort((target, at_first, first, source))
        edges = edges[seen.navigable[edges].any(axis=1)]
        return edges, swept[best[edges]], VIEW_HEADINGS[best[edges]]

    def _slots(self, camera: Camera, source: np.ndarray, target: np.ndarray, view: np.ndarray) -> np.ndarray:
        lists = self.views(camera).records["neighbour"][source * NUM_VIEWS + view]
        # A neighbour's place in the list, which holds every navigable one once.
        return (lists == target[:, None]).argmax(axis=1)


def record_type(slots: int) -> np.dtype:
    """Layout of what a simulator knows in one state: wide fields first, a whole number of 8 bytes."""
    fields = [
        ("heading", np.float64, ()),
        ("elevation", np.float64, ()),
        ("rel_elevation", np.float64, (slots,)),
        ("viewpoint", np.int32, ()),
        ("view", np.int32, ()),
        ("num_navigable", np.int32, ()),
        ("neighbour", np.int32, (slots,)),
        ("rel_heading", np.float32, (slots,)),
        ("rel_distance", np.float32, (slots,)),
    ]
    return np.dtype(fields, align=True)


def _deviation(rel_heading: np.ndarray, rel_elevation: np.ndarray) -> np.ndarray:
    """How far from the middle of the view, which sorts the locations; float64 radians."""
    wide = rel_heading.astype(np.float64)
    return np.sqrt(wide * wide + rel_elevation * rel_elevation)


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Place of every entry within its run of equal values, ``groups`` being ascending."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else groups
    lengths = np.diff(np.r_[starts, len(groups)])
    return np.arange(len(groups)) - np.repeat(starts, lengths)
