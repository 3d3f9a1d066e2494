"""View features of a house: what each of the 36 views shows, as a noisy mixture of directions.

Every noun and every colour has a direction of its own, all orthogonal. A view is the sum over the visible
things of those of noun and colour, the stronger the nearer to the middle of the view and to the viewer. A
house adds a tint of its own, and every view noise, so that words must be matched to views and no view can be
learnt by heart.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vln.geometry import NUM_VIEWS, VIEW_ELEVATIONS, VIEW_HEADINGS
from vln.house_plans import COLOURS, NOUNS, House

NUM_CONCEPTS = len(NOUNS) + len(COLOURS) + 1
"""Nouns, colours, and how much is within reach."""
_NEAR = NUM_CONCEPTS - 1
_WIDTH = np.radians(16.0)
"""Of the bell with which a thing fades from the middle of a view."""
_HALF_DISTANCE = 3.0
"""Metres at which a thing counts for half."""
_REACH = 1.5
"""Metres."""


@lru_cache(maxsize=8)
def concept_vectors(feature_size: int) -> np.ndarray:
    """Direction of every concept, float32 ``[NUM_CONCEPTS, D]``, orthonormal rows, the same in all worlds.

    Raises:
        ValueError: there are fewer directions than concepts.
    """
    if feature_size < NUM_CONCEPTS:
        raise ValueError(
            f"feature_size is {feature_size}: {NUM_CONCEPTS} nouns and colours need at least as many"
        )
    drawn = np.random.default_rng(20200316).normal(size=(feature_size, NUM_CONCEPTS))
    return np.linalg.qr(drawn)[0].T.astype(np.float32)


def concept_strengths(house: House) -> np.ndarray:
    """How strongly each view shows each concept, float32 ``[V, 36, NUM_CONCEPTS]``, without noise."""
    viewpoint, thing = np.nonzero(house.visible)
    offset = house.positions[thing] - house.graph.positions[viewpoint]
    flat = np.hypot(offset[:, 0], offset[:, 1])
    heading, elevation = np.arctan2(offset[:, 0], offset[:, 1]), np.arctan2(offset[:, 2], flat)
    beside = np.remainder(heading[:, None] - VIEW_HEADINGS + np.pi, 2 * np.pi) - np.pi
    above = elevation[:, None] - VIEW_ELEVATIONS
    bell = np.exp(-(beside**2 + above**2) / (2 * _WIDTH**2))  # [P, 36]
    shown = bell / (1 + flat / _HALF_DISTANCE)[:, None]
    strengths = np.zeros((len(house.room_of), NUM_VIEWS, NUM_CONCEPTS))
    views = np.arange(NUM_VIEWS)
    colour = house.colours[thing]
    np.add.at(strengths, (viewpoint[:, None], views, house.nouns[thing][:, None]), shown)
    tinted = colour >= 0
    place = (len(NOUNS) + colour)[tinted, None]
    np.add.at(strengths, (viewpoint[tinted, None], views, place), shown[tinted])
    reached = bell * np.exp(-flat / _REACH)[:, None]
    np.add.at(strengths, (viewpoint[:, None], views, np.full_like(place, _NEAR, shape=(1, 1))), reached)
    return strengths.astype(np.float32)


def view_features(
    house: House, random: np.random.Generator, *, feature_size: int = 64, noise: float = 0.05
) -> np.ndarray:
    """Features of all views of a house, float32 ``[V, 36, D]``.

    Args:
        house: what there is to see.
        random: source of tint and noise.
        feature_size: D.
        noise: standard deviation in every direction; a thing in the middle of a view and within reach counts
            1. The tint's is the same.

    Raises:
        ValueError: ``feature_size`` is below the number of concepts.
    """
    clean = concept_strengths(house) @ concept_vectors(feature_size)
    tint = random.normal(0, noise, feature_size)
    drawn = random.standard_normal(clean.shape, dtype=np.float32)
    return clean + np.float32(noise) * drawn + tint.astype(np.float32)
