"""The parts that training commands share: command line, stored configurations, processes, loops."""

import importlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from fq.command import flat_settings, from_dict, make_accelerator, parse_preset, run_command
from fq.loop import derived_seed, due, prepare, require_finite, summed_last


@dataclass(frozen=True, kw_only=True)
class Run:
    steps: int = 4
    """Steps in all."""
    trackers: tuple[str, ...] = ()
    heat: float = 200.0
    crust: Literal["soft", "hard"] | None = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Baking:
    preset: str
    run: Run = field(default_factory=Run)


PRESETS = {
    "bread": ("Flour and water.", Baking(preset="bread")),
    "cake": ("Also eggs.", Baking(preset="cake", run=Run(steps=9, trackers=("wandb",)))),
}


def parse(arguments):
    return parse_preset(
        arguments, PRESETS, command="python -m bakery", about="Bake.",
        stored=lambda values: from_dict(Baking, values),
    )  # fmt: skip


def refused(capsys, *arguments):
    """What the command says to a line that it does not take."""
    with pytest.raises(SystemExit):
        parse(list(arguments))
    said = capsys.readouterr()
    return " ".join((said.out + said.err).replace("│", " ").split())


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(PRESETS["cake"][1])), encoding="utf-8")
    return tmp_path


# ---- command line


def test_a_preset_is_taken_with_changes():
    assert parse(["cake"]) == PRESETS["cake"][1]
    assert parse(["cake", "--steps", "5"]).run == Run(steps=5, trackers=("wandb",))


def test_a_stored_configuration_is_taken_with_a_changed_option(stored):
    assert parse(["--config", str(stored)]) == PRESETS["cake"][1]
    changed = replace(PRESETS["cake"][1], run=Run(steps=5, trackers=("wandb",)))
    assert parse(["--config", str(stored / "config.json"), "--steps", "5"]) == changed
    assert parse([f"--config={stored}", "--steps", "5"]) == changed


@pytest.mark.parametrize("arguments", [["--config"], ["--config="], ["--configs", "x"]])
def test_config_without_a_place_is_refused(arguments):
    with pytest.raises(ValueError, match=r"--config needs a run folder or a config\.json after it"):
        parse(arguments)


def test_a_value_out_of_range_is_refused_wherever_it_comes_from(stored, capsys):
    assert "steps is 0: give at least 1" in refused(capsys, "--config", str(stored), "--steps", "0")
    values = {"preset": "cake", "run": asdict(Run()) | {"steps": 0}}
    (stored / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="steps is 0: give at least 1"):
        parse(["--config", str(stored)])


def test_a_misspelt_name_is_told_the_right_one(capsys):
    assert "cake" in refused(capsys, "cakes")
    said = refused(capsys, "cake", "--stepps", "3")
    assert "--steps" in said and "python -m bakery cake" in said


def test_help_speaks_of_all_presets_or_of_one(capsys):
    said = refused(capsys, "--help")
    assert "Bake. Every option of a preset can be changed: see `python -m bakery bread --help`." in said
    assert "Flour and water." in said and "Also eggs." in said
    assert "takes the stored configuration of a run instead of a preset" in said
    said = refused(capsys, "cake", "--help")
    assert "Also eggs." in said and "Steps in all. (default: 9)" in said and "Flour" not in said


def test_help_of_a_stored_configuration_has_its_values(stored, capsys):
    said = refused(capsys, "--config", str(stored), "--help")
    assert "with changes." in said and "(default: 9)" in said


# ---- running


def test_a_command_trains_what_the_line_says(monkeypatch):
    seen = []
    run_command(seen.append, parse, ["cake", "--steps", "2"])
    monkeypatch.setattr(sys, "argv", ["bakery", "bread"])
    run_command(seen.append, parse, None)
    assert [config.run.steps for config in seen] == [2, 4]


@pytest.mark.parametrize(
    "error", [ValueError("a"), FileNotFoundError("b"), FloatingPointError("c"), ImportError("d")]
)
def test_expected_errors_become_one_line(error):
    def train(config):
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(train, parse, ["cake"])
    assert stopped.value.code == f"error: {error}"


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(AttributeError):
        run_command(lambda config: config.absent, parse, ["cake"])


def test_an_interrupted_run_says_how_to_go_on(capsys):
    def train(config):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(train, parse, ["cake"])
    assert stopped.value.code == 130
    assert "interrupted: the same command goes on from the newest checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "needs"), [("fq.command", "tyro"), ("fq.loop", "accelerate")])
def test_a_missing_library_is_told_with_its_extra(monkeypatch, module, needs):
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ImportError, match=rf"{module} needs accelerate.*: pip install 'fq-gan\[train\]'"):
        importlib.import_module(module)


# ---- stored configurations


def test_a_configuration_comes_back_from_json():
    cake = PRESETS["cake"][1]
    assert from_dict(Baking, json.loads(json.dumps(asdict(cake)))) == cake


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"preset": "x", "run": asdict(Run()), "odd": 1},
            r"Baking has unknown keys \['odd'\] and lacks \[\]",
        ),
        ({"preset": "x"}, r"Baking has unknown keys \[\] and lacks \['run'\]"),
        (
            {"preset": "x", "run": {"step": 1}},
            r"Run has unknown keys \['step'\] and lacks \['crust', 'heat', 'st",
        ),
    ],
)
def test_unknown_and_missing_keys_are_refused_at_every_level(values, message):
    with pytest.raises(ValueError, match=f"configuration of {message}.*start from a preset instead"):
        from_dict(Baking, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "many"}, "Run: steps is 'many', expected int"),
        ({"steps": True}, "Run: steps is True, expected int"),
        ({"steps": 2.5}, r"Run: steps is 2\.5, expected int"),
        ({"heat": None}, "Run: heat is None, expected float"),
        ({"trackers": "wandb"}, r"Run: trackers is 'wandb', expected tuple\[str, \.\.\.\]"),
        ({"trackers": ["wandb", 3]}, r"Run: trackers is \('wandb', 3\), expected tuple"),
        ({"crust": "burnt"}, "Run: crust is 'burnt', expected .*soft"),
    ],
)
def test_values_of_another_type_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"configuration of {message}.*Mend it, or start from a preset"):
        from_dict(Baking, {"preset": "x", "run": asdict(Run()) | changes})
    with pytest.raises(ValueError, match="Baking: run is 3, expected Run"):
        from_dict(Baking, {"preset": "x", "run": 3})


def test_numbers_that_json_shortens_and_missing_choices_are_taken():
    read = from_dict(Run, {"steps": 3, "trackers": [], "heat": 180, "crust": "hard"})
    assert (read.heat, read.crust, from_dict(Run, asdict(Run())).crust) == (180, "hard", None)


def test_trackers_get_one_level_of_plain_values():
    flat = flat_settings(asdict(PRESETS["cake"][1]))
    assert flat == {"preset": "cake", "run.steps": 9, "run.trackers": "('wandb',)", "run.heat": 200.0,
                    "run.crust": "None"}  # fmt: skip


# ---- processes


def test_trackers_are_checked_before_anything_starts(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tracker 'pencil' is unknown: accelerate knows .*wandb"):
        make_accelerator(folder=str(tmp_path / "run"), trackers=("pencil",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tracker 'wandb' is not installed: pip install wandb, or leave"):
        make_accelerator(folder=str(tmp_path / "run"), trackers=("wandb",))
    assert not (tmp_path / "run").exists()


def test_an_accelerator_has_the_precision_and_the_folder_of_the_run(tmp_path):
    accelerator = make_accelerator(folder=str(tmp_path / "run"), trackers=(), mixed_precision="bf16")
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.project_configuration.logging_dir == str(tmp_path / "run" / "trackers")
    assert accelerator.ddp_handler.broadcast_buffers is False


# ---- loops


def test_seeds_depend_on_every_number_and_on_their_order():
    seeds = [derived_seed(*numbers) for numbers in ((0, 1), (1, 0), (0, 1, 2), (0, 2))]
    # The first is NumPy's, whose sequences are stable: stored runs depend on it.
    assert seeds[0] == derived_seed(0, 1) == 5836529245451711556 and len(set(seeds)) == 4
    assert derived_seed(0, 1, bits=63) == seeds[0] // 2
    torch.manual_seed(max(seeds))


def test_what_is_due_comes_now_and_then_and_at_the_end():
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 0, 7)] == [7]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_not_finite_stop_a_run(tmp_path, value):
    with pytest.raises(FloatingPointError, match=rf"norm is {value} at step 3: .* {tmp_path}\. Pray$"):
        require_finite({"loss": 1.0, "norm": value}, step=3, checkpoints=tmp_path, advice="Pray")


def test_one_object_is_prepared_as_a_tuple_too():
    model, optimiser = nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert prepare(Accelerator(cpu=True), model) == (model,)
    assert len(prepare(Accelerator(cpu=True), model, optimiser)) == 2


def test_gradients_wait_for_the_last_micro_batch():
    waiting = []
    recorder = SimpleNamespace(no_sync=lambda model: waiting.append(model) or torch.no_grad())
    for micro in range(3):
        with summed_last(recorder, "model", micro, 3):
            pass
    assert waiting == ["model", "model"]
