"""Released snapshots of the R2R agent and of EnvDrop's speaker to ours and back, to the bit.

A snapshot is a dict of networks, each with ``epoch``, ``state_dict`` and ``optimizer``. The files also hold
weights that the released code never uses; they are kept aside, and written again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vln.checkpoints import State, check_names, infer_config, read_plain, released_names
from vln.follower import Follower, FollowerConfig
from vln.model import Orientation, Prevalent
from vln.speaker_model import Speaker, SpeakerConfig

_SINGLE, _SEVERAL = "encoder_lstm2decoder", "encoder2decoder"
"""The pair of layers that starts the decoder: of the agent with one instruction, and of that with three."""

_DECODER = {
    "embedding.0": "embedding",
    "lstm": "lstm",
    "feat_att_layer.linear_in": "view_attention.linear_in",
    "attention_layer.linear_in": "word_attention.linear_in",
    "attention_layer.linear_out": "word_attention.linear_out",
    "candidate_att_layer.linear_in": "score",
}
_CRITIC = {"state2value.0": "layers.0", "state2value.3": "layers.3"}
_SPEAKER = {
    "encoder": {
        "lstm": "lstm",
        "attention_layer.linear_in": "attention.linear_in",
        "attention_layer.linear_out": "attention.linear_out",
        "post_lstm": "post_lstm",
    },
    "decoder": {
        "embedding": "embedding",
        "lstm": "lstm",
        "attention_layer.linear_in": "attention.linear_in",
        "attention_layer.linear_out": "attention.linear_out",
        "projection": "projection",
    },
}
_UNUSED = {
    "encoder": tuple(
        f"{name}_{part}.{kind}"
        for name in (_SINGLE, _SEVERAL)
        for part in ("ht", "ct")
        for kind in ("weight", "bias")
    ),
    "decoder": ("feat_att_layer.linear_out.weight", "candidate_att_layer.linear_out.weight"),
    "critic": (),
}
_UNUSED_SPEAKER = {
    "encoder": (),
    "decoder": tuple(
        f"baseline_projection.{layer}.{kind}" for layer in (0, 3) for kind in ("weight", "bias")
    ),
}


@dataclass(frozen=True)
class FollowerSnapshot:
    """An agent, and what its file held besides."""

    follower: Follower
    num_instructions: int
    """1, or 3 for the agent that reads all instructions of a path."""
    unused: dict[str, State]
    """Weights of the file that the agent does not use, by network."""


@dataclass(frozen=True)
class SpeakerSnapshot:
    """A speaker, and what its file held besides."""

    speaker: Speaker
    unused: dict[str, State]


def follower_from_released(
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    num_attention_heads: int = 12,
    num_instructions: int = 1,
    orientation: Orientation = "interleaved",
    options: FollowerConfig | None = None,
) -> FollowerSnapshot:
    """An agent from its networks' weights, its sizes from theirs.

    Args:
        parts: released names to tensors of ``encoder``, ``decoder`` and ``critic``.
        num_attention_heads: of the encoder; no tensor shows it.
        num_instructions: 1 or 3: which of the two pairs of layers starts the decoder.
        orientation: the released agents were trained with ``interleaved``.
        options: whose dropouts to take; sizes come from the weights.

    Raises:
        ValueError: a network or a name is missing or unknown, or a shape does not fit.
    """
    if num_instructions not in (1, 3):
        raise ValueError(f"num_instructions is {num_instructions}: the released agents read 1 or 3")
    states = {name: _unwrapped(parts, name) for name in ("encoder", "decoder", "critic")}
    encoder, decoder = states["encoder"], states["decoder"]
    start = _SINGLE if num_instructions == 1 else _SEVERAL
    _need(encoder, "lstm.weight_hh_l0", f"{start}_ht.weight")
    _need(decoder, "embedding.0.weight", "lstm.weight_hh")
    _need(states["critic"], "state2value.0.weight")
    action, angle = decoder["embedding.0.weight"].shape
    trunk = infer_config(
        encoder, num_attention_heads=num_attention_heads, angle_size=angle, orientation=orientation
    )
    chosen = FollowerConfig() if options is None else options
    config = FollowerConfig(
        encoder_hidden=encoder["lstm.weight_hh_l0"].shape[1],
        decoder_hidden=decoder["lstm.weight_hh"].shape[1],
        action_embedding=action,
        critic_hidden=states["critic"]["state2value.0.weight"].shape[0],
        encoder_dropout=chosen.encoder_dropout,
        dropout=chosen.dropout,
        feature_dropout=chosen.feature_dropout,
    )
    follower = Follower(Prevalent(trunk), config)
    unused = {
        name: _load(_part(follower, name), _renames(follower, name, num_instructions), states[name],
                    _UNUSED[name], f"the {name} of the agent's snapshot")
        for name in states
    }  # fmt: skip
    return FollowerSnapshot(follower.eval(), num_instructions, unused)


def follower_to_released(snapshot: FollowerSnapshot) -> dict[str, State]:
    """Weights of an agent under the released names, by network; the reverse of the import.

    Without a file's unused weights (an agent of our own), those names are left out.
    """
    follower, several = snapshot.follower, snapshot.num_instructions
    return {
        name: _renamed(_part(follower, name), _renames(follower, name, several))
        | snapshot.unused.get(name, {})
        for name in ("encoder", "decoder", "critic")
    }


def speaker_from_released(
    parts: Mapping[str, Mapping[str, Tensor]], *, angle_size: int = 128
) -> SpeakerSnapshot:
    """A speaker from its networks' weights; PAD, UNK and EOS are words 0 to 2 and BOS is the last.

    Args:
        parts: released names to tensors of ``encoder`` and ``decoder``.
        angle_size: of a view's numbers, those of orientation.

    Raises:
        ValueError: a network or a name is missing or unknown, or a shape does not fit.
    """
    states = {name: _unwrapped(parts, name) for name in ("encoder", "decoder")}
    encoder, decoder = states["encoder"], states["decoder"]
    _need(encoder, "lstm.weight_ih_l0")
    _need(decoder, "embedding.weight", "lstm.weight_hh_l0")
    vocab, word = decoder["embedding.weight"].shape
    config = SpeakerConfig(
        vocab_size=vocab,
        view_size=encoder["lstm.weight_ih_l0"].shape[1],
        angle_size=angle_size,
        hidden_size=decoder["lstm.weight_hh_l0"].shape[1],
        word_size=word,
        packed=False,
    )
    speaker = Speaker(config)
    unused = {
        name: _load(getattr(speaker, name), _modules(getattr(speaker, name), _SPEAKER[name]), states[name],
                    _UNUSED_SPEAKER[name], f"the {name} of the speaker's snapshot")
        for name in states
    }  # fmt: skip
    return SpeakerSnapshot(speaker.eval(), unused)


def speaker_to_released(snapshot: SpeakerSnapshot) -> dict[str, State]:
    """Weights of a speaker under the released names, by network."""
    parts = {name: getattr(snapshot.speaker, name) for name in ("encoder", "decoder")}
    return {
        name: _renamed(part, _modules(part, _SPEAKER[name])) | snapshot.unused.get(name, {})
        for name, part in parts.items()
    }


def read_snapshot(path: str | Path) -> dict[str, State]:
    """Weights by network of a released snapshot; its optimisers are left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds pickled objects, or is no such snapshot.
    """
    content = read_plain(Path(path))
    if not isinstance(content, Mapping) or not all(
        isinstance(part, Mapping) and isinstance(part.get("state_dict"), Mapping) for part in content.values()
    ):
        raise ValueError(f"{path} is no snapshot: a dict of networks with their state_dict was expected")
    return {name: dict(part["state_dict"]) for name, part in content.items()}


def write_snapshot(parts: Mapping[str, State], path: str | Path, *, epoch: int = 0) -> None:
    """Write weights by network in the released layout, without optimisers.

    Args:
        parts: as of `follower_to_released`.
        path: the file; its folder must exist.
        epoch: the number that the file states.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content = {name: {"epoch": epoch, "state_dict": state, "optimizer": {}} for name, state in parts.items()}
    try:
        torch.save(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- names


def _part(follower: Follower, name: str) -> nn.Module:
    part = getattr(follower, name)
    assert isinstance(part, nn.Module)
    return part


def _renames(follower: Follower, name: str, num_instructions: int) -> dict[str, str]:
    """Our names of a network's tensors to the released ones."""
    part = _part(follower, name)
    if name != "encoder":
        return _modules(part, _DECODER if name == "decoder" else _CRITIC)
    start = _SINGLE if num_instructions == 1 else _SEVERAL
    names = {f"trunk.{ours}": theirs for ours, theirs in released_names(follower.encoder.trunk).items()}
    return names | {
        key: key.replace("to_hidden", f"{start}_ht").replace("to_cell", f"{start}_ct")
        for key in part.state_dict()
        if not key.startswith("trunk.")
    }


def _modules(part: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    theirs = {ours: name for name, ours in modules.items()}
    return {key: f"{theirs[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in part.state_dict()}


def _load(
    part: nn.Module, names: Mapping[str, str], state: State, may_rest: tuple[str, ...], what: str
) -> State:
    """Load a network and return the weights that it does not use."""
    rest = {key: state[key] for key in may_rest if key in state and key not in names.values()}
    used = {key: value for key, value in state.items() if key not in rest}
    own = part.state_dict()
    check_names(used, {theirs: own[ours] for ours, theirs in names.items()}, what)
    part.load_state_dict({ours: used[theirs] for ours, theirs in names.items()}, strict=True)
    return rest


def _renamed(part: nn.Module, names: Mapping[str, str]) -> State:
    return {names[key]: value.detach().cpu() for key, value in part.state_dict().items()}


def _unwrapped(parts: Mapping[str, Mapping[str, Tensor]], name: str) -> State:
    if name not in parts:
        raise ValueError(f"the snapshot has no {name} but {', '.join(sorted(parts)) or 'nothing'}")
    state: dict[str, Any] = dict(parts[name])
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items()}


def _need(state: State, *keys: str) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"the snapshot lacks {', '.join(missing)}: its sizes cannot be told")
