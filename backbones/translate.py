"""Translate pictures with a U-GAT-IT: ``python -m backbones.translate RUN PICTURE --direction A2B``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from backbones.configs import UGATITTraining
from backbones.convert_ugatit import load_public
from backbones.sample import save_grid
from backbones.scores import Extractor, score_generator
from backbones.train_setup import stored_training
from backbones.ugatit import Generator, Translation
from backbones.unpaired import Pair
from fq.run import CONFIG, STEP_NAME, checkpoint_tensors, load_config, newest_checkpoint

Direction = Literal["A2B", "B2A"]
FILES: dict[Direction, str] = {"A2B": "model.safetensors", "B2A": "model_1.safetensors"}
"""The generators in a checkpoint: the models that training prepares first."""


@torch.no_grad()
def translate(generator: nn.Module, images: Tensor, *, batch_size: int = 16) -> Translation:
    """Translate pictures in eval mode.

    Args:
        generator: of one direction.
        images: ``[B, 3, H, W]`` in [-1, 1].
        batch_size: pictures at once.

    Returns:
        `Translation`, on the generator's device, in float32.
    """
    device = next(generator.parameters()).device
    with _evaluating(generator):
        parts = [generator(part.to(device)) for part in images.split(batch_size)]
    return Translation(*(torch.cat(column).float() for column in zip(*parts, strict=True)))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def overlay(images: Tensor, heatmaps: Tensor) -> Tensor:
    """Where a network looked, in colour over the pictures (U-GAT-IT, Fig. 2).

    Args:
        images: ``[B, 3, H, W]`` in [-1, 1].
        heatmaps: ``[B, 1, h, w]``; each is stretched to its own range.

    Returns:
        ``[B, 3, H, W]`` in [-1, 1]: blue is least, red most.
    """
    heat = F.interpolate(heatmaps, images.shape[-2:], mode="bilinear", align_corners=False)
    low, high = heat.amin((1, 2, 3), keepdim=True), heat.amax((1, 2, 3), keepdim=True)
    share = ((heat - low) / (high - low).clamp_min(1e-12)).squeeze(1).cpu().numpy()
    colours = torch.from_numpy(matplotlib.colormaps["jet"](share)[..., :3]).to(images)
    return 0.5 * images + 0.5 * (rearrange(colours, "b h w c -> b c h w") * 2 - 1)


def save_translations(a2b: nn.Module, b2a: nn.Module, pair: Pair, path: Path, *, columns: int = 8) -> None:
    """Write a picture of translations both ways.

    Rows: pictures of A, where the generator looks, their translations, these translated back; then the same
    from B.

    Args:
        a2b: generator from A to B.
        b2a: generator from B to A.
        pair: pictures to translate, the first of each domain.
        path: of the PNG.
        columns: pictures of each domain.
    """
    rows = []
    columns = min(columns, len(pair.a), len(pair.b))
    for images, there, back in ((pair.a, a2b, b2a), (pair.b, b2a, a2b)):
        source = images.fetch(np.arange(columns))[0].float() / 127.5 - 1
        translated = translate(there, source)
        again = translate(back, translated.image)
        rows += [source, overlay(source, translated.heatmap.cpu()), translated.image.cpu(), again.image.cpu()]
    save_grid(torch.cat(rows), path, rows=len(rows))


def score_translations(
    a2b: nn.Module,
    b2a: nn.Module,
    pair: Pair,
    extractor: Extractor,
    *,
    num_samples: int,
    num_real: int,
    seed: int = 0,
) -> dict[str, float]:
    """Distances of translations to real pictures of the domain they go to, both ways.

    Args:
        a2b: generator from A to B.
        b2a: generator from B to A.
        pair: pictures to translate and to compare with; a score of record takes the test pictures.
        extractor: see `backbones.scores.make_extractor`.
        num_samples: pictures of the source domain to translate, if there are that many.
        num_real: pictures of the target domain to compare with, if there are that many.
        seed: of the random subsets of the kernel distance.

    Returns:
        Scores of `backbones.scores.score_generator`, their names after ``A2B/`` or ``B2A/``.
    """
    scores: dict[str, float] = {}
    for name, source, target, generator in (
        ("A2B", pair.a, pair.b, a2b),
        ("B2A", pair.b, pair.a, b2a),
    ):

        def sample(labels: Tensor, start: int, source=source, generator=generator) -> Tensor:
            pictures = source.fetch(np.arange(start, start + len(labels)))[0].float() / 127.5 - 1
            return translate(generator, pictures).image

        found = score_generator(
            sample, target, extractor, num_samples=min(num_samples, len(source)), num_real=num_real,
            seed=seed, conditional=False,
        )  # fmt: skip
        scores |= {f"{name}/{key}": value for key, value in found.items()}
    return scores


def load_translator(source: str | Path, direction: Direction) -> Generator:
    """The generator of one direction of a run, or of a public U-GAT-IT checkpoint.

    Args:
        source: a run folder, one of its checkpoints, or a public ``.pt`` file.
        direction: ``"A2B"`` or ``"B2A"``.

    Returns:
        The generator in eval mode.

    Raises:
        FileNotFoundError: there is no such file, or the run has no checkpoint yet.
        ValueError: the file is damaged, pickled, or not of U-GAT-IT.
    """
    path = Path(source).expanduser().resolve()
    run = path.parent.parent if STEP_NAME.fullmatch(path.name) else path
    if not (run / CONFIG).is_file():
        networks = load_public(path)
        return (networks.genA2B if direction == "A2B" else networks.genB2A).eval()
    training = stored_training(load_config(run))
    if not isinstance(training, UGATITTraining):
        raise ValueError(
            f"{run} is a run of the preset {training.preset}, which makes pictures of noise: use python -m "
            "backbones.sample RUN"
        )
    checkpoint = newest_checkpoint(run) if run == path else path
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint yet: let the run reach its first one")
    generator = Generator(training.model)
    generator.load_state_dict(checkpoint_tensors(checkpoint, FILES[direction]), strict=True)
    return generator.eval()


@dataclass(frozen=True, kw_only=True)
class TranslateConfig:
    """Translate pictures from one domain into the other."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")]
    """Run folder, checkpoint folder, or public .pt file."""
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures to translate; the short side is resized and the centre cut out."""
    direction: Direction = "A2B"
    """From domain A to B, or back."""
    heatmap: bool = False
    """Also write where the generator looked."""
    out: str = "translated"
    """Folder for the results; PICTURE.png of every picture."""

    def __post_init__(self) -> None:
        if not self.pictures:
            raise ValueError("no pictures were given: name one or more files after the run")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the translations.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(TranslateConfig, args=sys.argv[1:] if arguments is None else arguments,
                          prog="python -m backbones.translate")  # fmt: skip
        generator = load_translator(config.source, config.direction)
        sources = {_target(Path(name), config): _read(Path(name), generator) for name in config.pictures}
        for target, image in sources.items():
            result = translate(generator, image)
            shown = [image, overlay(image, result.heatmap.cpu())] if config.heatmap else []
            save_grid(torch.cat([*shown, result.image.cpu()]), target, rows=1)
            print(f"wrote {target}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _target(picture: Path, config: TranslateConfig) -> Path:
    return Path(config.out) / f"{picture.stem}.png"


def _read(path: Path, generator: Generator) -> Tensor:
    """A picture as the generator takes it, [1, 3, R, R] in [-1, 1]."""
    size = generator.config.resolution
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), method=Image.Resampling.LANCZOS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no picture {path}: check the name") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): give a PNG or JPEG file") from error
    return torch.from_numpy(rearrange(np.array(square), "h w c -> 1 c h w")).float() / 127.5 - 1


if __name__ == "__main__":
    main()
