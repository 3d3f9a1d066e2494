"""The pre-training command: resumed runs, two processes, objectives, data, and what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import grid, tiny_config, tiny_model, write_folder

from fq.command import from_dict
from fq.run import RunFolder, newest_checkpoint, read_metrics
from vln import pretrain
from vln.checkpoints import from_released, save_released
from vln.model import PrevalentPretraining
from vln.pretrain_config import (
    HOUSES,
    PAPER,
    OptimConfig,
    Pretraining,
    SizesConfig,
    TripletsConfig,
)
from vln.pretrain_data import RandomFeatures, Stream, Vocabulary, open_data
from vln.world import World

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "houses --features random:6 --hidden-size 16 --num-attention-heads 2 --intermediate-size 24"
    " --angle-size 4 --num-text-layers 1 --num-cross-layers 2 --max-position-embeddings 32 --max-tokens 12"
    " --batch-size 16 --warmup-steps 2 --lr 3e-3 --eval-triplets 16 --log-every 1 --dropout 0.1"
    " --feature-scale 1 --initializer-range 0.02 --action-target candidate_rank"
).split()

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


def run_here(data, out, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [*SMALL, "--data", str(data), "--out", str(out), *map(str, options)]
    pretrain.train(pretrain.parse(given))
    return read_metrics(out)


def untimed(records):
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def test_a_run_learns_and_leaves_a_model(data, tmp_path, capsys):
    records = run_here(
        data,
        tmp_path / "run",
        "--steps",
        40,
        "--mask-share",
        0.3,
        "--log-every",
        5,
        "--export",
        "--no-shortest",
    )
    train = [record for record in records if "loss" in record]
    assert train[-1]["action_loss"] < 0.7 * train[0]["action_loss"]
    assert train[-1]["mlm_loss"] < train[0]["mlm_loss"]
    assert [record["step"] for record in train] == list(range(5, 41, 5))
    last = records[-1]
    assert {name for name in last if name.startswith("val_seen/")} == {
        f"val_seen/{name}"
        for name in ("loss", "mlm_loss", "mlm_accuracy", "action_loss", "action_accuracy", "action_floor")
    }
    assert 0 < last["val_seen/action_floor"] < 1
    model = PrevalentPretraining.from_pretrained(tmp_path / "run" / "model")
    exported = from_released(tmp_path / "run" / "released", angle_size=4).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in model.state_dict().items())
    assert model.config.feature_size == 6 and (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert "triplets of 2 scans" in capsys.readouterr().out
    told = (tmp_path / "run" / "samples" / "val_seen_000040.md").read_text().splitlines()
    assert len([line for line in told if line.startswith("* ")]) == 12 and "[PAD]" not in "".join(told)
    assert any("[" in line and ": " in line for line in told) and any(
        "  Action: STOP;" in line for line in told
    )


def test_a_killed_run_resumes_to_the_bit(data, tmp_path, monkeypatch):
    options = ("--steps", 6, "--checkpoint-every", 2, "--eval-every", 3)
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
    ours, theirs = (
        PrevalentPretraining.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_micro_batches_and_processes_change_no_loss(data, tmp_path):
    """One batch of 16, two of 8, and two processes: the same losses without dropout."""
    options = ("--steps", 10, "--dropout", 0, "--eval-every", 5)
    one = run_here(data, tmp_path / "one", *options)
    two = run_here(data, tmp_path / "two", *options, "--batch-size", 8, "--accumulation", 2)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "vln.pretrain", *SMALL, "--data", str(data)]
    command += ["--out", str(tmp_path / "pair"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    for others in (two, read_metrics(tmp_path / "pair")):
        assert len(others) == len(one)
        for ours, theirs in zip(untimed(one), untimed(others), strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=2e-5), (name, ours["step"])


@pytest.mark.parametrize(("off", "gone"), [("--no-mlm", "mlm"), ("--no-action", "action")])
def test_objectives_can_be_switched_off(data, tmp_path, off, gone):
    records = run_here(data, tmp_path / "run", "--steps", 2, off, "--mixed-precision", "bf16")
    assert not any(gone in name for record in records for name in record)
    other = {"mlm": "action", "action": "mlm"}[gone]
    assert records[0]["loss"] == records[0][f"{other}_loss"]


def test_views_as_actions_and_the_other_layout(data, tmp_path):
    run_here(data, tmp_path / "run", "--steps", 1, "--action-target", "view", "--orientation", "interleaved")
    config = PrevalentPretraining.from_pretrained(tmp_path / "run" / "model").config
    assert (config.num_actions, config.orientation) == (37, "interleaved")


def test_a_run_begins_from_other_checkpoints(data, tmp_path):
    opened = open_data(TripletsConfig(data=str(data), features="random:6", max_tokens=12))
    words = len(opened.tokenizer)
    save_released(tiny_model(vocab_size=words), tmp_path / "released")
    tiny_model(vocab_size=words).save_pretrained(tmp_path / "ours")
    expected = tiny_model(vocab_size=words).state_dict()
    tiny_model(vocab_size=words).save_pretrained(tmp_path / "run" / "model")
    for name in ("released", "ours", "run"):
        sizes = SizesConfig(init=str(tmp_path / name), angle_size=4)
        state = pretrain.build_model(sizes, opened, num_words=words).state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    tiny_model(vocab_size=words, action_target="view").save_pretrained(tmp_path / "views")
    given = [*SMALL, "--data", str(data), "--init", str(tmp_path / "views"), "--export"]
    with pytest.raises(SystemExit, match=r"tell candidate_ranks, .* but that of init .*views tells views"):
        pretrain.main([*given, "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="but that of init scratch tells views: leave it out"):
        pretrain.main([*SMALL, "--data", str(data), "--action-target", "view", "--export",
                       "--out", str(tmp_path / "new")])  # fmt: skip
    assert not (tmp_path / "new" / "config.json").exists()
    with pytest.raises(ValueError, match="trained with 6 features a view and 40 words, but the data have 6"):
        tiny_model().save_pretrained(tmp_path / "other")
        pretrain.build_model(SizesConfig(init=str(tmp_path / "other")), opened, num_words=words)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        pretrain.build_model(SizesConfig(init=str(tmp_path / "none")), opened, num_words=words)


def test_rates_rise_and_fall_and_norms_do_not_decay():
    optim = OptimConfig(lr=1.0, warmup_steps=2, weight_decay=0.1)
    rates = [pretrain.learning_rate(optim, step, 6) for step in range(7)]
    assert rates == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    model = PrevalentPretraining(tiny_config())
    decayed, plain = pretrain.make_optimiser(model, optim).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"]) and plain["weight_decay"] == 0
    assert {names[id(p)].rpartition(".")[2] for p in plain["params"]} == {"weight", "bias"}
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])


# ---- data


def test_an_epoch_has_every_triplet_once_and_the_next_another_order():
    stream = Stream(10, seed=3)
    rows = np.concatenate([stream.rows(first, 4) for first in range(0, 20, 4)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert (rows[:10] != rows[10:]).any()
    assert (Stream(10, seed=3).rows(7, 6) == rows[7:13]).all()


def test_a_batch_has_the_words_views_and_actions_of_its_triplets(data):
    opened = open_data(TripletsConfig(data=str(data), features="random:6", max_tokens=12))
    train, rows = opened.train, np.array([0, 9, 17])
    batch = train.batch(
        rows, seed=0, step=0, angle_size=4, orientation="blocks", action_target="candidate_rank",
        mask_share=0.3,
    )  # fmt: skip
    assert batch.action_labels.tolist() == train.triplets.action[rows].tolist()
    words = torch.where(batch.mlm_labels >= 0, batch.mlm_labels, batch.input_ids)
    for row, text in zip(words, train.triplets.text[rows], strict=True):
        stored = train.token_ids[text]
        assert row.tolist() == stored[: len(row)].tolist() and not stored[len(row) :].any()
    place = int(train.triplets.viewpoint[9])
    features = train.features.gather([train.world.scan_ids[place]], [train.world.viewpoint_ids[place]])
    assert torch.equal(batch.views[1, :, :6], torch.from_numpy(features[0]))
    assert train.scan_ids == {"a", "b"} and set(opened.val) == {"val_seen"}
    scaled = train.batch(
        rows, seed=0, step=0, angle_size=4, orientation="blocks", action_target="candidate_rank",
        feature_scale=10.0, mask_share=0.3,
    )  # fmt: skip
    torch.testing.assert_close(scaled.views[..., :6], 10 * batch.views[..., :6])
    assert torch.equal(scaled.views[..., 6:], batch.views[..., 6:])


def test_random_features_are_a_viewpoints_own():
    world, alone = World([grid("a"), grid("b")]), World([grid("b")])
    whole = RandomFeatures(world, 5).gather(["b", "a", "b"], ["b-3", "a-3", "b-4"])
    assert (RandomFeatures(alone, 5).gather(["b"], ["b-3"])[0] == whole[0]).all()
    assert whole.dtype == np.float32 and whole.shape == (3, 36, 5)
    assert abs(whole.mean()) < 0.15 and abs(whole.std() - 1) < 0.1
    assert np.abs(np.corrcoef(whole.reshape(3, -1)) - np.eye(3)).max() < 0.3
    with pytest.raises(ValueError, match="random features of width 0"):
        RandomFeatures(world, 0)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no R2R_train.json: looked for nowhere"),
        (["--features", "store"], "no store of features: looked for .*store"),
        (["--features", "random:x"], "give random:WIDTH"),
        (["--tokenizer", "none"], "no tokeniser: looked for .*none and none"),
        (["--trackers", "pencil"], "tracker 'pencil' is unknown"),
    ],
)
def test_the_command_says_what_is_wrong(data, tmp_path, options, message):
    given = [*SMALL, "--data", str(data), "--steps", "4", "--out", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        pretrain.main(given)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimConfig(mlm=False, action=False), "there is nothing to predict"),
        (lambda: OptimConfig(mask_share=0), "mask_share is 0"),
        (lambda: OptimConfig(batch_size=0), "batch_size is 0: give at least 1"),
        (lambda: SizesConfig(init="bert"), "init is 'bert': give bert:NAME"),
        (lambda: SizesConfig(dropout=1.0), r"dropout is 1\.0"),
        (lambda: TripletsConfig(splits=()), "there is nothing to learn from"),
        (lambda: replace(HOUSES.run, seed=2**32), "give a number below"),
        (
            lambda: replace(HOUSES, optim=OptimConfig(schedule_steps=3)),
            "reaches 0 at schedule_steps, which is 3",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_round_trip_and_presets_have_the_papers_numbers(data, tmp_path):
    run_here(data, tmp_path / "run", "--steps", 1)
    stored = pretrain.parse(["--config", str(tmp_path / "run"), "--steps", "2"])
    assert stored == replace(
        pretrain.parse([*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"])
    )
    assert newest_checkpoint(tmp_path / "run") is not None
    assert (PAPER.model.num_text_layers, PAPER.model.num_cross_layers, PAPER.optim.lr) == (9, 4, 5e-5)
    assert HOUSES.folder == "runs/pretrain-houses-0"
    with pytest.raises(ValueError, match=r"configuration of Pretraining has unknown keys \['odd'\]"):
        from_dict(Pretraining, {"odd": 1})
    with pytest.raises(ValueError, match="--config needs a run folder"):
        pretrain.parse(["--config"])


def test_a_tokeniser_without_a_mask_is_refused():
    class Plain:
        mask_token_id, pad_token_id = None, 0

    with pytest.raises(ValueError, match=r"the tokeniser has no \[MASK\] or no \[PAD\]"):
        Vocabulary.of(Plain())
