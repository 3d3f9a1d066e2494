"""Recurrent pieces that follower and speaker share: soft-dot attention, sequences of unequal length.

Letters of shapes: B rows, T steps or tokens, Q width of the query, K width of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class SoftDot(nn.Module):
    """Attention by dot products with a projected query (Luong et al., 2015, "general").

    Args:
        query_size: Q.
        key_size: K; keys are the values too.
        output: whether the result is ``tanh(W [attended; query])`` of width Q instead of what was attended.
    """

    def __init__(self, query_size: int, key_size: int, *, output: bool = True) -> None:
        super().__init__()
        self.linear_in = nn.Linear(query_size, key_size, bias=False)
        self.linear_out = nn.Linear(key_size + query_size, query_size, bias=False) if output else None

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Look at the keys.

        Args:
            query: ``[..., Q]``.
            keys: ``[..., N, K]``.
            mask: bool ``[..., N]``, true where a key may be looked at; each row needs one.

        Returns:
            ``[..., Q]``, or without an output layer ``[..., K]``.
        """
        scores = (keys @ self.linear_in(query)[..., None])[..., 0]  # [..., N]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attended = (scores.softmax(-1)[..., None, :] @ keys)[..., 0, :]
        if self.linear_out is None:
            return attended
        return torch.tanh(self.linear_out(torch.cat([attended, query], dim=-1)))


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Which of ``size`` places hold something: int64 ``[B]`` to bool ``[B, size]``.

    Example:
        >>> length_mask(torch.tensor([2, 0]), 3)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def reverse_in_time(states: Tensor, lengths: Tensor) -> Tensor:
    """Turn the first ``lengths`` states of every row around; the rest stays.

    Args:
        states: ``[B, T, K]``.
        lengths: int64 ``[B]``.

    Example:
        >>> reverse_in_time(torch.tensor([[[1], [2], [3]]]), torch.tensor([2]))[0, :, 0]
        tensor([2, 1, 3])
    """
    place = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
    place = torch.where(length_mask(lengths, states.shape[1]), lengths[:, None] - 1 - place, place)
    return states.gather(1, place[..., None].expand_as(states))


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Packed(NamedTuple):
    """What an LSTM of one layer and two directions makes of a batch."""

    states: Tensor
    """``[B, T, 2 H]``, zeros after a row's end."""
    hidden: Tensor
    """``[2, B, H]``: forward, backward."""
    cell: Tensor
    """``[2, B, H]``."""


def run_packed(lstm: nn.LSTM, states: Tensor, lengths: Tensor) -> Packed:
    """Run an LSTM over rows of unequal length, none of which sees the padding of another.

    Args:
        lstm: batch first.
        states: ``[B, T, K]``.
        lengths: int64 ``[B]``, at least 1.
    """
    packed = pack_padded_sequence(states, lengths.cpu(), batch_first=True, enforce_sorted=False)
    output, (hidden, cell) = lstm(packed)
    padded, _ = pad_packed_sequence(output, batch_first=True, total_length=states.shape[1])
    return Packed(padded, hidden, cell)


def run_states(lstm: nn.LSTM, states: Tensor, lengths: Tensor) -> Tensor:
    """The states that `run_packed` gives, without the ends; on a CPU in less than half the time.

    There, packed sequences are walked step by step in many small operations. Here each direction is one fused
    pass over padded rows: the backward one reads rows turned around, so that padding comes last for both.

    Args:
        lstm: one layer, two directions, batch first.
        states: ``[B, T, K]``.
        lengths: int64 ``[B]``, at least 1.

    Returns:
        ``[B, T, 2 H]``, zeros after a row's end.
    """
    if states.device.type != "cpu":
        return run_packed(lstm, states, lengths).states
    zeros = states.new_zeros(1, len(states), lstm.hidden_size)
    found = []
    for suffix in ("", "_reverse"):
        weights = [getattr(lstm, f"{kind}_l0{suffix}") for kind in _WEIGHTS]
        given = reverse_in_time(states, lengths) if suffix else states
        made = torch.lstm(given, (zeros, zeros), weights, True, 1, 0.0, lstm.training, False, True)[0]
        found.append(reverse_in_time(made, lengths) if suffix else made)
    mask = length_mask(lengths, states.shape[1])
    return torch.cat(found, dim=-1) * mask[..., None]


class FeatureDropout(nn.Module):
    """Dropout of the image features alone; the orientation behind them stays.

    Args:
        share: dropped.
        angle_size: numbers at the end that stay.
    """

    def __init__(self, share: float, angle_size: int) -> None:
        super().__init__()
        self.dropout, self.angle_size = nn.Dropout(share), angle_size

    def forward(self, views: Tensor) -> Tensor:
        """``[..., D]`` to the same; the tensor given is left alone."""
        if not (self.training and self.dropout.p):
            return views
        size = views.shape[-1] - self.angle_size
        return torch.cat([self.dropout(views[..., :size]), views[..., size:]], dim=-1)
