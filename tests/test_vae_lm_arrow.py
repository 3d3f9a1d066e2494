"""Arrow and Parquet files: written by ``prepare``, read wherever texts are."""

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from vae_lm import prepare
from vae_lm.data import read_texts

TEXTS = [f"sentence number {number} of a few words ." for number in range(40)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join([*TEXTS, "", "a far too long sentence " * 5]) + "\n", encoding="utf-8")
    return path


def write_batches(path, kind, column="text"):
    """Three batches, with a null and a second column."""
    rows = [*TEXTS, None]
    table = pyarrow.table({"label": list(range(41)), column: pyarrow.array(rows, pyarrow.string())})
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=15)
        return
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(path), "wb") as opened, new(opened, table.schema) as writer:
        writer.write_table(table, max_chunksize=15)


def test_prepare_writes_what_is_read_back(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "_AT_ONCE", 7)  # several batches
    given = [str(source), "--out", str(tmp_path / "made"), "--format", "arrow", "--max-words", "12"]
    prepare.main([*given, "--valid", "0.2"])
    train, valid = (
        read_texts(tmp_path / "made" / f"{name}.arrow", split="train") for name in ("train", "valid")
    )
    assert sorted(train + valid) == sorted(TEXTS) and 1 < len(valid) < 20
    assert read_texts(tmp_path / "made", split="valid") == valid
    assert "train.arrow" in (tmp_path / "made" / "counts.json").read_text()
    prepare.main([*given[:2], str(tmp_path / "plain"), "--max-words", "12", "--valid", "0.2"])
    assert read_texts(tmp_path / "plain", split="train") == train


@pytest.mark.parametrize(
    ("name", "kind"), [("a.arrow", "file"), ("b.arrow", "stream"), ("c.parquet", "parquet")]
)
def test_every_batch_of_every_form_is_read_and_nulls_are_left_out(tmp_path, name, kind):
    write_batches(tmp_path / name, kind)
    assert read_texts(tmp_path / name, split="train") == TEXTS
    write_batches(tmp_path / name, kind, column="sentence")
    assert read_texts(tmp_path / name, split="train", column="sentence") == TEXTS
    with pytest.raises(ValueError, match=rf"{name} has no column 'text' but label, sentence: see --column"):
        read_texts(tmp_path / name, split="train")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.arrow", "file"), ("b.arrow", "stream"), ("c.parquet", "parquet")]
)
def test_damaged_files_are_named(tmp_path, name, kind):
    path = tmp_path / name
    write_batches(path, kind)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.+\): copy it again"):
        read_texts(path, split="train")
