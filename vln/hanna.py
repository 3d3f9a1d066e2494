"""HANNA's assistant and teachers (Nguyen & Daumé, 2019): who answers a request, and what was right to do.

The assistant ANNA knows routes. Asked, she leads the agent onto one that begins where it stands or next to
it, and lets it off where a goal is nearest. The teachers say which way to go, which past mistakes to avoid,
and, once an episode is over, when asking was right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vln.navgraph import NavGraph

START_RADIUS = 2.0
"""Metres to a neighbouring viewpoint at which a route may begin."""
UNCERTAIN = 0.25
"""Entropy of the navigation, as a share of its largest, from which on an agent is uncertain."""
REASONS = ("lost", "uncertain_wrong", "already_asked")

_TIE = 1e-6

Draw = Callable[[int], int]
"""``draw(count)``: a number below ``count``."""


class Route(Protocol):
    """What the assistant knows of a route."""

    @property
    def path_id(self) -> int | str:
        """Its name."""

    @property
    def scan_id(self) -> str:
        """Its house."""

    @property
    def path(self) -> Sequence[str]:
        """Viewpoint ids."""

    @property
    def instruction(self) -> str:
        """Words for it."""

    @property
    def view_id(self) -> int:
        """View that one faces on entering it."""

    @property
    def split(self) -> str:
        """Whose it is."""


class Answer(NamedTuple):
    """What ANNA says."""

    route: Route
    depart_node: str
    """Viewpoint id on the route where the agent shall leave it."""
    goal_node: str
    """The goal that is nearest from there."""

    @property
    def start_node(self) -> str:
        """Where the agent is moved to."""
        return self.route.path[0]


class Assistant:
    """ANNA.

    Args:
        routes: of all splits.
        graphs: scan ids to graphs.
        start_radius: metres to a neighbour at which a route may begin.
    """

    def __init__(
        self, routes: Iterable[Route], graphs: Mapping[str, NavGraph], *, start_radius: float = START_RADIUS
    ) -> None:
        self._graphs, self._radius = graphs, start_radius
        self._from: dict[tuple[str, str], list[Route]] = {}
        for route in routes:
            self._from.setdefault((route.scan_id, route.path[0]), []).append(route)
        self._known: dict[tuple[str, str], tuple[list[Route], np.ndarray, np.ndarray]] = {}

    def routes_at(self, scan_id: str, viewpoint_id: str) -> list[Route]:
        """Routes that can be entered from a viewpoint: its own first, then those of near neighbours.

        Raises:
            ValueError: the viewpoint is unknown.
        """
        graph = self._graphs[scan_id]
        here = graph.index(viewpoint_id)
        near = [n for n in graph.neighbours[here] if graph.distances[here, n] <= self._radius]
        starts = [graph.viewpoint_ids[node] for node in (here, *near)]
        return [route for start in starts for route in self._from.get((scan_id, start), ())]

    def can_answer(self, scan_id: str, viewpoint_id: str) -> bool:
        """Whether asking is legal here."""
        return bool(self.routes_at(scan_id, viewpoint_id))

    def answer(
        self, scan_id: str, viewpoint_id: str, goals: Sequence[str], *, split: str, draw: Draw | None = None
    ) -> Answer | None:
        """The route that leads nearest to a goal.

        All routes count when the nearest point is looked for, but only those of the split may be named, as
        in the original, which fails where none of those is as near; here there is no answer then.

        Args:
            scan_id: the house.
            viewpoint_id: where the agent asks.
            goals: viewpoint ids.
            split: whose routes may be named.
            draw: among two and more that are equally near; the first by default, as in evaluation.

        Raises:
            ValueError: a viewpoint is unknown.
        """
        graph = self._graphs[scan_id]
        routes, owners, nodes = self._points(scan_id, viewpoint_id)
        ends = np.array([graph.index(goal) for goal in goals], dtype=np.int64)
        far = graph.distances[nodes[:, None], ends]
        if not np.isfinite(far.min(initial=np.inf)):
            return None
        kept = [
            (routes[owners[point]], int(nodes[point]), goal)
            for point, goal in np.argwhere(far - far.min() <= _TIE).tolist()
            if routes[owners[point]].split == split
        ]
        if not kept:
            return None
        route, node, goal = kept[draw(len(kept)) if draw and len(kept) > 1 else 0]
        return Answer(route, graph.viewpoint_ids[node], goals[goal])

    def _points(self, scan_id: str, viewpoint_id: str) -> tuple[list[Route], np.ndarray, np.ndarray]:
        """Routes that can be entered here, and all their points: the route's place in the list, the node."""
        key = (scan_id, viewpoint_id)
        if key not in self._known:
            graph, routes = self._graphs[scan_id], self.routes_at(scan_id, viewpoint_id)
            points = [(place, graph.index(node)) for place, route in enumerate(routes) for node in route.path]
            owners, nodes = np.array(points, dtype=np.int64).reshape(-1, 2).T
            self._known[key] = routes, owners, nodes
        return self._known[key]


# ---- teachers


class HannaStep(NamedTuple):
    """What a teacher must know of one step of an episode."""

    viewpoint_id: str
    targets: tuple[str, ...]
    """Viewpoint ids of the present goals: the task's, or the point where to leave the route."""
    subgoal: str
    """Name of the present instruction."""
    ended: bool
    """Whether the episode was over before."""
    nav_entropy: float
    """Of the navigation, as a share of its largest."""
    nav_best: int
    """The likeliest action."""
    nav_target: int
    """The teacher's action; -1 where the agent asked."""
    nav_action: int
    """What was done; 0 stops."""
    asked: bool


class AskTarget(NamedTuple):
    """What would have been right."""

    target: int
    """1 to ask, 0 not to, -1 where it does not count."""
    reasons: tuple[bool, bool, bool]
    """Lost; uncertain and wrong; already asked here."""
    names: tuple[str, ...]
    """The reasons by name; else ``pass``, ``ended``, ``no_route``."""


def nearest_target(graph: NavGraph, viewpoint_id: str, targets: Sequence[str]) -> tuple[str, float]:
    """The target to which the way is shortest, the first on equal ways, and that way in metres.

    Raises:
        ValueError: there is no target, or an unknown viewpoint.
    """
    if not targets:
        raise ValueError(f"there is no target to walk to from viewpoint {viewpoint_id}")
    here = graph.index(viewpoint_id)
    ways = [float(graph.distances[here, graph.index(target)]) for target in targets]
    best = ways.index(min(ways))
    return targets[best], ways[best]


def shortest_action(
    graph: NavGraph, viewpoint_id: str, targets: Sequence[str], candidates: Sequence[str]
) -> int:
    """First step to the nearest target, as a place among the candidates; 0 to stop at it.

    Args:
        graph: of the scan.
        viewpoint_id: where the agent is.
        targets: viewpoint ids.
        candidates: viewpoint ids of the choices, the own one first.

    Raises:
        ValueError: the next viewpoint is no candidate, or there is no way.
    """
    way = graph.shortest_path(viewpoint_id, nearest_target(graph, viewpoint_id, targets)[0])
    if len(way) == 1:
        return 0
    if not way or way[1] not in candidates:
        raise ValueError(f"no candidate of viewpoint {viewpoint_id} leads to any of {list(targets)}")
    return list(candidates).index(way[1])


def ask_teacher(
    steps: Sequence[HannaStep],
    graph: NavGraph,
    can_answer: Callable[[str], bool],
    *,
    last: HannaStep | None = None,
    uncertain: float = UNCERTAIN,
) -> list[AskTarget]:
    """When asking was right, told after the episode.

    An agent should have asked when it was lost (past the nearest point of a segment, which a request, a STOP
    or the end closes), or when it was uncertain and its likeliest action wrong; not where it had asked
    before.

    Args:
        steps: with an action each.
        graph: of the scan.
        can_answer: whether asking is legal at a viewpoint.
        last: what was seen after the last step; it may be the nearest point.
        uncertain: share of the largest entropy from which on an agent is uncertain.
    """
    lost = _lost(steps, graph, last)
    found, asked_at = [], set()
    for step, is_lost in zip(steps, lost, strict=True):
        reasons = (
            is_lost,
            step.nav_entropy >= uncertain and step.nav_best != step.nav_target,
            step.viewpoint_id in asked_at,
        )
        legal = can_answer(step.viewpoint_id)
        if step.asked:
            asked_at.add(step.viewpoint_id)
        if step.ended or not legal:
            names = tuple(name for name, holds in (("ended", step.ended), ("no_route", not legal)) if holds)
            found.append(AskTarget(-1, (False, False, False), names))
            continue
        names = tuple(name for name, holds in zip(REASONS, reasons, strict=True) if holds) or ("pass",)
        found.append(AskTarget(int(not reasons[2] and (reasons[0] or reasons[1])), reasons, names))
    return found


def _lost(steps: Sequence[HannaStep], graph: NavGraph, last: HannaStep | None) -> list[bool]:
    """Whether each step comes after the nearest one of its segment."""
    seen = [*steps, *([last] if last else [])]
    ways = [nearest_target(graph, step.viewpoint_id, step.targets)[1] for step in seen]
    lost, first = [], 0
    for end, step in enumerate(seen):
        if end + 1 == len(seen) or step.asked or step.nav_action == 0:
            segment = ways[first : end + 1]
            best = segment.index(min(segment))
            lost += [place > best for place in range(len(segment))]
            first = end + 1
    return lost[: len(steps)]


def negative_actions(steps: Sequence[HannaStep]) -> list[list[int]]:
    """Past wrong actions at the same viewpoint under the same instruction, for each step, ascending."""
    wrong: dict[tuple[str, str], set[int]] = {}
    found = []
    for step in steps:
        key = (step.viewpoint_id, step.subgoal)
        counts = not step.ended and step.nav_target >= 0
        found.append(sorted(wrong.get(key, ())) if counts else [])
        if counts and step.nav_action != step.nav_target:
            wrong.setdefault(key, set()).add(step.nav_action)
    return found


def normalised_entropy(probabilities: Tensor) -> Tensor:
    """Entropy as a share of the largest: ``[..., C]`` to ``[...]`` in [0, 1]."""
    bins = torch.tensor(float(probabilities.shape[-1]), dtype=probabilities.dtype)
    return -torch.xlogy(probabilities, probabilities).sum(-1) / bins.log()


def curiosity_loss(logits: Tensor, teacher: Tensor, negatives: Tensor, *, weight: float = 1.0) -> Tensor:
    """Imitation that also runs from past mistakes: -log p(a*) + weight * mean of log p(a-) (Sec. 5.2).

    Args:
        logits: ``[B, C]``, -inf where there is no candidate.
        teacher: int64 ``[B]``, -1 for rows that do not count.
        negatives: bool ``[B, C]``: past wrong actions of each row.
        weight: alpha.

    Returns:
        Mean over the rows that count, ``[]``; 0 without any.
    """
    active = teacher >= 0
    log_probs = logits.log_softmax(-1)
    right = -log_probs.gather(1, teacher.clamp(min=0)[:, None])[:, 0]
    wrong = log_probs.masked_fill(~negatives, 0.0).sum(1) / negatives.sum(1).clamp(min=1)
    terms = torch.where(active, right + weight * wrong, 0.0)
    return terms.sum() / active.sum().clamp(min=1)
