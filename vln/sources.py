"""Files by name, whether they lie in a folder, gzipped in a folder, or in a tar archive.

Archives are read member by member; nothing is unpacked to the disk.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
"""Endings of what is read as an archive."""

_BROKEN = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)


class Document(NamedTuple):
    """One file: its content, uncompressed, and where it came from, for messages."""

    origin: str
    content: bytes


def is_archive(path: Path) -> bool:
    """Whether a path ends like a tar archive."""
    return path.name.endswith(ARCHIVES)


def read_documents(source: Path, wanted: Callable[[str], bool]) -> dict[str, Document]:
    """Every wanted file of a folder (not of its subfolders) or of an archive (wherever in it).

    Args:
        source: folder or tar archive.
        wanted: told a file's name without folders and without ``.gz``, says whether to read it.

    Returns:
        Those names to documents, in the order of the names.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: it is neither a folder nor an archive, or what is in it cannot be decompressed.
    """
    if source.is_dir():
        files = {path.name.removesuffix(".gz"): path for path in sorted(source.iterdir()) if path.is_file()}
        return {name: read_document(path) for name, path in files.items() if wanted(name)}
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a folder or a tar archive")
    if not is_archive(source):
        raise ValueError(f"{source} is not a folder, nor a tar archive ({', '.join(ARCHIVES)})")
    found: dict[str, Document] = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                name = Path(member.name).name.removesuffix(".gz")
                stream = archive.extractfile(member) if member.isfile() and wanted(name) else None
                if stream is not None:
                    content = stream.read()
                    content = gzip.decompress(content) if member.name.endswith(".gz") else content
                    found[name] = Document(f"{source}/{member.name}", content)
    except _BROKEN as error:
        raise ValueError(f"{source} cannot be read as a tar archive: {error}") from error
    return dict(sorted(found.items()))


def read_document(path: Path) -> Document:
    """One file, decompressed when its name ends in ``.gz``.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be decompressed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except _BROKEN as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return Document(str(path), content)


def find_document(place: Path, group: str, name: str) -> Document:
    """A file of a data folder: in the folder itself, in ``group/``, or in an archive ``group.tar*``.

    Args:
        place: the data folder.
        group: what the file belongs to, such as ``"r2r"``.
        name: of the file, without ``.gz``.

    Raises:
        FileNotFoundError: it is in none of them; the text names all.
        ValueError: it is there but damaged.
    """
    tried = []
    for folder in (place, place / group):
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return read_document(candidate)
        tried.append(str(folder / name))
    for ending in ARCHIVES:
        archive = place / f"{group}{ending}"
        if archive.is_file():
            if found := read_documents(archive, lambda other: other == name):
                return found[name]
            tried.append(f"{archive}/{name}")
    raise FileNotFoundError(f"no {name}: looked for {', '.join(tried)}")


def parse_json(document: Document) -> Any:
    """Content of a JSON document.

    Raises:
        ValueError: it is not JSON; the text names the file and the place in it.
    """
    try:
        return json.loads(document.content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{document.origin} is not valid JSON, perhaps cut short: {error}") from error


def digest(source: Path, wanted: Callable[[str], bool]) -> str:
    """SHA-256 of an archive, or of the names and bytes of the wanted files of a folder, as stored.

    Raises:
        FileNotFoundError: ``source`` does not exist.
    """
    if source.is_file():
        return hashlib.sha256(source.read_bytes()).hexdigest()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist: give a folder or a tar archive")
    total = hashlib.sha256()
    for path in sorted(source.iterdir()):
        if path.is_file() and wanted(path.name.removesuffix(".gz")):
            content = path.read_bytes()
            total.update(f"{path.name}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()
