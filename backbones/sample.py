"""Pictures from a trained BigGAN: ``python -m backbones.sample RUN|CHECKPOINT --classes 3 7``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchvision
import tyro
from torch import Tensor, nn

from backbones.biggan import BigGANConfig, Generator
from backbones.configs import TrainConfig, from_dict
from backbones.convert import infer_config, load_public
from fq.run import CONFIG, STEP_NAME, checkpoint_tensors, load_config, newest_checkpoint

AVERAGE = "model_2.safetensors"
"""The averaged generator in a checkpoint: the third model that training prepares."""


@torch.no_grad()
def generate(
    generator: nn.Module,
    config: BigGANConfig,
    labels: Tensor,
    *,
    seed: int = 0,
    first: int = 0,
    truncation: float = 0.0,
) -> Tensor:
    """Pictures of the given classes; the latent of a picture depends on seed and number alone.

    Args:
        generator: in eval mode during the call.
        config: of the generator.
        labels: int64 ``[B]``.
        seed: of the latents.
        first: number of the first picture.
        truncation: latents beyond it are drawn again: smaller is tidier and less varied (BigGAN, Sec. 3.1);
            0 keeps all.

    Returns:
        float32 ``[B, 3, R, R]`` in [-1, 1], on the generator's device.

    Raises:
        ValueError: a label is outside the classes, or the truncation is negative.
    """
    _check(config, labels, truncation)
    numbers = range(first, first + len(labels))
    z = torch.stack([_latent(generator, seed, number, truncation) for number in numbers])
    return _decode(generator, z, _condition(generator, labels))


@torch.no_grad()
def interpolate(
    generator: nn.Module,
    config: BigGANConfig,
    labels: Tensor,
    *,
    columns: int,
    seed: int = 0,
    truncation: float = 0.0,
) -> Tensor:
    """One row a label, from one latent to another; with a shared embedding also on to the next label's class.

    Args:
        generator: in eval mode during the call.
        config: of the generator.
        labels: int64 ``[rows]``.
        columns: pictures a row, at least 2.
        seed: of the latents.
        truncation: as for :func:`generate`.

    Returns:
        float32 ``[rows · columns, 3, R, R]`` in [-1, 1].

    Raises:
        ValueError: fewer than two columns, or as for :func:`generate`.
    """
    _check(config, labels, truncation)
    if columns < 2:
        raise ValueError(f"--num is {columns}: an interpolation needs at least 2 pictures a row")
    rows = []
    for row, label in enumerate(labels.tolist()):
        ends = [_latent(generator, seed, 2 * row + end, truncation) for end in (0, 1)]
        share = torch.linspace(0, 1, columns)[:, None]
        z = torch.lerp(ends[0], ends[1], share)
        target = int(labels[(row + 1) % len(labels)]) if config.shared_dim else label
        start, stop = (_condition(generator, torch.tensor([end])) for end in (label, target))
        # Class embeddings of an unshared generator are rows of tables, between which there is nothing.
        y = torch.lerp(start, stop, share.to(start)) if config.shared_dim else start.expand(columns)
        rows.append(_decode(generator, z, y))
    return torch.cat(rows)


def class_grid(generator: nn.Module, config: BigGANConfig, *, seed: int) -> tuple[Tensor, int]:
    """Ten pictures of each of up to ten classes, evenly chosen, from fixed latents.

    Args:
        generator: see :func:`generate`.
        config: of the generator.
        seed: of the latents.

    Returns:
        The pictures, and the number of rows, one a class.
    """
    classes = torch.tensor(spread(config.num_classes))
    return generate(generator, config, classes.repeat_interleave(10), seed=seed), len(classes)


def save_grid(images: Tensor, path: str | Path, *, rows: int) -> None:
    """Write pictures as one PNG, small ones enlarged without smoothing.

    Args:
        images: float ``[rows · columns, 3, R, R]`` in [-1, 1], row by row.
        path: of the PNG; its folder is made.
        rows: number of rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (images.detach().cpu().float().clamp(-1, 1) + 1) / 2
    factor = max(1, 48 // images.shape[-1])
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = torchvision.utils.make_grid(pixels, nrow=-(-len(images) // rows), padding=2, pad_value=1.0)
    partial = path.with_name(f".{path.stem}.partial.png")
    torchvision.utils.save_image(grid, partial)
    partial.replace(path)


def load_generator(source: str | Path) -> tuple[Generator, BigGANConfig]:
    """The averaged generator of a run, or the generator of a public BigGAN checkpoint.

    Args:
        source: a run folder; one of its checkpoints; a public ``.pth`` file, or the folder that holds it.

    Returns:
        The generator in eval mode and its configuration.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: the file is damaged, pickled, or not a BigGAN generator.
    """
    path = Path(source).expanduser().resolve()
    run = path.parent.parent if STEP_NAME.fullmatch(path.name) else path
    if (run / CONFIG).is_file():
        config = from_dict(TrainConfig, load_config(run)).model
        checkpoint = newest_checkpoint(run) if run == path else path
        if checkpoint is None:
            raise FileNotFoundError(f"{run} has no complete checkpoint yet: let the run reach its first one")
        state = checkpoint_tensors(checkpoint, AVERAGE)
    else:
        state = load_public(path)
        config = infer_config(state)
    generator = Generator(config)
    try:
        generator.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the BigGAN generator it looks like: {error}") from error
    return generator.eval(), config


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw pictures from a run, one of its checkpoints, or a public BigGAN checkpoint."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """Run folder, checkpoint folder, or .pth file."""
    classes: tuple[int, ...] = ()
    """Class numbers, one row each; all classes (at most 10) when empty."""
    num: int = 10
    """Pictures a row."""
    truncation: float = 0.0
    """Draw latents again beyond this; 0 keeps all, 0.5 is tidy."""
    interpolate: bool = False
    """Each row goes from one latent to another instead."""
    seed: int = 0
    """Seed of the latents."""
    out: str = "samples.png"
    """Picture to write."""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num is {self.num}: give at least one picture a row")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write one picture.

    Args:
        arguments: instead of ``sys.argv[1:]``.
    """
    try:
        config = tyro.cli(SampleConfig, args=sys.argv[1:] if arguments is None else arguments,
                          prog="python -m backbones.sample")  # fmt: skip
        generator, model = load_generator(config.source)
        classes = torch.tensor(config.classes or spread(model.num_classes))
        if config.interpolate:
            images = interpolate(generator, model, classes, columns=config.num, seed=config.seed,
                                 truncation=config.truncation)  # fmt: skip
        else:
            labels = classes.repeat_interleave(config.num)
            images = generate(generator, model, labels, seed=config.seed, truncation=config.truncation)
        save_grid(images, config.out, rows=len(classes))
        print(f"wrote {len(images)} pictures of classes {classes.tolist()} to {config.out}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def spread(num_classes: int) -> list[int]:
    """Up to ten classes, evenly chosen.

    Args:
        num_classes: classes there are.

    Returns:
        Class numbers in ascending order, one a row of a grid.

    Example:
        >>> spread(5), spread(20)
        ([0, 1, 2, 3, 4], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18])
    """
    rows = min(num_classes, 10)
    return [row * num_classes // rows for row in range(rows)]


def _check(config: BigGANConfig, labels: Tensor, truncation: float) -> None:
    wrong = [label for label in labels.tolist() if not 0 <= label < config.num_classes]
    if wrong:
        raise ValueError(
            f"class {wrong[0]} does not exist: this generator knows 0 to {config.num_classes - 1}"
        )
    if not 0 <= truncation < math.inf:
        raise ValueError(f"truncation is {truncation}: give a bound above 0, or 0 to keep all latents")


def _latent(generator: nn.Module, seed: int, number: int, truncation: float) -> Tensor:
    """One latent [latent_dim] from a source of its own."""
    dim = generator.latent_dim  # a hierarchical generator rounds the configured one down
    assert isinstance(dim, int)
    draw = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1, number]).generate_state(1)[0]))
    z = torch.randn(dim, generator=draw)
    if truncation:
        # Inverse transform: the same uniform numbers, squeezed into the mass within the bound.
        bound = torch.special.ndtr(torch.tensor(truncation, dtype=torch.float64))
        uniform = torch.special.ndtr(z.double())
        z = torch.special.ndtri((1 - bound) + uniform * (2 * bound - 1)).float()
    return z


def _condition(generator: nn.Module, labels: Tensor) -> Tensor:
    device = next(generator.parameters()).device
    shared = generator.shared
    assert callable(shared)
    y: Tensor = shared(labels.to(device))
    return y


def _decode(generator: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    """Forward in eval mode, a hundred at a time; spectral norm stores nothing there, so no state changes."""
    training = generator.training
    generator.eval()
    pairs = zip(z.to(y.device).split(100), y.split(100), strict=True)
    images = torch.cat([generator(latents, condition) for latents, condition in pairs])
    generator.train(training)
    return images.float()


if __name__ == "__main__":
    main()
