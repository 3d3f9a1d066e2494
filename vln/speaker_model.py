"""EnvDrop's speaker: a walked path to words (Tan et al., 2019, Sec. 3.4.3).

Letters of shapes: B rows, S steps of a path, V views (36), D width of a view, H hidden, L words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vln.recurrent import FeatureDropout, SoftDot, length_mask, run_states

Draw = Callable[[int, int], Tensor]
"""``draw(step, count)``: uniform numbers of [0, 1) for one step, ``[count]``."""


@dataclass(frozen=True, kw_only=True)
class SpeakerConfig:
    """Sizes of the speaker, its dropout, and its special words.

    Raises:
        ValueError: an odd hidden size, or a special word outside the vocabulary.
    """

    vocab_size: int = 992
    view_size: int = 2176
    """D."""
    angle_size: int = 128
    """Of it, orientation."""
    hidden_size: int = 512
    """H; of both encoder LSTMs each direction has half."""
    word_size: int = 256
    """Of a word's embedding."""
    dropout: float = 0.6
    feature_dropout: float = 0.3
    packed: bool = True
    """Whether the path's LSTMs stop at its end. The released speakers' run over the padding of the longest
    row, so that their words depend on the batch."""
    pad_id: int = 0
    unk_id: int = 1
    eos_id: int = 2
    bos_id: int = -1
    """The last word by default, where EnvDrop adds it."""

    def __post_init__(self) -> None:
        if self.bos_id == -1:
            object.__setattr__(self, "bos_id", self.vocab_size - 1)
        if self.hidden_size < 2 or self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size} but must be even: half for each direction")
        special = (self.pad_id, self.unk_id, self.eos_id, self.bos_id)
        if not all(0 <= word < self.vocab_size for word in special):
            raise ValueError(f"special words are {special} but the vocabulary has {self.vocab_size}")


class PathEncoder(nn.Module):
    """States of a path's steps, from what was chosen and what was seen.

    Args:
        config: sizes.
    """

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        size, half = config.hidden_size, config.hidden_size // 2
        self.lstm = nn.LSTM(config.view_size, half, batch_first=True, bidirectional=True)
        self.attention = SoftDot(size, config.view_size)
        self.post_lstm = nn.LSTM(size, half, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)
        self.feature_dropout = FeatureDropout(config.feature_dropout, config.angle_size)
        self.packed = config.packed

    def forward(
        self, actions: Tensor, panoramas: Tensor, lengths: Tensor, *, features_dropped: bool = False
    ) -> Tensor:
        """Read a batch of paths.

        Args:
            actions: views of the candidates taken, ``[B, S, D]``; zeros for STOP and after the end.
            panoramas: ``[B, S, V, D]``.
            lengths: int64 ``[B]``, steps of each path, STOP's included.
            features_dropped: features come with a dropout of their own.

        Returns:
            ``[B, S, H]``.
        """
        if not features_dropped:
            actions, panoramas = self.feature_dropout(actions), self.feature_dropout(panoramas)
        states = self.dropout(self._run(self.lstm, actions, lengths))
        states = self.dropout(self.attention(states, panoramas))
        return self.dropout(self._run(self.post_lstm, states, lengths))

    def _run(self, lstm: nn.LSTM, states: Tensor, lengths: Tensor) -> Tensor:
        return run_states(lstm, states, lengths) if self.packed else lstm(states)[0]


class Said(NamedTuple):
    """Scores of the next words, and the decoder's state."""

    logits: Tensor
    """``[B, L, vocab]``."""
    hidden: Tensor
    """``[1, B, H]``."""
    cell: Tensor
    """``[1, B, H]``."""


class WordDecoder(nn.Module):
    """Words under a path.

    Args:
        config: sizes.
    """

    def __init__(self, config: SpeakerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.word_size, padding_idx=config.pad_id)
        self.lstm = nn.LSTM(config.word_size, config.hidden_size, batch_first=True)
        self.attention = SoftDot(config.hidden_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        words: Tensor,
        path: Tensor,
        mask: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> Said:
        """Score the word after each word.

        Args:
            words: int64 ``[B, L]``.
            path: ``[B, S, H]`` of `PathEncoder`.
            mask: bool ``[B, S]``, true for steps of the path.
            state: of the words before; zeros at the beginning.
        """
        states, (hidden, cell) = self.lstm(self.dropout(self.embedding(words)), state)
        states = self.dropout(states)
        told = self.attention(states, path[:, None], mask[:, None])
        return Said(self.projection(self.dropout(told)), hidden, cell)


class Speaker(nn.Module):
    """Path encoder and word decoder.

    Args:
        config: sizes and special words.
    """

    def __init__(self, config: SpeakerConfig | None = None) -> None:
        super().__init__()
        self.config = SpeakerConfig() if config is None else config
        self.encoder = PathEncoder(self.config)
        self.decoder = WordDecoder(self.config)

    def forward(
        self, actions: Tensor, panoramas: Tensor, lengths: Tensor, words: Tensor, *,
        features_dropped: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Teacher-forced cross-entropy.

        Args:
            actions: ``[B, S, D]``.
            panoramas: ``[B, S, V, D]``.
            lengths: int64 ``[B]``, steps of each path, STOP's included.
            words: int64 ``[B, L]``: BOS, words, EOS, padding.
            features_dropped: features come with a dropout of their own.

        Returns:
            Cross-entropy of each text summed over its words, ``[B]``, and how many those are, int64 ``[B]``.
        """
        path = self.encoder(actions, panoramas, lengths, features_dropped=features_dropped)
        targets = words[:, 1:]
        said = self.decoder(words[:, :-1], path, length_mask(lengths, path.shape[1]))
        loss = F.cross_entropy(
            said.logits.transpose(1, 2).float(), targets, ignore_index=self.config.pad_id, reduction="none"
        )
        return loss.sum(1), (targets != self.config.pad_id).sum(1)

    @torch.no_grad()
    def speak(
        self, actions: Tensor, panoramas: Tensor, lengths: Tensor, *,
        max_words: int = 120, temperature: float = 0.0, draw: Draw | None = None,
        features_dropped: bool = False,
    ) -> Tensor:  # fmt: skip
        """Say each path; UNK, PAD and BOS are never said.

        Args:
            actions: ``[B, S, D]``.
            panoramas: ``[B, S, V, D]``.
            lengths: int64 ``[B]``.
            max_words: longest text, EOS included.
            temperature: of the draws; 0 takes the likeliest word.
            draw: where the draws come from (see `vln.draws`); PyTorch's own generator by default.
            features_dropped: features come with a dropout of their own.

        Returns:
            int64 ``[B, L]`` with EOS and then padding; without BOS.

        Raises:
            ValueError: a negative temperature, or no word to say.
        """
        path = self.encoder(actions, panoramas, lengths, features_dropped=features_dropped)
        return self.say(path, lengths, max_words=max_words, temperature=temperature, draw=draw)

    @torch.no_grad()
    def say(
        self, path: Tensor, lengths: Tensor, *,
        max_words: int = 120, temperature: float = 0.0, draw: Draw | None = None,
    ) -> Tensor:  # fmt: skip
        """Say paths that have been read, so that several texts of a path need one reading.

        Args:
            path: ``[B, S, H]`` of `PathEncoder`.
            lengths: int64 ``[B]``.
            max_words: longest text, EOS included.
            temperature: of the draws; 0 takes the likeliest word.
            draw: where the draws come from.

        Returns:
            As of `speak`.

        Raises:
            ValueError: a negative temperature, or no word to say.
        """
        if temperature < 0 or max_words < 1:
            raise ValueError(f"temperature {temperature}, max_words {max_words}: give at least 0, at least 1")
        config, count = self.config, len(path)
        mask = length_mask(lengths, path.shape[1])
        word = lengths.new_full((count, 1), config.bos_id)
        open_ = torch.ones(count, dtype=torch.bool, device=word.device)
        state, said = None, []
        for step in range(max_words):
            logits, *state = self.decoder(word, path, mask, None if state is None else tuple(state))
            logits = logits[:, -1].float()
            logits[:, [config.unk_id, config.pad_id, config.bos_id]] = -torch.inf
            word = _choose(logits, temperature, draw, step)
            word = torch.where(open_, word, config.pad_id)[:, None]
            said.append(word)
            open_ &= word[:, 0] != config.eos_id
            if not open_.any():
                break
        return torch.cat(said, dim=1)


def _choose(logits: Tensor, temperature: float, draw: Draw | None, step: int) -> Tensor:
    if not temperature:
        return logits.argmax(-1)
    shares = (logits / temperature).softmax(-1).double().cumsum(-1)
    count = len(logits)
    drawn = torch.rand(count) if draw is None else draw(step, count)
    # Of the last share, that rounding may keep below 1, so that no draw falls behind the last word.
    at = drawn.to(shares)[:, None] * shares[:, -1:]
    return torch.searchsorted(shares, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
