"""Rollouts: the same in any batch and with any caching, in the official form, with the right rewards."""

import numpy as np
import pytest
import torch
from tiny_agents import NDHFollower, episodes, surroundings, tiny_agent

from vln.agent import Noise, caching_is_exact, freeze, order_of, predictions, rollout, turned
from vln.candidates import PanoramicSimulator
from vln.data import R2RItem
from vln.follower import Follower
from vln.rewards import actor_critic_loss, discounted_returns, policy_entropy
from vln.submission import Submission, find_faults
from vln.surroundings import Clock, Course, Surroundings, environment_mask, padded

PLACE = surroundings()
NOISE = Noise(seed=1, step=5)

pytestmark = pytest.mark.usefixtures("one_thread")


def paths(found, world=PLACE.world):
    trace = found.trace
    return [trace.viewpoint[: moves + 1, row].tolist() for row, moves in enumerate(trace.num_moves)]


def test_surroundings_of_a_model_have_the_form_it_was_trained_with():
    config = tiny_agent(feature_scale=10.0, orientation="interleaved").encoder.trunk.config
    place = Surroundings.of(config, PLACE.world, PLACE.features)
    plain = Surroundings(PLACE.world, PLACE.features, angle_size=4, orientation="interleaved")
    now = PanoramicSimulator(PLACE.world, batch_size=2).place(np.array([0, 3]), np.array([0.3, 2.0]))
    scaled, seen = (each.look(now, np.arange(2)) for each in (place, plain))
    for ours, theirs in ((scaled.panorama, seen.panorama), (scaled.candidates, seen.candidates)):
        torch.testing.assert_close(ours[..., :6], 10 * theirs[..., :6])
        assert torch.equal(ours[..., 6:], theirs[..., 6:])
    with pytest.raises(ValueError, match=r"feature_scale is 0\.0 but must be above 0"):
        tiny_agent(feature_scale=0.0)


@pytest.mark.parametrize("kind", [Follower, NDHFollower])
@pytest.mark.parametrize("feedback", ["argmax", "sample", "teacher", "mixed"])
def test_a_batch_walks_as_its_rows_do_alone(kind, feedback):
    agent, whole = tiny_agent(kind), episodes(PLACE.world)
    options = {"feedback": feedback, "max_steps": 7, "noise": NOISE, "imitate": True}
    with torch.no_grad():
        together = rollout(agent, PLACE, whole, **options)
        alone = [rollout(agent, PLACE, whole.rows([row]), **options) for row in range(6)]
    assert paths(together) == [paths(one)[0] for one in alone]
    summed = sum(one.imitation for one in alone)
    torch.testing.assert_close(together.imitation, summed, rtol=1e-3, atol=1e-4)
    assert together.num_active == sum(one.num_active for one in alone)
    assert len({tuple(path) for path in paths(together)}) > 3


@pytest.mark.parametrize("kind", [Follower, NDHFollower])
def test_cached_words_change_nothing_in_eval_mode(kind):
    agent, whole = tiny_agent(kind), episodes(PLACE.world, instructions=3 if kind is Follower else 1)
    options = {"feedback": "sample", "max_steps": 6, "noise": NOISE, "imitate": True}
    with torch.no_grad():
        cached, plain = (rollout(agent, PLACE, whole, cache_text=cache, **options) for cache in (True, False))
    assert paths(cached) == paths(plain)
    assert torch.equal(cached.imitation, plain.imitation)


def test_cached_words_change_no_gradient_without_dropout_in_the_text():
    gradients = []
    for cache in (True, False):
        agent = tiny_agent(hidden_dropout=0.0, attention_dropout=0.0).train()
        torch.manual_seed(4)
        found = rollout(agent, PLACE, episodes(PLACE.world), feedback="teacher", max_steps=6, imitate=True,
                        cache_text=cache)  # fmt: skip
        found.imitation.sum().backward()
        gradients.append({n: p.grad.clone() for n, p in agent.named_parameters() if p.grad is not None})
    assert (
        gradients[0].keys() == gradients[1].keys() and "encoder.trunk.embeddings.words.weight" in gradients[0]
    )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_caching_is_chosen_where_it_is_exact():
    agent = tiny_agent()
    assert caching_is_exact(agent)
    assert not caching_is_exact(agent.train())
    freeze(agent.encoder.trunk, text=False, cross=True)
    assert caching_is_exact(agent) and agent.encoder.trunk.cross_layers.training
    freeze(agent.encoder.trunk, text=False, cross=False)
    assert not any(p.requires_grad for p in agent.encoder.trunk.parameters())
    assert caching_is_exact(tiny_agent(hidden_dropout=0.0, attention_dropout=0.0).train())
    with pytest.raises(ValueError, match="text=True needs cross=True"):
        freeze(agent.encoder.trunk, text=True, cross=False)


def test_a_teacher_walks_shortest_paths_and_the_loss_is_the_teachers():
    agent, whole = tiny_agent(), episodes(PLACE.world, 8)
    with torch.no_grad():
        found = rollout(agent, PLACE, whole, feedback="teacher", max_steps=20, imitate=True)
    world = PLACE.world
    for row, path in enumerate(paths(found)):
        names = [world.viewpoint_ids[place] for place in path]
        scan = world.scan_ids[path[0]]
        goal = world.viewpoint_ids[whole.waypoints[row, -1]]
        assert names == world.graph(scan).shortest_path(names[0], goal)
    assert found.trace.stopped.all()
    assert found.num_taught.sum() == found.num_active == sum(map(len, paths(found)))


def test_a_teacher_with_waypoints_passes_all_of_them():
    whole = episodes(PLACE.world, 6, path=True)
    with torch.no_grad():
        found = rollout(tiny_agent(), PLACE, whole, feedback="teacher", max_steps=40)
    for row, path in enumerate(paths(found)):
        places = iter(path)
        assert all(point in places or point == path[0] for point in whole.waypoints[row].tolist())
        assert path[-1] == whole.waypoints[row, -1]
    course = Course(PLACE, whole.waypoints)
    here = whole.start.copy()
    course.arrive(here)
    lengths = [
        PLACE.distances.between(np.array(path[:-1]), np.array(path[1:])).sum() if len(path) > 1 else 0.0
        for path in paths(found)
    ]
    np.testing.assert_allclose(course.remaining(here), lengths)


def test_actor_critic_terms_are_those_of_the_walk():
    """Against the terms of each row walked alone, joined by hand."""
    agent, whole = tiny_agent(), episodes(PLACE.world, 5)
    options = {"feedback": "sample", "max_steps": 4, "noise": NOISE, "reinforce": True}
    found = rollout(agent, PLACE, whole, **options)
    alone = [rollout(agent, PLACE, whole.rows([row]), **options) for row in range(5)]
    for name in ("loss", "policy", "value"):
        summed = sum(getattr(one.actor_critic, name) for one in alone)
        torch.testing.assert_close(getattr(found.actor_critic, name), summed, rtol=1e-4, atol=1e-5)
    assert found.reward == sum(one.reward for one in alone)
    # Rewards by hand: of how the graph distance to the goal changed, and of where a row stopped.
    expected = 0.0
    for row, path in enumerate(paths(found)):
        way = PLACE.distances.between(np.array(path), np.full(len(path), whole.waypoints[row, 0]))
        expected += float(np.sign(way[:-1] - way[1:]).sum())
        if found.trace.stopped[row]:
            expected += 2.0 if way[-1] < 3.0 else -2.0
    assert found.reward == expected
    found.actor_critic.loss.backward()
    assert agent.critic.layers[0].weight.grad.abs().sum() > 0


def test_an_unfinished_row_is_continued_by_the_critic():
    agent, whole = tiny_agent(), episodes(PLACE.world, 1)
    short = rollout(agent, PLACE, whole, feedback="teacher", max_steps=1, noise=NOISE, reinforce=True)
    assert not short.trace.stopped[0]
    seen, logits = [], []
    hooks = [
        agent.critic.register_forward_hook(lambda _m, _given, value: seen.append(value)),
        agent.decoder.register_forward_hook(lambda _m, _given, step: logits.append(step.logits)),
    ]
    again = rollout(agent, PLACE, whole, feedback="teacher", max_steps=1, noise=NOISE, reinforce=True)
    for hook in hooks:
        hook.remove()
    value, guess = (torch.stack([part]) for part in seen)
    reward = torch.tensor([[again.reward]])
    returns = discounted_returns(reward, guess[0])
    torch.testing.assert_close(returns, reward + 0.9 * guess)
    first = PanoramicSimulator(PLACE.world).place(whole.start, whole.heading)
    taken = int(np.flatnonzero(first.candidate[0] == again.trace.viewpoint[1, 0])[0])
    log_prob = logits[0].log_softmax(-1)[:, taken][None]
    expected = actor_critic_loss(
        log_prob, value, policy_entropy(logits[0])[None], returns, torch.ones(1, 1, dtype=torch.bool),
        normalize="none",
    )  # fmt: skip
    torch.testing.assert_close(again.actor_critic.loss, expected.loss)


def test_loops_can_be_avoided():
    agent, whole = tiny_agent(seed=2), episodes(PLACE.world, 8)
    with torch.no_grad():
        free, bound = (
            rollout(agent, PLACE, whole, feedback="argmax", max_steps=15, avoid_loops=avoid)
            for avoid in (False, True)
        )
    assert any(len(set(path)) < len(path) for path in paths(free))
    assert all(len(set(path)) == len(path) for path in paths(bound))


def test_predictions_pass_the_leaderboards_check_with_and_without_turns():
    world, whole = PLACE.world, episodes(PLACE.world, 6)
    with torch.no_grad():
        found = rollout(tiny_agent(), PLACE, whole, feedback="argmax", max_steps=9)
    items = [
        R2RItem(row, world.scan_ids[start], 0.0, (world.viewpoint_ids[start],), ("go",), None)
        for row, start in enumerate(whole.start)
    ]
    rows = {
        turns: predictions(found.trace, whole.names, world.viewpoint_ids, turns=turns) for turns in (0, 1)
    }
    for turns, given in rows.items():
        assert find_faults(Submission("r2r", given, []), items, world.graphs) == [], turns
    assert [row.item_id for row in rows[0]] == [f"{row}_0" for row in range(6)]
    for short, long in zip(rows[0], rows[1], strict=True):
        assert short.trajectory[-1] == long.trajectory[-1] and len(long.trajectory) >= len(short.trajectory)
        # Between two rows the agent either turns by one view, or stays in view and moves.
        steps = list(zip(long.trajectory, long.trajectory[1:], strict=False))
        assert all((a[0] == b[0]) != (a[1:] == b[1:]) for a, b in steps)
    assert turned(0, 35) == [12, 24, *range(25, 36)] and turned(24, 24) == []


def test_dropped_channels_are_the_same_for_views_and_candidates():
    whole, keep = episodes(PLACE.world, 4), environment_mask(3, 9, 6, 0.5)
    assert set(keep.tolist()) == {0.0, 2.0}
    assert (environment_mask(3, 9, 6, 0.5) == keep).all() and environment_mask(3, 9, 6, 0.0) is None
    now = PanoramicSimulator(PLACE.world, batch_size=4).place(whole.start, whole.heading)
    plain, dropped = (PLACE.look(now, np.arange(4), keep=mask) for mask in (None, keep))
    for name in ("panorama", "candidates"):
        ours, theirs = getattr(dropped, name), getattr(plain, name)
        assert torch.equal(ours[..., :6], theirs[..., :6] * torch.from_numpy(keep))
        assert torch.equal(ours[..., 6:], theirs[..., 6:])
    agent = tiny_agent(hidden_dropout=0.0, attention_dropout=0.0).train()
    for module in agent.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    agent.decoder.feature_dropout.dropout.p = 0.9  # off under a mask of the environment
    losses = [
        rollout(
            agent, PLACE, whole, feedback="teacher", max_steps=5, imitate=True, keep=keep, cache_text=True
        )
        for _ in range(2)
    ]
    assert torch.equal(losses[0].imitation, losses[1].imitation)


def test_the_clock_tells_the_parts_of_a_rollout():
    clock = Clock()
    assert clock.share("simulator") == 0
    with torch.no_grad():
        rollout(tiny_agent(), PLACE, episodes(PLACE.world), feedback="argmax", max_steps=5, clock=clock)
    assert set(clock.seconds) == {"simulator", "features", "model"}
    assert 0 < clock.share("simulator", "features") < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedback": "guess"}, "feedback is 'guess', expected one of teacher, argmax, sample, mixed"),
        ({"feedback": "sample", "noise": None}, r"give noise=Noise\(seed, step\)"),
        ({"feedback": "teacher", "goals": False}, "need goals, which these items lack"),
        ({"feedback": "argmax", "kind": NDHFollower, "reinforce": True}, "NDHFollower has no critic"),
    ],
)
def test_what_cannot_be_walked_is_refused(change, message):
    whole = episodes(PLACE.world, 2)
    if not change.pop("goals", True):
        whole = whole._replace(waypoints=None)
    agent = tiny_agent(change.pop("kind", Follower))
    with pytest.raises(ValueError, match=message):
        rollout(agent, PLACE, whole, **({"max_steps": 3, "noise": NOISE} | change))


def test_goals_are_not_needed_to_walk():
    whole = episodes(PLACE.world, 3)
    with torch.no_grad():
        blind, told = (
            rollout(tiny_agent(), PLACE, given, feedback="argmax", max_steps=5)
            for given in (whole._replace(waypoints=None), whole)
        )
    assert paths(blind) == paths(told)
    assert (order_of(tiny_agent()), order_of(tiny_agent(NDHFollower))) == ("envdrop", "follower")
    assert padded([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, 4, 4]]
    assert isinstance(PLACE, Surroundings)
