"""Items of the embedded world: what they say is there to see, and nothing but the words tells where to go."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from vln.candidates import PanoramicSimulator
from vln.house_language import SYNONYMS, Speaker
from vln.house_plans import CLASSES, COLOURS, NOUNS, build_house
from vln.house_tasks import GOAL_SHARES, HABITS, Walks, draw_groups, edge_pattern
from vln.houses import EDGE_SHARES, SPLITS, HousesConfig, generate
from vln.world import World


@pytest.fixture(scope="module")
def world():
    return generate(HousesConfig(num_seen=4, num_unseen=3, train_groups=16, val_groups=10))


@pytest.fixture(scope="module")
def walks():
    houses = [build_house(f"house{n}", np.random.default_rng([3, n])) for n in range(4)]
    return {house.scan_id: Walks(house, EDGE_SHARES["r2r"], most_edges=7) for house in houses}


def by_pose(rows, start, heading):
    """Rows by scan, start viewpoint and the nearest of 12 headings: what an agent begins with."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["scan"], start(row), round(heading(row) / (np.pi / 6)) % 12].append(row)
    return groups


def path_length(graph, path):
    places = graph.positions[[graph.index(name) for name in path]]
    return float(np.linalg.norm(np.diff(places, axis=0), axis=1).sum())


@pytest.mark.parametrize("task", ["r2r", "ndh", "hanna"])
def test_every_start_pose_has_several_goals_far_apart_and_equally_many_edges(world, task):
    path_of = {
        "r2r": lambda row: row["path"],
        "ndh": lambda row: row["planner_path"],
        "hanna": lambda row: row["paths"][0],
    }[task]
    for split in SPLITS:
        rows = getattr(world, task)[split]
        heading = (
            (lambda row: row["start_pano"]["heading"]) if task == "ndh" else (lambda row: row["heading"])
        )
        groups = by_pose(rows, lambda row: path_of(row)[0], heading)
        assert sum(map(len, groups.values())) == len(rows)
        for (scan_id, _, _), group in groups.items():
            graph = world.graphs[scan_id]
            goals = [graph.index(path_of(row)[-1]) for row in group]
            assert len(set(goals)) == len(group) >= 3
            assert len({len(path_of(row)) for row in group}) == 1
            apart = graph.distances[np.ix_(goals, goals)] + np.eye(len(goals)) * 100
            assert apart.min() > 6.0


def test_r2r_paths_are_shortest_and_shaped_like_the_real_ones(world):
    for split in SPLITS:
        for row in world.r2r[split]:
            graph = world.graphs[row["scan"]]
            start, goal = graph.index(row["path"][0]), graph.index(row["path"][-1])
            length = path_length(graph, row["path"])
            assert length == pytest.approx(graph.distances[start, goal])
            assert row["distance"] == pytest.approx(length, abs=0.006)
            assert 5.0 <= length <= 20.0
            assert 4 <= len(row["path"]) <= 7
            assert 0 <= row["heading"] <= 6.284
    ids = [row["path_id"] for split in SPLITS for row in world.r2r[split]]
    assert len(set(ids)) == len(ids)


def test_edges_are_spread_the_same_way_in_all_splits(world):
    for task, count in (("r2r", lambda row: len(row["path"])), ("ndh", lambda row: len(row["planner_path"]))):
        shares = []
        for split in ("val_seen", "val_unseen"):
            rows = getattr(world, task)[split]
            shares.append(Counter(count(row) for row in rows))
        assert shares[0] == shares[1]
        train = Counter(count(row) for row in getattr(world, task)["train"])
        for edges in train:
            assert train[edges] / train.total() == pytest.approx(
                shares[0][edges] / shares[0].total(), abs=0.15
            )


def test_goals_are_alike_in_seen_and_unseen_houses():
    houses = {
        kind: [build_house(f"{kind}{n}", np.random.default_rng([11, kind, n])) for n in range(6)]
        for kind in (0, 1)
    }
    spread, steps = [], []
    for kind, listed in houses.items():
        walks = {house.scan_id: Walks(house, EDGE_SHARES["r2r"], most_edges=6) for house in listed}
        random = np.random.default_rng(kind)
        pattern = edge_pattern(EDGE_SHARES["r2r"], 100, random)
        groups = list(draw_groups(walks, pattern, random, group_size=4, longest_m=20.0, taken=set()))
        kinds = [walks[group.scan_id].goal_kind[path[-1]] for group in groups for path in group.paths]
        counts = np.bincount(kinds, minlength=len(GOAL_SHARES))
        assert (counts <= 400 * np.array(GOAL_SHARES) + 4).all()
        spread.append(counts / 400)
        steps.append(Counter(group.num_edges for group in groups))
    assert np.abs(spread[0] - spread[1]).max() < 0.04
    assert steps[0] == steps[1]


def test_habits_stay_near_chance(walks):
    random = np.random.default_rng(1)
    pattern = edge_pattern(EDGE_SHARES["r2r"], 60, random)
    groups = list(draw_groups(walks, pattern, random, group_size=4, longest_m=20.0, taken=set()))
    tallies = [walks[group.scan_id].tally(group) for group in groups]
    hits, chance = (np.sum(values, axis=0) for values in zip(*tallies, strict=True))
    assert len(hits) == len(HABITS)
    assert (hits <= 1.1 * chance + 1e-9).all()
    assert 0.15 < chance[0] / sum(4 * group.num_edges for group in groups) < 0.35


def test_tallies_agree_with_the_simulator(walks):
    """Straight walks and chance are tables; here an agent walks them."""
    random = np.random.default_rng(2)
    group = next(draw_groups(walks, [5], random, group_size=3, longest_m=20.0, taken=set()))
    house = walks[group.scan_id].house
    graph, start = house.graph, group.paths[0][0]
    agent = PanoramicSimulator(World([graph]), order="follower")
    now = agent.new_episodes([graph.scan_id], [graph.viewpoint_ids[start]], [group.heading])
    walked = [start]
    for _ in range(10):
        now = agent.choose([1])
        walked.append(int(now.viewpoint[0]))
    assert walks[group.scan_id].straight(start, group.heading).tolist() == walked
    taken = 0
    for path in group.paths:
        now = agent.new_episodes([graph.scan_id], [graph.viewpoint_ids[start]], [group.heading])
        for there in path[1:]:
            taken += int(now.candidate[0, 1]) == there
            now = agent.choose([int(np.argmax(now.candidate[0, 1:] == there)) + 1])
    assert walks[group.scan_id].tally(group)[0][0] == taken
    crowd = PanoramicSimulator(World([graph]), batch_size=4000, order="follower")
    now = crowd.place(np.full(4000, start), np.zeros(4000))
    steps = random.choice(list(EDGE_SHARES["r2r"]), p=list(EDGE_SHARES["r2r"].values()), size=4000)
    for step in range(6):
        choice = 1 + random.integers(now.num_choices - 1)
        now = crowd.choose(np.where(step < steps, choice, 0))
    for path in group.paths:
        reached = (graph.distances[now.viewpoint, path[-1]] < 3.0).mean()
        assert walks[group.scan_id].chance[start, path[-1]] == pytest.approx(reached, abs=0.015)


def test_instructions_name_only_what_is_visible_on_the_way(world):
    colours = {word: name for name in COLOURS for word in SYNONYMS.get(name, (name,))}
    nouns = {word: name for name in CLASSES for word in SYNONYMS.get(name, (name,))}
    houses = {house.scan_id: house for house in world.houses}
    named = 0
    for split in SPLITS:
        for row in world.r2r[split]:
            house = houses[row["scan"]]
            on_the_way = house.visible[[house.graph.index(name) for name in row["path"]]].any(axis=0)
            seen = {
                (COLOURS[house.colours[thing]], NOUNS[house.nouns[thing]])
                for thing in np.flatnonzero(on_the_way & (house.colours >= 0))
            }
            for text in row["instructions"]:
                words = text.split()
                for first, second in itertools.pairwise(words):
                    if first in colours and second in nouns:
                        named += 1
                        assert (colours[first], nouns[second]) in seen
    assert named > 500


def test_mentions_lie_ahead_of_the_step_they_belong_to(world):
    random = np.random.default_rng(0)
    ahead = []
    for row in world.r2r["val_unseen"]:
        house = next(house for house in world.unseen if house.scan_id == row["scan"])
        path = [house.graph.index(name) for name in row["path"]]
        told = Speaker(house).describe(path, row["heading"], random)
        for step, thing, words in told.mentions:
            assert words in told.text or NOUNS[house.nouns[thing]] in ("upstairs", "downstairs")
            assert house.visible[path[step], thing]
            if step == len(path) - 1:
                continue
            way = house.graph.positions[path[step + 1]] - house.graph.positions[path[step]]
            offset = house.positions[thing] - house.graph.positions[path[step]]
            turn = np.arctan2(offset[0], offset[1]) - np.arctan2(way[0], way[1])
            ahead.append(np.cos(turn))
            noun = NOUNS[house.nouns[thing]]
            if noun in ("upstairs", "downstairs") and abs(way[2]) > 0.5:
                assert (way[2] > 0) == (noun == "upstairs")
    assert np.mean(np.array(ahead) > np.cos(np.radians(50))) > 0.97


def test_turn_words_follow_the_heading(world):
    """The same path from the opposite heading: left becomes right, straight becomes around."""
    house = world.seen[0]
    speaker, random = Speaker(house), np.random.default_rng(0)
    opposite = {"left": "right", "right": "left", "straight": "around", "around": "straight"}
    seen = Counter()
    for source, target in house.graph.edges[:60].tolist():
        way = house.graph.positions[target] - house.graph.positions[source]
        bearing = np.arctan2(way[0], way[1])
        for turn, side in ((-np.pi / 2, "right"), (np.pi / 2, "left"), (0.0, "straight"), (np.pi, "around")):
            assert speaker.side(source, target, bearing + turn) == side
            assert speaker.side(source, target, bearing + turn + np.pi) == opposite[side]
            seen[side] += 1
    assert seen.total() == 240
    assert speaker.describe([source, target], bearing, random, stop=False).text.endswith(" .")


def test_three_instructions_of_a_path_differ(world):
    different = [len(set(row["instructions"])) for row in world.r2r["train"]]
    assert np.mean(different) > 2.9
    lengths = [len(text.split()) for row in world.r2r["train"] for text in row["instructions"]]
    assert 15 < np.mean(lengths) < 50


def test_ndh_items_hold_together(world):
    silent = 0
    for split in SPLITS:
        for row in world.ndh[split]:
            graph = world.graphs[row["scan"]]
            planner, player, history = row["planner_path"], row["player_path"], row["nav_history"]
            assert planner[0] == player[0] == history[-1] == row["start_pano"]["pano"]
            for path in (planner, player, history):
                assert all(graph.has_edge(a, b) for a, b in itertools.pairwise(path))
            assert 4 <= len(planner) <= 6
            turns = row["dialog_history"]
            assert [turn["role"] for turn in turns] == ["navigator", "oracle"] * (len(turns) // 2)
            assert not turns or turns[-1]["nav_idx"] == len(history) - 1
            silent += not turns
            end = [graph.index(name) for name in row["end_panos"]]
            start, planned = graph.index(planner[0]), graph.index(planner[-1])
            assert graph.distances[start, end].min() >= graph.distances[start, planned] - 2.5
            assert row["target"] in NOUNS
    assert any(len(row["dialog_history"]) > 2 for row in world.ndh["train"])
    assert silent < 0.3 * sum(len(world.ndh[split]) for split in SPLITS)


def test_ndh_items_of_a_pose_differ_in_the_last_answer_alone(world):
    groups = by_pose(
        world.ndh["train"], lambda row: row["start_pano"]["pano"], lambda row: row["start_pano"]["heading"]
    )
    for group in groups.values():
        assert len({str(row["dialog_history"][:-2]) for row in group}) == 1
        if group[0]["dialog_history"]:
            assert len({row["dialog_history"][-1]["message"] for row in group}) == len(group)


def test_hanna_goals_see_the_object_and_routes_can_be_walked(world):
    for split in SPLITS:
        for row in world.hanna[split]:
            graph = world.graphs[row["scan"]]
            distances = [
                graph.distances[graph.index(row["paths"][0][0]), graph.index(way[-1])] for way in row["paths"]
            ]
            assert distances[0] == min(distances)
            assert len({way[0] for way in row["paths"]}) == 1
            assert len({way[-1] for way in row["paths"]}) == len(row["paths"])
            for way in row["paths"]:
                assert way == graph.shortest_path(way[0], way[-1])
    assert max(len(row["paths"]) for row in world.hanna["train"]) > 1
    for scan_id, routes in world.routes.items():
        graph = world.graphs[scan_id]
        splits = {"val_unseen_all"} if scan_id.startswith("unseen") else {"train", "val_seen_env"}
        assert {route["split"] for route in routes} == splits
        assert len({route["path_id"] for route in routes}) == len(routes)
        for route in routes:
            assert route["path"] == graph.shortest_path(route["path"][0], route["path"][-1])
            assert 0 <= route["view_id"] < 36
            assert route["instruction"]


def test_pattern_has_the_very_shares():
    pattern = edge_pattern(EDGE_SHARES["r2r"], 100, np.random.default_rng(0))
    assert Counter(pattern) == {3: 1, 4: 35, 5: 30, 6: 34}
