"""The sentence VAE: losses, texts in and out, its folder, what it needs of memory, what it refuses."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lm import TEXTS, bert_config, gpt2_config, tiny_vae, tokenizers
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel, DistilBertConfig, GPT2LMHeadModel

from vae_lm import Batch, LatentStatistics, Optimus, OptimusConfig, Posterior, TextTokenizers, latent

NOISE = torch.randn(len(TEXTS), 5, generator=torch.Generator().manual_seed(7))


def equal_states(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ---- losses


def test_loss_is_reconstruction_and_weighted_kl_of_one_draw():
    model = tiny_vae()
    batch = model.tokenize(TEXTS)
    found = model.loss(batch, beta=0.3, free_bits=0.4, noise=NOISE)
    mu, logvar = model.posterior(batch.encoder_ids)
    z = mu + NOISE * (0.5 * logvar).exp()
    log_probs = model.decoder(batch.decoder_ids, z).logits.log_softmax(-1)
    for index, row in enumerate(batch.decoder_ids):
        length = int((row != 0).sum())
        expected = -sum(log_probs[index, t - 1, row[t]] for t in range(1, length))
        torch.testing.assert_close(found.reconstruction[index], expected, atol=1e-3, rtol=1e-4)
        assert found.num_tokens[index] == length
    kl = latent.kl_per_dimension(mu, logvar)
    torch.testing.assert_close(found.kl, kl.sum(-1))
    torch.testing.assert_close(found.kl_counted, (kl * (kl > 0.4)).sum(-1))
    torch.testing.assert_close(found.loss, found.reconstruction + 0.3 * found.kl_counted)


def test_length_weighting_divides_the_reconstruction_alone():
    model = tiny_vae()
    plain = model.loss(TEXTS, beta=0.3, noise=NOISE)
    weighted = model.loss(TEXTS, beta=0.3, noise=NOISE, length_weighted=True)
    torch.testing.assert_close(weighted.reconstruction, plain.reconstruction)
    expected = plain.reconstruction / plain.num_tokens + 0.3 * plain.kl
    torch.testing.assert_close(weighted.loss, expected)


def test_modes_of_the_posterior():
    model = tiny_vae()
    batch = model.tokenize(TEXTS)
    mu, _ = model.posterior(batch.encoder_ids)
    point = model.loss(batch, mode="mean")
    torch.testing.assert_close(point.reconstruction, -model.log_likelihood(batch.decoder_ids, mu))
    torch.testing.assert_close(point.kl, mu.square().sum(-1) / 2)
    unit = model.loss(batch, mode="unit_variance", noise=NOISE)
    torch.testing.assert_close(unit.reconstruction, -model.log_likelihood(batch.decoder_ids, mu + NOISE))


def test_a_sentence_does_not_depend_on_the_others_in_its_batch():
    model = tiny_vae()
    together = model.loss(TEXTS, noise=NOISE)
    for index, text in enumerate(TEXTS):
        alone = model.loss([text], noise=NOISE[index : index + 1])
        torch.testing.assert_close(alone.loss, together.loss[index : index + 1], atol=1e-3, rtol=1e-5)


def test_several_latents_a_sentence():
    model = tiny_vae()
    ids = model.tokenize(TEXTS[:2]).decoder_ids
    z = torch.randn(2, 3, 5)
    found = model.log_likelihood(ids, z)
    assert found.shape == (2, 3)
    for draw in range(3):
        torch.testing.assert_close(found[:, draw], model.log_likelihood(ids, z[:, draw]))


def test_every_weight_gets_a_gradient_with_either_injection():
    for injection in ("both", "memory", "embedding"):
        model = tiny_vae(injection=injection).train()
        model.loss(TEXTS).loss.mean().backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_a_few_steps_learn_sentences_by_heart():
    model = tiny_vae(decoder=gpt2_config(initializer_range=0.02, n_embd=32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(TEXTS, mode="mean", beta=0.0).loss.mean().backward()
        optimizer.step()
    assert model.reconstruct(TEXTS) == TEXTS
    posterior = model.encode(TEXTS)
    assert model.decode(posterior.mu.roll(1, 0)) == [TEXTS[-1], *TEXTS[:-1]]


class _Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation gives, forward or backward."""

    def __init__(self):
        super().__init__()
        self.size, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.numel() > self.size:
                self.size, self.name = value.numel(), str(func)
        return result


def test_a_training_step_never_holds_a_quarter_of_the_logits():
    batch, length, vocabulary = 32, 128, 50260
    special = {"pad_token_id": 50257, "bos_token_id": 50258, "eos_token_id": 50259}
    model = tiny_vae(
        encoder=bert_config(vocab_size=90, max_position_embeddings=128),
        decoder=gpt2_config(vocab_size=vocabulary, n_positions=130, n_embd=8, n_layer=1, n_head=1, **special),
        tokenizers=None,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = Batch(torch.randint(4, 90, (batch, length)), torch.randint(vocabulary - 3, (batch, length)))
    with _Largest() as largest:
        model.loss(rows, free_bits=0.5).loss.mean().backward()
        optimizer.step()
    assert largest.size < batch * length * vocabulary / 4, largest.name
    with _Largest() as largest:  # and the measurement sees logits that are whole
        model.decoder(rows.decoder_ids[:8], torch.zeros(8, 5))
    assert largest.size == 8 * length * vocabulary


# ---- encoder


@pytest.mark.parametrize("pooling", ["pooler", "first", "mean"])
def test_pooling_of_the_encoder(pooling):
    model = tiny_vae(pooling=pooling)
    ids = model.tokenize(TEXTS).encoder_ids
    output = model.encoder(input_ids=ids, attention_mask=(ids != 0).long())
    states, kept = output.last_hidden_state, (ids != 0)[..., None]
    feature = {
        "pooler": lambda: output.pooler_output,
        "first": lambda: states[:, 0],
        "mean": lambda: (states * kept).sum(1) / kept.sum(1),
    }[pooling]()
    torch.testing.assert_close(torch.cat(model.posterior(ids), -1), feature @ model.posterior_head.weight.t())
    assert any("pooler" in name for name, _ in model.named_parameters()) == (pooling == "pooler")


def test_an_encoder_without_a_pooler_needs_another_pooling():
    config = DistilBertConfig(
        vocab_size=len(tokenizers().encoder), dim=16, n_layers=1, n_heads=2, hidden_dim=16
    )
    with pytest.raises(
        ValueError, match="a distilbert encoder has no pooler: choose pooling 'first' or 'mean'"
    ):
        tiny_vae(encoder=config)
    assert tiny_vae(encoder=config, pooling="mean").encode(TEXTS).mu.shape == (len(TEXTS), 5)


def test_encoding_sorts_and_splits_without_a_trace():
    model = tiny_vae().train()
    whole, parts = model.encode(TEXTS), model.encode(TEXTS, batch_size=2)
    assert model.training and isinstance(whole, Posterior) and not whole.mu.requires_grad
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(whole.mu[index], model.encode([text]).mu[0], atol=1e-5, rtol=1e-4)
    assert model.encode([]).logvar.shape == (0, 5)


# ---- texts out


def test_decoding_is_greedy_and_in_batches():
    model = tiny_vae()
    mu = model.encode(TEXTS).mu
    found = model.decode(mu, max_new_tokens=6)
    assert (
        found
        == model.decode(mu, max_new_tokens=6, batch_size=4)
        == model.reconstruct(TEXTS, max_new_tokens=6)
    )
    ids = model.decoder.generate(
        torch.ones(6, 1, dtype=torch.int64), latents=mu, max_new_tokens=6, do_sample=False
    )
    assert found == tokenizers().texts(ids)
    assert len(set(found)) > 1
    assert model.decode(mu[:0]) == []


def test_sampling_repeats_with_a_seed_and_leaves_other_random_numbers_alone():
    model = tiny_vae()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    first, second = model.sample(2, seed=4, **options), model.sample(2, seed=4, **options)
    assert first == second and len(first) == 6 and len(set(first)) > 1
    assert model.sample(2, seed=5, **options) != first
    assert torch.equal(torch.rand(3), expected)


def test_sampling_without_filters_can_say_anything():
    model = tiny_vae(decoder=gpt2_config(initializer_range=0.001))
    z = torch.zeros(500, 5)
    some = model.decode(z, do_sample=True, max_new_tokens=1, seed=0, batch_size=500)
    few = model.decode(z, do_sample=True, max_new_tokens=1, seed=0, batch_size=500, top_k=3)
    assert len(set(few)) <= 3 and len(set(some)) > 60


def test_interpolation_goes_from_one_reconstruction_to_the_other():
    model = tiny_vae()
    way = model.interpolate(TEXTS[0], TEXTS[1], steps=4, max_new_tokens=6)
    assert len(way) == 5
    assert [way[0], way[-1]] == model.reconstruct(TEXTS[:2], max_new_tokens=6)
    mu = model.encode(TEXTS[:2]).mu
    assert way[2] == model.decode(mu.mean(0, keepdim=True), max_new_tokens=6)[0]
    round_way = latent.interpolate(*mu, steps=4, mode="slerp")
    assert model.interpolate(*TEXTS[:2], steps=4, mode="slerp", max_new_tokens=6) == model.decode(
        round_way, max_new_tokens=6
    )


def test_analogies_of_texts_and_of_lists():
    model = tiny_vae()
    a, b, c = (model.encode([text]).mu for text in TEXTS[:3])
    expected = model.decode(c + 2 * (b - a), max_new_tokens=6)
    assert model.analogy(*TEXTS[:3], scale=2.0, max_new_tokens=6) == expected[0]
    both = model.analogy(TEXTS[:2], TEXTS[1:3], TEXTS[2:4], scale=2.0, max_new_tokens=6)
    assert both[0] == expected[0] and len(both) == 2
    assert (
        model.analogy(*TEXTS[:3], scale=0.0, max_new_tokens=6)
        == model.reconstruct([TEXTS[2]], max_new_tokens=6)[0]
    )


# ---- one folder


@pytest.mark.parametrize("injection", ["both", "memory", "embedding"])
def test_a_model_survives_its_folder(tmp_path, injection):
    slots = 1 if injection == "embedding" else 2
    model = tiny_vae(injection=injection, num_memory_slots=slots, pooling="mean")
    mu, logvar = model.encode(TEXTS)
    model.latent_statistics = latent.latent_statistics([(mu, logvar)])
    model.save_pretrained(tmp_path / "model")
    again = Optimus.from_pretrained(tmp_path / "model")
    assert equal_states(model, again) and not again.training
    assert again.config.pooling == "mean" and again.config.latent_dim == 5
    assert again.decoder.config.injection == injection and again.decoder.config.num_memory_slots == slots
    assert again.decoder.lm_head.weight is again.decoder.transformer.wte.weight
    assert again.reconstruct(TEXTS, max_new_tokens=6) == model.reconstruct(TEXTS, max_new_tokens=6)
    torch.testing.assert_close(again.latent_statistics[:2], model.latent_statistics[:2])
    assert again.latent_statistics.num_sentences == len(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_an_older_model_leaves_nothing_of_it(tmp_path):
    old = tiny_vae(seed=1)
    old.latent_statistics = LatentStatistics(torch.zeros(5), torch.eye(5), 3)
    old.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    (tmp_path / "model" / "notes.txt").write_text("mine")
    new = tiny_vae(seed=2, tokenizers=None)
    new.save_pretrained(tmp_path / "model")
    again = Optimus.from_pretrained(tmp_path / "model")
    assert equal_states(again, new) and again.latent_statistics is None
    with pytest.raises(ValueError, match="has no tokenisers"):
        again.encode(TEXTS)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_precision_and_attention_can_be_chosen_when_loading(tmp_path):
    model = tiny_vae()
    model.save_pretrained(tmp_path)
    half = Optimus.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.encode(TEXTS).mu.dtype == torch.float32
    assert len(half.reconstruct(TEXTS, max_new_tokens=4)) == len(TEXTS)
    eager = Optimus.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.decoder.config._attn_implementation == "memory_eager"
    assert eager.reconstruct(TEXTS, max_new_tokens=6) == model.reconstruct(TEXTS, max_new_tokens=6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("posterior_head.weight"), "missing: posterior_head.weight"),
        (lambda state: state.update({"extra.weight": torch.zeros(1)}), "unknown: extra.weight"),
        (
            lambda state: state.update({"posterior_head.weight": torch.zeros(2, 16)}),
            "of another shape: posterior_head.weight",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    tiny_vae().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Optimus.from_pretrained(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent holds no config\.json"):
        Optimus.from_pretrained(tmp_path / "absent")
    tiny_vae().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")  # never read: such files may hold code
    with pytest.raises(OSError, match=r"model.safetensors"):
        Optimus.from_pretrained(tmp_path)


def test_a_vae_starts_from_two_trained_networks(tmp_path):
    torch.manual_seed(0)
    encoder = BertModel(bert_config())
    plain = GPT2LMHeadModel(gpt2_config(vocab_size=len(tokenizers().decoder) - 3))
    encoder.save_pretrained(tmp_path / "head")
    plain.save_pretrained(tmp_path / "tail")
    model = Optimus.from_backbones(
        tmp_path / "head", tmp_path / "tail", latent_dim=7, num_memory_slots=2, tokenizers=tokenizers()
    )
    assert equal_states(model.encoder, encoder)
    words = plain.transformer.wte.weight
    assert torch.equal(model.decoder.transformer.wte.weight[: len(words)], words)
    assert torch.equal(
        model.decoder.transformer.h[1].attn.c_attn.weight, plain.transformer.h[1].attn.c_attn.weight
    )
    assert model.decoder.memory_projection.weight.shape == (3 * 2 * 24, 7)
    assert 0.01 < model.posterior_head.weight.std() < 0.03
    assert model.decoder.lm_head.weight is model.decoder.transformer.wte.weight
    without = Optimus.from_backbones(
        tmp_path / "head", tmp_path / "tail", pooling="first", tokenizers=tokenizers()
    )
    assert not any("pooler" in name for name in without.state_dict())
    assert torch.equal(
        without.encoder.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight
    )


def test_new_embeddings_and_heads_are_drawn_small(tmp_path):
    plain = GPT2LMHeadModel(gpt2_config(vocab_size=len(tokenizers().decoder) - 3, n_embd=96))
    plain.save_pretrained(tmp_path / "tail")
    model = Optimus.from_backbones(bert_config(), tmp_path / "tail", tokenizers=tokenizers())
    added = model.decoder.transformer.wte.weight[-3:]
    assert 0.15 < added.std() < 0.45  # the configuration's initializer_range, here 0.3


# ---- errors


def long_text(words):
    return " ".join(["dog"] * words)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m.encode(["a dog", long_text(30)]),
            r"text 1 \('dog dog.*has 32 tokens but the encoder takes at most 24",
        ),
        (lambda m: m.loss(["x" * 60]), "text 0 .*but the decoder takes at most 31"),
        (lambda m: m.decode(torch.zeros(2, 4)), r"latents are \[2, 4\] but \[N, 5\] was expected"),
        (lambda m: m.decode(torch.zeros(5)), r"latents are \[5\] but"),
        (
            lambda m: m.decode(torch.zeros(2, 5), max_new_tokens=31),
            "max_new_tokens is 31 but 1 to 30 tokens fit",
        ),
        (lambda m: m.decode(torch.zeros(2, 5), max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.decode(torch.zeros(2, 5), top_pp=0.3), "top_pp"),
        (lambda m: m.decode(torch.zeros(2, 5), batch_size=0), "batch_size is 0"),
        (lambda m: m.sample(-1), "count is -1"),
        (lambda m: m.interpolate("a", "b", mode="cubic"), "mode is 'cubic'"),
        (lambda m: m.analogy(["a"], ["b", "c"], ["d"]), r"a, b and c have \[1, 2, 1\] texts"),
        (lambda m: m.loss(["a dog"], free_bits=-1.0), "free_bits is -1.0"),
        (lambda m: m.loss(["a dog"], mode="none"), "posterior mode is 'none'"),
        (lambda m: m.loss(["a dog"], noise=torch.zeros(2, 5)), r"noise is \[2, 5\]"),
        (lambda m: m.log_likelihood(torch.ones(2, 1).long(), torch.zeros(2, 5)), r"decoder_ids are \[2, 1\]"),
        (lambda m: m.log_likelihood(torch.ones(2, 4).long(), torch.zeros(3, 5)), r"latents are \[3, 5\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_vae())


def test_vocabularies_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"encoder's tokeniser has \d+ tokens and pads with 0, but .* for 400 and 0"
    ):
        tiny_vae(encoder=bert_config(vocab_size=400))
    with pytest.raises(ValueError, match=r"but .* for 20 and 0: give the tokeniser"):
        tiny_vae(encoder=bert_config(vocab_size=20))
    size = len(tokenizers().decoder)
    with pytest.raises(
        ValueError, match=rf"decoder's tokeniser has \[size, pad, bos, eos\] \[{size}, 0, 1, 2\]"
    ):
        tiny_vae(decoder=gpt2_config(vocab_size=size + 1))
    model = tiny_vae()
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "encoder_tokenizer")
    model.tokenizers.decoder.save_pretrained(tmp_path / "encoder_tokenizer")
    with pytest.raises(ValueError, match=re.escape("the encoder's tokeniser has")):
        Optimus.from_pretrained(tmp_path)


def test_configurations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="pooling is 'last' but must be one of pooler, first, mean"):
        tiny_vae(pooling="last")
    with pytest.raises(ValueError, match="lacks a network"):
        Optimus(OptimusConfig(encoder=bert_config()))
    with pytest.raises(
        ValueError, match=r"pad, bos and eos tokens are \[None, 1, 2\] but must be three different"
    ):
        tiny_vae(decoder=gpt2_config(pad_token_id=None), tokenizers=None)


def test_a_model_without_tokenisers_works_on_ids_and_says_so():
    model = tiny_vae(tokenizers=None)
    batch = tokenizers().batch(TEXTS)
    assert model.loss(batch).loss.shape == (len(TEXTS),)
    with pytest.raises(ValueError, match=r"knows token ids only: set model.tokenizers first"):
        model.loss(TEXTS)
    model.tokenizers = TextTokenizers(tokenizers().encoder, tokenizers().decoder)
    torch.testing.assert_close(model.loss(TEXTS, noise=NOISE).loss, model.loss(batch, noise=NOISE).loss)


def test_gradient_of_the_loss_is_that_of_plain_cross_entropy():
    model = tiny_vae()
    batch = model.tokenize(TEXTS)
    ours = model.loss(batch, beta=0.7, free_bits=0.3, noise=NOISE).loss.mean()
    mu, logvar = model.posterior(batch.encoder_ids)
    logits = model.decoder(batch.decoder_ids, mu + NOISE * (0.5 * logvar).exp()).logits[:, :-1]
    nll = F.cross_entropy(logits.mT, batch.decoder_ids[:, 1:], reduction="none", ignore_index=0).sum(-1)
    kl = latent.kl_per_dimension(mu, logvar)
    plain = (nll + 0.7 * (kl * (kl > 0.3)).sum(-1)).mean()
    weights = list(model.parameters())
    for one, two in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, two, atol=2e-4 * float(two.abs().max()) + 1e-6, rtol=1e-3)
