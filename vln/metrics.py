"""Official scores of R2R, NDH and HANNA, an item at a time and on average.

Distances are shortest walking distances in metres. A path may repeat a viewpoint, as it does when an agent
turns on the spot. All functions score whole splits at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vln.fidelity import PathTable, alignment, share
from vln.items import HannaTask, NDHItem, R2RItem, RxRItem
from vln.navgraph import NavGraph

PathType = Literal["planner_path", "player_path", "trusted_path"]


class R2RScores(NamedTuple):
    """Scores of every instruction, float64 ``[N]`` each, in metres where they are lengths."""

    instruction_ids: tuple[str, ...]
    nav_error: np.ndarray
    oracle_error: np.ndarray
    steps: np.ndarray
    length: np.ndarray
    shortest_length: np.ndarray
    success: np.ndarray
    oracle_success: np.ndarray
    spl: np.ndarray
    dtw: np.ndarray
    ndtw: np.ndarray
    sdtw: np.ndarray
    cls: np.ndarray


class NDHScores(NamedTuple):
    """Scores of every item, float64 ``[N]`` each, in metres where they are lengths."""

    inst_idx: tuple[int, ...]
    goal_progress: np.ndarray
    oracle_progress: np.ndarray
    nav_error: np.ndarray
    oracle_error: np.ndarray
    oracle_plan_error: np.ndarray
    length: np.ndarray
    shortest_length: np.ndarray
    success: np.ndarray
    oracle_success: np.ndarray
    oracle_path_success: np.ndarray
    spl: np.ndarray
    success_progress: np.ndarray


class HannaScores(NamedTuple):
    """Scores of every instruction, float64 ``[N]`` each, in metres where they are lengths."""

    instruction_ids: tuple[str, ...]
    error: np.ndarray
    oracle_error: np.ndarray
    steps: np.ndarray
    length: np.ndarray
    optimal_length: np.ndarray
    oracle_length: np.ndarray
    success: np.ndarray
    oracle_success: np.ndarray
    spl: np.ndarray
    oracle_spl: np.ndarray
    """With the final success as factor: a slip of the official evaluator, whose figures are published."""
    oracle_spl_mended: np.ndarray
    """With the oracle success."""
    num_requests: np.ndarray
    num_targets: np.ndarray
    """Sub-goals that were to be reached after a request."""
    num_targets_reached: np.ndarray


class HannaResult(NamedTuple):
    """What an agent did on one HANNA instruction."""

    viewpoints: tuple[str, ...]
    """``[T + 1]``."""
    asked: tuple[int, ...]
    """``[T]``: 1 where it requested help."""
    moved: tuple[int, ...]
    """``[T]``: choice of where to go, 0 for STOP, below 0 for none."""
    targets: tuple[tuple[str, ...], ...]
    """``[T + 1]``: viewpoints it was to reach at each moment."""


def mean_scores(scores: R2RScores | NDHScores | HannaScores) -> dict[str, float]:
    """Plain mean of every score.

    HANNA's counts of targets become ``target_success_rate``: the share reached of all, -1 without any.
    """
    means = {
        name: float(np.mean(value))
        for name, value in scores._asdict().items()
        if isinstance(value, np.ndarray)
    }
    if isinstance(scores, HannaScores):
        targets, reached = scores.num_targets.sum(), scores.num_targets_reached.sum()
        del means["num_targets"], means["num_targets_reached"]
        means["target_success_rate"] = float(reached / targets) if targets else -1.0
    return means


def score_r2r(
    paths: Mapping[str, Sequence[str]],
    items: Sequence[R2RItem | RxRItem],
    graphs: Mapping[str, NavGraph],
    *,
    success_radius: float = 3.0,
    deduplicate: bool = False,
    annotated_length: bool = False,
) -> R2RScores:
    """R2R scores with nDTW, SDTW and CLS of every instruction of the items, also for R4R and RxR.

    With P the path, R the reference and g its end: ``nav_error = d(P_end, g)``, ``oracle_error = min d(P_i,
    g)``, success where they are below the radius, ``length = sum d(P_i, P_i+1)``, so that a jump costs its
    walking distance, ``spl = success * L / max(L, length, 0.01)`` with ``L = d(P_0, g)`` (Anderson et al.,
    2018). ``ndtw = exp(-DTW(P, R) / (radius * |R|))`` (Ilharco et al., 2019). ``cls = C * E / (E + |E -
    length(P)|)`` with coverage ``C = mean over R of exp(-d(r, P) / radius)`` and ``E = C * length(R)`` (Jain
    et al., 2019).

    Args:
        paths: instruction id to viewpoint ids, repeats included; ids that no item has are not looked at.
        items: with whole paths, so not the test split.
        graphs: of the items' scans.
        success_radius: metres; reaching it exactly is no success.
        deduplicate: leave consecutive repeats out of nDTW, SDTW and CLS, to which they otherwise count.
        annotated_length: take the length of R for L, as is usual for R4R.

    Raises:
        ValueError: an instruction has no path; a path is empty, does not begin where its item does, or passes
            a viewpoint that the scan does not have or that cannot be reached; or an item has no goal.
    """
    rows = [(name, item) for item in items for name in item.instruction_ids]
    goalless = [name for name, item in rows if item.distance is None and len(item.path) == 1]
    if goalless:
        raise ValueError(
            f"{len(goalless)} instructions, {goalless[0]} first, have no goal: a test split has no scores"
        )
    names = [name for name, _ in rows]
    _require_all(names, paths)
    table = PathTable(graphs, [item.scan_id for _, item in rows])
    path = table.paths(names, [paths[name] for name in names], [item.path[0] for _, item in rows])
    reference = table.paths(names, [item.path for _, item in rows])
    goal = reference.last
    to_goal = table.between(path.nodes, goal[:, None])
    _require_reachable(names, to_goal)
    nav_error, oracle_error = to_goal[:, -1], to_goal.min(axis=1)
    success = (nav_error < success_radius).astype(float)
    length, reference_length = table.lengths(path), table.lengths(reference)
    shortest = reference_length if annotated_length else to_goal[:, 0]
    walked = path.without_repeats() if deduplicate else path
    dtw, cls = alignment(table, walked, reference, length, reference_length, success_radius)
    ndtw = np.exp(-dtw / (success_radius * reference.lengths))
    return R2RScores(
        instruction_ids=tuple(names),
        nav_error=nav_error,
        oracle_error=oracle_error,
        steps=(path.lengths - 1).astype(float),
        length=length,
        shortest_length=shortest,
        success=success,
        oracle_success=(oracle_error < success_radius).astype(float),
        spl=success * shortest / np.maximum(np.maximum(shortest, length), 0.01),
        dtw=dtw,
        ndtw=ndtw,
        sdtw=success * ndtw,
        cls=cls,
    )


def score_ndh(
    paths: Mapping[int, Sequence[str]],
    items: Sequence[NDHItem],
    graphs: Mapping[str, NavGraph],
    *,
    path_type: PathType = "trusted_path",
    success_radius: float = 3.0,
) -> NDHScores:
    """NDH scores of every item.

    ``goal_progress = min d(start, e) - min d(P_end, e)`` over the goal region's viewpoints e (Thomason et
    al., 2019), whatever the path type; ``oracle_progress`` that of the best viewpoint passed. The other
    scores take the last viewpoint of the chosen path for the goal; SPL of a walk of no length counts as 1 if
    none was needed.

    Args:
        paths: ``inst_idx`` to viewpoint ids; ids that no item has are not looked at.
        items: with ends and paths, so not the test split.
        graphs: of the items' scans.
        path_type: whose path leads to the goal.
        success_radius: metres; reaching it exactly is no success.

    Raises:
        ValueError: an item has no path; a path is empty, does not begin where its item does, or passes a
            viewpoint that the scan does not have or that cannot be reached; an item has no goal; or
            ``path_type`` is another.
    """
    if path_type not in get_args(PathType):
        raise ValueError(f"path_type is {path_type!r}, expected one of {', '.join(get_args(PathType))}")
    names = [item.inst_idx for item in items]
    goalless = [
        item.inst_idx for item in items if not (item.end_panos and item.planner_path and item.player_path)
    ]
    if goalless:
        raise ValueError(
            f"{len(goalless)} items, {goalless[0]} first, have no goal: the test split has no scores here"
        )
    _require_all(names, paths)
    table = PathTable(graphs, [item.scan_id for item in items])
    path = table.paths(names, [paths[name] for name in names], [item.start for item in items])
    region = table.paths(names, [item.end_panos for item in items])
    goal = table.paths(names, [getattr(item, path_type)[-1:] for item in items]).last
    planned = table.paths(names, [item.planner_path[-1:] for item in items]).last
    to_region = table.between(path.nodes[:, :, None], region.nodes[:, None, :]).min(axis=2)
    to_goal, to_plan = table.between(path.nodes, goal[:, None]), table.between(path.nodes, planned[:, None])
    _require_reachable(names, np.stack([to_goal[:, 0], to_region[:, 0], to_plan[:, 0]], axis=1))
    length, shortest = table.lengths(path), to_goal[:, 0]
    success = (to_goal[:, -1] < success_radius).astype(float)
    longest = np.maximum(length, shortest)
    progress = to_region[:, 0] - to_region[:, -1]
    return NDHScores(
        inst_idx=tuple(names),
        goal_progress=progress,
        oracle_progress=to_region[:, 0] - to_region.min(axis=1),
        nav_error=to_goal[:, -1],
        oracle_error=to_goal.min(axis=1),
        oracle_plan_error=to_plan.min(axis=1),
        length=length,
        shortest_length=shortest,
        success=success,
        oracle_success=(to_goal.min(axis=1) < success_radius).astype(float),
        oracle_path_success=(to_plan.min(axis=1) < success_radius).astype(float),
        spl=success * share(shortest, longest),
        success_progress=success * progress,
    )


def score_hanna(
    results: Mapping[str, HannaResult],
    tasks: Sequence[HannaTask],
    graphs: Mapping[str, NavGraph],
    *,
    success_radius: float = 2.0,
) -> HannaScores:
    """HANNA scores of every instruction.

    ``error`` is the distance to the nearest goal, and reaching the radius exactly is a success (Nguyen &
    Daumé, 2019). SPL compares with the distance of that goal from the start. The oracle stops at the
    viewpoint passed that is nearest to a goal, for the first time. After a request a target is to be reached:
    it counts as reached when the agent is within the radius of it at its next STOP, or at the end.

    Args:
        results: instruction id to what the agent did; ids that no task has are not looked at.
        tasks: with the paths to their goals.
        graphs: of the tasks' scans.
        success_radius: metres.

    Raises:
        ValueError: an instruction has no result; a path is empty, does not begin where its task does, or
            passes a viewpoint that the scan does not have or that cannot be reached; or a result's lists do
            not fit together.
    """
    rows = [(name, task) for task in tasks for name in task.instruction_ids]
    names = [name for name, _ in rows]
    _require_all(names, results)
    table = PathTable(graphs, [task.scan_id for _, task in rows])
    starts = [task.paths[0][0] for _, task in rows]
    path = table.paths(names, [results[name].viewpoints for name in names], starts)
    goals = table.paths(names, [[way[-1] for way in task.paths] for _, task in rows])
    to_goals = table.between(path.nodes[:, :, None], goals.nodes[:, None, :])  # [N, T, G]
    _require_reachable(names, to_goals[:, 0])
    errors = to_goals[:, -1]
    # The last of the goals at equal distance: the reversed list's first. Padding repeats the last goal.
    reached = errors.shape[1] - 1 - errors[:, ::-1].argmin(axis=1)
    each = np.arange(len(names))
    error, optimal = errors[each, reached], to_goals[each, 0, reached]
    nearest, oracle_goal = to_goals.min(axis=1), to_goals.min(axis=1).argmin(axis=1)
    stop = to_goals[each, :, oracle_goal].argmin(axis=1)
    oracle_error, hops = nearest.min(axis=1), table.hops(path)
    length = hops.sum(axis=1)
    oracle_length = np.where(np.arange(hops.shape[1]) < stop[:, None], hops, 0.0).sum(axis=1)
    success = (error <= success_radius).astype(float)
    oracle_success = (oracle_error <= success_radius).astype(float)
    oracle_share = share(optimal, np.maximum(optimal, oracle_length))
    targets = [_targets(name, results[name], graphs[task.scan_id], success_radius) for name, task in rows]
    return HannaScores(
        instruction_ids=tuple(names),
        error=error,
        oracle_error=oracle_error,
        steps=(path.lengths - 1).astype(float),
        length=length,
        optimal_length=optimal,
        oracle_length=oracle_length,
        success=success,
        oracle_success=oracle_success,
        spl=success * share(optimal, np.maximum(optimal, length)),
        oracle_spl=success * oracle_share,
        oracle_spl_mended=oracle_success * oracle_share,
        num_requests=np.array([sum(results[name].asked) for name in names], dtype=float),
        num_targets=np.array([due for due, _ in targets], dtype=float),
        num_targets_reached=np.array([met for _, met in targets], dtype=float),
    )


def _targets(name: str, result: HannaResult, graph: NavGraph, radius: float) -> tuple[int, int]:
    """How many targets were due after requests, and how many of them were reached."""
    steps = len(result.viewpoints) - 1
    if not len(result.asked) == len(result.moved) == len(result.targets) - 1 == steps:
        raise ValueError(
            f"{name}: {steps + 1} poses need {steps} requests, {steps} choices and {steps + 1} targets, got "
            f"{len(result.asked)}, {len(result.moved)} and {len(result.targets)}"
        )
    due = reached = 0
    waiting = False
    for step in range(steps + 1):
        ended = step == steps
        if waiting and (ended or result.moved[step] <= 0):
            here, target = result.viewpoints[min(step + 1, steps)], result.targets[step][0]
            due += 1
            reached += bool(graph.distances[graph.index(here), graph.index(target)] <= radius)
            waiting = False
        if not ended and result.asked[step]:
            waiting = True
    return due, reached


def _require_all(names: Sequence[Any], given: Mapping[Any, Any]) -> None:
    if not names:
        raise ValueError("there are no items to score")
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} are missing, {missing[0]} first: every instruction needs a path"
        )


def _require_reachable(names: Sequence[Any], distances: np.ndarray) -> None:
    reachable = np.isfinite(distances).all(axis=1)
    if not reachable.all():
        raise ValueError(f"{names[int(np.argmin(reachable))]}: there is no way from its start to its goal")
