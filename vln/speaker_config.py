"""Settings of the speaker's training. The docstrings of the fields are the help text."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from vln.bounds import at_least
from vln.model import Orientation


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """What is learnt from.

    Raises:
        ValueError: there is nothing to learn from, or a number is outside its range.
    """

    data: str = "data/vln"
    """Folder with connectivity and R2R items, such as `python -m vln.houses` writes."""
    splits: tuple[str, ...] = ("train",)
    """Of the R2R items to learn from."""
    val_splits: tuple[str, ...] = ("val_seen", "val_unseen")
    """Of the R2R items to evaluate on; left out where there are none."""
    shortest: bool = True
    """Paths are the shortest between their ends; --no-shortest takes them as written, for R4R."""
    features: str = "features"
    """Store of view features, a folder there or below data; random:WIDTH gives each view a fixed random
    vector."""
    tokenizer: str = ""
    """Empty counts the words of the training instructions; a folder, there or below data, cuts them with its
    tokeniser instead; a text file lists the words, one a line."""
    min_count: int = 5
    """Words that occur less often are unknown, and never said."""
    max_words: int = 80
    """Longest instruction to learn from, EOS included; what is longer loses its end."""

    def __post_init__(self) -> None:
        if not self.splits:
            raise ValueError("splits is empty: there is nothing to learn from")
        at_least(self, 1, "min_count", "max_words")


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """The speaker.

    Raises:
        ValueError: a number is outside its range.
    """

    init: str = ""
    """Speaker to train further: a run, its model folder, or a released snapshot, whose words --tokenizer
    lists. Its sizes and words then count instead of those below."""
    hidden_size: int = 512
    """Width of encoder and decoder, even."""
    word_size: int = 256
    """Width of a word's embedding."""
    angle_size: int = 128
    """Orientation numbers behind a view's features."""
    orientation: Orientation = "blocks"
    """Their layout; a released snapshot has interleaved."""
    match_features: bool = False
    """Begin with weights that give features of any size the effect of those whose root mean square is 1. Of
    small features, such as the houses', little is heard otherwise."""
    dropout: float = 0.6
    """Of states and words."""
    feature_dropout: float = 0.3
    """Of the image features."""

    def __post_init__(self) -> None:
        at_least(self, 2, "hidden_size")
        at_least(self, 1, "word_size")
        if self.hidden_size % 2 or self.angle_size < 4 or self.angle_size % 4:
            raise ValueError(
                f"hidden_size is {self.hidden_size} and angle_size {self.angle_size}: give an even number, "
                "and a multiple of 4"
            )
        for name in ("dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batches and optimiser.

    Raises:
        ValueError: a number is outside its range.
    """

    batch_size: int = 64
    """Instructions of a step, shared by all processes."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    max_grad_norm: float = 40.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")
        at_least(self, 0, "lr")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: give a norm above 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and reports of a run. Frequencies are in steps; 0 is never.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 80_000
    """Optimiser steps in all; a finished run goes on when this is raised."""
    seed: int = 0
    """Seed of weights, order and dropout."""
    out: str = ""
    """Run folder; runs/speaker-PRESET-SEED when empty. A folder that holds this run is resumed."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, means over the steps since; a checkpoint writes one too."""
    eval_every: int = 1000
    """Steps between two evaluations; there is one at the end in any case."""
    eval_paths: int = 0
    """Paths of each validation split to evaluate on; 0 takes all."""
    eval_words: int = 120
    """Longest text to say in an evaluation."""
    select: str = "val_seen"
    """Validation split by whose BLEU-4 (the original's variant) the speaker in model/ is chosen; empty takes
    the last."""
    sacrebleu: bool = True
    """Also report sacrebleu's BLEU; --no-sacrebleu leaves it out."""
    samples: int = 8
    """Paths of each validation split written to samples/ with what is said of them."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 3
    """Checkpoints kept."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl: tensorboard, wandb, mlflow, … as accelerate knows them."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "eval_every", "eval_paths", "samples", "checkpoint_every")
        at_least(self, 1, "steps", "log_every", "eval_words", "keep_checkpoints")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: give a number below 2**32, as NumPy wants it")


@dataclass(frozen=True, kw_only=True)
class SpeakerTraining:
    """A speaker's training run.

    Raises:
        ValueError: values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    data: PathsConfig
    model: SizesConfig
    optim: OptimConfig
    run: RunConfig

    def __post_init__(self) -> None:
        if self.run.select and self.run.select not in self.data.val_splits:
            raise ValueError(
                f"select is {self.run.select!r} but the validation splits are {self.data.val_splits}: give "
                "one of those, or '' for the last speaker"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return self.run.out or f"runs/speaker-{self.preset}-{self.run.seed}"


MAY_CHANGE = tuple(
    f"run.{name}"
    for name in (
        "steps", "out", "trackers", "log_every", "eval_every", "samples", "checkpoint_every",
        "keep_checkpoints",
    )
)  # fmt: skip
"""Options that may differ when a run is resumed."""

ENVDROP = SpeakerTraining(
    preset="envdrop",
    data=PathsConfig(),
    model=SizesConfig(),
    optim=OptimConfig(),
    run=RunConfig(select="val_unseen"),
)
HOUSES = SpeakerTraining(
    preset="houses",
    data=PathsConfig(data="data/houses", max_words=96),
    model=SizesConfig(
        hidden_size=128, word_size=64, angle_size=8, match_features=True, dropout=0.1, feature_dropout=0.1
    ),
    optim=OptimConfig(lr=4e-3, max_grad_norm=5.0),
    run=RunConfig(steps=1500, eval_every=500, eval_paths=192, checkpoint_every=250),
)

PRESETS: dict[str, tuple[str, SpeakerTraining]] = {
    "houses": ("A small speaker on the embedded houses, for two CPU cores.", HOUSES),
    "envdrop": ("The published numbers of EnvDrop's speaker: 80,000 steps on R2R.", ENVDROP),
}
