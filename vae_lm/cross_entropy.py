"""Cross-entropy of an output layer over a large vocabulary, without ever holding all the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOGITS_AT_ONCE = 2**25
"""128 MiB in float32: large enough for full speed of the matrix products, small beside the weights."""


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_scale: Tensor | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each target under ``softmax(hidden @ weight.T)``, in chunks of rows.

    Logits are formed for some rows at a time, in the type of an active autocast or else of ``hidden``, and
    turned to float32 (float64 stays). Gradients are taken while the logits are there, for an upstream
    gradient that is the same for all rows, as it is after a sum or a mean; for any other upstream gradient
    the backward pass forms the logits again. Differentiable once.

    Args:
        hidden: ``[N, H]``, last states.
        weight: ``[V, H]``, the output layer.
        targets: int64 ``[N]``, values in ``[0, V)``.
        row_scale: ``[N]``, multiplies the result; constant. Row weights given here keep the upstream gradient
            uniform, and with it the fast way.
        rows_at_once: rows whose logits exist together; None keeps them at 2^25 logits.

    Returns:
        ``[N]`` in nats, float32 or float64.

    Raises:
        ValueError: the shapes do not fit, or ``rows_at_once`` is below 1.

    Example:
        >>> token_nll(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3])).exp()
        tensor([4., 4.])
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)} but [N, H] and [V, H] were "
            "expected: flatten batch and time first"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets are {list(targets.shape)} but hidden has {len(hidden)} rows: give one token a row"
        )
    if row_scale is not None and row_scale.shape != targets.shape:
        raise ValueError(f"row_scale is {list(row_scale.shape)} but {list(targets.shape)} was expected")
    rows = max(1, _LOGITS_AT_ONCE // len(weight)) if rows_at_once is None else rows_at_once
    if rows < 1:
        raise ValueError(f"rows_at_once is {rows_at_once} but at least one row is handled at once")
    if row_scale is None:
        row_scale = torch.ones_like(targets, dtype=_wide(hidden.dtype))
    # Under no_grad, too, a Function is told that its inputs need gradients: two of three products in vain.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        result: Tensor = _TokenNLL.apply(hidden, weight, targets, row_scale, rows)
        return result
    cast_hidden, cast_weight = _cast(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        nll, _, _ = _pass(cast_hidden, cast_weight, targets, row_scale, rows, (False, False))
    return nll


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type of the products; once for all chunks, which autocast itself would not do."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), weight.to(dtype)


def _pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    rows: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scaled losses ``[N]``, and the gradients of their sum by hidden and by weight where wanted."""
    want_hidden, want_weight = wanted
    nll = torch.empty(len(targets), dtype=_wide(hidden.dtype), device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if want_hidden else None
    grad_weight = None
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        states, target = hidden[part], targets[part, None]
        logits = (states @ weight.t()).to(nll.dtype)  # [n, V]
        total = logits.logsumexp(-1, keepdim=True)  # [n, 1]
        factor = scale[part, None]
        nll[part] = ((total - logits.gather(-1, target)) * factor).squeeze(-1)
        if not (want_hidden or want_weight):
            continue
        slope = logits.sub_(total).exp_()  # softmax
        slope.scatter_add_(-1, target, torch.full_like(total, -1.0))
        slope = slope.mul_(factor).to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(slope, weight, out=grad_hidden[part])
        if not want_weight:
            continue
        if grad_weight is None:  # in float32: many chunks of a low precision would lose small terms
            grad_weight = (slope.t() @ states).to(nll.dtype)
        elif grad_weight.dtype == slope.dtype:
            grad_weight.addmm_(slope.t(), states)
        else:
            grad_weight += slope.t() @ states
    if want_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight, dtype=nll.dtype)
    return nll, grad_hidden, grad_weight


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, rows: int
    ) -> Tensor:
        cast_hidden, cast_weight = _cast(hidden, weight)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        with torch.autocast(hidden.device.type, enabled=False):
            nll, grad_hidden, grad_weight = _pass(cast_hidden, cast_weight, targets, scale, rows, wanted)
        ctx.save_for_backward(hidden, weight, targets, scale)
        ctx.rows, ctx.dtype, ctx.wanted, ctx.gradients = (
            rows,
            cast_hidden.dtype,
            wanted,
            (grad_hidden, grad_weight),
        )
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, scale = ctx.saved_tensors
        # Handed out once and scaled in place: the one by weight is as large as all embeddings of words.
        gradients, ctx.gradients = ctx.gradients, None
        uniform = not len(upstream) or bool((upstream == upstream[0]).all())
        if uniform and gradients is not None:
            for gradient in gradients:
                if gradient is not None and len(upstream):
                    gradient.mul_(upstream[0])
        else:
            states, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            _, *gradients = _pass(states, matrix, targets, scale * upstream, ctx.rows, ctx.wanted)
        by_hidden, by_weight = gradients
        return (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None,
            None,
            None,
        )
