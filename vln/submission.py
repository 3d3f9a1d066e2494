"""Submission files: read, written, and checked for what a leaderboard would refuse."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vln.items import HannaTask, NDHItem, R2RItem, RxRItem
from vln.metrics import HannaResult
from vln.navgraph import NavGraph
from vln.sources import Document, parse_json, read_document

Task = Literal["r2r", "ndh", "hanna"]
Item = R2RItem | RxRItem | NDHItem | HannaTask


class Pose(NamedTuple):
    """Where an agent was at one moment."""

    viewpoint_id: str
    heading: float
    """Radians."""
    elevation: float
    """Radians."""


class Prediction(NamedTuple):
    """One row of a submission."""

    item_id: str | int
    """Instruction id, or ``inst_idx`` for NDH."""
    trajectory: tuple[Pose, ...]


class Submission(NamedTuple):
    """A submission as it stands in its file, doubled rows and all."""

    task: Task
    predictions: list[Prediction]
    hanna: list[HannaResult]
    """What HANNA wants beyond the trajectory, in the same order; empty for other tasks."""

    @property
    def paths(self) -> dict[Any, list[str]]:
        """Viewpoint ids of every item, of its first row if it has several, as the evaluators do."""
        rows = reversed(self.predictions)
        return {row.item_id: [pose.viewpoint_id for pose in row.trajectory] for row in rows}

    @property
    def results(self) -> dict[str, HannaResult]:
        """What the agent did on every HANNA instruction, by its first row."""
        rows = zip(reversed(self.predictions), reversed(self.hanna), strict=True)
        return {str(row.item_id): result for row, result in rows}


class Fault(NamedTuple):
    """One reason to refuse a submission."""

    kind: Literal["missing", "doubled", "unknown", "start", "graph", "gap"]
    item_id: str | int
    text: str

    def __str__(self) -> str:
        return f"{self.item_id}: {self.text}"


def read_submission(path: str | Path) -> Submission:
    """Read a submission; its rows tell which task it is for.

    R2R, R4R and RxR: ``[{"instr_id", "trajectory": [[viewpoint, heading, elevation], ...]}]``; NDH has
    ``inst_idx`` instead; HANNA has ``agent_pose``, ``agent_ask``, ``agent_nav`` and ``target_viewpoints``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, is empty, or a row is not of the first row's task or not well formed; the
            text names the row.
    """
    return parse_submission(read_document(Path(path)))


def parse_submission(document: Document) -> Submission:
    """The same for a document in hand.

    Raises:
        ValueError: see :func:`read_submission`.
    """
    rows = parse_json(document)
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        raise ValueError(f"{document.origin} holds no list of predictions: expected one object for each item")
    id_field, pose_field, task = _fields(document, rows[0])
    predictions, hanna = [], []
    for number, row in enumerate(rows):
        try:
            item_id = int(row[id_field]) if task == "ndh" else str(row[id_field])
            predictions.append(Prediction(item_id, _trajectory(row[pose_field])))
            if task == "hanna":
                hanna.append(_hanna_result(predictions[-1], row))
        except KeyError as error:
            raise ValueError(f"{document.origin}: row {number} lacks the field {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{document.origin}: row {number}: {error}") from error
    return Submission(task, predictions, hanna)


def _fields(document: Document, row: Mapping[str, Any]) -> tuple[str, str, Task]:
    """Fields of a row that hold its id and its poses, and the task that has such rows."""
    if "agent_pose" in row:
        return "instr_id", "agent_pose", "hanna"
    if "instr_id" in row:
        return "instr_id", "trajectory", "r2r"
    if "inst_idx" in row:
        return "inst_idx", "trajectory", "ndh"
    raise ValueError(
        f"{document.origin}: row 0 has {', '.join(row)}; expected instr_id or inst_idx, and a trajectory"
    )


def _trajectory(rows: Any) -> tuple[Pose, ...]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("the trajectory is empty, expected at least the start")
    poses = []
    for step, row in enumerate(rows):
        well_formed = (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and all(
                isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in row[1:]
            )
        )
        if not well_formed:
            raise ValueError(
                f"step {step} is {row!s:.80}, expected [viewpoint id, heading, elevation] in radians"
            )
        poses.append(Pose(row[0], float(row[1]), float(row[2])))
    return tuple(poses)


def _hanna_result(prediction: Prediction, row: Mapping[str, Any]) -> HannaResult:
    return HannaResult(
        viewpoints=tuple(pose.viewpoint_id for pose in prediction.trajectory),
        asked=tuple(int(value) for value in row["agent_ask"]),
        moved=tuple(int(value) for value in row["agent_nav"]),
        targets=tuple(tuple(targets) for targets in row["target_viewpoints"]),
    )


def write_submission(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Write a submission for the R2R or NDH leaderboard, under a temporary name first.

    Args:
        path: the JSON file; its folder must exist.
        predictions: rows whose ids are all texts (R2R) or all integers (NDH).

    Raises:
        ValueError: there is no prediction, ids are mixed, or an angle is not finite.
        OSError: the folder is missing or not writable.
    """
    rows = list(predictions)
    kinds = {type(row.item_id) for row in rows}
    if len(kinds) != 1 or not kinds <= {str, int}:
        raise ValueError(
            f"{len(rows)} predictions with ids of {len(kinds)} kinds: expected instruction ids (text) or "
            "inst_idx (integers), and at least one"
        )
    field = "instr_id" if kinds == {str} else "inst_idx"
    for row in rows:
        if not all(math.isfinite(pose.heading) and math.isfinite(pose.elevation) for pose in row.trajectory):
            raise ValueError(f"{row.item_id}: an angle of the trajectory is not finite")
    content = [{field: row.item_id, "trajectory": [list(pose) for pose in row.trajectory]} for row in rows]
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def find_faults(submission: Submission, items: Sequence[Item], graphs: Mapping[str, NavGraph]) -> list[Fault]:
    """Everything for which a leaderboard, or the official evaluator, would refuse a submission.

    Items may be those of a test split: of a path, the first viewpoint alone is needed.

    Args:
        submission: of the items' task.
        items: of the whole split.
        graphs: of the items' scans.

    Returns:
        Missing, doubled and unknown ids; trajectories that do not begin at the item's start, leave the graph,
        or have a gap; empty when there is nothing to refuse.

    Raises:
        ValueError: the items are of another task, or a scan has no graph.
    """
    expected = _expected(submission.task, items)
    counts = Counter(row.item_id for row in submission.predictions)
    faults = [Fault("missing", name, "is missing") for name in expected if name not in counts]
    faults += [Fault("doubled", name, f"occurs {count} times") for name, count in counts.items() if count > 1]
    faults += [
        Fault("unknown", name, "is unknown: no item of the split has this id")
        for name in counts
        if name not in expected
    ]
    for row in submission.predictions:
        if row.item_id in expected:
            scan_id, start = expected[row.item_id]
            if scan_id not in graphs:
                raise ValueError(f"no graph of scan {scan_id}: load the graphs of all scans of the items")
            faults += _trajectory_faults(row, start, graphs[scan_id])
    return faults


def _expected(task: Task, items: Sequence[Item]) -> dict[str | int, tuple[str, str]]:
    """Ids of a split with the scan and the start of each."""
    expected: dict[str | int, tuple[str, str]] = {}
    kinds = {"r2r": R2RItem | RxRItem, "ndh": NDHItem, "hanna": HannaTask}
    for item in items:
        if not isinstance(item, kinds[task]):
            raise ValueError(f"the submission is for {task} but the items are {type(item).__name__}s")
        if isinstance(item, NDHItem):
            expected[item.inst_idx] = item.scan_id, item.start
        elif isinstance(item, R2RItem | RxRItem):
            expected |= dict.fromkeys(item.instruction_ids, (item.scan_id, item.path[0]))
        else:
            expected |= dict.fromkeys(item.instruction_ids, (item.scan_id, item.paths[0][0]))
    return expected


def _trajectory_faults(row: Prediction, start: str, graph: NavGraph) -> Iterator[Fault]:
    """The first fault of a trajectory, if it has one."""
    path = [pose.viewpoint_id for pose in row.trajectory]
    if path[0] != start:
        yield Fault("start", row.item_id, f"begins at {path[0]}, expected the item's start {start}")
        return
    before = -1
    for step, viewpoint_id in enumerate(path):
        try:
            here = graph.index(viewpoint_id)
        except ValueError as error:
            yield Fault("graph", row.item_id, f"step {step}: {error}")
            return
        if not graph.included[here]:
            text = f"step {step}: viewpoint {viewpoint_id} of scan {graph.scan_id} is excluded"
            yield Fault("graph", row.item_id, text)
            return
        if before >= 0 and here != before and here not in graph.neighbours[before]:
            text = f"has a gap at step {step}: one cannot walk from {path[step - 1]} to {viewpoint_id}"
            yield Fault("gap", row.item_id, text)
            return
        before = here
