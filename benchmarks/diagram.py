"""The models as pictures, for their manuals: ``python -m benchmarks.diagram``."""

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


def sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page, 1.25 units an inch."""
    figure = Figure(figsize=(width / 1.25, height / 1.25))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def draw_optimus() -> Figure:
    """The sentence VAE: encoder, latent and decoder from left to right."""
    figure, axes = sheet(11.5, 4.5)
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


def draw_prevalent() -> Figure:
    """Prevalent's pipeline: data on the left, the model that is pre-trained, the agents on the right."""
    figure, axes = sheet(12.4, 5.4)
    box(axes, 0.2, 4.1, 2.3, 0.9, "R2R: paths\nand instructions", SLOT)
    box(axes, 0.2, 2.45, 2.3, 0.9, "vln.speaker\npath to words", ENCODER)
    box(axes, 0.2, 0.8, 2.3, 0.9, "sampled paths of\ntraining scans", SLOT)
    arrow(axes, (1.35, 4.1), (1.35, 3.35))
    box(axes, 3.1, 1.65, 1.9, 0.9, "vln.augment\nsays the paths", ENCODER)
    arrow(axes, (2.5, 2.9), (3.1, 2.35))
    arrow(axes, (2.5, 1.25), (3.1, 1.85))
    box(axes, 3.1, 3.6, 1.9, 1.4, "triplets:\ninstruction,\npanorama, action", LATENT)
    arrow(axes, (2.5, 4.55), (3.1, 4.4))
    arrow(axes, (4.05, 2.55), (4.05, 3.6))
    arrow(axes, (5.0, 4.3), (5.6, 4.3))
    box(axes, 5.6, 0.8, 3.5, 4.2, "", ENCODER)
    axes.text(7.35, 4.72, "vln.pretrain", ha="center", va="center", fontsize=9, color=INK)
    box(axes, 5.8, 1.65, 1.5, 0.7, "words\n9 text layers", "white")
    box(axes, 7.4, 1.65, 1.5, 0.7, "36 views\nprojection", "white")
    box(axes, 5.8, 2.75, 3.1, 0.7, "4 layers of cross attention", "white")
    arrow(axes, (6.55, 2.35), (6.55, 2.75))
    arrow(axes, (8.15, 2.35), (8.15, 2.75))
    box(axes, 5.8, 3.85, 1.5, 0.6, "masked words", LATENT)
    box(axes, 7.4, 3.85, 1.5, 0.6, "next action", LATENT)
    arrow(axes, (6.55, 3.45), (6.55, 3.85))
    arrow(axes, (8.15, 3.45), (8.15, 3.85))
    axes.text(
        7.35, 1.2, "seen anew at every step of an episode", ha="center", va="center", fontsize=8, color=INK
    )
    axes.text(10.95, 5.1, "vln.train", ha="center", va="center", fontsize=9, color=INK)
    for row, text in enumerate((
        "R2R: follow an instruction", "NDH: follow a dialogue", "HANNA: find, ask for help"
    )):  # fmt: skip
        y = 3.9 - 1.55 * row
        box(axes, 9.75, y, 2.45, 0.9, text, DECODER)
        arrow(axes, (9.1, 2.9), (9.75, y + 0.45))
    axes.set_ylim(0.55, 5.4)
    figure.set_figheight(4.85 / 1.25)
    return figure


PICTURES = {"optimus.png": draw_optimus, "prevalent.png": draw_prevalent}


def main(arguments: list[str] | None = None) -> None:
    """Write the PNGs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagram", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    options = parser.parse_args(arguments)
    for name, draw in PICTURES.items():
        picture = io.BytesIO()
        draw().savefig(picture, format="png", dpi=130)
        write_atomically(options.out / name, picture.getvalue())
        print(f"written to {options.out / name}")


if __name__ == "__main__":
    main()
