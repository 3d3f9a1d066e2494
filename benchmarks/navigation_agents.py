"""Agents without a model on R2R items: the shortest path, a random walk, and standing still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vln.candidates import PanoramicSimulator
from vln.data import R2RItem
from vln.geometry import HEADING_STEP, NUM_HEADINGS, VIEW_ELEVATIONS, VIEW_HEADINGS, views_between
from vln.simulator import Simulator
from vln.submission import Pose, Prediction
from vln.world import World

FORWARD_STEPS, MOST_ACTIONS = 5, 30
"""Of the random agent (Anderson et al., 2018)."""


def standing(items: Sequence[R2RItem]) -> list[Prediction]:
    """Stop where the episode begins."""
    return [
        Prediction(name, (Pose(item.path[0], item.heading, 0.0),))
        for item in items
        for name in item.instruction_ids
    ]


def random_walk(world: World, items: Sequence[R2RItem], *, seed: int) -> list[Prediction]:
    """Turn to a random heading, then walk five steps straight on, turning right where there is no way.

    Args:
        world: with the items' scans.
        items: to walk on; each instruction gets a walk of its own.
        seed: of the headings.
    """
    rows = [(name, item) for item in items for name in item.instruction_ids]
    simulator = Simulator(world, batch_size=len(rows))
    scan_ids, starts = [item.scan_id for _, item in rows], [item.path[0] for _, item in rows]
    state = simulator.new_episodes(scan_ids, starts, [item.heading for _, item in rows])
    turns_left = np.random.default_rng(seed).integers(0, NUM_HEADINGS, len(rows))
    moved = np.zeros(len(rows), dtype=np.int64)
    poses = [[_pose(world, state.viewpoint[row], state.view[row])] for row in range(len(rows))]
    for _ in range(MOST_ACTIONS):
        acting = moved < FORWARD_STEPS
        forward = acting & (turns_left == 0) & (state.num_navigable > 1)
        turning = acting & ~forward
        state = simulator.step(
            forward.astype(np.int64), np.where(turning, HEADING_STEP, 0.0), np.zeros(len(rows))
        )
        moved += forward
        turns_left = np.maximum(turns_left - 1, 0)
        for row in np.flatnonzero(acting):
            poses[row].append(_pose(world, state.viewpoint[row], state.view[row]))
    return [Prediction(name, tuple(walk)) for (name, _), walk in zip(rows, poses, strict=True)]


def shortest_path(world: World, items: Sequence[R2RItem]) -> list[Prediction]:
    """Follow the shortest path in the panoramic action space, and log every turn on the way.

    Args:
        world: with the items' scans.
        items: with goals.
    """
    rows = [(name, item) for item in items for name in item.instruction_ids]
    agent = PanoramicSimulator(world, batch_size=len(rows))
    scan_ids, starts = [item.scan_id for _, item in rows], [item.path[0] for _, item in rows]
    now = agent.new_episodes(scan_ids, starts, [item.heading for _, item in rows])
    first = np.array([world.starts[scan_id] for scan_id in scan_ids])
    goals = [world.graphs[item.scan_id].index(item.path[-1]) for _, item in rows]
    hops = [world.graphs[scan_id].next_hops for scan_id in scan_ids]
    poses = [[_pose(world, now.viewpoint[row], now.view[row])] for row in range(len(rows))]
    while True:
        here = now.viewpoint - first
        following = first + [table[at, goal] for table, at, goal in zip(hops, here, goals, strict=True)]
        walks = following != now.viewpoint
        if not walks.any():
            return [Prediction(name, tuple(walk)) for (name, _), walk in zip(rows, poses, strict=True)]
        choice = np.where(walks, (now.candidate == following[:, None]).argmax(axis=1), now.stop)
        faced = now.point_id[np.arange(len(rows)), choice]
        for row in np.flatnonzero(walks):
            turns = views_between(int(now.view[row]), int(faced[row]))
            poses[row] += [_pose(world, now.viewpoint[row], view) for view in turns]
            poses[row].append(_pose(world, following[row], faced[row]))
        now = agent.choose(choice)


def _pose(world: World, viewpoint: int, view: int) -> Pose:
    return Pose(world.viewpoint_ids[viewpoint], float(VIEW_HEADINGS[view]), float(VIEW_ELEVATIONS[view]))
