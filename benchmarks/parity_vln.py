"""Parity of the navigation scores with the original evaluators, and of the pre-training labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.golden import EXACT, Case, Tolerance
from benchmarks.parity_hanna import check_assistant
from benchmarks.parity_navgraph import array, find_graphs
from benchmarks.parity_prevalent import check_agent, check_pretraining
from vln.candidates import PanoramicSimulator
from vln.data import hanna_task, read_ndh, read_r2r
from vln.metrics import (
    HannaScores,
    NDHScores,
    PathType,
    R2RScores,
    mean_scores,
    score_hanna,
    score_ndh,
    score_r2r,
)
from vln.navgraph import NavGraph
from vln.sources import Document, parse_json, read_document
from vln.submission import parse_submission
from vln.triplets import Triplets, roll_triplets
from vln.walks import Walk, roll_teacher
from vln.world import World

SCORE = Tolerance(0.0, 0.0, 1e-9)
ANGLE = Tolerance(0.0, 0.0, 1e-6)

R2R_SUMMARY = {"lengths": "length", "success_rate": "success", "oracle_rate": "oracle_success"}
"""The R2R-EnvDrop and DUET evaluators' names where they differ from ours."""
R2R_REFERENCE = {"success_rate": "success", "oracle success_rate": "oracle_success"}
NDH_SUMMARY = {
    "success_rate": "success",
    "oracle success_rate": "oracle_success",
    "oracle path_success_rate": "oracle_path_success",
    "dist_to_end_reduction": "goal_progress",
    "sc_dr": "success_progress",
}
HANNA_SUMMARY = {"success_rate": "success", "oracle_success_rate": "oracle_success"}

_T = TypeVar("_T")


def check(case: Case, places: Sequence[Path]) -> None:
    """One file: scores of R2R, NDH or HANNA, labels of pre-training, or networks.

    Args:
        case: the file.
        places: where items and connectivity may lie, in order.
    """
    if case.path.suffix == ".npz":
        if "in/img_feats" in case.arrays:
            check_pretraining(case)
        else:
            check_agent(case)
        return
    document = parse_json(read_document(case.path))
    checker = {"r2r": _check_r2r, "ndh": _check_ndh, "hanna": _check_hanna, "triplets": _check_triplets}
    checker[document.get("task", "triplets")](case, document, places)


def _find_items(read: Callable[[Path, str], list[_T]], split: str, places: Sequence[Path]) -> list[_T]:
    lacks = []
    for place in places:
        try:
            return read(place, split)
        except FileNotFoundError as error:
            lacks.append(str(error))
    raise FileNotFoundError("; ".join(lacks))


def _submission(case: Case, document: Mapping[str, Any]) -> Any:
    return parse_submission(Document(str(case.path), json.dumps(document["predictions"]).encode()))


def _check_r2r(case: Case, document: Mapping[str, Any], places: Sequence[Path]) -> None:
    items = _find_items(read_r2r, document["split"], places)
    graphs = find_graphs((item.scan_id for item in items), places)
    scores = score_r2r(_submission(case, document).paths, items, graphs)
    _compare(case, "", document, scores, R2R_SUMMARY)
    # The first evaluator divides by no less than nothing; where it does not fail, the figures are the same.
    reference = document["summary_reference_toolkit"]
    case.add(
        {
            f"summary_reference_toolkit.{name}": np.array(value, dtype=float)
            for name, value in reference.items()
        }
    )
    means = mean_scores(scores)
    for name in reference:
        value = means[R2R_REFERENCE.get(name, name)]
        case.compare(f"summary_reference_toolkit.{name}", array(value), SCORE)


def _check_ndh(case: Case, document: Mapping[str, Any], places: Sequence[Path]) -> None:
    items = _find_items(read_ndh, document["split"], places)
    graphs = find_graphs((item.scan_id for item in items), places)
    paths = _submission(case, document).paths
    path_types: dict[PathType, Any] = document["by_path_type"]
    for path_type, expected in path_types.items():
        scores = score_ndh(paths, items, graphs, path_type=path_type)
        _compare(case, f"{path_type}.", expected, scores, NDH_SUMMARY)


def _check_hanna(case: Case, document: Mapping[str, Any], places: Sequence[Path]) -> None:
    tasks = [hanna_task(row) for row in document["tasks"]]
    graphs = find_graphs((task.scan_id for task in tasks), places)
    results = _submission(case, document).results
    scores = score_hanna(results, tasks, graphs, success_radius=document["success_radius"])
    _compare(case, "", document, scores, HANNA_SUMMARY)
    if "anna_queries" in document:
        check_assistant(case, document, graphs | find_graphs(document["routes"], places))


def _compare(
    case: Case,
    prefix: str,
    expected: Mapping[str, Any],
    scores: R2RScores | NDHScores | HannaScores,
    summary_names: Mapping[str, str],
) -> None:
    """Compare all items, field by field, and the means."""
    rows = {str(key): row for key, row in expected["items"].items()}
    names = [str(name) for name in scores[0]]
    case.require(sorted(rows) == sorted(names), f"{prefix}items: {len(rows)} are stored, {len(names)} scored")
    for field in next(iter(rows.values())):
        key = f"{prefix}items.{field}"
        case.add({key: np.array([float(row[field]) for row in rows.values()])})
        ours = dict(zip(names, getattr(scores, field), strict=True))
        case.compare(key, array([ours[name] for name in rows]), SCORE)
    means = mean_scores(scores)
    for field, value in expected["summary"].items():
        key = f"{prefix}summary.{field}"
        case.add({key: np.array(float(value))})
        case.compare(key, array(means[summary_names.get(field, field)]), SCORE)


def _check_triplets(case: Case, document: Mapping[str, Any], places: Sequence[Path]) -> None:
    """The shortest-path teacher along R2R paths, its views and its choices."""
    episodes = document["episodes"]
    items = {item.path_id: item for item in _find_items(read_r2r, document["split"], places)}
    world = World(find_graphs((episode["scan"] for episode in episodes), places))
    stored: list[dict[str, Any]] = []
    for episode in episodes:
        graph, start = world.graphs[episode["scan"]], world.starts[episode["scan"]]
        stored += [_stored_label(step, graph, start) for step in episode["steps"]]
    walks = [
        Walk(episode["scan"], items[episode["path_id"]].path, episode["heading"]) for episode in episodes
    ]
    found = _labels(world, walks)
    names = stored[0].keys()
    case.add({name: _joined([record[name] for record in stored]) for name in names})
    for name in names:
        tolerance = ANGLE if name.endswith(("angles", "emd")) else EXACT
        case.compare(name, array(_joined([record[name] for record in found])), tolerance)
    _compare_table(case, roll_triplets(world, walks), found)


def _labels(world: World, walks: Sequence[Walk]) -> list[dict[str, Any]]:
    """One record a step of the teacher, the stop included, walk by walk."""
    agents = PanoramicSimulator(world, batch_size=len(walks), order="follower")
    starts, goals = ([world.index(walk.scan_id, walk.path[end]) for walk in walks] for end in (0, -1))
    records: list[list[dict[str, Any]]] = [[] for _ in walks]
    for now, actions, active in roll_teacher(agents, starts, goals, [walk.heading for walk in walks]):
        for row in np.flatnonzero(active):
            listed, action = slice(int(now.num_choices[row])), int(actions[row])
            angles = np.stack([now.rel_heading[row, listed], now.rel_elevation[row, listed]], axis=1)
            records[row].append(
                {
                    "viewpoint": now.viewpoint[row],
                    "view_index": now.view[row],
                    "heading": now.heading[row],
                    "elevation": now.elevation[row],
                    "num_candidates": now.num_choices[row],
                    "candidate": now.candidate[row, listed].astype(np.int64),
                    "candidate_view": now.point_id[row, listed],
                    "candidate_angles": angles[1:],
                    "teacher_action": action,
                    # A stop has no direction: the original writes 90.
                    "teacher_action_emd": [
                        now.point_id[row, action], *(angles[action] if action else (90.0, 90.0))
                    ],
                }
            )  # fmt: skip
    return [record for walk in records for record in walk]


def _compare_table(case: Case, triplets: Triplets, found: list[dict[str, Any]]) -> None:
    """The table that training reads says the same."""
    columns = {
        "viewpoint": triplets.viewpoint,
        "view_index": triplets.view,
        "teacher_action": triplets.action,
        "teacher_action_emd": triplets.target_view,
    }
    for name, column in columns.items():
        expected = [record[name] if name != "teacher_action_emd" else record[name][0] for record in found]
        case.require(np.array_equal(column, np.array(expected)), f"the table of triplets differs in {name}")


def _stored_label(step: Mapping[str, Any], graph: NavGraph, start: int) -> dict[str, Any]:
    """The same record of one step as the file holds it."""
    listed = step["candidates"]
    return {
        "viewpoint": start + graph.index(step["viewpoint"]),
        **{name: step[name] for name in ("view_index", "heading", "elevation")},
        "num_candidates": len(listed),
        "candidate": [start + graph.index(row[0]) for row in listed],
        "candidate_view": [row[1] for row in listed],
        "candidate_angles": np.array([row[2:] for row in listed[1:]]).reshape(-1, 2),
        **{name: step[name] for name in ("teacher_action", "teacher_action_emd")},
    }


def _joined(values: list[Any]) -> np.ndarray:
    """Numbers as one array, lists of different lengths end to end."""
    return np.concatenate([np.atleast_1d(np.asarray(value)) for value in values])
