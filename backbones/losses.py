"""Losses of a discriminator's outputs, and the gradient penalties that go with them.

The outputs may have any shape; means are over all of it. Losses of a discriminator come as two terms, for
real and for generated pictures; the loss is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["hinge", "nonsaturating", "least_squares", "wasserstein"]


class AdversarialLoss(NamedTuple):
    """Both sides of one adversarial game."""

    discriminator: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Takes outputs for real and for generated pictures; two scalars."""
    generator: Callable[[Tensor], Tensor]
    """Takes outputs for generated pictures; a scalar."""


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss of the discriminator (Lim & Ye 2017; BigGAN, Sec. 3).

    Args:
        real: outputs for real pictures.
        fake: outputs for generated pictures.

    Returns:
        Two scalars, ``mean max(0, 1 - real)`` and ``mean max(0, 1 + fake)``.

    Example:
        >>> import torch
        >>> hinge_discriminator(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]))
        (tensor(0.5000), tensor(1.))
    """
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """Hinge loss of the generator, which is also Wasserstein's: ``-mean fake``.

    Args:
        fake: outputs for generated pictures.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> hinge_generator(torch.tensor([2.0, 0.0]))
        tensor(-1.)
    """
    return -fake.mean()


def nonsaturating_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic loss of the discriminator (Goodfellow et al. 2014): softplus of -real and of fake.

    Args:
        real: logits for real pictures.
        fake: logits for generated pictures.

    Returns:
        Two scalars, ``mean log(1 + exp(-real))`` and ``mean log(1 + exp(fake))``.

    Example:
        >>> import torch
        >>> nonsaturating_discriminator(torch.zeros(2), torch.zeros(2))
        (tensor(0.6931), tensor(0.6931))
    """
    return F.softplus(-real).mean(), F.softplus(fake).mean()


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """Logistic loss of the generator, ``mean log(1 + exp(-fake))``.

    Args:
        fake: logits for generated pictures.

    Returns:
        A scalar.
    """
    return F.softplus(-fake).mean()


def least_squares_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with targets 1 and 0 (Mao et al. 2017; U-GAT-IT, Sec. 2.2.1).

    Args:
        real: outputs for real pictures.
        fake: outputs for generated pictures.

    Returns:
        Two scalars, ``mean (real - 1)²`` and ``mean fake²``.

    Example:
        >>> import torch
        >>> least_squares_discriminator(torch.tensor([3.0]), torch.tensor([0.5]))
        (tensor(4.), tensor(0.2500))
    """
    return (real - 1).square().mean(), fake.square().mean()


def least_squares_generator(fake: Tensor) -> Tensor:
    """Least squares of the generator, ``mean (fake - 1)²``.

    Args:
        fake: outputs for generated pictures.

    Returns:
        A scalar.
    """
    return (fake - 1).square().mean()


def wasserstein_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Wasserstein loss of the critic (Arjovsky et al. 2017); give it :func:`gradient_penalty` as well.

    Args:
        real: outputs for real pictures.
        fake: outputs for generated pictures.

    Returns:
        Two scalars, ``-mean real`` and ``mean fake``.
    """
    return -real.mean(), fake.mean()


ADVERSARIAL: dict[LossName, AdversarialLoss] = {
    "hinge": AdversarialLoss(hinge_discriminator, hinge_generator),
    "nonsaturating": AdversarialLoss(nonsaturating_discriminator, nonsaturating_generator),
    "least_squares": AdversarialLoss(least_squares_discriminator, least_squares_generator),
    "wasserstein": AdversarialLoss(wasserstein_discriminator, hinge_generator),
}


def multiclass_hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Hinge over all classes, the right one included, as in TAC-GAN's code: it adds a constant 1 / classes.

    Args:
        scores: ``[B, classes]``.
        labels: int64 ``[B]``.

    Returns:
        A scalar, ``mean max(0, 1 - scores[label] + scores)`` over samples and classes.

    Example:
        >>> import torch
        >>> multiclass_hinge(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor(0.5000)
    """
    return F.relu(1 - scores.gather(1, labels[:, None]) + scores).mean()


def r1_penalty(outputs: Tensor, images: Tensor) -> Tensor:
    """Squared gradient norm of the outputs at the pictures (Mescheder et al. 2018, Eq. 9, without γ/2).

    Args:
        outputs: of the discriminator for ``images``, any shape.
        images: ``[B, ...]``; must have required grad before the forward.

    Returns:
        ``[B]``, differentiable.
    """
    (gradient,) = torch.autograd.grad(outputs.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor
) -> Tensor:
    """Mean squared distance of gradient norms from 1 between real and fake (Gulrajani et al. 2017, Eq. 3).

    The pictures it looks at are leaves that require grad, which is how attached FQ layers know that this
    forward is a penalty.

    Args:
        discriminator: from pictures ``[B, ...]`` to outputs of any shape.
        real: ``[B, ...]``.
        fake: like ``real``.
        share: uniform in [0, 1], ``[B]``: how far each picture lies on the way from real to fake.

    Returns:
        A scalar, without the usual factor of 10.
    """
    share = share.reshape(-1, *[1] * (real.ndim - 1)).to(real)
    between = torch.lerp(real.detach(), fake.detach(), share).requires_grad_()
    # The root of a sum of squares has no derivative at zero.
    return ((r1_penalty(discriminator(between), between) + 1e-12).sqrt() - 1).square().mean()


def path_lengths(images: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """How far pictures move per step in w, along a random direction (StyleGAN2, Sec. 3.2).

    Args:
        images: ``[B, C, H, W]``, made from ``latents``.
        latents: ``[B, num_ws, w_dim]``.
        noise: standard normal, like ``images``; scaled to ``1 / √(H W)`` here.

    Returns:
        ``[B]``: root of the squared lengths of ``Jᵀ noise``, summed over w and averaged over ``num_ws``;
        differentiable.
    """
    height, width = images.shape[-2:]
    moved = (images * noise).sum() / math.sqrt(height * width)
    (gradient,) = torch.autograd.grad(moved, latents, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
