"""Feature extractors that need no download, and scores of a generator against real pictures.

A Fréchet distance is an FID only with the FID Inception network; every key therefore names the network, the
first digits of the sha256 of its weights and the number of samples.
"""

import hashlib
import os
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from backbones.data import Images, batches, held_out

_MAX_NEIGHBOUR_SAMPLES = 5_000
_MAX_DIVERSITY_SAMPLES, _MAX_DIVERSITY_PER_CLASS, _THUMBNAIL_SIZE = 2_000, 500, 64
_TOTAL_VARIANCE = 1_000.0
_CLASSIFIER_STEPS, _CLASSIFIER_BATCH = 600, 64


class Preprocessing(NamedTuple):
    """How a network wants its input: RGB resized to ``size`` (anti-aliased), then (scale * x - mean) / std.

    x lies in [0, 1]. Bicubic is the filter of clean-fid (Parmar et al., 2022).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 1.0
    filter: str = "bilinear"


_IMAGENET = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = (0.5, 0.5, 0.5)
_PREPROCESSING = {
    "inception": Preprocessing(299, (128.0,) * 3, (128.0,) * 3, scale=255.0, filter="bicubic"),
    # torchvision's weights of these two were ported from TensorFlow and take [-1, 1].
    "inception_v3": Preprocessing(299, _HALVES, _HALVES),
    "googlenet": Preprocessing(224, _HALVES, _HALVES),
    # Weights of Caffe origin: 0..255, means of the training set, no division.
    "squeezenet1_1": Preprocessing(227, (123.0, 117.0, 104.0), (1.0, 1.0, 1.0), scale=255.0),
}

_SPECS = (
    "  classifier      a small network trained on the labelled real pictures, in seconds\n"
    "  inception:PATH  the FID Inception network, pt_inception-2015-12-05-6726825d.pth of pytorch-fid\n"
    "                  (91 MB): pass --features inception:PATH, or set the environment variable\n"
    "                  FQ_INCEPTION to PATH and pass --features inception\n"
    "  NETWORK:PATH    a torchvision classification network and the file of its state dict, for example\n"
    "                  squeezenet1_1:squeezenet1_1.pt\n"
    "  random          fixed random convolutions, for tests: not FID"
)


class ReferenceFeatures(NamedTuple):
    """What the scores need of a set of pictures; see `reference_features`."""

    features: Tensor  # float32 [N, F]
    thumbnails: Tensor  # uint8 [M, 3, h, w], the first M pictures at 64 pixels or less
    labels: Tensor  # int64 [M], 0 where the pictures have no labels


class Extractor:
    """Features float32 ``[N, F]`` of images ``[N, 3, H, W]`` in [-1, 1]; batched by the caller.

    Attributes:
        name: network and first digits of the sha256 of its weights.
        device: where it runs.
        held_out_accuracy: of a classifier on real pictures it has not seen, otherwise None.
        references: features of real pictures that `reference_features` keeps here.
    """

    def __init__(
        self,
        name: str,
        features: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        logits: Callable[[Tensor], Tensor] | None = None,
        held_out_accuracy: float | None = None,
    ) -> None:
        self.name, self.device, self.held_out_accuracy = name, device, held_out_accuracy
        self._features, self._logits = features, logits
        self.references: dict[tuple[Any, ...], ReferenceFeatures] = {}

    @property
    def can_classify(self) -> bool:
        return self._logits is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self._features(images.to(self.device, torch.float32)).float()

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]``.

        Raises:
            TypeError: the network does not know the classes of the real pictures.
        """
        if self._logits is None:
            raise TypeError(f"{self.name} cannot classify these pictures: use the extractor 'classifier'")
        return self._logits(images.to(self.device, torch.float32))


def make_extractor(spec: str, images: Images, *, device: torch.device | str, seed: int = 0) -> Extractor:
    """Build the feature extractor that ``spec`` names; nothing is downloaded and no file can run code.

    Args:
        spec: ``classifier``, ``inception[:PATH]``, ``NETWORK:PATH`` or ``random``.
        images: the real pictures; the classifier is trained on four fifths of them.
        device: where the extractor shall run. The classifier is trained on the CPU whatever it is.
        seed: of the classifier.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: an unknown ``spec``, a file that is no plain state dict of the network, or no labels for
            the classifier.
    """
    kind, _, path = spec.partition(":")
    if kind == "inception":
        path = path or os.environ.get("FQ_INCEPTION", "")
    place = torch.device(device)
    if spec == "classifier":
        return _train_classifier(images, device=place, seed=seed)
    if spec == "random":
        return _random_extractor(place)
    if kind == "inception" or (path and kind in torchvision.models.list_models(module=torchvision.models)):
        return _load_extractor(kind, path, device=place)
    raise ValueError(f"unknown feature extractor {spec!r}, expected one of\n{_SPECS}")


def _load_extractor(kind: str, path: str, *, device: torch.device) -> Extractor:
    weights, digest = _read_weights(kind, path)
    # Construction draws initial weights, which must not disturb the run's random state.
    with torch.random.fork_rng(devices=[]):
        network = _fid_inception() if kind == "inception" else _torchvision_network(kind)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{path} does not fit {kind} ({first[:200]}), expected one of\n{_SPECS}") from error
    network.eval().requires_grad_(False).to(device)
    preprocessing = _PREPROCESSING.get(kind, _IMAGENET)
    pooled = _pooled(network)
    return Extractor(f"{kind}-{digest[:8]}", lambda x: pooled(_preprocess(x, preprocessing)), device=device)


def _read_weights(kind: str, path: str) -> tuple[dict[str, Tensor], str]:
    """State dict in float32 and the sha256 of its file."""
    file = Path(path).expanduser()
    if not path or not file.is_file():
        place = repr(path) if path else "(no path given)"
        raise FileNotFoundError(f"no weights for {kind} at {place}, expected one of\n{_SPECS}")
    advice = f"expected a plain state dict, saved by torch.save(network.state_dict(), ...); one of\n{_SPECS}"
    try:
        with warnings.catch_warnings():
            # torch warns of a TorchScript archive before it refuses it; the error below says more.
            warnings.filterwarnings("ignore", message=".*TorchScript", category=UserWarning)
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling errors have no common base
        what = "a TorchScript archive, which is code" if _is_torchscript(file) else type(error).__name__
        raise ValueError(f"refused {file} ({what}): {advice}") from error
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"refused {file} (holds more than named tensors): {advice}")
    weights = {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
    return weights, hashlib.sha256(file.read_bytes()).hexdigest()


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())


def _fid_inception() -> nn.Module:
    """TensorFlow's Inception of 2015-12-05 in pytorch-fid's layout; its pooling differs from torchvision's.

    clean-fid builds the same network but downloads weights on the way, so only its blocks are taken.
    """
    from cleanfid import inception_pytorch as fid

    network = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False, transform_input=False
    )
    network.Mixed_5b = fid.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = fid.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = fid.FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = fid.FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = fid.FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = fid.FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = fid.FIDInceptionE_1(1280)
    network.Mixed_7c = fid.FIDInceptionE_2(2048)
    return network


def _torchvision_network(kind: str) -> nn.Module:
    # Without this flag the two warn that their slow initialisation will change.
    options = {"init_weights": False} if kind in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(kind, weights=None, **options)


def _preprocess(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    size = (preprocessing.size, preprocessing.size)
    x = (images + 1) / 2
    x = F.interpolate(x, size=size, mode=preprocessing.filter, align_corners=False, antialias=True)
    x = x.clamp(0, 1)  # bicubic overshoots; clean-fid cuts that off too
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in preprocessing[1:3])
    return (preprocessing.scale * x - mean) / std


def _pooled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Input of the last linear layer, or the spatial mean of ``features`` in a network that has none."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        trunk = network.get_submodule("features")
        return lambda x: trunk(x).mean((2, 3))
    kept: list[Tensor] = []
    linear[-1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))

    def features(x: Tensor) -> Tensor:
        network(x)
        return kept.pop().flatten(1)

    return features


def _random_extractor(device: torch.device) -> Extractor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        trunk = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
    trunk.eval().requires_grad_(False).to(device)
    return Extractor("random-not-fid", lambda x: trunk(x).mean((2, 3)), device=device)


def _classifier_layers(resolution: int, num_classes: int) -> tuple[nn.Sequential, nn.Linear]:
    """Trunk to 64 features, and the head from features to logits."""
    channels, layers, size = 32, [*_conv(3, 32, stride=1)], resolution
    while size >= 8:
        layers += _conv(channels, 64, stride=2)
        channels, size = 64, (size + 1) // 2
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(channels * 16, 64), nn.ReLU()]
    return nn.Sequential(*layers), nn.Linear(64, num_classes)


def _conv(channels: int, out_channels: int, *, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    ]


def _train_classifier(images: Images, *, device: torch.device, seed: int) -> Extractor:
    """Train on four fifths of the pictures; same pictures and seed, same weights."""
    train, unseen = held_out(images)
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would change the weights and with them the name
    try:
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too, which fork_rng does not put back.
            torch.default_generator.manual_seed(seed)
            trunk, head = _classifier_layers(images.resolution, images.num_classes)
        _fit(trunk, head, train, seed=seed)
        accuracy = _accuracy(trunk, head, unseen)
        scale = _feature_scale(trunk, train)
    finally:
        torch.set_num_threads(threads)
    weights = hashlib.sha256()
    for value in (*trunk.state_dict().values(), *head.state_dict().values()):
        weights.update(value.numpy())
    name = f"classifier-{weights.hexdigest()[:8]}"
    print(
        f"{name}: {accuracy:.2%} of {len(unseen)} held-out pictures of {images.name} right after "
        f"{_CLASSIFIER_STEPS} steps, {time.perf_counter() - began:.1f} s"
    )
    for part in (trunk, head):
        part.eval().requires_grad_(False).to(device)
    return Extractor(
        name,
        lambda x: scale * trunk(x),
        device=device,
        logits=lambda x: head(trunk(x)),
        held_out_accuracy=accuracy,
    )


def _fit(trunk: nn.Module, head: nn.Module, train: Images, *, seed: int) -> None:
    optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=_CLASSIFIER_STEPS)
    batch_size = min(_CLASSIFIER_BATCH, len(train))
    # Noise as in training a generator on coarse levels, so that such pictures are familiar.
    stream = batches(train, batch_size=batch_size, seed=seed, dequantize=1 / 16)
    for _, (x, labels) in zip(range(_CLASSIFIER_STEPS), stream, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(head(trunk(x)), labels).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _accuracy(trunk: nn.Module, head: nn.Module, images: Images) -> float:
    trunk.eval()
    right = 0
    for rows in np.array_split(np.arange(len(images)), max(1, len(images) // 256)):
        pixels, labels = images.fetch(rows)
        right += int((head(trunk(pixels.float() / 127.5 - 1)).argmax(1) == labels).sum())
    return right / len(images)


@torch.no_grad()
def _feature_scale(trunk: nn.Module, train: Images) -> float:
    """Factor that gives the features a fixed total variance; otherwise distances would vary with the seed."""
    pixels, _ = train.fetch(np.arange(min(len(train), 2_000)))
    features = torch.cat([trunk(chunk.float() / 127.5 - 1) for chunk in pixels.split(256)])
    return float((_TOTAL_VARIANCE / features.var(0).sum().clamp(min=1e-12)).sqrt())


def reference_features(
    images: Images,
    extractor: Extractor,
    *,
    at_most: int = 50_000,
    batch_size: int = 100,
    dequantize: float = 0.0,
    num_workers: int = 0,
) -> ReferenceFeatures:
    """Features of the real pictures, or of some drawn at random; kept in ``extractor.references``.

    Args:
        images: the real pictures.
        extractor: see `make_extractor`.
        at_most: pictures to look at; a fixed random choice when there are more.
        batch_size: pictures at once.
        dequantize: noise added to them, as in training; see `backbones.data.batches`.
        num_workers: processes that decode.
    """
    count = min(len(images), at_most)
    key = (images.digest, dequantize, count)
    if key not in extractor.references:
        batch_size = min(batch_size, len(images))
        # The first epoch of the stream shows every picture once.
        stream = batches(
            images, batch_size=batch_size, seed=0, dequantize=dequantize, num_workers=num_workers
        )
        features, thumbnails, labels, seen = [], [], [], 0
        while seen < count:
            x, y = (part[: count - seen] for part in next(stream))
            x = _eight_bit(x)
            features.append(extractor(x).cpu())
            if seen < _num_thumbnails(images.num_classes):
                thumbnails.append(_thumbnails(x))
                labels.append(y)
            seen += len(x)
        extractor.references[key] = ReferenceFeatures(
            torch.cat(features), torch.cat(thumbnails), torch.cat(labels)
        )
    return extractor.references[key]


def _num_thumbnails(num_classes: int) -> int:
    return max(_MAX_DIVERSITY_SAMPLES, 4 * num_classes)


def _eight_bit(images: Tensor) -> Tensor:
    """Round to the 256 levels of a saved picture: scores must not see what a file could not hold."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 ``[N, 3, h, w]`` with h and w at most 64; keeps memory small at high resolutions."""
    if max(images.shape[-2:]) > _THUMBNAIL_SIZE:
        images = F.interpolate(images, size=(_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), mode="area")
    return ((images + 1) * 127.5).round().to(torch.uint8).cpu()


def score_generator(
    sample: Callable[[Tensor, int], Tensor],
    images: Images,
    extractor: Extractor,
    *,
    num_samples: int,
    num_real: int = 50_000,
    seed: int = 0,
    batch_size: int = 100,
    conditional: bool = True,
    dequantize: float = 0.0,
    neighbours: int = 5,
    kid_subsets: int = 100,
) -> dict[str, float]:
    """Score samples of a generator against the real pictures.

    Keys carry the extractor's name and the count: ``fd`` Fréchet distance; ``kid`` kernel distance (random
    subsets, may be below 0); ``precision`` and ``recall`` by k nearest neighbours; ``diversity``, the mean
    distance in pixels of two fakes of one class over that of two real pictures (below 0.55: collapsed);
    ``accuracy``, how often a classifier reads the requested label. Accuracy alone says nothing: the ten mean
    digits reach 1.

    Args:
        sample: ``sample(labels, start)`` returns images ``[b, 3, R, R]`` in [-1, 1] for labels int64 ``[b]``
            on the extractor's device; ``start`` numbers the first of them, to seed the latents with.
        images: the real pictures.
        extractor: see `make_extractor`.
        num_samples: fakes to draw; label i is i modulo the number of classes.
        num_real: real pictures to compare with, if there are that many.
        seed: of the random subsets.
        batch_size: fakes at once.
        conditional: False for a generator without classes: then all pictures count as one class.
        dequantize: noise added to the real pictures, as the generator saw them in training.
        neighbours: k of precision and recall.
        kid_subsets: random subsets of up to 1000 pictures that the kernel distance averages over.

    Raises:
        ValueError: too few pictures for ``neighbours``, or samples that are not finite or of another shape.
    """
    if min(num_samples, len(images)) <= neighbours:
        raise ValueError(
            f"{num_samples} samples and {len(images)} real pictures are too few for {neighbours} nearest "
            "neighbours: draw more samples or lower neighbours"
        )
    conditional = conditional and images.labels is not None
    real = reference_features(
        images, extractor, at_most=num_real, batch_size=batch_size, dequantize=dequantize
    )
    if not conditional:
        real = real._replace(labels=torch.zeros_like(real.labels))
    num_classes = images.num_classes if conditional else 1
    fake, accuracy = _sampled(sample, images, extractor, num_samples, batch_size, num_classes)
    few = min(len(real.features), num_samples, _MAX_NEIGHBOUR_SAMPLES)
    place = _wide(extractor.device)
    precision, recall = precision_recall(
        _subset(real.features, few, seed).to(place),
        _subset(fake.features, few, seed + 1).to(place),
        neighbours=neighbours,
    )
    name, n = extractor.name, f"{num_samples},reals={len(real.features)}"
    scores = {
        f"fd[{name},n={n}]": frechet_distance(real.features, fake.features),
        f"kid[{name},n={n}]": kernel_distance(
            real.features, fake.features, seed=seed, num_subsets=kid_subsets
        ),
        f"precision[{name},n={few},k={neighbours}]": precision,
        f"recall[{name},n={few},k={neighbours}]": recall,
        f"diversity[pixels,n={len(fake.labels)}]": _relative_spread(fake, real),
    }
    if conditional and extractor.can_classify:
        scores[f"accuracy[{name},n={num_samples}]"] = accuracy
    return scores


def _sampled(
    sample: Callable[[Tensor, int], Tensor],
    images: Images,
    extractor: Extractor,
    num_samples: int,
    batch_size: int,
    num_classes: int,
) -> tuple[ReferenceFeatures, float]:
    """The generator's counterpart of the real features, and the share of labels that a classifier reads."""
    features, thumbnails, labels, right = [], [], [], 0
    for start in range(0, num_samples, batch_size):
        numbers = torch.arange(start, min(start + batch_size, num_samples), device=extractor.device)
        requested = numbers % num_classes
        x = _eight_bit(_checked(sample(requested, start), len(numbers), images.resolution))
        features.append(extractor(x).cpu())
        if extractor.can_classify:
            right += int((extractor.classify(x).argmax(1) == requested).sum())
        if start < _num_thumbnails(images.num_classes):
            thumbnails.append(_thumbnails(x))
            labels.append(requested.cpu())
    collected = ReferenceFeatures(torch.cat(features), torch.cat(thumbnails), torch.cat(labels))
    return collected, right / num_samples


def _wide(device: torch.device) -> torch.device:
    """Where float64 works: everywhere but on Apple's accelerator."""
    return torch.device("cpu") if device.type == "mps" else device


def _checked(images: Tensor, count: int, resolution: int) -> Tensor:
    expected = (count, 3, resolution, resolution)
    if images.shape != expected:
        raise ValueError(
            f"sample returned {list(images.shape)}, expected {list(expected)}: one picture a label at the "
            "resolution of the real ones"
        )
    if not images.isfinite().all():
        raise ValueError(
            "sample returned values that are not finite: the generator has diverged, go back to an earlier "
            "checkpoint"
        )
    return images.detach().float()


def _subset(features: Tensor, count: int, seed: int) -> Tensor:
    rows = np.random.default_rng(seed).permutation(len(features))[:count]
    return features[torch.from_numpy(rows)]


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """|m - m'|^2 + Tr(C + C' - 2 (C C')^(1/2)) of two feature sets (Heusel et al., 2017), by clean-fid.

    Fewer pictures than features leave a covariance singular, and the matrix root may then fail. There the
    trace of the root is the sum of the singular values of A B^T, for C = A^T A and C' = B^T B. The
    estimate's bias, about proportional to 1/n, remains: compare at equal counts only.

    Args:
        real: ``[N, F]``, N of 2 or more.
        fake: ``[M, F]``, M of 2 or more.
    """
    from cleanfid import fid

    sets = [part.double().cpu() for part in (real, fake)]
    means = [part.mean(0) for part in sets]
    if min(len(part) for part in sets) <= real.shape[1]:
        roots = [(part - mean) / (len(part) - 1) ** 0.5 for part, mean in zip(sets, means, strict=True)]
        variance = sum(root.square().sum() for root in roots)
        # R of A = Q R has A^T A = R^T R, too, and no more rows than there are features.
        first, second = (torch.linalg.qr(r).R if len(r) > r.shape[1] else r for r in roots)
        cross = torch.linalg.svdvals(first @ second.T).sum()
        return float((means[0] - means[1]).square().sum() + variance - 2 * cross)
    covariances = [np.atleast_2d(np.cov(part.numpy(), rowvar=False)) for part in sets]
    ridge = max(1e-10 * float(np.mean([np.diagonal(c).mean() for c in covariances])), 1e-30)
    moments = [(m.numpy(), c + ridge * np.eye(len(c))) for m, c in zip(means, covariances, strict=True)]
    with warnings.catch_warnings():
        # clean-fid passes an argument to sqrtm that SciPy 1.18 will drop.
        warnings.filterwarnings("ignore", message="The `disp` argument", category=DeprecationWarning)
        return float(fid.frechet_distance(*moments[0], *moments[1]))


def kernel_distance(real: Tensor, fake: Tensor, *, seed: int, num_subsets: int = 100) -> float:
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3 (Binkowski et al., 2018), by clean-fid.

    Args:
        real: ``[N, F]``.
        fake: ``[M, F]``.
        seed: of the random subsets.
        num_subsets: subsets of up to 1000 pictures that are averaged.
    """
    from cleanfid import fid

    before = np.random.get_state()
    np.random.seed(seed % 2**32)  # clean-fid draws from NumPy's global state, which is put back below
    try:
        return fid.kernel_distance(real.double().cpu().numpy(), fake.double().cpu().numpy(), num_subsets)
    finally:
        np.random.set_state(before)


def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 5) -> tuple[float, float]:
    """Share of fakes near real pictures, and of real pictures near fakes (Kynkäänniemi et al., 2019).

    A point is near a set when it lies within the distance of some member to its k-th nearest neighbour there.

    Args:
        real: features ``[N, F]``.
        fake: features ``[N, F]``; equal counts, or the two shares cannot be compared.
        neighbours: k, below N.
    """
    # Centred and in float64, since the fast form |x|^2 - 2 x.y + |y|^2 cancels for near neighbours.
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre
    precision = _share_within(fake, real, _radii(real, neighbours))
    return precision, _share_within(real, fake, _radii(fake, neighbours))


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of every point to its k-th nearest neighbour, itself not counted."""
    radii = [torch.cdist(c, points).kthvalue(neighbours + 1, dim=1).values for c in points.split(1000)]
    return torch.cat(radii)


def _share_within(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = [(torch.cdist(chunk, centres) <= radii).any(1) for chunk in points.split(1000)]
    return float(torch.cat(inside).double().mean())


def _relative_spread(fake: ReferenceFeatures, real: ReferenceFeatures) -> float:
    """Mean spread within a class, fakes over real; over the classes with two pictures on both sides."""
    spread, expected = _spreads(fake.thumbnails, fake.labels), _spreads(real.thumbnails, real.labels)
    shared = spread.keys() & expected.keys()
    denominator = sum(expected[label] for label in shared)
    return sum(spread[label] for label in shared) / denominator if denominator else float("nan")


def _spreads(pictures: Tensor, labels: Tensor) -> dict[int, float]:
    """Mean Euclidean distance of two pictures, by class."""
    spreads = {}
    for label in labels.unique().tolist():
        members = pictures[labels == label][:_MAX_DIVERSITY_PER_CLASS].flatten(1).float()
        if len(members) > 1:
            spreads[label] = float(F.pdist(members).mean())
    return spreads
