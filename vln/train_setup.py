"""What a training of an agent starts from: data, the agent, its optimiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vln.agent import freeze
from vln.agent_data import Split, make_split, pick_pairs, read_items
from vln.agent_folder import KINDS, load_agent, trunk_of
from vln.back_translation import BackTranslation, sample_paths
from vln.checkpoints import WEIGHTS, from_released
from vln.checks import warn_of_findings
from vln.data import read_r2r
from vln.follower import FollowerConfig
from vln.hanna_model import HannaAgentConfig
from vln.instructions import add_markers
from vln.model import Prevalent
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig, sized
from vln.pretrain_data import open_features, open_tokenizer
from vln.speaker_folder import load_speaker
from vln.train_config import AgentConfig, ItemsConfig, LearnConfig, Training
from vln.walks import PanoramaFeatures
from vln.world import World


class Opened(NamedTuple):
    """Data of a run."""

    world: World
    features: PanoramaFeatures
    tokenizer: Any
    train: Split
    extra: Split | None
    teller: BackTranslation | None
    val: dict[str, Split]


class Best(nn.Module):
    """The best agent so far, as buffers that checkpoints carry, so that a resumed run has it to the bit.

    Args:
        agent: whose weights are copied when it is the best.
    """

    score: Tensor
    step: Tensor

    def __init__(self, agent: nn.Module) -> None:
        super().__init__()
        self.register_buffer("score", torch.tensor(-torch.inf, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(-1))
        self.agent = copy.deepcopy(agent).requires_grad_(False)

    def update(self, agent: nn.Module, score: float, step: int) -> bool:
        """Keep an agent if it is better; returns whether it is."""
        if not score > float(self.score):
            return False
        self.score.fill_(score)
        self.step.fill_(step)
        self.agent.load_state_dict(agent.state_dict())
        return True


def refuse_idle_processes(accelerator: Accelerator, batch_size: int) -> None:
    """Raise if a process would have no episode in a step.

    Raises:
        ValueError: there are more processes than episodes.
    """
    if accelerator.num_processes > batch_size:
        raise ValueError(
            f"batch_size is {batch_size} for {accelerator.num_processes} processes: give at least one "
            "episode to each"
        )


def open_data(config: ItemsConfig, *, seed: int = 0) -> Opened:
    """Everything that a configuration of R2R or NDH names.

    Args:
        config: what is walked.
        seed: of the paths that a speaker tells.

    Raises:
        FileNotFoundError: a file is missing; the text names it.
        ValueError: a file is damaged, or things do not fit together.
    """
    dataset: Any = "ndh" if config.task == "ndh" else config.dataset
    items = read_items(config.data, dataset, config.split)
    if config.pairs:
        items = pick_pairs(items, config.pairs)
    more = [item for path in config.extra for item in read_r2r(path)]
    tokenizer = open_words(config)
    held_out: dict[str, Any] = {config.split: items} if config.pairs else {}
    for split in config.val_splits:
        try:
            held_out[split] = read_items(config.data, dataset, split)
        except FileNotFoundError:
            continue  # a folder may have no such split
    needed = {item.scan_id for rows in (items, more, *held_out.values()) for item in rows}
    world = World(load_graphs(config.data, sorted(needed)))
    warn_of_findings({config.split: items} | held_out, world.graphs)
    features = open_features(sources(config), world)

    def split_of(name: str, rows: Sequence[Any], first: int = 0) -> Split:
        return make_split(name, rows, world, tokenizer, config.reading, first=first)

    train = split_of(config.split, items)
    if train.episodes.waypoints is None:
        raise ValueError(
            f"split {config.split} of {config.data} has items without a goal: learn from another"
        )
    extra = split_of("extra", more, len(train.episodes.names)) if more else None
    teller = None
    if config.speaker:
        known = [item for rows in (items, *held_out.values()) for item in rows]
        scans = {name: world.graph(name) for name in sorted(train.scan_ids)}
        paths = sample_paths(scans, known, config.speaker_paths, seed=seed)
        trained = load_speaker(config.speaker)
        trained.require_width(features.width, config.features)
        teller = BackTranslation(
            trained, paths, world, features, tokenizer, reading=config.reading,
            first=len(train.episodes.names),
        )  # fmt: skip
    val = {name: split_of(name, rows) for name, rows in held_out.items()}
    for name, made in val.items():
        if made.episodes.waypoints is None:
            raise ValueError(
                f"split {name} has items without a goal, so no scores: leave it out of --val-splits"
            )
    return Opened(world, features, tokenizer, train, extra, teller, val)


def sources(config: ItemsConfig) -> TripletsConfig:
    """Where features and tokeniser are, as the pre-training says it."""
    return TripletsConfig(data=config.data, features=config.features, tokenizer=config.tokenizer)


def open_words(config: ItemsConfig) -> Any:
    """The tokeniser, with the markers of dialogues for NDH.

    Raises:
        FileNotFoundError: there is none.
    """
    tokenizer = open_tokenizer(sources(config))
    if config.task == "ndh":
        add_markers(tokenizer, released=config.released_markers)
    return tokenizer


# ---- the agent


def build_agent(config: Training, *, num_words: int, pad_id: int, feature_size: int) -> nn.Module:
    """The agent to train, with the weights that it starts from.

    Args:
        config: of the run.
        num_words: of the vocabulary; a smaller one of the pre-trained model grows (markers).
        pad_id: of the tokeniser.
        feature_size: of a view.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: they do not fit, or are for other features, words or another task.
    """
    sizes, task = config.model, config.items.task
    if sizes.agent:
        loaded = load_agent(sizes.agent)
        if loaded.task != task:
            raise ValueError(f"{sizes.agent} holds an agent for {loaded.task}, not for {task}")
        together, given = loaded.reading.num_instructions, config.items.num_instructions
        if together != given:
            raise ValueError(
                f"{sizes.agent} reads {together} instructions together but num_instructions is {given}: "
                f"give --num-instructions {together}"
            )
        _require_fit(trunk_of(loaded.agent), feature_size, num_words, sizes.agent)
        return loaded.agent.train()
    trunk = build_trunk(sizes, num_words=num_words, pad_id=pad_id, feature_size=feature_size)
    return KINDS[task](trunk, agent_options(sizes, task)).train()


def agent_options(sizes: AgentConfig, task: str) -> Any:
    """Sizes and dropouts around the pre-trained model."""
    if task == "hanna":
        return HannaAgentConfig(hidden_size=sizes.decoder_hidden, dropout=sizes.decoder_dropout)
    return FollowerConfig(
        encoder_hidden=sizes.encoder_hidden,
        decoder_hidden=sizes.decoder_hidden,
        action_embedding=sizes.action_embedding,
        encoder_dropout=sizes.encoder_dropout,
        dropout=sizes.decoder_dropout,
        feature_dropout=sizes.feature_dropout,
    )


def build_trunk(sizes: AgentConfig, *, num_words: int, pad_id: int, feature_size: int) -> Prevalent:
    """The pre-trained model, or one from scratch.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it was trained with other features or words.
    """
    if sizes.pretrained == "scratch":
        options = sized(
            sizes, vocab_size=num_words, feature_size=feature_size, dropout=sizes.trunk_dropout,
            pad_token_id=pad_id,
        )  # fmt: skip
        return Prevalent(options)
    folder = Path(sizes.pretrained)
    if (folder / WEIGHTS).is_file():
        released = from_released(folder, angle_size=sizes.angle_size)
        trunk = Prevalent(released.config)
        own = trunk.state_dict()
        trunk.load_state_dict({name: value for name, value in released.state_dict().items() if name in own})
    else:
        inside = folder / "model"
        trunk = Prevalent.from_pretrained(inside if inside.is_dir() else folder)
    known = trunk.config.vocab_size
    if known < num_words <= known + 3:  # the markers of dialogues
        trunk.resize_token_embeddings(num_words)
    _require_fit(trunk, feature_size, num_words, sizes.pretrained)
    return trunk.train()


def _require_fit(trunk: Prevalent, feature_size: int, num_words: int, origin: str) -> None:
    have = trunk.config
    if (have.feature_size, have.vocab_size) != (feature_size, num_words):
        raise ValueError(
            f"{origin} was trained with {have.feature_size} features a view and {have.vocab_size} words, but "
            f"the data have {feature_size} and {num_words}: give those that it was trained with"
        )


def set_stage(agent: nn.Module, learn: LearnConfig, step: int) -> None:
    """Training mode, and what of the pre-trained model learns in a step."""
    agent.train()
    tuned = step >= learn.tune_from
    freeze(trunk_of(agent), text=tuned and learn.tune == "all", cross=tuned and learn.tune != "none")


def make_optimiser(agent: nn.Module, learn: LearnConfig) -> torch.optim.Optimizer:
    """Optimiser of everything that learns at some time."""
    set_stage(agent, learn, max(learn.tune_from, 0))
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    kinds: dict[str, Any] = {
        "rmsprop": torch.optim.RMSprop,
        "adamw": torch.optim.AdamW,
        "adamax": torch.optim.Adamax,
        "adam": torch.optim.Adam,
    }
    return kinds[learn.optimiser](trained, lr=learn.lr, weight_decay=learn.weight_decay)


def clip_gradients(agent: nn.Module, max_norm: float) -> Tensor:
    """Clip the parts of an agent, each to the norm; a critic is left alone, as in EnvDrop.

    Returns:
        The largest norm of a part before clipping, ``[]``.
    """
    norms = [
        nn.utils.clip_grad_norm_(part.parameters(), max_norm)
        for name, part in agent.named_children()
        if name != "critic"
    ]
    return torch.stack(norms).max()
