"""The two differentiable pieces of FQ: the commitment loss and the straight-through output."""

from __future__ import annotations

import torch
from torch import Tensor


def commitment(features: Tensor, quantized: Tensor, batch_size: int, *, reduction: str) -> Tensor:
    """Mean squared distance of the features to their codes, ``mean (sg(q) - x)²`` (FQ-GAN, Eq. 6).

    Built from differentiable operations that save only the difference, so that second derivatives exist and a
    trunk may change its features in place afterwards.

    Args:
        features: ``[N, D]``, tokens of ``batch_size`` samples in order.
        quantized: ``[N, D]``; no gradient flows to it.
        batch_size: B; N is a multiple of it.
        reduction: ``"mean"`` for a scalar, ``"none"`` for one value a sample.

    Returns:
        A scalar, or ``[B]``. Zero, still connected to ``features``, when there are no tokens.

    Example:
        >>> commitment(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 1, reduction="mean")
        tensor(2.)
    """
    difference = features - quantized.detach()
    if features.numel() == 0:
        empty = difference.sum()
        return empty if reduction == "mean" else empty.expand(batch_size)
    if reduction == "mean":
        return difference.square().mean()
    return difference.square().view(batch_size, -1).mean(1)


def straight_through(features: Tensor, quantized: Tensor, blend: Tensor | float = 1.0) -> Tensor:
    """``x + b·sg(q - x)``: the value of the code (for ``b = 1``), the gradient of the identity.

    Args:
        features: any shape.
        quantized: the shape of ``features``.
        blend: share of the code in the value, in ``[0, 1]``.

    Returns:
        A fresh tensor of the shape of ``features``; its gradient with respect to ``features`` is the
        identity.

    Example:
        >>> straight_through(torch.tensor([1.0]), torch.tensor([3.0]), 0.5)
        tensor([2.])
    """
    with torch.no_grad():
        step = quantized - features
        if isinstance(blend, Tensor) or blend != 1.0:
            step = step * blend
    return features + step
