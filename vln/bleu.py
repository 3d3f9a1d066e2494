"""The BLEU score by which the original chose its speakers.

It differs from sacrebleu's in two points: texts come as tokens, and the brevity penalty compares with the
shortest of the references of each text, not with the closest one. Report sacrebleu's beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Tokens = Sequence[Hashable]


class Bleu(NamedTuple):
    """A corpus score; shares, not percent."""

    score: float
    precisions: tuple[float, ...]
    """Of 1-grams, 2-grams, ..."""
    brevity_penalty: float


def corpus_bleu(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], *, order: int = 4
) -> Bleu:
    """BLEU of a corpus (Papineni et al., 2002), unsmoothed.

    Args:
        candidates: one text each, as tokens.
        references: of each candidate, at least one.
        order: longest n-gram.

    Raises:
        ValueError: another number of references than of candidates, a candidate without any, or no order.

    Example:
        >>> corpus_bleu(["go left now please".split()], [["go left now please".split()]]).score
        1.0
    """
    if len(candidates) != len(references) or not all(references) or order < 1:
        raise ValueError(
            f"{len(candidates)} texts have {len(references)} lists of references, order {order}: give each "
            "text at least one reference, and an order of at least 1"
        )
    matched, possible, length, shortest = [0] * order, [0] * order, 0, 0
    for candidate, texts in zip(candidates, references, strict=True):
        length, shortest = length + len(candidate), shortest + min(map(len, texts))
        for size in range(1, order + 1):
            most: Counter[tuple[Hashable, ...]] = Counter()
            for text in texts:
                most |= _ngrams(text, size)
            matched[size - 1] += (_ngrams(candidate, size) & most).total()
            possible[size - 1] += max(0, len(candidate) - size + 1)
    precisions = tuple(m / p if p else 0.0 for m, p in zip(matched, possible, strict=True))
    penalty = 1.0 if length > shortest or not shortest else math.exp(1 - shortest / length) if length else 0.0
    if min(precisions) == 0:
        return Bleu(0.0, precisions, penalty)
    return Bleu(penalty * math.exp(sum(map(math.log, precisions)) / order), precisions, penalty)


def _ngrams(tokens: Tokens, size: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[first : first + size]) for first in range(len(tokens) - size + 1))
