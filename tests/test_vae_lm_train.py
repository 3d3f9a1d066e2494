import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, GPT2LMHeadModel, PreTrainedTokenizerFast

from fq.command import from_dict
from fq.run import newest_checkpoint, read_metrics
from tests.largest_tensor import LargestTensor
from tests.tiny_lm import TEXTS, bert_config, gpt2_config, tiny_vae, tokenizers
from vae_lm import Optimus, train, train_reports
from vae_lm.configs import NetworkConfig, ObjectiveConfig, OptimConfig, Training
from vae_lm.convert import save_released
from vae_lm.data import TokenRows, training_batches
from vae_lm.model import VAELoss
from vae_lm.presets import PRESETS
from vae_lm.train_reports import evaluate, reconstruction_accuracy
from vae_lm.train_setup import PlainGPT2, build_network, kl_weights, learning_rate, make_optimiser

LINES = [" ".join(TEXTS[number % 6].split()[: 2 + number % 7]) for number in range(23)]
SIZES = (
    "--width 16 --num-heads 2 --encoder-layers 1 --decoder-layers 2 --latent-dim 5 --max-tokens 32".split()
)
QUIET = "--sample-every 0 --eval-every 0 --log-every 1 --held-out 0 --batch-size 5 --warmup-steps 0".split()

STREAM = "--stream --held-out 0 --too-long refuse --steps 1"

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A text file and a vocabulary, and the options that name them."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    tokenizers().save(folder / "vocab")
    return ["--data", folder / "text.txt", "--vocab", folder / "vocab", "--cache", folder / "tokens"]


def run(out, *options):
    """Train in this process and return what was logged."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(["small", *SIZES, *QUIET, "--out", str(out), *map(str, options)])
    return read_metrics(out)


def refused(*arguments):
    """What the command said when it stopped with an error."""
    AcceleratorState._reset_state(reset_partial_state=True)
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said), pytest.raises(SystemExit) as stop:
        train.main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    # tyro draws a box around its messages and breaks lines in it.
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", f"{said.getvalue()} {stop.value.code}").split())


def figures(records, *names):
    return [[record[name] for name in names or ("loss", "rec", "kl", "kl_counted")] for record in records]


# What a run leaves


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        options = (
            "--steps 4 --sample-every 4 --eval-every 2 --held-out 0.4 --importance-samples 3 --log-every 2"
        )
        run(out, *given, *options.split(), "--trackers", "tensorboard")
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


def test_metrics_have_losses_schedule_and_figures_of_the_space(finished):
    records = read_metrics(finished)
    assert [record["step"] for record in records] == [2, 2, 4, 4]
    logged, valid = records[2], records[3]
    assert logged["rec"] <= logged["loss"] <= logged["rec"] + logged["kl_counted"]
    assert {"kl", "kl_counted", "beta", "lr", "grad_norm", "seconds_per_step", "tokens_per_second"} <= set(
        logged
    )
    assert logged["lr"] == pytest.approx(1e-3 / 4)
    assert valid["valid/neg_elbo"] == pytest.approx(valid["valid/rec"] + valid["valid/kl"])
    assert valid["valid/num_sentences"] == 9 and valid["valid/importance_samples"] == 3
    assert valid["valid/mi"] <= np.log(9) and 0 <= valid["valid/au"] <= 5
    assert 0 <= valid["valid/accuracy"] <= 1 and "valid/accuracy_permuted" in valid
    assert valid["valid/ppl_original"] < valid["valid/ppl_token"] < valid["valid/ppl_word"]


def test_the_model_folder_is_complete(finished):
    model = Optimus.from_pretrained(finished / "model")
    assert model.config.latent_dim == 5 and model.decoder.config.resid_pdrop == 0.1
    assert model.latent_statistics.num_sentences == 14
    mu = model.encode(LINES[:3]).mu
    assert mu.shape == (3, 5) and len(model.decode(mu, max_new_tokens=4)) == 3
    assert model.tokenizers.decoder_rows(LINES) == tokenizers().decoder_rows(LINES)


def test_samples_are_sentences_and_a_picture(finished):
    assert sorted(path.name for path in (finished / "samples").iterdir()) == [
        "000000.md", "000002.png", "000004.md", "000004.png",
    ]  # fmt: skip
    text = (finished / "samples" / "000004.md").read_text(encoding="utf-8")
    assert text.startswith("# Step 4\n\n## Samples of the prior, greedy\n")
    for part in (
        "## Reconstructions\n\n| sentence | from z = mu |",
        "## Interpolation\n\nFrom '",
        "| t | linear | slerp |",
    ):
        assert part in text
    with Image.open(finished / "samples" / "000004.png") as picture:
        assert picture.size == (600, 250)


def test_trackers_receive_figures_and_sentences(finished):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (path for path in (finished / "trackers").iterdir() if path.is_dir())
    events = reading.EventAccumulator(str(folder)).Reload()
    assert {"rec", "kl", "kl_counted", "beta", "valid/mi", "valid/au"} <= set(events.Tags()["scalars"])
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")]
    assert texts[-1] == (finished / "samples" / "000004.md").read_text(encoding="utf-8")


def test_a_finished_run_says_so_and_its_configuration_comes_back(finished, capsys):
    train.main(["--config", str(finished)])
    said = capsys.readouterr().out
    assert f"{finished} has reached step 4 already" in said
    stored = from_dict(Training, json.loads((finished / "config.json").read_text(encoding="utf-8")))
    assert stored.run.steps == 4 and stored.network.vocab


def test_the_first_line_says_what_is_trained(given, tmp_path, capsys):
    run(tmp_path / "run", *given, "--steps", 1, "--max-words", 4, "--held-out", 0.2)
    said = capsys.readouterr().out
    kept = sum(len(line.split()) <= 4 for line in LINES)
    held = round(0.2 * kept)
    assert f"training small to step 1: {kept - held} sentences, {held} held out" in said
    assert f"(left out: {23 - kept} with too many words)" in said
    assert "batches of 5 x 1, 1 process(es) on cpu" in said


# The loop


def test_accumulated_batches_count_each_sentence_once(given, tmp_path):
    """All sentences in one batch, or in several of unequal size: the same gradients."""
    options = (
        "--steps 4 --dropout 0 --posterior mean --beta 0.5 --beta-start 0.5 --limit 7 --decay none".split()
    )
    whole = run(tmp_path / "whole", *given, *options, "--batch-size", 7)
    parts = run(tmp_path / "parts", *given, *options, "--batch-size", 5, "--accumulation", 2)
    names = ("loss", "rec", "kl", "grad_norm")
    np.testing.assert_allclose(figures(parts, *names), figures(whole, *names), rtol=2e-5)
    assert whole[0]["loss"] > whole[-1]["loss"]


def test_gradient_checkpointing_changes_no_loss(given, tmp_path):
    plain = run(tmp_path / "plain", *given, "--steps", 3)
    again = run(tmp_path / "again", *given, "--steps", 3, "--gradient-checkpointing")
    np.testing.assert_allclose(figures(again), figures(plain), rtol=1e-5)


def test_bfloat16_trains_and_saves_float32(given, tmp_path):
    plain = run(tmp_path / "plain", *given, "--steps", 2, "--dropout", 0)
    half = run(
        tmp_path / "half",
        *given,
        "--steps",
        2,
        "--dropout",
        0,
        "--mixed-precision",
        "bf16",
        "--eval-every",
        2,
    )
    assert half[0]["rec"] != plain[0]["rec"]
    assert half[0]["rec"] == pytest.approx(plain[0]["rec"], rel=0.02)
    assert half[-1]["valid/rec"] > 0
    assert Optimus.from_pretrained(tmp_path / "half" / "model").dtype == torch.float32


def test_weights_of_the_kl_reach_the_loss(given, tmp_path):
    cyclic = run(tmp_path / "cyclic", *given, "--steps", 8, "--cycles", 2, "--free-bits", 0)
    expected = kl_weights(ObjectiveConfig(cycles=2), 8)
    assert [record["beta"] for record in cyclic] == expected and expected[0] == 0 and expected[3] == 1
    for record in cyclic:
        assert record["loss"] == pytest.approx(record["rec"] + record["beta"] * record["kl"])
        assert record["kl"] == pytest.approx(record["kl_counted"])
    collapse = run(tmp_path / "collapse", *given, "--steps", 1, "--cycles", 0, "--free-bits", 0.02,
                   "--head-range", 0.02)[0]  # fmt: skip
    assert collapse["beta"] == 1
    assert collapse["kl_counted"] < collapse["kl"]
    assert collapse["loss"] == pytest.approx(collapse["rec"] + collapse["kl_counted"])


def test_lengths_divide_the_reconstruction_alone(given, tmp_path):
    plain = run(tmp_path / "plain", *given, "--steps", 1, "--dropout", 0)[0]
    weighted = run(tmp_path / "weighted", *given, "--steps", 1, "--dropout", 0, "--length-weighted")[0]
    assert weighted["rec"] == pytest.approx(plain["rec"]) and weighted["kl"] == pytest.approx(plain["kl"])
    assert weighted["loss"] < plain["loss"] / 3


def test_auto_encoders_have_no_noise_or_unit_noise(given, tmp_path):
    options = ["--steps", 1, "--dropout", 0, "--beta", 0, "--seed", 3]
    first = {
        mode: run(tmp_path / mode, *given, *options, "--posterior", mode, "--eval-every", 1)
        for mode in ("sample", "unit_variance", "mean")
    }
    assert len({records[0]["rec"] for records in first.values()}) == 3
    mean, unit = first["mean"], first["unit_variance"]
    assert mean[0]["kl"] == pytest.approx(unit[0]["kl"]) and mean[0]["kl"] < first["sample"][0]["kl"] + 1
    assert "valid/neg_bound" in unit[1] and "valid/neg_bound" not in mean[1] and "valid/au" in mean[1]


@pytest.mark.parametrize("injection", ["memory", "embedding"])
def test_one_injection_alone_trains(injection, given, tmp_path):
    records = run(tmp_path / "run", *given, "--steps", 12, "--injection", injection, "--lr", 0.01)
    assert records[-1]["rec"] < records[0]["rec"]
    assert Optimus.from_pretrained(tmp_path / "run" / "model").decoder.config.injection == injection


def test_a_plain_gpt2_is_trained_for_comparison(given, tmp_path):
    options = "--no-latent --steps 12 --lr 0.01 --eval-every 12 --sample-every 12".split()
    records = run(tmp_path / "run", *given, *options)
    assert records[11]["rec"] < records[0]["rec"] and records[0]["kl"] == 0
    valid = records[-1]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "model")
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in _tiny().parameters())
    corpus = TokenRows.build(LINES, tokenizers(), max_tokens=32)
    nll = []
    for row in tokenizers().decoder_rows(LINES):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        nll.append(-float(logits.gather(-1, torch.tensor(row[1:])[:, None]).sum()))
    assert valid["valid/rec"] == pytest.approx(np.mean(nll), rel=1e-4)
    predicted = int(corpus.decoder.lengths.sum()) - 23
    assert valid["valid/ppl_token"] == pytest.approx(np.exp(sum(nll) / predicted), rel=1e-4)
    text = (tmp_path / "run" / "samples" / "000012.md").read_text(encoding="utf-8")
    assert text.startswith("# Step 12\n\n## Samples\n\n- ")


def test_a_loss_that_is_not_finite_stops(given, tmp_path, monkeypatch):
    expected = run(tmp_path / "well", *given, "--steps", 6)
    whole, calls = Optimus.forward, []

    def fails_at_the_fifth(self, *ids, **options):
        calls.append(ids)
        found = whole(self, *ids, **options)
        return found._replace(loss=found.loss * float("nan")) if len(calls) == 5 else found

    monkeypatch.setattr(Optimus, "forward", fails_at_the_fifth)
    options = ("--steps", 6, "--checkpoint-every", 2)
    with pytest.raises(SystemExit, match=r"error: loss is nan at step 5: stopped; .*checkpoints. Lower --lr"):
        run(tmp_path / "ill", *given, *options)
    assert newest_checkpoint(tmp_path / "ill").name == "step_00000004"
    monkeypatch.setattr(Optimus, "forward", whole)
    assert figures(run(tmp_path / "ill", *given, *options)) == figures(expected)


def test_weights_broken_by_an_update_do_not_reach_a_checkpoint(given, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train, "learning_rate", lambda config, step, total: 1e-3 if step < 2 else float("nan")
    )
    with pytest.raises(SystemExit, match="is not finite after step 3: stopped"):
        run(tmp_path / "run", *given, "--steps", 5, "--checkpoint-every", 1)
    assert newest_checkpoint(tmp_path / "run").name == "step_00000002"


def test_schedules_of_their_own_length_let_a_run_go_on(given, tmp_path):
    options = [*given, "--schedule-steps", 6, "--checkpoint-every", 3]
    whole = run(tmp_path / "whole", *options, "--steps", 6)
    run(tmp_path / "parts", *options, "--steps", 3)
    assert figures(run(tmp_path / "parts", *options, "--steps", 6)) == figures(whole)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(tmp_path / "fixed", *given, "--steps", 1)
    said = refused("small", *SIZES, *QUIET, *given, "--steps", 2, "--out", tmp_path / "fixed")
    assert "run.steps: stored 1, given 2" in said


def test_epochs_become_steps(given, tmp_path):
    records = run(tmp_path / "run", *given, "--epochs", 1.5, "--accumulation", 2)
    assert records[-1]["step"] == 4  # 5 batches of 23 sentences, 7.5 in all, two a step


def test_no_tensor_of_a_step_is_as_large_as_a_quarter_of_all_logits(tmp_path):
    batch, length, words = 32, 128, 50_257
    vocabulary = {f"w{number}": number for number in range(words)}
    special = ("<PAD>", "<BOS>", "<EOS>")
    made = Tokenizer(
        models.WordLevel(vocabulary | {token: words + i for i, token in enumerate(special)}, "w0")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tail = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>"
    )
    head = tokenizers().encoder
    (tmp_path / "text.txt").write_text("\n".join(f"w{i} " + "w7 " * (length - 3) for i in range(batch)))
    tail.save_pretrained(tmp_path / "decoder_tokenizer")
    head.save_pretrained(tmp_path / "encoder_tokenizer")
    options = ["--data", tmp_path / "text.txt", "--vocab", tmp_path, "--cache", "", "--max-tokens", length]
    with LargestTensor() as watched:
        records = run(tmp_path / "run", *options, "--steps", 1, "--batch-size", batch, "--width", 8)
    assert records[0]["rec"] == pytest.approx((length - 1) * np.log(words), rel=0.02)
    assert 50_260 * 8 < watched.largest < batch * length * 50_260 / 4


def test_a_few_sentences_are_learnt_by_heart(tmp_path, given):
    out = tmp_path / "run"
    (tmp_path / "six.txt").write_text("\n".join(TEXTS))
    options = (
        "--posterior mean --beta 0 --free-bits 0 --dropout 0 --steps 120 --batch-size 6 --lr 0.01 --width 32"
    )
    run(out, *given, "--data", tmp_path / "six.txt", *options.split(), "--log-every", 120)
    model = Optimus.from_pretrained(out / "model")
    corpus = TokenRows.build(TEXTS, tokenizers(), max_tokens=32)
    own, permuted = reconstruction_accuracy(model, corpus)
    assert own >= 0.99 and permuted < 0.4
    assert model.reconstruct(TEXTS) == TEXTS


# Where networks come from


def _tiny(**options):
    return tiny_vae(**options)


def test_a_vae_of_ours_or_a_released_one_goes_on(given, tmp_path):
    model = _tiny()
    model.save_pretrained(tmp_path / "ours")
    save_released(model, tmp_path / "released", step=7)
    options = [*QUIET, *given, "--steps", "1", "--dropout", "0", "--latent-dim", "5", "--max-tokens", "30"]
    options = [*map(str, options), "--posterior", "mean", "--max-words", "0"]
    found = []
    for name in ("ours", "released"):
        AcceleratorState._reset_state(reset_partial_state=True)
        train.main(["snli", *options, "--init", str(tmp_path / name), "--out", str(tmp_path / f"{name}_run")])
        found.append(read_metrics(tmp_path / f"{name}_run")[0]["rec"])
    corpus = TokenRows.build(LINES, tokenizers(), max_tokens=30)
    first = next(training_batches(corpus, batch_size=5, seed=42))
    with torch.no_grad():
        expected = model.loss(first.batch, mode="mean").reconstruction.mean()
    assert found == pytest.approx([float(expected)] * 2, rel=1e-5)
    # Its own tokenisers, if no others are named.
    AcceleratorState._reset_state(reset_partial_state=True)
    cut = options.index("--vocab")
    train.main(
        [
            "snli",
            *options[:cut],
            *options[cut + 2 :],
            "--init",
            str(tmp_path / "ours"),
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert read_metrics(tmp_path / "x")[0]["rec"] == found[0]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder / "bert")
    GPT2LMHeadModel(gpt2_config()).save_pretrained(folder / "gpt2")
    tokenizers().encoder.save_pretrained(folder / "bert")
    tokenizers().decoder.save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.parametrize("latent", [True, False])
def test_pre_trained_networks_are_taken_up(latent, pretrained, given, tmp_path):
    given = given[:2] + given[4:]  # their own tokenisers
    options = ["--encoder", pretrained / "bert", "--decoder", pretrained / "gpt2", "--max-tokens", 31]
    options += ["--lr", 1e-9, "--steps", 1, "--latent" if latent else "--no-latent"]
    arguments = ["ptb", *QUIET, *given, *options, "--out", tmp_path / "run"]
    train.main([str(argument) for argument in arguments])
    if latent:
        model = Optimus.from_pretrained(tmp_path / "run" / "model")
        weights = (model.encoder.embeddings.word_embeddings.weight, model.decoder.transformer.wte.weight)
        sources = (
            BertModel.from_pretrained(pretrained / "bert"),
            GPT2LMHeadModel.from_pretrained(pretrained / "gpt2"),
        )
        theirs = (sources[0].embeddings.word_embeddings.weight, sources[1].transformer.wte.weight)
        for ours, old in zip(weights, theirs, strict=True):
            torch.testing.assert_close(ours, old, atol=1e-7, rtol=0)
        assert model.encoder.config.hidden_dropout_prob == 0.1
    else:
        assert GPT2LMHeadModel.from_pretrained(tmp_path / "run" / "model").config.n_embd == 24


def test_presets_hold_the_numbers_of_the_paper():
    for name in ("ptb", "snli", "yahoo", "yelp", "wikipedia"):
        preset = PRESETS[name][1]
        optim, objective = preset.optim, preset.objective
        assert (optim.lr, optim.adam_eps, optim.weight_decay, optim.warmup_steps) == (5e-5, 1e-8, 0, 0)
        assert (optim.decay, optim.max_grad_norm, optim.beta1, optim.beta2) == ("linear", 1.0, 0.9, 0.999)
        assert (objective.zero_share, objective.rise_share, objective.beta) == (0.5, 0.25, 1.0)
        assert objective.cycles == (10 if name == "wikipedia" else 1)
        network = preset.network
        assert (network.latent_dim, network.injection, network.dropout) == (32, "both", 0.1)
        assert (network.encoder, network.decoder, preset.run.seed) == ("bert-base-cased", "gpt2", 42)
    blocks = {name: PRESETS[name][1].text.max_words for name in ("ptb", "snli", "yahoo", "yelp")}
    assert blocks == {"ptb": 100, "snli": 100, "yahoo": 300, "yelp": 300}
    assert [PRESETS[name][1].text.labelled for name in ("yahoo", "yelp")] == [False, True]
    wikipedia = PRESETS["wikipedia"][1]
    assert (wikipedia.optim.batch_size, wikipedia.run.steps, wikipedia.text.max_tokens) == (128, 508_523, 256)


# Optimiser and schedules


def test_only_matrices_decay():
    network = _tiny()
    optimiser = make_optimiser(network, OptimConfig(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying, resting = ({names[id(p)] for p in group["params"]} for group in optimiser.param_groups)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.1, 0.0]
    assert decaying | resting == set(names.values())
    norms = {name for name in names.values() if "LayerNorm" in name or "ln_" in name}
    assert resting == norms | {name for name in names.values() if name.endswith("bias")}
    assert any("ln_1.weight" in name for name in resting)
    assert "posterior_head.weight" in decaying


def test_learning_rate_rises_and_falls():
    config = OptimConfig(lr=1.0)
    assert [learning_rate(config, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    config = OptimConfig(lr=1.0, warmup_steps=2)
    assert [learning_rate(config, step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    config = OptimConfig(lr=1.0, warmup_steps=2, decay="none")
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_a_run_shorter_than_its_cycles_still_has_weights():
    assert kl_weights(ObjectiveConfig(cycles=10), 2) == [0.0, 0.0]
    assert kl_weights(ObjectiveConfig(cycles=0, beta=0.3), 2) == [0.3, 0.3]


def test_dropout_is_what_was_asked_for():
    config = NetworkConfig(width=16, encoder_layers=1, decoder_layers=1, num_heads=2, dropout=0.25)
    for network in (build_network(config, tokenizers(), max_tokens=16),
                    build_network(replace(config, latent=False), tokenizers(), max_tokens=16)):  # fmt: skip
        found = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
        assert found and set(found) == {0.25}
        assert network.training


# Evaluation


def test_evaluation_is_repeatable_and_consistent():
    model = _tiny()
    corpus = TokenRows.build(LINES, tokenizers(), max_tokens=32)
    once, again = (evaluate(model, corpus, num_samples=7, seed=4) for _ in range(2))
    assert once.figures == again.figures and torch.equal(once.kl, again.kl)
    other = evaluate(model, corpus, num_samples=7, seed=5)
    assert other.figures["neg_bound"] != once.figures["neg_bound"]
    batch = tokenizers().batch(LINES)
    mu, logvar = model.posterior(batch.encoder_ids)
    kl = (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean(0)
    torch.testing.assert_close(once.kl, kl.detach(), atol=1e-5, rtol=1e-4)
    assert once.figures["kl"] == pytest.approx(float(kl.sum().detach()), rel=1e-4)
    torch.testing.assert_close(once.variance, mu.detach().double().var(0), atol=1e-6, rtol=1e-4)
    assert once.figures["neg_bound"] < once.figures["neg_elbo"] + 0.2
    assert not model.training
    rec = evaluate(model, corpus, posterior="mean").figures["rec"]
    expected = -model.log_likelihood(batch.decoder_ids, mu).mean()
    assert rec == pytest.approx(float(expected.detach()), rel=1e-4)
    unit = evaluate(model, corpus, posterior="unit_variance", num_samples=2).figures["kl"]
    assert unit == pytest.approx(float((0.5 * mu**2).mean(0).sum().detach()), rel=1e-4)


def test_accuracy_counts_tokens_in_place(monkeypatch):
    model, corpus = _tiny().train(), TokenRows.build(TEXTS, tokenizers(), max_tokens=32)
    truth = tokenizers().batch(TEXTS).decoder_ids
    mu = model.eval().posterior(tokenizers().batch(TEXTS).encoder_ids).mu
    model.train()

    def says_what_belongs_to(_, latents, length):
        """The sentence of each latent, with its second token wrong."""
        rows = [int((mu - z).abs().sum(1).argmin()) for z in latents]
        said = torch.nn.functional.pad(truth, (0, 40), value=0)[rows, 1 : 1 + length]
        said[:, 1] = -1
        return said

    monkeypatch.setattr(train_reports, "_greedy", says_what_belongs_to)
    own, permuted = reconstruction_accuracy(model, corpus)
    total = int(corpus.decoder.lengths.sum()) - len(TEXTS)
    assert own == pytest.approx(1 - len(TEXTS) / total)
    assert permuted < 0.4
    assert model.training


# Bad input


@pytest.fixture(scope="module")
def places(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "one.txt").write_text("a man\n")
    (folder / "tokens.json").write_text("[]")
    (folder / "full").mkdir()
    (folder / "full" / "note.txt").write_text("mine")
    _tiny().save_pretrained(folder / "vae")
    bare = _tiny(tokenizers=None)
    bare.save_pretrained(folder / "bare")
    other = tokenizers.__wrapped__()
    other.decoder.add_tokens(["zebra"])
    other.save(folder / "other")
    return {"FOLDER": str(folder), "TEXT": str(given[1]), "VOCAB": str(given[3])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("small --data FOLDER/empty.txt", "empty.txt holds no sentence: one a line was expected"),
        ("small --data FOLDER/none.txt", "no text at .*none.txt: give a file, or a folder"),
        ("small --data TEXT --max-words 3 --too-long refuse", "words but at most 3 are allowed"),
        ("small --data TEXT --max-words 1", "no sentence left to train on .0 empty, 23 too long."),
        ("small --data TEXT --vocab VOCAB --max-tokens 5 --too-long refuse", "tokens but at most 5 "),
        ("small --data FOLDER/one.txt", "1 sentences cannot spare 2 to evaluate on: give more, or"),
        ("small --data TEXT --valid FOLDER/empty.txt", "empty.txt holds no sentence"),
        ("small --data TEXT --valid FOLDER/full", "full holds no held-out sentence"),
        ("small --data TEXT --vocab FOLDER/nothing", "no tokeniser at .*nothing"),
        ("small --data TEXT --vocab a b c", "vocab names 3 tokenisers: give the encoder's and the decoder's"),
        ("small --data TEXT --width 0", "made anew have sizes of at least 1, but these are .*'width': 0"),
        ("small --data TEXT --width 30", "width 30 is not a multiple of num_heads 4"),
        ("small --data TEXT --encoder bert", "give both --encoder and --decoder, or neither"),
        ("small --data TEXT --init FOLDER/vae", "sizes .* are for networks made anew, but .*vae has its own"),
        (
            "snli --data TEXT --init FOLDER/vae --pooling mean --head-range 0.5",
            "pooling and head_range cannot be chosen for what .*vae brings",
        ),
        ("snli --data TEXT --initializer-range 0.1", "initializer_range cannot be chosen for what bert-base"),
        ("snli --data TEXT --init FOLDER/vae --no-latent", "--no-latent trains a plain GPT-2, which --init"),
        ("snli --data TEXT --init FOLDER/vae", "latent_dim is 32 but that of .*vae is 5: pass --latent-dim"),
        ("snli --data TEXT --init FOLDER/vae --latent-dim 5 --injection memory", "injection is 'memory' but"),
        ("snli --data TEXT --init FOLDER/vae --latent-dim 5", "max_tokens is 200 but the networks take 31"),
        ("snli --data TEXT --init FOLDER/vae --vocab FOLDER/other", "decoder's tokeniser has .* but the de"),
        ("snli --data TEXT --init FOLDER/bare", "bare has no tokenisers: give --vocab ENCODER DECODER"),
        ("snli --data TEXT --init FOLDER/full --vocab VOCAB", "full holds no config.json"),
        ("small --data TEXT --dropout 1", "dropout is 1.0: give a probability from 0 to below 1"),
        ("small --data TEXT --lr 0", "lr is 0.0: give a finite number above 0"),
        ("small --data TEXT --beta1 1", "beta1 is 1.0: give a factor from 0 to below 1"),
        ("small --data TEXT --free-bits -1", "free_bits is -1.0: give at least 0"),
        ("small --data TEXT --beta-start 2", "beta_start is 2.0 but beta 1.0: the weight must not fall"),
        ("small --data TEXT --rise-share 0", "rise_share 0.0: give shares of a cycle"),
        ("small --data TEXT --held-out 1", "held_out is 1.0: give a share from 0 to below 1"),
        ("small --data TEXT --max-tokens 2", "max_tokens is 2: give at least 3"),
        ("small --data TEXT --steps 9 --schedule-steps 8", "steps is 9 but the schedules end at "),
        ("small --data TEXT --seed 4294967296", r"seed is 4294967296: give a number below 2\*\*32"),
        ("small --data TEXT --num-eval 1", "num_eval is 1: give at least 2"),
        ("small --data TEXT --batch-size 0", "batch_size is 0: give at least 1"),
        ("small --data TEXT --trackers abacus", "tracker 'abacus' is unknown: accelerate knows"),
        ("small --data TEXT --stream --steps 1", "a stream takes its files as they are, but held_out would"),
        ("wikipedia --data TEXT --too-long drop", "a stream takes its files as they are, but too_long would"),
        ("wikipedia --data TEXT --steps 0", "the length of a stream is not known beforehand: give --steps"),
        (f"small {STREAM} --data FOLDER/tokens.json", "tokens.json has no text to learn a vocabulary from"),
        (f"small {STREAM} --data FOLDER/none", "no text at .*none: give a file, or a folder"),
        (f"small {STREAM} --data TEXT --vocab VOCAB --shuffle-buffer 2", "shuffle_buffer is 2 but must hold"),
        ("grammar --stream", "the grammar is in memory anyway: leave out --stream"),
        ("--config", "--config needs a run folder or a config.json after it"),
        ("--config FOLDER", "no configuration at"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_before_anything_is_written(options, message, places, tmp_path):
    for name, value in places.items():
        options = options.replace(name, value)
    arguments = options.split()
    if not options.startswith("--config"):
        arguments += ["--out", str(tmp_path / "run"), "--cache", ""]
    assert re.search(message, refused(*arguments))
    assert not (tmp_path / "run").exists()


def test_folders_of_something_else_are_left_as_they_were(places, given, finished, tmp_path):
    full = Path(places["FOLDER"]) / "full"
    said = refused("small", *SIZES, *QUIET, *given, "--steps", 1, "--out", full)
    assert "has no config.json but other things (note.txt): use another --out" in said
    assert [path.name for path in full.iterdir()] == ["note.txt"]
    said = refused("--config", finished, "--lr", "0.5")
    assert "holds a run with another configuration (optim.lr: stored 0.001, given 0.5)" in said


def test_a_resumed_run_wants_the_sentences_it_began_with(given, tmp_path):
    out, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("\n".join(LINES))
    run(out, *given, "--data", text, "--steps", 1)
    moved = tmp_path / "moved.txt"
    text.rename(moved)
    run(out, *given, "--data", moved, "--steps", 1)
    moved.write_text("\n".join([*LINES[:-1], "a dog"]))
    said = refused("small", *SIZES, *QUIET, *given, "--data", moved, "--steps", 1, "--out", out)
    assert f"{out} was started with other sentences than {moved} holds now" in said


def test_a_missing_tracker_is_named(given, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    said = refused("small", *SIZES, *given, "--trackers", "wandb", "--out", tmp_path / "run")
    assert "tracker 'wandb' is not installed: pip install wandb" in said


def test_a_configuration_of_another_version_is_refused(finished, tmp_path):
    stored = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    stored["objective"]["lambda"] = stored["objective"].pop("free_bits")
    (tmp_path / "config.json").write_text(json.dumps(stored))
    said = refused("--config", tmp_path)
    assert "configuration of ObjectiveConfig has unknown keys ['lambda'] and lacks ['free_bits']" in said


def test_the_plain_model_counts_like_the_vae():
    torch.manual_seed(0)
    plain = PlainGPT2(GPT2LMHeadModel(gpt2_config())).eval()
    batch = tokenizers().batch(TEXTS)
    found = plain(*batch, beta=1.0, length_weighted=True)
    assert isinstance(found, VAELoss)
    lengths = torch.tensor([len(row) for row in tokenizers().decoder_rows(TEXTS)])
    assert torch.equal(found.num_tokens, lengths)
    torch.testing.assert_close(found.loss * lengths, found.reconstruction)
    alone = plain(*tokenizers().batch(TEXTS[3:4]))
    torch.testing.assert_close(alone.loss, found.reconstruction[3:4])
