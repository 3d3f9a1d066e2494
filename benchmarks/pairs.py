"""32 items by heart: ``python -m benchmarks.pairs`` trains the agent, and a copy that cannot read.

The items are 16 pairs in the embedded houses with one start pose and two goals each, so that without the
words nobody can be right about more than half. Both are walked greedily, without the teacher. Writes
``pairs.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fq.provenance import provenance
from fq.run import read_metrics, write_atomically
from vln import houses, train

COPIES: dict[str, tuple[str, ...]] = {"reads": (), "deaf": ("--deaf",)}


def measure(runs: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Train both copies.

    Args:
        runs: folder for the world and the run folders.
        steps: of each.
        seed: of each.

    Returns:
        For each copy ``{"success": percent by step, "seconds": of the processor}``.
    """
    runs.mkdir(parents=True, exist_ok=True)
    world = runs / "world"
    if not world.is_dir():
        houses.main(["--out", str(world), "--num-seen", "10", "--num-unseen", "1", "--train-groups", "40",
                     "--val-groups", "2"])  # fmt: skip
    found = {}
    for name, flags in COPIES.items():
        folder, started = runs / f"{name}-{seed}", time.process_time()
        train.main(["overfit", "--data", str(world), "--steps", str(steps), "--seed", str(seed),
                    "--maps", "0", "--out", str(folder), *flags])  # fmt: skip
        lines = [line for line in read_metrics(folder) if "train/success" in line]
        found[name] = {
            "success": {int(line["step"]): 100 * line["train/success"] for line in lines},
            "seconds": time.process_time() - started,
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/pairs"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pairs.json"))
    options = parser.parse_args(arguments)
    found = measure(options.runs, steps=options.steps, seed=options.seed)
    for name, row in found.items():
        curve = ", ".join(f"{value:.1f} % at {step}" for step, value in row["success"].items())
        print(f"{name}: SR {curve}; {row['seconds']:.0f} s of the processor")
    document = found | {"provenance": provenance(options.seed)}
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
