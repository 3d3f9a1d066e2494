"""The R2R agent's networks, and snapshots of them."""

import dataclasses

import pytest
import torch
from tiny_vln import parity_line, tiny_batch, tiny_model

from vln.follower import Context, Follower, FollowerConfig
from vln.model import Prevalent
from vln.recurrent import FeatureDropout, SoftDot, length_mask, reverse_in_time, run_packed, run_states
from vln.snapshots import (
    FollowerSnapshot,
    follower_from_released,
    follower_to_released,
    read_snapshot,
    write_snapshot,
)

CONFIG = FollowerConfig(encoder_hidden=5, decoder_hidden=7, action_embedding=3)


def tiny_follower(seed=0, config=CONFIG):
    trunk = tiny_model(Prevalent, seed=seed)
    torch.manual_seed(seed)
    return Follower(trunk, config).eval()


def inputs(rows=3):
    ids, lengths, panorama = tiny_batch(rows)
    draw = torch.Generator().manual_seed(7)
    candidates, angle = torch.randn(rows, 4, 10, generator=draw), torch.randn(rows, 4, generator=draw)
    return ids, lengths, panorama, candidates, angle


@torch.no_grad()
def walk(agent, ids, lengths, panorama, candidates, angle, **options):
    """Scores of two steps, and the critic's values."""
    text, found = agent.encoder.encode_text(ids, lengths), []
    tilde = cell = None
    for step in range(2):
        context = agent.encoder(text, lengths, panorama + step)
        if step == 0:
            tilde, cell = context.hidden, context.cell
        logits, hidden, tilde, cell = agent.decoder(
            angle, panorama + step, candidates, tilde, cell, context, **options
        )
        found.append(torch.cat([logits, agent.critic(hidden)[:, None]], dim=1))
    return torch.stack(found)


def test_the_original_is_reproduced(capsys):
    line = parity_line(capsys, "agent_tiny.npz")
    assert line.startswith("pass  vln/agent_tiny.npz  vln  16 of 16 arrays"), line


def test_a_batch_is_its_rows():
    agent, given = tiny_follower(), inputs()
    together = walk(agent, *given)
    for row, length in enumerate(given[1]):
        one = [part[row : row + 1] for part in given]
        one[0] = one[0][:, :length]
        torch.testing.assert_close(walk(agent, *one)[:, 0], together[:, row], rtol=0, atol=2e-6)


def test_three_equal_instructions_are_as_one_and_others_are_averaged():
    agent = tiny_follower()
    ids, lengths, *rest = inputs()
    once = walk(agent, ids, lengths, *rest)
    thrice = walk(agent, ids[:, None].repeat(1, 3, 1), lengths[:, None].repeat(1, 3), *rest)
    torch.testing.assert_close(thrice, once, rtol=0, atol=2e-6)
    others = torch.stack([ids, ids.flip(0), ids], dim=1)
    both = torch.stack([lengths, lengths.flip(0), lengths], dim=1)
    text = agent.encoder.encode_text(others, both)
    context = agent.encoder(text, both, rest[0])
    each = [agent.encoder(text[:, n : n + 1], both[:, n], rest[0]) for n in range(3)]
    torch.testing.assert_close(context.hidden, torch.stack([part.hidden for part in each]).mean(0))
    torch.testing.assert_close(context.cell, torch.stack([part.cell for part in each]).mean(0))
    tildes = [
        agent.decoder(rest[2], rest[0], rest[1], context.hidden, context.cell, part).tilde for part in each
    ]
    found = agent.decoder(rest[2], rest[0], rest[1], context.hidden, context.cell, context).tilde
    torch.testing.assert_close(found, torch.stack(tildes).mean(0))


def test_candidates_behind_the_list_have_no_chance():
    agent, given = tiny_follower(), inputs()
    limited = walk(agent, *given, num_candidates=torch.tensor([4, 2, 1]))
    assert limited[0, :, :4].isfinite().sum(1).tolist() == [4, 2, 1]
    kept = limited.isfinite()
    torch.testing.assert_close(limited[kept], walk(agent, *given)[kept])


def test_words_after_the_end_are_not_looked_at():
    agent = tiny_follower()
    ids, lengths, panorama, candidates, angle = inputs()
    context = agent.encoder(agent.encoder.encode_text(ids, lengths), lengths, panorama)
    assert context.mask[:, 0].sum(1).tolist() == lengths.tolist()
    spoilt = Context(context.words + 100 * ~context.mask[..., None], *context[1:])
    both = [
        agent.decoder(angle, panorama, candidates, context.hidden, context.cell, read)
        for read in (context, spoilt)
    ]
    assert torch.equal(both[0].logits, both[1].logits)


def test_a_frozen_trunk_gets_no_gradient_and_a_trained_one_does():
    for train_cross in (True, False):
        trunk = tiny_model(Prevalent, train_cross=train_cross)
        agent = Follower(trunk, CONFIG)
        ids, lengths, panorama, candidates, angle = inputs()
        context = agent.encoder(agent.encoder.encode_text(ids, lengths), lengths, panorama)
        step = agent.decoder(angle, panorama, candidates, context.hidden, context.cell, context)
        (step.logits.sum() + agent.critic(step.hidden).sum()).backward()
        reached = [p.grad is not None for p in trunk.parameters() if p.requires_grad]
        assert all(reached) if train_cross else not any(reached)
        others = [p for n, p in agent.named_parameters() if "trunk" not in n]
        assert all(p.grad is not None for p in others)


# ---- pieces


def test_feature_dropout_leaves_orientation_and_its_input_alone():
    views = torch.ones(50, 10)
    dropped = FeatureDropout(0.5, 4)(views)
    assert (views == 1).all() and (dropped[:, 6:] == 1).all()
    assert set(dropped[:, :6].unique().tolist()) == {0.0, 2.0}
    assert FeatureDropout(0.5, 4).eval()(views) is views


def test_soft_dot_is_a_weighted_mean_of_what_may_be_seen():
    torch.manual_seed(0)
    layer, query, keys = SoftDot(3, 4, output=False), torch.randn(2, 3), torch.randn(2, 5, 4)
    mask = length_mask(torch.tensor([5, 2]), 5)
    weights = torch.softmax((keys[1, :2] @ layer.linear_in(query)[1]), dim=0)
    torch.testing.assert_close(layer(query, keys, mask)[1], weights @ keys[1, :2])


def test_states_without_ends_are_those_of_the_packed_run_and_learn_the_same():
    torch.manual_seed(0)
    lstm, states = torch.nn.LSTM(3, 4, batch_first=True, bidirectional=True), torch.randn(3, 6, 3)
    lengths, found = torch.tensor([6, 1, 4]), []
    for run in (lambda *given: run_packed(*given).states, run_states):
        given = states.clone().requires_grad_()
        lstm.zero_grad()
        out = run(lstm, given, lengths)
        out.square().sum().backward()
        found.append([out.detach(), given.grad, *(part.grad.clone() for part in lstm.parameters())])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
    assert not found[1][0][1, 1:].any() and not found[1][1][1, 1:].any()


def test_a_later_step_reads_the_same_words_without_the_ends():
    agent, (ids, lengths, panorama, *_) = tiny_follower(), inputs()
    text = agent.encoder.encode_text(ids, lengths)
    first, later = (agent.encoder(text, lengths, panorama, first=first) for first in (True, False))
    torch.testing.assert_close(later.words, first.words, rtol=1e-5, atol=1e-6)
    assert later.hidden is None and later.cell is None and first.hidden.shape == (3, 7)


def test_reversing_twice_is_nothing_and_packed_rows_are_their_own():
    torch.manual_seed(0)
    states, lengths = torch.randn(3, 6, 4), torch.tensor([6, 1, 4])
    assert torch.equal(reverse_in_time(reverse_in_time(states, lengths), lengths), states)
    lstm = torch.nn.LSTM(4, 3, batch_first=True, bidirectional=True)
    packed = run_packed(lstm, states, lengths)
    alone, (hidden, _) = lstm(states[2:, :4])
    torch.testing.assert_close(packed.states[2, :4], alone[0])
    torch.testing.assert_close(packed.hidden[:, 2], hidden[:, 0])
    assert (packed.states[2, 4:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_hidden": 0}, "decoder_hidden is 0 but must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0: give a share"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


# ---- snapshots


def released(several=1, seed=0):
    """An agent's weights as the released files hold them, unused ones included."""
    agent = tiny_follower(seed)
    unused = {
        "encoder": {
            f"{name}_{part}.{kind}": torch.randn(7, 10) if kind == "weight" else torch.randn(7)
            for name in (["encoder2decoder"] if several == 1 else ["encoder_lstm2decoder"])
            for part in ("ht", "ct")
            for kind in ("weight", "bias")
        },
        "decoder": {
            "feat_att_layer.linear_out.weight": torch.randn(7, 17),
            "candidate_att_layer.linear_out.weight": torch.randn(7, 17),
        },
    }
    return agent, follower_to_released(FollowerSnapshot(agent, several, unused))


@pytest.mark.parametrize("several", [1, 3])
def test_a_snapshot_round_trips_to_the_bit(tmp_path, several):
    agent, parts = released(several)
    write_snapshot(parts, tmp_path / "best", epoch=7)
    read = read_snapshot(tmp_path / "best")
    snapshot = follower_from_released(read, num_attention_heads=2, num_instructions=several)
    again = follower_to_released(snapshot)
    for name, state in parts.items():
        assert again[name].keys() == state.keys()
        assert all(torch.equal(again[name][key], state[key]) for key in state)
    assert snapshot.follower.encoder.trunk.config.orientation == "interleaved"
    assert torch.equal(walk(snapshot.follower, *inputs()), walk(agent, *inputs()))


def test_a_snapshot_that_does_not_fit_is_refused(tmp_path):
    _, parts = released()
    with pytest.raises(ValueError, match="the snapshot has no critic but decoder, encoder"):
        follower_from_released({name: parts[name] for name in ("encoder", "decoder")})
    odd = parts | {"decoder": parts["decoder"] | {"surprise": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"the decoder of the agent's snapshot .* \(unknown: surprise\)"):
        follower_from_released(odd, num_attention_heads=2)
    with pytest.raises(ValueError, match="num_instructions is 2: the released agents read 1 or 3"):
        follower_from_released(parts, num_instructions=2)
    with pytest.raises(ValueError, match=r"the snapshot lacks embedding\.0\.weight"):
        follower_from_released(parts | {"decoder": {}})
    torch.save({"encoder": 1}, tmp_path / "odd")
    with pytest.raises(ValueError, match="is no snapshot: a dict of networks with their state_dict"):
        read_snapshot(tmp_path / "odd")


def test_weights_of_a_wrapped_network_are_read():
    _, parts = released()
    wrapped = {
        name: {f"module.{key}": value for key, value in state.items()} for name, state in parts.items()
    }
    snapshot = follower_from_released(wrapped, num_attention_heads=2)
    assert torch.equal(
        follower_to_released(snapshot)["decoder"]["lstm.bias_hh"], parts["decoder"]["lstm.bias_hh"]
    )
