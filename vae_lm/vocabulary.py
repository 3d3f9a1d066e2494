"""Vocabularies trained on the spot: byte-level BPE for both networks, without any download.

One set of merges (Sennrich et al. 2016, on bytes as in GPT-2) serves both sides; only the special tokens
differ. Every text can be written with it, and comes back from the decoder's ids exactly, but for blanks at
its ends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from vae_lm.tokenizers import TextTokenizers

NUM_BYTES = 256

_ENCODER_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
_DECODER_SPECIAL = ("<PAD>", "<BOS>", "<EOS>")


def train_tokenizers(texts: Iterable[str], *, vocab_size: int) -> TextTokenizers:
    """Train the tokenisers of a sentence VAE; the same texts give the same tokenisers.

    The encoder's vocabulary begins with [PAD] (0), [CLS], [SEP], [UNK] and [MASK], and its rows are
    ``[CLS] ... [SEP]``. The decoder's ends with <PAD>, <BOS> and <EOS>, as GPT-2's does in Optimus. The first
    word of a text is the same token as anywhere else in it.

    Args:
        texts: read once and never held as a whole; blanks at their ends are dropped.
        vocab_size: most bytes and merged pieces, without special tokens; fewer if the texts have no more. At
            least the 256 bytes.

    Returns:
        Tokenisers that `TextTokenizers.save` writes and `TextTokenizers.from_folder` reads.

    Raises:
        TypeError: ``texts`` is one string, or holds something else than strings.
        ValueError: ``vocab_size`` is below 256, or no text has a word in it.

    Example:
        >>> both = train_tokenizers(["a dog runs .", "a cat runs ."], vocab_size=300)
        >>> both.encoder.tokenize("a cat runs .")
        ['Ġa', 'Ġcat', 'Ġruns', 'Ġ.']
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is the string {texts[:40]!r} but several texts were expected: write [text]")
    if vocab_size < NUM_BYTES:
        raise ValueError(
            f"vocab_size is {vocab_size} but a byte-level vocabulary has at least its {NUM_BYTES} bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    counted = _Counted(texts)
    tokenizer.train_from_iterator(
        iter(counted),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if not counted.num_texts:
        raise ValueError("no text has a word in it, so no vocabulary can be trained: give at least one")
    # The trainer's own model holds a cache and settings; what defines it is this.
    learnt = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)
    merges = [(left, right) for left, right in learnt["merges"]]
    return TextTokenizers(_encoder(pieces, merges), _decoder(pieces, merges))


class _Counted:
    """Stripped texts that are not empty, and how many there were."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_texts = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if not isinstance(text, str):
                raise TypeError(f"texts hold a {type(text).__name__} but only strings were expected")
            if stripped := text.strip():
                self.num_texts += 1
                yield stripped


def _encoder(pieces: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level([*_ENCODER_SPECIAL, *pieces], merges, special=_ENCODER_SPECIAL)
    ids = {token: _ENCODER_SPECIAL.index(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def _decoder(pieces: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = _byte_level([*pieces, *_DECODER_SPECIAL], merges, special=_DECODER_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<PAD>",
        bos_token="<BOS>",
        eos_token="<EOS>",
        # Loading sets the blank before a text from this, whatever the tokeniser itself says.
        add_prefix_space=True,
    )


def _byte_level(tokens: list[str], merges: list[tuple[str, str]], *, special: tuple[str, ...]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # No piece has a special token's name: pieces are letters or signs, never both.
    assert len(vocabulary) == len(tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
