import json

import pytest
import torch

from benchmarks import gpu
from fq import ops


def test_a_dry_run_goes_through_every_part(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    sections = [name for name in gpu.SECTIONS if name != "speed"]  # it compiles C++ code on a CPU
    gpu.main(["--dry", "--out", str(out), "--sections", *sections])
    results = json.loads(out.read_text())
    assert results["not met"] == [] and list(results["seconds"]) == sections
    assert not any("error" in row for row in results.values() if isinstance(row, dict))
    assert results["compiled"]["graphs for three batch sizes"] == 1
    assert results["discriminator_step"]["plain_ms"] > 0
    assert "checks not met: none" in capsys.readouterr().out


def test_wrong_codes_and_sums_are_found(monkeypatch):
    quantize = ops.quantize

    def wrong(*args, **kwargs):
        difference, error, indices, packed = quantize(*args, **kwargs)
        return difference, error * 1.01, (indices + 1) % len(packed), packed + 1

    bench = gpu.Bench(torch.device("cpu"), gpu.TINY, 2)
    assert gpu.failures(gpu.correctness(bench)) == []
    monkeypatch.setattr(ops, "quantize", wrong)
    found = gpu.failures(gpu.correctness(bench))
    for part in ("beyond", "difference is exact", "error, relative", "counts are exact", "largest sum"):
        assert any(part in name for name in found), part


def test_a_part_that_fails_leaves_its_error_and_lets_others_run(tmp_path, monkeypatch):
    def broken(bench):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.SECTIONS, "launches", broken)
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--out", str(tmp_path / "gpu.json"), "--sections", "launches", "memory"])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["launches"]["error"] == "RuntimeError: no such kernel" and "memory" in results["seconds"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="there is no CUDA device here; --dry runs tiny shapes on the CPU"):
        gpu.main([])
