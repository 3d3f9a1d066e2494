"""Real pictures: sources, their errors, and the stateless stream."""

import io
import pickle
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import backbones.data as data
from backbones.data import DataConfig, Images, batches, held_out, open_images

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(value: int = 0, *, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[:, : width // 2, 0] = 255
    return Image.fromarray(pixels)


def encoded(value: int = 0, **size: int) -> bytes:
    stream = io.BytesIO()
    picture(value, **size).save(stream, "PNG")
    return stream.getvalue()


def save(path: Path, value: int = 0, **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value, **size))
    return path


def truncated(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    path.write_bytes(stream.getvalue()[:80])  # the header is whole, the pixels are not
    return path


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    save(tmp_path / "set" / "dog" / "a.png", 1)
    save(tmp_path / "set" / "cat" / "deep" / "er" / "b.png", 2)
    save(tmp_path / "set" / "cat" / "c.PNG", 3)
    (tmp_path / "set" / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / "set" / "list.csv").write_text("a,b")
    save(tmp_path / "set" / ".thumbnails" / "hidden.png", 9)
    return tmp_path / "set"


def numbered(n: int, *, resolution: int = 2) -> Images:
    """Picture i has all pixels i and label i."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, resolution, resolution)
    return data._from_pixels(pixels.contiguous(), name="numbered", labels=np.arange(n))


def drawn(images: Images, count: int, **options: object) -> list[list[int]]:
    return [labels.tolist() for _, labels in islice(batches(images, **options), count)]  # type: ignore[arg-type]


# Sources


def test_digits_keep_their_levels_at_8_pixels_and_grow_to_16() -> None:
    small = open_images(DataConfig(), resolution=8, conditional=True)
    large = open_images(DataConfig(), resolution=16, conditional=True)
    assert len(small) == len(large) == 1797
    assert large.num_classes == 10 and np.bincount(large.labels).min() > 170  # type: ignore[arg-type]
    pixels, label = small[0]
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 8, 8) and label == 0
    assert set(small.fetch(np.arange(1797))[0].unique().tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert large[0][0].shape == (3, 16, 16) and torch.equal(large[0][0][0], large[0][0][2])
    assert small.digest != large.digest and len(large.digest) == 64
    assert large.digest == open_images(DataConfig(), resolution=16, conditional=True).digest


def test_digits_smaller_than_stored_are_refused() -> None:
    with pytest.raises(ValueError, match="resolution is 4 but the digits have 8 x 8"):
        open_images(DataConfig(), resolution=4, conditional=True)


def test_class_folders_are_labelled_as_in_torchvision(class_folder: Path) -> None:
    images = open_images(DataConfig(data=str(class_folder)), resolution=8, conditional=True)
    assert images.num_classes == 2
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1]
    assert [int(images[i][0][1, 0, 0]) for i in range(3)] == [
        3,
        2,
        1,
    ]  # cat/c.PNG, cat/deep/er/b.png, dog/a.png
    assert images.name == "set"


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 5)
    images = open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    assert images.labels is None and images.num_classes == 0 and images[0][1] == 0
    with pytest.raises(
        ValueError, match=r"has no labels, which a class-conditional model needs: put every class"
    ):
        open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=True)


def test_stray_picture_beside_class_folders_is_named(class_folder: Path) -> None:
    save(class_folder / "preview.png")
    with pytest.raises(
        ValueError, match=r"holds 1 pictures beside its class folders \(such as preview.png\)"
    ):
        open_images(DataConfig(data=str(class_folder)), resolution=8, conditional=True)
    assert len(open_images(DataConfig(data=str(class_folder)), resolution=8, conditional=False)) == 4


def test_class_folder_without_pictures_is_named(class_folder: Path) -> None:
    (class_folder / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images for 1 classes in .* \(such as emu\): delete"):
        open_images(DataConfig(data=str(class_folder)), resolution=8, conditional=True)


def test_links_are_followed_but_not_in_circles(class_folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "d.png", 4)
    (class_folder / "emu").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (class_folder / "cat" / "loop").symlink_to(class_folder, target_is_directory=True)
    images = open_images(DataConfig(data=str(class_folder)), resolution=8, conditional=True)
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1, 2]


def test_archive_equals_folder_and_keeps_paths_inside(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack/dog/a.png", encoded(1))
        archive.writestr("pack/cat/b.png", encoded(2))
        archive.writestr("../../pack/cat/evil.png", encoded(7))
        archive.writestr("__MACOSX/pack/cat/._b.png", b"resource fork")
        archive.writestr("pack/readme.txt", "hello")
    images = open_images(DataConfig(data=str(path)), resolution=8, conditional=True)
    assert images.labels is not None and sorted(images.labels.tolist()) == [0, 0, 1]
    assert sorted(int(images[i][0][1, 0, 0]) for i in range(3)) == [1, 2, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]
    assert not list(tmp_path.parent.rglob("evil.png"))


def test_sets_beyond_the_memory_limit_are_decoded_when_drawn(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in class_folder.rglob("*.[pP][nN][gG]"):
            archive.write(file, file.relative_to(class_folder))
    for source in (class_folder, path):
        config = DataConfig(data=str(source))
        kept = open_images(config, resolution=8, conditional=True)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_MEMORY_LIMIT", 1)
            lazy = open_images(config, resolution=8, conditional=True)
        lazy = pickle.loads(pickle.dumps(lazy))  # as for a worker that is spawned
        assert lazy.digest == kept.digest
        assert torch.equal(lazy.fetch(np.arange(3))[0], kept.fetch(np.arange(3))[0])
        expected = [x for x, _ in islice(batches(kept, batch_size=2, seed=1), 4)]
        workers = islice(batches(lazy, batch_size=2, seed=1, num_workers=2), 4)
        for (x, _), y in zip(workers, expected, strict=True):
            assert torch.equal(x, y)


def test_damage_in_a_large_set_is_reported_when_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_MEMORY_LIMIT", 1)
    save(tmp_path / "a.png")
    truncated(tmp_path / "b.png")
    images = open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    with pytest.raises(
        ValueError, match=r"b\.png in .* cannot be decoded .*: remove the file or pass --skip-corrupt"
    ):
        images[1]
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images in .*: b\.png"):
        images = open_images(
            DataConfig(data=str(tmp_path), skip_corrupt=True), resolution=8, conditional=False
        )
    assert len(images) == 1


def test_arrays_grey_and_coloured(tmp_path: Path) -> None:
    grey = np.arange(4 * 6 * 6, dtype=np.uint8).reshape(4, 6, 6)
    np.savez(tmp_path / "grey.npz", images=grey, labels=np.array([0, 2, 2, 1], np.int32))
    images = open_images(DataConfig(data=str(tmp_path / "grey.npz")), resolution=6, conditional=True)
    assert images.num_classes == 3 and images.labels is not None and images.labels.dtype == np.int64
    assert torch.equal(images[1][0], torch.from_numpy(grey[1]).expand(3, 6, 6)) and images[1][1] == 2

    colour = np.stack([grey, grey[::-1], grey], axis=-1)
    np.savez(tmp_path / "colour.npz", images=colour)
    images = open_images(DataConfig(data=str(tmp_path / "colour.npz")), resolution=6, conditional=False)
    assert torch.equal(images[0][0][1], torch.from_numpy(grey[3])) and images.labels is None


def test_resize_fits_the_short_side_and_cuts_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    save(tmp_path / "small.png", 50, width=4, height=4)
    images = open_images(DataConfig(data=str(tmp_path), resize=True), resolution=8, conditional=False)
    assert images[0][0].shape == (3, 8, 8)
    assert images[1][0].unique().tolist() == [200]

    np.savez(tmp_path / "wide.npz", images=pixels[None])
    array = open_images(
        DataConfig(data=str(tmp_path / "wide.npz"), resize=True), resolution=8, conditional=False
    )
    assert torch.equal(array[0][0], images[1][0])


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)).save(tmp_path / "deep.png")
    images = open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    assert images[0][0].unique().tolist() == [128]


def test_cifar_is_never_fetched_unasked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not complete in .*pass --download to fetch it"):
        open_images(DataConfig(data="cifar10", data_root=str(tmp_path)), resolution=32, conditional=True)


def test_cifar_files_in_the_root_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        pixels = np.full((2, 3072), i, np.uint8)
        pixels[:, 1024:] = 0  # stored plane by plane, red first
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps({"data": pixels, "labels": [i, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    config = DataConfig(data="cifar10", data_root=str(tmp_path))
    images = open_images(config, resolution=32, conditional=True)
    assert len(images) == 10 == images.num_classes and images.name == "cifar10"
    assert images[8][1] == 5 and images[8][0].amax((1, 2)).tolist() == [5, 0, 0]
    with pytest.raises(ValueError, match="the pictures of cifar10 are 32x32 but the resolution is 64"):
        open_images(config, resolution=64, conditional=True)


# Errors


def test_missing_path_suggests_a_built_in_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no 'digit' \(did you mean digits\?\)"):
        open_images(DataConfig(data="digit"), resolution=16, conditional=True)


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    for name in ("photo.png", "broken.zip"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=rf"{name} is neither a folder nor a readable \.zip or \.npz"):
            open_images(DataConfig(data=str(tmp_path / name)), resolution=8, conditional=False)


def test_folder_and_archive_without_images_say_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.mp4"):
        (folder / name).write_text("")
    with pytest.raises(
        FileNotFoundError, match=r"no images \(found 2 x \.txt, 1 x \.mp4\): accepted are \.png"
    ):
        open_images(DataConfig(data=str(folder)), resolution=8, conditional=False)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(FileNotFoundError, match=r"no images \(found nothing\)"):
        open_images(DataConfig(data=str(tmp_path / "empty.zip")), resolution=8, conditional=False)


def test_corrupt_images_are_counted_and_named_or_skipped_with_one_warning(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"good{i}.png", i)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    truncated(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"2 of 5 images in .* cannot be decoded, the first is bad\.png"):
        open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    with pytest.warns(UserWarning, match=r"skipped 2 of 5 images .*: bad\.png, half\.png") as caught:
        images = open_images(
            DataConfig(data=str(tmp_path), skip_corrupt=True), resolution=8, conditional=False
        )
    assert len(caught) == 1 and len(images) == 3
    assert [int(images[i][0][1, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_nothing_but_corrupt_images_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 1 images .* cannot be decoded, .*: replace them"):
        open_images(DataConfig(data=str(tmp_path), skip_corrupt=True), resolution=8, conditional=False)


def test_sizes_that_differ_name_two_files(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", width=12)
    with pytest.raises(ValueError, match=r"than 8x8 \(a\.png is 8x8, b\.png is 12x8\): pass --resize"):
        open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"than 16x16 \(a\.png is 8x8, b\.png is 8x8\): pass --resize"):
        open_images(DataConfig(data=str(tmp_path)), resolution=16, conditional=False)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, r"it holds \['pictures'\]; expected `images` uint8"),
        ({"images": np.zeros((2, 8, 8), np.float32)}, r"is float32 \[2, 8, 8\]; expected `images` uint8"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"is uint8 \[2, 3, 8, 8\].*move channels last"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"is empty"),
        ({"images": np.array([{}, {}], object)}, r"Object arrays cannot be loaded.*without objects"),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(3, int)},
            r"`labels` in .* is int64 \[3\] for 2 images",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros(2)},
            r"`labels` in .* is float64 \[2\] for 2 images",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, -1])},
            r"for 2 images; .* counted from 0",
        ),
        ({"images": np.zeros((2, 8, 9), np.uint8)}, r"are 9x8 but the resolution is 8: pass --resize"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "set.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        open_images(DataConfig(data=str(tmp_path / "set.npz")), resolution=8, conditional=False)


def test_file_that_only_claims_to_hold_arrays(tmp_path: Path) -> None:
    for content in (b"", b"nonsense", pickle.dumps([1])):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot use .*set\.npz: .*; expected `images` uint8"):
            open_images(DataConfig(data=str(tmp_path / "set.npz")), resolution=8, conditional=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ""}, "data is empty"),
        ({"dequantize": 1.0}, "dequantize is 1.0, expected 0 <= dequantize < 1"),
        ({"num_workers": -1}, "num_workers is -1, expected 0 or more"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)  # type: ignore[arg-type]


def test_resolution_must_be_positive() -> None:
    with pytest.raises(ValueError, match="resolution is 0, expected a positive number"):
        open_images(DataConfig(), resolution=0, conditional=True)


# Splits


def test_split_is_stratified_disjoint_and_repeatable() -> None:
    images = open_images(DataConfig(), resolution=8, conditional=True)
    train, unseen = held_out(images)
    again, _ = held_out(images)
    assert len(train) + len(unseen) == 1797 and set(train._indices).isdisjoint(unseen._indices)
    assert np.array_equal(train._indices, again._indices) and train.digest == again.digest != unseen.digest
    assert train.labels is not None and unseen.labels is not None and images.labels is not None
    share = np.bincount(unseen.labels) / np.bincount(images.labels)
    assert np.all(np.abs(share - 0.2) < 0.005)
    assert np.array_equal(images.labels[unseen._indices], unseen.labels)
    nested, _ = held_out(train)
    assert set(nested._indices) <= set(train._indices)


def test_split_needs_labels(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    images = open_images(DataConfig(data=str(tmp_path)), resolution=8, conditional=False)
    with pytest.raises(ValueError, match="cannot be split by class"):
        held_out(images)


# The stream


@given(
    n=st.integers(2, 23),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 30),
    world_size=st.integers(1, 3),
    mirror=st.booleans(),
    dequantize=st.sampled_from([0.0, 0.0625]),
)
@settings(deadline=None, max_examples=60)
def test_batches_depend_on_seed_and_index_alone(
    n: int, batch_size: int, seed: int, start: int, world_size: int, mirror: bool, dequantize: float
) -> None:
    batch_size = min(batch_size, n // world_size) or 1
    if batch_size * world_size > n:
        world_size = 1
    images = numbered(n)
    options = {"seed": seed, "mirror": mirror, "dequantize": dequantize}

    def stream(**more: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(islice(batches(images, **options, **more), 4))  # type: ignore[arg-type]

    whole = stream(batch_size=batch_size * world_size, start=start)
    from_zero = islice(batches(images, batch_size=batch_size * world_size, **options), start, start + 4)  # type: ignore[arg-type]
    ranks = [
        stream(batch_size=batch_size, start=start, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for i, (x, y) in enumerate(from_zero):
        assert torch.equal(whole[i][0], x) and torch.equal(whole[i][1], y)
        assert torch.equal(torch.cat([ranks[r][i][0] for r in range(world_size)]), x)
        assert torch.equal(torch.cat([ranks[r][i][1] for r in range(world_size)]), y)


def test_every_epoch_shows_every_picture_once_in_another_order() -> None:
    labels = [label for batch in drawn(numbered(10), 6, batch_size=5, seed=3) for label in batch]
    epochs = [labels[0:10], labels[10:20], labels[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn(numbered(10), 2, batch_size=5, seed=4) != drawn(numbered(10), 2, batch_size=5, seed=3)


def test_workers_change_nothing() -> None:
    images = numbered(40)
    options = {"batch_size": 8, "seed": 5, "start": 3, "mirror": True, "dequantize": 0.1}
    alone = list(islice(batches(images, **options), 6))  # type: ignore[arg-type]
    helped = list(islice(batches(images, **options, num_workers=2), 6))  # type: ignore[arg-type]
    for (x, y), (u, v) in zip(alone, helped, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_state_is_left_alone(num_workers: int) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    list(islice(batches(numbered(8), batch_size=4, seed=0, dequantize=0.1, num_workers=num_workers), 3))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_pictures_span_the_range_and_flip_about_half_the_time() -> None:
    pixels = torch.zeros(100, 3, 1, 2, dtype=torch.uint8)
    pixels[..., 1] = 255
    images = data._from_pixels(pixels, name="edges", labels=np.zeros(100, int))
    x, _ = next(batches(images, batch_size=100, seed=0))
    assert x.dtype == torch.float32 and x.unique().tolist() == [-1, 1] and (x[..., 0] == -1).all()
    x, _ = next(batches(images, batch_size=100, seed=0, mirror=True))
    assert 30 < (x[:, 0, 0, 0] == 1).sum() < 70
    assert torch.equal(x[..., 0], -x[..., 1])


def test_noise_fills_the_gaps_between_levels_evenly() -> None:
    pixels = (torch.arange(17) * 255 / 16).round().to(torch.uint8).repeat(64)[:, None, None, None]
    images = data._from_pixels(pixels.repeat(1, 3, 1, 1), name="levels", labels=np.zeros(17 * 64, int))
    x, _ = next(batches(images, batch_size=17 * 64, seed=0, dequantize=1 / 16))
    assert -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1
    counts = torch.histc(x, bins=17, min=-1, max=1)
    assert (counts / counts.mean() - 1).abs().max() < 0.25


def test_batch_larger_than_the_set_names_both_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"takes 12 pictures but numbered holds 10: choose a batch size from 1 to 5"
    ):
        batches(numbered(10), batch_size=6, seed=0, world_size=2)
    with pytest.raises(ValueError, match="a batch of 0 on each"):
        batches(numbered(10), batch_size=0, seed=0)


def test_stream_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="rank is 2, expected 0 <= rank < world_size = 2"):
        batches(numbered(4), batch_size=1, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start is -1 and seed is 0"):
        batches(numbered(4), batch_size=1, seed=0, start=-1)
    with pytest.raises(ValueError, match="start is 0 and seed is -1"):
        batches(numbered(4), batch_size=1, seed=-1)


def test_data_loader_fetches_several_pictures_at_once() -> None:
    samples = numbered(6).__getitems__([4, 1])
    assert [label for _, label in samples] == [4, 1] and int(samples[0][0][0, 0, 0]) == 4


def test_jpeg_pack_unpacked_to_a_folder_opens(tmp_path: Path) -> None:
    source = SHARED / "images" / "anime96.npz"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    with np.load(source) as z:
        for i in range(4):
            k = z["test_header_id"][i]
            header = z["headers"][z["header_offsets"][k] : z["header_offsets"][k + 1]]
            scan = z["test_scans"][z["test_offsets"][i] : z["test_offsets"][i + 1]]
            (tmp_path / f"{i}.jpg").write_bytes(header.tobytes() + scan.tobytes())
    images = open_images(DataConfig(data=str(tmp_path)), resolution=96, conditional=False)
    pixels, _ = images.fetch(np.arange(4))
    assert pixels.shape == (4, 3, 96, 96) and pixels.float().std() > 20
