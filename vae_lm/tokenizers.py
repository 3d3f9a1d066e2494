"""The two tokenisers of a sentence VAE: encoder rows ``[CLS] ... [SEP]``, decoder rows ``BOS ... EOS``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

ENCODER_FOLDER, DECODER_FOLDER = "encoder_tokenizer", "decoder_tokenizer"

_SPECIAL_TOKENS = {"pad_token": "<PAD>", "bos_token": "<BOS>", "eos_token": "<EOS>"}
"""In this order: 50257, 50258 and 50259 for GPT-2, as in the original."""


class Batch(NamedTuple):
    """The same B sentences for both networks, padded on the right.

    ``encoder_ids`` is int64 ``[B, T0]``, ``decoder_ids`` int64 ``[B, T1]``.
    """

    encoder_ids: Tensor
    decoder_ids: Tensor


class TextTokenizers:
    """Tokenisers of the encoder and of the decoder.

    Args:
        encoder: any with a padding token; its own special tokens surround a text.
        decoder: with padding, BOS and EOS tokens, three different ones.

    Raises:
        ValueError: one of these tokens is missing, or two are the same.
    """

    def __init__(self, encoder: PreTrainedTokenizerBase, decoder: PreTrainedTokenizerBase) -> None:
        if encoder.pad_token_id is None:
            raise ValueError("the encoder's tokeniser has no padding token: set its pad_token")
        names = ("pad", "bos", "eos")
        ids = [decoder.pad_token_id, decoder.bos_token_id, decoder.eos_token_id]
        if None in ids or len(set(ids)) < len(ids):
            found = ", ".join(f"{name} {value}" for name, value in zip(names, ids, strict=True))
            raise ValueError(
                f"the decoder's tokeniser has {found} but needs three different tokens: TextTokenizers.load "
                "adds them"
            )
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def load(cls, encoder: str | Path, decoder: str | Path) -> TextTokenizers:
        """Tokenisers from folders or Hub names, the decoder's with special tokens and a blank before texts.

        A decoder without three different special tokens (GPT-2 has one for all) gets ``<PAD>``, ``<BOS>`` and
        ``<EOS>`` at the end of its vocabulary.

        Args:
            encoder: folder or name, as of bert-base-cased.
            decoder: folder or name, as of gpt2.

        Raises:
            FileNotFoundError: a folder or name leads to no tokeniser.
            ValueError: see the class.
        """
        # The old GPT-2 tokeniser put a blank before every text, and so did everything trained with it.
        tail = _load(decoder, add_prefix_space=True)
        ids = [tail.pad_token_id, tail.bos_token_id, tail.eos_token_id]
        if None in ids or len(set(ids)) < len(ids):
            tail.add_special_tokens(dict(_SPECIAL_TOKENS))
        return cls(_load(encoder), tail)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TextTokenizers:
        """Both tokenisers as `save` left them in a model's folder."""
        return cls(_load(Path(folder) / ENCODER_FOLDER), _load(Path(folder) / DECODER_FOLDER))

    def save(self, folder: str | Path) -> None:
        """Write both into subfolders of ``folder``."""
        self.encoder.save_pretrained(Path(folder) / ENCODER_FOLDER)
        self.decoder.save_pretrained(Path(folder) / DECODER_FOLDER)

    def encoder_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with the encoder's special tokens; texts are stripped.

        Special tokens spelt out in a text count as such: dialogues join their turns by ``[SEP]``.
        """
        texts = _stripped(texts)
        rows: list[list[int]] = self.encoder(texts, verbose=False)["input_ids"] if texts else []
        return rows

    def decoder_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text between BOS and EOS; texts are stripped, ``<EOS>`` in them is plain text."""
        texts = _stripped(texts)
        if not texts:
            return []
        rows = self.decoder(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]
        bos, eos = self.decoder.bos_token_id, self.decoder.eos_token_id
        return [[bos, *row, eos] for row in rows]

    def batch(self, texts: Sequence[str]) -> Batch:
        """Both kinds of rows, padded."""
        return Batch(
            pad_rows(self.encoder_rows(texts), self.encoder.pad_token_id),
            pad_rows(self.decoder_rows(texts), self.decoder.pad_token_id),
        )

    def texts(self, decoder_ids: Tensor) -> list[str]:
        """Texts of decoder rows ``[B, T]``: up to the first EOS, without special tokens, stripped.

        A row without EOS was cut off by a limit of length and is kept to its end.
        """
        if not len(decoder_ids):
            return []
        eos = self.decoder.eos_token_id
        rows = [row[: row.index(eos)] if eos in row else row for row in decoder_ids.tolist()]
        # The clean-up of blanks before punctuation would change what the model said.
        texts = self.decoder.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]


def pad_rows(rows: Iterable[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of token ids as int64 ``[B, T]``, padded on the right to the longest.

    Example:
        >>> pad_rows([[5], [6, 7]], 0)
        tensor([[5, 0],
                [6, 7]])
    """
    rows = list(rows)
    width = max(map(len, rows), default=0)
    padded = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width)


def _stripped(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"texts is the string {texts[:40]!r} but a list of texts was expected: write [text]")
    odd = next((text for text in texts if not isinstance(text, str)), None)
    if odd is not None:
        raise TypeError(f"texts hold a {type(odd).__name__} but only strings were expected")
    return [text.strip() for text in texts]


def _load(source: str | Path, **options: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source), **options)
    except (OSError, ValueError) as error:  # a missing folder, a folder without a tokeniser, no network
        raise FileNotFoundError(
            f"no tokeniser at {source}: give a folder with its files (tokenizer_config.json beside them) or "
            f"a name on the Hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return tokenizer
