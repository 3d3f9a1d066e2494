"""Corpora larger than memory: files read line by line, shuffled in a buffer, shared by all processes.

A stream reads text files (see `vae_lm.data`) or Optimus's Wikipedia files of token ids, and holds one buffer
of lines and one batch of token ids at a time, whatever the size of the corpus.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae_lm.data import ItemBatch, epoch_order, find_files, read_file
from vae_lm.tokenizers import Batch, TextTokenizers, pad_rows

_TOKEN_FILES = (".json", ".json.gz")

_CHUNK = 1 << 20  # characters of a token file read at once

_LINE_BITS = 40  # of an item's number; the file's number is above

_Line = tuple[int, str]
"""Number of the item, and its text or its record of token ids."""


class TextStream:
    """Batches of a corpus of any size.

    Every epoch goes through all files in an order of its own, reads ``shuffle_buffer`` lines at a time (the
    first time in an epoch fewer, so that the seams move), and shuffles them: into buckets of 100 batches,
    each sorted by length, cut into batches, which are shuffled again. So a batch mixes lines that are at most
    a buffer apart, and has little padding. Every line is in one batch of each epoch; the last batch of an
    epoch may be smaller.

    All processes read all lines but tokenise their own alone. Batch number ``step`` depends on the files,
    ``batch_size``, ``shuffle_buffer``, ``seed`` and ``step``, and not on the number of processes: process r
    of W has every W-th of its items, from item r on. No position is stored: a resumed stream reads through
    the files to count the lines, and then again up to its buffer, both without tokenising.

    A line is an item numbered 2^40 times its file plus its line, both from 0.

    Args:
        sources: files or folders. Text: one sentence a line, blank lines left out. Token files (``.json``,
            ``.json.gz``): a list of objects ``bert_token``, ``bert_token_length``, ``gpt2_token``,
            ``gpt2_token_length``, special tokens included. All must be of one of both kinds; which files a
            folder stands for, see `source_files`.
        tokenizers: of the model.
        batch_size: items of a batch over all processes.
        max_tokens: most tokens of a row, special tokens included. A longer one stops the stream:
            ``python -m vae_lm.prepare`` leaves such lines out beforehand.
        shuffle_buffer: lines shuffled together, rounded down to whole batches.
        seed: of all shuffles.
        rank: of this process.
        world_size: number of processes.

    Raises:
        TypeError: ``sources`` is one path.
        FileNotFoundError: a source is missing, or a folder holds no file of a known kind.
        ValueError: a count out of range, an unknown kind of file, or both kinds together. While it runs: a
            file without a line, damaged or not UTF-8, a row that is too long, or token ids that are not of
            the tokenisers.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        tokenizers: TextTokenizers,
        *,
        batch_size: int,
        max_tokens: int,
        shuffle_buffer: int = 65_536,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: expected at least 1 item and a rank "
                "below the number of processes"
            )
        if shuffle_buffer < batch_size:
            raise ValueError(
                f"shuffle_buffer is {shuffle_buffer} but must hold at least one batch of {batch_size} lines"
            )
        if max_tokens < 3:
            raise ValueError(f"max_tokens is {max_tokens} but a row has two special tokens and one more")
        self.files = source_files(sources)
        kinds = {is_token_file(path) for path in self.files}
        if len(kinds) > 1:
            raise ValueError("the sources are text files and token files (.json): give one of both kinds")
        self._has_tokens = kinds == {True}
        self.tokenizers = tokenizers
        self.batch_size, self.max_tokens, self.seed = batch_size, max_tokens, seed
        self.shuffle_buffer = shuffle_buffer // batch_size * batch_size
        self._share = slice(rank, None, world_size)

    @functools.cached_property
    def num_items(self) -> int:
        """Lines of an epoch; the first time, all files are read through."""
        return sum(1 for _ in self._lines(range(len(self.files))))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; counts the lines as `num_items` does."""
        return -(-self.num_items // self.batch_size)

    def batches(self, start_step: int = 0) -> Iterator[ItemBatch]:
        """This process's shares of all batches from number ``start_step`` on, without end.

        Raises:
            ValueError: a negative step; see also the class.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step} but steps are counted from 0")
        return self._batches(start_step)

    def _batches(self, step: int) -> Iterator[ItemBatch]:
        epoch, within = divmod(step, self.steps_per_epoch) if step else (0, 0)
        while True:
            for lines in self._epoch(epoch, within):
                mine = lines[self._share]
                items = torch.tensor([item for item, _ in mine], dtype=torch.int64)
                yield ItemBatch(step, items, self._rows(mine), len(lines))
                step += 1
            epoch, within = epoch + 1, 0

    def _epoch(self, epoch: int, within: int) -> Iterator[list[_Line]]:
        """Whole batches of one epoch, from its batch number ``within`` on."""
        draw = np.random.default_rng([self.seed, epoch])
        lines = self._lines(draw.permutation(len(self.files)).tolist())
        seed = int(draw.integers(2**62))
        in_buffer = self.shuffle_buffer // self.batch_size
        size = int(draw.integers((in_buffer + 1) // 2, in_buffer + 1))  # batches of the first buffer
        for number in itertools.count():
            if within >= size:
                deque(itertools.islice(lines, size * self.batch_size), maxlen=0)
                within -= size
            else:
                buffer = list(itertools.islice(lines, size * self.batch_size))
                if not buffer:
                    return
                lengths = np.array([len(text) for _, text in buffer])
                order = epoch_order(lengths, batch_size=self.batch_size, seed=seed, epoch=number)
                for indices in order[within:]:
                    yield [buffer[index] for index in indices]
                within = 0
            size = in_buffer

    def _lines(self, order: Sequence[int]) -> Iterator[_Line]:
        for index in order:
            path = self.files[index]
            first = item = index << _LINE_BITS
            found = False
            for item, text in enumerate(_records(path) if self._has_tokens else read_file(path), start=first):
                if text := text.strip():
                    found = True
                    yield item, text
            if not found:
                raise ValueError(f"{path} holds no sentence: fill it, or leave it out of the sources")

    # ---- token ids

    def _rows(self, lines: list[_Line]) -> Batch:
        texts = [text for _, text in lines]
        if self._has_tokens:
            pairs = [self._stored(item, record) for item, record in lines]
            heads, tails = [head for head, _ in pairs], [tail for _, tail in pairs]
        else:
            heads, tails = self.tokenizers.encoder_rows(texts), self.tokenizers.decoder_rows(texts)
        for (item, text), head, tail in zip(lines, heads, tails, strict=True):
            if max(len(head), len(tail)) > self.max_tokens:
                raise ValueError(
                    f"{self._place(item)} ({text[:40]!r}...) has {len(head)} tokens for the encoder and "
                    f"{len(tail)} for the decoder but at most {self.max_tokens} are allowed: raise "
                    "max_tokens, or leave long sentences out of text files by python -m vae_lm.prepare"
                )
        encoder, decoder = self.tokenizers.encoder, self.tokenizers.decoder
        return Batch(pad_rows(heads, encoder.pad_token_id), pad_rows(tails, decoder.pad_token_id))

    def _stored(self, item: int, record: str) -> tuple[list[int], list[int]]:
        """Rows of a record of token ids, checked."""
        try:
            head, tail = read_record(record)
        except ValueError as error:
            raise ValueError(f"{self._place(item)}: {error}") from None
        encoder, decoder = self.tokenizers.encoder, self.tokenizers.decoder
        for name, row, size in (("bert", head, len(encoder)), ("gpt2", tail, len(decoder))):
            if not 0 <= min(row) <= max(row) < size:
                odd = next(token for token in row if not 0 <= token < size)
                raise ValueError(
                    f"{self._place(item)} has the {name}_token {odd} but the vocabulary has {size}: give the "
                    "tokenisers that the file was made with"
                )
        ends = (decoder.bos_token_id, decoder.eos_token_id)
        if (tail[0], tail[-1]) != ends:
            raise ValueError(
                f"{self._place(item)} goes from gpt2_token {tail[0]} to {tail[-1]} but BOS and EOS are "
                f"{ends[0]} and {ends[1]}: give the tokenisers that the file was made with"
            )
        return head, tail

    def _place(self, item: int) -> str:
        kind = "record" if self._has_tokens else "line"
        return f"{self.files[item >> _LINE_BITS]}, {kind} {(item & ((1 << _LINE_BITS) - 1)) + 1}"


def read_record(record: str) -> tuple[list[int], list[int]]:
    """Token ids for encoder and decoder of one object of a token file.

    Raises:
        ValueError: not such an object, or a length that is not that of its list.

    Example:
        >>> read_record('{"bert_token": [1, 7, 2], "bert_token_length": 3, '
        ...             '"gpt2_token": [8, 9], "gpt2_token_length": 2}')
        ([1, 7, 2], [8, 9])
    """
    try:
        fields: Any = json.loads(record)
    except ValueError as error:
        raise ValueError(f"{record[:60]!r} is no JSON object ({error}): copy the file again") from None
    rows = []
    for name in ("bert_token", "gpt2_token"):
        row, length = fields.get(name), fields.get(f"{name}_length")
        if not isinstance(row, list) or not row or not all(type(token) is int for token in row):
            raise ValueError(
                f"{name} is {str(row)[:60]} but a list of token ids was expected (keys: {', '.join(fields)})"
            )
        if length != len(row):
            raise ValueError(f"{name}_length is {length} but {name} has {len(row)} ids: make the file again")
        rows.append(row)
    return rows[0], rows[1]


def _records(path: Path) -> Iterator[str]:
    """Objects of a JSON list, one after the other; they hold numbers only, so each ends at the next brace."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    rest = ""
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            while chunk := file.read(_CHUNK):
                *records, rest = (rest + chunk).split("}")
                for record in records:
                    yield record.lstrip("[, \r\n\t") + "}"
                if len(rest) > 8 * _CHUNK:
                    break
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from None
    if rest.strip("[ \r\n\t") != "]":
        raise ValueError(
            f"{path} ends with {rest[-40:]!r} but a JSON list of objects was expected: it is of another kind "
            "or cut off; copy it again"
        )


def is_token_file(path: Path) -> bool:
    """Whether a file is named like those that hold token ids instead of text."""
    return path.name.endswith(_TOKEN_FILES)


def source_files(sources: Sequence[str | Path]) -> list[Path]:
    """Files of sources, each a file or a folder.

    A folder stands for its files of the train split (`vae_lm.data.find_files`); where none is named so, for
    all its text files, or if it has none for its token files, in order of name.

    Raises:
        TypeError: ``sources`` is one path.
        FileNotFoundError: a source is missing, or a folder holds no file of a known kind.
        ValueError: a file of unknown kind.
    """
    if isinstance(sources, str | Path):
        raise TypeError(f"sources is the path {sources} but several were expected: write [source]")
    found: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found += _inside(path)
        elif path.is_file() and is_token_file(path):
            found.append(path)
        else:
            found += find_files(path)
    if not found:
        raise FileNotFoundError("no source was given: give at least one file or folder")
    return found


def _inside(folder: Path) -> list[Path]:
    if named := find_files(folder):  # with the held-out files beside them left alone
        return named
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    found = [file for file in files if _is_text_file(file)] or list(filter(is_token_file, files))
    if not found:
        raise FileNotFoundError(f"no text or token file in {folder}: give files of .txt or .json")
    return found


def _is_text_file(path: Path) -> bool:
    try:
        return bool(find_files(path))
    except ValueError:  # of another kind
        return False
