"""The batched simulator: the rules, batches, snapshots, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from navigation_cases import RIGHT, UP, OneAgent, graph_of, graphs, house

from vln.geometry import VIEW_ELEVATIONS, VIEW_HEADINGS, Camera, nearest_view, views_between, wrap_heading
from vln.simulator import Simulator, State
from vln.world import World

CAMERAS = [
    Camera(),
    Camera(restricted=False),
    Camera(width=320, height=240, vfov=0.8),
    Camera(width=200, height=100),
]
ARRAYS = tuple(name for name in State._fields if name != "step")


def assert_same(a, b, rows=slice(None)):
    assert a.step == b.step
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name)[rows], getattr(b, name), err_msg=name)


def frozen(state):
    return state._replace(**{name: getattr(state, name).copy() for name in ARRAYS})


def assert_agrees(state, row, agent, start):
    assert state.viewpoint[row] == start + agent.viewpoint
    assert (state.heading[row], state.elevation[row]) == (agent.heading, agent.elevation)
    assert state.view[row] == agent.view
    expected = agent.locations()
    count = state.num_navigable[row]
    assert (state.neighbour[row, :count] - start).tolist() == [entry[0] for entry in expected]
    for place, (_, heading, elevation, distance) in enumerate(expected):
        assert state.rel_heading[row, place] == pytest.approx(heading, abs=5e-7)
        assert state.rel_elevation[row, place] == pytest.approx(elevation, abs=1e-12)
        assert state.rel_distance[row, place] == distance
    assert (state.neighbour[row, count:] == -1).all()
    assert not state.rel_heading[row, count:].any() and not state.rel_distance[row, count:].any()


def walk(data, simulator, scan_ids, *, steps=4):
    """Start every row somewhere and act; yields each action, the start first, with the state after it."""
    size = simulator.batch_size
    angle = st.floats(-20, 20)
    included = [np.flatnonzero(simulator.world.graphs[scan_id].included).tolist() for scan_id in scan_ids]
    places = [data.draw(st.sampled_from(numbers)) for numbers in included]
    poses = [data.draw(st.lists(angle, min_size=size, max_size=size)) for _ in range(2)]
    ids = [simulator.world.graphs[s].viewpoint_ids[p] for s, p in zip(scan_ids, places, strict=True)]
    state = simulator.new_episodes(scan_ids, ids, *poses)
    yield (places, *poses), state
    for _ in range(steps):
        index = [data.draw(st.integers(0, int(count) - 1)) for count in state.num_navigable]
        turns = [data.draw(st.lists(angle, min_size=size, max_size=size)) for _ in range(2)]
        state = simulator.step(index, *turns)
        yield (index, *turns), state


# ---- the rules


@settings(deadline=None, max_examples=60)
@given(graphs(), st.sampled_from(CAMERAS), st.booleans(), st.data())
def test_a_walk_is_that_of_the_rules_written_out(graph, camera, discretized, data):
    simulator = Simulator(World([graph]), camera=camera, discretized=discretized)
    agent = OneAgent(graph, camera, discretized=discretized)
    for number, (action, state) in enumerate(walk(data, simulator, [graph.scan_id])):
        agent = (
            agent.act(*(part[0] for part in action)) if number else agent.begin(*(part[0] for part in action))
        )
        assert state.step == number
        assert_agrees(state, 0, agent, 0)
        assert graph.included[state.viewpoint[0]]


@settings(deadline=None, max_examples=40)
@given(graphs("a"), graphs("b"), st.sampled_from(CAMERAS), st.booleans(), st.data())
def test_a_batch_is_that_many_single_agents(first, second, camera, discretized, data):
    world = World([first, second])
    scan_ids = data.draw(st.lists(st.sampled_from(["a", "b"]), min_size=2, max_size=4))
    batch = Simulator(world, batch_size=len(scan_ids), camera=camera, discretized=discretized)
    singles = [Simulator(world, camera=camera, discretized=discretized) for _ in scan_ids]
    for number, (action, state) in enumerate(walk(data, batch, scan_ids)):
        for row, single in enumerate(singles):
            part = [[values[row]] for values in action]
            if number:
                alone = single.step(*part)
            else:
                viewpoint_id = world.graphs[scan_ids[row]].viewpoint_ids[part[0][0]]
                alone = single.new_episodes([scan_ids[row]], [viewpoint_id], *part[1:])
            assert_same(state, alone, slice(row, row + 1))


@settings(deadline=None, max_examples=40)
@given(graphs(both_ways=True), st.data())
def test_a_random_walk_stays_on_the_graph(graph, data):
    simulator = Simulator(World([graph]), batch_size=3)
    here = None
    for _, state in walk(data, simulator, ["house"] * 3, steps=6):
        if here is not None:
            for before, now in zip(here, state.viewpoint, strict=True):
                assert before == now or now in graph.neighbours[before]
        here = state.viewpoint
        for row, viewpoint in enumerate(here):
            seen = state.neighbour[row, 1 : state.num_navigable[row]].tolist()
            assert set(seen) <= set(graph.neighbours[viewpoint]) and len(set(seen)) == len(seen)


@settings(deadline=None, max_examples=40)
@given(graphs(both_ways=True), st.floats(-7, 7))
def test_unrestricted_sight_is_mutual(graph, heading):
    inside = np.flatnonzero(graph.included)
    simulator = Simulator(
        World([graph]), batch_size=len(inside), camera=Camera(restricted=False), discretized=False
    )
    narrow = Simulator(World([graph]), batch_size=len(inside), discretized=False)
    state, seen = (one.place(inside, np.full(len(inside), heading)) for one in (simulator, narrow))
    row_of = {int(viewpoint): row for row, viewpoint in enumerate(inside)}
    for row in range(len(inside)):
        listed = state.neighbour[row, 1 : state.num_navigable[row]].tolist()
        part = seen.neighbour[row, 1 : seen.num_navigable[row]].tolist()
        assert [
            viewpoint for viewpoint in listed if viewpoint in part
        ] == part  # a part of it, in the same order
        for place, other in enumerate(listed, 1):
            back = state.neighbour[row_of[other]].tolist().index(int(inside[row]))
            assert state.rel_distance[row, place] == state.rel_distance[row_of[other], back]
            assert state.rel_elevation[row, place] == pytest.approx(-state.rel_elevation[row_of[other], back])
            flat = graph.positions[other, :2] - graph.positions[inside[row], :2]
            if np.hypot(*flat) > 1e-3:
                turned = abs(state.rel_heading[row, place] - state.rel_heading[row_of[other], back])
                assert turned == pytest.approx(math.pi, abs=1e-5)


def test_turning_the_house_by_30_degrees_shifts_the_views():
    graph = house()
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    turned = graph_of(graph.positions @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]), [], excluded=(8,))
    turned = type(graph)(graph.scan_id, graph.viewpoint_ids, turned.positions, graph.included, graph.edges)
    for view in range(12, 24):  # counter-clockwise by 30 degrees: the view before shows the same
        before, after = (Simulator(World([one]), batch_size=8) for one in (graph, turned))
        k = view - 12
        first = before.place(np.arange(8), np.full(8, k * RIGHT))
        second = after.place(np.arange(8), np.full(8, (k - 1) * RIGHT))
        np.testing.assert_array_equal(first.neighbour, second.neighbour)
        np.testing.assert_allclose(first.rel_heading, second.rel_heading, atol=1e-6)


def test_turns_go_round_and_tilts_stop():
    simulator = Simulator(World([house()]), batch_size=2)
    start = frozen(simulator.new_episodes(["house"] * 2, ["house-2"] * 2, [0.0, RIGHT]))
    for number in range(12):
        state = simulator.step([0, 0], [1e-9, 3.0], [0, 0])
        assert state.view.tolist() == [12 + (number + 1) % 12, 12 + (number + 2) % 12]
    assert_same(state, start._replace(step=12))
    for tilt, row in ((1.0, 2), (5.0, 2), (-0.1, 1), (-1.0, 0), (-2.0, 0), (0.0, 0)):
        assert (simulator.step([0, 0], [0, 0], [tilt] * 2).view // 12).tolist() == [row, row]
    assert simulator.step([0, 0], [0, 0], [0, 0]).elevation.tolist() == [-UP, -UP]


def test_the_sweep_of_the_originals_visits_all_views():
    simulator = Simulator(World([house()]))
    views = [int(simulator.new_episodes(["house"], ["house-0"], [0.0], [-UP]).view[0])]
    for number in range(1, 36):
        views.append(int(simulator.step([0], [1.0], [1.0 if number % 12 == 0 else 0.0]).view[0]))
    assert views == list(range(36))


def test_a_ladder_is_climbed_from_any_pitch_but_only_unrestricted():
    graph = graph_of([(0, 0, 0), (0, 0, 3)], [(0, 1)])
    assert Simulator(World([graph])).place([0], [1.0]).num_navigable.tolist() == [1]
    free = Simulator(World([graph]), camera=Camera(restricted=False))
    for view in range(36):
        state = free.place([0], [VIEW_HEADINGS[view]], [VIEW_ELEVATIONS[view]])
        assert state.rel_heading[0, 1] == 0
        assert state.rel_elevation[0, 1] == math.pi / 2 - VIEW_ELEVATIONS[view]


@pytest.mark.parametrize("restricted", [True, False])
def test_lists_may_be_long(restricted):
    angles = np.linspace(0, 2 * math.pi, 300, endpoint=False)
    ring = [(0, 0, 0), *((3 * math.sin(a), 3 * math.cos(a), 0.0) for a in angles)]
    graph = graph_of(ring, [(0, number) for number in range(1, 301)])
    simulator = Simulator(World([graph]), camera=Camera(restricted=restricted))
    state = simulator.place([0], [0.0])
    assert state.num_navigable[0] == (68 if restricted else 301)  # 80 degrees of the ring, and oneself
    assert state.neighbour[0, 1] == 1 and set(state.neighbour[0, 2:4].tolist()) == {2, 300}
    assert simulator.step([50], [0.0], [0.0]).viewpoint[0] == state.neighbour[0, 50]


@pytest.mark.parametrize("discretized", [True, False])
def test_a_world_of_one_lonely_viewpoint(discretized):
    simulator = Simulator(World([graph_of([(0, 0, 0)], [])]), discretized=discretized)
    state = simulator.new_episodes(["house"], ["house-0"], [0.3])
    assert state.neighbour[0, 0] == 0 and state.num_navigable.tolist() == [1]
    assert simulator.step([0], [1.0], [0.0]).viewpoint.tolist() == [0]


def test_poses_snap_and_wrap_at_the_edges():
    tiny = np.nextafter(0.5 * RIGHT, 0)
    halves = np.array([0.5 * RIGHT, tiny, 11.5 * RIGHT, -1e-17, -0.6 * RIGHT])
    assert nearest_view(halves, np.zeros(5)).tolist() == [13, 12, 12, 12, 23]
    edge = np.array([UP / 2, np.nextafter(UP / 2, 1), -UP / 2, np.nextafter(-UP / 2, -1), 9.0])
    assert (nearest_view(np.zeros(5), edge) // 12).tolist() == [1, 2, 1, 0, 2]
    assert wrap_heading(np.array([-1e-17, 7.0, 2 * math.pi])).tolist() == [
        2 * math.pi,
        7.0 - 2 * math.pi,
        0.0,
    ]
    simulator = Simulator(World([house()]), discretized=False, camera=Camera(elevation_limits=(-0.5, 0.3)))
    state = simulator.new_episodes(["house"], ["house-0"], [1.0], [2.0])
    assert state.elevation.tolist() == [0.3] and state.view.tolist() == [0]
    assert simulator.step([0], [0.25], [-4.0]).elevation.tolist() == [-0.5]


def test_views_between_are_those_that_single_turns_pass():
    simulator = Simulator(World([house()]))
    for view in range(36):
        for target in (0, 7, 12, 23, 35):
            passed = views_between(view, target)
            state = simulator.place([0], [VIEW_HEADINGS[view]], [VIEW_ELEVATIONS[view]])
            for following in passed:
                row, now = divmod(following, 12)[0], int(state.view[0])
                tilt = row - now // 12
                state = simulator.step([0], [0.0 if tilt else 1.0], [float(tilt)])
                assert state.view[0] == following
            assert state.view[0] == target and len(passed) <= 13


# ---- snapshots


@pytest.mark.parametrize("discretized", [True, False])
def test_a_state_is_a_snapshot_and_its_own(discretized):
    simulator = Simulator(World([house()]), batch_size=2, discretized=discretized)
    other = Simulator(simulator.world, batch_size=2, discretized=discretized)
    first = simulator.place([0, 2], [0.6, 1.0])
    kept = frozen(first)
    other.place([0, 2], [0.6, 1.0])
    action = [1, 1], [0.5, 0.0], [0.0, 0.4]
    expected = frozen(other.step(*action))
    state = simulator.step(*action)
    assert_same(first, kept)
    assert_same(state, expected)
    for name in ARRAYS:  # whatever is done to a snapshot reaches neither the simulator nor the world
        getattr(state, name)[...] = 77
    assert_same(simulator.step([0, 1], [0.0, 0.1], [0.0, 0.0]), other.step([0, 1], [0.0, 0.1], [0.0, 0.0]))
    assert_same(simulator.place([0, 2], [0.6, 1.0]), kept)


def test_states_become_tensors_without_a_copy():
    state = Simulator(World([house()]), batch_size=3).place([0, 1, 2], [0.0, 1.0, 2.0])
    for name in ARRAYS:
        tensor = torch.from_numpy(getattr(state, name))
        assert tensor.tolist() == getattr(state, name).tolist()


def test_random_episodes_depend_on_the_own_seed_alone():
    world = World([house("a"), house("b")])
    scan_ids = ["a", "b", "a", "b"]

    def starts(seed, *, disturb=False):
        simulator, other = (Simulator(world, batch_size=4, seed=s) for s in (seed, 99))
        found = []
        for _ in range(30):
            found.append(simulator.new_random_episodes(scan_ids))
            if disturb:
                other.new_random_episodes(scan_ids)
        return np.array([state.viewpoint for state in found]), np.array([state.view for state in found])

    first = starts(1)
    for repeated, drawn in zip(starts(1, disturb=True), first, strict=True):
        np.testing.assert_array_equal(repeated, drawn)
    assert (starts(2)[0] != first[0]).any()
    assert set(first[0][:, 0]) == set(range(8)) and set(first[0][:, 1]) == set(
        range(9, 17)
    )  # never the excluded
    assert set(first[1].ravel()) == set(range(12, 24))
    assert (first[1][:, 0] != first[1][:, 1]).any()


# ---- what it refuses


@pytest.mark.parametrize("discretized", [True, False])
@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (([0, 9], [0, 0], [0, 0]), ValueError, r"row 1: index 9 but the list holds \d navigable locations"),
        (([0, -1], [0, 0], [0, 0]), ValueError, r"row 1: index -1 but"),
        (([0, 0], [0, math.nan], [0, 0]), ValueError, "row 1: headings hold nan, expected a finite angle"),
        (([0, 0], [0, 0], [math.inf, 0]), ValueError, "row 0: elevations hold inf"),
        (([0.0, 1.0], [0, 0], [0, 0]), TypeError, "indices hold float64, expected integers"),
        (([True, False], [0, 0], [0, 0]), TypeError, "indices hold bool"),
        (([0, 0], ["a", "b"], [0, 0]), TypeError, "headings hold <U1, expected numbers"),
        ((0, 0, 0), ValueError, r"indices have shape \[\], expected \[2\]"),
        (([0], [0, 0], [0, 0]), ValueError, r"indices have shape \[1\], expected \[2\]"),
        (([0, 0], [0, 0, 0], [0, 0]), ValueError, r"headings have shape \[3\]"),
    ],
)
def test_a_bad_step_names_the_row_and_changes_nothing(discretized, action, error, message):
    simulator = Simulator(World([house()]), batch_size=2, discretized=discretized)
    twin = Simulator(simulator.world, batch_size=2, discretized=discretized)
    for one in (simulator, twin):
        one.place([0, 2], [0.6, 2.0])
    with pytest.raises(error, match=message):
        simulator.step(*action)
    assert_same(simulator.step([1, 0], [0.3, 0.0], [0.0, 0.3]), twin.step([1, 0], [0.3, 0.0], [0.0, 0.3]))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ((["house", "hut"], ["house-0"] * 2, [0, 0]), "scan hut is not loaded: there are 2 others"),
        ((["house"] * 2, ["house-0", "annex-0"], [0, 0]), "scan house has no viewpoint annex-0"),
        ((["house"] * 2, ["house-0", "house-8"], [0, 0]), "viewpoint house-8 of scan house is excluded"),
        ((["house"], ["house-0"], [0]), "1 scan ids and 1 viewpoint ids, expected 2 of each"),
        (("house", "house-0", [0, 0]), "lists with one id for each row, not texts"),
        ((["house"] * 2, ["house-0"] * 2, [0]), r"headings have shape \[1\], expected \[2\]"),
        ((["house"] * 2, ["house-0"] * 2, [0, math.inf]), "row 1: headings hold inf"),
        ((["house"] * 2, ["house-0"] * 2, [0, 0], [math.nan, 0]), "row 0: elevations hold nan"),
    ],
)
def test_a_bad_start_is_named_and_changes_nothing(start, message):
    world = World([house(), house("annex")])
    simulator, twin = (Simulator(world, batch_size=2) for _ in range(2))
    for one in (simulator, twin):
        one.place([0, 2], [0.6, 2.0])
        one.step([0, 1], [0, 0], [0, 0])
    with pytest.raises(ValueError, match=message):
        simulator.new_episodes(*start)
    assert_same(simulator.step([1, 0], [0.3, 0.0], [0.0, 0.3]), twin.step([1, 0], [0.3, 0.0], [0.0, 0.3]))


def test_other_mistakes_are_named():
    world = World([house(), graph_of([(0, 0, 0)], [], scan_id="shut", excluded=(0,))])
    simulator = Simulator(world)
    with pytest.raises(RuntimeError, match="new_episodes must be called before step"):
        simulator.step([0], [0], [0])
    with pytest.raises(ValueError, match="row 0: 9 is not the number of an included viewpoint"):
        simulator.place([9], [0.0])
    with pytest.raises(ValueError, match="row 0: -1 is not the number"):
        simulator.place([-1], [0.0])
    with pytest.raises(TypeError, match="viewpoints hold float64"):
        simulator.place([0.0], [0.0])
    with pytest.raises(ValueError, match="scan shut has no included viewpoint"):
        simulator.new_random_episodes(["shut"])
    with pytest.raises(ValueError, match="scan hut is not loaded"):
        simulator.new_random_episodes(["hut"])
    with pytest.raises(ValueError, match="expected a list of 1 scan ids"):
        simulator.new_random_episodes("house")
    with pytest.raises(ValueError, match="batch_size is 0"):
        Simulator(world, batch_size=0)
    with pytest.raises(ValueError, match="2 graphs of 1 scans"):
        World([house(), house()])
    with pytest.raises(ValueError, match="0 graphs of 0 scans"):
        World([])
    for limits in ((-1.6, 0.5), (0.0, 0.5), (-0.5, 0.0), (-0.5, 1.6)):
        with pytest.raises(ValueError, match="elevation_limits are"):
            Camera(elevation_limits=limits)
    with pytest.raises(ValueError, match="a camera of 0x480 pixels"):
        Camera(width=0)
