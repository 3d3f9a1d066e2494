"""Reports say what the runs' own files say, and refuse to set different things side by side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import evaluate
from backbones.presets import PRESETS
from backbones.sample import save_grid
from backbones.train import main as train
from benchmarks import compare, overhead, readme
from fq.run import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = ["--steps", "4", "--log-every", "2", "--sample-every", "2", "--num-eval", "60", "--num-real", "80"]


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain and a quantised run of four steps, scored by random features."""
    folder = tmp_path_factory.mktemp("runs")
    for mode in ("none", "replace"):
        train(["smoke", "--fq", mode, "--out", str(folder / mode), "--batch-size", "8", *SMALL])
    return [folder / "none", folder / "replace"]


def test_the_report_holds_the_last_scores_of_every_run(runs, tmp_path):
    report = compare.compare([compare.read_run(run) for run in runs], tmp_path / "out", title="A title")
    text = report.read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for run, result in zip(runs, results["runs"], strict=True):
        last = [line for line in read_metrics(run) if any(key.startswith("score/") for key in line)][-1]
        for key, value in last.items():
            if key != "step":
                assert result["scores_by_step"][key.removeprefix("score/")]["4"] == value
                assert f"{value:.3g}" in text
        command = result["provenance"][0]["command"]
        assert command in text and str(run.parent) not in text
    assert text.startswith("# A title")
    for name in ("samples.png", "curves.png", "codebooks.png", "codebook_replace.png"):
        assert name in text
        assert min(size_of(tmp_path / "out" / name)) > 100


@pytest.mark.parametrize("size", [16, 64])
def test_columns_of_a_grid_are_cut_between_pictures(size, tmp_path):
    save_grid(
        torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, size, size), tmp_path / "g.png", rows=2
    )
    cut = compare.first_columns(np.asarray(Image.open(tmp_path / "g.png")), size=size, columns=3)
    save_grid(
        torch.linspace(-1, 1, 8)[[0, 1, 2, 4, 5, 6], None, None, None].expand(6, 3, size, size),
        tmp_path / "h.png",
        rows=2,
    )
    assert np.array_equal(cut, np.asarray(Image.open(tmp_path / "h.png")))


def test_real_pictures_can_be_left_out_of_the_report(runs, tmp_path):
    for name, flags in (("with", []), ("without", ["--hide-real"])):
        command = [sys.executable, "-m", "benchmarks.compare", *map(str, runs), "--out", str(tmp_path / name)]
        subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    widths = {name: size_of(tmp_path / name / "samples.png")[0] for name in ("with", "without")}
    assert widths["without"] * 3 == widths["with"] * 2


def test_runs_scored_by_different_numbers_are_not_compared(runs, tmp_path):
    other = tmp_path / "other"
    train(["smoke", "--out", str(other), "--batch-size", "8", *SMALL[:-3], "70", *SMALL[-2:]])
    with pytest.raises(ValueError, match="scored differently"):
        compare.compare([compare.read_run(runs[0]), compare.read_run(other)], tmp_path / "out", title="x")
    assert not (tmp_path / "out").exists()


def test_a_run_without_scores_is_refused(tmp_path):
    run = tmp_path / "run"
    train(["smoke", "--out", str(run), "--batch-size", "8", "--steps", "1", "--features", "none"])
    with pytest.raises(ValueError, match="has no scores"):
        compare.read_run(run)


def test_evaluating_a_run_gives_the_scores_it_logged(runs, capsys):
    evaluate.main([str(runs[1]), "--num-real", "80"])
    written = json.loads((runs[1] / "scores.json").read_text())
    last = [line for line in read_metrics(runs[1]) if any(key.startswith("score/") for key in line)][-1]
    last.pop("step")
    assert set(last) == {f"score/{key}" for key in written["scores"]}
    for key, value in written["scores"].items():  # training keeps its networks channels-last
        assert value == pytest.approx(last[f"score/{key}"], rel=1e-3, abs=1e-6)
    assert written["checkpoint"] == "step_00000004"
    assert written["provenance"]["seed"] == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in written["scores"])


def test_evaluating_with_fewer_samples_says_so_in_the_name(runs):
    result = evaluate.evaluate(evaluate.EvaluateConfig(source=str(runs[0]), num_eval=30, num_real=40))
    assert any("n=30,reals=40" in name for name in result["scores"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["{run}", "--features", "squeezenet1_1:nowhere.pt"], "nowhere.pt"),
        (["{run}", "--data", "nowhere.npz"], "nowhere.npz"),
        (["{run}", "--num-eval", "-1"], "num_eval is -1"),
    ],
)
def test_evaluate_names_what_is_wrong(runs, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([argument.format(run=runs[0]) for argument in arguments])
    assert stopped.value.code
    assert message in str(stopped.value.code) + capsys.readouterr().err


def test_overhead_pairs_a_plain_step_with_each_mode():
    result = overhead.measure(PRESETS["smoke"][1], batch_size=4, repeats=3)
    assert list(result["sites"]) == [f"blocks.{block}.0" for block in range(4)] and result["plain_ms"] > 0
    assert set(result["overhead"]) == {"regularize", "replace"}
    for mode, (lower, upper) in result["quartiles"].items():
        assert lower <= (result["overhead"] | result["sites"])[mode] <= upper


def test_the_demo_trains_three_runs_and_reports_them(tmp_path):
    command = [sys.executable, "-m", "benchmarks.demo", "--steps", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["fq"] for run in results["runs"]] == ["none", "regularize", "replace"]
    assert {run["provenance"][0]["seed"] for run in results["runs"]} == {0}
    assert results["overhead"]["plain_ms"] > 0
    assert "Cost of FQ" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [
        ("README.md", "measured", readme.measured),
        ("docs/quantiser.md", "measured:search", readme.quantiser),
        ("docs/prevalent.md", "measured:pretraining", readme.pretraining),
    ],
)
def test_readme_and_docs_show_the_committed_numbers(file, name, made):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip() == made().strip()


def test_the_page_of_the_backbones_is_made_from_the_committed_results():
    assert (readme.RESULTS / "backbones.md").read_text(encoding="utf-8") == readme.backbones()
