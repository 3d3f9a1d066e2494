"""Everything a run can be told. The docstrings of the fields are the help text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from vae_lm.latent import PosteriorMode


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if not least <= getattr(config, name) < math.inf:  # nor NaN, which passes a plain <
            raise ValueError(f"{name} is {getattr(config, name)}: give at least {least}")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}: give a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which sentences.

    Raises:
        ValueError: a value is outside its range.
    """

    data: str = "data/sentences.txt"
    """File (one sentence a line: .txt, .tsv, either with .gz; .parquet, .arrow), folder with train.txt or the
    like and valid.txt, name on the Hub, or grammar for the embedded sentences."""
    valid: str = ""
    """Held-out sentences, a file or folder; by default the valid split of the data, else held_out of it."""
    held_out: float = 0.05
    """Share of the data to hold out (at most 2,000 sentences) where it has no valid split; at 0, evaluations
    are of training sentences."""
    column: str = "text"
    """Column of the text in Arrow files and on the Hub."""
    labelled: bool = False
    """Lines are label<TAB>text; the label is dropped."""
    max_words: int = 64
    """Most words of a sentence; 0 for no limit."""
    max_tokens: int = 128
    """Most tokens of a sentence in either network, special ones included."""
    too_long: Literal["drop", "refuse"] = "drop"
    """What becomes of longer sentences: left out (and counted), or an error."""
    limit: int = 0
    """Use the first so many sentences only; 0 for all."""
    cache: str = "runs/tokens"
    """Folder of stored token ids, each under a key of texts, tokenisers and lengths; empty for none."""
    stream: bool = False
    """Read the data as it is needed instead of holding it in memory: text, or the JSON files of token ids of
    the original's pre-training, as python -m vae_lm.prepare leaves them."""
    shuffle_buffer: int = 100_000
    """Sentences that a stream holds to draw from."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_words", "limit")
        _at_least(self, 3, "max_tokens")  # BOS, a token, EOS
        _at_least(self, 1, "shuffle_buffer")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}: give a share from 0 to below 1")
        if self.stream and self.data == "grammar":
            raise ValueError("the grammar is in memory anyway: leave out --stream")
        untouched = {"max_words": 0, "limit": 0, "labelled": False, "column": "text", "held_out": 0.0}
        changed = [name for name, value in untouched.items() if getattr(self, name) != value]
        if self.stream and (changed or self.too_long == "drop"):
            raise ValueError(
                f"a stream takes its files as they are, but {', '.join(changed) or 'too_long'} would change "
                "them: prepare the files beforehand (python -m vae_lm.prepare), and stream them with "
                "--max-words 0 --held-out 0 --too-long refuse"
            )


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The two networks: pre-trained, a finished VAE, or made anew in given sizes.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    init: str = ""
    """Folder of a VAE to go on from, ours or a released checkpoint, in place of encoder and decoder."""
    encoder: str = ""
    """Pre-trained BERT-like encoder, folder or Hub name; empty for random weights."""
    decoder: str = ""
    """Pre-trained GPT-2, folder or Hub name; empty for random weights."""
    vocab: tuple[str, ...] = ()
    """Tokenisers, folders or Hub names: encoder's and decoder's, or one folder of a VAE with both. By default
    those of the pre-trained networks, or one of vocab_size learnt from the data."""
    vocab_size: int = 8000
    """Size of a vocabulary learnt from the data."""
    latent: bool = True
    """Without, a plain GPT-2 language model of the same size is trained, for comparison."""
    latent_dim: int = 32
    """Size of z."""
    injection: Literal["both", "memory", "embedding"] = "both"
    """How the decoder is told z."""
    num_memory_slots: int = 1
    """Positions of the memory in each layer."""
    width: int = 0
    """Width of networks made anew."""
    encoder_layers: int = 0
    """Layers of an encoder made anew."""
    decoder_layers: int = 0
    """Layers of a decoder made anew."""
    num_heads: int = 0
    """Attention heads of networks made anew."""
    pooling: Literal["pooler", "first", "mean"] = "pooler"
    """Feature of a sentence: the encoder's pooler (the original's), its first token, or the mean of all."""
    initializer_range: float = 0.02
    """Standard deviation of weights made anew; 0.02 suits widths of 768, narrow networks want more."""
    head_range: float = 0.02
    """Standard deviation of a posterior head made anew."""
    dropout: float = 0.1
    """Dropout everywhere in both networks."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "vocab_size", "latent_dim", "num_memory_slots")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a probability from 0 to below 1")
        if bool(self.encoder) != bool(self.decoder):
            raise ValueError("give both --encoder and --decoder, or neither")
        if len(self.vocab) > 2:
            raise ValueError(
                f"vocab names {len(self.vocab)} tokenisers: give the encoder's and the decoder's"
            )
        _above_zero(self, "initializer_range", "head_range")
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.is_new and min(sizes.values()) < 1:
            raise ValueError(
                f"networks made anew have sizes of at least 1, but these are {sizes}: give them, or "
                "--encoder and --decoder, or --init"
            )
        if self.is_new and self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not self.is_new and any(sizes.values()):
            raise ValueError(
                f"sizes {sizes} are for networks made anew, but {self.init or self.encoder} has its own: "
                "leave them at 0"
            )
        settled: dict[str, Any] = {} if self.is_new else {"initializer_range": 0.02}
        settled |= {"pooling": "pooler", "head_range": 0.02} if self.init else {}
        changed = [name for name, default in settled.items() if getattr(self, name) != default]
        if changed:
            raise ValueError(
                f"{' and '.join(changed)} cannot be chosen for what {self.init or self.encoder} brings: "
                "leave the default"
            )
        if not self.latent and self.init:
            raise ValueError("--no-latent trains a plain GPT-2, which --init has no place for: use --decoder")

    @property
    def is_new(self) -> bool:
        """Whether weights are random."""
        return not (self.init or self.encoder)


_SIZES = ("width", "encoder_layers", "decoder_layers", "num_heads")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised: reconstruction + beta * KL.

    A VAE as in the paper is the default. KL collapse as a control: cycles 0, free_bits 0. An auto-encoder:
    posterior mean and beta 0; the original's stochastic ones: posterior unit_variance, or beta 0 alone.

    Raises:
        ValueError: a value is outside its range.
    """

    posterior: PosteriorMode = "sample"
    """How z is taken from the posterior: a draw, a draw with variance 1, or its mean (an auto-encoder)."""
    beta: float = 1.0
    """Weight of the KL at the end of a cycle."""
    beta_start: float = 0.0
    """Weight of the KL at the beginning of a cycle."""
    cycles: int = 1
    """Cycles of the weight; 0 keeps it at beta from the first step."""
    zero_share: float = 0.5
    """Share of a cycle spent at beta_start."""
    rise_share: float = 0.25
    """Share of a cycle in which the weight rises."""
    free_bits: float = 0.5
    """Threshold lambda of the KL by sentence and dimension, in nats; 0 is the plain KL."""
    length_weighted: bool = False
    """Divide the reconstruction by the number of tokens, BOS and EOS included."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "beta", "beta_start", "cycles", "free_bits")
        if self.beta_start > self.beta:
            raise ValueError(
                f"beta_start is {self.beta_start} but beta {self.beta}: the weight must not fall"
            )
        if not (0 <= self.zero_share <= 1 and 0 < self.rise_share <= 1):
            raise ValueError(
                f"zero_share is {self.zero_share} and rise_share {self.rise_share}: give shares of a cycle"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batches and optimiser.

    Raises:
        ValueError: a value is outside its range.
    """

    batch_size: int = 32
    """Sentences of a batch, over all processes."""
    accumulation: int = 1
    """Batches whose gradients are added up before a step of the optimiser; each sentence counts the same."""
    lr: float = 5e-5
    """Learning rate."""
    warmup_steps: int = 0
    """Steps in which the rate rises from 0."""
    decay: Literal["linear", "none"] = "linear"
    """The rate falls to 0 at schedule_steps, or stays."""
    schedule_steps: int = 0
    """Length of both schedules, of the rate and of the KL weight, in steps; 0 for the length of the run."""
    beta1: float = 0.9
    """AdamW's first factor."""
    beta2: float = 0.999
    """AdamW's second factor."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Of matrices and embeddings; never of biases and layer norms."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "accumulation")
        _at_least(self, 0, "warmup_steps", "schedule_steps", "weight_decay")
        _above_zero(self, "lr", "adam_eps", "max_grad_norm")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a factor from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, place and reports of a run. Frequencies are in steps; 0 is never.

    Raises:
        ValueError: a value is outside its range.
    """

    steps: int = 0
    """Steps of the optimiser in all; 0 for as many as the epochs have."""
    epochs: float = 1.0
    """Times that every sentence is seen, where steps is 0."""
    seed: int = 42
    """Seed of weights, noise and the order of sentences."""
    out: str = ""
    """Run folder; runs/PRESET-SEED when empty. A folder that holds this run is resumed."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl, means over the steps since; a checkpoint writes one too."""
    sample_every: int = 1000
    """Steps between samples, reconstructions and an interpolation in samples/."""
    eval_every: int = 1000
    """Steps between evaluations on held-out sentences."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; each also writes model/, for Optimus.from_pretrained."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    num_eval: int = 500
    """Held-out sentences of an evaluation, drawn once with the seed."""
    importance_samples: int = 20
    """Draws of z for each sentence's importance-weighted bound."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers beside metrics.jsonl: tensorboard, wandb, mlflow, … as accelerate knows them."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs both networks under autocast; losses stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "steps", "seed", "sample_every", "eval_every", "checkpoint_every")
        _above_zero(self, "epochs")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}: give a number below 2**32, as NumPy wants it")
        _at_least(self, 1, "log_every", "keep_checkpoints", "importance_samples")
        _at_least(self, 2, "num_eval")  # a variance is taken over them


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run of Optimus, or of a plain GPT-2 beside it.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    preset: tyro.conf.Suppress[str]
    text: TextConfig
    network: NetworkConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig

    def __post_init__(self) -> None:
        steps, schedule = self.run.steps, self.optim.schedule_steps
        if self.text.stream and not steps:
            raise ValueError("the length of a stream is not known beforehand: give --steps")
        if schedule and steps > schedule:
            raise ValueError(
                f"steps is {steps} but the schedules end at schedule_steps, which is {schedule}: raise it too"
            )

    @property
    def folder(self) -> str:
        """Where the run goes."""
        return self.run.out or f"runs/{self.preset}-{self.run.seed}"


REPORTS = (
    *("run." + name for name in ("out", "trackers", "log_every", "sample_every", "eval_every")),
    *("run." + name for name in ("checkpoint_every", "keep_checkpoints", "num_eval", "importance_samples")),
    "text.cache",
)
"""Options that may differ when a run is resumed: they change what is reported, never what is computed."""


def may_change(config: Training) -> tuple[str, ...]:
    """`REPORTS`; the place of sentences whose digest is stored; the length, if no schedule depends on it."""
    moved = () if config.text.stream else ("text.data", "text.valid")
    return (*REPORTS, *moved, *(("run.steps", "run.epochs") if config.optim.schedule_steps else ()))
