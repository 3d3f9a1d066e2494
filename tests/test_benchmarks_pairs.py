"""Items by heart: both copies are trained, one of them without words."""

import json

import pytest

from benchmarks import pairs
from fq.run import load_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_both_copies_are_trained_and_only_one_reads(tmp_path, capsys):
    out = tmp_path / "pairs.json"
    pairs.main(["--runs", str(tmp_path / "runs"), "--steps", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    items = {name: load_config(tmp_path / "runs" / f"{name}-0")["items"] for name in pairs.COPIES}
    assert items["deaf"].pop("deaf") is True and items["reads"].pop("deaf") is False
    assert items["deaf"] == items["reads"] and items["reads"]["pairs"] == 16
    for name in pairs.COPIES:
        assert list(found[name]["success"]) == ["2"] and 0 <= found[name]["success"]["2"] <= 100
        assert found[name]["seconds"] > 0
    assert found["provenance"]["seed"] == 0 and "deaf: SR " in capsys.readouterr().out
