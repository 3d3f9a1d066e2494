"""KL, schedules, bounds and figures of a latent space, against definitions and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from vae_lm import latent
from vae_lm.latent import LatentStatistics

PROPERTIES = settings(deadline=None, max_examples=30)


def posteriors(count=6, dim=4, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return mu * spread, logvar


# ---- one posterior


def test_kl_is_that_of_normal_distributions():
    mu, logvar = posteriors()
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(torch.tensor(0.0), torch.tensor(1.0)))
    torch.testing.assert_close(latent.kl_per_dimension(mu, logvar), expected)


def test_kl_without_a_variance_keeps_the_mean():
    mu, logvar = posteriors()
    for mode in ("unit_variance", "mean"):
        torch.testing.assert_close(latent.kl_per_dimension(mu, logvar, mode=mode), mu**2 / 2)


def test_threshold_counts_sentence_by_sentence_and_stops_gradients_below():
    mu = torch.tensor([[2.0, 0.5], [0.1, 3.0]], requires_grad=True)
    per_dimension = latent.kl_per_dimension(mu, torch.zeros(2, 2))
    counted = latent.thresholded_kl(per_dimension, 0.125)
    assert counted.tolist() == [2.0, 4.5]  # 0.125 is not above 0.125
    counted.sum().backward()
    assert mu.grad.tolist() == [[2.0, 0.0], [0.0, 3.0]]
    torch.testing.assert_close(latent.thresholded_kl(per_dimension, 0.0), per_dimension.sum(-1))


def test_draws_follow_the_mode():
    mu, logvar = posteriors()
    noise = torch.full_like(mu, 2.0)
    torch.testing.assert_close(latent.draw(mu, logvar, noise=noise), mu + 2 * (0.5 * logvar).exp())
    assert torch.equal(latent.draw(mu, logvar, mode="unit_variance", noise=noise), mu + 2)
    assert torch.equal(latent.draw(mu, logvar, mode="mean"), mu)
    torch.manual_seed(0)
    free = latent.draw(torch.zeros(20000, 1), torch.full((20000, 1), math.log(9.0)))
    assert abs(free.std() - 3) < 0.1


def test_log_normal_is_a_density():
    mu, logvar = posteriors()
    z = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(
        latent.log_normal(z, mu, logvar), Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(-1)
    )
    torch.testing.assert_close(latent.log_normal(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


# ---- schedule


def by_the_definition(num_steps, start, stop, cycles, zero, rise):
    """The schedule step by step, as written down in words."""
    values, period = [stop] * num_steps, num_steps / cycles
    for cycle in range(cycles):
        value, step = start, 0
        while step <= period + 1 and math.floor(step + cycle * period) < num_steps:
            flat = step < period * zero
            values[math.floor(step + cycle * period)] = start if flat else min(value, stop)
            value += 0 if flat else (stop - start) / (period * rise)
            step += 1
    return values


@PROPERTIES
@given(
    num_steps=st.integers(1, 60),
    cycles=st.integers(1, 6),
    zero=st.floats(0, 1),
    rise=st.floats(0.05, 1),
    stop=st.floats(0, 2),
)
def test_schedule_follows_its_definition(num_steps, cycles, zero, rise, stop):
    cycles = min(cycles, num_steps)
    found = latent.beta_schedule(num_steps, stop=stop, num_cycles=cycles, zero_share=zero, rise_share=rise)
    expected = by_the_definition(num_steps, 0.0, stop, cycles, zero, rise)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_schedule_without_a_change_is_constant():
    assert set(latent.beta_schedule(40, start=2.0, stop=2.0, num_cycles=3).tolist()) == {2.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 3, "num_cycles": 4}, "4 cycles in 3 steps"),
        ({"num_steps": 9, "num_cycles": 0}, "0 cycles in 9 steps"),
        ({"num_steps": 9, "zero_share": 1.5}, "zero_share is 1.5"),
        ({"num_steps": 9, "rise_share": 0.0}, "rise_share 0.0"),
        ({"num_steps": 9, "start": 1.0, "stop": 0.5}, "falls from 1.0 to 0.5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        latent.beta_schedule(**options)


# ---- bound: a linear model, where log p(x) is known


def linear_model(dim=3, width=5, seed=0):
    """x = W z + noise of variance 0.25, and a posterior that is not the exact one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, dim, generator=generator, dtype=torch.float64)
    x = torch.randn(4, width, generator=generator, dtype=torch.float64)

    def log_likelihood(z):
        return Normal(z @ weight.t(), 0.5).log_prob(x[:, None]).sum(-1)

    covariance = weight @ weight.t() + 0.25 * torch.eye(width, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(width).double(), covariance).log_prob(x)
    precision = weight.t() @ weight / 0.25 + torch.eye(dim, dtype=torch.float64)
    mu = (torch.linalg.solve(precision, weight.t()) @ x.t()).t() / 0.25
    logvar = -precision.diagonal().log().expand_as(mu) + 0.3
    return log_likelihood, mu, logvar, exact


def test_bound_lies_between_elbo_and_the_truth_and_grows_with_the_samples():
    log_likelihood, mu, logvar, exact = linear_model()
    runs, generator = 4000, torch.Generator().manual_seed(1)

    def many(z):  # [runs * 4, s, d], the four sentences in turn
        parts = z.unflatten(0, (runs, 4)).transpose(0, 1).flatten(1, 2)
        return log_likelihood(parts).unflatten(1, (runs, -1)).transpose(0, 1).flatten(0, 1)

    found = []
    for num_samples in (1, 5, 50):
        estimate = latent.importance_weighted(
            many,
            mu.repeat(runs, 1),
            logvar.repeat(runs, 1),
            num_samples=num_samples,
            samples_at_once=25,
            generator=generator,
        )
        found.append(estimate.log_prob.unflatten(0, (runs, 4)).mean(0))
        elbo = -(estimate.reconstruction + estimate.kl).unflatten(0, (runs, 4)).mean(0)
        assert (found[-1] > elbo - 0.1).all()
    assert (found[0] < found[1]).all() and (found[1] < found[2]).all()
    assert (found[2] < exact + 0.02).all()
    torch.testing.assert_close(found[2], exact, atol=0.1, rtol=0)


def test_bound_does_not_depend_on_how_many_samples_are_taken_at_once():
    log_likelihood, mu, logvar, _ = linear_model()
    noise = torch.randn(4, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = latent.importance_weighted(
        log_likelihood, mu, logvar, num_samples=12, samples_at_once=12, noise=noise
    )
    parts = latent.importance_weighted(
        log_likelihood, mu, logvar, num_samples=12, samples_at_once=5, noise=noise
    )
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole.kl, latent.kl_per_dimension(mu, logvar).sum(-1))


def test_three_perplexities_of_one_sum():
    found = latent.perplexity(-12 * math.log(3), num_tokens=14, num_words=10, num_sentences=2)
    assert found == pytest.approx((3 ** (12 / 14), 3.0, 3.0))
    with pytest.raises(ValueError, match="2 sentences with 3 tokens"):
        latent.perplexity(-1.0, num_tokens=3, num_words=1, num_sentences=2)


# ---- figures of a set


@PROPERTIES
@given(count=st.integers(1, 9), dim=st.integers(1, 5), chunk=st.integers(1, 10), seed=st.integers(0, 99))
def test_mutual_information_is_that_of_its_definition(count, dim, chunk, seed):
    mu, logvar = posteriors(count, dim, seed, spread=3.0)
    noise = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    z = mu + noise * (0.5 * logvar).exp()
    density = Normal(mu, (0.5 * logvar).exp())
    aggregate = torch.stack([density.log_prob(row).sum(-1).logsumexp(0) - math.log(count) for row in z])
    expected = -density.entropy().sum(-1).mean() - aggregate.mean()
    found = latent.mutual_information(mu, logvar, noise=noise, chunk_size=chunk)
    assert found.nats == pytest.approx(float(expected), abs=1e-8)
    assert found.num_sentences == count


def test_mutual_information_is_bounded_by_log_n_and_by_the_mean_kl():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = posteriors(400, 4, spread=50.0)
    far = latent.mutual_information(mu, logvar, generator=generator)
    assert far.nats == pytest.approx(math.log(400), abs=0.15)  # posteriors that never overlap
    mu, logvar = posteriors(400, 4, spread=0.7)
    near = latent.mutual_information(mu, logvar, generator=generator)
    assert 0 < near.nats < latent.kl_per_dimension(mu, logvar).sum(-1).mean() + 0.2
    same = latent.mutual_information(torch.zeros(50, 3), torch.zeros(50, 3), generator=generator)
    assert abs(same.nats) < 0.5


def test_active_units_have_means_that_vary():
    mu = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.11, 0.05])
    found = latent.active_units(mu)
    assert found.num_active == 2
    torch.testing.assert_close(found.variance, mu.double().var(0))
    assert latent.active_units(mu, threshold=0.5).num_active == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent.thresholded_kl(torch.ones(2), -0.1), "free_bits is -0.1"),
        (lambda: latent.draw(torch.ones(2), torch.ones(2), mode="none"), "posterior mode is 'none'"),
        (lambda: latent.kl_per_dimension(torch.ones(2), torch.ones(2), mode="x"), "must be one of sample"),
        (lambda: latent.draw(torch.ones(2), torch.ones(2), noise=torch.ones(3)), r"noise is \[3\]"),
        (lambda: latent.active_units(torch.ones(1, 3)), "1 sentences have no variance"),
        (lambda: latent.mutual_information(torch.ones(0, 3), torch.ones(0, 3)), "of no sentences"),
        (lambda: latent.latent_statistics([]), "at least one sentence"),
        (
            lambda: latent.importance_weighted(
                lambda z: z[..., 0], torch.ones(2, 3), torch.ones(2, 3), num_samples=0
            ),
            "num_samples 0",
        ),
        (
            lambda: latent.importance_weighted(
                lambda z: z[..., 0], torch.ones(2, 3), torch.ones(2, 3), noise=torch.ones(2, 3)
            ),
            r"noise is \[2, 3\] but \[2, 100, 3\]",
        ),
        (lambda: latent.interpolate(torch.ones(2), torch.ones(2), steps=0), "steps is 0"),
        (lambda: latent.interpolate(torch.ones(2), torch.ones(3)), r"the ends are \[2\] and \[3\]"),
        (lambda: latent.interpolate(torch.ones(2), torch.ones(2), mode="cubic"), "mode is 'cubic'"),
        (lambda: latent.traverse(torch.ones(2), 2, torch.ones(3)), "dimension is 2 but the latent has 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- statistics


def test_statistics_are_the_moments_of_draws_and_do_not_depend_on_the_batches():
    mu, logvar = posteriors(300, 3)
    mu = mu @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0.1]]).double() + 1000
    whole = latent.latent_statistics([(mu, logvar)])
    parts = latent.latent_statistics(iter(zip(mu.split(7), logvar.split(7), strict=True)))
    torch.testing.assert_close(whole[:2], parts[:2])
    assert whole.num_sentences == parts.num_sentences == 300
    noise = torch.randn(2000, 300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = (mu + noise * (0.5 * logvar).exp()).flatten(0, 1)
    torch.testing.assert_close(whole.mean, draws.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(whole.covariance, draws.t().cov(), atol=0.05, rtol=0.01)


def test_whitening_gives_unit_covariance_and_can_be_undone():
    mu, logvar = posteriors(200, 4, spread=5.0)
    statistics = latent.latent_statistics([(mu, logvar + 1)])
    root = torch.linalg.cholesky(statistics.covariance)
    z = torch.randn(50_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ root.t()
    white = statistics.whiten(z + statistics.mean)
    torch.testing.assert_close(white.t().cov(), torch.eye(4).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(statistics.unwhiten(white), z + statistics.mean)
    assert statistics.whiten(z[:3].float()).dtype == torch.float32
    dead = LatentStatistics(torch.zeros(2), torch.tensor([[4.0, 0.0], [0.0, 0.0]]).double(), 9)
    assert dead.whiten(torch.tensor([2.0, 0.0])).tolist() == [1.0, 0.0]


# ---- moving


def test_slerp_keeps_to_the_circle_and_meets_both_ends():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])
    way = latent.interpolate(first, second, steps=4, mode="slerp")
    torch.testing.assert_close(way[[0, -1]], torch.stack([first, second]))
    torch.testing.assert_close(way.norm(dim=1), torch.linspace(3, 1, 5))
    angles = torch.atan2(way[:, 1], way[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 5))
    parallel = latent.interpolate(first, 2 * first, steps=2, mode="slerp")
    torch.testing.assert_close(parallel[:, 0], torch.tensor([3.0, 4.5, 6.0]))
    assert latent.interpolate(torch.zeros(2), second, steps=2, mode="slerp").isfinite().all()


def test_analogy_and_traversal():
    a, b, c = torch.eye(3)
    assert latent.analogy(a, b, c, scale=2.0).tolist() == [-2.0, 2.0, 1.0]
    moved = latent.traverse(torch.tensor([5.0, 6.0]), 1, torch.tensor([-1.0, 1.0]))
    assert moved.tolist() == [[5.0, -1.0], [5.0, 1.0]]
