"""Runs of the trainer as processes: killed, side by side, without a network."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fq.run import newest_checkpoint, read_metrics
from tests.tiny_lm import TEXTS, tokenizers
from vae_lm import Optimus, train

ROOT = Path(__file__).resolve().parents[1]
LINES = [" ".join(TEXTS[number % 6].split()[: 2 + number % 7]) for number in range(21)]
SIZES = (
    "--width 16 --num-heads 2 --encoder-layers 1 --decoder-layers 2 --latent-dim 5 --max-tokens 32".split()
)
QUIET = "--sample-every 0 --eval-every 0 --log-every 1 --held-out 0 --warmup-steps 0 --cache".split()
# Each process starts as a copy of one that has imported everything: a twentieth of the time of a new one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vae_lm.train", "tests.tiny_lm"])


@pytest.fixture(scope="module", autouse=True)
def on_one_thread_of_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    tokenizers().save(folder / "vocab")
    named = ["--data", str(folder / "text.txt"), "--vocab", str(folder / "vocab")]
    return ["small", *SIZES, *QUIET, str(folder / "tokens"), *named]


def start(arguments):
    process = FORKS.Process(target=train.main, args=(arguments,))
    process.start()
    return process


def finish(arguments):
    process = start(arguments)
    process.join()
    assert process.exitcode == 0


def without_time(records):
    return [{name: value for name, value in record.items() if "_per_" not in name} for record in records]


def digests(run):
    manifest = json.loads((newest_checkpoint(run) / "manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def kill_at(arguments, run, step):
    """SIGKILL as soon as that step has been logged."""
    process, deadline = start(arguments), time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < step:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_twice_repeats_one_never_killed_to_the_bit(given, tmp_path):
    """With dropout, noise of z, a cyclic weight, two batches a step and evaluations in between."""
    options = "--steps 16 --checkpoint-every 3 --accumulation 2 --batch-size 4 --cycles 2".split()
    options += "--eval-every 5 --sample-every 8 --importance-samples 2".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*given, *options, "--out", str(whole)])
    for step in (5, 12):
        kill_at([*given, *options, "--out", str(killed)], killed, step)
    kept = newest_checkpoint(killed)
    assert kept is not None and 3 <= int(kept.name.removeprefix("step_")) < 16
    finish([*given, *options, "--out", str(killed)])
    assert without_time(read_metrics(killed)) == without_time(read_metrics(whole))
    assert digests(killed) == digests(whole)
    assert (killed / "samples" / "000016.md").read_bytes() == (whole / "samples" / "000016.md").read_bytes()
    assert len(json.loads((killed / "provenance.json").read_text())) == 3
    assert Optimus.from_pretrained(killed / "model").latent_statistics is not None


def launch(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "vae_lm.train", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


# Shares of 3 and 2; the 21st sentence makes a batch of one, and a share of none.
@pytest.mark.parametrize("options", ["--batch-size 5", "--batch-size 4 --accumulation 2 --length-weighted"])
def test_two_processes_equal_one(options, given, tmp_path):
    options = [*options.split(), *"--steps 10 --dropout 0 --free-bits 0.01 --cycles 2 --seed 1".split()]
    finish([*given, *options, "--out", str(tmp_path / "one")])
    output = launch(*given, *options, "--out", tmp_path / "two")
    assert "2 process(es)" in output and "Warning" not in output
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    names = ("step", "loss", "rec", "kl", "kl_counted", "beta", "lr", "grad_norm")
    table = [[[record[name] for name in names] for record in records] for records in (two, one)]
    assert len(one) == 10 and max(record["kl_counted"] for record in one) > 0
    np.testing.assert_allclose(*table, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("preset", ["grammar", "small"])
def test_presets_need_no_network(preset, tmp_path):
    """Nothing in the Hub's cache, its access off: a vocabulary is learnt on the spot and saved."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} men and a dog play in park {number}" for number in range(200)))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    options = [
        *(["--data", str(text)] if preset == "small" else []),
        *"--steps 2 --vocab-size 300 --cache".split(),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "vae_lm.train", preset, *options, str(tmp_path / "tokens"), "--out", "run"],
        cwd=tmp_path, env=os.environ | offline, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime - before.ru_utime < 20, "a dry run takes seconds"
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "hub").exists() or not list((tmp_path / "hub").rglob("*.safetensors"))
    model = Optimus.from_pretrained(tmp_path / "run" / "model")
    assert len(model.encode(["a dog play in park 7"]).mu) == 1 and len(model.sample(2, max_new_tokens=5)) == 2
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_stream_trains_and_goes_on_to_the_bit(given, tmp_path):
    options = "--stream --too-long refuse --max-words 0 --shuffle-buffer 8 --batch-size 4 --steps 8".split()
    options += ["--checkpoint-every", "3", "--valid", given[given.index("--data") + 1], "--eval-every", "8"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*given, *options, "--out", str(whole)])
    kill_at([*given, *options, "--out", str(killed)], killed, 5)
    finish([*given, *options, "--out", str(killed)])
    records = without_time(read_metrics(killed))
    assert records == without_time(read_metrics(whole)) and digests(killed) == digests(whole)
    assert records[-1]["valid/num_sentences"] == 21


@pytest.mark.parametrize("arguments", [["--help"], ["small", "--help"]])
def test_help_as_a_command(arguments):
    command = [sys.executable, "-m", "vae_lm.train", *arguments]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("usage: python -m vae_lm.train") and done.stderr == ""
    if arguments == ["--help"]:
        assert all(name in done.stdout for name in (*train.PRESETS, "--config RUN"))
        assert len(done.stdout.splitlines()) < 60
    else:
        groups = ("text options", "network options", "objective options", "optim options", "run options")
        assert all(group in done.stdout for group in groups)
        assert all(f"--{name}" in done.stdout for name in ("data", "free-bits", "no-latent", "steps", "init"))
