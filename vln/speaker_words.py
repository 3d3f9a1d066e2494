"""The speaker's words: a vocabulary counted in the training instructions, texts to ids and back.

As in the original, PAD, UNK and EOS are words 0 to 2, BOS is the last, and what is said fewer than five times
is UNK. A tokeniser of transformers may cut the texts into pieces instead of words.

Letters of shapes: M texts, L words.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PAD, UNK, EOS, BOS = "<PAD>", "<UNK>", "<EOS>", "<BOS>"
FILE, TOKENIZER = "words.json", "tokenizer"

_WORD = re.compile(r"\w+|\.+|[^\w\s]")
_BEFORE = re.compile(r"(?<=\w) (?=[.,;:!?)])")
"""Spaces that a text has none of."""


class Words:
    """A vocabulary.

    Args:
        entries: PAD, UNK, EOS, the words, BOS.
        tokenizer: of transformers, whose pieces the words are; by default they are words and punctuation.

    Raises:
        ValueError: the special words are not where they must be, or a word is there twice.

    Example:
        >>> words = Words.count(["Go left.", "go right"], min_count=1)
        >>> ids = words.encode(["Go left, then stop."], max_words=9)
        >>> ids.shape, words.decode(ids[0, 1:])
        ((1, 8), 'go left <UNK> <UNK> <UNK> .')
    """

    def __init__(self, entries: Sequence[str], tokenizer: Any = None) -> None:
        entries = tuple(entries)
        ends = (*entries[:3], *entries[-1:])
        if ends != (PAD, UNK, EOS, BOS) or len(set(entries)) != len(entries):
            raise ValueError(
                f"the vocabulary begins with {entries[:3]} and ends with {entries[-1:]}, {len(entries)} "
                f"words of which {len(set(entries))} differ; expected {PAD}, {UNK}, {EOS}, words, {BOS}"
            )
        self.entries, self.tokenizer = entries, tokenizer
        self._ids = {word: number for number, word in enumerate(entries)}

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def count(cls, texts: Iterable[str], *, min_count: int = 5, tokenizer: Any = None) -> Words:
        """The words of texts, the commonest first.

        Args:
            texts: to learn from.
            min_count: words that occur less often are unknown.
            tokenizer: see `Words`.

        Raises:
            ValueError: no word occurs so often.
        """
        counts = Counter(word for text in texts for word in _split(text, tokenizer))
        for special in () if tokenizer is None else tokenizer.all_special_tokens:
            counts.pop(special, None)  # above all its own [UNK]
        listed = sorted((word for word, count in counts.items() if count >= min_count),
                        key=lambda word: (-counts[word], word))  # fmt: skip
        if not listed:
            raise ValueError(f"no word occurs {min_count} times in the instructions: lower --min-count")
        return cls((PAD, UNK, EOS, *listed, BOS), tokenizer)

    @classmethod
    def listed(cls, path: str | Path) -> Words:
        """The words of a text file, one a line; BOS is added, as the original does.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not begin with PAD, UNK and EOS.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a file of words, one a line")
        entries = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        try:
            return cls((*entries, BOS))
        except ValueError as error:
            raise ValueError(f"{path} is no list of a speaker's words: {error}") from error

    def split(self, text: str) -> list[str]:
        """Words of a text, unknown ones too, as BLEU compares them."""
        return _split(text, self.tokenizer)

    def encode(self, texts: Sequence[str], *, max_words: int) -> np.ndarray:
        """Texts as the speaker learns them.

        Args:
            texts: ``[M]``.
            max_words: of a text, EOS included. What is longer loses its end and EOS: it does not end there.

        Returns:
            int64 ``[M, 1 + L]``: BOS, words, EOS, padding.
        """
        unknown = self._ids[UNK]
        rows = [
            [self._ids[BOS], *([self._ids.get(word, unknown) for word in self.split(text)] + [2])[:max_words]]
            for text in texts
        ]
        ids = np.zeros((len(rows), max(map(len, rows), default=1)), dtype=np.int64)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return ids

    def said(self, ids: Iterable[int]) -> list[str]:
        """Words up to EOS."""
        found = []
        for number in ids:
            if self.entries[number] in (EOS, PAD):
                break
            found.append(self.entries[number])
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to EOS."""
        said = self.said(ids)
        text = " ".join(said) if self.tokenizer is None else self.tokenizer.convert_tokens_to_string(said)
        return _BEFORE.sub("", text).strip()

    def save(self, folder: str | Path) -> None:
        """Write into a folder."""
        (Path(folder) / FILE).write_text(
            json.dumps(self.entries, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(folder) / TOKENIZER)

    @classmethod
    def load(cls, folder: str | Path) -> Words:
        """Read from a folder.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist: the words of the speaker stand there, copy it too"
            )
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        place = Path(folder) / TOKENIZER
        return cls(entries, load_tokenizer(place) if place.is_dir() else None)


def _split(text: str, tokenizer: Any) -> list[str]:
    return _WORD.findall(text.lower()) if tokenizer is None else tokenizer.tokenize(text)


def load_tokenizer(folder: str | Path) -> Any:
    """A tokeniser of transformers.

    Raises:
        FileNotFoundError: the folder has none.
        ImportError: transformers is not there.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("a tokenizer folder needs transformers: pip install 'fq-gan[vln]'") from error
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} is no tokeniser of transformers ({error}): give another --tokenizer"
        ) from error
