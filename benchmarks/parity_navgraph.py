"""Parity of the navigation graphs and their simulator with the original Matterport3D Simulator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.golden import EXACT, Case, Tolerance
from vln.geometry import VIEW_ELEVATIONS, VIEW_HEADINGS, Camera, nearest_view, wrap_heading
from vln.navgraph import NavGraph, load_graphs
from vln.simulator import Simulator, State
from vln.sources import parse_json, read_document
from vln.world import World

REL_HEADING = Tolerance(0.0, 0.0, 5e-7)
REL_ELEVATION = Tolerance(0.0, 0.0, 1e-12)
CANDIDATE_ANGLE = Tolerance(0.0, 0.0, 1e-6)
METRES = Tolerance(0.0, 0.0, 1e-9)


def check(case: Case, places: Sequence[Path]) -> None:
    """One file: walks, snapped poses, candidates, shortest paths, or random episodes.

    Args:
        case: the file.
        places: where connectivity may lie, in order.
    """
    if case.path.suffix == ".json":
        _check_random_episodes(case, places)
    elif "nav_ptr" in case.arrays:
        _check_walks(case, places)
    elif "cand_ptr" in case.arrays:
        _check_candidates(case, places)
    elif "disc_view" in case.arrays:
        _check_snap(case)
    else:
        _check_shortest_paths(case, places)


def find_graphs(scan_ids: Iterable[str], places: Sequence[Path]) -> dict[str, NavGraph]:
    """Graphs from the first place that has all of the scans.

    Raises:
        FileNotFoundError: none has; the text says what each lacks.
    """
    wanted, lacks = list(dict.fromkeys(scan_ids)), []
    for place in places:
        try:
            return load_graphs(place, wanted)
        except FileNotFoundError as error:
            lacks.append(str(error))
    raise FileNotFoundError("; ".join(lacks))


def array(values: Any) -> torch.Tensor:
    """NumPy array or list as a tensor to compare."""
    return torch.from_numpy(np.array(values))


class _Walk(NamedTuple):
    """What a replay found, concatenated over all states of the file."""

    nav_ptr: list[int]
    states: dict[str, list[np.ndarray]]
    lists: dict[str, list[np.ndarray]]


def _check_walks(case: Case, places: Sequence[Path]) -> None:
    names = "config episode row t scan act_index act_heading act_elevation in_heading in_elevation"
    inputs = {name: case.use(name).numpy() for name in names.split()}
    scan_ids = case.meta["scans"]
    world = World(find_graphs(scan_ids, places))
    found = _Walk([0], {name: [] for name in ("ix", "heading", "elevation", "view", "step")}, {})
    found.lists.update({f"nav_{name}": [] for name in ("ix", "rel_heading", "rel_elevation", "rel_distance")})
    start_of = np.array([world.starts[scan_id] for scan_id in scan_ids])[inputs["scan"]]
    viewpoint = start_of + case.arrays["ix"]
    simulators = {config["id"]: _simulator(world, config) for config in case.meta["configs"]}
    # The file is in the order of configuration, episode, time and row.
    moments = np.flatnonzero(inputs["row"] == 0)
    for first, last in zip(moments, [*moments[1:], len(viewpoint)], strict=True):
        rows = slice(first, last)
        simulator = simulators[int(inputs["config"][first])]
        if inputs["t"][first] == 0:
            state = simulator.place(viewpoint[rows], inputs["in_heading"][rows], inputs["in_elevation"][rows])
        else:
            before = slice(first - (last - first), first)
            state = simulator.step(
                *(inputs[f"act_{name}"][before] for name in ("index", "heading", "elevation"))
            )
        _record(found, state, start_of[rows])
    for name, values in (found.states | found.lists).items():
        tolerance = {"nav_rel_heading": REL_HEADING, "nav_rel_elevation": REL_ELEVATION}.get(name, EXACT)
        case.compare(name, array(np.concatenate(values)), tolerance)
    case.compare("nav_ptr", array(found.nav_ptr), EXACT)


def _simulator(world: World, config: dict[str, Any]) -> Simulator:
    camera = Camera(
        width=config["width"],
        height=config["height"],
        vfov=config["vfov"],
        restricted=bool(config["restricted"]),
        elevation_limits=tuple(config["elevation_limits"]),
    )
    return Simulator(
        world, batch_size=config["batch"], camera=camera, discretized=bool(config["discretized"])
    )


def _record(found: _Walk, state: State, starts: np.ndarray) -> None:
    found.states["ix"].append(state.viewpoint - starts)
    for name in ("heading", "elevation", "view"):
        found.states[name].append(getattr(state, name))
    found.states["step"].append(np.full(len(starts), state.step))
    for row, count in enumerate(state.num_navigable):
        found.nav_ptr.append(found.nav_ptr[-1] + int(count))
        found.lists["nav_ix"].append(state.neighbour[row, :count] - starts[row])
        for name in ("rel_heading", "rel_elevation", "rel_distance"):
            found.lists[f"nav_{name}"].append(getattr(state, name)[row, :count])


def _check_snap(case: Case) -> None:
    heading, elevation = case.use("in_heading").numpy(), case.use("in_elevation").numpy()
    view = nearest_view(heading, elevation)
    case.compare("disc_view", array(view), EXACT)
    case.compare("disc_heading", array(VIEW_HEADINGS[view]), EXACT)
    case.compare("disc_elevation", array(VIEW_ELEVATIONS[view]), EXACT)
    case.compare("cont_heading", array(wrap_heading(heading)), EXACT)
    case.compare("cont_elevation", array(np.clip(elevation, *Camera().elevation_limits)), EXACT)


def _check_candidates(case: Case, places: Sequence[Path]) -> None:
    meta, scan, ix = case.meta, case.use("scan").numpy(), case.use("ix").numpy()
    world = World(find_graphs(meta["scans"], places))
    camera = Camera(width=meta["width"], height=meta["height"], vfov=math.radians(meta["vfov_degrees"]))
    table = world.candidates(camera)
    starts = np.array([world.starts[scan_id] for scan_id in meta["scans"]])[scan]
    viewpoint = starts + ix
    counts = table.num_candidates[viewpoint]
    listed = np.arange(table.viewpoint.shape[1]) < counts[:, None]
    case.compare("cand_ptr", array(np.cumsum([0, *counts])), EXACT)
    case.compare("cand_ix", array((table.viewpoint[viewpoint] - starts[:, None])[listed]), EXACT)
    case.compare("cand_point_id", array(table.point_id[viewpoint][listed]), EXACT)
    case.compare("cand_idx", array(table.slot[viewpoint][listed]), EXACT)
    case.compare("cand_normalized_heading", array(table.heading[viewpoint][listed]), CANDIDATE_ANGLE)
    case.compare("cand_elevation", array(table.elevation[viewpoint][listed]), CANDIDATE_ANGLE)
    # It is the root of squared angles, so it has their tolerance.
    case.compare("cand_distance", array(table.distance[viewpoint][listed]), CANDIDATE_ANGLE)


def _check_shortest_paths(case: Case, places: Sequence[Path]) -> None:
    graphs = find_graphs(case.meta["scans"], places)
    for scan_id, graph in graphs.items():
        linked = np.unique(graph.edges[graph.included[graph.edges].all(axis=1)])
        grid = np.ix_(linked, linked)
        distances, hops = graph.distances[grid], graph.next_hops[grid]
        case.compare(f"{scan_id}_nodes", array(linked), EXACT)
        case.compare(f"{scan_id}_dist", array(distances), METRES)
        case.compare(f"{scan_id}_next", array(hops), EXACT)
        ids = [graph.viewpoint_ids[index] for index in linked]
        num_hops = np.array([[len(graph.shortest_path(a, b)) - 1 for b in ids] for a in ids])
        case.compare(f"{scan_id}_hops", array(num_hops), EXACT)
        facts = {
            "viewpoints": len(graph.viewpoint_ids),
            "included": int(graph.included.sum()),
            "graph_nodes": len(linked),
            "edges": int(graph.included[graph.edges].all(axis=1).sum()) // 2,
            "isolated_included": int(graph.included.sum()) - len(linked),
            "components": len(np.unique(np.isfinite(distances), axis=0)),
            "diameter_m": distances.max(),
            "mean_distance_m": distances[~np.eye(len(linked), dtype=bool)].mean(),
            "max_hops": int(num_hops.max()),
        }
        for name, value in facts.items():
            case.compare_number(f"meta.{scan_id}.{name}", value, case.meta[scan_id][name], METRES)


class ReferenceRandom:
    """The original's generator: x becomes 16807 x modulo 2^31 - 1.

    Args:
        seed: any integer of 64 bits; 0 counts as 1.
    """

    modulus = 2**31 - 1

    def __init__(self, seed: int) -> None:
        self._x = seed % 2**64 % self.modulus or 1

    def draw(self) -> int:
        """The next number, from 0 to the modulus less 2."""
        self._x = 16807 * self._x % self.modulus
        return self._x - 1

    def below(self, limit: int) -> int:
        """A number below ``limit``, each as likely: draws beyond the last whole share are thrown away."""
        share = (self.modulus - 2) // limit
        while (value := self.draw()) >= limit * share:
            pass
        return value // share

    def heading(self) -> float:
        """An angle below 2 pi, from two draws."""
        span = float(self.modulus - 1)  # all in doubles: exact integers would differ in the last bit
        low, high = self.draw(), self.draw()
        return (low + high * span) / (span * span) * (2 * math.pi)


def _check_random_episodes(case: Case, places: Sequence[Path]) -> None:
    runs = parse_json(read_document(case.path))["runs"]
    rows = [row for run in runs for call in run["calls"] for row in call]
    case.add({name: np.array([row[name] for row in rows]) for name in ("ix", "heading")})
    world = World(find_graphs((scan_id for run in runs for scan_id in run["scans"]), places))
    ix, heading = [], []
    for run in runs:
        simulator, random = (
            Simulator(world, batch_size=len(run["scans"]), discretized=False),
            ReferenceRandom(run["seed"]),
        )
        starts = np.array([world.starts[scan_id] for scan_id in run["scans"]])
        for _ in run["calls"]:
            places_drawn = [_draw_viewpoint(world.graphs[scan_id], random) for scan_id in run["scans"]]
            # The original makes a new generator for headings on every call: they repeat.
            fresh = ReferenceRandom(1)
            state = simulator.place(starts + places_drawn, [fresh.heading() for _ in run["scans"]])
            ix.append(state.viewpoint - starts)
            heading.append(state.heading)
    case.compare("ix", array(np.concatenate(ix)), EXACT)
    case.compare("heading", array(np.concatenate(heading)), EXACT)


def _draw_viewpoint(graph: NavGraph, random: ReferenceRandom) -> int:
    """Any listed viewpoint; from an excluded one on to the next that is included."""
    number = random.below(len(graph.viewpoint_ids))
    while not graph.included[number]:
        number = (number + 1) % len(graph.viewpoint_ids)
    return number
