"""Check and score a submission, or walk an agent and score that.

``python -m vln.evaluate SUBMISSION --data DIR --split val_unseen`` takes a file; ``python -m vln.evaluate RUN
--data DIR`` takes a run of ``vln.train`` and writes the submission first: of a greedy walk, with ``--search``
of state-factored search, with ``--explore`` of a greedy walk after pre-exploration. The scores say which.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import tyro

from fq.provenance import provenance
from fq.run import write_atomically
from vln.checks import warn_of_findings
from vln.data import HannaTask, NDHItem, R2RItem, RxRItem, read_hanna, read_ndh, read_r2r, read_r4r, read_rxr
from vln.evaluate_config import EvaluateConfig, WalkConfig
from vln.evaluate_provenance import dataset_of, setting_of
from vln.metrics import HannaScores, NDHScores, R2RScores, mean_scores, score_hanna, score_ndh, score_r2r
from vln.navgraph import NavGraph, load_graphs
from vln.submission import Submission, find_faults, read_submission

__all__ = ["COLUMNS", "EvaluateConfig", "WalkConfig", "evaluate", "main", "table"]

Scores = R2RScores | NDHScores | HannaScores

_READERS: dict[str, Callable[..., Sequence[Any]]] = {
    "r2r": read_r2r, "r4r": read_r4r, "rxr": read_rxr, "ndh": read_ndh, "hanna": read_hanna,
}  # fmt: skip
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


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Check and score a submission.

    Args:
        config: see :class:`EvaluateConfig`.

    Returns:
        ``{"submission", "task", "dataset", "split", "setting", "num_items", "scores", "items",
        "provenance"}``.
        ``setting`` is greedy, search or pre-explored where an agent of ours walked, else ``None``. ``scores``
        has for every way to score the mean scores (one, named like the data set; for NDH one a path type),
        ``items`` the same for every item; both are empty for a split without goals.

    Raises:
        FileNotFoundError: submission, items or graphs are missing.
        ValueError: a file is damaged, or the submission would be refused; the text lists the faults.
    """
    submission = read_submission(config.submission)
    source, split = (config.items, None) if config.items else (config.data, config.split)
    if config.dataset and submission.task != "r2r":
        raise ValueError(f"{config.submission} is for {submission.task}, not for {config.dataset}")
    dataset: str = submission.task
    if dataset == "r2r":
        dataset = config.dataset or dataset_of(config.submission) or dataset
    items = _READERS[dataset](source, split)
    graphs = load_graphs(config.graphs or config.data, sorted({item.scan_id for item in items}))
    warn_of_findings({config.split: items}, graphs, file=config.items)
    faults = find_faults(submission, items, graphs)
    if faults and not config.lenient:
        shown = "\n".join(f"  {fault}" for fault in faults[:_SHOWN])
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        kinds = ", ".join(
            f"{number} {kind}" for kind, number in Counter(fault.kind for fault in faults).items()
        )
        raise ValueError(f"{config.submission} would be refused ({kinds}):\n{shown}{more}")
    scores = _score(submission, dataset, items, graphs, deduplicate=config.deduplicate)
    return {
        "submission": config.submission,
        "task": submission.task,
        "dataset": dataset,
        "split": config.items or config.split,
        "setting": setting_of(config.submission),
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
    submission: Submission,
    dataset: str,
    items: Sequence[Any],
    graphs: Mapping[str, NavGraph],
    *,
    deduplicate: bool,
) -> dict[str, Scores]:
    """Scores by their way of scoring; none for a split without goals."""
    if not any(_has_goal(item) for item in items):
        return {}
    if submission.task == "r2r":
        found = score_r2r(
            submission.paths, items, graphs, deduplicate=deduplicate, annotated_length=dataset == "r4r"
        )
        return {dataset: found}
    if submission.task == "hanna":
        return {"hanna": score_hanna(submission.results, items, graphs)}
    return {
        path_type: score_ndh(submission.paths, items, graphs, path_type=path_type)
        for path_type in ("planner_path", "player_path", "trusted_path")
    }


def _has_goal(item: R2RItem | RxRItem | NDHItem | HannaTask) -> bool:
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
        elif config.setting.name != "greedy" or config.agent != WalkConfig():
            raise ValueError(
                f"{config.submission} is no folder: search and pre-exploration, and how to walk, are for a "
                "run of vln.train"
            )
        result = evaluate(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    target = config.out or f"{config.submission}.scores.json"
    verdict = f"{result['num_faults']} faults passed over" if result["num_faults"] else "nothing to refuse"
    setting = f", {result['setting']}" if result["setting"] else ""
    print(f"{result['dataset']} {result['split']}{setting}: {result['num_items']} items, {verdict}")
    if not result["scores"]:
        print("the items have starts alone: checked, not scored")
        return
    print(table(result))
    if result["setting"] not in (None, "greedy"):
        print(f"setting {result['setting']}: not to be compared with scores of another setting")
    write_atomically(target, json.dumps(result, indent=1) + "\n")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
