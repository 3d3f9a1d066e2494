"""The manual: its example runs as pasted, its commands exist, its picture is the one that is drawn."""

import importlib
import re
from pathlib import Path

from tiny_lm import tiny_vae

from benchmarks import diagram
from vae_lm import generate, picture
from vae_lm.evaluate import DEFINITIONS

MANUAL = Path(__file__).resolve().parents[1] / "docs" / "optimus.md"
TEXT = MANUAL.read_text(encoding="utf-8")


def test_the_example_runs_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_vae()
    model.save_pretrained("runs/grammar/model")
    code = re.search(r"```python\n(.+?)```", TEXT, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    names = {}
    exec(compile(code, str(MANUAL), "exec"), names)
    assert names["mu"].shape == (2, 5) and len(capsys.readouterr().out.splitlines()) >= 4
    assert names["model"].posterior_head.weight.grad.abs().sum() > 0


def test_commands_of_the_manual_exist():
    named = re.findall(r"python -m vae_lm\.(\w+)(?: ([a-z]+) (?:MODEL|RUN))?", TEXT)
    assert {module for module, _ in named} >= {"evaluate", "generate", "embed", "picture", "convert"}
    subcommands = {
        "generate": {part.__metadata__[0].name for part in generate.Command.__args__},
        "picture": {part.__metadata__[0].name for part in picture.Command.__args__},
    }
    for module, found in subcommands.items():
        assert {sub for name, sub in named if name == module and sub} == found
    for module in {"evaluate", "generate", "embed", "picture", "convert"}:
        assert callable(importlib.import_module(f"vae_lm.{module}").main)


def test_figures_of_the_manual_are_those_of_the_command():
    figures = set(re.findall(r"`([a-z_0-9]+)`", TEXT.split("## Figures")[1].split("## Released")[0]))
    assert set(DEFINITIONS) - {"log_prob", "mi_at_most"} <= figures


def test_the_picture_of_the_manual_is_drawn_here(tmp_path):
    diagram.main(["--out", str(tmp_path)])
    assert (tmp_path / "optimus.png").read_bytes().startswith(b"\x89PNG")
    assert (MANUAL.parent / "optimus.png").read_bytes().startswith(b"\x89PNG")
    words = [text.get_text() for text in diagram.draw_optimus().axes[0].texts]
    assert words.count("slot") == 3 and any("BERT" in word for word in words)
