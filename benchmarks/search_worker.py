"""One measurement in a process of its own: ``python -m benchmarks.search_worker JOB`` prints it as JSON.

It imports little, because :mod:`benchmarks.search` starts one for every shape and for every memory figure.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import (
    LARGE,
    MAKERS,
    MODES,
    PEERS,
    Peer,
    Product,
    Shape,
    as_tokens,
    clustered,
    exactness,
    unavailable,
)

_PROC = Path("/proc/self")


def time_shape(
    shape: Shape,
    *,
    data: str,
    peers: list[str],
    repeats: int,
    modes: tuple[str, ...] = MODES,
    limit: bool = True,
) -> dict[str, Any]:
    """Times of one shape and kind of data.

    Args:
        shape: of the features.
        data: ``"clustered"`` or ``"feature_like"``.
        peers: names in ``PEERS``, ``"ours"`` first; those that a mode does not have are left out of it.
        repeats: rounds; each sets every peer beside a run of ours.
        modes: of ``MODES``.
        limit: whether to time, in every mode, the matrix product alone, and with a training mode the copies
            that nobody can do without: the output, and in a step the leaf and its gradient.

    Returns:
        ``{mode: {peer: {"ms", "ratio", "quartiles", "ratios", "differ", "beyond"} or {"skipped": why}}}``,
        where a ratio is the peer's time over that of the run of ours just before it; also ``"limit"``.
    """
    features, state = MAKERS[data](shape)
    result: dict[str, Any] = {}
    for mode in modes:
        calls, entries = _candidates(peers, mode, features, state, shape)
        if limit:
            product, tokens = Product(state.codes, shape.tokens), as_tokens(features)
            copies = MODES.index(mode) if mode != "train_step" else 3
            for name in ("mm", "convolution"):
                calls[name] = partial(_least, getattr(product, name), tokens, features, copies)
            product.mm(tokens)  # the pages of the kept result are its cost only once
        times, ratios = _by_turns(calls, repeats)
        for name in calls:
            entries.setdefault(name, {})["ms"] = statistics.median(times[name]) * 1e3
            if name != "ours":
                entries[name] |= {"ratio": statistics.median(ratios[name]), "ratios": ratios[name],
                                  "quartiles": statistics.quantiles(ratios[name], n=4)[::2]}  # fmt: skip
        if "mm" in calls:
            forms = {name: entries.pop(name) for name in ("mm", "convolution")}
            best = min(forms, key=lambda name: forms[name]["ratio"])
            gflops = shape.flop / forms[best]["ms"] / 1e6
            entries["limit"] = {"best": best, "gflops": gflops, "share": forms[best]["ratio"], **forms}
        result[mode] = entries
        print(f"    {data} {mode}: " + _line(entries), file=sys.stderr, flush=True)
    return result


def _least(product: Callable[[Tensor], None], tokens: Tensor, features: Tensor, copies: int) -> list[Tensor]:
    """The product, and as many fresh tensors like the features as the mode has to hand out."""
    product(tokens)
    return [features.clone() for _ in range(copies)]


def _candidates(
    peers: list[str], mode: str, features: Tensor, state: Any, shape: Shape
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The call of every peer that has the mode and can run, and what is known of each before it is timed."""
    calls: dict[str, Callable[[], Any]] = {}
    entries: dict[str, Any] = {}
    for name in peers:
        if mode not in PEERS[name].modes:
            continue
        why = unavailable(name)
        if why is None:
            try:
                calls[name], entries[name] = _prepare(name, mode, features, state, shape)
            except Exception as error:  # another's package may fail in any way; the report says so
                if name.startswith("ours"):
                    raise
                why = f"failed: {str(error).splitlines()[0][:200]}"
        if why is not None:
            entries[name] = {"skipped": why}
    return calls, entries


def _prepare(
    name: str, mode: str, features: Tensor, state: Any, shape: Shape
) -> tuple[Callable[[], Any], dict[str, float]]:
    """A peer's call, warmed up, and how exact the codes of its first call were."""
    peer, inputs = PEERS[name](state), _inputs(PEERS[name], mode, features)
    # A slice of the samples warms a large shape up; a compiled form must see the shape itself.
    part = slice(None)
    if shape.scores >= LARGE and name != "addmm_compiled":
        part = slice(len(inputs[0]) // 8)
    found = _call(peer, mode, [value[part] for value in inputs])
    tokens = inputs[0][part] if inputs[0].ndim == 2 else as_tokens(inputs[0][part])
    exact = exactness(found if mode == "search" else found.indices, tokens, state.codes)

    def call() -> Any:
        return _call(peer, mode, inputs)

    if mode != "search":
        call.reset = lambda: peer.reset(state)  # type: ignore[attr-defined]
    return call, exact


def _inputs(kind: type[Peer], mode: str, features: Tensor) -> list[Tensor]:
    """Tokens for a search; features, and the gradient of the output, for a layer in training."""
    if mode == "search":
        return [features if kind.from_images else as_tokens(features)]
    layout = torch.channels_last if kind.channels_last else torch.contiguous_format
    features = features.contiguous(memory_format=layout)
    if mode == "train_forward":
        return [features.detach().requires_grad_()]
    draw = torch.Generator().manual_seed(1)
    gradient = torch.randn(features.shape, generator=draw).to(features.device)
    return [features, gradient.contiguous(memory_format=layout)]


def _call(peer: Peer, mode: str, inputs: list[Tensor]) -> Any:
    if mode == "search":
        with torch.no_grad():
            return peer.search(*inputs)
    return peer.forward(*inputs) if mode == "train_forward" else peer.step(*inputs)


def _by_turns(
    calls: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every call, and each one's ratio to the run of ours just before it."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> float:
        getattr(calls[name], "reset", lambda: None)()
        begin = clock()
        output = calls[name]()
        spent = clock() - begin
        del output
        times[name].append(spent)
        return spent

    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in calls:
                if name != "ours":
                    ours = timed("ours")
                    ratios[name].append(timed(name) / ours)
    finally:
        gc.enable()
    return times, ratios


def _line(entries: dict[str, Any]) -> str:
    ours = f"ours {entries['ours']['ms']:.1f} ms" if "ours" in entries else ""
    others = [f"{name} {entry['ratio']:.2f}" for name, entry in entries.items() if "ratio" in entry]
    return ", ".join([ours, *others])


def growth(shape: Shape, *, peer: str, mode: str) -> float | None:
    """MiB by which one call raises the peak of this process's memory; call it in a fresh process.

    Args:
        shape: of the features, which are there before.
        peer: name in ``PEERS``.
        mode: of ``MODES``.

    Returns:
        The growth (for a search without the indices it returns), or ``None`` where /proc does not tell.
    """
    if not (_PROC / "clear_refs").exists():
        return None
    features, state = clustered(shape)
    candidate, inputs = PEERS[peer](state), _inputs(PEERS[peer], mode, features)
    del features
    few = 256 if inputs[0].ndim == 2 else 1
    _call(candidate, mode, [value[:few] for value in inputs])
    candidate.reset(state)
    gc.collect()
    _trim()
    (_PROC / "clear_refs").write_text("5")  # the peak becomes what is resident now
    before = _status("VmRSS")
    output = _call(candidate, mode, inputs)
    grown = _status("VmHWM") - before
    if mode == "search":
        grown -= output.numel() * 8
    return grown / 2**20


def _trim() -> None:
    """Return freed memory to the system: a later call could hide in it."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass


def _status(key: str) -> int:
    line = next(line for line in (_PROC / "status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def main(job: dict[str, Any]) -> None:
    """Do one job.

    Args:
        job: ``{"task": "time" or "memory", "shape": [...], ...}`` with the arguments of :func:`time_shape` or
            :func:`growth`.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task, shape = job.pop("task"), Shape(*job.pop("shape"))
    print(json.dumps(time_shape(shape, **job) if task == "time" else growth(shape, **job)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
