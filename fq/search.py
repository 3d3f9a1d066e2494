"""Nearest-centroid search and the per-code statistics of its result, in pure PyTorch.

The score of code ``e`` for token ``x`` is ``x·e - ||e||²/2``: its largest value belongs to the smallest
distance, and the term ``||x||²``, equal for all codes, is never formed. Tokens are handled in chunks, so
memory does not grow with their number.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# A score block of this many numbers (8 MiB) stays in a CPU's last-level cache; a GPU wants larger launches.
_CPU_SCORES, _GPU_SCORES = 1 << 21, 1 << 24
# Read once: a compiled graph cannot ask.
_ONEDNN = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_GROUP = 32  # codes reduced by one vectorised amax before the scalar argmax


def nearest(features: Tensor, codebook: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Index of the closest codebook row for every feature vector.

    Minimises ``||x - e||²`` (FQ-GAN, Eq. 2); ties go to the lowest index, a token with a NaN gets index 0.
    No gradient flows. Distances are formed in the wider of both dtypes, at least float32.

    Args:
        features: ``[N, D]``, floating.
        codebook: ``[K, D]``, floating, on the device of ``features``.
        chunk_size: tokens handled at once; ``None`` picks a number that keeps the scores in cache.

    Returns:
        int64 ``[N]``, values in ``[0, K)``.

    Raises:
        ValueError: widths differ, a tensor is not a matrix, the codebook is empty, or ``chunk_size`` is below
            1.

    Example:
        >>> nearest(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0]]))
        tensor([1])
    """
    _check(features, codebook, chunk_size)
    dtype = torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)
    with (
        torch.no_grad(),
        torch.autocast(features.device.type, enabled=False),
        _full_precision(features.device),
    ):
        codes = codebook.detach().to(dtype)
        size = chunk_size or _default_chunk(len(codes), features.device)
        through_conv = _ONEDNN and dtype == torch.float32 and features.device.type == "cpu"
        best = _BestByConv(codes) if through_conv else _BestByGemm(codes)
        found = [best(chunk.detach().to(dtype)) for chunk in torch.split(features, size)]
        return torch.cat(found) if len(found) != 1 else found[0]


def code_sums(features: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Number of tokens and sum of tokens of every code, in a fixed order of summation.

    Sorting the tokens by code and summing each segment (an embedding bag) gives the same bits in every run
    and needs no ``N x K`` one-hot matrix.

    Args:
        features: ``[N, D]``, float32 or float64.
        indices: int64 ``[N]``, values in ``[0, codebook_size)``.
        codebook_size: K.

    Returns:
        ``(counts, sums)`` of shapes ``[K]`` and ``[K, D]``, in the dtype of ``features``.

    Example:
        >>> code_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 1]), 3)
        (tensor([1., 2., 0.]), tensor([[2.],
                [5.],
                [0.]]))
    """
    ones = torch.ones_like(indices, dtype=features.dtype)
    counts = features.new_zeros(codebook_size).scatter_add_(0, indices, ones)
    if len(indices) == 0:
        return counts, features.new_zeros(codebook_size, features.shape[1])
    order = torch.argsort(indices, stable=True)
    starts = counts.to(torch.int64).cumsum(0) - counts.to(torch.int64)
    return counts, F.embedding_bag(order, features, starts, mode="sum")


class _BestByGemm:
    """Best code of each token by one matrix product: the float64 reference, and every GPU."""

    def __init__(self, codebook: Tensor) -> None:
        self.transposed = codebook.t()  # [D, K]
        self.bias = codebook.square().sum(1).mul_(-0.5)  # [K]
        self.first = _first_equal(codebook)

    def __call__(self, features: Tensor) -> Tensor:
        scores = torch.addmm(self.bias, features, self.transposed)  # [n, K]
        top, index = scores.max(1)
        # max() ranks NaN above everything but does not say which of several: fix the row to code 0.
        return self.first[index.masked_fill_(top.isnan(), 0)]


class _BestByConv:
    """The same scores as a 1x1 convolution over tokens laid out as channels-last pixels.

    PyTorch's CPU ``mm`` goes to MKL, which runs at less than half speed on some processors; a convolution
    goes to oneDNN and stays true float32. With one thread a batch below 16 falls back to MKL, hence the (16,
    D, n/16, 1) view.
    """

    def __init__(self, codebook: Tensor) -> None:
        self.codebook_size = len(codebook)
        bias = codebook.square().sum(1).mul_(-0.5)
        padding = -len(codebook) % _GROUP
        # Padded codes score -inf and can never win.
        self.bias = F.pad(bias, (0, padding), value=-torch.inf)
        self.codes = F.pad(codebook, (0, 0, 0, padding))
        self.weight = self.codes[:, :, None, None]  # [K, D, 1, 1]

    def __call__(self, features: Tensor) -> Tensor:
        rows, dim = features.shape
        even = rows - rows % 16
        if even == 0:
            return self._argmax(torch.addmm(self.bias, features, self.codes.t()))
        pixels = features[:even].reshape(16, even // 16, 1, dim).permute(0, 3, 1, 2)  # channels-last
        scores = F.conv2d(pixels, self.weight, self.bias).permute(0, 2, 3, 1).reshape(even, -1)
        found = self._argmax(scores)
        if even == rows:
            return found
        return torch.cat([found, self._argmax(torch.addmm(self.bias, features[even:], self.codes.t()))])

    def _argmax(self, scores: Tensor) -> Tensor:
        """First index of the row maximum; amax is vectorised where argmax is not, so reduce groups first."""
        if self.codebook_size <= 8 * _GROUP:
            top, index = scores.max(1)
            return index.masked_fill_(top.isnan(), 0)
        groups = scores.view(len(scores), scores.shape[1] // _GROUP, _GROUP)
        maxima = groups.amax(2)  # [n, K / 32]
        top, group = maxima.max(1)
        inside = groups[torch.arange(len(scores)), group].argmax(1)
        return (group * _GROUP + inside).masked_fill_(top.isnan(), 0)


def _first_equal(codebook: Tensor) -> Tensor:
    """For every code the lowest index of a code with the same vector, ``[K]``.

    A product may sum the last columns of a tile in another order than the rest, so that equal codes get
    scores that differ in the last bit, and the tie would go to any of them.
    """
    places = torch.arange(1, codebook.shape[1] + 1, device=codebook.device, dtype=codebook.dtype)
    keys = (codebook * places.sin()).sum(1)  # row by row, so equal codes have equal keys
    keys, order = keys.sort(stable=True)
    index = torch.arange(len(codebook), device=codebook.device)
    # Of each run of equal keys the stable sort puts the lowest index in front.
    starts = torch.where(keys == keys.roll(1), 0, index).cummax(0).values
    first = torch.empty_like(order).scatter_(0, order, order[starts])
    return torch.where((codebook[first] == codebook).all(1), first, index)


def _default_chunk(codebook_size: int, device: torch.device) -> int:
    scores = _CPU_SCORES if device.type == "cpu" else _GPU_SCORES
    # Below 512 rows a matrix product loses its efficiency; 16-row multiples keep the ragged tail to the last
    # chunk.
    return min(max(scores // codebook_size, 512), 1 << 16) // 16 * 16


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """TF32 products confuse close codes, so they stay off inside, whatever the program has chosen outside."""
    chosen = torch.get_float32_matmul_precision() if device.type == "cuda" else "highest"
    if chosen == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def _check(features: Tensor, codebook: Tensor, chunk_size: int | None) -> None:
    if features.ndim != 2 or codebook.ndim != 2:
        raise ValueError(
            f"features have shape {list(features.shape)} and the codebook {list(codebook.shape)}: "
            "pass matrices [N, D] and [K, D], one token or code a row"
        )
    if len(codebook) == 0:
        raise ValueError("the codebook has 0 codes: give it at least one")
    if features.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"features have {features.shape[1]} channels but the codebook has {codebook.shape[1]}: "
            "build FeatureQuantize with dim equal to the channels of the layer it is attached to"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"chunk_size is {chunk_size}: give a positive number of tokens, or None to choose one"
        )
