"""What an agent learns from: imitation, and advantage actor-critic (Tan et al., 2019, Sec. 3.2).

Letters of shapes: S steps, B rows, C candidates.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Normalize = Literal["total", "batch", "none"]

SUCCESS_RADIUS = 3.0
"""Metres."""


def step_rewards(before: Tensor, after: Tensor, stopped: Tensor, active: Tensor) -> Tensor:
    """Reward of one step.

    A STOP earns 2 within 3 m of the goal and -2 elsewhere; a move 1 if the distance fell, -1 if it rose and
    0 if it stayed (where the original fails).

    Args:
        before: metres to the goal before the step, ``[...]``.
        after: metres after it.
        stopped: bool, whether the step is a STOP.
        active: bool, whether the episode was still going on; else the reward is 0.

    Returns:
        float32 ``[...]``.

    Example:
        >>> step_rewards(torch.tensor([5.0, 2.0]), torch.tensor([4.0, 2.0]), torch.tensor([False, True]),
        ...     torch.tensor([True, True]))
        tensor([1., 2.])
    """
    at_end = torch.where(before < SUCCESS_RADIUS, 2.0, -2.0)
    return torch.where(stopped, at_end, torch.sign(before - after).to(at_end.dtype)) * active


def discounted_returns(rewards: Tensor, bootstrap: Tensor, *, discount: float = 0.9) -> Tensor:
    """R_t = r_t + discount * R_{t+1}, from the last step back.

    Args:
        rewards: ``[S, B]``.
        bootstrap: ``[B]``: the critic's value after the last step, 0 for finished episodes.
        discount: gamma.

    Returns:
        ``[S, B]``, without gradients.

    Example:
        >>> discounted_returns(torch.tensor([[1.0], [2.0]]), torch.tensor([10.0]), discount=0.5).tolist()
        [[4.5], [7.0]]
    """
    following, found = bootstrap.detach(), []
    for reward in rewards.detach().flip(0):
        following = reward + discount * following
        found.append(following)
    return torch.stack(found).flip(0)


class ActorCritic(NamedTuple):
    """Loss and its terms, each ``[]``."""

    loss: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor
    """Mean over the active steps, in nats; not weighted."""


def actor_critic_loss(
    log_probs: Tensor,
    values: Tensor,
    entropies: Tensor,
    returns: Tensor,
    active: Tensor,
    *,
    entropy_weight: float = 0.01,
    normalize: Normalize = "total",
) -> ActorCritic:
    """Advantage actor-critic: mean of -log pi (R - V) + 1/2 (R - V)^2 - 0.01 entropy over active steps.

    Args:
        log_probs: of the actions taken, ``[S, B]``.
        values: of the critic, ``[S, B]``.
        entropies: of the policy, ``[S, B]``.
        returns: of `discounted_returns`, ``[S, B]``.
        active: bool ``[S, B]``.
        entropy_weight: of the entropy.
        normalize: divide the sum by the number of active steps, by B, or not at all.

    Raises:
        ValueError: ``normalize`` is another.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize is {normalize!r}, expected one of {', '.join(get_args(Normalize))}")
    count = active.sum().clamp(min=1)
    divisors: dict[str, Any] = {"total": count, "batch": active.shape[1], "none": 1}
    divisor = divisors[normalize]
    advantage = returns - values
    # Where nothing was taken log_probs may be -inf: chosen, not multiplied, so that 0 * inf is no NaN.
    zero = values.new_zeros(())
    policy = torch.where(active, -log_probs * advantage.detach(), zero).sum() / divisor
    value = torch.where(active, 0.5 * advantage**2, zero).sum() / divisor
    entropy = torch.where(active, entropies, zero).sum()
    return ActorCritic(policy + value - entropy_weight * entropy / divisor, policy, value, entropy / count)


def policy_entropy(logits: Tensor) -> Tensor:
    """Entropy of the policy in nats, ``[..., C]`` to ``[...]``; candidates of -inf count nothing."""
    # Filled before the product: the gradient of 0 * -inf would be NaN.
    log_probs = logits.log_softmax(-1).masked_fill(logits == -torch.inf, 0.0)
    return -torch.where(logits == -torch.inf, 0.0, log_probs.exp() * log_probs).sum(-1)


def imitation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher, summed over rows; divide the sum over steps by B.

    Args:
        logits: ``[B, C]``, -inf where there is no candidate.
        teacher: int64 ``[B]``, -1 for ended rows.

    Returns:
        ``[]``.
    """
    return F.cross_entropy(logits, teacher, ignore_index=-1, reduction="sum")
