"""Losses and penalties against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.losses import (
    ADVERSARIAL,
    gradient_penalty,
    multiclass_hinge,
    nonsaturating_generator,
    path_lengths,
    r1_penalty,
)

REAL, FAKE = torch.tensor([[2.0], [-0.5]]), torch.tensor([[1.5], [-3.0]])


@pytest.mark.parametrize(
    ("name", "real", "fake", "generator"),
    [
        ("hinge", (0 + 1.5) / 2, (2.5 + 0) / 2, (-1.5 + 3) / 2),
        ("least_squares", (1 + 2.25) / 2, (2.25 + 9) / 2, (0.25 + 16) / 2),
        ("wasserstein", -0.75, -0.75, 0.75),
    ],
)
def test_adversarial_losses_by_hand(name, real, fake, generator):
    loss = ADVERSARIAL[name]
    assert [float(term) for term in loss.discriminator(REAL, FAKE)] == pytest.approx([real, fake])
    assert float(loss.generator(FAKE)) == pytest.approx(generator)


def test_nonsaturating_is_the_cross_entropy_of_a_logistic_classifier():
    on_real, on_fake = ADVERSARIAL["nonsaturating"].discriminator(REAL, FAKE)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(on_real, entropy(REAL, torch.ones_like(REAL)))
    torch.testing.assert_close(on_fake, entropy(FAKE, torch.zeros_like(FAKE)))
    torch.testing.assert_close(nonsaturating_generator(FAKE), entropy(FAKE, torch.ones_like(FAKE)))


def test_multiclass_hinge_is_least_where_the_right_class_leads_by_one():
    scores = torch.tensor([[2.0, 0.5, 1.0, -4.0]])
    assert float(multiclass_hinge(scores, torch.tensor([0]))) == pytest.approx(1 / 4)
    assert float(multiclass_hinge(scores, torch.tensor([2]))) == pytest.approx((2 + 0.5 + 1 + 0) / 4)


def test_r1_is_the_squared_gradient_of_each_picture_and_can_be_differentiated():
    weight = torch.randn(12, dtype=torch.float64, requires_grad=True)
    images = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    outputs = 0.5 * (images.flatten(1) * weight).sum(1, keepdim=True).square()
    # The gradient at x is (w x) w.
    dot = images.detach().flatten(1) @ weight
    expected = dot.square() * weight.square().sum()
    penalty = r1_penalty(outputs, images)
    torch.testing.assert_close(penalty, expected)
    (ours,) = torch.autograd.grad(penalty.mean(), weight)
    (theirs,) = torch.autograd.grad(expected.mean(), weight)
    torch.testing.assert_close(ours, theirs)


def test_gradient_penalty_of_a_plane_is_its_slope_less_one_squared_wherever_it_looks():
    slope = torch.full((12,), 0.75, dtype=torch.float64)
    looked: list[torch.Tensor] = []

    def critic(images: torch.Tensor) -> torch.Tensor:
        looked.append(images)
        return images.flatten(1) @ slope

    real, fake = torch.zeros(4, 3, 2, 2, dtype=torch.float64), torch.ones(4, 3, 2, 2, dtype=torch.float64)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    penalty = gradient_penalty(critic, real, fake, share)
    assert float(penalty) == pytest.approx((12**0.5 * 0.75 - 1) ** 2)
    # Leaves that require grad: how FQ layers know a penalty.
    assert looked[0].is_leaf and looked[0].requires_grad
    assert looked[0].detach().mean((1, 2, 3)).tolist() == pytest.approx(share.tolist())


def test_gradient_penalty_is_finite_where_the_critic_is_flat():
    layer = nn.Linear(4, 1)
    nn.init.zeros_(layer.weight)
    penalty = gradient_penalty(layer, torch.zeros(2, 4), torch.ones(2, 4), torch.rand(2))
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(1, abs=1e-5) and layer.weight.grad.isfinite().all()


def test_path_lengths_of_a_linear_generator_follow_from_its_matrix():
    torch.manual_seed(0)
    matrices = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)  # one for each of three styles
    ws = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    images = torch.einsum("bnw,nwp->bp", ws, matrices).reshape(2, 3, 2, 2)
    noise = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    moved = torch.einsum("nwp,bp->bnw", matrices, noise.flatten(1)) / 2  # √(H W) is 2
    expected = moved.square().sum(2).mean(1).sqrt()
    lengths = path_lengths(images, ws, noise)
    torch.testing.assert_close(lengths, expected)
    (ours,) = torch.autograd.grad(lengths.sum(), matrices)
    (theirs,) = torch.autograd.grad(expected.sum(), matrices)
    torch.testing.assert_close(ours, theirs)
