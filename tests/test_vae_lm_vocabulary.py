"""Vocabularies trained on the spot: nothing is lost, nothing is downloaded, the same comes out again."""

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import TEXTS
from transformers import BertConfig, GPT2Config

from vae_lm import Optimus
from vae_lm.grammar import FACTORS, VOCAB_SIZE, splits
from vae_lm.tokenizers import TextTokenizers
from vae_lm.vocabulary import train_tokenizers

TEXT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"


@pytest.fixture(scope="module")
def both():
    return train_tokenizers(TEXTS, vocab_size=400)


def test_special_tokens_stand_first_at_the_encoder_and_last_at_the_decoder(both):
    head, tail = both.encoder, both.decoder
    names = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    assert head.convert_tokens_to_ids(list(names)) == [0, 1, 2, 3, 4]
    assert [head.pad_token_id, head.cls_token_id, head.sep_token_id] == [0, 1, 2]
    size = len(tail)
    assert [tail.pad_token_id, tail.bos_token_id, tail.eos_token_id] == [size - 3, size - 2, size - 1]
    assert len(head) == size + 2
    head_row, tail_row = both.encoder_rows(["a dog"])[0], both.decoder_rows(["a dog"])[0]
    assert head_row[0] == 1 and head_row[-1] == 2 and min(head_row[1:-1]) >= 5
    assert tail_row[0] == size - 2 and tail_row[-1] == size - 1
    # The same pieces on both sides, in the same order.
    assert [token - 5 for token in head_row[1:-1]] == tail_row[1:-1]


def test_words_are_the_same_pieces_wherever_they_stand(both):
    first, second = both.decoder.tokenize("dog man dog", add_special_tokens=False)[::2]
    assert first == second == "Ġdog"


def test_the_size_is_kept_and_not_filled_where_the_texts_have_no_more():
    assert len(train_tokenizers(TEXTS, vocab_size=256).decoder) == 256 + 3
    assert len(train_tokenizers(TEXTS, vocab_size=300).decoder) == 300 + 3
    assert len(train_tokenizers(["aa aa"], vocab_size=5000).decoder) == 256 + 2 + 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_plural_of_the_grammar_is_its_noun_and_an_s(seed):
    tail = train_tokenizers(splits(seed)["train"], vocab_size=VOCAB_SIZE).decoder
    for noun in FACTORS["object"]:
        assert tail.tokenize(f"{noun}s") == [*tail.tokenize(noun), "s"]


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_any_text_comes_back(both, text):
    assert both.texts(both.batch([text, TEXTS[0]]).decoder_ids) == [text.strip(), TEXTS[0]]


@pytest.mark.parametrize("name", ["ptb/valid.txt.gz", "snli/sentences.valid.txt.gz"])
def test_real_sentences_come_back(name):
    path = TEXT_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        texts = list(itertools.islice(file, 700))
    both = train_tokenizers(texts, vocab_size=1000)
    assert len(both.decoder) == 1003
    assert both.texts(both.batch(texts).decoder_ids) == [text.strip() for text in texts]
    assert both.encoder.unk_token_id not in set(both.batch(texts).encoder_ids.flatten().tolist())


def test_a_folder_gives_back_equal_tokenisers_without_a_network(both, tmp_path):
    both.save(tmp_path)
    texts = [*TEXTS, "Ünï ☃ <EOS> [SEP]  two"]
    loaded = TextTokenizers.from_folder(tmp_path)
    assert loaded.encoder.get_vocab() == both.encoder.get_vocab()
    assert loaded.decoder.get_vocab() == both.decoder.get_vocab()
    assert loaded.encoder_rows(texts) == both.encoder_rows(texts)
    assert loaded.decoder_rows(texts) == both.decoder_rows(texts)
    assert loaded.texts(loaded.batch(texts).decoder_ids) == texts
    # In a process of its own, with an empty cache and the network off.
    code = (
        "import sys; from vae_lm.tokenizers import TextTokenizers\n"
        "from vae_lm.vocabulary import train_tokenizers\n"
        "both = TextTokenizers.from_folder(sys.argv[1])\n"
        "again = train_tokenizers(sys.argv[2:], vocab_size=400)\n"
        "assert again.encoder.get_vocab() == both.encoder.get_vocab()\n"
        "assert again.decoder_rows(sys.argv[2:]) == both.decoder_rows(sys.argv[2:])\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path), *TEXTS], env=os.environ | offline, check=True)


def test_a_model_takes_them_and_saves_them(both, tmp_path):
    head = BertConfig(
        vocab_size=len(both.encoder), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=40,
    )  # fmt: skip
    tail = GPT2Config(vocab_size=len(both.decoder), n_positions=40, n_embd=8, n_layer=1, n_head=1)
    model = Optimus.from_backbones(head, tail, latent_dim=4, tokenizers=both).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = Optimus.from_pretrained(tmp_path / "model")
    assert loaded.reconstruct(TEXTS, max_new_tokens=5) == model.reconstruct(TEXTS, max_new_tokens=5)


def test_texts_are_read_once_and_in_any_container(both):
    once = train_tokenizers((f"  {text}\n" for text in ["", *TEXTS]), vocab_size=400)
    assert once.decoder.get_vocab() == both.decoder.get_vocab()


def test_bad_input_is_refused():
    with pytest.raises(
        TypeError, match=r"the string 'a dog' but several texts were expected: write \[text\]"
    ):
        train_tokenizers("a dog", vocab_size=300)
    with pytest.raises(
        ValueError, match="vocab_size is 255 but a byte-level vocabulary has at least its 256"
    ):
        train_tokenizers(TEXTS, vocab_size=255)
    with pytest.raises(ValueError, match="no text has a word in it"):
        train_tokenizers(["", "  \n"], vocab_size=300)
    with pytest.raises(TypeError, match="texts hold a int"):
        train_tokenizers(["a", 3], vocab_size=300)
