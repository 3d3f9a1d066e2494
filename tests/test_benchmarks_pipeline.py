"""The pipeline of the published pre-training at small sizes: what is counted is what the data hold."""

import json

import pytest
from tiny_vln import write_folder

from benchmarks import pipeline, readme
from benchmarks.pretraining_speed import TINY
from vln.augment_paths import PathFilter, PathSource
from vln.augment_shards import PAPER
from vln.data import read_r2r
from vln.navgraph import load_graphs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_paths_are_sampled_and_rolled_and_some_are_told(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "world")
    scans = {item.scan_id for item in read_r2r(data, "train")}
    source = PathSource(load_graphs(data, sorted(scans)), chosen=PathFilter())
    found = pipeline.measure(data, num_said=3, batch=2, steps=1, model=TINY, hidden_size=8)
    assert found["paths"]["count"] == len(source)
    lengths = [len(path.path) for path in source.sample(len(source), seed=0)]
    assert found["triplets"]["count"] == pipeline.NUM_INSTRUCTIONS * sum(lengths)  # STOP is an action, too
    assert found["instructions"]["count"] == 18 and found["instructions"]["words"] > 18
    hours = PAPER["triplets"] / found["training"]["per_second"] / 3600
    assert found["training"]["paper_hours"] == pytest.approx(hours) and found["training"]["count"] == 2

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "not measured yet" in readme.pipeline()
    record = {"device_name": "abacus", "commit": "0" * 40, "versions": {"torch": "2.11"}, "command": "x"}
    (tmp_path / "pipeline.json").write_text(json.dumps(found | {"provenance": record}))
    text = readme.pipeline()
    assert f"{len(source):,} paths" in text and "abacus" in text
    assert f"{found['triplets']['count']:,} triplets" in text


def test_missing_graphs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"R2R_train\.json"):
        pipeline.measure(tmp_path, num_said=1, batch=1, steps=1)
