"""Small agents and episodes for the tests of rollouts and training."""

import numpy as np
import torch
from tiny_vln import grid, tiny_model

from vln.agent import Episodes, NDHFollower
from vln.follower import Follower, FollowerConfig
from vln.model import Prevalent
from vln.pretrain_data import RandomFeatures
from vln.surroundings import Surroundings
from vln.world import World

SIZES = FollowerConfig(encoder_hidden=6, decoder_hidden=10, action_embedding=4)


def surroundings(scans=("a", "b")):
    world = World([grid(scan) for scan in scans])
    return Surroundings(world, RandomFeatures(world, 6), angle_size=4, orientation="blocks")


def tiny_agent(kind=Follower, seed=0, **changes):
    """An agent whose weights are large enough to walk about."""
    agent = kind(tiny_model(Prevalent, seed=seed, **changes), SIZES)
    with torch.no_grad():
        for parameter in agent.decoder.parameters():
            parameter.mul_(3)
    return agent.eval()


def episodes(world, count=6, *, instructions=1, path=False, seed=3):
    """Random starts, goals in the same scan and texts of unequal lengths."""
    random = np.random.default_rng(seed)
    half = len(world.viewpoint_ids) // 2
    start, goal = random.integers(half, size=(2, count))
    shift = half * (np.arange(count) % 2)
    lengths = random.integers(3, 8, size=(count, instructions))
    ids = random.integers(5, 40, size=(count, instructions, 8))
    ids[np.arange(8) >= lengths[..., None]] = 0
    waypoints = (goal + shift)[:, None]
    if path:
        waypoints = np.concatenate([(random.integers(half, size=count) + shift)[:, None], waypoints], axis=1)
    return Episodes(
        tuple((f"{row}_0",) for row in range(count)), np.arange(count) + 7, start + shift,
        random.uniform(0, 6.28, count), waypoints, ids, lengths,
    )  # fmt: skip


__all__ = ["NDHFollower", "episodes", "surroundings", "tiny_agent"]
