"""Everything a run can be told. The docstrings of the fields are the help text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from backbones.biggan import BigGANConfig
from backbones.data import DataConfig
from backbones.losses import LossName
from backbones.stylegan2 import StyleGAN2Config
from backbones.ugatit import UGATITConfig


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:  # nor NaN, which passes a plain <
            raise ValueError(f"{name} is {getattr(config, name)}: give at least {least}")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}: give a finite number above 0")


def _factors(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: give a factor from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Which two domains of pictures a translation goes between.

    Raises:
        ValueError: an option lies outside its range.
    """

    data: str = "data/pair"
    """A folder with trainA, trainB, testA and testB, or A=PATH,B=PATH[,testA=PATH,testB=PATH], where a path
    is a folder, a .zip, an .npz with images, or an .npz pack of JPEG files (PACK#NAME+NAME takes classes)."""
    data_root: str = "."
    """Folder below which relative paths are looked up."""
    mirror: bool = True
    """Flip pictures left to right at random."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    num_workers: int = 0
    """Processes that prepare batches of each domain; 0 prepares them in the training process."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "num_workers")


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
    codebook_sizes: tuple[int, ...] = ()
    """Codes of each of the layers, in their order, where they differ; codebook_size counts when empty."""
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
        if self.codebook_sizes and len(self.codebook_sizes) != len(self.layers):
            raise ValueError(
                f"codebook_sizes names {len(self.codebook_sizes)} sizes for {len(self.layers)} layers: give "
                "one for each, or none"
            )
        if min(self.codebook_sizes, default=1) < 1:
            raise ValueError(
                f"codebook_sizes holds {min(self.codebook_sizes)}: a codebook has at least 1 code"
            )
        _at_least(self, 0, "commitment_weight")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}: give a moving-average factor from 0 to below 1")
        if not 0 <= self.blend_end <= 1:
            raise ValueError(f"blend_end is {self.blend_end}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class BigGANOptim:
    """Losses, batches and optimisers of BigGAN and TAC-GAN.

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
    loss: LossName = "hinge"
    """Adversarial loss; wasserstein wants gradient_penalty 10 and spectral_norm off."""
    gradient_penalty: float = 0.0
    """Factor of the penalty that holds gradient norms between real and fake at 1 (WGAN-GP)."""
    class_loss: Literal["cross_entropy", "multiclass_hinge"] = "cross_entropy"
    """Loss of the classifiers that a class_head other than projection has."""
    class_weight: float = 1.0
    """Factor of the classifiers' losses."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulation", "d_steps")
        _at_least(self, 0, "ema_start", "g_orthogonal", "gradient_penalty", "class_weight")
        _above_zero(self, "lr_g", "lr_d", "adam_eps")
        _factors(self, "beta1", "beta2", "ema_decay")


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Optim:
    """Losses, batches and optimisers of StyleGAN2 (non-saturating loss, lazy R1 and path length).

    Raises:
        ValueError: a value is outside its range.
    """

    batch_size: int = 32
    """Pictures a process handles at once."""
    accumulation: int = 1
    """Micro-batches whose gradients are added up before a step of an optimiser."""
    lr_g: float = 2e-3
    """Learning rate of the generator."""
    lr_d: float = 2e-3
    """Learning rate of the discriminator."""
    beta1: float = 0.0
    """Adam's first factor."""
    beta2: float = 0.99
    """Adam's second factor."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    r1_gamma: float = 10.0
    """Weight gamma of the R1 penalty; 0 leaves it out."""
    r1_every: int = 16
    """Steps from one R1 phase to the next; its gradient counts that many times."""
    path_weight: float = 2.0
    """Weight of the path length penalty; 0 leaves it out."""
    path_every: int = 4
    """Steps from one path length phase to the next; its gradient counts that many times."""
    path_shrink: int = 2
    """The path length phase uses the batch divided by this."""
    path_decay: float = 0.01
    """Share of a batch in the moving average of path lengths."""
    style_mixing: float = 0.9
    """Probability that the finer styles of a batch come from other latents."""
    ema_kimg: float = 10.0
    """Thousands of pictures after which half of the generator's moving average is new."""
    ema_rampup: float = 0.0
    """While training is young, the half-life is at most this share of the pictures seen; 0 for never."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulation", "r1_every", "path_every", "path_shrink")
        _at_least(self, 0, "r1_gamma", "path_weight", "ema_rampup")
        _above_zero(self, "lr_g", "lr_d", "adam_eps", "ema_kimg")
        _factors(self, "beta1", "beta2")
        for name in ("style_mixing", "path_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class UGATITOptim:
    """Losses, batches and optimisers of U-GAT-IT (least squares, cycle, identity and CAM losses).

    Raises:
        ValueError: a value is outside its range.
    """

    batch_size: int = 1
    """Pictures of each domain that a process handles at once."""
    lr: float = 1e-4
    """Learning rate of both optimisers."""
    schedule_steps: int = 1_000_000
    """The rate stays for the first half of these steps and falls linearly to 0 over the second."""
    beta1: float = 0.5
    """Adam's first factor."""
    beta2: float = 0.999
    """Adam's second factor."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 1e-4
    """Adam's L2 penalty."""
    adversarial_weight: float = 1.0
    """Factor of the adversarial losses of the generators."""
    cycle_weight: float = 10.0
    """Factor of the L1 distance to a picture translated there and back."""
    identity_weight: float = 10.0
    """Factor of the L1 distance to a picture translated into its own domain."""
    cam_weight: float = 1000.0
    """Factor of the generators' attention loss, which tells the two domains apart."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "schedule_steps")
        _at_least(
            self, 0, "weight_decay", "adversarial_weight", "cycle_weight", "identity_weight", "cam_weight"
        )
        _above_zero(self, "lr", "adam_eps")
        _factors(self, "beta1", "beta2")


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
class BigGANTraining:
    """A run of BigGAN or TAC-GAN, with or without feature quantisation.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    data: DataConfig
    model: BigGANConfig
    quantizer: QuantizerConfig
    optim: BigGANOptim
    run: RunConfig

    def __post_init__(self) -> None:
        if self.optim.class_loss != "cross_entropy" and self.model.class_head == "projection":
            raise ValueError(
                f"class_loss is {self.optim.class_loss} but the projection head has no classifier: choose "
                "another --class-head, such as twin"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return _folder(self)


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Training:
    """A run of StyleGAN2, with or without feature quantisation.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    data: DataConfig
    model: StyleGAN2Config
    quantizer: QuantizerConfig
    optim: StyleGAN2Optim
    run: RunConfig

    def __post_init__(self) -> None:
        batch, group = self.optim.batch_size, self.model.mbstd_group
        if group and batch % min(group, batch):
            raise ValueError(
                f"batch_size is {batch} but the discriminator compares pictures in groups of {group}: make "
                "it a multiple, or choose another --mbstd-group"
            )
        if self.optim.path_weight and batch < self.optim.path_shrink:
            raise ValueError(
                f"batch_size is {batch} but the path length phase divides it by path_shrink, which is "
                f"{self.optim.path_shrink}: raise the one or lower the other"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return _folder(self)


@dataclass(frozen=True, kw_only=True)
class UGATITTraining:
    """A run of U-GAT-IT, with or without feature quantisation in its global discriminators.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    data: PairConfig
    model: UGATITConfig
    quantizer: QuantizerConfig
    optim: UGATITOptim
    run: RunConfig

    def __post_init__(self) -> None:
        if self.run.steps > self.optim.schedule_steps:
            raise ValueError(
                f"steps is {self.run.steps} but the learning rate reaches 0 at schedule_steps, which is "
                f"{self.optim.schedule_steps}: raise --schedule-steps too"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return _folder(self)


Training = BigGANTraining | StyleGAN2Training | UGATITTraining


def _folder(config: Training) -> str:
    return config.run.out or f"runs/{config.preset}-{config.quantizer.fq}-{config.run.seed}"


MAY_CHANGE = (
    *("run." + name for name in ("steps", "out", "trackers", "log_every", "sample_every", "eval_every")),
    *("run." + name for name in ("checkpoint_every", "keep_checkpoints", "features", "num_eval", "num_real")),
    *("data." + name for name in ("num_workers", "data_root", "download")),
)
"""Options that may differ when a run is resumed: they change what is reported, never what is computed."""
