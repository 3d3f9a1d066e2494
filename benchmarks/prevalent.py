"""Does pre-training pay? ``python -m benchmarks.prevalent`` runs the ablation in the embedded houses.

For every seed a speaker is trained and describes sampled paths, models are pre-trained, and agents are
fine-tuned from them, in run folders below ``--runs``: what is finished is only read, what was stopped is
resumed. Then come ``report.md`` with its pictures and ``results.json``. Pre-training, speaker and sampling
see training houses alone; the houses of ``val_unseen`` are walked by finished agents and by the evaluations
beside the fine-tuning, by which nothing is chosen.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.prevalent_report import (
    ALONE,
    RANKS,
    SETTINGS,
    add_processor_seconds,
    processor_seconds,
    seeds_of,
    write,
)
from fq.run import load_config, newest_checkpoint

ARMS = {
    "a": "no pre-training",
    "a+": "no pre-training, fine-tuned for (c)'s total time",
    "b": "masked words",
    "c": "masked words and actions",
    "c+": "as (c), as many triplets seen as (d)",
    "d": "as (c+), speaker's instructions among the triplets",
}
TASKS = {"r2r": tuple(ARMS), "ndh": ("a", "d"), "hanna": ("a", "d")}
UNSEEN = {"r2r": "val_unseen", "ndh": "val_unseen", "hanna": "val_unseen_all"}
SEEN = {"r2r": "val_seen", "ndh": "val_seen", "hanna": "val_seen_env"}
CHOSEN_BY = {"r2r": "val_seen/spl", "ndh": "val_seen/goal_progress", "hanna": "val_seen_env/spl"}
"""What the best agent of a run is best in: houses that it knows."""

DECIDING = ("a", "c", "d")
"""What the experiment is for; the other arms are run behind these, of all seeds."""

REAL_ARMS, RANDOM = ("a", "c"), "random:64"
NUM_SEEN = 120
"""Training houses: in few, paths are learnt by heart."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """How much is done, the same for every seed."""

    speaker_steps: int = 1500
    num_paths: int = 10_000
    """Sampled and described."""
    num_instructions: int = 3
    """Of each of them."""
    pretrain_steps: int = 2000
    """Of (b) and (c)."""
    long_pretrain_steps: int = 10_000
    """Of (c+) and (d)."""
    steps: int = 1000
    """Of the fine-tuning."""
    routes: int = 40
    """Of a search."""
    explore_steps: int = 500
    """Of a pre-exploration."""


class Job(NamedTuple):
    """A command of the experiment."""

    name: str
    """Also that of its run folder or file."""
    after: tuple[str, ...]
    """Jobs whose results it needs."""
    words: Callable[[], list[str]]
    """The command without Python, made when those are there."""
    finished: Callable[[], bool]
    late: bool = False
    """Whether to run it behind those that are not late."""


def make_jobs(
    world: Path, runs: Path, seeds: Sequence[int], lengths: Lengths, tasks: Sequence[str]
) -> list[Job]:
    """Everything that is to be run.

    Args:
        world: folder of `vln.houses`.
        runs: folder of the run folders.
        seeds: of the runs.
        lengths: of the runs.
        tasks: of `TASKS`.

    Returns:
        The jobs, each behind those that it needs.
    """
    jobs = [job for seed in seeds for job in _seed_jobs(world, runs, seed, seeds, lengths, tasks)]
    return sorted(jobs, key=lambda job: job.late)


def _seed_jobs(
    world: Path, runs: Path, seed: int, seeds: Sequence[int], lengths: Lengths, tasks: Sequence[str]
) -> Iterator[Job]:
    told = runs / f"told-{seed}.json"
    common = ("--data", str(world), "--seed", str(seed))
    blind = ("--val-splits", "val_seen")  # not even evaluated on what agents have never seen
    speaker = runs / f"speaker-{seed}"
    yield _training(speaker, (), ["vln.speaker", "houses", *common, *blind], lengths.speaker_steps)
    words = [
        "vln.augment", str(speaker), *common, "--out", str(told), "--num-paths", str(lengths.num_paths),
        "--num-instructions", str(lengths.num_instructions), "--temperature", "0.4",
    ]  # fmt: skip
    yield Job(told.name, (speaker.name,), lambda: words, told.is_file)
    for arm, steps, more in (
        ("b", lengths.pretrain_steps, ("--no-action",)),
        ("c", lengths.pretrain_steps, ()),
        ("c+", lengths.long_pretrain_steps, ()),
        ("d", lengths.long_pretrain_steps, ("--extra", str(told))),
    ):
        if arm == "d" or "r2r" in tasks:
            needs = (told.name,) if arm == "d" else ()
            words_of = ["vln.pretrain", "houses", *common, *blind, *more]
            job = _training(runs / f"pretrain-{arm}-{seed}", needs, words_of, steps)
            yield job._replace(late=arm not in DECIDING)
    for task in tasks:
        for arm in TASKS[task]:
            for job in _agent_jobs(task, arm, world, runs, seed, seeds, lengths):
                yield job._replace(late=arm not in DECIDING)
    if "r2r" in tasks and seed == seeds[0]:
        words_of = ["vln.pretrain", "houses", *common, *blind, "--action-target", "candidate_rank"]
        ranks = _training(runs / f"{RANKS}-{seed}", (), words_of, lengths.pretrain_steps)
        yield ranks._replace(late=True)
        words_of = ["vln.pretrain", "houses", *common, *blind, "--no-mlm"]
        alone = _training(runs / f"pretrain-{ALONE}-{seed}", (), words_of, lengths.pretrain_steps)
        for job in (alone, *_agent_jobs("r2r", ALONE, world, runs, seed, seeds, lengths)):
            yield job._replace(late=True)
        agent = runs / f"r2r-d-{seed}"
        given = ("--search", lengths.routes), ("--explore", lengths.explore_steps, "--explore-lr", 3e-4)
        for setting, options in zip(SETTINGS, given, strict=True):
            scores = scores_file(runs, "r2r", "d", seed, f"{UNSEEN['r2r']}.{setting}")
            walked = [*_walking(agent, world, "r2r", UNSEEN["r2r"], scores), "--speaker", str(speaker)]
            walked += map(str, options)
            yield Job(scores.name, (agent.name,), partial(list, walked), scores.is_file, late=True)


def real_jobs(data: Path, tokenizer: str, runs: Path, seeds: Sequence[int], lengths: Lengths) -> list[Job]:
    """R2R's own graphs and instructions, with a fixed random vector for each view: arms (a) and (c).

    Such vectors say nothing of a scan that was not trained on, so that `val_seen` is the only split.

    Args:
        data: folder with connectivity and R2R items.
        tokenizer: folder of one.
        runs: folder of the run folders.
        seeds: of the runs.
        lengths: of the runs.
    """
    jobs: list[Job] = []
    for seed in seeds:
        common = [
            "houses", "--data", str(data), "--tokenizer", tokenizer, "--features", RANDOM, "--feature-scale",
            "1", "--max-tokens", "80", "--val-splits", "val_seen", "--seed", str(seed),
        ]  # fmt: skip
        model = runs / f"real-pretrain-c-{seed}"
        jobs.append(_training(model, (), ["vln.pretrain", *common], lengths.pretrain_steps))
        for arm in REAL_ARMS:
            folder, needs = runs / f"real-{arm}-{seed}", (model.name,) if arm == "c" else ()
            words = [
                "vln.train", *common, "--select", "val_seen/spl", "--eval-every",
                str(max(lengths.steps // 5, 1)), "--maps", "0",
            ]  # fmt: skip
            words += ["--pretrained", str(model)] if needs else []
            jobs.append(_training(folder, needs, words, lengths.steps))
            scores = scores_file(runs, "real", arm, seed, "val_seen")
            words = [*_walking(folder, data, "r2r", "val_seen", scores), "--features", RANDOM]
            jobs.append(Job(scores.name, (folder.name,), partial(list, words), scores.is_file))
    return jobs


def _agent_jobs(
    task: str, arm: str, world: Path, runs: Path, seed: int, seeds: Sequence[int], lengths: Lengths
) -> Iterator[Job]:
    folder, model = runs / f"{task}-{arm}-{seed}", runs / f"pretrain-{arm}-{seed}"
    words = [
        "vln.train", "houses", "--task", task, "--data", str(world), "--seed", str(seed),
        "--select", CHOSEN_BY[task], "--eval-every", str(max(lengths.steps // 5, 1)), "--maps", "0",
    ]  # fmt: skip
    if arm == "a+":
        plain = tuple(f"{task}-a-{each}" for each in seeds)
        trained = tuple(f"pretrain-c-{each}" for each in seeds)

        def steps() -> int:
            if (folder / "config.json").is_file():  # begun before
                return int(load_config(folder)["run"]["steps"])
            share = processor_seconds(runs, trained) / processor_seconds(runs, plain)
            return lengths.steps + math.ceil(share * lengths.steps)

        yield _training(folder, (*plain, *trained), words, steps)
    elif arm == "a":
        yield _training(folder, (), words, lengths.steps)
    else:
        yield _training(folder, (model.name,), [*words, "--pretrained", str(model)], lengths.steps)
    for split in (SEEN[task], UNSEEN[task]):
        scores = scores_file(runs, task, arm, seed, split)
        told = _walking(folder, world, task, split, scores)
        yield Job(scores.name, (folder.name,), partial(list, told), scores.is_file)


def _walking(agent: Path, data: Path, task: str, split: str, scores: Path) -> list[str]:
    return [
        "vln.evaluate", str(agent), "--data", str(data), "--split", split, "--max-steps",
        "24" if task == "hanna" else "12", "--submission-out",
        str(scores.with_name(scores.name.replace(".scores", ""))), "--out", str(scores),
    ]  # fmt: skip


def scores_file(runs: Path, task: str, arm: str, seed: int, split: str) -> Path:
    """Where the scores of an agent are."""
    return runs / f"{task}-{arm}-{seed}.{split}.scores.json"


def _training(folder: Path, after: tuple[str, ...], words: list[str], steps: int | Callable[[], int]) -> Job:
    def number() -> int:
        return steps() if callable(steps) else steps

    return Job(
        folder.name,
        after,
        lambda: [*words, "--steps", str(number()), "--out", str(folder)],
        lambda: (folder / "config.json").is_file() and _reached(folder) == number(),
    )


def _reached(folder: Path) -> int:
    newest = newest_checkpoint(folder)
    return 0 if newest is None else int(newest.name.removeprefix("step_"))


def run_jobs(jobs: Sequence[Job], runs: Path, *, workers: int) -> Iterator[str]:
    """Run what is not finished, some at a time on one thread each, what others need first.

    Args:
        jobs: each behind those that it needs.
        runs: folder of the run folders; ``logs`` in it gets what they print and their processor time.
        workers: jobs beside each other.

    Yields:
        A line on every job, when it is done.

    Raises:
        RuntimeError: a job failed; its log says why. Those that run beside it are ended.
    """
    logs = runs / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, done = list(jobs), set[str]()
    processes: dict[str, subprocess.Popen[bytes]] = {}
    stopping = threading.Event()

    def run(job: Job) -> str:
        if job.finished():
            return f"{job.name}: finished before"
        start = time.perf_counter()
        with (logs / f"{job.name}.log").open("ab") as output:
            threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            processes[job.name] = process = subprocess.Popen(
                [sys.executable, "-m", *job.words()], env=os.environ | threads, stdout=output, stderr=output
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = code = os.waitstatus_to_exitcode(status)
        add_processor_seconds(runs, job.name, used.ru_utime + used.ru_stime)
        if code and not stopping.is_set():
            raise RuntimeError(f"{job.name} ended with code {code}: see {logs / f'{job.name}.log'}")
        return f"{job.name}: {(time.perf_counter() - start) / 60:.1f} minutes"

    running: dict[Future[str], Job] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                ready = [job for job in waiting if done.issuperset(job.after)][: workers - len(running)]
                for job in ready:
                    waiting.remove(job)
                    running[pool.submit(run, job)] = job
                assert running, [job.name for job in waiting]
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    done.add(running.pop(future).name)
                    yield future.result()
        finally:
            stopping.set()
            for process in processes.values():
                with suppress(ProcessLookupError):  # it may end at this very moment
                    if process.returncode is None:
                        os.kill(process.pid, signal.SIGTERM)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, run what is missing, write the report.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is missing or failed; the text says what.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prevalent", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/prevalent"), help="folder of the run folders")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prevalent"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--report", action="store_true", help="run nothing, report on what is finished")
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other, on one thread each")
    parser.add_argument(
        "--real", type=Path, help="folder of R2R itself, learnt with random features, too, for the first seed"
    )
    parser.add_argument("--tokenizer", default="tokenizer", help="for --real: a folder there, or any other")
    options = parser.parse_args(arguments)
    world, lengths = options.runs / "world", Lengths()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what runs beside it, too
    try:
        if not (world / "config.json").is_file():
            words = [sys.executable, "-m", "vln.houses", "--num-seen", str(NUM_SEEN), "--out", str(world)]
            subprocess.run(words, check=True)
        jobs = make_jobs(world, options.runs, options.seeds, lengths, options.tasks)
        if options.real:
            own = seeds_of("real", options.seeds)
            jobs += real_jobs(options.real, options.tokenizer, options.runs, own, lengths)
        if not options.report:
            for line in run_jobs(jobs, options.runs, workers=options.workers):
                print(line, flush=True)
        arms = {task: TASKS[task] for task in options.tasks}
        splits: dict[str, tuple[str, ...]] = {task: (SEEN[task], UNSEEN[task]) for task in options.tasks}
        if options.real:
            arms["real"], splits["real"] = REAL_ARMS, ("val_seen",)
        settings = SETTINGS if "r2r" in options.tasks else ()
        print(f"written to {write(options.runs, options.out, options.seeds, arms, ARMS, splits, settings)}")
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
