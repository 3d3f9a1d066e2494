"""Rows of token ids of the two tokenisers, and texts back from them."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import TEXTS, tokenizers
from transformers import PreTrainedTokenizerFast

from vae_lm.tokenizers import TextTokenizers, pad_rows

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARIES = SHARED / "data" / "vocab"


def with_vocabularies():
    if not VOCABULARIES.is_dir():
        pytest.skip(f"{VOCABULARIES} is not here")
    return TextTokenizers.load(VOCABULARIES / "bert-base-cased", VOCABULARIES / "gpt2")


def test_real_tokenisers_give_the_rows_of_the_original_and_survive_a_folder(tmp_path):
    real = with_vocabularies()
    path = SHARED / "golden" / "optimus" / "tokenization.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    texts = [entry["text"] for entry in entries]
    real.save(tmp_path)
    for each in (real, TextTokenizers.from_folder(tmp_path)):
        assert each.encoder_rows(texts) == [entry["bert_token"] for entry in entries]
        assert each.decoder_rows(texts) == [entry["gpt2_token"] for entry in entries]
        assert each.texts(each.batch(texts).decoder_ids) == texts
        special = (each.decoder.pad_token_id, each.decoder.bos_token_id, each.decoder.eos_token_id)
        assert special == (50257, 50258, 50259) and len(each.decoder) == 50260


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=20))
def test_any_text_comes_back_from_the_decoder_rows(text):
    both = tokenizers()
    ids = both.batch([text, TEXTS[0]]).decoder_ids
    assert both.texts(ids)[0] == text.strip()


def test_rows_have_special_tokens_around_stripped_text():
    both = tokenizers()
    plain, blanks = both.batch(["a dog runs ."]), both.batch(["  a dog runs . \n"])
    assert torch.equal(plain.encoder_ids, blanks.encoder_ids)
    assert torch.equal(plain.decoder_ids, blanks.decoder_ids)
    assert plain.encoder_ids[0, [0, -1]].tolist() == [2, 3]
    assert plain.decoder_ids[0, [0, -1]].tolist() == [1, 2]
    assert both.batch(["", "a dog"]).decoder_ids[0].tolist()[:3] == [1, 2, 0]
    assert both.batch([]).decoder_ids.shape == (0, 0) and both.texts(torch.empty(0, 3)) == []


def test_special_tokens_in_a_text_do_not_end_it():
    both = tokenizers()
    ids = both.batch(["a <EOS> dog"]).decoder_ids
    assert (ids == both.decoder.eos_token_id).sum() == 1
    assert both.texts(ids) == ["a <EOS> dog"]


def test_a_text_ends_at_its_first_end_or_where_it_was_cut():
    both = tokenizers()
    row = both.decoder_rows(["a dog runs ."])[0]
    assert both.texts(torch.tensor([[*row, *row]])) == ["a dog runs ."]
    assert both.texts(torch.tensor([row[:-1]])) == ["a dog runs ."]


def test_special_tokens_are_added_where_they_are_missing(tmp_path):
    both = tokenizers()
    bare = PreTrainedTokenizerFast(
        tokenizer_object=both.decoder.backend_tokenizer, eos_token="a", bos_token="a", add_prefix_space=True
    )
    for name, each in (("head", both.encoder), ("tail", bare)):
        each.save_pretrained(tmp_path / name)
    loaded = TextTokenizers.load(tmp_path / "head", tmp_path / "tail")
    assert [loaded.decoder.pad_token, loaded.decoder.bos_token, loaded.decoder.eos_token] == [
        "<PAD>",
        "<BOS>",
        "<EOS>",
    ]


def test_tokenisers_without_what_is_needed_are_refused():
    both = tokenizers()
    bare = PreTrainedTokenizerFast(tokenizer_object=both.decoder.backend_tokenizer, eos_token="<EOS>")
    with pytest.raises(ValueError, match="pad None, bos None, eos 2 but needs three different tokens"):
        TextTokenizers(both.encoder, bare)
    with pytest.raises(ValueError, match="encoder's tokeniser has no padding token"):
        TextTokenizers(bare, both.decoder)


def test_what_is_no_list_of_texts_is_refused():
    with pytest.raises(
        TypeError, match=r"the string 'a dog' but a list of texts was expected: write \[text\]"
    ):
        tokenizers().batch("a dog")
    with pytest.raises(TypeError, match="texts hold a int"):
        tokenizers().decoder_rows(["a", 3])


def test_missing_tokenisers_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no tokeniser at .*absent"):
        TextTokenizers.from_folder(tmp_path / "absent")
    (tmp_path / "encoder_tokenizer").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokeniser at .*encoder_tokenizer"):
        TextTokenizers.from_folder(tmp_path)


def test_padding_is_on_the_right():
    assert pad_rows([[1], [2, 3, 4], []], 9).tolist() == [[1, 9, 9], [2, 3, 4], [9, 9, 9]]
