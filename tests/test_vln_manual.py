"""The manual of the agent: every command in it is understood as it stands, its picture is the one drawn."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from benchmarks import diagram

MANUAL = Path(__file__).resolve().parents[1] / "docs" / "prevalent.md"
TEXT = MANUAL.read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.+?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"^(?:accelerate launch|python) -m (vln\.\w+) ([^#\n]*)", BLOCKS, re.MULTILINE)


class Understood(BaseException):
    """What a command line became."""


@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_commands_are_understood(module, words, monkeypatch):
    cli = tyro.cli

    def caught(*arguments, **options):
        raise Understood(cli(*arguments, **options))

    monkeypatch.setattr(tyro, "cli", caught)
    with pytest.raises(Understood) as stop:
        importlib.import_module(module).main(shlex.split(words))
    assert stop.value.args[0] is not None


def test_all_commands_of_the_package_are_there_and_run_into_each_other():
    named = {module for module, _ in COMMANDS}
    listed = {f"vln.{name}" for name in re.findall(r"^\| `vln\.(\w+)` \|", TEXT, re.MULTILINE)}
    assert (
        named
        >= listed
        >= {"vln.pretrain", "vln.speaker", "vln.augment", "vln.train", "vln.evaluate", "vln.convert"}
    )
    made = {"data/houses", "data/vln"} | set(re.findall(r"--out (\S+)", BLOCKS))
    for option in ("--pretrained", "--extra", "--speaker"):
        for name in re.findall(rf"{option} (\S+)", BLOCKS):
            assert name in made, (option, name)


def test_the_picture_is_drawn_here(tmp_path):
    diagram.main(["--out", str(tmp_path)])
    assert (tmp_path / "prevalent.png").read_bytes().startswith(b"\x89PNG")
    assert (MANUAL.parent / "prevalent.png").read_bytes().startswith(b"\x89PNG")
    words = {text.get_text() for text in diagram.draw_prevalent().axes[0].texts}
    assert {"vln.pretrain", "vln.train", "masked words", "next action"} <= words
