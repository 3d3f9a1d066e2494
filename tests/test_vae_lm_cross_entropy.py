"""Cross-entropy over a large vocabulary in chunks: values, gradients, and what is never in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vae_lm.cross_entropy import token_nll


def problem(rows, vocabulary, width=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 9), vocabulary=st.integers(1, 12), at_once=st.integers(1, 10), kind=st.integers(0, 2)
)
def test_values_and_gradients_are_those_of_the_whole_product(rows, vocabulary, at_once, kind):
    hidden, weight, targets = problem(rows, vocabulary)
    upstream = torch.ones(rows).double() if kind == 0 else torch.linspace(-1, 2, rows).double()
    scale = torch.linspace(0.5, 3, rows).double() if kind == 2 else None
    nll = token_nll(hidden, weight, targets, row_scale=scale, rows_at_once=at_once)
    ours = torch.autograd.grad((nll * upstream).sum() * 0.3, (hidden, weight))
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * (1 if scale is None else scale)
    theirs = torch.autograd.grad((plain * upstream).sum() * 0.3, (hidden, weight))
    torch.testing.assert_close(nll, plain)
    torch.testing.assert_close(ours, theirs)


def test_a_second_backward_gives_the_same_gradients():
    hidden, weight, targets = problem(5, 7)
    loss = token_nll(hidden, weight, targets, rows_at_once=2).mean()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(first, second)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = problem(5, 7)
    token_nll(hidden, weight.detach(), targets, rows_at_once=2).sum().backward()
    frozen = hidden.grad.clone()
    token_nll(hidden.detach(), weight, targets, rows_at_once=2).sum().backward()
    expected = torch.autograd.grad(
        F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"), (hidden, weight)
    )
    torch.testing.assert_close((frozen, weight.grad), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            token_nll(hidden, weight, targets),
            F.cross_entropy(hidden @ weight.t(), targets, reduction="none"),
        )


def test_low_precision_is_summed_in_float32():
    hidden, weight, targets = problem(40, 50, dtype=torch.float32)
    exact = torch.autograd.grad(token_nll(hidden, weight, targets).mean(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        nll = token_nll(hidden, weight, targets, rows_at_once=7)
        with torch.no_grad():
            assert torch.equal(token_nll(hidden, weight, targets, rows_at_once=7), nll)
    assert nll.dtype == torch.float32
    assert not torch.equal(nll, token_nll(hidden, weight, targets, rows_at_once=7))
    found = torch.autograd.grad(nll.mean(), (hidden, weight))
    assert [gradient.dtype for gradient in found] == [torch.float32] * 2
    torch.testing.assert_close(found, exact, atol=2e-3, rtol=0.05)
    half = [value.detach().bfloat16().requires_grad_() for value in (hidden, weight)]
    nll = token_nll(*half, targets, rows_at_once=7)
    assert nll.dtype == torch.float32
    assert torch.autograd.grad(nll.mean(), half)[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden is \[2, 3, 4\] and weight \[5, 4\]"),
        ({"weight": torch.zeros(5, 3)}, r"weight \[5, 3\] but \[N, H\] and \[V, H\] were expected"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets are \[3\] but hidden has 2 rows"),
        ({"row_scale": torch.ones(3)}, r"row_scale is \[3\] but \[2\] was expected"),
        ({"rows_at_once": 0}, "rows_at_once is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=message):
        token_nll(**(arguments | changes))
