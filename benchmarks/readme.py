"""Put the measured numbers into the README and the docs: ``python -m benchmarks.readme``.

What stands between the marks is made from ``benchmarks/results`` alone, and a test holds both together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.search_report import ceilings, judge, table
from fq.run import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _label(mode: str) -> str:
    return "BigGAN" if mode == "none" else f"FQ-BigGAN, {mode}"


def measured() -> str:
    """Markdown between the marks.

    Returns:
        The tables of the digits demo, of the CIFAR-10 runs and of the cost of a step.

    Raises:
        FileNotFoundError: a result has not been committed.
    """
    digits, cifar, overhead = (
        json.loads((RESULTS / name).read_text(encoding="utf-8"))
        for name in ("digits/results.json", "cifar10/results.json", "overhead.json")
    )
    lines = [*_digits(digits), "", *_cifar(cifar), "", _overhead(overhead)]
    return "\n".join(lines)


def _digits(results: dict[str, Any]) -> list[str]:
    lines = [
        f"Digits, `make demo`, {results['runs'][0]['steps']} steps fixed beforehand, one seed (no claim "
        "beyond it; [report](benchmarks/results/digits/report.md)):",
        "",
        "| | accuracy | Fréchet distance | recall | diversity |",
        "|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        last = {key.split("[")[0]: list(values.values())[-1] for key, values in run["scores_by_step"].items()}
        lines.append(
            f"| {_label(run['fq'])} | {last['accuracy']:.3f} | {last['fd']:.1f} | {last['recall']:.2f} | "
            f"{last['diversity']:.2f} |"
        )
    return [*lines, "", _machine(results["runs"][0]["provenance"][-1])]


def _cifar(results: dict[str, Any]) -> list[str]:
    key = next(key for key in results["runs"][0]["scores_by_step"] if key.startswith("fd["))
    lines = [
        f"CIFAR-10, a narrow model on a CPU, `{key}`, one seed "
        "([report and commands](benchmarks/results/cifar10/report.md)):",
        "",
        "| | at the first evaluation | at the end |",
        "|---|---|---|",
    ]
    for run in results["runs"]:
        steps = list(run["scores_by_step"][key].items())
        (first, before), (last, after) = steps[0], steps[-1]
        lines.append(f"| {_label(run['fq'])} | {before:.0f} (step {first}) | {after:.0f} (step {last}) |")
    return [*lines, "", _machine(results["runs"][0]["provenance"][-1])]


def _overhead(result: dict[str, Any]) -> str:
    shares = ", ".join(f"{share:.1%} in mode {mode}" for mode, share in result["overhead"].items())
    alone = "at one site alone " + ", ".join(f"{share:.1%}" for share in result["sites"].values())
    return (
        f"Cost, `python -m benchmarks.overhead`: a discriminator step of BigGAN-CIFAR (width "
        f"{result['d_channels']}, {result['batch']}, K = {result['codebook_size']} at {len(result['sites'])} "
        f"sites, {result['threads']} thread, {result['clock']}, median of {result['repeats']} interleaved "
        f"pairs) takes {result['plain_ms']:.0f} ms; FQ adds {shares} ({alone}). "
        f"{_machine(result['provenance'])}"
    )


def _machine(record: dict[str, Any]) -> str:
    return f"{record['device_name']}, torch {record['versions']['torch']}, commit `{record['commit'][:8]}`."


def quantiser() -> str:
    """Markdown between the marks of ``docs/quantiser.md``.

    Returns:
        The targets of the search with what was reached, the cost in a step, and the state of the GPU figures.

    Raises:
        FileNotFoundError: a result has not been committed.
    """
    search, overhead, processes = (
        json.loads((RESULTS / name).read_text(encoding="utf-8"))
        for name in ("search/results.json", "overhead.json", "processes.json")
    )
    lines = [
        "### CPU",
        "",
        "`python -m benchmarks.search`, one thread, process time, by turns in one process; above 1 ours is "
        "faster. Shapes (N, D, K): S1 (4096, 128, 1024), S2 (16384, 256, 1024), S3 (65536, 64, 512), S4 "
        "(16384, 512, 1024), S5 (65536, 256, 4096), C1 (32768, 256, 1024), C2 (8192, 256, 1024). L is the "
        "speed of the matrix product alone. "
        "[Everything measured](../benchmarks/results/search/report.md). "
        f"{_machine(search['provenance'][-1])}",
        "",
        "![Ratios and memory](../benchmarks/results/search/search.png)",
        "",
        table(judge(search)),
        "",
        *ceilings(search),
        _overhead(overhead),
        "",
        _processes(processes),
        "",
        "### CUDA",
        "",
        *_gpu(),
    ]
    return "\n".join(lines)


def _processes(result: dict[str, Any]) -> str:
    sent = result["FQ's all-reduces of a step, bytes"]["together"]
    over, size = result["over plain"], result["batch_size"]
    mib = ", ".join(f"{number / 2**20:.2f}" for number in sent)
    return (
        f"Two processes, `python -m benchmarks.processes` (gloo, width {result['d_channels']}, {size} real + "
        f"{size} fake each, {result['clock']}): FQ's all-reduces of the last step were "
        f"{mib} MiB: the statistics of the four sites, sent "
        "beside the rest of the forward, then for every site with dead codes the numbers of tokens and the "
        f"tokens that replace them. FQ adds {over['apart']:.1%} with a "
        f"codebook a process, {over['together']:.1%} with common ones, {over['together, waiting']:.1%} when "
        f"the exchange is waited for. {_machine(result['provenance'])}"
    )


_GPU_COLUMNS = (
    "", "train-forward, ms", "replayed", "vs upstream form", "vs compiled pure torch", "search, ms",
    "vs addmm + argmin", "% of the tf32x3 roof", "memory beyond in and out, MiB",
)  # fmt: skip


def _gpu() -> list[str]:
    found = sorted((RESULTS / "gpu").glob("*.json"))
    if not found:
        return [
            "Not yet run. The kernels pass their tests in Triton's interpreter and compile for sm_90; no "
            "time, memory or launch count has been measured on a GPU. `python -m benchmarks.gpu` measures "
            "all of it.",
        ]
    lines: list[str] = []
    for path in found:
        results = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            "`python -m benchmarks.gpu`, float32 with TF32 off, median of events, [everything measured]"
            f"(../benchmarks/results/gpu/{path.name}). {_machine(results['provenance'])}",
            "",
            "| " + " | ".join(_GPU_COLUMNS) + " |",
            "|---" * len(_GPU_COLUMNS) + "|",
        ]
        for name, row in results["speed"].items():
            cells = [
                _number(row["ms"].get("train-forward, ours"), ".3f"),
                _number(row["replay_ms"].get("train-forward, ours"), ".3f"),
                _number(row["ratios"].get("train-forward, upstream form"), ".1f"),
                _number(row["ratios"].get("train-forward, pure torch compiled"), ".1f"),
                _number(row["ms"].get("search, ours"), ".3f"),
                _number(row["ratios"].get("search, addmm + argmin"), ".1f"),
                _number(row.get("percent_of_tf32x3_roof"), ".0f"),
                _number(results["memory"].get(name, {}).get("OursRegularize"), ".1f"),
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def pretraining() -> str:
    """Markdown between the marks of ``docs/prevalent.md``.

    Returns:
        The scores of the pre-training experiment and the differences between its arms, if it is there.
    """
    path = RESULTS / "prevalent" / "results.json"
    if not path.is_file():
        return "Its report is not here yet: no figure is given before all seeds are done."
    results = json.loads(path.read_text(encoding="utf-8"))
    runs = results["runs"]
    commits = ", ".join(f"`{commit[:8]}`" for commit in runs["commits"])
    lines = [
        f"{len(runs['seeds'])} seeds, 95 % intervals over seeds and paths, {runs['minutes']:.0f} minutes of "
        f"one core{' so far' if runs['missing'] else ''}. [Curves, maps and the command of every run]"
        f"(../benchmarks/results/prevalent/report.md). {runs['device_name']}, torch {runs['torch']}, "
        f"commits {commits}.",
        "",
        "| | R2R, seen houses: SR, SPL | R2R, unseen houses: SR, SPL | NDH, unseen: GP | HANNA, unseen: SR | "
        "R2R's own scans, all seen, random vectors: SR, SPL |",
        "|---|---|---|---|---|---|",
    ]
    for arm, label in runs["arms"].items():
        cells = [
            _scores(results, "r2r/val_seen", arm, ("success", "spl")),
            _scores(results, "r2r/val_unseen", arm, ("success", "spl")),
            _scores(results, "ndh/val_unseen", arm, ("goal_progress",)),
            _scores(results, "hanna/val_unseen_all", arm, ("success",)),
            _scores(results, "real/val_seen", arm, ("success", "spl")),
        ]
        lines.append(f"| ({arm}) {label} | " + " | ".join(cells) + " |")
    if runs["missing"]:
        lines += ["", f"Not finished yet: {', '.join(runs['missing'])}."]
    lines += ["", "| difference | SR | SPL | GP, m |", "|---|---|---|---|"]
    for split, label in _COMPARED.items():
        found = results.get(split, {"differences": {}})["differences"]
        for pair in dict.fromkeys(name.rpartition(",")[0] for name in found):
            cells = [
                _interval(found[name]) if (name := f"{pair}, {field}") in found else ""
                for field in ("success", "spl", "goal_progress")
            ]
            lines.append(f"| {label}: {pair} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pipeline() -> str:
    """Markdown of what the published pre-training data take, for ``docs/prevalent.md``."""
    path = RESULTS / "pipeline.json"
    if not path.is_file():
        return "The pipeline at its published size is not measured yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    paths, triplets, said, step = (found[key] for key in ("paths", "triplets", "instructions", "training"))
    return (
        "**The published data, made here** (`python -m benchmarks.pipeline`: R2R's own training graphs, "
        f"random vectors, one thread): {paths['count']:,.0f} paths are sampled in {paths['seconds']:.0f} s "
        f"and rolled into {triplets['count']:,.0f} triplets, of six instructions each, in "
        f"{triplets['seconds']:.0f} s. A speaker of the published size says {said['per_second']:.0f} "
        f"instructions of {said['words'] / said['count']:.0f} words a second (it is untrained and stops "
        f"late), the published 1,020,000 in {said['paper_hours']:.1f} hours of one process; `vln.augment` "
        f"shares them among processes. The model of the published size learns from "
        f"{step['per_second']:.1f} triplets a second, so one epoch of 6,482,000 would take "
        f"{step['paper_hours'] / 24:.0f} days on this processor: that part wants a GPU. "
        f"{_machine(found['provenance'])}"
    )


_COMPARED = {
    "r2r/val_unseen": "R2R, unseen houses",
    "ndh/val_unseen": "NDH, unseen houses",
    "hanna/val_unseen_all": "HANNA, unseen houses",
    "real/val_seen": "R2R's own scans, all seen",
}


def _scores(results: dict[str, Any], split: str, arm: str, fields: tuple[str, ...]) -> str:
    means = results.get(split, {"means": {}})["means"].get(arm)
    if means is None:
        return ""
    cells = []
    for field in fields:
        factor, form = (1.0, ".2f") if field == "goal_progress" else (100.0, ".1f")
        cells.append(format(sum(means[field]) / len(means[field]) * factor, form))
    return ", ".join(cells)


def _interval(found: dict[str, float]) -> str:
    digits = 1 if max(abs(found["low"]), abs(found["high"])) >= 5 else 2
    text = f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"
    return text if found["low"] > 0 or found["high"] < 0 else f"{text}, 0 is inside"


TRAINED = {
    "digits": "BigGAN on scikit-learn's digits, 16 px",
    "cifar10": "BigGAN on CIFAR-10 pictures",
    "tac": "TAC-GAN on CIFAR-10 pictures",
    "faces": "StyleGAN2 on anime faces, 32 px",
    "pets": "U-GAT-IT light between cats and dogs, 64 px",
}
"""Folders of results whose runs the page of the backbones shows."""


def backbones() -> str:
    """The page of what was trained here, and of what FQ costs in whole steps.

    Returns:
        Markdown, made from the results that are there.
    """
    lines = [
        "# The backbones, trained on two CPU cores",
        "",
        "Narrow models and short runs, one seed each: they show that everything trains, not who is better. "
        "Most runs shared the machine with others, so the seconds are no measurement of FQ. A score by one "
        "network says nothing about a score by another.",
        "",
        "| run | score | at the first evaluation | lowest | at the end | seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for folder, what in TRAINED.items():
        path = RESULTS / folder / "results.json"
        if not path.is_file():
            lines.append(f"| {what} | not yet trained here | | | | |")
            continue
        results = json.loads(path.read_text(encoding="utf-8"))
        for run in results["runs"]:
            mode = "without FQ" if run["fq"] == "none" else f"FQ, {run['fq']}"
            for key, scores in run["scores_by_step"].items():
                if key.split("[")[0].rpartition("/")[2] == "fd":
                    (first, before), *_, (last, after) = scores.items()
                    best = min(scores, key=lambda step: scores[step])
                    lines.append(
                        f"| [{what}]({folder}/report.md), {mode} | `{key}` | {before:.4g} (step {first}) | "
                        f"{scores[best]:.4g} (step {best}) | {after:.4g} (step {last}) | "
                        f"{run['seconds_per_step_median']:.2f} |"
                    )
    if (RESULTS / "steps.json").is_file():
        lines += _whole_steps(json.loads((RESULTS / "steps.json").read_text(encoding="utf-8")))
    return "\n".join(lines) + "\n"


def _whole_steps(steps: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## A whole training step, FQ off and on",
        "",
        "`python -m benchmarks.steps`: the loops as they train, at the widths and FQ layers of the paper and "
        "at few pictures, step by step in turns in one process (one thread, process time, median of ratios). "
        "Peak memory is that of a fresh process, PyTorch included. " + _machine(steps["provenance"]),
        "",
        "| | pictures | plain step, ms | regularize | replace | peak, MiB: plain | regularize | replace |",
        "|---" * 8 + "|",
    ]
    for name, row in steps.items():
        if name != "provenance":
            peak = row["peak_mib"]
            lines.append(
                f"| {name} | {row['pictures_per_step']} | {row['plain_ms']:.0f} | "
                f"{row['ratio']['regularize']:.3f}x | {row['ratio']['replace']:.3f}x | {peak['none']:.0f} | "
                f"{peak['regularize']:.0f} | {peak['replace']:.0f} |"
            )
    return lines


def _number(value: float | None, form: str) -> str:
    return "failed" if value is None else format(value, form)


def write(path: Path, name: str, text: str) -> None:
    """Exchange what stands between two marks of a file.

    Args:
        path: the file.
        name: of the marks, ``<!-- name -->`` and ``<!-- /name -->``.
        text: new content.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = path.read_text(encoding="utf-8").split(begin, 1)
    write_atomically(path, f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
    print(f"written to {path}")


def main() -> None:
    """Rewrite the blocks and the page of the backbones."""
    write_atomically(RESULTS / "backbones.md", backbones())
    write(ROOT / "README.md", "measured", measured())
    write(ROOT / "docs" / "quantiser.md", "measured:search", quantiser())
    write(ROOT / "docs" / "prevalent.md", "measured:pretraining", pretraining())
    write(ROOT / "docs" / "prevalent.md", "measured:pipeline", pipeline())


if __name__ == "__main__":
    main()
