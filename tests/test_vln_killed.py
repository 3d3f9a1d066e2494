"""Runs that are killed: each training command, on generated houses, goes on as if nothing had been."""

import json
import multiprocessing
import signal
import time
from importlib import import_module

import pytest

from fq.run import newest_checkpoint, read_metrics
from vln.houses import HousesConfig, generate, write

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vln.pretrain", "vln.speaker", "vln.train"])
STEPS = 9
RUN = f"--steps {STEPS} --checkpoint-every 2 --log-every 1 --eval-every 4 --batch-size 4".split()
WALKS = "--maps 0 --eval-items 4 --max-steps 5 --eval-max-steps 5".split()
COMMANDS = {
    "pretrain": ("vln.pretrain", "--val-splits val_seen --eval-triplets 8 --dropout 0.1".split()),
    "speaker": ("vln.speaker", "--val-splits val_seen --eval-paths 2 --min-count 1 --no-sacrebleu".split()),
    "r2r": ("vln.train", ["--reinforce", "--tune-from", "5", "--trunk-dropout", "0.1", *WALKS]),
    "ndh": ("vln.train", ["--task", "ndh", *WALKS]),
    "hanna": ("vln.train", ["--task", "hanna", *WALKS]),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = generate(HousesConfig(num_seen=3, num_unseen=1, train_groups=6, val_groups=2, group_size=3))
    return write(made, tmp_path_factory.mktemp("killed") / "houses")


@pytest.fixture(autouse=True)
def on_one_thread(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(module, arguments):
    process = FORKS.Process(target=import_module(module).main, args=(arguments,))
    process.start()
    return process


def finish(module, arguments):
    process = start(module, arguments)
    process.join()
    assert process.exitcode == 0


def untimed(run):
    return [
        {name: value for name, value in record.items() if "second" not in name}
        for record in read_metrics(run)
    ]


def digests(run):
    manifest = json.loads((newest_checkpoint(run) / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_repeats_one_that_was_not_to_the_bit(name, world, tmp_path):
    module, options = COMMANDS[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = ["houses", "--data", str(world), *options, *RUN]
    finish(module, [*given, "--out", str(whole)])
    process, deadline = start(module, [*given, "--out", str(killed)]), time.monotonic() + 120
    while not (killed / "metrics.jsonl").is_file() or not any(
        record["step"] >= 5 for record in read_metrics(killed)
    ):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = int(newest_checkpoint(killed).name.removeprefix("step_"))
    assert 2 <= kept < STEPS
    finish(module, [*given, "--out", str(killed)])
    assert untimed(killed) == untimed(whole)
    assert digests(killed) == digests(whole) and digests(whole)
