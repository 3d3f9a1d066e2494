import gzip
import itertools
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_lm import TEXTS, tokenizers
from vae_lm import data
from vae_lm.data import (
    TokenRows,
    epoch_order,
    evaluation_batches,
    filter_texts,
    find_files,
    item_noise,
    read_texts,
    training_batches,
)

LINES = [" ".join(TEXTS[number % 6].split()[: 1 + number % 7]) for number in range(50)]


def rows(texts=LINES, **options):
    return TokenRows.build(texts, tokenizers(), **({"max_tokens": 64} | options))


# Reading


def write(path, text, *, compressed=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if compressed else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(("name", "compressed"), [("a.txt", False), ("a.txt.gz", True), ("b.tsv", False)])
def test_a_file_has_one_sentence_a_line(name, compressed, tmp_path):
    path = write(tmp_path / name, " a man \n\nun café\n", compressed=compressed)
    assert read_texts(path) == ["a man", "", "un café"]
    assert read_texts(path, split="valid") == []


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("a man\n".encode("utf-8-sig"))
    assert read_texts(path) == ["a man"]


def test_labels_are_dropped_and_only_the_first_tab_splits(tmp_path):
    path = write(tmp_path / "yelp.txt", "1\tgood food\tindeed\n\n0\tbad\n")
    assert read_texts(path, labelled=True) == ["good food\tindeed", "", "bad"]
    with pytest.raises(ValueError, match=r"yelp.txt, line 3 \('neither'\) has no tab: label<TAB>text"):
        read_texts(write(tmp_path / "yelp.txt", "1\tgood\n0\tbad\nneither\n"), labelled=True)


def test_a_folder_offers_its_splits(tmp_path):
    write(tmp_path / "sentences.train.1.txt", "second\n")
    write(tmp_path / "sentences.train.0.txt.gz", "first\n", compressed=True)
    write(tmp_path / "dev.txt", "held out\n")
    write(tmp_path / "training_notes.txt", "neither\n")
    write(tmp_path / "test" / "part-0.txt", "tested\n")
    (tmp_path / "train.json").write_text("{}")
    assert read_texts(tmp_path) == ["first", "second"]
    assert read_texts(tmp_path, split="valid") == ["held out"]
    assert read_texts(tmp_path, split="test") == ["tested"]
    assert find_files(tmp_path / "test") == []


def test_the_grammar_is_read_by_name(monkeypatch):
    grammar = types.ModuleType("vae_lm.grammar")
    grammar.splits = lambda seed=0: {"train": ["a b", "c d"], "valid": ["e"], "test": []}
    monkeypatch.setitem(sys.modules, "vae_lm.grammar", grammar)
    assert read_texts("grammar") == ["a b", "c d"]
    assert read_texts("grammar", split="valid") == ["e"]


def hub(monkeypatch):
    class Loaded(dict):
        column_names = ("text", "label")

    offered = {"train": ["one ", "two"], "validation": ["three"]}
    module = types.ModuleType("datasets")
    module.get_dataset_split_names = lambda name: list(offered)
    module.load_dataset = lambda name, split: Loaded(text=offered[split])
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_name_on_the_hub_is_fetched_by_its_splits(monkeypatch):
    module = hub(monkeypatch)
    assert read_texts("somebody/captions") == ["one", "two"]
    assert read_texts("somebody/captions", split="valid") == ["three"]
    assert read_texts("somebody/captions", split="test") == []
    with pytest.raises(ValueError, match="no column 'sentence' but text, label: see --column"):
        read_texts("somebody/captions", column="sentence")

    def offline(name):
        raise ConnectionError("no network\nfor long")

    module.get_dataset_split_names = offline
    with pytest.raises(
        FileNotFoundError, match=r"'captions' here or on the Hub \(ConnectionError: no network\)"
    ):
        read_texts("captions")


def test_missing_libraries_come_with_their_install_line(monkeypatch, tmp_path):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"'captions' is no file or folder here; .* pip install datasets"):
        read_texts("captions")
    path = tmp_path / "a.parquet"
    path.touch()
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow: pip install pyarrow"):
        read_texts(path)


def test_arrow_and_parquet_files(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": ["one", None, " two"], "label": [0, 1, 1]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with (
        arrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        arrow.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    with (
        arrow.OSFile(str(tmp_path / "s.arrow"), "wb") as sink,
        arrow.ipc.new_stream(sink, table.schema) as out,
    ):
        out.write_table(table)
    for name in ("a.parquet", "file.arrow", "s.arrow"):
        assert read_texts(tmp_path / name) == ["one", "two"]
        with pytest.raises(ValueError, match="no column 'words' but text, label: see --column"):
            read_texts(tmp_path / name, column="words")
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no sentence: one a line was expected"),
        ("blank.txt", b"\n \n", "blank.txt holds no sentence"),
        ("latin.txt", "un café\n".encode("latin-1"), "latin.txt is not UTF-8 text, or damaged"),
        (
            "cut.txt.gz",
            gzip.compress(b"a man\n" * 99, mtime=0)[:-9],
            "cut.txt.gz is not UTF-8 text, or damaged",
        ),
        ("no.txt.gz", b"a man\n", "no.txt.gz is not UTF-8 text, or damaged"),
        ("a.docx", b"a man\n", r"a.docx is not of a known kind: give .txt, .text, .tsv"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "data/text/missing"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no text at {Path(name)}: give a file, or a folder"):
        read_texts(name)


def test_filters_count_what_they_leave_out():
    kept = filter_texts(["one two", "", " one two three", "  ", "one "], max_words=2)
    assert kept == (["one two", "one"], 2, 1)
    assert filter_texts(["one two three"]).texts == ["one two three"]
    with pytest.raises(ValueError, match=r"text 1 \('a b c'...\) has 3 words but at most 2 are allowed"):
        filter_texts(["a", "a b c"], max_words=2, drop=False)


# Token ids


def test_rows_are_those_of_the_tokenisers():
    corpus = rows()
    head, tail = tokenizers().encoder_rows(LINES), tokenizers().decoder_rows(LINES)
    assert len(corpus) == 50 and corpus.texts == LINES and corpus.num_long == 0
    for item in (0, 7, 49):
        batch = corpus.batch([item, 3])
        assert batch.encoder_ids[0].tolist()[: len(head[item])] == head[item]
        assert batch.decoder_ids[0].tolist()[: len(tail[item])] == tail[item]
    both = tokenizers().batch([LINES[6], LINES[0]])
    assert all(torch.equal(a, b) for a, b in zip(corpus.batch([6, 0]), both, strict=True))
    chosen = corpus.select([6, 0])
    assert chosen.texts == [LINES[6], LINES[0]]
    assert all(torch.equal(a, b) for a, b in zip(chosen.batch([0, 1]), both, strict=True))


def test_long_rows_are_dropped_and_counted_or_refused():
    sizes = [len(row) for row in tokenizers().decoder_rows(LINES)]
    limit = sorted(sizes)[30]
    corpus = rows(max_tokens=limit)
    assert corpus.texts == [text for text, size in zip(LINES, sizes, strict=True) if size <= limit]
    assert corpus.num_long == sum(size > limit for size in sizes) > 0
    assert max(corpus.decoder.lengths) == limit
    first = next(number for number, size in enumerate(sizes) if size > limit)
    with pytest.raises(
        ValueError, match=rf"text {first} \(.* has {sizes[first]} tokens but at most {limit} "
    ):
        rows(max_tokens=limit, drop=False)
    with pytest.raises(ValueError, match="of 50 texts none is left with 1 to 3 tokens"):
        rows(["a man is walking"] * 50, max_tokens=3)


def contents(corpus):
    return [corpus.texts, *(part.tolist() for flat in (corpus.encoder, corpus.decoder) for part in flat)]


def test_the_cache_holds_what_was_tokenised(tmp_path, monkeypatch):
    plain = rows()
    assert contents(rows(cache=tmp_path)) == contents(plain)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(data, "_tokenise", lambda *_: pytest.fail("tokenised again"))
    again = rows(cache=tmp_path)
    assert contents(again) == contents(plain) and again.num_long == plain.num_long
    monkeypatch.undo()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-100], b"x" * 64):
        file.write_bytes(damaged)
        assert contents(rows(cache=tmp_path)) == contents(plain)
        assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_another_text_length_or_vocabulary_has_another_cache(tmp_path):
    rows(cache=tmp_path)
    rows(LINES[1:], cache=tmp_path)
    rows(cache=tmp_path, max_tokens=10)
    other = tokenizers.__wrapped__()  # made anew, and then changed
    other.decoder.add_tokens(["zebra"])
    TokenRows.build(LINES, other, max_tokens=64, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    rows(cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_dropped_texts_are_refused_from_the_cache_too(tmp_path):
    limit = 5
    kept = rows(cache=tmp_path, max_tokens=limit)
    with pytest.raises(ValueError, match="tokens but at most 5 "):
        rows(cache=tmp_path, max_tokens=limit, drop=False)
    assert rows(cache=tmp_path, max_tokens=limit).num_long == kept.num_long > 0


# Batches


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_item_once_and_like_lengths_together(count, batch_size, seed, epoch):
    lengths = np.random.default_rng(seed).integers(3, 60, count)
    batches = epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert len(batches) == -(-count // batch_size)
    assert sum(len(batch) < batch_size for batch in batches) == (count % batch_size > 0)
    again = epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    if count <= 100 * batch_size:  # one bucket: the batches partition the sorted lengths
        ordered = sorted(batches, key=lambda batch: (-lengths[batch].max(), -lengths[batch].min()))
        ends = [(lengths[batch].min(), lengths[after].max()) for batch, after in itertools.pairwise(ordered)]
        assert all(least >= most for least, most in ends)


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = np.full(40, 5)
    orders = {
        tuple(np.concatenate(epoch_order(lengths, batch_size=4, seed=seed, epoch=epoch)))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_lines_far_apart_share_a_batch_only_within_a_bucket():
    batches = epoch_order(np.arange(1000), batch_size=2, seed=0, epoch=0)
    spans = [int(batch.max() - batch.min()) for batch in batches]
    assert 1 < np.mean(spans) < 20  # 200 lines drawn of 1,000 and sorted: about 5 apart
    firsts = [int(batch[0]) for batch in batches]
    assert firsts != sorted(firsts)


def taken(stream, count):
    return list(itertools.islice(stream, count))


def same(one, two):
    return (
        one.step == two.step
        and one.num_items == two.num_items
        and torch.equal(one.items, two.items)
        and all(torch.equal(a, b) for a, b in zip(one.batch, two.batch, strict=True))
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 3))
def test_batches_go_on_from_any_step_and_split_over_processes(batch_size, start, world_size):
    corpus, seed = rows(), 3
    whole = taken(training_batches(corpus, batch_size=batch_size, seed=seed), start + 8)
    assert [batch.step for batch in whole] == list(range(start + 8))
    resumed = training_batches(corpus, batch_size=batch_size, seed=seed, start_step=start)
    assert all(same(a, b) for a, b in zip(whole[start:], taken(resumed, 8), strict=True))
    shares = [
        taken(
            training_batches(
                corpus, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, start_step=start
            ),
            8,
        )
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole[start:], *shares, strict=True):
        assert sorted(batch.items.tolist()) == sorted(i for part in parts for i in part.items.tolist())
        sizes = [len(part.items) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert {part.num_items for part in parts} == {len(batch.items)}
        assert all(
            len(part.batch.encoder_ids) == len(part.batch.decoder_ids) == len(part.items) for part in parts
        )


def test_rows_of_a_batch_are_those_of_its_items():
    corpus = rows()
    for batch in taken(training_batches(corpus, batch_size=7, seed=1), 9):
        texts = [LINES[item] for item in batch.items.tolist()]
        assert all(torch.equal(a, b) for a, b in zip(batch.batch, tokenizers().batch(texts), strict=True))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"world_size": 0}, {"start_step": -1}, {"rank": -1}],
)
def test_batches_refuse_impossible_counts(options):
    with pytest.raises(ValueError, match=r"batch_size \d+, rank -?\d of \d, start_step -?\d: expected"):
        training_batches(rows(), **({"batch_size": 2, "seed": 0} | options))


@pytest.mark.parametrize("batch_size", [1, 7, 50, 99])
def test_evaluation_drops_nothing_and_goes_by_length(batch_size):
    corpus = rows()
    batches = list(evaluation_batches(corpus, batch_size=batch_size))
    items = torch.cat([batch.items for batch in batches]).tolist()
    assert sorted(items) == list(range(50))
    lengths = [int(corpus.decoder.lengths[item]) for item in items]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        texts = [LINES[item] for item in batch.items.tolist()]
        assert all(torch.equal(a, b) for a, b in zip(batch.batch, tokenizers().batch(texts), strict=True))
    with pytest.raises(ValueError, match="batch_size is 0 but must be at least 1"):
        evaluation_batches(corpus, batch_size=0)


def test_noise_belongs_to_seed_step_and_item():
    items = torch.tensor([4, 0, 2**41 + 7])
    noise = item_noise(items, 1000, seed=1, step=5)
    assert noise.dtype == torch.float32 and noise.shape == (3, 1000)
    alone = [item_noise(items[i : i + 1], 1000, seed=1, step=5) for i in (2, 0)]
    assert torch.equal(torch.cat(alone), noise[[2, 0]])
    others = [item_noise(items, 1000, seed=seed, step=step) for seed, step in ((2, 5), (1, 6))]
    everything = torch.cat([noise, *others])  # [9, 1000]
    assert everything.corrcoef().sub(torch.eye(9)).abs().max() < 0.15  # 4.7 standard deviations
    assert everything.mean().abs() < 0.05 and abs(everything.std() - 1) < 0.05
    assert item_noise(items[:0], 4, seed=0, step=0).shape == (0, 4)
