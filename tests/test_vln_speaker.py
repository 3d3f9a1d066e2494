"""The speaker's command: learning, resumed runs, two processes, words, folders, and what is refused."""

import json
import os
import pickle
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from tiny_vln import WORDS, write_folder

from fq.run import RunFolder, read_metrics
from vln import speaker
from vln.data import read_r2r
from vln.snapshots import SpeakerSnapshot, speaker_to_released, write_snapshot
from vln.speaker_config import ENVDROP, HOUSES, OptimConfig, PathsConfig, RunConfig, SizesConfig
from vln.speaker_data import open_data
from vln.speaker_folder import TrainedSpeaker, fingerprint, load_speaker, save_speaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_scores import Said, bleu_scores, evaluate, require_sacrebleu
from vln.speaker_words import Words

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "houses --features random:6 --hidden-size 16 --word-size 8 --angle-size 4 --min-count 1 --max-words 12"
    " --batch-size 8 --eval-words 12 --log-every 1 --val-splits val_seen --no-sacrebleu"
).split()

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "world")


def run_here(data, out, *options):
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [*SMALL, "--data", str(data), "--out", str(out), *map(str, options)]
    speaker.train(speaker.parse(given))
    return read_metrics(out)


def untimed(records):
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def tiny_speaker(seed=0, words=None, **changes):
    torch.manual_seed(seed)
    words = words or Words(("<PAD>", "<UNK>", "<EOS>", *WORDS, "<BOS>"))
    sizes = {"vocab_size": len(words), "view_size": 10, "angle_size": 4, "hidden_size": 8, "word_size": 6}
    model = Speaker(SpeakerConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return TrainedSpeaker(model.eval(), words, "blocks", {"scan_ids": ["a"]})


# ---- training


def test_a_speaker_learns_paths_and_says_them_again(data, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "connectivity").symlink_to(data / "connectivity")
    rows = json.loads((data / "R2R_train.json").read_text())
    for row in rows:  # of two texts it could say but one
        row["instructions"] = row["instructions"][:1]
    (folder / "R2R_train.json").write_text(json.dumps(rows))
    records = run_here(
        folder, tmp_path / "run", "--val-splits", "train", "--select", "train", "--steps", 100, "--lr", 2e-2,
        "--dropout", 0, "--feature-dropout", 0, "--hidden-size", 32, "--eval-every", 50, "--log-every", 10,
    )  # fmt: skip
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.1 * losses[0] and [r["step"] for r in records if "loss" in r] == list(
        range(10, 101, 10)
    )
    before, after = records[0], records[-1]
    assert before["step"] == 0 and before["train/word_accuracy"] < 0.5 < 0.99 < after["train/word_accuracy"]
    assert after["train/bleu_original"] == pytest.approx(100) and after["train/loss"] < 0.1
    sample = (tmp_path / "run" / "samples" / "000100.txt").read_text().splitlines()
    assert len(sample) == 3 * 8
    for said, reference in zip(sample[1::3], sample[2::3], strict=True):
        assert said.split(":")[1].split() == reference.split(":")[1].split()
    trained = load_speaker(tmp_path / "run")
    assert trained.origin["scan_ids"] == ["a", "b"] and trained.origin["splits"] == ["train"]
    opened = open_data(PathsConfig(data=str(folder), features="random:6", min_count=1))
    again = evaluate(trained, opened.train, Accelerator(cpu=True), sacrebleu=False)
    assert again.figures["bleu_original"] == pytest.approx(100)


def test_a_killed_run_resumes_to_the_bit(data, tmp_path, monkeypatch):
    options = ("--steps", 6, "--checkpoint-every", 2, "--eval-every", 3, "--lr", 1e-2)
    whole = run_here(data, tmp_path / "whole", *options)
    save = RunFolder.save

    def killed(self, step, **kwargs):
        if step == 6:
            raise KeyboardInterrupt
        return save(self, step, **kwargs)

    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run_here(data, tmp_path / "parts", *options)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    parts = run_here(data, tmp_path / "parts", *options)
    assert untimed(parts) == untimed(whole)
    ours, theirs = (load_speaker(tmp_path / name) for name in ("whole", "parts"))
    assert fingerprint(ours) == fingerprint(theirs) and ours.origin["step"] == theirs.origin["step"]
    texts = [(tmp_path / name / "samples" / "000006.txt").read_text() for name in ("whole", "parts")]
    assert texts[0] == texts[1]


def test_two_processes_learn_and_say_the_same(data, tmp_path):
    options = [
        "--steps",
        "6",
        "--dropout",
        "0",
        "--feature-dropout",
        "0",
        "--eval-every",
        "3",
        "--lr",
        "1e-2",
    ]
    options += ["--batch-size", "3"]  # an odd share for each process
    one = run_here(data, tmp_path / "one", *options)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "vln.speaker", *SMALL, "--data", str(data)]
    command += ["--out", str(tmp_path / "pair"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout
    two = read_metrics(tmp_path / "pair")
    assert len(two) == len(one)
    for ours, theirs in zip(untimed(one), untimed(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=2e-5), (name, ours["step"])
    assert (tmp_path / "one" / "samples" / "000006.txt").read_text() == (
        tmp_path / "pair" / "samples" / "000006.txt"
    ).read_text()


def test_the_best_speaker_is_kept_unless_the_last_is_asked_for(data, tmp_path, monkeypatch):
    scores = {0: 5.0, 1: 30.0, 2: 20.0}
    evaluated = speaker.evaluate

    def scored(trained, *args, **kwargs):
        found = evaluated(trained, *args, **kwargs)
        found.figures["bleu_original"] = scores.pop(min(scores))
        return found

    monkeypatch.setattr(speaker, "evaluate", scored)
    run_here(data, tmp_path / "best", "--steps", 2, "--eval-every", 1)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    run_here(data, tmp_path / "last", "--steps", 2, "--eval-every", 1, "--select", "")
    assert load_speaker(tmp_path / "best").origin["step"] == 1
    assert load_speaker(tmp_path / "last").origin["step"] == 2


def test_a_run_goes_on_from_another_speaker(data, tmp_path):
    run_here(data, tmp_path / "first", "--steps", 1, "--select", "")
    first = load_speaker(tmp_path / "first")
    records = run_here(
        data, tmp_path / "second", "--steps", 1, "--init", tmp_path / "first", "--hidden-size", 32, "--lr", 0,
        "--select", "",
    )  # fmt: skip
    second = load_speaker(tmp_path / "second")
    assert fingerprint(second) == fingerprint(first)  # at a rate of 0
    assert second.origin["init"] == str(tmp_path / "first") and records[-1]["step"] == 1


def test_small_features_are_heard_from_the_start_as_large_ones_are(data):
    given = [*SMALL, "--data", str(data), "--match-features"]
    torch.manual_seed(0)
    matched, opened = speaker.build(speaker.parse(given))
    torch.manual_seed(0)
    plain, _ = speaker.build(speaker.parse([*given[:-1], "--no-match-features"]))
    size = opened.train.feature_size()
    assert size == pytest.approx(1.0, abs=0.05)  # random ones are standard normal
    speaker.match_features(matched.speaker.eval(), 0.25 / size)
    batch = opened.train.batch(np.arange(4), angle_size=4, orientation="blocks")
    small = [views.clone() for views in batch[:2]]
    for views in small:
        views[..., :6] *= 0.25
    with torch.no_grad():
        heard = matched.speaker.encoder.lstm(small[0])[0]
        torch.testing.assert_close(heard, plain.speaker.encoder.lstm(batch.actions)[0])
        attended = matched.speaker.encoder.attention(heard, small[1])
        torch.testing.assert_close(attended, plain.speaker.encoder.attention(heard, batch.panoramas))
    with pytest.raises(ValueError, match=r"root mean square of 0\.0: they are empty or broken"):
        speaker.match_features(plain.speaker, 0.0)


# ---- scores


def test_scores_do_not_depend_on_batches_and_are_those_of_each_word(data):
    opened = open_data(PathsConfig(data=str(data), features="random:6", min_count=1))
    trained = tiny_speaker(words=opened.words)
    found = [
        evaluate(trained, opened.train, Accelerator(cpu=True), batch_size=size, max_words=9, sacrebleu=False)
        for size in (1, 5, 64)
    ]
    assert found[0].said == found[1].said == found[2].said and len(found[0].said) == 8
    for other in found[1:]:
        assert other.figures == pytest.approx(found[0].figures, rel=1e-5)
    rows = np.arange(len(opened.train))
    with torch.no_grad():
        batch = opened.train.batch(rows, angle_size=4, orientation="blocks")
        loss, count = trained.speaker(*batch)
    assert found[0].figures["loss"] == pytest.approx(float(loss.sum() / count.sum()), rel=1e-5)
    assert not trained.speaker.training
    some = evaluate(trained, opened.train, Accelerator(cpu=True), num_paths=4, max_words=9, sacrebleu=False)
    assert [said.item for said in some.said] == [0, 2, 4, 6]


class Item(types.SimpleNamespace):
    """Of a split, with its instructions alone."""


def test_sacrebleu_is_given_lower_case_texts_and_gaps(monkeypatch):
    given = {}

    def corpus_bleu(texts, references, **options):
        given.update(texts=texts, references=references, options=options)
        return types.SimpleNamespace(score=12.5)

    monkeypatch.setitem(sys.modules, "sacrebleu", types.SimpleNamespace(corpus_bleu=corpus_bleu))
    data = types.SimpleNamespace(
        items=[Item(instructions=("Go left.", "turn left")), Item(instructions=("Stop.",))]
    )
    said = [Said(0, ["turn", "left"], "turn left"), Said(1, ["stop", "."], "stop.")]
    figures = bleu_scores(tiny_speaker(), data, said, sacrebleu=True)
    assert figures["bleu"] == 12.5 and figures["words"] == 2.0
    assert given["texts"] == ["turn left", "stop."] and given["options"] == {"lowercase": True}
    assert given["references"] == [["Go left.", "Stop."], ["turn left", None]]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'fq-gan\[vln\]', or give --no-sacrebleu"):
        require_sacrebleu()


def test_sacrebleu_and_the_originals_variant_agree_on_equal_texts():
    pytest.importorskip("sacrebleu")
    data = types.SimpleNamespace(items=[Item(instructions=("Go left then stop now.", "turn"))])
    said = [Said(0, "go left then stop now .".split(), "go left then stop now.")]
    figures = bleu_scores(tiny_speaker(), data, said, sacrebleu=True)
    assert figures["bleu"] == pytest.approx(100) and figures["bleu_original"] == pytest.approx(100)


# ---- words


def test_words_are_counted_and_listed_as_the_original_does(tmp_path):
    words = Words.count(["Turn left. Turn left!", "turn right", "left"], min_count=2)
    assert words.entries == ("<PAD>", "<UNK>", "<EOS>", "left", "turn", "<BOS>")
    ids = words.encode(["turn right, left", "left"], max_words=9)
    assert ids.tolist() == [[5, 4, 1, 1, 3, 2], [5, 3, 2, 0, 0, 0]]
    assert words.encode(["turn left turn left"], max_words=3).tolist() == [[5, 4, 3, 4]]  # and no end
    file = tmp_path / "vocab.txt"
    file.write_text("<PAD>\n<UNK>\n<EOS>\nleft\nturn\n")
    assert Words.listed(file).entries == words.entries
    words.save(tmp_path)
    assert Words.load(tmp_path).entries == words.entries


@given(st.lists(st.sampled_from([*WORDS, ".", ",", "'", "-", "(", ")", "..", "12"]), min_size=1, max_size=12))
def test_what_is_said_splits_into_the_same_words(said):
    # Points that follow each other are one word when they are read.
    said = [word for word, before in zip(said, [None, *said], strict=False) if not before or before[0] != "."]
    words = Words.count([" ".join(said)], min_count=1)
    ids = words.encode([" ".join(said)], max_words=50)
    assert words.said(ids[0, 1:]) == said and words.split(words.decode(ids[0, 1:])) == said


def test_a_tokenisers_pieces_can_be_the_words(data, tmp_path):
    run_here(data, tmp_path / "run", "--steps", 1, "--tokenizer", "tokenizer", "--select", "")
    trained = load_speaker(tmp_path / "run")
    assert set(trained.words.entries[3:-1]) <= set(WORDS)  # no [MASK], nor its own [UNK]
    ids = trained.words.encode(["Turn left unheard door"], max_words=9)[0, 1:]
    assert trained.words.decode(ids) == "turn left <UNK> door"


def test_words_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no word occurs 5 times"):
        Words.count(["go left"])
    with pytest.raises(FileNotFoundError, match="vocab does not exist: give a file of words"):
        Words.listed(tmp_path / "vocab")
    (tmp_path / "vocab").write_text("left\nright\n")
    with pytest.raises(ValueError, match="vocab is no list of a speaker's words: the vocabulary begins with"):
        Words.listed(tmp_path / "vocab")
    with pytest.raises(FileNotFoundError, match=r"words\.json does not exist"):
        Words.load(tmp_path)
    (tmp_path / "words.json").write_text("[")
    with pytest.raises(ValueError, match=r"words\.json is not valid JSON"):
        Words.load(tmp_path)


# ---- folders and snapshots


def test_a_folder_holds_the_speaker_to_the_bit_and_is_replaced_whole(tmp_path):
    first, second = tiny_speaker(seed=1), tiny_speaker(seed=2)
    for trained in (first, second):
        save_speaker(trained, tmp_path / "model")
        loaded = load_speaker(tmp_path / "model")
        assert fingerprint(loaded) == fingerprint(trained) and loaded.speaker.config == trained.speaker.config
        assert loaded.orientation == "blocks" and loaded.origin == {"scan_ids": ["a"]}
        assert not loaded.speaker.training
    assert fingerprint(first) != fingerprint(second)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="trained with 6 features a view but the store has 8"):
        loaded.require_width(8, "the store")


def test_damaged_folders_are_refused(tmp_path):
    folder = tmp_path / "model"
    save_speaker(tiny_speaker(), folder)
    content = json.loads((folder / "config.json").read_text())
    for change in ({"format": 9}, {"orientation": "round"}, {"speaker": {"odd": 1}}):
        (folder / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match="model is damaged, or no speaker of this program"):
            load_speaker(folder)
    (folder / "config.json").write_text(json.dumps(content))
    other = tiny_speaker(hidden_size=10)
    save_speaker(other, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the model"):
        load_speaker(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="model is damaged, or no speaker of this program"):
        load_speaker(folder)
    save_speaker(tiny_speaker(), folder)
    Words(("<PAD>", "<UNK>", "<EOS>", "left", "<BOS>")).save(folder)
    with pytest.raises(ValueError, match="has 5 words but the speaker 20: give those that it"):
        load_speaker(folder)


def test_a_released_snapshot_speaks_and_is_trained_further(data, tmp_path):
    released = tiny_speaker(packed=False)
    file, listed = tmp_path / "best_val_unseen_bleu", tmp_path / "vocab.txt"
    write_snapshot(speaker_to_released(SpeakerSnapshot(released.speaker, {})), file)
    listed.write_text("\n".join(released.words.entries[:-1]) + "\n")
    loaded = load_speaker(file, words=listed, angle_size=4)
    assert fingerprint(loaded) == fingerprint(released) and loaded.orientation == "interleaved"
    assert loaded.words.entries == released.words.entries
    options = ("--init", file, "--tokenizer", listed, "--steps", 1, "--select", "", "--lr", 0)
    run_here(data, tmp_path / "run", *options)
    assert fingerprint(load_speaker(tmp_path / "run")) == fingerprint(released)
    assert load_speaker(tmp_path / "run").orientation == "interleaved"
    with pytest.raises(ValueError, match="has no words in it: give its list, --words FILE"):
        load_speaker(file)
    with pytest.raises(SystemExit, match=r"error: .*has no words in it: give --tokenizer the text file"):
        speaker.main([*SMALL, "--data", str(data), "--out", str(tmp_path / "x"), "--init", str(file)])
    file.write_bytes(pickle.dumps({"encoder": Path("odd")}))
    with pytest.raises(ValueError, match="holds pickled objects, which are not loaded"):
        load_speaker(file, words=listed)
    with pytest.raises(FileNotFoundError, match="nowhere holds no speaker"):
        load_speaker("nowhere")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "no R2R_train.json: looked for nowhere"),
        (["--features", "store"], "no store of features: looked for .*store"),
        (["--features", "random:x"], "give random:WIDTH"),
        (["--tokenizer", "none"], "no tokeniser: looked for .*none and none"),
        (["--init", "nowhere"], "nowhere holds no speaker"),
        (["--min-count", "999"], "no word occurs 999 times"),
        (["--trackers", "pencil"], "tracker 'pencil' is unknown"),
        (["--val-splits", "val_unseen", "--select", "val_unseen"], "has no val_unseen items to select"),
    ],
)
def test_the_command_says_what_is_wrong(data, tmp_path, options, message):
    given = [*SMALL, "--data", str(data), "--steps", "4", "--out", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        speaker.main(given)
    assert not (tmp_path / "run" / "config.json").exists()


def test_features_of_another_width_and_a_missing_library_are_refused(data, tmp_path, monkeypatch):
    save_speaker(tiny_speaker(), tmp_path / "model")
    given = [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--features", "random:7"]
    with pytest.raises(SystemExit, match="trained with 6 features a view but random:7 has 7"):
        speaker.main([*given, "--init", str(tmp_path / "model")])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(SystemExit, match="error: BLEU needs sacrebleu"):
        speaker.main([*given, "--sacrebleu"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimConfig(batch_size=0), "batch_size is 0: give at least 1"),
        (lambda: OptimConfig(max_grad_norm=0), "max_grad_norm is 0"),
        (lambda: SizesConfig(hidden_size=7), "hidden_size is 7 and angle_size 128: give an even number"),
        (lambda: SizesConfig(angle_size=6), "angle_size 6"),
        (lambda: SizesConfig(dropout=1.0), r"dropout is 1\.0: give a share"),
        (lambda: PathsConfig(splits=()), "there is nothing to learn from"),
        (lambda: RunConfig(seed=2**32), "give a number below"),
        (
            lambda: replace(HOUSES, run=RunConfig(select="odd")),
            "select is 'odd' but the validation splits are",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_round_trip_and_presets_have_the_papers_numbers(data, tmp_path):
    run_here(data, tmp_path / "run", "--steps", 1)
    stored = speaker.parse(["--config", str(tmp_path / "run"), "--steps", "2"])
    assert stored == speaker.parse(
        [*SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2"]
    )
    model, optim, run = ENVDROP.model, ENVDROP.optim, ENVDROP.run
    assert (model.hidden_size, model.word_size, model.dropout, model.feature_dropout) == (512, 256, 0.6, 0.3)
    assert (optim.lr, optim.batch_size, optim.max_grad_norm) == (1e-4, 64, 40.0)
    assert (run.steps, run.eval_words, run.select) == (80_000, 120, "val_unseen")
    assert HOUSES.folder == "runs/speaker-houses-0" and HOUSES.run.select == "val_seen"
    with pytest.raises(ValueError, match="--config needs a run folder"):
        speaker.parse(["--config"])


def test_paths_without_words_or_end_are_left_out(data, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "connectivity").symlink_to(data / "connectivity")
    items = read_r2r(data, "train")
    rows = [
        {"path_id": 1, "scan": "a", "heading": 0.0, "path": list(items[0].path), "instructions": ["go"]},
        {"path_id": 2, "scan": "a", "heading": 0.0, "path": ["a-1"], "instructions": ["stay"]},
        {"path_id": 3, "scan": "b", "heading": 0.0, "path": ["b-1", "b-2"], "instructions": []},
    ]
    (folder / "R2R_train.json").write_text(json.dumps(rows))
    config = PathsConfig(data=str(folder), features="random:6", min_count=1)
    opened = open_data(config)
    assert [item.path_id for item in opened.train.items] == [1] and opened.val == {}
    assert opened.train.scan_ids == ["a"]
    (folder / "R2R_train.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="has no path with instructions in train"):
        open_data(config)
