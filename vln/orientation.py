"""Orientation of views and candidates as numbers beside their features.

Only sine and cosine of heading and elevation carry information; they are repeated to a width of A. Two
layouts exist: ``blocks`` = [sin h ... | cos h ... | sin e ... | cos e ...] of the pre-training, and
``interleaved`` = [sin h, cos h, sin e, cos e] over and over, of the released R2R agents.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import numpy as np

from vln.geometry import HEADING_STEP, NUM_HEADINGS, NUM_VIEWS, VIEW_ELEVATIONS
from vln.model import Orientation


def angle_features(
    heading: Any, elevation: Any, *, size: int = 128, layout: Orientation = "blocks"
) -> np.ndarray:
    """Numbers of a direction.

    Args:
        heading: radians, any shape; need not be wrapped.
        elevation: radians, of a shape that broadcasts with it.
        size: A, a multiple of 4.
        layout: of the numbers.

    Returns:
        float32 ``[..., A]``.

    Raises:
        ValueError: ``size`` is no positive multiple of 4, or ``layout`` is another.

    Example:
        >>> angle_features(np.pi / 2, 0.0, size=8).round(3).tolist()
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    if size < 4 or size % 4:
        raise ValueError(f"an orientation of {size} numbers: give a positive multiple of 4")
    if layout not in get_args(Orientation):
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(get_args(Orientation))}")
    heading, elevation = np.broadcast_arrays(
        np.asarray(heading, dtype=np.float64), np.asarray(elevation, dtype=np.float64)
    )
    four = np.stack([np.sin(heading), np.cos(heading), np.sin(elevation), np.cos(elevation)], axis=-1)
    repeated = np.repeat(four, size // 4, axis=-1) if layout == "blocks" else np.tile(four, size // 4)
    return repeated.astype(np.float32)


@lru_cache(maxsize=8)
def panorama_table(size: int, layout: Orientation) -> np.ndarray:
    """Numbers of all views for every heading of the agent.

    Returns:
        float32 ``[12, 36, A]``, not to be written to: views in absolute order, headings as seen from the
        agent's, elevations absolute.
    """
    ahead = np.arange(NUM_HEADINGS)[:, None]
    relative = (np.arange(NUM_VIEWS) - ahead) % NUM_HEADINGS * HEADING_STEP
    table = angle_features(relative, VIEW_ELEVATIONS, size=size, layout=layout)
    table.setflags(write=False)
    return table


def with_panorama_angles(
    features: np.ndarray, view: Any, *, size: int = 128, layout: Orientation = "blocks"
) -> np.ndarray:
    """Features of all views with their orientation behind.

    Args:
        features: ``[B, 36, F]``.
        view: integers ``[B]``: where each row looks, 0 to 35.
        size: A.
        layout: of the numbers.

    Returns:
        float32 ``[B, 36, F + A]``.

    Raises:
        ValueError: as of `angle_features`.
    """
    angles = panorama_table(size, layout)[np.asarray(view) % NUM_HEADINGS]
    return np.concatenate([np.asarray(features, dtype=np.float32), angles], axis=-1)


def candidate_views(
    features: np.ndarray,
    point_id: Any,
    rel_heading: Any,
    rel_elevation: Any,
    *,
    size: int = 128,
    layout: Orientation = "blocks",
) -> np.ndarray:
    """Views of candidates with their own direction behind; zeros for STOP and behind the list.

    Args:
        features: of all views, ``[B, 36, F]``.
        point_id: view that shows each candidate, integers ``[B, C]``; -1 for none.
        rel_heading: of the candidates as the agent looks, radians ``[B, C]``.
        rel_elevation: above the horizon, radians ``[B, C]``.
        size: A.
        layout: of the numbers.

    Returns:
        float32 ``[B, C, F + A]``.

    Raises:
        ValueError: as of `angle_features`.
    """
    view = np.asarray(point_id, dtype=np.int64)
    shown = np.take_along_axis(features, np.maximum(view, 0)[..., None], axis=1)
    angles = angle_features(rel_heading, rel_elevation, size=size, layout=layout)
    found = np.concatenate([np.asarray(shown, dtype=np.float32), angles], axis=-1)
    found[view < 0] = 0
    return found
