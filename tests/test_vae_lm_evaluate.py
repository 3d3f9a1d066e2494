"""Figures of a model: their definitions, their independence of batches, the command."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_lm import TEXTS, gpt2_config, tiny_vae, tokenizers

from vae_lm import evaluate as module
from vae_lm import latent
from vae_lm.bleu import bleu, self_bleu
from vae_lm.evaluate import (
    DEFINITIONS,
    EvaluateConfig,
    bound,
    evaluate_model,
    keyed_noise,
    main,
    reconstruction,
    table,
)

RELEASED = Path(__file__).parent / "data" / "optimus" / "checkpoint_tiny"


def settings(**changes):
    return EvaluateConfig(models=("model",), data="texts", **({"num_importance": 6} | changes))


@pytest.fixture(scope="module")
def trained():
    """It says the sentences by heart, so that reconstruction figures are not all zero."""
    model = tiny_vae(decoder=gpt2_config(initializer_range=0.02, n_embd=32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(TEXTS, mode="mean", beta=0.0).loss.mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "", "  "]) + "\n")
    return tmp_path


# ---- definitions


def test_draws_belong_to_seed_sentence_and_number():
    noise = keyed_noise(3, 7, num_draws=50, dim=5)
    for fewer in (1, 2, 3, 20):
        assert torch.equal(keyed_noise(3, 7, num_draws=fewer, dim=5), noise[:fewer])
    assert not torch.equal(keyed_noise(4, 7, num_draws=50, dim=5), noise)
    assert not torch.equal(keyed_noise(3, 8, num_draws=50, dim=5), noise)
    many = torch.cat([keyed_noise(0, item, num_draws=40, dim=10) for item in range(200)])
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02


def test_figures_are_those_of_their_definitions_sentence_by_sentence():
    model = tiny_vae()
    found = evaluate_model(model, TEXTS, settings(seed=2))
    log_prob, rec, first, kls, mus = [], [], [], [], []
    for item, text in enumerate(TEXTS):
        ids = model.tokenize([text])
        with torch.no_grad():
            mu, logvar = (part.double()[0] for part in model.posterior(ids.encoder_ids))
            z = mu + keyed_noise(2, item, num_draws=6, dim=5).double() * (0.5 * logvar).exp()
            given = torch.stack([model.log_likelihood(ids.decoder_ids, one[None])[0] for one in z]).double()
        weights = given + latent.log_normal(z) - latent.log_normal(z, mu, logvar)
        log_prob.append(float(weights.logsumexp(0)) - math.log(6))
        rec.append(-float(given.mean()))
        first.append(-float(given[0]))
        kls.append(0.5 * (mu.square() + logvar.exp() - logvar - 1))
        mus.append(mu)
    tokens = sum(len(row) for row in tokenizers().decoder_rows(TEXTS))
    words = sum(len(text.split()) for text in TEXTS)
    near = {"rel": 1e-5}
    assert found["ppl_original"] == pytest.approx(math.exp(-sum(log_prob) / tokens), **near)
    assert found["ppl_token"] == pytest.approx(math.exp(-sum(log_prob) / (tokens - 6)), **near)
    assert found["ppl_word"] == pytest.approx(math.exp(-sum(log_prob) / (words + 6)), **near)
    assert found["log_prob"] == pytest.approx(sum(log_prob) / 6, **near)
    assert found["rec"] == pytest.approx(sum(rec) / 6, **near)
    assert found["kl_per_dimension"] == pytest.approx(torch.stack(kls).mean(0).tolist(), **near)
    assert found["kl"] == pytest.approx(float(torch.stack(kls).sum(1).mean()), **near)
    assert found["neg_elbo"] == pytest.approx(found["rec"] + found["kl"])
    assert found["nll_sentence"] == pytest.approx(sum(first) / 6, **near)
    assert found["nll_word"] == pytest.approx(sum(first) / (words + 6), **near)
    assert found["au"] == int((torch.stack(mus).var(0) >= 0.01).sum())
    assert found["mi_at_most"] == pytest.approx(math.log(6)) and found["mi"] <= math.log(6)


def test_no_figure_depends_on_batches():
    model = tiny_vae()
    some = settings(batch_size=4, samples_at_once=4)
    other = settings(batch_size=1, samples_at_once=1)
    first, second = (evaluate_model(model, TEXTS, config) for config in (some, other))
    for name in first.keys() - {"bleu", "sample_bleu5", "sample_self_bleu5"}:
        assert second[name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name
    assert evaluate_model(model, TEXTS, settings(seed=1))["rec"] != pytest.approx(first["rec"], rel=1e-5)


def test_the_bound_grows_with_the_draws_and_a_sentence_keeps_its_figures_in_another_set():
    model = tiny_vae()
    posterior = model.encode(TEXTS)
    few = bound(model, TEXTS, posterior, num_importance=1, seed=0)
    many = bound(model, TEXTS, posterior, num_importance=100, samples_at_once=50, seed=0)
    assert float(many.log_prob.mean()) > float(few.log_prob.mean())
    torch.testing.assert_close(few.one_draw, many.one_draw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few.one_draw, few.reconstruction)
    part = bound(model, TEXTS[:2], model.encode(TEXTS[:2]), num_importance=1, seed=0)
    torch.testing.assert_close(part.log_prob, few.log_prob[:2], rtol=1e-5, atol=1e-4)


def test_reconstruction_counts_tokens_in_place_with_the_end(trained):
    mu = trained.encode(TEXTS).mu
    found = reconstruction(trained, TEXTS, mu, batch_size=4)
    assert found.token_accuracy == found.exact == 1.0 and found.texts == TEXTS
    # One sentence told from another's latent: those tokens count that happen to stand in the same place.
    swapped = mu[[1, 0, 2, 3, 4, 5]]
    rows = [row[1:] for row in tokenizers().decoder_rows(TEXTS)]
    equal = sum(a == b for a, b in zip(rows[0], rows[1], strict=False))
    total = sum(map(len, rows))
    expected = (2 * equal + sum(map(len, rows[2:]))) / total
    found = reconstruction(trained, TEXTS, swapped)
    assert found.token_accuracy == pytest.approx(expected) and found.exact == pytest.approx(4 / 6)


def test_samples_are_scored_against_the_sentences_and_each_other(trained):
    found = evaluate_model(trained, TEXTS, settings(samples=5, reconstruct=False, seed=4))
    drawn = trained.sample(5, seed=4, do_sample=True, top_p=0.9, max_new_tokens=30)
    assert found["sample_bleu5"] == bleu(drawn, TEXTS) > 0
    assert found["sample_self_bleu5"] == self_bleu(drawn)
    assert found["token_accuracy"] is found["exact"] is found["bleu"] is None


def test_bleu_of_reconstructions_needs_a_library(trained, monkeypatch):
    asked = {}

    def corpus_bleu(found, references):
        asked.update(found=found, references=references)
        return types.SimpleNamespace(score=77.0)

    monkeypatch.setitem(sys.modules, "sacrebleu", types.SimpleNamespace(corpus_bleu=corpus_bleu))
    assert evaluate_model(trained, TEXTS, settings())["bleu"] == 77.0
    assert asked == {"found": TEXTS, "references": [TEXTS]}
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert evaluate_model(trained, TEXTS, settings())["bleu"] is None


def test_a_broken_model_is_named_by_the_sentence_that_shows_it():
    model = tiny_vae()
    posterior = model.encode(TEXTS)
    posterior.mu[4, 0] = torch.nan
    with pytest.raises(ValueError, match=r"sentence 4 \('a dog runs .'\) has log p\(x\) nan"):
        bound(model, TEXTS, posterior, num_importance=2)


# ---- command


def test_several_models_make_a_table_and_a_file(folder, capsys):
    tiny_vae(seed=1).save_pretrained(folder / "other")
    out = folder / "scores.json"
    names = [str(folder / "model"), str(folder / "other")]
    main([*names, "--data", str(folder / "texts.txt"), "--num-importance", "3", "--out", str(out)])
    printed, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert list(stored["models"]) == names and stored["num_sentences"] == 6
    assert stored["provenance"]["seed"] == 0 and stored["settings"]["num_importance"] == 3
    expected = evaluate_model(tiny_vae(seed=1), TEXTS, settings(num_importance=3))
    for name, value in expected.items():
        found = stored["models"][names[1]][name]
        assert (found is None) if value is None else (found == pytest.approx(value, rel=1e-5)), name
    lines = printed.splitlines()
    assert "6 sentences" in lines[0] and "S = 3" in lines[0] and "at most log N = 1.79" in lines[0]
    row = next(line for line in lines if line.startswith("ppl_word"))
    assert row.split()[1:3] == [f"{stored['models'][name]['ppl_word']:.4f}" for name in names]
    assert row.endswith(DEFINITIONS["ppl_word"]) and not list(folder.glob(".*"))
    assert "sample_bleu5" not in printed


def test_a_released_checkpoint_can_be_scored(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(module.sources, "open_model", lambda *given: asked.append(given) or tiny_vae())
    (tmp_path / "texts.txt").write_text("a dog runs .\nnobody is here\n")
    options = ["--encoder-tokenizer", "E", "--decoder-tokenizer", "D", "--injection", "memory", "--step", "7"]
    main([str(RELEASED), "--data", str(tmp_path / "texts.txt"), "--num-importance", "2", *options])
    ((source, released),) = asked
    assert source == str(RELEASED) and released.injection == "memory" and released.step == 7
    assert (released.encoder_tokenizer, released.decoder_tokenizer) == ("E", "D")


def test_only_the_first_sentences_if_so_told(folder, capsys):
    model = str(folder / "model")
    main([model, "--data", str(folder / "texts.txt"), "--num-importance", "1", "--num-sentences", "1"])
    printed = capsys.readouterr().out
    assert "1 sentences of" in printed and "\nau " not in printed  # one sentence has no variance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.txt"], "missing.txt does not exist"),
        (["--injection", "memory"], "is no released checkpoint"),
    ],
)
def test_mistakes_are_named(folder, options, message):
    given = [str(folder / "model"), "--data", str(folder / "texts.txt"), *options]
    with pytest.raises(SystemExit, match=message):
        main(given)


def test_a_text_over_the_limit_is_named_before_any_work(folder, monkeypatch):
    (folder / "texts.txt").write_text("a dog runs .\n" + "dog " * 40 + "\n")
    monkeypatch.setattr(module, "bound", None)
    with pytest.raises(SystemExit, match=r"text 1 \('dog dog .* special tokens included: shorten or drop it"):
        main([str(folder / "model"), "--data", str(folder / "texts.txt")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_importance": 0}, "num_importance is 0 but must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"samples": 1}, "samples is 1: give two or more"),
        ({"models": ()}, "no model was named"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**({"models": ("m",), "data": "x"} | changes))


def test_the_command_line_repeats_what_the_settings_refuse(capsys):
    with pytest.raises(SystemExit):
        main(["model", "--data", "x", "--num-importance", "0"])
    assert "num_importance is 0" in capsys.readouterr().err


def test_the_table_says_what_is_missing_for_bleu():
    figures = dict.fromkeys(DEFINITIONS, 1.0) | {"bleu": None}
    result = {"data": "x", "num_sentences": 3, "models": {"m": figures}}
    result["settings"] = {"num_importance": 2, "seed": 0, "samples": 4, "top_p": 0.9, "reconstruct": True}
    assert table(result).endswith("pip install sacrebleu") and "4 samples, top_p 0.9, 3 references" in table(
        result
    )
