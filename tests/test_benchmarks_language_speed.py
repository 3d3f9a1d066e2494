"""The benchmark of speed: both ways of decoding say the same, and the report follows the figures."""

import json

import pytest
import torch

from benchmarks import language_speed as module
from benchmarks.language_speed import (
    FULL,
    TINY,
    Largest,
    flop_of_a_step,
    long_step,
    main,
    on_gpu,
    random_batch,
    recompute,
    run,
    take_turns,
)


def test_small_networks_go_through_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "memory", lambda sizes: module_memory(sizes))
    out = tmp_path / "speed.json"
    run(["training"], TINY, out, rounds=2)
    results = run(["decoding", "memory"], TINY, out, rounds=2)
    stored = json.loads(out.read_text())
    assert list(stored) == ["training", "decoding", "memory"]
    decoding, training = stored["decoding"], stored["training"]["batches"]["2"]
    assert decoding["equal texts"] == 1.0
    assert decoding["gain over forming again"]["lowest"] <= decoding["gain over forming again"]["median"]
    seconds = decoding["seconds"]
    assert decoding["tokens_per_second"]["ours"] == pytest.approx(16 / seconds["ours"])
    assert training["padded"] == 16 and 0 < training["tokens"] <= 16
    assert training["met"] == (training["share"]["median"] >= 0.9)
    assert results["decoding"]["provenance"]["versions"]["transformers"]
    text = out.with_suffix(".md").read_text()
    assert "## Decoding 4 sentences of 4 tokens" in text and "rows of 4 to 8 tokens" in text
    assert f"{training['share']['median']:.2f} (" in text and "100% of the texts are equal" in text
    assert f"| ours | {stored['memory']['ours']['peak_mib']:.0f} |" in text


def module_memory(sizes):
    """Both kinds in this process: the other one would start anew for each."""
    found = {kind: long_step(sizes, kind) for kind in ("ours", "plain")}
    logits = sizes.long_batch * sizes.long_tokens * sizes.vocabulary
    sizes_named = {"batch": sizes.long_batch, "tokens": sizes.long_tokens, "logits": logits}
    return found | sizes_named | {"met": found["ours"]["largest"] < logits / 4}


def test_no_way_of_decoding_ends_at_eos():
    torch.manual_seed(0)
    model = module.our_model(TINY).eval()
    torch.nn.init.zeros_(model.decoder.transformer.wte.weight)
    with torch.no_grad():
        model.decoder.transformer.wte.weight[-1] = 1.0  # EOS wins wherever the last state is positive
        model.decoder.transformer.ln_f.bias.fill_(1.0)
    latents = torch.randn(2, TINY.latent_dim)
    ids = recompute(model, latents, num_tokens=3)
    assert ids.shape == (2, 4) and (ids[:, 0] == TINY.vocabulary - 2).all()
    assert (ids[:, 1:] == TINY.vocabulary - 1).all()
    model.decoder.generation_config.eos_token_id = None
    start = torch.full((2, 1), TINY.vocabulary - 2)
    mask = torch.ones_like(start)
    found = model.decoder.generate(start, latents=latents, attention_mask=mask, max_new_tokens=3)
    assert torch.equal(found, ids)


def test_rows_have_the_same_lengths_for_both_networks():
    batch = random_batch(TINY, 50, shortest=4, longest=9)
    lengths = (batch.encoder_ids != 0).sum(1)
    pad, bos, eos = (TINY.vocabulary - 3 + number for number in range(3))
    assert torch.equal(lengths, (batch.decoder_ids != pad).sum(1))
    assert lengths.min() == 4 and lengths.max() == lengths[0] == 9
    assert (batch.decoder_ids[:, 0] == bos).all()
    assert (batch.decoder_ids.gather(1, lengths[:, None] - 1) == eos).all()
    assert (batch.decoder_ids == eos).sum() == 50


def test_calls_take_turns_after_one_that_warms_up():
    order, ticks = [], iter(range(100))
    calls = {name: lambda name=name: order.append(name) or name * 2 for name in "ab"}
    spent, results = take_turns(calls, 3, clock=lambda: next(ticks))
    assert "".join(order) == "abababab" and results == {"a": "aa", "b": "bb"}
    assert spent == {"a": [1, 1, 1], "b": [1, 1, 1]}


def test_all_logits_are_seen_where_they_are_made_and_weights_are_passed_over():
    with Largest({(7, 11)}) as largest:
        (torch.randn(7, 11) * 2).sum()
        torch.randn(3, 4)
    assert largest.elements == 12 and "[3, 4]" in largest.name
    sizes = TINY._replace(vocabulary=4000, long_batch=4, long_tokens=32)
    logits = 4 * 31 * 4000
    assert long_step(sizes, "plain")["largest"] >= logits


def test_memory_asks_fresh_processes(monkeypatch):
    asked = []

    def fresh(command, **options):
        asked.append(command[-2])
        largest = 10 if command[-2] == "ours" else 900
        line = json.dumps({"peak_mib": 1.0, "largest": largest, "largest_is": "x"})
        return module.subprocess.CompletedProcess(command, 0, stdout=f"noise\n{line}\n")

    monkeypatch.setattr(module.subprocess, "run", fresh)
    found = module.memory(TINY)
    assert asked == ["ours", "plain"] and found["plain"]["largest"] == 900
    assert found["met"] == (10 < 2 * 16 * 60 / 4)


def test_a_hidden_option_does_one_long_step(capsys):
    threads = torch.get_num_threads()
    main(["--long-step", "ours", json.dumps(TINY._asdict()), "--threads", str(threads)])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["largest"] > 0 and found["peak_mib"] > 50


def test_operations_are_about_six_for_each_weight_and_token():
    body, head = 12 * 12 * 768**2, 768 * 50_260
    found = flop_of_a_step(FULL, 1, 128)
    assert (
        found == pytest.approx(6 * (128 * body + 127 * (body + head)), rel=0.03)
        and found > 6 * 128 * 2 * body
    )


def test_training_in_bfloat16_is_measured():
    found = on_gpu(TINY, latent_dim=7, batch=2, tokens=6, steps=2, device=torch.device("cpu"), roof=1e9)
    assert found["tokens_per_second"] == pytest.approx(12e3 / found["step_ms"])
    share = flop_of_a_step(TINY, 2, 6) / found["step_ms"] * 1e3 / 1e9
    assert found["percent_of_roof"] == pytest.approx(100 * share) and "peak_mib" not in found
