"""Latents of texts in a file: ``python -m vae_lm.embed MODEL --input texts.txt --out z.npy``.

Row i is the posterior mean of line i, in float32. Lines are read, encoded and written a few batches at a
time, so that neither texts nor latents need fit into memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from torch import Tensor

from vae_lm import sources
from vae_lm.latent import latent_statistics
from vae_lm.model import Optimus, Posterior
from vae_lm.sources import Released

_BATCHES_AT_ONCE = 16
"""Texts of like length are encoded together, so there must be some to choose from."""

_HEADER = 512
"""Bytes of a safetensors header, filled with blanks: the number of rows is known at the end alone."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Write the latents of texts, one a line, into a file, in their order.

    Raises:
        ValueError: there is nothing to do, options do not go together, or the name of the file is wrong.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Folder of a model, of a run, or of a released checkpoint."""
    input: str = sources.STDIN
    """Text file; - is the standard input."""
    out: str = ""
    """.npy, or .safetensors with the latents as "mu"."""
    whiten: bool = False
    """Rotate and scale them to mean 0 and covariance 1 by the statistics in the model's folder."""
    statistics: bool = False
    """Store mean and covariance of z over these texts in the model's folder, for whitening."""
    batch_size: int = 64
    """Texts encoded together."""
    released: Annotated[Released, tyro.conf.arg(name="")] = field(default_factory=Released)

    def __post_init__(self) -> None:
        if not self.out and not self.statistics:
            raise ValueError("nothing to do: give --out FILE, or --statistics, or both")
        if self.out and Path(self.out).suffix not in (".npy", ".safetensors"):
            raise ValueError(f"out is {self.out!r} but its name must end in .npy or .safetensors")
        if self.whiten and (self.statistics or not self.out):
            raise ValueError(
                "whiten is for --out, by statistics that were stored before: take them in a run of their own"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size} but must be at least 1")


def posteriors(model: Optimus, texts: Iterable[str], *, batch_size: int = 64) -> Iterator[Posterior]:
    """Posteriors of a stream of texts, in order, some batches at a time.

    Args:
        model: with tokenisers.
        texts: any number of them.
        batch_size: texts encoded together.

    Raises:
        ValueError: a text is too long.
    """
    stream = iter(texts)
    while some := list(islice(stream, _BATCHES_AT_ONCE * batch_size)):
        yield model.encode(some, batch_size=batch_size)


def embed(config: EmbedConfig) -> int:
    """Do as told.

    Returns:
        Number of texts.

    Raises:
        FileNotFoundError: a model or file is missing.
        ValueError: a line is blank or too long, there is none, or the model has no statistics to whiten by.
    """
    model = sources.open_model(config.model, config.released)
    folder = sources.model_folder(config.model)
    if config.statistics and not (folder / "config.json").is_file():
        raise ValueError(
            f"{config.model} is a released checkpoint, which has no place for statistics: convert it first "
            "by python -m vae_lm.convert"
        )
    whitening = sources.statistics(model) if config.whiten else None
    target = LatentFile(Path(config.out), model.config.latent_dim) if config.out else None
    count = 0

    def written() -> Iterator[Posterior]:
        nonlocal count
        for posterior in posteriors(model, _no_blanks(config.input), batch_size=config.batch_size):
            mu = whitening.whiten(posterior.mu) if whitening else posterior.mu
            if target:
                target.add(mu)
            count += len(mu)
            yield posterior

    try:
        found = latent_statistics(written()) if config.statistics else None
        for _ in () if config.statistics else written():
            pass
        if target:
            target.finish()
    finally:
        if target:
            target.close()
    if found:
        model.latent_statistics = found
        model.save_pretrained(folder)
    return count


def _no_blanks(source: str) -> Iterator[str]:
    number = 0
    for number, line in enumerate(sources.lines(source), 1):
        if not line:
            raise ValueError(
                f"line {number} of {source} is blank, and rows are counted like lines: take blank lines out"
            )
        yield line
    if not number:
        raise ValueError(f"{source} holds no text: one a line was expected")


class LatentFile:
    """A file of latents that grows by batches; its name is there only when it is finished.

    Args:
        path: .npy or .safetensors.
        latent_dim: width of a row.
    """

    def __init__(self, path: Path, latent_dim: int) -> None:
        self.path, self.latent_dim, self.rows = path, latent_dim, 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.rows, self.latent_dim)
        if self.path.suffix == ".npy":
            # NumPy leaves room for the first axis to grow.
            described: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, described)
            return
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * self.rows * self.latent_dim]}
        text = json.dumps({"mu": tensor}).encode().ljust(_HEADER)
        self._file.write(_HEADER.to_bytes(8, "little") + text)

    def add(self, mu: Tensor) -> None:
        """Append rows ``[B, latent_dim]``."""
        self._file.write(mu.float().cpu().numpy().astype("<f4").tobytes())
        self.rows += len(mu)

    def finish(self) -> None:
        """Say how many rows there are, and give the file its name."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.replace(self.path)

    def close(self) -> None:
        """Leave nothing behind if it was not finished."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the file.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(
            EmbedConfig,
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vae_lm.embed",
        )
        count = embed(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    if config.out:
        print(f"{count} latents written to {config.out}")
    if config.statistics:
        print(f"statistics of {count} texts stored in {config.model}")


if __name__ == "__main__":
    main()
