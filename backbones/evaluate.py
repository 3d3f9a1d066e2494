"""Score a trained BigGAN: ``python -m backbones.evaluate RUN --features inception:PATH``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from backbones.configs import TrainConfig, from_dict
from backbones.data import DataConfig, open_images
from backbones.sample import generate, load_generator
from backbones.scores import make_extractor, score_generator
from fq.provenance import provenance
from fq.run import CONFIG, load_config, newest_checkpoint, write_atomically


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score the averaged generator of a run, or a public BigGAN checkpoint, against real pictures.

    Raises:
        ValueError: a number is outside its range.
    """

    source: Annotated[str, tyro.conf.Positional]
    """Run folder, checkpoint folder of a run, or .pth file."""
    features: str = ""
    """classifier, inception[:PATH], NETWORK:PATH or random; what the run was scored with when empty."""
    data: str = ""
    """Real pictures, as for training; the run's when empty. A public checkpoint needs it."""
    num_eval: int = 0
    """Samples to draw; 0 takes the run's number, or 10,000."""
    num_real: int = 50_000
    """Real pictures to compare with, if there are that many."""
    truncation: float = 0.0
    """Draw latents again beyond this; 0 keeps all, as scores of record do."""
    seed: int = 0
    """Seed of the latents."""
    out: str = ""
    """JSON to write; scores.json in the run folder when empty, nothing for a public checkpoint."""

    def __post_init__(self) -> None:
        if self.num_eval < 0 or self.num_real < 1:
            raise ValueError(f"num_eval is {self.num_eval}, num_real {self.num_real}: give numbers above 0")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Draw samples, score them, and say with what.

    Args:
        config: see :class:`EvaluateConfig`.

    Returns:
        ``{"source", "checkpoint", "data", "scores", "provenance"}``.

    Raises:
        FileNotFoundError: run, checkpoint, weights or pictures are missing.
        ValueError: they do not fit together.
    """
    generator, model = load_generator(config.source)
    run = _run_folder(Path(config.source))
    trained = from_dict(TrainConfig, load_config(run)) if run else None
    if trained is None and not config.data:
        raise ValueError(
            f"{config.source} does not say what it was trained on: name the pictures with --data"
        )
    data = trained.data if trained else DataConfig(resize=True)
    if config.data:
        data = replace(data, data=config.data)
    features = config.features or (trained.run.features if trained else "none")
    if features == "none":
        raise ValueError(
            "no network to score with: pass --features classifier, inception:PATH or NETWORK:PATH"
        )
    images = open_images(data, resolution=model.resolution, conditional=model.num_classes > 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = make_extractor(features, images, device=device)
    generator.to(device)

    def sample(labels: Tensor, start: int) -> Tensor:
        return generate(generator, model, labels, seed=config.seed, first=start, truncation=config.truncation)

    scores = score_generator(
        sample,
        images,
        extractor,
        num_samples=config.num_eval or (trained.run.num_eval if trained else 10_000),
        num_real=config.num_real,
        seed=config.seed,
        conditional=model.num_classes > 1,
        dequantize=data.dequantize,
    )
    checkpoint = newest_checkpoint(run) if run and run == Path(config.source) else Path(config.source)
    return {
        "source": config.source,
        "checkpoint": checkpoint.name if checkpoint else None,
        "data": f"{images.name} {images.digest[:8]}",
        "truncation": config.truncation,
        "scores": scores,
        "provenance": provenance(config.seed),
    }


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, print the scores and write them beside the run.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(
            EvaluateConfig,
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m backbones.evaluate",
        )
        result = evaluate(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    for name, value in result["scores"].items():
        print(f"{value:12.4f}  {name}")
    run = _run_folder(Path(config.source))
    target = config.out or (run / "scores.json" if run else None)
    if target:
        write_atomically(target, json.dumps(result, indent=2) + "\n")
        print(f"written to {target}")


def _run_folder(source: Path) -> Path | None:
    """The run that a path names: itself, or the run of one of its checkpoints."""
    return next((folder for folder in (source, source.parent.parent) if (folder / CONFIG).is_file()), None)


if __name__ == "__main__":
    main()
