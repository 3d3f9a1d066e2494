"""Official scores of R2R, NDH and HANNA, an item at a time and on average.

Distances are shortest walking distances in metres. A path may repeat a viewpoint, as it does when an agent
turns on the spot. All functions score whole splits at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vln.data import HannaTask, NDHItem, R2RItem
from vln.navgraph import NavGraph

PathType = Literal["planner_path", "player_path", "trusted_path"]

_CHUNK = 1024
"""Paths whose pairwise distances are held at once."""


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
    items: Sequence[R2RItem],
    graphs: Mapping[str, NavGraph],
    *,
    success_radius: float = 3.0,
    deduplicate: bool = False,
    annotated_length: bool = False,
) -> R2RScores:
    """R2R scores with nDTW, SDTW and CLS of every instruction of the items.

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
    world = _Distances(graphs, [item.scan_id for _, item in rows])
    path = world.paths(names, [paths[name] for name in names], [item.path[0] for _, item in rows])
    reference = world.paths(names, [item.path for _, item in rows])
    goal = reference.last
    to_goal = world.between(path.nodes, goal[:, None])
    nav_error, oracle_error = to_goal[:, -1], to_goal.min(axis=1)
    success = (nav_error < success_radius).astype(float)
    length, reference_length = world.lengths(path), world.lengths(reference)
    shortest = reference_length if annotated_length else to_goal[:, 0]
    walked = path.without_repeats() if deduplicate else path
    dtw, cls = _fidelity(world, walked, reference, length, reference_length, success_radius)
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
    world = _Distances(graphs, [item.scan_id for item in items])
    path = world.paths(names, [paths[name] for name in names], [item.start for item in items])
    region = world.paths(names, [item.end_panos for item in items])
    goal = world.paths(names, [getattr(item, path_type)[-1:] for item in items]).last
    planned = world.paths(names, [item.planner_path[-1:] for item in items]).last
    to_region = world.between(path.nodes[:, :, None], region.nodes[:, None, :]).min(axis=2)
    to_goal, to_plan = world.between(path.nodes, goal[:, None]), world.between(path.nodes, planned[:, None])
    length, shortest = world.lengths(path), to_goal[:, 0]
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
        spl=success * _share(shortest, longest),
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
    world = _Distances(graphs, [task.scan_id for _, task in rows])
    starts = [task.paths[0][0] for _, task in rows]
    path = world.paths(names, [results[name].viewpoints for name in names], starts)
    goals = world.paths(names, [[way[-1] for way in task.paths] for _, task in rows])
    to_goals = world.between(path.nodes[:, :, None], goals.nodes[:, None, :])  # [N, T, G]
    errors = to_goals[:, -1]
    # The last of the goals at equal distance: the reversed list's first. Padding repeats the last goal.
    reached = errors.shape[1] - 1 - errors[:, ::-1].argmin(axis=1)
    each = np.arange(len(names))
    error, optimal = errors[each, reached], to_goals[each, 0, reached]
    nearest, oracle_goal = to_goals.min(axis=1), to_goals.min(axis=1).argmin(axis=1)
    stop = to_goals[each, :, oracle_goal].argmin(axis=1)
    oracle_error, hops = nearest.min(axis=1), world.hops(path)
    length = hops.sum(axis=1)
    oracle_length = np.where(np.arange(hops.shape[1]) < stop[:, None], hops, 0.0).sum(axis=1)
    success = (error <= success_radius).astype(float)
    oracle_success = (oracle_error <= success_radius).astype(float)
    oracle_share = _share(optimal, np.maximum(optimal, oracle_length))
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
        spl=success * _share(optimal, np.maximum(optimal, length)),
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


class _Paths(NamedTuple):
    """Paths of different lengths, the last viewpoint repeated behind the end: that changes no distance."""

    nodes: np.ndarray
    """int64 ``[N, T]``."""
    lengths: np.ndarray
    """int64 ``[N]``: viewpoints of each."""

    @property
    def last(self) -> np.ndarray:
        return self.nodes[:, -1]

    def without_repeats(self) -> _Paths:
        new = np.ones(self.nodes.shape, dtype=bool)
        new[:, 1:] = self.nodes[:, 1:] != self.nodes[:, :-1]
        order = np.argsort(~new, axis=1, kind="stable")
        nodes = np.take_along_axis(self.nodes, order, axis=1)
        lengths = new.sum(axis=1)
        inside = np.arange(nodes.shape[1]) < lengths[:, None]
        return _Paths(np.where(inside, nodes, self.last[:, None]), lengths)


class _Distances:
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
    ) -> _Paths:
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
        return _Paths(nodes, lengths)

    def between(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Distances of viewpoints, float64; the first axis of both is the row."""
        extra = (1,) * (max(source.ndim, target.ndim) - 1)
        starts, sizes = self._starts.reshape(-1, *extra), self._sizes.reshape(-1, *extra)
        return self._flat[starts + source * sizes + target]

    def hops(self, path: _Paths) -> np.ndarray:
        """Distance of every step, float64 ``[N, T - 1]``."""
        return self.between(path.nodes[:, :-1], path.nodes[:, 1:])

    def lengths(self, path: _Paths) -> np.ndarray:
        """Length of every path, float64 ``[N]``."""
        return self.hops(path).sum(axis=1)

    def some(self, rows: np.ndarray) -> _Distances:
        """The same for some of the rows."""
        part = _Distances.__new__(_Distances)
        part._graphs = [self._graphs[row] for row in rows]
        part._flat, part._starts, part._sizes = self._flat, self._starts[rows], self._sizes[rows]
        return part


def _fidelity(
    world: _Distances,
    path: _Paths,
    reference: _Paths,
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
        distances = world.some(rows).between(path.nodes[rows, :wide, None], reference.nodes[rows, None, :])
        dtw[rows] = _dtw(distances, path.lengths[rows], reference.lengths[rows])
        near = np.exp(-distances.min(axis=1) / radius)
        inside = np.arange(near.shape[1]) < reference.lengths[rows, None]
        coverage[rows] = np.where(inside, near, 0.0).sum(axis=1) / reference.lengths[rows]
    expected = coverage * reference_length
    return dtw, coverage * _share(expected, expected + np.abs(expected - length))


def _dtw(distances: np.ndarray, lengths: np.ndarray, reference_lengths: np.ndarray) -> np.ndarray:
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


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, and 1 where both are 0: nothing was needed and nothing done."""
    return np.divide(part, whole, out=np.ones_like(part), where=whole != 0)


def _require_all(names: Sequence[Any], given: Mapping[Any, Any]) -> None:
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} are missing, {missing[0]} first: every instruction needs a path"
        )
