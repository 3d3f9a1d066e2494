import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fq import run as run_module
from fq.provenance import _git_state, provenance
from fq.run import (
    RunFolder,
    Steps,
    checkpoint_tensors,
    load_config,
    newest_checkpoint,
    read_metrics,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"steps": 40, "model": {"width": 8, "betas": (0.0, 0.999)}, "run": {"trackers": []}}

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Training:
    """A model, its optimiser and a step counter, prepared and trained on noise."""

    def __init__(self, path: Path, config: dict[str, Any] = CONFIG, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.net, self.optimizer = self.accelerator.prepare(net, torch.optim.Adam(net.parameters(), lr=0.01))
        self.steps = self.accelerator.prepare_model(Steps(), evaluation_mode=True)
        self.run = RunFolder.open(path, config, self.accelerator, seed=3, **options)

    def train(self, count: int = 1, *, save: bool = False, keep: int = 3) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.net(torch.randn(6, 4)).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.steps.advance()
            self.run.log(int(self.steps), {"loss": loss.item()})
            if save:
                self.run.save(int(self.steps), keep=keep)

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "adam": self.optimizer.state_dict(), "step": int(self.steps)}


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def clone(state: Any) -> Any:
    return pickle.loads(pickle.dumps(state))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(item.relative_to(folder)): item.read_bytes() if item.is_file() else None
        for item in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def rewrite_manifest(checkpoint: Path) -> None:
    """What somebody who plants a file would do."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").unlink()
    run_module._write_manifest(checkpoint, manifest["step"], manifest["world_size"])


# Saving and resuming


def test_resume_restores_everything_and_repeats_the_same_losses(tmp_path):
    first = Training(tmp_path / "run")
    first.train(3, save=True)
    first.train(2)
    expected, losses = clone(first.state()), first.run.metrics()

    second = Training(tmp_path / "run")
    assert second.run.resume() == 3
    assert int(second.steps) == 3
    assert second.run.metrics() == losses[:3]
    second.train(2)
    assert_same(second.state(), expected)
    assert second.run.metrics() == losses


def test_a_run_without_checkpoints_starts_over(tmp_path):
    first = Training(tmp_path / "run")
    first.train(2)
    assert first.run.resume() is None
    assert first.run.metrics() == []


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model_1.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"],
)
def test_truncated_newest_checkpoint_is_reported_and_the_previous_used(tmp_path, name):
    first = Training(tmp_path / "run")
    first.train(2, save=True)
    expected = torch.load(tmp_path / "run/checkpoints/step_00000001/optimizer.bin")
    truncate(tmp_path / "run/checkpoints/step_00000002" / name)

    second = Training(tmp_path / "run")
    with pytest.warns(
        UserWarning, match=rf"step_00000002 is damaged \(.*{name}.*\): using an earlier"
    ) as record:
        assert second.run.resume() == 1
    assert len(record) == 1 and "\n" not in str(record[0].message)
    assert_same(second.optimizer.state_dict(), expected)
    assert names(second.run.checkpoints) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("change", ["flip", "remove", "add", "rename"])
def test_changed_checkpoints_are_damaged(tmp_path, change):
    first = Training(tmp_path / "run")
    first.train(2, save=True)
    newest = first.run.checkpoints / "step_00000002"
    weights = newest / "model.safetensors"
    if change == "flip":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    elif change == "remove":
        weights.unlink()
    elif change == "add":
        (newest / "custom_checkpoint_0.pkl").write_bytes(b"")
    else:
        newest.rename(newest.with_name("step_00000005"))
    with pytest.warns(UserWarning, match="is damaged"):
        assert first.run.resume() == 1


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    first = Training(tmp_path / "run")
    first.train(2, save=True)
    for folder in first.run.checkpoints.iterdir():
        truncate(folder / "optimizer.bin")
    (first.run.checkpoints / ".step_00000003.partial").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"no usable checkpoint: .*step_00000002 .*step_00000001 "):
        first.run.resume()
    assert contents(tmp_path) == before


def test_leftovers_of_interrupted_writes_are_removed(tmp_path):
    first = Training(tmp_path / "run")
    first.train(1, save=True)
    leftover = first.run.checkpoints / ".step_00000002.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (first.run.path / ".metrics.jsonl.17.partial").write_bytes(b"half")
    assert first.run.resume() == 1
    assert names(first.run.checkpoints) == ["step_00000001"]
    assert names(first.run.path) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "provenance.json",
        "samples",
    ]


def test_kill_inside_a_write_leaves_the_previous_checkpoint_usable(tmp_path):
    script = (
        "import sys, time, torch\nsys.path[:0] = [sys.argv[2], sys.argv[2] + '/tests']\n"
        "from pathlib import Path\nfrom test_fq_run import Training\n"
        "training = Training(Path(sys.argv[1]))\ntraining.train(1, save=True)\n"
        "torch.save = lambda *a, **k: time.sleep(60)\n"
        "training.train(1, save=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run"), str(ROOT)])
    partial = tmp_path / "run/checkpoints/.step_00000002.partial/model_1.safetensors"
    deadline = time.monotonic() + 40
    while not partial.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert partial.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()

    second = Training(tmp_path / "run")
    assert second.run.resume() == 1
    assert names(second.run.checkpoints) == ["step_00000001"]
    assert [line["step"] for line in second.run.metrics()] == [1]


def test_saving_a_step_again_replaces_it(tmp_path):
    training = Training(tmp_path / "run")
    training.run.save(1)
    with torch.no_grad():
        training.net[0].bias.fill_(7.0)
    training.run.save(1)
    assert names(training.run.checkpoints) == ["step_00000001"]
    again = Training(tmp_path / "run")
    assert again.run.resume() == 1
    assert again.net[0].bias.tolist() == [7.0] * 8


def test_kill_while_a_step_is_replaced_keeps_the_old_one(tmp_path, monkeypatch):
    training = Training(tmp_path / "run")
    training.run.save(1)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        training.run.save(1)
    monkeypatch.undo()
    assert training.run.resume() == 1
    assert names(training.run.checkpoints) == ["step_00000001"]


def test_pruning_keeps_the_newest(tmp_path):
    training = Training(tmp_path / "run")
    training.train(4, save=True, keep=2)
    assert names(training.run.checkpoints) == ["step_00000003", "step_00000004"]
    training.train(1, save=True, keep=1)
    assert names(training.run.checkpoints) == ["step_00000005"]


def test_pruning_waits_for_the_rename(tmp_path, monkeypatch):
    training = Training(tmp_path / "run")
    training.run.save(1)

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="no space left"):
        training.run.save(2, keep=1)
    monkeypatch.undo()
    assert training.run.resume() == 1


def test_pruning_never_deletes_the_checkpoint_just_written(tmp_path):
    training = Training(tmp_path / "run")
    for step in (10, 20):
        training.run.save(step)
    truncate(training.run.checkpoints / "step_00000020/optimizer.bin")
    training.run.save(15, keep=1)
    assert names(training.run.checkpoints) == ["step_00000015", "step_00000020"]


def test_a_failed_write_is_an_os_error_and_keeps_the_others(tmp_path, monkeypatch):
    training = Training(tmp_path / "run")
    training.run.save(1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*step_00000002.*disk full"):
        training.run.save(2, keep=1)
    monkeypatch.undo()
    assert training.run.resume() == 1


@pytest.mark.parametrize(("step", "keep"), [(-1, 3), (1, 0)])
def test_save_refuses_impossible_numbers(tmp_path, step, keep):
    with pytest.raises(ValueError, match=f"step={step}, keep={keep}: expected"):
        Training(tmp_path / "run").run.save(step, keep=keep)


# What must not be loaded


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"]
)
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_planted_pickle_is_refused_and_not_executed(tmp_path, name, writer):
    training = Training(tmp_path / "run")
    training.train(1, save=True)
    checkpoint = training.run.checkpoints / "step_00000001"
    if name == "pytorch_model.bin":  # what accelerate falls back to
        (checkpoint / "model.safetensors").unlink()
    payload = Payload(f"touch {tmp_path / 'executed'}")
    if writer == "torch":
        torch.save(payload, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(payload))
    rewrite_manifest(checkpoint)
    with pytest.raises(ValueError, match=rf"{name} does not hold plain tensors .* was not loaded"):
        training.run.resume()
    assert not (tmp_path / "executed").exists()


def test_objects_registered_for_checkpointing_are_refused(tmp_path):
    training = Training(tmp_path / "run")
    training.accelerator.register_for_checkpointing(torch.optim.SGD(training.net.parameters()))
    with pytest.raises(
        ValueError, match="SGD registered by register_for_checkpointing, which reloads full pickles"
    ):
        training.run.save(1)
    with pytest.raises(ValueError, match="registered by register_for_checkpointing"):
        training.run.resume()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Training(tmp_path / "run").run.save(1)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(nn.Linear(4, 9))
    run = RunFolder.open(tmp_path / "run", CONFIG, accelerator, seed=3)
    with pytest.raises(ValueError, match="step_00000001 does not fit what was prepared"):
        run.resume()


def test_checkpoint_tensors_reads_one_module(tmp_path):
    training = Training(tmp_path / "run")
    training.train(2, save=True)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.name == "step_00000002"
    assert_same(checkpoint_tensors(checkpoint), dict(training.net.state_dict()))
    assert checkpoint_tensors(checkpoint, "model_1.safetensors")["step"].item() == 2
    with pytest.raises(ValueError, match=r"no tensors 'ema', expected one of .*model_1.safetensors"):
        checkpoint_tensors(checkpoint, "ema")
    with pytest.raises(ValueError, match=r"no tensors 'optimizer.bin'"):
        checkpoint_tensors(checkpoint, "optimizer.bin")
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Payload("true")))
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint_tensors(checkpoint)
    rewrite_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"model.safetensors does not hold plain tensors"):
        checkpoint_tensors(checkpoint)


# The folder and its configuration


def test_new_folder_has_everything(tmp_path):
    run = Training(tmp_path / "a/run").run
    assert names(run.path) == ["checkpoints", "config.json", "provenance.json", "samples"]
    assert (run.samples, run.checkpoints) == (run.path / "samples", run.path / "checkpoints")
    assert load_config(run.path) == load_config(run.path / "config.json") == json.loads(json.dumps(CONFIG))


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({**CONFIG, "steps": 80}, "steps: stored 40, given 80"),
        ({**CONFIG, "steps": True}, "steps: stored 40, given True"),
        (CONFIG | {"model": {"width": 9, "betas": [0, 0.999]}}, r"model.width: stored 8, given 9\)"),
        (CONFIG | {"extra": 1}, r"extra: stored '\(absent\)', given 1"),
        ({"steps": 40, "model": CONFIG["model"]}, r"run.trackers: stored \[\], given '\(absent\)'"),
    ],
)
def test_another_configuration_is_refused_and_the_folder_untouched(tmp_path, config, difference):
    Training(tmp_path / "run").train(1, save=True)
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path / 'run'} .*{difference}.*use another --out, or the stored"
    ):
        Training(tmp_path / "run", config, may_change=["step", "model.widt"])
    assert contents(tmp_path) == before


def test_permitted_changes_are_recorded(tmp_path):
    Training(tmp_path / "run")
    changed = CONFIG | {"steps": 80, "run": {"trackers": ["wandb"]}}
    run = Training(tmp_path / "run", changed, may_change=("steps", "run")).run
    assert load_config(run.path)["steps"] == 80
    first, second = json.loads((run.path / "provenance.json").read_text())
    assert "changed" not in first
    assert second["changed"] == {
        "steps": {"from": 40, "to": 80},
        "run.trackers": {"from": [], "to": ["wandb"]},
    }


def test_other_folders_are_refused_and_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"has no config.json but other things \(notes.txt\): use another --out"
    ):
        Training(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        Training(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_creation_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    write = run_module.write_atomically

    def killed(path: Path, data: bytes | str) -> None:
        if path.name == "config.json":
            raise OSError("stopped here")
        write(path, data)

    monkeypatch.setattr(run_module, "write_atomically", killed)
    with pytest.raises(OSError, match="stopped here"):
        Training(tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="no configuration at"):
        load_config(tmp_path / "run")
    run = Training(tmp_path / "run").run
    assert len(json.loads((run.path / "provenance.json").read_text())) == 1


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be stored as JSON: .*is a set, expected numbers"):
        Training(tmp_path / "run", {"sites": {1}})
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        Training(tmp_path / "run", {"decay": float("nan")})
    assert not (tmp_path / "run").exists()
    assert load_config(Training(tmp_path / "run", {"data": Path("a/b")}).run.path) == {"data": "a/b"}


def test_automatic_checkpoint_naming_is_refused(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.project_configuration.automatic_checkpoint_naming = True
    with pytest.raises(ValueError, match="automatic_checkpoint_naming=True, expected False"):
        RunFolder.open(tmp_path / "run", CONFIG, accelerator, seed=0)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a JSON list")])
def test_unreadable_configurations_are_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'} {message}"):
        load_config(tmp_path)


def test_provenance_says_what_ran(tmp_path):
    run = Training(tmp_path / "run").run
    (record,) = json.loads((run.path / "provenance.json").read_text())
    assert record["seed"] == 3 and record["world_size"] == 1 and record["device"] == "cpu"
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"python", "torch", "accelerate", "numpy", "fq-gan"}
    assert record["started"].endswith("+00:00")
    program, *arguments = sys.orig_argv  # not sys.argv, which hides `-m`
    assert record["command"] == shlex.join([Path(program).name, *arguments])


def test_provenance_without_git_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert (provenance(0)["commit"], provenance(0)["dirty"]) == ("unknown", "unknown")


def test_commit_and_dirty_flag_come_from_the_repository_that_tracks_the_file(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "run.py"
    file.write_text("1")
    git("init")
    assert _git_state(file) == ("unknown", "unknown")
    git("add", "run.py")
    git("commit", "-m", "one")
    (tmp_path / "untracked").write_text("")
    assert _git_state(file) == (git("rev-parse", "HEAD"), False)
    file.write_text("2")
    assert _git_state(file) == (git("rev-parse", "HEAD"), True)


# Metrics and files


def test_metrics_are_one_valid_json_object_a_line(tmp_path):
    run = Training(tmp_path / "run").run
    assert run.metrics() == []
    run.log(1, {"loss": torch.tensor(0.5), "images": 64}, prefix="train")
    run.log(2, {"loss": float("nan"), "bound": float("-inf")})
    assert (run.path / "metrics.jsonl").read_text() == (
        '{"step": 1, "train/loss": 0.5, "train/images": 64}\n{"step": 2, "loss": null, "bound": null}\n'
    )
    assert read_metrics(run.path / "metrics.jsonl") == run.metrics()
    assert run.metrics()[1] == {"step": 2, "loss": None, "bound": None}


@pytest.mark.parametrize("value", ["0.5", None, True, torch.zeros(2)])
def test_only_numbers_are_logged(tmp_path, value):
    run = Training(tmp_path / "run").run
    with pytest.raises(TypeError, match=r"metric 'loss' is .*expected a number"):
        run.log(1, {"loss": value})
    with pytest.raises(ValueError, match="is called 'step'"):
        run.log(1, {"step": 2})
    assert run.metrics() == []


def test_resume_drops_later_and_half_written_metrics(tmp_path):
    training = Training(tmp_path / "run")
    training.train(2, save=True)
    training.train(2)
    file = training.run.path / "metrics.jsonl"
    kept = file.read_bytes().splitlines(keepends=True)[:2]
    with file.open("ab") as stream:
        stream.write(b'{"step": 2, "lo')
    assert len(training.run.metrics()) == 4
    assert training.run.resume() == 2
    assert file.read_bytes() == b"".join(kept)


def test_unreadable_metrics_name_the_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected an object with a step"):
        read_metrics(file)
    with pytest.raises(FileNotFoundError, match="no metrics at"):
        read_metrics(tmp_path)


def test_a_failed_atomic_write_keeps_the_old_content(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", b"old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "a", "new")
    assert contents(tmp_path) == {"a": b"old"}


def test_missing_accelerate_says_what_to_install():
    script = "import sys; sys.modules['accelerate'] = None\nimport fq.run"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: fq.run needs accelerate and safetensors: pip install 'fq-gan[train]'" in done.stderr


# Two processes

WORKER = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
import gc, json, random, warnings
from pathlib import Path
import numpy as np, torch
from accelerate import Accelerator
from torch import nn
from fq.run import RunFolder, Steps

path, config = Path(sys.argv[1]), {"steps": 4}
accelerator = Accelerator()
rank = accelerator.process_index
report = {"world_size": accelerator.num_processes}

def prepare():
    accelerator.free_memory()
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    net, optimizer = accelerator.prepare(net, torch.optim.Adam(net.parameters()))
    return net, optimizer, accelerator.prepare_model(Steps(), evaluation_mode=True)

def train():
    loss = net(torch.randn(3, 4)).square().mean()
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    steps.advance()
    run.log(int(steps), {"loss": loss.item()})

def failure(act):
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = act()
        return [result, len(caught)]
    except ValueError as error:
        return str(error)

net, optimizer, steps = prepare()
torch.manual_seed(10 + rank)
run = RunFolder.open(path, config, accelerator, seed=0)
train(); run.save(1); train(); train()
report["expected"] = [net.module.weight.tolist(), torch.rand(1).item()]

net, optimizer, steps = prepare()
run = RunFolder.open(path, config, accelerator, seed=0)
report["resumed"] = run.resume()
report["kept"] = len(run.metrics())
accelerator.wait_for_everyone()
train(); train()
report["repeated"] = [net.module.weight.tolist(), torch.rand(1).item()]
report["mismatch"] = failure(lambda: RunFolder.open(path, {"steps": 4 + rank}, accelerator, seed=0) and None)
report["both_mismatch"] = failure(lambda: RunFolder.open(path, {"steps": 5}, accelerator, seed=0) and None)

run.save(3)
accelerator.wait_for_everyone()
if rank == 0:
    (run.checkpoints / "step_00000003/random_states_1.pkl").write_bytes(b"x")
accelerator.wait_for_everyone()
report["damaged"] = failure(run.resume)
if rank == 0:
    import fq.run
    folder = run.checkpoints / "step_00000003"
    (folder / "manifest.json").unlink()
    fq.run._write_manifest(folder, 3, 2)
accelerator.wait_for_everyone()
report["one_rank"] = failure(run.resume)
(path.parent / f"report_{rank}.json").write_text(json.dumps(report))
accelerator.wait_for_everyone()
# Gloo's threads end with the last object that holds the group; one that outlives Python's own end aborts.
del net, optimizer, steps, run
accelerator.free_memory()
accelerator.end_training()
gc.collect()
"""


def test_two_processes_save_resume_and_refuse_together(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", str(tmp_path / "worker.py"), str(tmp_path / "run"), str(ROOT)],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"report_{rank}.json").read_text()) for rank in (0, 1)]
    for rank, report in enumerate(reports):
        assert report["world_size"] == 2
        assert (report["resumed"], report["kept"]) == (1, 1)
        assert report["repeated"] == report["expected"]
        assert "steps: stored 4, given 5" in report["both_mismatch"]
        assert report["mismatch"] == [None, 0]  # the main process decides for both
        assert report["damaged"] == [1, 1 - rank]  # it also warns alone
        assert "random_states_1.pkl does not hold plain tensors" in report["one_rank"]
    assert reports[0]["repeated"][0] == reports[1]["repeated"][0]
    assert reports[0]["repeated"][1] != reports[1]["repeated"][1]

    record = json.loads((tmp_path / "run/provenance.json").read_text())
    assert [start["world_size"] for start in record] == [2, 2, 2]
    run = RunFolder.open(tmp_path / "run", {"steps": 4}, Accelerator(cpu=True), seed=0)
    before = contents(run.checkpoints)
    with pytest.raises(ValueError, match=r"was written by 2 process\(es\), resume with as many, not 1"):
        run.resume()
    assert contents(run.checkpoints) == before
    assert set(checkpoint_tensors(run.checkpoints / "step_00000001")) == {"weight", "bias"}
