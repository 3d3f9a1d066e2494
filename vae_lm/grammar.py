"""A seeded corpus of English sentences whose factors are known, so that the truth of an analogy is known.

Seven factors (who, when, does what, to how many, of what, where, said how) combine freely: every combination
is one correct sentence, no two give the same, and a sentence tells all seven. Nothing is downloaded, and the
same seed gives the same sentences on every machine. All is in lower case, as in PTB and SNLI.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from typing import NamedTuple

FACTORS: dict[str, tuple[str, ...]] = {
    "subject": ("baker", "pilot", "king", "clown", "monk", "friend", "girl", "nurse"),
    "number": ("one", "two"),
    "tense": ("present", "past", "future"),
    "action": (
        *("painting", "selling", "hiding", "cleaning"),
        *("carrying", "repairing", "drawing", "buying"),
    ),
    "object": ("flag", "basket", "chair", "clock", "drum", "bicycle", "barrel", "violin"),
    "place": (
        *("in the garden", "at the market", "near the river"),
        *("behind the school", "on the bridge", "under the old oak"),
    ),
    "mood": ("statement", "negation", "question", "guess"),
}
"""Values of every factor, in the order of `Factors`; the number is that of the object."""

_VERBS = {"present": ("is", ""), "past": ("was", ""), "future": ("will", " be")}
"""What a question puts first, and what it leaves behind."""

VOCAB_SIZE = 400
"""Of a vocabulary for these sentences, so small that a plural is the pieces of its noun and an s: were it one
piece, nothing would tell a network what two of the things have in common with one."""

NUM_COMBINATIONS = math.prod(map(len, FACTORS.values()))

TRAIN_SHARE, VALID_SHARE = 0.2, 0.02


class Factors(NamedTuple):
    """What a sentence says; each field holds one of the values in ``FACTORS``."""

    subject: str
    number: str
    tense: str
    action: str
    object: str
    place: str
    mood: str


class AnalogyItem(NamedTuple):
    """Four sentences: D is to C what B is to A, and ``factor`` is the one that B changes."""

    factor: str
    a: str
    b: str
    c: str
    d: str


def sentence(factors: Factors) -> str:
    """The sentence of a combination.

    Args:
        factors: one value of each factor.

    Returns:
        9 to 12 words in lower case, with a full stop or question mark.

    Raises:
        ValueError: a value that its factor does not have.

    Example:
        >>> sentence(Factors("monk", "two", "past", "hiding", "drum", "near the river", "question"))
        'was the monk hiding two drums near the river?'
    """
    for name, value in factors._asdict().items():
        if value not in FACTORS[name]:
            raise ValueError(f"{name} is {value!r} but must be one of {', '.join(FACTORS[name])}")
    return _said(factors)


def _said(factors: Factors) -> str:
    who, (verb, rest) = f"the {factors.subject}", _VERBS[factors.tense]
    things = f"{factors.object}s" if factors.number == "two" else factors.object
    what = f"{factors.action} {factors.number} {things} {factors.place}"
    if factors.mood == "question":
        return f"{verb} {who}{rest} {what}?"
    if factors.mood == "negation":
        return f"{who} {verb} not{rest} {what}."
    perhaps = "perhaps " if factors.mood == "guess" else ""
    return f"{perhaps}{who} {verb}{rest} {what}."


def factors_of(text: str) -> Factors:
    """The combination that a sentence says.

    Args:
        text: exactly as `sentence` writes it; blanks around it do not matter.

    Raises:
        ValueError: not a sentence of this grammar.

    Example:
        >>> factors_of("perhaps the nurse was selling one clock at the market.").tense
        'past'
    """
    try:
        return _sentences()[text.strip()]
    except KeyError:
        raise ValueError(
            f"{text!r} is not a sentence of the grammar: write it exactly as sentence() does, full stop "
            "included"
        ) from None


def splits(seed: int = 0) -> dict[str, list[str]]:
    """All sentences, each in one of three sets, in an order drawn by the seed.

    Args:
        seed: draws the sets.

    Returns:
        "train" (20 % of all, rounded down), "valid" (2 %) and "test" (the rest). Every value of every factor
        occurs hundreds of times in "train".
    """
    return {name: list(texts) for name, texts in zip(("train", "valid", "test"), _split(seed), strict=True)}


def analogy_items(seed: int, count: int, *, split_seed: int = 0) -> list[AnalogyItem]:
    """Analogies whose answer no training sentence gives away.

    A and B, any two sentences, differ in one factor. C shares A's value of it and differs from A in at least
    three others. D is C with B's value of that factor; it is none of A, B and C. C and D come from the test
    set. The factors take turns.

    Args:
        seed: draws the items.
        count: how many.
        split_seed: seed of the `splits` that the model was trained on.

    Returns:
        ``count`` items; fewer of the same seed are the first of these.

    Raises:
        ValueError: a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count} but the number of items cannot be negative")
    *_, test = _split(split_seed)
    held_out = frozenset(test)
    generator = random.Random(seed)
    turns = itertools.islice(itertools.cycle(FACTORS), count)
    return [_analogy_item(generator, factor, held_out, test) for factor in turns]


def _analogy_item(
    generator: random.Random, factor: str, held_out: frozenset[str], test: tuple[str, ...]
) -> AnalogyItem:
    while True:
        a = Factors(*(_pick(generator, values) for values in FACTORS.values()))
        others = tuple(value for value in FACTORS[factor] if value != getattr(a, factor))
        b = a._replace(**{factor: _pick(generator, others)})
        c = _sentences()[_pick(generator, test)]
        if getattr(c, factor) != getattr(a, factor) or sum(x != y for x, y in zip(a, c, strict=True)) < 3:
            continue
        d = _said(c._replace(**{factor: getattr(b, factor)}))
        if d in held_out:
            return AnalogyItem(factor, _said(a), _said(b), _said(c), d)


def _pick(generator: random.Random, values: tuple[str, ...]) -> str:
    # random() is the one draw that Python promises to repeat in later versions.
    return values[int(generator.random() * len(values))]


@functools.cache
def _sentences() -> dict[str, Factors]:
    """Every sentence with its combination."""
    combinations = itertools.starmap(Factors, itertools.product(*FACTORS.values()))
    return {_said(factors): factors for factors in combinations}


@functools.lru_cache(maxsize=4)
def _split(seed: int) -> tuple[tuple[str, ...], ...]:
    def digest(text: str) -> bytes:
        # A shuffle by digests does not depend on the version of any generator.
        return hashlib.blake2b(f"{seed}\t{text}".encode(), digest_size=16).digest()

    texts = sorted(_sentences(), key=digest)
    num_train, num_valid = int(len(texts) * TRAIN_SHARE), int(len(texts) * VALID_SHARE)
    return (
        tuple(texts[:num_train]),
        tuple(texts[num_train : num_train + num_valid]),
        tuple(texts[num_train + num_valid :]),
    )
