"""The page on navigation: its example runs, and what it names exists."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vln.candidates import Panorama
from vln.geometry import Camera
from vln.simulator import Simulator, State
from vln.world import World

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "navigation.md").read_text(encoding="utf-8")
ROLLOUT = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)[0]
CELLS = PAGE[PAGE.index("| there | here |") : PAGE.index("Sets, order and transitions")]


def test_the_rollout_runs_as_pasted_and_arrives(tmp_path):
    script = tmp_path / "rollout.py"
    script.write_text(ROLLOUT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 ['bath', 'loft']\n2 ['loft', 'loft']\n"
    assert len(ROLLOUT.splitlines()) <= 12


def test_every_command_and_function_of_the_page_exists():
    modules = set(re.findall(r"python -m (vln\.\w+|benchmarks\.\w+)", PAGE)) - {"vln.houses"}
    assert {"vln.evaluate", "vln.render", "vln.convert", "vln.features", "benchmarks.parity"} <= modules
    for module in modules:
        assert callable(importlib.import_module(module).main)
    named = set(re.findall(r"`(vln\.\w+)\.(\w+)", PAGE))
    assert ("vln.data", "read_rxr") in named and ("vln.instructions", "encode_instructions") in named
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_options_of_the_commands_exist():
    def options(line):
        return re.findall(r"--([\w-]+)", line)

    for line in re.findall(r"^python -m vln\.\w+ .*$", PAGE, flags=re.M):
        module, subcommand = re.match(r"python -m (vln\.\w+) (\S+)", line).groups()
        if module == "vln.houses":
            continue
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert f'"{subcommand}"' in source, line
        for option in options(line):
            assert re.search(rf"^    {option.replace('-', '_')}: ", source, flags=re.M), (line, option)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Simulator, ("new_episodes", "new_random_episodes", "step", "place")),
        (State, ("viewpoint", "view", "neighbour", "num_navigable", "rel_heading", "rel_distance")),
        (Panorama, ("candidate", "point_id", "rel_heading", "rel_elevation", "distance")),
        (World, ("graph",)),
        (Camera, ("restricted", "vfov", "elevation_limits")),
    ],
)
def test_the_names_for_people_from_the_original_are_real(kind, names):
    for name in names:
        assert name in CELLS and (hasattr(kind, name) or name in kind.__dataclass_fields__)


def test_the_picture_is_there_and_small():
    with Image.open(ROOT / "docs" / "navigation.png") as image:
        assert image.size[0] == 1100
    assert (ROOT / "docs" / "navigation.png").stat().st_size < 200_000
