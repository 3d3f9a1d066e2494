"""The streaming benchmark: what it makes, what it measures, and when it fails."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from benchmarks import streaming
from vae_lm.grammar import splits
from vae_lm.vocabulary import train_tokenizers


def test_a_corpus_has_its_lines_in_several_files_some_packed(tmp_path):
    size = streaming.write_corpus(tmp_path, 1003)
    texts = []
    for path in sorted(tmp_path.iterdir()):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            texts.append(file.read())
    assert len(texts) == 8 and sum(text.count("\n") for text in texts) == 1003
    assert sum(map(len, texts)) == size
    assert sum(path.suffix == ".gz" for path in tmp_path.iterdir()) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_an_epoch_is_streamed_and_measured(tmp_path):
    (tmp_path / "corpus").mkdir()
    streaming.write_corpus(tmp_path / "corpus", 1500)
    train_tokenizers(splits()["train"][:500], vocab_size=400).save(tmp_path / "vocabulary")
    found = streaming.measure(
        tmp_path / "corpus", tmp_path / "vocabulary", shuffle_buffer=512, max_seconds=100
    )
    assert found["lines"] == found["lines_streamed"] == 1500 and found["steps_per_epoch"] == 12
    assert found["resume_step"] == 11 and found["resume_seconds"] > 0
    assert 0 <= found["peak_growth_mib"] <= found["peak_growth_with_resume_mib"] < 256
    assert 0 < found["decoder_padding"] < 0.5 and found["lines_per_second"] > 0
    short = streaming.measure(tmp_path / "corpus", tmp_path / "vocabulary", shuffle_buffer=512, max_seconds=0)
    assert short["lines_streamed"] == 128


def test_too_much_memory_or_lines_left_fail(tmp_path, monkeypatch, capsys):
    found = {
        "corpus_mb": 1.0, "lines": 10, "lines_streamed": 10, "memory_before_mib": 700.0,
        "peak_growth_mib": 9.0, "peak_growth_with_resume_mib": 10.0, "lines_per_second": 5,
        "lines_per_cpu_second": 6, "resume_step": 1, "resume_seconds": 0.1,
    }  # fmt: skip
    out = tmp_path / "results" / "streaming.json"
    monkeypatch.setattr(sys, "argv", ["streaming", "--lines", "100", "--out", str(out)])
    asked = []
    monkeypatch.setattr(streaming, "run", lambda lines, **settings: asked.append(lines) or found)
    streaming.main()
    assert asked == [10, 100] and "9.0 MiB above 700.0 MiB" in capsys.readouterr().out
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["passed"] and record["shuffle_buffer"] == 100_000
    for changes in ({"peak_growth_with_resume_mib": 257.0}, {"lines_streamed": 9}):
        monkeypatch.setattr(streaming, "run", lambda lines, changes=changes, **settings: found | changes)
        with pytest.raises(SystemExit, match="not passed"):
            streaming.main()
        assert not json.loads(out.read_text(encoding="utf-8"))["passed"]
