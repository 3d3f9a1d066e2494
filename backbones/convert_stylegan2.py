"""Public StyleGAN2 state dicts: recover the configuration, load with errors that say what differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.pickles import read_networks
from backbones.stylegan2 import Discriminator, Filtering, Generator, StyleGAN2Config

State = dict[str, Tensor]

_G_BLOCK = re.compile(r"synthesis\.b(\d+)\.conv1\.weight$")
_D_BLOCK = re.compile(r"b(\d+)\.conv1\.weight$")
_LAYER = re.compile(r"mapping\.fc(\d+)\.weight$")

# Constructor arguments that shapes do not show and that have one value here; the resampling filter is in the
# state too. Where an argument stands in the constructor differs, so it is looked up by name alone.
_FIXED: dict[str, Any] = {
    "activation": "lrelu",
    "resample_filter": [1, 3, 3, 1],
    "lr_multiplier": 0.01,
    "w_avg_beta": 0.995,
    "use_noise": True,
}


def infer_config(
    g_state: Mapping[str, Tensor] | None = None,
    d_state: Mapping[str, Tensor] | None = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> StyleGAN2Config:
    """Configuration that public state dicts fit, from their keys and shapes.

    Shapes show neither ``conv_clamp`` nor ``mbstd_group``. They come from the constructor arguments that are
    stored with a public checkpoint, where a missing one means ``None`` and 4. Without arguments they keep
    their defaults, like the fields of a network that is not given.

    Args:
        g_state: generator, keys ``synthesis.*`` and ``mapping.*``.
        d_state: discriminator, keys ``b4.*`` and up, ``mapping.*`` if conditional.
        init_kwargs: constructor arguments of the network whose state is given (``synthesis_kwargs``,
            ``epilogue_kwargs``, ``conv_clamp``, ...), or of both under ``"G"`` and ``"D"``.

    Returns:
        A configuration whose `Generator` and `Discriminator` load the states with ``strict=True``.

    Raises:
        ValueError: no state is given, a state is not a StyleGAN2, both disagree, or an argument asks for
            something that this StyleGAN2 does not do.

    Example:
        >>> from backbones.stylegan2 import Generator
        >>> state = Generator(StyleGAN2Config(resolution=8, channel_max=4, w_dim=6)).state_dict()
        >>> config = infer_config(state, init_kwargs={"synthesis_kwargs": {"conv_clamp": 256}})
        >>> config.resolution, config.channel_max, config.w_dim, config.conv_clamp
        (8, 4, 6, 256)
    """
    states = {"G": g_state, "D": d_state}
    given = {name: state for name, state in states.items() if state is not None}
    if not given:
        raise ValueError("infer_config got neither g_state nor d_state: pass at least one state dict")
    arguments = _arguments_of(given, init_kwargs)
    readers: dict[str, Callable[..., dict[str, Any]]] = {"G": _read_generator, "D": _read_discriminator}
    fields: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, state in given.items():
        try:
            found = readers[name](state, arguments[name])
        except KeyError as error:
            raise ValueError(
                f"the state of {name} has no {error.args[0]}: a StyleGAN2 {name} was expected, with the key "
                "names of the public PyTorch checkpoints"
            ) from error
        for field, value in found.items():
            if field in fields and fields[field] != value:
                raise ValueError(
                    f"{name} says {field} {value} but {origin[field]} says {fields[field]}: pass the two "
                    "networks of one model, or one of them alone"
                )
            fields[field], origin[field] = value, name
    return StyleGAN2Config(**fields)


def load_nvidia(path: str | Path) -> tuple[StyleGAN2Config, State]:
    """The averaged generator of an NVIDIA network pickle; nothing in the file is run.

    Args:
        path: the ``.pkl`` file.

    Returns:
        Its configuration and its state dict in float32, of ``G_ema``, or of ``G`` where there is no average.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file would run code, is damaged, or holds no StyleGAN2 generator.
    """
    networks = read_networks(path)
    name = next((name for name in ("G_ema", "G") if name in networks), None)
    if name is None:
        raise ValueError(f"{path} holds {', '.join(networks)} but no generator: give a file with G_ema or G")
    record = networks[name]
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in record.state.items()
    }
    return infer_config(g_state=state, init_kwargs=record.kwargs), state


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare keys and shapes of a state dict with those of a model.

    Args:
        model: a `Generator` or `Discriminator`.
        state: tensors by key.

    Raises:
        ValueError: keys are missing, superfluous or of another shape; the first five are named, with both
            shapes.
    """
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is missing (ours {ours[key]})" for key in ours if key not in theirs]
    wrong += [f"{key} {theirs[key]} is not in the model" for key in theirs if key not in ours]
    wrong += [
        f"{key} has shape {theirs[key]} but the model {shape}"
        for key, shape in ours.items()
        if theirs.get(key, shape) != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"the state does not fit this {type(model).__name__}: {'; '.join(wrong[:5])}{more}. Build the "
            "model with infer_config(state)"
        )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict, if it passes `check_state`; otherwise the model is left as it was.

    Args:
        model: a `Generator` or `Discriminator`.
        state: tensors by key.

    Raises:
        ValueError: keys or shapes differ.
    """
    check_state(model, state)
    model.load_state_dict(state, strict=True)


def _arguments_of(
    given: Mapping[str, Any], arguments: Mapping[str, Any] | None
) -> dict[str, Mapping[str, Any] | None]:
    """Constructor arguments by network, checked for what cannot be reproduced; ``None`` where unknown."""
    if arguments is None:
        return dict.fromkeys(given)
    if not arguments.keys() & {"G", "D"}:
        if len(given) > 1:
            raise ValueError(
                "init_kwargs of one network were given with the states of both: pass {'G': ..., 'D': ...}"
            )
        arguments = dict.fromkeys(given, arguments)
    for name in given:
        _check_arguments(arguments.get(name) or {}, name)
    return {name: arguments.get(name) for name in given}


def _check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    for key, value in arguments.items():
        value = list(value) if isinstance(value, tuple) else value
        if isinstance(value, Mapping):
            _check_arguments(value, f"{where}.{key}")
        elif key in _FIXED and value != _FIXED[key] and value is not None:
            raise ValueError(
                f"{where}.{key} is {value!r} but this StyleGAN2 always has {_FIXED[key]!r}: the model would "
                "not give the same pictures"
            )


def _read_generator(state: Mapping[str, Tensor], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    if any(key.startswith(("synthesis.input.", "synthesis.L")) for key in state):
        raise ValueError(
            "the state of G is of a StyleGAN3 generator (synthesis.input, synthesis.L*): only StyleGAN2 and "
            "StyleGAN2-ADA are known"
        )
    widths = {4: state["synthesis.b4.const"].shape[0]}
    widths |= {int(m[1]): value.shape[0] for key, value in state.items() if (m := _G_BLOCK.match(key))}
    last = f"synthesis.b{max(widths)}"
    embed = state.get("mapping.embed.weight")
    joined = state["mapping.fc0.weight"].shape[1]
    architecture = "orig"
    if max(widths) > 4 and "synthesis.b4.torgb.weight" in state:
        architecture = "skip"
    elif "synthesis.b8.skip.weight" in state:
        architecture = "resnet"
    found = _read_widths(widths, "G") | {
        "num_classes": _num_classes(embed),
        "image_channels": state[f"{last}.torgb.weight"].shape[0],
        "latent_dim": joined if embed is None else joined - embed.shape[0],
        "w_dim": state["mapping.w_avg"].shape[0],
        "mapping_layers": _num_layers(state),
        "g_architecture": architecture,
    }
    if arguments is not None:
        # One public constructor takes these arguments apart, a later one takes them among its own.
        found["conv_clamp"] = (arguments.get("synthesis_kwargs") or arguments).get("conv_clamp")
    return found


def _read_discriminator(state: Mapping[str, Tensor], arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    width = state["b4.conv.weight"].shape[0]
    widths = {4: width}
    for key, value in state.items():
        if match := _D_BLOCK.match(key):
            widths[int(match[1])] = value.shape[1]
    first = f"b{max(widths)}"
    embed = state.get("mapping.embed.weight")
    architecture = "orig"
    if "b4.fromrgb.weight" in state:
        architecture = "skip"
    elif f"{first}.skip.weight" in state:
        architecture = "resnet"
    found = _read_widths(widths, "D") | {
        "num_classes": _num_classes(embed),
        "image_channels": state[f"{first}.fromrgb.weight"].shape[1],
        "d_architecture": architecture,
        "mbstd_channels": state["b4.conv.weight"].shape[1] - width,
    }
    if embed is not None:
        found["d_mapping_layers"] = _num_layers(state)
    if arguments is not None:
        found["conv_clamp"] = arguments.get("conv_clamp")
        found["mbstd_group"] = (arguments.get("epilogue_kwargs") or {}).get("mbstd_group_size", 4) or 0
    return found


def _read_widths(widths: Mapping[int, int], network: str) -> dict[str, Any]:
    """Resolution and channel table of the widths at 4, 8, ... pixels, which must follow one."""
    resolution, limit = max(widths), max(widths.values())
    # Widths below the limit are base // size: this is the smallest base that gives all of them.
    base = max([size * width for size, width in widths.items() if width < limit] or [resolution * limit])
    sizes = [1 << power for power in range(2, resolution.bit_length())]
    table = {size: min(base // size, limit) for size in sizes}
    if table != dict(sorted(widths.items())):
        raise ValueError(
            f"{network} has the channels {dict(sorted(widths.items()))} by resolution, which no channel_base "
            "and channel_max give: only min(channel_base // resolution, channel_max) is known"
        )
    return {"resolution": resolution, "channel_base": base, "channel_max": limit}


def _num_layers(state: Mapping[str, Tensor]) -> int:
    return len([key for key in state if _LAYER.match(key)])


def _num_classes(embed: Tensor | None) -> int:
    if embed is not None and embed.shape[1] == 1:
        raise ValueError(
            "mapping.embed.weight has one class: a conditional model of a single class is not known here, "
            "where num_classes 1 means unconditional"
        )
    return 1 if embed is None else embed.shape[1]


# Names inside a layer of rosinality's networks: a generator layer, and colours, then the ends of the others.
_LAYER_PARTS = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
    "bias": "bias",
}
_BLOCK_PARTS = {
    "conv1.0.weight": "conv0.weight",
    "conv1.1.bias": "conv0.bias",
    "conv2.1.weight": "conv1.weight",
    "conv2.2.bias": "conv1.bias",
    "skip.1.weight": "skip.weight",
}
_ENDS = {
    "final_conv.0.weight": "b4.conv.weight",
    "final_conv.1.bias": "b4.conv.bias",
    "final_linear.0.weight": "b4.fc.weight",
    "final_linear.0.bias": "b4.fc.bias",
    "final_linear.1.weight": "b4.out.weight",
    "final_linear.1.bias": "b4.out.bias",
}


def from_rosinality(state: Mapping[str, Tensor], *, w_avg: Tensor | None = None) -> State:
    """Network of the independent PyTorch implementation by rosinality under the public names.

    The arithmetic of both is the same, so only names, order and axes of length one change. Its filters are
    those of every StyleGAN2 and are made anew.

    Args:
        state: what its checkpoint stores as ``g``, ``g_ema`` or ``d``.
        w_avg: ``[w_dim]``, average latent, which it keeps apart from the state (``latent_avg``). Zeros
            without one: then only ``truncation=1`` means anything.

    Returns:
        A new dict that our `Generator` or `Discriminator` of `infer_config` loads with ``strict=True``.

    Raises:
        ValueError: a key is not one of that implementation, or the tensors do not fit together.
    """
    is_generator = "input.input" in state
    rename = _rename_generator if is_generator else _rename_discriminator
    count = len([key for key in state if re.match(r"to_rgbs\.\d+\.bias$|convs\.\d+\.skip\.1\.weight$", key)])
    found: State = {}
    for key, value in state.items():
        if key.endswith(".kernel"):
            continue
        name = rename(key, 4 << count)
        if name is None:
            raise ValueError(
                f"{key} is no key of rosinality's {'generator' if is_generator else 'discriminator'}: "
                "pass its g, g_ema or d, keys without a prefix such as 'module.'"
            )
        found[name] = _reshape(key, value) if is_generator else value
    if is_generator:
        zeros = torch.zeros_like(found.get("mapping.fc0.bias", torch.zeros(0)))
        found["mapping.w_avg"] = zeros if w_avg is None else w_avg
    config = infer_config(g_state=found) if is_generator else infer_config(d_state=found)
    with torch.device("meta"):
        model = Generator(config) if is_generator else Discriminator(config)
    taps = Filtering().resample_filter
    found |= {key: taps.clone() for key in model.state_dict() if key.endswith("resample_filter")}
    check_state(model, found)
    return {key: found[key] for key in model.state_dict()}


def _rename_generator(key: str, resolution: int) -> str | None:
    if key == "input.input":
        return "synthesis.b4.const"
    if match := re.match(r"style\.(\d+)\.(weight|bias)$", key):
        return f"mapping.fc{int(match[1]) - 1}.{match[2]}"
    if match := re.match(r"noises\.noise_(\d+)$", key):
        return f"{_layer_name(int(match[1]))}.noise_const"
    if match := re.match(r"(conv1|convs\.(\d+))\.(.+)$", key):
        layer = _layer_name(0 if match[2] is None else int(match[2]) + 1)
        return f"{layer}.{_LAYER_PARTS[match[3]]}" if match[3] in _LAYER_PARTS else None
    if match := re.match(r"(to_rgb1|to_rgbs\.(\d+))\.(.+)$", key):
        size = 4 if match[2] is None else 8 << int(match[2])
        return f"synthesis.b{size}.torgb.{_LAYER_PARTS[match[3]]}" if match[3] in _LAYER_PARTS else None
    return None


def _layer_name(index: int) -> str:
    """Generator layer by its place: one at 4 pixels, two at every other resolution."""
    return f"synthesis.b{4 << (index + 1) // 2}.conv{1 - index % 2}"


def _rename_discriminator(key: str, resolution: int) -> str | None:
    if match := re.match(r"convs\.0\.[01]\.(weight|bias)$", key):
        return f"b{resolution}.fromrgb.{match[1]}"
    if match := re.match(r"convs\.(\d+)\.(.+)$", key):
        block = f"b{resolution >> (int(match[1]) - 1)}"
        return f"{block}.{_BLOCK_PARTS[match[2]]}" if match[2] in _BLOCK_PARTS else None
    return _ENDS.get(key)


def _reshape(key: str, value: Tensor) -> Tensor:
    """Without the axes of length one that our generator does not have."""
    if key.startswith("noises."):
        return value[0, 0]
    if key.endswith("noise.weight"):
        return value.reshape(())
    if key == "input.input" or key.endswith("conv.weight"):
        return value[0]
    return value.flatten() if key.endswith(".bias") else value
