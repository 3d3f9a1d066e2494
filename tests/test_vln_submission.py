"""Submissions: written, read, and refused for what a leaderboard would refuse."""

import json
import math

import pytest
from navigation_cases import house

from vln.data import HannaTask, NDHItem, R2RItem
from vln.metrics import HannaResult
from vln.submission import Pose, Prediction, find_faults, read_submission, write_submission

GRAPHS = {"house": house()}
ITEMS = [
    R2RItem(4, "house", 0.0, ("house-0", "house-1"), ("go", "walk"), 2.0),
    R2RItem(9, "house", 0.0, ("house-2",), ("stop",), None),
]


def row(name, *numbers):
    return Prediction(name, tuple(Pose(f"house-{number}", 0.5, -0.25) for number in numbers))


GOOD = [row("4_0", 0, 1, 1), row("4_1", 0), row("9_0", 2, 4, 5, 6)]


def written(tmp_path, rows):
    path = tmp_path / "submission.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


def faults(tmp_path, rows, items=ITEMS):
    write_submission(tmp_path / "s.json", rows)
    found = find_faults(read_submission(tmp_path / "s.json"), items, GRAPHS)
    return [(fault.kind, str(fault)) for fault in found]


def test_a_submission_is_written_in_the_published_form_and_read_back(tmp_path):
    path = tmp_path / "s.json"
    write_submission(path, GOOD)
    assert json.loads(path.read_text())[1] == {"instr_id": "4_1", "trajectory": [["house-0", 0.5, -0.25]]}
    back = read_submission(path)
    assert back.task == "r2r" and back.predictions == GOOD and back.hanna == []
    assert back.paths["9_0"] == ["house-2", "house-4", "house-5", "house-6"]
    write_submission(path, [row(17, 0)])
    assert json.loads(path.read_text()) == [{"inst_idx": 17, "trajectory": [["house-0", 0.5, -0.25]]}]
    assert read_submission(path).task == "ndh"
    assert [left.name for left in tmp_path.iterdir()] == ["s.json"]


def test_hanna_results_are_read_with_requests_and_targets(tmp_path):
    rows = [
        {
            "instr_id": "t_0",
            "agent_pose": [["house-0", 0.0, 0.0], ["house-1", 0.0, 0.0]],
            "agent_ask": [1],
            "agent_nav": [-1],
            "target_viewpoints": [["house-1"], ["house-2", "house-3"]],
        }
    ]
    back = read_submission(written(tmp_path, rows))
    expected = HannaResult(("house-0", "house-1"), (1,), (-1,), (("house-1",), ("house-2", "house-3")))
    assert back.task == "hanna" and back.results == {"t_0": expected}
    task = HannaTask("t", "house", 0.0, (("house-0", "house-2"),), ("find it",))
    assert find_faults(back, [task], GRAPHS) == []


def test_the_first_of_doubled_rows_counts(tmp_path):
    rows = [{"instr_id": "a", "trajectory": [[name, 0, 0]]} for name in ("x", "y")]
    assert read_submission(written(tmp_path, rows)).paths == {"a": ["x"]}


def test_a_good_submission_has_no_faults(tmp_path):
    assert faults(tmp_path, GOOD) == []
    dialogue = NDHItem(17, "house", "house-0", 0.0, (), (), ())
    assert faults(tmp_path, [row(17, 0, 3)], [dialogue]) == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (GOOD[:2], [("missing", "9_0: is missing")]),
        ([*GOOD, GOOD[0]], [("doubled", "4_0: occurs 2 times")]),
        ([*GOOD, row("5_0", 0)], [("unknown", "5_0: is unknown: no item of the split has this id")]),
        ([row("4_0", 1), *GOOD[1:]],
         [("start", "4_0: begins at house-1, expected the item's start house-0")]),
        ([row("4_0", 0, 1, 3), *GOOD[1:]],
         [("gap", "4_0: has a gap at step 2: one cannot walk from house-1 to house-3")]),
        ([row("4_0", 0, 8), *GOOD[1:]],
         [("graph", "4_0: step 1: viewpoint house-8 of scan house is excluded")]),
        ([row("4_0", 0, 12), *GOOD[1:]],
         [("graph", "4_0: step 1: scan house has no viewpoint house-12 among its 9")]),
    ],
)  # fmt: skip
def test_each_fault_is_named_alone(tmp_path, rows, expected):
    assert faults(tmp_path, rows) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[{]", r"submission\.json is not valid JSON"),
        ([], "holds no list of predictions"),
        ({"a": 1}, "holds no list of predictions"),
        ([{"path_id": 1}], "row 0 has path_id; expected instr_id or inst_idx"),
        ([{"instr_id": "a"}], "row 0 lacks the field 'trajectory'"),
        ([{"instr_id": "a", "trajectory": []}], "row 0: the trajectory is empty"),
        (
            [{"instr_id": "a", "trajectory": ["x"]}],
            r"row 0: step 0 is x, expected \[viewpoint id, heading, elevation\]",
        ),
        ([{"instr_id": "a", "trajectory": [["x", 0]]}], "row 0: step 0 is"),
        ([{"instr_id": "a", "trajectory": [["x", 0, "up"]]}], "row 0: step 0 is"),
        ([{"instr_id": "a", "trajectory": [["x", 0, math.nan]]}], "row 0: step 0 is"),
        ([{"inst_idx": "a", "trajectory": [["x", 0, 0]]}], "row 0: invalid literal"),
        ([{"instr_id": "a", "agent_pose": [["x", 0, 0]]}], "row 0 lacks the field 'agent_ask'"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_submission(written(tmp_path, rows))


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json does not exist"):
        read_submission(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="0 predictions with ids of 0 kinds"):
        write_submission(tmp_path / "s.json", [])
    with pytest.raises(ValueError, match="2 predictions with ids of 2 kinds"):
        write_submission(tmp_path / "s.json", [row("4_0", 0), row(4, 0)])
    with pytest.raises(ValueError, match="4_0: an angle of the trajectory is not finite"):
        write_submission(tmp_path / "s.json", [Prediction("4_0", (Pose("house-0", math.inf, 0.0),))])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        write_submission(tmp_path / "nowhere" / "s.json", GOOD)
    write_submission(tmp_path / "s.json", GOOD)
    good = read_submission(tmp_path / "s.json")
    with pytest.raises(ValueError, match="the submission is for r2r but the items are NDHItems"):
        find_faults(good, [NDHItem(1, "house", "house-0", 0.0, (), (), ())], GRAPHS)
    with pytest.raises(ValueError, match="no graph of scan house"):
        find_faults(good, ITEMS, {})
