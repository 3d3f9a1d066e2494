"""Two other discretisations behind FQ's result, to tell what of FQ's effect is the dictionary's.

FSQ rounds without any dictionary; SimVQ learns its dictionary by gradients instead of following the features.
Both have parameters: build them before the optimiser.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fq import ops
from fq.options import integer, require
from fq.quantize import FQOutput
from fq.search import wide_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence


class FiniteScalarQuantize(nn.Module):
    """Project to a few channels, round each to a fixed number of levels, project back (Mentzer et al. 2023).

    A channel ``z`` becomes ``round(bound(z))`` with ``bound(z) = half · tanh(z + shift) - offset``, which
    takes ``levels`` integer values (Sec. 3.1 of arXiv:2309.15505); gradients pass the rounding unchanged.
    There is no codebook and no loss: its ``loss`` is 0.

    Args:
        dim: D, channels of the features.
        levels: values of each projected channel, at least 2 each; their product is the number of codes.

    Raises:
        ValueError: a number is too small.
        TypeError: a number is no integer.

    Example:
        >>> features, indices, loss = FiniteScalarQuantize(16, (8, 5, 5))(torch.randn(2, 16, 4, 4))
        >>> features.shape, indices.shape, loss
        (torch.Size([2, 16, 4, 4]), torch.Size([2, 4, 4]), tensor(0.))
    """

    levels: Tensor

    def __init__(self, dim: int, levels: Sequence[int] = (8, 5, 5, 5)) -> None:
        super().__init__()
        integer(dim, "dim", 1)
        require(len(levels) > 0, "levels", tuple(levels), "at least one number of levels")
        for number in levels:
            integer(number, "levels", 2)
        self.dim, self.codebook_size = dim, math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels))
        self.reduce, self.expand = nn.Linear(dim, len(levels)), nn.Linear(len(levels), dim)

    def forward(self, features: Tensor) -> FQOutput:
        """Quantise.

        Args:
            features: ``[B, dim, *spatial]``, floating.

        Returns:
            ``FQOutput(features, indices, loss)``; the features are fresh.

        Raises:
            ValueError: the channels differ from ``dim``.
        """
        _check(features, self.dim)
        levels = self.levels.to(features.dtype)
        tokens = self.reduce(features.movedim(1, -1))  # [B, *spatial, d]
        half = (levels - 1) * (1 + 1e-3) / 2
        # An even number of levels has no middle one: shift, so that zero lies between two.
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(features.dtype)
        bounded = half * torch.tanh(tokens + torch.atanh(offset / half)) - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        steps = self.levels.div(2, rounding_mode="floor")
        digits = (rounded.detach().round().to(torch.int64) + steps).clamp(min=0).minimum(self.levels - 1)
        places = torch.cat([self.levels.new_ones(1), self.levels.cumprod(0)[:-1]])
        output = self.expand(rounded / steps.to(features.dtype)).movedim(-1, 1)
        loss = torch.zeros((), dtype=wide_dtype(features, features), device=features.device)
        return FQOutput(output, (digits * places).sum(-1), loss)


class SimVQ(nn.Module):
    """Frozen random codes seen through one learnt linear map (Zhu et al. 2024, arXiv:2411.02038).

    ``codes = C W`` with ``C`` fixed: every code moves when ``W`` learns, so none can die. The loss pulls the
    codes to the features and, weighted, the features to their codes; the output is straight-through.

    Args:
        dim: D, channels of the features.
        codebook_size: K.
        commitment_weight: of the features' part of the loss.
        seed: of the frozen codes.

    Raises:
        ValueError: a number is too small.
        TypeError: a size is no integer.

    Example:
        >>> features, indices, loss = SimVQ(16, 32)(torch.randn(2, 16, 4, 4))
        >>> indices.shape, bool(loss > 0)
        (torch.Size([2, 4, 4]), True)
    """

    frozen: Tensor

    def __init__(
        self, dim: int, codebook_size: int, *, commitment_weight: float = 0.25, seed: int = 0
    ) -> None:
        super().__init__()
        integer(dim, "dim", 1)
        integer(codebook_size, "codebook_size", 1)
        require(commitment_weight >= 0, "commitment_weight", commitment_weight, "a number of at least 0")
        self.dim, self.codebook_size, self.commitment_weight = dim, codebook_size, commitment_weight
        draw = torch.Generator("cpu").manual_seed(seed)
        codes = torch.randn(codebook_size, dim, generator=draw, device="cpu") / math.sqrt(dim)
        self.register_buffer("frozen", codes.to(torch.get_default_device()))
        self.map = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> FQOutput:
        """Quantise.

        Args:
            features: ``[B, dim, *spatial]``, floating.

        Returns:
            ``FQOutput(features, indices, loss)``; the features are fresh.

        Raises:
            ValueError: the channels differ from ``dim``.
        """
        _check(features, self.dim)
        codes = self.map(self.frozen)  # [K, D]
        tokens = features.reshape(len(features), self.dim, math.prod(features.shape[2:]))
        difference, error, indices, _ = ops.quantize(tokens, codes.detach(), statistics=False)
        chosen = codes[indices].transpose(1, 2)  # [B, D, S], with a gradient for the map
        toward = (chosen - tokens.detach()).square().mean()
        output = (tokens - difference.detach()).reshape(features.shape).to(features.dtype)
        loss = toward + self.commitment_weight * error
        return FQOutput(output, indices.reshape(len(features), *features.shape[2:]), loss)


def _check(features: Tensor, dim: int) -> None:
    if features.ndim < 2 or features.shape[1] != dim:
        raise ValueError(
            f"features of shape {list(features.shape)} do not have {dim} channels in layout "
            "[B, dim, *spatial]: build the control with dim equal to the channels of the layer"
        )
