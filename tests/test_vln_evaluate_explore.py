"""Pre-exploration: scans are explored, items are not looked at, and the scores are named."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_agents import NDHFollower
from tiny_vln import grid, write_folder
from tiny_walkers import refused, run_walk, write_agent, write_speaker

from fq.run import RunFolder, read_metrics
from vln.agent_folder import load_agent
from vln.augment_paths import PathSource
from vln.data import read_r2r
from vln.evaluate_config import EvaluateConfig, SettingConfig
from vln.evaluate_explore import explore, lessons
from vln.navgraph import load_graphs
from vln.pretrain_data import RandomFeatures
from vln.surroundings import Surroundings
from vln.train_config import HOUSES, PAPER, LearnConfig
from vln.world import World

LEARN = LearnConfig(
    reinforce=True, imitation_weight=0.2, batch_size=4, max_steps=6, optimiser="adamw", lr=1e-3, tune="cross",
    tune_from=7, tune_lr=1e-2,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world", per_scan=2)


def write_run(folder):
    """A run of `vln.train`, as far as it is looked at."""
    folder.mkdir()
    write_agent(folder / "best")
    (folder / "config.json").write_text(json.dumps(asdict(replace(HOUSES, learn=LEARN))))
    return folder


def explored(capsys, data, run, speaker, out, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = ("--explore", 3, "--explore-paths", 6, "--speaker", speaker, "--submission-out", out)
    return run_walk(capsys, data, run, *given, *options)


def weights(exploration):
    return load_agent(exploration / "run").agent.state_dict()


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_only_the_scans_of_a_split_reach_what_is_learnt(data, tmp_path, capsys):
    """With all paths, goals, headings and instructions of the split changed the agent learns the same."""
    run, speaker = write_run(tmp_path / "run"), write_speaker(tmp_path / "speaker")
    before = load_agent(run).agent.state_dict()
    lines = explored(capsys, data, run, speaker, tmp_path / "one.json")
    assert any(line == "r2r val_seen, pre-explored: 8 items, nothing to refuse" for line in lines)
    assert lines[-2] == "setting pre-explored: not to be compared with scores of another setting"
    first = tmp_path / "one.json.exploration"
    changed = weights(first)
    assert not same(before, changed) and same(before, load_agent(run).agent.state_dict())

    other = write_folder(tmp_path / "other", seed=5, per_scan=2)
    for row in (rows := json.loads((other / "R2R_val_seen.json").read_text())):
        row.update(heading=1.0, instructions=["stop stop stop"] * 2)
    (other / "R2R_val_seen.json").write_text(json.dumps(rows))
    ours, theirs = (read_r2r(folder, "val_seen") for folder in (data, other))
    assert not {item.path for item in ours} & {item.path for item in theirs}
    assert {item.scan_id for item in ours} == {item.scan_id for item in theirs}
    explored(capsys, other, run, speaker, tmp_path / "two.json")
    second = tmp_path / "two.json.exploration"
    for name in ("R2R_explored.json", "connectivity/a_connectivity.json", "identity.json"):
        assert (first / "data" / name).read_bytes() == (second / "data" / name).read_bytes()
    assert same(changed, weights(second))

    # What it learnt from: nothing but this folder, and in it paths of the scans as the speaker says them.
    config = json.loads((first / "run" / "config.json").read_text())
    assert config["items"]["data"] == str(first / "data") and config["items"]["extra"] == []
    assert (config["items"]["split"], config["items"]["val_splits"]) == ("explored", ["explored"])
    assert {path.name for path in (first / "data").iterdir()} == {
        "R2R_explored.json", "connectivity", "tokenizer", "identity.json"
    }  # fmt: skip
    graphs = load_graphs(data, ["a", "b"])
    assert {scan: graph.distances.tolist() for scan, graph in load_graphs(first / "data").items()} == {
        scan: graph.distances.tolist() for scan, graph in graphs.items()
    }
    source = PathSource(graphs)
    possible = {path.path for path in source.sample(len(source), seed=0)}
    items = read_r2r(first / "data", "explored")
    assert len(items) == 6 and {item.path for item in items} <= possible
    said = {text for item in items for text in item.instructions}
    assert not said & {text for item in ours for text in item.instructions}


def test_it_learns_as_in_its_own_run_but_by_imitation_alone(data, tmp_path, capsys):
    run = write_run(tmp_path / "run")
    expected = replace(LEARN, reinforce=False, imitation_weight=1.0, tune_from=0, lr=1e-2)
    assert lessons(load_agent(run)) == expected
    assert lessons(load_agent(run), rate=0.5) == replace(expected, lr=0.5, tune_lr=0.5)
    frozen = replace(HOUSES, learn=replace(LEARN, tune="none"))
    (run / "config.json").write_text(json.dumps(asdict(frozen)))
    assert lessons(load_agent(run)).lr == 1e-3
    alone = load_agent(write_agent(tmp_path / "alone"))
    assert lessons(alone) == replace(PAPER.learn, reinforce=False, imitation_weight=1.0, tune_from=0, lr=2e-6)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another version"):
        lessons(load_agent(run))


def test_an_interrupted_exploration_goes_on_to_the_same_agent(data, tmp_path, capsys, monkeypatch):
    run, speaker = write_run(tmp_path / "run"), write_speaker(tmp_path / "speaker")
    explored(capsys, data, run, speaker, tmp_path / "whole.json")
    save = RunFolder.save

    def killed(self, step, **options):
        if step == 3:
            raise KeyboardInterrupt
        return save(self, step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            explored(capsys, data, run, speaker, tmp_path / "parts.json")
    assert not (tmp_path / "parts.json").exists()
    lines = explored(capsys, data, run, speaker, tmp_path / "parts.json")
    assert any(line.startswith("resuming explored at step 2") for line in lines)
    whole, parts = (tmp_path / f"{name}.json.exploration" for name in ("whole", "parts"))
    assert same(weights(whole), weights(parts))
    assert [row["step"] for row in read_metrics(parts / "run") if "loss" in row] == [1, 2, 3]
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "parts.json").read_bytes()


def test_an_exploration_of_another_kind_is_not_taken_for_this_one(data, tmp_path, capsys):
    run, speaker = write_run(tmp_path / "run"), write_speaker(tmp_path / "speaker")
    folder = tmp_path / "mine.json.exploration"
    (folder / "data").mkdir(parents=True)
    given = ("--explore", 3, "--speaker", speaker, "--submission-out", tmp_path / "mine.json")
    assert "identity.json is missing or damaged: delete" in refused(capsys, data, run, *given)
    (folder / "data" / "identity.json").write_text('{"steps": 3}')
    text = refused(capsys, data, run, *given)
    assert "another kind (agent, speaker, features, paths, learn differ)" in text


def test_what_cannot_be_explored_is_refused(data, tmp_path, capsys):
    speaker = write_speaker(tmp_path / "speaker")
    other = write_agent(tmp_path / "ndh", kind=NDHFollower, task="ndh")
    text = refused(capsys, data, other, "--explore", 2, "--speaker", speaker)
    assert "holds an agent for ndh: pre-explored is for those of R2R" in text
    world = World([grid("a", width=2, height=2)])
    place = Surroundings(world, RandomFeatures(world, 6), angle_size=4, orientation="blocks")
    config = EvaluateConfig(submission="x", setting=SettingConfig(explore=2, speaker="x"))
    with pytest.raises(ValueError, match="none of 1 scans has a path of 5 m and 4 to 6 edges"):
        explore(config, load_agent(write_agent(tmp_path / "alone")), place, None, None, tmp_path / "out")
