"""Pictures: what is drawn, where it is read from, what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tiny_lm import TEXTS, tiny_vae

from vae_lm import latent, picture
from vae_lm.picture import curves, kl_bars, main, project, save_table, scatter


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """Figures that a command draws, instead of files."""
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, path: figures.append(figure))
    return figures


def test_clusters_stay_together_and_seeds_repeat():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0] * 8, [30.0] * 8])
    latents = (centres.repeat_interleave(20, 0) + torch.randn(40, 8, generator=generator)).numpy()
    points = project(latents, perplexity=8, seed=3)
    assert points.shape == (40, 2) and np.array_equal(project(latents, perplexity=8, seed=3), points)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(1) < 20) == (np.arange(40) < 20)).all()


def test_colours_are_names_or_numbers():
    points = np.arange(8.0).reshape(4, 2)
    named = scatter(points, ["b", "a", "b", "b"], title="t", legend="label")
    axes = named.axes[0]
    assert [len(part.get_offsets()) for part in axes.collections] == [1, 3]
    assert [text.get_text() for text in named.legends[0].get_texts()] == ["a", "b"]
    numbered = scatter(points, [1, 2.5, 3, 4], title="t", legend="words")
    assert numbered.axes[0].collections[0].get_array().tolist() == [1, 2.5, 3, 4]
    assert numbered.axes[1].get_ylabel() == "words"
    many = scatter(np.zeros((12, 2)), [f"{n:02}" for n in range(12)], title="t", legend="label")
    assert len({tuple(part.get_facecolor()[0]) for part in many.axes[0].collections}) == 12


def test_latents_of_a_model_are_coloured_by_words_or_labels(folder, drawn):
    given = ["latents", str(folder / "model"), "--input", str(folder / "texts.txt"), "--out", "x.png"]
    main(given)
    points = drawn[0].axes[0].collections[0]
    assert points.get_array().tolist() == [len(text.split()) for text in TEXTS]
    expected = project(tiny_vae().encode(TEXTS).mu.numpy())
    np.testing.assert_allclose(points.get_offsets(), expected, rtol=1e-3, atol=1e-2)
    (folder / "labels").write_text("x\ny\nx\ny\nx\nx\n")
    main([*given, "--labels", str(folder / "labels")])
    assert [len(part.get_offsets()) for part in drawn[1].axes[0].collections] == [4, 2]


def test_latents_of_a_file_need_no_model(tmp_path, drawn):
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(30, 4)))
    (tmp_path / "labels").write_text("\n".join(str(number / 2) for number in range(30)))
    main(["latents", str(tmp_path / "z.npy"), "--out", "x.png", "--labels", str(tmp_path / "labels")])
    assert drawn[0].axes[0].collections[0].get_array().tolist() == [number / 2 for number in range(30)]
    main(["latents", str(tmp_path / "z.npy"), "--out", "x.png", "--limit", "10"])
    assert len(drawn[1].axes[0].collections[0].get_offsets()) == 10


def test_bars_are_the_mean_kl_largest_first(folder, drawn):
    main(["kl", str(folder / "model"), "--input", str(folder / "texts.txt"), "--out", "x.png"])
    expected = latent.kl_per_dimension(*tiny_vae().encode(TEXTS)).mean(0)
    axes = drawn[0].axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx(sorted(expected.tolist(), reverse=True), rel=1e-5)
    assert [int(label.get_text()) for label in axes.get_xticklabels()] == expected.argsort(
        descending=True
    ).tolist()
    assert f"KL {float(expected.sum()):.2f} nats over 6 texts, 5 of 5 dimensions" in axes.get_title()
    assert "0" in [label.get_text() for label in kl_bars([0.1] * 64, title="").axes[0].get_xticklabels()]


def test_curves_are_those_of_the_runs(tmp_path, drawn):
    lines = [
        {"step": 1, "rec": 9.0, "kl": 1.0, "kl_counted": 0.5, "beta": 0.0},
        {"step": 2, "rec": None, "kl": 2.0, "kl_counted": 1.5, "beta": 0.5, "other": 3},
        {"step": 3, "mi": 1.0},
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    runs = [str(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    main(["curves", *runs, "--out", "x.png"])
    rec, kl, beta = drawn[0].axes
    assert len(rec.lines) == 2 and len(kl.lines) == 4 and len(beta.lines) == 2
    assert rec.lines[0].get_xdata().tolist() == [1, 2] and math.isnan(rec.lines[0].get_ydata()[1])
    assert [line.get_ydata().tolist() for line in kl.lines[:2]] == [[1.0, 2.0], [0.5, 1.5]]
    assert beta.lines[1].get_ydata().tolist() == [0.0, 0.5]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == runs


def test_a_table_shows_every_cell_whatever_is_in_it(tmp_path):
    rows = [("0.00", "costs $5 or $6 " * 9), ("1.00", "odd \x1b \u04b9 signs"), ("", "")]
    save_table(("t", "text"), rows, tmp_path / "new" / "table.png")
    tall = imread(tmp_path / "new" / "table.png")
    save_table(("t", "text"), rows[1:], tmp_path / "new" / "short.png")
    assert tall.shape[0] > imread(tmp_path / "new" / "short.png").shape[0]
    assert tall[..., :3].min() < 0.1 and not list(tmp_path.rglob(".*"))


def test_the_way_between_two_texts_is_drawn(folder, monkeypatch):
    tables = []
    monkeypatch.setattr(picture, "save_table", lambda *given: tables.append(given))
    main(["interpolation", str(folder / "model"), *TEXTS[:2], "--out", "x.png", "--steps", "2",
          "--max-new-tokens", "4"])  # fmt: skip
    (header, rows, path) = tables[0]
    assert header == ("t", "linear", "slerp") and str(path) == "x.png"
    assert [row[1] for row in rows] == tiny_vae().interpolate(*TEXTS[:2], steps=2, max_new_tokens=4)


def test_mistakes_are_named(folder):
    np.save(folder / "z.npy", np.zeros((3, 2)))
    np.save(folder / "many.npy", np.zeros((30, 2)))
    (folder / "labels").write_text("a\nb\n")
    (folder / "names").write_text("\n".join(f"name {number}" for number in range(30)))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    cases = {
        ("latents", "z.npy"): "3 latents make no picture: give at least 4",
        ("latents", "model"): "model is a model: give the texts to draw with --input",
        ("latents", "many.npy", "--labels", "labels"): "there are 30 latents but 2 labels",
        ("latents", "many.npy", "--input", "texts.txt"): "there are 30 latents but 6 texts",
        ("latents", "many.npy", "--labels", "names"): "there are 30 labels: numbers, or at most 20 names",
        ("kl", "model", "--input", "missing"): "missing does not exist",
        ("curves",): "no run was named",
        ("curves", "metrics.jsonl"): "logged none of rec, kl, beta",
        ("curves", "missing"): "no metrics at",
    }
    for (name, *rest), message in cases.items():
        arguments = [part if part.startswith("--") else str(folder / part) for part in rest]
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main([name, *arguments, "--out", str(folder / "x.png")])
    assert not (folder / "x.png").exists()


def test_curves_of_nothing():
    with pytest.raises(ValueError, match=r"run logged none of rec, kl, beta: give runs of vae_lm.train"):
        curves({"run": [{"step": 1}]})
