"""HANNA's assistant and teachers on a grid, where all ways are known."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tiny_vln import grid, parity_line

from vln.hanna import (
    Assistant,
    HannaStep,
    ask_teacher,
    curiosity_loss,
    nearest_target,
    negative_actions,
    normalised_entropy,
    shortest_action,
)
from vln.navgraph import NavGraph

GRAPH = grid()  # 5 x 4 viewpoints, 3 m apart


def test_the_original_is_reproduced(capsys):
    line = parity_line(capsys, "hanna_synthetic.json.gz")
    assert line.startswith("pass  vln/hanna_synthetic.json.gz  vln  30 of 30 arrays"), line


def name(number):
    return f"house-{number}"


def route(label, *numbers, split="val"):
    return SimpleNamespace(
        path_id=label, scan_id="house", path=[name(number) for number in numbers], instruction=f"go {label}",
        view_id=3, split=split,
    )  # fmt: skip


def test_routes_begin_here_or_at_a_near_neighbour():
    assistant = Assistant([route("far", 1, 2), route("own", 0, 5)], {"house": GRAPH})
    assert [found.path_id for found in assistant.routes_at("house", name(0))] == ["own"]
    assert not assistant.can_answer("house", name(6))
    wider = Assistant([route("far", 1, 2), route("own", 0, 5)], {"house": GRAPH}, start_radius=3.0)
    assert [found.path_id for found in wider.routes_at("house", name(0))] == ["own", "far"]
    assert wider.answer("house", name(12), [name(4)], split="val") is None


def test_the_answer_departs_where_a_goal_is_nearest():
    routes = [route("up", 0, 5, 10), route("right", 0, 1, 2), route("seen", 0, 1, 2, split="train")]
    assistant = Assistant(routes, {"house": GRAPH})
    found = assistant.answer("house", name(0), [name(15), name(3)], split="val")
    # Both leave 3 m to a goal: the first of them is said, or one is drawn.
    assert (found.route.path_id, found.depart_node, found.goal_node) == ("up", name(10), name(15))
    drawn = assistant.answer("house", name(0), [name(15), name(3)], split="val", draw=lambda count: count - 1)
    assert (drawn.route.path_id, drawn.depart_node, drawn.goal_node) == ("right", name(2), name(3))
    assert found.start_node == name(0)
    # Where the nearest route is of another split, there is no answer.
    other = Assistant([route("up", 0, 5), route("near", 0, 1, 2, split="train")], {"house": GRAPH})
    assert other.can_answer("house", name(0))
    assert other.answer("house", name(0), [name(3)], split="val") is None


def test_there_is_no_answer_without_a_goal_that_can_be_reached(recwarn):
    cut = dataclasses.replace(GRAPH, edges=GRAPH.edges[(GRAPH.edges != 19).all(1)])
    assistant = Assistant([route("up", 0, 5)], {"house": cut})
    assert assistant.answer("house", name(0), [], split="val") is None
    assert assistant.answer("house", name(0), [name(19)], split="val") is None
    assert assistant.answer("house", name(0), [name(19), name(10)], split="val").goal_node == name(10)
    assert not recwarn.list


def test_the_shortest_action_leads_to_the_nearest_target():
    candidates = [name(number) for number in (6, 1, 5, 7, 11)]
    assert nearest_target(GRAPH, name(6), [name(19), name(8)]) == (name(8), 6.0)
    assert shortest_action(GRAPH, name(6), [name(19), name(8)], candidates) == 3
    assert shortest_action(GRAPH, name(6), [name(6)], candidates) == 0
    with pytest.raises(ValueError, match="no candidate of viewpoint house-6 leads to any of"):
        shortest_action(GRAPH, name(6), [name(8)], candidates[:3])
    with pytest.raises(ValueError, match="there is no target"):
        nearest_target(GRAPH, name(6), [])


def step(number, **changes):
    given = {
        "viewpoint_id": name(number), "targets": (name(4),), "subgoal": "none", "ended": False,
        "nav_entropy": 0.1, "nav_best": 1, "nav_target": 1, "nav_action": 1, "asked": False,
    }  # fmt: skip
    return HannaStep(**(given | changes))


def targets(steps, *, last=None, legal=lambda _: True):
    return [told.target for told in ask_teacher(steps, GRAPH, legal, last=last)]


def test_lost_is_after_the_nearest_point_of_a_segment():
    way = [step(2), step(3), step(2), step(1)]
    assert targets(way) == [0, 0, 1, 1]
    assert targets(way, last=step(4)) == [0, 0, 0, 0]  # arrived in the end
    closed = [step(2), step(3), step(2, asked=True, nav_action=0), step(1), step(0)]
    assert targets(closed) == [0, 0, 1, 0, 1]


def test_uncertain_counts_only_when_wrong_and_nobody_asks_twice_in_one_place():
    way = [
        step(1, nav_entropy=0.3),
        step(2, nav_entropy=0.3, nav_best=2, asked=True, nav_action=0),
        step(2, nav_entropy=0.3, nav_best=2),
        step(3, nav_entropy=0.2, nav_best=2),
    ]
    told = ask_teacher(way, GRAPH, lambda _: True)
    assert [answer.target for answer in told] == [0, 1, 0, 0]
    assert told[2].names == ("uncertain_wrong", "already_asked") and told[3].names == ("pass",)


def test_where_asking_is_impossible_or_all_is_over_nothing_counts():
    told = ask_teacher([step(1), step(2, ended=True)], GRAPH, lambda viewpoint: viewpoint != name(2))
    assert [answer.target for answer in told] == [0, -1]
    assert told[1].names == ("ended", "no_route")


def test_negatives_are_past_mistakes_under_the_same_instruction():
    way = [
        step(1, nav_action=2), step(1, nav_action=3), step(1), step(1, subgoal="route"),
        step(1, nav_target=-1, nav_action=0), step(1), step(1, ended=True),
    ]  # fmt: skip
    assert negative_actions(way) == [[], [2], [2, 3], [], [], [2, 3], []]


def test_entropy_is_a_share_of_the_largest():
    shares = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(normalised_entropy(shares), torch.tensor([1.0, 0.0, 0.5]))


def test_curiosity_pushes_from_mistakes():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    negatives = torch.tensor([[False, True, True, False], [True, False, False, False]])
    loss = curiosity_loss(logits, torch.tensor([0, -1]), negatives, weight=0.5)
    log_probs = logits[0].detach().log_softmax(-1)
    torch.testing.assert_close(loss.detach(), -log_probs[0] + 0.5 * (log_probs[1] + log_probs[2]) / 2)
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()
    nothing = curiosity_loss(logits, torch.tensor([-1, -1]), negatives)
    assert float(nothing.detach()) == 0


def test_a_viewpoint_of_no_house_is_refused():
    assert isinstance(GRAPH, NavGraph)
    with pytest.raises(ValueError, match="has no viewpoint nowhere"):
        Assistant([], {"house": GRAPH}).routes_at("house", "nowhere")
