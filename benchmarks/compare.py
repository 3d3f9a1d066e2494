"""Set finished runs beside each other: ``python -m benchmarks.compare RUN RUN ... --out FOLDER``.

Writes ``report.md`` with its pictures, and ``results.json`` with the numbers behind it. Every figure comes
out of the runs' own metrics; each run's command, seed, commit and machine stand at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import fq
from backbones import biggan, stylegan2
from backbones.configs import BigGANTraining, StyleGAN2Training, Training, UGATITTraining
from backbones.data import batches, open_images
from backbones.sample import generate, load_generator
from backbones.train_setup import attach_fq, stored_training
from fq.run import checkpoint_tensors, load_config, newest_checkpoint, read_metrics, write_atomically

COLORS = {"none": "#444444", "regularize": "#1f77b4", "replace": "#d62728", "blend": "#2ca02c"}
_D = "model_1.safetensors"  # the discriminator is the second model that training prepares


@dataclass
class Run:
    """One run folder, read."""

    path: Path
    config: Training
    metrics: list[dict[str, Any]]
    provenance: list[dict[str, Any]]

    @property
    def mode(self) -> str:
        """none, regularize, replace or blend."""
        return self.config.quantizer.fq

    @property
    def label(self) -> str:
        """Name in tables and legends."""
        return self.model if self.mode == "none" else f"FQ-{self.model}, {self.mode}"

    @property
    def model(self) -> str:
        """Name of the plain model."""
        if isinstance(self.config, BigGANTraining):
            return "BigGAN" if self.config.model.class_head == "projection" else "TAC-GAN"
        return "StyleGAN2" if isinstance(self.config, StyleGAN2Training) else "U-GAT-IT"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one logged number."""
        rows = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        return [step for step, _ in rows], [value for _, value in rows]

    def last(self, key: str) -> float | None:
        """Value at the last step where it was logged."""
        values = self.series(key)[1]
        return values[-1] if values else None


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Args:
        path: the folder.

    Returns:
        Its configuration, metrics and provenance.

    Raises:
        ValueError: it is not a finished run with scores.
    """
    path = Path(path)
    run = Run(path, stored_training(load_config(path)), read_metrics(path),
              json.loads((path / "provenance.json").read_text()))  # fmt: skip
    if not any(key.startswith("score/") for line in run.metrics for key in line):
        raise ValueError(f"{path} has no scores: train it with --features classifier or another network")
    return run


def compare(
    runs: list[Run],
    out: Path,
    *,
    title: str,
    note: str = "",
    extra: str = "",
    more: dict[str, Any] | None = None,
    show_real: bool = True,
    columns: int = 8,
) -> Path:
    """Write report, pictures and results.

    Args:
        runs: baseline first.
        out: folder, made if missing.
        title: of the report.
        note: sentence under the title: how these settings came about.
        extra: Markdown put before the provenance.
        more: entries added to ``results.json``.
        show_real: put real pictures beside the samples; False for data that must not be passed on.
        columns: of a translation's grid, which shows real pictures: the first ones are shown.

    Returns:
        The report.

    Raises:
        ValueError: the runs were not scored by the same network against the same number of pictures.
    """
    keys = _score_keys(runs)
    out.mkdir(parents=True, exist_ok=True)
    _grids(runs, out / "samples.png", show_real=show_real, columns=columns)
    _curves(runs, keys, out / "curves.png")
    quantized = [run for run in runs if run.mode != "none"]
    for run in quantized:
        if not isinstance(run.config, UGATITTraining):
            fq.stats.draw(_histograms(run, run.config), out / f"codebook_{run.mode}.png")
    if quantized:
        _codebook_curves(quantized, out / "codebooks.png")
    results = {"runs": [_results(run, keys) for run in runs]} | (more or {})
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    text = _report(runs, quantized, keys, f"# {title}\n\n{note}".strip(), extra)
    write_atomically(out / "report.md", text)
    return out / "report.md"


def _score_keys(runs: list[Run]) -> list[str]:
    keys = [sorted({key for line in run.metrics for key in line if key.startswith("score/")}) for run in runs]
    if any(other != keys[0] for other in keys):
        raise ValueError(
            "the runs were scored differently, and one network's score is never another's: "
            + "; ".join(f"{run.path}: {', '.join(found)}" for run, found in zip(runs, keys, strict=True))
        )
    order = ("fd", "kid", "accuracy", "recall", "precision", "diversity")
    return sorted(keys[0], key=lambda key: (order.index(_kind(key)), key))


def _short(key: str) -> str:
    """Name of a score without network and counts, ``fd`` or ``A2B/fd``."""
    return key.removeprefix("score/").split("[")[0]


def _kind(key: str) -> str:
    return _short(key).rpartition("/")[2]


def _grids(runs: list[Run], path: Path, *, show_real: bool, columns: int) -> None:
    """Real pictures and every run's last samples, side by side at one scale."""
    real = runs[0].path / "real.png"  # a translation shows real pictures among its samples
    pictures = [("real pictures", real)] if show_real and real.is_file() else []
    pictures += [(run.label, max((run.path / "samples").glob("[0-9]*.png"))) for run in runs]
    figure = Figure(figsize=(4.2 * len(pictures), 4.5), layout="constrained")
    for axis, (name, file) in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        grid = np.asarray(Image.open(file))
        if isinstance(runs[0].config, UGATITTraining):
            grid = first_columns(grid, size=runs[0].config.model.resolution, columns=columns)
        axis.imshow(grid, interpolation="nearest")
        axis.set_title(name)
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


def first_columns(grid: np.ndarray, *, size: int, columns: int) -> np.ndarray:
    """The left part of what `backbones.sample.save_grid` has drawn.

    Args:
        grid: ``[H, W, 3]``.
        size: width of a picture before it was enlarged.
        columns: how many to keep.
    """
    return grid[:, : 2 + columns * (size * max(1, 48 // size) + 2)]


def _curves(runs: list[Run], keys: list[str], path: Path) -> None:
    figure = Figure(figsize=(4 * min(len(keys), 3), 3 * -(-len(keys) // 3)), layout="constrained")
    axes = list(figure.subplots(-(-len(keys) // 3), min(len(keys), 3), squeeze=False).flat)
    for axis, key in zip(axes, keys, strict=False):
        for run in runs:
            steps, values = run.series(key)
            axis.plot(steps, values, marker="o", markersize=3, color=COLORS[run.mode], label=run.label)
        axis.set_title(key.removeprefix("score/"), fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if _kind(key) in ("fd", "kid") and min(min(run.series(key)[1]) for run in runs) > 0:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _codebook_curves(runs: list[Run], path: Path) -> None:
    """Perplexity and real/fake divergence of every site against the step."""
    figure = Figure(figsize=(9, 2.8 * len(runs)), layout="constrained")
    for row, run in zip(figure.subplots(len(runs), 2, squeeze=False), runs, strict=True):
        sites = _sites(run)
        for axis, what in zip(row, ("perplexity", "divergence"), strict=True):
            for site in sites:
                axis.plot(*run.series(f"fq/{site}/{what}"), label=site, linewidth=1.2)
            axis.set_title(f"{run.label}: {what}", fontsize=9)
            axis.set_xlabel("step", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        row[0].set_ylim(0, _codes(run))
        row[0].set_ylabel("codes", fontsize=8)
        row[1].set_yscale("log")
        row[1].set_ylabel("bit", fontsize=8)
        row[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _sites(run: Run) -> list[str]:
    keys = {key for line in run.metrics for key in line if key.startswith("fq/")}
    return sorted({key.removeprefix("fq/").rpartition("/")[0] for key in keys})


def _codes(run: Run) -> int:
    """Size of the largest codebook."""
    return max(run.config.quantizer.codebook_sizes, default=run.config.quantizer.codebook_size)


@torch.no_grad()
def _histograms(
    run: Run, config: BigGANTraining | StyleGAN2Training, pictures: int = 512
) -> dict[str, fq.stats.SiteStats]:
    """Code histograms of the trained discriminator on real pictures and on as many samples."""
    checkpoint = newest_checkpoint(run.path)
    assert checkpoint is not None
    discriminator: nn.Module
    if isinstance(config, BigGANTraining):
        discriminator = biggan.Discriminator(config.model)
    else:
        discriminator = stylegan2.Discriminator(config.model)
    handle = attach_fq(discriminator, config.quantizer, seed=0)
    assert handle is not None
    discriminator.load_state_dict(checkpoint_tensors(checkpoint, _D), strict=True)
    discriminator.eval()
    images = open_images(
        config.data, resolution=config.model.resolution, conditional=config.model.num_classes > 1
    )
    size = min(pictures, len(images))
    real, labels = next(batches(images, batch_size=size, seed=1, dequantize=config.data.dequantize))
    if config.model.num_classes == 1:
        labels.zero_()
    generator, model = load_generator(run.path)
    with handle.part("real"):
        discriminator(real, labels)
    with handle.part("fake"):
        discriminator(generate(generator, model, labels, seed=1), labels)
    return handle.stats()


def _results(run: Run, keys: list[str]) -> dict[str, Any]:
    scores = {key.removeprefix("score/"): dict(zip(*run.series(key), strict=True)) for key in keys}
    seconds = run.series("seconds_per_step")[1]
    figures = {key: run.last(key) for line in run.metrics[-3:] for key in line if key.startswith("fq/")}
    return {
        "fq": run.mode,
        "steps": run.config.run.steps,
        "seconds_per_step_median": statistics.median(seconds),
        "scores_by_step": scores,
        "codebooks_at_the_end": figures,
        "provenance": json.loads(portable(json.dumps(run.provenance))),
    }


def _report(runs: list[Run], quantized: list[Run], keys: list[str], head: str, extra: str) -> str:
    first = runs[0].config
    of_d = f", {first.optim.d_steps} discriminator steps a step" if isinstance(first, BigGANTraining) else ""
    lines = [head, ""]
    lines += [
        f"{first.preset}: {first.run.steps} steps, seed {first.run.seed}, batch "
        f"{first.optim.batch_size}{of_d}. One seed a row: "
        "differences of this size between rows are not a result, see the curves. A score by one network says "
        "nothing about a score by another.",
        "",
        "| at the last step | " + " | ".join(f"{_short(key)}" for key in keys) + " | s/step (median) |",
        "|---" * (len(keys) + 2) + "|",
    ]
    for run in runs:
        cells = [f"{run.last(key):.3g}" for key in keys]
        pace = statistics.median(run.series("seconds_per_step")[1])
        lines.append(f"| {run.label} | " + " | ".join(cells) + f" | {pace:.3f} |")
    lines += ["", "What the columns are:", ""]
    lines += [f"* `{key.removeprefix('score/')}`: {_MEANING[_kind(key)]}" for key in keys]
    lines += ["", "![samples](samples.png)", "", "![scores against steps](curves.png)", ""]
    if quantized:
        lines += _codebook_table(quantized)
        lines += ["", "![perplexity and divergence](codebooks.png)", ""]
        for run in quantized if not isinstance(first, UGATITTraining) else ():
            lines += [f"Codes of {run.label} at the end, real above and fake below the axis:", "",
                      f"![codes](codebook_{run.mode}.png)", ""]  # fmt: skip
    if extra:
        lines += [extra, ""]
    lines += ["## Where these numbers come from", ""]
    for run in runs:
        for record in run.provenance:
            versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
            dirty = {True: " with local changes", False: ""}.get(record["dirty"], "")
            lines.append(
                f"* {run.label}: `{portable(record['command'])}`; seed {record['seed']}, commit "
                f"`{record['commit'][:12]}`{dirty}, {record['device_name']}, {record['world_size']} "
                f"process(es), {versions}, {record['started']}"
            )
    return "\n".join(lines) + "\n"


_MEANING = {
    "fd": "Fréchet distance of the network's features, smaller is nearer to the real pictures",
    "kid": "kernel distance of the same features (a random estimate)",
    "accuracy": "how often a classifier reads the requested class; a collapsed model can reach 1",
    "recall": "share of real pictures that have a sample nearby (collapse shows below 0.2)",
    "precision": "share of samples that have a real picture nearby",
    "diversity": "mean distance of two samples of a class over that of two real ones (healthy: 0.65 to 1.1)",
}


def portable(command: str) -> str:
    """A command with absolute paths cut to their last part: a report travels, folders of one machine do not.

    Args:
        command: as it was run.

    Returns:
        The command to give on another machine.

    Example:
        >>> portable("python -m backbones.train cifar10 --data /data/cifar/train.npz --out /tmp/run")
        'python -m backbones.train cifar10 --data train.npz --out run'
    """
    return re.sub(r"(?<![\w.])/(?:[^\s:'\"/]+/)*([^\s:'\"/]+)", r"\1", command)


def _site_codes(run: Run, site: str) -> int:
    """Size of a site's codebook; sizes that differ are given for layers by their names."""
    chosen = run.config.quantizer
    named = dict(zip(chosen.layers, chosen.codebook_sizes, strict=False))
    return named.get(site.rpartition("/")[2], chosen.codebook_size)


def _codebook_table(runs: list[Run]) -> list[str]:
    lines = [
        "| codebook at the end | used | perplexity | dead codes | commitment | real/fake divergence, bit |",
        "|---" * 6 + "|",
    ]
    for run in runs:
        for site in _sites(run):
            used, ppl, dead, error, apart = (
                run.last(f"fq/{site}/{what}")
                for what in ("usage", "perplexity", "dead_codes", "commitment", "divergence")
            )
            lines.append(
                f"| {run.label}, `{site}` | {used:.0%} of {_site_codes(run, site)} | {ppl:.1f} | "
                f"{dead:.0f} | {error:.3g} | {'-' if apart is None else f'{apart:.3f}'} |"
            )
    return lines


def main() -> None:
    """Read the command line and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, baseline first")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for report.md, pictures and results.json"
    )
    parser.add_argument("--title", default="With and without feature quantisation")
    parser.add_argument("--note", default="", help="sentence under the title: how these settings came about")
    parser.add_argument("--hide-real", action="store_true", help="leave the real pictures out of the report")
    parser.add_argument("--columns", type=int, default=8, help="pictures of a translation's grid to show")
    options = parser.parse_args()
    try:
        runs = [read_run(path) for path in options.runs]
        report = compare(
            runs, options.out, title=options.title, note=options.note, show_real=not options.hide_real,
            columns=options.columns,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written to {report}")


if __name__ == "__main__":
    main()
