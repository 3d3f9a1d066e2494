"""The command that checks and scores submissions, and the items it reads."""

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from navigation_cases import house, write_connectivity

from vln import evaluate
from vln.data import read_hanna, read_ndh, read_r2r
from vln.submission import Pose, Prediction, write_submission

SHARED = Path(__file__).parents[2] / "shared"

R2R = [
    {"path_id": 4, "scan": "house", "heading": 1.0, "path": ["house-0", "house-1", "house-2"],
     "distance": 3.83, "instructions": ["go", "walk"]},
    {"path_id": 9, "scan": "house", "heading": 0.0, "path": ["house-2", "house-4"], "distance": 1.92,
     "instructions": ["stop"]},
]  # fmt: skip
TEST = [
    {key: value for key, value in row.items() if key != "distance"} | {"path": row["path"][:1]} for row in R2R
]
NDH = [
    {"inst_idx": 3, "scan": "house", "start_pano": {"pano": "house-0", "heading": 0.5, "elevation": 17.5},
     "end_panos": ["house-5", "house-6"], "planner_path": ["house-0", "house-1", "house-2"],
     "player_path": ["house-0", "house-3", "house-2", "house-4"], "target": "sofa"},
]  # fmt: skip
HANNA = [
    {
        "path_id": "t",
        "scan": "house",
        "heading": 0.0,
        "paths": [["house-0", "house-1"]],
        "instructions": ["find"],
    }
]


@pytest.fixture
def data(tmp_path):
    """A data folder: graphs and R2R unpacked, NDH in an archive, HANNA beside them."""
    folder = tmp_path / "data"
    write_connectivity(folder / "connectivity", house())
    (folder / "r2r").mkdir()
    (folder / "r2r" / "R2R_val_seen.json").write_text(json.dumps(R2R))
    (folder / "r2r" / "R2R_test.json").write_text(json.dumps(TEST))
    (tmp_path / "val_seen.json").write_text(json.dumps(NDH))
    with tarfile.open(folder / "ndh.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "val_seen.json", "ndh/val_seen.json")
    (folder / "hanna_val_seen.json").write_text(json.dumps(HANNA))
    return folder


def trajectory(*numbers):
    return [[f"house-{number}", 0.0, 0.0] for number in numbers]


def rows(**trajectories):
    return [
        {"instr_id": name.removeprefix("i"), "trajectory": trajectory(*t)} for name, t in trajectories.items()
    ]


GOOD = rows(i4_0=(0, 1, 2), i4_1=(0, 3), i9_0=(2, 4, 4))


def run(capsys, data, submission, *arguments):
    path = data.parent / "mine.json"
    path.write_text(json.dumps(submission))
    evaluate.main([str(path), "--data", str(data), "--split", "val_seen", *arguments])
    return capsys.readouterr().out.splitlines()


def refused(capsys, data, submission, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(capsys, data, submission, *arguments)
    return str(stop.value)


def test_r2r_is_scored_printed_and_written(capsys, data):
    lines = run(capsys, data, GOOD)
    assert lines[0] == "r2r val_seen: 3 items, nothing to refuse"
    names, values = lines[1].replace(" %", "").split(), lines[2].split()
    assert names == ["TL", "NE", "OSR", "SR", "SPL", "nDTW", "SDTW", "CLS"] and values[0] == "r2r"
    result = json.loads((data.parent / "mine.json.scores.json").read_text())
    means = result["scores"]["r2r"]
    assert [f"{means['length']:.2f}", f"{100 * means['success']:.2f}"] == [values[1], values[4]]
    assert result["items"]["r2r"]["4_0"]["spl"] == 1 and result["items"]["r2r"]["9_0"]["steps"] == 2
    assert means["spl"] == pytest.approx(sum(i["spl"] for i in result["items"]["r2r"].values()) / 3)
    assert result["provenance"]["seed"] == 0 and result["num_items"] == 3


def test_ndh_is_scored_for_all_path_types(capsys, data):
    submission = [{"inst_idx": 3, "trajectory": trajectory(0, 1, 2, 4)}]
    lines = run(capsys, data, submission, "--out", str(data.parent / "scores.json"))
    assert [line.split()[0] for line in lines[2:5]] == ["planner_path", "player_path", "trusted_path"]
    scores = json.loads((data.parent / "scores.json").read_text())["scores"]
    assert scores["player_path"]["nav_error"] == 0 < scores["planner_path"]["nav_error"]
    assert len({scores[name]["goal_progress"] for name in scores}) == 1


def test_hanna_is_scored(capsys, data):
    submission = [{"instr_id": "t_0", "agent_pose": trajectory(0, 1), "agent_ask": [0], "agent_nav": [1],
                   "target_viewpoints": [["house-1"], ["house-1"]]}]  # fmt: skip
    lines = run(capsys, data, submission)
    assert lines[0].startswith("hanna val_seen: 1 items") and lines[2].split()[4:6] == ["100.00", "100.00"]


def test_a_test_split_is_checked_and_not_scored(capsys, data):
    lines = run(capsys, data, GOOD, "--split", "test")
    assert lines == [
        "r2r test: 3 items, nothing to refuse",
        "the items have starts alone: checked, not scored",
    ]
    assert not (data.parent / "mine.json.scores.json").exists()
    assert "4_1: is missing" in refused(capsys, data, GOOD[::2], "--split", "test")


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (GOOD[:2], "would be refused (1 missing):\n  9_0: is missing"),
        ([*GOOD, GOOD[0], GOOD[1]], "(2 doubled):\n  4_0: occurs 2 times\n  4_1: occurs 2 times"),
        (GOOD + rows(i7_0=(0,)), "(1 unknown):\n  7_0: is unknown"),
        ([GOOD[0], *rows(i4_1=(0, 2)), GOOD[2]], "(1 gap):\n  4_1: has a gap at step 1"),
        ([*rows(**{f"i{n}_0": (0,) for n in range(20, 35)})], "(3 missing, 15 unknown):"),
    ],
)
def test_what_a_leaderboard_would_refuse_is_refused(capsys, data, submission, message):
    text = refused(capsys, data, submission)
    assert text.startswith("error: ") and message in text
    assert len(text.splitlines()) <= 12
    assert not (data.parent / "mine.json.scores.json").exists()


def test_lenient_scores_as_the_first_evaluators_do(capsys, data):
    odd = [*rows(i4_0=(0, 2)), GOOD[0], *GOOD[1:], *rows(i7_0=(0,))]
    lines = run(capsys, data, odd, "--lenient")
    assert lines[0] == "r2r val_seen: 3 items, 3 faults passed over"
    item = json.loads((data.parent / "mine.json.scores.json").read_text())["items"]["r2r"]["4_0"]
    assert item["steps"] == 1 and item["length"] == item["shortest_length"]
    assert "1 of 3 are missing, 9_0 first" in refused(capsys, data, odd[:3], "--lenient")


def test_deduplicate_reaches_the_scores(capsys, data):
    turning = [GOOD[0], *rows(i4_1=(0, 3, 3, 3)), GOOD[2]]
    run(capsys, data, turning)
    first = json.loads((data.parent / "mine.json.scores.json").read_text())["items"]["r2r"]["4_1"]
    run(capsys, data, turning, "--deduplicate")
    second = json.loads((data.parent / "mine.json.scores.json").read_text())["items"]["r2r"]["4_1"]
    assert first["ndtw"] < second["ndtw"] and first["spl"] == second["spl"]


def test_missing_files_are_named(capsys, data):
    assert "no R2R_val_unseen.json: looked for" in refused(capsys, data, GOOD, "--split", "val_unseen")
    assert "absent.json does not exist" in refused(capsys, data, GOOD, "--items", "absent.json")
    for path in (data / "connectivity").iterdir():
        path.unlink()
    assert "no connectivity files at" in refused(capsys, data, GOOD)


def test_items_and_graphs_can_be_named_apart(capsys, data, tmp_path):
    items = data / "r2r" / "R2R_val_seen.json"
    graphs = (data / "connectivity").rename(tmp_path / "elsewhere")
    lines = run(capsys, data, GOOD, "--items", str(items), "--graphs", str(graphs))
    assert lines[0].endswith("R2R_val_seen.json: 3 items, nothing to refuse")


# ---- items


def test_items_are_read_from_files_folders_and_archives(data):
    items = read_r2r(data, "val_seen")
    assert items == read_r2r(data / "r2r" / "R2R_val_seen.json")
    assert items[0].path == ("house-0", "house-1", "house-2") and items[0].instruction_ids == ("4_0", "4_1")
    assert (items[0].distance, items[0].heading, items[1].scan_id) == (3.83, 1.0, "house")
    assert read_r2r(data, "test")[0].distance is None
    dialogue = read_ndh(data, "val_seen")[0]
    assert (dialogue.start, dialogue.heading, dialogue.end_panos) == ("house-0", 0.5, ("house-5", "house-6"))
    assert dialogue.trusted_path == dialogue.player_path
    assert read_hanna(data, "val_seen")[0].paths == (("house-0", "house-1"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"path_id": 1', r"R2R_x\.json is not valid JSON, perhaps cut short"),
        ("{}", r"R2R_x\.json holds a JSON dict, expected a list of items"),
        ('[{"path_id": 1}]', r"R2R_x\.json: item 0 lacks the field 'scan'"),
        ("[3]", r"R2R_x\.json: item 0 is not as expected"),
        (
            '[{"path_id": 1, "scan": "s", "heading": "north", "path": [], "instructions": []}]',
            "item 0 is not as",
        ),
    ],
)
def test_a_bad_item_is_named(tmp_path, content, message):
    (tmp_path / "R2R_x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_r2r(tmp_path, "x")


def test_standing_agents_are_accepted_on_the_real_test_split(capsys, tmp_path):
    data = SHARED / "data" / "vln"
    if not data.is_dir():
        pytest.skip(f"{data} is not here")
    items = read_r2r(data, "test")
    rows = [
        Prediction(name, (Pose(item.path[0], item.heading, 0.0),))
        for item in items
        for name in item.instruction_ids
    ]
    write_submission(tmp_path / "test.json", rows)
    evaluate.main([str(tmp_path / "test.json"), "--data", str(data), "--split", "test"])
    assert capsys.readouterr().out.startswith("r2r test: 4173 items, nothing to refuse\n")


def test_the_published_agent_scores_as_it_was_published(capsys, tmp_path):
    golden = SHARED / "golden" / "vln" / "r2r_val_seen_agent.json.gz"
    if not golden.is_file():
        pytest.skip(f"{golden} is not here")
    submission = json.loads(gzip.decompress(golden.read_bytes()))["predictions"]
    (tmp_path / "agent.json").write_text(json.dumps(submission))
    evaluate.main(
        [str(tmp_path / "agent.json"), "--data", str(SHARED / "data" / "vln"), "--split", "val_seen"]
    )
    values = capsys.readouterr().out.splitlines()[2].split()[1:]
    assert values == ["10.30", "3.32", "72.58", "66.11", "63.07", "74.73", "60.03", "73.23"]
