"""Train BigGAN and FQ-BigGAN on handwritten digits and write a report: ``python -m benchmarks.demo``.

Three runs of the preset ``digits`` from one seed and with one budget, two at a time on two cores, then
``report.md``. Runs that were finished or interrupted are taken up where they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from backbones.presets import DIGITS
from benchmarks.compare import compare, read_run
from benchmarks.overhead import measure
from fq.run import read_metrics

MODES = ("none", "regularize", "replace")
STEPS = 1200


def main() -> None:
    """Train, compare, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the runs and the report")
    parser.add_argument("--steps", type=int, default=STEPS, help="generator steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # The slowest run first, so that the last one to finish does not leave the other core idle for long.
    with ThreadPoolExecutor(max_workers=max(1, min(len(MODES), os.cpu_count() or 1))) as pool:
        jobs = {
            mode: pool.submit(_train, mode, options.out, options.steps, options.seed)
            for mode in reversed(MODES)
        }
        while not all(job.done() for job in jobs.values()):
            elapsed = f"{time.monotonic() - started:4.0f} s"
            print(f"\r{_state(options.out, options.steps)}   {elapsed}", end="", flush=True)
            time.sleep(1)
        print()
        for job in jobs.values():
            job.result()
    torch.set_num_threads(1)
    overhead = measure(DIGITS, batch_size=32, repeats=31, seed=options.seed)
    cost = ", ".join(f"{share:.1%} for {mode}" for mode, share in overhead["overhead"].items())
    report = compare(
        [read_run(options.out / mode) for mode in MODES],
        options.out,
        title="Handwritten digits: BigGAN and FQ-BigGAN",
        note=f"{options.steps} steps is all each run gets, whatever its curve does; nothing is selected.",
        extra=f"Cost of FQ, measured by turns in one process ({overhead['clock']}, {overhead['threads']} "
        f"thread, {overhead['repeats']} discriminator steps of each kind, median of ratios): {cost} over a "
        f"plain step of {overhead['plain_ms']:.1f} ms at this small width, where a layer is cheap. The "
        "column s/step above is from runs that shared the machine.",
        more={"overhead": overhead},
    )
    print(f"report: {report}   ({time.monotonic() - started:.0f} s)")


def _train(mode: str, out: Path, steps: int, seed: int) -> None:
    command = [sys.executable, "-m", "backbones.train", "digits", "--fq", mode, "--steps", str(steps),
               "--seed", str(seed), "--out", str(out / mode)]  # fmt: skip
    with (out / f"{mode}.log").open("w") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).returncode
    if code:
        tail = (out / f"{mode}.log").read_text()[-800:]
        raise SystemExit(f"error: the run {out / mode} stopped with code {code}:\n{tail}")


def _state(out: Path, steps: int) -> str:
    states = []
    for mode in MODES:
        path = out / mode / "metrics.jsonl"
        lines = read_metrics(path) if path.is_file() else []
        states.append(f"{mode} {lines[-1]['step'] if lines else 0}/{steps}")
    return "  ".join(states)


if __name__ == "__main__":
    main()
