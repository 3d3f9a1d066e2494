"""GPT-2 with a latent: what it computes, through transformers' generation, and what it refuses."""

import pytest
import torch
from tiny_lm import gpt2_config, tiny_vae
from torch.nn import functional as F
from transformers import StaticCache

from vae_lm.decoder import INJECTIONS, LatentGPT2, LatentGPT2Config

IDS = torch.tensor([[1, 40, 50, 60, 70, 2], [1, 41, 51, 61, 2, 0]])


def decoder(injection="both", **options):
    return tiny_vae(injection=injection, **options).decoder


def latents(count=2, dim=5, seed=3):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def by_hand(model, ids, z):
    """Logits from the weights alone, one head at a time; independent of transformers."""
    config = model.config
    width, heads, layers = config.n_embd, config.n_head, config.n_layer
    size, slots = width // heads, config.num_memory_slots
    length = ids.shape[1]
    body = model.transformer
    x = body.wte.weight[ids] + body.wpe.weight[config.first_position : config.first_position + length]
    if config.has_embedding:
        x = x + (z @ model.embedding_projection.weight.t())[:, None]
    for index in range(layers):
        block = body.h[index]
        queries, keys, values = (
            F.layer_norm(x, (width,), block.ln_1.weight, block.ln_1.bias, 1e-5) @ block.attn.c_attn.weight
            + block.attn.c_attn.bias
        ).split(width, dim=-1)
        if config.has_memory:
            rows = model.memory_projection.weight.view(layers, slots, width, -1)[index]
            memory = torch.einsum("swd,bd->bsw", rows, z)
            keys, values = torch.cat([memory, keys], 1), torch.cat([memory, values], 1)
        outputs = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = queries[..., part] @ keys[..., part].mT / size**0.5
            extra = keys.shape[1] - length
            hidden = torch.ones(length, length).triu(1).bool()
            scores = scores.masked_fill(F.pad(hidden, (extra, 0)), -torch.inf)
            outputs.append(scores.softmax(-1) @ values[..., part])
        x = x + torch.cat(outputs, -1) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        y = F.layer_norm(x, (width,), block.ln_2.weight, block.ln_2.bias, 1e-5)
        y = F.gelu(y @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
        x = x + y @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    return F.layer_norm(x, (width,), body.ln_f.weight, body.ln_f.bias, 1e-5) @ body.wte.weight.t()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("injection", "slots"), [("both", 1), ("memory", 1), ("embedding", 1), ("both", 3), ("memory", 2)]
)
def test_logits_follow_from_the_weights(injection, slots, attention):
    model = decoder(injection, num_memory_slots=slots)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS, latents()).logits, by_hand(model, IDS, latents()), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("injection", INJECTIONS)
def test_unused_ways_of_injection_have_no_weights(injection):
    names = {name for name, _ in decoder(injection).named_parameters() if "projection" in name}
    expected = {"memory_projection.weight", "embedding_projection.weight"}
    assert names == {name for name in expected if injection == "both" or name.startswith(injection)}


# ---- generation


def told(model, z, prompt=None, **options):
    prompt = torch.full((len(z), 1), model.config.bos_token_id) if prompt is None else prompt
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(prompt, latents=z, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("prompt", [1, 3])
def test_greedy_tokens_are_those_of_recomputing_the_text(injection, attention, prompt):
    model, z = decoder(injection, num_memory_slots=1 if injection == "embedding" else 2), latents(3)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 200, (3, prompt), generator=torch.Generator().manual_seed(5))
    found, expected = told(model, z, ids, eos_token_id=None), ids
    with torch.no_grad():
        for _ in range(8):
            last = by_hand(model, expected, z)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, last], 1)
    assert torch.equal(found, expected)
    assert torch.equal(told(model, z, ids, eos_token_id=None, use_cache=False), expected)


@pytest.mark.parametrize("end", ["none", "early", "one of two", "all at once"])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_the_short_way_of_greedy_decoding_gives_what_generate_gives(injection, end, monkeypatch):
    monkeypatch.setattr("vae_lm.decoder._VOCABULARY_AT_ONCE", 64)
    model, z = decoder(injection), latents(4)
    model.generation_config.eos_token_id = None
    free = model.greedy(z, max_new_tokens=9)
    assert free.shape == (4, 10) and torch.equal(free, told(model, z, max_new_tokens=9))
    ends = {"early": int(free[0, 3]), "one of two": [int(free[0, 3]), int(free[1, 5])]}
    if end == "all at once":
        z, ends = z[:1].expand(4, -1), {end: int(free[0, 4])}
    model.generation_config.eos_token_id = ends.get(end)
    found = model.greedy(z, max_new_tokens=9)
    assert torch.equal(found, told(model, z, max_new_tokens=9))
    assert end == "none" or (found[0] == model.config.pad_token_id).any() or found.shape[1] < 10


def test_only_plain_settings_take_the_short_way():
    model = decoder()
    assert model.is_plainly_greedy()
    for name, value in (("num_beams", 2), ("repetition_penalty", 1.5), ("do_sample", True)):
        before = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value)
        assert not model.is_plainly_greedy(), name
        setattr(model.generation_config, name, before)
    assert model.is_plainly_greedy()


@pytest.mark.parametrize("injection", INJECTIONS)
def test_beams_of_a_batch_are_those_of_one_text_at_a_time_and_of_no_cache(injection):
    model, z = decoder(injection), latents(3)
    found = told(model, z, num_beams=4, num_return_sequences=2)
    assert torch.equal(found, told(model, z, num_beams=4, num_return_sequences=2, use_cache=False))
    for index in range(3):
        alone = told(model, z[index : index + 1], num_beams=4, num_return_sequences=2)
        assert torch.equal(
            F.pad(alone, (0, found.shape[1] - alone.shape[1])), found[2 * index : 2 * index + 2]
        )


def test_sampling_with_several_texts_a_latent_draws_the_same_without_a_cache():
    model, z = decoder(), latents(2)
    options = {"do_sample": True, "num_return_sequences": 5, "top_k": 20, "top_p": 0.9, "temperature": 1.3}
    torch.manual_seed(1)
    found = told(model, z, **options)
    torch.manual_seed(1)
    assert torch.equal(found, told(model, z, use_cache=False, **options))
    assert len(found) == 10 and len({tuple(row.tolist()) for row in found}) > 5


@pytest.mark.parametrize("injection", INJECTIONS)
def test_padding_on_the_left_changes_nothing(injection):
    model, z = decoder(injection), latents(2)
    short = torch.tensor([[1, 40]])
    padded = torch.tensor([[0, 0, 1, 40], [1, 50, 60, 70]])
    mask = (padded != 0).long()
    both = told(model, z, padded, attention_mask=mask, eos_token_id=None)
    alone = told(model, z[:1], short, eos_token_id=None)
    assert torch.equal(both[:1, 4:], alone[:, 2:])
    with torch.no_grad():
        logits = model(padded, z, attention_mask=mask).logits
        torch.testing.assert_close(logits[:1, 2:], model(short, z[:1]).logits, atol=1e-5, rtol=1e-4)


def test_many_kinds_of_generation_run():
    model, z = decoder(), latents(2)
    for options in (
        {"num_beams": 3, "do_sample": True, "top_k": 0},
        {"num_beams": 2, "length_penalty": 2.0},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "min_p": 0.1},
        {"repetition_penalty": 1.5, "min_new_tokens": 6},
    ):
        assert told(model, z, **options).shape[0] == 2


def test_the_cache_grows_past_its_first_room_and_starts_again_after_it_was_replaced():
    model, z = tiny_vae(decoder=gpt2_config(n_positions=100)).decoder, latents(2)
    found = told(model, z, max_new_tokens=80, eos_token_id=None)
    assert torch.equal(found, told(model, z, max_new_tokens=80, eos_token_id=None, use_cache=False))


def test_a_text_can_be_continued_from_a_cache_with_gradients():
    model, z = decoder(), latents().requires_grad_()
    first = model(IDS[:, :3], z, use_cache=True)
    second = model(IDS[:, 3:], z, past_key_values=first.past_key_values)
    whole = model(IDS, z).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-4)
    by_parts = torch.autograd.grad(second.logits.square().sum(), z)
    torch.testing.assert_close(
        by_parts, torch.autograd.grad(whole[:, 3:].square().sum(), z), atol=1e-2, rtol=1e-4
    )


# ---- training


def recompute(model, *options):
    """Switch activation checkpointing on; older versions of transformers have another name for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(*options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activation_checkpointing_repeats_loss_and_gradients_to_the_bit(attention):
    model, z = decoder().train(), latents().requires_grad_()
    model.set_attn_implementation(attention)
    results = []
    for enable in (False, True):
        if enable:
            recompute(model)
        model.zero_grad()
        loss = model(IDS, z).logits.square().mean()
        gradient = torch.autograd.grad(
            loss, [z, model.memory_projection.weight, model.transformer.wte.weight]
        )
        results.append((loss, *gradient))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_reentrant_checkpointing_is_refused_because_it_loses_a_gradient():
    model = decoder().train()
    recompute(model, {"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(IDS, latents())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bfloat16_weights_take_float32_latents(attention):
    model = decoder().bfloat16()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        found, exact = model(IDS, latents()).logits, model.float()(IDS, latents()).logits
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert told(model.bfloat16(), latents()).shape[0] == 2


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": None}, "latents are missing: pass latents=z"),
        ({"latents": torch.zeros(2, 4)}, r"latents are \[2, 4\] but \[2, 5\] was expected"),
        ({"latents": torch.zeros(3, 5)}, r"latents are \[3, 5\] but \[2, 5\] was expected"),
        (
            {"attention_mask": torch.ones(2, 7)},
            r"attention_mask is \[2, 7\] but \[2, 6\].*none for the memory",
        ),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"must end in \[6, 7\]: 1 memory columns"),
        ({"attention_mask": torch.ones(6)}, r"attention_mask is \[6\]"),
        ({"input_ids": torch.ones(2, 32, dtype=torch.int64)}, "the text has 32 tokens but at most 31 fit"),
    ],
)
def test_a_forward_that_would_be_wrong_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        decoder()(**({"input_ids": IDS, "latents": latents()} | arguments))


def test_a_full_mask_with_the_slot_is_taken_as_it_is():
    model = decoder()
    mask = F.pad(torch.ones(6, 6).tril().bool(), (1, 0), value=True)[None, None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(IDS, latents(), attention_mask=mask).logits, model(IDS, latents()).logits
        )


def test_embedding_alone_starts_at_position_zero_and_leaves_one_token_more():
    model = decoder("embedding")
    ids = torch.ones(1, 32, dtype=torch.int64)
    assert model(ids, latents(1)).logits.shape == (1, 32, model.config.vocab_size)
    with pytest.raises(ValueError, match=r"attention_mask .* \[6, 6\]: 0 memory columns"):
        model(IDS, latents(), attention_mask=torch.ones(2, 1, 6, 7))


def test_static_caches_are_refused():
    model = decoder()
    with pytest.raises(ValueError, match=r"static cache .* leave cache_implementation out"):
        told(model, latents(), cache_implementation="static")
    with pytest.raises(ValueError, match="static cache"):
        model(IDS, latents(), past_key_values=StaticCache(model.config, max_cache_len=20))


def test_misspelt_generation_arguments_are_refused():
    with pytest.raises(ValueError, match="top_pp"):
        told(decoder(), latents(), top_pp=0.9)


def test_attention_that_does_not_know_the_memory_is_refused():
    model = decoder()
    with pytest.raises(ValueError, match="cannot carry the memory"):
        model.set_attn_implementation("flex_attention")
    model.transformer.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set to 'eager', which does not know the memory"):
        model(IDS, latents())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"num_memory_slots": 0}, "num_memory_slots is 0"),
        ({"injection": "none"}, "injection is 'none' but must be one of both, memory, embedding"),
        (
            {"injection": "embedding", "num_memory_slots": 2},
            "num_memory_slots is 2 but injection 'embedding'",
        ),
        ({"add_cross_attention": True}, "leave both False"),
    ],
)
def test_configurations_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LatentGPT2Config(**options)


def test_the_decoder_alone_survives_its_folder(tmp_path):
    model = decoder("memory", num_memory_slots=2)
    model.save_pretrained(tmp_path)
    again = LatentGPT2.from_pretrained(tmp_path)
    assert (again.config.injection, again.config.num_memory_slots) == ("memory", 2)
    with torch.no_grad():
        assert torch.equal(again(IDS, latents()).logits, model(IDS, latents()).logits)
