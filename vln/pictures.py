"""Features of the 36 pictures of each panorama by a torchvision network without its classifier."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vln.geometry import NUM_VIEWS
from vln.store import DType, FeatureStore, Key, StoreWriter

try:
    from PIL import Image, UnidentifiedImageError
    from torchvision import models
    from torchvision.transforms import v2
except ImportError as error:
    raise ImportError(
        "features of pictures need torchvision and pillow: pip install torchvision pillow"
    ) from error

_NAME = re.compile(r"(.+)_(\d\d)\.(?:jpg|jpeg|png)", flags=re.IGNORECASE)
_CLASSIFIERS = ("fc", "heads", "head")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as torchvision's weights expect."""


def find_pictures(folder: str | Path) -> dict[Key, list[Path]]:
    """Pictures of every panorama: ``SCAN/VIEWPOINT_VIEW.jpg`` (or png), ``VIEW`` 00 to 35.

    View ``12 * row + k`` looks at heading ``k * 30°``; row 0 looks down by 30°, row 1 level, row 2 up.

    Returns:
        Scan and viewpoint to the 36 files in the order of the views.

    Raises:
        FileNotFoundError: there is no such folder, no picture in it, or a view of a panorama is missing.
        ValueError: a view occurs twice, or is not one of 36.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of pictures")
    found: dict[Key, dict[int, Path]] = {}
    for path in sorted(folder.glob("*/*")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        views = found.setdefault((path.parent.name, match[1]), {})
        view = int(match[2])
        if view >= NUM_VIEWS or view in views:
            fault = "is there already" if view in views else "expected 00 to 35"
            raise ValueError(f"{path}: view {match[2]} {fault}")
        views[view] = path
    if not found:
        raise FileNotFoundError(f"{folder} holds no picture called SCAN/VIEWPOINT_VIEW.jpg or .png")
    for (scan_id, viewpoint_id), views in found.items():
        missing = sorted(set(range(NUM_VIEWS)) - views.keys())
        if missing:
            raise FileNotFoundError(
                f"{folder / scan_id / viewpoint_id}_{missing[0]:02d}.jpg is missing: {len(views)} of "
                f"{NUM_VIEWS} views of this viewpoint are there"
            )
    return {key: [views[view] for view in range(NUM_VIEWS)] for key, views in found.items()}


def build_network(name: str, weights: str | Path) -> nn.Module:
    """A torchvision network whose output is what its classifier would see, ready for inference.

    Args:
        name: in torchvision; one whose classifier is called ``fc``, ``heads`` or ``head``.
        weights: a state dict of the whole network, ``.safetensors`` or what ``torch.save`` wrote; files that
            hold more than tensors are refused.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the network is unknown or has another classifier, or the weights are not its own.
    """
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: download the state dict of {name} yourself")
    try:
        network = models.get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"torchvision has no network {name!r}") from error
    heads = [attribute for attribute in _CLASSIFIERS if hasattr(network, attribute)]
    if not heads:
        raise ValueError(f"{name} has no {', '.join(_CLASSIFIERS)}: take a resnet, regnet, vit or swin")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # a foreign file can fail in many ways, and all mean the same to the caller
        raise ValueError(f"{path} does not hold the weights of {name}: {error!s:.300}") from error
    setattr(network, heads[0], nn.Identity())
    return network.eval()


def extract(
    pictures: str | Path,
    out: str | Path,
    *,
    network: str,
    weights: str | Path,
    size: int = 0,
    batch_size: int = NUM_VIEWS,
    dtype: DType = "float16",
    device: str = "cpu",
) -> FeatureStore:
    """Write a store of the features of pictures; panoramas of an interrupted run are not looked at again.

    Args:
        pictures: see :func:`find_pictures`.
        out: folder of the store.
        network: see :func:`build_network`.
        weights: the same.
        size: shorter side after resizing, of which the middle square is cut out; 0 takes what the network
            needs.
        batch_size: pictures at once.
        dtype: precision of the store.
        device: of the network.

    Raises:
        FileNotFoundError: pictures or weights are missing.
        FileExistsError: there is something at ``out``.
        ValueError: network, weights, or a picture cannot be used.
    """
    panoramas = find_pictures(pictures)
    model = build_network(network, weights)
    size = size or int(getattr(model, "image_size", 0))
    steps: list[nn.Module] = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(_MEAN, _STD),
    ]
    if size:
        steps[:0] = [v2.Resize(size), v2.CenterCrop(size)]
    prepare, model = v2.Compose(steps), model.to(device)
    with StoreWriter(out, dtype=dtype) as writer, torch.inference_mode():
        for key, files in panoramas.items():
            if key not in writer.written:
                parts = [
                    model(torch.stack([prepare(image) for image in _images(some)]).to(device)).cpu()
                    for some in _chunks(files, batch_size)
                ]
                writer.add(key, _features(parts))
        return writer.finish()


def _chunks(files: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(files), size):
        yield files[start : start + size]


def _images(files: Iterable[Path]) -> Iterator[Image.Image]:
    for path in files:
        try:
            with Image.open(path) as image:
                yield image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _features(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).flatten(1).float().numpy()
