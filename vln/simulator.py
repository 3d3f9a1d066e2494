"""The Matterport3D Simulator without pictures, for whole batches: poses in, navigable viewpoints out.

Every result is a snapshot: arrays of the moment that no later action changes. A call either moves the whole
batch or raises and changes nothing. Angles are radians; see ``vln.geometry`` for views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vln.geometry import NUM_VIEWS, Camera, Offsets, look, nearest_view, turn_table, wrap_heading
from vln.world import World

_TURNS = turn_table()
_TURN_BASES = 9.0 * np.arange(NUM_VIEWS) + 4
"""What a view adds to the signs of a turn to give its place in that table; float64, as the signs are."""
_TURN_BASES_AFTER = _TURN_BASES.take(_TURNS)
_FLOAT64, _INT64, _UINT64 = np.dtype(np.float64), np.dtype(np.int64), np.dtype(np.uint64)


class State(NamedTuple):
    """A batch at one moment; ``world.viewpoint_ids[number]`` and ``world.scan_ids[number]`` name a viewpoint.

    Fields are strided views of one block that belongs to this state alone; ``torch.from_numpy`` takes them as
    they are.
    """

    step: int
    """Actions since the episodes began."""
    viewpoint: np.ndarray
    """int32 ``[B]``."""
    view: np.ndarray
    """int32 ``[B]``: 0 to 35, always 0 when angles are continuous."""
    heading: np.ndarray
    """float64 ``[B]``."""
    elevation: np.ndarray
    """float64 ``[B]``."""
    num_navigable: np.ndarray
    """int32 ``[B]``: length of each list of navigable locations, the own one included."""
    neighbour: np.ndarray
    """int32 ``[B, S]``: the own viewpoint, then those in reach from the middle of the view outwards, then
    -1."""
    rel_heading: np.ndarray
    """float32 ``[B, S]``, positive to the right; 0 for the own viewpoint and behind the list."""
    rel_elevation: np.ndarray
    """float64 ``[B, S]``."""
    rel_distance: np.ndarray
    """float32 ``[B, S]``, metres."""


class Simulator:
    """A batch of agents in the scans of a world.

    Args:
        world: the scans; simulators share its tables.
        batch_size: rows.
        camera: what counts as navigable.
        discretized: headings and elevations snap to the 36 views, and of an increment the sign alone counts.
        seed: of this simulator's own random episodes.

    Raises:
        ValueError: ``batch_size`` is below 1.

    Example:
        >>> from vln.navgraph import NavGraph
        >>> edges, positions = np.array([[0, 1], [1, 0]]), np.array([[0, 0, 0], [0, 3.0, 0]])
        >>> house = NavGraph("house", ("hall", "bath"), positions, np.ones(2, bool), edges)
        >>> simulator = Simulator(World([house]))
        >>> state = simulator.new_episodes(["house"], ["hall"], [0.0])
        >>> state.neighbour[0, : state.num_navigable[0]].tolist()
        [0, 1]
        >>> simulator.step([1], [0.0], [0.0]).viewpoint.tolist()
        [1]
    """

    def __init__(
        self,
        world: World,
        *,
        batch_size: int = 1,
        camera: Camera | None = None,
        discretized: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        self.world, self.batch_size, self.discretized = world, batch_size, discretized
        self.camera = camera or Camera()
        self._random = np.random.default_rng(seed)
        self._shape = (batch_size,)
        self._checks = np.empty((3, batch_size), dtype=bool)
        self._steps = 0
        self._count: np.ndarray | None = None
        if discretized:
            table = world.views(self.camera)
            self._records = table.records
            fields = table.records.dtype.fields
            assert fields is not None
            # A neighbour by its position in the table, whatever a caller has done to the last snapshot.
            self._neighbours = table.records.view(np.int32)[fields["neighbour"][1] // 4 :]
            # Arrays, because NumPy takes longer over a Python number than over a small array.
            self._words = np.full(batch_size, table.records.itemsize // 4)
            self._views, self._three = np.full(batch_size, NUM_VIEWS), np.full(batch_size, 3.0)

    def new_episodes(
        self,
        scan_ids: Sequence[str],
        viewpoint_ids: Sequence[str],
        headings: Any,
        elevations: Any = None,
    ) -> State:
        """Put every row somewhere and count steps from 0.

        Args:
            scan_ids: ``[B]``.
            viewpoint_ids: ``[B]``.
            headings: ``[B]``; any finite numbers.
            elevations: ``[B]``, level when left out. Snapped, or else kept within the camera's limits.

        Raises:
            ValueError: another number of rows, an unknown scan, an unknown or excluded viewpoint, or an angle
                that is not finite. The batch stays as it was.
        """
        if isinstance(scan_ids, str) or isinstance(viewpoint_ids, str):
            raise ValueError("scan_ids and viewpoint_ids are lists with one id for each row, not texts")
        if len(scan_ids) != self.batch_size or len(viewpoint_ids) != self.batch_size:
            raise ValueError(
                f"{len(scan_ids)} scan ids and {len(viewpoint_ids)} viewpoint ids, expected "
                f"{self.batch_size} of each: one for each row"
            )
        rows = zip(scan_ids, viewpoint_ids, strict=True)
        viewpoints = np.array([self.world.index(scan_id, viewpoint_id) for scan_id, viewpoint_id in rows])
        return self.place(viewpoints, headings, elevations)

    def new_random_episodes(self, scan_ids: Sequence[str]) -> State:
        """Put every row at a random included viewpoint of its scan, level, with a random heading.

        Raises:
            ValueError: another number of rows, an unknown scan, or one without an included viewpoint.
        """
        if isinstance(scan_ids, str) or len(scan_ids) != self.batch_size:
            raise ValueError(
                f"expected a list of {self.batch_size} scan ids, one for each row, got {scan_ids!r:.60}"
            )
        viewpoints = []
        for scan_id in scan_ids:
            inside = np.flatnonzero(self.world.graph(scan_id).included)
            if not len(inside):
                raise ValueError(f"scan {scan_id} has no included viewpoint: nobody can be there")
            viewpoints.append(self.world.starts[scan_id] + int(self._random.choice(inside)))
        return self.place(np.array(viewpoints), self._random.uniform(0, 2 * math.pi, self.batch_size))

    def place(self, viewpoints: Any, headings: Any, elevations: Any = None) -> State:
        """Like :meth:`new_episodes`, with the world's numbers for viewpoints.

        Args:
            viewpoints: integer ``[B]``.
            headings: ``[B]``.
            elevations: ``[B]``, level when left out.

        Raises:
            TypeError: ``viewpoints`` are not integers.
            ValueError: another number of rows, a number that is no included viewpoint, or an angle that is
                not finite.
        """
        viewpoint = self._integers("viewpoints", viewpoints)
        heading = self._numbers("headings", headings)
        elevation = self._numbers(
            "elevations", np.zeros(self.batch_size) if elevations is None else elevations
        )
        self._require_finite("headings", heading)
        self._require_finite("elevations", elevation)
        known = (viewpoint >= 0) & (viewpoint < len(self.world.included))
        known[known] = self.world.included[viewpoint[known]]
        if not known.all():
            row = int(np.argmin(known))
            raise ValueError(f"row {row}: {viewpoint[row]} is not the number of an included viewpoint")
        if self.discretized:
            view = nearest_view(heading, elevation)
            return self._arrive(viewpoint * NUM_VIEWS + view, _TURN_BASES[view], 0)
        return self._arrive_anywhere(viewpoint, heading, elevation, 0)

    def step(self, indices: Any, headings: Any, elevations: Any) -> State:
        """Move and turn every row at once.

        Args:
            indices: integer ``[B]``: place in the row's list of navigable locations; 0 stays.
            headings: ``[B]``, increments; positive turns right.
            elevations: ``[B]``, increments; positive looks up.

        Raises:
            RuntimeError: there are no episodes yet.
            TypeError: indices are not integers.
            ValueError: another number of rows, an index outside a row's list, or an angle that is not finite;
                the text names the row. The batch stays as it was.
        """
        count = self._count
        if count is None:
            raise RuntimeError("new_episodes must be called before step")
        index = self._integers("indices", indices)
        heading, elevation = self._numbers("headings", headings), self._numbers("elevations", elevations)
        in_list, finite_heading, finite_elevation = self._checks
        # As unsigned numbers, negative ones are beyond every list too.
        np.less(index.view(_UINT64), count, in_list)
        np.isfinite(heading, finite_heading)
        np.isfinite(elevation, finite_elevation)
        if np.count_nonzero(self._checks) != self._checks.size:
            self._refuse(index, heading, elevation)
        if not self.discretized:
            return self._step_anywhere(index, heading, elevation)
        # Few and plain calls: for a small batch they cost more than what they do.
        place = np.multiply(self._code, self._words)
        place += index
        turn = np.sign(heading)
        turn *= self._three
        turn += np.sign(elevation)
        turn += self._turn_base
        turned = turn.astype(_INT64)
        code = np.multiply(self._neighbours.take(place), self._views)
        code += _TURNS.take(turned)
        return self._arrive(code, _TURN_BASES_AFTER.take(turned), self._steps + 1)

    def _refuse(self, index: np.ndarray, heading: np.ndarray, elevation: np.ndarray) -> NoReturn:
        """Name the first row that a step cannot take."""
        assert self._count is not None
        row = int(np.argmin(self._checks.all(axis=0)))
        if self._checks[0, row]:
            self._require_finite("headings", heading)
            self._require_finite("elevations", elevation)
        raise ValueError(
            f"row {row}: index {index[row]} but the list holds {self._count[row]} navigable locations, "
            "0 being the own one"
        )

    def _arrive(self, code: np.ndarray, turn_base: np.ndarray, steps: int) -> State:
        """Commit to states of the table, ``36 * viewpoint + view``."""
        rows = self._records.take(code)
        count = rows["num_navigable"]
        # The next step relies on these alone: what is in the snapshot belongs to the caller.
        self._code, self._turn_base, self._count, self._steps = code, turn_base, count.astype(_UINT64), steps
        return State(
            steps, rows["viewpoint"], rows["view"], rows["heading"], rows["elevation"], count,
            rows["neighbour"], rows["rel_heading"], rows["rel_elevation"], rows["rel_distance"],
        )  # fmt: skip

    def _step_anywhere(self, index: np.ndarray, heading: np.ndarray, elevation: np.ndarray) -> State:
        viewpoint = np.take_along_axis(self._neighbour, index[:, None], axis=1)[:, 0]
        return self._arrive_anywhere(
            viewpoint, self._heading + heading, self._elevation + elevation, self._steps + 1
        )

    def _arrive_anywhere(
        self, viewpoint: np.ndarray, heading: np.ndarray, elevation: np.ndarray, steps: int
    ) -> State:
        """Commit to poses with continuous angles."""
        heading, elevation = wrap_heading(heading), np.clip(elevation, *self.camera.elevation_limits)
        near = self.world.neighbours[viewpoint]
        offsets = Offsets(*(field[viewpoint] for field in self.world.neighbour_offsets))
        seen = look(offsets, heading[:, None], elevation[:, None], self.camera)
        navigable = seen.navigable & (near >= 0)
        wide = seen.rel_heading.astype(np.float64)
        deviation = np.where(
            navigable, np.sqrt(wide * wide + seen.rel_elevation * seen.rel_elevation), np.inf
        )
        order = np.argsort(deviation, axis=1, kind="stable")
        inside = np.take_along_axis(navigable, order, axis=1)

        def listed(own: Any, values: np.ndarray, padding: float) -> np.ndarray:
            column = np.broadcast_to(np.asarray(own, dtype=values.dtype), self._shape)[:, None]
            sorted_values = np.take_along_axis(values, order, axis=1)
            return np.concatenate(
                [column, np.where(inside, sorted_values, values.dtype.type(padding))], axis=1
            )

        state = State(
            step=steps,
            viewpoint=viewpoint.astype(np.int32),
            view=np.zeros(self.batch_size, dtype=np.int32),
            heading=heading,
            elevation=elevation,
            num_navigable=1 + navigable.sum(axis=1, dtype=np.int32),
            neighbour=listed(viewpoint, near, -1),
            rel_heading=listed(0, seen.rel_heading, 0),
            rel_elevation=listed(0, seen.rel_elevation, 0),
            rel_distance=listed(0, offsets.distance, 0),
        )
        self._heading, self._elevation, self._neighbour = (
            heading.copy(),
            elevation.copy(),
            state.neighbour.copy(),
        )
        self._count, self._steps = state.num_navigable.astype(np.uint64), steps
        return state

    def _integers(self, name: str, values: Any) -> np.ndarray:
        array = np.asarray(values)
        if array.dtype is not _INT64:
            if array.dtype.kind not in "iu":
                raise TypeError(f"{name} hold {array.dtype}, expected integers")
            array = array.astype(_INT64)
        if array.shape != self._shape:
            raise ValueError(
                f"{name} have shape {list(array.shape)}, expected [{self.batch_size}]: one for each row"
            )
        return array

    def _numbers(self, name: str, values: Any) -> np.ndarray:
        array = np.asarray(values)
        if array.dtype is not _FLOAT64:
            if array.dtype.kind not in "iuf":
                raise TypeError(f"{name} hold {array.dtype}, expected numbers (radians)")
            array = array.astype(_FLOAT64)
        if array.shape != self._shape:
            raise ValueError(
                f"{name} have shape {list(array.shape)}, expected [{self.batch_size}]: one for each row"
            )
        return array

    def _require_finite(self, name: str, values: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.argmin(finite))
            raise ValueError(f"row {row}: {name} hold {values[row]}, expected a finite angle in radians")
