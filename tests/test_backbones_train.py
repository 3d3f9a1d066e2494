import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from backbones import train, train_biggan, train_setup
from backbones.configs import BigGANOptim, BigGANTraining, QuantizerConfig, RunConfig
from backbones.data import DataConfig, open_images
from backbones.losses import ADVERSARIAL, AdversarialLoss
from backbones.presets import PRESETS
from backbones.sample import real_grid
from fq.run import checkpoint_tensors, load_config, newest_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("loss_d_real", "loss_d_fake", "commitment_d", "loss_g", "commitment_g")
GENERATOR, DISCRIMINATOR, AVERAGE = "model.safetensors", "model_1.safetensors", "model_2.safetensors"
SMALL = "smoke --g-channels 2 --d-channels 2 --batch-size 8 --features none --sample-every 0".split()
# The average differs from the generator soon, so that a resumed run can lose it.
EVERY_STEP = "--log-every 1 --checkpoint-every 3 --ema-start 4 --ema-decay 0.9".split()
# Each process starts as a copy of one that has imported everything: a twentieth of the time of a new one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["backbones.train"])


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_process(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def run_here(out: Path, *options: Any) -> list[dict[str, Any]]:
    """Train in this process and return what was logged."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*SMALL, "--out", str(out), "--log-every", "1", *map(str, options)])
    return read_metrics(out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What the command said when it stopped with an error."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stop:
        train.main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    said = capsys.readouterr()
    # tyro draws a box around its messages and breaks lines in it.
    text = re.sub(r"[│╭╮╰╯─]", " ", f"{said.out} {said.err} {stop.value.code}")
    return " ".join(text.split())


def losses(records: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [tuple(record[name] for name in ("step", *LOSSES)) for record in records]


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds_per_step"} for record in records]


def tensor_digests(run: Path) -> dict[str, str]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None
        for item in sorted(folder.rglob("*"))
    }


def picture_file(path: Path, count: int, size: int, *, classes: int = 0) -> Path:
    draw = np.random.default_rng(0)
    arrays = {"images": draw.integers(0, 256, (count, size, size, 3), dtype=np.uint8)}
    if classes:
        arrays["labels"] = np.arange(count) % classes
    np.savez(path, **arrays)
    return path


def picture_folder(path: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / name)
    return path


# Killed and resumed


def start(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=train.main, args=(arguments,))
    process.start()
    return process


def finish(arguments: list[str]) -> None:
    process = start(arguments)
    process.join()
    assert process.exitcode == 0


def steps_logged(run: Path) -> int:
    records = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return int(records[-1]["step"]) if records else 0


def writes_checkpoint(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.partial"))


def lines_to_keep(run: Path) -> tuple[int, list[bytes]]:
    """Newest checkpoint's step, and the lines up to it, which a resumed run leaves as they are."""
    checkpoint = newest_checkpoint(run)
    step = int(checkpoint.name.removeprefix("step_")) if checkpoint else 0
    return step, (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:step]


def kill_when(arguments: list[str], is_time: Any) -> None:
    process, deadline = start(arguments), time.monotonic() + 60
    while not is_time():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_while_writing(arguments: list[str], run: Path) -> None:
    """Killed between the first file of a checkpoint and its rename, as the leftover proves."""
    for _ in range(10):
        kill_when(arguments, lambda: writes_checkpoint(run))
        if writes_checkpoint(run):
            return
    pytest.fail("ten attempts never hit the time in which a checkpoint is written")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """Runs of 40 steps by mode, each made once."""
    made: dict[str, Path] = {}

    def run(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("never_killed") / mode
            finish([*SMALL, *EVERY_STEP, "--steps", "40", "--fq", mode, "--out", str(made[mode])])
        return made[mode]

    return run


@pytest.mark.parametrize("mode", ["none", "regularize", "replace"])
def test_a_run_killed_five_times_repeats_one_never_killed_to_the_bit(mode, never_killed, tmp_path):
    expected, run = never_killed(mode), tmp_path / "run"
    arguments = [*SMALL, *EVERY_STEP, "--steps", "40", "--fq", mode, "--out", str(run)]
    resumed_at, kept = 0, []
    for target in (2, 10, "in a checkpoint", 24, 34):
        if target == "in a checkpoint":
            kill_while_writing(arguments, run)
        else:
            kill_when(arguments, lambda target=target: steps_logged(run) >= target)
        # Lines with the same seconds per step: the run went on, it did not start over.
        assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[: len(kept)] == kept
        step, kept = lines_to_keep(run)
        assert step >= resumed_at
        resumed_at = step
    assert 30 <= resumed_at < 40
    finish(arguments)

    records = read_metrics(run)
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[: len(kept)] == kept
    assert [record["step"] for record in records] == list(range(1, 41))
    assert without_time(records) == without_time(read_metrics(expected))
    assert ("fq/blocks.0.0/usage" in records[0]) == (mode != "none")
    assert tensor_digests(run) == tensor_digests(expected)
    assert (run / "samples/000040.png").read_bytes() == (expected / "samples/000040.png").read_bytes()
    assert not writes_checkpoint(run)
    assert len(json.loads((run / "provenance.json").read_text())) >= 6


def test_worker_processes_change_no_bit_of_a_resumed_run(never_killed, tmp_path):
    run = tmp_path / "run"
    arguments = [*SMALL, *EVERY_STEP, "--steps", "40", "--num-workers", "1", "--out", str(run)]
    kill_when(arguments, lambda: steps_logged(run) >= 8)
    step, kept = lines_to_keep(run)
    finish(arguments)
    assert step >= 6
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:step] == kept
    assert without_time(read_metrics(run)) == without_time(read_metrics(never_killed("none")))


def test_regularize_without_weight_is_the_baseline_to_the_bit(never_killed, tmp_path):
    plain, free = never_killed("none"), tmp_path / "free"
    finish(
        [*SMALL, *EVERY_STEP, *"--steps 40 --fq regularize --commitment-weight 0 --out".split(), str(free)]
    )
    assert losses(read_metrics(free)) == losses(read_metrics(plain))
    assert losses(read_metrics(free)) != losses(read_metrics(never_killed("regularize")))
    for name in ("000000.png", "000040.png"):
        assert (free / "samples" / name).read_bytes() == (plain / "samples" / name).read_bytes()
    ours, theirs = tensor_digests(free), tensor_digests(plain)
    assert (ours[GENERATOR], ours[AVERAGE]) == (theirs[GENERATOR], theirs[AVERAGE])

    quantised = checkpoint_tensors(newest_checkpoint(free), DISCRIMINATOR)
    bare = checkpoint_tensors(newest_checkpoint(plain), DISCRIMINATOR)
    assert all(torch.equal(quantised.pop(name), tensor) for name, tensor in bare.items())
    # The quantisers were there and learnt: 2 discriminator steps in each of 40 steps.
    assert {name.removeprefix(f"blocks.{i}.0.") for i in range(4) for name in quantised} >= {"fq.codebook"}
    assert all(quantised[f"blocks.{i}.0.fq.num_updates"] == 80 for i in range(4))


def test_log_windows_never_span_a_checkpoint(tmp_path):
    whole = run_here(tmp_path / "whole", "--steps", 6, "--log-every", 4, "--checkpoint-every", 3)
    run_here(tmp_path / "parts", "--steps", 3, "--log-every", 4, "--checkpoint-every", 3)
    parts = run_here(tmp_path / "parts", "--steps", 6, "--log-every", 4, "--checkpoint-every", 3)
    assert [record["step"] for record in whole] == [3, 4, 6]
    assert losses(parts) == losses(whole)


# Two processes

RANKS = """
import sys
import torch
from backbones import train, train_biggan
from fq.run import RunFolder

folder = sys.argv.pop(1)
save, stream = RunFolder.save, train_biggan.batches

def first_batch(*args, rank, **options):
    torch.save(next(stream(*args, rank=rank, **options))[0], f"{folder}/batch{rank}.pt")
    return stream(*args, rank=rank, **options)

def keep(run, step, **options):
    states = [model.state_dict() for model in run._accelerator._models]
    torch.save(states, f"{folder}/step{step}_rank{run._accelerator.process_index}.pt")
    return save(run, step, **options)

RunFolder.save, train_biggan.batches = keep, first_batch
train.main()
"""
PAIR = [*SMALL, *EVERY_STEP, *"--steps 10 --fq replace --batch-size 4".split()]


def launch(*arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def kill_family(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher first, then for its processes, which lie in sessions of their own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) >= 3
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ten steps of two processes, with the state of both at every checkpoint."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "ranks.py").write_text(RANKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        process = launch(folder / "ranks.py", folder, *PAIR, "--out", folder / "run")
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "2 process(es)" in output and "effective batch 8" in output
    assert "Warning" not in output
    return folder


def test_two_processes_stay_identical_to_the_bit(pair):
    first, second = (torch.load(pair / f"step10_rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first) == 4  # generator, discriminator, averaged generator, step counter
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(name.endswith("fq.codebook") for name in first[1]) == 4
    assert int(first[3]["step"]) == 10
    before = torch.load(pair / "step3_rank0.pt", weights_only=True)
    assert not any(torch.equal(before[1][name], first[1][name]) for name in first[1] if "codebook" in name)
    # Equal although each saw pictures of its own.
    batches = [torch.load(pair / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not torch.equal(*batches)


def test_two_processes_killed_and_resumed_repeat_the_same_losses(pair, tmp_path):
    run = tmp_path / "run"
    process, deadline = launch("-m", "backbones.train", *PAIR, "--out", run), time.monotonic() + 60
    while steps_logged(run) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    kill_family(process)
    step, kept = lines_to_keep(run)
    assert 3 <= step < 10
    process = launch("-m", "backbones.train", *PAIR, "--out", run)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"resuming smoke at step {step}" in output
    assert (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:step] == kept
    assert without_time(read_metrics(run)) == without_time(read_metrics(pair / "run"))
    assert tensor_digests(run) == tensor_digests(pair / "run")


# The loop


def test_accumulation_adds_up_the_mean_of_micro_batches_before_each_step(tmp_path, monkeypatch):
    seen, handed, fresh = [], [], []
    (hinge, of_g), backward = ADVERSARIAL["hinge"], Accelerator.backward

    def watched_hinge(real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(real) == len(fake) == 4
        result = hinge(real, fake)
        seen.append([loss.item() for loss in result])
        return result

    def watched_backward(accelerator: Any, loss: torch.Tensor) -> None:
        handed.append(loss.item())
        fresh.append(next(accelerator._models[len(handed) <= 4].parameters()).grad is None)
        backward(accelerator, loss)

    monkeypatch.setitem(ADVERSARIAL, "hinge", AdversarialLoss(watched_hinge, of_g))
    monkeypatch.setattr(Accelerator, "backward", watched_backward)
    record, *_ = run_here(tmp_path / "run", *"--steps 1 --batch-size 4 --accumulation 2".split())
    # Two discriminator steps and one generator step, each of two micro-batches with half the loss.
    assert len(seen) == 4
    assert handed[:4] == pytest.approx([sum(pair) / 2 for pair in seen])
    assert sum(handed[4:]) == pytest.approx(record["loss_g"])
    assert fresh == [True, False] * 3
    assert record["loss_d_real"] == pytest.approx(np.mean([real for real, _ in seen]))
    for name, steps in (("optimizer.bin", 1), ("optimizer_1.bin", 2)):
        optimiser = torch.load(newest_checkpoint(tmp_path / "run") / name, weights_only=True)
        assert {int(state["step"]) for state in optimiser["state"].values()} == {steps}


def test_nan_in_a_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    expected = run_here(tmp_path / "well", "--steps", 6)
    original, calls = ADVERSARIAL["hinge"], []

    def fails_at_the_fifth(fake: torch.Tensor) -> torch.Tensor:
        calls.append(fake)
        return original.generator(fake) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setitem(ADVERSARIAL, "hinge", original._replace(generator=fails_at_the_fifth))
    options = ("--steps", 6, "--checkpoint-every", 2)
    with pytest.raises(SystemExit, match=r"error: loss_g is nan at step 5: stopped; .*checkpoints"):
        run_here(tmp_path / "ill", *options)
    assert newest_checkpoint(tmp_path / "ill").name == "step_00000004"
    monkeypatch.setitem(ADVERSARIAL, "hinge", original)
    assert losses(run_here(tmp_path / "ill", *options)) == losses(expected)


def test_absurd_learning_rate_raises_floating_point_error(tmp_path):
    arguments = [*SMALL, *"--steps 50 --lr-g 1e38 --lr-d 1e38 --checkpoint-every 1 --out".split()]
    with pytest.raises(FloatingPointError, match=r"step \d+: stopped; the last good checkpoint"):
        train.train(train.parse([*arguments, str(tmp_path / "run")]))
    checkpoint = newest_checkpoint(tmp_path / "run")
    if checkpoint is not None:
        tensors = checkpoint_tensors(checkpoint, GENERATOR) | checkpoint_tensors(checkpoint, DISCRIMINATOR)
        assert all(tensor.isfinite().all() for name, tensor in tensors.items() if "weight" in name)


def test_weights_broken_by_an_update_do_not_reach_a_checkpoint(tmp_path, monkeypatch):
    calls: list[float] = []

    def breaks_at_the_third(generator: torch.nn.Module, strength: float) -> None:
        calls.append(strength)
        if len(calls) == 3:
            generator.linear.weight.grad.fill_(float("nan"))

    monkeypatch.setattr(train_biggan, "add_orthogonal_gradient", breaks_at_the_third)
    with pytest.raises(SystemExit, match=r"linear\.weight of the generator is not finite after step 3"):
        run_here(tmp_path / "run", *"--steps 5 --checkpoint-every 1 --g-orthogonal 0.5".split())
    assert calls == [0.5] * 3
    assert newest_checkpoint(tmp_path / "run").name == "step_00000002"


def test_orthogonal_regularisation_changes_the_generator(tmp_path):
    plain = run_here(tmp_path / "plain", "--steps", 3)
    pulled = run_here(tmp_path / "pulled", "--steps", 3, "--g-orthogonal", 10)
    assert losses(plain)[0] == losses(pulled)[0]  # before the first update
    assert losses(plain)[1:] != losses(pulled)[1:]


def test_raised_steps_continue_a_finished_run(tmp_path, capsys):
    whole = run_here(tmp_path / "whole", "--steps", 6, "--fq", "replace")
    run_here(tmp_path / "parts", "--steps", 4, "--fq", "replace")
    first = (tmp_path / "parts/metrics.jsonl").read_bytes()
    capsys.readouterr()
    parts = run_here(tmp_path / "parts", "--steps", 6, "--fq", "replace")
    assert "resuming smoke at step 4" in capsys.readouterr().out
    assert (tmp_path / "parts/metrics.jsonl").read_bytes().startswith(first)
    assert without_time(parts) == without_time(whole)
    assert tensor_digests(tmp_path / "parts") == tensor_digests(tmp_path / "whole")


def test_a_finished_run_says_so(tmp_path, capsys):
    run_here(tmp_path / "run", "--steps", 2)
    capsys.readouterr()
    run_here(tmp_path / "run", "--steps", 2)
    assert "has reached step 2 already: raise --steps" in capsys.readouterr().out


def test_config_round_trip(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_here(first, *"--steps 2 --fq blend --layers blocks.0.0 blocks.3.0 --lr-g 3e-4".split())
    stored = (first / "config.json").read_bytes()
    for source in (["--config", str(first)], [f"--config={first / 'config.json'}"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main([*source, "--out", str(second)])
        again = load_config(second)
        assert again["run"].pop("out") == str(second)
        expected = json.loads(stored)
        assert expected["run"].pop("out") == str(first)
        assert again == expected
    assert losses(read_metrics(first)) == losses(read_metrics(second))
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["--config", str(first)])
    assert (first / "config.json").read_bytes() == stored


def test_averaged_generator_copies_then_follows(tmp_path):
    options = "--steps 3 --checkpoint-every 1 --keep-checkpoints 9 --ema-start 2 --ema-decay 0.75".split()
    run_here(tmp_path / "run", *options)
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    plain = [checkpoint_tensors(folder, GENERATOR) for folder in folders]
    average = [checkpoint_tensors(folder, AVERAGE) for folder in folders]
    for name in plain[0]:
        torch.testing.assert_close(average[1][name], plain[1][name], rtol=0, atol=0)
        expected = 0.75 * plain[1][name] + 0.25 * plain[2][name]
        torch.testing.assert_close(average[2][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("classes", "rows", "columns"), [(0, 1, 10), (3, 3, 4)])
def test_an_unconditional_model_takes_pictures_with_and_without_labels(classes, rows, columns, tmp_path):
    data = picture_file(tmp_path / "pictures.npz", 12, 16, classes=classes)
    records = run_here(tmp_path / "run", "--steps", 2, "--data", data, "--num-classes", 1)
    assert len(records) == 2
    with Image.open(tmp_path / "run/real.png") as grid:
        assert grid.size == (50 * columns + 2, 50 * rows + 2)  # 48 pixels each and 2 between


def test_real_grid_keeps_rows_to_classes_of_unequal_size(tmp_path):
    pixels = np.repeat(np.arange(7, dtype=np.uint8)[:, None, None, None] * 40, 16, 1).repeat(16, 2)
    labels = np.array([0, 0, 0, 0, 2, 2, 2])  # nothing of class 1
    np.savez(tmp_path / "uneven.npz", images=pixels.repeat(3, 3), labels=labels)
    config = DataConfig(data=str(tmp_path / "uneven.npz"))
    images = open_images(config, resolution=16, conditional=True)
    pictures, rows = real_grid(images)
    assert rows == 2
    levels = ((pictures[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert levels == [0, 40, 80, 160, 200, 240]


# Presets


@pytest.mark.parametrize(
    ("preset", "mode", "size", "options"),
    [
        ("digits", "none", 16, "--g-channels 4 --d-channels 4 --features none"),
        ("smoke", "regularize", 16, "--g-channels 4 --d-channels 4"),
        ("cifar10", "regularize", 32, "--g-channels 4 --d-channels 4"),
        ("cifar100", "replace", 32, "--g-channels 4 --d-channels 4"),
        ("imagenet64", "blend", 64, "--g-channels 4 --d-channels 8"),
        ("imagenet128", "replace", 128, "--g-channels 4 --d-channels 8 --accumulation 1"),
    ],
)
def test_every_preset_runs_two_steps(preset, mode, size, options, tmp_path):
    run, data = tmp_path / "run", picture_file(tmp_path / "pictures.npz", 8, size, classes=2)
    train.main([
        preset, *options.split(), *"--num-classes 2 --batch-size 2 --codebook-size 8 --steps 2".split(),
        *"--num-workers 0 --log-every 1".split(), "--fq", mode, "--data", str(data), "--out", str(run),
    ])  # fmt: skip
    records = [record for record in read_metrics(run) if "loss_g" in record]
    assert [record["step"] for record in records] == [1, 2]
    assert losses(records)[0][1:] != losses(records)[1][1:]
    sites = {name.split("/")[1] for name in records[-1] if name.startswith("fq/")}
    blocks = {"none": [], "blend": [2]}.get(mode, range(4))
    assert sites == {f"blocks.{i}.0" for i in blocks}
    assert all(records[-1][f"fq/{site}/perplexity"] > 1 for site in sites)
    assert (run / "samples/000002.png").read_bytes() != (run / "samples/000000.png").read_bytes()
    assert (newest_checkpoint(run) or run).name == "step_00000002"
    stored = load_config(run)
    assert stored["preset"] == preset and stored["optim"]["d_steps"] == PRESETS[preset][1].optim.d_steps
    training = train_setup.stored_training(stored)
    assert isinstance(training, BigGANTraining) and training.folder == str(run)


def test_presets_hold_the_paper_s_numbers():
    def row(name: str) -> tuple[Any, ...]:
        config = PRESETS[name][1]
        quantizer, optim = config.quantizer, config.optim
        return (
            quantizer.codebook_size, quantizer.commitment_weight, quantizer.decay, optim.batch_size,
            optim.accumulation, optim.d_steps, optim.lr_g, optim.lr_d, optim.adam_eps, optim.ema_start,
            config.model.init, config.model.g_channels,
        )  # fmt: skip

    # The launch files of the released code (FQ-GAN) and of BigGAN-PyTorch.
    assert row("cifar10") == (1024, 1.0, 0.8, 64, 1, 4, 2e-4, 2e-4, 1e-8, 1000, "normal02", 64)
    assert row("cifar100") == (64, 10.0, 0.9, 64, 1, 4, 2e-4, 2e-4, 1e-8, 1000, "normal02", 64)
    assert row("imagenet64") == (1024, 0.5, 0.7, 128, 4, 1, 1e-4, 4e-4, 1e-6, 20_000, "ortho", 64)
    assert row("imagenet128") == (1024, 15.0, 0.8, 256, 4, 1, 1e-4, 4e-4, 1e-6, 20_000, "ortho", 64)
    assert PRESETS["imagenet128"][1].model.shared_dim == 128
    assert all(PRESETS[name][1].preset == name for name in PRESETS)


def test_bfloat16_steps_and_keeps_codebooks_in_float32(tmp_path):
    options = "--steps 2 --fq replace".split()
    exact = run_here(tmp_path / "exact", *options)
    rough = run_here(tmp_path / "rough", *options, "--mixed-precision", "bf16")
    assert losses(rough) != losses(exact)
    assert rough[0]["loss_d_real"] == pytest.approx(exact[0]["loss_d_real"], rel=0.2)
    tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "rough"), DISCRIMINATOR)
    assert {tensor.dtype for name, tensor in tensors.items() if "codebook" in name} == {torch.float32}


# Trackers


def test_tensorboard_receives_the_logged_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = run_here(tmp_path / "run", "--steps", 3, "--trackers", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run/trackers/fq-gan"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss_g")]
    assert logged == [(record["step"], pytest.approx(record["loss_g"])) for record in records]


def test_a_missing_tracker_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "wandb" else find(name, *rest),
    )
    said = refused(capsys, *SMALL, "--trackers", "wandb", "--out", tmp_path / "run")
    assert "tracker 'wandb' is not installed: pip install wandb" in said
    said = refused(capsys, *SMALL, "--trackers", "tensorbord", "--out", tmp_path / "run")
    assert "tracker 'tensorbord' is unknown: accelerate knows" in said and "pip" not in said
    assert not (tmp_path / "run").exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--comitment-weight 2", "Perhaps you meant: --commitment-weight"),
        ("--codebook-size 0", "codebook_size is 0: give at least 1"),
        ("--decay 1.5", "decay is 1.5: give a moving-average factor from 0 to below 1"),
        ("--commitment-weight nan", "commitment_weight is nan: give at least 0"),
        ("--commitment-weight -1", "commitment_weight is -1.0: give at least 0"),
        ("--blend-end 2", "blend_end is 2.0: give a share from 0 to 1"),
        ("--lr-g inf", "lr_g is inf: give a finite number above 0"),
        ("--lr-d 0", "lr_d is 0.0: give a finite number above 0"),
        ("--beta1 1", "beta1 is 1.0: give a factor from 0 to below 1"),
        ("--batch-size 0", "batch_size is 0: give at least 1"),
        ("--g-orthogonal nan", "g_orthogonal is nan: give at least 0"),
        ("--steps 0", "steps is 0: give at least 1"),
        ("--seed -1", "seed is -1: give at least 0"),
        ("--seed 4294967296", "seed is 4294967296: give a number below 2**32"),
        ("--steps many", "invalid literal for int"),
        ("--fq replac", "Expected one of ('none', 'regularize', 'replace', 'blend')"),
        ("--resolution 24", "resolution is 24 but BigGAN is laid out for 16, 32, 64, 128, 256"),
        ("--num-classes 7", "digits has 10 classes but the model 7: pass --num-classes 10"),
        ("--batch-size 2000", "a batch of 2000 pictures (--batch-size 2000 x 1 processes) is larger than"),
        ("--features incepton", "unknown feature extractor 'incepton'"),
        ("--data nowhere", "there is no 'nowhere'"),
        (
            "--fq replace --layers blocks.9.0",
            "no module matches 'blocks.9.0': nearest names are 'blocks.3.0', 'blocks.2.0', 'blocks.1.0'",
        ),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(options, message, tmp_path, capsys):
    said = refused(capsys, *SMALL, *options.split(), "--out", tmp_path / "run")
    assert message in said
    assert "tyro" not in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_unknown_preset_lists_the_presets(capsys):
    said = refused(capsys, "smok")
    assert "smok" in said and all(name in said for name in PRESETS)
    assert "digits" in refused(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config needs a run folder or a config.json after it"),
        (["--config="], "--config needs a run folder or a config.json after it"),
        (["--config", "nowhere"], "no configuration at nowhere"),
    ],
)
def test_config_without_a_configuration(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_configuration_of_another_version_is_refused(tmp_path, capsys):
    run_here(tmp_path / "run", "--steps", 1)
    stored = load_config(tmp_path / "run")
    stored["optim"]["momentum"] = stored["optim"].pop("beta1")
    (tmp_path / "old.json").write_text(json.dumps(stored))
    said = refused(capsys, "--config", tmp_path / "old.json")
    assert "BigGANOptim has unknown keys ['momentum'] and lacks ['beta1']" in said


def test_a_folder_with_another_configuration_is_left_as_it_was(tmp_path, capsys):
    run_here(tmp_path / "run", "--steps", 2, "--fq", "replace")
    before = contents(tmp_path / "run")
    said = refused(capsys, *SMALL, "--steps", 4, "--fq", "regularize", "--out", tmp_path / "run")
    assert (
        "holds a run with another configuration (quantizer.fq: stored 'replace', given 'regularize')" in said
    )
    assert contents(tmp_path / "run") == before


FOLDERS = {
    "empty": ({}, "holds no images (found 1 x .txt)"),
    "flat": ({"a.png": 16, "b.png": 16}, "has no labels, which a class-conditional model needs"),
    "mixed": ({"x/a.png": 16, "y/b.png": 20}, "have other sizes than 16x16"),
    "small": ({"x/a.png": 16, "y/b.png": 16}, "is larger than small with 2"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_unusable_folders_are_refused_before_anything_is_written(kind, tmp_path, capsys):
    pictures, message = FOLDERS[kind]
    folder = picture_folder(tmp_path / kind, pictures)
    folder.mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("no picture")
    options = ["--data", folder, "--num-classes", 2, "--out", tmp_path / "run"]
    assert message in refused(capsys, *SMALL, *options)
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_is_refused_or_skipped(tmp_path, capsys):
    names = [f"{kind}/{i}.png" for kind in "xy" for i in range(5)]
    folder = picture_folder(tmp_path / "pictures", dict.fromkeys(names, 16))
    (folder / "y/3.png").write_bytes((folder / "y/3.png").read_bytes()[:100])
    options = ["--data", folder, "--num-classes", "2", "--steps", 1]
    said = refused(capsys, *SMALL, *options, "--out", tmp_path / "run")
    assert "1 of 10 images" in said and "y/3.png" in said and "--skip-corrupt" in said
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"skipped 1 of 10 images .*y/3\.png"):
        run_here(tmp_path / "run", *options, "--skip-corrupt")
    assert "9 pictures of pictures" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_an_error_not_a_traceback(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "error: " in refused(capsys, *SMALL, "--steps", 1, "--out", tmp_path / "file" / "run")


# The command


@pytest.mark.parametrize("arguments", [["--help"], ["smoke", "--help"]])
def test_help_as_a_command(arguments):
    started = time.monotonic()
    command = [sys.executable, "-m", "backbones.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("usage: python -m backbones.train")
    assert done.stderr == ""
    assert time.monotonic() - started < 30
    if arguments == ["--help"]:
        assert all(name in done.stdout for name in (*PRESETS, "--config RUN"))
    else:
        groups = ("data options", "model options", "quantizer options", "optim options", "run options")
        assert all(group in done.stdout for group in groups)
        assert all(f"--{name}" in done.stdout for name in ("fq", "out", "steps", "trackers", "mirror"))


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "backbones.train", *SMALL, *EVERY_STEP, "--steps", "4000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while steps_logged(tmp_path / "run") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: the same command goes on from the newest checkpoint" in said
    assert "Traceback" not in said


def test_config_dataclasses_refuse_what_the_command_refuses():
    with pytest.raises(ValueError, match="codebook_size is 0: give at least 1"):
        QuantizerConfig(codebook_size=0)
    with pytest.raises(ValueError, match="ema_decay is 1"):
        BigGANOptim(ema_decay=1)
    with pytest.raises(ValueError, match="keep_checkpoints is 0"):
        RunConfig(keep_checkpoints=0)


def test_quantiser_options_without_fq_are_noted(capsys):
    train.parse(["smoke", "--commitment-weight", "5"])
    assert "commitment_weight change nothing" in capsys.readouterr().err
    train.parse(["smoke", "--commitment-weight", "5", "--fq", "replace"])
    train.parse(["smoke"])
    assert "change nothing" not in capsys.readouterr().err
