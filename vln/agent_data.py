"""Items of R2R, R4R, RxR and NDH as episodes to walk.

An episode has a start, words, and waypoints: the goal alone where the teacher walks shortest paths, the path
where it is to be followed (R4R and RxR, whose paths are detours by intention).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vln.agent import Episodes
from vln.data import read_ndh, read_r2r, read_r4r, read_rxr
from vln.instructions import Encoded, History, encode_instructions
from vln.items import NDHItem, R2RItem, RxRItem
from vln.surroundings import padded
from vln.world import World

Dataset = Literal["r2r", "r4r", "rxr", "ndh"]
PathType = Literal["planner_path", "player_path", "trusted_path"]
Follow = Literal["goal", "path"]

_READERS: dict[str, Any] = {"r2r": read_r2r, "r4r": read_r4r, "rxr": read_rxr, "ndh": read_ndh}


class Reading(NamedTuple):
    """How items become episodes."""

    max_tokens: int = 80
    """Longest text."""
    num_instructions: int = 1
    """Instructions read together: 1, or those of a whole path (R2R)."""
    follow: Follow = "goal"
    """Whether the teacher walks to the goal, or along the path."""
    history: History = "nav_q_oracle_ans"
    """How much of a dialogue is read (NDH)."""
    path_type: PathType = "trusted_path"
    """Whose path the teacher follows the end of (NDH)."""
    deaf: bool = False
    """Every text becomes one unknown word, for even its length would tell something."""


class Split(NamedTuple):
    """Episodes, and the items that score them."""

    name: str
    items: tuple[Any, ...]
    episodes: Episodes

    @property
    def scan_ids(self) -> frozenset[str]:
        """Scans of the items."""
        return frozenset(item.scan_id for item in self.items)


def read_items(data: str | Path, dataset: Dataset, split: str | None) -> list[Any]:
    """Items of a split; without one, of the file that ``data`` is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or the data set is unknown.
    """
    if dataset not in _READERS:
        raise ValueError(f"dataset is {dataset!r}, expected one of {', '.join(_READERS)}")
    return list(_READERS[dataset](data, split))


def pick_pairs(items: Sequence[R2RItem], count: int) -> list[R2RItem]:
    """Pairs of items with one start pose and two goals, each with its first instruction alone.

    Args:
        items: in which such pairs are looked for, in their order.
        count: pairs.

    Returns:
        ``2 * count`` items, pair by pair: without the words nobody can be right about more than half.

    Raises:
        ValueError: there are fewer.
    """
    groups: dict[Any, dict[str, R2RItem]] = {}
    for item in items:
        groups.setdefault((item.scan_id, item.path[0], item.heading), {}).setdefault(item.path[-1], item)
    pairs = [list(group.values())[:2] for group in groups.values() if len(group) > 1]
    if len(pairs) < count:
        raise ValueError(f"found {len(pairs)} pairs of items with one start pose and two goals, not {count}")
    return [item._replace(instructions=item.instructions[:1]) for pair in pairs[:count] for item in pair]


def make_split(
    name: str, items: Sequence[Any], world: World, tokenizer: Any, reading: Reading, *, first: int = 0
) -> Split:
    """Episodes of items of one kind.

    Args:
        name: of the split.
        items: R2R, R4R, RxR or NDH.
        world: with all their scans.
        tokenizer: of transformers; for dialogues with the markers.
        reading: how.
        first: number of the first episode, on which draws hang.

    Raises:
        ValueError: there is no item, a viewpoint is unknown, or the path type is.
    """
    if reading.path_type not in get_args(PathType):
        listed = ", ".join(get_args(PathType))
        raise ValueError(f"path_type is {reading.path_type!r}, expected one of {listed}")
    encoded = encode_instructions(items, tokenizer, max_tokens=reading.max_tokens, history=reading.history)
    ids, mask = encoded.token_ids, encoded.mask
    if reading.deaf:
        silence = [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]
        ids = np.tile(np.array(silence), (len(ids), 1))
        mask = np.ones(ids.shape, dtype=bool)
    names, owner, texts = _joined(encoded, reading.num_instructions)
    item_of = [items[place] for place in owner]
    lengths = mask.sum(axis=1)[texts]
    starts = [item.start if isinstance(item, NDHItem) else item.path[0] for item in item_of]
    episodes = Episodes(
        names,
        np.arange(len(names), dtype=np.int64) + first,
        np.array([world.index(item.scan_id, start) for item, start in zip(item_of, starts, strict=True)]),
        np.array([item.heading for item in item_of]),
        _waypoints(item_of, world, reading),
        ids[texts].astype(np.int64),
        np.maximum(lengths, 1).astype(np.int64),
    )
    return Split(name, tuple(items), episodes)


def _joined(
    encoded: Encoded, together: int
) -> tuple[tuple[tuple[str | int, ...], ...], np.ndarray, np.ndarray]:
    """Names, items and texts ``[N, I]`` of rows that read several instructions of an item together."""
    if together == 1:
        return tuple((name,) for name in encoded.names), encoded.item, np.arange(len(encoded.item))[:, None]
    owners = np.unique(encoded.item)
    names, texts = [], []
    for owner in owners:
        own = np.flatnonzero(encoded.item == owner)
        names.append(tuple(encoded.names[text] for text in own))
        # 15 paths of R2R have four instructions, others may have fewer than the agent reads.
        texts.append([own[place % len(own)] for place in range(together)])
    return tuple(names), owners, np.array(texts)


def _waypoints(items: Sequence[Any], world: World, reading: Reading) -> np.ndarray | None:
    """Where the teacher goes, ``[N, P]``; ``None`` for a split without goals."""
    paths = [getattr(item, reading.path_type) if isinstance(item, NDHItem) else item.path for item in items]
    known = [bool(path) if isinstance(item, NDHItem) else len(path) > 1 or _stated(item)
             for item, path in zip(items, paths, strict=True)]  # fmt: skip
    if not all(known):
        return None
    if reading.follow == "goal":
        paths = [path[-1:] for path in paths]
    numbers = [
        [world.index(item.scan_id, name) for name in path] for item, path in zip(items, paths, strict=True)
    ]
    return padded([_without_repeats(path) for path in numbers])


def _stated(item: R2RItem | RxRItem) -> bool:
    """Whether a path of one viewpoint is a whole one: test items have their start alone."""
    return isinstance(item, R2RItem) and item.distance is not None


def _without_repeats(path: Sequence[int]) -> list[int]:
    return [place for place, before in zip(path, [None, *path], strict=False) if place != before]
