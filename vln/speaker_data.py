"""What a speaker learns from: walked paths with their views, and the words of their instructions.

Letters of shapes: B rows, S steps of a path, D width of a view, M instructions, L words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vln.checks import warn_of_findings
from vln.data import R2RItem, read_r2r
from vln.model import Orientation
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig
from vln.pretrain_data import open_features
from vln.speaker_config import PathsConfig
from vln.speaker_words import Words, load_tokenizer
from vln.walks import PanoramaFeatures, PathBatch, path_batch, roll_walks, walks_of
from vln.world import World


class SpeakerBatch(NamedTuple):
    """Some instructions with their paths."""

    actions: Tensor
    """float32 ``[B, S, D]``."""
    panoramas: Tensor
    """float32 ``[B, S, 36, D]``."""
    lengths: Tensor
    """int64 ``[B]``."""
    words: Tensor
    """int64 ``[B, 1 + L]``: BOS, words, EOS, padding."""

    def to(self, device: Any) -> SpeakerBatch:
        """The same on a device."""
        return SpeakerBatch(*(part.to(device, non_blocking=True) for part in self))


class SpeakerData:
    """Items of one split.

    Args:
        world: with their scans.
        items: whole paths.
        words: of the speaker.
        features: of the viewpoints.
        shortest: see `vln.walks.roll_walks`.
        max_words: of an instruction, EOS included.
    """

    def __init__(
        self, world: World, items: Sequence[R2RItem], words: Words, features: PanoramaFeatures, *,
        shortest: bool = True, max_words: int = 80,
    ) -> None:  # fmt: skip
        self.world, self.items, self.features = world, tuple(items), features
        self.table = roll_walks(world, walks_of(items), shortest=shortest)
        self.texts = [text for item in items for text in item.instructions]
        self.item_of = np.repeat(np.arange(len(items)), [len(item.instructions) for item in items])
        """int64 ``[M]``: the item of each instruction."""
        self.token_ids = words.encode(self.texts, max_words=max_words)
        self._lengths = (self.token_ids != 0).sum(axis=1)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def scan_ids(self) -> list[str]:
        """Scans of the items, sorted."""
        return sorted({item.scan_id for item in self.items})

    def paths(self, rows: Any, *, angle_size: int, orientation: Orientation) -> PathBatch:
        """Paths of items by their numbers, integers ``[B]``."""
        return path_batch(
            self.table, rows, self.world, self.features, angle_size=angle_size, orientation=orientation
        )

    def feature_size(self, *, num_viewpoints: int = 256) -> float:
        """Root mean square of the features of some viewpoints, spread evenly over those of the paths."""
        places = np.unique(self.table.viewpoint)
        picked = places[np.linspace(0, len(places), num_viewpoints, endpoint=False).astype(np.int64)]
        ids = (
            [names[place] for place in picked] for names in (self.world.scan_ids, self.world.viewpoint_ids)
        )
        features = np.asarray(self.features.gather(*ids), dtype=np.float64)
        return float(np.sqrt((features**2).mean()))

    def words(self, rows: np.ndarray) -> Tensor:
        """Instructions by their numbers, trimmed to the longest: int64 ``[B, 1 + L]``."""
        longest = int(self._lengths[rows].max(initial=1))
        return torch.from_numpy(self.token_ids[rows, :longest])

    def batch(self, rows: np.ndarray, *, angle_size: int, orientation: Orientation) -> SpeakerBatch:
        """Instructions by their numbers, with their paths."""
        paths = self.paths(self.item_of[rows], angle_size=angle_size, orientation=orientation)
        return SpeakerBatch(*paths, self.words(rows))


class Opened(NamedTuple):
    """Data of a run."""

    train: SpeakerData
    val: dict[str, SpeakerData]
    words: Words


def open_data(config: PathsConfig, *, words: Words | None = None) -> Opened:
    """Everything that a configuration names; of the scans only those of the items are read.

    Args:
        config: where it is.
        words: of a speaker that is trained further; else they are counted in the training instructions.

    Raises:
        FileNotFoundError: a file is missing; the text names it.
        ValueError: a file is damaged, or things do not fit together.
    """
    items = _walked([item for split in config.splits for item in read_r2r(config.data, split)])
    held_out: dict[str, list[R2RItem]] = {}
    for split in config.val_splits:
        try:
            held_out[split] = _walked(read_r2r(config.data, split))
        except FileNotFoundError:
            continue  # a folder may have no such split
    if not items:
        raise ValueError(f"{config.data} has no path with instructions in {', '.join(config.splits)}")
    scan_ids = sorted({item.scan_id for rows in (items, *held_out.values()) for item in rows})
    world = World(load_graphs(config.data, scan_ids))
    warn_of_findings({"/".join(config.splits): items} | held_out, world.graphs)
    features = open_features(TripletsConfig(data=config.data, features=config.features), world)
    if words is None:
        words = _words(config, [text for item in items for text in item.instructions])
    options: dict[str, Any] = {"shortest": config.shortest, "max_words": config.max_words}
    val = {
        split: SpeakerData(world, rows, words, features, **options)
        for split, rows in held_out.items()
        if rows
    }
    return Opened(SpeakerData(world, items, words, features, **options), val, words)


def _walked(items: Sequence[R2RItem]) -> list[R2RItem]:
    return [item for item in items if len(item.path) > 1 and item.instructions]


def _words(config: PathsConfig, texts: Sequence[str]) -> Words:
    if not config.tokenizer:
        return Words.count(texts, min_count=config.min_count)
    tried = (Path(config.data) / config.tokenizer, Path(config.tokenizer))
    for place in tried:
        if place.is_file():
            return Words.listed(place)
        if place.is_dir():
            return Words.count(texts, min_count=config.min_count, tokenizer=load_tokenizer(place))
    raise FileNotFoundError(f"no tokeniser: looked for {' and '.join(map(str, tried))}")
