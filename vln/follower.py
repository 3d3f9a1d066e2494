"""The R2R agent: EnvDrop's decoder (Tan et al., 2019) on Prevalent's encoder (Hao et al., 2020).

The encoder reads the instruction together with the panorama of the present step, at every step anew; the
decoder attends to the panorama, then to the words, and scores the candidates.

Letters of shapes: B rows, T tokens, I instructions of a row, V views (36), C candidates, D width of a view,
A of it orientation, H the decoder's hidden size, W width of the words (two directions of the encoder's LSTM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vln.model import Prevalent
from vln.recurrent import FeatureDropout, SoftDot, length_mask, reverse_in_time, run_packed, run_states


@dataclass(frozen=True, kw_only=True)
class FollowerConfig:
    """Sizes of the agent around its encoder, and its dropout.

    Raises:
        ValueError: a size is below 1, or a share is outside [0, 1).
    """

    encoder_hidden: int = 1024
    """Of the encoder's LSTM, each direction."""
    decoder_hidden: int = 1024
    """H."""
    action_embedding: int = 64
    """Width of the agent's own orientation after its embedding."""
    critic_hidden: int | None = None
    """Of the critic's one hidden layer; that of the decoder by default."""
    encoder_dropout: float = 0.4
    dropout: float = 0.5
    """Of decoder and critic."""
    feature_dropout: float = 0.4
    """Of the image features in the decoder."""

    def __post_init__(self) -> None:
        for name in ("encoder_hidden", "decoder_hidden", "action_embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        for name in ("encoder_dropout", "dropout", "feature_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to below 1")


class Context(NamedTuple):
    """What the agent has read."""

    words: Tensor
    """``[B, I, T, W]``, zeros after a row's end."""
    mask: Tensor
    """bool ``[B, I, T]``."""
    hidden: Tensor | None
    """``[B, H]``: where the decoder begins (its h~); at the first step alone."""
    cell: Tensor | None
    """``[B, H]``."""


class InstructionEncoder(nn.Module):
    """Words joined with the present panorama, reversed in time, through a bi-LSTM.

    With several instructions a row (three in the published agent) each is read by the same weights, and the
    states that the decoder begins with are averaged.

    Args:
        trunk: the pre-trained model. Gradients reach it as its configuration says.
        config: sizes.
    """

    def __init__(self, trunk: Prevalent, config: FollowerConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.trunk.pooler.requires_grad_(False)  # the agents read all words, not the pooled one
        self.lstm = nn.LSTM(
            trunk.config.hidden_size, config.encoder_hidden, batch_first=True, bidirectional=True
        )
        self.to_hidden = nn.Linear(2 * config.encoder_hidden, config.decoder_hidden)
        self.to_cell = nn.Linear(2 * config.encoder_hidden, config.decoder_hidden)
        self.dropout = nn.Dropout(config.encoder_dropout)

    @property
    def words_size(self) -> int:
        """W."""
        return 2 * self.lstm.hidden_size

    def encode_text(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Words before they see a view, once an episode.

        Args:
            input_ids: int64 ``[B, T]`` or ``[B, I, T]``.
            lengths: int64 ``[B]`` or ``[B, I]``.

        Returns:
            ``[B, I, T, H']`` with the trunk's hidden size H'.
        """
        rows = input_ids.numel() // input_ids.shape[-1]
        flat = input_ids.reshape(rows, -1)
        text = self.trunk.encode_text(flat, length_mask(lengths.reshape(-1), flat.shape[1]))
        return rearrange(text, "(b i) t h -> b i t h", b=len(input_ids))

    def forward(self, text: Tensor, lengths: Tensor, panorama: Tensor, *, first: bool = True) -> Context:
        """Read the instruction while looking around.

        Args:
            text: ``[B, I, T, H']`` of `encode_text`.
            lengths: int64 ``[B]`` or ``[B, I]``.
            panorama: ``[B, V, D]``.
            first: whether a decoder begins with this; only then ``hidden`` and ``cell`` are there.

        Returns:
            What was read.
        """
        batch, several = text.shape[:2]
        lengths = lengths.reshape(-1)
        flat = rearrange(text, "b i t h -> (b i) t h")
        mask = length_mask(lengths, flat.shape[1])
        views = self.trunk.embed_views(panorama)
        if several > 1:
            views = repeat(views, "b v h -> (b i) v h", i=several)
        # No mask where nothing is padded: the attention is faster, and its result the same.
        joined = self.trunk.fuse(flat, views, None if bool(mask.all()) else mask)
        joined, mask = reverse_in_time(joined, lengths), rearrange(mask, "(b i) t -> b i t", b=batch)
        if not first:
            words = self.dropout(run_states(self.lstm, joined, lengths))
            return Context(rearrange(words, "(b i) t w -> b i t w", b=batch), mask, None, None)
        states = run_packed(self.lstm, joined, lengths)
        ends = [torch.cat([part[1], part[0]], dim=-1) for part in (states.hidden, states.cell)]
        hidden, cell = (
            rearrange(end, "(b i) h -> b i h", b=batch).mean(1)
            for end in (torch.tanh(self.to_hidden(ends[0])), self.to_cell(ends[1]))
        )
        words = rearrange(self.dropout(states.states), "(b i) t w -> b i t w", b=batch)
        return Context(words, mask, hidden, cell)


class Step(NamedTuple):
    """One step of the decoder."""

    logits: Tensor
    """``[B, C]``, -inf where there is no candidate if ``num_candidates`` was given."""
    hidden: Tensor
    """h of the cell, ``[B, H]``; the critic's input."""
    tilde: Tensor
    """h~ with the words in it, ``[B, H]``; what is fed back."""
    cell: Tensor
    """c, ``[B, H]``."""


class Decoder(nn.Module):
    """EnvDrop's attentive decoder.

    Args:
        config: sizes.
        view_size: D.
        angle_size: A.
        words_size: W.
    """

    def __init__(self, config: FollowerConfig, *, view_size: int, angle_size: int, words_size: int) -> None:
        super().__init__()
        size = config.decoder_hidden
        self.embedding = nn.Linear(angle_size, config.action_embedding)
        self.view_attention = SoftDot(size, view_size, output=False)
        self.lstm = nn.LSTMCell(config.action_embedding + view_size, size)
        self.word_attention = SoftDot(size, words_size)
        self.score = nn.Linear(size, view_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.feature_dropout = FeatureDropout(config.feature_dropout, angle_size)

    def forward(
        self,
        angle: Tensor,
        panorama: Tensor,
        candidates: Tensor,
        tilde: Tensor,
        cell: Tensor,
        context: Context,
        *,
        num_candidates: Tensor | None = None,
        features_dropped: bool = False,
    ) -> Step:
        """One step (Tan et al., 2019, Eq. 3 to 8).

        Args:
            angle: the agent's own orientation ``[B, A]``.
            panorama: ``[B, V, D]``.
            candidates: ``[B, C, D]``, zeros for STOP and behind the list.
            tilde: h~ of the step before, or the context's ``hidden``: ``[B, H]``.
            cell: c of the step before, or the context's: ``[B, H]``.
            context: of this step.
            num_candidates: int64 ``[B]``, STOP included.
            features_dropped: features come with a dropout of their own (environment dropout).

        Returns:
            Scores and states.
        """
        if not features_dropped:
            panorama, candidates = self.feature_dropout(panorama), self.feature_dropout(candidates)
        own = self.dropout(torch.tanh(self.embedding(angle)))
        seen = self.view_attention(self.dropout(tilde), panorama)
        # The recurrent state is h~, not h: a peculiarity of the original that its weights rely on.
        hidden, cell = self.lstm(torch.cat([own, seen], dim=-1), (tilde, cell))
        query = repeat(self.dropout(hidden), "b h -> b i h", i=context.words.shape[1])
        tilde = self.word_attention(query, context.words, context.mask).mean(1)
        logits = (candidates @ self.score(self.dropout(tilde))[..., None])[..., 0]
        if num_candidates is not None:
            logits = logits.masked_fill(~length_mask(num_candidates, logits.shape[1]), -torch.inf)
        return Step(logits, hidden, tilde, cell)


class Critic(nn.Module):
    """Value of a state: h ``[B, H]`` to ``[B]``.

    Args:
        config: sizes.
    """

    def __init__(self, config: FollowerConfig) -> None:
        super().__init__()
        inner = config.critic_hidden or config.decoder_hidden
        self.layers = nn.Sequential(
            nn.Linear(config.decoder_hidden, inner),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(inner, 1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Values."""
        return self.layers(hidden)[..., 0]


class Follower(nn.Module):
    """Encoder, decoder and critic together.

    Args:
        trunk: the pre-trained model.
        config: sizes.
    """

    def __init__(self, trunk: Prevalent, config: FollowerConfig | None = None) -> None:
        super().__init__()
        self.config = FollowerConfig() if config is None else config
        self.encoder = InstructionEncoder(trunk, self.config)
        self.decoder = Decoder(
            self.config,
            view_size=trunk.config.view_size,
            angle_size=trunk.config.angle_size,
            words_size=self.encoder.words_size,
        )
        self.critic = Critic(self.config)
