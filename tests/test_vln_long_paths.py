"""R4R and RxR, whose paths are detours: learnt, walked, scored and drawn like R2R."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from test_vln_train import SMALL
from tiny_vln import write_folder

from fq.run import read_metrics
from vln import evaluate, render, train
from vln.data import read_r2r, read_r4r, read_rxr
from vln.joined import join_paths, write_r2r
from vln.metrics import mean_scores, score_r2r
from vln.navgraph import load_graphs
from vln.submission import read_submission


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """R2R, and R4R and RxR items made of it: there and back, so that shortest ways are short."""
    folder = write_folder(tmp_path_factory.mktemp("data") / "world", per_scan=6)
    for split in ("train", "val_seen"):
        items = read_r2r(folder, split)
        back = [item._replace(path_id=900 + int(item.path_id), path=item.path[::-1]) for item in items]
        joined = join_paths([*items, *back], load_graphs(folder))
        write_r2r(
            folder / f"R4R_{split}.json", [item for item in joined if item.path[0] != item.path[-1]][:6]
        )
        rows = [
            {"split": split, "instruction_id": 10 * number + each, "annotator_id": 1, "language": "en-US",
             "path_id": item.path_id, "scan": item.scan_id, "path": [*item.path, *item.path[-2::-1][:2]],
             "heading": item.heading, "instruction": text, "timed_instruction": []}
            for number, item in enumerate(items) for each, text in enumerate(item.instructions)
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"rxr_{split}_guide.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A short run on each."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setenv("ACCELERATE_USE_CPU", "1")
    torch.set_num_threads(1)
    found = {}
    for name in ("r4r", "rxr"):
        AcceleratorState._reset_state(reset_partial_state=True)
        found[name] = folder = tmp_path_factory.mktemp("runs") / name
        words = [*SMALL, "--dataset", name, "--follow", "path", "--data", data, "--out", folder, "--steps", 2]
        train.train(train.parse([str(word) for word in words]))
    yield found
    torch.set_num_threads(threads)
    patch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name, reader", [("r4r", read_r4r), ("rxr", read_rxr)])
def test_a_run_is_walked_and_scored_on_its_own_items(data, runs, capsys, name, reader):
    words = [runs[name], "--data", data, "--split", "val_seen", "--features", "random:6"]
    evaluate.main([str(word) for word in words])
    assert f"{name} val_seen, greedy: " in capsys.readouterr().out
    result = json.loads((runs[name] / f"val_seen.{name}.json.scores.json").read_text())
    items, graphs = reader(data, "val_seen"), load_graphs(data)
    paths = read_submission(runs[name] / f"val_seen.{name}.json").paths
    assert not (runs[name] / "val_seen.json").exists()  # that is R2R's
    assert sorted(paths) == sorted(instruction for item in items for instruction in item.instruction_ids)
    expected = mean_scores(score_r2r(paths, items, graphs, annotated_length=name == "r4r"))
    assert result["scores"][name] == pytest.approx(expected) and result["dataset"] == name
    lengths = [result["items"][name][key]["shortest_length"] for key in paths]
    shortest = score_r2r(paths, items, graphs).shortest_length
    # For R4R the annotated way counts, which is longer than the shortest one.
    assert (sum(lengths) > 1.2 * shortest.sum()) == (name == "r4r")
    # Given alone, a submission that was walked here is scored on the same items.
    evaluate.main([str(runs[name] / f"val_seen.{name}.json"), "--data", str(data), "--split", "val_seen"])
    assert f"{name} val_seen, greedy: " in capsys.readouterr().out
    record = runs[name] / f"val_seen.{name}.json.provenance.json"
    told = record.read_text()
    record.write_text(told.replace(f'"dataset": "{name}"', '"dataset": "other"'))
    with pytest.raises(SystemExit, match=r"provenance\.json is damaged: .* \(dataset 'other'\)"):
        evaluate.main([str(runs[name] / f"val_seen.{name}.json"), "--data", str(data), "--split", "val_seen"])
    record.write_text(told)
    # While it learns, a run scores itself the same way.
    told = [line for line in read_metrics(runs[name]) if "val_seen/shortest_length" in line][-1]
    assert {field: told[f"val_seen/{field}"] for field in expected} == pytest.approx(expected)


def test_scores_stand_on_the_maps_of_rxr(data, runs, tmp_path):
    submission = runs["rxr"] / "samples" / "last_val_seen.json"
    words = ["episodes", "--submission", submission, "--data", data, "--split", "val_seen", "--task", "rxr",
             "--order", "worst", "--limit", 2, "--out", tmp_path / "maps"]  # fmt: skip
    render.main([str(word) for word in words])
    page = (tmp_path / "maps" / "index.html").read_text()
    assert page.count("nDTW") >= 2 and len(list((tmp_path / "maps").glob("*.png"))) == 2


def test_a_data_set_of_another_task_is_refused(data, runs, tmp_path):
    submission = tmp_path / "ndh.json"
    submission.write_text(json.dumps([{"inst_idx": 1, "trajectory": [["a-0", 0.0, 0.0]]}]))
    with pytest.raises(SystemExit, match=r"ndh\.json is for ndh, not for rxr"):
        evaluate.main([str(submission), "--data", str(data), "--dataset", "rxr"])
    with pytest.raises(SystemExit, match=r"missing.* unknown"):  # nothing says whose items these are: R2R's
        evaluate.main([str(runs["rxr"] / "samples" / "last_val_seen.json"), "--data", str(data),
                       "--split", "val_seen"])  # fmt: skip
