"""Settings of the pre-training. The docstrings of the fields are the help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from vln.bounds import at_least
from vln.model import ActionTarget, Orientation, PrevalentConfig


@dataclass(frozen=True, kw_only=True)
class TripletsConfig:
    """What is learnt from.

    Raises:
        ValueError: there is nothing to learn from, or a number is outside its range.
    """

    data: str = "data/vln"
    """Folder with connectivity and R2R items, such as `python -m vln.houses` writes."""
    splits: tuple[str, ...] = ("train",)
    """Of the R2R items to learn from."""
    extra: tuple[str, ...] = ()
    """More R2R-format JSON files, as of a speaker."""
    released: tuple[str, ...] = ()
    """Released JSON files of triplets, whose token ids are those of bert-base-uncased."""
    val_splits: tuple[str, ...] = ("val_seen", "val_unseen")
    """Of the R2R items to evaluate on; left out where there are none."""
    shortest: bool = True
    """The teacher walks shortest paths between the ends; --no-shortest follows the paths as written, for R4R
    and RxR."""
    features: str = "features"
    """Store of view features, a folder there or below data; random:WIDTH gives each view a fixed random
    vector."""
    tokenizer: str = "tokenizer"
    """Tokeniser, a folder there or below data; hub:NAME takes one of the Hub."""
    max_tokens: int = 80
    """Longest instruction, [CLS] and [SEP] included; what is longer loses its end."""

    def __post_init__(self) -> None:
        if not (self.splits or self.extra or self.released):
            raise ValueError("splits, extra and released are all empty: there is nothing to learn from")
        at_least(self, 3, "max_tokens")


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """The model.

    Raises:
        ValueError: a number is outside its range.
    """

    init: str = "scratch"
    """scratch; bert:NAME and lxmert:FILE fill what they have; or a run, a folder of ours or a released one,
    which brings all that stands below, but for --angle-size with a released one."""
    hidden_size: int = 768
    """Width."""
    num_attention_heads: int = 12
    """Of every attention."""
    intermediate_size: int = 3072
    """Width of the feed-forward blocks."""
    num_text_layers: int = 9
    """Layers over the words alone."""
    num_cross_layers: int = 4
    """Layers over words and views."""
    angle_size: int = 128
    """Orientation numbers behind a view's features."""
    max_position_embeddings: int = 512
    """Longest text that the model can take."""
    dropout: float = 0.1
    """Of hidden states and attention."""
    action_target: ActionTarget = "candidate_rank"
    """What the action head answers: the rank among the candidates (released checkpoints) or the view."""
    orientation: Orientation = "blocks"
    """Layout of the orientation numbers."""
    feature_scale: float = 1.0
    """Factor of the image features, which should then be about 1 in size. The published model took those of
    ResNet as they are."""
    initializer_range: float = 0.02
    """Standard deviation of new weights; BERT's by default, a narrow model wants more."""

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_size", "num_attention_heads", "intermediate_size", "num_cross_layers")
        at_least(self, 0, "num_text_layers", "feature_scale", "initializer_range")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a share from 0 to below 1")
        if (
            self.init != "scratch"
            and self.init.partition(":")[0] in ("bert", "lxmert")
            and ":" not in self.init
        ):
            raise ValueError(f"init is {self.init!r}: give bert:NAME or lxmert:FILE")


def sized(sizes: Any, *, dropout: float, **others: Any) -> PrevalentConfig:
    """Configuration of a model from scratch, after options of a pre-training or of an agent.

    Args:
        sizes: with the sizes of the model.
        dropout: of hidden states and attention.
        **others: of `PrevalentConfig`.
    """
    return PrevalentConfig(
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=sizes.intermediate_size,
        num_text_layers=sizes.num_text_layers,
        num_cross_layers=sizes.num_cross_layers,
        angle_size=sizes.angle_size,
        max_position_embeddings=sizes.max_position_embeddings,
        orientation=sizes.orientation,
        feature_scale=sizes.feature_scale,
        initializer_range=sizes.initializer_range,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        **others,
    )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Objectives, batches and optimiser.

    Raises:
        ValueError: a number is outside its range, or nothing is to be predicted.
    """

    mlm: bool = True
    """Predict masked words."""
    action: bool = True
    """Predict the teacher's action."""
    mask_share: float = 0.15
    """Of the words, those to predict."""
    batch_size: int = 64
    """Triplets of a micro-batch, shared by all processes."""
    accumulation: int = 1
    """Micro-batches of a step."""
    lr: float = 5e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0; then it falls linearly to 0."""
    schedule_steps: int = 0
    """Step at which the rate is 0; 0 takes the run's steps."""
    weight_decay: float = 0.0
    """None on biases and layer norms."""
    adam_eps: float = 1e-8
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    def __post_init__(self) -> None:
        if not (self.mlm or self.action):
            raise ValueError("neither --mlm nor --action is on: there is nothing to predict")
        at_least(self, 1, "batch_size", "accumulation")
        at_least(self, 0, "lr", "warmup_steps", "schedule_steps", "weight_decay")
        if not 0 < self.mask_share <= 1 or not 0 < self.max_grad_norm:
            raise ValueError(
                f"mask_share is {self.mask_share} and max_grad_norm {self.max_grad_norm}: give a share above "
                "0 up to 1, and a norm above 0"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and reports of a run. Frequencies are in steps; 0 is never.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 12_864
    """Optimiser steps in all; a finished run goes on when this is raised."""
    seed: int = 0
    """Seed of weights, order, masks and dropout."""
    out: str = ""
    """Run folder; runs/pretrain-PRESET-SEED when empty. A folder that holds this run is resumed."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, means over the steps since; a checkpoint writes one too."""
    eval_every: int = 1000
    """Steps between two evaluations; there is one at the end in any case."""
    eval_triplets: int = 4096
    """Triplets of each validation split to evaluate on."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 3
    """Checkpoints kept."""
    export: bool = False
    """Also write the finished model under the released names, as HAMT and VLN-BERT read them."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl: tensorboard, wandb, mlflow, … as accelerate knows them."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs the model under autocast; losses stay float32."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "eval_every", "checkpoint_every")
        at_least(self, 1, "steps", "log_every", "keep_checkpoints", "eval_triplets")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: give a number below 2**32, as NumPy wants it")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A pre-training run.

    Raises:
        ValueError: values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    data: TripletsConfig
    model: SizesConfig
    optim: OptimConfig
    run: RunConfig

    def __post_init__(self) -> None:
        last = self.optim.schedule_steps
        if last and self.run.steps > last:
            raise ValueError(
                f"steps is {self.run.steps} but the learning rate reaches 0 at schedule_steps, which is "
                f"{last}: raise --schedule-steps too"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return self.run.out or f"runs/pretrain-{self.preset}-{self.run.seed}"

    @property
    def schedule_steps(self) -> int:
        """Step at which the rate is 0."""
        return self.optim.schedule_steps or self.run.steps


MAY_CHANGE = (
    *("run." + name for name in ("steps", "out", "trackers", "log_every", "eval_every", "eval_triplets")),
    *("run." + name for name in ("checkpoint_every", "keep_checkpoints", "export")),
    "optim.schedule_steps",
)
"""Options that may differ when a run is resumed. The schedule follows ``steps`` unless it is given."""

PAPER = Pretraining(
    preset="paper",
    data=TripletsConfig(),
    model=SizesConfig(),
    # The released step 12,864 fits one epoch of 6.59 M triplets at 512.
    optim=OptimConfig(batch_size=512),
    run=RunConfig(),
)
HOUSES = Pretraining(
    preset="houses",
    data=TripletsConfig(data="data/houses", max_tokens=96),
    # Narrow layers need larger new weights and features, and dropout keeps them from learning to look.
    model=SizesConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        num_text_layers=1,
        num_cross_layers=1,
        angle_size=8,
        max_position_embeddings=320,
        dropout=0.0,
        action_target="view",
        feature_scale=10.0,
        initializer_range=0.12,
    ),
    optim=OptimConfig(batch_size=64, lr=2e-3, warmup_steps=100),
    run=RunConfig(steps=1000, eval_every=250, checkpoint_every=250, eval_triplets=1024),
)

PRESETS: dict[str, tuple[str, Pretraining]] = {
    "houses": ("A small model on the embedded houses, for two CPU cores.", HOUSES),
    "paper": ("The published sizes: 9 + 4 layers, 156.7 M parameters, R2R and a speaker's triplets.", PAPER),
}
