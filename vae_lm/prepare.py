"""Text to sentences that fit a model: ``python -m vae_lm.prepare SOURCE ... --out FOLDER``.

Lines, or the sentences in them, are stripped and written one a line, without those that are empty or too
long. Every sentence goes to train, valid or test by a digest of the seed and itself, so equal sentences never
lie on both sides of a split. Nothing is held in memory but some thousand lines.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fq.run import write_atomically
from vae_lm.data import read_file
from vae_lm.stream import is_token_file, source_files
from vae_lm.tokenizers import TextTokenizers

COUNTS = "counts.json"

_AT_ONCE = 10_000  # sentences tokenised together

# Straight and curly quotes, closing ones and then opening ones.
_BOUNDARY = re.compile(
    "([.!?][\"'\u201d\u2019)\\]]*)\\s+(?=[\"'\u201c\u2018(\\[]*[A-Z0-9\u00c0-\u00d6\u00d8-\u00de])"
)

_NO_END = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|No|vs|cf|al"
    r"|[Ee]\.g|[Ii]\.e|[Ff]ig|[Vv]ol|pp|ca|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Text to sentences that fit a model, one a line.

    Raises:
        ValueError: a value is outside its range, or values do not go together.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Text files (.txt, .text, .tsv, each also with .gz; .parquet, .arrow) or folders of them."""
    out: str
    """Folder to make; it gets train.txt, if asked for valid.txt and test.txt, and counts.json."""
    sentences: Literal["lines", "rule", "nltk"] = "lines"
    """What a sentence is: a line; or a part of one, found by the rule of split_sentences or by NLTK."""
    max_words: int = 64
    """Most words of a sentence; 0 for no limit."""
    max_tokens: int = 0
    """Most tokens in either network, special ones included; 0 for no limit. Needs vocab."""
    vocab: tuple[str, ...] = ()
    """Tokenisers, folders or Hub names: encoder's and decoder's, or one folder of a VAE with both."""
    valid: float = 0.0
    """Share of the sentences for valid.txt."""
    test: float = 0.0
    """Share of the sentences for test.txt."""
    seed: int = 0
    """Of the split."""
    labelled: bool = False
    """Lines are label<TAB>text; the label is dropped."""
    column: str = "text"
    """Column of the text in Arrow files."""
    format: Literal["text", "arrow"] = "text"
    """What is written: text files, or Arrow files with one column (needs pyarrow)."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no source was given: name at least one file or folder")
        if min(self.max_words, self.max_tokens) < 0:
            raise ValueError(
                f"max_words {self.max_words} and max_tokens {self.max_tokens} must be at least 0"
            )
        if bool(self.max_tokens) != bool(self.vocab):
            raise ValueError(
                f"max_tokens is {self.max_tokens} and vocab {' '.join(self.vocab) or 'empty'}: tokens are "
                "counted with tokenisers, so give both or neither"
            )
        if len(self.vocab) > 2:
            raise ValueError(
                f"vocab names {len(self.vocab)} tokenisers: give the encoder's and the decoder's, or one "
                "folder with both"
            )
        if min(self.valid, self.test) < 0 or self.valid + self.test >= 1:
            raise ValueError(
                f"valid is {self.valid} and test {self.test}: give shares from 0 that leave some to train on"
            )


def prepare(options: Preparation) -> dict[str, Any]:
    """Write the sentences and their counts; the folder appears when all is done.

    Args:
        options: see `Preparation`.

    Returns:
        What ``counts.json`` holds: options, lines read, sentences found, how many were dropped for what, and
        number, words and sha256 of each file.

    Raises:
        FileExistsError: the folder is there already.
        FileNotFoundError: a source or tokeniser is missing.
        ImportError: NLTK, its data or pyarrow is needed and missing.
        ValueError: a source is of unknown kind, empty or damaged, or a file would have no sentence.
    """
    out = Path(options.out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} is there already: remove it, or choose another folder by --out")
    files = source_files(options.sources)
    if odd := next(filter(is_token_file, files), None):
        raise ValueError(f"{odd} holds token ids and no text: give text files")
    find = _sentence_finder(options.sentences)
    tokenizers = _load_tokenizers(options.vocab)
    writer = _writer(options.format)
    seen: Counter[str] = Counter()
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            names = ["train", *(name for name in ("valid", "test") if getattr(options, name))]
            written = {name: stack.enter_context(writer(partial, name)) for name in names}
            for text in _kept(_sentences(files, find, options, seen), tokenizers, options, seen):
                written[_part(text, options)].add(text)
        _check_written(written, seen)
        counts = _report(options, files, seen, written, partial)
        write_atomically(partial / COUNTS, json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def split_sentences(text: str) -> list[str]:
    """Sentences of a text by a rule for written English.

    One ends at a full stop, exclamation or question mark (and closing quotes or brackets after it), where
    blanks and then a capital or a digit follow (perhaps after opening ones). It does not end after a single
    letter (an initial) or one of some thirty abbreviations, such as Mr., Dr., e.g., No. and months.

    Example:
        >>> split_sentences('Mr. Brown left at 5 p.m. on Sunday. "Why?" he asked. Nobody knew.')
        ['Mr. Brown left at 5 p.m. on Sunday.', '"Why?" he asked.', 'Nobody knew.']
    """
    found, first = [], 0
    for match in _BOUNDARY.finditer(text):
        end = match.end(1)
        if not _NO_END.search(text[first:end]):
            found.append(text[first:end].strip())
            first = end
    return [*found, *filter(None, [text[first:].strip()])]


def _sentence_finder(kind: str) -> Callable[[str], list[str]]:
    if kind == "lines":
        return lambda text: [text]
    if kind == "rule":
        return split_sentences
    try:
        find: Callable[[str], list[str]] = importlib.import_module("nltk").sent_tokenize
        find("One. Two.")
    except (ImportError, LookupError) as error:
        raise ImportError(
            "--sentences nltk needs NLTK and its data: pip install nltk, then python -m nltk.downloader "
            "punkt_tab; or take --sentences rule"
        ) from error
    return find


def _load_tokenizers(vocab: tuple[str, ...]) -> TextTokenizers | None:
    if not vocab:
        return None
    return TextTokenizers.load(*vocab) if len(vocab) == 2 else TextTokenizers.from_folder(vocab[0])


def _sentences(
    files: Iterable[Path], find: Callable[[str], list[str]], options: Preparation, seen: Counter[str]
) -> Iterator[str]:
    """Stripped sentences that are not empty and not too long in words."""
    for path in files:
        before = seen["sentences"]
        for line in read_file(path, column=options.column, labelled=options.labelled):
            seen["lines"] += 1
            if not line.strip():
                seen["empty"] += 1
                continue
            for sentence in find(line.strip()):
                # A table's cell or a dialogue's turn may hold line ends, which would make two of one.
                words = sentence.split()
                seen["sentences"] += 1
                if options.max_words and len(words) > options.max_words:
                    seen["too many words"] += 1
                else:
                    yield " ".join(words) if "\n" in sentence or "\r" in sentence else sentence.strip()
        if seen["sentences"] == before:
            raise ValueError(f"{path} holds no sentence: fill it, or leave it out of the sources")


def _kept(
    texts: Iterator[str], tokenizers: TextTokenizers | None, options: Preparation, seen: Counter[str]
) -> Iterator[str]:
    """Those that are not too long in tokens."""
    if tokenizers is None:
        yield from texts
        return
    while part := list(itertools.islice(texts, _AT_ONCE)):
        rows = zip(part, tokenizers.encoder_rows(part), tokenizers.decoder_rows(part), strict=True)
        for text, head, tail in rows:
            if max(len(head), len(tail)) > options.max_tokens:
                seen["too many tokens"] += 1
            else:
                yield text


def _part(text: str, options: Preparation) -> str:
    if not options.valid and not options.test:
        return "train"
    digest = hashlib.blake2b(f"{options.seed}\t{text}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    if place < options.valid:
        return "valid"
    return "test" if place < options.valid + options.test else "train"


# ---- what is written


class _TextFile:
    """One sentence a line, UTF-8."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.txt"
        self.num_sentences = self.num_words = 0

    def __enter__(self) -> _TextFile:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def add(self, text: str) -> None:
        self.num_sentences += 1
        self.num_words += len(text.split())
        self._write(text)

    def _open(self) -> None:
        self._file = self.path.open("w", encoding="utf-8", newline="\n")

    def _write(self, text: str) -> None:
        self._file.write(f"{text}\n")

    def _close(self) -> None:
        self._file.close()


class _ArrowFile(_TextFile):
    """An Arrow file with a column ``text``."""

    def __init__(self, arrow: Any, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.path = folder / f"{name}.arrow"
        self._arrow, self._texts = arrow, []  # type: Any, list[str]

    def _open(self) -> None:
        self._schema = self._arrow.schema([("text", self._arrow.string())])
        self._stream = self._arrow.OSFile(str(self.path), "wb")
        self._table = self._arrow.ipc.new_file(self._stream, self._schema)

    def _write(self, text: str) -> None:
        self._texts.append(text)
        if len(self._texts) >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        column = self._arrow.array(self._texts, self._arrow.string())
        self._table.write_batch(self._arrow.record_batch([column], schema=self._schema))
        self._texts.clear()

    def _close(self) -> None:
        if self._texts:
            self._flush()
        self._table.close()
        self._stream.close()


def _writer(kind: str) -> Callable[[Path, str], _TextFile]:
    if kind == "text":
        return _TextFile
    try:
        return functools.partial(_ArrowFile, importlib.import_module("pyarrow"))
    except ImportError:
        raise ImportError("--format arrow needs pyarrow: pip install pyarrow; or write text") from None


def _check_written(written: dict[str, _TextFile], seen: Counter[str]) -> None:
    for name, file in written.items():
        if not file.num_sentences:
            total = sum(other.num_sentences for other in written.values())
            dropped = ", ".join(
                f"{seen[why]} with {why}" for why in ("too many words", "too many tokens") if seen[why]
            )
            raise ValueError(
                f"no sentence is left for {name} ({seen['sentences']} found, {dropped or 'none too long'}, "
                f"{total} kept): raise the limits, change the shares, or give more text"
            )


def _report(
    options: Preparation, files: list[Path], seen: Counter[str], written: dict[str, _TextFile], folder: Path
) -> dict[str, Any]:
    dropped = {why: seen[why] for why in ("empty", "too many words", "too many tokens")}
    parts = {
        name: {
            "file": file.path.name,
            "sentences": file.num_sentences,
            "words": file.num_words,
            "sha256": _sha256(folder / file.path.name),
        }
        for name, file in written.items()
    }
    return {
        "options": asdict(options),
        "files": [str(path) for path in files],
        "lines": seen["lines"],
        "sentences": seen["sentences"],
        "dropped": dropped,
        "written": parts,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and prepare.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        options = tyro.cli(
            Preparation,
            args=list(sys.argv[1:] if arguments is None else arguments),
            prog="python -m vae_lm.prepare",
        )
        counts = prepare(options)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    parts = ", ".join(f"{part['sentences']} in {part['file']}" for part in counts["written"].values())
    dropped = ", ".join(f"{count} {why}" for why, count in counts["dropped"].items())
    print(f"{options.out}: {parts}; {counts['lines']} lines read, dropped: {dropped}")


if __name__ == "__main__":
    main()
