"""The examples of the README run as pasted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_first_example_is_short_enough_to_read_at_a_glance():
    assert 0 < len(EXAMPLES[0].strip().splitlines()) <= 12


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example-{i}" for i in range(len(EXAMPLES))])
def test_example_runs_as_pasted(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "codes in use" in done.stdout or "bit between" in done.stdout


def test_every_command_of_the_readme_is_a_module_that_exists():
    modules = set(re.findall(r"python -m ((?:backbones|benchmarks)\.\w+)", README))
    assert {"backbones.train", "benchmarks.parity"} <= modules
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_every_preset_of_the_readme_exists_and_none_is_missing():
    from backbones.presets import PRESETS

    table = README[README.index("| preset |") : README.index("`--data` takes")]
    cells = re.findall(r"^\| (`.*?`) \|", table, flags=re.M)
    named = {name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)}
    if any("…" in cell for cell in cells):  # a row for all sizes between two
        named |= {name for name in PRESETS if name.startswith("ffhq")}
    assert named == set(PRESETS)
