"""The panoramic action space: equal to a sweep of the simulator through all views, in both orders."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from navigation_cases import RIGHT, UP, graph_of, graphs, house

from vln.candidates import Panorama, PanoramicSimulator
from vln.geometry import VIEW_ELEVATIONS, VIEW_HEADINGS, Camera
from vln.simulator import Simulator
from vln.world import World

ARRAYS = tuple(name for name in Panorama._fields if name != "step")


def sweep(simulator, viewpoint, start=0):
    """Neighbours with their best views, in the order of first sight, as the original agents find them.

    Returns:
        ``{neighbour: (view, place in its list, absolute heading, elevation, deviation)}``.
    """
    found = {}
    for relative in range(36):
        row, turn = divmod(relative, 12)
        view = 12 * row + (start + turn) % 12
        state = simulator.place([viewpoint], [VIEW_HEADINGS[view]], [VIEW_ELEVATIONS[view]])
        for place in range(1, int(state.num_navigable[0])):
            heading, elevation = state.rel_heading[0, place].astype(float), state.rel_elevation[0, place]
            deviation = math.sqrt(heading**2 + elevation**2)
            neighbour = int(state.neighbour[0, place])
            if neighbour not in found or deviation < found[neighbour][4]:
                absolute = VIEW_HEADINGS[view] + heading, VIEW_ELEVATIONS[view] + elevation
                found[neighbour] = (view, place, *absolute, deviation)
    return found


def wrapped(angle):
    return (angle + math.pi) % (2 * math.pi) - math.pi


def frozen(state):
    return state._replace(**{name: getattr(state, name).copy() for name in ARRAYS})


def assert_same(a, b):
    assert a.step == b.step
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


@settings(deadline=None, max_examples=40)
@given(graphs(), st.sampled_from([Camera(), Camera(restricted=False), Camera(width=100, height=480)]))
def test_candidates_are_those_of_a_sweep_in_its_order(graph, camera):
    world = World([graph])
    simulator, table = Simulator(world, camera=camera), world.candidates(camera)
    for viewpoint in np.flatnonzero(graph.included):
        expected = sweep(simulator, viewpoint)
        count = table.num_candidates[viewpoint]
        assert table.viewpoint[viewpoint, :count].tolist() == list(expected)
        assert (table.viewpoint[viewpoint, count:] == -1).all()
        for place, (view, slot, heading, elevation, deviation) in enumerate(expected.values()):
            assert (table.point_id[viewpoint, place], table.slot[viewpoint, place]) == (view, slot)
            ours = [table[field][viewpoint, place] for field in (4, 5, 6)]
            assert ours == pytest.approx([heading, elevation, deviation], abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(graphs(), st.integers(0, 11))
def test_the_follower_order_is_that_of_a_sweep_from_the_own_heading(graph, k):
    world = World([graph])
    simulator, agent = Simulator(world), PanoramicSimulator(world, order="follower")
    for viewpoint in np.flatnonzero(graph.included):
        expected = sweep(simulator, viewpoint, start=k)
        now = agent.place([viewpoint], [k * RIGHT])
        count = int(now.num_choices[0])
        assert now.stop[0] == 0 and now.candidate[0, 0] == viewpoint and now.point_id[0, 0] == -1
        listed = now.candidate[0, 1:count].tolist()
        assert sorted(listed) == sorted(expected)
        turned = [abs(wrapped(expected[neighbour][2] - k * RIGHT)) for neighbour in listed]
        assert turned == pytest.approx(sorted(turned), abs=1e-6)
        sight = list(expected)
        for place, neighbour in enumerate(listed, 1):
            view, slot, heading, elevation, _ = expected[neighbour]
            assert (now.point_id[0, place], now.slot[0, place]) == (view, slot)
            difference = wrapped(now.rel_heading[0, place] - (heading - k * RIGHT))
            assert difference == pytest.approx(0, abs=1e-6)
            assert now.rel_elevation[0, place] == pytest.approx(elevation, abs=1e-6)
            if (
                place > 1 and turned[place - 1] == turned[place - 2] == 0
            ):  # a tie keeps the order of first sight
                assert sight.index(listed[place - 2]) < sight.index(neighbour)


@pytest.mark.parametrize("order", ["envdrop", "follower"])
def test_choosing_is_turning_and_walking_in_the_simulator(order):
    world = World([house("a"), house("b")])
    agent, simulator = PanoramicSimulator(world, batch_size=2, order=order), Simulator(world, batch_size=2)
    rng = np.random.default_rng(0)
    now = agent.new_episodes(["a", "b"], ["a-2", "b-4"], [0.2, 3.0], [0.0, UP])
    assert now.view.tolist() == [12, 30]
    for step in range(40):
        choice = (rng.random(2) * now.num_choices).astype(int)
        stays = choice == now.stop
        here, faced = now.viewpoint, now.point_id[[0, 1], choice]
        view = np.where(stays, now.view, faced)
        simulator.place(here, VIEW_HEADINGS[view], VIEW_ELEVATIONS[view])
        expected = simulator.step(now.slot[[0, 1], choice], [0, 0], [0, 0])
        now = agent.choose(choice)
        assert now.step == step + 1
        assert now.viewpoint.tolist() == expected.viewpoint.tolist()
        assert now.view.tolist() == expected.view.tolist()
        assert now.heading.tolist() == expected.heading.tolist()
        assert now.elevation.tolist() == expected.elevation.tolist()


def test_orders_and_padding_of_a_crossing():
    graph = graph_of([(0, 0, 0), (-2, 0, 0), (0, -3, 0), (2, 0, 0), (9, 9, 0)], [(0, 1), (0, 2), (0, 3)])
    world = World([graph])
    first = PanoramicSimulator(world, batch_size=2).place([0, 4], [0.0, 0.0])
    assert first.candidate.tolist() == [[3, 2, 1, 0], [4, -1, -1, -1]]
    assert first.point_id.tolist() == [[15, 18, 21, -1], [-1] * 4]
    assert first.stop.tolist() == [3, 0] and first.num_choices.tolist() == [4, 1]
    assert first.rel_heading[0] == pytest.approx([math.pi / 2, math.pi, 3 * math.pi / 2, 0], abs=1e-6)
    assert first.distance[0] == pytest.approx(0, abs=1e-6)
    second = PanoramicSimulator(world, batch_size=2, order="follower").place([0, 4], [math.pi, 0.0])
    assert second.candidate[0].tolist() in ([0, 2, 1, 3], [0, 2, 3, 1])
    assert second.candidate[1].tolist() == [4, -1, -1, -1] and second.stop.tolist() == [0, 0]
    assert np.abs(second.rel_heading[0]) == pytest.approx([0, 0, math.pi / 2, math.pi / 2], abs=1e-6)


def test_a_camera_too_narrow_for_a_neighbour_has_it_for_no_candidate():
    graph = graph_of([(0, 0, 0), (math.sin(0.26), math.cos(0.26), 0), (0, 2, 0)], [(0, 1), (0, 2)])
    agent = PanoramicSimulator(World([graph]), camera=Camera(width=100, height=400))  # 15 degrees wide
    now = agent.place([0], [0.0])
    assert now.candidate[0, : now.num_choices[0]].tolist() == [2, 0]


@pytest.mark.parametrize("order", ["envdrop", "follower"])
def test_a_panorama_is_a_snapshot(order):
    agent = PanoramicSimulator(World([house()]), batch_size=2, order=order)
    twin = PanoramicSimulator(agent.world, batch_size=2, order=order)
    first, expected = agent.place([0, 2], [0.0, 1.0]), frozen(twin.place([0, 2], [0.0, 1.0]))
    second = agent.choose([1, 0])
    assert_same(first, expected)
    after = frozen(twin.choose([1, 0]))
    for name in ARRAYS:
        getattr(first, name)[...] = 5
        getattr(second, name)[...] = 5
    assert_same(agent.choose([0, 0]), twin.choose([0, 0]))
    assert_same(twin.place([0, 2], [0.0, 1.0]), expected)
    assert after.step == 1


def test_random_panoramas_repeat_with_the_seed():
    world = World([house()])
    drawn = [
        PanoramicSimulator(world, batch_size=4, seed=seed).new_random_episodes(["house"] * 4)
        for seed in (1, 1, 2)
    ]
    assert_same(drawn[0], drawn[1])
    assert (drawn[0].viewpoint != drawn[2].viewpoint).any()


@pytest.mark.parametrize("order", ["envdrop", "follower"])
@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ([0, 7], ValueError, "row 1: choice 7 but there are 4, STOP included"),
        ([-1, 0], ValueError, "row 0: choice -1 but there are 3"),
        ([0], ValueError, r"choices have shape \[1\], expected \[2\]"),
        ([0.0, 1.0], TypeError, "choices hold float64, expected integers"),
    ],
)
def test_a_bad_choice_names_the_row_and_changes_nothing(order, choices, error, message):
    agent = PanoramicSimulator(World([house()]), batch_size=2, order=order)
    before = agent.place([0, 2], [0.0, 1.0])
    with pytest.raises(error, match=message):
        agent.choose(choices)
    assert_same(agent.choose(before.stop), before._replace(step=1))


def test_other_mistakes_are_named():
    world = World([house()])
    agent = PanoramicSimulator(world)
    with pytest.raises(RuntimeError, match="new_episodes must be called before choose"):
        agent.choose([0])
    with pytest.raises(ValueError, match="order is 'random', expected one of envdrop, follower"):
        PanoramicSimulator(world, order="random")
    with pytest.raises(ValueError, match="batch_size is 0"):
        PanoramicSimulator(world, batch_size=0)
    with pytest.raises(ValueError, match="viewpoint house-8 of scan house is excluded"):
        agent.new_episodes(["house"], ["house-8"], [0.0])
    with pytest.raises(ValueError, match="not the number of an included viewpoint"):
        agent.place([8], [0.0])
    with pytest.raises(ValueError, match="expected a list of 1 scan ids"):
        agent.new_random_episodes(["house"] * 2)
