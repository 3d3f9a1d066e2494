"""BLEU as the original speakers were chosen by."""

import math

import pytest

from vln.bleu import corpus_bleu


def test_counts_are_clipped_by_the_best_reference():
    candidate = "the the the the cat sat".split()
    found = corpus_bleu([candidate], [["the cat sat there".split(), "the the mat".split()]], order=2)
    # the x 2, cat, sat of 6; the-the, the-cat, cat-sat of 5.
    assert found.precisions == (4 / 6, 3 / 5) and found.brevity_penalty == 1
    assert found.score == pytest.approx(math.sqrt(4 / 6 * 3 / 5))


def test_brevity_counts_from_the_shortest_reference():
    texts = ["go left now please".split()]
    long, short = "go left now please and then stop".split(), "go left now please and".split()
    assert corpus_bleu(texts, [[long, short]]).brevity_penalty == pytest.approx(math.exp(1 - 5 / 4))
    assert corpus_bleu(texts, [[long]]).score == pytest.approx(math.exp(1 - 7 / 4))


def test_counts_are_summed_over_the_corpus():
    one, two = "a b c d e".split(), "a x c y e".split()
    both = corpus_bleu([one, two], [[one], [one]], order=1)
    assert both.precisions == (8 / 10,) and both.score == pytest.approx(0.8)
    assert corpus_bleu([two], [[one]]).score == 0  # no pair of words is right
    assert corpus_bleu([[]], [[one]]).score == 0


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 texts have 1 lists of references"):
        corpus_bleu([[1], [2]], [[[1]]])
    with pytest.raises(ValueError, match="at least one reference"):
        corpus_bleu([[1]], [[]])
