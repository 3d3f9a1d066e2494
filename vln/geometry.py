"""What can be seen and walked to from a pose: the Matterport3D Simulator's formulas, to its last float.

Angles are radians. Heading 0 looks along +y and grows to the right, elevation grows upwards from the horizon.
There are 36 views: view ``12 * row + k`` looks at heading ``k * 30°``, row 0 down, 1 level, 2 up by 30°.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NUM_HEADINGS, NUM_VIEWS = 12, 36
HEADING_STEP = 2 * math.pi / NUM_HEADINGS
ELEVATION_STEP = math.pi / 6
ROW_ELEVATIONS = np.array([-ELEVATION_STEP, 0.0, ELEVATION_STEP])
VIEW_HEADINGS = np.tile(np.arange(NUM_HEADINGS) * HEADING_STEP, 3)
"""float64 ``[36]``."""
VIEW_ELEVATIONS = np.repeat(ROW_ELEVATIONS, NUM_HEADINGS)
"""float64 ``[36]``."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """What a simulator looks through; the default is that of R2R and its descendants.

    Raises:
        ValueError: a size or an angle is outside its range.
    """

    width: int = 640
    """Pixels."""
    height: int = 480
    """Pixels."""
    vfov: float = math.pi / 3
    """Vertical field of view. The horizontal one is ``vfov * width / height``, as in the original."""
    restricted: bool = True
    """Only neighbours inside the horizontal field of view can be walked to."""
    elevation_limits: tuple[float, float] = (-0.94, 0.94)
    """Lowest and highest elevation where angles are continuous."""

    def __post_init__(self) -> None:
        low, high = self.elevation_limits
        if self.width < 1 or self.height < 1 or not 0 < self.vfov < math.pi:
            raise ValueError(
                f"a camera of {self.width}x{self.height} pixels and {self.vfov} rad: give sizes above 0 "
                "and a vertical field of view between 0 and pi"
            )
        if not -math.pi / 2 < low < 0 < high < math.pi / 2:
            raise ValueError(f"elevation_limits are {low} and {high}: expected -pi/2 < low < 0 < high < pi/2")

    @property
    def cosine(self) -> float:
        """Cosine of half the horizontal field of view."""
        return math.cos(self.vfov * self.width / self.height / 2)


class Look(NamedTuple):
    """Neighbours as seen from a pose; arrays of one shape."""

    rel_heading: np.ndarray
    """float32, in [-pi, pi], positive to the right."""
    rel_elevation: np.ndarray
    """float64."""
    navigable: np.ndarray
    """bool."""


class Offsets(NamedTuple):
    """Way from a viewpoint to a neighbour, whatever the pose; arrays of one shape."""

    x: np.ndarray
    y: np.ndarray
    horizontal_squared: np.ndarray
    distance: np.ndarray
    """float32, metres."""
    elevation: np.ndarray
    """float64, absolute."""


def offsets_between(source: np.ndarray, target: np.ndarray) -> Offsets:
    """Way from one position to the other.

    Args:
        source: float32 ``[..., 3]``. The original rounds so, which moves headings by up to 7e-4.
        target: the same.
    """
    x, y, z = np.moveaxis(target - source, -1, 0)
    squared = x * x + y * y
    elevation = np.arctan2(z.astype(np.float64), np.sqrt(squared).astype(np.float64))
    return Offsets(x, y, squared, np.sqrt(squared + z * z), elevation)


def look(offsets: Offsets, heading: np.ndarray, elevation: np.ndarray, camera: Camera) -> Look:
    """Neighbours from a pose. Whether one is navigable depends on the heading alone, never on the elevation.

    Args:
        offsets: ways to the neighbours.
        heading: float64, of a shape that broadcasts with the offsets'.
        elevation: the same.
        camera: its field of view, and whether navigation is restricted to it.
    """
    angle = math.pi / 2 - heading
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    x, y, squared = offsets[:3]
    ahead, right = x * cosine + y * sine, x * sine - y * cosine
    # In float64, then rounded: closer to the C library's atan2f than NumPy's own in float32.
    rel_heading = np.arctan2(right.astype(np.float64), ahead.astype(np.float64)).astype(np.float32)
    # A neighbour straight above or below has no heading; signed zeros would make it one of pi.
    rel_heading = np.where(squared == 0, np.float32(0), rel_heading)
    rel_elevation = offsets.elevation - elevation
    if not camera.restricted:
        return Look(rel_heading, rel_elevation, np.ones(rel_heading.shape, dtype=bool))
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(1) / np.sqrt(squared)
        # Normalised first and then projected, as the original does: the last bit decides at the border.
        projected = (x * inverse) * cosine + (y * inverse) * sine
    return Look(rel_heading, rel_elevation, projected.astype(np.float64) >= camera.cosine)


def wrap_heading(heading: np.ndarray) -> np.ndarray:
    """Heading in [0, 2 pi], both ends included, as C's ``fmod`` leaves it."""
    wrapped = np.fmod(heading, 2 * math.pi)
    return np.where(wrapped < 0, wrapped + 2 * math.pi, wrapped)


def nearest_view(heading: np.ndarray, elevation: np.ndarray) -> np.ndarray:
    """View that a pose snaps to, int64: halves turn right, and exactly 15° up or down is level."""
    turns = wrap_heading(heading) / HEADING_STEP
    whole = np.floor(turns)
    k = (whole + (turns - whole >= 0.5)).astype(np.int64) % NUM_HEADINGS
    row = 1 + (elevation > ELEVATION_STEP / 2) - (elevation < -ELEVATION_STEP / 2).astype(np.int64)
    return NUM_HEADINGS * row + k


def turn_table() -> np.ndarray:
    """View after a turn, int64 ``[36 * 9]``: entry ``9 * view + 3 * sign(heading) + sign(elevation) + 4``."""
    row, k = np.divmod(np.arange(NUM_VIEWS), NUM_HEADINGS)
    sign = np.arange(-1, 2)
    new_k = (k[:, None] + sign) % NUM_HEADINGS
    new_row = np.clip(row[:, None] + sign, 0, 2)
    return (NUM_HEADINGS * new_row[:, None, :] + new_k[:, :, None]).reshape(-1)


def views_between(view: int, target: int) -> list[int]:
    """Views an agent passes on its way to another, the last included: levels first, then right turns alone.

    That is how published trajectories turn, one pose a simulator call; from a view to itself there is none.

    Example:
        >>> views_between(12, 1)
        [0, 1]
        >>> views_between(13, 12)[-2:], len(views_between(13, 12))
        ([23, 12], 11)
    """
    (row, k), (target_row, target_k) = divmod(view, NUM_HEADINGS), divmod(target, NUM_HEADINGS)
    passed = []
    while row != target_row:
        row += 1 if target_row > row else -1
        passed.append(NUM_HEADINGS * row + k)
    while k != target_k:
        k = (k + 1) % NUM_HEADINGS
        passed.append(NUM_HEADINGS * row + k)
    return passed
