"""Panoramic action space: at every viewpoint choose a neighbour, whatever the view, or stop.

A neighbour's record names the view that shows it best. The originals find it by sweeping a simulator through
all 36 views; here it is a table. Two orders are in use: that of EnvDrop (first sight from view 0, STOP last)
and that of speaker-follower (STOP first, then by how far to turn), on which NDH, HANNA and the pre-training
labels rely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vln.geometry import NUM_HEADINGS, VIEW_ELEVATIONS, VIEW_HEADINGS, Camera
from vln.simulator import Simulator
from vln.world import World

Order = Literal["envdrop", "follower"]


class Panorama(NamedTuple):
    """A batch at one moment, and what each row can choose; arrays of this moment alone."""

    step: int
    """Choices since the episodes began."""
    viewpoint: np.ndarray
    """int64 ``[B]``, the world's numbers."""
    view: np.ndarray
    """int64 ``[B]``, 0 to 35."""
    heading: np.ndarray
    """float64 ``[B]``, radians."""
    elevation: np.ndarray
    """float64 ``[B]``, radians."""
    num_choices: np.ndarray
    """int64 ``[B]``: number of choices, STOP included."""
    stop: np.ndarray
    """int64 ``[B]``: which choice is STOP."""
    candidate: np.ndarray
    """int32 ``[B, C]``: viewpoints; the own one for STOP, -1 behind the list."""
    point_id: np.ndarray
    """int32 ``[B, C]``: view that shows the candidate best, and that one faces there; -1 for STOP."""
    slot: np.ndarray
    """int32 ``[B, C]``: the candidate's place among that view's navigable locations; 0 for STOP."""
    rel_heading: np.ndarray
    """float64 ``[B, C]``: as the row looks now; within [-pi, pi] in the follower order only."""
    rel_elevation: np.ndarray
    """float64 ``[B, C]``: of the candidate above the horizon, wherever the row looks."""
    distance: np.ndarray
    """float64 ``[B, C]``: radians between the candidate and the middle of its view."""


class PanoramicSimulator:
    """A batch of agents that walk from viewpoint to neighbouring viewpoint.

    Args:
        world: the scans.
        batch_size: rows.
        order: of the choices, ``"envdrop"`` or ``"follower"``.
        camera: restricted to what a view shows, as a rule.
        seed: of this simulator's own random episodes.

    Raises:
        ValueError: ``batch_size`` is below 1, or ``order`` is another.

    Example:
        >>> from vln.navgraph import NavGraph
        >>> edges, positions = np.array([[0, 1], [1, 0]]), np.array([[0, 0, 0], [3.0, 0, 0]])
        >>> house = NavGraph("house", ("hall", "bath"), positions, np.ones(2, bool), edges)
        >>> agents = PanoramicSimulator(World([house]))
        >>> seen = agents.new_episodes(["house"], ["hall"], [0.0])
        >>> seen.candidate.tolist(), seen.point_id.tolist(), seen.stop.tolist()
        ([[1, 0]], [[15, -1]], [1])
        >>> agents.choose([0]).viewpoint.tolist()
        [1]
    """

    def __init__(
        self,
        world: World,
        *,
        batch_size: int = 1,
        order: Order = "envdrop",
        camera: Camera | None = None,
        seed: int = 0,
    ) -> None:
        if order not in get_args(Order):
            raise ValueError(f"order is {order!r}, expected one of {', '.join(get_args(Order))}")
        self._poses = Simulator(world, batch_size=batch_size, camera=camera, seed=seed)
        self.world, self.batch_size, self.order = world, batch_size, order
        self.camera = self._poses.camera
        self._table = world.candidates(self.camera)
        self._follower = world.followers(self.camera) if order == "follower" else None
        self._rows = np.arange(batch_size)
        self._now: tuple[np.ndarray, np.ndarray] | None = None
        self._steps = 0

    def new_episodes(
        self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str], headings: Any, elevations: Any = None
    ) -> Panorama:
        """Put every row somewhere, looking at the nearest view; see :meth:`Simulator.new_episodes`.

        Raises:
            ValueError: as there; the batch stays as it was.
        """
        state = self._poses.new_episodes(scan_ids, viewpoint_ids, headings, elevations)
        return self._arrive(state.viewpoint.astype(np.int64), state.view.astype(np.int64), 0)

    def new_random_episodes(self, scan_ids: Sequence[str]) -> Panorama:
        """Put every row at a random included viewpoint of its scan, with a random heading.

        Raises:
            ValueError: see :meth:`Simulator.new_random_episodes`; the batch stays as it was.
        """
        state = self._poses.new_random_episodes(scan_ids)
        return self._arrive(state.viewpoint.astype(np.int64), state.view.astype(np.int64), 0)

    def place(self, viewpoints: Any, headings: Any, elevations: Any = None) -> Panorama:
        """Like :meth:`new_episodes`, with the world's numbers for viewpoints; see :meth:`Simulator.place`.

        Raises:
            TypeError: as there.
            ValueError: as there; the batch stays as it was.
        """
        state = self._poses.place(viewpoints, headings, elevations)
        return self._arrive(state.viewpoint.astype(np.int64), state.view.astype(np.int64), 0)

    def choose(self, choices: Any) -> Panorama:
        """Take every row to the candidate it chose, facing the view that showed it; STOP stays as it is.

        Args:
            choices: integer ``[B]``, below the row's ``num_choices``.

        Raises:
            RuntimeError: there are no episodes yet.
            TypeError: choices are not integers.
            ValueError: another number of rows, or a choice outside a row's list; the batch stays as it was.
        """
        if self._now is None:
            raise RuntimeError("new_episodes must be called before choose")
        choice = np.asarray(choices)
        if choice.dtype.kind not in "iu":
            raise TypeError(f"choices hold {choice.dtype}, expected integers")
        if choice.shape != (self.batch_size,):
            raise ValueError(f"choices have shape {list(choice.shape)}, expected [{self.batch_size}]")
        viewpoint, view = self._now
        candidates = self._table.num_candidates[viewpoint]
        outside = (choice < 0) | (choice > candidates)
        if outside.any():
            row = int(np.argmax(outside))
            raise ValueError(
                f"row {row}: choice {choice[row]} but there are {candidates[row] + 1}, STOP included"
            )
        if self._follower is None:
            walks = choice < candidates
            place = np.where(walks, choice, 0)
            point_id = self._table.point_id[viewpoint, place]
        else:
            walks, row = choice > 0, viewpoint * NUM_HEADINGS + view % NUM_HEADINGS
            place, point_id = (field[row, np.where(walks, choice - 1, 0)] for field in self._follower[:2])
        target = self._table.viewpoint[viewpoint, place]
        return self._arrive(
            np.where(walks, target, viewpoint).astype(np.int64),
            np.where(walks, point_id, view).astype(np.int64),
            self._steps + 1,
        )

    def _arrive(self, viewpoint: np.ndarray, view: np.ndarray, steps: int) -> Panorama:
        """Commit to viewpoints and views, int64 ``[B]`` that nobody else holds."""
        count = self._table.num_candidates[viewpoint].astype(np.int64)
        candidate, point_id, slot, heading, elevation, distance = (
            field[viewpoint] for field in self._table[1:]
        )
        rel_heading = heading - VIEW_HEADINGS[view][:, None]
        stop = count
        if self._follower is not None:
            row = viewpoint * NUM_HEADINGS + view % NUM_HEADINGS
            order = np.maximum(self._follower.position[row], 0)
            candidate, rel_heading, elevation, distance = (
                np.take_along_axis(field, order, axis=1)
                for field in (candidate, rel_heading, elevation, distance)
            )
            point_id, slot = self._follower.point_id[row], self._follower.slot[row]
            rel_heading = np.remainder(rel_heading + math.pi, 2 * math.pi) - math.pi
            stop = np.zeros_like(count)
        listed = np.arange(candidate.shape[1]) < count[:, None]

        def with_stop(values: np.ndarray, at_stop: Any, padding: float) -> np.ndarray:
            column = np.full((self.batch_size, values.shape[1] + 1), padding, dtype=values.dtype)
            np.copyto(column[:, 1:] if self._follower else column[:, :-1], values, where=listed)
            column[self._rows, stop] = at_stop
            return column

        self._now, self._steps = (viewpoint, view), steps
        return Panorama(
            step=steps,
            viewpoint=viewpoint.copy(),
            view=view.copy(),
            heading=VIEW_HEADINGS[view],
            elevation=VIEW_ELEVATIONS[view],
            num_choices=count + 1,
            stop=stop.copy(),
            candidate=with_stop(candidate, viewpoint, -1),
            point_id=with_stop(point_id, -1, -1),
            slot=with_stop(slot, 0, -1),
            rel_heading=with_stop(rel_heading, 0, 0),
            rel_elevation=with_stop(elevation, 0, 0),
            distance=with_stop(distance, 0, 0),
        )
