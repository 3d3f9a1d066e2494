"""Batches of the pre-training: triplets, their words with some hidden, and their panoramas.

Letters of shapes: N triplets, M instructions, L tokens, B rows of a batch, D width of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from vln.checks import warn_of_findings
from vln.data import R2RItem, read_r2r
from vln.draws import FEATURES, uniforms
from vln.geometry import NUM_VIEWS
from vln.masking import mask_words
from vln.model import ActionTarget, Orientation
from vln.navgraph import load_graphs
from vln.orientation import with_panorama_angles
from vln.pretrain_config import TripletsConfig
from vln.triplets import Triplets, read_released, roll_triplets
from vln.walks import PanoramaFeatures, walks_of
from vln.world import World

_TEXTS = 10_000
"""Texts tokenised together."""


class RandomFeatures:
    """A fixed random vector for every view: enough to tell places apart, without a picture.

    Args:
        world: whose viewpoints there are.
        width: numbers of a view, standard normal.
        seed: of the numbers; a viewpoint's do not depend on which others there are.

    Raises:
        ValueError: ``width`` is below 1.
    """

    def __init__(self, world: World, width: int, *, seed: int = 0) -> None:
        if width < 1:
            raise ValueError(f"random features of width {width}: give at least 1")
        self._world, self._width, self._seed = world, width, seed
        self._known: dict[int, np.ndarray] = {}

    @property
    def width(self) -> int:
        """Numbers of a view."""
        return self._width

    def gather(self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str]) -> np.ndarray:
        """Features of viewpoints, float32 ``[B, 36, width]``.

        Raises:
            ValueError: a viewpoint is unknown.
        """
        places = [self._world.index(scan, name) for scan, name in zip(scan_ids, viewpoint_ids, strict=True)]
        for place in set(places) - self._known.keys():
            self._known[place] = self._draw(place)
        return np.stack([self._known[place] for place in places])

    def _draw(self, place: int) -> np.ndarray:
        key = _number(f"{self._world.scan_ids[place]}/{self._world.viewpoint_ids[place]}")
        size = NUM_VIEWS * self._width
        # Box and Muller's transform of two uniform numbers each.
        first, second = np.split(uniforms(self._seed, FEATURES, 0, [key], 2 * size)[0], 2)
        normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
        return normal.reshape(NUM_VIEWS, self._width).astype(np.float32)


def _number(text: str) -> int:
    """A number below 2^62 for a name, the same in every process (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 2


class Batch(NamedTuple):
    """What the model is given, and how much it has to predict."""

    input_ids: Tensor
    """int64 ``[B, L]``."""
    views: Tensor
    """float32 ``[B, 36, D]``."""
    mlm_labels: Tensor
    """int64 ``[B, L]``."""
    action_labels: Tensor
    """int64 ``[B]``."""

    def to(self, device: Any) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Vocabulary(NamedTuple):
    """What masking must know of a tokeniser."""

    size: int
    mask_id: int
    pad_id: int
    special_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """That of a tokeniser.

        Raises:
            ValueError: it lacks [MASK] or [PAD].
        """
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError("the tokeniser has no [MASK] or no [PAD]: take one of BERT's kind")
        return cls(
            len(tokenizer), tokenizer.mask_token_id, tokenizer.pad_token_id, tuple(tokenizer.all_special_ids)
        )


class PretrainingData:
    """A table of triplets with its words and features.

    Args:
        world: of the triplets' viewpoints.
        triplets: the table.
        token_ids: integers ``[M, L]``, padded on the right.
        vocabulary: of the ids.
        features: of the viewpoints.
    """

    def __init__(
        self,
        world: World,
        triplets: Triplets,
        token_ids: np.ndarray,
        vocabulary: Vocabulary,
        features: PanoramaFeatures,
    ) -> None:
        self.world, self.triplets, self.token_ids = world, triplets, token_ids
        self.vocabulary, self.features = vocabulary, features
        self._lengths = (token_ids != vocabulary.pad_id).sum(axis=1)

    def __len__(self) -> int:
        return len(self.triplets.text)

    @property
    def scan_ids(self) -> frozenset[str]:
        """Scans that some triplet is from."""
        return frozenset(self.world.scan_ids[number] for number in np.unique(self.triplets.viewpoint))

    def batch(
        self,
        rows: np.ndarray,
        *,
        seed: int,
        step: int,
        items: np.ndarray | None = None,
        angle_size: int,
        orientation: Orientation,
        action_target: ActionTarget,
        feature_scale: float = 1.0,
        mask_share: float,
    ) -> Batch:
        """Triplets by their numbers, masked anew for every step.

        Args:
            rows: int64 ``[B]``.
            seed: of the run.
            step: of the training.
            items: numbers that the masks hang on; the rows by default.
            angle_size: orientation numbers of a view.
            orientation: their layout.
            action_target: what the labels mean.
            feature_scale: factor of the image features.
            mask_share: of the words, 0 to hide none.
        """
        picked = Triplets(*(column[rows] for column in self.triplets))
        words = self.token_ids[picked.text, : int(self._lengths[picked.text].max(initial=1))]
        masked = mask_words(
            words, vocab_size=self.vocabulary.size, special_ids=self.vocabulary.special_ids,
            mask_id=self.vocabulary.mask_id, seed=seed, step=step, items=rows if items is None else items,
            share=mask_share,
        )  # fmt: skip
        # A batch has many steps of few places: each is fetched once.
        places, back = np.unique(picked.viewpoint, return_inverse=True)
        scans, names = self.world.scan_ids, self.world.viewpoint_ids
        features = self.features.gather(
            [scans[place] for place in places], [names[place] for place in places]
        )
        if feature_scale != 1:
            features = features * np.float32(feature_scale)
        views = with_panorama_angles(features[back], picked.view, size=angle_size, layout=orientation)
        parts = (masked.input_ids, views, masked.labels, picked.labels(action_target))
        return Batch(*map(torch.from_numpy, parts))


class Stream:
    """Order of the triplets: each epoch all of them once, shuffled by seed and epoch.

    Args:
        size: triplets.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows number ``first`` to ``first + count`` of the endless sequence, int64 ``[count]``."""
        found = []
        while count:
            epoch, place = divmod(first, self.size)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            part = self._order[place : place + count]
            found.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(found)


class Opened(NamedTuple):
    """Data of a run."""

    train: PretrainingData
    val: dict[str, PretrainingData]
    tokenizer: Any


def open_data(config: TripletsConfig) -> Opened:
    """Everything that a configuration names.

    Raises:
        FileNotFoundError: a file is missing; the text names it.
        ValueError: a file is damaged, or things do not fit together.
    """
    items = [item for split in config.splits for item in read_r2r(config.data, split)]
    told = [item for path in config.extra for item in read_r2r(path)]
    held_out: dict[str, list[R2RItem]] = {}
    for split in config.val_splits:
        try:
            held_out[split] = read_r2r(config.data, split)
        except FileNotFoundError:
            continue  # a folder may have no such split
    tokenizer = open_tokenizer(config)
    vocabulary = Vocabulary.of(tokenizer)
    graphs = load_graphs(config.data)
    warn_of_findings({"/".join(config.splits): items} | held_out, graphs)
    world = World(graphs)
    features = open_features(config, world)
    triplets, token_ids = _tables(world, items + told, tokenizer, config)
    for path in config.released:
        released = read_released(path, world)
        if int(released.token_ids.max(initial=0)) >= vocabulary.size:
            raise ValueError(
                f"{path} has token {released.token_ids.max()} but the tokeniser knows {vocabulary.size}: "
                "released triplets need that of bert-base-uncased"
            )
        triplets, token_ids = _joined(triplets, token_ids, released.triplets, released.token_ids)
    if not len(triplets.text):
        raise ValueError(f"{config.data} gives no triplet: its items have no paths or no instructions")
    val = {
        split: PretrainingData(world, *_tables(world, rows, tokenizer, config), vocabulary, features)
        for split, rows in held_out.items()
    }
    return Opened(PretrainingData(world, triplets, token_ids, vocabulary, features), val, tokenizer)


def open_features(config: TripletsConfig, world: World) -> PanoramaFeatures:
    """The store, or random vectors.

    Raises:
        FileNotFoundError: there is no such store.
        ValueError: ``random:`` without a width.
    """
    kind, _, width = config.features.partition(":")
    if kind == "random":
        if not width.isdecimal():
            raise ValueError(f"features are {config.features!r}: give random:WIDTH, such as random:64")
        return RandomFeatures(world, int(width))
    place = _find(config, config.features, "store of features")
    from vln.features import FeatureStore

    return FeatureStore.open(place)


def open_tokenizer(config: TripletsConfig) -> Any:
    """The tokeniser, from a folder or the Hub.

    Raises:
        FileNotFoundError: there is none.
    """
    kind, _, name = config.tokenizer.partition(":")
    place = name if kind == "hub" else str(_find(config, config.tokenizer, "tokeniser"))
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{place} is no tokeniser of transformers ({error}): give another --tokenizer"
        ) from error


def _find(config: TripletsConfig, name: str, what: str) -> Path:
    tried = (Path(config.data) / name, Path(name))
    for place in tried:
        if place.exists():
            return place
    raise FileNotFoundError(f"no {what}: looked for {' and '.join(map(str, tried))}")


def _tables(
    world: World, items: Sequence[R2RItem], tokenizer: Any, config: TripletsConfig
) -> tuple[Triplets, np.ndarray]:
    items = [item for item in items if len(item.path) > 1]  # test items have no path
    texts = [text for item in items for text in item.instructions]
    triplets = roll_triplets(world, walks_of(items), shortest=config.shortest)
    return triplets, encode(texts, tokenizer, config.max_tokens)


def encode(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> np.ndarray:
    """Token ids of texts, int32 ``[M, L]``, cut at the end before [SEP] and padded on the right."""
    parts = []
    for first in range(0, len(texts), _TEXTS):  # a million lists of Python numbers would fill the memory
        given = list(texts[first : first + _TEXTS])
        rows = tokenizer(given, truncation=True, max_length=max_tokens)["input_ids"]
        lengths = np.array([len(row) for row in rows])
        ids = np.full((len(rows), int(lengths.max())), tokenizer.pad_token_id, dtype=np.int32)
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
        parts.append(ids)
    return _stacked(parts, tokenizer.pad_token_id)


def _stacked(parts: Sequence[np.ndarray], pad_id: int) -> np.ndarray:
    """Tables of ids below each other, padded to the widest."""
    width = max((part.shape[1] for part in parts), default=0)
    padded = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=pad_id) for part in parts]
    return np.concatenate(padded) if padded else np.zeros((0, 0), dtype=np.int32)


def _joined(
    triplets: Triplets, token_ids: np.ndarray, others: Triplets, other_ids: np.ndarray
) -> tuple[Triplets, np.ndarray]:
    others = others._replace(text=others.text + np.int32(len(token_ids)))
    # The released ids are padded with 0, BERT's [PAD].
    ids = _stacked([token_ids, other_ids.astype(np.int32)], 0)
    return Triplets(*(np.concatenate(pair) for pair in zip(triplets, others, strict=True))), ids
