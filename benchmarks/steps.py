"""Whole training steps with FQ off and on: ``python -m benchmarks.steps``.

The real training loops run in threads of one process, one step of one of them at a time, so that each step
with FQ stands beside the same step without. What is timed is everything between two steps' ends: data, all
phases, optimisers, averages. Memory is the peak of a fresh process. Pictures are random: no time depends on
them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from backbones import train, train_setup
from backbones.configs import (
    BigGANOptim,
    BigGANTraining,
    StyleGAN2Optim,
    StyleGAN2Training,
    Training,
    UGATITTraining,
)
from backbones.presets import PRESETS
from benchmarks.memory import peak_mib
from fq.provenance import provenance
from fq.run import write_atomically

Mode = Literal["none", "regularize", "replace"]
MODES: tuple[Mode, ...] = ("none", "regularize", "replace")


BACKBONES: dict[str, Training] = {
    "biggan": PRESETS["cifar10"][1],
    "stylegan2": PRESETS["ffhq1024"][1],
    "ugatit": PRESETS["selfie2anime"][1],
}
"""The three at the size of the paper."""


def on_cpu(name: str) -> Training:
    """A backbone with the widths and layers of the paper, and as few and small pictures as a CPU can take.

    Args:
        name: of ``BACKBONES``.
    """
    config = BACKBONES[name]
    if isinstance(config, BigGANTraining):
        return replace(config, optim=replace(config.optim, batch_size=8))
    if isinstance(config, StyleGAN2Training):
        model = replace(config.model, resolution=32)
        return replace(config, model=model, optim=replace(config.optim, batch_size=4, accumulation=1))
    return replace(config, model=replace(config.model, light=True, resolution=64, global_layers=6))


def tiny(name: str) -> Training:
    """A backbone so small that a test can train it."""
    config = on_cpu(name)
    if isinstance(config, BigGANTraining):
        return replace(config, model=replace(config.model, g_channels=2, d_channels=2))
    if isinstance(config, StyleGAN2Training):
        return replace(
            config, model=replace(config.model, channel_base=256, channel_max=8, w_dim=8, latent_dim=8)
        )
    return replace(config, model=replace(config.model, channels=2, num_blocks=1))


def measure(config: Training, *, steps: int, modes: tuple[Mode, ...] = MODES) -> dict[str, Any]:
    """Time the steps of one training without FQ and with it, by turns.

    Args:
        config: of the training; its data are replaced by random pictures.
        steps: timed steps of each, after one that warms up.
        modes: of FQ, "none" first.

    Returns:
        ``{"plain_ms", "ratio": {mode: median}, "quartiles": {mode: [lower, upper]}, ...}``, a ratio being the
        time of a step over that of the same step without FQ.
    """
    with tempfile.TemporaryDirectory() as folder:
        configs = [_prepared(config, mode, Path(folder), steps + 1) for mode in modes]
        times = _Turns(configs).run()
    shares = {
        mode: [with_fq / without for with_fq, without in zip(spent[1:], times[0][1:], strict=True)]
        for mode, spent in zip(modes, times, strict=True)
    }
    return {
        "pictures_per_step": _pictures(config),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "clock": _clock_name(),
        "plain_ms": statistics.median(times[0][1:]) * 1e3,
        "ratio": {mode: statistics.median(shares[mode]) for mode in modes[1:]},
        "quartiles": {mode: statistics.quantiles(shares[mode], n=4)[::2] for mode in modes[1:]},
    }


def _prepared(config: Training, mode: Mode, folder: Path, steps: int) -> Training:
    """The training on random pictures, silent but for its steps."""
    draw, size = np.random.default_rng(0), config.model.resolution
    count = 4 * config.optim.batch_size

    def pictures(name: str, side: int) -> str:
        path = folder / f"{name}.npz"
        if not path.exists():
            images = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
            np.savez(path, images=images, labels=np.arange(count) % _classes(config))
        return str(path)

    run = replace(
        config.run, steps=steps, out=str(folder / mode), features="none", sample_every=0, checkpoint_every=0,
        log_every=steps + 1,
    )  # fmt: skip
    quantizer = replace(config.quantizer, fq=mode)
    if isinstance(config, UGATITTraining):
        source = ",".join(f"{name}={pictures(name, size)}" for name in ("A", "B", "testA", "testB"))
        data: Any = replace(config.data, data=source)
    else:
        data = replace(config.data, data=pictures("pictures", size), num_workers=0)
    return replace(config, data=data, run=run, quantizer=quantizer)


def _pictures(config: Training) -> int:
    """Real pictures that a step takes from a domain."""
    optim = config.optim
    if isinstance(optim, BigGANOptim):
        return optim.batch_size * optim.accumulation * optim.d_steps
    return optim.batch_size * (optim.accumulation if isinstance(optim, StyleGAN2Optim) else 1)


def _classes(config: Training) -> int:
    return 1 if isinstance(config, UGATITTraining) else config.model.num_classes


class _Turns:
    """Trainings in threads of their own that take turns, step by step."""

    def __init__(self, configs: list[Training]) -> None:
        self.configs = configs
        self.times: list[list[float]] = [[] for _ in configs]
        self._turn, self._changed = 0, threading.Condition()
        self._numbers: dict[int, int] = {}
        self._begun: dict[int, float] = {}
        self._finished: set[int] = set()
        self._errors: list[BaseException] = []

    def run(self) -> list[list[float]]:
        """Seconds of every step of every training."""
        # It belongs to the process and would hold this precision for whatever runs later.
        AcceleratorState._reset_state(reset_partial_state=True)
        original: Callable[..., None] = train_setup.Reports.finish
        train_setup.Reports.finish = lambda reports, now, terms: self._step_done(terms)  # type: ignore
        try:
            threads = [
                threading.Thread(target=self._train, args=(number,)) for number in range(len(self.configs))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            train_setup.Reports.finish = original  # type: ignore
            AcceleratorState._reset_state(reset_partial_state=True)
        if self._errors:
            raise self._errors[0]
        return self.times

    def _train(self, number: int) -> None:
        self._numbers[threading.get_ident()] = number
        try:
            self._wait(number)
            self._begun[number] = _clock()
            train.train(self.configs[number])
        except BaseException as error:  # handed to the thread that waits for all
            self._errors.append(error)
        finally:
            with self._changed:
                self._finished.add(number)
                self._next()

    def _step_done(self, terms: Tensor) -> None:
        terms.cpu()  # what the loop itself waits for
        number = self._numbers[threading.get_ident()]
        self.times[number].append(_clock() - self._begun[number])
        with self._changed:
            self._next()
        self._wait(number)
        self._begun[number] = _clock()

    def _next(self) -> None:
        left = [number for number in range(len(self.configs)) if number not in self._finished]
        if left:
            self._turn = next((number for number in left if number > self._turn), left[0])
        self._changed.notify_all()

    def _wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == number or bool(self._errors))
        if self._errors:
            raise RuntimeError("another training stopped")


def on_gpu(name: str, *, steps: int, small: bool = False) -> dict[str, Any]:
    """Pictures a second and memory of a whole step in bfloat16, FQ off and on.

    Args:
        name: of ``BACKBONES``.
        steps: timed steps of each kind.
        small: take the tiny form, for a dry run; without CUDA there are no figures of memory.

    Returns:
        What :func:`measure` returns, and ``"pictures_per_second"`` and ``"peak_mib"`` by mode.
    """
    config = tiny(name) if small else BACKBONES[name]
    config = replace(config, run=replace(config.run, mixed_precision="bf16"))
    result = measure(config, steps=steps)
    rate = result["pictures_per_step"] / result["plain_ms"] * 1e3
    ratios = {"none": 1.0} | result["ratio"]
    result["pictures_per_second"] = {mode: rate / ratio for mode, ratio in ratios.items()}
    if torch.cuda.is_available():
        result["peak_mib"] = {mode: _gpu_peak(config, mode) for mode in MODES}
    return result


def _gpu_peak(config: Training, mode: Mode) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        _Turns([_prepared(config, mode, Path(folder), 3)]).run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _clock_name() -> str:
    return "wall time, synchronised" if torch.cuda.is_available() else "process time"


def peak(name: str, mode: Mode) -> float:
    """Peak memory in MiB of a fresh process that trains for three steps, its libraries included."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.steps", "--peak", name, mode], capture_output=True, text=True,
        check=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _print_peak(name: str, mode: Mode) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _Turns([_prepared(on_cpu(name), mode, Path(folder), 3)]).run()
    print(peak_mib())


def main(arguments: list[str] | None = None) -> None:
    """Measure the backbones and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--peak", nargs=2, metavar=("BACKBONE", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--only-peaks", action="store_true", help="keep the times that --out holds")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/steps.json"), help="JSON to write"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peak:
        _print_peak(*options.peak)
        return
    if options.only_peaks:
        result: dict[str, Any] = json.loads(options.out.read_text())
        for name in options.backbones:
            result[name]["peak_mib"] = {mode: peak(name, mode) for mode in MODES}
        write_atomically(options.out, json.dumps(result, indent=2) + "\n")
        return
    result = {}
    for name in options.backbones:
        result[name] = measure(on_cpu(name), steps=options.steps)
        if not torch.cuda.is_available():
            result[name]["peak_mib"] = {mode: peak(name, mode) for mode in MODES}
        ratios = ", ".join(f"{ratio:.3f}x {mode}" for mode, ratio in result[name]["ratio"].items())
        print(f"{name}: plain step {result[name]['plain_ms']:.0f} ms; {ratios}", flush=True)
    result["provenance"] = provenance(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
