"""The latent side of a sentence VAE: KL and its threshold, schedules, bounds, figures of the space.

Everything here is about tensors of means, log-variances and latents, and knows no network. Logarithms are
natural, so all figures are in nats. Sets of sentences are handled in chunks: no figure holds more than a
chunk times the set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PosteriorMode = Literal["sample", "unit_variance", "mean"]
"""How z is taken from a posterior: a draw, a draw with variance 1 whatever the encoder says (the original's
"deterministic" mode), or its mean (a plain auto-encoder)."""

POSTERIOR_MODES: tuple[PosteriorMode, ...] = ("sample", "unit_variance", "mean")


# ---- one posterior


def draw(
    mu: Tensor, logvar: Tensor, *, mode: PosteriorMode = "sample", noise: Tensor | None = None
) -> Tensor:
    """Latents of posteriors N(mu, exp(logvar)).

    Args:
        mu: ``[..., d]``.
        logvar: ``[..., d]``.
        mode: see `PosteriorMode`.
        noise: standard normal ``[..., d]``; None draws it from PyTorch's default generator. Mode "mean" has
            none.

    Returns:
        ``[..., d]``.

    Raises:
        ValueError: unknown mode, or noise of another shape.
    """
    _check_mode(mode)
    if noise is not None and noise.shape != mu.shape:
        raise ValueError(f"noise is {list(noise.shape)} but the posterior means are {list(mu.shape)}")
    if mode == "mean":
        return mu
    noise = torch.randn_like(mu) if noise is None else noise
    return mu + noise if mode == "unit_variance" else mu + noise * (0.5 * logvar).exp()


def kl_per_dimension(mu: Tensor, logvar: Tensor, *, mode: PosteriorMode = "sample") -> Tensor:
    """KL(q || N(0, 1)) of every dimension, (mu^2 + sigma^2 - log sigma^2 - 1) / 2.

    Without a variance of its own ("unit_variance", "mean") a posterior keeps mu^2 / 2.

    Args:
        mu: ``[..., d]``.
        logvar: ``[..., d]``.
        mode: see `PosteriorMode`.

    Returns:
        ``[..., d]``, not negative.

    Raises:
        ValueError: unknown mode.

    Example:
        >>> kl_per_dimension(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor([2.])
    """
    _check_mode(mode)
    # expm1: at a small logvar the exponential and the 1 would cancel to nothing.
    own = logvar.expm1() - logvar if mode == "sample" else 0.0
    return 0.5 * (mu.square() + own)


def thresholded_kl(per_dimension: Tensor, free_bits: float) -> Tensor:
    """Sum of the dimensions whose KL is above the threshold, sentence by sentence.

    The paper (Eq. 8) writes sum_j max(lambda, KL_j): the gradient is the same, and the value larger by lambda
    for each dimension below. A dimension at or below the threshold gets no gradient, so it is free to carry
    that much.

    Args:
        per_dimension: ``[..., d]``, from `kl_per_dimension`.
        free_bits: the threshold lambda, in nats; 0 is the plain KL.

    Returns:
        ``[...]``.

    Raises:
        ValueError: a negative threshold.

    Example:
        >>> thresholded_kl(torch.tensor([0.25, 1.0, 2.0]), 0.5)
        tensor(3.)
    """
    if free_bits < 0:
        raise ValueError(f"free_bits is {free_bits} but a threshold of KL cannot be negative")
    return torch.where(per_dimension > free_bits, per_dimension, 0).sum(-1)


def _check_mode(mode: str) -> None:
    if mode not in POSTERIOR_MODES:
        raise ValueError(f"posterior mode is {mode!r} but must be one of {', '.join(POSTERIOR_MODES)}")


def log_normal(z: Tensor, mu: Tensor | None = None, logvar: Tensor | None = None) -> Tensor:
    """Log-density of N(mu, exp(logvar)) with independent dimensions; the prior N(0, I) by default.

    Args:
        z: ``[..., d]``.
        mu: broadcastable to z.
        logvar: broadcastable to z.

    Returns:
        ``[...]``.
    """
    offset = z if mu is None else z - mu
    squares = offset.square() if logvar is None else offset.square() * (-logvar).exp() + logvar
    return -0.5 * (squares + math.log(2 * math.pi)).sum(-1)


# ---- schedule of the KL weight


def beta_schedule(
    num_steps: int,
    *,
    start: float = 0.0,
    stop: float = 1.0,
    num_cycles: int = 1,
    zero_share: float = 0.5,
    rise_share: float = 0.25,
) -> Tensor:
    """Cyclic KL weight (Fu et al. 2019; Optimus Sec. 3.3): flat at ``start``, a rise, flat at ``stop``.

    A cycle lasts p = num_steps / num_cycles, not always a whole number of steps, and begins at the next lower
    step. If the shares add to more than 1, the rise ends before it reaches ``stop``.

    Args:
        num_steps: length of the schedule, in steps before gradient accumulation.
        start: weight at the beginning of each cycle.
        stop: weight at its end; at least ``start``.
        num_cycles: of equal length.
        zero_share: share of a cycle spent at ``start``.
        rise_share: share of a cycle in which the weight rises.

    Returns:
        float64 ``[num_steps]``.

    Raises:
        ValueError: a count below 1, more cycles than steps, a share that is not one, or a fall instead of a
            rise.

    Example:
        >>> beta_schedule(8, num_cycles=2, zero_share=0.25, rise_share=0.5)
        tensor([0.0000, 0.0000, 0.5000, 1.0000, 0.0000, 0.0000, 0.5000, 1.0000],
               dtype=torch.float64)
    """
    if num_cycles < 1 or num_steps < num_cycles:
        raise ValueError(
            f"{num_cycles} cycles in {num_steps} steps: both must be positive, a step at least each"
        )
    if not (0 <= zero_share <= 1 and 0 < rise_share <= 1):
        raise ValueError(
            f"zero_share is {zero_share} and rise_share {rise_share}: shares of a cycle are in [0, 1], and "
            "the rise takes some of it"
        )
    if not start <= stop:
        raise ValueError(f"the KL weight falls from {start} to {stop}: give start <= stop")
    period = num_steps / num_cycles
    begins = (torch.arange(num_cycles, dtype=torch.float64) * period).floor()
    steps = torch.arange(num_steps, dtype=torch.float64)
    within = steps - begins[torch.searchsorted(begins, steps, right=True) - 1]
    risen = (within - math.ceil(period * zero_share)).clamp(min=0)
    return (start + risen * (stop - start) / (period * rise_share)).clamp(max=stop)


# ---- bound by importance weights


class ImportanceEstimate(NamedTuple):
    """Estimates for each sentence, ``[B]`` each.

    ``log_prob`` is the importance-weighted bound of log p(x), ``reconstruction`` the mean of -log p(x | z)
    over the same draws, ``kl`` the analytic KL without a threshold; -ELBO is ``reconstruction + kl``.
    """

    log_prob: Tensor
    reconstruction: Tensor
    kl: Tensor


def importance_weighted(
    log_likelihood: Callable[[Tensor], Tensor],
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int = 100,
    samples_at_once: int = 5,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> ImportanceEstimate:
    """Bound log p(x) from below by S draws of the posterior (Burda et al. 2016; Optimus, App. on evaluation).

    log-mean-exp over s of log p(x | z_s) + log p(z_s) - log q(z_s | x). In expectation it is at least the
    ELBO and grows with S.

    Args:
        log_likelihood: from latents ``[B, s, d]`` to log p(x | z) ``[B, s]``.
        mu: ``[B, d]``.
        logvar: ``[B, d]``.
        num_samples: S.
        samples_at_once: draws given to ``log_likelihood`` together.
        noise: standard normal ``[B, S, d]`` to use instead of drawing.
        generator: for the draws, on the device of ``mu``.

    Returns:
        An `ImportanceEstimate`; float32 or wider.

    Raises:
        ValueError: a count below 1, or noise of another shape.
    """
    if num_samples < 1 or samples_at_once < 1:
        raise ValueError(
            f"num_samples {num_samples} and samples_at_once {samples_at_once} must be at least 1"
        )
    batch, dim = mu.shape
    if noise is not None and noise.shape != (batch, num_samples, dim):
        raise ValueError(
            f"noise is {list(noise.shape)} but [{batch}, {num_samples}, {dim}] was expected: num_samples "
            "draws for each sentence"
        )
    log_prob, likelihood = torch.full_like(mu[:, 0], -math.inf), torch.zeros_like(mu[:, 0])
    for first in range(0, num_samples, samples_at_once):
        count = min(samples_at_once, num_samples - first)
        if noise is None:
            part = torch.randn(batch, count, dim, dtype=mu.dtype, device=mu.device, generator=generator)
        else:
            part = noise[:, first : first + count]
        z = draw(mu[:, None].expand_as(part), logvar[:, None], noise=part)
        given_z = log_likelihood(z)  # [B, s]
        weights = given_z + log_normal(z) - log_normal(z, mu[:, None], logvar[:, None])
        log_prob = torch.logaddexp(log_prob, weights.logsumexp(1))
        likelihood = likelihood + given_z.sum(1)
    return ImportanceEstimate(
        log_prob=log_prob - math.log(num_samples),
        reconstruction=-likelihood / num_samples,
        kl=kl_per_dimension(mu, logvar).sum(-1),
    )


class Perplexity(NamedTuple):
    """Three perplexities of one sum of log-probabilities; they differ in what counts as a token.

    ``original`` divides by the tokens with BOS and EOS (as the paper's figures do, which flatters: BOS is
    never predicted), ``token`` by the predicted tokens, ``word`` by the words between blanks and one end a
    sentence.
    """

    original: float
    token: float
    word: float


def perplexity(log_prob: float, *, num_tokens: int, num_words: int, num_sentences: int) -> Perplexity:
    """Perplexities of a set of sentences.

    Args:
        log_prob: sum of log p(x) over the sentences.
        num_tokens: decoder tokens of all sentences, BOS and EOS included.
        num_words: words between blanks, of all stripped sentences.
        num_sentences: how many.

    Returns:
        A `Perplexity`.

    Raises:
        ValueError: no sentence, or fewer tokens than two a sentence (BOS and EOS).

    Example:
        >>> perplexity(-8 * math.log(2), num_tokens=10, num_words=6, num_sentences=2).token
        2.0
    """
    if num_sentences < 1 or num_tokens < 2 * num_sentences or num_words < 0:
        raise ValueError(
            f"{num_sentences} sentences with {num_tokens} tokens and {num_words} words: at least one "
            "sentence with BOS and EOS was expected"
        )
    counts = (num_tokens, num_tokens - num_sentences, num_words + num_sentences)
    return Perplexity(*(math.exp(-log_prob / count) for count in counts))


# ---- figures of a set of sentences


class MutualInformation(NamedTuple):
    """Estimate of I(x; z) in nats and the number N of sentences it comes from; it cannot exceed log N."""

    nats: float
    num_sentences: int


def mutual_information(
    mu: Tensor,
    logvar: Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int = 256,
) -> MutualInformation:
    """Mutual information of sentence and latent under the encoder (Hoffman and Johnson 2016).

    -H(q(z | x)) averaged over sentences, analytically, minus log q(z_n) of one draw for each of them, where
    q(z) is the mean of all N posteriors. In float64.

    Args:
        mu: ``[N, d]``.
        logvar: ``[N, d]``.
        noise: standard normal ``[N, d]`` instead of draws.
        generator: for the draws, on the device of ``mu``.
        chunk_size: draws compared with all posteriors at once.

    Returns:
        The estimate and N.

    Raises:
        ValueError: no sentence, or noise of another shape.
    """
    if not len(mu):
        raise ValueError("mutual information of no sentences: give at least one posterior")
    mu, logvar = mu.double(), logvar.double()
    if noise is None:
        noise = torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
    z = draw(mu, logvar, noise=noise.double())
    # Expanded squares turn N^2 d operations into matrix products; float64 bears the cancellation.
    precision = (-logvar).exp()
    constant = (mu.square() * precision + logvar).sum(-1) + mu.shape[1] * math.log(2 * math.pi)  # [N]
    total = z.new_zeros(())
    for part in z.split(chunk_size):
        squares = part.square() @ precision.t() - 2 * part @ (mu * precision).t() + constant
        total += (-0.5 * squares).logsumexp(1).sum()
    aggregate = total / len(mu) - math.log(len(mu))
    own = -0.5 * (math.log(2 * math.pi) + 1 + logvar).sum(-1).mean()
    return MutualInformation(float(own - aggregate), len(mu))


class ActiveUnits(NamedTuple):
    """Number of dimensions in use, and the variance of the means in each, ``[d]``."""

    num_active: int
    variance: Tensor


def active_units(mu: Tensor, *, threshold: float = 0.01) -> ActiveUnits:
    """Dimensions whose posterior mean varies over the sentences (Burda et al. 2016).

    Args:
        mu: ``[N, d]``.
        threshold: least unbiased variance of a dimension in use.

    Returns:
        The count, and the variance of each dimension in float64.

    Raises:
        ValueError: fewer than two sentences.

    Example:
        >>> active_units(torch.tensor([[0.0, 1.0], [2.0, 1.0]])).num_active
        1
    """
    if len(mu) < 2:
        raise ValueError(f"{len(mu)} sentences have no variance: give at least two")
    variance = mu.double().var(0)
    return ActiveUnits(int((variance >= threshold).sum()), variance)


# ---- the aggregate posterior, for diffusion models and flows on z


class LatentStatistics(NamedTuple):
    """Mean ``[d]`` and covariance ``[d, d]`` of z over a corpus, float64, and the number of sentences.

    The covariance counts both how the means spread and how wide each posterior is, so a whitened draw has
    mean 0 and covariance 1 over that corpus.
    """

    mean: Tensor
    covariance: Tensor
    num_sentences: int

    def whiten(self, z: Tensor) -> Tensor:
        """Rotate and scale z ``[..., d]`` to covariance 1, as near to the old axes as that can be (ZCA)."""
        return self._apply(z.double() - self.mean.to(z.device), -0.5).to(z.dtype)

    def unwhiten(self, w: Tensor) -> Tensor:
        """Undo `whiten`."""
        return (self._apply(w.double(), 0.5) + self.mean.to(w.device)).to(w.dtype)

    def _apply(self, x: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance.to(x.device))
        # A dimension that never moves would be blown up without end.
        values = values.clamp(min=float(values.max()) * 1e-9)
        return x @ (vectors * values.pow(power)) @ vectors.t()


def latent_statistics(
    posteriors: Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]],
) -> LatentStatistics:
    """Moments of the aggregate posterior, from batches, so that a corpus need not be in memory.

    Args:
        posteriors: pairs of mu ``[B, d]`` and logvar ``[B, d]``.

    Returns:
        Statistics on the CPU.

    Raises:
        ValueError: no sentence at all.
    """
    count, mean, scatter = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for mu, logvar in posteriors:
        if not len(mu):
            continue
        means, variance = mu.detach().double().cpu(), logvar.detach().double().cpu().exp()
        # Two sets joined by their means: sums of squares about zero would lose digits far from it.
        own, total = means.mean(0), count + len(means)
        shift, centred = own - mean, means - own
        joined = torch.outer(shift, shift) * (count * len(means) / total)
        scatter = scatter + centred.t() @ centred + variance.sum(0).diag() + joined
        mean, count = mean + shift * (len(means) / total), total
    if not count:
        raise ValueError("no posterior was given: latent statistics need at least one sentence")
    return LatentStatistics(mean, scatter / count, count)


# ---- moving in the space


def interpolate(first: Tensor, second: Tensor, *, steps: int = 10, mode: str = "linear") -> Tensor:
    """Points from one latent to another, both ends included.

    Args:
        first: ``[d]``.
        second: ``[d]``.
        steps: number of equal steps, so steps + 1 points.
        mode: "linear", (1 - t) z_1 + t z_2; or "slerp", along the great circle between the directions, the
            length changing evenly (linear where the directions are parallel).

    Returns:
        ``[steps + 1, d]``.

    Raises:
        ValueError: steps below 1, unknown mode, or two latents of different shape.

    Example:
        >>> interpolate(torch.tensor([0.0]), torch.tensor([1.0]), steps=2).flatten()
        tensor([0.0000, 0.5000, 1.0000])
    """
    if steps < 1:
        raise ValueError(f"steps is {steps} but a way has at least one")
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"the ends are {list(first.shape)} and {list(second.shape)}: two latents [d] were expected"
        )
    t = torch.linspace(0, 1, steps + 1, dtype=first.dtype, device=first.device)[:, None]
    if mode == "linear":
        return (1 - t) * first + t * second
    if mode != "slerp":
        raise ValueError(f"mode is {mode!r} but must be 'linear' or 'slerp'")
    lengths = first.norm(), second.norm()
    tiny = torch.finfo(first.dtype).tiny
    one, two = first / lengths[0].clamp(min=tiny), second / lengths[1].clamp(min=tiny)
    angle = (one @ two).clamp(-1, 1).acos()
    if angle.sin() < 1e-4:
        return (1 - t) * first + t * second
    directions = (((1 - t) * angle).sin() * one + (t * angle).sin() * two) / angle.sin()
    return ((1 - t) * lengths[0] + t * lengths[1]) * directions


def analogy(a: Tensor, b: Tensor, c: Tensor, *, scale: float = 1.0) -> Tensor:
    """``c + scale * (b - a)``: to c what b is to a. Shapes ``[..., d]``."""
    return c + scale * (b - a)


def traverse(z: Tensor, dimension: int, values: Tensor) -> Tensor:
    """Copies of a latent ``[d]`` with one dimension set to each of ``values`` ``[n]``; ``[n, d]``.

    Raises:
        ValueError: there is no such dimension.
    """
    if not 0 <= dimension < len(z):
        raise ValueError(f"dimension is {dimension} but the latent has {len(z)}: choose 0 to {len(z) - 1}")
    copies = z.repeat(len(values), 1)
    copies[:, dimension] = values.to(copies)
    return copies
