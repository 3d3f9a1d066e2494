"""``python -m vae_lm.generate``: what each command gives, and what it refuses."""

import io

import numpy as np
import pytest
import torch
from tiny_lm import TEXTS, tiny_vae

from vae_lm import LatentStatistics, latent
from vae_lm.generate import Decoding, Nearest, Prior, Reconstruct, main, markdown_table, nearest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate")
    model = tiny_vae()
    model.latent_statistics = LatentStatistics(torch.arange(5.0).double(), 4 * torch.eye(5).double(), 9)
    model.save_pretrained(path / "model")
    (path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture
def run(folder, capsys):
    """Cells of what a command prints, line by line."""

    def call(name, *arguments):
        main([name, str(folder / "model"), *map(str, arguments), "--form", "lines"])
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    return call


SHORT = ("--max-new-tokens", "5")


def cleaned(texts):
    return [" ".join(text.split()) for text in texts]


def test_prior_draws_latents_and_tokens_from_the_seed(run):
    model = tiny_vae()
    greedy = model.sample(3, seed=4, max_new_tokens=5)
    assert run("prior", "--count", 3, "--seed", 4, *SHORT) == [[text] for text in cleaned(greedy)]
    # Tokens of the prior are drawn from 0.9 of the probability unless told otherwise.
    for given, top_p in (((), 0.9), (("--top-p", 0.5), 0.5)):
        drawn = model.sample(3, seed=0, do_sample=True, top_p=top_p, top_k=3, max_new_tokens=5)
        found = run("prior", "--count", 3, "--sample", "--top-k", 3, *given, *SHORT)
        assert found == [[text] for text in cleaned(drawn)]


def test_reconstruct_takes_arguments_a_file_or_the_input(run, folder, monkeypatch):
    expected = [
        [a, b] for a, b in zip(TEXTS, cleaned(tiny_vae().reconstruct(TEXTS, max_new_tokens=5)), strict=True)
    ]
    assert run("reconstruct", "--input", folder / "texts.txt", *SHORT) == expected
    assert run("reconstruct", *TEXTS[:2], *SHORT) == expected[:2]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert run("reconstruct", "--batch-size", 2, *SHORT) == expected


def test_beams_and_further_options_reach_generation(run):
    expected = tiny_vae().reconstruct(TEXTS[:2], num_beams=3, no_repeat_ngram_size=1, max_new_tokens=5)
    options = ("--num-beams", 3, "--generation", "no_repeat_ngram_size=1")
    assert [row[1] for row in run("reconstruct", *TEXTS[:2], *SHORT, *options)] == cleaned(expected)


def test_decode_reads_latents_and_undoes_whitening(run, tmp_path):
    model, z = tiny_vae(), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "z.npy", z.numpy())
    assert run("decode", tmp_path / "z.npy", *SHORT) == [
        [t] for t in cleaned(model.decode(z, max_new_tokens=5))
    ]
    plain = 2 * z + torch.arange(5.0)
    found = run("decode", tmp_path / "z.npy", "--whitened", *SHORT)
    assert found == [[text] for text in cleaned(model.decode(plain, max_new_tokens=5))]


def test_interpolation_of_one_pair_and_of_several(run, tmp_path):
    model = tiny_vae()
    ways = [
        cleaned(model.interpolate(*TEXTS[:2], steps=2, mode=m, max_new_tokens=5)) for m in ("linear", "slerp")
    ]
    one = run("interpolate", *TEXTS[:2], "--steps", 2, *SHORT)
    assert one == [[t, *texts] for t, *texts in zip(("0.00", "0.50", "1.00"), *ways, strict=True)]
    (tmp_path / "pairs").write_text(f"{TEXTS[0]}\t{TEXTS[1]}\n{TEXTS[3]}\t{TEXTS[4]}\n")
    several = run("interpolate", "--input", tmp_path / "pairs", "--steps", 2, "--modes", "slerp", *SHORT)
    other = cleaned(model.interpolate(*TEXTS[3:5], steps=2, mode="slerp", max_new_tokens=5))
    assert [row[0] for row in several] == ["1"] * 3 + ["2"] * 3
    assert [row[2] for row in several] == [*ways[1], *other]


def test_analogy_traversal_and_neighbours(run, folder):
    model = tiny_vae()
    expected = model.analogy(*TEXTS[:3], scale=0.5, max_new_tokens=5)
    assert run("analogy", *TEXTS[:3], "--scale", 0.5, *SHORT) == [[*TEXTS[:3], *cleaned([expected])]]
    rows = run("traverse", *TEXTS[:2], "--dimension", 3, "--values", -2, 2, *SHORT)
    z = latent.traverse(model.encode(TEXTS[1:2]).mu[0], 3, torch.tensor([-2.0, 2.0]))
    assert [row[0] for row in rows] == ["-2", "2"]
    assert [row[2] for row in rows] == cleaned(model.decode(z, max_new_tokens=5))
    rows = run("nearest", TEXTS[2], TEXTS[5], "--bank", folder / "texts.txt", "--count", 2)
    mu = model.encode(TEXTS).mu
    found = nearest(mu[[2, 5]], mu, count=2)
    assert [row[2] for row in rows] == [TEXTS[i] for i in found.indices.flatten().tolist()]
    assert rows[0] == [TEXTS[2], "0.000", TEXTS[2]] and rows[1][1] == f"{float(found.distances[0, 1]):.3f}"


def test_a_table_is_markdown_and_can_go_into_files(folder, tmp_path, capsys):
    given = ["reconstruct", str(folder / "model"), *TEXTS[:2], *SHORT]
    back = tiny_vae().reconstruct(TEXTS[:2], max_new_tokens=5)
    expected = markdown_table(("text", "reconstruction"), zip(TEXTS[:2], back, strict=True))
    main(given)
    assert capsys.readouterr().out == expected
    main([*given, "--out", str(tmp_path / "table.md"), "--png", str(tmp_path / "table.png")])
    printed = capsys.readouterr()
    assert (tmp_path / "table.md").read_text() == expected and printed.out == ""
    assert "table.png" in printed.err and (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prior", "--generation", "num_beamz=2"], r"not used by the model: \['num_beamz'\]"),
        (["traverse", "a dog", "--dimension", "7"], "dimension is 7 but the latent has 5: choose 0 to 4"),
        (
            ["nearest", "a dog", "--bank", "BANK", "--count", "9"],
            "9 neighbours were asked for but the bank has 6",
        ),
        (["interpolate", "a dog"], r"texts are \['a dog'\] but A, B were expected"),
        (["analogy", "a", "b", " "], "but A, B, C were expected"),
        (["reconstruct", "a", " "], "a blank one says nothing"),
        (["reconstruct", "--input", "missing.txt"], "missing.txt does not exist"),
        (["reconstruct", "dog " * 40], r"text 0 \('dog dog .* takes at most 24"),
        (["decode", "missing.npy"], "missing.npy does not exist"),
        (["prior", "--max-new-tokens", "40"], "max_new_tokens is 40 but 1 to 30 tokens fit"),
    ],
)
def test_mistakes_are_named(folder, arguments, message):
    name, *rest = [str(folder / "texts.txt") if part == "BANK" else part for part in arguments]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main([name, str(folder / "model"), *rest])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decoding(top_k=3), "are of drawn tokens: give --sample with them"),
        (lambda: Decoding(sample=True, temperature=0.0), "temperature is 0.0 and num_beams 1"),
        (lambda: Decoding(num_beams=0), "num_beams 0: both must be positive"),
        (lambda: Decoding(sample=True, top_p=1.5), "top_p 1.5"),
        (lambda: Decoding(generation=("num_beams",)), "'num_beams' but NAME=VALUE was expected"),
        (lambda: Decoding(generation=("num_beams=3",)), "is an option of its own or set by the command"),
        (lambda: Prior(model="m", count=0), "count is 0"),
        (lambda: Reconstruct(model="m", texts=("a",), input="f"), "there are texts and --input f"),
        (lambda: Nearest(model="m", bank="b", texts=("a",), input="f"), "there are texts and --input f"),
    ],
)
def test_options_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
