"""Scores: against evaluators written out item by item, and against figures worked out by hand."""

import math
from itertools import pairwise

import networkx
import numpy as np
import pytest
from navigation_cases import graph_of, house

from vln.data import HannaTask, NDHItem, R2RItem
from vln.metrics import HannaResult, mean_scores, score_hanna, score_ndh, score_r2r

LINE = graph_of([(2.0 * x, 0, 0) for x in range(7)], [(x, x + 1) for x in range(6)], scan_id="line")
"""Seven viewpoints, 2 m apart."""
GRAPHS = {"line": LINE, "house": house()}


def ids(*numbers, scan_id="line"):
    return tuple(f"{scan_id}-{number}" for number in numbers)


def item(path, *, path_id=1, scan_id="line", instructions=1, distance=1.0):
    return R2RItem(path_id, scan_id, 0.0, ids(*path, scan_id=scan_id), ("go",) * instructions, distance)


def one(paths, reference, **options):
    """Scores of one path as plain numbers."""
    scores = score_r2r({"1_0": ids(*paths)}, [item(reference)], GRAPHS, **options)
    return {name: float(value[0]) for name, value in scores._asdict().items() if name != "instruction_ids"}


# ---- written out


class Slow:
    """The definitions, one item at a time."""

    def __init__(self, graph):
        self.flat = networkx.Graph()
        self.flat.add_nodes_from(graph.viewpoint_ids)
        for a, b in graph.edges[graph.included[graph.edges].all(axis=1)].tolist():
            length = math.dist(graph.positions[a], graph.positions[b])
            self.flat.add_edge(graph.viewpoint_ids[a], graph.viewpoint_ids[b], weight=length)
        self.d = dict(networkx.all_pairs_dijkstra_path_length(self.flat))

    def length(self, path):
        return sum(self.d[a][b] for a, b in pairwise(path))

    def dtw(self, path, reference):
        table = {(-1, -1): 0.0}
        for i, p in enumerate(path):
            for j, r in enumerate(reference):
                before = [table.get(key, math.inf) for key in ((i - 1, j), (i, j - 1), (i - 1, j - 1))]
                table[i, j] = self.d[p][r] + min(before)
        return table[len(path) - 1, len(reference) - 1]

    def r2r(self, path, reference, radius=3.0):
        goal = reference[-1]
        error, shortest, length = self.d[path[-1]][goal], self.d[path[0]][goal], self.length(path)
        oracle, success, dtw = (
            min(self.d[p][goal] for p in path),
            float(error < radius),
            self.dtw(path, reference),
        )
        coverage = np.mean([math.exp(-min(self.d[r][p] for p in path) / radius) for r in reference])
        expected = coverage * self.length(reference)
        score = expected / (expected + abs(expected - length)) if expected or length else 1.0
        ndtw = math.exp(-dtw / (radius * len(reference)))
        return {
            "nav_error": error, "oracle_error": oracle, "steps": len(path) - 1, "length": length,
            "shortest_length": shortest, "success": success, "oracle_success": float(oracle < radius),
            "spl": success * shortest / max(shortest, length, 0.01), "dtw": dtw, "ndtw": ndtw,
            "sdtw": success * ndtw, "cls": coverage * score,
        }  # fmt: skip


def random_path(rng, graph, start, steps):
    """A walk that also stays and, at times, jumps."""
    path = [start]
    for _ in range(steps):
        near = graph.neighbours[path[-1]]
        near = [other for other in near if other < 7]
        path.append(int(rng.choice([path[-1], *near, int(rng.integers(7))])))
    return path


@pytest.mark.parametrize("deduplicate", [False, True])
def test_r2r_scores_are_those_of_the_definitions(deduplicate):
    rng = np.random.default_rng(5)
    slow = {name: Slow(graph) for name, graph in GRAPHS.items()}
    items, paths = [], {}
    for number in range(60):
        scan_id = ("line", "house")[number % 2]
        reference = random_path(rng, GRAPHS[scan_id], int(rng.integers(7)), int(rng.integers(1, 6)))
        items.append(item(reference, path_id=number, scan_id=scan_id, instructions=2))
        for name in items[-1].instruction_ids:
            walked = random_path(rng, GRAPHS[scan_id], reference[0], int(rng.integers(0, 12)))
            paths[name] = list(ids(*walked, scan_id=scan_id))
    scores = score_r2r(paths, items, GRAPHS, deduplicate=deduplicate)
    assert scores.instruction_ids == tuple(paths)
    for row, (name, path) in enumerate(paths.items()):
        number = int(name.split("_")[0])
        definitions = slow[items[number].scan_id]
        expected = definitions.r2r(path, items[number].path)
        if deduplicate:
            once = [b for a, b in zip([None, *path], path, strict=False) if a != b]
            expected |= {
                key: definitions.r2r(once, items[number].path)[key] for key in ("dtw", "ndtw", "sdtw", "cls")
            }
        for field, value in expected.items():
            assert getattr(scores, field)[row] == pytest.approx(value, abs=1e-12), (name, field)
    means = mean_scores(scores)
    assert means["spl"] == pytest.approx(np.mean(scores.spl)) and "instruction_ids" not in means


# ---- by hand


def test_r2r_by_hand():
    scores = one([0, 1, 1, 2, 3, 2], [0, 1, 2, 3])
    assert scores["length"] == 8 and scores["steps"] == 5 and scores["shortest_length"] == 6
    assert scores["nav_error"] == 2 and scores["success"] == 1 and scores["oracle_error"] == 0
    assert scores["spl"] == pytest.approx(6 / 8)
    assert scores["dtw"] == 2 and scores["ndtw"] == pytest.approx(math.exp(-2 / 12))
    assert scores["cls"] == pytest.approx(6 / (6 + 2))
    perfect = one([0, 1, 2, 3], [0, 1, 2, 3])
    assert [perfect[name] for name in ("success", "spl", "ndtw", "sdtw", "cls")] == [1.0] * 5


def test_exactly_the_radius_is_no_success_in_r2r_and_one_in_hanna():
    assert one([0, 1], [0, 1, 2], success_radius=2.0)["success"] == 0
    assert one([0, 1], [0, 1, 2], success_radius=2.0 + 1e-9)["success"] == 1
    task = HannaTask(1, "line", 0.0, (ids(0, 1, 2),), ("find it",))
    done = HannaResult(ids(0, 1), (0,), (1,), (ids(2), ids(2)))
    assert score_hanna({"1_0": done}, [task], GRAPHS).success.tolist() == [1]
    assert score_hanna({"1_0": done}, [task], GRAPHS, success_radius=2 - 1e-9).success.tolist() == [0]


def test_repeats_cost_dtw_off_the_reference_unless_left_out():
    assert one([0, 1, 2, 2, 2], [0, 1])["dtw"] == 6
    assert one([0, 1, 2, 2, 2], [0, 1], deduplicate=True)["dtw"] == 2
    assert one([0, 0, 0, 1], [0, 1])["dtw"] == 0


def test_standing_at_the_goal_has_no_spl_in_r2r_and_a_jump_costs_its_way():
    assert one([2], [2, 3, 2])["spl"] == 0 and one([2], [2, 3, 2])["success"] == 1
    assert one([0, 4], [0, 4])["length"] == 8


def test_annotated_length_takes_the_reference_for_spl():
    loop = [0, 1, 2, 1, 0, 1]
    assert one(loop, loop)["spl"] == pytest.approx(2 / 10)
    assert one(loop, loop, annotated_length=True)["spl"] == 1


def ndh(planner, player, ends, *, start=0):
    return NDHItem(7, "line", ids(start)[0], 0.0, ids(*ends), ids(*planner), ids(*player))


def ndh_scores(path, it, **options):
    scores = score_ndh({7: ids(*path)}, [it], GRAPHS, **options)
    return {name: float(value[0]) for name, value in scores._asdict().items() if name != "inst_idx"}


def test_ndh_by_hand():
    it = ndh([0, 1, 2, 3], [0, 1, 2, 3, 4], [5, 6])
    planner = ndh_scores([0, 1, 2, 3, 4, 3, 2], it, path_type="planner_path")
    assert planner["goal_progress"] == 10 - 6 and planner["oracle_progress"] == 10 - 2
    assert planner["nav_error"] == 2 and planner["shortest_length"] == 6 and planner["length"] == 12
    assert planner["spl"] == pytest.approx(0.5) and planner["success"] == planner["oracle_success"] == 1
    trusted = ndh_scores([0, 1, 2, 3, 4, 3, 2], it)
    assert trusted["nav_error"] == 4 and trusted["success"] == 0 and trusted["oracle_plan_error"] == 0
    assert (
        trusted["goal_progress"] == 4
        and trusted["success_progress"] == 0
        and trusted["oracle_path_success"] == 1
    )
    assert planner["success_progress"] == 4
    assert ndh_scores([0], ndh([0], [0, 1], [0]), path_type="planner_path")["spl"] == 1
    assert ndh_scores([0, 1, 0], ndh([0], [0, 1], [0]), path_type="planner_path")["spl"] == 0
    assert ndh_scores([3, 2], ndh([3, 4], [3, 4], [6], start=3))["goal_progress"] == -2


def test_the_trusted_path_is_the_players_if_it_passes_the_planners_end():
    assert ndh([0, 1], [0, 1, 2], [3]).trusted_path == ids(0, 1, 2)
    assert ndh([0, 1, 4], [0, 1, 2], [3]).trusted_path == ids(0, 1, 4)
    assert ndh([0], [0, 1], [3]).trusted_path == ids(0)  # passed, but not after the start


def hanna(paths, **lists):
    steps = len(paths) - 1
    return HannaResult(
        ids(*paths),
        tuple(lists.get("asked", (0,) * steps)),
        tuple(lists.get("moved", (1,) * steps)),
        tuple(ids(target) for target in lists.get("targets", (6,) * (steps + 1))),
    )


def hanna_scores(result, goals):
    task = HannaTask("t", "line", 0.0, tuple(ids(0, goal) for goal in goals), ("find it",))
    scores = score_hanna({"t_0": result}, [task], GRAPHS)
    return {
        name: float(value[0]) for name, value in scores._asdict().items() if name != "instruction_ids"
    }, scores


def test_hanna_by_hand():
    scores, _ = hanna_scores(hanna([0, 1, 2, 3, 2, 1]), [3, 6])
    assert scores["error"] == 4 and scores["optimal_length"] == 6 and scores["length"] == 10
    assert scores["success"] == scores["spl"] == 0
    assert scores["oracle_error"] == 0 and scores["oracle_success"] == 1 and scores["oracle_length"] == 6
    assert scores["oracle_spl"] == 0 and scores["oracle_spl_mended"] == 1
    equal, _ = hanna_scores(hanna([0, 1, 2, 3, 4]), [2, 6])  # 4 m from both: the last one counts
    assert equal["error"] == 4 and equal["optimal_length"] == 12
    at_once, _ = hanna_scores(hanna([0]), [0])
    assert at_once["spl"] == at_once["oracle_spl"] == 1 and at_once["length"] == 0


def test_hanna_targets_are_due_at_the_next_stop_or_at_the_end():
    met, full = hanna_scores(
        hanna([0, 0, 1, 2, 2], asked=(1, 0, 0, 0), moved=(-1, 1, 0, 1), targets=(6, 2, 3, 6, 6)), [6]
    )
    assert (met["num_requests"], met["num_targets"], met["num_targets_reached"]) == (1, 1, 1)
    assert mean_scores(full)["target_success_rate"] == 1
    missed, _ = hanna_scores(
        hanna([0, 0, 1, 2], asked=(1, 1, 0), moved=(-1, -1, 1), targets=(6, 6, 6, 4)), [6]
    )
    # The second request is itself no move, which settles the first; it is then open until the end.
    assert (missed["num_requests"], missed["num_targets"], missed["num_targets_reached"]) == (2, 2, 0)
    _, never = hanna_scores(hanna([0, 1]), [6])
    assert mean_scores(never)["target_success_rate"] == -1


# ---- what it refuses


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"1_0": ids(0)}, "1 of 2 are missing, 1_1 first"),
        (
            {"1_0": ids(0), "1_1": ids(1, 0)},
            "1_1: the path begins at line-1, expected the item's start line-0",
        ),
        ({"1_0": ids(0), "1_1": ()}, "1_1: the path is empty"),
        ({"1_0": ids(0), "1_1": ids(0, 9)}, "1_1: scan line has no viewpoint line-9"),
    ],
)
def test_a_path_that_cannot_be_scored_is_named(paths, message):
    with pytest.raises(ValueError, match=message):
        score_r2r(paths, [item([0, 1], instructions=2)], GRAPHS)


def test_unreachable_viewpoints_are_named():
    apart = item([0, 1], scan_id="house")
    for viewpoint in (7, 8):
        with pytest.raises(ValueError, match=f"1_0: there is no way from house-0 to house-{viewpoint}"):
            score_r2r({"1_0": ids(0, viewpoint, scan_id="house")}, [apart], GRAPHS)
    island = NDHItem(7, "house", "house-0", 0.0, ("house-7",), ("house-0",), ("house-0",))
    with pytest.raises(ValueError, match="7: there is no way from its start to its goal"):
        score_ndh({7: ["house-0"]}, [island], GRAPHS)
    task = HannaTask("t", "house", 0.0, (("house-7",),), ("find it",))
    with pytest.raises(
        ValueError, match="t_0: the path begins at house-0, expected the item's start house-7"
    ):
        score_hanna({"t_0": HannaResult(("house-0",), (), (), (("house-7",),))}, [task], GRAPHS)


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="1 instructions, 1_0 first, have no goal"):
        score_r2r({"1_0": ids(0)}, [item([0], distance=None)], GRAPHS)
    with pytest.raises(ValueError, match="there are no items to score"):
        score_r2r({}, [], GRAPHS)
    with pytest.raises(ValueError, match="no graph of scan line: load the graphs of all scans"):
        score_r2r({"1_0": ids(0)}, [item([0, 1])], {"house": GRAPHS["house"]})
    with pytest.raises(ValueError, match="path_type is 'oracle', expected one of planner_path, player_path"):
        score_ndh({}, [], GRAPHS, path_type="oracle")
    with pytest.raises(ValueError, match="1 items, 7 first, have no goal"):
        score_ndh({7: ids(0)}, [ndh([], [], [])], GRAPHS)
    with pytest.raises(
        ValueError, match=r"t_0: 2 poses need 1 requests, 1 choices and 2 targets, got 2, 1 and 2"
    ):
        hanna_scores(hanna([0, 1], asked=(0, 0)), [6])
