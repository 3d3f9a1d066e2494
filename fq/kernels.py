"""Triton kernels of the layer: search with its difference and loss, code statistics, and the EMA step.

Features are read where they lie, ``[B, D, S]`` by strides, so neither a permuted copy nor a tensor of tokens
times codes exists. Every sum has a fixed order: two runs give the same bits. Nothing waits for the device and
the number of launches does not depend on the data, so all of it can be captured in a CUDA graph.

Callers check the arguments, import this module only for CUDA tensors, and never pass an empty batch.
"""

# The bodies of kernels are written in Triton's language, which has no types that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fq.kernels_search import (
    CONFIGS,
    MOST_CERTIFIED_CHANNELS,
    Config,
    error_bound,
    offsets,
    search_config,
    search_kernel,
)

__all__ = ["CONFIGS", "Config", "ema_update_", "nearest", "quantize", "search_config"]

_HISTOGRAM_BYTES = 32 << 20  # a [tiles, K] scratch above this gives way to torch.sort
_SCAN_CELLS = 4096  # cells of that scratch that one program of the scan holds at once
_SORTED_ROWS = 128  # tokens, sorted by code, that one program of the segmented sum adds up


def nearest(features: Tensor, codebook: Tensor, *, config: Config | None = None) -> Tensor:
    """Index of the closest codebook row for every token.

    Minimises ``||x - e||²`` (FQ-GAN, Eq. 2); ties go to the lowest index, a token with a NaN gets index 0.
    One launch.

    Args:
        features: ``[B, D, S]`` with any strides; float32, float16 or bfloat16.
        codebook: float32 ``[K, D]``, contiguous.
        config: tiles, where the default choice is not wanted.

    Returns:
        int64 ``[B, S]``, values in ``[0, K)``.

    Raises:
        ValueError: a certified ``config`` for features that are not float32, or too wide for its bound.
    """
    batch, dim, space = features.shape
    config = _checked(config, features) or search_config(dim, len(codebook), batch * space, features.dtype)
    indices = torch.empty(batch, space, dtype=torch.int64, device=features.device)
    _search(features, codebook, indices, config)
    return indices


def quantize(
    features: Tensor,
    codebook: Tensor,
    learn: Tensor | None,
    *,
    statistics: bool,
    loss_scale: float,
    per_sample: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest codes, the way to them and its squared length, and what the codes may learn from the tokens.

    Two launches, five with ``statistics``.

    Args:
        features: ``[B, D, S]`` with any strides; float32, float16 or bfloat16.
        codebook: float32 ``[K, D]``, contiguous.
        learn: bool ``[B]``; the tokens of samples with False are left out of ``packed``, and only there.
        statistics: whether to form ``packed``.
        loss_scale: factor of the loss.
        per_sample: one loss a sample instead of one for the batch.
        config: tiles, where the default choice is not wanted.

    Returns:
        ``(indices, difference, loss, packed)``: int64 ``[B, S]``; float32 ``[B, D, S]``, ``features -
        codebook[indices]`` in the memory layout of ``features``; float32 scalar or ``[B]``, ``loss_scale``
        times the sum of the squared differences; float32 ``[K, D + 1]``, for each code the sum of its tokens
        and, last, their number, or ``[0]`` without ``statistics``.

    Raises:
        ValueError: a certified ``config`` for features that are not float32, or too wide for its bound.
    """
    batch, dim, space = features.shape
    tokens, device = batch * space, features.device
    config = _checked(config, features) or search_config(dim, len(codebook), tokens, features.dtype)
    tiles = triton.cdiv(tokens, config.tokens)
    indices = torch.empty(batch, space, dtype=torch.int64, device=device)
    difference = torch.empty_like(features, dtype=torch.float32)
    squares = torch.empty((batch, space) if per_sample else (1, tiles), dtype=torch.float32, device=device)
    loss = torch.empty((batch,) if per_sample else (), dtype=torch.float32, device=device)
    sort = _Sort.allocate(tokens, tiles, len(codebook), device) if statistics else None
    _search(features, codebook, indices, config, difference, squares, learn, sort)
    _scan(sort, squares, loss, loss_scale)
    if not statistics:
        return indices, difference, loss, difference.new_empty(0)
    if sort is None:
        order, starts = _sort_by_library(indices, learn, len(codebook))
    else:
        order, starts = _scatter(indices, sort, config.tokens), sort.starts
    return indices, difference, loss, _code_sums(features, indices, order, starts)


def ema_update_(
    codebook: Tensor,
    ema_count: Tensor,
    ema_sum: Tensor,
    num_updates: Tensor,
    seed: Tensor,
    packed: Tensor,
    features: Tensor,
    *,
    decay: Tensor | float,
    dead_code_threshold: float,
    dead_code_grace: int,
) -> Tensor:
    """Move the codebook by one batch and replace its dead codes, in place.

    The rules are those of ``fq.codebook.ema_step`` outside ``compat`` and of ``FeatureQuantize`` for dead
    codes, in one process. A batch with a sum or count that is not finite, or with no token, changes nothing.
    Two launches.

    Args:
        codebook: float32 ``[K, D]``, contiguous.
        ema_count: float32 ``[K]``.
        ema_sum: float32 ``[K, D]``, contiguous.
        num_updates: 0-dim int64, updates before this one; one more afterwards.
        seed: 0-dim int64, of the draws of replacements.
        packed: float32 ``[K, D + 1]``, contiguous, as :func:`quantize` returns it.
        features: ``[B, D, S]`` with any strides, the tokens that replace dead codes.
        decay: factor of the averages; a 0-dim floating tensor is read on the device.
        dead_code_threshold: share of the mean count below which a code is dead; 0 replaces none.
        dead_code_grace: updates before any code is replaced.

    Returns:
        0-dim bool on the device: whether anything was changed.
    """
    size, dim = codebook.shape
    batch, _, space = features.shape
    device = codebook.device
    programs = triton.cdiv(size, 16)
    partials = torch.empty(3, programs, dtype=torch.float32, device=device)
    before = torch.empty_like(num_updates)
    valid = torch.empty((), dtype=torch.bool, device=device)
    rate = None if isinstance(decay, Tensor) else 1.0 - decay
    columns = min(triton.next_power_of_2(dim), 128)
    _launch(
        _ema_totals_kernel, (programs,),
        packed, ema_count, num_updates, partials, before, decay, rate,
        K=size, D=dim, ROWS=16, COLUMNS=columns,
    )  # fmt: skip
    _launch(
        _ema_kernel, (triton.cdiv(size, 8),),
        codebook, ema_count, ema_sum, num_updates, seed, packed, features, partials, before, valid,
        decay, rate, batch * space, space, *features.stride(), float(dead_code_threshold), dead_code_grace,
        REPLACE=dead_code_threshold > 0 and batch * space > 0,
        K=size, D=dim, PARTIALS=programs, ALL_PARTIALS=triton.next_power_of_2(programs),
        ROWS=8, COLUMNS=columns,
    )  # fmt: skip
    return valid


class _Sort(NamedTuple):
    """Scratch of a stable counting sort of the tokens by code."""

    ranks: Tensor
    """int32 ``[N]``: position of a token among those of its code in its tile; -1 for one left out."""
    histogram: Tensor
    """int32 ``[tiles, K]``: tokens of each code in each tile; the scan makes them places in the order."""
    below: Tensor
    """int32 ``[tiles, scans]``: tokens of the tile whose code is below the first of a scan's codes."""
    starts: Tensor
    """int32 ``[K + 1]``: place of the first token of each code, and how many there are altogether."""
    scan_codes: int
    """Codes of one program of the scan."""

    @classmethod
    def allocate(cls, tokens: int, tiles: int, codebook_size: int, device: torch.device) -> _Sort | None:
        """The scratch, or nothing if it would be too large."""
        if tiles * codebook_size * 4 > _HISTOGRAM_BYTES:
            return None
        # At most 128 scans, so that a tile can compare each of its tokens with all of them.
        scan_codes = max(32, triton.next_power_of_2(triton.cdiv(codebook_size, 128)))
        scans = triton.cdiv(codebook_size, scan_codes)
        shapes = (tokens,), (tiles, codebook_size), (tiles, scans), (codebook_size + 1,)
        ranks, histogram, below, starts = (
            torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes
        )
        return cls(ranks, histogram, below, starts, scan_codes)


def _checked(config: Config | None, features: Tensor) -> Config | None:
    """The tiles, if they can search such features."""
    dim = features.shape[1]
    if config and config.certified and (features.dtype != torch.float32 or dim > MOST_CERTIFIED_CHANNELS):
        raise ValueError(
            f"a certified search needs float32 features of at most {MOST_CERTIFIED_CHANNELS} channels, got "
            f"{features.dtype} with {dim}: take a config without certified"
        )
    return config


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: object, **options: object) -> None:
    """Run a kernel on the device of its first argument, with products and sums rounded as in PyTorch."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, enable_fp_fusion=False, **options)


def _search(
    features: Tensor,
    codebook: Tensor,
    indices: Tensor,
    config: Config,
    difference: Tensor | None = None,
    squares: Tensor | None = None,
    learn: Tensor | None = None,
    sort: _Sort | None = None,
) -> None:
    """Fill ``indices`` and, where given, ``difference``, ``squares`` and the start of ``sort``."""
    batch, dim, space = features.shape
    tokens = batch * space
    scans = 1 if sort is None else sort.below.shape[1]
    bounds = error_bound(dim) if config.certified else (None, None)
    _launch(
        search_kernel, (triton.cdiv(tokens, config.tokens),),
        features, codebook, learn, indices, difference, squares,
        *((None, None, None) if sort is None else sort[:3]),
        tokens, space, *features.stride(), *((0, 0, 0) if difference is None else difference.stride()),
        *bounds,
        K=len(codebook), D=dim, BN=config.tokens, BK=config.codes, BD=config.channels,
        PER_TOKEN=squares is not None and squares.numel() == tokens,
        SCANS=scans, ALL_SCANS=triton.next_power_of_2(scans),
        SCAN_CODES=1 if sort is None else sort.scan_codes, FLATTEN=config.flatten,
        INTERPRET=not isinstance(search_kernel, triton.JITFunction),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _scan(sort: _Sort | None, squares: Tensor, loss: Tensor, loss_scale: float) -> None:
    """Make the histogram places in the order by code, and sum up the loss from its parts [losses, parts]."""
    scans, codes = (0, 32) if sort is None else (sort.below.shape[1], sort.scan_codes)
    tiles, size = (0, 0) if sort is None else sort.histogram.shape
    _launch(
        _scan_kernel, (scans + len(squares),),
        squares, loss, *((None, None, None) if sort is None else sort[1:4]),
        tiles, squares.shape[1], float(loss_scale),
        K=size, SCANS=scans, CODES=codes, TILES=max(_SCAN_CELLS // codes, 1), BLOCK=1024,
    )  # fmt: skip


def _scatter(indices: Tensor, sort: _Sort, tile: int) -> Tensor:
    """Tokens in the order of their codes, int32 [N]; what lies behind ``starts[K]`` is undefined."""
    tokens = indices.numel()
    order = torch.empty_like(sort.ranks)
    _launch(
        _scatter_kernel, (triton.cdiv(tokens, 256),),
        indices, sort.ranks, sort.histogram, sort.starts, order, tokens,
        K=sort.histogram.shape[1], TILE=tile, BLOCK=256, num_warps=2,
    )  # fmt: skip
    return order


def _sort_by_library(indices: Tensor, learn: Tensor | None, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Order and starts as the counting sort gives them, without its scratch."""
    codes = indices if learn is None else torch.where(learn[:, None], indices, codebook_size)
    codes, order = torch.sort(codes.flatten(), stable=True)
    bounds = torch.arange(codebook_size + 1, device=indices.device)
    return order.to(torch.int32), torch.searchsorted(codes, bounds, out_int32=True)


def _code_sums(features: Tensor, indices: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """Sums and counts of the tokens of each code, float32 [K, D + 1]."""
    batch, dim, space = features.shape
    size = len(starts) - 1
    packed = torch.empty(size, dim + 1, dtype=torch.float32, device=features.device)
    stretches = triton.cdiv(batch * space, _SORTED_ROWS)
    # Of the first and the last code of a stretch there may be more in its neighbours.
    borders = torch.empty(stretches, 2, dim, dtype=torch.float32, device=features.device)
    narrow, wide = (min(triton.next_power_of_2(dim), columns) for columns in (32, 256))
    _launch(
        _segment_kernel, (stretches, triton.cdiv(dim, narrow)),
        features, indices, order, starts, packed, borders, space, *features.stride(),
        K=size, D=dim, ROWS=_SORTED_ROWS, COLUMNS=narrow,
    )  # fmt: skip
    _launch(
        _combine_kernel, (size, triton.cdiv(dim, wide)),
        starts, packed, borders, D=dim, ROWS=_SORTED_ROWS, COLUMNS=wide, STRETCHES=8, num_warps=2,
    )  # fmt: skip
    return packed


@triton.jit
def _scan_kernel(
    squares, loss, histogram, below, starts, num_tiles, num_parts, loss_scale,
    K: tl.constexpr, SCANS: tl.constexpr, CODES: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn counts into places, a few codes a program; each program behind those sums up one loss."""
    program = tl.program_id(0)
    if program >= SCANS:
        part = tl.arange(0, BLOCK)
        parts = squares + (program - SCANS).to(tl.int64) * num_parts
        total = tl.zeros([BLOCK], tl.float32)
        done = 0
        while done < num_parts:
            total += tl.load(parts + done + part, done + part < num_parts, 0.0)
            done += BLOCK
        tl.store(loss + program - SCANS, loss_scale * tl.sum(total))
    elif SCANS > 0:
        _scan_codes(histogram, below, starts, program, num_tiles, K, SCANS, CODES, TILES)


@triton.jit
def _scan_codes(
    histogram, below, starts, program, num_tiles,
    K: tl.constexpr, SCANS: tl.constexpr, CODES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Exclusive sums of the histogram over its tiles, in place, and where each code starts in the order."""
    k = program * CODES + tl.arange(0, CODES)
    tile = tl.arange(0, TILES)
    lower = tl.zeros([TILES], tl.int32)
    count = tl.zeros([CODES], tl.int32)
    done = 0
    while done < num_tiles:
        inside = done + tile < num_tiles
        lower += tl.load(below + (done + tile) * SCANS + program, inside, 0)
        cell = histogram + (done + tile)[:, None] * K + k[None, :]
        mask = inside[:, None] & (k < K)[None, :]
        number = tl.load(cell, mask, 0)
        tl.store(cell, count[None, :] + tl.cumsum(number, 0) - number, mask)
        count += tl.sum(number, 0)
        done += TILES
    # Of the codes before this program's, the search has counted the tokens already: no program waits.
    tl.store(starts + k + 1, tl.sum(lower) + tl.cumsum(count, 0), k < K)
    if program == 0:
        tl.store(starts, 0)


@triton.jit
def _scatter_kernel(
    indices, ranks, histogram, starts, order, num_tokens,
    K: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each token to its place in the order by code."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks + token, token < num_tokens, -1)
    learned = rank >= 0
    code = tl.load(indices + token, learned, 0)
    place = tl.load(starts + code, learned, 0) + rank
    place += tl.load(histogram + (token // TILE).to(tl.int64) * K + code, learned, 0)
    tl.store(order + place, token, learned)


@triton.jit
def _add_within_code(value, code, next_value, next_code):
    """Sum that restarts where the code changes; associative as long as equal codes are neighbours."""
    return tl.where(code == next_code, value + next_value, next_value), next_code


@triton.jit
def _segment_kernel(
    features, indices, order, starts, packed, borders, space, stride_b, stride_d, stride_s,
    K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of the codes in a stretch of the order; of a code that crosses its ends, the part inside.

    Stretches are equally long, however unequally the codes are used: a collapsed codebook is no slower.
    """
    stretch = tl.program_id(0)
    place = stretch * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = place < tl.load(starts + K)
    token = tl.load(order + place, inside, 0)
    code = tl.load(indices + token, inside, 0).to(tl.int32)
    start = tl.load(starts + code, inside, 0)
    end = tl.load(starts + code + 1, inside, 0)
    mask = inside[:, None] & (d < D)[None, :]
    offset = offsets(token, space, stride_b, stride_s)
    x = tl.load(features + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, mask, 0.0).to(tl.float32)
    key = tl.where(inside, code, K)[:, None] + tl.zeros([ROWS, COLUMNS], tl.int32)
    total, _ = tl.associative_scan((x, key), 0, _add_within_code)  # [ROWS, COLUMNS]
    begun_before = start < stretch * ROWS
    ends = place + 1 == end
    whole = ends & (begun_before == 0)
    tl.store(packed + code[:, None] * (D + 1) + d[None, :], total, mask & whole[:, None])
    part = (ends & begun_before) | ((ends == 0) & (place == stretch * ROWS + ROWS - 1))
    slot = stretch * 2 + tl.where(begun_before, 0, 1)
    tl.store(borders + slot[:, None] * D + d[None, :], total, mask & part[:, None])


@triton.jit
def _combine_kernel(
    starts, packed, borders,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRETCHES: tl.constexpr,
):  # fmt: skip
    """Count of one code, and its sum if that is zero or lies in several stretches."""
    k = tl.program_id(0)
    start, end = tl.load(starts + k), tl.load(starts + k + 1)
    first, last = start // ROWS, tl.maximum(end - 1, start) // ROWS
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(borders + (first * 2 + 1) * D + d, d < tl.where(last > first, D, 0), 0.0)
    stretch = first + 1
    while stretch <= last:
        t = stretch + tl.arange(0, STRETCHES)
        mask = (t <= last)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(borders + (t * 2)[:, None] * D + d[None, :], mask, 0.0), 0)
        stretch += STRETCHES
    # A code in one stretch has its sum already.
    tl.store(packed + k * (D + 1) + d, total, d < tl.where((last > first) | (start == end), D, 0))
    if tl.program_id(1) == 0:
        tl.store(packed + k * (D + 1) + D, (end - start).to(tl.float32))


@triton.jit
def _new_count(ema_count, packed, k, decay, rate, K: tl.constexpr, D: tl.constexpr):
    """Moving average of the counts after the batch [k], and the batch's counts."""
    number = tl.load(packed + k * (D + 1) + D, k < K, 0.0)
    return tl.load(ema_count + k, k < K, 0.0) * decay + number * rate, number


@triton.jit
def _factors(decay, rate):
    """Decay and one minus it in float32; without a rate the decay lies in memory."""
    if rate is None:
        decay = tl.load(decay).to(tl.float32)
        rate = 1.0 - decay
    return decay, rate


@triton.jit
def _ema_totals_kernel(
    packed, ema_count, num_updates, partials, before, decay, rate,
    K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What every code's update depends on, for ROWS codes: all finite, tokens, and sum of the new counts."""
    program = tl.program_id(0)
    k = program * ROWS + tl.arange(0, ROWS)
    decay, rate = _factors(decay, rate)
    new, number = _new_count(ema_count, packed, k, decay, rate, K, D)
    wrong = tl.zeros([ROWS, COLUMNS], tl.int32)
    for d0 in range(0, D + 1, COLUMNS):
        d = d0 + tl.arange(0, COLUMNS)
        value = tl.load(
            packed + k[:, None] * (D + 1) + d[None, :], (k < K)[:, None] & (d < D + 1)[None, :], 0.0
        )
        wrong += ((tl.abs(value) < float("inf")) == 0).to(tl.int32)  # also true for NaN
    tl.store(partials + program, tl.sum(tl.sum(wrong, 1), 0).to(tl.float32))
    tl.store(partials + tl.num_programs(0) + program, tl.sum(number))
    tl.store(partials + 2 * tl.num_programs(0) + program, tl.sum(new))
    if program == 0:
        # The next kernel writes the number of updates while all its programs need the old one.
        tl.store(before, tl.load(num_updates))


@triton.jit
def _ema_kernel(
    codebook, ema_count, ema_sum, num_updates, seed, packed, features, partials, before, valid,
    decay, rate, num_tokens, space, stride_b, stride_d, stride_s, threshold, grace,
    REPLACE: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PARTIALS: tl.constexpr,
    ALL_PARTIALS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """New averages and codes of ROWS codes."""
    program = tl.program_id(0)
    k = program * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, ALL_PARTIALS)
    wrong = tl.sum(tl.load(partials + p, p < PARTIALS, 0.0))
    tokens = tl.sum(tl.load(partials + PARTIALS + p, p < PARTIALS, 0.0))
    mean = tl.sum(tl.load(partials + 2 * PARTIALS + p, p < PARTIALS, 0.0)) / K
    updates = tl.load(before)
    ok = (wrong == 0.0) & (tokens > 0.0)
    if program == 0:
        tl.store(num_updates, updates + ok.to(tl.int64))
        tl.store(valid, ok)
    decay, rate = _factors(decay, rate)
    new, number = _new_count(ema_count, packed, k, decay, rate, K, D)
    live = k < tl.where(ok, K, 0)
    hit = number > 0.0
    divisor = tl.where(hit, new, 1.0)
    count = new
    if REPLACE:
        dead = new < tl.where(updates >= grace, threshold * mean, float("-inf"))
        count = tl.where(dead, mean, new)
        draw = _random_bits(k + 1, tl.load(seed), updates) % num_tokens
        offset = offsets(draw, space, stride_b, stride_s)
    tl.store(ema_count + k, count, live)
    for d0 in range(0, D, COLUMNS):
        d = d0 + tl.arange(0, COLUMNS)
        mask = live[:, None] & (d < D)[None, :]
        cell = k[:, None] * D + d[None, :]
        value = tl.load(packed + k[:, None] * (D + 1) + d[None, :], mask, 0.0)
        total = tl.load(ema_sum + cell, mask, 0.0) * decay + value * rate
        code = tl.load(codebook + cell, mask, 0.0)
        code = tl.where(hit[:, None], total / divisor[:, None], code)
        if REPLACE:
            column = d.to(tl.int64)[None, :] * stride_d
            found = tl.load(features + offset[:, None] + column, mask & dead[:, None], 0.0).to(tl.float32)
            code = tl.where(dead[:, None], found, code)
            # Both averages restart together: a fresh code with a stale sum would jump back at its next hit.
            total = tl.where(dead[:, None], found * mean, total)
        tl.store(codebook + cell, code, mask)
        tl.store(ema_sum + cell, total, mask)


@triton.jit
def _random_bits(position, seed, stream):
    """The hash of ``fq.codebook.random_bits``, to the bit, for positions that count from 1."""
    bits = position.to(tl.int64)
    bits = _mix(bits + _mix(seed * 2 + 1))
    return _mix(bits + _mix(stream * 2 + 1))


@triton.jit
def _mix(bits):
    bits = bits & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return bits ^ (bits >> 15)
