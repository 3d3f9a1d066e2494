"""What all training loops promise: exact resume, identical processes, penalties that teach no codes."""

import copy
import json
import math
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
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from backbones import train, train_biggan, train_stylegan2, train_ugatit, translate
from backbones.losses import r1_penalty
from backbones.sample import load_generator
from backbones.sample import main as sample_main
from backbones.stylegan2 import StyleGAN2Config
from fq.run import checkpoint_tensors, newest_checkpoint, read_metrics

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("tac", "stylegan2", "ugatit")
OPTIONS = {
    "tac": "smoke --class-head twin --g-channels 2 --d-channels 2 --batch-size 8",
    "stylegan2": (
        "faces --resolution 16 --channel-base 128 --channel-max 8 --latent-dim 8 --w-dim 8 --mbstd-group 2 "
        "--batch-size 4 --r1-every 2 --r1-gamma 1 --path-weight 2 --path-every 3 --style-mixing 0.5 "
        "--layers b16 --codebook-size 8 --ema-kimg 0.02"
    ),
    "ugatit": (
        "pets --resolution 16 --channels 2 --num-blocks 1 --global-layers 4 --local-layers 3 --batch-size 2 "
        "--layers model.2 model.5 --codebook-sizes 8 4 --schedule-steps 40"
    ),
}
EVERY_STEP = "--features none --sample-every 0 --log-every 1 --checkpoint-every 3 --fq replace".split()
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["backbones.train"])


@pytest.fixture(scope="module", autouse=True)
def one_thread_a_process(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ACCELERATE_USE_CPU", "1")
        yield


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Faces to be, and a folder of two domains."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    np.savez(folder / "faces.npz", images=draw.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8))
    for name in ("trainA", "trainB", "testA", "testB"):
        (folder / "pair" / name).mkdir(parents=True)
        for number in range(8):
            pixels = draw.integers(0, 128, (20, 20, 3), dtype=np.uint8) + (128 if name.endswith("B") else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "pair" / name / f"{number}.png")
    return folder


@pytest.fixture
def command(data):
    """The options of a small run of a model."""

    def build(model: str, *more: Any) -> list[str]:
        source = {"tac": [], "stylegan2": ["--data", str(data / "faces.npz")],
                  "ugatit": ["--data", str(data / "pair")]}  # fmt: skip
        return [*OPTIONS[model].split(), *source[model], *EVERY_STEP, *map(str, more)]

    return build


def changed(arguments: list[str], option: str, value: Any) -> list[str]:
    """The same command with another value of an option that it has."""
    place = arguments.index(option)
    return [*arguments[: place + 1], str(value), *arguments[place + 2 :]]


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds_per_step"} for record in records]


def digests(run: Path) -> dict[str, str]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


def steps_logged(run: Path) -> int:
    records = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return int(records[-1]["step"]) if records else 0


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command said when it stopped with an error."""
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code not in (0, None)
    said = capsys.readouterr()
    # tyro draws a box around its messages and breaks lines in it.
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", f"{said.out} {said.err} {stop.value.code}").split())


def start(arguments: list[str]) -> multiprocessing.process.BaseProcess:
    process = FORKS.Process(target=train.main, args=(arguments,))
    process.start()
    return process


@pytest.mark.parametrize("model", MODELS)
def test_a_killed_run_repeats_one_never_killed_to_the_bit(model, command, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    process = start(command(model, "--steps", 14, "--out", whole))
    process.join()
    assert process.exitcode == 0
    for target in (4, 9):
        process, deadline = start(command(model, "--steps", 14, "--out", run)), time.monotonic() + 60
        while steps_logged(run) < target:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None and int(checkpoint.name[5:]) >= target - 3
    process = start(command(model, "--steps", 14, "--out", run))
    process.join()
    assert process.exitcode == 0
    assert without_time(read_metrics(run)) == without_time(read_metrics(whole))
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 15))
    assert digests(run) == digests(whole)
    assert (run / "samples/000014.png").read_bytes() == (whole / "samples/000014.png").read_bytes()
    assert (run / "samples/000000.png").read_bytes() != (whole / "samples/000014.png").read_bytes()


RANKS = """
import sys
import torch
from backbones import train
from fq.run import RunFolder

folder = sys.argv.pop(1)
save = RunFolder.save

def keep(run, step, **options):
    states = [model.state_dict() for model in run._accelerator._models]
    torch.save(states, f"{folder}/step{step}_rank{run._accelerator.process_index}.pt")
    return save(run, step, **options)

RunFolder.save = keep
train.main()
"""


def launch(*arguments: Any) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["stylegan2", "ugatit"])  # BigGAN's loop has a test of its own
def test_two_processes_stay_identical_and_resume_to_the_bit(model, command, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    arguments, whole, run = command(model, "--steps", 8), tmp_path / "whole", tmp_path / "run"
    process = launch(tmp_path / "ranks.py", tmp_path, *arguments, "--out", whole)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    first, second = (torch.load(tmp_path / f"step8_rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("fq.codebook" in name for state in first for name in state)

    process, deadline = launch("-m", "backbones.train", *arguments, "--out", run), time.monotonic() + 90
    while steps_logged(run) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=10)
    process = launch("-m", "backbones.train", *arguments, "--out", run)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert without_time(read_metrics(run)) == without_time(read_metrics(whole))
    assert digests(run) == digests(whole)


# TAC-GAN


def test_twin_classifiers_learn_and_the_generator_pays_their_difference(command, tmp_path):
    train.main(command("tac", "--steps", 30, "--out", tmp_path / "run"))
    records = read_metrics(tmp_path / "run")
    # At first the generator's two classifier losses are alike; classifiers then fall below chance, 2 log 10.
    assert records[-1]["class_loss_d"] < records[0]["class_loss_d"]
    tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "run"), "model_1.safetensors")
    assert {"linear_c.weight", "linear_mi.weight"} <= set(tensors) and "embed.weight" not in tensors


def test_class_losses_follow_tac_gan(monkeypatch):
    config = train.parse(["smoke", "--class-head", "twin", "--class-weight", "3"])
    draw = torch.Generator().manual_seed(0)
    twin, scores = (torch.randn(6, 10, generator=draw) for _ in range(2))
    labels = torch.randint(10, (6,), generator=draw)
    verdict = train_biggan.Verdict(torch.zeros(6, 1), twin, scores)
    entropy = nn.functional.cross_entropy
    of_d = train_biggan._discriminator_class_loss(config, verdict, labels)
    torch.testing.assert_close(of_d, 3 * (entropy(scores[3:], labels[3:]) + entropy(twin[:3], labels[:3])))
    of_g = train_biggan._generator_class_loss(config, verdict, labels)
    torch.testing.assert_close(of_g, 3 * (entropy(scores, labels) - entropy(twin, labels)))
    alone = verdict._replace(twin_scores=None)
    of_d = train_biggan._discriminator_class_loss(config, alone, labels)
    torch.testing.assert_close(of_d, 3 * entropy(scores[3:], labels[3:]))


def test_a_class_loss_without_classifier_is_refused(capsys):
    said = refused(capsys, ["smoke", "--class-loss", "multiclass_hinge"])
    assert "class_loss is multiclass_hinge but the projection head has no classifier" in said


@pytest.mark.parametrize("mode", ["none", "regularize", "replace"])
def test_wasserstein_with_gradient_penalty_stays_finite_with_fq(mode, tmp_path):
    options = (
        "--loss wasserstein --gradient-penalty 10 --no-spectral-norm --g-channels 2 --d-channels 2".split()
    )
    train.main(
        ["smoke", *options, "--steps", "60", "--features", "none", "--sample-every", "0", "--log-every", "1",
         "--fq", mode, "--out", str(tmp_path / "run")]
    )  # fmt: skip
    records = read_metrics(tmp_path / "run")
    assert len(records) == 60
    gap = [record["loss_d_real"] + record["loss_d_fake"] for record in records]
    assert all(map(math.isfinite, gap)) and max(map(abs, gap[10:])) < 100
    if mode != "none":
        assert max(record["commitment_d"] for record in records[10:]) < 10


# StyleGAN2


def test_penalty_phases_teach_no_codes_and_come_when_due(command, tmp_path):
    train.main(command("stylegan2", "--steps", 7, "--out", tmp_path / "run"))
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "r1" in record] == [1, 3, 5, 7]
    assert [record["step"] for record in records if "path" in record] == [1, 4, 7]
    tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "run"), "model_1.safetensors")
    assert int(tensors["b16.fq.num_updates"]) == 2 * 7  # fake and real, in each step; none for R1


def test_200_steps_with_lazy_r1_leave_finite_weights(command, tmp_path):
    train.main(command("stylegan2", "--steps", 200, "--checkpoint-every", 0, "--out", tmp_path / "run"))
    for file in ("model.safetensors", "model_1.safetensors"):
        tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "run"), file)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_r1_under_replaced_features_equals_finite_differences():
    """With the codes held fixed, replacing adds a constant to the features; weights below and above it."""
    from backbones.stylegan2 import Discriminator
    from fq import attach

    torch.manual_seed(0)
    config = StyleGAN2Config(resolution=8, channel_base=64, channel_max=4, mbstd_group=2)
    plain = Discriminator(config).double().eval()
    images, labels = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    replacing = copy.deepcopy(plain).train()
    attach(replacing, "b8", codebook_size=4, mode="replace")
    replacing(images, labels)  # the codebook begins
    replacing.eval()

    def penalty(discriminator: nn.Module) -> Tensor:
        leaf = images.clone().requires_grad_()
        return r1_penalty(discriminator(leaf, labels), leaf).mean()

    with torch.no_grad():  # from the features to their codes, once and for all
        step_to_codes = replacing.b8(None, images)[0] - plain.b8(None, images)[0]
    assert step_to_codes.abs().max() > 0.1
    plain.b8.register_forward_hook(lambda module, inputs, output: (output[0] + step_to_codes, output[1]))
    torch.testing.assert_close(penalty(plain), penalty(replacing))
    for name in ("b8.conv0.weight", "b8.skip.weight", "b4.conv.weight"):
        (gradient,) = torch.autograd.grad(penalty(replacing), replacing.get_parameter(name))
        weight, step = plain.get_parameter(name), 1e-6
        for place in ((0, 0, 0, 0), (3, 1, 0, 0), (1, 2, -1, -1)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[place] += sign * step
                values.append(penalty(plain).item())
                with torch.no_grad():
                    weight[place] -= sign * step
            numeric = (values[0] - values[1]) / (2 * step)
            assert gradient[place].item() == pytest.approx(numeric, rel=1e-6, abs=1e-8), (name, place)


class Adaptive(nn.Module):
    """Flips pictures with a probability that rises while the discriminator is sure of real ones."""

    probability: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("probability", torch.tensor(0.5))
        self.calls = 0

    def forward(self, images: Tensor, draw: torch.Generator) -> Tensor:
        self.calls += 1
        flips = torch.rand(len(images), 1, 1, 1, generator=draw) < self.probability
        return torch.where(flips, images.flip(-1), images)

    def observe(self, real_logits: Tensor) -> None:
        self.probability += 0.01 * real_logits.sign().mean()


def test_an_adaptive_augmentation_is_used_saved_and_resumed(command, tmp_path):
    def run(name: str, steps: int) -> tuple[list[dict[str, Any]], Tensor, int]:
        AcceleratorState._reset_state(reset_partial_state=True)
        augment = Adaptive()
        config = train.parse(command("stylegan2", "--steps", steps, "--out", tmp_path / name))
        train_stylegan2.train(config, augment=augment)
        return without_time(read_metrics(tmp_path / name)), augment.probability, augment.calls

    whole, probability, calls = run("whole", 6)
    assert calls == 6 * 3 + 3 and probability != 0.5  # one fake for G, a fake and a real for D, R1 at 0, 2, 4
    run("parts", 3)
    parts, again, _ = run("parts", 6)
    assert parts == whole and torch.equal(again, probability)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(command("stylegan2", "--steps", 6, "--out", tmp_path / "plain"))
    assert without_time(read_metrics(tmp_path / "plain"))[-1] != whole[-1]


def test_sampling_truncates_and_interpolates_a_stylegan2_run(command, tmp_path):
    train.main(command("stylegan2", "--steps", 3, "--out", tmp_path / "run"))
    _, config = load_generator(tmp_path / "run")
    assert isinstance(config, StyleGAN2Config) and config.resolution == 16
    for name, options in (("all", ()), ("mean", ("--truncation", "0")), ("way", ("--interpolate",))):
        sample_main([str(tmp_path / "run"), "--num", "6", "--out", str(tmp_path / f"{name}.png"), *options])
    shown = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("all", "mean", "way")}
    tile = shown["mean"].shape[1] // 6
    first, second = (shown["mean"][4:40, column * tile + 4 : column * tile + 36] for column in (0, 1))
    assert np.array_equal(first, second) and not np.array_equal(shown["all"], shown["way"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resolution 24", "resolution is 24 but must be a power of two"),
        (
            "--batch-size 5 --mbstd-group 2",
            "batch_size is 5 but the discriminator compares pictures in groups of 2",
        ),
        (
            "--batch-size 1 --mbstd-group 1",
            "batch_size is 1 but the path length phase divides it by path_shrink",
        ),
        ("--style-mixing 2", "style_mixing is 2.0: give a share from 0 to 1"),
        ("--codebook-sizes 8 8", "codebook_sizes names 2 sizes for 1 layers"),
        ("--codebook-sizes 0", "codebook_sizes holds 0: a codebook has at least 1 code"),
    ],
)
def test_impossible_stylegan2_settings_are_refused_before_work_starts(
    options, message, command, tmp_path, capsys
):
    said = refused(capsys, [*command("stylegan2", "--out", tmp_path / "run"), *options.split()])
    assert message in said and not (tmp_path / "run").exists()


# U-GAT-IT


def test_the_rate_stays_then_falls_to_zero_and_rho_stays_in_range(command, tmp_path, monkeypatch):
    rates: list[float] = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step",
        lambda self, *rest, **more: (rates.append(self.param_groups[0]["lr"]), step(self, *rest, **more))[1],
    )  # fmt: skip
    train.main(
        command("ugatit", "--steps", 8, "--schedule-steps", 8, "--lr", "0.1", "--out", tmp_path / "run")
    )
    expected = [0.1 * min(1, 2 * (1 - done / 8)) for done in range(8) for _ in range(2)]
    assert rates == pytest.approx(expected)
    tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "run"), "model.safetensors")
    mixtures = [tensor for name, tensor in tensors.items() if name.endswith("rho")]
    assert len(mixtures) == 4 and all(0 <= rho.min() and rho.max() <= 1 for rho in mixtures)
    assert any((rho == 0).any() for rho in mixtures)  # at this rate some were clipped


def test_steps_beyond_the_schedule_are_refused(command, capsys):
    said = refused(capsys, command("ugatit", "--steps", 50))
    assert "steps is 50 but the learning rate reaches 0 at schedule_steps, which is 40" in said


def test_generator_losses_are_the_papers(monkeypatch):
    """Against a discriminator that says 3 for all, and generators that return known pictures."""
    from backbones.ugatit import Networks, Translation, Verdict

    class Constant(nn.Module):
        def __init__(self, value: float, cam: float) -> None:
            super().__init__()
            self.value, self.cam = value, cam

        def forward(self, x: Tensor) -> Translation:
            return Translation(torch.full_like(x, self.value), torch.full((len(x), 2), self.cam), x[:, :1])

    class Judge(nn.Module):
        def forward(self, x: Tensor) -> Verdict:
            return Verdict(torch.full((len(x), 1, 2, 2), 3.0), torch.full((len(x), 2), 2.0), x[:, :1])

    networks = Networks(Constant(0.5, 0.0), Constant(-0.25, 0.0), Judge(), Judge(), Judge(), Judge())
    a, b = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    found = train_ugatit._generator_losses(networks, {"A": None, "B": None}, a, b)
    # Two directions, global and local judges: (3 - 1)^2 + (2 - 1)^2 each.
    assert float(found.adversarial) == pytest.approx(2 * 2 * (4 + 1))
    # b -> a -> b ends at 0.5 against 1, a -> b -> a at -0.25 against 0.
    assert float(found.cycle) == pytest.approx(0.5 + 0.25)
    # Each generator's picture of its own target: -0.25 against 0, 0.5 against 1.
    assert float(found.identity) == pytest.approx(0.25 + 0.5)
    assert float(found.cam) == pytest.approx(4 * math.log(2))


def test_pictures_are_translated_by_command_with_heat_maps(command, data, tmp_path, capsys):
    train.main(command("ugatit", "--steps", 3, "--out", tmp_path / "run"))
    picture = data / "pair" / "testA" / "0.png"
    translate.main(
        [str(tmp_path / "run"), str(picture), "--direction", "A2B", "--out", str(tmp_path / "plain")]
    )
    translate.main(
        [
            str(tmp_path / "run"),
            str(picture),
            "--direction",
            "B2A",
            "--heatmap",
            "--out",
            str(tmp_path / "heat"),
        ]
    )
    plain, heat = (np.asarray(Image.open(tmp_path / name / "0.png")) for name in ("plain", "heat"))
    # The picture, where the generator looks, the translation.
    assert heat.shape[1] > 2.8 * plain.shape[1]
    with pytest.raises(SystemExit, match=r"there is no picture .*absent\.png"):
        translate.main([str(tmp_path / "run"), str(tmp_path / "absent.png")])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SystemExit, match=r"text\.png cannot be read as a picture"):
        translate.main([str(tmp_path / "run"), str(tmp_path / "text.png")])
    with pytest.raises(SystemExit, match="is a run of U-GAT-IT, which translates pictures"):
        sample_main([str(tmp_path / "run")])


def test_translations_are_scored_both_ways(command, tmp_path):
    arguments = command("ugatit", "--steps", 2, "--num-eval", 8, "--out", tmp_path / "run")
    train.main(changed(arguments, "--features", "random"))
    scores = [key for key in read_metrics(tmp_path / "run")[-1] if key.startswith("score/")]
    for direction in ("A2B", "B2A"):
        assert any(key.startswith(f"score/{direction}/kid[") and "n=8,reals=8" in key for key in scores)


def test_an_empty_domain_is_named(data, command, tmp_path):
    (tmp_path / "pair" / "trainA").mkdir(parents=True)
    arguments = changed(
        command("ugatit", "--steps", 2, "--out", tmp_path / "run"), "--data", tmp_path / "pair"
    )
    with pytest.raises(SystemExit, match=r"error: trainA and trainB in .*pair is missing or empty"):
        train.main(arguments)
    assert not (tmp_path / "run").exists()
