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
    assert gpu.errors(results) == []
    assert results["compiled"]["graphs for three batch sizes"] == 1
    assert results["discriminator_step"]["plain_ms"] > 0
    sizes = {name: row["tokens_per_second"] for name, row in results["language"].items()}
    assert list(sizes) == ["latent 32", "latent 768"] and min(sizes.values()) > 0
    triplets = results["navigation"]["batch 2"]
    assert triplets["triplets_per_second"] > 0 and triplets["flop_of_a_step"] > 2 * 3 * triplets["parameters"]
    printed = capsys.readouterr().out
    assert (
        "Prevalent, batch 2: " in printed
        and "checks not met: none" in printed
        and "sentence VAE, latent 768: " in printed
    )


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

    def broken_shape(bench, name):
        return broken(bench) if name == "T1" else {"fine": True}

    monkeypatch.setitem(gpu.SECTIONS, "launches", broken)
    monkeypatch.setitem(gpu.SECTIONS, "sweep", broken_shape)
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--out", str(tmp_path / "gpu.json"), "--sections", "launches", "sweep", "memory"])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["launches"]["error"] == "RuntimeError: no such kernel" and "memory" in results["seconds"]
    assert results["sweep"]["T1"]["error"] and results["sweep"]["T2"] == {"fine": True}
    assert [where for where, _ in gpu.errors(results)] == ["launches", "sweep T1"]


def test_numbers_out_of_bounds_and_nan_are_not_met():
    fine = {"relative": 1e-6, "ema step": {"updates": 106.0, "share to 1e-4": 1.0}, "x / beyond": 0.0}
    assert gpu.failures(fine) == []
    for key, value in (("relative", float("nan")), ("relative", 1.0), ("x / beyond", float("nan"))):
        assert gpu.failures(fine | {key: value}) == [key]
    assert gpu.failures({"ema step": {"updates": 0.0, "share to 1e-4": 0.0}}) == [
        "ema step / updates",
        "ema step / share to 1e-4",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="there is no CUDA device here; --dry runs tiny shapes on the CPU"):
        gpu.main([])
