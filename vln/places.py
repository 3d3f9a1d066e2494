"""Places to write to: refused where something is, and filled whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_new(out: Path) -> None:
    """Refuse a place that is taken, or in no folder.

    Raises:
        FileExistsError: something is there.
        FileNotFoundError: its folder is not.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: delete it, or name another place")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.absolute().parent} does not exist: make it first")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``out`` when all went well, and is removed if not.

    Raises:
        FileExistsError: ``out`` is there.
        FileNotFoundError: its folder is not.

    Example:
        >>> import tempfile
        >>> out = Path(tempfile.mkdtemp()) / "made"
        >>> with new_folder(out) as partial:
        ...     _ = (partial / "note.txt").write_text("whole")
        >>> [path.name for path in out.iterdir()]
        ['note.txt']
    """
    require_new(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
