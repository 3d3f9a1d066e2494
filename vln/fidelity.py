"""Paths of whole batches as arrays: walking distances along and between them, alignment, coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vln.navgraph import NavGraph

_CHUNK = 1024
"""Paths whose pairwise distances are held at once."""


class Paths(NamedTuple):
    """Paths of different lengths, the last viewpoint repeated behind the end: that changes no distance."""

    nodes: np.ndarray
    """int64 ``[N, T]``."""
    lengths: np.ndarray
    """int64 ``[N]``: viewpoints of each."""

    @property
    def last(self) -> np.ndarray:
        """int64 ``[N]``: where each ends."""
        return self.nodes[:, -1]

    def without_repeats(self) -> Paths:
        """The same paths, each viewpoint once for as long as one stays there."""
        new = np.ones(self.nodes.shape, dtype=bool)
        new[:, 1:] = self.nodes[:, 1:] != self.nodes[:, :-1]
        order = np.argsort(~new, axis=1, kind="stable")
        nodes = np.take_along_axis(self.nodes, order, axis=1)
        lengths = new.sum(axis=1)
        inside = np.arange(nodes.shape[1]) < lengths[:, None]
        return Paths(np.where(inside, nodes, self.last[:, None]), lengths)


class PathTable:
    """Distance tables of several scans in one flat array, and the rows of a batch that belong to them.

    Args:
        graphs: of the scans.
        scan_ids: of the rows.

    Raises:
        ValueError: a scan has no graph.
    """

    def __init__(self, graphs: Mapping[str, NavGraph], scan_ids: Sequence[str]) -> None:
        used = list(dict.fromkeys(scan_ids))
        missing = [scan_id for scan_id in used if scan_id not in graphs]
        if missing:
            raise ValueError(
                f"no graph of scan {', '.join(missing[:3])}: load the graphs of all scans of the items"
            )
        self._graphs = [graphs[scan_id] for scan_id in scan_ids]
        tables = [graphs[scan_id].distances for scan_id in used]
        starts = np.cumsum([0, *(table.size for table in tables)])
        number = {scan_id: at for at, scan_id in enumerate(used)}
        rows = np.array([number[scan_id] for scan_id in scan_ids], dtype=np.int64)
        self._flat = np.concatenate([table.ravel() for table in tables]) if tables else np.zeros(0)
        self._starts = starts[rows]
        self._sizes = np.array([len(table) for table in tables], dtype=np.int64)[rows]

    def paths(
        self, names: Sequence[object], paths: Sequence[Sequence[str]], starts: Sequence[str] | None = None
    ) -> Paths:
        """Viewpoint ids to numbers, for every row.

        Raises:
            ValueError: a path is empty, begins elsewhere than it should, or passes a viewpoint that is not
                there or cannot be reached; the text names the row.
        """
        lengths = np.array([len(path) for path in paths], dtype=np.int64)
        if not lengths.all():
            raise ValueError(
                f"{names[int(np.argmin(lengths))]}: the path is empty, expected at least its start"
            )
        nodes = np.zeros((len(paths), lengths.max(initial=1)), dtype=np.int64)
        for row, (path, graph) in enumerate(zip(paths, self._graphs, strict=True)):
            if starts is not None and path[0] != starts[row]:
                raise ValueError(
                    f"{names[row]}: the path begins at {path[0]}, expected the item's start {starts[row]}"
                )
            try:
                numbers = [graph.index(viewpoint_id) for viewpoint_id in path]
            except ValueError as error:
                raise ValueError(f"{names[row]}: {error}") from error
            nodes[row, : len(numbers)] = numbers
            nodes[row, len(numbers) :] = numbers[-1]
        reachable = np.isfinite(self.between(nodes, nodes[:, :1]))
        if not reachable.all():
            row, step = np.argwhere(~reachable)[0]
            raise ValueError(f"{names[row]}: there is no way from {paths[row][0]} to {paths[row][step]}")
        return Paths(nodes, lengths)

    def between(self, source: np.ndarray, target: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Distances of viewpoints, float64; the first axis of both is the row, or one of the given rows."""
        extra = (1,) * (max(source.ndim, target.ndim) - 1)
        starts, sizes = (
            numbers[... if rows is None else rows].reshape(-1, *extra)
            for numbers in (self._starts, self._sizes)
        )
        return self._flat[starts + source * sizes + target]

    def hops(self, path: Paths) -> np.ndarray:
        """Distance of every step, float64 ``[N, T - 1]``."""
        return self.between(path.nodes[:, :-1], path.nodes[:, 1:])

    def lengths(self, path: Paths) -> np.ndarray:
        """Length of every path, float64 ``[N]``."""
        return self.hops(path).sum(axis=1)


def alignment(
    table: PathTable,
    path: Paths,
    reference: Paths,
    length: np.ndarray,
    reference_length: np.ndarray,
    radius: float,
) -> tuple[np.ndarray, np.ndarray]:
    """DTW and CLS of every row, float64 ``[N]``."""
    dtw, coverage = np.zeros(len(length)), np.zeros(len(length))
    # Rows of about one length together: little of a chunk is padding.
    order = np.argsort(path.lengths, kind="stable")
    for rows in np.array_split(order, max(1, -(-len(order) // _CHUNK))):
        wide = int(path.lengths[rows].max(initial=1))
        distances = table.between(path.nodes[rows, :wide, None], reference.nodes[rows, None, :], rows)
        dtw[rows] = dtw_costs(distances, path.lengths[rows], reference.lengths[rows])
        near = np.exp(-distances.min(axis=1) / radius)
        inside = np.arange(near.shape[1]) < reference.lengths[rows, None]
        coverage[rows] = np.where(inside, near, 0.0).sum(axis=1) / reference.lengths[rows]
    expected = coverage * reference_length
    return dtw, coverage * share(expected, expected + np.abs(expected - length))


def dtw_costs(distances: np.ndarray, lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
    """Cost of the cheapest monotone alignment of every row, float64 ``[N]``.

    Args:
        distances: ``[N, T, R]``, of every viewpoint passed to every one of the reference.
        lengths: ``[N]``, viewpoints passed.
        reference_lengths: ``[N]``.
    """
    number, steps, width = distances.shape
    costs = np.ascontiguousarray(distances.transpose(1, 2, 0))  # [T, R, N]
    result, each = np.zeros(number), np.arange(number)
    before = np.full((width + 1, number), np.inf)
    before[0] = 0.0
    for step in range(steps):
        now = np.full((width + 1, number), np.inf)
        for place in range(1, width + 1):
            cheapest = np.minimum(np.minimum(before[place], before[place - 1]), now[place - 1])
            now[place] = costs[step, place - 1] + cheapest
        ends = lengths == step + 1
        result[ends] = now[reference_lengths[ends], each[ends]]
        before = now
    return result


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, and 1 where both are 0: nothing was needed and nothing done."""
    return np.divide(part, whole, out=np.ones_like(part), where=whole != 0)
