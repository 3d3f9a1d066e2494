"""Training data of the pre-training: (instruction, panorama, action) at every step of a teacher.

The teacher walks shortest paths. Triplets are rolled from tasks and graphs when needed, or read from the
released JSON files. A table has no image in it: viewpoint and view say which panorama belongs to a triplet,
and how it is turned.

Letters of shapes: N triplets, M instructions, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from vln.geometry import NUM_HEADINGS, NUM_VIEWS
from vln.model import ActionTarget
from vln.sources import parse_json, read_document
from vln.walks import Walk, roll_walks
from vln.world import World

STOP_VIEW = NUM_VIEWS
"""Class of STOP where views are predicted."""


def relative_view(view: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Number of a view counted from the heading of the agent, int64 ``[N]``; elevations stay absolute.

    The model is told headings relative to its own and nothing of the order of the views, so that it could
    never tell an absolute number.

    Args:
        view: int ``[N]``, 0 to 35, of the world.
        ahead: int ``[N]``, 0 to 35: where the agent looks.

    Example:
        >>> relative_view(np.array([14, 24]), np.array([13, 1])).tolist()
        [13, 35]
    """
    level, heading = np.divmod(np.asarray(view, dtype=np.int64), NUM_HEADINGS)
    return level * NUM_HEADINGS + (heading - ahead) % NUM_HEADINGS


class Triplets(NamedTuple):
    """A table of triplets; those of one instruction are consecutive, in the order of the walk."""

    viewpoint: np.ndarray
    """int32 ``[N]``, the world's numbers."""
    view: np.ndarray
    """int16 ``[N]``: where the agent looks, 0 to 35."""
    action: np.ndarray
    """int16 ``[N]``: place in the follower's list of candidates, 0 for STOP."""
    target_view: np.ndarray
    """int16 ``[N]``: view of the candidate taken, of the world, -1 for STOP."""
    text: np.ndarray
    """int32 ``[N]``: row of the instruction."""

    def labels(self, target: ActionTarget) -> np.ndarray:
        """Classes of the action head, int64 ``[N]``.

        Raises:
            ValueError: ``target`` is unknown.
        """
        if target not in get_args(ActionTarget):
            raise ValueError(f"target is {target!r}, expected one of {', '.join(get_args(ActionTarget))}")
        if target == "candidate_rank":
            return self.action.astype(np.int64)
        return np.where(self.target_view < 0, STOP_VIEW, relative_view(self.target_view, self.view))

    def floor(self, target: ActionTarget) -> float:
        """Accuracy of always answering the commonest class; for ranks that is 1, the way straight ahead.

        Raises:
            ValueError: ``target`` is unknown.
        """
        labels = self.labels(target)
        return float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0


def roll_triplets(world: World, walks: Sequence[Walk], *, shortest: bool = True) -> Triplets:
    """Triplets of all instructions of walks.

    Args:
        world: with all their scans.
        walks: their instructions are numbered from 0.
        shortest: see `vln.walks.roll_walks`.

    Raises:
        ValueError: a scan or viewpoint is unknown, or a goal cannot be reached.
    """
    table = roll_walks(world, walks, shortest=shortest)
    repeats = np.array([walk.num_texts for walk in walks], dtype=np.int64)
    place, text = _repeat_blocks(table.length, repeats)
    return Triplets(
        viewpoint=table.viewpoint[place],
        view=table.view[place],
        action=table.action[place],
        target_view=table.target_view[place],
        text=text,
    )


def _repeat_blocks(sizes: np.ndarray, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices that repeat consecutive blocks, and the number of the repetition that each belongs to."""
    sizes_of = np.repeat(sizes, repeats)
    begins_of = np.repeat(np.cumsum(sizes) - sizes, repeats)
    text = np.repeat(np.arange(len(sizes_of)), sizes_of)
    within = np.arange(len(text)) - np.repeat(np.cumsum(sizes_of) - sizes_of, sizes_of)
    return begins_of[text] + within, text.astype(np.int32)


# ---- the released files


class ReleasedTriplets(NamedTuple):
    """A released file."""

    triplets: Triplets
    token_ids: np.ndarray
    """int64 ``[M, L]``, padded with 0 on the right."""
    instruction_ids: tuple[str, ...]
    """``[M]``."""


def read_released(source: str | Path, world: World) -> ReleasedTriplets:
    """Triplets of a released JSON file.

    Each object has ``instr_id``, ``instr_encoding`` (token ids), ``path`` (rows of scan, viewpoint and view
    index, and perhaps heading and elevation), ``teacher_actions`` and ``teacher_action_emd`` (rows that begin
    with the view, -1 for STOP).

    Args:
        source: the file, perhaps gzipped.
        world: with all its scans.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a list, or names an unknown scan or viewpoint; the text says where.
    """
    document = read_document(Path(source))
    rows = parse_json(document)
    if not isinstance(rows, list):
        raise ValueError(f"{document.origin} holds a JSON {type(rows).__name__}, expected a list of objects")
    columns: list[tuple[int, int, int, int, int]] = []
    encodings, names = [], []
    for number, row in enumerate(rows):
        try:
            columns += _released_steps(row, number, world)
            encodings.append(np.asarray(row["instr_encoding"], dtype=np.int64))
            names.append(str(row["instr_id"]))
        except KeyError as error:
            raise ValueError(f"{document.origin}: object {number} lacks the field {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{document.origin}: object {number} is not as expected: {error}") from error
    lengths = [len(encoding) for encoding in encodings]
    token_ids = np.zeros((len(rows), max(lengths, default=0)), dtype=np.int64)
    for place, encoding in enumerate(encodings):
        token_ids[place, : len(encoding)] = encoding
    table = np.array(columns, dtype=np.int64).reshape(-1, 5).T
    kinds = (np.int32, np.int16, np.int16, np.int16, np.int32)
    triplets = Triplets(*(column.astype(kind) for column, kind in zip(table, kinds, strict=True)))
    return ReleasedTriplets(triplets, token_ids, tuple(names))


def _released_steps(row: Any, number: int, world: World) -> Iterator[tuple[int, int, int, int, int]]:
    path, actions, directions = row["path"], row["teacher_actions"], row["teacher_action_emd"]
    if not len(path) == len(actions) == len(directions):
        raise ValueError(
            f"it has {len(path)} rows of path, {len(actions)} teacher_actions and {len(directions)} "
            "teacher_action_emd, expected as many of each"
        )
    for pose, action, direction in zip(path, actions, directions, strict=True):
        if len(pose) not in (3, 5):
            raise ValueError(f"a row of path has {len(pose)} values, expected 3 or 5")
        view, target = int(pose[2]), int(direction[0])
        if not (0 <= view < NUM_VIEWS and -1 <= target < NUM_VIEWS and int(action) >= 0):
            raise ValueError(f"view {view}, action {action}, towards view {target}: out of their range")
        yield world.index(pose[0], pose[1]), view, int(action), target, number
