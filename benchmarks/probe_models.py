"""Bilinear probes of a world: can words be matched to views, and does anything else tell the way?

Score of a candidate with features x and an instruction with words b (how often each): ``b W x + v x``. No
hidden layer, no memory. STOP is scored the same way on what the place itself shows, and on how many steps
were made. A *blind* probe has the features set to zero and keeps the angles; a *deaf* one always reads one
constant instruction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vln.candidates import Panorama, PanoramicSimulator
from vln.data import R2RItem
from vln.world import World

MOST_STEPS = 10
"""Of a rollout that does not stop by itself."""
_STEP_SLOTS = MOST_STEPS + 1


class Items(NamedTuple):
    """Instructions of a split, as arrays."""

    scan_ids: tuple[str, ...]
    starts: tuple[str, ...]
    headings: np.ndarray
    """float64 ``[N]``."""
    words: Tensor
    """float32 ``[N, W]``: how often each word of the vocabulary occurs."""
    paths: tuple[tuple[int, ...], ...]
    """The world's numbers."""

    @property
    def goals(self) -> np.ndarray:
        """int64 ``[N]``."""
        return np.array([path[-1] for path in self.paths])


class Rows(NamedTuple):
    """Steps of teacher-forced walks; C choices, padded."""

    item: np.ndarray
    """int64 ``[R]``."""
    step: np.ndarray
    viewpoint: np.ndarray
    view: np.ndarray
    """int64 ``[R, C]``: the view that shows a choice best, 0 where there is none."""
    angles: np.ndarray
    """float32 ``[R, C, 4]``: sine and cosine of relative heading and of elevation."""
    listed: np.ndarray
    """bool ``[R, C]``: choices other than STOP."""
    target: np.ndarray
    """int64 ``[R]``: choice of the teacher, C for STOP."""


@dataclass
class Sight:
    """What probes see: features of all views, float32 ``[V, 36, D]``, and their mean at each viewpoint."""

    views: Tensor
    mean: Tensor

    @classmethod
    def of(cls, features: np.ndarray) -> Sight:
        """From features ``[V, 36, D]``."""
        views = torch.from_numpy(features)
        return cls(views, views.mean(dim=1))


def read_items(items: Sequence[R2RItem], world: World, vocabulary: Sequence[str]) -> Items:
    """Every instruction of R2R items, with how often it has each word.

    Raises:
        ValueError: an instruction has no word of the vocabulary.
    """
    place = {word: number for number, word in enumerate(vocabulary)}
    told = [(item, text) for item in items for text in item.instructions]
    words = torch.zeros(len(told), len(place))
    for row, (_, text) in enumerate(told):
        for word in text.split():
            if word in place:
                words[row, place[word]] += 1
        if not words[row].any():
            raise ValueError(f"instruction {text!r:.60} has no word of the vocabulary")
    first = {item.scan_id: world.starts[item.scan_id] for item in items}
    index = {item.scan_id: world.graphs[item.scan_id].index for item in items}
    return Items(
        scan_ids=tuple(item.scan_id for item, _ in told),
        starts=tuple(item.path[0] for item, _ in told),
        headings=np.array([item.heading for item, _ in told]),
        words=words,
        paths=tuple(
            tuple(first[item.scan_id] + index[item.scan_id](name) for name in item.path) for item, _ in told
        ),
    )


def exchanged(items: Items) -> Items:
    """The same items, each with an instruction of another goal from the same start pose.

    Raises:
        ValueError: a start pose has one goal only.
    """
    groups: dict[tuple[str, str, float], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(items.scan_ids, items.starts, items.headings.tolist(), strict=True)):
        groups[key].append(row)
    other = np.empty(len(items.starts), dtype=np.int64)
    for key, rows in groups.items():
        for place, row in enumerate(rows):
            others = [n for n in rows if items.paths[n][-1] != items.paths[row][-1]]
            if not others:
                raise ValueError(f"start {key} has one goal only: nothing to exchange its instruction with")
            other[row] = others[place % len(others)]
    return items._replace(words=items.words[torch.from_numpy(other)])


def teacher_rows(items: Items, world: World) -> Rows:
    """All steps of the items' paths, STOP at the end included."""
    simulator = PanoramicSimulator(world, batch_size=len(items.starts))
    now = simulator.new_episodes(items.scan_ids, items.starts, items.headings)
    longest = max(map(len, items.paths))
    paths = np.array([path + path[-1:] * (longest - len(path)) for path in items.paths])
    lengths = np.array([len(path) for path in items.paths])
    found = []
    for step in range(longest):
        following = paths[:, min(step + 1, longest - 1)]
        walks = step + 1 < lengths
        choice = np.where(walks, (now.candidate == following[:, None]).argmax(axis=1), now.stop)
        view, angles, listed = _candidates(now)
        keep = np.flatnonzero(step < lengths)
        target = np.where(walks, choice, view.shape[1])
        found.append(Rows(keep, np.full(len(keep), step), now.viewpoint[keep], view[keep], angles[keep],
                          listed[keep], target[keep]))  # fmt: skip
        now = simulator.choose(choice)
    return Rows(*(np.concatenate(fields) for fields in zip(*found, strict=True)))


def _candidates(now: Panorama) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    listed = now.point_id >= 0
    angles = np.stack(
        [
            np.sin(now.rel_heading),
            np.cos(now.rel_heading),
            np.sin(now.rel_elevation),
            np.cos(now.rel_elevation),
        ],
        axis=-1,
    )
    return np.maximum(now.point_id, 0).astype(np.int64), angles.astype(np.float32), listed


class Probe(torch.nn.Module):
    """A bilinear probe.

    Args:
        num_words: W.
        feature_size: D.
        blind: features count as zero.
        deaf: all instructions count as one and the same.
    """

    def __init__(self, num_words: int, feature_size: int, *, blind: bool = False, deaf: bool = False) -> None:
        super().__init__()
        self.blind, self.deaf = blind, deaf
        width = feature_size + 4
        self.moves = torch.nn.Parameter(torch.zeros(num_words + 1, width))
        """W, and v in the last row."""
        self.stops = torch.nn.Parameter(torch.zeros(num_words + 1, feature_size + _STEP_SLOTS))

    def forward(
        self,
        words: Tensor,
        sight: Sight,
        viewpoint: Tensor,
        view: Tensor,
        angles: Tensor,
        listed: Tensor,
        step: Tensor,
    ) -> Tensor:
        """Scores ``[B, C + 1]``, STOP last; -inf where there is no candidate."""
        if self.deaf:
            words = torch.zeros_like(words)
        words = torch.cat([words, torch.ones(len(words), 1)], dim=1)
        row, column = listed.nonzero(as_tuple=True)
        seen, here = sight.views[viewpoint[row], view[row, column]], sight.mean[viewpoint]  # [P, D], [B, D]
        if self.blind:
            seen, here = torch.zeros_like(seen), torch.zeros_like(here)
        moves = (torch.cat([seen, angles[row, column]], dim=1) * (words @ self.moves)[row]).sum(dim=1)
        steps = torch.nn.functional.one_hot(step.clamp(max=_STEP_SLOTS - 1), _STEP_SLOTS).float()
        stop = (torch.cat([here, steps], dim=1) * (words @ self.stops)).sum(dim=1)
        scores = torch.full(listed.shape, -math.inf).index_put((row, column), moves)
        return torch.cat([scores, stop[:, None]], dim=1)


def train_probe(
    probe: Probe, items: Items, rows: Rows, sight: Sight, *, epochs: int, seed: int, batch_size: int = 1024
) -> None:
    """Teacher forcing: cross-entropy of all steps, AdamW with a rate that falls to 0."""
    random = np.random.default_rng(seed)
    total = epochs * math.ceil(len(rows.item) / batch_size)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.03, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / (total + 1))
    for _ in range(epochs):
        order = random.permutation(len(rows.item))
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            scores = _score(probe, items, rows, sight, part)
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(rows.target[part]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _score(probe: Probe, items: Items, rows: Rows, sight: Sight, part: np.ndarray) -> Tensor:
    fields = (rows.viewpoint, rows.view, rows.angles, rows.listed, rows.step)
    tensors = (torch.from_numpy(values[part]) for values in fields)
    scores: Tensor = probe(items.words[torch.from_numpy(rows.item[part])], sight, *tensors)
    return scores


def action_hits(probe: Probe, items: Items, rows: Rows, sight: Sight) -> np.ndarray:
    """Whether the best candidate is the teacher's, for every step but the last ones; bool ``[R']``."""
    moving = np.flatnonzero(rows.target < rows.view.shape[1])
    with torch.no_grad():
        scores = _score(probe, items, rows, sight, moving)[:, :-1]
    return scores.argmax(dim=1).numpy() == rows.target[moving]


def rollout(probe: Probe, items: Items, sight: Sight, world: World) -> np.ndarray:
    """Where greedy walks end, the world's numbers, int64 ``[N]``."""
    size = len(items.starts)
    simulator = PanoramicSimulator(world, batch_size=size)
    now = simulator.new_episodes(items.scan_ids, items.starts, items.headings)
    ended = np.zeros(size, dtype=bool)
    for step in range(MOST_STEPS):
        fields = _candidates(now)
        with torch.no_grad():
            scores = probe(
                items.words, sight, torch.from_numpy(now.viewpoint), *map(torch.from_numpy, fields),
                torch.full((size,), step),
            )  # fmt: skip
        best = scores.argmax(dim=1).numpy()
        ended |= best == fields[0].shape[1]
        now = simulator.choose(np.where(ended, now.stop, np.minimum(best, fields[0].shape[1] - 1)))
        if ended.all():
            break
    return now.viewpoint
