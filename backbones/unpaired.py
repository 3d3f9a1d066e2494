"""Two domains of pictures without pairs, for translation: folders, arrays or packs in, batches out.

`open_pair` checks and reads both domains; `unpaired_batches` turns them into an endless stream in which batch
i depends on the seed and i alone, so a run continues from any step exactly as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from backbones.data import DataConfig, Images, batches, open_images

Split = Literal["train", "test"]

_MARGIN = 286 / 256  # training pictures are enlarged by this much, and a random part of them is cut out
_ENTRY = re.compile(r"(?P<domain>(?:test)?[AB])=(?P<source>.+)")
_PACK_SPLITS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


class _Place(NamedTuple):
    """Where the pictures of one domain are; without classes all of them."""

    path: Path
    classes: tuple[str, ...] = ()


class Pair(NamedTuple):
    """One split of two domains.

    Attributes:
        a: pictures of domain A; of the training split larger than ``resolution``, to cut parts out of them.
        b: pictures of domain B, alike.
        resolution: height and width in pixels that the model is built for.
    """

    a: Images
    b: Images
    resolution: int


def open_pair(
    source: str | Path,
    resolution: int,
    *,
    split: Split = "train",
    root: str | Path = ".",
    skip_corrupt: bool = False,
    num_workers: int = 0,
) -> Pair:
    """Open both domains of one split, after checking that both are there.

    A source is a folder with the subfolders trainA, trainB, testA and testB, or a specification
    ``A=PATH,B=PATH[,testA=PATH,testB=PATH]``, where PATH is

    * a folder or a .zip of pictures, or an .npz with ``images`` (uint8 ``[N, H, W, 3]``): one set, so that
      the test split needs testA and testB;
    * an .npz pack of JPEG files, which has training and test (or val) pictures of its own.
      ``PACK#NAME+NAME`` takes the classes of these names alone.

    The short side of every picture is resized (Lanczos) and the centre cut out: to ``resolution`` for the
    test split, to 286/256 of it for training, whose random parts `unpaired_batches` takes.

    Args:
        source: folder or specification.
        resolution: height and width of the pictures that the model is built for.
        split: "train" or "test".
        root: folder below which relative paths are looked up.
        skip_corrupt: leave out pictures that cannot be decoded, with one warning, instead of stopping.
        num_workers: threads that decode the pictures of folders and archives.

    Raises:
        FileNotFoundError: the source or a domain is missing, or a domain has no pictures; it is named.
        ValueError: a number or the specification cannot be used, the split is not known, a file is damaged or
            a class is not in its pack.
    """
    if split not in _PACK_SPLITS:
        raise ValueError(f"split is {split!r}, expected 'train' or 'test'")
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, expected a positive number of pixels")
    size = round(resolution * _MARGIN) if split == "train" else resolution
    places = _find_domains(str(source), split, Path(root).expanduser())
    options = DataConfig(data=str(source), resize=True, skip_corrupt=skip_corrupt, num_workers=num_workers)
    a, b = (_open_domain(domain, place, size, split, options) for domain, place in places.items())
    return Pair(a, b, resolution)


def _find_domains(source: str, split: Split, root: Path) -> dict[str, _Place]:
    """Where the pictures of A and B are, both known to be there."""
    if re.match(_ENTRY, source):
        return _parse(source, split, root)
    folder = root / Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: give one with trainA, trainB, testA and testB, or A=PATH,B=PATH"
        )
    places = {domain: folder / f"{split}{domain}" for domain in "AB"}
    if bare := [place.name for place in places.values() if not (place.is_dir() and any(place.iterdir()))]:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{' and '.join(bare)} in {folder} is missing or empty (found {found}): put the pictures of each "
            f"domain into {split}A and {split}B"
        )
    return {domain: _Place(path) for domain, path in places.items()}


def _parse(specification: str, split: Split, root: Path) -> dict[str, _Place]:
    given: dict[str, str] = {}
    for part in re.split(r",(?=(?:test)?[AB]=)", specification):
        entry = re.fullmatch(_ENTRY, part)
        if entry is None or entry["domain"] in given:
            raise ValueError(
                f"{part!r} in {specification!r} is not understood: write A=PATH,B=PATH and, where the test "
                "pictures lie elsewhere, testA=PATH,testB=PATH, each once"
            )
        given[entry["domain"]] = entry["source"]
    if missing := [domain for domain in "AB" if domain not in given]:
        raise FileNotFoundError(
            f"{specification!r} names no domain {' and '.join(missing)}: write A=PATH,B=PATH"
        )
    places = {}
    for domain in "AB":
        own = split == "test" and f"test{domain}" in given
        place = _place(given[f"test{domain}" if own else domain], root)
        if not place.path.exists():
            raise FileNotFoundError(f"domain {domain}: there is no {place.path} (from {specification!r})")
        if split == "test" and not own and not _is_pack(place.path):
            raise FileNotFoundError(
                f"domain {domain}: {place.path} has one set of pictures, which train; name others for the "
                f"test with test{domain}=PATH"
            )
        places[domain] = place
    return places


def _place(text: str, root: Path) -> _Place:
    selection = re.fullmatch(r"(.+\.npz)#(.+)", text, re.DOTALL)
    path, classes = (selection[1], tuple(selection[2].split("+"))) if selection else (text, ())
    return _Place(root / Path(path).expanduser(), classes)


def _is_pack(path: Path) -> bool:
    if not (path.is_file() and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return "header_offsets.npy" in archive.namelist()


def _open_domain(domain: str, place: _Place, size: int, split: Split, options: DataConfig) -> Images:
    try:
        if _is_pack(place.path):
            return _open_pack(place, size, split, skip_corrupt=options.skip_corrupt)
        if place.classes:
            raise ValueError(f"{place.path} has no class names to pick {'+'.join(place.classes)} from")
        return open_images(replace(options, data=str(place.path)), resolution=size, conditional=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"domain {domain}: {error}") from error
    except ValueError as error:
        raise ValueError(f"domain {domain}: {error}") from error


def _open_pack(place: _Place, size: int, split: Split, *, skip_corrupt: bool) -> Images:
    """Pictures of a JPEG pack, all in memory."""
    pack = _Pack(place.path, split)
    rows = pack.rows(place.classes)
    if not len(rows):
        raise FileNotFoundError(
            f"{place.path} holds no such picture for the {split} split: choose other classes"
        )
    pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    damaged: dict[int, str] = {}
    digest = hashlib.sha256(f"{size}".encode())
    for index, row in enumerate(rows.tolist()):
        try:
            jpeg = pack.jpeg(row)
            digest.update(jpeg)
            pixels[index] = _decoded(jpeg, size)
        except Exception as error:  # a damaged picture fails in many ways, all meaning the same
            damaged[index] = f"picture {row} of {pack.split} ({error})"
    keep = np.array([index for index in range(len(rows)) if index not in damaged], np.int64)
    if damaged:
        text = f"{len(damaged)} of {len(rows)} pictures in {place.path} cannot be decoded"
        if not skip_corrupt or not len(keep):
            raise ValueError(f"{text}, the first is {next(iter(damaged.values()))}: copy the file again")
        warnings.warn(f"skipped: {text}: {', '.join(list(damaged.values())[:10])}", stacklevel=5)
    digest.update(keep.tobytes())
    name = f"{place.path.stem}-{pack.split}"
    return Images(pixels, name=name, digest=digest.hexdigest(), resolution=size, indices=keep)


class _Pack:
    """One split of a JPEG pack, still encoded.

    A pack stores the JPEG headers of a set once, in ``headers`` cut at ``header_offsets``. Picture i of split
    s is header ``{s}_header_id[i]`` followed by bytes ``{s}_offsets[i]`` to ``{s}_offsets[i + 1]`` of
    ``{s}_scans``; its class is ``{s}_labels[i]``, a row of ``classes``.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.path = path
        try:
            # Opened here: NumPy leaves a damaged archive open when it gives up.
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                splits = _PACK_SPLITS[split]
                self.split = s = next((name for name in splits if f"{name}_scans" in stored), splits[0])
                self.headers, self.header_offsets = stored["headers"].tobytes(), stored["header_offsets"]
                self.scans, self.offsets = stored[f"{s}_scans"].tobytes(), stored[f"{s}_offsets"]
                self.header_id = stored[f"{s}_header_id"]
                has_classes = "classes" in stored and f"{s}_labels" in stored
                self.classes = [str(name) for name in stored["classes"]] if has_classes else []
                self.labels = stored[f"{s}_labels"] if has_classes else np.empty(0)
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is not a whole JPEG pack ({error}): copy it again") from error

    def rows(self, classes: tuple[str, ...]) -> np.ndarray:
        """Pictures of these classes, all without any."""
        if not classes:
            return np.arange(len(self.header_id))
        if unknown := [name for name in classes if name not in self.classes]:
            known = ", ".join(self.classes) or "none"
            raise ValueError(
                f"there is no class {', '.join(unknown)} in {self.path}: its classes are {known}"
            )
        return np.flatnonzero(np.isin(self.labels, [self.classes.index(name) for name in classes]))

    def jpeg(self, row: int) -> bytes:
        first = int(self.header_id[row])
        header = self.headers[self.header_offsets[first] : self.header_offsets[first + 1]]
        return header + self.scans[self.offsets[row] : self.offsets[row + 1]]


def _decoded(jpeg: bytes, size: int) -> Tensor:
    with Image.open(io.BytesIO(jpeg)) as image:
        square = ImageOps.fit(image.convert("RGB"), (size, size), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(rearrange(np.array(square), "h w c -> c h w"))


def unpaired_batches(
    pair: Pair,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mirror: bool = True,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of both domains; batch i depends on (seed, i, rank, world_size) and nothing else.

    Each domain is shuffled by itself, one permutation after another, so that the smaller one comes round more
    often. Order, flips and crops of a domain depend on the seed, the domain and the position in its stream,
    and the ranks share the streams as in `backbones.data.batches`.

    Args:
        pair: both domains; a random part is cut out of pictures larger than ``pair.resolution``.
        batch_size: pictures per batch, domain and rank.
        seed: non-negative, below 2**64.
        start: number of the first batch; the stream goes on as if it had never stopped.
        rank: this process, in ``[0, world_size)``.
        world_size: processes that share the stream.
        mirror: flip every other picture left to right, at random.
        num_workers: processes that prepare batches of each domain; changes nothing but speed.

    Returns:
        Iterator over (a, b), each float32 ``[batch_size, 3, resolution, resolution]`` in [-1, 1].

    Raises:
        ValueError: the batches of all ranks hold more pictures than a domain, or a number is out of range.
    """
    streams = []
    for domain, images in zip((0, 1), pair[:2], strict=True):
        order_seed, crop_seed = _seeds(seed, domain)
        stream = batches(
            images,
            batch_size=batch_size,
            seed=order_seed,
            start=start,
            rank=rank,
            world_size=world_size,
            mirror=mirror,
            num_workers=num_workers,
        )
        first, step = (start * world_size + rank) * batch_size, world_size * batch_size
        streams.append(_cropped(stream, pair.resolution, crop_seed, first, step))
    return zip(*streams, strict=True)


def _seeds(seed: int, domain: int) -> tuple[int, int]:
    """Independent seeds for the order and for the crops of a domain."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected 0 <= seed < 2**64")
    # The domain comes first: behind a short seed it would read like the upper half of a long one.
    order, crop = np.random.SeedSequence((domain, seed)).generate_state(2, np.uint64)
    return int(order), int(crop)


def _cropped(
    stream: Iterator[tuple[Tensor, Tensor]], resolution: int, seed: int, first: int, step: int
) -> Iterator[Tensor]:
    """A random part of every picture; the offsets of position p depend on (seed, p)."""
    for images, _ in stream:
        room = images.shape[-1] - resolution + 1
        parts = []
        for position, image in enumerate(images, start=first):
            # Counter-based: the position picks a stream of its own without drawing those before it.
            source = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
            top, left = source.integers(room, size=2).tolist()
            parts.append(image[:, top : top + resolution, left : left + resolution])
        yield torch.stack(parts)
        first += step


def ordered_batches(images: Images, *, batch_size: int) -> Iterator[Tensor]:
    """All pictures once, in their order and unchanged, such as those of a test split.

    Args:
        images: one domain.
        batch_size: pictures per batch; the last one may hold fewer.

    Returns:
        Iterator over float32 ``[n, 3, R, R]`` in [-1, 1].

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    blocks = range(0, len(images), batch_size)
    return (
        images.fetch(np.arange(first, min(first + batch_size, len(images))))[0].float() / 127.5 - 1
        for first in blocks
    )
