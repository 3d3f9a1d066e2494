"""Score a trained model: ``python -m backbones.evaluate RUN --features inception:PATH``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from backbones.configs import UGATITTraining
from backbones.data import DataConfig, open_images
from backbones.sample import load_generator, sampler
from backbones.scores import make_extractor, score_generator
from backbones.train_setup import stored_training
from backbones.translate import Direction, load_translator, score_translations
from backbones.unpaired import open_pair
from fq.provenance import provenance
from fq.run import CONFIG, load_config, newest_checkpoint, write_atomically

_NO_NETWORK = "no network to score with: pass --features classifier, inception:PATH or NETWORK:PATH"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score the generator of a run, or a public BigGAN or StyleGAN2 checkpoint, against real pictures.

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
    truncation: float | None = None
    """As for backbones.sample; left out it keeps all variety, as scores of record do."""
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
    run = _run_folder(Path(config.source))
    trained = stored_training(load_config(run)) if run else None
    if isinstance(trained, UGATITTraining):
        return _evaluate_translation(config, trained)
    generator, model = load_generator(config.source)
    if trained is None and not config.data:
        raise ValueError(
            f"{config.source} does not say what it was trained on: name the pictures with --data"
        )
    data = trained.data if trained else DataConfig(resize=True)
    if config.data:
        data = replace(data, data=config.data)
    features = config.features or (trained.run.features if trained else "none")
    if features == "none":
        raise ValueError(_NO_NETWORK)
    images = open_images(data, resolution=model.resolution, conditional=model.num_classes > 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = make_extractor(features, images, device=device)
    generator.to(device)

    scores = score_generator(
        sampler(generator, model, seed=config.seed, truncation=config.truncation),
        images,
        extractor,
        num_samples=config.num_eval or (trained.run.num_eval if trained else 10_000),
        num_real=config.num_real,
        seed=config.seed,
        conditional=model.num_classes > 1,
        dequantize=data.dequantize,
    )
    return _result(config, f"{images.name} {images.digest[:8]}", scores)


def _evaluate_translation(config: EvaluateConfig, trained: UGATITTraining) -> dict[str, Any]:
    """Both directions of U-GAT-IT on the test pictures."""
    if config.truncation is not None:
        raise ValueError("truncation is for generators that start from noise: leave it out for U-GAT-IT")
    source = replace(trained.data, data=config.data) if config.data else trained.data
    pair = open_pair(
        source.data, trained.model.resolution, split="test", root=source.data_root,
        skip_corrupt=source.skip_corrupt,
    )  # fmt: skip
    features = config.features or trained.run.features
    if features == "none":
        raise ValueError(_NO_NETWORK)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = make_extractor(features, pair.a, device=device)
    directions: tuple[Direction, ...] = ("A2B", "B2A")
    a2b, b2a = (load_translator(config.source, direction).to(device) for direction in directions)
    scores = score_translations(
        a2b, b2a, pair, extractor, num_samples=config.num_eval or trained.run.num_eval,
        num_real=config.num_real, seed=config.seed,
    )  # fmt: skip
    names = " and ".join(f"{images.name} {images.digest[:8]}" for images in pair[:2])
    return _result(config, names, scores)


def _result(config: EvaluateConfig, data: str, scores: dict[str, float]) -> dict[str, Any]:
    run = _run_folder(Path(config.source))
    checkpoint = newest_checkpoint(run) if run and run == Path(config.source) else Path(config.source)
    return {
        "source": config.source,
        "checkpoint": checkpoint.name if checkpoint else None,
        "data": data,
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
