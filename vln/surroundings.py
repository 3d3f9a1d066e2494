"""What agents see and where they should go: panoramas as tensors, distances, ways to waypoints.

Letters of shapes: B rows, V views (36), C candidates, P waypoints, F image features of a view, A orientation
numbers, D both together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vln.candidates import Panorama
from vln.draws import uniforms
from vln.model import Orientation, PrevalentConfig
from vln.orientation import angle_features, candidate_views, with_panorama_angles
from vln.walks import NextHops, PanoramaFeatures
from vln.world import World

_ENVIRONMENT = 100
"""Purpose of the draws (see `vln.draws`) for environment dropout."""


class Clock:
    """Seconds spent in the parts of a rollout; waits for the device at every part's end.

    Args:
        timer: gives seconds, of the wall by default.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._timer = timer

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part."""
        started = self._timer()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + self._timer() - started

    def share(self, *parts: str) -> float:
        """Share of parts in the whole, 0 before anything was measured."""
        whole = sum(self.seconds.values())
        return sum(self.seconds.get(part, 0.0) for part in parts) / whole if whole else 0.0


class Views(NamedTuple):
    """What some rows see at one moment."""

    angle: Tensor
    """Own orientation, float32 ``[B, A]``."""
    panorama: Tensor
    """float32 ``[B, 36, D]``."""
    candidates: Tensor
    """float32 ``[B, C, D]``; zeros for STOP and behind the list."""
    num_candidates: Tensor
    """int64 ``[B]``, STOP included."""


class Surroundings:
    """World, features and the form in which a model wants them.

    Args:
        world: the scans.
        features: of their viewpoints.
        angle_size: A.
        orientation: layout of the orientation numbers.
        feature_scale: factor of the features.
        device: of the tensors.
    """

    def __init__(
        self, world: World, features: PanoramaFeatures, *, angle_size: int, orientation: Orientation,
        feature_scale: float = 1.0, device: Any = "cpu",
    ) -> None:  # fmt: skip
        self.world, self.features, self.device = world, features, torch.device(device)
        self.orientation = orientation
        self._scale = np.float32(feature_scale)
        self._form: dict[str, Any] = {"size": angle_size, "layout": orientation}
        self.hops, self.distances = NextHops(world), Distances(world)

    @classmethod
    def of(
        cls, model: PrevalentConfig, world: World, features: PanoramaFeatures, *, device: Any = "cpu"
    ) -> Surroundings:
        """In the form that a pre-trained model was trained with."""
        orientation: Any = model.orientation
        return cls(
            world, features, angle_size=model.angle_size, orientation=orientation,
            feature_scale=model.feature_scale, device=device,
        )  # fmt: skip

    def gather(self, viewpoints: np.ndarray) -> np.ndarray:
        """Features of viewpoints by the world's numbers, scaled, each read once: ``[B, 36, F]``."""
        places, back = np.unique(viewpoints, return_inverse=True)
        scans, names = self.world.scan_ids, self.world.viewpoint_ids
        found = self.features.gather([scans[place] for place in places], [names[place] for place in places])
        return (found if self._scale == 1 else found * self._scale)[back]

    def look(self, now: Panorama, rows: np.ndarray, *, keep: np.ndarray | None = None) -> Views:
        """What rows of a simulator see.

        Args:
            now: all rows.
            rows: int64 ``[B]``: those that look.
            keep: ``[F]``: factors of the features (environment dropout), the same for views and candidates.
        """
        seen = self.gather(now.viewpoint[rows])
        if keep is not None:
            seen = seen * keep
        count = now.num_choices[rows]
        listed = slice(0, int(count.max()))
        panorama = with_panorama_angles(seen, now.view[rows], **self._form)
        candidates = candidate_views(
            seen, now.point_id[rows, listed], now.rel_heading[rows, listed], now.rel_elevation[rows, listed],
            **self._form,
        )  # fmt: skip
        angle = angle_features(now.heading[rows], now.elevation[rows], **self._form)
        parts = (angle, panorama, candidates, count)
        return Views(*(torch.from_numpy(part).to(self.device, non_blocking=True) for part in parts))

    def views_of(self, viewpoints: np.ndarray, view: np.ndarray) -> Tensor:
        """Panoramas of viewpoints as seen with some views ahead, float32 ``[B, 36, D]``."""
        seen = with_panorama_angles(self.gather(viewpoints), view, **self._form)
        return torch.from_numpy(seen).to(self.device, non_blocking=True)


def environment_mask(seed: int, step: int, size: int, share: float) -> np.ndarray | None:
    """Environment dropout: one mask over the channels for a whole batch and rollout (Tan et al., 2019).

    Args:
        seed: of the run.
        step: of the training.
        size: F.
        share: dropped; the rest grows by 1 / (1 - share).

    Returns:
        float32 ``[F]``, or ``None`` for no dropout.
    """
    if not share:
        return None
    kept = uniforms(seed, _ENVIRONMENT, step, [0], size)[0] >= share
    return (kept / (1 - share)).astype(np.float32)


class Distances:
    """Lengths of shortest paths, in the world's numbers.

    Args:
        world: the scans.
    """

    def __init__(self, world: World) -> None:
        self._graphs = list(world.graphs.values())
        self._starts = np.array([world.starts[graph.scan_id] for graph in self._graphs])

    def between(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Metres from one viewpoint to another of the same scan, float64 ``[B]``.

        Example:
            >>> edges, positions = np.array([[0, 1], [1, 0]]), np.array([[0, 0, 0], [3.0, 0, 0]])
            >>> from vln.navgraph import NavGraph
            >>> house = NavGraph("house", ("hall", "bath"), positions, np.ones(2, bool), edges)
            >>> Distances(World([house])).between(np.array([0, 1]), np.array([1, 1])).tolist()
            [3.0, 0.0]
        """
        scan = np.searchsorted(self._starts, first, side="right") - 1
        found = np.empty(len(first))
        for number in np.unique(scan):
            rows, start = np.flatnonzero(scan == number), self._starts[number]
            found[rows] = self._graphs[number].distances[first[rows] - start, second[rows] - start]
        return found


class Course:
    """Waypoints of each row, which of them it has reached, and the teacher's way on.

    With the goal as its one waypoint a row is sent along shortest paths (R2R); with a whole path it is sent
    to the next viewpoint of it that it has not reached (R4R, RxR).

    Args:
        surroundings: hops and distances.
        waypoints: the world's numbers, int64 ``[B, P]``; behind its end a row repeats the last.
    """

    def __init__(self, surroundings: Surroundings, waypoints: np.ndarray) -> None:
        self._hops, self._distances, self._waypoints = surroundings.hops, surroundings.distances, waypoints
        self._reached = np.zeros(len(waypoints), dtype=np.int64)
        legs = [
            surroundings.distances.between(waypoints[:, place], waypoints[:, place + 1])
            for place in range(waypoints.shape[1] - 1)
        ]
        behind = np.cumsum([np.zeros(len(waypoints)), *legs[::-1]], axis=0)[::-1]
        self._behind = behind.T  # [B, P]

    def _next(self, here: np.ndarray) -> np.ndarray:
        return self._waypoints[np.arange(len(here)), self._reached]

    def arrive(self, here: np.ndarray) -> None:
        """Rows are at viewpoints: those at their next waypoint look for the one after it."""
        for _ in range(self._waypoints.shape[1]):
            met = (self._next(here) == here) & (self._reached + 1 < self._waypoints.shape[1])
            if not met.any():
                return
            self._reached += met

    def following(self, here: np.ndarray) -> np.ndarray:
        """The teacher's next viewpoint of each row, the own one to stop: int64 ``[B]``."""
        return self._hops.towards(here, self._next(here))

    def remaining(self, here: np.ndarray) -> np.ndarray:
        """Metres still to walk, float64 ``[B]``."""
        return (
            self._distances.between(here, self._next(here))
            + self._behind[np.arange(len(here)), self._reached]
        )


def padded(paths: Sequence[Sequence[int]]) -> np.ndarray:
    """Paths as one table, the last viewpoint of each repeated behind its end: int64 ``[B, P]``.

    Example:
        >>> padded([[1, 2], [3]]).tolist()
        [[1, 2], [3, 3]]
    """
    longest = max(map(len, paths))
    return np.array([[*path, *[path[-1]] * (longest - len(path))] for path in paths], dtype=np.int64)
