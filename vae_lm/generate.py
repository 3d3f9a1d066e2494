"""What to do with the space of a trained model: filters of sampling, traversals, neighbours, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from vae_lm import latent
from vae_lm.model import Optimus


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What ``decode(..., do_sample=True, top_k=..., top_p=...)`` leaves of the logits of a step.

    Top-k first, then top-p: the smallest set of tokens whose probability exceeds ``top_p``, the one that
    crosses it included. 0 switches either filter off, as does a ``top_p`` of 1.

    Args:
        logits: ``[B, V]``.
        top_k: number of tokens to keep.
        top_p: probability to keep, in [0, 1].

    Returns:
        ``[B, V]``, minus infinity where a token is out.

    Raises:
        ValueError: a negative ``top_k``, or ``top_p`` outside [0, 1].

    Example:
        >>> filter_logits(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
        tensor([[-inf, 2., 1.]])
    """
    if top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(
            f"top_k is {top_k} and top_p {top_p}: a count of tokens and a probability were expected"
        )
    # transformers' own, so that this is what its generation does; they do not read the tokens so far.
    tokens = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
    if top_k:
        logits = TopKLogitsWarper(top_k=top_k)(tokens, logits)
    if 0 < top_p < 1:
        logits = TopPLogitsWarper(top_p=top_p)(tokens, logits)
    return logits


def traverse(
    model: Optimus, text: str, dimension: int, values: Sequence[float], **generation: Any
) -> list[str]:
    """Texts of a sentence's latent with one dimension set to each of some values.

    Args:
        model: with tokenisers.
        text: where to start.
        dimension: which, from 0.
        values: in standard deviations of the prior; -3 to 3 is most of it.
        **generation: as for ``model.decode``.

    Returns:
        One text for each value.

    Raises:
        ValueError: there is no such dimension.
    """
    z = model.encode([text]).mu[0]
    return model.decode(latent.traverse(z, dimension, torch.tensor(values)), **generation)


class Neighbours(NamedTuple):
    """Nearest latents of each query, int64 ``[Q, k]``, and Euclidean distances ``[Q, k]``, nearest first."""

    indices: Tensor
    distances: Tensor


def nearest(queries: Tensor, bank: Tensor, *, count: int = 5, chunk_size: int = 256) -> Neighbours:
    """Nearest latents of a bank.

    Args:
        queries: ``[Q, d]``.
        bank: ``[N, d]``, as the means of a corpus.
        count: k.
        chunk_size: queries compared with the bank at once.

    Returns:
        `Neighbours`; ties go to the lower index.

    Raises:
        ValueError: fewer latents than are wanted, or other sizes.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries are {list(queries.shape)} and the bank {list(bank.shape)}: both must be [., d]"
        )
    if not 1 <= count <= len(bank):
        raise ValueError(f"{count} neighbours were asked for but the bank has {len(bank)} latents")
    found = []
    for part in queries.split(chunk_size):
        # Not by products: those lose the small distances that are asked for here.
        distances = torch.cdist(part, bank, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.sort(dim=1, stable=True))
    distances = torch.cat([part.values[:, :count] for part in found])
    return Neighbours(torch.cat([part.indices[:, :count] for part in found]), distances)


def interpolation_table(
    model: Optimus,
    first: str,
    second: str,
    *,
    steps: int = 10,
    modes: Sequence[str] = ("linear", "slerp"),
    **generation: Any,
) -> str:
    """Markdown table of the way between two sentences, a column a mode.

    Args:
        model: with tokenisers.
        first: where it starts.
        second: where it ends.
        steps: see ``model.interpolate``.
        modes: columns.
        **generation: as for ``model.decode``.

    Returns:
        The table; its first column is the share of the way.
    """
    columns = [model.interpolate(first, second, steps=steps, mode=mode, **generation) for mode in modes]
    shares = [f"{step / steps:.2f}" for step in range(steps + 1)]
    return markdown_table(["t", *modes], zip(shares, *columns, strict=True))


def analogy_table(
    model: Optimus,
    items: Sequence[tuple[str, str, str]],
    *,
    scale: float = 1.0,
    **generation: Any,
) -> str:
    """Markdown table of analogies: to C what B is to A.

    Args:
        model: with tokenisers.
        items: triples (A, B, C).
        scale: how far from C.
        **generation: as for ``model.decode``.

    Returns:
        The table; its last column is what the model says.
    """
    if not items:
        return markdown_table(["A", "B", "C", "D"], [])
    a, b, c = (list(column) for column in zip(*items, strict=True))
    found = model.analogy(a, b, c, scale=scale, **generation)
    return markdown_table(["A", "B", "C", "D"], zip(a, b, c, found, strict=True))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in a cell are escaped.

    Example:
        >>> print(markdown_table(["t", "text"], [("0", "a | b")]), end="")
        | t | text |
        |---|---|
        | 0 | a \\| b |
    """
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"
