"""Which layers a caller means: names, globs, or a preset that knows a discriminator by how it is built."""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

NAMES = ("biggan", "stylegan2", "ugatit")

_EXPECTED = {
    "biggan": (
        "three or more residual blocks 'blocks.<i>.0' with two 3x3 convolutions each, the first of which (or "
        "a convolution before them) reads an image, and a linear layer on the last one's channels",
        ("blocks.0.0", "blocks.1.0.conv1", "linear"),
    ),
    "stylegan2": (
        "blocks 'b<size>' for every power of two from 8 to 16 or more with 'conv0' and 'conv1', and an "
        "epilogue 'b4' with 'conv', 'fc' and 'out'",
        ("b16", "b8.conv1", "b4.fc"),
    ),
    "ugatit": (
        "LeakyReLUs 'model.5', 'model.8', 'model.11' and 'model.14' behind 4x4 convolutions, and the heads "
        "'gap_fc' and 'gmp_fc' (the local discriminator, which ends at 'model.11', carries no FQ)",
        ("model.5", "model.11", "gap_fc"),
    ),
}


def resolve(
    root: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Mapping[str, Any]],
    names: list[str],
    given: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Full names of the layers that a caller means, with the overrides of each.

    Args:
        root: the model itself.
        layers: as for :func:`fq.attach`.
        names: of all layers that may be meant.
        given: settings that the caller gave and a preset must leave alone.

    Returns:
        ``{name: overrides}``; overrides of a later pattern win.

    Raises:
        ValueError: ``layers`` is empty, a pattern matches nothing, or the model is not built like the
            preset's discriminator.
        TypeError: a name is no string.
    """
    wanted: Mapping[str, Mapping[str, Any]]
    if isinstance(layers, str):
        if layers in NAMES and layers not in names:
            return {name: {**preset, **given} for name, preset in layers_of(root, layers).items()}
        wanted = {layers: {}}
    elif hasattr(layers, "items"):
        wanted = layers  # type: ignore[assignment]
    else:
        wanted = {pattern: {} for pattern in layers}
    if not wanted:
        raise ValueError("layers is empty: name at least one module of the model")
    return {
        name: dict(overrides) for pattern, overrides in wanted.items() for name in _matches(pattern, names)
    }


def _matches(pattern: str, names: list[str]) -> list[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"layer {pattern!r} is a {type(pattern).__name__}: give module names as strings")
    if pattern in names:
        return [pattern]
    if any(sign in pattern for sign in "*?["):
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        matches = [name for name in names if name.endswith(f".{pattern}")]
    if matches:
        return matches
    near = ", ".join(map(repr, difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)))
    raise ValueError(
        f"no module matches {pattern!r}: nearest names are {near or 'none, for the model has none'}; "
        "fq.suggest(model, example_input) lists layers worth attaching to, and there are the presets "
        f"{', '.join(NAMES)}"
    )


def layers_of(root: nn.Module, preset: str) -> dict[str, dict[str, Any]]:
    """Layers that a preset means in this model, and the paper's settings for each (its released commands).

    ==============  ===================================  ======================  =============  =====  ======
    preset          discriminator                        layers                  codes          decay  weight
    ==============  ===================================  ======================  =============  =====  ======
    ``biggan``      up to 4 blocks (32 px)               residual blocks 0 to 3  1024           0.8    1
    ``biggan``      the same, 100 classes                residual blocks 0 to 3  64             0.9    10
    ``biggan``      5 blocks (64 px)                     residual block 2        1024           0.7    0.5
    ``biggan``      6 or more blocks (128 px and above)  residual blocks 0 to 3  1024           0.8    15
    ``stylegan2``   16 px and above                      ``b32``, ``b16``        128            0.8    0.25
    ``ugatit``      global                               ``model.5``, 8, 11      64, 128, 128   0.85   2
    ==============  ===================================  ======================  =============  =====  ======

    The paper has no model above 128 px among its BigGANs and none of the deep kind: these get the settings of
    their neighbours. A convolution before the first block, as the deep kind has, counts as a block.

    Args:
        root: the model itself.
        preset: one of ``NAMES``.

    Returns:
        ``{name: overrides}`` with ``codebook_size``, ``decay`` and ``commitment_weight``, for ``biggan`` also
        ``dim``.

    Raises:
        ValueError: the model is not built like that discriminator.

    Example:
        >>> trunk = [layer for _ in range(5) for layer in (nn.Identity(), nn.Conv2d(3, 3, 4), nn.LeakyReLU())]
        >>> heads = {"gap_fc": nn.Linear(3, 1), "gmp_fc": nn.Linear(3, 1)}
        >>> layers_of(nn.ModuleDict({"model": nn.Sequential(*trunk), **heads}), "ugatit")["model.5"]
        {'codebook_size': 64, 'decay': 0.85, 'commitment_weight': 2.0}
    """
    finders = {"biggan": _biggan, "stylegan2": _stylegan2, "ugatit": _ugatit}
    found = finders[preset](root)
    if found:
        return found
    looked_for, samples = _EXPECTED[preset]
    names = [name for name, _ in root.named_modules() if name]
    near = dict.fromkeys(
        name for sample in samples for name in difflib.get_close_matches(sample, names, n=2, cutoff=0.0)
    )
    others = [name for name in NAMES if name != preset and finders[name](root)]
    way_out = f"it is built like preset {others[0]!r}: give that, or" if others else "give"
    raise ValueError(
        f"{type(root).__name__} is not built like the discriminator of preset {preset!r}: looked for "
        f"{looked_for}; nearest names are {', '.join(map(repr, near)) or 'none, for the model has none'}; "
        f"{way_out} the names of the layers (fq.suggest(model, example_input) lists them)"
    )


def _settings(codebook_size: int, decay: float, commitment_weight: float) -> dict[str, Any]:
    return {"codebook_size": codebook_size, "decay": decay, "commitment_weight": commitment_weight}


def _biggan(root: nn.Module) -> dict[str, dict[str, Any]] | None:
    blocks = root._modules.get("blocks")
    if blocks is None:
        return None
    firsts = {f"blocks.{i}.0": block._modules.get("0") for i, block in blocks.named_children()}
    # Attention may have an entry of its own; the paper counts residual blocks.
    residual = {name: block for name, block in firsts.items() if block and len(_convolutions(block, 3)) > 1}
    if len(residual) < 3:
        return None
    stems = [shape for child in root.children() if len(shape := _weight_shape(child)) == 4]
    widths = {name: _width(block) for name, block in residual.items()}
    reads = (stems or _convolutions(next(iter(residual.values())), 3))[0][1]
    heads = [shape for child in root.children() if len(shape := _weight_shape(child)) == 2]
    heads = [shape for shape in heads if shape[1] == list(widths.values())[-1]]
    if reads > 4 or not heads:  # the generator, for one
        return None
    layers, chosen = list(residual)[:4], _settings(1024, 0.8, 15.0)
    size = len(residual) + len(stems)
    if size == 5:
        layers, chosen = list(residual)[2:3], _settings(1024, 0.7, 0.5)
    elif size < 5:
        hundred = any(shape[0] == 100 for shape in heads)
        chosen = _settings(64, 0.9, 10.0) if hundred else _settings(1024, 0.8, 1.0)
    return {name: {**chosen, "dim": widths[name]} for name in layers}


def _stylegan2(root: nn.Module) -> dict[str, dict[str, Any]] | None:
    blocks = {int(name[1:]): block for name, block in root.named_children() if re.fullmatch(r"b\d+", name)}
    sizes = sorted(blocks)
    if len(sizes) < 3 or sizes != [4 << i for i in range(len(sizes))]:
        return None
    epilogue = all(hasattr(blocks[4], name) for name in ("conv", "fc", "out"))
    if not epilogue or not all(
        hasattr(blocks[size], name) for size in sizes[1:] for name in ("conv0", "conv1")
    ):
        return None
    return {f"b{size}": _settings(128, 0.8, 0.25) for size in (32, 16) if size in blocks}


def _ugatit(root: nn.Module) -> dict[str, dict[str, Any]] | None:
    trunk = root._modules.get("model")
    if not isinstance(trunk, nn.Sequential) or len(trunk) < 15:
        return None
    fits = all(isinstance(trunk[i], nn.LeakyReLU) for i in (5, 8, 11, 14))
    fits &= all(_weight_shape(trunk[i - 1])[2:] == (4, 4) for i in (5, 8, 11, 14))
    if not fits or not {"gap_fc", "gmp_fc"} <= set(root._modules):
        return None
    return {f"model.{i}": _settings(size, 0.85, 2.0) for i, size in ((5, 64), (8, 128), (11, 128))}


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight, which is not read: a parametrised one would be computed anew."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    if isinstance(module, nn.Embedding):
        return (module.num_embeddings, module.embedding_dim)
    weight = module._parameters.get("weight", module._parameters.get("weight_orig"))
    return () if weight is None else tuple(weight.shape)


def _convolutions(block: nn.Module, size: int) -> list[tuple[int, ...]]:
    """Weight shapes of the block's own convolutions with kernels of this size."""
    shapes = (_weight_shape(child) for child in block.children())
    return [shape for shape in shapes if shape[2:] == (size, size)]


def _width(block: nn.Module) -> int:
    """Channels of a residual block: what it says, or its convolution with the highest number puts out."""
    declared = getattr(block, "out_channels", None)
    if isinstance(declared, int):
        return declared
    numbered = {
        int(number[0]): shape[0]
        for name, child in block.named_children()
        if (number := re.findall(r"\d+$", name)) and len(shape := _weight_shape(child)) == 4
    }
    return numbered[max(numbered)] if numbered else _convolutions(block, 3)[-1][0]
