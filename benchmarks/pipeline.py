"""The data of the published pre-training, made here: ``python -m benchmarks.pipeline --data FOLDER``.

All paths that pass R2R's filter are sampled and rolled into triplets, whole. What a speaker of the published
size says, and steps of the model of the published size, are timed on a part of it. Features are random
vectors of the published width; nothing is licensed but the graphs. Writes ``pipeline.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import portable
from benchmarks.pretraining_speed import FULL
from benchmarks.pretraining_speed import measure as measure_training
from fq.provenance import provenance
from fq.run import write_atomically
from vln.augment_config import AugmentConfig
from vln.augment_paths import PathSource
from vln.augment_shards import PAPER, Job, describe, walks_of_paths
from vln.data import read_r2r
from vln.model import PrevalentConfig
from vln.navgraph import load_graphs
from vln.pretrain_data import RandomFeatures
from vln.speaker_config import ENVDROP
from vln.speaker_folder import TrainedSpeaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words
from vln.triplets import roll_triplets
from vln.world import World

NUM_INSTRUCTIONS = 6
MAX_WORDS = 80
"""Of the speaker that made the published instructions."""


def untrained_speaker(words: Words, *, feature_size: int, hidden_size: int) -> TrainedSpeaker:
    """A speaker of some words, with new weights."""
    sizes, view_size = ENVDROP.model, feature_size + ENVDROP.model.angle_size
    torch.manual_seed(0)
    config = SpeakerConfig(vocab_size=len(words), view_size=view_size, angle_size=sizes.angle_size,
                           hidden_size=hidden_size, word_size=sizes.word_size)  # fmt: skip
    return TrainedSpeaker(Speaker(config).eval(), words, "blocks")


def measure(
    data: Path,
    *,
    num_said: int,
    batch: int,
    steps: int,
    model: PrevalentConfig = FULL,
    hidden_size: int = ENVDROP.model.hidden_size,
) -> dict[str, Any]:
    """Time the four parts.

    Args:
        data: folder with graphs and R2R's training items.
        num_said: paths that the speaker tells.
        batch: triplets of a training step.
        steps: timed training steps.
        model: that is trained.
        hidden_size: of the speaker.

    Returns:
        ``{"paths", "triplets", "instructions", "training"}``, each with ``count``, ``seconds`` and
        ``per_second``; for the last two also the ``paper_hours`` that the published numbers would take.

    Raises:
        FileNotFoundError: graphs or items are missing.
        ValueError: a file is damaged, or no path passes.
    """
    items = read_r2r(data, "train")
    graphs = load_graphs(data, sorted({item.scan_id for item in items}))
    started = time.perf_counter()
    source = PathSource(graphs)
    paths = source.sample(len(source), seed=0)
    found = {"paths": _rate(len(paths), time.perf_counter() - started)}

    world = World(graphs)
    roll_triplets(world, walks_of_paths(paths[:1], 1), shortest=False)  # builds the world's tables
    started = time.perf_counter()
    triplets = roll_triplets(world, walks_of_paths(paths, NUM_INSTRUCTIONS), shortest=False)
    found["triplets"] = _rate(len(triplets.text), time.perf_counter() - started)
    del triplets

    words = Words.count(text for item in items for text in item.instructions)
    features = RandomFeatures(world, model.feature_size)
    trained = untrained_speaker(words, feature_size=features.width, hidden_size=hidden_size)
    told = paths[:num_said]
    features.gather([path.scan_id for path in told for _ in path.path], [n for p in told for n in p.path])
    config = AugmentConfig(speaker="", out="", num_instructions=NUM_INSTRUCTIONS, max_words=MAX_WORDS,
                           shard_size=num_said)  # fmt: skip
    job = Job(told, 1, world, features, trained, {}, 0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained.speaker.to(device)
    shard = describe(config, job, 0, device)
    found["instructions"] = _rate(num_said * NUM_INSTRUCTIONS, shard.speaking_s)
    found["instructions"]["words"] = sum(len(t.split()) for row in shard.rows for t in row["instructions"])

    tokens = min(80, model.max_position_embeddings)
    step = measure_training(model, batch=batch, tokens=tokens, steps=steps, device=device, roof=float("inf"))
    found["training"] = _rate(batch * steps, batch * steps / step["triplets_per_second"]) | {
        "parameters": step["parameters"], "batch": batch, "tokens": tokens,
    }  # fmt: skip
    for name, whole in (("instructions", "instructions"), ("training", "triplets")):
        found[name]["paper_hours"] = PAPER[whole] / found[name]["per_second"] / 3600
    return found


def _rate(count: int, seconds: float) -> dict[str, float]:
    return {"count": count, "seconds": seconds, "per_second": count / seconds}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/vln"))
    parser.add_argument("--num-said", type=int, default=512, help="paths that the speaker tells")
    parser.add_argument("--batch", type=int, default=8, help="triplets of a training step")
    parser.add_argument("--steps", type=int, default=3, help="timed training steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pipeline.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure(options.data, num_said=options.num_said, batch=options.batch, steps=options.steps)
    for name, row in found.items():
        more = f"; the published number takes {row['paper_hours']:.1f} h" if "paper_hours" in row else ""
        print(
            f"{name}: {row['count']:,.0f} in {row['seconds']:.1f} s, {row['per_second']:,.1f} a second{more}"
        )
    record = provenance(0)
    document = found | {"provenance": record | {"command": portable(record["command"])}}
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
