"""Pictures from a trained generator: ``python -m backbones.sample RUN|CHECKPOINT --classes 3 7``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torchvision
import tyro
from torch import Tensor, nn

from backbones import stylegan2
from backbones.biggan import BigGANConfig, Generator
from backbones.configs import UGATITTraining
from backbones.convert import infer_config, load_public
from backbones.convert_stylegan2 import load_nvidia
from backbones.data import Images
from backbones.stylegan2 import StyleGAN2Config
from backbones.train_setup import stored_training
from fq.run import CONFIG, STEP_NAME, checkpoint_tensors, load_config, newest_checkpoint

AVERAGE = "model_2.safetensors"
"""The averaged generator in a checkpoint: the third model that training prepares."""


NoiseConfig = BigGANConfig | StyleGAN2Config
"""Configurations of the generators that turn noise into pictures."""


@torch.no_grad()
def generate(
    generator: nn.Module,
    config: NoiseConfig,
    labels: Tensor,
    *,
    seed: int = 0,
    first: int = 0,
    truncation: float | None = None,
) -> Tensor:
    """Pictures of the given classes; the latent of a picture depends on seed and number alone.

    Args:
        generator: in eval mode during the call.
        config: of the generator.
        labels: int64 ``[B]``.
        seed: of the latents.
        first: number of the first picture.
        truncation: smaller is tidier and less varied; None keeps all variety. BigGAN draws latents beyond it
            again (Sec. 3.1); StyleGAN2 moves styles to the mean until this share psi of the way is left.

    Returns:
        float32 ``[B, 3, R, R]`` in [-1, 1], on the generator's device.

    Raises:
        ValueError: a label is outside the classes, or the truncation is out of range.
    """
    _check(config, labels, truncation)
    numbers = range(first, first + len(labels))
    z = torch.stack([_latent(generator, config, seed, number, truncation) for number in numbers])
    if isinstance(config, StyleGAN2Config):
        psi = 1.0 if truncation is None else truncation
        return _in_eval(generator, lambda z, y: generator(z, y, truncation=psi, noise="const"), z, labels)
    return _in_eval(generator, generator, z, _condition(generator, labels))


@torch.no_grad()
def interpolate(
    generator: nn.Module,
    config: NoiseConfig,
    labels: Tensor,
    *,
    columns: int,
    seed: int = 0,
    truncation: float | None = None,
) -> Tensor:
    """One row a label, from one latent to another.

    StyleGAN2 goes from style to style; BigGAN from z to z, with a shared embedding also on to the next
    label's class.

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
        ends = torch.stack(
            [_latent(generator, config, seed, 2 * row + end, truncation) for end in (0, 1)]
        )  # [2, latent_dim]
        share = torch.linspace(0, 1, columns)[:, None]
        if isinstance(config, StyleGAN2Config):
            rows.append(_between_styles(generator, ends, label, share, truncation))
            continue
        z = torch.lerp(ends[0], ends[1], share)
        target = int(labels[(row + 1) % len(labels)]) if config.shared_dim else label
        start, stop = (_condition(generator, torch.tensor([end])) for end in (label, target))
        # Class embeddings of an unshared generator are rows of tables, between which there is nothing.
        y = torch.lerp(start, stop, share.to(start)) if config.shared_dim else start.expand(columns)
        rows.append(_in_eval(generator, generator, z, y))
    return torch.cat(rows)


def _between_styles(
    generator: nn.Module, ends: Tensor, label: int, share: Tensor, truncation: float | None
) -> Tensor:
    """Pictures on the straight way between the styles of two latents."""
    mapping, synthesis = generator.mapping, generator.synthesis
    assert callable(mapping) and callable(synthesis)
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    psi = 1.0 if truncation is None else truncation
    ws = mapping(ends.to(device), torch.tensor([label, label], device=device), truncation=psi)
    way = torch.lerp(ws[:1], ws[1:], share[:, :, None].to(ws))  # [columns, num_ws, w_dim]
    images: Tensor = synthesis(way, noise="const")
    generator.train(training)
    return images.float()


def class_grid(generator: nn.Module, config: NoiseConfig, *, seed: int) -> tuple[Tensor, int]:
    """Ten pictures of each of up to ten classes, evenly chosen, or fifty without classes, from fixed latents.

    Args:
        generator: see :func:`generate`.
        config: of the generator.
        seed: of the latents.

    Returns:
        The pictures, and the number of rows: one a class, five without classes.
    """
    classes = spread(config.num_classes) if config.num_classes > 1 else [0] * 5
    labels = torch.tensor(classes).repeat_interleave(10)
    return generate(generator, config, labels, seed=seed), len(classes)


def real_grid(images: Images) -> tuple[Tensor, int]:
    """Real pictures laid out like the samples.

    Args:
        images: the real pictures.

    Returns:
        Up to ten pictures of each of up to ten classes (up to fifty without classes), and the number of rows.
    """
    if images.labels is None:
        count = min(50, len(images) // 10 * 10) or len(images)
        rows = list(np.arange(count).reshape(-1, min(10, count)))
    else:
        rows = [np.flatnonzero(images.labels == c) for c in spread(images.num_classes)]
        rows = [row for row in rows if len(row)]
    columns = min(10, *map(len, rows))
    pictures = torch.stack([images[int(i)][0] for row in rows for i in row[:columns]])
    return pictures.float() / 127.5 - 1, len(rows)


def sampler(
    generator: nn.Module, config: NoiseConfig, *, seed: int, truncation: float | None = None
) -> Callable[[Tensor, int], Tensor]:
    """:func:`generate` as :func:`backbones.scores.score_generator` calls it, ``sample(labels, start)``."""

    def sample(labels: Tensor, start: int) -> Tensor:
        return generate(generator, config, labels, seed=seed, first=start, truncation=truncation)

    return sample


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


def load_generator(source: str | Path) -> tuple[nn.Module, NoiseConfig]:
    """The averaged generator of a run, or the generator of a public checkpoint.

    Args:
        source: a run folder; one of its checkpoints; a public BigGAN ``.pth`` file, or its folder; an NVIDIA
            StyleGAN2 ``.pkl``, in which nothing is run.

    Returns:
        The generator in eval mode and its configuration.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: the file is damaged, would run code, or holds no generator that makes pictures of noise.
    """
    path = Path(source).expanduser().resolve()
    run = path.parent.parent if STEP_NAME.fullmatch(path.name) else path
    config: NoiseConfig
    if (run / CONFIG).is_file():
        config, state = _load_run(run, path)
    elif path.suffix == ".pkl":
        config, state = load_nvidia(path)
    else:
        state = load_public(path)
        config = infer_config(state)
    stylegan = isinstance(config, StyleGAN2Config)
    generator = stylegan2.Generator(config) if isinstance(config, StyleGAN2Config) else Generator(config)
    try:
        generator.load_state_dict(state, strict=True)
    except RuntimeError as error:
        kind = "StyleGAN2" if stylegan else "BigGAN"
        raise ValueError(f"{path} does not fit the {kind} generator it looks like: {error}") from error
    return generator.eval(), config


def _load_run(run: Path, path: Path) -> tuple[NoiseConfig, dict[str, Tensor]]:
    training = stored_training(load_config(run))
    if isinstance(training, UGATITTraining):
        raise ValueError(
            f"{run} is a run of U-GAT-IT, which translates pictures and makes none of noise: use "
            "python -m backbones.translate RUN PICTURE --direction A2B"
        )
    checkpoint = newest_checkpoint(run) if run == path else path
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint yet: let the run reach its first one")
    return training.model, checkpoint_tensors(checkpoint, AVERAGE)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw pictures from a run, one of its checkpoints, or a public BigGAN or StyleGAN2 checkpoint."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """Run folder, checkpoint folder, BigGAN .pth or NVIDIA .pkl file."""
    classes: tuple[int, ...] = ()
    """Class numbers, one row each; all classes (at most 10) when empty."""
    num: int = 10
    """Pictures a row."""
    truncation: float | None = None
    """Smaller is tidier, and less varied: 0.5 for BigGAN (latents beyond it are drawn again), 0.7 for
    StyleGAN2 (styles move to their mean)."""
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


def _check(config: NoiseConfig, labels: Tensor, truncation: float | None) -> None:
    wrong = [label for label in labels.tolist() if not 0 <= label < config.num_classes]
    if wrong:
        raise ValueError(
            f"class {wrong[0]} does not exist: this generator knows 0 to {config.num_classes - 1}"
        )
    if truncation is None:
        return
    if isinstance(config, StyleGAN2Config):
        if not math.isfinite(truncation):
            raise ValueError(f"truncation is {truncation}: give a finite psi, usually from 0 to 1")
    elif not 0 < truncation < math.inf:
        raise ValueError(
            f"truncation is {truncation}: give a bound above 0, or leave it out to keep all latents"
        )


def _latent(
    generator: nn.Module, config: NoiseConfig, seed: int, number: int, truncation: float | None
) -> Tensor:
    """One latent [latent_dim] from a source of its own."""
    dim = generator.latent_dim  # a hierarchical BigGAN rounds the configured one down
    assert isinstance(dim, int)
    draw = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 1, number]).generate_state(1)[0]))
    z = torch.randn(dim, generator=draw)
    if truncation is not None and isinstance(config, BigGANConfig):
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


def _in_eval(
    generator: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor
) -> Tensor:
    """Forward in eval mode, a hundred at a time; spectral norm stores nothing there, so no state changes."""
    device = next(generator.parameters()).device
    training = generator.training
    generator.eval()
    pairs = zip(z.to(device).split(100), y.to(device).split(100), strict=True)
    images = torch.cat([forward(latents, condition) for latents, condition in pairs])
    generator.train(training)
    return images.float()


if __name__ == "__main__":
    main()
