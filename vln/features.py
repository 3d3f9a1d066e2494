"""Features of panoramas: the store, readers of others' files, and extraction from pictures.

``python -m vln.features extract --pictures FOLDER --network resnet152 --weights FILE --out STORE`` makes a
store from pictures, ``python -m vln.features verify STORE`` reads one through. ``vln.convert`` turns TSV and
HDF5 files into stores.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from vln.geometry import NUM_VIEWS
from vln.store import DType, FeatureStore, Key, StoreWriter

__all__ = ["FeatureStore", "StoreWriter", "read_hdf5", "read_tsv"]

_TSV_FIELDS = "scanId, viewpointId, image_w, image_h, vfov, features"


def read_tsv(path: str | Path, *, width: int | None = None) -> Iterator[tuple[Key, np.ndarray]]:
    """Features of the field's TSV files, line by line: tabs, no header, the last field base64 of float32.

    Args:
        path: ``.tsv``, ``.tsv.gz``, or a ``.zip`` with one TSV file in it.
        width: take the first so many numbers of each view, if there are more (some files have class scores
            behind the features).

    Yields:
        ``((scan_id, viewpoint_id), float32 [36, D])``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decompressed or a line is not of this form; the text names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with ExitStack() as stack:
        try:
            for number, line in enumerate(_open(path, stack), start=1):
                if line.strip():
                    yield _tsv_row(f"{path}, line {number}", line, width)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _open(path: Path, stack: ExitStack) -> Iterable[bytes]:
    if path.name.endswith(".gz"):
        return stack.enter_context(gzip.open(path))
    if path.suffix != ".zip":
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    names = [name for name in archive.namelist() if name.endswith(".tsv")]
    if len(names) != 1:
        raise ValueError(f"{path} holds {len(names)} TSV files, expected one: unpack the one you mean")
    return stack.enter_context(archive.open(names[0]))


def _tsv_row(place: str, line: bytes, width: int | None) -> tuple[Key, np.ndarray]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != 6:
        raise ValueError(f"{place} has {len(fields)} fields, expected the six of {_TSV_FIELDS}")
    scan_id, viewpoint_id = fields[0].decode(), fields[1].decode()
    try:
        content = base64.b64decode(fields[5], validate=True)
    except binascii.Error as error:
        raise ValueError(
            f"{place} ({viewpoint_id}): the features are not base64, perhaps cut short: {error}"
        ) from error
    if not content or len(content) % (4 * NUM_VIEWS):
        raise ValueError(
            f"{place} ({viewpoint_id}): {len(content)} bytes of features, expected float32 of {NUM_VIEWS} "
            f"views: a multiple of {4 * NUM_VIEWS}; perhaps the file is cut short"
        )
    features = np.frombuffer(content, dtype="<f4").reshape(NUM_VIEWS, -1)
    return (scan_id, viewpoint_id), _first(features, width, f"{place} ({viewpoint_id})")


def _first(features: np.ndarray, width: int | None, place: str) -> np.ndarray:
    if width is not None and features.shape[1] < width:
        raise ValueError(f"{place}: features of width {features.shape[1]}, expected at least {width}")
    return features[:, :width]


def read_hdf5(path: str | Path, *, width: int | None = None) -> Iterator[tuple[Key, np.ndarray]]:
    """Features of HDF5 files as HAMT and DUET use them: a data set ``[36, D]`` called ``scan_viewpoint``.

    Args:
        path: the file.
        width: take the first so many numbers of each view, if there are more: files made with a ViT have its
            class scores behind the features.

    Yields:
        ``((scan_id, viewpoint_id), floating [36, D])``; what follows the last ``_`` of a name is the
        viewpoint.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no HDF5 file, or a data set's name or shape is another.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("reading HDF5 features needs h5py: pip install h5py") from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an HDF5 file: {error}") from error
    with file:
        for name, data in file.items():
            scan_id, _, viewpoint_id = name.rpartition("_")
            shape: tuple[int, ...] = getattr(data, "shape", ())
            if not scan_id or len(shape) != 2 or shape[0] != NUM_VIEWS:
                raise ValueError(
                    f"{path}: {name} has shape {list(shape)}, expected data sets called SCAN_VIEWPOINT of "
                    f"shape [{NUM_VIEWS}, D]"
                )
            yield (scan_id, viewpoint_id), _first(data[()], width, f"{path}, {name}")


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Features of pictures by a torchvision network; an interrupted run goes on where it was."""

    pictures: str
    """Folder with SCAN/VIEWPOINT_VIEW.jpg (or .png), VIEW from 00 to 35: the 36 views of a panorama."""
    weights: str
    """The network's weights, a .pth or .safetensors file; nothing is downloaded."""
    out: str
    """Store to write, a folder."""
    network: str = "resnet152"
    """Name in torchvision: a resnet, resnext, wide_resnet, regnet, vit or swin."""
    size: int = 0
    """Resize the shorter side to this and cut out the middle square; 0 takes what the network needs: pictures
    as they are, or the size of a ViT."""
    batch_size: int = 36
    """Pictures at once."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the store."""
    device: str = "cpu"
    """Such as cpu or cuda."""

    def __post_init__(self) -> None:
        if self.size < 0 or self.batch_size < 1:
            raise ValueError(
                f"size is {self.size} and batch_size {self.batch_size}: give at least 0 and at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read a store through and hold every viewpoint's features against their digest."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder of the store."""


Command = (
    Annotated[ExtractConfig, tyro.conf.subcommand("extract")]
    | Annotated[VerifyConfig, tyro.conf.subcommand("verify")]
)


def main(arguments: list[str] | None = None) -> None:
    """Extract features or verify a store.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config: ExtractConfig | VerifyConfig = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vln.features",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        if isinstance(config, VerifyConfig):
            store = FeatureStore.open(config.store, verify=True)
        else:
            from vln.pictures import extract  # torchvision takes seconds to import

            dtype: DType = config.dtype
            store = extract(
                config.pictures, config.out, network=config.network, weights=config.weights, size=config.size,
                batch_size=config.batch_size, dtype=dtype, device=config.device,
            )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"{store.path}: {len(store)} viewpoints of width {store.width} in {store.features.dtype}, all sound"
    )


if __name__ == "__main__":
    main()
