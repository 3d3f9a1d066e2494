"""Streams of corpora: every line once an epoch, the same batches from any step and by any processes."""

import gzip
import itertools
import json
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import tokenizers

from vae_lm.stream import TextStream, read_record, source_files
from vae_lm.tokenizers import pad_rows

WORDS = "a man is walking his dog in the park two children play football".split()


def numbered(count, start=0):
    """Different lines of different lengths."""
    return [" ".join([str(n), *WORDS[: n * 7 % 13 + 1]]) for n in range(start, start + count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """97 lines in three files, one of them packed, with blank lines between."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\ufeff" + "\n\n".join(numbered(40)) + "\n  \n", encoding="utf-8")
    with gzip.open(folder / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\r\n".join(numbered(37, 40)))
    (folder / "c.txt").write_text("\n".join(numbered(20, 77)), encoding="utf-8")
    (folder / "README.md").write_text("not a corpus", encoding="utf-8")
    return folder


def stream(source, **options):
    sources = source if isinstance(source, list) else [source]
    options = {"batch_size": 8, "max_tokens": 200, "shuffle_buffer": 32, "seed": 5} | options
    return TextStream(sources, tokenizers(), **options)


def take(source, count, *, start=0, **options):
    return list(itertools.islice(stream(source, **options).batches(start), count))


def texts_of(batches):
    return [text for each in batches for text in tokenizers().texts(each.batch.decoder_ids)]


def test_every_line_of_every_file_is_in_one_batch_of_each_epoch(corpus):
    source = stream(corpus)
    assert [path.name for path in source.files] == ["a.txt", "b.txt.gz", "c.txt"]
    assert (source.num_items, source.steps_per_epoch) == (97, 13)
    batches = take(corpus, 39)
    assert [each.step for each in batches] == list(range(39))
    epochs = [texts_of(batches[first : first + 13]) for first in (0, 13, 26)]
    assert all(sorted(epoch) == sorted(numbered(97)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    sizes = Counter(each.num_items for each in batches[:13])
    assert sizes == {8: 12, 1: 1}


def test_items_are_numbered_by_file_and_line(corpus):
    for each in take(corpus, 13):
        for item, text in zip(each.items.tolist(), texts_of([each]), strict=True):
            file, line = divmod(item, 2**40)
            path = corpus / ["a.txt", "b.txt.gz", "c.txt"][file]
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8-sig") as lines:
                assert next(itertools.islice(lines, line, None)).strip() == text


def test_rows_are_those_of_the_tokenisers(corpus):
    for each in take(corpus, 5):
        expected = tokenizers().batch(texts_of([each]))
        assert torch.equal(each.batch.encoder_ids, expected.encoder_ids)
        assert torch.equal(each.batch.decoder_ids, expected.decoder_ids)


def same(first, second):
    return (
        (first.step, first.num_items) == (second.step, second.num_items)
        and torch.equal(first.items, second.items)
        and all(torch.equal(one, two) for one, two in zip(first.batch, second.batch, strict=True))
    )


@settings(deadline=None, max_examples=30)
@given(
    start=st.integers(0, 45),
    batch_size=st.integers(1, 40),
    buffered=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_a_stream_goes_on_at_any_step_as_if_it_had_never_stopped(corpus, start, batch_size, buffered, seed):
    options = {"batch_size": batch_size, "shuffle_buffer": buffered * batch_size, "seed": seed}
    whole = take(corpus, start + 4, **options)
    resumed = take(corpus, 4, start=start, **options)
    assert all(itertools.starmap(same, zip(whole[start:], resumed, strict=True)))


@settings(deadline=None, max_examples=30)
@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 20), start=st.integers(0, 30))
def test_processes_share_the_batches_of_one(corpus, world_size, batch_size, start):
    options = {"batch_size": batch_size, "shuffle_buffer": 40, "start": start}
    whole = take(corpus, 3, **options)
    shares = [take(corpus, 3, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for one, *parts in zip(whole, *shares, strict=True):
        assert {(part.step, part.num_items) for part in parts} == {(one.step, len(one.items))}
        counts = [len(part.items) for part in parts]
        assert max(counts) - min(counts) <= 1
        dealt = torch.cat([part.items for part in parts])
        assert sorted(dealt.tolist()) == sorted(one.items.tolist())
        for rank, part in enumerate(parts):
            assert part.items.tolist() == one.items[rank::world_size].tolist()
            assert texts_of([part]) == texts_of([one])[rank::world_size]


def test_tokenising_is_left_out_on_the_way_to_a_step(corpus, monkeypatch):
    calls = []
    both = tokenizers()
    source = TextStream([corpus], both, batch_size=8, max_tokens=200, shuffle_buffer=32, seed=5)
    monkeypatch.setattr(
        type(both), "encoder_rows", lambda self, texts: calls.append(texts) or [[2, 3]] * len(texts)
    )
    step = next(source.batches(20))
    assert step.step == 20 and len(calls) == 1 and len(calls[0]) == 8


def test_lines_are_mixed_within_the_buffer_and_no_further(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(numbered(3000)), encoding="utf-8")
    lines = [
        (each.items & (2**40 - 1)).tolist() for each in take(path, 300, batch_size=10, shuffle_buffer=500)
    ]
    reach = [max(batch) - min(batch) for batch in lines]
    assert max(reach) < 500 and sum(reach) / len(reach) > 200
    orders = [
        [item for each in take(path, 60, batch_size=50, shuffle_buffer=500, seed=seed) for item in each.items]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    # Seams between buffers move, so that each epoch brings other lines together.
    seams = [set(map(int, order[:250])) for order in orders]
    assert seams[0] != seams[1]


def test_batches_hold_lines_of_like_length(tmp_path):
    path = tmp_path / "mixed.txt"
    path.write_text("\n".join(numbered(2000)), encoding="utf-8")
    sorted_ = take(path, 100, batch_size=20, shuffle_buffer=2000)
    padding = sum(int((each.batch.decoder_ids == 0).sum()) for each in sorted_)
    rows = tokenizers().decoder_rows(numbered(2000))
    unsorted = sum(int((pad_rows(rows[first : first + 20], 0) == 0).sum()) for first in range(0, 2000, 20))
    assert padding < 0.3 * unsorted


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.txt"
        path.write_text("\n".join(f"line number {n}" for n in range(count)), encoding="utf-8")
        source = stream(path, batch_size=100, shuffle_buffer=2000)
        tracemalloc.start()
        assert next(source.batches(count // 100 - 1)).step == count // 100 - 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 3_000_000


# ---- token files


def record(head, tail, **changes):
    fields = {
        "bert_token": head,
        "bert_token_length": len(head),
        "gpt2_token": tail,
        "gpt2_token_length": len(tail),
    }
    return fields | changes


def token_records(texts):
    both = tokenizers()
    return list(map(record, both.encoder_rows(texts), both.decoder_rows(texts)))


@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"separators": (",", ":")}])
@pytest.mark.parametrize("packed", [False, True])
def test_token_files_give_the_batches_of_their_texts(tmp_path, monkeypatch, options, packed):
    monkeypatch.setattr("vae_lm.stream._CHUNK", 100)  # records lie across what is read at once
    for number in range(3):
        content = json.dumps(token_records(numbered(20, 20 * number)), **options).encode()
        path = tmp_path / f"wikipedia.segmented.nltk.split.seq64.{number}.json{'.gz' * packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
    batches = take(tmp_path, 16)
    assert sorted(texts_of(batches[:8])) == sorted(texts_of(batches[8:])) == sorted(numbered(60))
    for each in batches[:3]:
        expected = tokenizers().batch(texts_of([each]))
        assert torch.equal(each.batch.encoder_ids, expected.encoder_ids)
        assert [int(item) & (2**40 - 1) for item in each.items] == [
            int(text.split()[0]) % 20 for text in texts_of([each])
        ]


@pytest.mark.parametrize(
    "records, message",
    [
        ([record([2, 3], [1, 2, 999])], r"record 1 has the gpt2_token 999 but the vocabulary has 300"),
        ([record([2, -1, 3], [1, 2])], r"record 1 has the bert_token -1 but the vocabulary has"),
        ([record([2, 3], [1, 7])], r"record 1 goes from gpt2_token 1 to 7 but BOS and EOS are 1 and 2"),
        ([record([2, 3], [1, 2], bert_token_length=3)], r"record 1: bert_token_length is 3 but bert_token"),
        ([{"text": "a dog"}], r"record 1: bert_token is None but a list .* \(keys: text\)"),
        ([record([2, "x"], [1, 2])], r"bert_token is \[2, 'x'\] but a list of token ids"),
        ([record([2] * 300, [1, 2])], r"has 300 tokens for the encoder and 2 for the .* at most 200"),
        ([], r"holds no sentence"),
    ],
)  # fmt: skip
def test_token_files_that_do_not_fit_are_refused(tmp_path, records, message):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        take(path, 1)


def test_token_files_cut_off_or_of_another_kind_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tokens.json"
    whole = json.dumps(token_records(numbered(3)))
    path.write_text(whole[:-9], encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"tokens\.json ends with .* but a JSON list of objects was expected"
    ):
        take(path, 1)
    path.write_bytes(gzip.compress(whole.encode())[:-20])
    with pytest.raises(ValueError, match=r"tokens\.json is damaged"):
        take(path, 1)
    path.rename(tmp_path / "tokens.json.gz")
    with pytest.raises(ValueError, match=r"tokens\.json\.gz is damaged"):
        take(tmp_path / "tokens.json.gz", 1)
    monkeypatch.setattr("vae_lm.stream._CHUNK", 10)
    path.write_text("no end " * 100, encoding="utf-8")
    with pytest.raises(ValueError, match="JSON list of objects was expected"):
        take(path, 1)
    with pytest.raises(ValueError, match=r"is no JSON object .* copy the file again"):
        read_record('{"bert_token": [1, 2}')


# ---- what is refused


def test_a_folder_stands_for_its_training_files_or_for_all(tmp_path):
    for name in ("b.txt", "a.json", "c.json.gz", ".d.txt", "notes.md", "train"):
        (tmp_path / name).write_text("a dog\n", encoding="utf-8")

    def names():
        return [path.name for path in source_files([tmp_path])]

    assert names() == ["b.txt"]
    (tmp_path / "b.txt").unlink()
    assert names() == ["a.json", "c.json.gz"]
    for name in ("x.train.1.txt", "x.train.0.txt", "x.valid.txt", "x.test.txt"):
        (tmp_path / name).write_text("a dog\n", encoding="utf-8")
    assert names() == ["x.train.0.txt", "x.train.1.txt"]


def test_bad_sources_are_refused(tmp_path, corpus):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "table.csv").write_text("a,b", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("one\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "tokens.json").write_text("[]", encoding="utf-8")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no text at .*absent\.txt"):
        stream(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match=r"no text at .*absent\.json"):
        stream(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match=r"no text or token file in .*bare"):
        stream(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="no source was given"):
        stream([])
    with pytest.raises(TypeError, match=r"sources is the path .* write \[source\]"):
        TextStream(tmp_path, tokenizers(), batch_size=1, max_tokens=9)
    with pytest.raises(ValueError, match=r"table\.csv is not of a known kind"):
        stream(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="text files and token files"):
        stream([corpus, tmp_path / "tokens.json"])
    with pytest.raises(ValueError, match=r"empty\.txt holds no sentence"):
        take([corpus / "c.txt", tmp_path / "empty.txt"], 30)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        take(tmp_path / "latin.txt", 1)


def test_a_line_over_the_limit_is_named(corpus):
    with pytest.raises(
        ValueError, match=r"(a|c)\.txt|b\.txt\.gz, line \d+ .* but at most 9 .* vae_lm.prepare"
    ):
        take(corpus, 13, max_tokens=9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size 0, rank 0 of 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"shuffle_buffer": 7}, "shuffle_buffer is 7 but must hold at least one batch of 8"),
        ({"max_tokens": 2}, "max_tokens is 2"),
    ],
)
def test_options_out_of_range_are_refused(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        stream(corpus, **options)


def test_steps_before_the_first_are_refused(corpus):
    with pytest.raises(ValueError, match="start_step is -1"):
        stream(corpus).batches(-1)
