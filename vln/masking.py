"""Masked words of the pre-training: which words are hidden, and behind what (Hao et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vln.draws import MASKS, uniforms

SHARE = 0.15
"""Of the words, those that are to be predicted."""
_AS_MASK, _AS_ANY = 0.8, 0.9
"""Draws below the first become [MASK], below the second any word; the rest stays."""


class Masked(NamedTuple):
    """Words with some hidden."""

    input_ids: np.ndarray
    """int64 ``[B, T]``."""
    labels: np.ndarray
    """int64 ``[B, T]``: the word where it is to be predicted, else -1."""


def mask_words(
    token_ids: Any,
    *,
    vocab_size: int,
    special_ids: Sequence[int],
    mask_id: int,
    seed: int,
    step: int,
    items: Any,
    share: float = SHARE,
) -> Masked:
    """Hide words, anew at every step, the same for an item whatever batch it comes in.

    Each word is chosen on its own. Of those chosen 80 % become [MASK], 10 % any word of the vocabulary,
    special ones included as in the original, and 10 % stay.

    Args:
        token_ids: int64 ``[B, T]``.
        vocab_size: words to draw from.
        special_ids: never chosen: [CLS], [SEP], [PAD], [MASK], [UNK].
        mask_id: of [MASK].
        seed: of the run.
        step: of the training.
        items: integers ``[B]``, the rows' own numbers.
        share: of words chosen.

    Raises:
        ValueError: ``share`` is outside [0, 1], or a number is negative.

    Example:
        >>> masked = mask_words([[7, 8, 9]], vocab_size=10, special_ids=[0], mask_id=1, seed=0, step=0,
        ...     items=[0], share=1.0)
        >>> masked.labels.tolist()
        [[7, 8, 9]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: give a share of the words, from 0 to 1")
    ids = np.asarray(token_ids, dtype=np.int64)
    # A column's draws must not depend on how wide the batch is: its numbers come from its own place.
    choose, how, word = np.moveaxis(
        uniforms(seed, MASKS, step, items, 3 * ids.shape[1]).reshape(*ids.shape, 3), -1, 0
    )
    chosen = (choose < share) & ~np.isin(ids, np.asarray(special_ids))
    hidden = np.where(how < _AS_MASK, mask_id, (word * vocab_size).astype(np.int64))
    hidden = np.where(how < _AS_ANY, hidden, ids)
    return Masked(np.where(chosen, hidden, ids), np.where(chosen, ids, -1))
