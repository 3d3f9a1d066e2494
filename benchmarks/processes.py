"""What agreement between processes costs: ``python -m benchmarks.processes``.

Two processes on this machine train the same BigGAN discriminator under DistributedDataParallel: without FQ,
with FQ and a codebook a process, and with common codebooks whose statistics travel beside the rest of the
forward, or are waited for. By turns in the same processes, wall time.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fq
from backbones.biggan import BigGANConfig, Discriminator
from backbones.losses import hinge_discriminator
from backbones.presets import CIFAR10
from fq.provenance import provenance
from fq.run import write_atomically

FORMS = ("plain", "apart", "together", "together, waiting")


class _Step:
    """One discriminator step under DDP, in one of the forms."""

    def __init__(self, model: nn.Module, form: str, codebook_size: int) -> None:
        self.waiting, self.handle = form.endswith("waiting"), None
        if form != "plain":
            options = fq.CodebookOptions(sync=form != "apart", init="data")
            self.handle = fq.attach(
                model, CIFAR10.quantizer.layers, codebook_size=codebook_size, concat_parts=2,
                options=options,
            )  # fmt: skip
        # Newer versions of PyTorch have another name for it, older ones only this.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        self.model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.optimizer = torch.optim.Adam(model.parameters(), 2e-4, (0.0, 0.999))

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        handle = self.handle
        if handle and self.waiting:
            enter, handle._enter = handle._enter, lambda *_: None  # type: ignore[method-assign]
        fake, real = self.model(images, labels).chunk(2)
        if handle and self.waiting:
            handle._enter = enter  # type: ignore[method-assign]
        loss = sum(hinge_discriminator(real, fake), torch.zeros(()))
        self.optimizer.zero_grad(set_to_none=True)
        (loss + handle.loss() if handle else loss).backward()
        self.optimizer.step()


def measure(rank: int, folder: str, channels: int, batch_size: int, codebook_size: int, repeats: int) -> None:
    """Work of one process; rank 0 leaves its figures in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(minutes=5))  # fmt: skip
    torch.manual_seed(0)
    config = BigGANConfig(resolution=32, d_channels=channels)
    plain = Discriminator(config).to(memory_format=torch.channels_last)
    steps = {form: _Step(copy.deepcopy(plain), form, codebook_size) for form in FORMS}
    calls = {form: _counted(step) for form, step in steps.items()}
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    collectives: dict[str, list[int]] = {}
    for repeat in range(repeats + 3):
        images = torch.randn(2 * batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(config.num_classes, (2 * batch_size,))
        for form, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            collectives[form] = call(images, labels)
            if repeat >= 3:
                times[form].append(time.perf_counter() - start)
    if rank == 0:
        found = {
            "ms": {form: statistics.median(values) * 1e3 for form, values in times.items()},
            "over plain": {
                form: statistics.median(a / b - 1 for a, b in zip(times[form], times["plain"], strict=True))
                for form in FORMS[1:]
            },
            "FQ's all-reduces of a step, bytes": collectives,
        }
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _counted(step: _Step) -> Callable[..., list[int]]:
    """The step, returning the size of every all-reduce that Python asks for in it (DDP's own are in C++)."""

    def call(*arguments: torch.Tensor) -> list[int]:
        sizes, all_reduce = [], dist.all_reduce

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel() * tensor.element_size())
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counting  # type: ignore[assignment]
        try:
            step(*arguments)
        finally:
            dist.all_reduce = all_reduce
        return sizes

    return call


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--channels", type=int, default=32, help="width of the discriminator")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="real pictures a process; as many fakes join"
    )
    parser.add_argument("--codebook-size", type=int, default=1024, help="codes of each of the four sites")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each form")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/processes.json"), help="JSON to write"
    )
    options = parser.parse_args(arguments)
    settings = (options.channels, options.batch_size, options.codebook_size, options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, *settings), nprocs=2)
        found = json.loads((Path(folder) / "found.json").read_text())
    names = ("d_channels", "batch_size", "codebook_size", "repeats")
    found |= dict(zip(names, settings, strict=True)) | {
        "backend": "gloo",
        "clock": "wall time, two processes",
    }
    found["provenance"] = provenance(0)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(found, indent=2) + "\n")
    print(", ".join(f"{form} {ms:.0f} ms" for form, ms in found["ms"].items()))
    print("over plain: " + ", ".join(f"{form} {share:.1%}" for form, share in found["over plain"].items()))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
