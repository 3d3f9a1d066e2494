"""Who may import whom: fq nobody of ours, models never fq, siblings never each other."""

import ast
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIBLINGS = ("backbones", "vae_lm", "vln")
OURS = ("fq", *SIBLINGS, "benchmarks", "tests")
# Modules with a command line of their own join models with FQ; all others stay apart from it.
ENTRIES = set(
    "train pretrain sample evaluate translate speaker augment generate embed picture prepare convert render"
    " tasks".split()
)  # fmt: skip
KERNELS = ("fq.kernels", "fq.kernels_search")
# What training needs; `import fq` does not.
TRAINING = ("fq.run", "fq.provenance", "fq.command", "fq.loop")
HEAVY = {"accelerate", "torchvision", "transformers", "triton", "tyro"}


def imported(source: str, module: str) -> Iterator[str]:
    """Full names of all modules that a source imports, wherever in it, by statement or by name."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def violations(source: str, module: str) -> list[str]:
    """What a module imports although the direction of the arrows forbids it."""
    package, *rest = module.split(".")
    allowed = {package}
    if package == "benchmarks":
        allowed |= set(OURS) - {"tests"}
    elif package in SIBLINGS and rest and rest[0].split("_")[0] in ENTRIES:
        allowed.add("fq")
    tops = {name.split(".")[0] for name in imported(source, module)}
    found = sorted((tops & set(OURS)) - allowed)
    if package == "fq" and module not in TRAINING:
        found += sorted(tops & (HEAVY - {"triton"} if module in KERNELS else HEAVY))
        if module == "fq.__init__":
            lazy = (*TRAINING, *KERNELS)
            found += [name for name in imported(source, module) if name in lazy]
    return found


def modules(*packages: str) -> dict[str, Path]:
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


SOURCES = modules("fq", *SIBLINGS, "benchmarks")


def test_all_packages_are_looked_at():
    assert {"fq.quantize", "fq.__init__", "backbones.biggan", "backbones.train", "benchmarks.parity"} <= set(
        SOURCES
    )


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_in_the_allowed_direction(module):
    assert violations(SOURCES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("fq.search", "from backbones import layers", ["backbones"]),
        ("fq.search", "import vln.agent as agent", ["vln"]),
        ("fq.search", "def f():\n    from benchmarks.report import draw", ["benchmarks"]),
        ("fq.attach", "if TYPE_CHECKING:\n    from backbones.biggan import Generator", ["backbones"]),
        ("fq.attach", "from ..backbones import biggan", ["backbones"]),
        ("fq.search", "import triton", ["triton"]),
        ("fq.stats", "from torchvision.utils import make_grid", ["torchvision"]),
        ("fq.stats", "importlib.import_module('transformers.models')", ["transformers"]),
        ("fq.stats", "import tyro", ["tyro"]),
        ("fq.__init__", "from fq import run", ["fq.run"]),
        ("fq.__init__", "from fq import command, loop", ["fq.command", "fq.loop"]),
        ("fq.__init__", "from fq.kernels_search import CONFIGS", ["fq.kernels_search"]),
        ("fq.__init__", "from fq.run import RunFolder", ["fq.run"]),
        ("backbones.biggan", "import fq", ["fq"]),
        ("backbones.biggan", "from fq.search import nearest", ["fq"]),
        ("backbones.layers", "def f():\n    import fq", ["fq"]),
        ("backbones.losses", "__import__('fq')", ["fq"]),
        ("backbones.train", "from vln import data", ["vln"]),
        ("vae_lm.train", "import backbones.losses", ["backbones"]),
        ("vln.tasks.follow", "import vae_lm", ["vae_lm"]),
        ("vln.model", "from fq import FeatureQuantize", ["fq"]),
        ("backbones.train", "from benchmarks import report", ["benchmarks"]),
        ("benchmarks.demo", "import tests.test_fq_search", ["tests"]),
    ],
)
def test_a_forbidden_import_is_found_wherever_it_is_planted(module, source, found):
    assert violations(source, module) == found
    path = SOURCES.get(module)
    if path:  # at the end of the real file, too
        assert violations(path.read_text(encoding="utf-8") + "\n\n" + source + "\n", module) == found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fq.quantize",
            "import torch, einops\nfrom fq.search import nearest\nfrom .losses import commitment",
        ),
        ("fq.kernels", "import triton"),
        ("fq.kernels_search", "import triton"),
        ("fq.run", "from accelerate import Accelerator"),
        ("fq.command", "import tyro\nfrom accelerate import Accelerator"),
        ("fq.loop", "from accelerate import Accelerator"),
        ("backbones.train", "import fq\nfrom fq.run import RunFolder\nfrom backbones import biggan"),
        ("vln.tasks.follow", "import fq"),
        ("benchmarks.demo", "import fq, backbones.train, vae_lm, vln"),
        ("backbones.biggan", "import torch\nfqs = 'import fq'"),
    ],
)
def test_allowed_imports_pass(module, source):
    assert violations(source, module) == []


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_fq_loads_nothing_heavy_that_torch_does_not():
    bare, ours = loaded_after("import torch, einops"), loaded_after("import fq")
    added = {name for name in ours - bare if name.split(".")[0] != "fq"}
    assert not {name for name in ours if name.split(".")[0] in HEAVY - {"triton"}}
    assert not {name for name in added if name.split(".")[0] in HEAVY | {"matplotlib", "numpy", "scipy"}}
    assert not {name for name in added if name.startswith("torch._dynamo")}, "that alone takes a second"
    assert {"fq.attach", "fq.search"} <= ours and not ours & set(TRAINING)


@pytest.mark.parametrize(
    "module", [name for name in modules("fq", *SIBLINGS) if not name.endswith("__init__")]
)
def test_examples_in_docstrings_are_right(module):
    if module in KERNELS:
        pytest.importorskip("triton")
    result = doctest.testmod(importlib.import_module(module), verbose=False)
    assert result.failed == 0


def test_public_functions_of_fq_have_examples_that_run():
    counts = {
        name: doctest.testmod(importlib.import_module(name)).attempted
        for name in ("fq.search", "fq.quantize", "fq.attach", "fq.stats", "fq.suggest")
    }
    assert all(counts.values()), counts
