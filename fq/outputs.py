"""The one tensor in whatever a layer returns, and how many channels it has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fq.options import CodebookOptions


def find(output: Any, dim: int | None, select: int | str | None, name: str) -> Tensor:
    """The tensor of features in a layer's output.

    Args:
        output: a tensor, or a tuple, list, named tuple, dict or dataclass holding tensors.
        dim: channels expected, to tell features from images in a tuple; ``None`` when unknown.
        select: index or key of the tensor, when the caller named it.
        name: of the layer, for messages.

    Returns:
        The tensor. From a container it is the one 4-D tensor, or the one of those with ``dim`` channels.

    Raises:
        ValueError: there is no such tensor, or more than one.

    Example:
        >>> find((torch.zeros(2, 8, 4, 4), None), None, None, "b16").shape
        torch.Size([2, 8, 4, 4])
    """
    if isinstance(output, Tensor):
        return output
    items = _items(output)
    kind = type(output).__name__
    if select is not None:
        chosen = items.get(select)
        if not isinstance(chosen, Tensor):
            raise ValueError(
                f"layer {name!r} has no tensor at select={select!r} in its {kind}: it has {list(items)}"
            )
        return chosen
    maps = {key: value for key, value in items.items() if isinstance(value, Tensor) and value.ndim == 4}
    fitting = {key: value for key, value in maps.items() if dim is None or value.shape[1] == dim}
    candidates = fitting if len(maps) > 1 else maps
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not maps:
        raise ValueError(
            f"layer {name!r} returns a {kind} without a 4-D tensor: attach to a layer that returns features, "
            f"or name one of {list(items)} by layers={{{name!r}: {{'select': …}}}}"
        )
    shapes = {key: list(value.shape) for key, value in maps.items()}
    raise ValueError(
        f"layer {name!r} returns several 4-D tensors {shapes}: say which one by layers={{{name!r}: "
        f"{{'select': …}}}}"
    )


def put(output: Any, old: Tensor, new: Tensor) -> Any:
    """The same container with one tensor exchanged.

    Args:
        output: what the layer returned.
        old: the tensor in it, recognised by identity.
        new: its replacement.

    Returns:
        ``new`` itself for a bare tensor, else a new container of the same type.

    Example:
        >>> put([1, old := torch.zeros(1)], old, torch.ones(1))
        [1, tensor([1.])]
    """
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        for key, value in output.items():
            if value is old:
                changed[key] = new  # type: ignore[index]
        return changed
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = {f.name: new for f in dataclasses.fields(output) if getattr(output, f.name) is old}
        return dataclasses.replace(output, **fields)
    values = [new if value is old else value for value in output]
    return output._make(values) if hasattr(output, "_make") else type(output)(values)


def _items(output: Any) -> dict[Any, Any]:
    if isinstance(output, Mapping):
        return dict(output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return {}


def declared_channels(root: nn.Module, name: str) -> int | None:
    """Channels a layer puts out, as far as its attributes tell; no forward is run.

    Args:
        root: the model.
        name: of the layer.

    Returns:
        The number, from ``out_channels`` and the like, its weight, the layer before it (activations and
        pools), or its last child that has one; ``None`` if nothing tells.

    Example:
        >>> declared_channels(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "1")
        8
    """
    own = _own_channels(root.get_submodule(name))
    if own is not None:
        return own
    parent_name, _, child = name.rpartition(".")
    siblings = list(root.get_submodule(parent_name)._modules)
    # A layer without weights passes on the channels of the one before it, in a container that runs in order.
    if isinstance(root.get_submodule(parent_name), nn.Sequential) and siblings.index(child) > 0:
        before = siblings[siblings.index(child) - 1]
        return declared_channels(root, f"{parent_name}.{before}" if parent_name else before)
    return None


def channels(
    root: nn.Module,
    sites: Mapping[str, Mapping[str, Any]],
    probed: Mapping[str, Any],
    options: CodebookOptions,
) -> dict[str, int]:
    """Channels of every layer to be attached to.

    Args:
        root: the model.
        sites: overrides of each layer: ``dim`` says it, ``select`` and ``options`` say where to look.
        probed: outputs of :func:`probe`.
        options: of layers that have none of their own.

    Returns:
        ``{name: channels}``.

    Raises:
        ValueError: nothing tells those of a layer.
    """
    found: dict[str, int] = {}
    for name, overrides in sites.items():
        axis = -1 if overrides.get("options", options).channel_last else 1
        dim: int | None
        if "dim" in overrides:
            dim = overrides["dim"]
        elif name in probed:
            dim = find(probed[name], None, overrides.get("select"), name).shape[axis]
        else:
            dim = declared_channels(root, name)
        if dim is None:
            raise ValueError(
                f"cannot tell how many channels {name!r} puts out: pass example_input=… for one probing "
                f"forward, or layers={{{name!r}: {{'dim': …}}}}"
            )
        found[name] = dim
    return found


def check_width(name: str, dim: int, channel_last: bool, features: Tensor) -> None:
    """Refuse features of another width than FQ was attached for.

    Args:
        name: of the layer.
        dim: channels expected.
        channel_last: where they are.
        features: what the layer put out.

    Raises:
        ValueError: they have another width.
    """
    axis = -1 if channel_last else 1
    if features.ndim < 2 or features.shape[axis] != dim:
        raise ValueError(
            f"layer {name!r} put out features of shape {list(features.shape)}, but FQ was attached for "
            f"{dim} channels: attach with example_input=…, or layers={{{name!r}: {{'dim': "
            f"{features.shape[axis]}}}}}"
        )


def tensor_beside(root: nn.Module, name: str) -> Tensor:
    """A floating tensor of a layer, or else of the model: its quantiser follows its device and dtype.

    Args:
        root: the model.
        name: of the layer.

    Returns:
        The tensor; an empty one on the CPU for a model without any.
    """
    for module in (root.get_submodule(name), root):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)


def _own_channels(module: nn.Module) -> int | None:
    for attribute in ("out_channels", "num_features", "out_features", "normalized_shape"):
        value = getattr(module, attribute, None)
        value = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(value, int):
            return value
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim >= 1:
        return len(weight)
    for child in reversed(list(module.children())):
        channels = _own_channels(child)
        if channels is not None:
            return channels
    return None


def probe(root: nn.Module, names: list[str], example_input: Any) -> dict[str, Any]:
    """Outputs of some layers in one forward under no_grad in eval mode; modes and random state are restored.

    Args:
        root: the model.
        names: of the layers.
        example_input: a tensor or a tuple of arguments.

    Returns:
        ``{name: output}`` of the layers that ran.
    """
    found: dict[str, Any] = {}
    modes = {module: module.training for module in root.modules()}
    hooks = [
        root.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: found.setdefault(name, output)
        )
        for name in names
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            root.eval()
            root(*example_input) if isinstance(example_input, tuple) else root(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found
