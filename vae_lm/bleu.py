"""BLEU of generated texts: against real ones, and against each other.

Words are what blanks separate. A score of a text is sentence BLEU with equal weights of n-grams of 1 to
``order`` words (Papineni et al. 2002) and smoothing method 1 of Chen and Cherry (2014): an order without
any match counts as a match of 0.1. The score of a set is the mean over its texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

_NO_MATCH = 0.1
"""Epsilon of smoothing method 1."""

Words = tuple[str, ...]


def bleu(texts: Sequence[str], references: Sequence[str], *, order: int = 5) -> float:
    """Mean BLEU of texts, each against all references.

    Args:
        texts: to score.
        references: real texts.
        order: longest n-gram.

    Returns:
        In [0, 1]; 1 if every text is one of the references of ``order`` words or more.

    Raises:
        ValueError: no text, no reference, or an order below 1.

    Example:
        >>> round(bleu(["the cat sat here"], ["the cat sat there"], order=2), 4)
        0.7071
    """
    _check(texts, references, order)
    most: Counter[Words] = Counter()
    for reference in references:
        most |= _ngrams(reference.split(), order)
    lengths = [len(reference.split()) for reference in references]
    return sum(_score(text.split(), most, lengths, order) for text in texts) / len(texts)


def self_bleu(texts: Sequence[str], *, order: int = 5) -> float:
    """Mean BLEU of each text against all the others; the lower, the more varied they are (Zhu et al. 2018).

    Args:
        texts: two or more.
        order: longest n-gram.

    Returns:
        In [0, 1].

    Raises:
        ValueError: fewer than two texts, or an order below 1.

    Example:
        >>> self_bleu(["a b c", "a b c", "a b c"], order=2)
        1.0
    """
    _check(texts, texts[1:], order)
    counts = [_ngrams(text.split(), order) for text in texts]
    # The largest count among the others is the largest of all, or the second where it is a text's own.
    first: Counter[Words] = Counter()
    second: Counter[Words] = Counter()
    for own in counts:
        for ngram, count in own.items():
            if count > first[ngram]:
                first[ngram], second[ngram] = count, first[ngram]
            elif count > second[ngram]:
                second[ngram] = count
    lengths = [len(text.split()) for text in texts]
    total = 0.0
    for index, (text, own) in enumerate(zip(texts, counts, strict=True)):
        others = {
            ngram: second[ngram] if count == first[ngram] else first[ngram] for ngram, count in own.items()
        }
        total += _score(text.split(), others, lengths[:index] + lengths[index + 1 :], order)
    return total / len(texts)


def _check(texts: Sequence[str], references: Sequence[str], order: int) -> None:
    if not texts or not references or order < 1:
        raise ValueError(
            f"BLEU-{order} of {len(texts)} texts against {len(references)} references: at least one of each, "
            "and n-grams of at least one word, were expected"
        )


def _ngrams(words: Sequence[str], order: int) -> Counter[Words]:
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, order + 1)
        for start in range(len(words) - size + 1)
    )


def _score(words: Sequence[str], most: dict[Words, int], lengths: Iterable[int], order: int) -> float:
    matches, totals = [0.0] * order, [0] * order
    for ngram, count in _ngrams(words, order).items():
        matches[len(ngram) - 1] += min(count, most.get(ngram, 0))
        totals[len(ngram) - 1] += count
    if not matches[0]:  # not a word in common
        return 0.0
    precisions = [(match or _NO_MATCH) / max(total, 1) for match, total in zip(matches, totals, strict=True)]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    brevity = min(0.0, 1 - closest / len(words))
    return math.exp(brevity + sum(map(math.log, precisions)) / order)
