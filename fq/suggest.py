"""Which layers of a discriminator are worth attaching FQ to, and what each would cost."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fq import outputs
from fq.attach import puts_out_features, refuse_compiled, root_of, silent
from fq.options import CodebookOptions
from fq.quantize import FeatureQuantize


class Suggestion(NamedTuple):
    """One layer that FQ could be attached to."""

    name: str
    """Module name, as ``attach`` takes it."""
    output_shape: tuple[int, ...]
    """Shape of its features for the example."""
    channels: int
    """Width of a token."""
    tokens: int
    """Tokens in the example's batch."""
    added_ms: float
    """Measured milliseconds that FQ adds to one training forward here."""
    recommended: bool
    """Whether the layer is one of the few worth starting with."""


class Suggestions(list[Suggestion]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        """Fixed-width table, a star before the recommended rows."""
        width = max([len(row.name) for row in self] + [5])
        lines = [f"  {'layer':<{width}}  {'output':<20} {'channels':>8} {'tokens':>8} {'added ms':>9}"]
        for row in self:
            star, shape = "*" if row.recommended else " ", "x".join(map(str, row.output_shape))
            counts = f"{row.channels:>8} {row.tokens:>8} {row.added_ms:>9.2f}"
            lines.append(f"{star} {row.name:<{width}}  {shape:<20} {counts}")
        return "\n".join(lines)


def suggest(model: nn.Module, example_input: Any, *, codebook_size: int = 1024) -> Suggestions:
    """List the layers that put out feature maps, what FQ costs there, and which to start with.

    Runs the model once under no_grad in eval mode (modes and random state are restored) and times FQ on
    features of the shapes seen, on the same device. Recommended are outermost layers, one for each size of
    map from 4x4 to 32x32 tokens: the last module of that size whose channels ``attach`` can read off, where
    the paper's BigGAN, StyleGAN2 and U-GAT-IT have theirs.

    Args:
        model: a discriminator; a DDP or DataParallel wrapper is looked through.
        example_input: a tensor, or a tuple of arguments, with the batch size to be timed.
        codebook_size: K assumed for the timing.

    Returns:
        One row a layer in the model's order, printable as a table.

    Raises:
        ValueError: no layer puts out ``[B, C, H, W]`` features.
        TypeError: the model is compiled, which hides its layers.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        >>> [row.name for row in suggest(model, torch.randn(2, 3, 8, 8), codebook_size=16) if row.recommended]
        ['1']
    """
    model = root_of(model)
    refuse_compiled(model)
    names = [name for name, module in model.named_modules() if name and puts_out_features(name, module)]
    maps: dict[str, Tensor] = {}
    with silent(model):
        probed = outputs.probe(model, names, example_input)
    for name, output in probed.items():
        try:
            features = outputs.find(output, None, None, name)
        except ValueError:  # this layer returns no features, or several: not one to suggest
            continue
        if features.ndim == 4:
            maps[name] = features
    if not maps:
        raise ValueError(
            f"no layer of {type(model).__name__} puts out features [B, C, H, W] for this example: pass an "
            "input of a batch of pictures"
        )
    readable = {
        name: features
        for name, features in maps.items()
        if outputs.declared_channels(model, name) == features.shape[1]
    }
    chosen = _recommended(readable)
    costs: dict[tuple[int, ...], float] = {}
    rows = Suggestions()
    for name in (name for name in names if name in maps):
        shape = tuple(maps[name].shape)
        if shape not in costs:
            costs[shape] = _milliseconds(maps[name], codebook_size)
        tokens = shape[0] * shape[2] * shape[3]
        rows.append(Suggestion(name, shape, shape[1], tokens, costs[shape], name in chosen))
    return rows


def _recommended(maps: dict[str, Tensor]) -> set[str]:
    """The last of the outermost modules for each size of map worth quantising."""
    best: dict[tuple[int, ...], str] = {}
    for name, features in maps.items():
        height, width = features.shape[2:]
        if not 16 <= height * width <= 32 * 32 or features.shape[1] < 8:
            continue
        size = (height, width)
        # Names come in the order the outputs were made, inner modules before the one that holds them.
        if size not in best or name.count(".") <= best[size].count("."):
            best[size] = name
    return set(best.values())


def _milliseconds(features: Tensor, codebook_size: int) -> float:
    """Median cost of a training forward of FQ on features of this shape."""
    # Random codes: a first k-means on random numbers would cost more and tell nothing.
    layer = FeatureQuantize(
        features.shape[1], codebook_size, options=CodebookOptions(init="normal", sync=False)
    )
    layer.to(features.device)
    times = []
    for _ in range(4):
        _synchronize(features.device)
        start = time.perf_counter()
        layer(features)
        _synchronize(features.device)
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[1:])[1]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
