"""How fast and how small the search and the layer are beside other ways: ``python -m benchmarks.search``.

Candidates of one mode run by turns in one process, ours before each other one, and only neighbours are
compared. With one thread the clock is the process's own time, which other work on the machine hardly touches.
Memory is the growth of a fresh process. Every shape runs in processes of its own and is saved when it is
done; shapes measured before, at the same commit and with the same settings, stay in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.peers import DATA, LARGE, MODES, PEERS, SHAPES, Shape, unavailable
from benchmarks.search_report import GATED, draw, judge, report, table
from fq.provenance import provenance
from fq.run import write_atomically

ROOT = Path(__file__).resolve().parents[1]
QUICK_PEERS = ("ours", "upstream", "lucidrains", "addmm")
LARGE_PEERS = ("ours", "ours_channels_last", "ours_from_nchw", "upstream", "lucidrains", "addmm", "faiss")
QUICK_GROWTH = (("S3", "search"), ("S3", "train_step"))
MEMORY_SHAPES, MEMORY_MODES = ("S2", "S3"), ("search", "train_step")
SMALL = 1 << 22  # scores up to which a call is so short that thrice the rounds cost nothing
_PACKAGES = ("vector-quantize-pytorch", "faiss-cpu", "fast-pytorch-kmeans")


def run_worker(job: dict[str, Any], threads: int) -> Any:
    """Do a job in a fresh process whose numerical libraries have the wished number of threads.

    Args:
        job: ``{"task": "time" or "memory", "shape": [...], ...}``, the arguments of the function.
        threads: of every OpenMP and BLAS pool.

    Returns:
        What the function returned.

    Raises:
        RuntimeError: the process failed.
    """
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.search_worker", json.dumps(job)],
        cwd=ROOT, env=os.environ | dict.fromkeys(pools, str(threads)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the process for {job} ended with code {done.returncode}: see its output above")
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(name: str, *, repeats: int, threads: int, quick: bool = False) -> dict[str, Any]:
    """All times of one shape, each kind of data in a fresh process and faiss in one of its own.

    Args:
        name: key of ``SHAPES``.
        repeats: rounds; large shapes get three fifths of them, at least 3, and small ones thrice as many.
        threads: of the CPU.
        quick: few peers, clustered data.

    Returns:
        ``{"shape", "repeats", "times": {data: {mode: ...}}}``.
    """
    shape = SHAPES[name]
    if not quick and shape.scores >= LARGE:
        repeats = max(3, repeats * 3 // 5)
    elif not quick and shape.scores <= SMALL:
        repeats *= 3
    times: dict[str, Any] = {}
    for data in DATA[:1] if quick else DATA:
        peers, modes = (QUICK_PEERS, MODES) if quick else _plan(name, data)
        job = {"task": "time", "shape": shape, "data": data, "repeats": repeats}
        others = {"peers": [peer for peer in peers if peer != "faiss"], "modes": modes}
        times[data] = run_worker(job | others, threads)
        if "faiss" in peers:  # it brings a second OpenMP runtime with it
            alone = {"peers": ["ours", "faiss"], "modes": ["search"], "limit": False}
            times[data]["search"]["faiss"] = run_worker(job | alone, threads)["search"]["faiss"]
    return {"shape": shape._asdict(), "repeats": repeats, "times": times}


def _plan(name: str, data: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Peers and modes: everything where targets are; beyond, enough to see how little the data matter."""
    large = SHAPES[name].scores >= LARGE
    if data == DATA[0]:
        return (LARGE_PEERS if large else tuple(PEERS)), MODES
    if name in GATED:
        return tuple(PEERS), MODES
    return QUICK_PEERS, MODES[:1] if large else MODES


def measure_memory(name: str, threads: int) -> dict[str, Any]:
    """Growth of every peer at one shape, ``{mode: {peer: MiB}}``, and of our search at four times the tokens.

    Args:
        name: key of ``SHAPES``.
        threads: of the CPU.

    Returns:
        The figures; a peer that cannot run has its reason instead.
    """
    shape, result = SHAPES[name], {}
    for mode in MEMORY_MODES:
        result[mode] = {
            peer: unavailable(peer)
            or _grown(shape, peer, mode, threads, processes=3 if peer == "ours" else 1)
            for peer, kind in PEERS.items()
            if mode in kind.modes and peer != "addmm_compiled"  # it compiles again for the second input
        }
    larger = shape._replace(batch=4 * shape.batch)
    result["search"]["ours, 4N"] = _grown(larger, "ours", "search", threads, processes=3)
    return result


def _grown(shape: Shape, peer: str, mode: str, threads: int, *, processes: int = 1) -> float | None:
    """The largest growth of some processes: where freed blocks lie, and so what is used again, is chance."""
    job = {"task": "memory", "shape": shape, "peer": peer, "mode": mode}
    found: list[float | None] = [run_worker(job, threads) for _ in range(processes)]
    return max(value for value in found if value is not None) if None not in found else None


def run(out: Path, *, shapes: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Measure shapes one after another, saving results and report after each.

    Args:
        out: folder of ``results.json``, ``report.md`` and the picture.
        shapes: keys of ``SHAPES``.
        repeats: rounds.
        threads: of the CPU.

    Returns:
        The results.
    """
    origin = _provenance()
    settings = {"threads": threads, "repeats": repeats, "commit": origin["commit"],
                "versions": origin["versions"], "clock": _clock_name(threads)}  # fmt: skip
    results: dict[str, Any] = {"settings": settings, "provenance": [], "shapes": {}, "memory": {}}
    if (out / "results.json").exists():
        before = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if before["settings"] == settings:
            results = before
    results["provenance"].append(origin)
    out.mkdir(parents=True, exist_ok=True)
    for name in shapes:
        print(f"{name}: {SHAPES[name]}", flush=True)
        begin = time.perf_counter()
        results["shapes"][name] = measure_times(name, repeats=repeats, threads=threads)
        if name in MEMORY_SHAPES:
            results["memory"][name] = measure_memory(name, threads)
        _save(out, results)
        print(f"    saved after {time.perf_counter() - begin:.0f} s", flush=True)
    return results


def _save(out: Path, results: dict[str, Any]) -> None:
    order = list(SHAPES)
    results["shapes"] = dict(sorted(results["shapes"].items(), key=lambda item: order.index(item[0])))
    overhead = ROOT / "benchmarks" / "results" / "overhead.json"
    if overhead.exists():
        results["discriminator_step"] = json.loads(overhead.read_text(encoding="utf-8"))
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    draw(results, out / "search.png")
    write_atomically(out / "report.md", report(results))


def quick(shapes: list[str], *, repeats: int, threads: int) -> dict[str, Any]:
    """The short form: two shapes, three peers, clustered data.

    Args:
        shapes: keys of ``SHAPES``.
        repeats: rounds.
        threads: of the CPU.

    Returns:
        Ratios, share of the limit, memory growth, versions and number of threads.
    """
    ratios, percent = {}, {}
    for name in shapes:
        times = measure_times(name, repeats=repeats, threads=threads, quick=True)["times"]["clustered"]
        percent[name] = 100 * times["search"]["limit"]["share"]
        ratios[name] = {
            mode: {peer: entry.get("ratio", entry.get("skipped")) for peer, entry in entries.items()
                   if peer not in ("ours", "limit")}
            for mode, entries in times.items()
        }  # fmt: skip
    grown = {f"{name} {mode}": _grown(SHAPES[name], "ours", mode, threads) for name, mode in QUICK_GROWTH}
    return {
        "ratios": ratios, "percent_of_limit": percent, "growth_mib": grown, "threads": threads,
        "clock": _clock_name(threads), "repeats": repeats, "versions": _provenance()["versions"],
    }  # fmt: skip


def _provenance() -> dict[str, Any]:
    record = provenance(0)
    for name in _PACKAGES:
        try:
            record["versions"][name] = version(name)
        except PackageNotFoundError:
            record["versions"][name] = "not installed"
    return record


def _clock_name(threads: int) -> str:
    return "process time" if threads == 1 else "wall time, not gated"


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the report, and print the targets with what was reached."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="S1 and S2, three peers, JSON on the terminal only"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search"), help="folder to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="these only; others keep what they have")
    parser.add_argument("--repeats", type=int, default=None, help="rounds (5; 3 with --quick); at least 2")
    parser.add_argument("--threads", type=int, default=1, help="more than 1 measures wall time, not gated")
    options = parser.parse_args(arguments)
    repeats = options.repeats or (3 if options.quick else 5)
    if repeats < 2:
        parser.error(f"--repeats is {repeats}: quartiles need at least 2")
    if options.quick:
        chosen = options.shapes or ["S1", "S2"]
        print(json.dumps(quick(chosen, repeats=repeats, threads=options.threads), indent=1))
        return
    results = run(
        options.out, shapes=options.shapes or list(SHAPES), repeats=repeats, threads=options.threads
    )
    print(table(judge(results)))
    print(f"written to {options.out / 'report.md'}")


if __name__ == "__main__":
    main()
