"""The benchmark of rollouts says how fast, and where the time goes."""

import json

import pytest

from benchmarks import rollout

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_measures_both_ways_and_writes_them(tmp_path, capsys):
    out = tmp_path / "rollout.json"
    rollout.main(["--sizes", "houses", "--batch-size", "4", "--max-steps", "3", "--rounds", "1",
                  "--out", str(out)])  # fmt: skip
    document = json.loads(out.read_text())
    row = document["rollouts"][0]
    for name in ("cached", "uncached"):
        assert row[name]["steps_per_second"] > 0
        shares = [row[name][f"share_{part}"] for part in ("simulator", "features", "model")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert document["provenance"] and "caching the words" in capsys.readouterr().out
    with pytest.raises(ValueError, match="sizes are 'big', expected one of houses, paper"):
        rollout.measure("big")
    with pytest.raises(ValueError, match="rounds is 0: give at least 1"):
        rollout.measure("houses", rounds=0)
