"""Feature extractors from local files and scores with known answers."""

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

import backbones.scores as scores
from backbones.data import DataConfig, Images, batches, open_images
from backbones.scores import (
    Extractor,
    frechet_distance,
    kernel_distance,
    make_extractor,
    precision_recall,
    reference_features,
    score_generator,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def digits() -> Images:
    return open_images(DataConfig(), resolution=16, conditional=True)


@pytest.fixture(scope="module")
def classifier(digits: Images) -> Extractor:
    return make_extractor("classifier", digits, device="cpu")


def replay(images: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A generator that returns stored pictures in order, whatever the label."""
    return lambda labels, start: images[start : start + len(labels)]


def value(found: dict[str, float], metric: str) -> float:
    (key,) = (key for key in found if key.startswith(f"{metric}["))
    return found[key]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().eval()


def saved(network: nn.Module, path: Path) -> tuple[Path, str]:
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]


# The classifier


def test_classifier_reads_digits_it_has_not_seen(classifier: Extractor) -> None:
    assert classifier.held_out_accuracy is not None and classifier.held_out_accuracy >= 0.97
    assert classifier(torch.zeros(3, 3, 16, 16)).shape == (3, 64)
    assert classifier.classify(torch.zeros(3, 3, 16, 16)).shape == (3, 10)


def test_same_seed_gives_the_same_classifier_and_no_other_trace(
    digits: Images, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scores, "_CLASSIFIER_STEPS", 5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = make_extractor("classifier", digits, device="cpu", seed=3)
    torch.rand(5)
    again = make_extractor("classifier", digits, device="cpu", seed=3)
    other = make_extractor("classifier", digits, device="cpu", seed=4)
    assert first.name == again.name != other.name and len(first.name) == len("classifier-12345678")
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)
    make_extractor("classifier", digits, device="cpu", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert f"{first.name}: {first.held_out_accuracy:.2%} of 359 held-out" in capsys.readouterr().out


def test_classifier_needs_labels(digits: Images) -> None:
    unlabelled = Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), name="u", digest="0", resolution=16)
    with pytest.raises(ValueError, match="u has no labels"):
        make_extractor("classifier", unlabelled, device="cpu")


# Networks from files


def test_torchvision_network_gives_its_pooled_activations(digits: Images, tmp_path: Path) -> None:
    network = seeded(torchvision.models.resnet18)
    path, digest = saved(network, tmp_path / "resnet.pt")
    state = torch.get_rng_state()
    extractor = make_extractor(f"resnet18:{path}", digits, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert extractor.name == f"resnet18-{digest}" and not extractor.can_classify
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((images + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    trunk = nn.Sequential(*list(network.children())[:-1])
    with torch.no_grad():
        expected = trunk(x).flatten(1)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"resnet18-.* cannot classify these pictures: use the extractor"):
        extractor.classify(images)


def test_squeezenet_follows_the_recipe_of_its_weights(digits: Images) -> None:
    path = SHARED / "features" / "squeezenet1_1_caffe_fp16.pt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    extractor = make_extractor(f"squeezenet1_1:{path}", digits, device="cpu")
    assert extractor.name == f"squeezenet1_1-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    network = torchvision.models.squeezenet1_1(weights=None).eval()
    network.load_state_dict({k: v.float() for k, v in torch.load(path, weights_only=True).items()})
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    x = torch.nn.functional.interpolate(pixels, (227, 227), mode="bilinear")
    with torch.no_grad():
        expected = network.features(x - torch.tensor([123.0, 117.0, 104.0])[:, None, None]).mean((2, 3))
    found = extractor(pixels / 127.5 - 1)
    assert found.shape == (2, 512)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def test_fid_inception_equals_clean_fid(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import inception_pytorch, resize

    network = seeded(scores._fid_inception)
    path, digest = saved(network, tmp_path / "inception.pth")
    monkeypatch.setenv("FQ_INCEPTION", str(path))
    extractor = make_extractor("inception", digits, device="cpu")
    assert extractor.name == f"inception-{digest}"

    loader = "load_state_dict_from_url"
    with mock.patch.object(inception_pytorch, loader, lambda *_, **__: network.state_dict()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # clean-fid builds the network with arguments of old
            theirs = inception_pytorch.InceptionV3(resize_input=False, normalize_input=False).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    resized = torch.from_numpy(resize.build_resizer("clean")(pixels)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = theirs((resized - 128) / 128)[0].flatten(1)
    found = extractor(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    assert found.shape == (1, 2048)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))


def test_shrinking_for_inception_has_the_filter_of_clean_fid() -> None:
    from cleanfid import resize

    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = torch.from_numpy(resize.build_resizer("clean")(pixels)).permute(2, 0, 1)[None]
    found = scores._preprocess(images, scores._PREPROCESSING["inception"]) * 128 + 128
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_random_features_say_that_they_are_not_fid(digits: Images) -> None:
    first, second = (make_extractor("random", digits, device="cpu", seed=s) for s in (0, 1))
    x = torch.rand(2, 3, 16, 16)
    assert first.name == "random-not-fid" and torch.equal(first(x), second(x))
    assert first(x).std() > 0


@pytest.mark.parametrize("spec", ["incption", "resnet18", "resnet1:weights.pt", "", "random:x"])
def test_unknown_extractor_lists_the_ways(digits: Images, spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown feature extractor .*, expected one of\n  classifier"):
        make_extractor(spec, digits, device="cpu")


def test_missing_weights_say_how_to_supply_them(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FQ_INCEPTION", raising=False)
    ways = r"(?s)pt_inception-2015-12-05-6726825d\.pth.*--features inception:PATH.*FQ_INCEPTION"
    for spec, place in {"inception": r"\(no path given\)", "inception:gone.pth": "'gone.pth'"}.items():
        with pytest.raises(FileNotFoundError, match=rf"no weights for inception at {place}") as caught:
            make_extractor(spec, digits, device="cpu")
        assert caught.match(ways)
    with pytest.raises(FileNotFoundError, match=r"no weights for resnet18 at 'gone\.pt'"):
        make_extractor("resnet18:gone.pt", digits, device="cpu")


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("sprung",)


def test_weights_that_could_run_code_are_refused(
    digits: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"weight": Trap()}, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        with pytest.raises(ValueError, match=rf"refused {name} \(\w+\): expected a plain state dict"):
            make_extractor(f"resnet18:{name}", digits, device="cpu")
    assert not (tmp_path / "sprung").exists()
    with zipfile.ZipFile("script.pt", "w") as archive:
        for entry in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{entry}", b"3\n")
    with pytest.raises(ValueError, match=r"refused script\.pt \(a TorchScript archive, which is code\)"):
        make_extractor("inception:script.pt", digits, device="cpu")


def test_weights_of_something_else_are_refused(digits: Images, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"refused .*a\.pt \(holds more than named tensors\)"):
        make_extractor(f"resnet18:{tmp_path / 'a.pt'}", digits, device="cpu")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt does not fit resnet18 \(Missing key"):
        make_extractor(f"resnet18:{tmp_path / 'b.pt'}", digits, device="cpu")


# Distances


def exact_frechet(real: Tensor, fake: Tensor) -> float:
    """Tr (C C')^(1/2) is the sum of singular values of the product of the centred sets."""
    r, f = real.double(), fake.double()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (r, f))
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return float((r.mean(0) - f.mean(0)).square().sum() + traces)


@pytest.mark.parametrize(("real", "fake"), [(300, 200), (20, 300), (30, 20), (10, 8)])
def test_frechet_distance_matches_the_low_rank_form(real: int, fake: int) -> None:
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=rng) / 8
    a = (torch.randn(real, 64, generator=rng) @ mixing).relu()
    b = (torch.randn(fake, 64, generator=rng) @ mixing + 0.2).relu()
    a[:, 0] = b[:, 0] = 0  # a feature that never fires
    assert frechet_distance(a, b) == pytest.approx(exact_frechet(a, b), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-3)
    collapsed = torch.ones(real, 64)
    assert frechet_distance(collapsed, b) == pytest.approx(exact_frechet(collapsed, b), rel=1e-4)


@pytest.mark.parametrize(("real", "fake"), [(20, 300), (300, 20), (12, 20)])
def test_few_pictures_never_reach_the_matrix_root(
    real: int, fake: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise ValueError("Imaginary component 0.0058")

    monkeypatch.setattr("cleanfid.fid.frechet_distance", fails)
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(real, 64, generator=rng), 3 * torch.randn(fake, 64, generator=rng) + 1
    assert frechet_distance(a, b) == pytest.approx(exact_frechet(a, b), rel=1e-9)
    with pytest.raises(ValueError, match="Imaginary"):
        frechet_distance(a.repeat(10, 1), b.repeat(10, 1))


def test_kernel_distance_repeats_and_leaves_numpy_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, 8, generator=rng), torch.randn(50, 8, generator=rng) + 1
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    first = kernel_distance(a, b, seed=5, num_subsets=4)
    np.random.seed(9)
    assert (
        kernel_distance(a, b, seed=5, num_subsets=4) == first != kernel_distance(a, b, seed=6, num_subsets=4)
    )
    np.random.seed(0)
    expected = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    kernel_distance(a, b, seed=5, num_subsets=4)
    assert np.array_equal(np.random.get_state()[1], expected) and len(before) == len(expected)  # type: ignore[index]
    same = kernel_distance(a, torch.randn(60, 8, generator=rng), seed=5, num_subsets=20)
    assert abs(same) < 0.1 * kernel_distance(a, b, seed=5, num_subsets=20)


def test_precision_and_recall_match_their_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 3, generator=rng), torch.randn(40, 3, generator=rng) * 0.5 + 0.5
    found = precision_recall(real, fake, neighbours=3)

    def share(points: Tensor, centres: Tensor) -> float:
        radii = [sorted((c - o).norm().item() for o in centres)[3] for c in centres]
        near = [any((p - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(near) / len(near)

    assert found == (share(fake, real), share(real, fake)) and found[0] != found[1]
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


# Scores


def test_real_halves_set_the_yardstick(digits: Images, classifier: Extractor) -> None:
    rows = np.random.default_rng(0).permutation(len(digits))
    half = digits.subset(rows[:898], name="half")
    other, _ = digits.fetch(rows[898:1796])
    found = score_generator(
        replay(other.float() / 127.5 - 1), half, classifier, num_samples=898, conditional=False, kid_subsets=5
    )
    assert 0 < value(found, "fd") < 15
    assert value(found, "recall") > 0.9 and value(found, "precision") > 0.9
    assert value(found, "diversity") == pytest.approx(1, abs=0.05)
    assert not any(key.startswith("accuracy") for key in found)


def test_class_means_are_accurate_but_found_out(digits: Images, classifier: Extractor) -> None:
    pixels, labels = digits.fetch(np.arange(len(digits)))
    means = torch.stack([pixels[labels == c].float().mean(0) for c in range(10)]) / 127.5 - 1
    found = score_generator(lambda y, _: means[y], digits, classifier, num_samples=2000, kid_subsets=5)
    name = classifier.name
    assert found[f"accuracy[{name},n=2000]"] == 1
    assert 50 < found[f"fd[{name},n=2000,reals=1797]"] < 200
    assert found[f"recall[{name},n=1797,k=5]"] < 0.05
    assert found["diversity[pixels,n=2000]"] == 0
    assert set(found) >= {f"kid[{name},n=2000,reals=1797]", f"precision[{name},n=1797,k=5]"}


def test_requested_labels_are_balanced_and_start_counts_on(digits: Images) -> None:
    extractor, calls = make_extractor("random", digits, device="cpu"), []

    def sample(labels: Tensor, start: int) -> Tensor:
        calls.append((start, labels.tolist()))
        return torch.rand(len(labels), 3, 16, 16, generator=torch.Generator().manual_seed(start)) * 2 - 1

    first = score_generator(sample, digits, extractor, num_samples=25, batch_size=10, kid_subsets=2)
    assert calls == [(0, list(range(10))), (10, list(range(10))), (20, list(range(5)))]
    assert first == score_generator(sample, digits, extractor, num_samples=25, batch_size=10, kid_subsets=2)
    assert not any(key.startswith("accuracy") for key in first)
    calls.clear()
    score_generator(sample, digits, extractor, num_samples=10, conditional=False, kid_subsets=2)
    assert calls == [(0, [0] * 10)]


def test_diversity_falls_with_the_share_of_copies(digits: Images) -> None:
    extractor = make_extractor("random", digits, device="cpu")
    pixels, labels = digits.fetch(np.arange(len(digits)))
    by_class = [pixels[labels == c].float() / 127.5 - 1 for c in range(10)]

    def diversity(distinct: int) -> float:
        def sample(y: Tensor, start: int) -> Tensor:
            return torch.stack([by_class[c][(start + i) // 10 % distinct] for i, c in enumerate(y.tolist())])

        return value(score_generator(sample, digits, extractor, num_samples=1000, kid_subsets=1), "diversity")

    everything, four, one = diversity(170), diversity(4), diversity(1)
    assert everything == pytest.approx(1, abs=0.05) and 0.6 < four < 0.85 and one == 0


def test_real_features_are_computed_once_per_noise(digits: Images) -> None:
    extractor = make_extractor("random", digits, device="cpu")
    first = reference_features(digits, extractor)
    assert len(first.features) == len(digits) == len(first.thumbnails)
    assert reference_features(digits, extractor, batch_size=7) is first
    noisy = reference_features(digits, extractor, dequantize=1 / 16)
    assert not torch.equal(noisy.features, first.features)
    expected, y = next(batches(digits, batch_size=5, seed=0))
    torch.testing.assert_close(first.features[:5], extractor(expected))
    assert torch.equal(first.labels[:5], y)


def test_large_pictures_are_compared_at_64_pixels() -> None:
    assert scores._thumbnails(torch.ones(2, 3, 256, 256)).shape == (2, 3, 64, 64)
    assert scores._thumbnails(torch.ones(2, 3, 32, 32)).unique().tolist() == [255]


def test_broken_samples_are_refused(digits: Images) -> None:
    extractor = make_extractor("random", digits, device="cpu")

    def score(images: Tensor, count: int = 10) -> None:
        score_generator(lambda *_: images, digits, extractor, num_samples=count)

    with pytest.raises(ValueError, match="not finite: the generator has diverged"):
        score(torch.full((10, 3, 16, 16), torch.nan))
    with pytest.raises(ValueError, match=r"returned \[10, 3, 8, 8\], expected \[10, 3, 16, 16\]"):
        score(torch.zeros(10, 3, 8, 8))
    with pytest.raises(ValueError, match="5 samples and 1797 real pictures are too few for 5 nearest"):
        score(torch.zeros(5, 3, 16, 16), count=5)
