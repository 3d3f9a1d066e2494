"""What a trained space is used for: filters, traversals, neighbours, tables."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import TEXTS, tiny_vae

from vae_lm.generate import (
    analogy_table,
    filter_logits,
    interpolation_table,
    markdown_table,
    nearest,
    traverse,
)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), top_k=st.integers(0, 12), top_p=st.floats(0, 1))
def test_filters_keep_what_their_definition_says(seed, top_k, top_p):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed)) * 3
    kept = filter_logits(logits, top_k=top_k, top_p=top_p).isfinite()
    for row, found in zip(logits, kept, strict=True):
        order = row.argsort(descending=True).tolist()[: top_k or None]
        probabilities = row[order].softmax(-1)
        expected, total = set(), 0.0
        for token, probability in zip(order, probabilities.tolist(), strict=True):
            if 0 < top_p < 1 and expected and total > top_p + 1e-6:
                break
            expected.add(token)
            total += probability
        almost = 0 < top_p < 1 and bool(((probabilities.cumsum(-1) - top_p).abs() < 1e-5).any())
        assert almost or set(found.nonzero().flatten().tolist()) == expected


def test_filters_outside_their_range_are_refused():
    for options in ({"top_k": -1}, {"top_p": 1.5}, {"top_p": -0.1}):
        with pytest.raises(ValueError, match=r"top_k is .* and top_p "):
            filter_logits(torch.zeros(1, 3), **options)


def test_sampling_obeys_the_filters():
    model = tiny_vae()
    z = torch.randn(1, 5)
    with torch.no_grad():
        logits = model.decoder(torch.tensor([[1]]), z).logits[:, -1]
    allowed = filter_logits(logits, top_k=6, top_p=0.8).isfinite()[0].nonzero().flatten().tolist()
    torch.manual_seed(0)
    drawn = model.decoder.generate(
        torch.ones(1, 1, dtype=torch.int64),
        attention_mask=torch.ones(1, 1, dtype=torch.int64),
        latents=z,
        do_sample=True,
        top_k=6,
        top_p=0.8,
        max_new_tokens=1,
        num_return_sequences=300,
    )
    assert set(drawn[:, 1].tolist()) == set(allowed)


def test_traversal_moves_one_dimension():
    model = tiny_vae()
    z = model.encode([TEXTS[0]]).mu.repeat(3, 1)
    z[:, 2] = torch.tensor([-3.0, 0.0, 3.0])
    expected = model.decode(z, max_new_tokens=6)
    assert traverse(model, TEXTS[0], 2, [-3, 0, 3], max_new_tokens=6) == expected
    with pytest.raises(ValueError, match="dimension is 5 but the latent has 5: choose 0 to 4"):
        traverse(model, TEXTS[0], 5, [0.0])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), count=st.integers(1, 7), chunk=st.integers(1, 5))
def test_neighbours_are_the_nearest(seed, count, chunk):
    generator = torch.Generator().manual_seed(seed)
    queries, bank = torch.randn(4, 3, generator=generator), torch.randn(7, 3, generator=generator)
    found = nearest(queries, bank, count=count, chunk_size=chunk)
    distances = (queries[:, None] - bank).norm(dim=-1)
    torch.testing.assert_close(found.distances, distances.sort(dim=1).values[:, :count])
    torch.testing.assert_close(distances.gather(1, found.indices), found.distances)


def test_equal_latents_are_at_distance_zero_and_the_first_wins():
    bank = torch.tensor([[1000.0, 1.0], [1000.0, 1.0001], [1000.0, 1.0]])
    found = nearest(bank[:1], bank, count=3)
    assert found.indices.tolist() == [[0, 2, 1]] and found.distances[0, 0] == 0
    assert found.distances[0, 2] > 0


@pytest.mark.parametrize(
    ("queries", "count", "message"),
    [((2, 3), 5, "5 neighbours .* has 4"), ((2, 3), 0, "0 neighbours"), ((2, 2), 1, r"queries are \[2, 2\]")],
)
def test_neighbours_that_cannot_be_are_refused(queries, count, message):
    with pytest.raises(ValueError, match=message):
        nearest(torch.zeros(queries), torch.zeros(4, 3), count=count)


def test_tables_show_what_the_model_says():
    model = tiny_vae()
    lines = interpolation_table(model, *TEXTS[:2], steps=2, max_new_tokens=4).splitlines()
    straight = model.interpolate(*TEXTS[:2], steps=2, max_new_tokens=4)
    assert lines[:2] == ["| t | linear | slerp |", "|---|---|---|"] and len(lines) == 5
    assert lines[3].split(" | ")[0] == "| 0.50" and markdown_cell(straight[1]) in lines[3]
    lines = analogy_table(model, [tuple(TEXTS[:3]), tuple(TEXTS[1:4])], max_new_tokens=4).splitlines()
    assert lines[2].startswith(f"| {TEXTS[0]} | {TEXTS[1]} | {TEXTS[2]} | ") and len(lines) == 4
    assert markdown_cell(model.analogy(*TEXTS[1:4], max_new_tokens=4)) in lines[3]
    assert analogy_table(model, []).count("\n") == 2


def markdown_cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def test_cells_cannot_break_a_table():
    assert markdown_table(["x"], [["a|b\nc"]]).splitlines()[2] == "| a\\|b c |"
