"""The search kernel, and the tiles that it may be run with.

The best code of a token is found exactly, or *certified*: scores come from one TF32 product, a third of the
work, with a bound of the error of each. Where the bounds leave one code, that is it; where they leave two,
these are compared in float32; where they leave more, the same program searches exactly. Both ways keep the
same promise about the returned codes.
"""

# The bodies of kernels are written in Triton's language, which has no types that mypy could check.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MOST_CERTIFIED_CHANNELS = 16384
"""Channels up to which the terms that :func:`error_bound` leaves out stay within its last percent."""
# Squared lengths: with codes below the limit no sum of products overflows, and what any of D channels loses
# by underflow is far less than the bound makes of the floor, added for each channel.
_LIMIT = tl.constexpr(2.0**120)
_FLOOR = tl.constexpr(2.0**-110)
_FEW = tl.constexpr(16)  # tokens gathered for one exact search: the fewest that a tensor core takes


class Config(NamedTuple):
    """Tile sizes and launch options of the search kernel."""

    tokens: int
    """Tokens of one program."""
    codes: int
    """Codes scored at once."""
    channels: int
    """Channels of one step of the matrix product."""
    warps: int
    stages: int
    flatten: bool = False
    """Whether loads run ahead across blocks of codes, too; helps where there are few channels."""
    certified: bool = False
    """Whether one TF32 product decides what the bounds of its error allow; float32 features only."""


CONFIGS = (
    Config(32, 64, 32, 4, 3),
    Config(32, 128, 32, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 64, 4, 3),
    Config(64, 128, 32, 4, 3),
    Config(64, 64, 32, 4, 3, flatten=True),
    Config(128, 64, 32, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(128, 128, 32, 8, 4),
    Config(128, 128, 32, 8, 3, flatten=True),
    Config(128, 128, 64, 8, 2),
    Config(64, 64, 32, 4, 3, certified=True),
    Config(128, 64, 32, 8, 3, certified=True),
    Config(128, 128, 32, 8, 3, certified=True),
)
"""Candidates for a benchmark to sweep; ``fq.kernels.nearest`` and ``quantize`` take one as ``config``."""


def search_config(dim: int, codebook_size: int, tokens: int, dtype: torch.dtype) -> Config:
    """Tiles for a problem: the largest that registers hold, but enough for 132 multiprocessors.

    They search exactly. A certified search should be faster unless most tokens lie between codes, but no
    search has been timed on a GPU yet: ``python -m benchmarks.gpu`` decides.
    """
    wide = tokens >= 16384 and dtype == torch.bfloat16
    channels = min(max(triton.next_power_of_2(dim), 16), 64 if wide else 32)
    codes = min(max(triton.next_power_of_2(codebook_size), 32), 128)
    if tokens <= 4096:
        return Config(32, codes, channels, 4, 3)
    if tokens < 16384:
        return Config(64, codes, channels, 4, 3)
    return Config(128, codes, channels, 8, 3)


def error_bound(dim: int) -> tuple[float, float]:
    """Factors of the error of a score from one TF32 product: ``delta * ||x|| * ||e|| + eta * ||e||²``.

    The score is ``x·e - ||e||²/2``. To first order, and with sums of absolute values at most ``||x|| ||e||``
    (Cauchy-Schwarz), its error is bounded by the sum of

    * rounding both factors to 11 bits, u = 2^-11: ``2u + u²`` of ``||x|| ||e||``;
    * the tensor core: an instruction aligns k >= 4 products and the sum so far to the largest of them,
      truncating each to 24 bits, and truncates the result: ``(k + 2) 2^-23``, for each of ``dim / k + 1``
      instructions, so at most ``(1.5 dim + 10) 2^-23`` of ``||x|| ||e||`` for k = 4 and 8;
    * a sum of ``dim`` rounded squares, in whatever order: ``(dim + 1) 2^-25`` of ``||e||²``;
    * rounding the score, its upper bound, and the way back to the lower one: ``3 * 2^-24`` of both terms.

    Sixteen channels too many cover the constants, and one percent the products of errors and the rounding of
    the lengths themselves.
    """
    rounding, one_percent = 2.0**-10, 1.01
    return one_percent * (rounding + (dim + 16) * 2.0**-22), one_percent * (dim + 16) * 2.0**-25


@triton.jit
def offsets(token, space, stride_b, stride_s):
    """Where in memory each token begins, in int64: features may hold more than 2^31 numbers."""
    return (token // space).to(tl.int64) * stride_b + (token % space).to(tl.int64) * stride_s


@triton.jit
def _product(tokens, codes, INTERPRET: tl.constexpr):
    """Tokens [BN, BD] times codes [BD, BK] to float32 accuracy on units that multiply fewer bits.

    A tensor core adds with truncation, so a long sum is not left to it: the caller adds up the blocks.
    """
    if tokens.dtype == tl.bfloat16:
        # Three terms of 8 bits are a whole code, and the tokens need one.
        high = _cut_to_bfloat16(codes)
        middle = _cut_to_bfloat16(codes - high)
        low = codes - high - middle
        if INTERPRET:  # which would multiply the bit patterns of bfloat16
            tokens = tokens.to(tl.float32)
        else:
            high, middle, low = high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)
        product = tl.dot(tokens, low)
        product = tl.dot(tokens, middle, product)
        return tl.dot(tokens, high, product)
    else:
        high = _round_to_tf32(codes)
        low = codes - high
        if tokens.dtype == tl.float16:  # exact in tf32
            wide = tokens.to(tl.float32)
            product = tl.dot(wide, low, input_precision="tf32")
            return tl.dot(wide, high, product, input_precision="tf32")
        else:
            # Not input_precision="tf32x3": it cuts the halves where this rounds them, and it repairs
            # infinities, which must not win anyway, at two instructions for each product.
            wide = _round_to_tf32(tokens)
            product = tl.dot(tokens - wide, high, input_precision="tf32")
            product = tl.dot(wide, low, product, input_precision="tf32")
            return tl.dot(wide, high, product, input_precision="tf32")


@triton.jit
def _round_to_tf32(x):
    """Nearest number with a mantissa of 10 bits, of which a tensor core loses nothing."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _cut_to_bfloat16(x):
    """Leading 8 bits of the mantissa; what is cut off follows by an exact subtraction."""
    return (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _exact(
    features, codebook, offset, inside, stride_d,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    FLATTEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Nearest code of BN tokens, int32 [BN]."""
    best = tl.full([BN], float("-inf"), tl.float32)
    index = tl.zeros([BN], tl.int32)
    for k0 in tl.range(0, K, BK, flatten=FLATTEN):
        k = k0 + tl.arange(0, BK)
        # Tokens times codes, not the reverse, whatever lies contiguous in memory: a thread then holds many
        # scores of few tokens, and the best is found with hardly any exchange between threads.
        product = tl.zeros([BN, BK], tl.float32)
        norm = tl.zeros([BK], tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            token_mask, code_mask = inside[:, None], (k < K)[None, :]
            if D % BD != 0:
                token_mask, code_mask = token_mask & (d < D)[None, :], code_mask & (d < D)[:, None]
            x = tl.load(features + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, token_mask, 0.0)
            e = tl.load(codebook + k[None, :] * D + d[:, None], code_mask, 0.0)
            product += _product(x, e, INTERPRET)
            norm += tl.sum(e * e, 0)
        # A NaN would win or lose every comparison, depending on its place; a maximum drops it.
        score = tl.maximum(product - 0.5 * norm[None, :], float("-inf"))  # [BN, BK]
        if K % BK != 0:
            score = tl.where((k < K)[None, :], score, float("-inf"))
        top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        index = tl.where(top > best, k0 + place, index)  # strictly: of equal scores the first stays
        best = tl.maximum(best, top)
    return index


@triton.jit
def certify(
    features, codebook, offset, inside, stride_d, delta, eta,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """The two codes of BN tokens that one TF32 product favours, and what its error bound says for sure.

    The bound of a score is made of its own code's length, so a few long codes spoil no other. Returned are
    two int32 [BN]; whether no other code can be as near as the first; and whether none can but the second.
    """
    square = _squared_lengths(features, offset, stride_d, inside, D, BN, BD)
    width = delta * tl.sqrt(square + D * _FLOOR)
    best = tl.full([BN], float("-inf"), tl.float32)  # of upper bounds, and the next two
    second, third = best, best
    index = tl.zeros([BN], tl.int32)
    rival = index
    unsound = tl.zeros([BK], tl.int32)
    for k0 in tl.range(0, K, BK, flatten=FLATTEN):
        k = k0 + tl.arange(0, BK)
        product = tl.zeros([BN, BK], tl.float32)
        squares = tl.zeros([BD, BK], tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            token_mask, code_mask = inside[:, None], (k < K)[None, :]
            if D % BD != 0:
                token_mask, code_mask = token_mask & (d < D)[None, :], code_mask & (d < D)[:, None]
            x = tl.load(features + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, token_mask, 0.0)
            e = tl.load(codebook + k[None, :] * D + d[:, None], code_mask, 0.0)
            # Here the long sum is left to the tensor core: the bound knows what it truncates.
            product = tl.dot(_round_to_tf32(x), _round_to_tf32(e), product, input_precision="tf32")
            squares = tl.fma(e, e, squares)
        norm = tl.sum(squares, 0)
        # Also true for NaN; one such code leaves all tokens to the exact search.
        unsound += ((norm < _LIMIT) == 0).to(tl.int32)
        upper = tl.fma(width[:, None], tl.sqrt(norm + D * _FLOOR)[None, :], product)
        upper = tl.maximum(upper + ((eta - 0.5) * norm)[None, :], float("-inf"))  # [BN, BK], NaN dropped
        if K % BK != 0:
            upper = tl.where((k < K)[None, :], upper, float("-inf"))
        best, index, second, rival, third = _merge(best, index, second, rival, third, upper, k0, BK)
    norm = _squared_lengths(codebook, index.to(tl.int64) * D, 1, inside, D, BN, BD)
    lower = best - 2.0 * (width * tl.sqrt(norm + D * _FLOOR) + eta * norm)
    # Tokens that are not finite or too long to be squared have no bound, or NaN, which is above nothing.
    lower = tl.where(tl.sum(unsound) == 0, lower, float("-inf"))
    # Strictly above: of codes that are equally near, none is ever taken for the only one.
    return index, rival, lower > second, lower > third


@triton.jit
def _squared_lengths(
    vectors, offset, stride_d, inside, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Sums of squares of the vectors that begin at offsets [BN]."""
    square = tl.zeros([BN], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        mask = inside[:, None]
        if D % BD != 0:
            mask = mask & (d < D)[None, :]
        x = tl.load(vectors + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, mask, 0.0)
        square += tl.sum(x * x, 1)
    return square


@triton.jit
def _merge(best, index, second, rival, third, upper, k0, BK: tl.constexpr):
    """The three largest values so far [BN], and the codes of two, after a block of values [BN, BK]."""
    column = tl.arange(0, BK)[None, :]
    top, place = tl.max(upper, 1, return_indices=True, return_indices_tie_break_left=True)
    upper = tl.where(column == place[:, None], float("-inf"), upper)
    next_top, next_place = tl.max(upper, 1, return_indices=True, return_indices_tie_break_left=True)
    upper = tl.where(column == next_place[:, None], float("-inf"), upper)
    wins = top > best
    # The first of the losing pair and the second of the winning pair compete for the second place.
    loser, loser_code = tl.minimum(best, top), tl.where(wins, index, k0 + place)
    follower, follower_code = tl.where(wins, next_top, second), tl.where(wins, k0 + next_place, rival)
    last = tl.maximum(tl.where(wins, second, next_top), tl.minimum(loser, follower))
    third = tl.maximum(tl.maximum(third, tl.max(upper, 1)), last)
    rival = tl.where(follower > loser, follower_code, loser_code)
    index = tl.where(wins, k0 + place, index)
    return tl.maximum(best, top), index, tl.maximum(loser, follower), rival, third


@triton.jit
def _nearer(
    features, codebook, offset, index, rival, paired, stride_d,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Indices [BN] with the nearer of two codes, of equally near ones the lower, where tokens are paired.

    The difference of the scores is summed up directly: zero for equal codes, and accurate for close ones.
    """
    first, last = tl.minimum(index, rival), tl.maximum(index, rival)
    lead = tl.zeros([BN], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        mask = paired[:, None]
        if D % BD != 0:
            mask = mask & (d < D)[None, :]
        x = tl.load(features + offset[:, None] + d.to(tl.int64)[None, :] * stride_d, mask, 0.0)
        e = tl.load(codebook + first[:, None] * D + d[None, :], mask, 0.0)
        f = tl.load(codebook + last[:, None] * D + d[None, :], mask, 0.0)
        lead += tl.sum((x - 0.5 * (e + f)) * (f - e), 1)
    return tl.where(paired, tl.where(lead > 0.0, last, first), index)


@triton.jit
def _decide(
    features, codebook, offset, index, uncertain, stride_d,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Indices [BN] with uncertain tokens searched exactly, a few gathered ones at a time or all at once."""
    number = tl.sum(uncertain.to(tl.int32))
    if number > BN // 4:
        # Half the tiles both ways: with them whole, what waits for the end would not fit the registers.
        exact = _exact(
            features, codebook, offset, uncertain, stride_d,
            K, D, BN, BK // 2, BD // 2 if BD > 16 else BD, False, INTERPRET,
        )  # fmt: skip
        index = tl.where(uncertain, exact, index)
    else:
        rank = tl.cumsum(uncertain.to(tl.int32)) - 1
        place = tl.arange(0, _FEW)
        done = 0
        while done < number:
            chosen = uncertain[:, None] & (rank[:, None] == done + place[None, :])  # [BN, few]
            few = tl.sum(tl.where(chosen, offset[:, None], 0), 0)
            exact = _exact(
                features, codebook, few, done + place < number, stride_d,
                K, D, _FEW, BK, BD, False, INTERPRET,
            )  # fmt: skip
            found = tl.sum(tl.where(chosen, exact[None, :], 0), 1)
            index = tl.where(uncertain & (rank >= done) & (rank < done + _FEW), found, index)
            done += _FEW
    return index


@triton.jit
def search_kernel(
    features, codebook, learn, indices, difference, squares, ranks, histogram, below,
    num_tokens, space, stride_b, stride_d, stride_s, out_b, out_d, out_s, delta, eta,
    K: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PER_TOKEN: tl.constexpr, SCANS: tl.constexpr, ALL_SCANS: tl.constexpr, SCAN_CODES: tl.constexpr,
    FLATTEN: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Best code of BN tokens, and what follows from it while the tile is at hand."""
    tile = tl.program_id(0)
    token = tile * BN + tl.arange(0, BN)
    inside = token < num_tokens
    offset = offsets(token, space, stride_b, stride_s)
    if delta is None:
        index = _exact(
            features, codebook, offset, inside, stride_d, K, D, BN, BK, BD, FLATTEN, INTERPRET
        )  # fmt: skip
    else:
        index, rival, certain, paired = certify(
            features, codebook, offset, inside, stride_d, delta, eta, K, D, BN, BK, BD, FLATTEN
        )  # fmt: skip
        index = _nearer(
            features, codebook, offset, index, rival, inside & paired & (certain == 0), stride_d, D, BN, BD
        )  # fmt: skip
        index = _decide(
            features, codebook, offset, index, inside & (paired == 0), stride_d, K, D, BN, BK, BD, INTERPRET
        )  # fmt: skip
    tl.store(indices + token, index.to(tl.int64), inside)
    if difference is not None:
        _store_difference(
            features, codebook, difference, squares, tile, token, inside, index, offset, stride_d,
            offsets(token, space, out_b, out_s), out_d, D, BN, BD, PER_TOKEN,
        )  # fmt: skip
    if histogram is not None:
        learned = inside
        if learn is not None:
            learned = learned & (tl.load(learn + token // space, inside, 0) != 0)
        _store_ranks(
            ranks, histogram, below, tile, token, inside, learned, index,
            K, BN, SCANS, ALL_SCANS, SCAN_CODES,
        )  # fmt: skip


@triton.jit
def _store_difference(
    features, codebook, difference, squares, tile, token, inside, index, offset, stride_d, out_offset, out_d,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Tokens minus their codes, and the sum of squares of each token or of the tile."""
    square = tl.zeros([BN], tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        mask = inside[None, :]
        if D % BD != 0:
            mask = mask & (d < D)[:, None]
        column = d.to(tl.int64)[:, None]
        x = tl.load(features + offset[None, :] + column * stride_d, mask, 0.0).to(tl.float32)
        step = x - tl.load(codebook + index[None, :] * D + d[:, None], mask, 0.0)  # [BD, BN]
        tl.store(difference + out_offset[None, :] + column * out_d, step, mask)
        square += tl.sum(step * step, 0)
    if PER_TOKEN:
        tl.store(squares + token, square, inside)
    else:
        tl.store(squares + tile, tl.sum(square))


@triton.jit
def _store_ranks(
    ranks, histogram, below, tile, token, inside, learned, index,
    K: tl.constexpr, BN: tl.constexpr, SCANS: tl.constexpr, ALL_SCANS: tl.constexpr,
    SCAN_CODES: tl.constexpr,
):  # fmt: skip
    """The tile's part of the counting sort: ranks, its row of the histogram, and that row summed up."""
    code = tl.where(learned, index, -1)
    place = tl.arange(0, BN)
    same = code[:, None] == code[None, :]
    rank = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), 1)
    number = tl.sum(same.to(tl.int32), 1)
    tl.store(ranks + token, tl.where(learned, rank, -1), inside)
    row = histogram + tile * K
    for k0 in range(0, K, BN):
        tl.store(row + k0 + place, tl.zeros([BN], tl.int32), k0 + place < K)
    tl.debug_barrier()  # the zeros of all threads, then the counts
    tl.store(row + code, number, learned & (rank == 0))
    scan = tl.arange(0, ALL_SCANS)
    lower = learned[:, None] & (code[:, None] < scan[None, :] * SCAN_CODES)
    tl.store(below + tile * SCANS + scan, tl.sum(lower.to(tl.int32), 0), scan < SCANS)
