"""What a codebook is doing: usage, perplexity, dead codes, and how far real and fake pictures share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

MIXED = "mixed"
"""Label of tokens whose part (real or fake) nobody named."""


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """One attached layer since the previous report, over the tokens of this process."""

    codebook_size: int
    """Codes of the layer, all its stages, classes and heads together."""
    tokens: int
    """Tokens quantised, once for each stage and head."""
    usage: float
    """Share of the codes that were hit."""
    perplexity: float
    """Perplexity of the codes of those tokens, in [1, K]."""
    ema_perplexity: float
    """Perplexity of the EMA counts, in [1, K]."""
    dead_codes: int
    """Codes whose EMA count is below 0.03 of the mean count."""
    commitment: float
    """Mean squared distance of a feature to its code, before any weight; NaN when there were no tokens."""
    divergence: float | None
    """Jensen-Shannon divergence of the real and the fake code histogram, in bits: 0 equal, 1 disjoint.
    ``None`` without tokens labelled ``real`` and ``fake``; unlabelled tokens are never guessed."""
    histograms: dict[str, list[int]] = field(repr=False)
    """Counts of every code by part: ``real``, ``fake``, ``mixed``, or any other label given."""


def perplexity(counts: Tensor) -> Tensor:
    """``exp(-Σ p ln(p + 1e-10))`` with ``p = counts / Σ counts``: the effective number of codes in use.

    Args:
        counts: ``[K]``, non-negative numbers or integers.

    Returns:
        A scalar in ``[1, K]`` (float64 for float64 counts, else float32); NaN when all counts are 0.

    Example:
        >>> perplexity(torch.tensor([5, 5, 0, 0]))
        tensor(2.)
    """
    counts = counts if counts.is_floating_point() else counts.float()
    share = counts / counts.sum()
    return torch.exp(-torch.sum(share * torch.log(share + 1e-10)))


def usage(counts: Tensor) -> float:
    """Share of codes with a count above 0.

    Args:
        counts: ``[K]``.

    Returns:
        A number in [0, 1].

    Example:
        >>> usage(torch.tensor([5, 5, 0, 0]))
        0.5
    """
    return float((counts > 0).float().mean())


def dead_codes(ema_count: Tensor, threshold: float = 0.03) -> int:
    """Number of codes whose EMA count is below ``threshold`` of the mean EMA count.

    Args:
        ema_count: ``[K]``.
        threshold: share of the mean.

    Returns:
        A number in [0, K]; 0 for a codebook that has seen nothing.

    Example:
        >>> dead_codes(torch.tensor([100.0, 90.0, 0.1]))
        1
    """
    return int((ema_count < threshold * ema_count.mean()).sum())


def divergence(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence of two code histograms, in bits (Lin 1991, Eq. 4.1).

    Args:
        first: ``[K]`` counts.
        second: ``[K]`` counts.

    Returns:
        0 for equal shares, 1 for disjoint ones; NaN when either histogram is empty.

    Example:
        >>> divergence(torch.tensor([1, 0]), torch.tensor([0, 7]))
        1.0
    """
    if not first.sum() or not second.sum():
        return math.nan
    p, q = first.double() / first.sum(), second.double() / second.sum()
    middle = (p + q) / 2

    def relative_entropy(share: Tensor) -> Tensor:
        terms: Tensor = torch.special.xlogy(share, share / middle.clamp(min=1e-300))
        return terms.sum() / 2

    return float((relative_entropy(p) + relative_entropy(q)) / math.log(2))


class Tally:
    """Running histograms and commitment of one site between two reports; tensors stay on their device."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        self.histograms: dict[str, Tensor] = {}
        self.commitment: Tensor | None = None
        self.forwards = 0

    @torch.no_grad()
    def add(self, indices: Tensor, commitment: Tensor, parts: tuple[str, ...]) -> None:
        """Count one forward, whose batch holds the named parts in equal shares and in order.

        Args:
            indices: int64 ``[B, *spatial]``.
            commitment: scalar, the unweighted commitment of the batch.
            parts: labels; B is a multiple of their number.
        """
        for part, share in zip(parts, indices.chunk(len(parts)) if len(indices) else (), strict=False):
            flat = share.reshape(-1)
            counts = self.histograms.setdefault(part, flat.new_zeros(self.codebook_size))
            counts.scatter_add_(0, flat, torch.ones_like(flat))
        if indices.numel():
            self.commitment = commitment if self.commitment is None else self.commitment + commitment
            self.forwards += 1

    def report(self, ema_count: Tensor) -> SiteStats:
        """Figures of everything added so far.

        Args:
            ema_count: ``[K]``.

        Returns:
            The report.
        """
        histograms = {part: counts.cpu() for part, counts in self.histograms.items()}
        total = sum(histograms.values(), torch.zeros(self.codebook_size, dtype=torch.int64))
        both = "real" in histograms and "fake" in histograms
        return SiteStats(
            codebook_size=self.codebook_size,
            tokens=int(total.sum()),
            usage=usage(total),
            perplexity=float(perplexity(total)),
            ema_perplexity=float(perplexity(ema_count)),
            dead_codes=dead_codes(ema_count),
            commitment=math.nan if self.commitment is None else float(self.commitment) / self.forwards,
            divergence=divergence(histograms["real"], histograms["fake"]) if both else None,
            histograms={part: counts.tolist() for part, counts in histograms.items()},
        )


def draw(stats: Mapping[str, SiteStats], path: str | Path) -> Path:
    """Draw the code histograms of every site, real above and fake below the axis, most used code first.

    Args:
        stats: what ``handle.stats()`` returned.
        path: picture to write; its ending chooses the format.

    Returns:
        The path written.

    Raises:
        ValueError: ``stats`` is empty.
        ImportError: matplotlib is missing.
    """
    if not stats:
        raise ValueError("stats has no sites: pass what handle.stats() returned after at least one forward")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'fq-gan[train]'") from error

    figure = Figure(figsize=(9, 1.9 * len(stats) + 0.4), layout="constrained")
    axes = figure.subplots(len(stats), 1, squeeze=False)[:, 0]
    colors = {"real": "#1f77b4", "fake": "#d62728"}
    for axis, (name, site) in zip(axes, stats.items(), strict=True):
        total = torch.tensor(list(site.histograms.values()) or [[0] * site.codebook_size]).sum(0)
        order = total.argsort(descending=True, stable=True)
        for part, counts in site.histograms.items():
            share = torch.tensor(counts, dtype=torch.float64)[order] / max(sum(counts), 1)
            sign = -1 if part == "fake" else 1
            axis.bar(range(site.codebook_size), (sign * share).tolist(), width=1.0, label=part,
                     color=colors.get(part, "#7f7f7f"), alpha=0.85)  # fmt: skip
        axis.axhline(0, color="black", linewidth=0.6)
        apart = "" if site.divergence is None else f" · real/fake divergence {site.divergence:.3f} bit"
        axis.set_title(
            f"{name}: {site.usage:.0%} of {site.codebook_size} codes used · perplexity {site.perplexity:.1f}"
            f" · {site.dead_codes} dead{apart}", fontsize=9, loc="left",
        )  # fmt: skip
        axis.set_xlim(-0.5, site.codebook_size - 0.5)
        axis.set_ylabel("share of tokens", fontsize=8)
        axis.tick_params(labelsize=7)
        if site.histograms:
            axis.legend(fontsize=7, loc="upper right")
    axes[-1].set_xlabel("codes, most used first", fontsize=8)
    figure.savefig(path, dpi=110)
    return Path(path)
