"""Everything about a codebook that is not its size, its decay or its weight in the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

Init = Literal["auto", "kmeans", "data", "normal", "uniform"]
Gradient = Literal["straight-through", "rotation"]
LearnFrom = Literal["all", "real"]


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """How a codebook starts, stays alive and is updated, and in what form it is searched.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a count is no integer.

    Example:
        >>> CodebookOptions(init="data", dead_code_threshold=0.0).init
        'data'
    """

    init: Init = "auto"
    """First codes: k-means or a sample of the first training batch, N(0, 1), or U(-1/K, 1/K).
    ``auto`` is ``kmeans``, and ``normal`` under ``compat``."""
    init_tokens: int = 4096
    """Tokens of the first batch that k-means looks at; never fewer than codes."""
    kmeans_iterations: int = 10
    """Lloyd iterations of ``init="kmeans"``."""
    dead_code_threshold: float | None = None
    """A code whose EMA count is below this share of the mean count is replaced by a token of the batch; 0
    never replaces. ``None`` is 0.03, and 0 under ``compat``."""
    dead_code_grace: int = 10
    """Updates after the start before any code may be replaced."""
    blend_start: int = 0
    """Codebook updates before ``mode="blend"`` begins to mix codes in."""
    blend_steps: int = 1000
    """Codebook updates over which the share of the code in the output grows linearly to ``blend_end``."""
    blend_end: float = 1.0
    """Largest share of the code in the output of ``mode="blend"``."""
    normalize: bool = False
    """Cosine codes: tokens and codes are scaled to a root mean square of 1, so only directions count, and the
    commitment weight no longer depends on the scale of the features; the output keeps each token's scale."""
    heads: int = 1
    """Equal groups of channels with a codebook of K codes each (product quantisation: K^heads values)."""
    stages: int = 1
    """Residual quantisation, 1 to 4: each further codebook of K codes quantises what the former left."""
    gradient: Gradient = "straight-through"
    """How the output passes its gradient on: unchanged, or turned as the token was turned to its code (the
    rotation trick, Fifty et al. 2024). Not for ``regularize``, whose output is the input."""
    divide_by_variance: bool = False
    """Divide the loss by a moving average of the variance of the features (1 before the first update)."""
    warmup_updates: int = 0
    """Codebook updates over which the commitment weight grows linearly from 0."""
    num_classes: int = 0
    """Class-conditional codebooks: K codes for each class, searched by the sample's label. 0: one for all."""
    learn_from: LearnFrom = "all"
    """Whose tokens move an attached codebook: ``"real"`` leaves fakes out, and needs labelled parts."""
    memory_images: float | None = None
    """Memory of the codebook in images instead of forwards: the averages decay by exp(-images / this), in
    place of ``decay``, so that batch size, accumulation and processes do not change it."""
    deferred_update: bool = False
    """Training forwards only add to pending statistics; ``apply_update()`` makes them one EMA step."""
    channel_last: bool = False
    """Input is ``[B, *spatial, dim]``, for instance tokens ``[B, T, dim]``."""
    sync: bool = True
    """Sum the statistics over all processes when ``torch.distributed`` is initialised."""
    epsilon: float = 1e-5
    """Laplace smoothing of the two original dictionaries; read under ``compat`` only."""
    seed: int = 0
    """Seed of the layer's own draws; the global generators are never touched."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        one_of(self.init, ("auto", "kmeans", "data", "normal", "uniform"), "init")
        one_of(self.gradient, ("straight-through", "rotation"), "gradient")
        one_of(self.learn_from, ("all", "real"), "learn_from")
        for name, least in (("init_tokens", 1), ("kmeans_iterations", 0), ("dead_code_grace", 0),
                            ("blend_start", 0), ("blend_steps", 1), ("heads", 1), ("stages", 1),
                            ("warmup_updates", 0), ("num_classes", 0)):  # fmt: skip
            integer(getattr(self, name), name, least)
        require(self.stages <= 4, "stages", self.stages, "1 to 4")
        require(
            not self.normalize or self.stages == 1, "stages", self.stages,
            "1 with normalize=True: what a stage leaves is shorter than the codes of the next one could be",
        )  # fmt: skip
        integer(self.seed, "seed", 0)
        require(self.seed < 2**63, "seed", self.seed, "an integer below 2**63")
        require(0.0 <= self.blend_end <= 1.0, "blend_end", self.blend_end, "a share from 0 to 1")
        require(self.epsilon > 0, "epsilon", self.epsilon, "a positive number")
        memory = self.memory_images
        require(
            memory is None or 0 < memory < math.inf, "memory_images", memory,
            "a positive number of images, or None",
        )  # fmt: skip
        threshold = self.dead_code_threshold
        require(
            threshold is None or 0 <= threshold < 1,
            "dead_code_threshold",
            threshold,
            "a share from 0 to below 1",
        )

    def resolve(self, compat: str | None) -> tuple[str, float]:
        """Concrete ``init`` and ``dead_code_threshold``.

        Args:
            compat: of the layer.

        Returns:
            ``(init, dead_code_threshold)``.

        Raises:
            ValueError: an option asks for something that the originals do not know.
        """
        threshold = self.dead_code_threshold
        if compat is None:
            return ("kmeans" if self.init == "auto" else self.init), 0.03 if threshold is None else threshold
        asked = [f"init={self.init!r}"] if self.init not in ("auto", "normal") else []
        asked += [f"dead_code_threshold={threshold}"] if threshold else []
        asked += [f"{name}={getattr(self, name)!r}" for name in _NOT_IN_ORIGINALS
                  if getattr(self, name) != _DEFAULTS[name]]  # fmt: skip
        if asked:
            raise ValueError(
                f"compat={compat!r} reproduces an original dictionary, which starts from N(0, 1), replaces "
                f"no code and has one codebook, but options ask for {', '.join(asked)}: leave these at their "
                "defaults, or drop compat"
            )
        return "normal", 0.0


_NOT_IN_ORIGINALS = ("normalize", "heads", "stages", "num_classes", "memory_images")
_DEFAULTS = {field.name: field.default for field in fields(CodebookOptions)}


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Refuse a value.

    Args:
        ok: whether it is fine.
        name: of the setting.
        value: given.
        expected: what to give instead.

    Raises:
        ValueError: it is not.
    """
    if not ok:
        raise ValueError(f"{name} is {value}: give {expected}")


def integer(value: object, name: str, least: int) -> None:
    """Refuse what is no integer, or too small.

    Args:
        value: given.
        name: of the setting.
        least: smallest value allowed.

    Raises:
        TypeError: it is no integer.
        ValueError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}: give an integer of at least {least}")
    require(value >= least, name, value, f"an integer of at least {least}")


def one_of(value: object, choices: tuple[object, ...], name: str) -> None:
    """Refuse what is not among the choices.

    Args:
        value: given.
        choices: allowed.
        name: of the setting.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, choices))}")


def check_samples(features: Tensor, classes: int, labels: Tensor | None, learn: Tensor | None) -> None:
    """Refuse labels or a mask that do not fit a batch.

    Args:
        features: ``[B, ...]``.
        classes: number of classes; 0 without.
        labels: class of each sample, or None.
        learn: mask of the samples, or None.

    Raises:
        ValueError: labels are missing, not wanted or out of range, or there is not one value a sample.
        TypeError: ``labels`` are not int64, ``learn`` is not bool, or they are on another device.
    """
    if (labels is None) == bool(classes):
        raise ValueError(
            f"num_classes is {classes} but labels are {'missing' if labels is None else 'given'}: build "
            "the layer with CodebookOptions(num_classes=...) and pass the class of every sample"
        )
    for name, value, dtype in (("labels", labels, torch.int64), ("learn", learn, torch.bool)):
        if value is None:
            continue
        if value.dtype != dtype or value.device != features.device:
            raise TypeError(
                f"{name} are {value.dtype} on {value.device}: give {dtype} on {features.device}, where the "
                "features are"
            )
        if value.shape != (len(features),):
            raise ValueError(
                f"{name} have shape {list(value.shape)}: give one value for each of the {len(features)} "
                "samples"
            )
    # Looking at the values would stop a GPU's queue, or break a compiled graph.
    if labels is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"labels run from {low} to {high}: give classes from 0 to {classes - 1}")
