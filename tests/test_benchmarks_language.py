"""The language-modelling table: rows are runs, figures come from their files, words from the figures."""

import gzip
import json

import pytest

from benchmarks import language
from fq.run import read_metrics


@pytest.fixture
def texts(tmp_path):
    """Some sentences in the files of SNLI."""
    (tmp_path / "text" / "snli").mkdir(parents=True)
    nouns, verbs = ("man", "dog", "child", "woman"), ("runs", "sleeps", "waits", "eats", "sings")
    lines = [f"a {noun} {verb} near the {other} ." for noun in nouns for verb in verbs for other in nouns]
    for name, part in (("train", lines[:60]), ("test", lines[60:])):
        with gzip.open(tmp_path / "text" / "snli" / f"sentences.{name}.txt.gz", "wt") as file:
            file.write("\n".join(part) + "\n")
    return tmp_path / "text"


def test_rows_are_trained_once_and_reported_from_their_metrics(texts, tmp_path, capfd):
    arguments = ["--data", str(texts), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    arguments += ["--corpora", "snli", "--rows", "gpt2", "lambda0.5", "--steps", "2", "--workers", "1"]
    language.main(arguments)
    assert "snli-gpt2: 0." in capfd.readouterr().out
    text = (tmp_path / "out" / "report.md").read_text()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    last = [line for line in read_metrics(tmp_path / "runs" / "snli-lambda0.5") if "valid/rec" in line][-1]
    assert results["snli"]["lambda0.5"]["rec"] == last["valid/rec"]
    assert f"{last['valid/kl']:.2f} | {last['valid/mi']:.2f} | {last['valid/au']:.0f}" in text
    assert "| GPT-2, no latent |" in text and "--no-latent" in text and str(tmp_path) not in text
    assert (tmp_path / "out" / "lambda.png").stat().st_size > 5000
    language.main(arguments)
    assert "snli-lambda0.5: finished before" in capfd.readouterr().out


def test_what_is_missing_or_fails_is_named(texts, tmp_path):
    arguments = ["--data", str(texts), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"ptb/train\.txt\.gz is missing: give --data a folder"):
        language.main(arguments)
    (texts / "snli" / "sentences.train.txt.gz").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match=r"snli-gpt2 ended with code 1: see .*snli-gpt2\.log"):
        language.main([*arguments, "--corpora", "snli", "--rows", "gpt2", "--steps", "2"])


def test_findings_say_what_the_figures_say():
    rising = {
        f"lambda{value:g}": {
            "mi": value,
            "kl": value,
            "rec": -value,
            "neg_elbo": value,
            "ppl_token": 5.0,
            "au": 32.0,
        }
        for value in language.LAMBDAS
    }
    said = " ".join(language.findings(rising | {"plain": {"au": 3.0}}))
    assert "MI rises with λ: yes, at every step" in said and "rec falls with λ: yes" in said
    assert "perplexity rises with λ: at 0 of 4 steps" in said
    assert "All 32 units active at every λ: yes" in said and "(AU at most 1): no (3)" in said
    rising["lambda0.1"] |= {"au": 31.0, "mi": 2.0}
    said = " ".join(language.findings(rising | {"plain": {"au": 0.0}}))
    assert "MI rises with λ: at 3 of 4 steps" in said and "every λ: no (32, 31," in said
    assert "(AU at most 1): yes (0)" in said
