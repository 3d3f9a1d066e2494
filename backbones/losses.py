"""Adversarial losses of a discriminator's outputs, which may have any shape; means are over all of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge loss of the discriminator (Lim & Ye 2017; BigGAN, Sec. 3).

    Args:
        real: outputs for real pictures.
        fake: outputs for generated pictures.

    Returns:
        Two scalars, ``mean max(0, 1 - real)`` and ``mean max(0, 1 + fake)``; the loss is their sum.

    Example:
        >>> import torch
        >>> hinge_discriminator(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]))
        (tensor(0.5000), tensor(1.))
    """
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: ``-mean fake``.

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
