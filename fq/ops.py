"""The two operators of FQ as PyTorch knows them: differentiable, and opaque to ``torch.compile``.

Outside a compiled graph ``quantize`` runs as an autograd function. Inside one it is the custom operator
``fq::quantize``: a graph without a break, the same for every batch size, in which no ``N x K`` tensor can
appear because nobody looks inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fq import search


def quantize(
    features: Tensor,
    codebook: Tensor,
    learn: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    statistics: bool,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiable :func:`fq.search.quantize`.

    The gradients of ``difference`` and ``error`` with respect to ``features`` are those for fixed codes: the
    identity, and ``2 / (B · D · S) · difference`` (FQ-GAN, Eq. 6). Only ``difference``, an output, is kept
    for the backward pass: a trunk may change its features in place, and second derivatives exist.

    Args:
        features: ``[B, D, S]``.
        codebook: ``[K, D]``, or ``[C, K, D]`` with ``labels``; no gradient flows to it.
        learn: bool ``[B]``, or ``None``.
        labels: int64 ``[B]``: each sample's tokens are searched among the codes of its class only.
        statistics: whether ``packed`` is made.
        per_sample: one mean a sample (and no B in the denominator).

    Returns:
        ``(difference [B, D, S], error [] or [B], indices [B, S], packed [K, D + 1] or [0])``; with
        classes, K is the number of all codes.
    """
    arguments = (features, codebook, learn, labels, statistics, per_sample)
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.fq.quantize(*arguments)
    else:
        found = _Quantize.apply(*arguments)
    return found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, *_, per_sample = inputs
    ctx.save_for_backward(output[0])
    ctx.dtype, ctx.per_sample = features.dtype, per_sample
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)  # under regularize nobody asks for the gradient of the difference


def _backward(ctx: Any, of_difference: Tensor | None, of_error: Tensor | None, *_: Any) -> Any:
    (difference,) = ctx.saved_tensors
    gradient = of_difference
    if of_error is not None:
        batch, dim, places = difference.shape
        scale = of_error * (2 / max(dim * places * (1 if ctx.per_sample else batch), 1))
        scale = scale[:, None, None] if ctx.per_sample else scale
        gradient = difference * scale if gradient is None else torch.addcmul(gradient, difference, scale)
    if gradient is not None:
        gradient = gradient.to(ctx.dtype)
    return gradient, None, None, None, None, None


def straight_through(difference: Tensor, value: Tensor) -> Tensor:
    """A value that passes its gradient on to ``difference`` unchanged.

    ``value + (x - x.detach())`` would do the same, but then the backward pass has two gradients of the
    features to add up; this way :func:`quantize` adds them while it makes its own.

    Args:
        difference: from :func:`quantize`, whose gradient with respect to the features is the identity.
        value: of the same shape, fresh and without a gradient; it becomes the result.

    Returns:
        ``value``, now part of the graph.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> straight_through(x * 1, torch.ones(2)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    result: Tensor = _StraightThrough.apply(difference, value)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(difference: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.mark_dirty(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Quantize(torch.autograd.Function):
    forward = staticmethod(search.quantize)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


@torch.library.custom_op("fq::quantize", mutates_args=())
def _quantize_op(
    features: Tensor,
    codebook: Tensor,
    learn: Tensor | None,
    labels: Tensor | None,
    statistics: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return search.quantize(features, codebook, learn, labels, statistics, per_sample)


@_quantize_op.register_fake
def _(
    features: Tensor,
    codebook: Tensor,
    learn: Tensor | None,
    labels: Tensor | None,
    statistics: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, dim, places = features.shape
    dtype = search.wide_dtype(features, codebook)
    indices = features.new_empty(batch, places, dtype=torch.int64)
    if features.device.type == "cpu":  # there tokens lie in rows
        difference = features.new_empty(batch, places, dim, dtype=dtype).transpose(1, 2)
    else:
        difference = torch.empty_like(features, dtype=dtype)
    error = features.new_empty((batch,) if per_sample else (), dtype=dtype)
    packed = features.new_empty((codebook.numel() // dim, dim + 1) if statistics else (0,), dtype=dtype)
    return difference, error, indices, packed


_quantize_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fq::nearest", mutates_args=())
def _nearest_op(features: Tensor, codebook: Tensor, chunk_size: int) -> Tensor:
    return search.search(features, codebook, chunk_size or None)


@_nearest_op.register_fake
def _(features: Tensor, codebook: Tensor, chunk_size: int) -> Tensor:
    return features.new_empty(len(features), dtype=torch.int64)
