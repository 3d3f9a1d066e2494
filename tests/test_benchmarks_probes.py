"""The probes that say whether the embedded world is honest."""

import json

import numpy as np
import pytest
import torch

from benchmarks import probes
from benchmarks.probe_models import (
    Probe,
    Sight,
    action_hits,
    exchanged,
    read_items,
    rollout,
    teacher_rows,
    train_probe,
)
from vln.house_language import vocabulary
from vln.houses import HousesConfig, generate, house_features
from vln.world import World

TINY = HousesConfig(num_seen=2, num_unseen=2, train_groups=6, val_groups=4)


@pytest.fixture(scope="module")
def scene():
    world = generate(TINY)
    graphs = World(world.graphs)
    sight = Sight.of(np.stack([views for _, views in house_features(world)]))
    items = {
        split: read_items(probes.r2r_items(rows), graphs, vocabulary()) for split, rows in world.r2r.items()
    }
    return world, graphs, sight, items


def test_the_teachers_steps_lead_along_the_paths(scene):
    _, graphs, _, items = scene
    rows = teacher_rows(items["train"], graphs)
    assert len(rows.item) == sum(map(len, items["train"].paths))
    stops = rows.target == rows.view.shape[1]
    assert stops.sum() == len(items["train"].paths)
    for item, path in enumerate(items["train"].paths):
        mine = rows.item == item
        assert sorted(rows.viewpoint[mine]) == sorted(path)
        assert rows.step[mine & stops].tolist() == [len(path) - 1]
    assert rows.listed[~stops, rows.target[~stops]].all()


def test_exchanged_instructions_come_from_another_goal_of_the_same_start(scene):
    _, _, _, items = scene
    before = items["val_unseen"]
    after = exchanged(before)
    assert after.paths == before.paths
    own = {}
    for row, path in enumerate(before.paths):
        own.setdefault((path[0], path[-1]), []).append(before.words[row])
    for row, path in enumerate(before.paths):
        words = after.words[row]
        assert any(torch.equal(words, other) for key, texts in own.items() for other in texts
                   if key[0] == path[0] and key[1] != path[-1])  # fmt: skip


def test_one_goal_alone_has_nothing_to_exchange(scene):
    _, _, _, items = scene
    one = items["val_unseen"]._replace(paths=tuple(path[:1] for path in items["val_unseen"].paths))
    with pytest.raises(ValueError, match="one goal only"):
        exchanged(one)


def test_an_instruction_without_known_words_is_refused(scene):
    world, graphs, _, _ = scene
    with pytest.raises(ValueError, match="no word of the vocabulary"):
        read_items(probes.r2r_items(world.r2r["val_seen"]), graphs, ["zebra"])


def test_a_blind_probe_sees_nothing_and_a_deaf_one_hears_nothing(scene):
    _, graphs, sight, items = scene
    told = items["val_unseen"]
    rows = teacher_rows(told, graphs)
    other_words = told._replace(words=told.words.flip(0))
    other_views = Sight(sight.views.flip(0), sight.mean.flip(0))
    for options, same, differs in (
        ({"blind": True}, (told, other_views), (other_words, sight)),
        ({"deaf": True}, (other_words, sight), (told, other_views)),
    ):
        probe = Probe(told.words.shape[1], sight.views.shape[2], **options)
        for parameter in probe.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        hits = action_hits(probe, told, rows, sight)
        assert (hits == action_hits(probe, same[0], rows, same[1])).all()
        assert (hits != action_hits(probe, differs[0], rows, differs[1])).any()


def test_a_probe_learns_its_training_steps(scene):
    _, graphs, sight, items = scene
    rows = teacher_rows(items["train"], graphs)
    probe = Probe(items["train"].words.shape[1], sight.views.shape[2])
    before = action_hits(probe, items["train"], rows, sight).mean()
    train_probe(probe, items["train"], rows, sight, epochs=60, seed=0, batch_size=64)
    assert action_hits(probe, items["train"], rows, sight).mean() > max(0.8, before + 0.3)
    ends = rollout(probe, items["train"], sight, graphs)
    assert probes.successes(items["train"], ends, graphs).mean() > 0.4


def test_walks_that_never_stop_end_after_the_most_steps(scene):
    _, graphs, sight, items = scene
    probe = Probe(items["val_seen"].words.shape[1], sight.views.shape[2])
    with torch.no_grad():
        probe.stops[-1] = -100.0
    ends = rollout(probe, items["val_seen"], sight, graphs)
    assert graphs.included[ends].all()
    with torch.no_grad():
        probe.stops[-1] = 100.0
    stays = rollout(probe, items["val_seen"], sight, graphs)
    assert stays.tolist() == [path[0] for path in items["val_seen"].paths]


def test_everything_is_reported(tmp_path, capsys):
    numbers = ["--num-seen", "2", "--num-unseen", "2", "--train-groups", "4", "--val-groups", "3"]
    probes.main(
        [
            "--seeds",
            "0",
            "1",
            "--epochs",
            "1",
            *numbers,
            "--data",
            str(_graphs(tmp_path)),
            "--out",
            str(tmp_path),
        ]
    )
    result = json.loads((tmp_path / "probes.json").read_text())
    assert set(result["probes"]) == {"0", "1"}
    assert set(result["graphs"]) == {"houses", "real scans"}
    assert result["graphs"]["real scans"]["degree"][0] == 1.0
    text = (tmp_path / "probes.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert "| full | SR, greedy walks |" in text
    assert all(row["claim"] in text for row in result["verdicts"])
    for entry in result["habits"].values():
        assert 15 < entry["action accuracy"]["random"] < 40
        assert len(entry["sr"]) == 12


def _graphs(folder):
    poses = [[1, 0, 0, x, 0, 1, 0, 0, 0, 0, 1, 1.5, 0, 0, 0, 1] for x in (0.0, 2.0)]
    rows = [{"image_id": f"v{n}", "pose": pose, "included": True, "unobstructed": [n == 1, n == 0]}
            for n, pose in enumerate(poses)]  # fmt: skip
    (folder / "pair_connectivity.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(("ahead", "spread", "holds"), [(25, 1, True), (19, 1, False), (25, 12, False)])
def test_a_claim_needs_margin_and_certainty(ahead, spread, holds):
    def scores(value):
        return {"accuracy": value, "sr": value}

    runs = {
        str(seed): {
            "full": scores(60 + ahead + turn * spread),
            "deaf": scores(60),
            "blind": scores(60),
            "exchanged": scores(62),
        }
        for seed, turn in enumerate((-1, 0, 1))
    }
    habit = {"action accuracy": {"candidate 1": 26.0, "random": 25.0},
             "sr": {"straight on 5 steps": 2.0, "straight on to a dead end": 3.0, "random": 2.0,
                    "random, never straight back": 9.0}}  # fmt: skip
    found = {row["claim"]: row["holds"] for row in probes.verdicts({"probes": runs, "habits": {"0": habit}})}
    assert found["sr: full 20 points and three deviations ahead of deaf"] is holds
    assert found["sr: exchanged at most 3 points above deaf"] is True
    assert found["sr: habits with 'dead' at most 1.2 times random"] is False
    assert found["action accuracy: habits with 'candidate 1' at most 1.2 times random"] is True


@pytest.mark.parametrize(
    ("flag", "value", "text"), [("--epochs", "0", "--epochs is 0"), ("--num-seen", "0", "num_seen is 0")]
)
def test_bad_numbers_stop_the_command(flag, value, text, capsys):
    with pytest.raises(SystemExit):
        probes.main([flag, value])
    assert text in capsys.readouterr().err
