"""Agents that walk a split greedily or by search, and how their scores are named."""

import json
from collections import Counter

import pytest
from tiny_agents import NDHFollower
from tiny_vln import write_folder
from tiny_walkers import refused, run_score, run_walk, write_agent, write_speaker

from vln import evaluate
from vln.data import read_r2r
from vln.evaluate_config import EvaluateConfig, SettingConfig, WalkConfig
from vln.evaluate_provenance import provenance_file, setting_of
from vln.submission import read_submission

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


def visits(path):
    return [
        Counter(pose.viewpoint_id for pose in row.trajectory) for row in read_submission(path).predictions
    ]


def test_search_walks_much_more_and_is_named(data, tmp_path, capsys):
    agent, speaker = write_agent(tmp_path / "agent"), write_speaker(tmp_path / "speaker")
    greedy = run_walk(capsys, data, agent)
    assert greedy[1] == "r2r val_seen, greedy: 8 items, nothing to refuse"
    searched = run_walk(capsys, data, agent, "--search", 3, "--speaker", speaker)
    assert searched[1] == "r2r val_seen, search: 8 items, nothing to refuse"
    assert searched[-2] == "setting search: not to be compared with scores of another setting"
    results = [
        json.loads((agent / f"val_seen{ending}.json.scores.json").read_text()) for ending in ("", ".search")
    ]
    assert [result["setting"] for result in results] == ["greedy", "search"]
    lengths = [result["scores"]["r2r"]["length"] for result in results]
    assert lengths[1] > 2 * lengths[0] and results[1]["scores"]["r2r"]["spl"] < 0.3
    starts = {name: item.path[0] for item in read_r2r(data, "val_seen") for name in item.instruction_ids}
    for row in read_submission(agent / "val_seen.search.json").predictions:
        # Back at the start before the chosen route is walked.
        places = [pose.viewpoint_id for pose in row.trajectory]
        assert places[0] == starts[row.item_id] and row.trajectory[0].heading == 0.5
        assert places.count(starts[row.item_id]) > 1


def test_speaker_weight_and_expansions_reach_the_search(data, tmp_path, capsys):
    agent, speaker = write_agent(tmp_path / "agent"), write_speaker(tmp_path / "speaker")
    ends = {}
    for weight in ("0", "1"):
        run_walk(capsys, data, agent, "--search", 6, "--speaker", speaker, "--speaker-weight", weight)
        rows = read_submission(agent / "val_seen.search.json").predictions
        ends[weight] = [row.trajectory[-1].viewpoint_id for row in rows]
    run_walk(capsys, data, agent, "--search", 6)
    rows = read_submission(agent / "val_seen.search.json").predictions
    assert [row.trajectory[-1].viewpoint_id for row in rows] == ends["0"] != ends["1"]
    whole = visits(agent / "val_seen.search.json")
    run_walk(capsys, data, agent, "--search", 6, "--max-expansions", 1)
    few = visits(agent / "val_seen.search.json")
    assert all(sum(a.values()) < sum(b.values()) for a, b in zip(few, whole, strict=True))


def test_instructions_that_are_read_together_are_searched_once(data, tmp_path, capsys):
    agent = write_agent(tmp_path / "agent", num_instructions=3)
    run_walk(capsys, data, agent, "--search", 2, "--speaker", write_speaker(tmp_path / "speaker"))
    rows = {
        row.item_id: row.trajectory for row in read_submission(agent / "val_seen.search.json").predictions
    }
    items = read_r2r(data, "val_seen")
    assert set(rows) == {name for item in items for name in item.instruction_ids}
    assert all(rows[item.instruction_ids[0]] == rows[item.instruction_ids[1]] for item in items)


def test_a_setting_is_known_of_the_very_submission_alone(data, tmp_path, capsys):
    agent = write_agent(tmp_path / "agent")
    run_walk(capsys, data, agent, "--search", 2)
    submission = agent / "val_seen.search.json"
    assert setting_of(submission) == "search"
    record = json.loads(provenance_file(submission).read_text())
    assert record["config"]["setting"]["search"] == 2
    alone = run_score(capsys, data, submission)
    assert alone[0] == "r2r val_seen, search: 8 items, nothing to refuse"
    submission.write_text(submission.read_text() + " ")
    assert setting_of(submission) is None
    assert run_score(capsys, data, submission)[0] == "r2r val_seen: 8 items, nothing to refuse"
    provenance_file(submission).write_text("{")
    with pytest.raises(SystemExit, match=r"provenance\.json is damaged: delete it"):
        run_score(capsys, data, submission)


def test_what_search_is_not_for_is_refused(data, tmp_path, capsys):
    agent = write_agent(tmp_path / "agent")
    narrow = write_speaker(tmp_path / "narrow", width=5)
    text = refused(capsys, data, agent, "--search", 2, "--speaker", narrow)
    assert "the speaker was trained with 5 features a view but random:6 has 6" in text
    assert "nowhere holds no speaker" in refused(capsys, data, agent, "--search", 2, "--speaker", "nowhere")
    released = tmp_path / "released"
    released.write_bytes(b"odd")
    text = refused(capsys, data, agent, "--search", 2, "--speaker", released)
    assert "released is a file: make a folder of it first, python -m vln.convert speaker" in text
    other = write_agent(tmp_path / "ndh", kind=NDHFollower, task="ndh")
    assert "holds an agent for ndh: search is for those of R2R" in refused(capsys, data, other, "--search", 2)
    submission = tmp_path / "mine.json"
    submission.write_text("[]")
    assert "mine.json is no folder: search and" in refused(capsys, data, submission, "--search", 2)
    with pytest.raises(SystemExit, match="how to walk, are for a run of vln"):
        evaluate.main([str(submission), "--data", str(data), "--turns"])
    text = refused(capsys, data, agent, "--submission-out", tmp_path / "below" / "mine.json")
    assert "below does not exist: make it first" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": -1}, "search is -1: give at least 0"),
        ({"max_expansions": 0}, "max_expansions is 0: give at least 1"),
        ({"explore": -1}, "explore is -1: give at least 0"),
        ({"explore_paths": 0}, "explore_paths is 0: give at least 1"),
        ({"explore_lr": float("nan")}, "explore_lr is nan: give at least 0"),
        ({"search": 2, "explore": 3, "speaker": "x"}, "search is 2 and explore 3: these are two settings"),
        ({"explore": 3}, "explore is 3 but nobody describes the paths: give --speaker"),
        ({"explore_lr": 0.1}, r"explore_lr is 0\.1, which does nothing without --explore"),
        ({"search": 2, "speaker": "x", "speaker_weight": 2.0}, r"speaker_weight is 2\.0: give a share"),
        ({"search": 2, "speaker_weight": 0.5}, r"speaker_weight is 0\.5 but nobody ranks: give --speaker"),
        ({"speaker_weight": 0.5}, r"speaker_weight is 0\.5, which does nothing without --search"),
        ({"max_expansions": 9}, "max_expansions is 9, which does nothing without --search"),
        ({"explore_paths": 9}, "explore_paths is 9, which does nothing without --explore"),
        ({"speaker": "x"}, "the speaker x has nothing to do in a greedy walk"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SettingConfig(**options)
    with pytest.raises(ValueError, match="--avoid-loops and --turns are for single walks"):
        EvaluateConfig(submission="x", agent=WalkConfig(turns=True), setting=SettingConfig(search=2))
