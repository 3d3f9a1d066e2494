"""Report of `benchmarks.prevalent`: paired intervals, tables, curves and maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.compare import portable
from fq.run import load_config, read_metrics, write_atomically
from vln.data import read_r2r
from vln.maps import draw_episode
from vln.navgraph import load_graphs
from vln.plans import read_plans
from vln.render import episodes_of
from vln.submission import read_submission

SETTINGS = ("search", "pre-explored")
"""More than one greedy walk; tried on the first seed's (d)."""

RANKS = "pretrain-rank"
"""As (c), but the action is its rank among the candidates; pre-trained for the first seed, to compare."""

ALONE = "actions"
"""As (c), but nothing except the action is learnt: what that brings by itself, for the first seed."""

RESAMPLES = 10_000
_MAPS = 3


class Column(NamedTuple):
    """A score: its title, its name in the files, and what it is multiplied with."""

    title: str
    field: str
    factor: float = 100.0


COLUMNS = {
    "r2r": (
        Column("SR", "success"), Column("SPL", "spl"), Column("OSR", "oracle_success"),
        Column("nDTW", "ndtw"), Column("NE, m", "nav_error", 1.0),
    ),
    "ndh": (Column("GP, m", "goal_progress", 1.0), Column("SR", "success"), Column("SPL", "spl")),
    "hanna": (
        Column("SR", "success"), Column("SPL", "spl"), Column("error, m", "error", 1.0),
        Column("requests", "num_requests", 1.0),
    ),
}  # fmt: skip
COLUMNS["real"] = COLUMNS["r2r"]
PAIRS = {
    "r2r": (("c", "a"), ("d", "c"), ("d", "a"), ("b", "a"), ("c", "b"), ("a+", "a"), ("c", "a+"), ("c+", "c"),
            ("d", "c+")),
    "ndh": (("d", "a"),),
    "hanna": (("d", "a"),),
    "real": (("c", "a"),),
}  # fmt: skip
"""Arms that are set beside each other; those that must differ come first."""


class Interval(NamedTuple):
    """A difference with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside."""
        return not self.low <= 0 <= self.high


def paired_interval(
    first: np.ndarray, second: np.ndarray, groups: Sequence[Any], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of ``first - second`` with the interval of a bootstrap over seeds and groups of items.

    Both seeds and groups are drawn with replacement; a seed keeps its pair of runs together, and a group the
    instructions of one path, which are not independent.

    Args:
        first: scores ``[S, N]`` of S seeds and N items.
        second: of the same seeds and items.
        groups: of each item, ``[N]``.
        seed: of the draws.
        resamples: how many.

    Example:
        >>> ones = np.ones((3, 4))
        >>> paired_interval(ones, ones / 2, [0, 0, 1, 1], resamples=10)
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.stack([np.bincount(group, weights=row) for row in difference])  # [S, G]
    sizes = np.bincount(group)
    random, means = np.random.default_rng(seed), np.empty(resamples)
    for number in range(resamples):
        rows = random.integers(len(sums), size=len(sums))
        picked = random.integers(len(sizes), size=len(sizes))
        means[number] = sums[rows][:, picked].sum() / (len(rows) * sizes[picked].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))


class Scores(NamedTuple):
    """Scores of one arm on one split."""

    names: tuple[str, ...]
    """Of the items, ``[N]``."""
    values: dict[str, np.ndarray]
    """By score: ``[S, N]``."""


def read_scores(files: Sequence[Path], task: str) -> Scores:
    """What `vln.evaluate` wrote for each seed.

    Raises:
        ValueError: they are not of the same items.
    """
    found = []
    for file in files:
        items = json.loads(file.read_text())["items"]
        found.append(items[{"ndh": "trusted_path", "real": "r2r"}.get(task, task)])
    names = tuple(found[0])
    for file, items in zip(files, found, strict=True):
        if tuple(items) != names:
            raise ValueError(f"{file} has other items than {files[0]}: make both with the same data")
    fields = [column.field for column in COLUMNS[task]]
    values = {
        field: np.array([[items[name][field] for name in names] for items in found]) for field in fields
    }
    return Scores(names, values)


def path_of(name: str) -> str:
    """The path that an instruction belongs to: ``17_2`` to ``17``; other names stay."""
    return name.rpartition("_")[0] or name


def score_table(task: str, scores: Mapping[str, Scores], labels: Mapping[str, str]) -> list[str]:
    """A row an arm: mean over items and seeds, and the deviation over seeds."""
    columns = COLUMNS[task]
    lines = ["| arm | | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for arm, found in scores.items():
        cells = []
        for column in columns:
            seeds = found.values[column.field].mean(axis=1) * column.factor
            digits = 1 if column.factor > 1 else 2
            spread = f" ± {seeds.std(ddof=1):.{digits}f}" if len(seeds) > 1 else ""
            cells.append(f"{seeds.mean():.{digits}f}{spread}")
        lines.append(f"| ({arm}) | {labels[arm]} | " + " | ".join(cells) + " |")
    return lines


def difference_table(task: str, scores: Mapping[str, Scores]) -> tuple[list[str], dict[str, Any]]:
    """Differences between arms with their intervals, as lines and as numbers."""
    columns = [column for column in COLUMNS[task] if column.title in ("SR", "SPL", "GP, m")]
    lines = [
        "| | " + " | ".join(column.title for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    numbers: dict[str, Any] = {}
    for better, worse in PAIRS[task]:
        if better not in scores or worse not in scores:
            continue
        groups = [path_of(name) for name in scores[better].names]
        cells = []
        for column in columns:
            ours, theirs = (scores[arm].values[column.field] * column.factor for arm in (better, worse))
            found = paired_interval(ours, theirs, groups)
            numbers[f"{better} - {worse}, {column.field}"] = found._asdict()
            mark = "" if found.excludes_zero else " (0 is inside)"
            cells.append(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{mark}")
        lines.append(f"| ({better}) - ({worse}) | " + " | ".join(cells) + " |")
    return lines, numbers


def draw_curves(runs: Path, seeds: Sequence[int], tasks: Mapping[str, Sequence[str]], path: Path) -> None:
    """What agents reach on unseen houses over their fine-tuning, means over seeds with their range.

    Args:
        runs: folder of the run folders.
        seeds: of the runs.
        tasks: arms by task.
        path: of the PNG.
    """
    shown = {
        "r2r": ("val_unseen/success", "R2R: SR, %", 100.0),
        "ndh": ("val_unseen/goal_progress", "NDH: GP, m", 1.0),
        "hanna": ("val_unseen_all/success", "HANNA: SR, %", 100.0),
        "real": ("val_seen/success", "R2R's own, random features: SR, %", 100.0),
    }
    figure = Figure(figsize=(5.2 * len(tasks), 3.6), layout="constrained")
    for axis, (task, arms) in zip(
        figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True
    ):
        key, title, factor = shown[task]
        for number, arm in enumerate(arms):
            curves = [_curve(runs / f"{task}-{arm}-{seed}", key) for seed in seeds_of(task, seeds)]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[step] * factor for step in steps] for curve in curves])
            line = axis.plot(
                steps, values.mean(axis=0), "os^Dvx"[number % 6] + "-", label=f"({arm})", markersize=4
            )
            axis.fill_between(
                steps, values.min(axis=0), values.max(axis=0), alpha=0.12, color=line[0].get_color()
            )
        axis.set_xlabel("steps of fine-tuning")
        axis.set_title(f"{title}, {key.partition('/')[0]}")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)


def draw_pretraining(runs: Path, seeds: Sequence[int], arms: Sequence[str], path: Path) -> None:
    """Both accuracies of the pre-training on paths of the known houses.

    Args:
        runs: folder of the run folders.
        seeds: of the runs.
        arms: pre-trained ones.
        path: of the PNG.
    """
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    for axis, (key, title) in zip(
        figure.subplots(1, 2),
        (("mlm_accuracy", "masked words, % right"), ("action_accuracy", "actions, % right")),
        strict=True,
    ):
        for number, arm in enumerate(arms):
            curves = [_curve(runs / f"pretrain-{arm}-{seed}", f"val_seen/{key}") for seed in seeds]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            if not steps:
                continue  # an objective that is off
            values = np.array([[curve[step] * 100 for step in steps] for curve in curves])
            axis.plot(steps, values.mean(axis=0), "sD^v"[number % 4] + "-", label=f"({arm})", markersize=4)
        axis.set_xlabel("steps of pre-training")
        axis.set_title(f"{title}, val_seen")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)


def _curve(folder: Path, key: str) -> dict[int, float]:
    return {int(line["step"]): line[key] for line in read_metrics(folder) if key in line}


def draw_maps(runs: Path, seed: int, scores: Mapping[str, Scores], row: int, out: Path) -> list[str]:
    """Episodes in unseen houses that (d) solves and (a) does not, each drawn with both ways.

    Args:
        runs: folder of the run folders.
        seed: of the agents.
        scores: of R2R's arms on val_unseen.
        row: of that seed among them.
        out: folder of the PNGs.

    Returns:
        Their names.
    """
    good, bad = (scores[arm].values["success"][row] > 0 for arm in ("d", "a"))
    spl = scores["d"].values["spl"][row]
    order = sorted(np.flatnonzero(good & ~bad), key=lambda place: -spl[place])
    wanted: dict[str, str] = {}  # one a path, and no two of the same house if there are others
    world = runs / "world"
    episodes = {
        str(name): episode for item in read_r2r(world, "val_unseen") for name, episode in episodes_of(item)
    }
    for place in order:
        name = scores["d"].names[place]
        wanted.setdefault(episodes[name].scan_id, name)
    plans, graphs = read_plans(world), load_graphs(world)
    written: list[str] = []
    for scan_id, name in list(wanted.items())[:_MAPS]:
        for arm in ("a", "d"):
            walked = read_submission(runs / f"r2r-{arm}-{seed}.val_unseen.json").paths[name]
            verdict = "reaches the goal" if arm == "d" else "misses the goal"
            episode = episodes[name]._replace(predicted=tuple(walked), note=f"({arm}) {verdict}")
            picture = f"map_{len(written) // 2}_{arm}.png"
            draw_episode(graphs[scan_id], episode, plan=plans.get(scan_id)).save(out / picture)
            written.append(picture)
    return written


def setting_table(runs: Path, seed: int, split: str, settings: Sequence[str]) -> list[str]:
    """One agent greedily and in other settings, a row each."""
    columns = COLUMNS["r2r"]
    lines = ["| setting | " + " | ".join(column.title for column in columns) + " | walked, m |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for setting in ("greedy", *settings):
        result = json.loads(_setting_scores(runs, seed, split, setting).read_text())
        if result["setting"] != setting:
            raise ValueError(f"scores of {setting} say {result['setting']}: delete them, they are made anew")
        means = result["scores"]["r2r"]
        cells = [
            f"{means[column.field] * column.factor:.{1 if column.factor > 1 else 2}f}" for column in columns
        ]
        lines.append(f"| {setting} | " + " | ".join(cells) + f" | {means['length']:.0f} |")
    return lines


def _setting_scores(runs: Path, seed: int, split: str, setting: str) -> Path:
    ending = "" if setting == "greedy" else f".{setting}"
    return runs / f"r2r-d-{seed}.{split}{ending}.scores.json"


def effort(runs: Path, seeds: Sequence[int], arms: Sequence[str]) -> list[str]:
    """What each arm of R2R cost: pre-training and fine-tuning, means over seeds."""
    lines = [
        "| arm | triplets seen | pre-training, processor minutes | fine-tuning, steps | processor minutes |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        tuned = [runs / f"r2r-{arm}-{seed}" for seed in seeds]
        before = [folder for seed in seeds if (folder := runs / f"pretrain-{arm}-{seed}").is_dir()]
        seen = "0"
        if before:
            config = load_config(before[0])
            optim = config["optim"]
            seen = f"{config['run']['steps'] * optim['batch_size'] * optim['accumulation']:,}"
        steps = np.mean([load_config(folder)["run"]["steps"] for folder in tuned])
        cost = [processor_seconds(runs, [folder.name for folder in folders]) / 60 if folders else 0.0
                for folders in (before, tuned)]  # fmt: skip
        lines.append(f"| ({arm}) | {seen} | {cost[0]:.1f} | {steps:.0f} | {cost[1]:.1f} |")
    return lines


def add_processor_seconds(runs: Path, name: str, seconds: float) -> None:
    """Add to the processor time of a job: a run that is resumed takes several processes."""
    file = runs / "logs" / f"{name}.seconds"
    file.parent.mkdir(parents=True, exist_ok=True)
    before = float(file.read_text()) if file.is_file() else 0.0
    write_atomically(file, f"{before + seconds:.1f}\n")


def processor_seconds(runs: Path, names: Sequence[str]) -> float:
    """Mean processor time of jobs, of those whose time is known: other work on the machine is not in it.

    Raises:
        ValueError: it is known of none.
    """
    files = [file for name in names if (file := runs / "logs" / f"{name}.seconds").is_file()]
    if not files:
        raise ValueError(
            f"the processor time of {', '.join(names)} is not known, runs/logs/*.seconds are missing: "
            "run one of them anew"
        )
    return float(np.mean([float(file.read_text()) for file in files]))


def target_table(folders: Mapping[str, Path]) -> list[str]:
    """How well each kind of action is told on known scans, beside what its commonest answer would reach."""
    lines = ["| action | right, % | commonest answer, % |", "|---|---|---|"]
    for name, folder in folders.items():
        told = [line for line in read_metrics(folder) if "val_seen/action_accuracy" in line][-1]
        right, floor = (told[f"val_seen/action_{key}"] * 100 for key in ("accuracy", "floor"))
        lines.append(f"| {name} | {right:.1f} | {floor:.1f} |")
    return lines


def learnt_table(
    runs: Path, seeds: Sequence[int], arms: Sequence[str], labels: Mapping[str, str], splits: Sequence[str]
) -> list[str]:
    """Losses of the pre-trainings on known scans beside what R2R's agents made of them, means over seeds."""
    lines = [
        "On paths of known scans that it did not see; beside it what the R2R agents made of it.", "",
        "| pre-training | loss of masked words | loss of actions, lowest, at step | at the end | "
        f"SR, SPL on {splits[0]} | on {splits[1]} |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = {
        arm: (f"({arm}) {labels[arm]}", seeds)
        for arm in arms
        if (runs / f"pretrain-{arm}-{seeds[0]}").is_dir()
    }
    if (runs / f"r2r-{ALONE}-{seeds[0]}.{splits[1]}.scores.json").is_file():
        rows[ALONE] = f"actions alone, seed {seeds[0]}", seeds[:1]
    for arm, (title, each) in rows.items():
        words, actions = (
            [_curve(runs / f"pretrain-{arm}-{seed}", f"val_seen/{loss}_loss") for seed in each]
            for loss in ("mlm", "action")
        )
        least = [min((loss, step) for step, loss in curve.items()) for curve in actions if curve]
        cells = [
            _mean([curve[max(curve)] for curve in words if curve]),
            ", ".join(filter(None, [_mean([loss for loss, _ in least]), *(str(step) for _, step in least)])),
            _mean([curve[max(curve)] for curve in actions if curve]),
        ]  # fmt: skip
        for split in splits:
            found = read_scores([runs / f"r2r-{arm}-{seed}.{split}.scores.json" for seed in each], "r2r")
            cells.append(", ".join(f"{100 * found.values[name].mean():.1f}" for name in ("success", "spl")))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if values else ""


def spoken(runs: Path, seeds: Sequence[int]) -> list[str]:
    """How good the speakers are, and what they said."""
    lines = []
    for seed in seeds:
        if not (runs / f"told-{seed}.json").is_file():
            continue
        scored = _curve(runs / f"speaker-{seed}", "val_seen/bleu_original")
        rows = json.loads((runs / f"told-{seed}.json").read_text())
        texts = sum(len(row["instructions"]) for row in rows)
        houses = len({row["scan"] for row in rows})
        lines.append(
            f"* Seed {seed}: BLEU {max(scored.values()):.1f} on val_seen; {texts:,} instructions of "
            f"{len(rows):,} sampled paths in {houses} training houses, the first: "
            f"“{rows[0]['instructions'][0]}”"
        )
    return lines


def provenance_table(folders: Sequence[Path]) -> list[str]:
    """Command, seed, commit and machine of each run."""
    lines = ["| run | command | seed | commit | machine |", "|---|---|---|---|---|"]
    for folder in folders:
        entry: dict[str, Any] = json.loads((folder / "provenance.json").read_text())[-1]
        lines.append(
            f"| {folder.name} | `{portable(entry['command'])}` | {entry['seed']} | {entry['commit'][:9]} | "
            f"{entry['device_name']} |"
        )
    return lines


TITLES = {
    "r2r": "R2R",
    "ndh": "NDH",
    "hanna": "HANNA",
    "real": "R2R's own scans and instructions, a fixed random vector for each view, one seed",
}


def write(
    runs: Path, out: Path, seeds: Sequence[int], tasks: Mapping[str, Sequence[str]],
    labels: Mapping[str, str], splits: Mapping[str, tuple[str, ...]], settings: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Report, pictures and numbers of runs; arms without the scores of every seed are left out, and named.

    Args:
        runs: folder of the run folders.
        out: folder, made if missing.
        seeds: of the runs.
        tasks: arms by task.
        labels: of the arms.
        splits: by task, that of known and that of unseen houses, if there is one.
        settings: in which the first seed's (d) walked the unseen houses of R2R, besides greedily.

    Returns:
        The report.

    Raises:
        ValueError: no arm is finished.
    """
    wanted = [(task, arm) for task, arms in tasks.items() for arm in arms]
    missing = [(task, arm) for task, arm in wanted if not _is_scored(runs, seeds, task, arm, splits[task])]
    tasks = {task: [arm for arm in arms if (task, arm) not in missing] for task, arms in tasks.items()}
    tasks = {task: arms for task, arms in tasks.items() if arms}
    if not tasks:
        raise ValueError(f"{runs} has no arm with the scores of seeds {', '.join(map(str, seeds))}")
    out.mkdir(parents=True, exist_ok=True)
    lines, numbers = _head(runs, seeds, "real" in tasks), dict[str, Any]()
    if missing:
        listed = ", ".join(f"{task} ({arm})" for task, arm in missing)
        lines += [f"**Not finished, and left out: {listed}.**", ""]
    maps: list[str] = []
    for task, arms in tasks.items():
        lines += [f"## {TITLES[task]}", ""]
        for split, where in zip(splits[task], ("known", "unseen"), strict=False):
            scores = {
                arm: read_scores(
                    [runs / f"{task}-{arm}-{seed}.{split}.scores.json" for seed in seeds_of(task, seeds)],
                    task,
                )
                for arm in arms
            }
            count = len(next(iter(scores.values())).names)
            differences, found = difference_table(task, scores)
            lines += [f"### {split}: {where} scans, {count:,} instructions", ""]
            lines += [*score_table(task, scores, labels), "", *differences, ""]
            numbers[f"{task}/{split}"] = {
                "means": {arm: {field: value.mean(axis=1).tolist() for field, value in row.values.items()}
                          for arm, row in scores.items()},
                "differences": found,
            }  # fmt: skip
            if task == "r2r" and where == "unseen" and {"a", "d"} <= scores.keys():
                maps = draw_maps(runs, seeds[0], scores, 0, out)
        if task == "r2r":
            lines += [*effort(runs, seeds, arms), ""]
            unseen = splits[task][1]
            if settings and all(_setting_scores(runs, seeds[0], unseen, name).is_file() for name in settings):
                lines += [
                    f"### Settings: (d) of seed {seeds[0]} on {splits[task][1]}", "",
                    "Never to be compared with each other: a search walks far before it decides, and a "
                    "pre-explored agent has learnt in the very scans, from its own speaker's words.", "",
                    *setting_table(runs, seeds[0], splits[task][1], settings), "",
                ]  # fmt: skip
            lines += [*_gallery(maps), ""] if maps else []
    draw_curves(runs, seeds, tasks, out / "curves.png")
    lines += ["## Curves", "", "![fine-tuning](curves.png)", ""]
    if "r2r" in tasks:
        trained = [arm for arm in tasks["r2r"] if (runs / f"pretrain-{arm}-{seeds[0]}").is_dir()]
        draw_pretraining(runs, seeds, trained, out / "pretraining.png")
        lines += ["![pre-training](pretraining.png)", ""]
        targets = {"one of 36 views, counted from the heading, or STOP": "pretrain-c",
                   "rank among the candidates": RANKS}  # fmt: skip
        learnt = learnt_table(runs, seeds, tasks["r2r"], labels, splits["r2r"])
        lines += ["## What the pre-training learns", "", *learnt, ""]
        folders_of = {title: runs / f"{name}-{seeds[0]}" for title, name in targets.items()}
        if all((folder / "model").is_dir() for folder in folders_of.values()):
            lines += ["## What the action is", "", f"As (c), seed {seeds[0]}, equally long:", ""]
            lines += [*target_table(folders_of), ""]
    lines += ["## What the speakers say", "", *spoken(runs, seeds), "", "## Runs", ""]
    folders = sorted(path.parent for path in runs.glob("*/provenance.json"))
    spent, besides = _spent(runs)
    lines += [
        f"Scores and differences in the houses took {spent:.0f} minutes of one core, all other figures on "
        f"this page {besides:.0f}.", "", *provenance_table(folders), "",
    ]  # fmt: skip
    records = [json.loads((folder / "provenance.json").read_text())[-1] for folder in folders]
    numbers["runs"] = {
        "seeds": list(seeds), "arms": dict(labels), "minutes": round(spent, 1),
        "minutes_besides": round(besides, 1),
        "missing": [f"{task} ({arm})" for task, arm in missing],
        "device_name": records[-1]["device_name"], "torch": records[-1]["versions"]["torch"],
        "commits": sorted({record["commit"] for record in records}),
    }  # fmt: skip
    write_atomically(out / "results.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _spent(runs: Path) -> tuple[float, float]:
    """Processor minutes: of the arms in the houses, and of R2R's own items, settings and kinds of action."""
    minutes, others = [0.0, 0.0], ("real-", f"{RANKS}-", f"pretrain-{ALONE}-", f"r2r-{ALONE}-")
    for file in (runs / "logs").glob("*.seconds"):
        is_setting = any(f".{name}." in file.name for name in SETTINGS)
        minutes[is_setting or file.name.startswith(others)] += float(file.read_text()) / 60
    return minutes[0], minutes[1]


def _is_scored(runs: Path, seeds: Sequence[int], task: str, arm: str, splits: Sequence[str]) -> bool:
    names = [f"{task}-{arm}-{seed}.{split}" for seed in seeds_of(task, seeds) for split in splits]
    return all((runs / f"{name}.scores.json").is_file() for name in names)


def seeds_of(task: str, seeds: Sequence[int]) -> Sequence[int]:
    """Seeds that a task was run with: R2R's own items with the first one alone."""
    return seeds[:1] if task == "real" else seeds


def _head(runs: Path, seeds: Sequence[int], real: bool) -> list[str]:
    more = " --real FOLDER --tokenizer FOLDER" if real else ""
    made = load_config(runs / "world" / "config.json")["config"]
    train, unseen = (
        len({item.scan_id for item in read_r2r(runs / "world", split)}) for split in ("train", "val_unseen")
    )
    return [
        "# Pre-training in the embedded houses",
        "",
        f"`python -m benchmarks.prevalent --seeds {' '.join(map(str, seeds))}{more}`",
        "",
        f"A world of {made['num_seen']} training houses and {made['num_unseen']} unseen ones, seed "
        f"{made['seed']}; R2R's items lie in {train} and {unseen} of them. Small networks from random "
        "weights; every seed has a speaker, pre-trainings and agents of its own. Speaker, sampled paths and "
        "pre-training see the training houses alone, and the best agent of a run is chosen on val_seen. ± is "
        "the deviation over seeds. A difference has the 95 % interval of a bootstrap over seeds and paths, "
        "paired by seed and instruction.",
        "",
    ]


def _gallery(maps: Sequence[str]) -> list[str]:
    pairs = [maps[place : place + 2] for place in range(0, len(maps), 2)]
    lines = ["Episodes in unseen houses that (d) solves, right, and (a) does not, left:", ""]
    return [*lines, *(f"![(a)]({left}) ![(d)]({right})" for left, right in pairs)]
