"""Back-translation: a speaker's words under the environment of a step, the same for any share of the rows."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_vln_train import SMALL, run_here, untimed
from tiny_vln import grid, write_folder
from tiny_walkers import write_speaker

from vln import train
from vln.back_translation import Masked
from vln.data import read_r2r
from vln.pretrain_data import RandomFeatures
from vln.train_config import ItemsConfig
from vln.train_setup import open_data
from vln.world import World

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return write_speaker(tmp_path_factory.mktemp("speaker") / "model", scale=4.0)


def opened(data, speaker, **changes):
    config = ItemsConfig(data=str(data), features="random:6", val_splits=("val_seen",), speaker=str(speaker))
    return open_data(replace(config, **changes), seed=3)


def test_words_are_of_the_path_under_the_mask_and_of_no_other_row(data, speaker):
    teller = opened(data, speaker).teller
    rows, keep = np.array([4, 0, 9]), np.array([2, 0, 2, 0, 0, 2], dtype=np.float32)
    masked, plain = (teller.texts(np.arange(12), mask) for mask in (keep, None))
    assert masked != plain and len(set(plain)) > 1
    assert teller.texts(rows, keep) == [masked[row] for row in rows]
    episodes = teller.episodes(rows, keep)
    alone = teller.episodes(rows[1:2], keep)
    assert alone.number[0] == episodes.number[1] and alone.start[0] == episodes.start[1]
    assert alone.token_ids[0, 0].tolist() == episodes.token_ids[1, 0, : alone.token_ids.shape[2]].tolist()


def test_the_speaker_sees_dropped_channels_as_zeros_and_the_rest_grown(data, speaker, monkeypatch):
    found, teller = [], opened(data, speaker).teller
    speak = type(teller._trained.speaker).speak

    def spy(self, actions, panoramas, lengths, **options):
        found.append((panoramas[:, 0, :, :6], options["features_dropped"]))
        return speak(self, actions, panoramas, lengths, **options)

    monkeypatch.setattr(type(teller._trained.speaker), "speak", spy)
    keep = np.array([2, 0, 2, 0, 0, 2], dtype=np.float32)
    teller.texts(np.arange(3), keep)
    teller.texts(np.arange(3), None)
    torch.testing.assert_close(found[0][0], found[1][0] * torch.from_numpy(keep))
    assert [dropped for _, dropped in found] == [True, False]


def test_paths_are_of_the_split_s_scans_and_of_no_item(data, speaker):
    items = [item for split in ("train", "val_seen") for item in read_r2r(data, split)]
    known = {(item.scan_id, item.path[0], item.path[-1]) for item in items}
    found = opened(data, speaker)
    paths = found.teller._paths
    assert found.teller.scan_ids == found.train.scan_ids and len(found.teller) == len(paths) > 50
    assert not known & {(path.scan_id, path.path[0], path.path[-1]) for path in paths}
    assert all(4 <= len(path.path) - 1 <= 6 for path in paths)
    fewer = opened(data, speaker, speaker_paths=7).teller
    assert fewer._paths == paths[:7]
    episodes = fewer.episodes(np.array([2]), None)
    assert found.world.viewpoint_ids[episodes.start[0]] == paths[2].path[0]
    assert found.world.viewpoint_ids[episodes.waypoints[0, -1]] == paths[2].path[-1]
    assert episodes.number[0] == len(found.train.episodes.names) + 2


def test_a_run_learns_from_the_speaker_and_a_resumed_one_repeats_it(data, speaker, tmp_path, capsys):
    options = ("--speaker", speaker, "--feature-dropout", 0.5, "--eval-every", 0, "--checkpoint-every", 2)
    whole = run_here(data, tmp_path / "whole", *options, "--steps", 4)
    assert {"extra_imitation_loss", "imitation_loss"} <= set(whole[0])
    assert "of 2 scans and " in capsys.readouterr().out
    run_here(data, tmp_path / "parts", *options, "--steps", 2)
    parts = run_here(data, tmp_path / "parts", *options, "--steps", 4)
    losses = [[record for record in untimed(run) if "loss" in record] for run in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_masked_features_have_the_same_width():
    features = RandomFeatures(World([grid("a")]), 4)
    masked = Masked(features, np.array([0, 1, 2, 0], dtype=np.float32))
    assert masked.width == 4
    given, seen = features.gather(["a"], ["a-1"]), masked.gather(["a"], ["a-1"])
    assert np.array_equal(seen, given * [0, 1, 2, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--extra", "told.json"), "--extra and --speaker are both given"),
        (("--features", "random:5"), "speaker was trained with 6 features a view but random:5 has 5"),
        (("--speaker-paths", "100000"), "100000 paths were asked for but [0-9]+ of 2 scans pass"),
        (("--task", "ndh", "--no-reinforce"), "--speaker, --pairs and --num-instructions are for --task r2r"),
        (("--speaker", "nowhere"), "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    data, speaker, tmp_path, options, message, capsys
):
    given = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--speaker", str(speaker), *options]
    with pytest.raises(SystemExit) as stop:
        train.main(given)
    assert re.search(message, str(stop.value) + "".join(capsys.readouterr()).replace("\n", " "))
    assert not (tmp_path / "run").exists()


def test_paths_without_a_speaker_are_refused():
    with pytest.raises(ValueError, match="speaker_paths is 5 but there is no --speaker to tell them"):
        ItemsConfig(speaker_paths=5)
