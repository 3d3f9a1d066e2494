"""Memory and speed of `vae_lm.stream`: ``python -m benchmarks.streaming --lines 5000000``.

A corpus of that many lines, and one of a tenth, are made in a temporary folder (eight files, two of them
packed) and streamed through once, each in a process of its own. What is stated is how far the peak of
resident memory lies above the memory after imports and tokenisers, lines per second, and how long a stream
needs to its first batch when it starts at the last step of the epoch. With ``--world-size`` the stream is
that of the first of so many processes, which reads all lines and tokenises its share.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fq.provenance import provenance
from fq.run import write_atomically
from vae_lm.grammar import splits
from vae_lm.stream import TextStream
from vae_lm.tokenizers import TextTokenizers
from vae_lm.vocabulary import train_tokenizers

LIMIT_MIB = 256
NUM_FILES, NUM_PACKED = 8, 2
BATCH_SIZE, MAX_TOKENS = 128, 64


def write_corpus(folder: Path, num_lines: int) -> int:
    """Write sentences of the grammar, every fourth line with a second one, into files of like length.

    Returns:
        Bytes of text.
    """
    texts = itertools.cycle(splits()["test"])
    size = 0
    for number in range(NUM_FILES):
        share = num_lines // NUM_FILES + (number < num_lines % NUM_FILES)
        packed = number < NUM_PACKED
        path = folder / f"part.{number}.txt{'.gz' * packed}"
        # The lowest level: packing is not what is measured.
        with (
            gzip.open(path, "wt", 1, encoding="utf-8") if packed else path.open("w", encoding="utf-8") as file
        ):
            for line in range(share):
                text = f"{next(texts)} {next(texts)}" if line % 4 == 0 else next(texts)
                size += file.write(f"{text}\n")
    return size


def measure(
    folder: Path, vocabulary: Path, *, shuffle_buffer: int, max_seconds: float, world_size: int = 1
) -> dict[str, Any]:
    """Stream one epoch in this process.

    Args:
        folder: of the corpus.
        vocabulary: folder of both tokenisers.
        shuffle_buffer: lines.
        max_seconds: stop after that long; what is stated is then of the lines seen.
        world_size: number of processes that this one is the first of.
    """
    tokenizers = TextTokenizers.from_folder(vocabulary)
    before = _memory("VmRSS")
    _forget_peak()
    stream = TextStream(
        [folder], tokenizers, batch_size=BATCH_SIZE * world_size, max_tokens=MAX_TOKENS,
        shuffle_buffer=shuffle_buffer, world_size=world_size,
    )  # fmt: skip
    counting = time.perf_counter()
    num_steps = stream.steps_per_epoch
    begin, cpu = time.perf_counter(), time.process_time()
    lines = tokenised = tokens = padding = 0
    for share in itertools.islice(stream.batches(), num_steps):
        lines, tokenised = lines + share.num_items, tokenised + len(share.items)
        real = int((share.batch.decoder_ids != tokenizers.decoder.pad_token_id).sum())
        tokens, padding = tokens + real, padding + share.batch.decoder_ids.numel() - real
        if time.perf_counter() - begin > max_seconds:
            break
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = _memory("VmHWM")
    again = time.perf_counter()
    last = next(stream.batches(num_steps - 1))
    return {
        "lines": stream.num_items,
        "lines_streamed": lines,
        "lines_tokenised": tokenised,
        "steps_per_epoch": num_steps,
        "counting_seconds": round(begin - counting, 2),
        "memory_before_mib": round(before, 1),
        "peak_growth_mib": round(peak - before, 1),
        "peak_growth_with_resume_mib": round(_memory("VmHWM") - before, 1),
        "lines_per_second": round(lines / seconds),
        "lines_per_cpu_second": round(lines / cpu),
        "decoder_padding": round(padding / (tokens + padding), 4),
        "resume_step": last.step,
        # A process that starts there has to count the lines first.
        "resume_seconds": round(time.perf_counter() - again + begin - counting, 2),
    }


def _memory(field: str) -> float:
    """A field of this process's memory, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def _forget_peak() -> None:
    # Importing took more than what is left of it; only what comes now shall count.
    Path("/proc/self/clear_refs").write_text("5")


def run(num_lines: int, *, shuffle_buffer: int, max_seconds: float, world_size: int) -> dict[str, Any]:
    """Measure a corpus of ``num_lines`` lines in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        corpus, vocabulary = Path(place) / "corpus", Path(place) / "vocabulary"
        corpus.mkdir()
        size = write_corpus(corpus, num_lines)
        train_tokenizers(splits()["train"], vocab_size=1000).save(vocabulary)
        command = [sys.executable, "-m", "benchmarks.streaming", "--measure", str(corpus), str(vocabulary)]
        command += ["--shuffle-buffer", str(shuffle_buffer), "--max-seconds", str(max_seconds)]
        command += ["--world-size", str(world_size)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = {"corpus_mb": round(size / 1e6, 1)} | json.loads(finished.stdout)
    return result


def main() -> None:
    """Run both sizes, print a table and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--lines", type=int, default=5_000_000, help="lines of the larger corpus")
    parser.add_argument("--shuffle-buffer", type=int, default=100_000, help="lines shuffled together")
    parser.add_argument("--max-seconds", type=float, default=1800, help="longest stream of one corpus")
    parser.add_argument("--world-size", type=int, default=1, help="be the first of so many processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    parser.add_argument(
        "--measure", nargs=2, type=Path, metavar=("CORPUS", "VOCABULARY"), help="one corpus only"
    )
    options = parser.parse_args()
    names = ("shuffle_buffer", "max_seconds", "world_size")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    if options.measure:
        print(json.dumps(measure(*options.measure, **settings)))
        return
    begin = time.perf_counter()
    results = [run(count, **settings) for count in (options.lines // 10, options.lines)]
    grown = max(result["peak_growth_with_resume_mib"] for result in results)
    record = {
        **settings,
        "batch_size": BATCH_SIZE * options.world_size,
        "limit_mib": LIMIT_MIB,
        "passed": grown <= LIMIT_MIB and all(r["lines"] == r["lines_streamed"] for r in results),
        "seconds": round(time.perf_counter() - begin),
        "results": results,
        "provenance": provenance(0),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(record, indent=2) + "\n")
    for result in results:
        print(
            f"{result['lines_streamed']:>9,} of {result['lines']:,} lines ({result['corpus_mb']} MB): "
            f"{result['peak_growth_mib']} MiB above {result['memory_before_mib']} MiB, "
            f"{result['lines_per_second']:,} lines/s ({result['lines_per_cpu_second']:,} a CPU second), "
            f"resumed at step {result['resume_step']:,} in {result['resume_seconds']} s"
        )
    if not record["passed"]:
        raise SystemExit(f"not passed: {grown} MiB with a limit of {LIMIT_MIB}, or lines were left")


if __name__ == "__main__":
    main()
