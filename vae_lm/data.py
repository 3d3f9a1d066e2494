"""Sentences in, batches of token ids out: reading, filters, a token cache, buckets of like length.

A source of texts is a file (one sentence a line: ``.txt``, ``.tsv``, either with ``.gz``; or ``.parquet``,
``.arrow``), a folder with a file for each split (``train.txt.gz``, ``sentences.valid.txt``, ...), ``grammar``
(the embedded sentences of `vae_lm.grammar`), or a name on the Hub. What does not fit in memory is for
`vae_lm.stream`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from vae_lm.tokenizers import Batch, TextTokenizers, pad_rows

Split = Literal["train", "valid", "test"]

_SPLIT_NAMES = {"train": {"train"}, "valid": {"valid", "validation", "val", "dev"}, "test": {"test"}}

_TEXT, _ARROW = (".txt", ".text", ".tsv"), (".parquet", ".arrow")

_BUCKET_BATCHES = 100

_CACHE_FORMAT = 1
"""Part of the key: raised when what is stored changes."""


class ItemBatch(NamedTuple):
    """One process's share of a batch.

    ``items`` int64 ``[b]`` are the numbers of its sentences in the corpus (in a share that is empty, b = 0),
    ``batch`` their token ids, ``num_items`` the size of the whole batch over all processes, ``step`` the
    number of the batch since the start of training.
    """

    step: int
    items: Tensor
    batch: Batch
    num_items: int


# ---- texts


def find_files(source: str | Path, *, split: Split = "train") -> list[Path]:
    """Files of one split of a source on disk.

    Args:
        source: a file, which is taken as it is; or a folder with files that name the split between dots
            (``train.0.txt.gz``), or with a subfolder of that name.
        split: which; ``validation``, ``val`` and ``dev`` name "valid" too.

    Returns:
        Paths in order of name; none if the folder has no such file.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a file of unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        names = _SPLIT_NAMES[split]
        inside = [file for file in sorted(path.iterdir()) if file.is_file() and _kind(file)]
        found = [file for file in inside if names & set(file.name.split(".")[:-1])]
        for name in sorted(names):
            folder = path / name
            if not found and folder.is_dir():
                found = [file for file in sorted(folder.iterdir()) if _kind(file)]
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no text at {source}: give a file, or a folder with train.txt or the like")
    if not _kind(path):
        raise ValueError(
            f"{path} is not of a known kind: give {', '.join(_TEXT)} (also with .gz), {' or '.join(_ARROW)}"
        )
    return [path]


def read_texts(
    source: str | Path, *, split: Split = "train", column: str = "text", labelled: bool = False
) -> list[str]:
    """Texts of one split, stripped, empty ones included.

    Args:
        source: see the module.
        split: which; a single file has only "train".
        column: of the text, in Arrow files and on the Hub.
        labelled: lines are ``label<TAB>text`` (as Yelp's are) and the label is dropped.

    Returns:
        The texts, in order; none if the source has no such split.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: a library that the source needs is not installed.
        ValueError: a file has no sentence, is damaged, or lacks the column or the label.
    """
    name, path = str(source), Path(source).expanduser()
    if name == "grammar":
        grammar: Any = importlib.import_module("vae_lm.grammar")
        return list(grammar.splits()[split])
    if not path.exists() and _is_hub_name(name):
        return list(_hub_texts(name, split, column))
    if path.is_file() and split != "train":
        return []
    texts = []
    for file in find_files(path, split=split):
        found = [text.strip() for text in read_file(file, column=column, labelled=labelled)]
        if not any(found):
            raise ValueError(f"{file} holds no sentence: one a line was expected")
        texts += found
    return texts


def read_file(path: Path, *, column: str = "text", labelled: bool = False) -> Iterator[str]:
    """Texts of one file, as they come; arguments and errors as of `read_texts`."""
    if _kind(path) == "arrow":
        yield from _arrow_texts(path, column)
        return
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not labelled or not line.strip():
                    yield line
                    continue
                _, tab, text = line.partition("\t")
                if not tab:
                    raise ValueError(
                        f"{path}, line {number} ({line.strip()[:40]!r}) has no tab: label<TAB>text was "
                        "expected"
                    )
                yield text
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is not UTF-8 text, or damaged ({error}): convert or copy it again"
        ) from None


def _kind(path: Path) -> str:
    suffixes = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    if suffixes[:1] and suffixes[0] in _TEXT:
        return "text"
    return "arrow" if path.suffix in _ARROW else ""


def _is_hub_name(name: str) -> bool:
    """One or two words of a name: not a file that is missing."""
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and not _kind(Path(name))


def _hub_texts(name: str, split: Split, column: str) -> Iterator[str]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise ImportError(
            f"{name!r} is no file or folder here; to fetch the data set of that name from the Hub: pip "
            "install datasets"
        ) from None
    try:
        offered = datasets.get_dataset_split_names(name)
        chosen = [offer for offer in offered if offer in _SPLIT_NAMES[split]]
        loaded = datasets.load_dataset(name, split=chosen[0]) if chosen else None
    except Exception as error:  # each of its many errors means the same to the caller
        raise FileNotFoundError(
            f"no data set {name!r} here or on the Hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if loaded is None:
        return
    if column not in loaded.column_names:
        raise ValueError(
            f"{name} has no column {column!r} but {', '.join(loaded.column_names)}: see --column"
        )
    for text in loaded[column]:
        yield str(text).strip()


def _arrow_texts(path: Path, column: str) -> Iterator[str]:
    try:
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from None
    try:
        if path.suffix == ".parquet":
            file = importlib.import_module("pyarrow.parquet").ParquetFile(path)
            names, batches = file.schema_arrow.names, file.iter_batches
        else:
            names, batches = _open_arrow(path)
        if column in names:
            for batch in batches(columns=[column]):
                yield from (str(text) for text in batch.column(column).to_pylist() if text is not None)
    except (arrow.ArrowException, OSError) as error:  # a cut stream is the latter
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    if column not in names:
        raise ValueError(f"{path} has no column {column!r} but {', '.join(names)}: see --column")


def _open_arrow(path: Path) -> tuple[list[str], Any]:
    """Names and an iterator of batches of an Arrow file, or stream as ``datasets`` writes it."""
    ipc: Any = importlib.import_module("pyarrow.ipc")
    with path.open("rb") as opened:
        is_file = opened.read(6) == b"ARROW1"
    reader = ipc.open_file(str(path)) if is_file else ipc.open_stream(str(path))

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        if not is_file:
            yield from reader
            return
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)

    return list(reader.schema.names), batches


class Kept(NamedTuple):
    """Texts that passed the filters, and how many were ``empty`` or had too many words (``wordy``)."""

    texts: list[str]
    empty: int
    wordy: int


def filter_texts(texts: Iterable[str], *, max_words: int = 0, drop: bool = True) -> Kept:
    """Leave out empty texts and those with too many words (between blanks).

    Args:
        texts: stripped or not.
        max_words: most words of a text; 0 for no limit.
        drop: False makes a text with more of them an error.

    Returns:
        `Kept`, with stripped texts.

    Raises:
        ValueError: a text is over the limit and must not be dropped.

    Example:
        >>> filter_texts(["a b c", "", "a"], max_words=2)
        Kept(texts=['a'], empty=1, wordy=1)
    """
    kept, empty, wordy = [], 0, 0
    for number, text in enumerate(texts):
        text = text.strip()
        words = len(text.split())
        if not words:
            empty += 1
        elif max_words and words > max_words:
            if not drop:
                raise _too_long(number, text, f"{words} words", f"{max_words} are")
            wordy += 1
        else:
            kept.append(text)
    return Kept(kept, empty, wordy)


def _too_long(number: int, text: str, size: str, limit: str) -> ValueError:
    return ValueError(
        f"text {number} ({text[:40]!r}...) has {size} but at most {limit} allowed: shorten it, raise the "
        "limit, or have long texts dropped"
    )


# ---- token ids


class _Flat(NamedTuple):
    """Rows one after the other, int32; row i is ``ids[offsets[i] : offsets[i + 1]]``."""

    ids: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        row: np.ndarray = self.ids[self.offsets[index] : self.offsets[index + 1]]
        return row


class TokenRows:
    """A corpus as token ids of both networks, with its texts; sentence i is item i.

    Args:
        texts: of the rows.
        encoder: flat rows ``[CLS] ... [SEP]``.
        decoder: flat rows ``BOS ... EOS``.
        pad_ids: of encoder and decoder.
        num_long: texts that had too many tokens and were dropped before.
    """

    def __init__(
        self, texts: list[str], encoder: _Flat, decoder: _Flat, *, pad_ids: tuple[int, int], num_long: int = 0
    ) -> None:
        self.texts, self.encoder, self.decoder = texts, encoder, decoder
        self.pad_ids, self.num_long = pad_ids, num_long

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizers: TextTokenizers,
        *,
        max_tokens: int,
        drop: bool = True,
        cache: str | Path | None = None,
    ) -> TokenRows:
        """Tokenise texts, or read what an earlier call with the same ones left.

        Args:
            texts: without empty ones.
            tokenizers: of the model.
            max_tokens: most tokens of a row in either network, special tokens included.
            drop: leave out longer texts; False makes one an error.
            cache: folder of stored token ids; None for none. A file is named after all that decides what is
                in it, so it is never stale; one that is damaged is made again.

        Raises:
            ValueError: a text is too long and must not be dropped, or none is left.
        """
        texts = list(texts)
        place = (
            Path(cache).expanduser() / f"{_digest(texts, tokenizers, max_tokens)}.safetensors"
            if cache
            else None
        )
        stored = _load_cache(place) if place else None
        if stored is None:
            stored = _tokenise(texts, tokenizers, max_tokens)
            if place:
                _store_cache(place, stored)
        kept, long = stored["kept"], stored["long"]
        if len(long) and not drop:
            number, size = (int(value) for value in long[0])
            raise _too_long(
                number, texts[number], f"{size} tokens", f"{max_tokens} (special ones included) are"
            )
        if not len(kept):
            raise ValueError(
                f"of {len(texts)} texts none is left with 1 to {max_tokens} tokens: give more text, or raise "
                "the limit"
            )
        return cls(
            [texts[index] for index in kept.tolist()],
            _Flat(stored["encoder_ids"], stored["encoder_offsets"]),
            _Flat(stored["decoder_ids"], stored["decoder_offsets"]),
            pad_ids=(int(tokenizers.encoder.pad_token_id), int(tokenizers.decoder.pad_token_id)),
            num_long=len(long),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, items: Sequence[int]) -> Batch:
        """Rows of some items, padded to the longest of them."""
        head = pad_rows([self.encoder.row(item).tolist() for item in items], self.pad_ids[0])
        return Batch(head, pad_rows([self.decoder.row(item).tolist() for item in items], self.pad_ids[1]))

    def select(self, items: Sequence[int]) -> TokenRows:
        """A corpus of some of the items, numbered anew."""
        return TokenRows(
            [self.texts[item] for item in items],
            _flatten([self.encoder.row(item) for item in items]),
            _flatten([self.decoder.row(item) for item in items]),
            pad_ids=self.pad_ids,
        )


def _flatten(rows: Sequence[Sequence[int] | np.ndarray]) -> _Flat:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    ids = [np.asarray(row, dtype=np.int32) for row in rows]
    return _Flat(np.concatenate(ids) if ids else np.empty(0, np.int32), offsets)


def _tokenise(texts: list[str], tokenizers: TextTokenizers, max_tokens: int) -> dict[str, np.ndarray]:
    head: list[np.ndarray] = []
    tail: list[np.ndarray] = []
    kept: list[int] = []
    long: list[tuple[int, int]] = []
    for first in range(0, len(texts), 10_000):
        part = texts[first : first + 10_000]
        rows = zip(tokenizers.encoder_rows(part), tokenizers.decoder_rows(part), strict=True)
        for number, (one, two) in enumerate(rows, start=first):
            size = max(len(one), len(two))
            if size > max_tokens:
                long.append((number, size))
                continue
            kept.append(number)
            head.append(np.asarray(one, dtype=np.int32))
            tail.append(np.asarray(two, dtype=np.int32))
    encoder, decoder = _flatten(head), _flatten(tail)
    return {
        "encoder_ids": encoder.ids, "encoder_offsets": encoder.offsets,
        "decoder_ids": decoder.ids, "decoder_offsets": decoder.offsets,
        "kept": np.asarray(kept, dtype=np.int64),
        "long": np.asarray(long, dtype=np.int64).reshape(-1, 2),
    }  # fmt: skip


def _digest(texts: Sequence[str], tokenizers: TextTokenizers, max_tokens: int) -> str:
    """Key of everything that token ids depend on."""
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {max_tokens}".encode())
    for tokenizer in (tokenizers.encoder, tokenizers.decoder):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        settings = [type(tokenizer).__name__, tokenizer.all_special_tokens, tokenizer.all_special_ids]
        digest.update(f"\n{settings}\n{content}".encode())
    for text in texts:
        digest.update(b"\n" + text.encode())
    return digest.hexdigest()[:40]


def _load_cache(path: Path) -> dict[str, np.ndarray] | None:
    try:
        stored: dict[str, np.ndarray] = load_file(path)
        ends = [
            stored[f"{name}_offsets"][-1] == len(stored[f"{name}_ids"]) for name in ("encoder", "decoder")
        ]
        sizes = {
            len(stored["kept"]) + 1,
            *(len(stored[f"{name}_offsets"]) for name in ("encoder", "decoder")),
        }
        return stored if all(ends) and len(sizes) == 1 and "long" in stored else None
    except Exception:  # missing or damaged, of whatever kind: it is made again
        return None


def _store_cache(path: Path, content: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(content, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- batches


def epoch_order(lengths: np.ndarray, *, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of one epoch: every item once, items of like length together.

    Lines are shuffled and cut into buckets of 100 batches; each bucket is sorted by length, the longest
    first, and cut into batches; then the batches are shuffled.

    Args:
        lengths: ``[N]`` of the rows.
        batch_size: items of a batch; one batch has what is left over.
        seed: of the shuffles.
        epoch: from 0.

    Returns:
        ceil(N / batch_size) arrays of item numbers.
    """
    draw = np.random.default_rng([seed, epoch])
    order, size = draw.permutation(len(lengths)), _BUCKET_BATCHES * batch_size
    batches = []
    for first in range(0, len(order), size):
        bucket = order[first : first + size]
        bucket = bucket[np.argsort(-lengths[bucket], kind="stable")]
        batches += [bucket[start : start + batch_size] for start in range(0, len(bucket), batch_size)]
    return [batches[index] for index in draw.permutation(len(batches))]


def training_batches(
    rows: TokenRows,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
) -> Iterator[ItemBatch]:
    """This process's shares of the batches of training, without end.

    Which items are in batch number ``step`` depends on the corpus, ``batch_size``, ``seed`` and ``step``
    alone, so a run can go on anywhere, and with another number of processes it sees the same batches.

    Args:
        rows: the corpus.
        batch_size: items of a batch over all processes.
        seed: of the order.
        rank: of this process.
        world_size: number of processes; shares differ by at most one item and have like lengths.
        start_step: first batch to give.

    Raises:
        ValueError: a count below 1, a rank out of range, or a negative step.
    """
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size or start_step < 0:
        raise ValueError(
            f"batch_size {batch_size}, rank {rank} of {world_size}, start_step {start_step}: expected at "
            "least 1 item, a rank below the number of processes and a step from 0"
        )
    return _training_batches(rows, batch_size, seed, slice(rank, None, world_size), start_step)


def _training_batches(
    rows: TokenRows, batch_size: int, seed: int, share: slice, step: int
) -> Iterator[ItemBatch]:
    lengths, per_epoch = rows.encoder.lengths, -(-len(rows) // batch_size)
    while True:
        epoch, within = divmod(step, per_epoch)
        for items in epoch_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)[within:]:
            mine = items[share].tolist()
            yield ItemBatch(step, torch.tensor(mine, dtype=torch.int64), rows.batch(mine), len(items))
            step += 1


def evaluation_batches(rows: TokenRows, *, batch_size: int) -> Iterator[ItemBatch]:
    """Every item once, in order of length, the longest first, so that memory runs out at once or never.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1")
    order = np.argsort(-rows.decoder.lengths, kind="stable")
    return (
        ItemBatch(step, torch.from_numpy(items), rows.batch(items.tolist()), len(items))
        for step, first in enumerate(range(0, len(order), batch_size))
        for items in [order[first : first + batch_size]]
    )


def item_noise(items: Tensor, latent_dim: int, *, seed: int, step: int) -> Tensor:
    """Standard normal noise of some items in one step, whichever process has them.

    Args:
        items: int64 ``[b]``.
        latent_dim: d.
        seed: of the run.
        step: number of the batch.

    Returns:
        float32 ``[b, d]`` on the CPU, a function of (seed, step, item) alone.
    """
    key = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
    noise = np.empty((len(items), latent_dim), dtype=np.float32)
    for row, item in zip(noise, items.tolist(), strict=True):
        # The item is the highest word of the counter: streams of two items never meet.
        source = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, item]))
        source.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)
