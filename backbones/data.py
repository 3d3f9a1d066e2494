"""Images in, [-1, 1] out: every source of real pictures, checked before training, and stateless batches.

A source (scikit-learn's digits, CIFAR, a folder, an archive or arrays) becomes one `Images` object of square
RGB pictures; `batches` turns it into an endless stream in which batch i depends on the seed and i alone, so a
run continues from any step exactly as if it had never stopped.
"""

import hashlib
import itertools
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

_BUILT_IN = ("digits", "cifar10", "cifar100")
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_MEMORY_LIMIT = 2 * 1024**3  # bytes of decoded pictures kept; larger sets are decoded whenever they are drawn
# What Pillow and zipfile raise on damaged input; RuntimeError is an archive that needs a password.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which real pictures a run sees.

    Raises:
        ValueError: an option lies outside its range.
    """

    data: str = "digits"
    """digits (scikit-learn, no network), cifar10, cifar100, or a path: a folder or .zip of images (one
    subfolder a class, or flat without labels), or an .npz with images (uint8 [N,H,W,3] or [N,H,W]) and, if
    wanted, labels."""
    data_root: str = "data"
    """Folder that holds CIFAR."""
    download: bool = False
    """Fetch CIFAR into data_root if it is not there."""
    mirror: bool = False
    """Flip pictures left to right at random."""
    resize: bool = False
    """Accept pictures of any size: the short side is resized (Lanczos), then the centre is cut out."""
    skip_corrupt: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    dequantize: float = 0.0
    """Width of the uniform noise added to real pictures, in units of [0, 1]; 0.0625 suits digits."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError(f"data is empty: give one of {', '.join(_BUILT_IN)} or a path")
        if not 0 <= self.dequantize < 1:
            raise ValueError(
                f"dequantize is {self.dequantize}, expected 0 <= dequantize < 1 (0.0625 suits digits)"
            )
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}, expected 0 or more")


class Images(Dataset[tuple[Tensor, int]]):
    """Square RGB pictures with optional labels, in memory or decoded when drawn.

    Attributes:
        name: short name of the source, for reports.
        digest: sha256 (hex) of the pictures, or of the list of files with their sizes.
        resolution: height and width in pixels.
        labels: int64 ``[N]``, or None.
        num_classes: classes the labels can name, 0 without labels.
    """

    channels = 3

    def __init__(
        self,
        pictures: "Tensor | _Files",
        *,
        name: str,
        digest: str,
        resolution: int,
        labels: np.ndarray | None = None,
        num_classes: int = 0,
        indices: np.ndarray | None = None,
    ) -> None:
        self._pictures = pictures
        self._indices = np.arange(len(pictures)) if indices is None else indices
        self.name = name
        self.digest = digest
        self.resolution = resolution
        self.labels = None if labels is None else labels[self._indices].astype(np.int64)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Picture uint8 ``[3, R, R]`` and its label, 0 where there are none."""
        picture = self._pictures[int(self._indices[index])]
        return picture, 0 if self.labels is None else int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        return [self[index] for index in indices]

    def fetch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pictures uint8 ``[n, 3, R, R]`` and labels int64 ``[n]`` at the positions ``indices``."""
        rows = self._indices[indices]
        if isinstance(self._pictures, Tensor):
            pictures = self._pictures[torch.from_numpy(rows)]
        else:
            pictures = torch.stack([self._pictures[int(row)] for row in rows])
        labels = np.zeros(len(rows), np.int64) if self.labels is None else self.labels[indices]
        return pictures, torch.from_numpy(labels)

    def subset(self, indices: np.ndarray, *, name: str) -> "Images":
        """The pictures at ``indices``, under a new name and a digest of their own; pixels are shared."""
        subset = Images(
            self._pictures,
            name=name,
            digest=_sha256(self.digest.encode(), np.ascontiguousarray(indices, np.int64)),
            resolution=self.resolution,
            num_classes=self.num_classes,
            indices=self._indices[indices],
        )
        subset.labels = None if self.labels is None else self.labels[indices]
        return subset


def open_images(config: DataConfig, *, resolution: int, conditional: bool) -> Images:
    """Open the real pictures that ``config`` names, after checking all that can be checked.

    Folders and archives are decoded once into memory where they fit 2 GiB. Of a larger set only the headers
    are read here (with ``skip_corrupt`` every picture is decoded once), and damage further in is reported
    when the picture is drawn.

    Args:
        config: source and how to read it.
        resolution: height and width of the pictures that the model is built for.
        conditional: whether labels are required.

    Raises:
        FileNotFoundError: the path, CIFAR's files, images in a folder or pictures of a class are missing.
        ValueError: a damaged image, a wrong size, array or label, or no labels where ``conditional`` needs
            them.
    """
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, expected a positive number of pixels")
    if config.data == "digits":
        images = _open_digits(resolution)
    elif config.data in _BUILT_IN:
        images = _open_cifar(config, resolution)
    else:
        images = _open_path(config, resolution, conditional)
    if conditional and images.labels is None:
        raise ValueError(
            f"{config.data} has no labels, which a class-conditional model needs: put every class into a "
            "subfolder of its own (no picture beside them), store `labels` in the .npz, or train without "
            "classes (--num-classes 1)"
        )
    return images


def held_out(images: Images) -> tuple[Images, Images]:
    """Split labelled pictures into a training part and a held-out fifth; the same split every time.

    Every class gives a fifth of its pictures (rounded, at least one where it has two).

    Raises:
        ValueError: the pictures have no labels.
    """
    if images.labels is None:
        raise ValueError(
            f"{images.name} has no labels, so it cannot be split by class: use pictures with labels"
        )
    order = np.random.default_rng(0).permutation(len(images))
    is_held = np.zeros(len(images), bool)
    for label in np.unique(images.labels):
        members = order[images.labels[order] == label]
        is_held[members[: max(round(len(members) / 5), int(len(members) > 1))]] = True
    return (
        images.subset(np.flatnonzero(~is_held), name=f"{images.name}-train"),
        images.subset(np.flatnonzero(is_held), name=f"{images.name}-held-out"),
    )


def batches(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    mirror: bool = False,
    dequantize: float = 0.0,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of real pictures; batch i depends on (seed, i, rank, world_size) and nothing else.

    Picture j of batch i stands at position p = (i * world_size + rank) * batch_size + j of a stream that runs
    through one permutation of all pictures after another. Flips and noise depend on (seed, p), so two ranks
    with batches of b see exactly what one process sees with batches of 2 b. No global random state is read or
    changed.

    Args:
        images: the real pictures.
        batch_size: pictures per batch and rank.
        seed: non-negative, below 2**64.
        start: number of the first batch; the stream goes on as if it had never stopped.
        rank: this process, in ``[0, world_size)``.
        world_size: processes that share the stream.
        mirror: flip every other picture, at random.
        dequantize: width w of the noise u in [0, 1): (x + w u) / (1 + w) for x in [0, 1], so that the levels
            of a coarse picture spread evenly and nothing leaves the range.
        num_workers: processes that prepare batches; changes nothing but speed.

    Returns:
        Iterator over images float32 ``[batch_size, 3, R, R]`` in [-1, 1] and labels int64 ``[batch_size]``.

    Raises:
        ValueError: the batches of all ranks hold more pictures than there are, or a number is out of range.
    """
    if batch_size < 1 or batch_size * world_size > len(images):
        raise ValueError(
            f"a batch of {batch_size} on each of {world_size} processes takes {batch_size * world_size} "
            f"pictures but {images.name} holds {len(images)}: choose a batch size from 1 to "
            f"{len(images) // world_size}"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
    if start < 0 or not 0 <= seed < 2**64:
        raise ValueError(f"start is {start} and seed is {seed}, expected start >= 0 and 0 <= seed < 2**64")
    stream = _Stream(images, batch_size, seed, rank, world_size, mirror, dequantize)
    if num_workers == 0:
        return (stream[i] for i in itertools.count(start))
    # The loader draws a seed for its workers; a generator of its own leaves the global one alone.
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=None,
        sampler=_CountFrom(start),
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    return iter(loader)


class _CountFrom:
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class _Stream(Dataset[tuple[Tensor, Tensor]]):
    """Batch i of a rank's stream at index i; see `batches`."""

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        mirror: bool,
        dequantize: float,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.mirror, self.dequantize = mirror, dequantize
        self._permutations: dict[int, np.ndarray] = {}

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        first = (i * self.world_size + self.rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        epochs, places = np.divmod(positions, len(self.images))
        drawn = np.concatenate([self._permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        pixels, labels = self.images.fetch(drawn)
        return self._augmented(pixels, positions), labels

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # A batch touches two epochs at most, so the one before is all that is worth keeping.
            self._permutations = {e: order for e, order in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = np.random.default_rng((self.seed, epoch)).permutation(
                len(self.images)
            )
        return self._permutations[epoch]

    def _augmented(self, pixels: Tensor, positions: np.ndarray) -> Tensor:
        if not (self.mirror or self.dequantize):
            return pixels.float() / 127.5 - 1
        flips = np.zeros(len(positions), bool)
        noise = np.zeros(pixels.shape, np.float32)
        for row, position in enumerate(positions.tolist()):
            # Counter-based: the position picks a stream of its own without drawing those before it.
            source = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, position]))
            flips[row] = source.random() < 0.5
            if self.dequantize:
                source.random(dtype=np.float32, out=noise[row])
        images = pixels.float() / 255
        if self.mirror:
            images = torch.where(torch.from_numpy(flips)[:, None, None, None], images.flip(-1), images)
        return dequantized(images, torch.from_numpy(noise), width=self.dequantize) * 2 - 1


def dequantized(images: Tensor, noise: Tensor, *, width: float) -> Tensor:
    """Spread levels with noise: (x + w u) / (1 + w), which maps [0, 1] into itself.

    Args:
        images: x in [0, 1].
        noise: u in [0, 1), of the same shape.
        width: w, the distance between two levels.
    """
    return (images + width * noise) / (1 + width)


def _sha256(*parts: Any) -> str:
    """Hex digest of bytes and contiguous arrays, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _from_pixels(
    pixels: Tensor, *, name: str, labels: np.ndarray | None = None, num_classes: int | None = None
) -> Images:
    """Pictures in memory, uint8 ``[N, 3, R, R]``, under a digest of their content."""
    content = [pixels.contiguous().numpy()] if labels is None else [pixels.contiguous().numpy(), labels]
    if num_classes is None:
        num_classes = 0 if labels is None else int(labels.max()) + 1
    return Images(
        pixels,
        name=name,
        digest=_sha256(str(tuple(pixels.shape)).encode(), *content),
        resolution=pixels.shape[-1],
        labels=labels,
        num_classes=num_classes,
    )


def _open_digits(resolution: int) -> Images:
    from sklearn.datasets import load_digits

    if resolution < 8:
        raise ValueError(
            f"resolution is {resolution} but the digits have 8 x 8 pixels: choose 8 or more (try 16)"
        )
    digits = load_digits()
    levels = torch.from_numpy(digits.images).float()[:, None] / 16  # [1797, 1, 8, 8] in [0, 1]
    if resolution > 8:
        # Bicubic overshoots at strokes, hence the clamp.
        levels = F.interpolate(levels, size=resolution, mode="bicubic", align_corners=False).clamp(0, 1)
    pixels = (levels * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    return _from_pixels(pixels, name="digits", labels=digits.target.astype(np.int64), num_classes=10)


def _open_cifar(config: DataConfig, resolution: int) -> Images:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = CIFAR10 if config.data == "cifar10" else CIFAR100
    try:
        stored = source(config.data_root, train=True, download=config.download)
    except RuntimeError as error:
        folder = Path(config.data_root) / source.base_folder
        raise FileNotFoundError(
            f"{config.data} is not complete in {folder}: pass --download to fetch it, unpack {source.url} "
            f"into {config.data_root} yourself, or name its parent folder with --data-root"
        ) from error
    labels = np.asarray(stored.targets, np.int64)
    pixels = _square_array(stored.data, resolution, config)
    return _from_pixels(pixels, name=config.data, labels=labels, num_classes=len(stored.classes))


def _open_path(config: DataConfig, resolution: int, conditional: bool) -> Images:
    path = Path(config.data).expanduser()
    if not path.exists():
        near = get_close_matches(config.data, _BUILT_IN, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FileNotFoundError(
            f"there is no {config.data!r}{hint}: --data takes {', '.join(_BUILT_IN)}, or the path of a "
            "folder, a .zip or an .npz"
        )
    if path.suffix.lower() == ".npz":
        return _open_arrays(path, resolution, config)
    if path.is_dir() or zipfile.is_zipfile(path):
        return _open_files(path, resolution, config, conditional)
    raise ValueError(
        f"{path} is neither a folder nor a readable .zip or .npz: pack single images into a folder, and "
        "check that the file is complete"
    )


def _open_arrays(path: Path, resolution: int, config: DataConfig) -> Images:
    expected = (
        "expected `images` uint8 [N, H, W, 3] or [N, H, W] and optionally `labels` of whole numbers [N]"
    )
    try:
        with np.load(path, allow_pickle=False) as stored:
            if "images" not in stored.files:
                raise ValueError(f"it holds {sorted(stored.files)}")
            pictures = stored["images"]
            labels = stored["labels"] if "labels" in stored.files else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy refuses pickled objects here, which keeps foreign files from running code.
        raise ValueError(
            f"cannot use {path}: {error}; {expected}, written by np.savez without objects"
        ) from error
    if (
        pictures.dtype != np.uint8
        or pictures.ndim not in (3, 4)
        or (pictures.ndim == 4 and pictures.shape[3] != 3)
    ):
        raise ValueError(
            f"`images` in {path} is {pictures.dtype} {list(pictures.shape)}; {expected}: scale to 0..255, "
            "move channels last, then save again"
        )
    if not len(pictures):
        raise ValueError(f"`images` in {path} is empty; {expected}")
    if labels is not None:
        if (
            labels.dtype.kind not in "iu"
            or labels.ndim != 1
            or len(labels) != len(pictures)
            or labels.min() < 0
        ):
            raise ValueError(
                f"`labels` in {path} is {labels.dtype} {list(labels.shape)} for {len(pictures)} images; "
                f"{expected}, counted from 0: save one class number for every image"
            )
        labels = labels.astype(np.int64)
    return _from_pixels(_square_array(pictures, resolution, config), name=path.stem, labels=labels)


def _square_array(pictures: np.ndarray, resolution: int, config: DataConfig) -> Tensor:
    """uint8 ``[N, H, W, 3]`` or ``[N, H, W]`` as uint8 ``[N, 3, R, R]``."""
    height, width = pictures.shape[1:3]
    if (height, width) != (resolution, resolution):
        if not config.resize:
            raise ValueError(
                f"the pictures of {config.data} are {width}x{height} but the resolution is {resolution}: "
                "pass --resize or choose their resolution"
            )
        pictures = np.stack([np.asarray(_square(Image.fromarray(p), resolution)) for p in pictures])
    if pictures.ndim == 3:
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    return torch.from_numpy(np.ascontiguousarray(rearrange(pictures, "n h w c -> n c h w")))


def _square(image: Image.Image, resolution: int) -> Image.Image:
    if image.size == (resolution, resolution):
        return image
    return ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.LANCZOS)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow clips 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class _Files:
    """Encoded pictures of a folder or an archive; decoded to uint8 ``[3, R, R]`` when indexed.

    Archives are read in place: nothing is unpacked, so names that climb out of the archive do no harm.
    """

    def __init__(self, root: Path, names: list[str], *, resolution: int) -> None:
        self.root, self.names, self.resolution = root, names, resolution
        self._archive: zipfile.ZipFile | None = None
        self._owner = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.decode(index)
        except _DAMAGE as error:
            raise ValueError(
                f"{self.names[index]} in {self.root} cannot be decoded ({error}): remove the file or pass "
                "--skip-corrupt"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None, "_owner": 0}

    def decode(self, index: int) -> Tensor:
        with self._open(index) as stream, Image.open(stream) as image:
            square = _square(_rgb(image), self.resolution)
        return torch.from_numpy(rearrange(np.array(square), "h w c -> c h w").copy())

    def size(self, index: int) -> tuple[int, int]:
        """Width and height, from the header alone."""
        with self._open(index) as stream, Image.open(stream) as image:
            return image.size

    def _open(self, index: int) -> IO[bytes]:
        if self.root.is_dir():
            return (self.root / self.names[index]).open("rb")
        # A forked worker shares the parent's file position, so every process opens the archive for itself.
        if self._archive is None or self._owner != os.getpid():
            self._archive, self._owner = zipfile.ZipFile(self.root), os.getpid()
        return self._archive.open(self.names[index])


def _open_files(root: Path, resolution: int, config: DataConfig, conditional: bool) -> Images:
    found = _list_folder(root) if root.is_dir() else _list_archive(root)
    sizes = {name: size for name, size in sorted(found.items()) if name.lower().endswith(_EXTENSIONS)}
    if not sizes:
        kinds = Counter(PurePosixPath(name).suffix or "no extension" for name in found)
        seen = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5)) or "nothing"
        raise FileNotFoundError(
            f"{root} holds no images (found {seen}): accepted are {' '.join(_EXTENSIONS)}"
        )
    names = list(sizes)
    labels, classes = _labels_from_folders(names, is_archive=not root.is_dir())
    if conditional:
        _check_classes(root, names, classes)

    files = _Files(root, names, resolution=resolution)
    fits = len(names) * 3 * resolution**2 <= _MEMORY_LIMIT
    damaged = _check_headers(files, config, resolution)
    pixels = torch.empty(len(names) if fits else 1, 3, resolution, resolution, dtype=torch.uint8)
    if fits or config.skip_corrupt:
        damaged |= _decode_all(files, set(range(len(names))) - set(damaged), pixels if fits else None, config)
    keep = _without_damaged(files, damaged, config)
    listing = "".join(f"{name}\t{size}\n" for name, size in sizes.items()) + f"{resolution}"
    return Images(
        pixels if fits else files,
        name=root.stem,
        digest=_sha256(listing.encode("utf-8", "surrogateescape"), keep),
        resolution=resolution,
        labels=labels,
        num_classes=len(classes),
        indices=keep,
    )


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))


def _list_folder(root: Path) -> dict[str, str]:
    """Files below ``root`` by relative name, with their size."""
    found: dict[str, str] = {}
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        visited.add(os.path.realpath(folder))
        # A link back to a parent would be walked for ever.
        subfolders[:] = [
            s for s in subfolders if not _is_hidden(s) and os.path.realpath(Path(folder) / s) not in visited
        ]
        for path in (Path(folder) / file for file in files if not _is_hidden(file)):
            found[path.relative_to(root).as_posix()] = (
                str(path.stat().st_size) if path.exists() else "missing"
            )
    return found


def _list_archive(path: Path) -> dict[str, str]:
    """Files in the archive by name, with size and checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = [e for e in archive.infolist() if not e.is_dir()]
    return {
        entry.filename: f"{entry.file_size} {entry.CRC:08x}"
        for entry in entries
        if not any(_is_hidden(part) for part in PurePosixPath(entry.filename).parts)
    }


def _labels_from_folders(names: list[str], *, is_archive: bool) -> tuple[np.ndarray | None, list[str]]:
    """Labels by the first folder of each name, sorted as in torchvision; None when any name has no folder."""
    paths = [[part for part in PurePosixPath(name).parts if part not in ("/", ".", "..")] for name in names]
    if is_archive and min(map(len, paths)) > 2 and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]  # the folder that was packed as a whole, not a class
    if min(map(len, paths)) < 2:
        return None, []
    classes = sorted({path[0] for path in paths})
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[path[0]] for path in paths], np.int64), classes


def _check_classes(root: Path, names: list[str], classes: list[str]) -> None:
    flat = [name for name in names if len(PurePosixPath(name).parts) == 1]
    if flat and len(flat) < len(names):
        raise ValueError(
            f"{root} holds {len(flat)} pictures beside its class folders (such as {flat[0]}), so their class "
            "is unknown: move them into class folders or delete them"
        )
    if root.is_dir() and classes:
        empty = sorted(
            p.name for p in root.iterdir() if p.is_dir() and not _is_hidden(p.name) and p.name not in classes
        )
        if empty:
            raise FileNotFoundError(
                f"no images for {len(empty)} classes in {root} (such as {empty[0]}): delete the folder, or "
                f"fill it with {' '.join(_EXTENSIONS)}"
            )


def _check_headers(files: _Files, config: DataConfig, resolution: int) -> dict[int, str]:
    """Reasons by index for pictures without a readable header; wrong sizes among the others are an error."""
    damaged: dict[int, str] = {}
    sizes: dict[tuple[int, int], list[int]] = {}
    for index in range(len(files)):
        try:
            sizes.setdefault(files.size(index), []).append(index)
        except _DAMAGE as error:
            damaged[index] = str(error)
    if not config.resize and set(sizes) - {(resolution, resolution)}:
        # One of each size where they differ, else simply the first two.
        examples = [indices[0] for indices in sizes.values()]
        if len(sizes) == 1:
            examples = next(iter(sizes.values()))
        named = {files.names[i]: files.size(i) for i in examples[:2]}
        seen = ", ".join(f"{name} is {width}x{height}" for name, (width, height) in named.items())
        raise ValueError(
            f"pictures in {files.root} have other sizes than {resolution}x{resolution} ({seen}): pass "
            "--resize to resize and crop them, or choose their resolution"
        )
    return damaged


def _decode_all(
    files: _Files, indices: set[int], pixels: Tensor | None, config: DataConfig
) -> dict[int, str]:
    """Decode ``indices`` into ``pixels``, or nowhere if that is None; reasons by index of those damaged."""
    damaged: dict[int, str] = {}

    def decode(index: int) -> None:
        try:
            picture = files.decode(index)
        except _DAMAGE as error:
            damaged[index] = str(error)
            return
        if pixels is not None:
            pixels[index] = picture

    with ThreadPoolExecutor(max_workers=max(1, config.num_workers)) as threads:
        for _ in threads.map(decode, sorted(indices)):
            pass
    return damaged


def _without_damaged(files: _Files, damaged: dict[int, str], config: DataConfig) -> np.ndarray:
    """Indices of sound pictures; damaged ones are an error, or one warning where they may be skipped."""
    keep = np.array([i for i in range(len(files)) if i not in damaged], np.int64)
    if not damaged:
        return keep
    first = min(damaged)
    if not config.skip_corrupt or not len(keep):
        advice = (
            "replace them" if config.skip_corrupt else "replace them or pass --skip-corrupt to leave them out"
        )
        raise ValueError(
            f"{len(damaged)} of {len(files)} images in {files.root} cannot be decoded, the first is "
            f"{files.names[first]} ({damaged[first]}): {advice}"
        )
    named = ", ".join(files.names[i] for i in sorted(damaged)[:10]) + (", ..." if len(damaged) > 10 else "")
    warnings.warn(
        f"skipped {len(damaged)} of {len(files)} images in {files.root} that cannot be decoded: {named}",
        stacklevel=4,
    )
    return keep
