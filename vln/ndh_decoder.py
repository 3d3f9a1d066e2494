"""The NDH agent's decoder: that of speaker-follower (Fried et al., 2018) on Prevalent's encoder.

Letters of shapes: B rows, V views (36), C candidates, D width of a view, H hidden size, W width of the words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vln.follower import Context, FollowerConfig, Step
from vln.recurrent import SoftDot, length_mask


class ProjectedAttention(nn.Module):
    """Attention over the views in a space of its own; the views themselves are averaged.

    Args:
        query_size: H.
        key_size: D.
        size: of the space.
    """

    def __init__(self, query_size: int, key_size: int, size: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(query_size, size), nn.Linear(key_size, size)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """``[B, H]`` and ``[B, V, D]`` to ``[B, D]``."""
        shares = (self.key(keys) @ self.query(query)[..., None]).softmax(1)  # [B, V, 1]
        return (shares * keys).sum(1)


class NDHDecoder(nn.Module):
    """Decoder that is told its last action, and scores candidates by a product of projections.

    The first action is a vector of zeros (`first_action`); the state fed back is the attended one.

    Args:
        config: sizes; neither the agent's own orientation nor a dropout of features is used here.
        view_size: D.
        words_size: W.
        projection_size: of the spaces in which views and candidates are compared.
    """

    def __init__(
        self, config: FollowerConfig, *, view_size: int, words_size: int, projection_size: int = 256
    ) -> None:
        super().__init__()
        size = config.decoder_hidden
        self.view_attention = ProjectedAttention(size, view_size, projection_size)
        self.lstm = nn.LSTMCell(2 * view_size, size)
        self.word_attention = SoftDot(size, words_size)
        self.state_projection = nn.Linear(size, projection_size)
        self.candidate_projection = nn.Linear(view_size, projection_size)
        self.score = nn.Linear(projection_size, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.view_size = view_size

    def first_action(self, batch_size: int) -> Tensor:
        """What stands for the action before the first one, ``[B, D]``."""
        return self.score.weight.new_zeros(batch_size, self.view_size)

    def forward(
        self,
        action: Tensor,
        panorama: Tensor,
        candidates: Tensor,
        tilde: Tensor,
        cell: Tensor,
        context: Context,
        *,
        num_candidates: Tensor | None = None,
    ) -> Step:
        """One step.

        Args:
            action: view of the candidate taken last, ``[B, D]``.
            panorama: ``[B, V, D]``.
            candidates: ``[B, C, D]``, STOP first and zero, zeros behind the list.
            tilde: h~ of the step before, or the context's ``hidden``: ``[B, H]``.
            cell: ``[B, H]``.
            context: of this step; several instructions are averaged as by the R2R agent.
            num_candidates: int64 ``[B]``, STOP included; scores behind become -inf.

        Returns:
            Scores and states.
        """
        seen = self.view_attention(tilde, panorama)
        given = self.dropout(torch.cat([action, seen], dim=-1))
        hidden, cell = self.lstm(given, (tilde, cell))
        query = self.dropout(hidden)[:, None].expand(-1, context.words.shape[1], -1)
        tilde = self.word_attention(query, context.words, context.mask).mean(1)
        both = self.state_projection(tilde)[:, None] * self.candidate_projection(candidates)  # [B, C, P]
        logits = self.score(both)[..., 0]
        if num_candidates is not None:
            logits = logits.masked_fill(~length_mask(num_candidates, logits.shape[1]), -torch.inf)
        return Step(logits, hidden, tilde, cell)
