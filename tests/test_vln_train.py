"""The agents' training command: resumed runs, two processes, stages, extra data, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import tiny_model, write_folder

from fq.run import RunFolder, checkpoint_tensors, newest_checkpoint, read_metrics
from vln import evaluate, pretrain_data, speaker_data, train
from vln.agent_data import make_split, pick_pairs, read_items
from vln.agent_folder import load_agent, trunk_of
from vln.data import R2RItem, read_r2r
from vln.evaluate_config import EvaluateConfig
from vln.model import Prevalent
from vln.pretrain_config import TripletsConfig
from vln.speaker_config import PathsConfig
from vln.submission import find_faults, read_submission
from vln.train_config import (
    HOUSES,
    PAPER,
    PRESETS,
    R4R,
    AgentConfig,
    ItemsConfig,
    LearnConfig,
    Training,
    WalkRunConfig,
)
from vln.train_setup import Best, build_agent, build_trunk, open_data, open_words, refuse_idle_processes

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "houses --features random:6 --hidden-size 16 --num-attention-heads 2 --intermediate-size 24"
    " --angle-size 4 --num-text-layers 1 --num-cross-layers 2 --max-position-embeddings 32 --max-tokens 12"
    " --trunk-dropout 0.1 --feature-scale 1 --initializer-range 0.02"
    " --encoder-hidden 8 --decoder-hidden 12 --action-embedding 4 --batch-size 6 --max-steps 6"
    " --eval-max-steps 6 --val-splits val_seen --select val_seen/spl --log-every 1 --maps 0"
).split()
NO_DROPOUT = (
    "--trunk-dropout 0 --encoder-dropout 0 --decoder-dropout 0 --feature-dropout 0".split()
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


def run_here(data, out, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [*SMALL, "--data", str(data), "--out", str(out), *map(str, options)]
    train.train(train.parse(given))
    return read_metrics(out)


def untimed(records):
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def test_a_run_leaves_an_agent_submissions_scores_and_maps(data, tmp_path, capsys):
    out = tmp_path / "run"
    records = run_here(data, out, "--steps", 4, "--eval-every", 2, "--reinforce", "--maps", 2)
    assert "episodes of 2 scans" in capsys.readouterr().out
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    assert {"imitation_loss", "policy_loss", "value_loss", "entropy", "reward", "grad_norm"} <= set(losses[0])
    scores = [record for record in records if "val_seen/spl" in record]
    assert [record["step"] for record in scores] == [2, 4]
    items = read_r2r(data, "val_seen")
    opened = open_data(ItemsConfig(data=str(data), features="random:6", val_splits=("val_seen",)))
    for name in ("best", "last"):
        submission = read_submission(out / "samples" / f"{name}_val_seen.json")
        assert find_faults(submission, items, opened.world.graphs) == []
    written = json.loads((out / "samples" / "last_scores.json").read_text())
    assert written["scores"]["val_seen"]["spl"] == scores[-1]["val_seen/spl"] and written["step"] == 4
    assert len(list((out / "samples" / "maps").glob("val_seen_*.png"))) == 2
    loaded = load_agent(out)
    assert (loaded.task, loaded.feature_size, loaded.reading.max_tokens) == ("r2r", 6, 12)
    assert not loaded.agent.training


@pytest.mark.parametrize("stages", [(), ("--tune-from", "3", "--reinforce")])
def test_a_killed_run_resumes_to_the_bit(data, tmp_path, monkeypatch, stages):
    options = ("--steps", 6, "--checkpoint-every", 2, "--eval-every", 2, *stages)
    whole = run_here(data, tmp_path / "whole", *options)
    save = RunFolder.save

    def killed(self, step, **kwargs):
        if step == 6:
            raise KeyboardInterrupt
        return save(self, step, **kwargs)

    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_here(data, tmp_path / "parts", *options)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    parts = run_here(data, tmp_path / "parts", *options)
    assert untimed(parts) == untimed(whole)
    ours, theirs = (load_agent(tmp_path / name).agent.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_two_processes_repeat_the_losses_and_scores_of_one(data, tmp_path):
    options = (*NO_DROPOUT, "--steps", 10, "--eval-every", 5, "--reinforce")
    one = run_here(data, tmp_path / "one", *options)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "vln.train", *SMALL, "--data", str(data)]
    command += ["--out", str(tmp_path / "pair"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    two = read_metrics(tmp_path / "pair")
    assert len(one) == len(two)
    for ours, theirs in zip(untimed(one), untimed(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert theirs[name] == pytest.approx(ours[name], rel=5e-4, abs=5e-5), (name, ours["step"])


def test_a_stage_of_its_own_tunes_the_pre_trained_model(data, tmp_path):
    """Frozen it stays as it was; tuned, the cross layers change and the words do not."""
    tiny_model(Prevalent, vocab_size=len(words(data))).save_pretrained(tmp_path / "model")
    start = Prevalent.from_pretrained(tmp_path / "model").state_dict()
    options = ("--pretrained", tmp_path / "model", "--eval-every", 1, "--steps", 2)
    run_here(data, tmp_path / "frozen", *options, "--tune", "none")
    frozen = trunk_of(load_agent(tmp_path / "frozen").agent).state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in start.items())
    run_here(data, tmp_path / "tuned", *options, "--tune", "cross", "--tune-lr", 0.01, "--select",
             "val_seen/length")  # fmt: skip
    # The last agent, whichever is the best.
    tensors = checkpoint_tensors(newest_checkpoint(tmp_path / "tuned"))
    changed = {
        name for name, value in start.items() if not torch.equal(tensors[f"encoder.trunk.{name}"], value)
    }
    assert any("cross_layers" in name for name in changed) and "view_projection.weight" in changed
    assert not any(name.startswith(("embeddings", "text_layers")) for name in changed)


def words(data):
    return open_words(ItemsConfig(data=str(data)))


def test_the_second_stage_begins_with_the_best_agent():
    agent = torch.nn.Linear(1, 1)
    best = Best(agent)
    first = agent.weight.detach().clone()
    assert best.update(agent, 0.5, 10)
    with torch.no_grad():
        agent.weight.add_(1)
    assert not best.update(agent, 0.5, 20) and not best.update(agent, float("nan"), 30)
    assert torch.equal(best.agent.weight, first) and (float(best.score), int(best.step)) == (0.5, 10)
    assert not any(p.requires_grad for p in best.parameters())


def test_extra_data_are_learnt_from_under_a_mask_of_the_environment(data, tmp_path, monkeypatch):
    masks = []
    plain = train.WalkTask.lessons.__globals__["rollout"]

    def spy(*args, **kwargs):
        if "keep" in kwargs:  # not an evaluation
            masks.append(None if kwargs["keep"] is None else tuple(kwargs["keep"]))
        return plain(*args, **kwargs)

    monkeypatch.setitem(train.WalkTask.lessons.__globals__, "rollout", spy)
    records = run_here(
        data, tmp_path / "run", "--steps", 2, "--extra", data / "R2R_val_seen.json", "--reinforce",
        "--feature-dropout", 0.5, "--eval-every", 0,
    )  # fmt: skip
    assert {"extra_imitation_loss", "extra_reward", "imitation_loss"} <= set(records[0])
    assert [mask is None for mask in masks] == [True, True, False, False] * 2
    assert masks[2] == masks[3] != masks[6] == masks[7] and set(masks[2]) <= {0.0, 2.0}
    # An agent that is taken over brings its own share, whatever the options say.
    run_here(data, tmp_path / "more", "--steps", 1, "--extra", data / "R2R_val_seen.json", "--reinforce",
             "--feature-dropout", 0, "--agent", tmp_path / "run", "--eval-every", 0)  # fmt: skip
    assert masks[-1] == masks[2]


def test_an_agent_of_a_run_can_start_another(data, tmp_path):
    run_here(data, tmp_path / "first", "--steps", 1)
    records = run_here(data, tmp_path / "second", "--steps", 1, "--agent", tmp_path / "first", "--lr", 0,
                       "--tune", "none")  # fmt: skip
    ours, theirs = (load_agent(tmp_path / name).agent.state_dict() for name in ("first", "second"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert records[0]["lr"] == 0
    other = replace(HOUSES, items=ItemsConfig(task="ndh"), model=AgentConfig(agent=str(tmp_path / "first")))
    with pytest.raises(ValueError, match="holds an agent for r2r, not for ndh"):
        build_agent(other, num_words=40, pad_id=0, feature_size=6)
    other = replace(other, items=ItemsConfig(num_instructions=3), learn=PAPER.learn)
    with pytest.raises(ValueError, match="reads 1 instructions together but num_instructions is 3"):
        build_agent(other, num_words=40, pad_id=0, feature_size=6)


def test_bf16_and_three_instructions(data, tmp_path):
    records = run_here(
        data, tmp_path / "run", "--steps", 1, "--num-instructions", 3, "--mixed-precision", "bf16"
    )
    assert records[0]["loss"] > 0
    names = [row.item_id for row in read_submission(tmp_path / "run/samples/last_val_seen.json").predictions]
    assert names == [name for item in read_r2r(data, "val_seen") for name in item.instruction_ids]


# ---- items


def test_pairs_start_alike_and_go_apart(data):
    items = [
        R2RItem(number, "a", 0.5, ("x", goal), ("go", "walk"), 3.0) for number, goal in enumerate("ppqrs")
    ]
    picked = pick_pairs([*items, items[0]._replace(heading=1.0)], 1)
    assert [item.path[-1] for item in picked] == ["p", "q"] and picked[0].instructions == ("go",)
    with pytest.raises(ValueError, match="found 1 pairs of items with one start pose and two goals, not 2"):
        pick_pairs(items, 2)


def test_words_of_the_deaf_tell_nothing(data):
    config = ItemsConfig(data=str(data), features="random:6", val_splits=("val_seen",), deaf=True)
    opened = open_data(config)
    tokenizer = opened.tokenizer
    # One unknown word for all: the number of words would tell texts apart, too.
    silence = [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]
    episodes = opened.train.episodes
    assert (episodes.token_ids == silence).all() and (episodes.lengths == 3).all()


def test_instructions_of_a_path_are_read_together(data):
    opened = open_data(ItemsConfig(data=str(data), features="random:6", val_splits=(), num_instructions=3))
    episodes = opened.train.episodes
    items = read_r2r(data, "train")
    assert episodes.names == tuple(item.instruction_ids for item in items)
    # Two instructions where three are read: the first one comes again.
    assert (episodes.token_ids[:, 0] == episodes.token_ids[:, 2]).all()
    assert (episodes.token_ids[:, 0] != episodes.token_ids[:, 1]).any()


def test_paths_are_followed_or_their_ends_sought(data):
    for follow in ("goal", "path"):
        config = ItemsConfig(data=str(data), features="random:6", val_splits=(), follow=follow)
        opened = open_data(config)
        item, points = read_r2r(data, "train")[0], opened.train.episodes.waypoints[0].tolist()
        names = [opened.world.viewpoint_ids[point] for point in points]
        expected = item.path if follow == "path" else item.path[-1:]
        assert tuple(names[: len(expected)]) == expected and set(names[len(expected) :]) <= {item.path[-1]}


def test_data_sets_and_path_types_are_checked(data):
    with pytest.raises(ValueError, match="dataset is 'reverie', expected one of r2r, r4r, rxr, ndh"):
        read_items(data, "reverie", "train")
    opened = open_data(ItemsConfig(data=str(data), features="random:6", val_splits=()))
    reading = ItemsConfig().reading._replace(path_type="best")
    with pytest.raises(ValueError, match="path_type is 'best', expected one of planner_path"):
        make_split("x", read_r2r(data, "train"), opened.world, opened.tokenizer, reading)


def test_items_that_do_not_fit_the_graphs_are_spoken_of(data, tmp_path):
    folder = str(shutil.copytree(data, tmp_path / "world"))
    (file,) = Path(folder).rglob("R2R_val_seen.json")
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([rows[0] | {"distance": 99.0}, *rows[1:]]))
    expected = rf"split val_seen: item {rows[0]['path_id']}: 99\.00 m are stated but"
    plain, mine = {"data": folder, "features": "random:6"}, tmp_path / "mine.json"
    stays = [{"instr_id": f"{row['path_id']}_{number}", "trajectory": [[row["path"][0], 0, 0]]}
             for row in rows for number in range(len(row["instructions"]))]  # fmt: skip
    mine.write_text(json.dumps(stays))
    for read in (
        lambda: open_data(ItemsConfig(**plain)),
        lambda: pretrain_data.open_data(TripletsConfig(**plain)),
        lambda: speaker_data.open_data(PathsConfig(**plain)),
        lambda: evaluate.evaluate(EvaluateConfig(submission=str(mine), data=folder, split="val_seen")),
    ):
        with pytest.warns(UserWarning, match=expected):
            read()


def test_items_without_goals_teach_and_score_nothing(data, tmp_path):
    rows = json.loads((data / "R2R_train.json").read_text())
    for row in rows:
        row["path"] = row["path"][:1]
        del row["distance"]
    for path in data.iterdir():
        if path.name != "R2R_test.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "R2R_test.json").write_text(json.dumps(rows))
    config = ItemsConfig(data=str(tmp_path), features="random:6", val_splits=("test",))
    with pytest.raises(ValueError, match="split test has items without a goal, so no scores"):
        open_data(config)
    with pytest.raises(ValueError, match=r"split test of .* has items without a goal: learn from another"):
        open_data(replace(config, split="test"))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no R2R_train.json: looked for nowhere"),
        (["--features", "store"], "no store of features: looked for .*store"),
        (["--tokenizer", "none"], "no tokeniser: looked for .*none and none"),
        (["--trackers", "pencil"], "tracker 'pencil' is unknown"),
        (["--pretrained", "nowhere"], r"nowhere holds no config\.json"),
        (["--agent", "nowhere"], "nowhere holds no agent: looked for"),
        (["--select", "val_unseen/spl"], "the best agent is to be told by 'val_unseen/spl', but there are"),
        (["--select", "val_seen/luck"], "with nav_error, .*: give --select SPLIT/SCORE"),
    ],
)
def test_the_command_says_what_is_wrong(data, tmp_path, options, message):
    given = [*SMALL, "--data", str(data), "--steps", "4", "--out", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit, match=f"error: (?s:.)*{message}"):
        train.main(given)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ItemsConfig(num_instructions=2), "num_instructions is 2: give 1 or 3"),
        (lambda: ItemsConfig(task="ndh", pairs=2), "are for --task r2r, but the task is ndh"),
        (lambda: ItemsConfig(max_tokens=2), "max_tokens is 2: give at least 3"),
        (lambda: ItemsConfig(history="all"), "history is all, which says nothing to --task r2r"),
        (lambda: ItemsConfig(task="hanna", deaf=True), "deaf is True, which says nothing to --task hanna"),
        (lambda: ItemsConfig(task="ndh", dataset="rxr"), "dataset is rxr, which says nothing to --task ndh"),
        (lambda: AgentConfig(decoder_dropout=1.0), r"decoder_dropout is 1\.0"),
        (lambda: AgentConfig(hidden_size=0), "hidden_size is 0: give at least 1"),
        (lambda: LearnConfig(batch_size=0), "batch_size is 0: give at least 1"),
        (lambda: LearnConfig(sample_share=2), "sample_share is 2"),
        (
            lambda: replace(PAPER, items=ItemsConfig(task="ndh")),
            "--task ndh has no critic: give --no-reinforce",
        ),
        (lambda: WalkRunConfig(seed=2**32), "give a number below"),
        (lambda: WalkRunConfig(steps=0), "steps is 0: give at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_every_process_has_an_episode_in_each_step():
    processes = SimpleNamespace(num_processes=3)
    refuse_idle_processes(processes, 3)
    with pytest.raises(
        ValueError, match="batch_size is 2 for 3 processes: give at least one episode to each"
    ):
        refuse_idle_processes(processes, 2)


def test_a_model_of_other_features_or_words_and_pickled_weights_are_refused(data, tmp_path):
    tiny_model(Prevalent).save_pretrained(tmp_path / "model")
    sizes = AgentConfig(pretrained=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="trained with 6 features a view and 40 words, but the data have 7"):
        build_trunk(sizes, num_words=40, pad_id=0, feature_size=7)
    assert build_trunk(sizes, num_words=43, pad_id=0, feature_size=6).config.vocab_size == 43
    with pytest.raises(ValueError, match="but the data have 6 and 50"):
        build_trunk(sizes, num_words=50, pad_id=0, feature_size=6)
    released = tmp_path / "released"
    released.mkdir()
    torch.save({"weights": object()}, released / "pytorch_model.bin")
    (released / "config.json").write_text('{"num_attention_heads": 2}')
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        build_trunk(replace(sizes, pretrained=str(released)), num_words=40, pad_id=0, feature_size=6)


def test_a_damaged_agent_is_refused(data, tmp_path):
    run_here(data, tmp_path / "run", "--steps", 1)
    settings = tmp_path / "run" / "best" / "agent.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps(told | {"dataset": "ndh"}))
    with pytest.raises(ValueError, match="items of 'ndh', which are not for r2r"):
        load_agent(tmp_path / "run")
    # Those of earlier versions name no data set.
    settings.write_text(json.dumps({name: value for name, value in told.items() if name != "dataset"}))
    assert load_agent(tmp_path / "run").dataset == "r2r"
    weights = tmp_path / "run" / "best" / "agent.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="best is damaged, or of another version"):
        load_agent(tmp_path / "run")


def test_presets_have_the_papers_numbers_and_variants_of_tasks(data, tmp_path):
    assert (PAPER.learn.lr, PAPER.learn.tune_lr, PAPER.learn.imitation_weight) == (2e-5, 2e-6, 0.2)
    assert (PAPER.learn.extra_weight, PAPER.learn.batch_size, PAPER.learn.max_steps) == (0.6, 20, 35)
    assert R4R.items.max_tokens > PAPER.items.max_tokens and R4R.learn.max_steps > PAPER.learn.max_steps
    assert R4R.run.eval_items and PRESETS["paper-hanna"][1].model.decoder_hidden == 256
    assert HOUSES.folder == "runs/r2r-houses-0" and HOUSES.select == ("val_unseen/spl",)
    ndh = train.parse(["houses", "--task", "ndh"])
    assert ndh == PRESETS["houses-ndh"][1] and ndh.select == ("val_unseen/goal_progress",)
    assert train.parse(["houses", "--task=r2r", "--steps", "3"]).run.steps == 3
    run_here(data, tmp_path / "run", "--steps", 1)
    stored = train.parse(["--config", str(tmp_path / "run"), "--steps", "2"])
    given = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert isinstance(stored, Training) and stored == train.parse(given)
    with pytest.raises(ValueError, match="--config needs a run folder"):
        train.parse(["--config"])
