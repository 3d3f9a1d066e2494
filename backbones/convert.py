"""Public BigGAN checkpoints to ours: read them, recover the configuration, rename FQ-BigGAN's quantiser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from backbones.biggan import LAYOUTS, BigGANConfig

State = dict[str, Tensor]
Network = Literal["G_ema", "G", "D"]

_ORIGINAL_BUFFERS = ("embed", "cluster_size", "embed_avg")
_OUR_BUFFERS = ("codebook", "ema_sum", "ema_count", "initialized", "num_updates", "seed")


def load_public(path_or_folder: str | Path, which: Network = "G_ema") -> State:
    """State dict of one network of a public BigGAN checkpoint, on the CPU.

    Only tensors are unpickled, never code. The variant whose norms keep their statistics one level down
    (``bn1.bn.stored_mean``) comes back with the plain names, without its accumulation counters.

    Args:
        path_or_folder: a ``.pth`` file, or the folder holding ``G_ema.pth``, ``G.pth`` and ``D.pth``.
        which: the network to take from a folder; ignored for a file.

    Returns:
        Tensors by key, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file, or the folder lacks that network.
        ValueError: the file is truncated, or holds more than tensors by name.
    """
    path = Path(path_or_folder)
    if path.is_dir():
        path = _find_network(path, which)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a BigGAN .pth file or the folder that holds them"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in many ways, all meaning the same to the caller
        raise ValueError(
            f"{path} is not a plain tensor file or is truncated ({type(error).__name__}): download it again, "
            "or save the network's state_dict() alone with torch.save"
        ) from error
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds {_describe(state)} but a state dict (tensors by key) was expected: pass "
            "G_ema.pth, G.pth or D.pth, not an optimiser or a training state"
        )
    return {
        str(key).replace(".bn.stored_", ".stored_"): value
        for key, value in state.items()
        if not str(key).endswith(".accumulation_counter")
    }


def _find_network(folder: Path, which: str) -> Path:
    path = folder / f"{which}.pth"
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("*.pth"))) or "no .pth file"
        raise FileNotFoundError(f"{folder} has no {which}.pth but {found}: give the path of the file to read")
    return path


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:3]))
        return f"a mapping with keys {keys}" if keys else "an empty mapping"
    return f"a {type(value).__name__}"


def infer_config(
    g_state: Mapping[str, Tensor] | None = None,
    d_state: Mapping[str, Tensor] | None = None,
    *,
    resolution: int | None = None,
) -> BigGANConfig:
    """Configuration that a pair of state dicts fits, from their keys and shapes alone.

    What shapes do not show keeps its default: ``sn_eps`` and ``inplace_relu`` (1e-6 and True in the ImageNet
    recipes; neither matters for pictures), ``init``, and the fields of a network that is not given. A
    hierarchical generator yields the width of z that it really reads.

    Args:
        g_state: generator, with or without spectral-norm buffers.
        d_state: discriminator, attention at ``blocks.i.1`` (see `from_fq_biggan`).
        resolution: checked against the states.

    Returns:
        A configuration whose `Generator` and `Discriminator` load the states with ``strict=True``.

    Raises:
        ValueError: neither state is given, a state is not a BigGAN of a known resolution, or the two states
            and ``resolution`` disagree.

    Example:
        >>> from backbones.biggan import Generator
        >>> infer_config(Generator(BigGANConfig(resolution=64, g_channels=2)).state_dict()).g_channels
        2
    """
    if g_state is None and d_state is None:
        raise ValueError("infer_config got neither g_state nor d_state: pass at least one state dict")
    fields: dict[str, Any] = {} if resolution is None else {"resolution": resolution}
    origin = dict.fromkeys(fields, "the resolution argument")
    for name, state, read in (
        ("generator", g_state, _read_generator),
        ("discriminator", d_state, _read_discriminator),
    ):
        if state is None:
            continue
        try:
            found = read(state)
        except KeyError as error:
            raise ValueError(
                f"the {name} state has no {error.args[0]}: a BigGAN {name} was expected, with the key names "
                "of the public checkpoints"
            ) from error
        for field, value in found.items():
            if field in fields and fields[field] != value:
                raise ValueError(
                    f"the {name} state says {field} {value} but {origin[field]} says {fields[field]}: "
                    "pass files of one and the same model"
                )
            fields[field], origin[field] = value, f"the {name} state"
    return BigGANConfig(**fields)


def _num_blocks(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if re.match(r"blocks\.\d+\.0\.conv1\.weight$", key)})


def _attention_blocks(state: Mapping[str, Tensor]) -> set[int]:
    return {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.1\.gamma$", key))}


def _unit(state: Mapping[str, Tensor], multiples: tuple[int, ...], resolution: int, network: str) -> int:
    """Channel unit, from the output channels of every block, which must follow the public table."""
    widths = [state[f"blocks.{index}.0.conv2.weight"].shape[0] for index in range(len(multiples))]
    unit = widths[0] // multiples[0]
    if widths != [unit * multiple for multiple in multiples]:
        raise ValueError(
            f"the {network} blocks give {widths} channels but a {resolution} px BigGAN gives multiples "
            f"{list(multiples)} of one number: only the channel table of the public code is known"
        )
    return unit


def _read_generator(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = _num_blocks(state)
    resolution = next((size for size, row in LAYOUTS.items() if len(row.g_out) == blocks), None)
    if resolution is None:
        raise _unknown_depth("generator", blocks, [len(row.g_out) for row in LAYOUTS.values()])
    row = LAYOUTS[resolution]
    gain = state["blocks.0.0.bn1.gain.weight"]
    stem_dim = state["linear.weight"].shape[1]
    shared = state.get("shared.weight")
    # With slices of z the gain reads more than the shared embedding: that surplus is one slice.
    hierarchical = shared is not None and gain.shape[1] > shared.shape[1]
    return {
        "resolution": resolution,
        "num_classes": (gain if shared is None else shared).shape[0],
        "g_channels": _unit(state, row.g_out, resolution, "generator"),
        "latent_dim": stem_dim * (blocks + 1) if hierarchical else stem_dim,
        "shared_dim": 0 if shared is None else shared.shape[1],
        "hierarchical": hierarchical,
        "g_attention": tuple(row.g_labels[index] for index in sorted(_attention_blocks(state))),
        "spectral_norm": "linear.u0" in state,
    }


def _read_discriminator(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if any(_QUANTISER.match(key) for key in state):
        raise ValueError(
            "the discriminator state keeps a quantiser at blocks.i.1 as the original FQ-BigGAN does: pass it "
            "through from_fq_biggan first"
        )
    blocks = _num_blocks(state)
    fits = [size for size, row in LAYOUTS.items() if len(row.d_out) == blocks]
    if not fits:
        raise _unknown_depth("discriminator", blocks, [len(row.d_out) for row in LAYOUTS.values()])
    # 16 and 32 px share depth and widths; only the 32 px model halves the map again in block 1.
    halves_twice = "blocks.1.0.conv_sc.weight" in state
    resolution = fits[-1] if halves_twice else fits[0]
    row = LAYOUTS[resolution]
    unit = _unit(state, row.d_out, resolution, "discriminator")
    return {
        "resolution": resolution,
        **_class_head(state),
        "d_channels": unit,
        "d_attention": _discriminator_attention(_attention_blocks(state), row.d_labels),
        "wide": all(
            state[f"blocks.{index}.0.conv1.weight"].shape[0] == unit * width
            for index, width in enumerate(row.d_out)
        ),
        "spectral_norm": "linear.u0" in state,
    }


def _class_head(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Number of classes, and the head that has them; shapes do not show whether a class row is projected."""
    if "linear_c.weight" in state:
        head = "twin" if "linear_mi.weight" in state else "auxiliary"
        return {"num_classes": state["linear_c.weight"].shape[0], "class_head": head}
    return {"num_classes": state["embed.weight"].shape[0], "class_head": "projection"}


def _discriminator_attention(blocks: set[int], labels: tuple[int, ...]) -> tuple[int, ...]:
    named = tuple(dict.fromkeys(labels[index] for index in sorted(blocks)))
    expected = {index for index, label in enumerate(labels) if label in named}
    if blocks != expected:
        raise ValueError(
            f"the discriminator has attention after blocks {sorted(blocks)} but the labels {list(labels)} "
            f"can only place it after {sorted(expected)} together: this is not a model of the public code"
        )
    return named


def _unknown_depth(network: str, blocks: int, known: list[int]) -> ValueError:
    return ValueError(
        f"the {network} state has {blocks} blocks but a BigGAN {network} has one of {sorted(set(known))}: "
        "pass the state dict of a BigGAN network, keys without a prefix such as 'module.'"
    )


_QUANTISER = re.compile(r"blocks\.(\d+)\.1\.(embed|embed_avg|cluster_size)$")
_ATTENTION = re.compile(r"blocks\.(\d+)\.([12])\.((?:theta|phi|g|o)\.\w+|gamma)$")
_OUR_QUANTISER = re.compile(r"blocks\.(\d+)\.0\.fq\.(\w+)$")


def from_fq_biggan(d_state: Mapping[str, Tensor]) -> State:
    """Discriminator of the original FQ-BigGAN with our names.

    The original keeps the quantiser of block i as ``blocks.i.1`` (codes in columns) and moves attention to
    ``blocks.i.2``; ours lives below the block itself, ``blocks.i.0.fq`` (codes in rows), with attention where
    a plain BigGAN has it. The original counts no updates and knows no seed: both become 0. A state without
    a quantiser comes back with nothing changed.

    Args:
        d_state: keys and tensors of the original.

    Returns:
        A new dict for a `Discriminator` with quantisers attached at ``blocks.i.0``.

    Raises:
        ValueError: a quantiser lacks one of its three buffers, or their shapes disagree.
    """
    sites = {match[1] for key in d_state if (match := _QUANTISER.match(key))}
    ours: State = {}
    for key, value in d_state.items():
        quantiser, attention = _QUANTISER.match(key), _ATTENTION.match(key)
        if quantiser:
            prefix = f"blocks.{quantiser[1]}.0.fq."
            if prefix + "codebook" not in ours:
                ours.update(_our_quantiser(d_state, quantiser[1], prefix))
        elif attention and attention[1] in sites and attention[2] == "2":
            ours[f"blocks.{attention[1]}.1.{attention[3]}"] = value
        else:
            ours[key] = value
    return ours


def _our_quantiser(d_state: Mapping[str, Tensor], site: str, prefix: str) -> State:
    missing = [name for name in _ORIGINAL_BUFFERS if f"blocks.{site}.1.{name}" not in d_state]
    if missing:
        raise ValueError(
            f"the quantiser blocks.{site}.1 lacks {', '.join(missing)}: an FQ-BigGAN discriminator has "
            f"{', '.join(_ORIGINAL_BUFFERS)}"
        )
    embed, count, total = (d_state[f"blocks.{site}.1.{name}"] for name in _ORIGINAL_BUFFERS)
    if embed.ndim != 2 or total.shape != embed.shape or count.shape != embed.shape[1:]:
        raise ValueError(
            f"the quantiser blocks.{site}.1 has embed {list(embed.shape)}, embed_avg {list(total.shape)} and "
            f"cluster_size {list(count.shape)}: [D, K], [D, K] and [K] were expected"
        )
    values = (embed.t().contiguous(), total.t().contiguous(), count,
              torch.tensor(True), torch.tensor(0), torch.tensor(0))  # fmt: skip
    return {prefix + name: value for name, value in zip(_OUR_BUFFERS, values, strict=True)}


def to_fq_biggan(d_state: Mapping[str, Tensor]) -> State:
    """Discriminator with quantisers at ``blocks.i.0.fq`` under the names of the original FQ-BigGAN.

    Undoes `from_fq_biggan` to the bit. The update counter and the seed have no place there and are dropped.

    Args:
        d_state: keys and tensors of our model with quantisers attached.

    Returns:
        A new dict; attention of a quantised block is at ``blocks.i.2``.

    Raises:
        ValueError: a quantiser has buffers that the original cannot hold, lacks some, or has no codes yet.
    """
    sites: dict[str, set[str]] = {}
    for key in d_state:
        if match := _OUR_QUANTISER.match(key):
            sites.setdefault(match[1], set()).add(match[2])
    for site, names in sites.items():
        _check_our_quantiser(d_state, site, names)
    original: State = {}
    for key, value in d_state.items():
        quantiser, attention = _OUR_QUANTISER.match(key), _ATTENTION.match(key)
        if quantiser:
            prefix, ours = f"blocks.{quantiser[1]}.1.", f"blocks.{quantiser[1]}.0.fq."
            original[prefix + "embed"] = d_state[ours + "codebook"].t().contiguous()
            original[prefix + "cluster_size"] = d_state[ours + "ema_count"]
            original[prefix + "embed_avg"] = d_state[ours + "ema_sum"].t().contiguous()
        elif attention and attention[1] in sites and attention[2] == "1":
            original[f"blocks.{attention[1]}.2.{attention[3]}"] = value
        else:
            original[key] = value
    return original


def _check_our_quantiser(d_state: Mapping[str, Tensor], site: str, names: set[str]) -> None:
    if names != set(_OUR_BUFFERS):
        raise ValueError(
            f"the quantiser blocks.{site}.0.fq has the buffers {', '.join(sorted(names))} but only "
            f"{', '.join(_OUR_BUFFERS)} can be converted: build it without options that add state"
        )
    if not d_state[f"blocks.{site}.0.fq.initialized"]:
        raise ValueError(
            f"the quantiser blocks.{site}.0.fq has no codes yet: run one training forward before converting"
        )
