"""Paths that nobody described: shortest ones between random viewpoints, filtered as R2R's are.

Letters of shapes: V viewpoints of a scan, P pairs that pass the filter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vln.draws import uniforms
from vln.navgraph import NavGraph

_ORDER, _HEADINGS = 100, 101
"""Purposes of draws, beside those of `vln.draws`."""


@dataclass(frozen=True, kw_only=True)
class PathFilter:
    """Which paths count; the defaults are R2R's (Anderson et al., 2018, Sec. 4.2).

    Raises:
        ValueError: a number is outside its range.
    """

    min_edges: int = 4
    max_edges: int = 6
    min_distance_m: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_edges <= self.max_edges or not self.min_distance_m >= 0:
            raise ValueError(
                f"min_edges is {self.min_edges}, max_edges {self.max_edges}, min_distance_m "
                f"{self.min_distance_m}: give at least 1, at least min_edges, at least 0"
            )


class SampledPath(NamedTuple):
    """A path to describe."""

    scan_id: str
    path: tuple[str, ...]
    """Viewpoint ids."""
    heading: float
    """At the start, radians, to three decimals."""
    distance_m: float
    """To two decimals, as R2R states it."""


Ends = tuple[str, str, str]
"""Scan, first and last viewpoint."""


class PathSource:
    """All pairs of viewpoints whose shortest path passes a filter, in a random order.

    Args:
        graphs: of the scans that may be sampled; their order counts.
        taken: ends of paths that must not be sampled, in this direction.
        chosen: the filter.

    Example:
        >>> points = np.array([[3.0 * x, 0, 0] for x in range(6)])
        >>> edges = np.array([(a, b) for a in range(6) for b in range(6) if abs(a - b) == 1])
        >>> graph = NavGraph("hall", tuple("abcdef"), points, np.ones(6, bool), edges)
        >>> source = PathSource({"hall": graph}, taken={("hall", "a", "e")})
        >>> len(source), source.sample(1, seed=1)[0].path
        (5, ('e', 'd', 'c', 'b', 'a'))
    """

    def __init__(
        self,
        graphs: Mapping[str, NavGraph],
        *,
        taken: Collection[Ends] = (),
        chosen: PathFilter | None = None,
    ) -> None:
        self._graphs = list(graphs.values())
        self._pairs = [_pairs(graph, chosen or PathFilter(), taken) for graph in self._graphs]
        self._starts = np.cumsum([0, *(len(pairs) for pairs in self._pairs)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, count: int, *, seed: int) -> list[SampledPath]:
        """Different paths with headings; a larger sample begins with a smaller one of the same seed.

        Args:
            count: how many.
            seed: of order and headings.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"{count} paths were asked for but {len(self)} of {len(self._graphs)} scans pass the filter: "
                "give 1 to so many, or a wider filter"
            )
        # Not NumPy's own permutation, which another version may draw otherwise.
        drawn = uniforms(seed, _ORDER, 0, np.arange(len(self)), 1)[:, 0]
        headings = uniforms(seed, _HEADINGS, 0, np.arange(count), 1)[:, 0] * 2 * np.pi
        order = np.argsort(drawn, kind="stable")[:count]
        return [self._path(int(pair), float(heading)) for pair, heading in zip(order, headings, strict=True)]

    def _path(self, pair: int, heading: float) -> SampledPath:
        scan = int(np.searchsorted(self._starts, pair, side="right")) - 1
        graph = self._graphs[scan]
        start, goal = self._pairs[scan][pair - self._starts[scan]]
        names = graph.shortest_path(graph.viewpoint_ids[start], graph.viewpoint_ids[goal])
        return SampledPath(
            graph.scan_id, tuple(names), round(heading, 3), round(float(graph.distances[start, goal]), 2)
        )


def _pairs(graph: NavGraph, chosen: PathFilter, taken: Collection[Ends]) -> np.ndarray:
    """Start and goal of what passes, int64 ``[P, 2]``."""
    edges = num_edges(graph, most=chosen.max_edges)
    passes = (edges >= chosen.min_edges) & (graph.distances >= chosen.min_distance_m)
    for scan_id, start, goal in taken:
        if scan_id == graph.scan_id:
            passes[graph.index(start), graph.index(goal)] = False
    return np.argwhere(passes)


def num_edges(graph: NavGraph, *, most: int) -> np.ndarray:
    """Edges of the shortest path (by metres) of every pair, int64 ``[V, V]``; -1 for none or too many."""
    hops = graph.next_hops
    goal = np.arange(len(hops))[None]
    here = np.where(hops < 0, -1, np.arange(len(hops))[:, None])
    found = np.full(hops.shape, -1, dtype=np.int64)
    for count in range(most + 1):
        found[(found < 0) & (here == goal)] = count
        here = np.where(here < 0, -1, hops[here, goal])
    return found
