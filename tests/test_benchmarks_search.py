"""The search benchmark: peers that do the same work, and a report that follows from its numbers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from largest_tensor import LargestTensor

from benchmarks import peers, search, search_report, search_worker
from benchmarks.peers import PEERS, Shape, State, as_tokens, clustered, exactness, feature_like, unavailable
from fq import CodebookOptions, FeatureQuantize

SMALL = Shape(4, 24, 8, 50)
# A compiled form has its own test in the package that compiles; here it would cost half of the time.
RUNNABLE = [name for name in PEERS if name != "addmm_compiled" and unavailable(name) is None]


@pytest.mark.parametrize("make", [clustered, feature_like])
@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_peer_finds_the_codes_of_float64(name, make):
    features, state = make(SMALL)
    tokens = as_tokens(features)
    exact = {"differ": 0.0, "beyond": 0.0}
    if "search" in PEERS[name].modes:
        found = PEERS[name](state).search(features if PEERS[name].from_images else tokens)
        assert found.shape == (256,) and exactness(found, tokens, state.codes) == exact
    if "train_step" in PEERS[name].modes:
        peer = PEERS[name](state)
        output = peer.step(features, torch.ones_like(features))
        assert exactness(output.indices, tokens, state.codes) == exact
        if name != "ours_regularize":
            expected = state.codes[output.indices.flatten()].view(4, 8, 8, 24).permute(0, 3, 1, 2)
            torch.testing.assert_close(output.features.detach(), expected, rtol=1e-4, atol=1e-4)
        peer.reset(state)  # and from the same codebook the same again
        assert exactness(peer.forward(features).indices, tokens, state.codes) == exact


def test_exactness_tells_wrong_codes():
    features, state = clustered(SMALL)
    wrong = torch.zeros(256, dtype=torch.int64)
    assert exactness(wrong, as_tokens(features), state.codes)["beyond"] > 0.9


def test_training_peers_give_the_same_loss_and_gradient():
    features, state = clustered(SMALL)
    gradient = torch.randn_like(features)
    steps = {}
    for name in ("ours", "upstream", "taming", "cdist"):
        leaf = features.clone().requires_grad_()
        output = PEERS[name](state).forward(leaf)
        torch.autograd.backward((output.features, output.loss.mean()), (gradient, None))
        steps[name] = (output.loss.mean().detach(), leaf.grad)
    for name in steps:
        torch.testing.assert_close(steps[name], steps["ours"], rtol=1e-4, atol=1e-6)


def test_the_upstream_form_moves_its_codebook_as_the_compatible_layer_does():
    features, state = clustered(SMALL)
    state = State(state.codes, torch.zeros(50), state.codes.clone())  # the released layer's start
    form = PEERS["upstream"](state)
    layer = FeatureQuantize(24, 50, compat="torch", options=CodebookOptions())
    layer.load_original(state.codes.t(), state.total.t(), state.number)
    for batch in (features, features.flip(0) * 0.9):
        expected = layer(batch)
        output = form.forward(batch)
        assert torch.equal(output.indices, expected.indices.flatten())
        torch.testing.assert_close(output.loss.mean(), expected.loss)
    torch.testing.assert_close(form.number, layer.ema_count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.total, layer.ema_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.codes, layer.codebook, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", peers.MODES)
def test_no_mode_of_ours_makes_a_tensor_of_tokens_times_codes(mode):
    shape = Shape(4, 16, 32, 1024)
    features, state = clustered(shape)
    sizes = {}
    for name in ("ours", "ours_regularize", "upstream"):
        peer, inputs = PEERS[name](state), search_worker._inputs(PEERS[name], mode, features)
        with LargestTensor() as seen:
            if mode in PEERS[name].modes:
                search_worker._call(peer, mode, inputs)
        sizes[name] = seen.largest
    assert max(sizes["ours"], sizes["ours_regularize"]) < shape.tokens * shape.codebook_size
    assert sizes["upstream"] >= shape.tokens * shape.codebook_size  # so the detector works


def test_a_missing_peer_is_named_with_what_installs_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find(name))
    hint = "not installed: pip install 'fq-gan[bench]'"
    assert unavailable("faiss") == hint and unavailable("upstream") is None
    times = search_worker.time_shape(
        SMALL, data="clustered", peers=["ours", "faiss"], repeats=2, modes=("search",)
    )
    assert times["search"]["faiss"] == {"skipped": hint}
    results = made_up(1.0)
    results["shapes"]["S1"]["times"]["clustered"]["search"]["faiss"] = {"skipped": hint}
    assert f"| faiss | {hint} |" in search_report.report(results)


def test_no_compiler_is_a_reason_to_leave_the_compiled_form_out(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert unavailable("addmm_compiled") == "no C++ compiler (no-such-compiler) for torch.compile"


def made_up(ratio, *, memory=6.0, shapes=("S1", "S2", "S3", "S4")):
    """Results in which every peer takes ``ratio`` times as long as ours, and the limit half as long."""
    entry = {"ms": 20.0 * ratio, "ratio": ratio, "quartiles": [ratio, ratio], "ratios": [ratio] * 3,
             "differ": 0.0, "beyond": 0.0}  # fmt: skip
    times = {
        mode: {"ours": {"ms": 20.0, "differ": 0.0, "beyond": 0.0}}
        | {name: dict(entry) for name, kind in PEERS.items() if name != "ours" and mode in kind.modes}
        for mode in peers.MODES
    }
    for mode, share in zip(peers.MODES, (0.5, 0.6, 0.75), strict=True):
        times[mode]["limit"] = {"best": "convolution", "gflops": 107.0, "share": share}
    grown = {mode: {"ours": memory, "ours, 4N": memory, "upstream": 136.0} for mode in search.MEMORY_MODES}
    return {
        "settings": {"threads": 1, "clock": "process time", "repeats": 3},
        "provenance": [
            {"command": "python -m benchmarks.search --out /somewhere/else", "commit": "0" * 40,
             "dirty": False, "versions": {"torch": "0"}, "device_name": "a processor", "started": "now"}
        ],
        "shapes": {
            name: {"shape": peers.SHAPES[name]._asdict(), "repeats": 3,
                   "times": {data: json.loads(json.dumps(times)) for data in peers.DATA}}
            for name in shapes
        },
        "memory": {"S2": grown, "S3": grown},
    }  # fmt: skip


def verdicts(results):
    return {row.quantity: (row.must_met, row.aim_met) for row in search_report.judge(results)}


def test_verdicts_follow_from_the_numbers():
    found = verdicts(made_up(4.5))
    assert found["search vs upstream form"] == (True, False)
    assert found["search vs lucidrains"] == (True, False)
    assert found["search vs addmm + argmin"] == (True, True)
    assert found["train-forward vs lucidrains"] == (False, False)
    assert found["search, share of L"] == (False, False)  # half of L is enough at 64 channels only
    assert found["search, memory beyond indices"] == (True, True)
    assert found["BigGAN-CIFAR discriminator step, overhead"] == (None, None)
    assert set(verdicts(made_up(11.0)).values()) >= {(True, True)}


def test_what_the_limit_itself_would_reach_is_told_for_every_mode():
    lines = search_report.ceilings(made_up(6.0))
    assert "| search vs lucidrains | 12.00x | 12.00x | 12.00x | 12.00x |  |  |  |" in lines
    assert "| train-forward vs upstream form | 10.00x | 10.00x | 10.00x | 10.00x |  |  |  |" in lines
    assert "| train-step vs upstream form | 8.00x | 8.00x | 8.00x | 8.00x |  |  |  |" in lines


def test_the_worse_kind_of_data_and_the_worst_shape_decide():
    results = made_up(6.0)
    results["shapes"]["S3"]["times"]["feature_like"]["search"]["upstream"]["ratio"] = 2.9
    row = search_report.judge(results)[0]
    assert row.cells["S3"] == "2.90x" and row.cells["S1"] == "6.00x"
    assert row.overall == f"{(6**3 * 2.9) ** 0.25:.2f}x" and (row.must_met, row.aim_met) == (False, True)


def test_a_part_of_the_shapes_can_fail_a_target_but_not_meet_it():
    assert verdicts(made_up(6.0, shapes=("S1", "S2", "S3")))["search vs upstream form"] == (None, None)
    assert verdicts(made_up(2.0, shapes=("S1", "S2", "S3")))["search vs upstream form"] == (False, None)


def test_memory_that_grows_with_the_tokens_is_not_met():
    results = made_up(6.0)
    results["memory"]["S3"] = {mode: dict(grown) for mode, grown in results["memory"]["S3"].items()}
    results["memory"]["S3"]["search"]["ours, 4N"] = 20.0
    assert verdicts(results)["search, memory beyond indices"] == (False, False)
    results["memory"]["S3"]["search"]["ours"] = None  # no /proc
    assert verdicts(results)["search, memory beyond indices"] == (None, None)
    assert "no /proc on this system" in search_report.report(results)


def test_the_discriminator_step_is_judged_in_both_modes():
    results = made_up(6.0)
    results["discriminator_step"] = {
        "overhead": {"regularize": 0.07, "replace": 0.1},
        "provenance": results["provenance"][0] | {"command": "python -m benchmarks.overhead"},
    }
    assert verdicts(results)["BigGAN-CIFAR discriminator step, overhead"] == (True, False)
    text = search_report.report(results)
    assert "regularize 7.0%, replace 10.0%" in text and "`python -m benchmarks.overhead`" in text


def test_the_report_prints_the_numbers_and_every_miss(tmp_path):
    results = made_up(2.5, memory=30.0)
    text = search_report.report(results)
    assert "| search vs upstream form | ≥ 3x each | ≥ 5x mean | 2.50x | 2.50x | 2.50x | 2.50x |" in text
    assert text.count("**NOT met**") == sum(row.count(False) for row in search_report.judge(results))
    assert "| search vs upstream form | 5.00x | 5.00x | 5.00x | 5.00x |" in text  # at L: 2.5 over a half
    assert "| ours | 30.0 | 30.0 | 30.0 | 30.0 |" in text and "| upstream form | 136.0 |" in text
    assert "--out else" in text and "somewhere" not in text
    search_report.draw(results, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_a_run_measures_saves_and_keeps_what_was_measured_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "SHAPES", {"S1": SMALL, "S2": SMALL._replace(batch=2)})
    monkeypatch.setattr(search, "draw", lambda results, path: None)
    monkeypatch.setattr(search_worker.gc, "collect", lambda: None)  # long in the process of many tests
    monkeypatch.setattr(search, "PEERS", {name: PEERS[name] for name in ("ours", "upstream")})
    monkeypatch.setattr(search, "MEMORY_SHAPES", ())
    monkeypatch.setattr(search, "run_worker", lambda job, threads: in_this_process(dict(job)))
    first = search.run(tmp_path, shapes=["S2"], repeats=2, threads=1)
    both = search.run(tmp_path, shapes=["S1"], repeats=2, threads=1)
    assert list(both["shapes"]) == ["S1", "S2"] and both["shapes"]["S2"] == first["shapes"]["S2"]
    assert json.loads((tmp_path / "results.json").read_text()) == both
    entry = both["shapes"]["S1"]["times"]["clustered"]["train_step"]["upstream"]
    assert len(entry["ratios"]) == 6 and entry["quartiles"][0] <= entry["ratio"] <= entry["quartiles"][1]
    assert f"{entry['ratio']:.2f} (" in (tmp_path / "report.md").read_text()
    other = search.run(tmp_path, shapes=["S1"], repeats=3, threads=1)
    assert list(other["shapes"]) == ["S1"] and len(other["provenance"]) == 1


def in_this_process(job):
    shape, job = job.pop("shape"), {key: value for key, value in job.items() if key != "task"}
    if "faiss" in job["peers"]:
        return {"search": {"faiss": {"skipped": "left out of this test"}}}
    return search_worker.time_shape(shape, **job)


def test_a_worker_measures_memory_in_a_process_of_its_own():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc on this system")
    shape = Shape(256, 8, 16, 512)
    job = {"task": "memory", "shape": shape, "peer": "upstream", "mode": "search"}
    assert search.run_worker(job, 1) > shape.tokens * shape.codebook_size * 4 / 2**20


def test_one_repeat_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        search.main(["--repeats", "1"])
    assert "--repeats is 1: quartiles need at least 2" in capsys.readouterr().err
