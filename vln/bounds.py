"""Bounds of numbers in configurations."""

from __future__ import annotations

import math
from typing import Any


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise unless fields of a configuration are finite and not too small.

    Args:
        config: any object.
        least: smallest value that may be.
        names: of its fields.

    Raises:
        ValueError: a field is smaller, infinite or not a number; the text names it.
    """
    for name in names:
        if not least <= getattr(config, name) < math.inf:  # nor NaN, which passes a plain <
            raise ValueError(f"{name} is {getattr(config, name)}: give at least {least}")
