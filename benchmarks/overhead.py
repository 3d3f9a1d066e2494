"""What FQ adds to a discriminator step: ``python -m benchmarks.overhead``.

The same step of the same BigGAN discriminator, with and without FQ, in one process and by turns, so that
whatever else the machine does falls on both. On a CPU the clock is this process's own time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fq
from backbones.biggan import BigGANConfig, Discriminator
from backbones.configs import BigGANTraining, QuantizerConfig
from backbones.losses import hinge_discriminator
from backbones.presets import CIFAR10
from fq.provenance import provenance
from fq.run import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("regularize", "replace")


def measure(config: BigGANTraining, *, batch_size: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Median time of a discriminator step without FQ, and the factor of each mode.

    Args:
        config: model and quantiser.
        batch_size: real pictures; as many fakes join them.
        repeats: timed steps of each kind, after two that warm up.
        seed: of weights and pictures.

    Returns:
        ``{"plain_ms", "overhead": {name: share}, "quartiles": {name: [lower, upper]}, "sites": {...}, ...}``
        where a share of 0.1 is 10 % more than the plain step next to it. Names are the modes, with FQ at all
        sites; ``sites`` has mode regularize at one site alone.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = Discriminator(config.model).to(device).to(memory_format=torch.channels_last)
    steps = [_Step(plain, None, config)]
    sites: list[str] = []

    def add(mode: str, layers: Sequence[str]) -> None:
        copied = copy.deepcopy(plain)
        handle = _attach(copied, config.quantizer, mode, layers)
        steps.append(_Step(copied, handle, config))
        sites[:] = sites or handle.names

    for mode in MODES:
        add(mode, config.quantizer.layers)
    for site in sites:
        add("regularize", (site,))
    size, classes = config.model.resolution, config.model.num_classes
    times: list[list[float]] = [[] for _ in steps]
    for repeat in range(repeats + 2):
        images = torch.randn(2 * batch_size, 3, size, size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(classes, (2 * batch_size,), device=device)
        for step, spent in zip(steps, times, strict=True):
            begin = _clock(device)
            step(images, labels)
            if repeat >= 2:
                spent.append(_clock(device) - begin)
    shares = {
        name: [with_fq / without - 1 for with_fq, without in zip(times[1 + i], times[0], strict=True)]
        for i, name in enumerate((*MODES, *sites))
    }
    return {
        "batch": f"{batch_size} real + {batch_size} fake",
        "codebook_size": config.quantizer.codebook_size,
        "d_channels": config.model.d_channels,
        "resolution": size,
        "threads": torch.get_num_threads(),
        "clock": "process time" if device.type == "cpu" else "wall time, synchronised",
        "repeats": repeats,
        "plain_ms": statistics.median(times[0]) * 1e3,
        "overhead": {mode: statistics.median(shares[mode]) for mode in MODES},
        "sites": {site: statistics.median(shares[site]) for site in sites},
        "quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in shares.items()},
    }


class _Step:
    """One discriminator step: forward of fakes and reals together, hinge loss, backward, Adam."""

    def __init__(self, model: nn.Module, handle: fq.Handle | None, config: BigGANTraining) -> None:
        self.model, self.handle = model, handle
        self.optimizer = torch.optim.Adam(model.parameters(), config.optim.lr_d, (0.0, 0.999))

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        fake, real = self.model(images, labels).chunk(2)
        loss_real, loss_fake = hinge_discriminator(real, fake)
        loss = loss_real + loss_fake
        if self.handle:
            loss = loss + self.handle.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def _attach(model: nn.Module, chosen: QuantizerConfig, mode: str, layers: Sequence[str]) -> fq.Handle:
    return fq.attach(
        model,
        layers,
        codebook_size=chosen.codebook_size,
        decay=chosen.decay,
        commitment_weight=chosen.commitment_weight,
        mode=mode,  # type: ignore[arg-type]
        concat_parts=2,
    )


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure the CIFAR-10 discriminator at full width and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument(
        "--channels", type=int, default=64, help="width of the discriminator (64 is the paper's)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="real pictures; as many fakes join them")
    parser.add_argument("--codebook-size", type=int, default=1024, help="codes of each of the four sites")
    parser.add_argument("--repeats", type=int, default=21, help="timed steps of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/overhead.json"), help="JSON to write"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = CIFAR10
    config = replace(
        preset,
        model=BigGANConfig(resolution=32, d_channels=options.channels, init="normal02"),
        quantizer=replace(preset.quantizer, codebook_size=options.codebook_size),
    )
    result = measure(config, batch_size=options.batch_size, repeats=options.repeats)
    result["provenance"] = provenance(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(result, indent=2) + "\n")
    print(f"plain step {result['plain_ms']:.0f} ms; FQ adds", end=" ")
    print(", ".join(f"{share:.1%} ({mode})" for mode, share in result["overhead"].items()))
    print("at one site alone (regularize):", end=" ")
    print(", ".join(f"{share:.1%} {layer}" for layer, share in result["sites"].items()))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
