"""Panorama features of all viewpoints in one memory-mapped array, with an index that is checked by digest.

A store is a folder: ``features.npy``, float16 or float32 ``[N, 36, D]``, which NumPy opens as it is, and
``index.json`` with the scan and viewpoint of every row and a digest of each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np

from vln.geometry import NUM_VIEWS

ARRAY, INDEX, JOURNAL = "features.npy", "index.json", "written.jsonl"
_FORMAT = 1
Key = tuple[str, str]
"""Scan id and viewpoint id."""
DType = Literal["float16", "float32"]
_DTYPES: dict[str, np.dtype] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class FeatureStore:
    """Features of the 36 views of viewpoints, read from the disk as they are asked for.

    A store pickles as its path, so worker processes of a data loader share one mapping of the file.

    Attributes:
        path: the folder.
        width: numbers a view.
        keys: scan and viewpoint of every row, in order.
        features: ``[N, 36, D]``, memory-mapped and read-only; views in the simulator's order.

    Example:
        >>> import tempfile
        >>> items = [(("house", "hall"), np.ones((36, 4))), (("house", "bath"), np.zeros((36, 4)))]
        >>> store = FeatureStore.write(Path(tempfile.mkdtemp()) / "views", items)
        >>> store.gather(["house"], ["hall"]).shape, store.index(["house"], ["bath"]).tolist(), store.width
        ((1, 36, 4), [1], 4)
    """

    def __init__(
        self, path: Path, keys: tuple[Key, ...], features: np.ndarray, digests: tuple[str, ...]
    ) -> None:
        self.path, self.keys, self.features = path, keys, features
        self._digests = digests
        self._rows = {key: row for row, key in enumerate(keys)}

    @property
    def width(self) -> int:
        """Numbers a view."""
        return self.features.shape[2]

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore.open, (self.path,)

    @classmethod
    def open(cls, path: str | Path, *, width: int | None = None, verify: bool = False) -> FeatureStore:
        """Open a store.

        Args:
            path: the folder.
            width: what the caller's model takes; a store of another width is refused.
            verify: read all features and hold them against their digests (a pass over the whole file).

        Raises:
            FileNotFoundError: there is no store.
            ValueError: it is damaged, cut short, or of another width.
        """
        path = Path(path)
        if not (path / INDEX).is_file():
            partial = (
                " (it was never finished: run the same command again)" if _partial(path).exists() else ""
            )
            raise FileNotFoundError(f"{path} holds no feature store{partial}: {INDEX} is missing")
        try:
            header = json.loads((path / INDEX).read_bytes())
            keys = tuple((str(scan_id), str(viewpoint_id)) for scan_id, viewpoint_id, _ in header["rows"])
            digests = tuple(str(row[2]) for row in header["rows"])
            shape = (len(keys), int(header["num_views"]), int(header["width"]))
            if header["format"] != _FORMAT or header["digest"] != _index_digest(header["rows"], shape):
                raise ValueError("its digest is another")
            features = np.load(path / ARRAY, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no feature store: {error}; write it anew") from error
        if features.shape != shape or features.dtype not in _DTYPES.values():
            raise ValueError(
                f"{path / ARRAY} holds {features.dtype} {list(features.shape)} but the index names "
                f"{list(shape)}: write the store anew"
            )
        if width is not None and width != shape[2]:
            raise ValueError(
                f"{path} holds features of width {shape[2]} but {width} is asked for: set the model's "
                f"feature width to {shape[2]}, or give a store of the other network's features"
            )
        store = cls(path, keys, features, digests)
        if verify:
            store.verify()
        return store

    def verify(self) -> None:
        """Hold all features against their digests.

        Raises:
            ValueError: one differs; the text names scan and viewpoint.
        """
        for key, row, digest in zip(self.keys, self.features, self._digests, strict=True):
            if _digest(row) != digest:
                raise ValueError(
                    f"{self.path}: the features of viewpoint {key[1]} of scan {key[0]} are damaged: "
                    "write the store anew"
                )

    def index(self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str]) -> np.ndarray:
        """Rows of viewpoints, int64 ``[B]``.

        Raises:
            ValueError: the two are not of one length, or the store lacks a viewpoint.
        """
        if isinstance(scan_ids, str) or isinstance(viewpoint_ids, str) or len(scan_ids) != len(viewpoint_ids):
            raise ValueError(
                f"expected one scan id for each viewpoint id, got {scan_ids!s:.60} and {viewpoint_ids!s:.60}"
            )
        try:
            rows = [self._rows[key] for key in zip(scan_ids, viewpoint_ids, strict=True)]
        except KeyError as error:
            scan_id, viewpoint_id = error.args[0]
            raise ValueError(
                f"{self.path} has no features of viewpoint {viewpoint_id} of scan {scan_id} among its "
                f"{len(self)}: extract or convert them with the others"
            ) from None
        return np.array(rows, dtype=np.int64)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Features of rows, a copy ``[..., 36, D]`` in the stored precision.

        Args:
            rows: integers from :meth:`index`, of any shape.

        Raises:
            IndexError: a row is not there.
        """
        return np.asarray(self.features[rows])

    def gather(self, scan_ids: Sequence[str], viewpoint_ids: Sequence[str]) -> np.ndarray:
        """Features of viewpoints, a copy ``[B, 36, D]`` in the stored precision.

        Raises:
            ValueError: see :meth:`index`.
        """
        return self.take(self.index(scan_ids, viewpoint_ids))

    @classmethod
    def write(
        cls,
        path: str | Path,
        items: Iterable[tuple[Key, Any]],
        *,
        dtype: DType = "float16",
        width: int | None = None,
    ) -> FeatureStore:
        """Write a store; what an interrupted call had written is kept, and passed over.

        Args:
            path: folder to make.
            items: ``((scan_id, viewpoint_id), features [36, D])``.
            dtype: precision of the file.
            width: numbers a view; ``None`` takes that of the first item.

        Raises:
            FileExistsError: there is something at ``path``.
            ValueError: features are of another shape, not finite or too large for the precision; a viewpoint
                occurs twice; there is none at all; or what was begun is of another width or precision.
        """
        with StoreWriter(path, dtype=dtype, width=width) as writer:
            seen: set[Key] = set()
            for key, features in items:
                if key in seen:
                    raise ValueError(f"viewpoint {key[1]} of scan {key[0]} occurs twice among the features")
                seen.add(key)
                if key not in writer.written:
                    writer.add(key, features)
            return writer.finish()


class StoreWriter:
    """Writes a store row by row into ``.NAME.partial``, which becomes the store when all is there.

    Args:
        path: folder to make.
        dtype: precision of the file.
        width: numbers a view; ``None`` takes that of the first row.

    Attributes:
        written: keys of the rows that are there, those of an interrupted run included.

    Raises:
        FileExistsError: there is something at ``path``.
        ValueError: ``dtype`` is another, or what was begun is of another width or precision.
    """

    def __init__(self, path: str | Path, *, dtype: DType = "float16", width: int | None = None) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected {' or '.join(_DTYPES)}")
        self.path, self.width, self._dtype = Path(path), width, _DTYPES[dtype]
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists: delete it or name another folder")
        self._folder = _partial(self.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[str, str, str]] = []
        self._array: BinaryIO = (self._folder / ARRAY).open("a+b")
        self._journal: BinaryIO = (self._folder / JOURNAL).open("a+b")
        try:
            self._resume()
        except BaseException:
            self.close()
            raise
        self.written: set[Key] = {(scan_id, viewpoint_id) for scan_id, viewpoint_id, _ in self._rows}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what is written stays for the next run."""
        self._array.close()
        self._journal.close()

    def add(self, key: Key, features: Any) -> None:
        """Append one viewpoint.

        Args:
            key: scan id and viewpoint id, not yet written.
            features: ``[36, D]`` numbers.

        Raises:
            ValueError: they are of another shape, not finite, or too large for the precision; or the
                viewpoint is there already.
        """
        place = f"viewpoint {key[1]} of scan {key[0]}"
        if key in self.written:
            raise ValueError(f"{place} occurs twice among the features")
        given = np.asarray(features)
        if given.ndim != 2 or given.shape[0] != NUM_VIEWS or given.dtype.kind not in "fiu":
            raise ValueError(
                f"features of {place} are {given.dtype} {list(given.shape)}, expected numbers "
                f"[{NUM_VIEWS}, D]"
            )
        if self.width is None:
            self.width = given.shape[1]
        if given.shape[1] != self.width or not self.width:
            raise ValueError(f"features of {place} have width {given.shape[1]}, expected {self.width}")
        with np.errstate(over="ignore"):
            row = np.ascontiguousarray(given, dtype=self._dtype)
        if not np.isfinite(row).all():
            cause = "not finite" if not np.isfinite(given).all() else f"too large for {row.dtype}"
            raise ValueError(f"features of {place} are {cause}")
        if not self._rows:
            self._array.write(_npy_header(0, self.width, self._dtype))
        self._array.write(row.tobytes())
        self._array.flush()
        entry = (*key, _digest(row))
        # The journal follows the array, so that a line in it means a row that was handed to the system.
        self._journal.write(json.dumps([*entry, self.width, self._dtype.name]).encode() + b"\n")
        self._journal.flush()
        self._rows.append(entry)
        self.written.add(key)

    def finish(self) -> FeatureStore:
        """Write the index, rename the folder, and open the store.

        Raises:
            ValueError: no viewpoint was added.
        """
        if not self._rows or self.width is None:
            raise ValueError(f"there are no features to write to {self.path}")
        self.close()
        array = self._folder / ARRAY
        with array.open("r+b") as file:
            file.write(_npy_header(len(self._rows), self.width, self._dtype))
            file.flush()
            os.fsync(file.fileno())
        shape = (len(self._rows), NUM_VIEWS, self.width)
        header = {
            "format": _FORMAT, "num_views": NUM_VIEWS, "width": self.width, "dtype": self._dtype.name,
            "digest": _index_digest(self._rows, shape), "rows": self._rows,
        }  # fmt: skip
        with (self._folder / INDEX).open("w", encoding="utf-8") as file:
            json.dump(header, file)
            file.flush()
            os.fsync(file.fileno())
        (self._folder / JOURNAL).unlink()
        self._folder.rename(self.path)
        return FeatureStore.open(self.path)

    def _resume(self) -> None:
        """Take over the rows of an interrupted run that are whole, and cut off the rest."""
        entries = list(self._entries())
        if entries:
            width, dtype = entries[0][3:]
            if dtype != self._dtype.name or self.width not in (None, width):
                raise ValueError(
                    f"{self._folder} holds features of width {width} in {dtype} from an interrupted run, "
                    f"but {self.width or 'any width'} in {self._dtype.name} is asked for: delete it or ask "
                    "for the same"
                )
            self.width = width
        self._array.seek(0)
        end = len(self._array.read(len(_npy_header(0, 1, self._dtype)))) if entries else 0
        kept = 0
        for scan_id, viewpoint_id, digest, _, _ in entries:
            size = NUM_VIEWS * (self.width or 0) * self._dtype.itemsize
            row = self._array.read(size)
            if hashlib.blake2b(row, digest_size=8).hexdigest() != digest:
                break
            self._rows.append((scan_id, viewpoint_id, digest))
            end, kept = end + size, kept + 1
        self._array.truncate(end if kept else 0)
        if kept < len(entries):
            self._journal.truncate(0)
            for entry in entries[:kept]:
                self._journal.write(json.dumps(entry).encode() + b"\n")
            self._journal.flush()

    def _entries(self) -> Iterator[tuple[str, str, str, int, str]]:
        """Whole lines of the journal."""
        self._journal.seek(0)
        good = 0
        for line in self._journal.readlines():
            try:
                scan_id, viewpoint_id, digest, width, dtype = json.loads(line)
            except ValueError:
                break
            good += len(line)
            yield scan_id, viewpoint_id, digest, width, dtype
        self._journal.truncate(good)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _digest(row: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=8).hexdigest()


def _index_digest(rows: Iterable[Sequence[Any]], shape: tuple[int, ...]) -> str:
    content = json.dumps([list(shape), [list(row) for row in rows]])
    return hashlib.sha256(content.encode()).hexdigest()


def _npy_header(rows: int, width: int, dtype: np.dtype) -> bytes:
    """Start of ``features.npy``, of one length for all shapes: it is written over when all rows are in."""
    content = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({rows}, {NUM_VIEWS}, {width}), }}"
    size = 256 - len(np.lib.format.MAGIC_PREFIX) - 4
    if len(content) >= size:
        raise ValueError(f"a store of {rows} rows of width {width} is beyond what its header can say")
    text = content.ljust(size - 1).encode("latin1") + b"\n"
    return np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text
