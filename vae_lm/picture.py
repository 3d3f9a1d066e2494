"""Pictures of a latent space and of trainings: ``python -m vae_lm.picture latents MODEL --out z.png``.

Commands: latents (t-SNE), kl (KL of each dimension), curves (of runs), interpolation (a way as a table).
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'fq-gan[train]'") from error

from fq.run import read_metrics, write_atomically
from vae_lm import sources
from vae_lm.generate import Decoding, Interpolate, Table
from vae_lm.latent import active_units, kl_per_dimension
from vae_lm.sources import Released

CURVES = {"rec": "reconstruction, nats a sentence", "kl": "KL, nats a sentence", "beta": "weight of the KL"}
"""Keys of metrics.jsonl that are drawn, and their axes; ``kl_counted`` joins ``kl``."""

_MOST_COLOURS = 20
_CELL_WIDTH = 44
"""Characters of a line in a cell of a table."""


# ---- drawing


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG at one stroke; its folder is made."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A model may say any sign; one that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(picture, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())


def save_table(header: Sequence[str], rows: Sequence[Sequence[str]], path: Path) -> None:
    """A table of texts as a picture; long texts are wrapped.

    Args:
        header: names of the columns.
        rows: texts.
        path: of the PNG.
    """
    cells = [[_wrapped(cell) for cell in row] for row in (header, *rows)]
    widths = [
        max(len(line) for row in cells for line in row[column].split("\n")) for column in range(len(header))
    ]
    heights = [max(cell.count("\n") + 1 for cell in row) for row in cells]
    units, lines = sum(widths) + 3 * len(widths), sum(heights) + 0.6 * len(heights)
    figure = Figure(figsize=(0.069 * units + 0.2, 0.175 * lines + 0.2))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(-1, units), ylim=(lines + 0.4, -0.4))
    axes.axis("off")
    top = 0.0
    for number, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if number % 2 == 0 and number:
            axes.axhspan(top, top + height + 0.6, color="0.95")
        left = 0.0
        for cell, width in zip(row, widths, strict=True):
            weight: Literal["bold", "normal"] = "normal" if number else "bold"
            # Dollars would be taken for formulas.
            axes.text(
                left, top + 0.3, cell, va="top", family="DejaVu Sans Mono", size=8, weight=weight,
                linespacing=1.5, parse_math=False,
            )  # fmt: skip
            left += width + 3
        top += height + 0.6
        if not number:
            axes.axhline(top, color="0.2", linewidth=0.8)
    save(figure, path)


def _wrapped(cell: str) -> str:
    return "\n".join(textwrap.wrap(cell, _CELL_WIDTH)) or " "


def project(latents: np.ndarray, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """t-SNE of latents in two dimensions (van der Maaten and Hinton 2008).

    Args:
        latents: ``[N, d]``.
        perplexity: number of neighbours that count; at most a third of N is taken.
        seed: of the search.

    Returns:
        float32 ``[N, 2]``.

    Raises:
        ValueError: fewer than four latents.
        ImportError: scikit-learn is missing.
    """
    if len(latents) < 4:
        raise ValueError(f"{len(latents)} latents make no picture: give at least 4")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'fq-gan[train]'") from error
    start: Literal["pca", "random"] = "pca" if latents.shape[1] > 1 else "random"
    found: np.ndarray = TSNE(
        perplexity=min(perplexity, (len(latents) - 1) / 3), init=start, random_state=seed
    ).fit_transform(latents)
    return found


def scatter(points: np.ndarray, colours: Sequence[Any], *, title: str, legend: str) -> Figure:
    """Points coloured by names, or along a scale if the colours are numbers.

    Args:
        points: ``[N, 2]``.
        colours: N names, or N numbers.
        title: above the picture.
        legend: what the colours are.
    """
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    size = min(20.0, 4000 / len(points) + 2)
    if all(isinstance(colour, int | float) for colour in colours):
        drawn = axes.scatter(
            points[:, 0], points[:, 1], c=np.array(colours, float), s=size, cmap="viridis", linewidths=0
        )
        figure.colorbar(drawn, label=legend)
    else:
        names = sorted(set(colours))
        for number, name in enumerate(names):
            chosen = points[[given == name for given in colours]]
            colour = f"C{number}" if len(names) <= 10 else _colour(number)
            axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=colour, label=name, linewidths=0)
        if len(names) > 1:
            figure.legend(title=legend, loc="outside right upper", markerscale=2, fontsize="small")
    axes.set(title=title, xticks=[], yticks=[])
    return figure


def _colour(number: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20"](number)


def kl_bars(per_dimension: Sequence[float], *, title: str) -> Figure:
    """Mean KL of every dimension, largest first; the numbers of the dimensions below, if they can be read.

    Args:
        per_dimension: nats, mean over a corpus.
        title: above the picture.
    """
    order = sorted(range(len(per_dimension)), key=lambda index: -per_dimension[index])
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.bar(
        range(len(order)), [per_dimension[index] for index in order], width=1.0 if len(order) > 64 else 0.8
    )
    if len(order) <= 64:
        axes.set_xticks(range(len(order)), [str(index) for index in order], fontsize=7, rotation=90)
    axes.set(
        title=title, xlabel="dimension, by its KL", ylabel="mean KL, nats", xlim=(-0.7, len(order) - 0.3)
    )
    return figure


def curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Reconstruction, KL and its weight over the steps of runs.

    Args:
        runs: lines of metrics.jsonl by name of the run.

    Raises:
        ValueError: a run logged none of these.
    """
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    panels = figure.subplots(len(CURVES), 1, sharex=True)
    for number, (name, metrics) in enumerate(runs.items()):
        found = False
        for axes, (key, label) in zip(panels, CURVES.items(), strict=True):
            axes.set_ylabel(label)
            dashed = ["kl_counted"] if key == "kl" else []
            for logged in (key, *dashed):
                steps, values = _series(metrics, logged)
                found = found or bool(steps)
                style = {"linestyle": "--", "linewidth": 0.9} if logged in dashed else {"label": name}
                axes.plot(steps, values, color=f"C{number}", **style)
        if not found:
            raise ValueError(f"{name} logged none of {', '.join(CURVES)}: give runs of vae_lm.train")
    panels[1].set_title("dashed: what is left above the threshold", fontsize="small", loc="right")
    panels[-1].set_xlabel("step")
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _series(metrics: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values; a value that was not finite leaves a gap."""
    chosen = [line for line in metrics if key in line]
    return [line["step"] for line in chosen], [
        math.nan if line[key] is None else line[key] for line in chosen
    ]


# ---- command line


@dataclass(frozen=True, kw_only=True)
class Latents:
    """t-SNE of latents, coloured by labels or by the number of words."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of a model (a run, a released checkpoint), or a file of latents that vae_lm.embed wrote."""
    out: str
    """PNG to write."""
    input: str = ""
    """Text file, one a line; needed with a model, gives the numbers of words with a file of latents."""
    labels: str = ""
    """File with a label a line, in the same order."""
    perplexity: float = 30.0
    """Of t-SNE: neighbours that count."""
    limit: int = 5000
    """Draw the first ones only; t-SNE of many takes long."""
    seed: int = 0
    """Of t-SNE."""
    released: Released = field(default_factory=Released)

    def draw(self) -> Figure:
        """Compute and draw."""
        texts = sources.texts(self.input, limit=self.limit) if self.input else []
        if Path(self.source).suffix in (".npy", ".safetensors"):
            latents = sources.latents(self.source)[: self.limit]
        elif not texts:
            raise ValueError(f"{self.source} is a model: give the texts to draw with --input")
        else:
            latents = sources.open_model(self.source, self.released).encode(texts).mu.cpu()
        labels: list[Any] = sources.texts(self.labels, limit=self.limit) if self.labels else []
        for name, given in (("texts", texts), ("labels", labels)):
            if given and len(given) != len(latents):
                raise ValueError(
                    f"there are {len(latents)} latents but {len(given)} {name}: give one of each"
                )
        colours, legend = _colours(labels, texts, len(latents))
        points = project(latents.numpy(), perplexity=self.perplexity, seed=self.seed)
        return scatter(points, colours, title=f"{len(latents)} latents of {self.source}", legend=legend)


def _colours(labels: list[str], texts: list[str], count: int) -> tuple[list[Any], str]:
    if not labels:
        return ([len(text.split()) for text in texts], "words") if texts else ([""] * count, "")
    if len(set(labels)) <= _MOST_COLOURS:
        return list(labels), "label"
    try:
        return [float(label) for label in labels], "label"
    except ValueError as error:
        raise ValueError(
            f"there are {len(set(labels))} labels: numbers, or at most {_MOST_COLOURS} names, can be drawn"
        ) from error


@dataclass(frozen=True, kw_only=True)
class KL:
    """Mean KL of each dimension over texts."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model, of a run, or of a released checkpoint."""
    out: str
    """PNG to write."""
    input: str = sources.STDIN
    """Text file, one a line; - is the standard input."""
    released: Released = field(default_factory=Released)

    def draw(self) -> Figure:
        """Compute and draw."""
        texts = sources.texts(self.input)
        posterior = sources.open_model(self.model, self.released).encode(texts)
        values = kl_per_dimension(*posterior).mean(0).tolist()
        title = f"KL {sum(values):.2f} nats over {len(texts)} texts"
        if len(texts) > 1:
            title += f", {active_units(posterior.mu).num_active} of {len(values)} dimensions in use"
        return kl_bars(values, title=title)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Reconstruction, KL and beta over the steps of training runs.

    Reads metrics.jsonl of the run folders: "rec", "kl", "kl_counted" and "beta" of the lines that have them.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of vae_lm.train."""
    out: str
    """PNG to write."""

    def draw(self) -> Figure:
        """Read and draw."""
        if not self.runs:
            raise ValueError("no run was named: give the folder of at least one")
        return curves({name: read_metrics(name) for name in self.runs})


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The way from one text to another as a table."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model, of a run, or of a released checkpoint."""
    first: Annotated[str, tyro.conf.Positional]
    """Where it starts."""
    second: Annotated[str, tyro.conf.Positional]
    """Where it ends."""
    out: str
    """PNG to write."""
    steps: int = 10
    """Equal steps, one text more than that."""
    decoding: Decoding = field(default_factory=Decoding)
    released: Released = field(default_factory=Released)

    def table(self) -> Table:
        """What is drawn."""
        way = Interpolate(
            model=self.model, texts=(self.first, self.second), steps=self.steps, decoding=self.decoding
        )
        return way.table(sources.open_model(self.model, self.released))


Command = (
    Annotated[Latents, tyro.conf.subcommand("latents")]
    | Annotated[KL, tyro.conf.subcommand("kl")]
    | Annotated[Curves, tyro.conf.subcommand("curves")]
    | Annotated[Interpolation, tyro.conf.subcommand("interpolation")]
)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, draw and write the picture.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        command: Any = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vae_lm.picture",
            description="Pictures of a latent space and of trainings.",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        if isinstance(command, Interpolation):
            save_table(*command.table(), Path(command.out))
        else:
            save(command.draw(), Path(command.out))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"written to {command.out}")


if __name__ == "__main__":
    main()
