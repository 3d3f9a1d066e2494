"""What the commands read: models of both kinds, lines, fields, files of latents."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_lm import tiny_vae, tokenizers

from vae_lm import TextTokenizers, sources
from vae_lm.convert import from_released, save_released
from vae_lm.sources import Released, open_model

RELEASED = Path(__file__).parent / "data" / "optimus" / "checkpoint_tiny"


def test_a_released_checkpoint_is_opened_with_tokenisers_and_injection(tmp_path, monkeypatch):
    model = tiny_vae()
    for step in (3, 9):
        save_released(model, tmp_path / "released", step=step)
    monkeypatch.setattr(TextTokenizers, "load", lambda encoder, decoder: tokenizers())
    released = Released(encoder_tokenizer="E", decoder_tokenizer="D", injection="memory", step=9)
    # The original's special tokens are the last three of the vocabulary, ours of these tests the first.
    opened = {}
    monkeypatch.setattr(sources, "from_released", lambda folder, **given: opened.update(given) or model)
    assert open_model(tmp_path / "released", released) is model
    assert opened["injection"] == "memory" and opened["step"] == 9 and opened["tokenizers"] is tokenizers()


def test_a_model_that_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(
        ValueError, match="is a released checkpoint and holds no tokenisers: give --encoder-tok"
    ):
        open_model(RELEASED)
    with pytest.raises(
        FileNotFoundError, match=r"holds no config.json: give a folder written by save_pretra"
    ):
        open_model(tmp_path)
    from_released(RELEASED).save_pretrained(tmp_path / "ids")
    with pytest.raises(ValueError, match="the model has no tokenisers and knows token ids only"):
        open_model(tmp_path / "ids")
    tiny_vae().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model is no released checkpoint: .* leave those options out"):
        open_model(tmp_path / "model", Released(step=3))
    with pytest.raises(ValueError, match="give both --encoder-tokenizer and --decoder-tokenizer"):
        Released(encoder_tokenizer="x")


def test_a_tokeniser_of_another_vocabulary_is_refused(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model")
    grown = TextTokenizers.from_folder(tmp_path / "model")
    grown.decoder.add_tokens(["neologism"])
    shutil.rmtree(tmp_path / "model" / "decoder_tokenizer")
    grown.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tokeniser has \[size, pad, bos, eos\] .* give the tokeniser that"):
        open_model(tmp_path / "model")


def test_lines_come_from_files_and_from_the_input(tmp_path, monkeypatch):
    (tmp_path / "t").write_text(" a b \n\n c\td\n")
    assert list(sources.lines(tmp_path / "t")) == ["a b", "", "c\td"]
    assert sources.texts(tmp_path / "t") == ["a b", "c\td"] and sources.texts(tmp_path / "t", limit=1) == [
        "a b"
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("x\ny\tz \n"))
    assert sources.texts("-") == ["x", "y\tz"]
    (tmp_path / "pairs").write_text("a\tb\n\nc \t d\n")
    assert sources.fields(tmp_path / "pairs", ("A", "B")) == [("a", "b"), ("c", "d")]


def test_texts_that_are_not_there_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing does not exist: give a file with one text a line"):
        sources.texts(tmp_path / "nothing")
    (tmp_path / "blank").write_text("\n  \n")
    with pytest.raises(ValueError, match="blank holds no text: one sentence a line"):
        sources.texts(tmp_path / "blank")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="the standard input holds no text"):
        sources.texts("-")
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match="latin is not text in UTF-8"):
        sources.texts(tmp_path / "latin")
    for line in ("a\tb\tc", "a", "a\t \tb\t"):
        (tmp_path / "pairs").write_text(f"x\ty\n{line}\n")
        with pytest.raises(ValueError, match=r"text 2 of .*pairs has \d fields .* but A<TAB>B was expected"):
            sources.fields(tmp_path / "pairs", ("A", "B"))


def test_latents_of_either_format(tmp_path):
    z = torch.randn(4, 5)
    np.save(tmp_path / "z.npy", z.double().numpy())
    save_file({"mu": z, "other": torch.ones(1)}, tmp_path / "z.safetensors")
    save_file({"z": z}, tmp_path / "alone.safetensors")
    for name in ("z.npy", "z.safetensors", "alone.safetensors"):
        for size in (5, None):
            found = sources.latents(tmp_path / name, size)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, z)


def test_latents_of_another_size_or_kind_are_refused(tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((4, 6), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((4, 5), np.int64))
    np.save(tmp_path / "nan.npy", np.full((4, 5), np.nan))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "z.bin").write_bytes(b"")
    (tmp_path / "z.safetensors").write_bytes(b"broken")
    messages = {
        "wide.npy": r"holds torch.float32 \[4, 6\] but floats \[N, 5\] were expected",
        "whole.npy": r"holds torch.int64 \[4, 5\]",
        "nan.npy": "holds numbers that are not finite",
        "objects.npy": "is no file of latents .*allow_pickle",
        "z.bin": "must end in .npy or .safetensors",
        "z.safetensors": "is no file of latents",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            sources.latents(tmp_path / name, 5)
    with pytest.raises(FileNotFoundError, match=r"z.npy does not exist: python -m vae_lm.embed writes"):
        sources.latents(tmp_path / "z.npy", 5)


def test_whitening_needs_statistics():
    with pytest.raises(ValueError, match=r"the model has no latent statistics to whiten by: .* --statistics"):
        sources.statistics(tiny_vae())


def test_a_run_folder_leads_to_its_model(tmp_path):
    model = tiny_vae()
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert torch.equal(open_model(tmp_path / "run").posterior_head.weight, model.posterior_head.weight)
    assert sources.model_folder(tmp_path / "run" / "model") == tmp_path / "run" / "model"
