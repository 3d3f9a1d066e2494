"""Sampled paths and their instructions: the filter, scans, resumed and shared work, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_vln import WORDS, grid, write_folder

from vln import augment
from vln.augment import provenance_file
from vln.augment_config import AugmentConfig
from vln.augment_paths import PathFilter, PathSource, num_edges
from vln.augment_shards import PAPER, report, speed
from vln.data import read_r2r
from vln.navgraph import load_graphs
from vln.speaker_folder import TrainedSpeaker, load_speaker, save_speaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "vln"

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scans a and b to train on; c is of the unseen split alone."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "world", scans=("a", "b", "c"))
    for source, split, keep in (
        ("train", "train", "ab"), ("val_seen", "val_unseen", "c"), ("val_seen", "val_seen", "ab"),
    ):  # fmt: skip
        rows = json.loads((folder / f"R2R_{source}.json").read_text())
        (folder / f"R2R_{split}.json").write_text(json.dumps([row for row in rows if row["scan"] in keep]))
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    torch.manual_seed(0)
    words = Words(("<PAD>", "<UNK>", "<EOS>", *WORDS, "<BOS>"))
    sizes = SpeakerConfig(vocab_size=len(words), view_size=10, angle_size=4, hidden_size=12, word_size=6)
    model = Speaker(sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    folder = tmp_path_factory.mktemp("speaker") / "model"
    save_speaker(TrainedSpeaker(model, words, "blocks", {"scan_ids": ["a", "b"]}), folder)
    return folder


@pytest.fixture
def config(data, speaker, tmp_path):
    return AugmentConfig(
        speaker=str(speaker), data=str(data), out=str(tmp_path / "aug.json"), features="random:6",
        num_paths=23, num_instructions=2, seed=3, max_words=12, batch_size=3, shard_size=4,
    )  # fmt: skip


def run_here(config):
    AcceleratorState._reset_state(reset_partial_state=True)
    return augment.augment(config).read_bytes()


def rows_of(config):
    return json.loads(run_here(config))


# ---- paths


def test_the_filter_is_that_of_the_paths_themselves():
    graph = grid("a")
    chosen = PathFilter(min_edges=3, max_edges=4, min_distance_m=9.5)
    expected = set()
    for start in graph.viewpoint_ids:
        for goal in graph.viewpoint_ids:
            path = graph.shortest_path(start, goal)
            far = graph.distances[graph.index(start), graph.index(goal)] >= 9.5
            if 3 <= len(path) - 1 <= 4 and far:
                expected.add(tuple(path))
            edges = num_edges(graph, most=20)[graph.index(start), graph.index(goal)]
            assert edges == len(path) - 1
    source = PathSource({"a": graph}, chosen=chosen)
    sampled = source.sample(len(source), seed=0)
    assert {path.path for path in sampled} == expected and len(sampled) == len(expected) > 20
    assert all(path.distance_m == pytest.approx(3.0 * (len(path.path) - 1)) for path in sampled)
    assert all(0 <= path.heading <= 6.284 for path in sampled)
    assert len({path.heading for path in sampled}) > len(sampled) / 2


def test_known_ends_are_left_out_and_seeds_order_the_rest():
    graphs = {"a": grid("a"), "b": grid("b")}
    every = PathSource(graphs).sample(len(PathSource(graphs)), seed=1)
    taken = {(path.scan_id, path.path[0], path.path[-1]) for path in every[:50]}
    source = PathSource(graphs, taken=taken)
    rest = source.sample(len(source), seed=1)
    assert len(rest) == len(every) - 50
    assert not taken & {(path.scan_id, path.path[0], path.path[-1]) for path in rest}
    assert PathSource(graphs).sample(7, seed=1) == every[:7] != PathSource(graphs).sample(7, seed=2)
    assert {path.scan_id for path in every[:40]} == {"a", "b"}
    with pytest.raises(
        ValueError, match=f"{len(rest) + 1} paths were asked for but {len(rest)} of 2 scans pass"
    ):
        source.sample(len(rest) + 1, seed=1)
    with pytest.raises(ValueError, match="min_edges is 5, max_edges 4"):
        PathFilter(min_edges=5, max_edges=4)


def test_matterport_has_as_many_paths_as_were_published():
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not here")
    scan_ids = sorted({item.scan_id for item in read_r2r(REAL, "train")})
    assert len(PathSource(load_graphs(REAL, scan_ids))) == PAPER["paths"]


# ---- files


def test_the_file_is_one_of_r2r_in_training_scans_alone(config, data):
    rows = rows_of(config)
    items = read_r2r(config.out, graphs=load_graphs(data))  # faults and warnings of lengths are errors
    assert len(items) == 23 and {item.scan_id for item in items} == {"a", "b"}
    known = [item for split in ("train", "val_seen", "val_unseen") for item in read_r2r(data, split)]
    assert min(item.path_id for item in items) > max(item.path_id for item in known)
    assert [item.path_id for item in items] == list(range(items[0].path_id, items[0].path_id + 23))
    ends = {(item.scan_id, item.path[0], item.path[-1]) for item in known}
    assert not ends & {(item.scan_id, item.path[0], item.path[-1]) for item in items}
    assert all(5 <= len(item.path) <= 7 and len(item.instructions) == 2 for item in items)
    texts = [text for item in items for text in item.instructions]
    assert len(set(texts)) > len(texts) / 2 and {word for text in texts for word in text.split()} <= set(
        WORDS
    )
    assert not list(Path(config.out).parent.glob(".*"))
    found = json.loads(provenance_file(config.out).read_text())
    assert found["scan_ids"] == ["a", "b"] == found["speaker"]["scan_ids"]
    assert (found["num_paths"], found["num_instructions"]) == (23, 46)
    assert found["num_triplets"] == 2 * sum(len(row["path"]) for row in rows)  # a STOP for each
    assert found["config"]["temperature"] == 1.0 and found["seed"] == 3
    assert found["speed"]["instructions_per_second"] > 0 and found["speed"]["paper_hours_total"] > 0


def test_scans_of_other_splits_are_not_even_read(config, data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "connectivity" / "c_connectivity.json").unlink()
    everything = replace(config, data=str(copy), num_paths=0, num_instructions=1, exclude_known=False)
    rows = rows_of(everything)
    assert len(rows) == 2 * len(PathSource({"a": grid("a")}))
    assert {row["scan"] for row in rows} == {"a", "b"}


def test_words_depend_on_seed_path_and_text_alone(config, tmp_path):
    rows = rows_of(config)
    other = replace(config, out=str(tmp_path / "other.json"), batch_size=8, shard_size=23)
    assert rows_of(other) == rows
    fewer = replace(config, out=str(tmp_path / "fewer.json"), num_paths=9, num_instructions=1)
    assert [row["instructions"] for row in rows_of(fewer)] == [row["instructions"][:1] for row in rows[:9]]
    seeded = replace(config, out=str(tmp_path / "seeded.json"), seed=4)
    assert rows_of(seeded) != rows


def test_temperature_0_says_the_likeliest_words(config, speaker, tmp_path):
    greedy = replace(config, temperature=0.0, num_instructions=1)
    said = [row["instructions"][0] for row in rows_of(greedy)]
    cold = replace(config, temperature=1e-4, num_instructions=1, out=str(tmp_path / "cold.json"))
    assert [row["instructions"][0] for row in rows_of(cold)] == said
    assert load_speaker(speaker).words.entries[1] not in " ".join(said)


# ---- interrupted and shared work


def command(config, processes):
    given = ["-m", "vln.augment", config.speaker, "--out", config.out, "--data", config.data]
    given += ["--features", "random:6", "--num-paths", "23", "--num-instructions", "2", "--seed", "3"]
    given += ["--max-words", "12", "--batch-size", "3", "--shard-size", "4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, "-W", "ignore", *(launch if processes > 1 else []), *given]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def test_two_processes_write_what_one_writes(config, tmp_path):
    whole = run_here(config)
    pair = replace(config, out=str(tmp_path / "pair.json"))
    done = subprocess.run(
        command(pair, 2), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 of 6 shards to do by 2 process(es)" in done.stdout and "would take" in done.stdout
    assert Path(pair.out).read_bytes() == whole


def test_a_killed_run_goes_on_where_it_was(config, tmp_path):
    whole = run_here(config)
    cut = replace(config, out=str(tmp_path / "cut.json"))
    folder = tmp_path / ".cut.json.shards"
    running = subprocess.Popen(command(cut, 1), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 200
        while not list(folder.glob("shard_*")) and running.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    # However far it came, the rest is done here, but for what is left of its last file.
    (folder / ".shard_000005.json.1.partial").write_text("{")
    left = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard_*")}
    assert left and not Path(cut.out).exists()
    assert run_here(cut) == whole and not folder.exists()


def test_shards_are_done_once(config, monkeypatch):
    describe, done = augment.describe, []

    def interrupted(config, job, number, device):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return describe(config, job, number, device)

    monkeypatch.setattr(augment, "describe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_here(config)
    with pytest.raises(FileExistsError, match=r"unfinished file of other options \(num_instructions\)"):
        run_here(replace(config, num_instructions=3))
    done.clear()
    assert len(json.loads(run_here(config))) == 23 and done == [3, 4, 5]


def test_a_finished_file_is_left_alone(config, monkeypatch, capsys):
    whole = run_here(config)
    monkeypatch.setattr(augment, "describe", None)
    assert run_here(config) == whole and "is there already, of the same options" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="is there already, and of other options"):
        run_here(replace(config, seed=9))


# ---- speed


def test_speeds_are_of_one_process_and_the_papers_hours_of_all():
    found = speed((1000, 6000, 30_000), (0.5, 600.0, 3.0), processes=2)
    assert (found["paths_per_second"], found["instructions_per_second"]) == (2000.0, 10.0)
    assert found["triplets_per_second"] == 10_000.0
    assert found["paper_hours"]["instructions"] == pytest.approx(1_020_000 / 20 / 3600, abs=1e-4)
    assert found["paper_hours"]["triplets"] == pytest.approx(6_482_000 / 20_000 / 3600, abs=1e-4)
    assert found["paper_hours"]["paths"] == pytest.approx(178_300 / 2000 / 3600, abs=1e-4)
    assert found["paper_hours_total"] == pytest.approx(sum(found["paper_hours"].values()), abs=1e-4)
    assert "10.0 instructions/s said" in report(found) and "2 process(es)" in report(found)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speaker": "nowhere"}, "nowhere holds no speaker: looked for config.json and model.safetensors"),
        ({"data": "nowhere"}, "no R2R_train.json: looked for nowhere"),
        ({"features": "random:7"}, "trained with 6 features a view but random:7 has 7"),
        ({"features": "store"}, "no store of features: looked for .*store"),
        ({"out": "no/such/aug.json"}, "such does not exist: make it first"),
        ({"num_paths": 10**6}, "1000000 paths were asked for"),
        ({"words": "list.txt"}, "--words is for a released snapshot"),
    ],
)
def test_the_command_says_what_is_wrong(config, change, message):
    given = replace(config, **change)
    options = ["--data", given.data, "--out", given.out, "--features", given.features]
    options += ["--num-paths", str(given.num_paths), *(["--words", given.words] if given.words else [])]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        augment.main([given.speaker, *options])
    assert not Path(given.out).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_instructions": 0}, "num_instructions is 0: give at least 1"),
        ({"temperature": -1.0}, r"temperature is -1\.0: give at least 0"),
        ({"temperature": 0.0}, "temperature 0 says the same 2 times"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)
