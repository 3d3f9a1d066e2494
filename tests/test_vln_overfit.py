"""The whole way in small: houses made, an agent trained by the command, and scored from its run."""

import re

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import write_tokenizer

from fq.run import read_metrics
from vln import evaluate, train
from vln.agent_data import make_split, pick_pairs
from vln.agent_folder import load_agent
from vln.data import read_r2r
from vln.evaluate_agent import open_surroundings, open_words
from vln.houses import HousesConfig, generate, write
from vln.navgraph import load_graphs
from vln.train_walk import score, walk_greedily
from vln.world import World

FEATURES = "random:32"
"""Views that differ in everything are learnt by heart sooner than those of the houses, which are alike."""

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    world = generate(HousesConfig(seed=1, num_seen=2, num_unseen=1, train_groups=8, val_groups=2))
    return write(world, tmp_path_factory.mktemp("houses") / "houses")


@pytest.fixture(scope="module")
def run(houses, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "overfit"
    options = "--pairs 4 --batch-size 8 --steps 60 --eval-every 60 --lr 3e-3 --tune-lr 3e-3 --maps 2"
    options += f" --features {FEATURES}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        AcceleratorState._reset_state(reset_partial_state=True)
        train.train(train.parse(["overfit", "--data", str(houses), "--out", str(out), *options.split()]))
    return out


def walked(run, houses, *, deaf, batch_size=8):
    config = evaluate.EvaluateConfig(
        submission=str(run), data=str(houses), split="train", agent=evaluate.WalkConfig(features=FEATURES)
    )
    loaded = load_agent(run)
    items = pick_pairs(read_r2r(houses, "train"), 4)
    world = World(load_graphs(houses, sorted({item.scan_id for item in items})))
    split = make_split("train", items, world, open_words(config, loaded), loaded.reading._replace(deaf=deaf))
    with torch.no_grad():
        found = walk_greedily(
            loaded.agent, open_surroundings(config, loaded, world), split, np.arange(8),
            batch_size=batch_size, max_steps=10,
        )  # fmt: skip
    told = [row for _, row in sorted(found, key=lambda row: row[0])]
    return told, score(split, told, "r2r", world.graphs, path_type="trusted_path").scores["success"]


def test_an_agent_follows_its_words_and_a_deaf_one_cannot(run, houses):
    assert [r for r in read_metrics(run) if "train/success" in r][-1]["train/success"] > 0.95
    told, success = walked(run, houses, deaf=False)
    assert success > 0.95
    assert walked(run, houses, deaf=True)[1] <= 0.55
    assert walked(run, houses, deaf=False, batch_size=3)[0] == told
    assert list((run / "samples" / "maps").glob("train_*.png"))


def test_a_run_is_scored_on_any_split(run, houses, capsys, tmp_path):
    scores = tmp_path / "scores.json"
    submission = tmp_path / "submission.json"
    given = [
        str(run),
        "--data",
        str(houses),
        "--features",
        FEATURES,
        "--split",
        "val_unseen",
        "--out",
        str(scores),
    ]
    evaluate.main([*given, "--submission-out", str(submission), "--max-steps", "8", "--avoid-loops"])
    assert "r2r val_unseen, greedy: 24 items, nothing to refuse" in capsys.readouterr().out
    assert scores.is_file() and submission.is_file()
    evaluate.main([str(submission), "--data", str(houses), "--split", "val_unseen", "--out", str(scores)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "random:7"], "features of width 7 but the agent of .* was trained with 32"),
        (["--features", "none"], "no store of features"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_what_does_not_fit_the_agent_is_refused(run, houses, options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        evaluate.main([str(run), "--data", str(houses), "--features", FEATURES, *options])
    said = f"{refused.value} {capsys.readouterr().err}".replace("\n", " ")
    assert re.search(message, said), said


def test_a_folder_without_an_agent_or_with_other_words_is_refused(run, houses, tmp_path):
    with pytest.raises(SystemExit, match="holds no agent"):
        evaluate.main([str(tmp_path), "--data", str(houses)])
    write_tokenizer(tmp_path / "other")
    with pytest.raises(SystemExit, match="the tokeniser has 21 words but the agent"):
        evaluate.main([str(run), "--data", str(houses), "--features", FEATURES, "--tokenizer",
                       str(tmp_path / "other")])  # fmt: skip
