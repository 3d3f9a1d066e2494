"""Files of latents: what is in them, that they stream, what is refused."""

import io

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_lm import TEXTS, tiny_vae

from vae_lm import Optimus, embed, latent, sources
from vae_lm.embed import EmbedConfig, LatentFile, main, posteriors


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


def test_rows_are_the_means_in_the_order_of_the_lines(folder, monkeypatch):
    expected = tiny_vae().encode(TEXTS).mu
    for name in ("z.npy", "z.safetensors"):
        main([str(folder / "model"), "--input", str(folder / "texts.txt"), "--out", str(folder / name)])
        found = sources.latents(folder / name, 5)
        torch.testing.assert_close(found, expected)
    assert np.load(folder / "z.npy").dtype == np.float32
    assert list(load_file(folder / "z.safetensors")) == ["mu"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    monkeypatch.setattr(embed, "_BATCHES_AT_ONCE", 2)
    main([str(folder / "model"), "--out", str(folder / "s.npy"), "--batch-size", "2"])
    torch.testing.assert_close(sources.latents(folder / "s.npy", 5), expected)


def test_a_stream_is_read_a_few_batches_at_a_time(monkeypatch):
    monkeypatch.setattr(embed, "_BATCHES_AT_ONCE", 2)
    taken = []

    def stream():
        for number in range(9):
            taken.append(number)
            yield TEXTS[number % 6]

    parts = posteriors(tiny_vae(), stream(), batch_size=2)
    assert len(next(parts).mu) == 4 and len(taken) == 4
    assert [len(part.mu) for part in parts] == [4, 1]


def test_statistics_are_stored_with_the_model_and_whiten(folder, capsys):
    model, given = str(folder / "model"), ["--input", str(folder / "texts.txt")]
    main([model, *given, "--statistics"])
    expected = latent.latent_statistics([tiny_vae().encode(TEXTS)])
    stored = Optimus.from_pretrained(model).latent_statistics
    torch.testing.assert_close(stored.mean, expected.mean)
    torch.testing.assert_close(stored.covariance, expected.covariance)
    assert stored.num_sentences == 6 and "statistics of 6 texts" in capsys.readouterr().out
    main([model, *given, "--whiten", "--out", str(folder / "w.npy")])
    mu = tiny_vae().encode(TEXTS).mu
    torch.testing.assert_close(
        sources.latents(folder / "w.npy", 5), expected.whiten(mu), atol=1e-4, rtol=1e-4
    )
    main([model, *given, "--statistics", "--out", str(folder / "z.npy")])  # both in one run
    torch.testing.assert_close(sources.latents(folder / "z.npy", 5), mu)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a dog runs .\n\nnobody\n", [], "line 2 of .* is blank, and rows are counted like lines"),
        ("", [], "texts.txt holds no text"),
        ("dog " * 40, [], "special tokens included: shorten or drop it"),
        ("a\n", ["--whiten"], "the model has no latent statistics"),
    ],
)
def test_nothing_is_left_behind_by_a_mistake(folder, text, options, message):
    (folder / "texts.txt").write_text(text)
    given = [str(folder / "model"), "--input", str(folder / "texts.txt"), "--out", str(folder / "z.npy")]
    with pytest.raises(SystemExit, match=message):
        main([*given, *options])
    assert {path.name for path in folder.iterdir()} == {"model", "texts.txt"}


def test_a_released_checkpoint_has_no_place_for_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(embed.sources, "open_model", lambda *given: tiny_vae())
    with pytest.raises(ValueError, match="has no place for statistics: convert it first"):
        embed.embed(EmbedConfig(model=str(tmp_path), statistics=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to do: give --out FILE, or --statistics"),
        ({"out": "z.txt"}, "'z.txt' but its name must end in .npy or .safetensors"),
        ({"whiten": True, "statistics": True, "out": "z.npy"}, "by statistics that were stored before"),
        ({"whiten": True, "statistics": True}, "whiten is for --out"),
        ({"out": "z.npy", "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EmbedConfig(model="m", **options)


@pytest.mark.parametrize("name", ["z.npy", "z.safetensors"])
def test_an_unfinished_file_does_not_get_its_name(tmp_path, name):
    file = LatentFile(tmp_path / name, 3)
    file.add(torch.ones(2, 3))
    file.close()
    assert list(tmp_path.iterdir()) == []
