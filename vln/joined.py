"""R4R: R2R paths joined to longer ones that are not the shortest way (Jain et al., 2019)."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vln.items import R2RItem
from vln.navgraph import NavGraph

JOIN_DISTANCE_M = 3.0


def join_paths(
    items: Sequence[R2RItem], graphs: Mapping[str, NavGraph], *, join_distance_m: float = JOIN_DISTANCE_M
) -> Iterator[R2RItem]:
    """Every pair (A, B) of a scan where B begins near A's end.

    The path is A, the shortest way to B's start, and B; its instructions are those of A, each followed by
    each of B's; ``path_id`` is ``A_B``, the heading that of A, the distance the length on the graph.

    Args:
        items: R2R items of one split, with whole paths.
        graphs: of their scans.
        join_distance_m: longest way between the two, inclusive.

    Raises:
        ValueError: a scan has no graph, or an item has no whole path.
    """
    scans: dict[str, list[R2RItem]] = defaultdict(list)
    for item in items:
        if item.scan_id not in graphs:
            raise ValueError(f"no graph of scan {item.scan_id}: load the graphs of all scans of the items")
        if len(item.path) < 2:
            raise ValueError(f"item {item.path_id} has its start alone: a test split cannot be joined")
        scans[item.scan_id].append(item)
    for scan_id, listed in scans.items():
        graph = graphs[scan_id]
        ends = [graph.index(item.path[-1]) for item in listed]
        starts = [graph.index(item.path[0]) for item in listed]
        near = graph.distances[ends][:, starts] <= join_distance_m
        for number, first in enumerate(listed):
            for other in near[number].nonzero()[0].tolist():
                if other != number:
                    yield _join(first, listed[other], graph)


def _join(first: R2RItem, second: R2RItem, graph: NavGraph) -> R2RItem:
    between = graph.shortest_path(first.path[-1], second.path[0])
    path = (*first.path, *between[1:], *second.path[1:])
    hops = itertools.pairwise(path)
    length = sum(float(graph.distances[graph.index(a), graph.index(b)]) for a, b in hops)
    return R2RItem(
        path_id=f"{first.path_id}_{second.path_id}",
        scan_id=first.scan_id,
        heading=first.heading,
        path=path,
        instructions=tuple(f"{a} {b}" for a in first.instructions for b in second.instructions),
        distance=round(length, 2),
    )


def write_r2r(path: str | Path, items: Iterable[R2RItem]) -> None:
    """Write items in the form of R2R, under a temporary name first.

    Args:
        path: the JSON file; its folder must exist.
        items: R2R or R4R items.

    Raises:
        OSError: the folder is missing or not writable.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps([_row(item) for item in items]), encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _row(item: R2RItem) -> dict[str, Any]:
    row: dict[str, Any] = {
        "path_id": item.path_id,
        "scan": item.scan_id,
        "heading": item.heading,
        "path": list(item.path),
        "instructions": list(item.instructions),
    }
    return row if item.distance is None else row | {"distance": item.distance}
