"""Items held against the graphs: what cannot be walked is a fault, what merely looks odd a warning."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Literal, NamedTuple

import numpy as np

from vln.items import Dialogue, HannaRoute, HannaTask, Item, NDHItem, R2RItem, RxRItem, item_id
from vln.navgraph import NavGraph

DISTANCE_TOLERANCE_M = 0.01
"""Stated lengths have two decimals."""


class Finding(NamedTuple):
    """One thing that is wrong, or odd, with an item."""

    kind: Literal["scan", "viewpoint", "gap", "start", "distance"]
    serious: bool
    """A fault; otherwise a warning: the item can be used."""
    origin: str
    """File the item is from."""
    item_id: int | str
    text: str

    def __str__(self) -> str:
        return f"{self.origin}: item {self.item_id}: {self.text}"


def validate(
    items: Sequence[Item], graphs: Mapping[str, NavGraph], *, origin: str = "items"
) -> list[Finding]:
    """Hold items against the graphs of their scans.

    Args:
        items: of one task.
        graphs: scan ids to graphs. A scan that is not among them is unknown.
        origin: the items' file, for the texts.

    Returns:
        For each item its first fault: an unknown scan, a viewpoint that is unknown, excluded or of another
        scan, two viewpoints in a row without an edge, or paths that do not begin at the start. An R2R path
        whose length is more than 0.01 m off what is stated has a warning.

    Example:
        >>> validate([R2RItem(7, "attic", 0.0, ("a",), ("Go.",), None)], {}, origin="mine.json")[0].text
        'scan attic is unknown: there are graphs of 0 scans'
    """
    known = {scan_id: frozenset(graph.viewpoint_ids) for scan_id, graph in graphs.items()}
    findings = []
    for item in items:
        found = next(_findings(item, graphs, known), None)
        if found is not None:
            kind, text = found
            findings.append(Finding(kind, kind != "distance", origin, item_id(item), text))
    return findings


def warn_of_findings(
    splits: Mapping[str, Sequence[Item]], graphs: Mapping[str, NavGraph], *, file: str = ""
) -> None:
    """Say of splits that are about to be used what does not fit their graphs: one warning for each.

    Args:
        splits: names to items, of one task.
        graphs: scan ids to graphs.
        file: that the items are from, if they are of no split.
    """
    for name, items in splits.items():
        findings = validate(items, graphs, origin=file or f"split {name}")
        if findings:
            more = f"; {len(findings) - 1} more items are odd" if len(findings) > 1 else ""
            warnings.warn(f"{findings[0]}{more} (python -m vln.convert check lists all)", stacklevel=3)


def instruction_counts(items: Iterable[R2RItem | RxRItem | HannaTask]) -> dict[int, int]:
    """How many items have how many instructions; R2R has three of them for each path, with 15 exceptions."""
    return dict(sorted(Counter(len(item.instructions) for item in items).items()))


_Found = tuple[Literal["scan", "viewpoint", "gap", "start", "distance"], str]


def _findings(item: Item, graphs: Mapping[str, NavGraph], known: Mapping[str, Set[str]]) -> Iterator[_Found]:
    if item.scan_id not in graphs:
        yield "scan", f"scan {item.scan_id} is unknown: there are graphs of {len(graphs)} scans"
        return
    graph = graphs[item.scan_id]
    paths = _paths(item)
    for name, path in paths.items():
        yield from _unknown(name, path, graph, known)
    walked = {name: path for name, path in paths.items() if name not in ("start", "end_panos")}
    for name, path in walked.items():
        yield from _gaps(name, path, graph)
    starts = {name: path[0] for name, path in walked.items() if path and name != "nav_history"}
    start = item.start if isinstance(item, NDHItem | Dialogue) else next(iter(starts.values()), None)
    for name, first in starts.items():
        if first != start:
            yield "start", f"{name} begins at {first}, expected the start {start}"
    if isinstance(item, R2RItem) and item.distance is not None and len(item.path) > 1:
        places = graph.positions[[graph.index(name) for name in item.path]]
        length = float(np.linalg.norm(np.diff(places, axis=0), axis=1).sum())
        if abs(length - item.distance) > DISTANCE_TOLERANCE_M:
            yield "distance", f"{item.distance:.2f} m are stated but its path is {length:.2f} m on the graph"


def _paths(item: Item) -> dict[str, tuple[str, ...]]:
    """Viewpoints of an item by the field they are in."""
    if isinstance(item, R2RItem | RxRItem | HannaRoute):
        return {"path": item.path}
    if isinstance(item, HannaTask):
        return {f"paths[{number}]": path for number, path in enumerate(item.paths)}
    named = {"start": (item.start,), "end_panos": item.end_panos}
    if isinstance(item, Dialogue):
        return named | {"nav_steps": item.nav_steps, "planner_nav_steps": item.planner_nav_steps}
    return named | {
        "planner_path": item.planner_path,
        "player_path": item.player_path,
        "nav_history": item.nav_history,
    }


def _unknown(
    name: str, path: Sequence[str], graph: NavGraph, known: Mapping[str, Set[str]]
) -> Iterator[_Found]:
    for step, viewpoint_id in enumerate(path):
        place, scan_id = f"{name}[{step}]", graph.scan_id
        if viewpoint_id in known[scan_id]:
            if not graph.included[graph.index(viewpoint_id)]:
                yield "viewpoint", f"{place}: viewpoint {viewpoint_id} of scan {scan_id} is excluded"
            continue
        others = [other for other, names in known.items() if viewpoint_id in names]
        if others:
            yield "viewpoint", f"{place}: viewpoint {viewpoint_id} is of scan {others[0]}, not of {scan_id}"
        else:
            yield "viewpoint", f"{place}: scan {scan_id} has no viewpoint {viewpoint_id}"


def _gaps(name: str, path: Sequence[str], graph: NavGraph) -> Iterator[_Found]:
    for step, (before, after) in enumerate(itertools.pairwise(path), start=1):
        if before != after and not graph.has_edge(before, after):
            yield "gap", f"{name} has a gap at step {step}: one cannot walk from {before} to {after}"
