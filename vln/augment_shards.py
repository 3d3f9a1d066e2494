"""Shards of the augmentation: some sampled paths, and what the speaker says of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vln.augment_config import AugmentConfig
from vln.augment_paths import SampledPath
from vln.draws import WORDS, uniforms
from vln.speaker_folder import TrainedSpeaker
from vln.triplets import roll_triplets
from vln.walks import PanoramaFeatures, Walk, WalkTable, path_batch, roll_walks
from vln.world import World

PAPER = {"paths": 178_300, "instructions": 1_020_000, "triplets": 6_482_000}
"""What the published pre-training data are made of."""

_TEXT = 2**32
"""Between the draws of a path's texts, so that those of the first do not depend on how many there are."""


class Job(NamedTuple):
    """What is to be done, the same on every process."""

    paths: list[SampledPath]
    first_id: int
    """Of the paths: above all of the data."""
    world: World
    features: PanoramaFeatures
    trained: TrainedSpeaker
    identity: dict[str, Any]
    """What the output is a function of."""
    seconds: float
    """Spent on sampling the paths."""


class Shard(NamedTuple):
    """Some paths with their instructions, and what they took."""

    rows: list[dict[str, Any]]
    triplets: int
    speaking_s: float
    rolling_s: float


def walks_of_paths(paths: Sequence[SampledPath], num_texts: int) -> list[Walk]:
    """Sampled paths as walks with so many texts each."""
    return [Walk(path.scan_id, path.path, path.heading, num_texts) for path in paths]


def describe(config: AugmentConfig, job: Job, number: int, device: Any) -> Shard:
    """Paths of one shard with their instructions.

    Args:
        config: numbers of texts and their draws.
        job: of `prepare`.
        number: of the shard.
        device: the speaker's.
    """
    first = number * config.shard_size
    paths = job.paths[first : first + config.shard_size]
    started = time.perf_counter()
    walks = walks_of_paths(paths, config.num_instructions)
    table = roll_walks(job.world, walks, shortest=False)
    texts: list[list[str]] = []
    for begin in range(0, len(paths), config.batch_size):
        rows = np.arange(begin, min(begin + config.batch_size, len(paths)))
        texts += _say(config, job, table, rows, first, device)
    spoken = time.perf_counter()
    triplets = len(roll_triplets(job.world, walks, shortest=False).text)
    rolled = time.perf_counter()
    numbers = range(job.first_id + first, job.first_id + first + len(paths))
    described = [_row(number, path, said) for number, path, said in zip(numbers, paths, texts, strict=True)]
    return Shard(described, triplets, spoken - started, rolled - spoken)


@torch.no_grad()
def _say(
    config: AugmentConfig, job: Job, table: WalkTable, rows: np.ndarray, first: int, device: Any
) -> list[list[str]]:
    """Texts of some walks of a shard's table; the walks are read once for all texts."""
    speaker, trained, count = job.trained.speaker, job.trained, config.num_instructions
    batch = path_batch(table, rows, job.world, job.features, angle_size=speaker.config.angle_size,
                       orientation=trained.orientation)  # fmt: skip
    lengths = batch.lengths.to(device)
    path = speaker.encoder(batch.actions.to(device), batch.panoramas.to(device), lengths)
    items = (first + rows[:, None] + _TEXT * np.arange(count)).reshape(-1)

    def draw(step: int, _: int) -> torch.Tensor:
        return torch.from_numpy(uniforms(config.seed, WORDS, step, items, 1)[:, 0])

    said = speaker.say(
        path.repeat_interleave(count, dim=0), lengths.repeat_interleave(count),
        max_words=config.max_words, temperature=config.temperature, draw=draw,
    )  # fmt: skip
    texts = [trained.words.decode(ids) for ids in said.tolist()]
    return [texts[begin : begin + count] for begin in range(0, len(texts), count)]


def _row(path_id: int, path: SampledPath, texts: Sequence[str]) -> dict[str, Any]:
    return {
        "path_id": path_id,
        "scan": path.scan_id,
        "heading": path.heading,
        "path": list(path.path),
        "distance": path.distance_m,
        "instructions": list(texts),
    }


# ---- speed


def speed(
    counts: tuple[int, int, int], seconds: tuple[float, float, float], *, processes: int
) -> dict[str, Any]:
    """Paths, instructions and triplets per second of one process, and what the paper's numbers would take.

    Args:
        counts: of paths, instructions and triplets.
        seconds: spent on drawing the first, saying the second, rolling the third, summed over processes.
        processes: that share the saying.

    Returns:
        ``<kind>_per_second`` of one process, ``processes``, and ``paper_hours`` of each kind with so many
        processes, and ``paper_hours_total``.
    """
    kinds = tuple(PAPER)
    rates = {kind: n / max(s, 1e-9) for kind, n, s in zip(kinds, counts, seconds, strict=True)}
    # Paths are sampled by every process for itself.
    shared = {"paths": 1, "instructions": processes, "triplets": processes}
    hours = {kind: PAPER[kind] / (rates[kind] * shared[kind]) / 3600 for kind in kinds}
    return {
        **{f"{kind}_per_second": round(rate, 3) for kind, rate in rates.items()},
        "processes": processes,
        "paper_hours": {kind: round(value, 5) for kind, value in hours.items()},
        "paper_hours_total": round(sum(hours.values()), 5),
    }


def report(figures: dict[str, Any]) -> str:
    """One text of the figures of `speed`."""
    return (
        f"{figures['paths_per_second']:,.0f} paths/s sampled, {figures['instructions_per_second']:,.1f} "
        f"instructions/s said, {figures['triplets_per_second']:,.0f} triplets/s rolled by one process; the "
        f"paper's {PAPER['paths']:,} paths, {PAPER['instructions']:,} instructions and {PAPER['triplets']:,} "
        f"triplets would take {figures['paper_hours_total']:.2f} h on {figures['processes']} process(es)"
    )
