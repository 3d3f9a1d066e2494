"""Put the measured numbers into the README: ``python -m benchmarks.readme``.

The table between the two marks is made from ``benchmarks/results`` alone, and a test holds both together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.compare import NAMES
from fq.run import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"


def measured() -> str:
    """Markdown between the marks.

    Returns:
        The tables of the digits demo, of the CIFAR-10 runs and of the cost of a step.

    Raises:
        FileNotFoundError: a result has not been committed.
    """
    digits, cifar, overhead = (
        json.loads((RESULTS / name).read_text(encoding="utf-8"))
        for name in ("digits/results.json", "cifar10/results.json", "overhead.json")
    )
    lines = [*_digits(digits), "", *_cifar(cifar), "", _overhead(overhead)]
    return "\n".join(lines)


def _digits(results: dict[str, Any]) -> list[str]:
    lines = [
        f"Digits, `make demo`, {results['runs'][0]['steps']} steps fixed beforehand, one seed (no claim "
        "beyond it; [report](benchmarks/results/digits/report.md)):",
        "",
        "| | accuracy | Fréchet distance | recall | diversity |",
        "|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        last = {key.split("[")[0]: list(values.values())[-1] for key, values in run["scores_by_step"].items()}
        lines.append(
            f"| {NAMES[run['fq']]} | {last['accuracy']:.3f} | {last['fd']:.1f} | {last['recall']:.2f} | "
            f"{last['diversity']:.2f} |"
        )
    return [*lines, "", _machine(results["runs"][0]["provenance"][-1])]


def _cifar(results: dict[str, Any]) -> list[str]:
    key = next(key for key in results["runs"][0]["scores_by_step"] if key.startswith("fd["))
    lines = [
        f"CIFAR-10, a narrow model on a CPU, `{key}`, one seed "
        "([report and commands](benchmarks/results/cifar10/report.md)):",
        "",
        "| | at the first evaluation | at the end |",
        "|---|---|---|",
    ]
    for run in results["runs"]:
        steps = list(run["scores_by_step"][key].items())
        (first, before), (last, after) = steps[0], steps[-1]
        lines.append(f"| {NAMES[run['fq']]} | {before:.0f} (step {first}) | {after:.0f} (step {last}) |")
    return [*lines, "", _machine(results["runs"][0]["provenance"][-1])]


def _overhead(result: dict[str, Any]) -> str:
    shares = ", ".join(f"{share:.1%} in mode {mode}" for mode, share in result["overhead"].items())
    alone = "at one site alone " + ", ".join(f"{share:.1%}" for share in result["sites"].values())
    return (
        f"Cost, `python -m benchmarks.overhead`: a discriminator step of BigGAN-CIFAR (width "
        f"{result['d_channels']}, {result['batch']}, K = {result['codebook_size']} at {len(result['sites'])} "
        f"sites, {result['threads']} thread, {result['clock']}, median of {result['repeats']} interleaved "
        f"pairs) takes {result['plain_ms']:.0f} ms; FQ adds {shares} ({alone}). {_machine(result['provenance'])}"
    )


def _machine(record: dict[str, Any]) -> str:
    return f"{record['device_name']}, torch {record['versions']['torch']}, commit `{record['commit'][:8]}`."


def main() -> None:
    """Rewrite the README's block."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    write_atomically(readme, f"{head}{BEGIN}\n{measured()}\n{END}{tail}")
    print(f"written to {readme}")


if __name__ == "__main__":
    main()
