"""Stored results of original implementations, and the record of which of them our code reproduced.

A checker recomputes every array of a file; one that nobody recomputed is a failure too, so a pass means that
the whole file was reproduced.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Tolerance(NamedTuple):
    """Allowed difference: ``relative * |expected| + of_scale * max |expected| + absolute``."""

    relative: float
    of_scale: float
    absolute: float = 0.0


EXACT = Tolerance(0.0, 0.0)


OUTPUTS = Tolerance(1e-4, 1e-5)
GRADIENT_NORMS = Tolerance(1e-3, 1e-6)


class Comparison(NamedTuple):
    """One reproduced array: its largest error, also as a share of what is allowed there."""

    name: str
    ratio: float
    error: float


class Case:
    """One golden file, and the record of what has been done with each of its arrays.

    Args:
        path: the file.
        arrays: everything in it but the metadata.
        meta: its metadata; a table of gradient norms in there counts as an array.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.path, self.arrays, self.meta = path, arrays, meta
        self.comparisons: list[Comparison] = []
        self.failures: list[str] = []
        self.left: dict[str, str] = {}
        self._tables = {f"meta.{key}" for key, value in meta.items() if "norms" in key and value}
        self._open = set(arrays) | self._tables
        self._inputs: set[str] = set()

    def use(self, key: str) -> Tensor:
        """An input or a state as a tensor of its own, marked as dealt with."""
        if key not in self.arrays:
            raise KeyError(f"array {key} is missing")
        self._open.discard(key)
        self._inputs.add(key)
        return torch.from_numpy(np.array(self.arrays[key]))

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Arrays that a checker found in a document, to be reproduced like those of an archive."""
        self.arrays = {**self.arrays, **arrays}
        self._open |= set(arrays)

    def leave(self, keys: Iterable[str], reason: str) -> None:
        """Arrays that nothing of ours can recompute yet: they are named, neither passed nor failed."""
        self.left |= dict.fromkeys(keys, reason)
        self._open -= set(self.left)

    def compare(self, key: str, value: Tensor, tolerance: Tolerance, *, by_column: bool = False) -> None:
        """Compare a recomputed array, if the file stores it; integers must be equal.

        With ``by_column`` the tolerance of every column counts from that column's own largest magnitude.
        """
        if key not in self.arrays:
            return
        self._open.discard(key)
        expected, ours = np.asarray(self.arrays[key]), value.detach().cpu().numpy()
        if expected.shape != ours.shape:
            self.failures.append(f"{key} has shape {list(expected.shape)} but ours {list(ours.shape)}")
            return
        self._record(key, ours, expected, tolerance, by_column=by_column)

    def compare_table(self, key: str, values: Mapping[str, float], tolerance: Tolerance) -> None:
        """Compare a table of norms in the metadata, if there; its scale is its largest entry."""
        if key not in self.meta:
            return
        table = self.meta[key]
        self._open.discard(f"meta.{key}")
        if table.keys() != values.keys():
            odd = ", ".join(sorted(table.keys() ^ values.keys())[:5])
            self.failures.append(f"meta.{key} and ours do not name the same entries: {odd}")
            return
        expected = np.array([table[name] for name in values], dtype=np.float64)
        self._record(f"meta.{key}", np.array(list(values.values())), expected, tolerance)

    def compare_number(self, name: str, value: float, expected: float, tolerance: Tolerance) -> None:
        """Compare a number that follows from the file without being stored in it."""
        self._record(name, np.asarray(value), np.asarray(expected), tolerance)

    def require(self, condition: bool, message: str) -> None:
        """Note a failure unless the condition holds."""
        if not condition:
            self.failures.append(message)

    def finish(self) -> None:
        """Turn arrays that nobody used or compared into a failure, and a file without results as well."""
        if not self.comparisons and not self.failures and not self.left:
            self.failures.append("the file stores no result to compare with")
        if self._open:
            names = sorted(self._open)
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self.failures.append(f"not reproduced: {', '.join(names[:5])}{rest}")

    @property
    def counts(self) -> tuple[int, int]:
        """Arrays reproduced within tolerance, and arrays to reproduce."""
        total = (set(self.arrays) | self._tables) - self._inputs
        return len({item.name for item in self.comparisons if item.ratio <= 1} & total), len(total)

    def _record(
        self,
        name: str,
        ours: np.ndarray,
        expected: np.ndarray,
        tolerance: Tolerance,
        *,
        by_column: bool = False,
    ) -> None:
        item = Comparison(name, *_measure(ours, expected, tolerance, by_column=by_column))
        self.comparisons.append(item)
        if item.ratio > 1:
            self.failures.append(f"{name} is off by {item.error:.3g}, {item.ratio:.3g} times its tolerance")


def _measure(
    ours: np.ndarray, expected: np.ndarray, tolerance: Tolerance, *, by_column: bool
) -> tuple[float, float]:
    """Largest error as a share of its allowance, and the largest error itself."""
    if expected.size == 0:
        return 0.0, 0.0
    if expected.dtype.kind in "iub":
        wrong = ours.dtype.kind not in "iub" or bool((ours != expected).any())
        return (np.inf if wrong else 0.0), float(np.abs(ours.astype(float) - expected.astype(float)).max())
    ours, expected = ours.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(expected).all()):
        same = np.array_equal(ours, expected, equal_nan=True)
        return (0.0, 0.0) if same else (np.inf, np.inf)
    error, size = np.abs(ours - expected), np.abs(expected)
    # The codes of one dictionary may differ by 1e5: one scale for all would let small ones be anything.
    scale = size.max(axis=0, keepdims=True) if by_column else size.max()
    allowed = tolerance.relative * size + tolerance.of_scale * scale + tolerance.absolute
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(ratio.max()), float(error.max())


# ---- fq: the layer in both original semantics, and a discriminator that carries it


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of every gradient there is, by parameter."""
    return {
        name: float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def read_case(path: Path) -> Case:
    """Everything in a golden file; JSON files are left to their checker, which has the path.

    Raises:
        Exception: whatever a damaged archive or metadata makes NumPy or ``json`` raise.
    """
    if path.suffix != ".npz":
        return Case(path, {}, {})
    # Opened here: NumPy leaves a damaged archive open when it gives up.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    # Where "config" is text it is metadata too; elsewhere it is an array of the file.
    texts = [
        key for key in ("meta", "meta_json", "config") if key in arrays and arrays[key].dtype.kind == "U"
    ]
    metas = [str(arrays.pop(key)) for key in texts]
    meta = json.loads(metas[0]) if metas else {}
    return Case(path, arrays, meta if isinstance(meta, dict) else {"meta": meta})
