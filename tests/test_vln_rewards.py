"""Returns and losses of the agent, random numbers by item, and masks."""

import numpy as np
import pytest
import torch

from vln.draws import ACTIONS, MASKS, uniforms
from vln.masking import mask_words
from vln.orientation import angle_features, panorama_table, with_panorama_angles
from vln.rewards import (
    actor_critic_loss,
    discounted_returns,
    imitation_loss,
    policy_entropy,
    step_rewards,
)


def test_rewards_of_all_kinds_of_steps():
    before = torch.tensor([5.0, 5.0, 5.0, 2.99, 3.0, 5.0])
    after = torch.tensor([4.0, 6.0, 5.0, 2.99, 3.0, 4.0])
    stopped = torch.tensor([False, False, False, True, True, False])
    active = torch.tensor([True, True, True, True, True, False])
    assert step_rewards(before, after, stopped, active).tolist() == [1, -1, 0, 2, -2, 0]


def test_returns_bootstrap_from_the_critic():
    rewards = torch.tensor([[1.0, 1.0], [0.0, -1.0], [2.0, 0.0]])
    found = discounted_returns(rewards, torch.tensor([0.0, 3.0]), discount=0.9)
    expected = [[1 + 0.81 * 2, 1 - 0.9 + 0.729 * 3], [1.8, -1 + 0.81 * 3], [2, 2.7]]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(("normalize", "divisor"), [("total", 3), ("batch", 2), ("none", 1)])
def test_actor_critic_is_the_papers_sum(normalize, divisor):
    log_probs = torch.tensor([[-0.5, -1.0], [-2.0, -torch.inf]], requires_grad=True)
    values = torch.tensor([[1.0, 0.5], [0.0, 9.0]], requires_grad=True)
    entropies = torch.tensor([[0.3, 0.2], [0.1, 5.0]])
    returns, active = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    found = actor_critic_loss(log_probs, values, entropies, returns, active, normalize=normalize)
    policy = 0.5 * 1 + 1.0 * -0.5 + 2.0 * 1
    total = policy + 0.5 * (1 + 0.25 + 1) - 0.01 * 0.6
    torch.testing.assert_close(found.loss, torch.tensor(total / divisor))
    torch.testing.assert_close(found.entropy, torch.tensor(0.2))
    found.loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-1.0, 0.5], [-1.0, 0.0]]) / divisor)
    torch.testing.assert_close(values.grad, torch.tensor([[-1.0, 0.5], [-1.0, 0.0]]) / divisor)


def test_an_unknown_normalisation_is_refused():
    empty = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="normalize is 'mean', expected one of total, batch, none"):
        actor_critic_loss(empty, empty, empty, empty, empty.bool(), normalize="mean")


def test_entropy_and_imitation_pass_over_what_is_not_there():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    entropy = policy_entropy(logits)
    torch.testing.assert_close(entropy[0], torch.log(torch.tensor(2.0)))
    (entropy.sum() + imitation_loss(logits, torch.tensor([1, -1]))).backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(
        imitation_loss(logits, torch.tensor([1, -1])).detach(), torch.log(torch.tensor(2.0))
    )


# ---- random numbers


def test_draws_are_uniform_and_of_their_item_alone():
    drawn = uniforms(1, MASKS, 3, np.arange(1000), 50)
    assert 0 <= drawn.min() and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005 and abs(drawn.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(drawn[:, :6], rowvar=False) - np.eye(6)).max() < 0.15
    assert (uniforms(1, MASKS, 3, [7], 20)[0] == drawn[7, :20]).all()
    for other in (
        uniforms(2, MASKS, 3, [7], 50),
        uniforms(1, ACTIONS, 3, [7], 50),
        uniforms(1, MASKS, 4, [7], 50),
    ):
        assert (other[0] != drawn[7]).all()
    with pytest.raises(ValueError, match="must be at least 0"):
        uniforms(1, MASKS, -1, [7], 5)


def mask(ids, **changes):
    options = {"vocab_size": 100, "special_ids": [0, 1, 2, 3, 4], "mask_id": 4, "seed": 0, "step": 0,
               "items": np.arange(len(ids))}  # fmt: skip
    return mask_words(ids, **(options | changes))


def test_shares_of_masked_words_are_those_of_bert():
    ids = np.random.default_rng(0).integers(0, 100, size=(2000, 40))
    masked = mask(ids)
    chosen, words = masked.labels >= 0, ids > 4
    assert not chosen[~words].any()
    assert abs(chosen[words].mean() - 0.15) < 0.005
    assert (masked.labels[chosen] == ids[chosen]).all() and (masked.input_ids[~chosen] == ids[~chosen]).all()
    kept, hidden = masked.input_ids[chosen] == ids[chosen], masked.input_ids[chosen] == 4
    assert abs(hidden.mean() - 0.801) < 0.015 and abs(kept.mean() - 0.101) < 0.012
    others = masked.input_ids[chosen][~kept & ~hidden]
    assert set(range(100)) - set(others.tolist()) <= {4}  # special words too, as in the original


def test_masks_are_fresh_at_every_step_and_the_same_in_every_batch():
    ids = np.random.default_rng(0).integers(5, 100, size=(20, 30))
    whole = mask(ids)
    part = mask(ids[5:8, :20], items=[5, 6, 7])
    assert (part.labels == whole.labels[5:8, :20]).all()
    assert (part.input_ids == whole.input_ids[5:8, :20]).all()
    assert (mask(ids, step=1).labels != whole.labels).any()
    assert (mask(ids, share=0.0).labels == -1).all()
    with pytest.raises(ValueError, match=r"share is 1\.5"):
        mask(ids, share=1.5)


# ---- orientation


def test_layouts_hold_the_same_numbers():
    blocks = angle_features([0.3, 4.0], [0.1, -0.5], size=8)
    mixed = angle_features([0.3, 4.0], [0.1, -0.5], size=8, layout="interleaved")
    four = [np.sin(0.3), np.cos(0.3), np.sin(0.1), np.cos(0.1)]
    np.testing.assert_allclose(blocks[0], np.repeat(four, 2), rtol=1e-6)
    np.testing.assert_allclose(mixed[0], four * 2, rtol=1e-6)
    with pytest.raises(ValueError, match="an orientation of 6 numbers"):
        angle_features(0.0, 0.0, size=6)
    with pytest.raises(ValueError, match="layout is 'mixed'"):
        angle_features(0.0, 0.0, layout="mixed")


def test_views_are_turned_as_the_agent_looks():
    table = panorama_table(4, "blocks")
    view = 12 + 2  # level, 60 degrees to the right
    np.testing.assert_allclose(table[view % 12, view], [0, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(table[2, 12 + 5], [1, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(table[2, 24 + 2], [0, 1, 0.5, 0.75**0.5], atol=1e-6)
    features = np.random.default_rng(0).normal(size=(2, 36, 3)).astype(np.float32)
    found = with_panorama_angles(features, [view, 5], size=4)
    assert (found[..., :3] == features).all() and (found[0, :, 3:] == table[2]).all()
    assert (found[1, :, 3:] == table[5]).all()
