"""Public U-GAT-IT checkpoints to ours and back: one ``.pt`` with the state dicts of six networks."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.ugatit import Networks, UGATITConfig, build_networks, max_layers

State = dict[str, Tensor]


def read_public(path: str | Path) -> dict[str, State]:
    """State dicts of the six networks of a public checkpoint, on the CPU.

    Only tensors are unpickled, never code. Entries beside the six are left out.

    Args:
        path: the ``.pt`` file.

    Returns:
        Tensors by key, in the order of the file, by network name: genA2B, genB2A, disGA, disGB, disLA, disLB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, needs code, lacks a network, or holds more than tensors in one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the .pt file of a U-GAT-IT checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways, all meaning the same to the caller
        raise ValueError(
            f"{path} is not a plain tensor file or is truncated ({type(error).__name__}): download it again, "
            "or save the six state_dict() alone with torch.save"
        ) from error
    found = list(map(str, content)) if isinstance(content, Mapping) else []
    missing = [name for name in Networks._fields if name not in found]
    if missing:
        seen = ", ".join(found[:6]) if found else f"a {type(content).__name__}"
        raise ValueError(
            f"{path} lacks {', '.join(missing)} (it holds {seen}): a U-GAT-IT checkpoint has the state dicts "
            f"of {', '.join(Networks._fields)}"
        )
    for name in Networks._fields:
        state = content[name]
        if not isinstance(state, Mapping) or not all(map(_is_weight, state.values())):
            raise ValueError(
                f"{name} in {path} is not a state dict (floating tensors by key): save {name}.state_dict() "
                "there"
            )
    return {name: dict(content[name]) for name in Networks._fields}


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def infer_config(
    states: Mapping[str, Mapping[str, Tensor]], *, resolution: int | None = None
) -> UGATITConfig:
    """Configuration that state dicts fit, from their keys and shapes alone.

    Args:
        states: state dicts by network name, all six or some; what the given ones do not show keeps its
            default, the numbers of layers within what the resolution allows.
        resolution: checked against a full generator. A light one fits every resolution: None is 256 then.

    Returns:
        A configuration whose networks load the states with ``strict=True``, if they are of one model.

    Raises:
        ValueError: no state is given, one is not a network of U-GAT-IT, or two disagree.

    Example:
        >>> from backbones.ugatit import Generator
        >>> G = Generator(UGATITConfig(resolution=96, channels=1))
        >>> infer_config({"genA2B": G.state_dict()}).resolution
        96
    """
    if not states:
        raise ValueError(f"states is empty: pass at least one of {', '.join(Networks._fields)}")
    fields: dict[str, Any] = {} if resolution is None else {"resolution": resolution}
    origin = dict.fromkeys(fields, "the resolution argument")
    for name, state in states.items():
        if name not in Networks._fields:
            raise ValueError(f"states names {name!r} but the networks are {', '.join(Networks._fields)}")
        try:
            found = (_read_generator if name.startswith("gen") else _read_discriminator)(name, state)
        except KeyError as error:
            raise ValueError(
                f"{name} has no {error.args[0]}: a network of U-GAT-IT was expected, with the key names of "
                "the public checkpoints and no prefix such as 'module.'"
            ) from error
        for field, value in found.items():
            if fields.setdefault(field, value) != value:
                raise ValueError(
                    f"{name} says {field} {value} but {origin[field]} says {fields[field]}: pass networks of "
                    "one and the same model"
                )
            origin.setdefault(field, name)
    most = max_layers(fields.get("resolution", UGATITConfig.resolution))
    fields.setdefault("global_layers", min(UGATITConfig.global_layers, most))
    fields.setdefault("local_layers", min(UGATITConfig.local_layers, most))
    return UGATITConfig(**fields)


def _read_generator(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    channels = _size(name, state, "DownBlock.1.weight", 0)
    inputs = _size(name, state, "FC.0.weight", 1)  # 4 channels, in the full generator times the map's places
    fields = {"channels": channels, "num_blocks": _count(state, r"UpBlock1_(\d+)\.conv1\.weight")}
    if inputs == 4 * channels:
        return fields | {"light": True}
    side = math.isqrt(inputs // (4 * channels))
    if inputs != 4 * channels * side**2:
        raise ValueError(
            f"FC.0.weight of {name} reads {inputs} numbers but a full generator flattens a square map of "
            f"{4 * channels} channels: only the layout of the public code is known"
        )
    return fields | {"light": False, "resolution": 4 * side}


def _read_discriminator(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = "global_layers" if name.startswith("disG") else "local_layers"
    return {
        "channels": _size(name, state, "model.1.weight_orig", 0),
        layers: 1 + _count(state, r"model\.(\d+)\.weight_orig"),
    }


def _size(name: str, state: Mapping[str, Tensor], key: str, axis: int) -> int:
    shape = list(state[key].shape)
    if len(shape) < 2 or not all(shape):
        raise ValueError(f"{key} of {name} has shape {shape} but a weight has two axes or more, none empty")
    return shape[axis]


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def load_public(path: str | Path, *, resolution: int | None = None) -> Networks:
    """Networks of a public checkpoint, in train mode on the CPU.

    Args:
        path: the ``.pt`` file.
        resolution: see `infer_config`; needed for a light model of other than 256 px alone.

    Returns:
        `Networks`; ``networks.genA2B.config`` is the configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `read_public` and `infer_config`; or the keys or shapes of a network are not those of
            U-GAT-IT, and then the first differences are named.
    """
    states = read_public(path)
    config = infer_config(states, resolution=resolution)
    networks = _fitting_networks(states, config)
    for name, network in networks._asdict().items():
        # Assigned and not copied into: drawing first values for 600 M parameters would take the longer part.
        # Cloned, because a file may hold one tensor under two names.
        state = {key: value.clone() for key, value in states[name].items()}
        network.load_state_dict(state, strict=True, assign=True)
    return networks


def save_public(path: str | Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the six networks as a public checkpoint, which `load_public` and the original read alike.

    The file is complete or not there: it is written beside its place and then renamed.

    Args:
        path: the ``.pt`` file to write; its folder must exist.
        states: state dicts by network name, such as ``{name: network.state_dict() for name, network in
            networks._asdict().items()}``. Take attached quantisers out of them first.

    Raises:
        ValueError: a network is missing, or its keys or shapes are not those of U-GAT-IT.
    """
    missing = [name for name in Networks._fields if name not in states]
    if missing:
        raise ValueError(f"states lacks {', '.join(missing)}: a U-GAT-IT checkpoint has all six networks")
    _fitting_networks(states, infer_config({name: states[name] for name in Networks._fields}))
    content = {name: {k: v.detach().cpu() for k, v in states[name].items()} for name in Networks._fields}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _fitting_networks(states: Mapping[str, Mapping[str, Tensor]], config: UGATITConfig) -> Networks:
    """Networks of ``config`` without memory, after comparing all keys and shapes with theirs."""
    with torch.device("meta"):
        networks = build_networks(config)
    for name, network in networks._asdict().items():
        _check_network(name, network, states[name])
    return networks


def _check_network(name: str, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    expected = {key: list(value.shape) for key, value in network.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    differences = [
        f"{key} is {found.get(key, 'missing')} but {expected.get(key, 'unknown')} was expected"
        for key in dict.fromkeys(itertools.chain(expected, found))
        if found.get(key) != expected.get(key)
    ]
    if differences:
        more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{name} is not a network of U-GAT-IT: {'; '.join(differences[:3])}{more}; pass the state dicts "
            "as the public code or save_public writes them, without attached quantisers"
        )
