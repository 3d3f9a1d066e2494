"""Triplets: the teacher on a world whose shortest paths are known, and the released files."""

import gzip
import json

import numpy as np
import pytest
from tiny_vln import grid, parity_line

from vln.candidates import PanoramicSimulator
from vln.data import R2RItem
from vln.pretrain_data import RandomFeatures
from vln.triplets import Triplets, read_released, roll_triplets
from vln.walks import NextHops, Walk, path_batch, roll_teacher, roll_walks, teacher_actions, walks_of
from vln.world import World


def house(*scans):
    return World([grid(scan) for scan in scans or ("house",)])


def test_the_original_is_reproduced(capsys):
    line = parity_line(capsys, "triplets_val_seen.json.gz")
    assert line.startswith("pass  vln/triplets_val_seen.json.gz  vln  10 of 10 arrays"), line


def test_straight_ahead_is_rank_one_and_stop_is_zero():
    world = house()
    # From the lower left corner to the right: heading 90 degrees is view 15 of the level row.
    table = roll_triplets(world, [Walk("house", ("house-0", "house-3"), np.pi / 2, 2)])
    assert table.viewpoint.tolist() == [0, 1, 2, 3] * 2
    assert table.view.tolist() == [15] * 8
    assert table.action.tolist() == [1, 1, 1, 0] * 2
    assert table.target_view.tolist() == [15, 15, 15, -1] * 2
    assert table.text.tolist() == [0] * 4 + [1] * 4
    assert table.labels("view").tolist() == [12, 12, 12, 36] * 2  # counted from the heading
    assert table.floor("candidate_rank") == 0.75


def test_every_row_of_a_batch_walks_its_shortest_path():
    world = house("a", "b")
    names = [(scan, number) for scan in "ab" for number in range(20)]
    random = np.random.default_rng(0)
    pairs = [(scan, *random.choice(20, 2, replace=False)) for scan in random.choice(["a", "b"], 60)]
    walks = [Walk(str(scan), (f"{scan}-{start}", f"{scan}-{goal}"), 1.0, number % 3)
             for number, (scan, start, goal) in enumerate(pairs)]  # fmt: skip
    table = roll_triplets(world, walks)
    text = 0
    for walk in walks:
        graph = world.graphs[walk.scan_id]
        way = [names.index((walk.scan_id, int(name.split("-")[1])))
               for name in graph.shortest_path(walk.path[0], walk.path[-1])]  # fmt: skip
        for _ in range(walk.num_texts):
            rows = table.text == text
            assert table.viewpoint[rows].tolist() == way
            assert (table.action[rows] == 0).tolist() == [False] * (len(way) - 1) + [True]
            text += 1
    assert table.text.max() == text - 1
    assert len(roll_triplets(world, []).text) == 0


def test_the_teacher_works_in_both_orders_of_candidates():
    world = house()
    for order in ("envdrop", "follower"):
        agents = PanoramicSimulator(world, batch_size=2, order=order)
        steps = list(roll_teacher(agents, [0, 5], [7, 5], [0.0, 0.0]))
        assert [step.active.tolist() for step in steps] == [[True, True], *[[True, False]] * 3]
        assert steps[-1].seen.viewpoint.tolist() == [7, 5]
        assert steps[0].action[1] == steps[0].seen.stop[1]


def test_what_cannot_be_walked_is_refused():
    world = house("a", "b")
    with pytest.raises(ValueError, match="row 1: no way from viewpoint 3 to 25"):
        NextHops(world).towards(np.array([0, 3]), np.array([5, 25]))
    seen = PanoramicSimulator(world, order="follower").place([0], [0.0])
    with pytest.raises(ValueError, match="row 0: viewpoint 9 is no candidate of 0"):
        teacher_actions(seen, np.array([9]))
    with pytest.raises(ValueError, match="target is 'rank'"):
        roll_triplets(world, [Walk("a", ("a-0", "a-1"), 0.0)]).labels("rank")


def test_walks_of_items():
    item = R2RItem(4, "a", 0.5, ("a-0", "a-1", "a-2"), ("go", "walk", "run"), None)
    assert walks_of([item]) == [Walk("a", ("a-0", "a-1", "a-2"), 0.5, 3)]


def test_a_path_as_written_is_walked_whatever_its_length():
    world = house()
    round_about = Walk("house", tuple(f"house-{n}" for n in (0, 1, 1, 6, 5, 0)), 0.0)
    straight = Walk("house", ("house-0", "house-5"), 0.0)
    table = roll_walks(world, [round_about, straight], shortest=False)
    assert table.viewpoint.tolist() == [0, 1, 6, 5, 0, 0, 5]
    assert table.length.tolist() == [5, 2] and table.first.tolist() == [0, 5]
    assert roll_walks(world, [round_about], shortest=True).viewpoint.tolist() == [0]
    with pytest.raises(ValueError, match="viewpoint 7 is no candidate of 0"):
        roll_walks(world, [Walk("house", ("house-0", "house-7"), 0.0)], shortest=False)


def test_paths_of_a_batch_have_the_views_that_were_taken():
    world = house("a", "b")
    features = RandomFeatures(world, 3)
    walks = [
        Walk("a", ("a-0", "a-2"), np.pi / 2),
        Walk("b", ("b-3", "b-3"), 0.0),
        Walk("b", ("b-0", "b-5"), 0.0),
    ]
    batch = path_batch(roll_walks(world, walks), [0, 2, 1], world, features, angle_size=4)
    assert batch.lengths.tolist() == [3, 2, 1] and batch.actions.shape == (3, 3, 7)
    here, ahead = features.gather(["a"], ["a-0"])[0], features.gather(["b"], ["b-0"])[0]
    # To the right, as one looks: view 15, direction straight ahead; the other way is view 12.
    np.testing.assert_allclose(batch.actions[0, 0], [*here[15], 0, 1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(batch.actions[1, 0], [*ahead[12], 0, 1, 0, 1], atol=1e-6)
    assert not batch.actions[0, 2].any() and not batch.actions[1, 1:].any() and not batch.actions[2].any()
    np.testing.assert_array_equal(batch.panoramas[0, 0, :, :3], here)
    np.testing.assert_allclose(batch.panoramas[0, 0, 15, 3:], [0, 1, 0, 1], atol=1e-6)
    assert batch.panoramas[0, 2].any() and not batch.panoramas[1, 2].any()


# ---- released files


def row(length=5, **changes):
    poses = [["house", f"house-{number}", 15, 1.5708, 0.0][:length] for number in range(3)]
    value = {
        "instr_id": "7_0", "instr_encoding": [101, 9, 102, 0], "path": poses, "teacher_actions": [1, 2, 0],
        "teacher_action_emd": [[15, 0.0, 0.1], [3, 0.2, 0.0], [-1, 90, 90]],
    }  # fmt: skip
    return value | changes


@pytest.mark.parametrize("length", [3, 5])
def test_released_rows_of_both_lengths_are_read(tmp_path, length):
    path = tmp_path / "triplets.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump([row(length), row(length, instr_id="7_1", instr_encoding=[101, 102])], file)
    found = read_released(path, house())
    assert found.instruction_ids == ("7_0", "7_1")
    assert found.token_ids.tolist() == [[101, 9, 102, 0], [101, 102, 0, 0]]
    assert isinstance(found.triplets, Triplets)
    assert [column.tolist() for column in found.triplets] == [
        [0, 1, 2] * 2, [15] * 6, [1, 2, 0] * 2, [15, 3, -1] * 2, [0, 0, 0, 1, 1, 1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds a JSON dict, expected a list"),
        ([{"path": []}], "object 0 lacks the field 'teacher_actions'"),
        ([row(4)], "object 0 is not as expected: a row of path has 4 values, expected 3 or 5"),
        ([row(teacher_actions=[1])], "it has 3 rows of path, 1 teacher_actions and 3 teacher_action_emd"),
        ([row(teacher_actions=[1, -2, 0])], "view 15, action -2, towards view 3: out of their range"),
        ([row(), row(path=[["other", "x", 0]] * 3)], "object 1 is not as expected: scan other is not loaded"),
    ],
)
def test_a_released_file_that_is_not_as_expected_is_refused(tmp_path, content, message):
    (tmp_path / "odd.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_released(tmp_path / "odd.json", house())


def test_view_labels_do_not_change_when_world_and_agent_turn_together():
    random = np.random.default_rng(0)
    ahead, target = random.integers(36, size=500), random.integers(-1, 36, size=500)

    def labels(turn):
        def turned(view):
            return np.where(view < 0, -1, view // 12 * 12 + (view + turn) % 12)

        blank = np.zeros(500, dtype=np.int32)
        return Triplets(blank, turned(ahead), blank, turned(target), blank).labels("view")

    assert np.array_equal(labels(0), labels(5)) and not np.array_equal(
        labels(0), np.where(target < 0, 36, target)
    )
    assert set(labels(0)[target < 0]) == {36}
