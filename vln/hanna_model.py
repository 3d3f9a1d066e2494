"""The HANNA agent's model on Prevalent's words (Nguyen & Daumé, 2019; Hao et al., 2020, Sec. 5.3).

The words pass the pre-trained text layers alone, then a Transformer layer. Two decoders, one to walk and one
to ask, each have a memory of the present sub-task, which begins anew with it, and one of the whole episode.

Letters of shapes: B rows, T tokens, V views (36), C candidates, D width of a view, H hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vln.model import Prevalent
from vln.recurrent import SoftDot, length_mask
from vln.surroundings import Views

NUM_BINS = 37
"""Of the distribution over where to go: 36 views and STOP; also of the similarities with a goal's views."""
_TIME_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class HannaAgentConfig:
    """Sizes of the agent around its words.

    Raises:
        ValueError: the heads do not divide the hidden size, or a share is outside [0, 1).
    """

    hidden_size: int = 256
    """H."""
    num_heads: int = 8
    """Of the Transformer layer over the words."""
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size} but must be a multiple of num_heads, {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a share from 0 to below 1")


class HannaWords(nn.Module):
    """Words of a sub-task: pre-trained text layers, a projection, one Transformer layer.

    Args:
        trunk: the pre-trained model, of which the views' part is not used.
        config: sizes.
    """

    def __init__(self, trunk: Prevalent, config: HannaAgentConfig) -> None:
        super().__init__()
        self.trunk, size = trunk, config.hidden_size
        trunk.pooler.requires_grad_(False)
        self.projection = nn.Linear(trunk.config.hidden_size, size)
        self.layer = nn.TransformerEncoderLayer(
            size, config.num_heads, 4 * size, dropout=config.dropout, batch_first=True
        )
        self.scale = math.sqrt(size)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Read: int64 ``[B, T]`` and ``[B]`` to ``[B, T, H]``."""
        mask = length_mask(lengths, input_ids.shape[1])
        text = self.projection(self.trunk.encode_text(input_ids, mask)) * self.scale
        text = text + sinusoids(text.shape[1], text.shape[2]).to(text)
        return self.layer(text, src_key_padding_mask=~mask)


def sinusoids(length: int, size: int) -> Tensor:
    """Positions as sines and cosines (Vaswani et al., 2017): ``[length, size]``.

    Example:
        >>> sinusoids(2, 2).round(decimals=2).tolist()
        [[0.0, 1.0], [0.8399999737739563, 0.5400000214576721]]
    """
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000.0) / size))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(length, -1)[:, :size]


class HannaMemory(NamedTuple):
    """What one decoder remembers, ``[B, H]`` each."""

    tilde: Tensor
    """Of the sub-task, with words in it."""
    task_cell: Tensor
    state: Tensor
    """Of the episode."""
    state_cell: Tensor

    def rows(self, which: Tensor) -> HannaMemory:
        """Some rows."""
        return HannaMemory(*(part[which] for part in self))

    def begin(self, fresh: Tensor) -> HannaMemory:
        """Forget the sub-task in rows, bool ``[B]``, that have a new one."""
        kept = (~fresh).to(self.tilde)[:, None]
        return self._replace(tilde=self.tilde * kept, task_cell=self.task_cell * kept)


class HannaDecoder(nn.Module):
    """Memory of a sub-task and of the episode.

    Args:
        config: sizes.
        view_size: D.
        more: further numbers that it is told.
    """

    def __init__(self, config: HannaAgentConfig, *, view_size: int, more: int = 0) -> None:
        super().__init__()
        size = config.hidden_size
        self.view_attention = SoftDot(size, view_size, output=False)
        self.task_lstm = nn.LSTMCell(2 * view_size + NUM_BINS + 1 + more, size)
        self.word_attention = SoftDot(size, size)
        self.state_lstm = nn.LSTMCell(size + NUM_BINS, size)
        self.dropout = nn.Dropout(config.dropout)
        self.size = size

    def first(self, count: int) -> HannaMemory:
        """Before the first step."""
        zeros = self.task_lstm.weight_hh.new_zeros(count, self.size)
        return HannaMemory(zeros, zeros, zeros, zeros)

    def forward(
        self, given: Tensor, similarity: Tensor, panorama: Tensor, memory: HannaMemory, words: Tensor,
        mask: Tensor,
    ) -> HannaMemory:  # fmt: skip
        """One step: ``given`` is ``[B, D + 1 + more]``, ``similarity`` ``[B, 37]``, words ``[B, T, H]``."""
        seen = self.view_attention(memory.tilde, panorama)
        told = self.dropout(torch.cat([given, seen, similarity], dim=-1))
        hidden, task_cell = self.task_lstm(told, (memory.tilde, memory.task_cell))
        tilde = self.word_attention(self.dropout(hidden), words, mask)
        state, state_cell = self.state_lstm(
            torch.cat([self.dropout(tilde), similarity], dim=-1), (memory.state, memory.state_cell)
        )
        return HannaMemory(tilde, task_cell, state, state_cell)


class HannaStepOutput(NamedTuple):
    """One step of the agent."""

    nav_logits: Tensor
    """``[B, C]``, -inf where there is no candidate."""
    reason_logits: Tensor
    """``[B, 3]``: of lost, uncertain and wrong, already asked."""
    ask_logits: Tensor
    """``[B, 2]``: do nothing, request help."""
    walk: HannaMemory
    ask: HannaMemory


class HannaAgent(nn.Module):
    """The agent: walks, and asks for help.

    Args:
        trunk: the pre-trained model.
        config: sizes.
    """

    def __init__(self, trunk: Prevalent, config: HannaAgentConfig | None = None) -> None:
        super().__init__()
        self.config = HannaAgentConfig() if config is None else config
        view_size = trunk.config.view_size
        self.encoder = HannaWords(trunk, self.config)
        self.walker = HannaDecoder(self.config, view_size=view_size)
        self.asker = HannaDecoder(self.config, view_size=view_size, more=NUM_BINS)
        size = self.config.hidden_size
        self.score = nn.Linear(2 * size, view_size, bias=False)
        self.reasons = nn.Linear(2 * size, 3)
        self.request = nn.Linear(3, 2)  # a linear map of the reasons, as in the original
        self.view_size = view_size

    def forward(
        self, views: Views, action: Tensor, similarity: Tensor, time: Tensor,
        memories: tuple[HannaMemory, HannaMemory], words: Tensor, mask: Tensor,
    ) -> HannaStepOutput:  # fmt: skip
        """One step.

        Args:
            views: what is seen, in the follower order.
            action: view of the candidate taken last, ``[B, D]``.
            similarity: of the present views with the goal's, ``[B, 37]``.
            time: steps since the sub-task began, ``[B]``.
            memories: of walking and asking.
            words: ``[B, T, H]``.
            mask: bool ``[B, T]``.
        """
        given = torch.cat([action, time[:, None] / _TIME_SCALE], dim=-1)
        walk = self.walker(given, similarity, views.panorama, memories[0], words, mask)
        query = self.score(torch.cat([walk.tilde, walk.state], dim=-1))
        logits = (views.candidates @ query[..., None])[..., 0]
        logits = logits.masked_fill(~length_mask(views.num_candidates, logits.shape[1]), -torch.inf)
        told = torch.cat([given, bins(logits).detach()], dim=-1)
        ask = self.asker(told, similarity, views.panorama, memories[1], words, mask)
        reasons = self.reasons(torch.cat([ask.tilde, ask.state], dim=-1))
        return HannaStepOutput(logits, reasons, self.request(reasons), walk, ask)


def bins(logits: Tensor) -> Tensor:
    """Probabilities of where to go in 37 bins, the unused ones 0: ``[B, C]`` to ``[B, 37]``.

    Raises:
        ValueError: there are more candidates than bins.
    """
    if logits.shape[1] > NUM_BINS:
        raise ValueError(f"there are {logits.shape[1]} candidates, more than the {NUM_BINS} bins")
    return F.pad(logits.softmax(-1), (0, NUM_BINS - logits.shape[1]))


def view_similarity(here: Tensor, goal: Tensor) -> Tensor:
    """Cosine of each view with the same view of the goal, and that of their means.

    Args:
        here: image features ``[B, 36, F]``.
        goal: the same; zeros where there are no goal views.

    Returns:
        ``[B, 37]``.
    """
    each = F.cosine_similarity(here, goal, dim=-1)
    whole = F.cosine_similarity(here.mean(1), goal.mean(1), dim=-1)
    return torch.cat([each, whole[:, None]], dim=1)
