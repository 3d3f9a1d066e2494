"""The embedded corpus: every combination one sentence, sets that share none, analogies with a known truth."""

import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vae_lm.grammar import (
    FACTORS,
    NUM_COMBINATIONS,
    Factors,
    analogy_items,
    factors_of,
    sentence,
    splits,
)

combinations = st.builds(Factors, *(st.sampled_from(values) for values in FACTORS.values()))


@pytest.mark.parametrize(
    "factors, expected",
    [
        (("monk", "two", "present", "carrying", "drum", "in the garden", "statement"),
         "the monk is carrying two drums in the garden."),
        (("girl", "one", "past", "hiding", "clock", "at the market", "statement"),
         "the girl was hiding one clock at the market."),
        (("king", "one", "future", "buying", "flag", "under the old oak", "guess"),
         "perhaps the king will be buying one flag under the old oak."),
        (("nurse", "two", "present", "selling", "chair", "on the bridge", "negation"),
         "the nurse is not selling two chairs on the bridge."),
        (("baker", "one", "future", "repairing", "violin", "near the river", "negation"),
         "the baker will not be repairing one violin near the river."),
        (("pilot", "two", "future", "painting", "basket", "behind the school", "question"),
         "will the pilot be painting two baskets behind the school?"),
        (("friend", "one", "past", "drawing", "bicycle", "in the garden", "question"),
         "was the friend drawing one bicycle in the garden?"),
        (("clown", "two", "past", "cleaning", "barrel", "in the garden", "guess"),
         "perhaps the clown was cleaning two barrels in the garden."),
    ],
)  # fmt: skip
def test_sentences_are_english(factors, expected):
    assert sentence(Factors(*factors)) == expected
    assert factors_of(f" {expected}\n") == Factors(*factors)


def test_every_combination_is_a_sentence_of_its_own_that_tells_all_factors():
    every = [Factors(*values) for values in itertools.product(*FACTORS.values())]
    texts = {sentence(factors): factors for factors in every}
    assert len(texts) == len(every) == NUM_COMBINATIONS
    assert all(factors_of(text) == factors for text, factors in texts.items())
    assert {len(text.split()) for text in texts} <= set(range(9, 13))


@given(factors=combinations, other=combinations)
def test_changing_a_word_keeps_all_others(factors, other):
    for name in ("subject", "action", "object", "place"):
        changed = sentence(factors._replace(**{name: getattr(other, name)}))
        assert changed.replace(getattr(other, name), getattr(factors, name)) == sentence(factors)


def test_sets_share_nothing_and_the_fifth_to_train_on_has_every_value_often():
    sets = splits()
    assert [len(sets[name]) for name in ("train", "valid", "test")] == [14745, 1474, 57509]
    assert len(set().union(*sets.values())) == NUM_COMBINATIONS
    assert len(sets["train"]) <= 0.2 * NUM_COMBINATIONS
    for column, values in zip(
        zip(*map(factors_of, sets["train"]), strict=True), FACTORS.values(), strict=True
    ):
        counts = Counter(column)
        assert set(counts) == set(values) and min(counts.values()) > 1000


def test_the_seed_alone_decides_on_every_machine():
    digest = hashlib.sha256("\n".join(itertools.chain(*splits().values())).encode()).hexdigest()
    items = hashlib.sha256(repr(analogy_items(7, 50)).encode()).hexdigest()
    assert digest[:16] == "36eb5845a6d543d8"
    assert items[:16] == "5e7134402b1aef59"
    assert splits(1)["train"] != splits(0)["train"] and set(splits(1)["train"]) != set(splits(0)["train"])
    other = "from vae_lm.grammar import splits; print(splits()['train'][:3])"
    run = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(splits()["train"][:3])


def test_what_is_done_to_a_split_stays_with_the_caller():
    splits()["train"].clear()
    assert splits()["train"]


def differing(first, second):
    return {name for name in FACTORS if getattr(factors_of(first), name) != getattr(factors_of(second), name)}


@pytest.mark.parametrize("split_seed", [0, 3])
def test_analogies_are_what_they_claim(split_seed):
    held_out = set(splits(split_seed)["test"])
    items = analogy_items(11, 210, split_seed=split_seed)
    for factor, a, b, c, d in items:
        assert differing(a, b) == differing(c, d) == {factor}
        of_a, of_b, of_c, of_d = map(factors_of, (a, b, c, d))
        assert getattr(of_c, factor) == getattr(of_a, factor)
        assert getattr(of_d, factor) == getattr(of_b, factor)
        assert len(differing(a, c)) >= 3 and d not in (a, b, c)
        assert {c, d} <= held_out
    assert Counter(item.factor for item in items) == dict.fromkeys(FACTORS, 30)
    assert len(set(items)) == 210


def test_fewer_analogies_are_the_first_of_more():
    assert analogy_items(5, 9) == analogy_items(5, 20)[:9]
    assert analogy_items(5, 9) != analogy_items(6, 9) and analogy_items(5, 0) == []


def test_what_the_grammar_does_not_know_is_refused():
    with pytest.raises(ValueError, match="mood is 'order' but must be one of statement, negation"):
        sentence(Factors("nurse", "two", "past", "hiding", "flag", "in the garden", "order"))
    with pytest.raises(ValueError, match=r"'the nurse hid a flag\.' is not a sentence of the grammar"):
        factors_of("the nurse hid a flag.")
    with pytest.raises(ValueError, match="count is -1"):
        analogy_items(0, -1)
