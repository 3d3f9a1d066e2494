"""The analogy benchmark on a space where the truth is known: one vector for each value of each factor."""

import json
import types

import pytest
import torch

from benchmarks import grammar
from vae_lm.grammar import FACTORS, Factors, analogy_items, factors_of, sentence, splits

PLACES = [(name, value) for name, values in FACTORS.items() for value in values]


class Additive:
    """A latent that is the sum of its values, and a decoder that says the strongest value of each factor."""

    def __init__(self, *, blurred=""):
        self.blurred = blurred
        self.config = types.SimpleNamespace(latent_dim=len(PLACES))
        self.decoder = types.SimpleNamespace(config=types.SimpleNamespace(max_tokens=40))

    def encode(self, texts):
        rows = [[float(getattr(factors_of(text), name) == value) for name, value in PLACES] for text in texts]
        mu = torch.tensor(rows)
        keep = torch.tensor([float(name != self.blurred) for name, _ in PLACES])
        return types.SimpleNamespace(mu=mu * keep)

    def decode(self, latents, max_new_tokens):
        assert max_new_tokens == 24
        said = []
        for row in latents.tolist():
            best = {}
            for (name, value), strength in zip(PLACES, row, strict=True):
                if name not in best or strength > best[name][0]:
                    best[name] = (strength, value)
            said.append(sentence(Factors(**{name: value for name, (_, value) in best.items()})))
        return said

    def parameters(self):
        return iter([torch.zeros(3, 4)])


ITEMS = analogy_items(3, 140)


def test_a_space_of_sums_is_right_everywhere_but_in_the_controls():
    result = grammar.summarise(grammar.answer(Additive(), ITEMS, splits()["train"][:3000]), ITEMS)
    rates = {name: rate["all"] for name, rate in result["rates"].items()}
    assert rates["analogy"] == rates["edit by mean difference"] == rates["scale 0 (should say C)"] == 1
    assert rates["copy B"] == rates["copy C"] == rates["nearest training sentence"] == 0
    assert 0 < rates["shuffled pairs"] <= 0.1
    assert result["passed"] and result["wrong_analogies"] == {}
    assert set(result["rates"]["analogy"]) == {"all", *FACTORS}


def test_a_space_without_one_factor_fails_where_it_matters():
    answers = grammar.answer(Additive(blurred="tense"), ITEMS, splits()["train"][:500])
    result = grammar.summarise(answers, ITEMS)
    # It always says the first tense, and so is right where that is the truth.
    truth = [factors_of(item.d).tense == "present" for item in ITEMS]
    assert result["rates"]["analogy"]["all"] == pytest.approx(sum(truth) / len(truth))
    assert sum(result["wrong_analogies"].values()) == len(truth) - sum(truth)
    assert result["wrong_analogies"].keys() == {"the factor to change", "another factor"}
    assert not result["passed"]


def test_the_factor_that_fails_most_is_named():
    expected = [item.d for item in ITEMS]
    said = [item.c if item.factor == "tense" else item.d for item in ITEMS]
    answers = [
        grammar.Answers("analogy", said, expected),
        grammar.Answers("scale 0 (should say C)", expected, expected),
        grammar.Answers("shuffled pairs", [""] * len(ITEMS), expected),
    ]
    result = grammar.summarise(answers, ITEMS)
    assert result["lowest_factor"] == "tense" and result["rates"]["analogy"]["tense"] == 0
    assert result["rates"]["analogy"]["all"] == pytest.approx(6 / 7) and result["passed"]


def test_mistakes_are_told_apart():
    item = ITEMS[0]  # its subject changes
    told = factors_of(item.d)
    other = next(name for name in FACTORS["object"] if name != told.object)
    said = [
        item.d,
        item.c,
        sentence(told._replace(object=other)),
        sentence(factors_of(item.c)._replace(object=other)),
        "a dog.",
    ]
    answers = [grammar.Answers("analogy", said, [item.d] * 5)]
    assert grammar._mistakes(answers[0], [item] * 5) == {
        "the factor to change": 1,
        "another factor": 1,
        "several factors": 1,
        "not of the grammar": 1,
    }


def test_the_command_writes_figures_and_a_table_of_the_first_items(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grammar.Optimus, "from_pretrained", lambda folder: Additive())
    grammar.main([str(tmp_path), "--items", "42", "--out", str(tmp_path / "result")])
    record = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (record["num_items"], record["train_sentences"], record["parameters"]) == (42, 14745, 12)
    table = (tmp_path / "result.md").read_text(encoding="utf-8")
    assert "| analogy | 100.0 | 100.0 |" in table and table.count("✓") == 20
    assert [row["a"] for row in record["examples"]] == [item.a for item in analogy_items(grammar.SEED, 20)]
    assert table.strip() in capsys.readouterr().out
