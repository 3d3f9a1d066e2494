"""Stored results of the original sentence VAE are reproduced, and whatever differs from them fails."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import parity

LOCAL = Path(__file__).parent / "data" / "optimus"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden" / "optimus"
FILES = sorted(LOCAL.rglob("*.npz"))


def run(capsys, *arguments):
    code = parity.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out.splitlines()


def altered(source, folder, **changes):
    """Copy a file with some arrays changed, into a folder that still says what it is."""
    with np.load(source) as archive:
        arrays = {key: archive[key] for key in archive.files} | changes
    folder = folder / "optimus"
    folder.mkdir()
    np.savez(folder / source.name, **arrays)
    return folder / source.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_stored_results_are_reproduced(capsys, path):
    code, lines = run(capsys, path)
    assert (code, lines[-1]) == (0, "1 passed, 0 failed"), lines


def test_all_shared_results_but_those_of_other_models_are_reproduced(capsys):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    code, lines = run(capsys, SHARED)
    assert (code, lines[-1]) == (0, "6 passed, 0 failed, 2 not covered yet"), lines
    assert [line.split()[1] for line in lines if line.startswith("----")] == [
        "optimus/cara_a.npz",
        "optimus/spacefusion_a.npz",
    ]


@pytest.mark.parametrize(
    "key",
    [
        "enc/mu",
        "enc_nomask/pooled",
        "kl_per_dim",
        "loss/fb1_lam0.5_lenw/loss",
        "loss/fb2/rec",
        "grad/decoder.transformer.linear.weight",
        "dec/memory/greedy_logits",
        "dec/none/logits",
        "iw/padded_upstream/log_prob_iw",
        "corpus/mi",
        "corpus/ppl",
    ],
)
def test_a_result_that_differs_fails_by_name(tmp_path, capsys, key):
    source = LOCAL / "vae_b.npz"
    with np.load(source) as archive:
        value = archive[key]
    code, lines = run(capsys, altered(source, tmp_path, **{key: value + 0.01 * np.abs(value).max()}))
    assert code == 1 and f"{key} is off by" in lines[0]


def test_weights_that_differ_change_the_results(tmp_path, capsys):
    source, key = LOCAL / "vae_b.npz", "sd/decoder.transformer.linear_emb.weight"
    with np.load(source) as archive:
        value = archive[key] * 1.01
    code, lines = run(capsys, altered(source, tmp_path, **{key: value}))
    assert code == 1 and "loss/fb0/loss is off by" in lines[0]


@pytest.mark.parametrize("name", ["beta_schedules", "token_filters", "vae_b"])
def test_an_array_that_nobody_reproduces_fails_by_name(tmp_path, capsys, name):
    path = LOCAL / f"{name}.npz"
    code, lines = run(capsys, altered(path, tmp_path, surprise=np.zeros(3)))
    assert code == 1 and "not reproduced: surprise" in lines[0]
