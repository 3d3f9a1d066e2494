"""Everything a run can be told, and the presets. The docstrings of the fields are the help text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

import tyro

from backbones.biggan import BigGANConfig
from backbones.data import DataConfig

T = TypeVar("T")


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:  # nor NaN, which passes a plain <
            raise ValueError(f"{name} is {getattr(config, name)}: give at least {least}")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Feature quantisation of the discriminator.

    Raises:
        ValueError: a value is outside its range.
    """

    fq: Literal["none", "regularize", "replace", "blend"] = "none"
    """none is the plain GAN; regularize adds the commitment loss; replace also feeds the codes forward; blend
    mixes them in gradually."""
    layers: tuple[str, ...] = ("blocks.*.0",)
    """Discriminator modules to attach to: names, ends of names, or globs."""
    codebook_size: int = 1024
    """Codes of every layer."""
    decay: float = 0.8
    """Factor of the codebooks' moving averages."""
    commitment_weight: float = 1.0
    """Factor of the commitment loss; fake and real halves each count once, as in the original."""
    generator_step: Literal["loss", "loss+ema", "none"] = "loss+ema"
    """In a generator step: the generator pays the loss; the codebooks also follow (the paper); neither."""
    compat: Literal["torch"] | None = None
    """torch reproduces the original dictionary, its flaws included."""
    blend_steps: int = 1000
    """Codebook updates over which blend reaches its end."""
    blend_end: float = 1.0
    """Final share of the code under blend."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "codebook_size", "blend_steps")
        _at_least(self, 0, "commitment_weight")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}: give a moving-average factor from 0 to below 1")
        if not 0 <= self.blend_end <= 1:
            raise ValueError(f"blend_end is {self.blend_end}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batches and optimisers.

    Raises:
        ValueError: a value is outside its range.
    """

    batch_size: int = 64
    """Pictures a process handles at once."""
    accumulation: int = 1
    """Micro-batches whose gradients are added up before a step of an optimiser."""
    d_steps: int = 4
    """Discriminator steps for one generator step."""
    lr_g: float = 2e-4
    """Learning rate of the generator."""
    lr_d: float = 2e-4
    """Learning rate of the discriminator."""
    beta1: float = 0.0
    """Adam's first factor."""
    beta2: float = 0.999
    """Adam's second factor."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    ema_decay: float = 0.9999
    """Factor of the moving average of the generator, which makes the samples."""
    ema_start: int = 1000
    """Steps before which the average is a plain copy."""
    g_orthogonal: float = 0.0
    """Strength of the generator's orthogonal regularisation (1e-4 in the BigGAN paper)."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulation", "d_steps")
        _at_least(self, 0, "ema_start", "g_orthogonal")
        for name in ("lr_g", "lr_d", "adam_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give a finite number above 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a factor from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and reports of a run. Frequencies are in steps; 0 is never.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = 100_000
    """Generator steps in all; a finished run goes on when this is raised."""
    seed: int = 0
    """Seed of weights, latents and the order of pictures."""
    out: str = ""
    """Run folder; runs/PRESET-FQ-SEED when empty. A folder that holds this run is resumed."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, means over the steps since; a checkpoint writes one too."""
    sample_every: int = 1000
    """Steps between two sample grids."""
    eval_every: int = 5000
    """Steps between two evaluations; there is one at the end in any case, unless features is none."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 3
    """Checkpoints kept."""
    features: str = "none"
    """Network behind the scores: classifier, inception[:PATH], NETWORK:PATH, random, or none."""
    num_eval: int = 10_000
    """Samples drawn for an evaluation."""
    num_real: int = 50_000
    """Real pictures that the samples are compared with, if there are that many."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl: tensorboard, wandb, mlflow, … as accelerate knows them."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs both networks under autocast; losses and codebooks stay float32."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "sample_every", "eval_every", "checkpoint_every")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: give a number below 2**32, as NumPy wants it")
        _at_least(self, 1, "steps", "log_every", "keep_checkpoints", "num_eval", "num_real")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of BigGAN, with or without feature quantisation.

    Raises:
        ValueError: a value is outside its range.
    """

    preset: tyro.conf.Suppress[str]
    data: DataConfig
    model: BigGANConfig
    quantizer: QuantizerConfig
    optim: OptimConfig
    run: RunConfig

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return self.run.out or f"runs/{self.preset}-{self.quantizer.fq}-{self.run.seed}"


MAY_CHANGE = (
    *("run." + name for name in ("steps", "out", "trackers", "log_every", "sample_every", "eval_every")),
    *("run." + name for name in ("checkpoint_every", "keep_checkpoints", "features", "num_eval", "num_real")),
    *("data." + name for name in ("num_workers", "data_root", "download")),
)
"""Options that may differ when a run is resumed: they change what is reported, never what is computed."""

_DIGITS = TrainConfig(
    preset="digits",
    data=DataConfig(data="digits", dequantize=1 / 16),
    model=BigGANConfig(resolution=16, g_channels=8, d_channels=8, latent_dim=64),
    quantizer=QuantizerConfig(codebook_size=64, decay=0.9, generator_step="loss"),
    optim=OptimConfig(
        batch_size=32, d_steps=2, lr_g=5e-4, lr_d=2e-3, beta2=0.99, ema_decay=0.99, ema_start=50
    ),
    run=RunConfig(
        steps=1000,
        sample_every=200,
        eval_every=200,
        checkpoint_every=200,
        features="classifier",
        num_eval=2000,
    ),
)
_CIFAR10 = TrainConfig(
    preset="cifar10",
    data=DataConfig(data="cifar10"),
    model=BigGANConfig(resolution=32, init="normal02"),
    quantizer=QuantizerConfig(),
    optim=OptimConfig(),
    run=RunConfig(steps=97_500),  # 500 epochs of 195 steps, each 4 x 64 pictures
)
_IMAGENET64 = TrainConfig(
    preset="imagenet64",
    data=DataConfig(data="data/imagenet", resize=True, num_workers=8),
    model=BigGANConfig(
        resolution=64,
        num_classes=1000,
        latent_dim=120,
        shared_dim=128,
        hierarchical=True,
        g_attention=(32,),
        d_attention=(32,),
        inplace_relu=True,
        sn_eps=1e-6,
    ),
    quantizer=QuantizerConfig(layers=("blocks.2.0",), decay=0.7, commitment_weight=0.5),
    optim=OptimConfig(
        batch_size=128, accumulation=4, d_steps=1, lr_g=1e-4, lr_d=4e-4, adam_eps=1e-6, ema_start=20_000
    ),
    run=RunConfig(steps=250_000, num_eval=50_000),
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "digits": ("Handwritten digits at 16 pixels: minutes on a laptop, nothing to fetch.", _DIGITS),
    "smoke": (
        "Digits through a tiny model for a few steps: does everything work here?",
        replace(
            _DIGITS,
            preset="smoke",
            model=replace(_DIGITS.model, g_channels=2, d_channels=2, latent_dim=16),
            quantizer=replace(_DIGITS.quantizer, codebook_size=16),
            optim=replace(_DIGITS.optim, batch_size=16),
            run=RunConfig(
                steps=20,
                log_every=5,
                sample_every=10,
                eval_every=0,
                checkpoint_every=10,
                features="random",
                num_eval=200,
            ),
        ),
    ),
    "cifar10": ("CIFAR-10 with the paper's settings (FQ at all four blocks).", _CIFAR10),
    "cifar100": (
        "CIFAR-100 with the paper's settings.",
        replace(
            _CIFAR10,
            preset="cifar100",
            data=DataConfig(data="cifar100"),
            model=replace(_CIFAR10.model, num_classes=100),
            quantizer=QuantizerConfig(codebook_size=64, decay=0.9, commitment_weight=10.0),
        ),
    ),
    "imagenet64": ("ImageNet (or any folder) at 64 pixels, effective batch 512.", _IMAGENET64),
    "imagenet128": (
        "ImageNet at 128 pixels, effective batch 1024; the published script's missing shared embedding is "
        "set.",
        replace(
            _IMAGENET64,
            preset="imagenet128",
            model=replace(_IMAGENET64.model, resolution=128, g_attention=(64,), d_attention=(64,)),
            quantizer=QuantizerConfig(layers=("blocks.[0-3].0",), commitment_weight=15.0),  # of six blocks
            optim=replace(_IMAGENET64.optim, batch_size=256),
        ),
    ),
}


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a configuration from what ``dataclasses.asdict`` and JSON made of it.

    Args:
        kind: the dataclass.
        values: nested mapping with every field; lists stand for tuples.

    Returns:
        The configuration, checked as ever.

    Raises:
        ValueError: a key is unknown or missing, or a value is out of range.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown, missing = sorted(set(values) - set(names)), sorted(set(names) - set(values))
    if unknown or missing:
        raise ValueError(
            f"configuration of {kind.__name__} has unknown keys {unknown} and lacks {missing}: it was "
            "written by another version; start from a preset instead"
        )
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        nested = hints[name]
        if is_dataclass(nested):
            value = from_dict(nested, value)  # type: ignore[arg-type]
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)
