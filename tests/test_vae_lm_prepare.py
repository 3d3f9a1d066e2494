"""Preparing text: what is kept, where it goes, what is counted, and what is refused."""

import gzip
import hashlib
import importlib.util
import itertools
import json
import sys
import types

import pytest
from tiny_lm import tokenizers

from vae_lm.data import read_texts
from vae_lm.prepare import Preparation, main, prepare, split_sentences
from vae_lm.stream import TextStream

LINES = ["a dog runs .", "", "  two children play football .  ", "nobody is here", "\t", "one " * 70]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "raw.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return path


def options(source, out, **changes):
    return Preparation(sources=(str(source),), out=str(out), **changes)


def test_lines_are_stripped_and_those_empty_or_too_long_left_out(source, tmp_path):
    out = tmp_path / "out"
    counts = prepare(options(source, out))
    content = (out / "train.txt").read_text(encoding="utf-8")
    assert content == "a dog runs .\ntwo children play football .\nnobody is here\n"
    assert sorted(path.name for path in out.iterdir()) == ["counts.json", "train.txt"]
    assert (counts["lines"], counts["sentences"]) == (6, 4)
    assert counts["dropped"] == {"empty": 2, "too many words": 1, "too many tokens": 0}
    assert counts["written"]["train"] == {
        "file": "train.txt",
        "sentences": 3,
        "words": 12,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    assert json.loads((out / "counts.json").read_text(encoding="utf-8")) == json.loads(json.dumps(counts))
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_no_limit_of_words_keeps_all(source, tmp_path):
    assert prepare(options(source, tmp_path / "out", max_words=0))["written"]["train"]["sentences"] == 4


@pytest.mark.parametrize("side", ["encoder_rows", "decoder_rows"])
def test_both_networks_limit_the_tokens(tmp_path, monkeypatch, side):
    both = tokenizers()
    both.save(tmp_path / "vocab")
    texts = [f"a dog runs {'x' * n}" for n in range(1, 30)]
    (tmp_path / "raw.txt").write_text("\n".join(texts), encoding="utf-8")
    other = {"encoder_rows": "decoder_rows", "decoder_rows": "encoder_rows"}[side]
    monkeypatch.setattr(
        f"vae_lm.tokenizers.TextTokenizers.{other}", lambda self, texts: [[1, 2]] * len(texts)
    )
    texts.append("a dog runs .")
    sizes = [len(row) for row in getattr(both, side)(texts)]
    limit = sorted(sizes)[len(sizes) // 2] - (min(sizes) == max(sizes))
    if min(sizes) == max(sizes):  # the encoder knows whole words only
        longer = " ".join(["dog"] * 30)
        (tmp_path / "raw.txt").write_text("\n".join([texts[0], longer]), encoding="utf-8")
        texts, limit = [texts[0], longer], sizes[0]
    else:
        texts.pop()
    counts = prepare(
        options(tmp_path / "raw.txt", tmp_path / "out", max_tokens=limit, vocab=(str(tmp_path / "vocab"),))
    )
    kept = [text for text, row in zip(texts, getattr(both, side)(texts), strict=True) if len(row) <= limit]
    assert (tmp_path / "out" / "train.txt").read_text(encoding="utf-8").splitlines() == kept
    assert 0 < counts["dropped"]["too many tokens"] == len(texts) - len(kept)


def test_what_is_prepared_streams_without_a_line_over_the_limit(tmp_path):
    tokenizers().save(tmp_path / "vocab")
    texts = [" ".join(["dog"] * n) for n in range(1, 40)]
    (tmp_path / "raw.txt").write_text("\n".join(texts), encoding="utf-8")
    chosen = {"max_tokens": 20, "vocab": (str(tmp_path / "vocab"),)}
    counts = prepare(options(tmp_path / "raw.txt", tmp_path / "out", **chosen))
    stream = TextStream([tmp_path / "out"], tokenizers(), batch_size=4, max_tokens=20, shuffle_buffer=8)
    assert stream.num_items == counts["written"]["train"]["sentences"] < 39
    batches = stream.batches()
    assert max(next(batches).batch.encoder_ids.shape[1] for _ in range(stream.steps_per_epoch)) <= 20


def test_splits_have_their_shares_and_equal_sentences_stay_together(tmp_path):
    texts = [f"sentence number {n % 4000} ." for n in range(8000)]
    (tmp_path / "raw.txt").write_text("\n".join(texts), encoding="utf-8")

    def parts(name, seed):
        prepare(options(tmp_path / "raw.txt", tmp_path / name, valid=0.1, test=0.2, seed=seed))
        return [
            (tmp_path / name / f"{part}.txt").read_text(encoding="utf-8").splitlines()
            for part in ("train", "valid", "test")
        ]

    first, again, other = parts("one", 0), parts("two", 0), parts("three", 1)
    assert first == again != other
    assert sorted(itertools.chain(*first)) == sorted(texts)
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not set(first[one]) & set(first[two])
    assert [round(len(part) / 8000, 1) for part in first] == [0.7, 0.1, 0.2]
    # Named as the reader of training data wants them.
    assert read_texts(tmp_path / "one", split="valid") == first[1]


def test_packed_and_labelled_files_and_folders_are_read(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    with gzip.open(folder / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("1\tgood food .\n\n")
    (folder / "b.tsv").write_text("0\tbad food .\n", encoding="utf-8")
    prepare(options(folder, tmp_path / "out", labelled=True))
    assert (tmp_path / "out" / "train.txt").read_text(encoding="utf-8") == "good food .\nbad food .\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. and Mrs. Smith met Dr. Lee. He left.", ["Mr. and Mrs. Smith met Dr. Lee.", "He left."]),
        ("J. R. Brown wrote it, e.g. In 1990.", ["J. R. Brown wrote it, e.g. In 1990."]),
        ("He said \u201cGo.\u201d \u201cNo.\u201d", ["He said \u201cGo.\u201d", "\u201cNo.\u201d"]),
        ("It cost 3.5 dollars. 20 came (see No. 4). \u00c9mile too.",
         ["It cost 3.5 dollars.", "20 came (see No. 4).", "\u00c9mile too."]),
        ("the usual tokens . and more", ["the usual tokens . and more"]),
        ("Wait ... What?", ["Wait ...", "What?"]),
        ("", []),
    ],
)  # fmt: skip
def test_the_rule_ends_sentences_where_english_does(text, expected):
    assert split_sentences(text) == expected


def test_sentences_of_a_paragraph_become_lines(tmp_path):
    (tmp_path / "raw.txt").write_text("One dog. Two dogs.\nThree.", encoding="utf-8")
    counts = prepare(options(tmp_path / "raw.txt", tmp_path / "out", sentences="rule"))
    assert (tmp_path / "out" / "train.txt").read_text(encoding="utf-8") == "One dog.\nTwo dogs.\nThree.\n"
    assert (counts["lines"], counts["sentences"]) == (2, 3)


def test_nltk_is_used_where_it_is_and_asked_for_where_not(tmp_path, source, monkeypatch):
    fake = types.SimpleNamespace(sent_tokenize=lambda text: text.split(" . "))
    monkeypatch.setitem(sys.modules, "nltk", fake)
    (tmp_path / "raw.txt").write_text("one . two . three", encoding="utf-8")
    prepare(options(tmp_path / "raw.txt", tmp_path / "out", sentences="nltk"))
    assert (tmp_path / "out" / "train.txt").read_text(encoding="utf-8") == "one\ntwo\nthree\n"

    def no_data(text):
        raise LookupError("punkt")

    fake.sent_tokenize = no_data
    with pytest.raises(ImportError, match="needs NLTK and its data"):
        prepare(options(source, tmp_path / "other", sentences="nltk"))
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match="needs NLTK and its data"):
        prepare(options(source, tmp_path / "other", sentences="nltk"))
    assert not (tmp_path / "other").exists()


def test_arrow_files_come_back_or_pyarrow_is_asked_for(tmp_path, source, monkeypatch):
    if importlib.util.find_spec("pyarrow"):
        prepare(options(source, tmp_path / "out", format="arrow"))
        assert read_texts(tmp_path / "out") == [
            "a dog runs .",
            "two children play football .",
            "nobody is here",
        ]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="--format arrow needs pyarrow"):
        prepare(options(source, tmp_path / "other", format="arrow"))


def test_bad_sources_are_refused_and_leave_nothing(tmp_path, source):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "book.pdf").write_text("text", encoding="utf-8")
    (tmp_path / "tokens.json").write_text("[]", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café au lait\n".encode("latin-1") * 3000)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no text at .*absent"):
        prepare(options(tmp_path / "absent.txt", out))
    for name, message in (
        ("empty.txt", r"empty\.txt holds no sentence"),
        ("book.pdf", r"book\.pdf is not of a known kind"),
        ("tokens.json", r"tokens\.json holds token ids and no text"),
        ("latin.txt", r"latin\.txt is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(options(tmp_path / name, out))
    with pytest.raises(
        ValueError, match=r"no sentence is left for train \(4 found, 4 with too many words, 0"
    ):
        prepare(options(source, out, max_words=1))
    with pytest.raises(ValueError, match=r"no sentence is left for valid .* none too long"):
        prepare(options(source, out, valid=1e-9, max_words=0))
    with pytest.raises(FileNotFoundError, match="no tokeniser at"):
        prepare(options(source, out, max_tokens=9, vocab=(str(tmp_path / "absent"),)))
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(FileExistsError, match=r"raw\.txt is there already: remove it"):
        prepare(options(source, source))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_words": -1}, "max_words -1 and max_tokens 0 must be at least 0"),
        ({"max_tokens": 9}, "give both or neither"),
        ({"vocab": ("a",)}, "give both or neither"),
        ({"vocab": ("a", "b", "c"), "max_tokens": 9}, "vocab names 3 tokenisers"),
        ({"valid": 0.5, "test": 0.5}, r"valid is 0\.5 and test 0\.5"),
        ({"valid": -0.1}, r"valid is -0\.1"),
        ({"sources": ()}, "no source was given"),
    ],
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**({"sources": ("a.txt",), "out": "b"} | changes))


def test_the_command_says_what_it_did_or_what_is_wrong(tmp_path, source, capsys):
    main([str(source), "--out", str(tmp_path / "out"), "--max-words", "4"])
    assert "2 in train.txt; 6 lines read, dropped: 2 empty, 2 too many words" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*out is there already"):
        main([str(source), "--out", str(tmp_path / "out")])
