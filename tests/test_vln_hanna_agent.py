"""The HANNA agent: requests, routes, what it learns from, and the same in any batch."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import grid, tiny_model

from fq.run import read_metrics
from vln import evaluate, train, train_hanna
from vln.agent_hanna import (
    HannaNoise,
    Helpers,
    episodes_of_tasks,
    rollout_hanna,
    route_split,
    submission_rows,
)
from vln.hanna import Assistant
from vln.hanna_model import (
    HannaAgent,
    HannaAgentConfig,
    HannaMemory,
    HannaWords,
    bins,
    sinusoids,
    view_similarity,
)
from vln.houses import HousesConfig, generate, write
from vln.items import HannaRoute, HannaTask
from vln.metrics import score_hanna
from vln.model import Prevalent
from vln.pretrain_data import RandomFeatures
from vln.surroundings import Surroundings
from vln.world import World

WORLD = World([grid("a")])
NAMES = WORLD.viewpoint_ids

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


class Tokenizer:
    """Words by their lengths: enough to tell texts apart."""

    pad_token_id = 0

    def __call__(self, texts, truncation, max_length):
        return {"input_ids": [[2, *(5 + len(word) for word in text.split())][:max_length] for text in texts]}


def helpers():
    place = Surroundings(WORLD, RandomFeatures(WORLD, 6), angle_size=4, orientation="blocks")
    path = (NAMES[0], NAMES[1], NAMES[2])
    routes = [
        HannaRoute("r", "a", path, "to the red door", 3, "train"),
        HannaRoute("s", "a", (NAMES[7], NAMES[8], NAMES[9]), "along it", 9, "train"),
    ]
    return Helpers(place, Assistant(routes, WORLD.graphs), Tokenizer(), 8, "train")


def tasks(starts=(0, 7, 12, 19)):
    return [
        HannaTask(number, "a", 0.4 * number, ((NAMES[start], NAMES[4]),), ("find the sofa",))
        for number, start in enumerate(starts)
    ]


def tiny_agent(seed=0, ask=0.0):
    agent = HannaAgent(tiny_model(Prevalent, seed=seed), HannaAgentConfig(hidden_size=16, num_heads=2))
    with torch.no_grad():
        agent.score.weight.mul_(20)
        agent.request.bias[1] += ask
    return agent.eval()


@pytest.mark.parametrize("noise", [None, HannaNoise(1, 3)])
def test_a_batch_does_as_its_rows_do_alone(noise):
    agent, episodes = tiny_agent(ask=0.3), episodes_of_tasks(tasks())
    options = {"max_steps": 8, "noise": noise, "learn": True}
    with torch.no_grad():
        together = rollout_hanna(agent, helpers(), episodes, **options)
        alone = [rollout_hanna(agent, helpers(), [episode], **options) for episode in episodes]
    assert together.results == [one.results[0] for one in alone]
    for name in ("nav", "ask", "num_nav", "num_ask"):
        summed = sum(getattr(one, name) for one in alone)
        torch.testing.assert_close(getattr(together, name), summed, rtol=1e-3, atol=1e-4)
    told = zip(together.predictions, together.results, strict=True)
    results = {str(row.item_id): result for row, result in told}
    scores = score_hanna(results, tasks(), WORLD.graphs)
    assert np.isfinite(scores.error).all()


def test_who_asks_is_led_onto_a_route_and_let_off_at_its_best_point():
    agent, episodes = tiny_agent(ask=1e4), episodes_of_tasks(tasks((0,)))
    with torch.no_grad():
        found = rollout_hanna(agent, helpers(), episodes, max_steps=3)
    result = found.results[0]
    # The route begins where the agent stands; there it may ask again and again.
    assert result.asked == (1, 1, 1) and result.moved == (-1, -1, -1)
    assert result.viewpoints == (NAMES[0],) * 4
    # Of the route's viewpoints the third is nearest to the goal, the first target.
    assert result.targets == ((NAMES[4],), (NAMES[2],), (NAMES[2],), (NAMES[2],))
    assert found.predictions[0].trajectory[1].heading == pytest.approx(3 * np.pi / 6)
    with torch.no_grad():
        never = rollout_hanna(agent, helpers(), episodes_of_tasks(tasks((19,))), max_steps=1)
    assert never.results[0].asked == (0,)  # no route begins near


def test_a_stop_on_a_route_leaves_it_and_one_off_routes_ends():
    agent = tiny_agent()
    with torch.no_grad():
        agent.score.weight.zero_()  # all alike: the first candidate, STOP, is taken
        agent.reasons.weight.zero_()
        agent.reasons.bias.zero_()
        agent.request.weight.zero_()
        agent.request.bias.copy_(torch.tensor([0.0, 1.0]))
    whole, asked = helpers(), []
    choose = agent.forward

    def once(views, action, similarity, *rest):
        output = choose(views, action, similarity, *rest)
        asked.append(similarity.abs().sum() > 0)
        silent = torch.tensor([[1.0, 0.0]])
        return output if len(asked) == 1 else output._replace(ask_logits=silent.expand_as(output.ask_logits))

    agent.forward = once
    with torch.no_grad():
        found = rollout_hanna(agent, whole, episodes_of_tasks(tasks((0,))), max_steps=9)
    result = found.results[0]
    assert result.asked == (1, 0, 0) and result.moved == (-1, 0, 0)
    assert result.targets == ((NAMES[4],), (NAMES[2],), (NAMES[4],), (NAMES[4],))
    assert [bool(seen) for seen in asked] == [False, True, False]  # goal views are seen on routes alone
    rows = submission_rows(found.predictions, found.results)
    assert rows[0]["agent_ask"] == [1, 0, 0] and len(rows[0]["agent_pose"]) == 4


def test_an_agent_learns_to_walk_and_to_ask():
    torch.manual_seed(0)
    agent, episodes = tiny_agent(), episodes_of_tasks(tasks())
    agent.train()
    for module in agent.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimiser = torch.optim.Adam(agent.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        found = rollout_hanna(agent, helpers(), episodes, max_steps=6, noise=HannaNoise(0, step), learn=True)
        nav, ask = (
            sums.sum() / count.sum().clamp(min=1)
            for sums, count in ((found.nav, found.num_nav), (found.ask, found.num_ask))
        )
        losses.append((nav.item(), ask.item()))
        optimiser.zero_grad()
        (nav + ask).backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 5.0)
        optimiser.step()
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert (last < 0.8 * first).all(), (first, last)


def test_memories_of_a_sub_task_are_forgotten_and_those_of_the_episode_kept():
    memory = HannaMemory(*torch.ones(4, 2, 3))
    begun = memory.begin(torch.tensor([True, False]))
    assert begun.tilde.sum(1).tolist() == begun.task_cell.sum(1).tolist() == [0, 3]
    assert begun.state.sum() == begun.state_cell.sum() == 6


def test_pieces_of_the_model():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert bins(logits)[0, :4].tolist() == [0.5, 0.5, 0, 0] and bins(logits).shape == (1, 37)
    with pytest.raises(ValueError, match="there are 38 candidates, more than the 37 bins"):
        bins(torch.zeros(1, 38))
    views = torch.randn(2, 36, 5)
    torch.testing.assert_close(view_similarity(views, 3 * views), torch.ones(2, 37))
    assert not view_similarity(views, torch.zeros_like(views)).any()
    assert sinusoids(5, 7).shape == (5, 7)
    words = HannaWords(tiny_model(Prevalent), HannaAgentConfig(hidden_size=16, num_heads=2)).eval()
    ids, lengths = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([3, 2])
    torch.testing.assert_close(words(ids, lengths)[1, :2], words(ids[1:, :2], lengths[1:])[0])
    with pytest.raises(ValueError, match="hidden_size is 20 but must be a multiple of num_heads, 8"):
        HannaAgentConfig(hidden_size=20)
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        HannaAgentConfig(dropout=1.0)


def test_routes_of_a_split_are_found_by_its_name():
    routes = [HannaRoute(1, "a", ("x",), "", 0, split) for split in ("train_seen", "val")]
    assert route_split("val_seen_env", routes) == "val" and route_split("val", routes) == "val"
    with pytest.raises(ValueError, match="no route is of split test: there are train_seen, val"):
        route_split("test", routes)


# ---- the command


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    world = generate(HousesConfig(num_seen=2, num_unseen=1, train_groups=4, val_groups=1))
    return write(world, tmp_path_factory.mktemp("houses") / "houses")


SMALL = (
    "--hidden-size 16 --num-attention-heads 2 --intermediate-size 24 --num-text-layers 1 --num-cross-layers 1"
    " --angle-size 4 --encoder-hidden 8 --decoder-hidden 16 --batch-size 4 --max-steps 5 --eval-max-steps 5"
    " --steps 2 --log-every 1 --maps 1"
).split()


@pytest.mark.parametrize("task", ["hanna", "ndh"])
def test_the_command_trains_and_scores_other_tasks(houses, tmp_path, monkeypatch, capsys, task):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    out, unseen = tmp_path / "run", {"hanna": "val_unseen_all", "ndh": "val_unseen"}[task]
    train.main(["houses", "--task", task, "--data", str(houses), "--out", str(out), *SMALL])
    records = read_metrics(out)
    losses = {"hanna": {"nav_loss", "ask_loss", "requests"}, "ndh": {"imitation_loss"}}[task]
    assert losses <= set(records[0])
    assert any(f"{unseen}/{'spl' if task == 'hanna' else 'goal_progress'}" in record for record in records)
    assert list((out / "samples" / "maps").glob("*.png"))
    stated = json.loads((out / "samples" / "best_scores.json").read_text())["scores"][unseen]
    scores = tmp_path / "scores.json"
    # It walks as far as in the run.
    evaluate.main([str(out), "--data", str(houses), "--split", unseen, "--out", str(scores)])
    again = json.loads(scores.read_text())["scores"]["hanna" if task == "hanna" else "trusted_path"]
    assert again == pytest.approx(stated)
    assert f"{task} {unseen}" in capsys.readouterr().out
    if task == "hanna":
        with pytest.raises(
            SystemExit, match="an agent for hanna: --avoid-loops and --turns are for R2R and NDH"
        ):
            evaluate.main([str(out), "--data", str(houses), "--split", unseen, "--turns"])


def test_tasks_are_evaluated_whole():
    def task(number):
        return HannaTask(number, "a", 0.0, (("x",),), ("find it", "look for it"))

    episodes = episodes_of_tasks([task(number) for number in (7, 3, 5, 1)])
    assert (
        train_hanna._evenly(episodes, 0).tolist() == train_hanna._evenly(episodes, 8).tolist() == [*range(8)]
    )
    assert train_hanna._evenly(episodes, 4).tolist() == [0, 1, 4, 5]
    assert train_hanna._evenly(episodes, 1).tolist() == [0, 1]
