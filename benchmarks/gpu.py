"""Everything that needs a GPU, in one command of a few minutes: ``python -m benchmarks.gpu``.

Correctness of the fused kernels against float64 first, then times, memory, launches and graph replay beside
the other forms, then what FQ adds to a discriminator step. One JSON; it is saved after every part, and a part
that fails leaves its error in it and lets the others run.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fq
from backbones.biggan import BigGANConfig
from backbones.presets import CIFAR10
from benchmarks import overhead
from benchmarks.language_speed import FULL
from benchmarks.language_speed import TINY as TINY_LANGUAGE
from benchmarks.language_speed import on_gpu as on_gpu_language
from benchmarks.peers import SHAPES, Ours, OursRegularize, Shape, Upstream, clustered, exactness, feature_like
from benchmarks.pretraining_speed import FULL as FULL_PREVALENT
from benchmarks.pretraining_speed import TINY as TINY_PREVALENT
from benchmarks.pretraining_speed import measure as measure_pretraining
from benchmarks.steps import BACKBONES, on_gpu
from fq.provenance import provenance
from fq.run import write_atomically
from fq.search import nearest, pack, search

TINY = {"T1": Shape(4, 16, 4, 32), "T2": Shape(3, 24, 5, 50)}
ROOF_BF16 = 790e12
"""FLOP/s of an H200 with bfloat16, measured."""
ROOF_TF32 = 395e12
"""FLOP/s of an H200 with TF32: half of its measured bfloat16 rate."""
ROOF_TF32X3 = 132e12
"""A third of it: three products for one, the roof of an exact search."""
MINUTES = 9.0

Section = Callable[..., Any]


class Bench:
    """Device, shapes and clock of a run."""

    def __init__(self, device: torch.device, shapes: dict[str, Shape], repeats: int) -> None:
        self.device, self.shapes, self.repeats = device, shapes, repeats
        self.cuda = device.type == "cuda"

    def milliseconds(self, call: Callable[[int], Any]) -> float:
        """Median time of a call, after ten that warm up; by events of the device where there are any.

        Args:
            call: given the number of the round, to rotate its inputs.
        """
        for turn in range(10):
            call(turn)
        if not self.cuda:
            seconds = []
            for turn in range(self.repeats):
                start = time.perf_counter()
                call(turn)
                seconds.append(time.perf_counter() - start)
            return statistics.median(seconds) * 1e3
        events = []
        for turn in range(self.repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call(turn)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def replay_milliseconds(self, call: Callable[[], Any]) -> float | None:
        """The same of a CUDA graph of the call, without launch gaps; an input that fits stays in the L2."""
        if not self.cuda:
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.milliseconds(lambda _: graph.replay())

    def inputs(self, name: str, kind: str = "clustered") -> tuple[list[Tensor], Any]:
        """Enough different features of a shape to overflow a 60 MB cache, and a codebook."""
        shape = self.shapes[name]
        make = clustered if kind == "clustered" else feature_like
        features, state = make(shape, device=self.device)
        copies = min(64, 1 + int(120e6 // (4 * features.numel()))) if self.cuda else 2
        return [features, *(features.roll(1 + turn, 0).contiguous() for turn in range(copies))], state


def correctness(bench: Bench) -> dict[str, Any]:
    """Indices by the exactness contract, statistics and the EMA step against float64, in every layout."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[Shape, float]] = {
        f"{name} clustered": (shape, 1.0) for name, shape in bench.shapes.items()
    }
    cases["ragged"] = (Shape(3, 24, 5, 50), 1.0)
    cases["one token, one code"] = (Shape(1, 1, 1, 1), 1.0)
    cases["exploded codes"] = (Shape(8, 128, 8, 1024), 1e5)
    for name, (shape, explode) in cases.items():
        features, state = clustered(shape, device=bench.device)
        codes = state.codes.clone()
        codes[1::2] *= explode
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in ("contiguous", "channels-last"):
                x = features.to(dtype)
                if layout == "channels-last":
                    x = x.contiguous(memory_format=torch.channels_last)
                key = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}"
                found[key] = _check(x, codes)
                if bench.cuda and dtype == torch.float32:
                    found[f"{key}, certified"] = _check_certified(x, codes)
    x, state = clustered(bench.shapes[min(bench.shapes)], device=bench.device)
    tripled = torch.cat([state.codes] * 3)
    tokens = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
    found["tripled codebook: all indices in the first copy"] = bool(
        (search(tokens, tripled) < len(state.codes)).all()
    )
    tokens[5] = torch.nan
    found["token with NaN: index 0"] = bool(search(tokens, state.codes)[5] == 0)
    found["ema step"] = _check_step(x, state)
    return found


def _check(features: Tensor, codes: Tensor) -> dict[str, Any]:
    """One quantisation: the contract, the difference, the loss, the statistics, and two equal runs."""
    from fq import ops

    x = features.flatten(2)
    runs = [ops.quantize(x, codes, statistics=True) for _ in range(2)]
    difference, error, indices, packed = runs[0]
    tokens = x.transpose(1, 2).reshape(-1, x.shape[1])
    chosen = codes[indices.flatten()]
    exact = pack(tokens.double().cpu(), indices.flatten().cpu(), len(codes)).to(packed.device)
    flat = difference.transpose(1, 2).reshape(-1, x.shape[1])
    scale = exact[:, :-1].abs().amax().clamp(min=1e-30)
    return exactness(indices, tokens, codes) | {
        "difference is exact": bool(torch.equal(flat, tokens.float() - chosen)),
        "error, relative": _relative(error, (tokens.double() - chosen.double()).square().mean()),
        "counts are exact": bool(torch.equal(packed[:, -1].double(), exact[:, -1])),
        "sums, largest error over largest sum": float((packed[:, :-1] - exact[:, :-1]).abs().amax() / scale),
        "two runs are equal to the bit": all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
    }


def _check_certified(features: Tensor, codes: Tensor) -> dict[str, Any]:
    """The contract, and two equal runs, of certified searches."""
    from fq import kernels

    x = features.flatten(2)
    tokens = x.transpose(1, 2).reshape(-1, x.shape[1])
    found: dict[str, Any] = {}
    for config in kernels.CONFIGS:
        if config.certified:
            first, again = (kernels.nearest(x, codes, config=config) for _ in range(2))
            equal = {"two runs are equal to the bit": bool(torch.equal(first, again))}
            found[str(tuple(config))] = exactness(first, tokens, codes) | equal
    return found


def _check_step(features: Tensor, state: Any) -> dict[str, float]:
    """Six training steps, dead codes included, beside the same on the CPU; few codes may differ."""
    here, there = (Ours(type(state)(*(value.to(device) for value in state))).layer
                   for device in (features.device, "cpu"))  # fmt: skip
    for layer in (here, there):
        with torch.no_grad():
            layer.ema_count[::7] = 0.0
            layer.codebook[::7] = 1e4
    for turn in range(6):
        batch = features.roll(turn, 0) + turn / 10
        here(batch)
        there(batch.cpu())
    close = (here.codebook.cpu() - there.codebook).abs().amax(1) < 1e-4
    return {
        "updates": float(here.num_updates),
        "share of codes that agree with the CPU's to 1e-4": close.float().mean().item(),
        "replaced codes left at 1e4": float((here.codebook.amax(1) > 9e3).sum()),
    }


def _relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs() / exact.abs().clamp(min=1e-30))


def speed(bench: Bench, name: str) -> dict[str, Any]:
    """Milliseconds of search and training forward of a shape, ours and others', eager and replayed."""
    torch.set_float32_matmul_precision("highest")
    shape = bench.shapes[name]
    features, state = bench.inputs(name)
    tokens = [x.flatten(2).transpose(1, 2).reshape(-1, shape.dim) for x in features]
    ours, regularize, upstream = Ours(state), OursRegularize(state), Upstream(state)
    pure = _pure_torch(state)
    torch._dynamo.reset()  # else it compiles for any shape from the second one on, which is slower
    compiled = torch.compile(pure, dynamic=False)
    calls: dict[str, Callable[[int], Any]] = {
        "search, ours": lambda turn: nearest(tokens[turn % len(tokens)], state.codes),
        "search, ours from NCHW": lambda turn: _from_images(features[turn % len(features)], state.codes),
        "search, addmm + argmin": lambda turn: _addmm(tokens[turn % len(tokens)], state.codes),
        "search, upstream form": lambda turn: upstream.search(tokens[turn % len(tokens)]),
        "train-forward, ours": lambda turn: ours.forward(features[turn % len(features)]),
        "train-forward, ours (regularize)": lambda turn: regularize.forward(features[turn % len(features)]),
        "train-forward, upstream form": lambda turn: upstream.forward(features[turn % len(features)]),
        "train-forward, pure torch": lambda turn: pure(features[turn % len(features)]),
        "train-forward, pure torch compiled": lambda turn: compiled(features[turn % len(features)]),
    }
    result: dict[str, Any] = {"ms": {}, "again_ms": {}, "replay_ms": {}, "failed": {}}
    if bench.cuda:
        config, certified = _certified_search(bench, name, features, state.codes)
        calls |= certified
        result["certified tf32, tiles"] = str(tuple(config))
    for key, call in calls.items():
        try:
            result["ms"][key] = bench.milliseconds(call)
            if "ours" in key:  # a second run tells the noise
                result["again_ms"][key] = bench.milliseconds(call)
                result["replay_ms"][key] = bench.replay_milliseconds(functools.partial(call, 0))
        except Exception as error:
            result["failed"][key] = f"{type(error).__name__}: {error}"[:500]
    ms = result["ms"]
    result["ratios"] = {
        key: ms[key] / ms[f"{key.split(',')[0]}, ours"]
        for key in ms
        if "ours" not in key and f"{key.split(',')[0]}, ours" in ms
    }
    if bench.cuda and "search, ours" in ms:
        result["percent_of_tf32x3_roof"] = 100 * shape.flop / (ms["search, ours"] * 1e-3) / ROOF_TF32X3
    result["percent_of_tf32_roof"] = {
        key: 100 * shape.flop / (ms[key] * 1e-3) / ROOF_TF32 for key in ms if "certified tf32" in key
    }
    return result


def _certified_search(
    bench: Bench, name: str, clusters: list[Tensor], codes: Tensor
) -> tuple[Any, dict[str, Callable[[int], Any]]]:
    """The fastest tiles, and the certified search of both kinds of data, for its time depends on them."""
    from fq import kernels

    def call(features: list[Tensor], codes: Tensor, config: Any) -> Callable[[int], Any]:
        tokens = [x.flatten(2) for x in features]
        return lambda turn: kernels.nearest(tokens[turn % len(tokens)], codes, config=config)

    like, state = bench.inputs(name, "feature_like")
    configs = [config for config in kernels.CONFIGS if config.certified]
    best = min(configs, key=lambda config: bench.milliseconds(call(like, state.codes, config)))
    return best, {
        "search, ours certified tf32 from NCHW": call(clusters, codes, best),
        "search, ours certified tf32 from NCHW, feature-like": call(like, state.codes, best),
    }


def _from_images(features: Tensor, codes: Tensor) -> Tensor:
    from fq import ops

    return ops.quantize(features.flatten(2), codes, statistics=False)[2]


def _addmm(tokens: Tensor, codes: Tensor) -> Tensor:
    return torch.addmm(0.5 * codes.square().sum(1), tokens, codes.t(), alpha=-1).argmin(1)


def _pure_torch(state: Any) -> Callable[[Tensor], Any]:
    """The best form in plain PyTorch operations: no one-hot, no ||x||²; N x K scores remain."""
    codes, number, total = (value.clone() for value in state)

    def forward(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = features.flatten(2).transpose(1, 2).reshape(-1, features.shape[1])
        indices = _addmm(tokens, codes)
        quantized = F.embedding(indices, codes)
        difference = tokens - quantized
        loss = difference.square().mean()
        sums = torch.zeros_like(total).index_add_(0, indices, tokens)
        counts = torch.zeros_like(number).index_add_(0, indices, torch.ones_like(indices, dtype=number.dtype))
        number.mul_(0.8).add_(counts, alpha=0.2)
        total.mul_(0.8).add_(sums, alpha=0.2)
        codes.copy_(torch.where(counts[:, None] > 0, total / number.clamp(min=1e-5)[:, None], codes))
        return quantized, indices, loss

    return forward


def memory(bench: Bench, name: str) -> dict[str, Any]:
    """MiB at the peak of a training forward beyond its inputs and outputs, ours and the upstream form's."""
    if not bench.cuda:
        return {"skipped": "needs CUDA"}
    shape = bench.shapes[name]
    features, state = clustered(shape, device=bench.device)
    row: dict[str, Any] = {}
    for kind in (OursRegularize, Ours, Upstream):
        peer = kind(state)
        peer.forward(features)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = peer.forward(features)
        torch.cuda.synchronize()
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in output
                if t.untyped_storage().data_ptr() != features.untyped_storage().data_ptr()}  # fmt: skip
        row[kind.__name__] = (torch.cuda.max_memory_allocated() - before - sum(kept.values())) / 2**20
        del output, peer
    k_d = shape.codebook_size * shape.dim
    row["must be at most"] = (4 * 4 * shape.tokens + 16 * 4 * k_d) / 2**20 + 32
    row["scores N K would take"] = 4 * shape.scores / 2**20
    return row


def launches(bench: Bench) -> dict[str, Any]:
    """Kernels (and memory sets or copies) of one training forward, as the profiler sees them."""
    if not bench.cuda:
        return {"skipped": "needs CUDA"}
    name = "S2" if "S2" in bench.shapes else min(bench.shapes)
    features, state = clustered(bench.shapes[name], device=bench.device)
    found: dict[str, Any] = {}
    for kind in (OursRegularize, Ours, Upstream):
        peer = kind(state)
        for _ in range(3):
            peer.forward(features)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            peer.forward(features)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if str(event.device_type).endswith("CUDA")]
        found[kind.__name__] = {"number": len(names), "names": names}
    return found


def bandwidth(bench: Bench) -> dict[str, Any]:
    """Microseconds of each kernel of a large training forward, and the bandwidth of a copy beside them."""
    if not bench.cuda:
        return {"skipped": "needs CUDA"}
    big = torch.empty(2, 256 << 20, device=bench.device)
    copy_ms = bench.milliseconds(lambda _: big[1].copy_(big[0]))
    found: dict[str, Any] = {"copy GB/s": 2 * 4 * big[0].numel() / copy_ms / 1e6}
    big = big[:, :0].clone()
    shape = Shape(512, 256, 16, 1024)  # 134 MB of tokens: more than the cache holds
    features, state = clustered(shape, device=bench.device)
    layer = Ours(state).layer
    for _ in range(3):
        layer(features)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            layer(features)
        torch.cuda.synchronize()
    found["microseconds of each kernel (131072 x 256, K = 1024)"] = {
        event.key: event.self_device_time_total / event.count
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    }
    found["bytes of tokens"] = 4 * features.numel()
    found["bytes of codebook, sums and statistics"] = 4 * 3 * state.codes.numel()
    return found


def sweep(bench: Bench, name: str) -> dict[str, Any]:
    """Milliseconds of the search for every candidate of tiles, to choose defaults by."""
    if not bench.cuda:
        return {"skipped": "needs CUDA"}
    from fq import kernels

    found: dict[str, Any] = {}
    shape = bench.shapes[name]
    features, state = clustered(shape, device=bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        x = features.flatten(2).to(dtype)
        rows: dict[str, Any] = {}
        for config in kernels.CONFIGS:
            if config.certified and dtype != torch.float32:
                continue
            try:
                one = functools.partial(kernels.nearest, x, state.codes, config=config)
                rows[str(tuple(config))] = bench.milliseconds(lambda _, one=one: one())  # type: ignore[misc]
            except Exception as error:
                rows[str(tuple(config))] = f"{type(error).__name__}: {error}"[:200]
        default = kernels.search_config(shape.dim, shape.codebook_size, shape.tokens, dtype)
        found[str(dtype).removeprefix("torch.")] = {"default": str(tuple(default)), "ms": rows}
    return found


def discriminator(bench: Bench) -> dict[str, Any]:
    """What FQ adds to a discriminator step of BigGAN-CIFAR, 64 real and 64 fake pictures."""
    preset = CIFAR10
    channels, batch = (64, 64) if bench.cuda else (8, 2)
    config = replace(preset, model=BigGANConfig(resolution=32, d_channels=channels, init="normal02"))
    return overhead.measure(config, batch_size=batch, repeats=15 if bench.cuda else 2)


def compiled(bench: Bench) -> dict[str, Any]:
    """Whether one graph serves all batch sizes, and a captured layer follows its features."""
    from torch._dynamo.testing import CompileCounter

    layer = fq.FeatureQuantize(32, 64, mode="replace").to(bench.device)
    layer(torch.randn(8, 32, 8, 8, device=bench.device))
    torch._dynamo.reset()
    counter = CompileCounter()
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch in (10, 12, 31):  # none like another size: equal sizes are taken for one
        graph(torch.randn(batch, 32, 8, 8, device=bench.device))
    result: dict[str, Any] = {"graphs for three batch sizes": counter.frame_count}
    if bench.cuda:
        x = torch.randn(8, 32, 8, 8, device=bench.device)
        before = layer.num_updates.item()
        bench.repeats, repeats = 5, bench.repeats
        bench.replay_milliseconds(lambda: layer(x))
        bench.repeats = repeats
        result["updates of 3 warm-ups and 15 replays"] = layer.num_updates.item() - before
    return result


def training(bench: Bench) -> dict[str, Any]:
    """Pictures a second and memory of whole training steps of each backbone in bfloat16, FQ off and on."""
    steps_each = 8 if bench.cuda else 2
    return {name: on_gpu(name, steps=steps_each, small=not bench.cuda) for name in BACKBONES}


def language(bench: Bench) -> dict[str, Any]:
    """Training of the sentence VAE at the size of BERT base and GPT-2 in bfloat16, small and large latent."""
    sizes, batch, tokens = (FULL, 64, 128) if bench.cuda else (TINY_LANGUAGE, 2, 8)
    return {
        f"latent {dim}": on_gpu_language(
            sizes, latent_dim=dim, batch=batch, tokens=tokens, steps=10 if bench.cuda else 2,
            device=bench.device, roof=ROOF_BF16,
        )
        for dim in (32, 768)
    }  # fmt: skip


def navigation(bench: Bench) -> dict[str, Any]:
    """Pre-training of Prevalent at the published size in bfloat16, texts of 80 tokens, by batch."""
    sizes, tokens, steps = (FULL_PREVALENT, 80, 10) if bench.cuda else (TINY_PREVALENT, 8, 2)
    return {
        f"batch {batch}": measure_pretraining(
            sizes, batch=batch, tokens=tokens, steps=steps, device=bench.device, roof=ROOF_BF16
        )
        for batch in ((96, 512) if bench.cuda else (2,))
    }


SECTIONS: dict[str, Section] = {
    "correctness": correctness,
    "compiled": compiled,
    "launches": launches,
    "memory": memory,
    "speed": speed,
    "discriminator_step": discriminator,
    "training": training,
    "language": language,
    "navigation": navigation,
    "bandwidth": bandwidth,
    "sweep": sweep,
}
A_SHAPE_AT_A_TIME = ("memory", "speed", "sweep")
# What a figure of `correctness` or `compiled` must be, by the end of its name.
_MUST: dict[str, Callable[[Any], bool]] = {
    "beyond": lambda value: value == 0,
    "left at 1e4": lambda value: value == 0,
    "relative": lambda value: value <= 1e-4,
    "over largest sum": lambda value: value <= 1e-5,
    "to 1e-4": lambda value: value >= 0.95,
    "ema step / updates": lambda value: value == 106,
    "three batch sizes": lambda value: value == 1,
    "15 replays": lambda value: value == 18,
}


def failures(found: Any, path: str = "") -> list[str]:
    """Names of all checks that are not met; NaN meets none."""
    if isinstance(found, dict):
        inner = [(f"{path} / {key}" if path else key, value) for key, value in found.items()]
        return [name for key, value in inner for name in failures(value, key)]
    met = [test(found) for end, test in _MUST.items() if path.endswith(end)]
    return [] if found is not False and all(met) else [path]


def run(bench: Bench, out: Path, sections: list[str], commit: str | None) -> dict[str, Any]:
    """Measure the sections and write the JSON after each, or after each of its shapes.

    Args:
        bench: device, shapes and clock.
        out: file.
        sections: names, in order.
        commit: of the code, where there is no repository to ask.

    Returns:
        What was written.
    """
    results: dict[str, Any] = {"provenance": provenance(0) | _device(bench), "seconds": {}, "not met": []}
    if commit:
        results["provenance"]["commit"] = commit
    out.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def measured(section: Callable[..., Any], *arguments: Any) -> Any:
        if time.perf_counter() - started > (MINUTES - 1.5) * 60:
            return {"skipped": "no time left"}
        try:
            return section(bench, *arguments)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()}

    for name in sections:
        begin = time.perf_counter()
        if name in A_SHAPE_AT_A_TIME:
            results[name] = {}
            for shape in bench.shapes:
                results[name][shape] = measured(SECTIONS[name], shape)
                write_atomically(out, json.dumps(results, indent=1) + "\n")
        else:
            results[name] = measured(SECTIONS[name])
        if name in ("correctness", "compiled"):
            results["not met"] += failures(results[name], name)
        results["seconds"][name] = round(time.perf_counter() - begin, 1)
        write_atomically(out, json.dumps(results, indent=1) + "\n")
        broken = " FAILED" if any(where.startswith(name) for where, _ in errors(results)) else ""
        print(f"{name}: {results['seconds'][name]} s{broken}", flush=True)
    return results


def errors(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Sections, or shapes of them, that failed, and how."""
    found = []
    for name, row in results.items():
        parts = {name: row} if name not in A_SHAPE_AT_A_TIME else {f"{name} {k}": v for k, v in row.items()}
        found += [(where, part["error"]) for where, part in parts.items()
                  if isinstance(part, dict) and "error" in part]  # fmt: skip
    return found


def _device(bench: Bench) -> dict[str, Any]:
    if not bench.cuda:
        return {"driver": None, "triton": None}
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = (
            subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
        )
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(bench.device)
    backends: Any = torch.backends
    return {
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "tf32": {
            "products": backends.cuda.matmul.fp32_precision,
            "convolutions": backends.cudnn.conv.fp32_precision,
        },
    }


def summary(results: dict[str, Any]) -> str:
    """A few lines of the most wanted figures."""
    lines = [f"checks not met: {results.get('not met') or 'none'}"]
    for name, row in results.get("speed", {}).items():
        if isinstance(row, dict) and "ms" in row:
            ratios = ", ".join(f"{key} {value:.1f}x" for key, value in row["ratios"].items())
            ours = ", ".join(f"{key} {value:.3f} ms" for key, value in row["ms"].items() if "ours" in key)
            roofs = [f"{share:.0f}% of its own" for share in row.get("percent_of_tf32_roof", {}).values()]
            roofs = [f"{row.get('percent_of_tf32x3_roof', 0):.0f}%", *roofs]
            lines.append(f"{name}: {ours}; {ratios}; roof {', certified '.join(roofs)}")
            lines += [f"   failed: {key}: {text}" for key, text in row["failed"].items()]
    for kind, row in results.get("launches", {}).items():
        if isinstance(row, dict):
            lines.append(f"launches, {kind}: {row['number']}")
    step = results.get("discriminator_step", {})
    if "overhead" in step:
        lines.append(f"discriminator step {step['plain_ms']:.1f} ms, FQ adds {step['overhead']}")
    for name, row in results.get("language", {}).items():
        if isinstance(row, dict) and "tokens_per_second" in row:
            lines.append(
                f"sentence VAE, {name}: {row['tokens_per_second']:.0f} tokens/s, "
                f"{row['percent_of_roof']:.0f}% of the roof, {row.get('peak_mib', 0):.0f} MiB"
            )
    for name, row in results.get("navigation", {}).items():
        if isinstance(row, dict) and "triplets_per_second" in row:
            lines.append(
                f"Prevalent, {name}: {row['triplets_per_second']:.0f} triplets/s, "
                f"{row['percent_of_roof']:.0f}% of the roof, {row.get('peak_mib', 0):.0f} MiB"
            )
    lines += [f"{where}: {error}" for where, error in errors(results)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run on the GPU, or a dry run of tiny shapes on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: benchmarks/results/gpu/DEVICE.json)"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME",
                        help=f"parts to run, of: {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME",
                        help="shapes to measure")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each kind")
    parser.add_argument("--commit", help="commit of the code, where there is no repository to ask")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: does everything run?")
    options = parser.parse_args(arguments)
    if options.dry:
        bench = Bench(torch.device("cpu"), TINY, 3)
        out = options.out or Path("gpu_dry.json")
    elif torch.cuda.is_available():
        bench = Bench(torch.device("cuda"), {name: SHAPES[name] for name in options.shapes}, options.repeats)
        name = torch.cuda.get_device_name().lower().replace(" ", "_")
        out = options.out or Path("benchmarks/results/gpu") / f"{name}.json"
    else:
        raise SystemExit("error: there is no CUDA device here; --dry runs tiny shapes on the CPU")
    results = run(bench, out, options.sections, options.commit)
    print(summary(results))
    print(f"written to {out}")
    if results["not met"] or errors(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
