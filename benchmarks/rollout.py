"""Speed of rollouts of the R2R agent, with and without cached words, and where the time goes:
``python -m benchmarks.rollout --out rollout.json``.

Greedy walks in the embedded houses with fixed random view features. An agent step is one decision of one row.
On a CPU process time is measured, on a GPU wall time. For context: 0.75 s an iteration are reported for
VLN-BERT on one GPU, where simulator and reading of features dominate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fq.provenance import provenance
from fq.run import write_atomically
from vln.agent import Episodes, rollout
from vln.follower import Follower, FollowerConfig
from vln.houses import HousesConfig, generate
from vln.model import Prevalent, PrevalentConfig
from vln.pretrain_data import RandomFeatures
from vln.surroundings import Clock, Surroundings
from vln.world import World

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "houses": (
        {"vocab_size": 200, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256,
         "num_text_layers": 2, "num_cross_layers": 2, "feature_size": 64, "angle_size": 8},
        {"encoder_hidden": 64, "decoder_hidden": 128, "action_embedding": 16},
    ),
    "paper": ({}, {}),
}  # fmt: skip
"""Pre-trained model and agent; the paper's are 9 + 4 layers of width 768 on 2048 features."""

PUBLISHED_SECONDS = 0.75
"""An iteration of VLN-BERT, from its issue threads."""


def make(sizes: str, *, batch_size: int, tokens: int, device: str) -> tuple[Follower, Surroundings, Episodes]:
    """An agent, its surroundings and a batch, all from one seed.

    Raises:
        ValueError: unknown sizes.
    """
    if sizes not in SIZES:
        raise ValueError(f"sizes are {sizes!r}, expected one of {', '.join(SIZES)}")
    houses = generate(HousesConfig(num_seen=4, num_unseen=1, train_groups=16, val_groups=2))
    world = World(houses.graphs)
    torch.manual_seed(0)
    trunk = PrevalentConfig(**SIZES[sizes][0])
    agent = Follower(Prevalent(trunk), FollowerConfig(**SIZES[sizes][1])).to(device).eval()
    features = RandomFeatures(world, trunk.feature_size)
    surroundings = Surroundings.of(trunk, world, features, device=device)
    rows = [houses.r2r["train"][number % len(houses.r2r["train"])] for number in range(batch_size)]
    random = np.random.default_rng(0)
    ids = random.integers(5, trunk.vocab_size, size=(batch_size, 1, tokens))
    episodes = Episodes(
        tuple((f"{number}_0",) for number in range(batch_size)),
        np.arange(batch_size),
        np.array([world.index(row["scan"], row["path"][0]) for row in rows]),
        np.array([row["heading"] for row in rows]),
        None,
        ids,
        np.full((batch_size, 1), tokens),
    )
    return agent, surroundings, episodes


@torch.no_grad()
def measure(
    sizes: str, *, batch_size: int = 20, tokens: int = 60, max_steps: int = 10, rounds: int = 3,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Agent steps a second and shares of the time, cached and not, taking turns.

    Args:
        sizes: of the agent, see `SIZES`.
        batch_size: rows.
        tokens: of every text.
        max_steps: of every walk.
        rounds: of both, the median counts; one more before them is not counted.
        device: of the agent.

    Returns:
        ``{"sizes", "batch_size", "tokens", "cached": {...}, "uncached": {...}, "speedup"}``.

    Raises:
        ValueError: unknown sizes, or no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: give at least 1")
    agent, surroundings, episodes = make(sizes, batch_size=batch_size, tokens=tokens, device=device)
    rates: dict[str, list[float]] = {"cached": [], "uncached": []}
    timer = time.process_time if device == "cpu" else time.perf_counter
    clocks = {name: Clock(timer) for name in rates}
    for number in range(rounds + 1):
        for name in rates:
            clock, started = clocks[name] if number else Clock(timer), timer()
            found = rollout(
                agent, surroundings, episodes, feedback="argmax", max_steps=max_steps,
                cache_text=name == "cached", clock=clock,
            )  # fmt: skip
            if number:
                rates[name].append(found.num_active / (timer() - started))
    result: dict[str, Any] = {
        "sizes": sizes, "batch_size": batch_size, "tokens": tokens, "max_steps": max_steps, "device": device,
    }  # fmt: skip
    for name, values in rates.items():
        clock = clocks[name]
        result[name] = {
            "steps_per_second": statistics.median(values),
            "share_simulator": clock.share("simulator"),
            "share_features": clock.share("features"),
            "share_model": clock.share("model"),
        }
    result["speedup"] = result["cached"]["steps_per_second"] / result["uncached"]["steps_per_second"]
    return result


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--max-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("rollout.json"))
    options = parser.parse_args(arguments)
    results = []
    for sizes in options.sizes:
        results.append(
            measure(
                sizes, batch_size=options.batch_size, max_steps=options.max_steps, rounds=options.rounds,
                device=options.device,
            )
        )  # fmt: skip
        for name in ("cached", "uncached"):
            row = results[-1][name]
            outside = row["share_simulator"] + row["share_features"]
            print(
                f"{sizes:8} {name:9} {row['steps_per_second']:9.1f} agent steps/s, simulator "
                f"{row['share_simulator']:5.1%}, features {row['share_features']:5.1%}, both {outside:5.1%}"
            )
        print(f"{sizes:8} caching the words: {results[-1]['speedup']:.2f} times as fast")
    document = {
        "rollouts": results,
        "published": {"seconds_per_iteration": PUBLISHED_SECONDS},
        "provenance": provenance(0),
    }
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
