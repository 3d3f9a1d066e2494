"""The pre-training experiment: what sees which houses, order of the runs, paired intervals, the report."""

import json
import math
import os
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import readme
from benchmarks.prevalent import (
    ARMS,
    REAL_ARMS,
    SEEN,
    SETTINGS,
    TASKS,
    UNSEEN,
    Job,
    Lengths,
    make_jobs,
    real_jobs,
    run_jobs,
)
from benchmarks.prevalent_report import (
    add_processor_seconds,
    paired_interval,
    path_of,
    processor_seconds,
    read_scores,
    write,
)
from fq.run import read_metrics
from vln import pretrain_data, speaker_data
from vln.features import FeatureStore
from vln.houses import main as make_houses

TINY = Lengths(
    speaker_steps=2,
    num_paths=6,
    num_instructions=2,
    pretrain_steps=2,
    long_pretrain_steps=3,
    steps=2,
    routes=2,
    explore_steps=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole experiment, tiny, in this process: its folder, and the scans whose features each job read."""
    runs = tmp_path_factory.mktemp("prevalent")
    world = "--num-seen 4 --num-unseen 1 --train-groups 12 --val-groups 2 --group-size 3".split()
    make_houses(["--out", str(runs / "world"), *world])
    seen, gather, threads = {}, FeatureStore.gather, torch.get_num_threads()
    patch = pytest.MonkeyPatch()
    patch.setenv("ACCELERATE_USE_CPU", "1")
    torch.set_num_threads(1)
    jobs = make_jobs(runs / "world", runs, [0], TINY, list(TASKS))
    for job in [*jobs, *real_jobs(runs / "world", "tokenizer", runs, [0], TINY)]:
        scans = seen.setdefault(job.name, set())

        def recorded(self, scan_ids, viewpoint_ids, scans=scans):
            scans.update(scan_ids)
            return gather(self, scan_ids, viewpoint_ids)

        patch.setattr(FeatureStore, "gather", recorded)
        assert not job.finished()
        AcceleratorState._reset_state(reset_partial_state=True)
        module, *words = job.words()
        patch.setattr(sys, "orig_argv", [sys.executable, "-m", module, *words])  # for the provenance
        import_module(module).main(words)
        assert job.finished(), job.name
        add_processor_seconds(runs, job.name, 8.0 if job.name.startswith("pretrain") else 3.0)
    patch.undo()
    torch.set_num_threads(threads)
    return runs, seen


def test_speaker_sampling_and_pre_training_never_see_unseen_houses(finished):
    _, seen = finished
    before = {name: scans for name, scans in seen.items() if name.startswith(("speaker", "told", "pretrain"))}
    assert not any(seen[name] for name in seen if name.startswith("real"))  # random vectors, no store
    assert sorted(before) == ["pretrain-actions-0", "pretrain-b-0", "pretrain-c+-0", "pretrain-c-0",
                              "pretrain-d-0", "pretrain-rank-0", "speaker-0", "told-0.json"]  # fmt: skip
    for name, scans in before.items():
        assert scans and all(scan.startswith("seen") for scan in scans), name
    assert any(scan.startswith("unseen") for scan in seen["r2r-a-0.val_unseen.scores.json"])


def test_items_of_unseen_houses_are_not_even_opened_for_the_pre_training(finished):
    runs, _ = finished
    for job in make_jobs(runs / "world", runs, [0], TINY, ["r2r"]):
        module, *words = job.words()
        if module in ("vln.pretrain", "vln.speaker"):
            data = import_module(module).parse(words).data
            opened = (pretrain_data if module == "vln.pretrain" else speaker_data).open_data(data)
            for part in (opened.train, *opened.val.values()):
                assert not [scan for scan in part.scan_ids if scan.startswith("unseen")], job.name


def test_report_has_every_arm_with_the_scores_of_its_file(finished, tmp_path):
    runs, _ = finished
    splits = {task: (SEEN[task], UNSEEN[task]) for task in TASKS} | {"real": ("val_seen",)}
    arms = TASKS | {"real": REAL_ARMS}
    text = write(runs, tmp_path, [0], arms, ARMS, splits, SETTINGS).read_text()
    assert set(json.loads((tmp_path / "results.json").read_text())["real/val_seen"]["means"]) == {"a", "c"}
    assert "random vector for each view" in text and "real/val_unseen" not in text
    for arm, label in ARMS.items():
        assert f"| ({arm}) | {label} |" in text
    scores = json.loads((runs / "r2r-d-0.val_unseen.scores.json").read_text())["scores"]["r2r"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["r2r/val_unseen"]["means"]["d"]["spl"] == pytest.approx([scores["spl"]])
    assert f"{scores['nav_error']:.2f}" in text
    assert {"c - a, success", "d - c, spl", "c+ - c, spl"} <= set(results["r2r/val_unseen"]["differences"])
    assert "d - a, goal_progress" in results["ndh/val_unseen"]["differences"]
    for setting in SETTINGS:
        scored = json.loads((runs / f"r2r-d-0.val_unseen.{setting}.scores.json").read_text())
        assert scored["setting"] == setting
        assert f"| {setting} | {100 * scored['scores']['r2r']['success']:.1f} |" in text
    curve = [line["val_seen/action_loss"] for line in read_metrics(runs / "pretrain-actions-0")
             if "val_seen/action_loss" in line]  # fmt: skip
    alone = next(line for line in text.splitlines() if line.startswith("| actions alone, seed 0 |"))
    assert f"|  | {min(curve):.3f}, " in alone and f" | {curve[-1]:.3f} | " in alone
    assert "| (b) masked words | " in text
    floor = [line["val_seen/action_floor"] for line in read_metrics(runs / "pretrain-rank-0")
             if "val_seen/action_floor" in line][-1]  # fmt: skip
    assert "| rank among the candidates | " in text and f" | {100 * floor:.1f} |" in text
    # Settings, action target and R2R's own items are no part of what the table cost.
    seconds = sum(float(file.read_text()) for file in (runs / "logs").glob("*.seconds"))
    besides = 2 * 3 + 8 + (8 + 3 * 3) + 5 * 3
    assert results["runs"]["minutes_besides"] == round(besides / 60, 1)
    assert results["runs"]["minutes"] == round((seconds - besides) / 60, 1)
    lain = len({item["scan"] for item in json.loads((runs / "world/r2r/R2R_train.json").read_text())})
    assert (
        f"A world of 4 training houses and 1 unseen ones, seed 0; R2R's items lie in {lain} and 1 of" in text
    )
    assert str(runs) not in text and "`python -m vln.pretrain houses" in text
    assert "(d) | as (c+)" in text and "| 192 |" in text  # 3 steps of 64 triplets
    for name in ("curves.png", "pretraining.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_a_report_names_what_is_not_finished_and_does_without(finished, tmp_path):
    runs, _ = finished
    splits = {task: (SEEN[task], UNSEEN[task]) for task in TASKS}
    names = ("r2r-b-0.val_unseen", "ndh-a-0.val_seen", "ndh-d-0.val_seen", "r2r-d-0.val_unseen.pre-explored")
    gone = [runs / f"{name}.scores.json" for name in names]
    for file in gone:
        file.rename(file.with_suffix(".away"))
    try:
        text = write(runs, tmp_path, [0], TASKS, ARMS, splits, SETTINGS).read_text()
    finally:
        for file in gone:
            file.with_suffix(".away").rename(file)
    assert "**Not finished, and left out: r2r (b), ndh (a), ndh (d).**" in text
    assert "| (b) |" not in text and "| (c) |" in text and "## NDH" not in text and "## HANNA" in text
    assert "### Settings" not in text
    with pytest.raises(ValueError, match="has no arm with the scores of seeds 0, 7"):
        write(runs, tmp_path / "none", [0, 7], TASKS, ARMS, splits)
    assert not (tmp_path / "none").exists()


def test_the_manual_shows_the_numbers_of_the_report(finished, tmp_path, monkeypatch):
    runs, _ = finished
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "not here yet" in readme.pretraining()
    splits = {task: (SEEN[task], UNSEEN[task]) for task in TASKS}
    write(runs, tmp_path / "prevalent", [0], TASKS, ARMS, splits)
    lines = {line.split(" |")[0]: line for line in readme.pretraining().splitlines()}
    scored = {task: json.loads((runs / f"{task}-d-0.{UNSEEN[task]}.scores.json").read_text())["scores"]
              for task in TASKS}  # fmt: skip
    row = lines[f"| (d) {ARMS['d']}"]
    assert f"{100 * scored['r2r']['r2r']['success']:.1f}, {100 * scored['r2r']['r2r']['spl']:.1f} |" in row
    assert f"| {scored['ndh']['trusted_path']['goal_progress']:.2f} |" in row
    assert row.endswith(f"| {100 * scored['hanna']['hanna']['success']:.1f} |  |")
    assert lines[f"| (b) {ARMS['b']}"].endswith("|  |  |  |") and "| R2R, unseen houses: c - a" in lines
    found = json.loads((tmp_path / "prevalent" / "results.json").read_text())["ndh/val_unseen"]["differences"]
    gained = lines["| NDH, unseen houses: d - a"].split(" | ")[-1]
    assert f"{found['d - a, goal_progress']['mean']:+.1f}" in gained
    assert "| HANNA, unseen houses: d - a" in lines and not any("R2R's own" in name for name in lines)
    assert "Not finished" not in readme.pretraining()
    write(runs, tmp_path / "prevalent", [0], TASKS | {"ndh": ("a", "x")}, ARMS, splits)
    assert "\nNot finished yet: ndh (x).\n" in readme.pretraining()
    real = {"real": REAL_ARMS}, {"real": ("val_seen",)}
    write(runs, tmp_path / "prevalent", [0], TASKS | real[0], ARMS, splits | real[1])
    assert "\n| R2R's own scans, all seen: c - a | " in readme.pretraining()


def test_longer_fine_tuning_takes_the_time_of_the_pre_training_and_keeps_its_length(finished):
    runs, _ = finished
    jobs = {job.name: job for job in make_jobs(runs / "world", runs, [0, 1], TINY, ["r2r"])}

    def steps(name):
        words = jobs[name].words()
        return int(words[words.index("--steps") + 1])

    longer = math.ceil(TINY.steps * (1 + 8 / 3))  # processor seconds of the one and the other
    assert json.loads((runs / "r2r-a+-0" / "config.json").read_text())["run"]["steps"] == longer
    assert steps("r2r-a+-1") == longer
    assert jobs["r2r-a+-1"].after == ("r2r-a-0", "r2r-a-1", "pretrain-c-0", "pretrain-c-1")
    add_processor_seconds(runs, "pretrain-c-1", 16.0)  # known of two seeds: their mean
    assert steps("r2r-a+-0") == longer and steps("r2r-a+-1") == math.ceil(TINY.steps * (1 + 12 / 3))
    (runs / "logs" / "pretrain-c-1.seconds").unlink()


def test_processor_time_adds_up_over_processes_and_a_missing_one_is_named(tmp_path):
    job = Job("twice", (), lambda: ["timeit", "-n", "1", "-r", "1", "sum(range(10**7))"], lambda: False)
    list(run_jobs([job], tmp_path, workers=1))
    once = processor_seconds(tmp_path, ["twice", "other"])
    list(run_jobs([job], tmp_path, workers=1))
    assert 0.05 < once < processor_seconds(tmp_path, ["twice"])
    with pytest.raises(ValueError, match="processor time of other, else is not known"):
        processor_seconds(tmp_path, ["other", "else"])


def test_arms_that_decide_come_first_for_all_seeds(tmp_path):
    jobs = make_jobs(tmp_path / "world", tmp_path, [0, 1], TINY, list(TASKS))
    names = [job.name for job in jobs]
    assert names.index("hanna-d-1.val_unseen_all.scores.json") < names.index("pretrain-b-0")
    assert all(set(job.after) <= set(names[:number]) for number, job in enumerate(jobs))


def test_jobs_wait_for_what_they_need_and_finished_ones_are_not_run(tmp_path):
    made = []

    def job(name, *after, words=("this",), done=False):
        def words_of():
            made.append(name)
            return list(words)

        return Job(name, after, words_of, lambda: done)

    jobs = [job("first"), job("old", done=True), job("last", "first", "old"), job("middle")]
    lines = list(run_jobs(jobs, tmp_path, workers=2))
    assert "old: finished before" in lines and len(lines) == 4
    assert sorted(made) == ["first", "last", "middle"] and made.index("last") > made.index("first")
    assert "Zen of Python" in (tmp_path / "logs" / "first.log").read_text()


def test_a_failed_job_ends_the_experiment_and_names_its_log(tmp_path):
    broken = Job("broken", (), lambda: ["no_such_module"], lambda: False)
    after = Job("after", ("broken",), lambda: pytest.fail("must not run"), lambda: False)
    with pytest.raises(RuntimeError, match=rf"broken ended with code 1: see .*{os.sep}broken\.log"):
        list(run_jobs([broken, after], tmp_path, workers=2))


STOPPED = """
import sys
from pathlib import Path
import benchmarks.prevalent as experiment
(Path(sys.argv[1]) / "world").mkdir()
(Path(sys.argv[1]) / "world" / "config.json").write_text("{}")
waits = f"import os, time; open('{sys.argv[1]}/number', 'w').write(str(os.getpid())); time.sleep(60)"
job = experiment.Job("waits", (), lambda: ["timeit", "-n", "1", "-r", "1", waits], lambda: False)
experiment.make_jobs = lambda *_: [job]
experiment.main(["--runs", sys.argv[1]])
"""


def test_what_ends_the_experiment_ends_its_runs(tmp_path):
    experiment = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)])
    number = tmp_path / "number"
    for _ in range(600):
        if number.is_file() and number.read_text():
            break
        time.sleep(0.1)
    experiment.terminate()
    assert experiment.wait(timeout=30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_paired_interval_sees_a_small_gain_under_large_differences_between_items():
    random = np.random.default_rng(0)
    hard = random.normal(0, 10, 400)  # the same for both: pairing takes it out
    first = hard + random.normal(0.5, 1, (3, 400))
    second = hard + random.normal(0.0, 1, (3, 400))
    found = paired_interval(first, second, np.arange(400), resamples=500)
    assert found.excludes_zero and 0.3 < found.low < found.mean < found.high < 0.7
    none = paired_interval(first, first + random.normal(0, 1, (3, 400)), np.arange(400), resamples=500)
    assert not none.excludes_zero


def test_paired_interval_counts_paths_not_instructions():
    random = np.random.default_rng(1)
    paths = np.repeat(np.arange(30), 9)
    gain = random.normal(0.2, 1, 30)[paths][None].repeat(2, axis=0)
    wide = paired_interval(gain, np.zeros_like(gain), paths, resamples=400)
    narrow = paired_interval(gain, np.zeros_like(gain), np.arange(270), resamples=400)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert path_of("12_34_2") == "12_34" and path_of("7") == "7"


def test_scores_of_other_items_are_refused(tmp_path):
    for number, names in enumerate((["1_0", "1_1"], ["1_0"])):
        row = dict.fromkeys(("success", "spl", "oracle_success", "ndtw", "nav_error"), 1.0)
        text = json.dumps({"items": {"r2r": dict.fromkeys(names, row)}})
        (tmp_path / f"{number}.json").write_text(text)
    files = [tmp_path / "0.json", tmp_path / "1.json"]
    with pytest.raises(ValueError, match=r"1\.json has other items than .*0\.json"):
        read_scores(files, "r2r")
    assert read_scores(files[:1], "r2r").values["spl"].tolist() == [[1.0, 1.0]]
