import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from backbones import sample, train
from backbones.biggan import BigGANConfig, Generator
from backbones.sample import AVERAGE, class_grid, generate, interpolate, load_generator, save_grid, spread
from fq.run import checkpoint_tensors

ROOT = Path(__file__).resolve().parents[1]
UNSHARED = BigGANConfig(resolution=16, num_classes=5, g_channels=2, d_channels=2, latent_dim=8)
# Four slots at 32 px: of 22 numbers the generator reads 20.
SHARED = BigGANConfig(
    resolution=32, num_classes=4, g_channels=2, d_channels=2, latent_dim=22, shared_dim=6, hierarchical=True
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run whose averaged generator differs from the generator itself, with two checkpoints."""
    folder = tmp_path_factory.mktemp("sample") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        train.main([
            *"smoke --g-channels 2 --d-channels 2 --batch-size 8 --features none --sample-every 0".split(),
            *"--steps 4 --checkpoint-every 2 --ema-start 1 --ema-decay 0.5 --out".split(), str(folder),
        ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def built(config: BigGANConfig) -> Generator:
    """A generator with statistics of its own, so that no layer is at rest."""
    torch.manual_seed(0)
    generator = Generator(config)
    with torch.no_grad():
        for _ in range(20):
            generator(torch.randn(16, generator.latent_dim),
                      generator.shared(torch.randint(config.num_classes, (16,))))  # fmt: skip
    return generator.eval()


def public_file(path: Path, config: BigGANConfig) -> Path:
    torch.save(built(config).state_dict(), path)
    return path


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def draw(out: Path, *arguments: Any) -> np.ndarray:
    sample.main([*map(str, arguments), "--out", str(out)])
    return picture(out)


def tile(grid: np.ndarray, row: int, column: int, resolution: int) -> np.ndarray:
    """One picture of a grid at its own size."""
    factor = max(1, 48 // resolution)
    step = factor * resolution + 2
    cut = grid[row * step + 2 : (row + 1) * step, column * step + 2 : (column + 1) * step]
    assert (cut.reshape(resolution, factor, resolution, factor, 3)[:, :1, :, :1] == cut.reshape(
        resolution, factor, resolution, factor, 3)).all()  # fmt: skip
    return cut[::factor, ::factor]


def levels(images: Tensor) -> np.ndarray:
    return np.asarray(((images + 1) * 127.5).permute(0, 2, 3, 1))


# From the command line


def test_a_run_becomes_a_grid_of_its_averaged_generator(run, tmp_path):
    out = tmp_path / "made" / "grid.png"
    command = [sys.executable, "-m", "backbones.sample", str(run), *"--classes 3 7 --num 4 --out".split()]
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"wrote 8 pictures of classes [3, 7] to {out}\n"
    grid = picture(out)
    assert grid.shape == (2 * 50 + 2, 4 * 50 + 2, 3)

    generator, config = load_generator(run)
    average = checkpoint_tensors(run / "checkpoints/step_00000004", AVERAGE)
    assert all(torch.equal(average[name], tensor) for name, tensor in generator.state_dict().items())
    plain = checkpoint_tensors(run / "checkpoints/step_00000004", "model.safetensors")
    assert not torch.equal(plain["linear.weight"], average["linear.weight"])
    expected = levels(generate(generator, config, torch.tensor([3, 3, 3, 3, 7, 7, 7, 7])))
    for number in range(8):
        shown = tile(grid, number // 4, number % 4, 16)
        np.testing.assert_allclose(shown, expected[number], atol=1)


def test_a_checkpoint_folder_is_taken_instead_of_the_newest(run, tmp_path, monkeypatch):
    newest = draw(tmp_path / "run.png", run)
    assert (newest == draw(tmp_path / "new.png", run / "checkpoints/step_00000004")).all()
    old = draw(tmp_path / "old.png", run / "checkpoints/step_00000002")
    assert (newest != old).any()
    monkeypatch.chdir(run / "checkpoints")
    assert (draw(tmp_path / "here.png", "step_00000002") == old).all()


@pytest.mark.parametrize("config", [UNSHARED, SHARED])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_public_checkpoint_becomes_pictures(config, as_folder, tmp_path, capsys):
    file = public_file(tmp_path / "G_ema.pth", config)
    grid = draw(tmp_path / "grid.png", tmp_path if as_folder else file, "--num", 3)
    assert f"wrote {3 * config.num_classes} pictures" in capsys.readouterr().out
    expected = levels(generate(built(config), config, torch.arange(config.num_classes).repeat_interleave(3)))
    shown = tile(grid, config.num_classes - 1, 2, config.resolution)
    np.testing.assert_allclose(shown, expected[-1], atol=1)


def test_seed_chooses_the_latents(run, tmp_path):
    first, again = (draw(tmp_path / name, run, "--seed", 1) for name in ("a.png", "b.png"))
    assert (first == again).all()
    assert (first != draw(tmp_path / "c.png", run, "--seed", 2)).any()


def test_interpolation_by_command_starts_and_ends_at_plain_samples(tmp_path):
    file = public_file(tmp_path / "G.pth", UNSHARED)
    plain = draw(tmp_path / "plain.png", file, *"--classes 2 --num 2".split())
    path = draw(tmp_path / "path.png", file, *"--classes 2 --num 5 --interpolate".split())
    for column, end in ((0, 0), (4, 1)):
        np.testing.assert_allclose(
            tile(path, 0, column, 16).astype(int), tile(plain, 0, end, 16).astype(int), atol=1
        )
    assert (tile(path, 0, 2, 16) != tile(path, 0, 0, 16)).any()


def test_truncation_by_command_makes_pictures_alike(tmp_path):
    file = public_file(tmp_path / "G.pth", UNSHARED)
    wide, narrow = (
        draw(tmp_path / "grid.png", file, *"--classes 0 --num 16".split(), *option)
        for option in ((), ("--truncation", 0.05))
    )
    spreads = [np.stack([tile(grid, 0, c, 16) for c in range(16)]).std(0).mean() for grid in (wide, narrow)]
    assert spreads[1] < 0.2 * spreads[0]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m backbones.sample")
    assert all(f"--{name}" in said for name in ("classes", "num", "truncation", "interpolate", "seed", "out"))


# The functions


def test_a_picture_does_not_depend_on_the_batch_it_is_made_in():
    generator, labels = built(UNSHARED), torch.arange(120) % 5
    together = generate(generator, UNSHARED, labels, seed=3)
    for number in (0, 7, 99, 100, 119):
        alone = generate(generator, UNSHARED, labels[number : number + 1], seed=3, first=number)
        torch.testing.assert_close(alone, together[number : number + 1], rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], together[5])  # same class, other latent


def test_generating_changes_neither_state_nor_mode():
    generator = built(SHARED).train()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generate(generator, SHARED, torch.tensor([0, 1]))
    assert generator.training
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


class Echo(torch.nn.Module):
    """Puts out its latent as a picture of one row, and keeps the conditions."""

    latent_dim = 400

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.conditions: list[Tensor] = []

    def shared(self, labels: Tensor) -> Tensor:
        return labels

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.conditions.append(y)
        return z[:, None, None, :]


def test_truncated_latents_lie_within_the_bound_and_keep_their_order():
    echo = Echo()
    free, cut = (
        generate(echo, UNSHARED, torch.zeros(20, dtype=torch.int64), truncation=bound)
        for bound in (None, 0.5)
    )
    assert free.abs().max() > 3
    assert cut.abs().max() <= 0.5
    assert 0.26 < cut.std() < 0.3  # 0.2798 for a normal law cut at 0.5
    assert (free.flatten().argsort() == cut.flatten().argsort()).float().mean() > 0.99


def test_interpolation_of_unshared_classes_moves_the_latent_alone():
    echo = Echo()
    images = interpolate(echo, UNSHARED, torch.tensor([1, 3]), columns=3)
    assert [condition.tolist() for condition in echo.conditions] == [[1, 1, 1], [3, 3, 3]]
    for row in range(2):
        ends = generate(echo, UNSHARED, torch.tensor([0, 0]), first=2 * row)
        torch.testing.assert_close(images[3 * row], ends[0])
        torch.testing.assert_close(images[3 * row + 1], (ends[0] + ends[1]) / 2)
        torch.testing.assert_close(images[3 * row + 2], ends[1])


def test_interpolation_of_shared_classes_moves_on_to_the_next_class():
    generator, classes = built(SHARED), torch.tensor([2, 0, 3])
    images = interpolate(generator, SHARED, classes, columns=4, seed=5, truncation=1.0)
    for row in range(3):
        ends = torch.stack([classes[row], classes[(row + 1) % 3]])
        plain = generate(generator, SHARED, ends, seed=5, first=2 * row, truncation=1.0)
        torch.testing.assert_close(images[4 * row], plain[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(images[4 * row + 3], plain[1], rtol=0, atol=1e-5)
        stays = generate(generator, SHARED, ends[:1], seed=5, first=2 * row + 1, truncation=1.0)
        assert not torch.allclose(images[4 * row + 3], stays[0], atol=1e-3)


def test_a_grid_shows_ten_classes_evenly_chosen():
    config = BigGANConfig(resolution=16, num_classes=40, g_channels=2, d_channels=2, latent_dim=8)
    generator = built(config)
    images, rows = class_grid(generator, config, seed=4)
    assert rows == 10 and len(images) == 100
    assert spread(40) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    torch.testing.assert_close(
        images[35:36], generate(generator, config, torch.tensor([12]), seed=4, first=35), rtol=0, atol=1e-5
    )


def test_save_grid_leaves_no_partial_file(tmp_path):
    ramp = torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 64, 64)
    save_grid(ramp, tmp_path / "grid.png", rows=2)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
    grid = picture(tmp_path / "grid.png")
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    shown = [int(tile(grid, row, column, 64)[9, 9, 0]) for row in range(2) for column in range(3)]
    assert shown == [0, 51, 102, 153, 204, 255]


# Bad input


def refused(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        sample.main([*map(str, arguments)])
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--classes 3 10", "error: class 10 does not exist: this generator knows 0 to 9"),
        ("--classes -1", "error: class -1 does not exist"),
        ("--truncation -1", "error: truncation is -1.0: give a bound above 0"),
        ("--truncation nan", "error: truncation is nan: give a bound above 0"),
        ("--interpolate --num 1", "error: --num is 1: an interpolation needs at least 2 pictures a row"),
    ],
)
def test_wrong_options_write_nothing(options, message, run, tmp_path):
    assert message in refused(run, *options.split(), "--out", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num 0", "num is 0: give at least one picture a row"),
        ("--seed -1", "seed is -1: give 0 or more"),
        ("--trunction 1", "--truncation {None}|FLOAT"),
    ],
)
def test_wrong_numbers_and_flags_are_refused(options, message, run, tmp_path, capsys):
    refused(run, *options.split(), "--out", tmp_path / "grid.png")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid.png").exists()


def test_an_empty_run_is_told_to_wait(run, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(run / "config.json", tmp_path / "empty")
    assert "has no complete checkpoint yet" in refused(tmp_path / "empty")


def test_a_source_that_is_not_there(tmp_path):
    assert "does not exist: give a BigGAN .pth file" in refused(tmp_path / "nowhere.pth")


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert "error: " in refused(run, "--num", 1, "--out", tmp_path / "file" / "grid.png")


def test_a_truncated_checkpoint_gives_way_to_the_one_before(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    file = copy / "checkpoints/step_00000004" / AVERAGE
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"step_00000004 is damaged \(model_2\.safetensors has .* earlier"):
        grid = draw(tmp_path / "grid.png", copy)
    assert (grid == draw(tmp_path / "old.png", run / "checkpoints/step_00000002")).all()
    assert "step_00000004 is damaged" in refused(copy / "checkpoints/step_00000004")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickled_file_does_not_run(nested, tmp_path):
    payload = Payload(tmp_path / "ran")
    torch.save({"linear.weight": payload} if nested else payload, tmp_path / "G_ema.pth")
    assert "is not a plain tensor file" in refused(tmp_path / "G_ema.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="not a plain tensor file"):
        load_generator(tmp_path)


def test_a_truncated_public_file_is_named(tmp_path):
    file = public_file(tmp_path / "G_ema.pth", UNSHARED)
    file.write_bytes(file.read_bytes()[:-100])
    assert "G_ema.pth is not a plain tensor file or is truncated" in refused(file)


def test_a_public_file_that_lacks_a_tensor_is_named(tmp_path):
    state = built(UNSHARED).state_dict()
    del state["linear.bias"]
    torch.save(state, tmp_path / "G_ema.pth")
    assert "linear.bias" in refused(tmp_path / "G_ema.pth")


def test_a_file_of_another_network_is_named(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "G_ema.pth")
    assert "error: the generator state has 0 blocks" in refused(tmp_path / "G_ema.pth")
