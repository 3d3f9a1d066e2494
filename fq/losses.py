"""How a quantised output passes its gradient on, where that is not simply the identity."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(features: Tensor, quantized: Tensor) -> Tensor:
    """The code as a rotated and stretched token: the rotation trick (Fifty et al. 2024).

    From arXiv:2410.06424. The value is ``quantized``; the gradient is that of the linear map which turns each
    token to its code, held constant: it keeps its angle to the code, where straight-through would keep its
    direction. A token shorter than a thousandth of its code has no direction to speak of, and the gradient
    would grow as it shrinks: it gets straight-through.

    Args:
        features: ``[B, D, S]``.
        quantized: ``[B, D, S]``; no gradient flows to it.

    Returns:
        ``[B, D, S]``.

    Example:
        >>> rotate(torch.tensor([[[3.0], [0.0]]]), torch.tensor([[[0.0], [6.0]]])).flatten().round()
        tensor([0., 6.])
    """
    with torch.no_grad():
        length = features.norm(dim=1, keepdim=True).clamp(min=1e-12)
        target = quantized.norm(dim=1, keepdim=True)
        source, goal = features / length, quantized / target.clamp(min=1e-12)
        middle = source + goal
        middle = middle / middle.norm(dim=1, keepdim=True).clamp(min=1e-12)
        short = length < 1e-3 * target
    along = (middle * features).sum(1, keepdim=True)
    onto = (source * features).sum(1, keepdim=True)
    turned = (features - 2 * middle * along + 2 * goal * onto) * (target / length)
    return torch.where(short, features + (quantized - features).detach(), turned)
