"""The feature store, the files it is made from, and extraction from pictures."""

import base64
import gzip
import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from navigation_cases import graph_of, write_connectivity
from PIL import Image
from torchvision import models

from vln import convert, features
from vln.data import read_r4r
from vln.features import FeatureStore, StoreWriter, read_hdf5, read_tsv
from vln.pictures import build_network, extract, find_pictures


def item(number, width=5, scan="house"):
    rng = np.random.default_rng(number)
    return (scan, f"spot{number}"), rng.normal(size=(36, width)).astype(np.float32)


ITEMS = [item(number) for number in range(6)]


def tsv_line(key, values, fields=6):
    content = base64.b64encode(np.asarray(values, dtype="<f4").tobytes())
    return b"\t".join([key[0].encode(), key[1].encode(), b"640", b"480", b"60", content][:fields]) + b"\n"


# ---- the store


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 0.0)])
def test_what_is_written_is_read_back_in_any_order(tmp_path, dtype, tolerance):
    store = FeatureStore.write(tmp_path / "views", ITEMS, dtype=dtype)
    again = FeatureStore.open(tmp_path / "views", width=5, verify=True)
    assert len(store) == len(again) == 6 and again.width == 5 and again.keys == tuple(key for key, _ in ITEMS)
    assert ("house", "spot3") in store and ("shed", "spot3") not in store
    asked = [4, 0, 4]
    found = again.gather(["house"] * 3, [f"spot{number}" for number in asked])
    assert found.shape == (3, 36, 5) and found.dtype == dtype and found.flags.writeable
    for row, number in zip(found, asked, strict=True):
        np.testing.assert_allclose(row, ITEMS[number][1], atol=tolerance, rtol=tolerance)
    assert again.index(["house"], ["spot5"]).tolist() == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["views"]


def test_the_array_is_mapped_and_plain_numpy_reads_it(tmp_path):
    store = FeatureStore.write(tmp_path / "views", ITEMS)
    assert isinstance(store.features, np.memmap) and not store.features.flags.writeable
    assert np.array_equal(np.load(tmp_path / "views" / "features.npy"), store.features)


def test_a_store_pickles_as_its_path(tmp_path):
    store = FeatureStore.write(tmp_path / "views", [item(1, width=2048)])
    packed = pickle.dumps(store)
    assert len(packed) < 500
    assert np.array_equal(pickle.loads(packed).features, store.features)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_gather_equals_the_items_one_by_one(tmp_path_factory, number, width, data):
    items = [item(at, width) for at in range(number)]
    store = FeatureStore.write(tmp_path_factory.mktemp("store") / "views", items, dtype="float32")
    rows = data.draw(st.lists(st.integers(0, number - 1), max_size=5))
    found = store.gather(["house"] * len(rows), [f"spot{row}" for row in rows])
    assert found.shape == (len(rows), 36, width)
    assert all(np.array_equal(found[at], items[row][1]) for at, row in enumerate(rows))


def test_an_interrupted_write_goes_on_without_the_rows_that_are_there(tmp_path):
    def failing():
        yield from ITEMS[:3]
        raise OSError("the disk was taken away")

    with pytest.raises(OSError, match="taken away"):
        FeatureStore.write(tmp_path / "views", failing())
    with pytest.raises(FileNotFoundError, match="it was never finished: run the same command again"):
        FeatureStore.open(tmp_path / "views")
    array = tmp_path / ".views.partial" / "features.npy"
    array.write_bytes(array.read_bytes() + b"half a row")
    with StoreWriter(tmp_path / "views") as writer:
        assert writer.written == {key for key, _ in ITEMS[:3]}
    # Rows that are there are not taken from the items again.
    changed = [(key, values + 9) if at < 3 else (key, values) for at, (key, values) in enumerate(ITEMS)]
    store = FeatureStore.write(tmp_path / "views", changed)
    whole = FeatureStore.write(tmp_path / "whole", ITEMS)
    assert (store.path / "features.npy").read_bytes() == (whole.path / "features.npy").read_bytes()
    assert (store.path / "index.json").read_bytes() == (whole.path / "index.json").read_bytes()


@pytest.mark.parametrize("damage", ["array", "journal", "row"])
def test_what_an_interrupted_write_left_damaged_is_written_again(tmp_path, damage):
    with StoreWriter(tmp_path / "views") as writer:
        for key, values in ITEMS[:4]:
            writer.add(key, values)
    part = tmp_path / ".views.partial"
    file = part / ("written.jsonl" if damage == "journal" else "features.npy")
    content = bytearray(file.read_bytes())
    if damage == "row":
        content[256 + 2 * 360 + 5] ^= 255  # in the third row of 36 x 5 halves
        file.write_bytes(content)
    else:
        file.write_bytes(content[:-9])
    with StoreWriter(tmp_path / "views") as writer:
        assert len(writer.written) == (2 if damage == "row" else 3)
    store = FeatureStore.write(tmp_path / "views", ITEMS)
    store.verify()
    assert len(store) == 6 and store.keys == tuple(key for key, _ in ITEMS)


def test_damage_is_found_by_digest_and_named(tmp_path):
    store = FeatureStore.write(tmp_path / "views", ITEMS)
    file = store.path / "features.npy"
    content = bytearray(file.read_bytes())
    content[256 + 2 * 360 + 5] ^= 1
    file.write_bytes(content)
    FeatureStore.open(store.path)
    with pytest.raises(ValueError, match="features of viewpoint spot2 of scan house are damaged"):
        FeatureStore.open(store.path, verify=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("index.json", lambda text: text[: len(text) // 2], "is damaged, or no feature store"),
        ("index.json", lambda text: text.replace(b"spot3", b"spot9"), "its digest is another"),
        ("features.npy", lambda data: data[:-40], "is damaged, or no feature store"),
        (
            "features.npy",
            lambda data: data.replace(b"(6, 36, 5)", b"(5, 36, 6)"),
            r"holds float16 \[5, 36, 6\]",
        ),
    ],
)
def test_a_changed_file_is_refused_on_opening(tmp_path, name, change, message):
    store = FeatureStore.write(tmp_path / "views", ITEMS)
    (store.path / name).write_bytes(change((store.path / name).read_bytes()))
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(store.path)


def test_a_store_of_another_width_is_refused(tmp_path):
    FeatureStore.write(tmp_path / "views", ITEMS)
    with pytest.raises(ValueError, match=r"holds features of width 5 but 2048 is asked for: set the model's"):
        FeatureStore.open(tmp_path / "views", width=2048)


def test_what_cannot_be_asked_for_is_named(tmp_path):
    store = FeatureStore.write(tmp_path / "views", ITEMS)
    with pytest.raises(ValueError, match="has no features of viewpoint spot1 of scan shed among its 6"):
        store.gather(["house", "shed"], ["spot1", "spot1"])
    with pytest.raises(ValueError, match="expected one scan id for each viewpoint id"):
        store.gather(["house"], ["spot1", "spot2"])
    with pytest.raises(ValueError, match="expected one scan id for each viewpoint id"):
        store.index("house", "spot1")
    with pytest.raises(IndexError):
        store.take(np.array([6]))
    with pytest.raises(FileNotFoundError, match=r"holds no feature store: index\.json is missing"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize(
    ("items", "arguments", "message"),
    [
        ([ITEMS[0], item(1, width=6)], {}, "spot1 of scan house have width 6, expected 5"),
        (ITEMS, {"width": 4}, "have width 5, expected 4"),
        ([(("h", "a"), np.zeros((12, 5)))], {}, r"are float64 \[12, 5\], expected numbers \[36, D\]"),
        ([(("h", "a"), np.zeros((36, 0)))], {}, "have width 0"),
        ([(("h", "a"), np.full((36, 5), np.nan))], {}, "viewpoint a of scan h are not finite"),
        ([(("h", "a"), np.full((36, 5), 1e6))], {}, "are too large for float16"),
        ([ITEMS[0], ITEMS[0]], {}, "viewpoint spot0 of scan house occurs twice"),
        ([], {}, "there are no features to write"),
        (ITEMS, {"dtype": "int8"}, "dtype is 'int8', expected float16 or float32"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, items, arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureStore.write(tmp_path / "views", items, **arguments)
    assert not (tmp_path / "views").exists()


def test_a_store_is_never_written_over_and_a_begun_one_not_mixed(tmp_path):
    FeatureStore.write(tmp_path / "views", ITEMS)
    with pytest.raises(FileExistsError, match="exists: delete it or name another folder"):
        FeatureStore.write(tmp_path / "views", ITEMS)
    with StoreWriter(tmp_path / "other") as writer:
        writer.add(*ITEMS[0])
        with pytest.raises(ValueError, match="spot0 of scan house occurs twice"):
            writer.add(*ITEMS[0])
    for arguments in ({"dtype": "float32"}, {"width": 6}):
        with pytest.raises(ValueError, match="holds features of width 5 in float16 from an interrupted run"):
            StoreWriter(tmp_path / "other", **arguments)


# ---- others' files


@pytest.mark.parametrize("ending", ["tsv", "tsv.gz", "zip"])
def test_tsv_files_are_converted(tmp_path, capsys, ending):
    content = b"".join(tsv_line(*entry) for entry in ITEMS)
    path = tmp_path / f"features.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("ResNet.tsv", content)
    else:
        path.write_bytes(gzip.compress(content) if ending == "tsv.gz" else content)
    convert.main(["features", str(path), str(tmp_path / "views"), "--dtype", "float32"])
    assert capsys.readouterr().out.endswith("views: 6 viewpoints of width 5 in float32\n")
    store = FeatureStore.open(tmp_path / "views", verify=True)
    assert all(np.array_equal(row, values) for row, (_, values) in zip(store.features, ITEMS, strict=True))
    assert next(read_tsv(path, width=3))[1].shape == (36, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tsv_line(*ITEMS[0]) + tsv_line(*ITEMS[1], fields=5),
            "line 2 has 5 fields, expected the six of scanId",
        ),
        (
            tsv_line(*ITEMS[0])[:-61],
            r"line 1 \(spot0\): \d+ bytes of features.*perhaps the file is cut short",
        ),
        (tsv_line(*ITEMS[0])[:-3] + b"?!\n", r"line 1 \(spot0\): the features are not base64"),
    ],
)
def test_a_broken_tsv_file_is_named_with_the_line(tmp_path, content, message):
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_tsv(tmp_path / "a.tsv"))


def test_other_faults_of_tsv_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.tsv does not exist"):
        list(read_tsv(tmp_path / "a.tsv"))
    (tmp_path / "a.tsv").write_bytes(tsv_line(*ITEMS[0]))
    with pytest.raises(ValueError, match=r"line 1 \(spot0\): features of width 5, expected at least 768"):
        list(read_tsv(tmp_path / "a.tsv", width=768))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(tsv_line(*ITEMS[0]))[:-200])
    with pytest.raises(ValueError, match=r"a\.tsv\.gz is damaged"):
        list(read_tsv(tmp_path / "a.tsv.gz"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w"):
        pass
    with pytest.raises(ValueError, match="holds 0 TSV files, expected one"):
        list(read_tsv(tmp_path / "a.zip"))


def test_hdf5_files_are_converted(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "vit.hdf5", "w") as file:
        for key, values in ITEMS:
            file["_".join(key)] = values
    convert.main(["features", str(tmp_path / "vit.hdf5"), str(tmp_path / "views"), "--width", "3"])
    store = FeatureStore.open(tmp_path / "views", width=3)
    np.testing.assert_allclose(store.gather(["house"], ["spot2"])[0], ITEMS[2][1][:, :3], atol=2e-3)
    with h5py.File(tmp_path / "odd.hdf5", "w") as file:
        file["house_spot"] = np.zeros((12, 5))
    with pytest.raises(
        ValueError, match=r"house_spot has shape \[12, 5\], expected data sets called SCAN_VIEW"
    ):
        list(read_hdf5(tmp_path / "odd.hdf5"))
    (tmp_path / "no.hdf5").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot be read as an HDF5 file"):
        list(read_hdf5(tmp_path / "no.hdf5"))
    with pytest.raises(FileNotFoundError, match=r"absent\.hdf5 does not exist"):
        list(read_hdf5(tmp_path / "absent.hdf5"))


def test_without_h5py_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="reading HDF5 features needs h5py: pip install h5py"):
        list(read_hdf5(tmp_path / "vit.hdf5"))
    with pytest.raises(SystemExit, match="error: reading HDF5 features needs h5py"):
        convert.main(["features", str(tmp_path / "vit.h5"), str(tmp_path / "views")])


# ---- the other conversions


def test_r4r_is_built_and_items_are_checked(tmp_path, capsys):
    shed = graph_of([(0, 0, 0), (0, 2, 0), (0, 5, 0)], [(0, 1), (1, 2)], scan_id="shed")
    write_connectivity(tmp_path / "connectivity", shed)
    row = {"path_id": 4, "scan": "shed", "heading": 1.0, "path": ["shed-0", "shed-1", "shed-2"],
           "distance": 5.0, "instructions": ["Go."]}  # fmt: skip
    back = row | {"path_id": 5, "path": ["shed-2", "shed-1"], "distance": 3.5, "instructions": ["a", "b"]}
    (tmp_path / "R2R_train.json").write_text(json.dumps([row, back]))
    convert.main(["r4r", str(tmp_path / "R4R_train.json"), "--split", "train", "--data", str(tmp_path)])
    assert capsys.readouterr().out.endswith("R4R_train.json: 2 paths, 4 instructions\n")
    assert [item.path_id for item in read_r4r(tmp_path, "train")] == ["4_5", "5_4"]
    checked = ["check", "r2r", str(tmp_path / "R2R_train.json"), "--graphs", str(tmp_path)]
    convert.main(checked)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 2 items, 0 faults, 1 warnings; 1 with 1 instructions; 1 with 2 instructions")
    assert "item 5: 3.50 m are stated but its path is 3.00 m" in lines[1] and len(lines) == 2
    (tmp_path / "R2R_train.json").write_text(
        json.dumps([row | {"scan": str(number)} for number in range(12)])
    )
    with pytest.raises(SystemExit, match=r"(?s)error: .*12 faults.*item 4: scan 9 is unknown.*and 2 more"):
        convert.main(checked)


def test_a_negative_width_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="width is -1: give 0 for all"):
        convert.main(["features", "a.tsv", str(tmp_path / "views"), "--width", "-1"])


# ---- pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    (folder / "house").mkdir()
    for spot in ("hall", "bath_2"):
        for view in range(36):
            image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            image.save(folder / "house" / f"{spot}_{view:02d}.png")
    (folder / "house" / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), path)
    return path


def test_features_of_pictures_are_what_the_network_says_before_its_classifier(
    tmp_path, pictures, weights, capsys
):
    arguments = ["--pictures", str(pictures), "--network", "resnet18", "--weights", str(weights)]
    out = tmp_path / "views"
    features.main(["extract", *arguments, "--out", str(out), "--dtype", "float32", "--batch-size", "20"])
    assert "2 viewpoints of width 512 in float32, all sound" in capsys.readouterr().out
    store = FeatureStore.open(out)
    network = models.resnet18().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    with Image.open(pictures / "house" / "bath_2_17.png") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = network(((pixels - mean) / std)[None])[0].numpy()
    np.testing.assert_allclose(store.gather(["house"], ["bath_2"])[0, 17], expected, atol=1e-5)
    features.main(["verify", str(out)])
    assert "2 viewpoints" in capsys.readouterr().out


def test_extraction_goes_on_with_the_panoramas_that_are_missing(tmp_path, pictures, weights):
    with StoreWriter(tmp_path / "views") as writer:
        writer.add(("house", "hall"), np.full((36, 512), 3.0))
    store = extract(pictures, tmp_path / "views", network="resnet18", weights=weights, size=16)
    assert (store.gather(["house"], ["hall"]) == 3).all() and not (
        store.gather(["house"], ["bath_2"]) == 3
    ).any()


def test_missing_and_odd_pictures_are_named(tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="is no folder of pictures"):
        find_pictures(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no picture called SCAN/VIEWPOINT_VIEW"):
        find_pictures(tmp_path)
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "hall_03.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"hall_00\.jpg is missing: 1 of 36 views"):
        find_pictures(tmp_path)
    (tmp_path / "house" / "hall_03.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hall_03\.png: view 03 is there already"):
        find_pictures(tmp_path)
    (tmp_path / "house" / "hall_03.png").rename(tmp_path / "house" / "hall_36.png")
    with pytest.raises(ValueError, match=r"hall_36\.png: view 36 expected 00 to 35"):
        find_pictures(tmp_path)


def test_a_broken_picture_is_named_and_what_was_done_is_kept(tmp_path, pictures, weights):
    (tmp_path / "in" / "house").mkdir(parents=True)
    for path in (pictures / "house").glob("*.png"):
        content = path.read_bytes()
        (tmp_path / "in" / "house" / path.name).write_bytes(b"x" if path.name == "hall_07.png" else content)
    with pytest.raises(ValueError, match=r"hall_07\.png cannot be read as a picture"):
        extract(tmp_path / "in", tmp_path / "views", network="resnet18", weights=weights)
    with StoreWriter(tmp_path / "views") as writer:
        assert writer.written == {("house", "bath_2")}


def test_networks_and_weights_that_do_not_fit_are_named(tmp_path, weights):
    with pytest.raises(
        FileNotFoundError, match=r"no weights at .*: download the state dict of resnet50 yourself"
    ):
        build_network("resnet50", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match="torchvision has no network 'resnet19'"):
        build_network("resnet19", weights)
    with pytest.raises(ValueError, match="squeezenet1_1 has no fc, heads, head"):
        build_network("squeezenet1_1", weights)
    with pytest.raises(ValueError, match="does not hold the weights of resnet34"):
        build_network("resnet34", weights)
    torch.save({"model": models.resnet18}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth does not hold the weights of resnet18"):
        build_network("resnet18", tmp_path / "code.pth")


def test_the_command_refuses_what_makes_no_sense(tmp_path, capsys):
    with pytest.raises(ValueError, match="size is -1 and batch_size 36: give at least 0"):
        features.ExtractConfig(pictures="a", weights="b", out="c", size=-1)
    with pytest.raises(SystemExit):
        features.main(["extract", "--pictures", "a", "--weights", "b", "--out", "c", "--batch-size", "0"])
    assert "batch_size 0" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: .* holds no feature store"):
        features.main(["verify", str(tmp_path)])
