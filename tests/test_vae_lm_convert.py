"""Released checkpoints: read in both layouts, refused where they could run code, written back."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import TEXTS, bert_config, gpt2_config, tiny_vae, tokenizers

from vae_lm import Optimus, TextTokenizers
from vae_lm.convert import from_released, main, rename_released, save_released, to_released

RELEASED = Path(__file__).parent / "data" / "optimus" / "checkpoint_tiny"


def expected(name):
    with np.load(RELEASED / "expected.npz") as stored:
        return torch.from_numpy(stored[name])


def copied(tmp_path):
    """A copy to damage."""
    shutil.copytree(RELEASED, tmp_path / "released")
    for path in (tmp_path / "released").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "released"


def rewritten(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path, _use_new_zipfile_serialization=False)


def equal_states(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("layout", ["folders", "full"])
def test_both_layouts_give_the_outputs_of_the_original(layout):
    model = from_released(RELEASED, layout=layout)
    assert not model.training
    with torch.no_grad():
        mu, logvar = model.posterior(expected("bert_ids"))
        logits = model.decoder(expected("gpt_ids"), mu).logits
        rec = -model.log_likelihood(expected("gpt_ids"), mu)
    for name, value in (("mu", mu), ("logvar", logvar), ("logits_at_mu", logits), ("rec_at_mu", rec)):
        torch.testing.assert_close(value, expected(name), atol=1e-4, rtol=1e-4)
    assert model.decoder.config.pad_token_id == int(expected("pad")) == 50
    assert (model.decoder.config.bos_token_id, model.decoder.config.eos_token_id) == (51, 52)


def test_auto_takes_the_folders_and_falls_back_to_the_full_file(tmp_path):
    released = copied(tmp_path)
    (released / "checkpoint-full-120" / "training.bin").unlink()
    folders = from_released(released)
    shutil.copy(RELEASED / "checkpoint-full-120" / "training.bin", released / "checkpoint-full-120")
    (released / "checkpoint-encoder-120" / "pytorch_model.bin").unlink()
    assert equal_states(folders, from_released(released))


def test_injection_is_what_was_asked_for():
    for injection, left in (("memory", "memory_projection"), ("embedding", "embedding_projection")):
        model = from_released(RELEASED, injection=injection)
        names = [name for name in model.state_dict() if "projection" in name]
        assert names == [f"decoder.{left}.weight"] and model.decoder.config.injection == injection
    both = from_released(RELEASED)
    mu = expected("mu")
    logits = [
        from_released(RELEASED, injection=name).decoder(expected("gpt_ids"), mu).logits
        for name in ("memory",)
    ]
    assert not torch.allclose(both.decoder(expected("gpt_ids"), mu).logits, logits[0], atol=1e-2)


def test_names_from_tensorflow_and_old_buffers_are_understood(tmp_path):
    released = copied(tmp_path)

    def old(state):
        for key in [key for key in state if "LayerNorm" in key]:
            state[key.replace("weight", "gamma").replace("bias", "beta")] = state.pop(key)
        state["embeddings.position_ids"] = torch.arange(64)[None]

    rewritten(released / "checkpoint-encoder-120" / "pytorch_model.bin", old)
    assert equal_states(from_released(released), from_released(RELEASED))
    c_attn = [key for key in from_released(RELEASED).state_dict() if key.endswith("c_attn.bias")]
    assert len(c_attn) == 2  # ends like the buffer that is dropped


def test_a_decoder_saved_before_the_special_tokens_gets_them(tmp_path):
    model = tiny_vae(
        decoder=gpt2_config(vocab_size=50260, n_embd=4, n_head=1, n_layer=1, initializer_range=0.02),
        tokenizers=None,
    )
    save_released(model, tmp_path, step=1)
    path = tmp_path / "checkpoint-decoder-1" / "pytorch_model.bin"

    def shorten(state):
        for key in ("lm_head.weight", "transformer.wte.weight"):
            state[key] = state[key][:-3].clone()

    rewritten(path, shorten)
    fresh = from_released(tmp_path).decoder
    assert fresh.config.vocab_size == 50260 and fresh.config.pad_token_id == 50257
    words = fresh.transformer.wte.weight
    assert torch.equal(words[:-3], model.decoder.transformer.wte.weight[:-3])
    assert not torch.equal(words[-3:], model.decoder.transformer.wte.weight[-3:]) and words[-3:].std() < 0.05
    assert fresh.lm_head.weight is words


def test_tokenisers_come_along(tmp_path):
    model = tiny_vae(decoder=gpt2_config(bos_token_id=1))
    size = len(tokenizers().decoder)
    with pytest.raises(ValueError, match=rf"the decoder has 53 tokens but its tokeniser {size}"):
        from_released(RELEASED, tokenizers=tokenizers())
    # The original's special tokens are its last ones; ours are the first three.
    save_released(model, tmp_path, step=2)
    again = from_released(tmp_path, tokenizers=tokenizers())
    assert again.reconstruct(TEXTS, max_new_tokens=5) == model.reconstruct(TEXTS, max_new_tokens=5)


# ---- and back


def test_writing_back_gives_the_same_files(tmp_path):
    model = from_released(RELEASED)
    save_released(model, tmp_path, step=120)
    for network in ("encoder", "decoder"):
        place = f"checkpoint-{network}-120"
        one, two = (
            torch.load(root / place / "pytorch_model.bin", weights_only=True) for root in (RELEASED, tmp_path)
        )
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        before, after = (
            json.loads((root / place / "config.json").read_text()) for root in (RELEASED, tmp_path)
        )
        assert len(after) > 9 and after.items() == {key: before[key] for key in after}.items()
        # A zip would start with PK; the original's PyTorch cannot read one.
        assert (tmp_path / place / "pytorch_model.bin").read_bytes()[:2] == b"\x80\x02"
    assert equal_states(from_released(tmp_path, layout="full"), model)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_model_with_memory_alone_is_the_same_with_both_injections_on(tmp_path):
    model = tiny_vae(injection="memory")
    save_released(model, tmp_path, step=1)
    again = from_released(tmp_path, tokenizers=tokenizers())
    ids, z = torch.tensor([[1, 40, 50]]), torch.randn(1, 5)
    torch.testing.assert_close(again.decoder(ids, z).logits, model.decoder(ids, z).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_memory_slots": 2}, "it has 2 memory slots"), ({"pooling": "mean"}, "its pooling is 'mean'")],
)
def test_what_the_original_cannot_hold_is_not_written(options, message):
    with pytest.raises(ValueError, match=f"the original cannot hold this model: {message}"):
        to_released(tiny_vae(**options))


# ---- what is refused


class _RunsACommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["checkpoint-encoder-120/pytorch_model.bin", "checkpoint-full-120/training.bin"]
)
def test_code_in_a_file_is_refused_and_not_run(tmp_path, name):
    released = copied(tmp_path)
    content = {"model_state_dict": {}, "args": argparse.Namespace(run=_RunsACommand(tmp_path / "made"))}
    torch.save(content, released / name, _use_new_zipfile_serialization=False)
    layout = "full" if "full" in name else "folders"
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values, which is not loaded"):
        from_released(released, layout=layout)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, share):
    path = copied(tmp_path) / "checkpoint-decoder-120" / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"checkpoint-decoder-120/pytorch_model\.bin is damaged"):
        from_released(path.parents[1])


def test_missing_files_and_ambiguous_steps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint-encoder-S"):
        from_released(tmp_path)
    released = copied(tmp_path)
    shutil.copytree(released / "checkpoint-encoder-120", released / "checkpoint-encoder-90")
    with pytest.raises(ValueError, match="holds the steps 90, 120: choose one"):
        from_released(released)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-decoder-90/config\.json does not exist"):
        from_released(released, step=90)
    (released / "checkpoint-full-120" / "training.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.bin does not exist"):
        from_released(released, step=120, layout="full")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds a JSON list")])
def test_a_configuration_that_is_none_is_refused(tmp_path, text, message):
    released = copied(tmp_path)
    (released / "checkpoint-encoder-120" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_released(released)


@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        (
            "encoder",
            lambda s: s.pop("linear.weight"),
            r"lacks encoder\.linear\.weight: an Optimus VAE was expected",
        ),
        (
            "decoder",
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}),
            r"differ but the original ties them",
        ),
        ("decoder", lambda s: s.pop("transformer.h.1.ln_1.bias"), r"transformer\.h\.1\.ln_1\.bias"),
        (
            "decoder",
            lambda s: s.update({"extra": torch.zeros(1)}),
            r"decoder\.extra missing, unknown or of another",
        ),
        (
            "encoder",
            lambda s: s.update({"pooler.dense.bias": torch.zeros(3)}),
            r"pooler\.dense\.bias missing, unkn",
        ),
        (
            "encoder",
            lambda s: s.update({"epoch": 3}),
            "holds a (Ordered)?[dD]ict but tensors by name were expected",
        ),
    ],
)
def test_weights_that_are_no_optimus_are_refused(tmp_path, network, change, message):
    released = copied(tmp_path)
    rewritten(released / f"checkpoint-{network}-120" / "pytorch_model.bin", change)
    with pytest.raises(ValueError, match=message):
        from_released(released)


def test_a_classifier_that_lost_its_latent_is_named():
    state = {f"encoder.bert.{name}": torch.zeros(1) for name in ("a", "b")}
    with pytest.raises(ValueError, match=r"a classifier's checkpoint keeps its encoder below 'bert.'"):
        rename_released(state)


def test_training_file_without_a_model_is_refused(tmp_path):
    released = copied(tmp_path)
    torch.save({"iter": 3}, released / "checkpoint-full-120" / "training.bin")
    with pytest.raises(ValueError, match=r"has no model_state_dict"):
        from_released(released, layout="full")


# ---- command line


def test_the_command_converts_there_and_back(tmp_path, capsys):
    both = tokenizers()
    both.save(tmp_path / "words")
    model = tiny_vae(decoder=gpt2_config(), encoder=bert_config())
    save_released(model, tmp_path / "released", step=5)
    named = ["--encoder-tokenizer", str(tmp_path / "words/encoder_tokenizer")]
    named += ["--decoder-tokenizer", str(tmp_path / "words/decoder_tokenizer")]
    main([str(tmp_path / "released"), str(tmp_path / "ours"), *named])
    assert "parameters, latent 5, written to" in capsys.readouterr().out
    ours = Optimus.from_pretrained(tmp_path / "ours")
    assert isinstance(ours.tokenizers, TextTokenizers)
    assert ours.reconstruct(TEXTS, max_new_tokens=5) == model.reconstruct(TEXTS, max_new_tokens=5)
    main([str(tmp_path / "ours"), str(tmp_path / "back"), "--back", "--step", "6"])
    assert equal_states(from_released(tmp_path / "back", step=6), model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--back"], "--back needs --step"),
        (["--encoder-tokenizer", "x"], "give both --encoder-tokenizer and --decoder-tokenizer"),
        (
            ["--back", "--step", "3", "--encoder-tokenizer", "x", "--decoder-tokenizer", "y"],
            "takes no tokenisers",
        ),
        ([], "holds no checkpoint-encoder-S"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), str(tmp_path / "out"), *arguments])
    said = f"{stopped.value} {capsys.readouterr().err}"
    assert message in " ".join(said.replace("│", " ").split())
