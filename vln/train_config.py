"""Settings of the agents' training. The docstrings of the fields are the help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from vln.agent_data import Follow, PathType, Reading
from vln.bounds import at_least
from vln.instructions import History
from vln.model import Orientation
from vln.rewards import Normalize

Task = Literal["r2r", "ndh", "hanna"]


@dataclass(frozen=True, kw_only=True)
class ItemsConfig:
    """What is walked.

    Raises:
        ValueError: a number is outside its range, or values do not go together.
    """

    task: Task = "r2r"
    """r2r (also R4R and RxR), ndh, or hanna."""
    data: str = "data/vln"
    """Folder with connectivity and items, such as `python -m vln.houses` writes."""
    dataset: Literal["r2r", "r4r", "rxr"] = "r2r"
    """Whose items, with --task r2r."""
    split: str = "train"
    """To learn from."""
    extra: tuple[str, ...] = ()
    """R2R-format JSON files of a speaker, as `python -m vln.augment` writes, learnt from beside the split."""
    speaker: str = ""
    """Instead of --extra, a run of vln.speaker that tells sampled paths of the split's scans anew at every
    step, through that step's environment dropout (back-translation)."""
    speaker_paths: int = 0
    """Paths sampled for it; 0 takes all that pass R2R's filter and that no item has."""
    val_splits: tuple[str, ...] = ("val_seen", "val_unseen")
    """To evaluate on; left out where there are none."""
    features: str = "features"
    """Store of view features, a folder there or below data; random:WIDTH gives each view a fixed random
    vector."""
    tokenizer: str = "tokenizer"
    """Tokeniser, a folder there or below data; hub:NAME takes one of the Hub."""
    max_tokens: int = 80
    """Longest text; an instruction loses its end, a dialogue its beginning."""
    num_instructions: int = 1
    """Instructions read together: 1, or 3 for all of an R2R path."""
    follow: Follow = "goal"
    """The teacher walks shortest paths to the goal, or along the path (R4R, RxR)."""
    history: History = "nav_q_oracle_ans"
    """How much of a dialogue is read (NDH)."""
    path_type: PathType = "trusted_path"
    """Whose path's end the teacher walks to: the oracle's planner, the player, or the player where it can be
    trusted (NDH)."""
    released_markers: bool = False
    """Take the misspelt markers of dialogues that the released NDH snapshots were trained with."""
    pairs: int = 0
    """Learn from, and evaluate on, so many pairs of training items with one start pose and two goals, one
    instruction each; 0 takes the whole split."""
    deaf: bool = False
    """Make every text one unknown word, to see what is learnt without words."""

    def __post_init__(self) -> None:
        at_least(self, 3, "max_tokens")
        at_least(self, 0, "pairs", "speaker_paths")
        if self.num_instructions not in (1, 3):
            raise ValueError(f"num_instructions is {self.num_instructions}: give 1 or 3")
        if self.task != "r2r" and (self.extra or self.speaker or self.pairs or self.num_instructions > 1):
            raise ValueError(
                "--extra, --speaker, --pairs and --num-instructions are for --task r2r, but the task is "
                f"{self.task}"
            )
        own: dict[str, Any] = {"dataset": "r2r", "follow": "goal"} if self.task != "r2r" else {}
        if self.task != "ndh":
            own |= {"history": "nav_q_oracle_ans", "path_type": "trusted_path", "released_markers": False}
        if self.task == "hanna":
            own |= {"deaf": False}
        for name, usual in own.items():
            if getattr(self, name) != usual:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which says nothing to --task {self.task}: leave it out"
                )
        if self.extra and self.speaker:
            raise ValueError("--extra and --speaker are both given: take written instructions or a speaker")
        if self.speaker_paths and not self.speaker:
            raise ValueError(f"speaker_paths is {self.speaker_paths} but there is no --speaker to tell them")

    @property
    def reading(self) -> Reading:
        """How items become episodes."""
        return Reading(
            self.max_tokens, self.num_instructions, self.follow, self.history, self.path_type, self.deaf
        )


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """The agent.

    Raises:
        ValueError: a number is outside its range.
    """

    pretrained: str = "scratch"
    """Pre-trained model: a run of vln.pretrain, its folder model, a released folder (config.json and
    pytorch_model.bin), or scratch, whose sizes stand below."""
    agent: str = ""
    """Start from this agent instead: a run of vln.train, of the same task; it brings sizes and dropouts."""
    hidden_size: int = 768
    """Width of a model from scratch."""
    num_attention_heads: int = 12
    """Of every attention."""
    intermediate_size: int = 3072
    """Width of the feed-forward blocks."""
    num_text_layers: int = 9
    """Layers over the words alone."""
    num_cross_layers: int = 4
    """Layers over words and views."""
    max_position_embeddings: int = 512
    """Longest text that the model can take."""
    angle_size: int = 128
    """Orientation numbers behind a view's features; must be told of a released model too."""
    orientation: Orientation = "blocks"
    """Layout of the orientation numbers of a model from scratch."""
    feature_scale: float = 1.0
    """Factor of the image features for a model from scratch, see vln.pretrain."""
    initializer_range: float = 0.02
    """Standard deviation of new weights of a model from scratch."""
    trunk_dropout: float = 0.1
    """Of hidden states and attention of a model from scratch, where it trains."""
    encoder_hidden: int = 1024
    """Of the encoder's LSTM, each direction (R2R, NDH)."""
    decoder_hidden: int = 1024
    """Of the decoder (R2R, NDH); of the whole agent in HANNA."""
    action_embedding: int = 64
    """Width of the agent's own orientation (R2R)."""
    encoder_dropout: float = 0.4
    """Of the words that were read (R2R, NDH)."""
    decoder_dropout: float = 0.5
    """Of decoder and critic."""
    feature_dropout: float = 0.4
    """Of the image features, in the decoder, or of a whole environment with --extra or --speaker (R2R)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden_size", "num_attention_heads", "intermediate_size", "num_cross_layers")
        at_least(self, 1, "encoder_hidden", "decoder_hidden", "action_embedding", "max_position_embeddings")
        at_least(self, 0, "num_text_layers", "feature_scale", "initializer_range")
        for name in ("trunk_dropout", "encoder_dropout", "decoder_dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Losses, batches and optimiser.

    Raises:
        ValueError: a number is outside its range.
    """

    reinforce: bool = True
    """Beside imitating the teacher on its walk, learn from drawn walks by advantage actor-critic (R2R)."""
    feedback: Literal["teacher", "argmax", "sample", "mixed"] = "teacher"
    """Whose actions are taken while the teacher is imitated; mixed is the teacher's or drawn ones, chosen at
    each step for the whole batch."""
    sample_share: float = 0.2
    """Chance of drawn actions with mixed feedback."""
    imitation_weight: float = 0.2
    """Of the imitation on the split."""
    extra_weight: float = 0.6
    """Of the imitation on --extra or of --speaker (back-translation)."""
    discount: float = 0.9
    """Of rewards."""
    entropy_weight: float = 0.01
    """Of the policy's entropy."""
    normalize: Normalize = "total"
    """What the actor-critic loss is divided by: all active steps, the batch, or nothing."""
    curiosity_weight: float = 1.0
    """Of running from past mistakes (HANNA)."""
    batch_size: int = 20
    """Episodes of a step, shared by all processes; as many of --extra or --speaker again."""
    max_steps: int = 35
    """Longest walk."""
    optimiser: Literal["rmsprop", "adamw", "adamax", "adam"] = "rmsprop"
    """Optimiser."""
    lr: float = 2e-5
    """Learning rate."""
    weight_decay: float = 0.0
    """Weight decay."""
    max_grad_norm: float = 40.0
    """Gradients of encoder and of decoder are clipped to this norm, each; the critic's are not."""
    tune: Literal["none", "cross", "all"] = "none"
    """What of the pre-trained model learns from step --tune-from on: nothing, its cross layers, or all."""
    tune_from: int = 0
    """Step from which it does, beginning with the best agent so far; before, the model is frozen."""
    tune_lr: float = 2e-6
    """Learning rate from then on."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "max_steps")
        at_least(self, 0, "lr", "tune_lr", "tune_from", "weight_decay", "imitation_weight", "extra_weight")
        at_least(self, 0, "entropy_weight", "discount", "curiosity_weight")
        if not 0 <= self.sample_share <= 1 or not self.max_grad_norm > 0:
            raise ValueError(
                f"sample_share is {self.sample_share} and max_grad_norm {self.max_grad_norm}: give a share "
                "from 0 to 1, and a norm above 0"
            )


@dataclass(frozen=True, kw_only=True)
class WalkRunConfig:
    """Length, place and reports of a run. Frequencies are in steps; 0 is never.

    Raises:
        ValueError: a number is outside its range.
    """

    steps: int = 100_000
    """Optimiser steps in all; a finished run goes on when this is raised."""
    seed: int = 0
    """Seed of weights, order, draws and dropout."""
    out: str = ""
    """Run folder; runs/TASK-PRESET-SEED when empty. A folder that holds this run is resumed."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, means over the steps since; a checkpoint writes one too."""
    eval_every: int = 100
    """Steps between two evaluations; there is one at the end in any case."""
    eval_items: int = 0
    """Episodes of each split to evaluate on; 0 takes all."""
    eval_batch_size: int = 100
    """Episodes walked together; the scores do not depend on it."""
    eval_max_steps: int = 35
    """Longest walk."""
    select: str = ""
    """What the best agent is best in: SPLIT/SCORE, or several joined by +; by default val_unseen/spl, for NDH
    val_unseen/goal_progress, with --pairs train/success."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is one at the end in any case."""
    keep_checkpoints: int = 3
    """Checkpoints kept."""
    maps: int = 4
    """Maps drawn of episodes of each split at the end, half of them failures if there are as many."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl: tensorboard, wandb, mlflow, … as accelerate knows them."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs the model under autocast; losses stay float32."""

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", "eval_every", "eval_items", "checkpoint_every", "maps")
        at_least(self, 1, "steps", "log_every", "keep_checkpoints", "eval_batch_size", "eval_max_steps")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: give a number below 2**32, as NumPy wants it")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run of an agent.

    Raises:
        ValueError: values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    items: ItemsConfig
    model: AgentConfig
    learn: LearnConfig
    run: WalkRunConfig

    def __post_init__(self) -> None:
        if self.items.task != "r2r" and self.learn.reinforce:
            raise ValueError(f"--task {self.items.task} has no critic: give --no-reinforce")
        if self.learn.tune == "all" and self.items.task == "hanna":
            return
        if self.learn.tune != "none" and self.items.task == "hanna":
            raise ValueError("--tune cross does nothing for hanna, which reads words alone: give none or all")

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return self.run.out or f"runs/{self.items.task}-{self.preset}-{self.run.seed}"

    @property
    def select(self) -> tuple[str, ...]:
        """Scores whose sum is best in the best agent."""
        if self.run.select:
            return tuple(self.run.select.split("+"))
        if self.items.pairs:
            return (f"{self.items.split}/success",)
        return ("val_unseen/goal_progress",) if self.items.task == "ndh" else ("val_unseen/spl",)


MAY_CHANGE = (
    *("run." + name for name in ("steps", "out", "trackers", "log_every", "eval_batch_size", "maps")),
    *("run." + name for name in ("checkpoint_every", "keep_checkpoints")),
)
"""Options that may differ when a run is resumed."""

PAPER = Training(
    preset="paper",
    items=ItemsConfig(),
    model=AgentConfig(),
    # First with the pre-trained model frozen, then with its cross layers, from the best agent on.
    learn=LearnConfig(tune="cross", tune_from=50_000),
    run=WalkRunConfig(),
)
PAPER_NDH = Training(
    preset="paper-ndh",
    items=ItemsConfig(task="ndh", max_tokens=300),
    model=AgentConfig(decoder_dropout=0.4),
    learn=LearnConfig(
        reinforce=False, feedback="mixed", imitation_weight=1.0, batch_size=5, max_steps=40,
        optimiser="adamax", lr=5e-4, weight_decay=5e-4,
    ),
    run=WalkRunConfig(steps=20_000, eval_every=500, eval_max_steps=40),
)  # fmt: skip
PAPER_HANNA = Training(
    preset="paper-hanna",
    items=ItemsConfig(task="hanna", val_splits=("val_seen_env", "val_unseen_all"), max_tokens=50),
    model=AgentConfig(decoder_hidden=256, decoder_dropout=0.3),
    learn=LearnConfig(
        reinforce=False, feedback="sample", imitation_weight=1.0, batch_size=32, max_steps=20,
        optimiser="adam", lr=1e-4, weight_decay=5e-4,
    ),
    run=WalkRunConfig(steps=30_000, eval_every=1000, eval_max_steps=50, select="val_unseen_all/spl"),
)  # fmt: skip
R4R = Training(
    preset="r4r",
    items=ItemsConfig(dataset="r4r", follow="path", max_tokens=160),
    model=AgentConfig(),
    learn=LearnConfig(tune="cross", tune_from=50_000, max_steps=60),
    run=WalkRunConfig(eval_every=1000, eval_items=1000, eval_max_steps=60, select="val_unseen/sdtw"),
)
RXR = Training(
    preset="rxr",
    items=ItemsConfig(dataset="rxr", follow="path", max_tokens=300),
    model=AgentConfig(),
    learn=LearnConfig(tune="cross", tune_from=50_000, max_steps=50),
    run=WalkRunConfig(eval_every=1000, eval_items=1000, eval_max_steps=50, select="val_unseen/sdtw"),
)
_SMALL = AgentConfig(
    hidden_size=64, num_attention_heads=4, intermediate_size=128, num_text_layers=1, num_cross_layers=1,
    angle_size=8, max_position_embeddings=320, trunk_dropout=0.0, feature_scale=10.0, initializer_range=0.12,
    encoder_hidden=64, decoder_hidden=128, action_embedding=16, encoder_dropout=0.1, decoder_dropout=0.1,
    feature_dropout=0.1,
)  # fmt: skip
HOUSES = Training(
    preset="houses",
    items=ItemsConfig(data="data/houses", max_tokens=96),
    model=_SMALL,
    learn=LearnConfig(
        reinforce=False, feedback="mixed", sample_share=0.5, imitation_weight=1.0, batch_size=32,
        max_steps=12, optimiser="adamw", lr=1e-3, max_grad_norm=5.0, tune="all", tune_lr=1e-3,
    ),
    run=WalkRunConfig(
        steps=1000, eval_every=250, eval_items=288, eval_max_steps=12, checkpoint_every=250, log_every=20
    ),
)  # fmt: skip
HOUSES_NDH = Training(
    preset="houses-ndh",
    items=ItemsConfig(task="ndh", data="data/houses", max_tokens=300),
    model=_SMALL,
    learn=HOUSES.learn,
    run=HOUSES.run,
)
HOUSES_HANNA = Training(
    preset="houses-hanna",
    items=ItemsConfig(
        task="hanna", data="data/houses", val_splits=("val_seen_env", "val_unseen_all"), max_tokens=96
    ),
    model=_SMALL,
    learn=LearnConfig(
        reinforce=False, feedback="sample", imitation_weight=1.0, batch_size=32, max_steps=16,
        optimiser="adamw", lr=1e-3, max_grad_norm=5.0, tune="all", tune_lr=1e-3,
    ),
    run=WalkRunConfig(
        steps=1000, eval_every=250, eval_items=288, eval_max_steps=24, checkpoint_every=250, log_every=20,
        select="val_unseen_all/spl",
    ),
)  # fmt: skip
OVERFIT = Training(
    preset="overfit",
    items=ItemsConfig(data="data/houses", max_tokens=96, val_splits=(), pairs=16),
    model=AgentConfig(
        hidden_size=64, num_attention_heads=4, intermediate_size=128, num_text_layers=1, num_cross_layers=1,
        angle_size=8, max_position_embeddings=128, trunk_dropout=0.0, encoder_hidden=48, decoder_hidden=96,
        action_embedding=8, encoder_dropout=0.0, decoder_dropout=0.0, feature_dropout=0.0,
    ),
    learn=LearnConfig(
        reinforce=False, imitation_weight=1.0, batch_size=32, max_steps=10, optimiser="adamw", lr=2e-3,
        max_grad_norm=5.0, tune="all", tune_lr=2e-3,
    ),
    run=WalkRunConfig(steps=150, eval_every=50, eval_max_steps=10, checkpoint_every=50, log_every=10),
)  # fmt: skip

PRESETS: dict[str, tuple[str, Training]] = {
    "houses": ("A small R2R agent in the embedded houses, for two CPU cores.", HOUSES),
    "houses-ndh": ("A small NDH agent in the embedded houses.", HOUSES_NDH),
    "houses-hanna": ("A small HANNA agent in the embedded houses.", HOUSES_HANNA),
    "overfit": ("32 items of the houses by heart: 16 pairs that differ in their words alone.", OVERFIT),
    "paper": ("R2R with the published numbers: imitation and actor-critic, frozen, then tuned.", PAPER),
    "paper-ndh": ("NDH with the published numbers.", PAPER_NDH),
    "paper-hanna": ("HANNA with the published numbers.", PAPER_HANNA),
    "r4r": ("R4R: longer texts and walks, a teacher that follows the path.", R4R),
    "rxr": ("RxR: longer texts and walks, a teacher that follows the path.", RXR),
}
