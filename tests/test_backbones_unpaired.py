"""Two domains without pairs: where they come from, what is refused, and the stream of batches."""

import io
import re
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from backbones.data import Images
from backbones.unpaired import Pair, open_pair, ordered_batches, unpaired_batches

SHARED = Path(__file__).parents[2] / "shared" / "data" / "images"


def save(path, value=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def fill(root, **counts):
    """Folders of grey pictures; the shade is the number of the picture in all folders together."""
    shade = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            save(root / folder / f"{number}.png", shade)
            shade += 1
    return root


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set", trainA=3, trainB=5, testA=2, testB=1)


def jpeg(value, size=(8, 8)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def pack(path, *, classes=("cat", "dog", "wild dog"), train=6, other=("val", 3), **changes):
    """A JPEG pack of grey pictures; number i has shade 20 i and class i modulo the classes."""
    arrays = {}
    files = {"train": [jpeg(20 * i) for i in range(train)], other[0]: [jpeg(20 * i) for i in range(other[1])]}
    # All start alike up to the marker of the scan; that part is stored once.
    length = next(iter(files.values()))[0].index(b"\xff\xda")
    header = files["train"][0][:length]
    for split, encoded in files.items():
        assert all(file[:length] == header for file in encoded)
        scans = [file[length:] for file in encoded]
        arrays |= {
            f"{split}_scans": np.frombuffer(b"".join(scans), np.uint8),
            f"{split}_offsets": np.cumsum([0, *map(len, scans)], dtype=np.uint32),
            f"{split}_header_id": np.zeros(len(scans), np.uint8),
        }
        if classes:
            arrays[f"{split}_labels"] = np.arange(len(scans), dtype=np.uint8) % len(classes)
    arrays |= {"headers": np.frombuffer(header, np.uint8), "header_offsets": np.array([0, length], np.uint32)}
    if classes:
        arrays["classes"] = np.array(classes)
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def shades(images):
    """The shade of every picture, after checking that it has just one."""
    pixels, _ = images.fetch(np.arange(len(images)))
    assert (pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)).max() <= 2
    return pixels[:, 0, 0, 0].tolist()


def numbered(count, name, size=9):
    """Picture i holds i in its first channel, its column in the second and its row in the third."""
    column, row = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")
    place = torch.stack([torch.zeros_like(row), column, row]).to(torch.uint8)
    pixels = place.repeat(count, 1, 1, 1)
    pixels[:, 0] += torch.arange(count, dtype=torch.uint8)[:, None, None]
    return Images(pixels, name=name, digest=name, resolution=size)


def levels(images):
    return ((images + 1) * 127.5).round().int()


# ---- folders


def test_folder_gives_the_pictures_of_each_split(folder):
    train, test = open_pair(folder, 8), open_pair(str(folder), 8, split="test")
    assert shades(train.a) == [0, 1, 2] and shades(train.b) == [3, 4, 5, 6, 7]
    assert shades(test.a) == [8, 9] and shades(test.b) == [10]
    assert (train.a.resolution, train.resolution) == (9, 8)  # 8 * 286 / 256
    assert (test.a.resolution, test.resolution) == (8, 8)
    assert (train.a.name, test.b.name) == ("trainA", "testB")
    assert len({images.digest for images in (*train[:2], *test[:2])}) == 4


@pytest.mark.parametrize(("resolution", "enlarged"), [(256, 286), (64, 72), (32, 36), (16, 18)])
def test_training_pictures_are_enlarged_like_286_to_256(folder, resolution, enlarged):
    assert open_pair(folder, resolution).b.resolution == enlarged
    assert open_pair(folder, resolution, split="test").b.resolution == resolution


def test_relative_paths_start_at_the_root(folder):
    assert len(open_pair("set", 8, root=folder.parent).b) == 5
    pair = open_pair("A=set/trainA,B=set/trainB,testA=set/testA,testB=set/testB", 8, root=folder.parent)
    assert shades(pair.b) == [3, 4, 5, 6, 7]


def test_oblong_pictures_keep_their_proportions(tmp_path):
    for domain in "AB":
        path = save(tmp_path / f"train{domain}" / "a.png", 0, size=(40, 10))
        with Image.open(path) as image:
            image.paste((200, 200, 200), (15, 0, 25, 10))
            image.save(path)
    pair = open_pair(tmp_path, 9)
    assert shades(pair.a) == [200]  # the middle square alone


@pytest.mark.parametrize(
    ("counts", "split", "message"),
    [
        ({"trainA": 2}, "train", r"trainB in .* is missing or empty \(found trainA\): put the pictures"),
        ({"trainA": 0, "trainB": 2}, "train", r"trainA in .* is missing or empty \(found trainA, trainB\)"),
        ({"trainA": 1, "trainB": 1}, "test", r"testA and testB in .* is missing .* into testA and testB"),
        ({"trainA": 1, "trainB": 1, "testA": 1, "testB": 0}, "test", r"testB in .* is missing or empty"),
        ({}, "train", r"trainA and trainB in .* \(found nothing\)"),
    ],
)
def test_a_domain_without_pictures_is_named(tmp_path, counts, split, message):
    fill(tmp_path, **counts)
    with pytest.raises(FileNotFoundError, match=message):
        open_pair(tmp_path, 8, split=split)


def test_a_domain_of_other_files_is_named(tmp_path):
    fill(tmp_path, trainA=1, trainB=0)
    (tmp_path / "trainB" / "notes.txt").write_text("none")
    with pytest.raises(FileNotFoundError, match=r"domain B: .*trainB holds no images \(found 1 x \.txt\)"):
        open_pair(tmp_path, 8)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent: give one with trainA, trainB"):
        open_pair(tmp_path / "absent", 8)
    save(tmp_path / "file.png")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*file\.png"):
        open_pair(tmp_path / "file.png", 8)


def test_corrupt_picture_is_named_or_skipped(folder):
    (folder / "trainB" / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"domain B: 1 of 6 images in .*trainB .* the first is bad\.png"):
        open_pair(folder, 8)
    with pytest.warns(UserWarning, match=r"skipped 1 of 6 images .*: bad\.png"):
        pair = open_pair(folder, 8, skip_corrupt=True)
    assert shades(pair.b) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "split is 'val', expected 'train' or 'test'"),
        ({"resolution": 0}, "resolution is 0, expected a positive number"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_pair(folder, **({"resolution": 8} | arguments))


# ---- specifications


def test_arrays_and_archives_are_domains(tmp_path, folder):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    np.savez(tmp_path / "a.npz", images=images)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(folder / "trainB" / "2.png", "2.png")
    pair = open_pair(f"B={tmp_path}/b.zip,A={tmp_path}/a.npz", 8)
    assert shades(pair.a) == [0, 1, 2, 3] and shades(pair.b) == [5]
    assert pair.a.resolution == 9


def test_one_set_of_pictures_does_not_serve_for_training_and_test(folder):
    text = f"A={folder}/trainA,B={folder}/trainB"
    with pytest.raises(FileNotFoundError, match=r"domain A: .*trainA has one set .* test with testA=PATH"):
        open_pair(text, 8, split="test")
    with pytest.raises(FileNotFoundError, match=r"domain B: .*trainB has one set .* test with testB=PATH"):
        open_pair(f"{text},testA={folder}/testA", 8, split="test")
    pair = open_pair(f"{text},testA={folder}/testA,testB={folder}/testB", 8, split="test")
    assert shades(pair.a) == [8, 9] and shades(pair.b) == [10] and pair.a.resolution == 8


@pytest.mark.parametrize("other", ["val", "test"])
def test_pack_has_both_splits(tmp_path, other):
    pack(tmp_path / "p.npz", other=(other, 2))
    train = open_pair("A=p.npz,B=p.npz", 8, root=tmp_path)
    assert shades(train.a) == shades(train.b) == pytest.approx([0, 20, 40, 60, 80, 100], abs=1)
    assert train.a.name == "p-train"
    test = open_pair("A=p.npz,B=p.npz", 8, split="test", root=tmp_path)
    assert shades(test.a) == pytest.approx([0, 20], abs=1) and test.a.name == f"p-{other}"
    assert test.a.digest == test.b.digest != train.a.digest


def test_classes_of_a_pack_are_picked_by_name(tmp_path):
    pack(tmp_path / "p.npz")
    pair = open_pair("A=p.npz#cat,B=p.npz#wild dog+dog", 8, root=tmp_path)
    assert shades(pair.a) == pytest.approx([0, 60], abs=1)
    assert shades(pair.b) == pytest.approx([20, 40, 80, 100], abs=1)
    assert pair.a.digest != pair.b.digest
    test = open_pair("A=p.npz#cat,B=p.npz#wild dog+dog", 8, split="test", root=tmp_path)
    assert shades(test.b) == pytest.approx([20, 40], abs=1)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("A=p.npz", FileNotFoundError, "names no domain B: write A=PATH,B=PATH"),
        ("testA=p.npz", FileNotFoundError, "names no domain A and B"),
        ("A=p.npz,A=q.npz,B=p.npz", ValueError, r"'A=q\.npz' in .* is not understood"),
        ("A=p.npz,B=", ValueError, "'B=' in .* is not understood"),
        ("A=p.npz,B=absent.npz", FileNotFoundError, r"domain B: there is no .*absent\.npz"),
        (
            "A=p.npz#lion,B=p.npz",
            ValueError,
            r"domain A: there is no class lion in .*: its .* cat, dog, wild",
        ),
        (
            "A=plain.npz#cat,B=p.npz",
            ValueError,
            r"domain A: .*plain\.npz has no class names to pick cat from",
        ),
        ("A=bare.npz#cat,B=p.npz", ValueError, r"domain A: there is no class cat in .* its classes are none"),
        (
            "A=p.npz,B=p.npz#rare",
            FileNotFoundError,
            r"domain B: .*p\.npz holds no such picture for the train",
        ),
        (
            "A=p.npz,B=text.npz",
            ValueError,
            r"domain B: cannot use .*text\.npz|domain B: .*text\.npz is neither",
        ),
    ],
)
def test_specifications_that_cannot_be_met_are_refused(tmp_path, text, error, message):
    pack(tmp_path / "p.npz", classes=("cat", "dog", "wild dog", "a", "b", "c", "rare"))
    pack(tmp_path / "bare.npz", classes=())
    np.savez(tmp_path / "plain.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(error, match=message):
        open_pair(text, 8, root=tmp_path)


def test_corrupt_picture_of_a_pack_is_named_or_skipped(tmp_path):
    path = pack(tmp_path / "p.npz")
    with np.load(path) as stored:
        scans, offsets = stored["train_scans"].copy(), stored["train_offsets"]
    scans = np.delete(scans, slice(offsets[3], offsets[4]))
    offsets = offsets.copy()
    offsets[4:] -= offsets[4] - offsets[3]
    pack(path, train_scans=scans, train_offsets=offsets)
    with pytest.raises(
        ValueError, match=r"domain A: 1 of 6 pictures in .*p\.npz .* the first is picture 3 of train"
    ):
        open_pair("A=p.npz,B=p.npz", 8, root=tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 6 pictures in .*p\.npz .*: picture 3 of train") as caught:
        pair = open_pair("A=p.npz,B=p.npz#dog", 8, root=tmp_path, skip_corrupt=True)
    assert shades(pair.a) == pytest.approx([0, 20, 40, 80, 100], abs=1)
    assert len(caught) == 1 and len(pair.b) == 2
    pack(path, train_header_id=np.full(6, 9, np.uint8))
    with pytest.raises(ValueError, match=r"6 of 6 pictures .* the first is picture 0 of train"):
        open_pair("A=p.npz,B=p.npz", 8, root=tmp_path, skip_corrupt=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"headers": None}, "is not a whole JPEG pack .*headers"),
        ({"train_scans": None}, "is not a whole JPEG pack .*train_scans"),
        ({"train_labels": np.array([{}], object)}, "is not a whole JPEG pack .*pickle"),
    ],
)
def test_incomplete_pack_is_refused(tmp_path, changes, message):
    pack(tmp_path / "p.npz", **changes)
    with pytest.raises(ValueError, match=message):
        open_pair("A=p.npz,B=p.npz", 8, root=tmp_path)


# ---- the stream


def pair(count_a=7, count_b=11):
    return Pair(numbered(count_a, "trainA"), numbered(count_b, "trainB"), 8)


@given(
    count_a=st.integers(2, 13),
    count_b=st.integers(2, 13),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 40),
    world_size=st.integers(1, 3),
    mirror=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_batches_depend_on_seed_and_index_alone(
    count_a, count_b, batch_size, seed, start, world_size, mirror
):
    least = min(count_a, count_b)
    world_size = min(world_size, least)
    batch_size = min(batch_size, least // world_size)
    both = pair(count_a, count_b)

    def stream(number, **options):
        return list(islice(unpaired_batches(both, seed=seed, mirror=mirror, **options), number))

    whole = stream(start + 4, batch_size=batch_size * world_size)[start:]
    resumed = stream(4, batch_size=batch_size * world_size, start=start)
    ranks = [
        stream(4, batch_size=batch_size, start=start, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for index, batch in enumerate(whole):
        for side in (0, 1):
            assert torch.equal(resumed[index][side], batch[side])
            parts = [ranks[rank][index][side] for rank in range(world_size)]
            assert torch.equal(torch.cat(parts), batch[side])


def test_every_epoch_of_a_domain_shows_every_picture_once_in_another_order():
    batches = islice(unpaired_batches(pair(4, 6), batch_size=2, seed=1), 6)
    a, b = (torch.cat(side) for side in zip(*batches, strict=True))
    assert a.shape == (12, 3, 8, 8) and a.dtype == torch.float32
    drawn = [levels(side)[:, 0, 0, 0].tolist() for side in (a, b)]
    epochs_a = [drawn[0][i : i + 4] for i in (0, 4, 8)]
    epochs_b = [drawn[1][i : i + 6] for i in (0, 6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs_a)
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5] for epoch in epochs_b)
    assert epochs_a[0] != epochs_a[1] or epochs_a[1] != epochs_a[2]
    assert epochs_b[0] != epochs_b[1]


def test_domains_are_shuffled_flipped_and_cut_independently():
    same = Pair(numbered(50, "same"), numbered(50, "same"), 6)
    a, b = (levels(side) for side in next(unpaired_batches(same, batch_size=50, seed=0)))
    for value in (
        lambda x: x[:, 0, 0, 0],  # which picture
        lambda x: (x[:, 1, 0, 0] > x[:, 1, 0, 1]).int(),  # flipped or not
        lambda x: x[:, 2, 0, 0],  # upper edge
        lambda x: x[:, 1, 0].amin(1),  # left edge
    ):
        assert not torch.equal(value(a), value(b))
        assert len(value(a).unique()) > 1
    other = levels(next(unpaired_batches(same, batch_size=50, seed=1))[0])
    assert not torch.equal(a, other)
    # Seeds beyond 32 bits do not turn one domain into the other.
    far = levels(next(unpaired_batches(same, batch_size=50, seed=2**32))[0])
    assert not torch.equal(far, b) and not torch.equal(far, a)


def test_crops_reach_every_offset_and_flips_happen_half_the_time():
    both = Pair(numbered(200, "a", size=9), numbered(200, "b", size=9), 6)
    a = levels(next(unpaired_batches(both, batch_size=200, seed=0))[0])
    assert a.shape[-2:] == (6, 6)
    rows = a[:, 2, 0, 0]
    assert rows.unique().tolist() == [0, 1, 2, 3]
    assert a[:, 1, 0].amin(1).unique().tolist() == [0, 1, 2, 3]
    flipped = a[:, 1, 0, 0] > a[:, 1, 0, 1]
    assert 70 < int(flipped.sum()) < 130
    steps = torch.arange(6)
    assert torch.equal(a[:, 2, :, 0], rows[:, None] + steps)  # connected, never rescaled
    assert torch.equal(a[~flipped][:, 1, 0], a[~flipped][:, 1, 0, :1] + steps)
    still = levels(next(unpaired_batches(both, batch_size=200, seed=0, mirror=False))[0])
    assert not (still[:, 1, 0, 0] > still[:, 1, 0, 1]).any()


def test_augmentation_of_a_picture_differs_between_epochs():
    both = Pair(numbered(40, "a", size=12), numbered(40, "b", size=12), 6)
    batches = unpaired_batches(both, batch_size=40, seed=0, mirror=False)
    epochs = [levels(a) for a, _ in islice(batches, 2)]
    corners = [epoch[epoch[:, 0, 0, 0].argsort()][:, 1:, 0, 0] for epoch in epochs]
    assert not torch.equal(*corners)


def test_workers_change_nothing_and_global_random_state_is_left_alone():
    both = pair()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone = list(islice(unpaired_batches(both, batch_size=3, seed=5, start=2), 4))
    helped = list(islice(unpaired_batches(both, batch_size=3, seed=5, start=2, num_workers=1), 4))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])


def test_stream_options_out_of_range():
    with pytest.raises(ValueError, match="takes 8 pictures but trainA holds 7"):
        unpaired_batches(pair(), batch_size=4, seed=0, world_size=2)
    with pytest.raises(ValueError, match="takes 8 pictures but trainB holds 7"):
        unpaired_batches(pair(11, 7), batch_size=8, seed=0)
    with pytest.raises(ValueError, match="seed is -1, expected 0 <= seed"):
        unpaired_batches(pair(), batch_size=1, seed=-1)
    with pytest.raises(ValueError, match="start is -1"):
        unpaired_batches(pair(), batch_size=1, seed=0, start=-1)
    with pytest.raises(ValueError, match="rank is 1, expected 0 <= rank < world_size = 1"):
        unpaired_batches(pair(), batch_size=1, seed=0, rank=1)


def test_test_pictures_come_once_in_order_without_augmentation(folder):
    images = numbered(5, "testA", size=4)
    blocks = list(ordered_batches(images, batch_size=2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    whole = torch.cat(blocks)
    assert torch.equal(levels(whole), images.fetch(np.arange(5))[0].int())
    assert whole.dtype == torch.float32 and whole.min() == -1
    test = open_pair(folder, 8, split="test")
    assert levels(torch.cat(list(ordered_batches(test.a, batch_size=9))))[:, 0, 0, 0].tolist() == [8, 9]
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        ordered_batches(images, batch_size=0)


# ---- real packs


def test_real_faces_and_drawings_open():
    files = [SHARED / name for name in ("utkface96.npz", "anime96.npz")]
    if not all(path.is_file() for path in files):
        pytest.skip(f"{files[0]} is not here")
    both = open_pair("A=utkface96.npz,B=anime96.npz", 32, split="test", root=SHARED)
    assert (len(both.a), len(both.b)) == (1000, 100)
    a, b = next(unpaired_batches(both, batch_size=8, seed=0))
    assert a.shape == b.shape == (8, 3, 32, 32) and min(a.std(), b.std()) > 0.2


def test_real_cats_and_dogs_open():
    path = SHARED / "tiny_imagenet60.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    cats = "tabby+Persian cat+Egyptian cat"
    dogs = "Chihuahua+Yorkshire terrier+golden retriever+Labrador retriever+German shepherd+standard poodle"
    text = f"A={path.name}#{cats},B={path.name}#{dogs}"
    both = open_pair(text, 16, split="test", root=SHARED)
    assert (len(both.a), len(both.b)) == (150, 300)
    assert re.fullmatch(r"tiny_imagenet60-val", both.a.name)
