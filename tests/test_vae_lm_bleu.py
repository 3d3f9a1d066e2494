"""BLEU of single sentences worked by hand, and of sets."""

import math

import pytest

from vae_lm.bleu import bleu, self_bleu


def test_precisions_are_clipped_and_multiplied():
    # 1-grams: "the" counts twice at most (of 4), "cat" once: 3 of 5. 2-grams: "the the", "the cat": 2 of 4.
    found = bleu(["the the the the cat"], ["the the cat sat on"], order=2)
    assert found == pytest.approx(math.sqrt(3 / 5 * 2 / 4))


def test_an_order_without_a_match_counts_a_tenth():
    # 3 of 4 words, 1 of 3 pairs ("a b"), none of 2 triples, none of 1 quadruple, and no quintuple at all.
    found = bleu(["a b x d"], ["d y a b z"], order=5)
    expected = (3 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1 * 0.1 / 1) ** (1 / 5) * math.exp(1 - 5 / 4)
    assert found == pytest.approx(expected)


def test_the_closest_reference_sets_the_penalty_and_the_shorter_one_of_two():
    assert bleu(["a b"], ["a b c", "a b c d e"], order=1) == pytest.approx(math.exp(1 - 3 / 2))
    assert bleu(["a b"], ["a", "a b c"], order=1) == pytest.approx(1.0)  # "b" is in the second one
    assert bleu(["a b c"], ["a b c d e", "a", "b c"], order=1) == pytest.approx(1.0)


def test_counts_are_clipped_by_the_reference_that_has_most_of_them():
    assert bleu(["a a b"], ["a a", "b c d"], order=1) == pytest.approx(1.0)


def test_the_score_of_a_set_is_the_mean_and_nothing_in_common_is_nothing():
    assert bleu(["a b c", "x y z", ""], ["a b c"], order=2) == pytest.approx(1 / 3)


def test_a_text_is_not_compared_with_itself():
    texts = ["a b c d e", "a b c d f", "u v w x y", "a b c d e"]
    one_by_one = [bleu([text], texts[:i] + texts[i + 1 :], order=3) for i, text in enumerate(texts)]
    assert self_bleu(texts, order=3) == pytest.approx(sum(one_by_one) / 4)
    assert one_by_one[0] == 1.0 and one_by_one[2] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bleu([], ["a"]), "BLEU-5 of 0 texts against 1 references"),
        (lambda: bleu(["a"], []), "1 texts against 0 references"),
        (lambda: bleu(["a"], ["a"], order=0), "BLEU-0"),
        (lambda: self_bleu(["a"]), "1 texts against 0 references"),
    ],
)
def test_sets_without_anything_to_compare_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
