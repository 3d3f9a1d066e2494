"""Nearest-centroid search and what a layer needs beside it, in pure PyTorch.

The score of code ``e`` for token ``x`` is ``x·e - ||e||²/2``: its largest value belongs to the smallest
distance, and the term ``||x||²``, equal for all codes, is never formed. Tokens are handled in chunks, so
memory does not grow with their number.
"""

from __future__ import annotations

import functools
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# Scores of a chunk: 2 MiB stay close to a core; a convolution re-orders its weights in every call and wants
# fewer calls; a GPU wants larger launches.
_SCORES = {"linear": 1 << 19, "conv": 1 << 20, "mm": 1 << 20, "gpu": 1 << 24}
_NUMBERS = {"cpu": 1 << 17}  # of a chunk of element-by-element work
_LANES = 32  # groups of codes whose maxima one vectorised pass takes side by side
# Channels, and multiplications, from which it pays to lay the codes out for oneDNN once.
_LAYOUT_CHANNELS, _LAYOUT_WORK = 192, 1 << 29
_BATCH = 16  # rows of the batch axis below which a 1x1 convolution falls back to MKL on one thread
GEMM_VARIABLE = "FQ_CPU_GEMM"
"""Environment variable that fixes the matrix product of the CPU search: ``linear``, ``conv`` or ``mm``."""
Product = Literal["linear", "conv", "mm"]


def nearest(features: Tensor, codebook: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Index of the closest codebook row for every feature vector.

    Minimises ``||x - e||²`` (FQ-GAN, Eq. 2); ties go to the lowest index, a token with a NaN gets index 0.
    No gradient flows. Distances are formed in the wider of both dtypes, at least float32.

    Args:
        features: ``[N, D]``, floating.
        codebook: ``[K, D]``, floating, on the device of ``features``.
        chunk_size: tokens handled at once; ``None`` picks a number that keeps the scores in cache (the fused
            CUDA kernel has no scores to keep and does not look at it).

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
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.fq.nearest(features, codebook, chunk_size or 0)
        return found
    return search(features, codebook, chunk_size)


@torch.no_grad()
def search(features: Tensor, codebook: Tensor, chunk_size: int | None = None) -> Tensor:
    """What :func:`nearest` does, without its checks.

    Args:
        features: ``[N, D]``.
        codebook: ``[K, D]``.
        chunk_size: as for :func:`nearest`.

    Returns:
        int64 ``[N]``.
    """
    if len(features) == 0:
        return torch.empty(0, dtype=torch.int64, device=features.device)
    dtype = wide_dtype(features, codebook)
    if fused := kernels(features, dtype):
        found: Tensor = fused.nearest(features.t()[None], codebook.to(dtype).contiguous())[0]
        return found
    with torch.autocast(features.device.type, enabled=False), _full_precision(features.device):
        best = _best(codebook.detach().to(dtype), len(features))
        size = chunk_size or _chunk(best.scores, len(codebook))
        indices = torch.empty(len(features), dtype=torch.int64, device=features.device)
        for start in range(0, len(features), size):
            indices[start : start + size] = best(features[start : start + size].to(dtype))
        return indices


@torch.no_grad()
def quantize(
    features: Tensor,
    codebook: Tensor,
    learn: Tensor | None,
    labels: Tensor | None,
    statistics: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest codes, the way to them, its mean square, and the statistics of an EMA step, in few passes.

    Args:
        features: ``[B, D, S]``, any strides.
        codebook: ``[K, D]``, or ``[C, K, D]`` with ``labels``.
        learn: bool ``[B]``: samples whose tokens count in the statistics; ``None`` for all.
        labels: int64 ``[B]``: the class of each sample, whose codes alone are searched.
        statistics: whether to make them.
        per_sample: one mean a sample instead of one in all.

    Returns:
        ``(difference [B, D, S], error [] or [B], indices int64 [B, S], packed)`` in the wider dtype of both
        inputs, at least float32. ``difference`` is the token minus its code, ``error`` the mean of its
        square, ``packed [K, D + 1]`` each code's sum of tokens and their number, or empty.
    """
    dtype = wide_dtype(features, codebook)
    batch, dim, places = features.shape
    scale = 1 / max(dim * places * (1 if per_sample else batch), 1)
    if labels is None and (fused := kernels(features, dtype)) and features.numel():
        indices, difference, error, packed = fused.quantize(
            features,
            codebook.to(dtype).contiguous(),
            learn if learn is None else learn.contiguous(),
            statistics=statistics,
            loss_scale=scale,
            per_sample=per_sample,
        )
        return difference, error, indices, packed
    codes = codebook.to(dtype).reshape(-1, dim)
    tokens = _rows(features).to(dtype)  # [N, D]; a copy unless channels-last
    if labels is None:
        indices = search(tokens, codes)
    else:
        indices = search_by_class(tokens.view(batch, places, dim), codebook, labels).flatten()
    packed = tokens.new_empty(0)
    if statistics:
        keys = indices
        if learn is not None:  # tokens that do not count go to a code of their own, which is dropped
            keys = torch.where(learn.repeat_interleave(places), indices, len(codes))
        packed = pack(tokens, keys, len(codes))
    owned = tokens.untyped_storage().data_ptr() != features.untyped_storage().data_ptr()
    difference = tokens if owned else torch.empty_like(tokens)
    squares = tokens.new_empty(len(tokens))
    size = _chunk(_NUMBERS.get(features.device.type, _SCORES["gpu"]), dim)
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        step = torch.sub(tokens[part], codes.index_select(0, indices[part]), out=difference[part])
        torch.sum(step * step, 1, out=squares[part])
    error = squares.view(batch, places).sum(1) if per_sample else squares.sum()
    shaped = difference.view(batch, places, dim).transpose(1, 2)
    if (
        features.device.type != "cpu"
    ):  # the fused kernels, and so the promise made to a compiler, keep strides
        shaped = torch.empty_like(features, dtype=dtype).copy_(shaped)
    return shaped, error * scale, indices.view(batch, places), packed


@torch.no_grad()
def search_by_class(features: Tensor, codebook: Tensor, labels: Tensor) -> Tensor:
    """Nearest code of each token among the codes of its sample's class; ties and NaN as in :func:`nearest`.

    Args:
        features: ``[B, S, D]``.
        codebook: ``[C, K, D]``.
        labels: int64 ``[B]``, values in ``[0, C)``.

    Returns:
        int64 ``[B, S]``, values in ``[0, C * K)``: class and code in one number.
    """
    dtype = wide_dtype(features, codebook)
    codebook = codebook.to(dtype)
    size, places = codebook.shape[1], features.shape[1]
    bias = codebook.square().sum(2).mul_(-0.5)  # [C, K]
    found = [torch.empty(0, places, dtype=torch.int64, device=features.device)]
    limit = _SCORES["mm" if features.device.type == "cpu" else "gpu"]
    samples = max(1, _chunk(limit, size) // max(places, 1))
    with _full_precision(features.device):
        for part, label in zip(torch.split(features, samples), torch.split(labels, samples), strict=True):
            codes = codebook[label].transpose(1, 2)  # [b, D, K]
            scores = torch.baddbmm(bias[label][:, None], part.to(dtype), codes)  # [b, S, K]
            top, index = scores.max(2)
            found.append(index.masked_fill_(top.isnan(), 0) + label[:, None] * size)
    return torch.cat(found)


def _rows(features: Tensor) -> Tensor:
    """Tokens in rows, ``[B, D, S]`` to ``[N, D]``: a view of channels-last features, else a copy."""
    batch, dim, places = features.shape
    if places < 1024 or features.stride(2) != 1 or features.device.type != "cpu":
        return features.transpose(1, 2).reshape(-1, dim).contiguous()  # of one sample it could be columns
    # Columns a page apart fall into the same lines of the cache; a copy of one matrix goes by blocks.
    rows = features.new_empty(batch, places, dim)
    for source, target in zip(features, rows, strict=True):
        target.copy_(source.t())
    return rows.view(-1, dim)


def pack(features: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """Sums and numbers of every code's tokens as one matrix, so that processes exchange one tensor.

    Args:
        features: ``[N, D]``, float32 or float64.
        indices: int64 ``[N]``, values in ``[0, codebook_size]``; the last one stands for no code.
        codebook_size: K.

    Returns:
        ``[K, D + 1]``: the sum of the tokens, then their number.

    Example:
        >>> pack(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 2, 1]), 2)
        tensor([[0., 0.],
                [5., 2.]])
    """
    dim = features.shape[1]
    packed = features.new_zeros(codebook_size + 1, dim + 1)
    if features.device.type == "cpu":
        # One row after the other: a fixed order. On CUDA the same call is a race of atomics.
        sums = features.new_zeros(codebook_size + 1, dim).index_add_(0, indices, features)
        counts = torch.bincount(indices, minlength=codebook_size + 1)
    else:
        counts, sums = code_sums(features, indices, codebook_size + 1)
    packed[:, :dim] = sums
    packed[:, dim] = counts
    return packed[:codebook_size]


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


def wide_dtype(features: Tensor, codebook: Tensor) -> torch.dtype:
    """The dtype distances are formed in: the wider of both, at least float32.

    Args:
        features: any tensor.
        codebook: any tensor.

    Returns:
        ``torch.float32`` or ``torch.float64``.
    """
    return torch.promote_types(torch.promote_types(features.dtype, codebook.dtype), torch.float32)


def kernels(features: Tensor, dtype: torch.dtype) -> Any:
    """The fused kernels, where they can serve: on NVIDIA's CUDA, with Triton, in float32.

    Args:
        features: the tensor they would read.
        dtype: the distances would be formed in.

    Returns:
        The module ``fq.kernels``, or ``None``.
    """
    if features.device.type != "cuda" or dtype != torch.float32 or torch.version.hip:
        return None
    return _load_kernels()


@functools.cache
def _load_kernels() -> Any:
    try:
        from fq import kernels as module
    except ImportError:  # a PyTorch without Triton
        return None
    return module


def _best(codebook: Tensor, tokens: int) -> _BestByMax | _BestOnCPU:
    """The form of the search for these codes and that many tokens."""
    if codebook.device.type != "cpu" or codebook.dtype != torch.float32:
        return _BestByMax(codebook)
    product = _cpu_product()
    small = codebook.shape[1] < _LAYOUT_CHANNELS or tokens * codebook.numel() < _LAYOUT_WORK
    if product == "linear" and small:
        product = "conv"
    return _BestOnCPU(codebook, product)


class _BestByMax:
    """Best code of each token by a product and a plain maximum: float64, and GPUs without Triton."""

    def __init__(self, codebook: Tensor) -> None:
        self.transposed = codebook.t()  # [D, K]
        self.bias = codebook.square().sum(1).mul_(-0.5)  # [K]
        self.first = _first_equal(codebook)
        self.scores = _SCORES["mm" if codebook.device.type == "cpu" else "gpu"]

    def __call__(self, features: Tensor) -> Tensor:
        scores = torch.addmm(self.bias, features, self.transposed)  # [n, K]
        top, index = scores.max(1)
        # max() ranks NaN above everything but does not say which of several: fix the row to code 0.
        return self.first[index.masked_fill_(top.isnan(), 0)]


class _BestOnCPU:
    """Best code of each token in float32 on a CPU, by a faster product and a faster maximum.

    PyTorch's CPU ``mm`` goes to MKL, which runs at less than half speed on some processors. oneDNN gets the
    same product, in true float32, as ``conv``, a 1x1 convolution over tokens laid out as channels-last
    pixels, or as ``linear``, the operator that compiled models use, which lays the codes out for it once.

    The maximum over the last axis with its index is scalar code, without it is vectorised. So the codes are
    dealt out to columns such that one vectorised pass over ``[n, K / G, G]`` gives the maxima of G groups of
    neighbouring codes; then come the best group, and the best of its few codes: in both the lowest index wins
    a tie.
    """

    def __init__(self, codebook: Tensor, product: Product) -> None:
        size, dim = codebook.shape
        self.lanes = 1 if size < 4 * _LANES else _LANES
        # Whole vectors of columns: then equal codes get equal scores wherever they stand.
        padding = -size % max(self.lanes, 16)
        bias, codes = codebook.square().sum(1).mul_(-0.5), codebook
        if padding:
            bias = F.pad(bias, (0, padding), value=-torch.inf)  # never the best
            codes = F.pad(codes, (0, 0, 0, padding))
        self.group = len(codes) // self.lanes  # codes of a group
        if self.lanes > 1:  # code g * group + c goes to column c * lanes + g
            codes = codes.view(self.lanes, self.group, dim).transpose(0, 1).reshape(-1, dim)
            bias = bias.view(self.lanes, self.group).t().reshape(-1)
        self.codes, self.bias, self.product, self.scores = codes, bias, product, _SCORES[product]
        if product == "linear":
            rows = _chunk(self.scores, len(codes))
            self.codes = torch.ops.mkldnn._reorder_linear_weight(codes.contiguous(), rows)
        # MKL may sum the last columns of a tile in another order than the rest.
        self.first = _first_equal(codebook) if product == "mm" else None

    def __call__(self, features: Tensor) -> Tensor:
        rows, dim = features.shape
        if self.product == "linear":
            product = torch.ops.mkldnn._linear_pointwise
            return self._argmax(product(features.contiguous(), self.codes, self.bias, "none", [], ""))
        if self.product == "mm":
            found = self._argmax(torch.addmm(self.bias, features, self.codes.t()))
            assert self.first is not None
            return self.first[found]
        features = F.pad(features, (0, 0, 0, -rows % _BATCH)) if rows % _BATCH else features
        pixels = features.view(_BATCH, -1, 1, dim).permute(0, 3, 1, 2)  # [16, D, n/16, 1], channels-last
        scores = F.conv2d(pixels, self.codes[:, :, None, None], self.bias)
        return self._argmax(scores.permute(0, 2, 3, 1).reshape(len(features), -1)[:rows])

    def _argmax(self, scores: Tensor) -> Tensor:
        """First index of the row maximum; 0 for a row with NaN."""
        if self.lanes == 1:
            top, index = scores.max(1)
            return index.masked_fill_(top.isnan(), 0)
        table = scores.view(len(scores), self.group, self.lanes)
        top, lane = table.amax(1).max(1)
        column = lane[:, None, None].expand(len(scores), self.group, 1)
        inside = table.gather(2, column)[:, :, 0].argmax(1)
        return inside.add_(lane, alpha=self.group).masked_fill_(top.isnan(), 0)


@functools.cache
def _cpu_product() -> Product:
    """Which product this process uses on a CPU: timed once, for the answer depends on the processor.

    The environment variable ``FQ_CPU_GEMM`` decides without a clock.
    """
    usable = _usable_products()
    chosen = os.environ.get(GEMM_VARIABLE)
    if chosen is not None:
        if chosen not in usable:
            raise ValueError(
                f"{GEMM_VARIABLE} is {chosen!r}: set it to one of {', '.join(usable)}, or leave it out to "
                "have them timed"
            )
        return chosen
    draw = torch.Generator("cpu").manual_seed(0)
    codes = torch.randn(1024, 256, generator=draw, device="cpu")
    tokens = torch.randn(512, 256, generator=draw, device="cpu")
    forms = {product: _BestOnCPU(codes, product) for product in usable}
    spent: dict[Product, list[float]] = {product: [] for product in usable}
    for _ in range(5):
        for product, form in forms.items():
            start = time.perf_counter()
            form(tokens)
            spent[product].append(time.perf_counter() - start)
    best = usable[0]
    for product in usable[1:]:
        # The first round warms up. A clear margin: two runs on one machine must not differ by chance, or a
        # resumed run would not repeat the first one's last bits.
        if 1.5 * min(spent[product][1:]) < min(spent[best][1:]):
            best = product
    return best


def _usable_products() -> list[Product]:
    """The products that this build of PyTorch has, the one that is usually fastest first."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return ["mm"]
    # The operator is PyTorch's own, not a public one: it may be gone one day.
    internal = all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )
    return ["linear", "conv", "mm"] if internal else ["conv", "mm"]


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


def _chunk(scores: int, codebook_size: int) -> int:
    """Tokens handled at once."""
    # Below 512 rows a matrix product loses its efficiency; 16-row multiples keep the ragged tail to the last
    # chunk.
    return min(max(scores // codebook_size, 512), 1 << 16) // _BATCH * _BATCH


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """TF32 and bfloat16 products confuse close codes: off inside, whatever the program has chosen outside."""
    backends: Any = torch.backends
    used = {"cuda": [backends.cuda.matmul], "cpu": [backends.mkldnn.matmul, backends.mkldnn.conv]}
    lowered = [
        (backend, backend.fp32_precision)
        for backend in used.get(device.type, [])
        if backend.fp32_precision not in ("ieee", "none")
    ]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


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
