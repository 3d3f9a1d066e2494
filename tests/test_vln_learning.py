"""All pieces together: an agent learns to tell instructions apart that begin in the same place."""

import numpy as np
import pytest
import torch
from tiny_vln import grid, tiny_config

from vln.candidates import PanoramicSimulator
from vln.follower import Follower, FollowerConfig
from vln.model import Prevalent
from vln.orientation import angle_features, candidate_views, with_panorama_angles
from vln.pretrain_data import RandomFeatures
from vln.rewards import imitation_loss
from vln.walks import NextHops, teacher_actions
from vln.world import World

WORLD, PAIRS = World([grid("house", 6, 6)]), 8


class Task:
    """Pairs of episodes with one start pose and two goals, each with words of its own."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.distances = WORLD.graphs["house"].distances
        self.starts = np.repeat(random.choice(36, PAIRS, replace=False), 2)
        self.headings = np.repeat(random.uniform(0, 6.28, PAIRS), 2)
        far = [np.flatnonzero((row >= 9) & (row <= 15)) for row in self.distances[self.starts[::2]]]
        self.goals = np.concatenate([random.choice(goals, 2, replace=False) for goals in far])
        words = random.integers(5, 40, size=(2 * PAIRS, 7))
        self.ids = torch.from_numpy(np.pad(np.pad(words, ((0, 0), (1, 0)), constant_values=2),
                                           ((0, 0), (0, 1)), constant_values=3))  # fmt: skip
        self.lengths = torch.full((2 * PAIRS,), 9)
        self.features = RandomFeatures(WORLD, 16).gather(["house"] * 36, WORLD.viewpoint_ids)
        self.agents = PanoramicSimulator(WORLD, batch_size=2 * PAIRS)
        self.hops = NextHops(WORLD)

    def walk(self, follower, ids, *, teacher):
        """Imitation loss, and the share of goals reached."""
        now, loss = self.agents.place(self.starts, self.headings), torch.zeros(())
        active = np.ones(2 * PAIRS, dtype=bool)
        text, states = follower.encoder.encode_text(ids, self.lengths), None
        for _ in range(8):
            seen = self.features[now.viewpoint]
            panorama = torch.from_numpy(with_panorama_angles(seen, now.view, size=4))
            candidates = candidate_views(seen, now.point_id, now.rel_heading, now.rel_elevation, size=4)
            context = follower.encoder(text, self.lengths, panorama)
            step = follower.decoder(
                torch.from_numpy(angle_features(now.heading, now.elevation, size=4)), panorama,
                torch.from_numpy(candidates), *(states or (context.hidden, context.cell)), context,
                num_candidates=torch.from_numpy(now.num_choices),
            )  # fmt: skip
            states = (step.tilde, step.cell)
            right = teacher_actions(now, self.hops.towards(now.viewpoint, self.goals))
            loss = loss + imitation_loss(step.logits, torch.from_numpy(np.where(active, right, -1)))
            taken = right if teacher else step.logits.argmax(-1).numpy()
            taken = np.where(active, taken, now.stop)
            active = active & (taken != now.stop)
            now = self.agents.choose(taken)
        return loss / (2 * PAIRS), float((self.distances[now.viewpoint, self.goals] < 3).mean())


pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_agent_follows_its_words_and_a_deaf_one_cannot():
    torch.manual_seed(0)
    task = Task()
    trunk = Prevalent(tiny_config(hidden_size=32, feature_size=16, num_text_layers=1, num_cross_layers=1,
                                  hidden_dropout=0.0, attention_dropout=0.0))  # fmt: skip
    sizes = FollowerConfig(encoder_hidden=32, decoder_hidden=48, action_embedding=8, dropout=0.0,
                           encoder_dropout=0.0, feature_dropout=0.0)  # fmt: skip
    follower = Follower(trunk, sizes)
    optimiser = torch.optim.Adam([p for p in follower.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss, _ = task.walk(follower, task.ids, teacher=True)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(follower.parameters(), 5.0)
        optimiser.step()
    with torch.no_grad():
        reached = task.walk(follower, task.ids, teacher=False)[1]
        deaf = task.walk(follower, torch.where(task.ids > 4, 5, task.ids), teacher=False)[1]
    assert reached > 0.95 and deaf <= 0.55, (reached, deaf)
