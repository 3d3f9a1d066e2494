"""The sentence VAE as a picture, for its manual: ``python -m benchmarks.diagram``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from fq.run import write_atomically

INK, ENCODER, LATENT, DECODER, SLOT = "#222222", "#dbe7f5", "#f6d9a8", "#dcefdc", "#f6c6a8"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A rounded box with a text, its lower left corner at (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, edgecolor=INK,
        linewidth=0.9,
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow with a text above its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.1})
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08
        axes.text(*middle, text, ha="center", va="bottom", fontsize=8, color=INK)


def draw() -> Figure:
    """Encoder, latent and decoder from left to right."""
    figure = Figure(figsize=(9.2, 3.6))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, 11.5), ylim=(0, 4.5))
    axes.axis("off")
    axes.text(1.2, 0.25, "[CLS] a dog runs . [SEP]", ha="center", fontsize=9, family="monospace")
    arrow(axes, (1.2, 0.55), (1.2, 1.0))
    box(axes, 0.25, 1.0, 1.9, 1.9, "BERT\n\npooled [CLS]", ENCODER)
    arrow(axes, (2.15, 1.95), (3.15, 1.95), "linear, no bias")
    box(axes, 3.15, 1.3, 1.25, 1.3, "$\\mu$,  $\\log\\,\\sigma^2$", LATENT)
    arrow(axes, (4.4, 1.95), (5.2, 1.95), "draw")
    box(axes, 5.2, 1.55, 0.8, 0.8, "$z$", LATENT)
    arrow(axes, (6.0, 2.1), (7.35, 2.4))
    axes.text(6.55, 2.5, "memory\n$W_M z$", ha="center", fontsize=8, color=INK)
    arrow(axes, (6.0, 1.75), (7.35, 0.95))
    axes.text(6.05, 0.85, "embedding\n$W_D z$", ha="center", fontsize=8, color=INK)
    box(axes, 8.2, 1.5, 2.95, 2.2, "", DECODER)
    axes.text(9.68, 3.42, "GPT-2", ha="center", va="center", fontsize=9, color=INK)
    for layer in range(3):
        y = 1.62 + 0.55 * layer
        box(axes, 7.4, y, 0.55, 0.42, "slot", SLOT)
        box(axes, 8.35, y, 2.65, 0.42, "keys, values of the text", "white")
    axes.text(7.68, 3.4, "one in each\nlayer", ha="center", va="bottom", fontsize=8, color=INK)
    box(axes, 7.4, 0.7, 3.75, 0.5, "$W_D z$  +  words  +  positions", SLOT)
    arrow(axes, (9.68, 1.2), (9.68, 1.5))
    axes.text(9.3, 0.25, "<BOS> a dog runs .", ha="center", fontsize=9, family="monospace")
    arrow(axes, (9.3, 0.48), (9.3, 0.7))
    arrow(axes, (9.68, 3.7), (9.68, 4.05))
    axes.text(9.68, 4.15, "a dog runs . <EOS>", ha="center", fontsize=9, family="monospace")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Write the PNG."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagram", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/optimus.png"), help="PNG to write")
    options = parser.parse_args(arguments)
    picture = io.BytesIO()
    draw().savefig(picture, format="png", dpi=130)
    write_atomically(options.out, picture.getvalue())
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
