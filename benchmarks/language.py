"""Optimus's language-modelling table: ``python -m benchmarks.language --data FOLDER``.

FOLDER holds ``ptb`` and ``snli``. Every row is a run of ``vae_lm.train small`` in a folder of its own below
``--runs``; a row that was stopped is resumed, a finished one is only read. Then come ``report.md``,
``results.json`` and a picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.compare import portable
from fq.run import load_config, newest_checkpoint, read_metrics, write_atomically

LAMBDAS = (0.05, 0.1, 0.25, 0.5, 1.0)
NUM_EVAL, IMPORTANCE_SAMPLES, LATENT_DIM = 500, 20, 32


class Row(NamedTuple):
    """A row of the table: its name there, that of its run, and what it gives to ``vae_lm.train small``."""

    label: str
    name: str
    flags: tuple[str, ...]


ROWS = (
    Row("GPT-2, no latent", "gpt2", ("--no-latent",)),
    Row("VAE, plain KL, beta 1 throughout", "plain", ("--cycles", "0", "--free-bits", "0")),
    *(Row(f"Optimus, λ {value:g}", f"lambda{value:g}", ("--free-bits", f"{value:g}")) for value in LAMBDAS),
    Row("λ 0.5, memory only", "memory", ("--free-bits", "0.5", "--injection", "memory")),
    Row("λ 0.5, embedding only", "embedding", ("--free-bits", "0.5", "--injection", "embedding")),
    Row("λ 0.5, beta 1 throughout", "constant", ("--free-bits", "0.5", "--cycles", "0")),
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Sentences of one part of the table, and how long its rows train."""

    name: str
    train: str
    test: str
    steps: int


CORPORA = {
    "snli": Corpus(name="SNLI", train="sentences.train.txt.gz", test="sentences.test.txt.gz", steps=1070),
    "ptb": Corpus(name="Penn Treebank", train="train.txt.gz", test="test.txt.gz", steps=986),
}


def command(corpus: Corpus, row: Row, source: Path, folder: Path, steps: int) -> list[str]:
    """The training run of one row.

    Args:
        corpus: its sentences.
        row: of the table.
        source: folder of the corpus's files.
        folder: run folder.
        steps: of the optimiser.
    """
    every = str(max(steps // 3, 1))
    return [
        *(sys.executable, "-m", "vae_lm.train", "small", *row.flags, "--data", str(source / corpus.train)),
        *("--valid", str(source / corpus.test), "--steps", str(steps), "--out", str(folder)),
        *("--latent-dim", str(LATENT_DIM), "--num-eval", str(NUM_EVAL)),
        *("--importance-samples", str(IMPORTANCE_SAMPLES)),
        *("--eval-every", str(steps), "--sample-every", str(steps), "--checkpoint-every", every),
    ]


def train(jobs: list[tuple[list[str], Path]], *, workers: int) -> Iterator[str]:
    """Run what is not finished, some at a time on one thread each.

    Args:
        jobs: commands and their run folders.
        workers: runs beside each other.

    Yields:
        A line on every row, when it is done.

    Raises:
        RuntimeError: a run failed; its log says why.
    """

    def run(job: tuple[list[str], Path]) -> str:
        words, folder = job
        steps = int(words[words.index("--steps") + 1])
        if _finished(folder, steps):
            return f"{folder.name}: finished before"
        folder.parent.mkdir(parents=True, exist_ok=True)
        log, start = folder.with_suffix(".log"), time.perf_counter()
        with log.open("a") as output:
            threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(words, env=os.environ | threads, stdout=output, stderr=output, check=False)
        if done.returncode:
            raise RuntimeError(f"{folder.name} ended with code {done.returncode}: see {log}")
        return f"{folder.name}: {(time.perf_counter() - start) / 60:.1f} minutes"

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, jobs)


def _finished(folder: Path, steps: int) -> bool:
    newest = newest_checkpoint(folder) if (folder / "config.json").is_file() else None
    return newest is not None and int(newest.name.removeprefix("step_")) == steps


def figures(folder: Path) -> dict[str, float]:
    """The last evaluation of a run, without the prefix of its keys.

    Args:
        folder: run folder.

    Raises:
        ValueError: the run has no evaluation.
    """
    lines = [line for line in read_metrics(folder) if "valid/rec" in line]
    if not lines:
        raise ValueError(f"{folder} was never evaluated: run `python -m benchmarks.language` to its end")
    return {key.removeprefix("valid/"): value for key, value in lines[-1].items()}


COLUMNS = (
    ("ppl_original", "PPL, as published", "{:.1f}"),
    ("ppl_token", "PPL a token", "{:.1f}"),
    ("ppl_word", "PPL a word", "{:.0f}"),
    ("neg_elbo", "-ELBO", "{:.2f}"),
    ("neg_bound", "-IW bound", "{:.2f}"),
    ("rec", "rec", "{:.2f}"),
    ("kl", "KL", "{:.2f}"),
    ("mi", "MI", "{:.2f}"),
    ("au", "AU", "{:.0f}"),
    ("accuracy", "tokens in place", "{:.2f}"),
)


def table(rows: list[tuple[Row, dict[str, float]]]) -> str:
    """The rows as Markdown.

    Args:
        rows: with the figures of each.
    """
    lines = ["| | " + " | ".join(title for _, title, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, found in rows:
        cells = [form.format(found[key]) if key in found else "" for key, _, form in COLUMNS]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def findings(found: dict[str, dict[str, float]]) -> list[str]:
    """What the paper says of such rows, and whether these agree, as sentences made from the figures.

    Args:
        found: figures by the name of the row.
    """
    sweep = [found[f"lambda{value:g}"] for value in LAMBDAS if f"lambda{value:g}" in found]
    said = []
    if len(sweep) == len(LAMBDAS):
        for key, words, up in (
            ("mi", "MI rises with λ", True),
            ("kl", "KL rises with λ", True),
            ("rec", "rec falls with λ", False),
            ("neg_elbo", "-ELBO rises with λ", True),
            ("ppl_token", "perplexity rises with λ", True),
        ):
            values = [row[key] if up else -row[key] for row in sweep]
            steps = sum(later > earlier for earlier, later in itertools.pairwise(values))
            listed = ", ".join(f"{row[key]:.2f}" for row in sweep)
            said.append(f"{words}: {_verdict(steps, len(values) - 1)} ({listed}).")
        listed = ", ".join(f"{row['au']:.0f}" for row in sweep)
        every = all(row["au"] == LATENT_DIM for row in sweep)
        said.append(f"All {LATENT_DIM} units active at every λ: {'yes' if every else 'no'} ({listed}).")
    if "plain" in found:
        units = found["plain"]["au"]
        said.append(
            f"Collapse without the threshold (AU at most 1): {'yes' if units <= 1 else 'no'} ({units:.0f})."
        )
    if {"memory", "embedding", "lambda0.5"} <= set(found):
        shown = {name: found[name]["rec"] for name in ("lambda0.5", "memory", "embedding")}
        best = min(shown, key=lambda name: shown[name])
        called = {"lambda0.5": "both", "memory": "memory", "embedding": "embedding"}
        listed = ", ".join(f"{called[name]} {value:.2f}" for name, value in shown.items())
        said.append(f"Reconstruction by injection at λ 0.5: {listed}; best: {called[best]} (paper: both).")
    return said


def _verdict(agreeing: int, steps: int) -> str:
    return "yes, at every step" if agreeing == steps else f"at {agreeing} of {steps} steps"


def draw(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """Reconstruction, KL, MI and perplexity over lambda.

    Args:
        results: figures by corpus and row.
        path: of the PNG.
    """
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    titles = {"rec": "reconstruction, nats", "kl": "KL, nats", "mi": "MI, nats", "ppl_token": "PPL a token"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for (name, found), style in zip(results.items(), ("o-", "s--"), strict=False):
            shown = [(value, found.get(f"lambda{value:g}")) for value in LAMBDAS]
            line = [(value, row[key]) for value, row in shown if row and key in row]
            axis.plot([x for x, _ in line], [y for _, y in line], style, label=CORPORA[name].name)
        if key == "mi":
            axis.axhline(math.log(NUM_EVAL), color="#999999", linewidth=1)
            axis.text(0.98, math.log(NUM_EVAL), f"log {NUM_EVAL}", ha="right", va="bottom", fontsize=8,
                      transform=axis.get_yaxis_transform())  # fmt: skip
        axis.set_xlabel("λ")
        axis.set_title(title)
    axes[0].legend()
    figure.savefig(path, dpi=100)


def report(results: dict[str, dict[str, dict[str, float]]], runs: dict[str, dict[str, Path]]) -> str:
    """The whole text.

    Args:
        results: figures by corpus and row.
        runs: run folders by corpus and row.
    """
    labels = {row.name: row for row in ROWS}
    lines = [
        "# Optimus from random weights: the language-modelling table",
        "",
        "Small networks that start from random weights: what moves with what is to be compared with the "
        f"paper, the digits are not. Each figure is of {NUM_EVAL} test sentences, the bound of "
        f"{IMPORTANCE_SAMPLES} importance samples. MI cannot exceed log {NUM_EVAL} = "
        f"{math.log(NUM_EVAL):.2f}. Nats, a sentence.",
        "",
    ]
    for name, found in results.items():
        folder = next(iter(runs[name].values()))
        config = load_config(folder)
        network, optim = config["network"], config["optim"]
        lines += [
            f"## {CORPORA[name].name}",
            "",
            f"{config['run']['steps']} steps of {optim['batch_size']} sentences, learning rate "
            f"{optim['lr']:g}; width {network['width']}, {network['encoder_layers']} + "
            f"{network['decoder_layers']} layers, a vocabulary of {network['vocab_size']} learnt from the "
            f"training sentences, {network['latent_dim']} latent dimensions.",
            "",
            table([(labels[key], values) for key, values in found.items()]),
            "",
            *(f"* {sentence}" for sentence in findings(found)),
            "",
        ]
    return "\n".join([*lines, "![λ](lambda.png)", "", *_columns(), "", *_provenance(runs), ""])


def _columns() -> list[str]:
    return [
        "* PPL as published divides by tokens with BOS, which is never predicted; a token: without it; a "
        "word: by whitespace words and the end of the sentence. All three are of the importance-weighted "
        "bound (for GPT-2 of the likelihood itself).",
        "* KL is the plain one, whatever was optimised; AU counts dimensions whose mean varies by at least "
        "0.01.",
        "* Tokens in place: free-running greedy decoding of the posterior's mean, EOS included.",
    ]


def _provenance(runs: dict[str, dict[str, Path]]) -> list[str]:
    lines = ["| run | command | seed | commit | machine |", "|---|---|---|---|---|"]
    for folders in runs.values():
        for folder in folders.values():
            entry: dict[str, Any] = json.loads((folder / "provenance.json").read_text())[-1]
            lines.append(
                f"| {folder.name} | `{portable(entry['command'])}` | {entry['seed']} | "
                f"{entry['commit'][:9]} | {entry['device_name']} |"
            )
    return lines


def write(runs: dict[str, dict[str, Path]], out: Path) -> Path:
    """Report, picture and results of finished runs.

    Args:
        runs: run folders by corpus and row.
        out: folder, made if missing.

    Returns:
        The report.
    """
    results = {
        name: {row: figures(folder) for row, folder in folders.items()} for name, folders in runs.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / "lambda.png")
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "report.md", report(results, runs))
    return out / "report.md"


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train what is missing, write the report.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is missing or failed; the text says what.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ptb/ and snli/")
    parser.add_argument("--runs", type=Path, default=Path("runs/language"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/language"))
    parser.add_argument("--corpora", nargs="+", choices=list(CORPORA), default=list(CORPORA))
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="only these rows")
    parser.add_argument("--steps", type=int, help="instead of each corpus's own number")
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other, on one thread each")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    runs: dict[str, dict[str, Path]] = {}
    jobs = []
    try:
        for name in options.corpora:
            corpus, source = CORPORA[name], options.data / name
            for file in (corpus.train, corpus.test):
                if not (source / file).is_file():
                    raise FileNotFoundError(
                        f"{source / file} is missing: give --data a folder with {name}/{file}"
                    )
            runs[name] = {row.name: options.runs / f"{name}-{row.name}" for row in rows}
            steps = options.steps or corpus.steps
            jobs += [
                (command(corpus, row, source, runs[name][row.name], steps), runs[name][row.name])
                for row in rows
            ]
        for line in train(jobs, workers=options.workers):
            print(line, flush=True)
        print(f"written to {write(runs, options.out)}")
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
