"""Random numbers that depend on (seed, purpose, step, item) alone, not on batches, processes or order.

A counter-based generator: the numbers are hashes (the finaliser of SplitMix64, Steele et al., 2014), so a
whole batch is drawn at once, and an item's draws are the same wherever it is processed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GAMMA, _FIRST, _SECOND = (
    np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)

MASKS, ACTIONS, WORDS, FEATURES = range(4)
"""Purposes: draws for one tell nothing about those for another."""


def uniforms(seed: int, purpose: int, step: int, items: Any, count: int) -> np.ndarray:
    """Uniform numbers for each item.

    Args:
        seed: of the run.
        purpose: one of those above, or any number of your own.
        step: of the training, or whatever must draw anew.
        items: integers ``[N]``, at least 0: the items' own numbers, not their places in a batch.
        count: numbers for each.

    Returns:
        float64 ``[N, count]`` in [0, 1).

    Raises:
        ValueError: a negative number.

    Example:
        >>> together = uniforms(1, MASKS, 5, [10, 20], 3)
        >>> bool((together[1] == uniforms(1, MASKS, 5, [20], 3)[0]).all())
        True
    """
    rows = np.asarray(items, dtype=np.int64).reshape(-1)
    if min(seed, purpose, step, count, int(rows.min(initial=0))) < 0:
        raise ValueError(
            f"seed {seed}, purpose {purpose}, step {step}, count {count} and the items must be at least 0"
        )
    state = np.zeros((1, 1), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is meant
        for part in (
            np.full((1, 1), seed), np.full((1, 1), purpose), np.full((1, 1), step), rows[:, None],
            np.arange(count)[None],
        ):  # fmt: skip
            state = _mix(state + _GAMMA * (part.astype(np.uint64) + np.uint64(1)))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))
