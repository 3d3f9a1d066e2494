"""The life of a codebook: draws, first codes, EMA steps, and their agreement over processes.

Every draw is a hash of (seed, update, code), so it needs no generator state, is the same on every device and
rank, and leaves the global generators alone. Tokens are chosen by their index in the batch of all ranks
together, so that two ranks with half a batch each choose what one rank with the whole batch would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fq.search import code_sums, nearest


class State(NamedTuple):
    """Codebook [K, D] and its moving averages: number of tokens [K] and their total [K, D]."""

    codes: Tensor
    number: Tensor
    total: Tensor


class Layout(NamedTuple):
    """How many codes there are: the axes of a codebook, of which the layer keeps all but the last flat."""

    stages: int
    classes: int
    heads: int
    size: int


class Pool(NamedTuple):
    """Tokens that stand ready to replace the dead codes of one stage and head."""

    tokens: Tensor
    """``[B, D, S]``, detached."""
    labels: Tensor | None
    """Class of each sample, when codes belong to classes."""


def draw_codes(codebook_size: int, dim: int, init: str, seed: int) -> Tensor:
    """Codes before any data: N(0, 1), or U(-1/K, 1/K) for ``init="uniform"``.

    Args:
        codebook_size: K.
        dim: D.
        init: name of the initialisation.
        seed: of a generator of its own.

    Returns:
        float32 ``[K, D]``.
    """
    generator = torch.Generator("cpu").manual_seed(seed)  # the same codes whatever the default device
    if init == "uniform":
        codes = (torch.rand(codebook_size, dim, generator=generator, device="cpu") * 2 - 1) / codebook_size
    else:
        codes = torch.randn(codebook_size, dim, generator=generator, device="cpu")
    return codes.to(torch.get_default_device())


def rms(tokens: Tensor, dim: int) -> Tensor:
    """Root mean square along one axis, which is kept; 1 where all is zero, so that nothing is divided by 0.

    Args:
        tokens: any shape.
        dim: axis.

    Returns:
        The shape of ``tokens`` with 1 at that axis.
    """
    square = tokens.square().mean(dim, keepdim=True)
    return torch.where(square > 1e-12, square, 1.0).sqrt()


def unit_rms(codes: Tensor) -> Tensor:
    """Codes scaled to a root mean square of 1.

    Args:
        codes: ``[K, D]``.

    Returns:
        ``[K, D]``.
    """
    return codes / rms(codes, -1)


def random_bits(number: int, seed: Tensor | int, stream: Tensor | int) -> Tensor:
    """Pseudo-random integers that depend on (seed, stream, position) alone.

    An integer hash in int64 arithmetic: its multipliers are below 2^31, so no product overflows, and it runs
    the same on every device and inside a compiled graph.

    Args:
        number: how many.
        seed: 0-dim int64 tensor or int.
        stream: 0-dim int64 tensor or int; different streams are independent.

    Returns:
        int64 ``[number]`` in ``[0, 2**32)``.
    """
    device = next((value.device for value in (seed, stream) if isinstance(value, Tensor)), None)
    bits = torch.arange(1, number + 1, dtype=torch.int64, device=device)
    for salt in (seed, stream):
        bits = _mix(bits + _mix(salt * 2 + 1 + torch.zeros_like(bits)))
    return bits


def _mix(bits: Tensor) -> Tensor:
    mask = 0xFFFFFFFF
    bits = bits & mask
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        bits = ((bits ^ (bits >> shift)) * factor) & mask
    return bits ^ (bits >> 15)


def tokens_per_rank(number: int, device: torch.device, group: bool) -> list[int]:
    """Number of tokens on every rank, in rank order; ``[number]`` without a group.

    Args:
        number: tokens on this rank.
        device: where a collective of this rank runs.
        group: whether there is a process group.

    Returns:
        One count a rank.
    """
    if not group:
        return [number]
    sizes = torch.zeros(torch.distributed.get_world_size(), dtype=torch.int64, device=device)
    sizes[torch.distributed.get_rank()] = number
    torch.distributed.all_reduce(sizes)
    return [int(size) for size in sizes.tolist()]


def take_tokens(
    tokens: Tensor, positions: Tensor, sizes: list[int], group: bool, dtype: torch.dtype
) -> Tensor:
    """Tokens at the given positions of the batch of all ranks.

    Args:
        tokens: ``[B, D, S]`` of this rank; token ``s`` of sample ``b`` is number ``b * S + s``.
        positions: int64 ``[n]`` in ``[0, sum(sizes))``, the same on all ranks.
        sizes: tokens of every rank.
        group: whether there is a process group.
        dtype: of the result, the same on all ranks even if the tokens' is not.

    Returns:
        ``[n, D]``, the same bits on all ranks.
    """
    rows, places = tokens.transpose(1, 2), max(tokens.shape[2], 1)  # [B, S, D]
    if not group:
        return rows[positions // places, positions % places].to(dtype)
    rank = torch.distributed.get_rank()
    local = positions - sum(sizes[:rank])
    mine = (local >= 0) & (local < sizes[rank])
    found = tokens.new_zeros(len(positions), tokens.shape[1], dtype=dtype)
    found[mine] = rows[local[mine] // places, local[mine] % places].to(dtype)
    # Each row has one owner and zeros elsewhere, so the sum is exact.
    torch.distributed.all_reduce(found)
    return found


def all_of(values: Tensor, sizes: list[int], group: bool) -> Tensor:
    """One number for each token of all ranks, in rank order.

    Args:
        values: int64 ``[sizes[rank]]`` of this rank.
        sizes: tokens of every rank.
        group: whether there is a process group.

    Returns:
        int64 ``[sum(sizes)]``, the same on all ranks.
    """
    if not group:
        return values
    start = sum(sizes[: torch.distributed.get_rank()])
    gathered = values.new_zeros(sum(sizes))
    gathered[start : start + len(values)] = values
    torch.distributed.all_reduce(gathered)
    return gathered


def places_of_class(labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For every code of every class the number of a token of that class.

    Args:
        labels: int64 ``[N]``, class of each token.
        draws: int64 ``[C, K]``, non-negative random numbers.

    Returns:
        ``(positions [C, K], exists bool [C, K])``; where a class has no token, ``exists`` is False.
    """
    classes = torch.arange(len(draws), device=labels.device)
    ordered, order = labels.sort(stable=True)
    starts = torch.searchsorted(ordered, classes)
    counts = torch.searchsorted(ordered, classes, right=True) - starts
    places = (starts[:, None] + draws % counts.clamp(min=1)[:, None]).clamp(max=len(labels) - 1)
    return order[places], (counts > 0)[:, None].expand_as(draws)


def sample_tokens(
    tokens: Tensor, sizes: list[int], at_most: int, seed: Tensor, group: bool, dtype: torch.dtype
) -> Tensor:
    """Up to ``at_most`` different tokens spread over the batch of all ranks, in order.

    Args:
        tokens: ``[B, D, S]`` of this rank.
        sizes: tokens of every rank.
        at_most: largest number of rows returned.
        seed: 0-dim int64.
        group: whether there is a process group.
        dtype: of the result.

    Returns:
        ``[n, D]``, the same bits on all ranks.
    """
    total = sum(sizes)
    number = min(total, at_most)
    # One position from each of `number` equal stretches: different by construction, and no stride to alias
    # with.
    places = torch.arange(number, device=tokens.device, dtype=torch.int64)
    starts, ends = places * total // max(number, 1), (places + 1) * total // max(number, 1)
    offsets = random_bits(number, seed, -1).to(tokens.device) % (ends - starts).clamp(min=1)
    return take_tokens(tokens, starts + offsets, sizes, group, dtype)


def codes_from_tokens(
    tokens: Tensor, codebook_size: int, seed: int, *, iterations: int | None
) -> tuple[Tensor, Tensor]:
    """First codes and how many of the given tokens each holds.

    Args:
        tokens: ``[n, D]``, n at least 1.
        codebook_size: K; with fewer tokens than codes some codes are equal and hold nothing.
        seed: of the k-means++ draws.
        iterations: Lloyd iterations; ``None`` takes a plain sample of the tokens.

    Returns:
        ``(codes [K, D], counts [K])`` in the dtype of ``tokens``.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if iterations is None:
        repeats = -(-codebook_size // len(tokens))
        permutations = [
            torch.randperm(len(tokens), generator=generator, device="cpu") for _ in range(repeats)
        ]
        order = torch.cat(permutations)
        codes = tokens[order[:codebook_size].to(tokens.device)].clone()
    else:
        codes = _plus_plus(tokens, codebook_size, generator)
    for _ in range(iterations or 0):
        counts, sums = _assign(tokens, codes)
        codes = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], codes)
    return codes, _assign(tokens, codes)[0]


def first_codes(
    tokens: Tensor, layout: Layout, seed: int, *, iterations: int | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    """First codes of all stages, classes and heads; all classes start from the same.

    Args:
        tokens: ``[n, dim]``, n at least 1.
        layout: of the codebook.
        seed: as for :func:`codes_from_tokens`.
        iterations: as for :func:`codes_from_tokens`.
        normalize: scale the codes to a root mean square of 1.

    Returns:
        ``(codes [K, D], counts [K])`` with K all codes and D ``dim / heads``.
    """
    width = tokens.shape[1] // layout.heads
    codes, counts = tokens.new_empty(*layout, width), tokens.new_empty(layout)
    for head, left in enumerate(tokens.split(width, 1)):  # type: ignore[no-untyped-call]
        rest = left
        for stage in range(layout.stages):
            found, number = codes_from_tokens(rest, layout.size, seed, iterations=iterations)
            found = unit_rms(found) if normalize else found
            codes[stage, :, head], counts[stage, :, head] = found, number / layout.classes
            if stage + 1 < layout.stages:
                rest = rest - found[nearest(rest, found)]
    return codes.flatten(0, -2), counts.flatten()


def revive(
    state: State, dead: Tensor, draws: Tensor, pools: list[Pool], layout: Layout, group: bool
) -> State:
    """Put tokens in place of dead codes: each from those that its stage, head and class has seen.

    Args:
        state: of all codes.
        dead: bool ``[K]``.
        draws: int64 ``[K]``, non-negative random numbers, the same on all ranks.
        pools: of every stage, in it of every head.
        layout: of the codebook.
        group: whether there is a process group.

    Returns:
        The new state; a code whose pool is empty stays.
    """
    tokens = pools[0].tokens
    sizes = tokens_per_rank(tokens.shape[0] * tokens.shape[2], tokens.device, group)
    if sum(sizes) == 0:  # a deferred update whose last forward's tokens are gone
        return state
    found = torch.empty_like(state.codes).view(*layout, -1)
    exists = torch.ones_like(dead).view(layout)
    for number, pool in enumerate(pools):
        stage, head = divmod(number, layout.heads)
        wanted = draws.view(layout)[stage, :, head]  # [classes, size]
        if pool.labels is None and layout.classes == 1:
            places = wanted % sum(sizes)
        else:
            labels = torch.zeros(0) if pool.labels is None else pool.labels
            labels = labels.to(dead.device, torch.int64).repeat_interleave(pool.tokens.shape[2])
            places, exists[stage, :, head] = places_of_class(all_of(labels, sizes, group), wanted)
        taken = take_tokens(pool.tokens, places.flatten(), sizes, group, found.dtype)
        found[stage, :, head] = taken.view(*wanted.shape, -1)
    found, dead = found.flatten(0, -2), dead & exists.flatten()
    # Both averages restart together: a fresh code with a stale sum would jump back at its next update.
    mean = state.number.mean()
    return State(
        torch.where(dead[:, None], found, state.codes),
        torch.where(dead, mean, state.number),
        torch.where(dead[:, None], found * mean, state.total),
    )


def variance_of(packed: Tensor, layout: Layout) -> Tensor:
    """Mean over the channels of the features' variance, from the statistics of a step.

    Args:
        packed: ``[K + 1, D + 1]``: sums and numbers of the tokens of every code, and last the sum of the
            squares of a code's channels.
        layout: of the codebook.

    Returns:
        A scalar, at least 0.
    """
    codes, width = packed[:-1], packed.shape[1] - 1
    first = codes[: len(codes) // layout.stages]  # the first stage's tokens are the features
    by_head = first.view(-1, layout.heads, layout.size, width + 1).sum((0, 2))  # [heads, D + 1]
    tokens = by_head[:, -1:].clamp(min=1)
    mean = by_head[:, :-1] / tokens
    mean_square = packed[-1, :-1].sum() / (tokens.sum() * width)
    return (mean_square - mean.square().mean()).clamp(min=0)


def ema_step(
    state: State,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: Tensor | float,
    compat: str | None,
    epsilon: float,
    num_updates: Tensor,
) -> State:
    """Codebook and averages after one batch with the given statistics.

    Outside compat a code that was not hit keeps its vector: its sum and count shrink by the same factor, so
    their ratio would not change, and nothing is ever divided by a vanishing count.

    Args:
        state: codebook, count and sum before.
        counts: ``[K]`` tokens of each code in the batch of all ranks.
        sums: ``[K, D]``.
        decay: factor of the averages; a float under compat.
        compat: ``"torch"`` smooths the counts (Laplace), ``"tf"`` also debiases the averages, which then
            forget the first codes altogether.
        epsilon: of the Laplace smoothing.
        num_updates: 0-dim, updates made before this one.

    Returns:
        The new state; the old one is left alone.
    """
    if compat == "tf":
        # The state holds debiased averages; the raw ones start at zero, whatever the first count and sum
        # were.
        step = num_updates.to(state.number.dtype)
        before, after = 1 - decay**step, 1 - decay ** (step + 1)
        count = (state.number * before * decay + counts * (1 - decay)) / after
        total = (state.total * before * decay + sums * (1 - decay)) / after
    else:
        count = state.number * decay + counts * (1 - decay)
        total = state.total * decay + sums * (1 - decay)
    if compat is None:
        hit = counts > 0
        codes = torch.where(hit[:, None], total / torch.where(hit, count, 1.0)[:, None], state.codes)
    else:
        tokens = count.sum()
        smooth = (count + epsilon) / (tokens + len(count) * epsilon) * tokens
        codes = total / smooth[:, None]
    return State(codes, count, total)


def _plus_plus(tokens: Tensor, codebook_size: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding: each next code is a token drawn in proportion to its squared distance."""
    draws = torch.rand(codebook_size, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(tokens.device)
    norms = tokens.square().sum(1)
    chosen = (draws[0] * len(tokens)).long().clamp(max=len(tokens) - 1)
    codes = [tokens[chosen]]
    distance = torch.full_like(norms, torch.inf)
    for draw in draws[1:]:
        latest = codes[-1]
        distance = torch.minimum(
            distance, (norms - 2 * (tokens @ latest) + latest.square().sum()).clamp(min=0)
        )
        cumulative = distance.double().cumsum(0)
        # With fewer different tokens than codes every distance is zero and the draw falls on the last token.
        chosen = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(tokens) - 1)
        codes.append(tokens[chosen])
    return torch.stack(codes)


def _assign(tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return code_sums(tokens, nearest(tokens, codes), len(codes))
