"""Check and score a submission, or walk an agent and score that.

``python -m vln.evaluate SUBMISSION --data DIR --split val_unseen`` takes a file; ``python -m vln.evaluate RUN
--data DIR`` takes a run of ``vln.train`` and writes the submission first.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro

from fq.provenance import provenance
from fq.run import write_atomically
from vln.data import HannaTask, NDHItem, R2RItem, read_hanna, read_ndh, read_r2r
from vln.metrics import HannaScores, NDHScores, R2RScores, mean_scores, score_hanna, score_ndh, score_r2r
from vln.navgraph import NavGraph, load_graphs
from vln.submission import Submission, find_faults, read_submission

Scores = R2RScores | NDHScores | HannaScores

_READERS: dict[str, Callable[..., Sequence[Any]]] = {"r2r": read_r2r, "ndh": read_ndh, "hanna": read_hanna}
_SHOWN = 10
"""Faults that an error message lists."""

COLUMNS: dict[str, dict[str, str]] = {
    "r2r": {"TL": "length", "NE": "nav_error", "OSR %": "oracle_success", "SR %": "success", "SPL %": "spl",
            "nDTW %": "ndtw", "SDTW %": "sdtw", "CLS %": "cls"},
    "ndh": {"GP": "goal_progress", "OGP": "oracle_progress", "TL": "length", "NE": "nav_error",
            "OSR %": "oracle_success", "OPSR %": "oracle_path_success", "SR %": "success", "SPL %": "spl"},
    "hanna": {"TL": "length", "NE": "error", "OSR %": "oracle_success", "SR %": "success", "SPL %": "spl",
              "#R": "num_requests", "targets %": "target_success_rate"},
}  # fmt: skip
"""Columns of the printed table and what each holds; metres, or percent where the name says so."""


@dataclass(frozen=True, kw_only=True)
class WalkConfig:
    """How an agent walks; for runs alone.

    Raises:
        ValueError: a number is outside its range.
    """

    features: str = "features"
    """Store of view features, a folder there or below data; random:WIDTH gives each view a fixed random
    vector."""
    tokenizer: str = ""
    """Tokeniser, a folder there or below data; that of the run when empty."""
    batch_size: int = 100
    """Episodes walked together; the scores do not depend on it."""
    max_steps: int = 0
    """Longest walk; 0 takes 35, and 40 for NDH, 50 for HANNA, as the originals do."""
    avoid_loops: bool = False
    """Take no viewpoint again (R2R, NDH)."""
    turns: bool = False
    """Write the poses between viewpoints too, as the originals do; they count in steps, nDTW and CLS."""
    submission_out: str = ""
    """Submission to write; RUN/SPLIT.json when empty."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_steps < 0:
            raise ValueError(
                f"batch_size is {self.batch_size} and max_steps {self.max_steps}: give at least 1 "
                "and at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Check a submission for what a leaderboard would refuse, and score it if the split has goals."""

    submission: Annotated[str, tyro.conf.Positional]
    """JSON file, whose rows tell the task: R2R, NDH or HANNA; or a run of vln.train, whose best agent then
    walks the split first."""
    split: str = "val_unseen"
    """Split of the items; with the R2R test split, which has no goals, the submission is checked alone."""
    data: str = "data/vln"
    """Folder with items and graphs, unpacked or in archives: r2r/, ndh/, hanna/, connectivity/."""
    items: str = ""
    """JSON file of the items instead."""
    graphs: str = ""
    """Folder or archive of the connectivity files instead."""
    deduplicate: bool = False
    """Leave consecutive repeats of a viewpoint out of nDTW, SDTW and CLS (R2R)."""
    lenient: bool = False
    """Score as the first evaluators do: ignore unknown ids, take the first of doubled ones, charge gaps as
    walked."""
    out: str = ""
    """JSON to write; SUBMISSION.scores.json when empty."""
    agent: tyro.conf.OmitArgPrefixes[WalkConfig] = field(default_factory=WalkConfig)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Check and score a submission.

    Args:
        config: see :class:`EvaluateConfig`.

    Returns:
        ``{"submission", "task", "split", "num_items", "scores", "items", "provenance"}``. ``scores`` has for
        every way to score (one, but for NDH one a path type) the mean scores, ``items`` the same for every
        item; both are empty for a split without goals.

    Raises:
        FileNotFoundError: submission, items or graphs are missing.
        ValueError: a file is damaged, or the submission would be refused; the text lists the faults.
    """
    submission = read_submission(config.submission)
    source, split = (config.items, None) if config.items else (config.data, config.split)
    items = _READERS[submission.task](source, split)
    graphs = load_graphs(config.graphs or config.data, sorted({item.scan_id for item in items}))
    faults = find_faults(submission, items, graphs)
    if faults and not config.lenient:
        shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN])
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        kinds = ", ".join(
            f"{number} {kind}" for kind, number in Counter(fault.kind for fault in faults).items()
        )
        raise ValueError(f"{config.submission} would be refused ({kinds}):\n{shown}{more}")
    scores = _score(submission, items, graphs, deduplicate=config.deduplicate)
    return {
        "submission": config.submission,
        "task": submission.task,
        "split": config.items or config.split,
        "num_items": len(items)
        if submission.task == "ndh"
        else sum(len(item.instructions) for item in items),
        "deduplicate": config.deduplicate,
        "lenient": config.lenient,
        "num_faults": len(faults),
        "scores": {name: mean_scores(value) for name, value in scores.items()},
        "items": {name: _by_item(value) for name, value in scores.items()},
        "provenance": provenance(0),
    }


def _score(
    submission: Submission, items: Sequence[Any], graphs: Mapping[str, NavGraph], *, deduplicate: bool
) -> dict[str, Scores]:
    """Scores by their way of scoring; none for a split without goals."""
    if not any(_has_goal(item) for item in items):
        return {}
    if submission.task == "r2r":
        return {"r2r": score_r2r(submission.paths, items, graphs, deduplicate=deduplicate)}
    if submission.task == "hanna":
        return {"hanna": score_hanna(submission.results, items, graphs)}
    return {
        path_type: score_ndh(submission.paths, items, graphs, path_type=path_type)
        for path_type in ("planner_path", "player_path", "trusted_path")
    }


def _has_goal(item: R2RItem | NDHItem | HannaTask) -> bool:
    if isinstance(item, NDHItem):
        return bool(item.end_panos and item.planner_path)
    return isinstance(item, HannaTask) or item.distance is not None or len(item.path) > 1


def _by_item(scores: Scores) -> dict[str, dict[str, float]]:
    names = cast("tuple[str | int, ...]", scores[0])
    values = {name: value for name, value in scores._asdict().items() if isinstance(value, np.ndarray)}
    return {
        str(item): {name: float(value[row]) for name, value in values.items()}
        for row, item in enumerate(names)
    }


def table(result: Mapping[str, Any]) -> str:
    """The mean scores as text, one line for each way of scoring."""
    columns = COLUMNS[result["task"]]
    lines = ["".join([" " * 14, *(f"{name:>10}" for name in columns)])]
    for name, scores in result["scores"].items():
        cells = [scores[field] * (100 if title.endswith("%") else 1) for title, field in columns.items()]
        lines.append("".join([f"{name:14}", *(f"{cell:10.2f}" for cell in cells)]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, print the scores and write them with those of every item.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(
            EvaluateConfig,
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vln.evaluate",
        )
        if Path(config.submission).is_dir():
            # Imported here: whoever scores a file needs no model.
            from vln.evaluate_agent import walk

            config = replace(config, submission=str(walk(config)))
            print(f"submission written to {config.submission}")
        result = evaluate(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    target = config.out or f"{config.submission}.scores.json"
    verdict = f"{result['num_faults']} faults passed over" if result["num_faults"] else "nothing to refuse"
    print(f"{result['task']} {result['split']}: {result['num_items']} items, {verdict}")
    if not result["scores"]:
        print("the items have starts alone: checked, not scored")
        return
    print(table(result))
    write_atomically(target, json.dumps(result, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
