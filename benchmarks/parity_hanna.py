"""Parity of HANNA's assistant and teachers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.golden import EXACT, Case
from benchmarks.parity_navgraph import array
from vln.hanna import (
    REASONS,
    Assistant,
    HannaStep,
    ask_teacher,
    negative_actions,
    normalised_entropy,
    shortest_action,
)
from vln.navgraph import NavGraph


def check_assistant(case: Case, document: Mapping[str, Any], graphs: Mapping[str, NavGraph]) -> None:
    """Every answer of the assistant, every target and reason of the teachers."""
    assistant = Assistant(_routes(document), graphs)
    queries = document["anna_queries"]
    rows = [_answer(assistant, query, document["anna_split"]) for query in queries]
    stored = [_stored_answer(query) for query in queries]
    # Texts are compared as numbers: each distinct one has its place.
    numbers = {text: place for place, text in enumerate(sorted({text for row in stored for text in row}))}
    for column, name in enumerate(("legal", "path", "start", "depart", "goal", "instruction", "view")):
        key = f"anna_queries.{name}"
        case.add({key: np.array([numbers[row[column]] for row in stored])})
        case.compare(key, array([numbers.get(row[column], -1) for row in rows]), EXACT)
    _check_teachers(case, document, graphs, assistant)


def _routes(document: Mapping[str, Any]) -> list[Any]:
    return [
        SimpleNamespace(**row, scan_id=scan_id)
        for scan_id, rows in document["routes"].items()
        for row in rows
    ]


def _answer(assistant: Assistant, query: Mapping[str, Any], split: str) -> list[str]:
    place = (query["scan"], query["viewpoint"])
    legal = assistant.can_answer(*place)
    found = assistant.answer(*place, query["goal_viewpoints"], split=split)
    if found is None:
        return [str(legal), *["none"] * 6]
    route = found.route
    texts = (legal, route.path_id, found.start_node, found.depart_node, found.goal_node, route.instruction)
    return [*map(str, texts), str(route.view_id)]


def _stored_answer(query: Mapping[str, Any]) -> list[str]:
    answer, legal = query["answer"], str(query["can_request"])
    # Where the original crashes ours has no answer; whether asking is legal tells the two apart.
    if answer is None or isinstance(answer, str):
        return [legal, *["none"] * 6]
    names = ("path_id", "start_node", "depart_node", "goal_node", "instruction", "view_id")
    return [legal, *(str(answer[name]) for name in names)]


def _check_teachers(
    case: Case, document: Mapping[str, Any], graphs: Mapping[str, NavGraph], assistant: Assistant
) -> None:
    names = ("ask_targets", "ask_reason_targets", "ask_reasons", "negative_actions", "nav_shortest_action")
    ours: dict[str, list[Any]] = {name: [] for name in names}
    stored: dict[str, list[Any]] = {name: [] for name in names}
    words = (*REASONS, "pass", "ended", "no_route")
    for episode in document["teacher_episodes"]:
        scan_id = episode["steps"][0]["ob"]["scan"]
        graph = graphs[scan_id]
        *steps, last = map(_step, episode["steps"])

        def legal(viewpoint_id: str, scan_id: str = scan_id) -> bool:
            return assistant.can_answer(scan_id, viewpoint_id)

        told = ask_teacher(steps, graph, legal, last=last, uncertain=document["uncertain_threshold"])
        ours["ask_targets"] += [target.target for target in told]
        ours["ask_reason_targets"] += [list(target.reasons) for target in told]
        ours["ask_reasons"] += [[word in target.names for word in words] for target in told]
        ours["negative_actions"] += [_row(actions) for actions in negative_actions(steps)]
        ours["nav_shortest_action"] += [
            -1 if seen["ob"]["ended"] else _shortest(graph, seen["ob"]) for seen in episode["steps"]
        ]
        for name in ("ask_targets", "ask_reason_targets", "nav_shortest_action"):
            stored[name] += episode[name]
        stored["ask_reasons"] += [[word in row for word in words] for row in episode["ask_reasons"]]
        stored["negative_actions"] += [_row(actions) for actions in episode["negative_actions"]]
    for name in names:
        key = f"teacher_episodes.{name}"
        case.add({key: np.array(stored[name], dtype=np.int64)})
        case.compare(key, array(np.array(ours[name], dtype=np.int64)), EXACT)


def _row(actions: list[int]) -> list[bool]:
    """Which of 36 actions are listed."""
    return [action in actions for action in range(36)]


def _shortest(graph: NavGraph, seen: Mapping[str, Any]) -> int:
    candidates = [location["nextViewpointId"] for location in seen["adj_loc_list"]]
    return shortest_action(graph, seen["viewpoint"], seen["target_viewpoints"], candidates)


def _step(row: Mapping[str, Any]) -> HannaStep:
    seen = row["ob"]
    shares = torch.tensor(row.get("nav_dist", [1.0, 0.0]), dtype=torch.float64)
    return HannaStep(
        viewpoint_id=seen["viewpoint"],
        targets=tuple(seen["target_viewpoints"]),
        subgoal=seen["subgoal_instr_id"],
        ended=seen["ended"],
        nav_entropy=float(normalised_entropy(shares)),
        nav_best=row.get("nav_argmax", -1),
        nav_target=row.get("nav_target", -1),
        nav_action=row.get("nav_a", -1),
        asked=row.get("ask_a", 0) == 1,
    )
