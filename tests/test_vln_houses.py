"""The embedded world: what its houses look like, that it repeats, and what it writes."""

import json
import sys
from collections import Counter

import numpy as np
import pytest

from vln import houses as houses_module
from vln.data import read_hanna, read_ndh, read_r2r
from vln.house_features import NUM_CONCEPTS, concept_strengths, concept_vectors, view_features
from vln.house_language import DIALOGUE_TOKENS, vocabulary, word_tokenizer
from vln.house_plans import NOUNS, build_house
from vln.houses import (
    EDGE_SHARES,
    HANNA_SPLITS,
    SPLITS,
    HousesConfig,
    documents,
    floor_plan,
    generate,
    house_features,
    main,
    write,
)
from vln.navgraph import load_graphs

SMALL = HousesConfig(num_seen=3, num_unseen=2, train_groups=12, val_groups=6)


@pytest.fixture(scope="module")
def world():
    return generate(SMALL)


@pytest.fixture(scope="module")
def houses():
    return [build_house(f"house{n}", np.random.default_rng([7, n])) for n in range(40)]


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    place = tmp_path_factory.mktemp("world")
    for name, text in documents(world).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    return place


def test_same_seed_gives_the_same_bytes():
    config = HousesConfig(num_seen=1, num_unseen=1, train_groups=2, val_groups=1)
    once, again = generate(config), generate(config)
    assert documents(again) == documents(once)
    for (key, views), (other, more) in zip(house_features(once), house_features(again), strict=True):
        assert key == other
        assert views.tobytes() == more.tobytes()


def test_another_seed_gives_another_world(world):
    other = generate(HousesConfig(num_seen=1, num_unseen=1, train_groups=2, val_groups=1, seed=1))
    ids = {name for graph in world.graphs.values() for name in graph.viewpoint_ids}
    assert ids.isdisjoint(name for graph in other.graphs.values() for name in graph.viewpoint_ids)


def test_more_houses_leave_the_first_ones_as_they_are(world):
    more = generate(HousesConfig(num_seen=4, num_unseen=3, train_groups=2, val_groups=1))
    for name, graph in world.graphs.items():
        assert more.graphs[name].viewpoint_ids == graph.viewpoint_ids
        assert (more.graphs[name].edges == graph.edges).all()


def test_graphs_are_like_the_real_scans(houses):
    sizes = [len(house.room_of) for house in houses]
    degree = np.concatenate([np.bincount(h.graph.edges[:, 0], minlength=len(h.room_of)) for h in houses])
    ways = [h.graph.positions[h.graph.edges[:, 1]] - h.graph.positions[h.graph.edges[:, 0]] for h in houses]
    length = np.linalg.norm(np.concatenate(ways), axis=1)
    assert min(sizes) >= 8
    assert max(sizes) <= 348
    assert 80 < np.mean(sizes) < 150
    assert 3.7 < degree.mean() < 4.4
    assert np.median(degree) == 4
    assert np.percentile(degree, 95) in (7, 8)
    assert degree.max() <= 14
    assert 1.8 < np.median(length) < 2.4
    assert 3.5 < np.percentile(length, 95) < 4.8


def test_houses_are_connected_and_some_have_stairs(houses):
    for house in houses:
        assert np.isfinite(house.graph.distances).all()
        heights = house.graph.positions[:, 2]
        floors = 1 + max(room.floor for room in house.rooms)
        assert np.ptp(heights) == pytest.approx(2.9 * (floors - 1), abs=0.3)
    assert {1, 2, 3} <= {1 + max(room.floor for room in house.rooms) for house in houses}


def test_rooms_of_a_floor_do_not_overlap(houses):
    for house in houses[:10]:
        for number, one in enumerate(house.rooms):
            for other in house.rooms[number + 1 :]:
                wide = min(one.x1, other.x1) - max(one.x0, other.x0)
                deep = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert one.floor != other.floor or wide < 1e-9 or deep < 1e-9


def test_what_is_visible_is_in_the_same_room_or_through_a_doorway(houses):
    """Marching along each sight line by small steps never leaves the rooms but at doorways."""
    checked = 0
    for house in houses[:6]:
        walls = [(d.x, d.y, d.across_x, d.width) for d in house.doorways]
        inside = np.bincount(house.room_of, minlength=len(house.rooms)) > 0
        for viewpoint, thing in np.argwhere(house.visible)[::37].tolist():
            start, end = house.graph.positions[viewpoint], house.positions[thing]
            room = house.rooms[house.room_of[viewpoint]]
            if house.colours[thing] < 0 or room.kind == "landing" or not inside[house.room_of[viewpoint]]:
                continue
            checked += 1
            for share in np.linspace(0, 1, 60):
                x, y = (start + share * (end - start))[:2]
                homes = [r for r in house.rooms if r.floor == room.floor and
                         r.x0 - 1e-6 <= x <= r.x1 + 1e-6 and r.y0 - 1e-6 <= y <= r.y1 + 1e-6]  # fmt: skip
                assert homes
                if room not in homes:
                    gap = min(abs((y - dy) if across else (x - dx)) for dx, dy, across, _ in walls)
                    assert gap < 9.0
    assert checked > 50


def test_a_thing_behind_a_wall_is_hidden(houses):
    hidden = 0
    for house in houses[:10]:
        apart = np.linalg.norm(house.graph.positions[:, None, :] - house.positions[None], axis=2)
        hidden += int(((apart < 3.0) & ~house.visible & (house.colours >= 0)).sum())
    assert hidden > 100


def test_features_without_noise_are_the_sum_of_what_is_seen(houses):
    house = houses[3]
    features = view_features(house, np.random.default_rng(0), noise=0.0)
    assert features.shape == (len(house.room_of), 36, 64)
    assert features.dtype == np.float32
    strengths = features @ concept_vectors(64).T
    assert np.allclose(strengths, concept_strengths(house), atol=1e-5)
    for viewpoint in range(len(house.room_of)):
        shown = set(house.nouns[house.visible[viewpoint]].tolist())
        unseen = [noun for noun in range(len(NOUNS)) if noun not in shown]
        assert np.abs(strengths[viewpoint][:, unseen]).max(initial=0) < 1e-5


def test_the_view_towards_a_landmark_shows_it_most_and_near_ones_show_more(houses):
    house = houses[3]
    strengths = concept_strengths(house)
    counts = Counter()
    single = [
        (v, t)
        for v, t in np.argwhere(house.visible)
        if house.colours[t] >= 0 and (house.nouns[house.visible[v]] == house.nouns[t]).sum() == 1
    ]
    shown = []
    for viewpoint, thing in single:
        offset = house.positions[thing] - house.graph.positions[viewpoint]
        k = round(np.arctan2(offset[0], offset[1]) / (np.pi / 6)) % 12
        best = int(strengths[viewpoint][:, house.nouns[thing]].argmax())
        counts[best % 12 == k] += 1
        shown.append((np.hypot(*offset[:2]), strengths[viewpoint][best, house.nouns[thing]]))
    assert counts[True] > 0.95 * len(single)
    apart, strength = np.array(shown).T
    assert strength[apart < 2].mean() > 1.5 * strength[apart > 5].mean()


def test_noise_and_width_follow_the_configuration(houses):
    clean = view_features(houses[5], np.random.default_rng(1), noise=0.0, feature_size=96)
    noisy = view_features(houses[5], np.random.default_rng(1), noise=0.1, feature_size=96)
    rest = noisy - clean
    assert rest.shape[-1] == 96
    assert (rest - rest.mean(axis=(0, 1))).std() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match=f"feature_size is 20: {NUM_CONCEPTS}"):
        concept_vectors(20)


def test_the_real_readers_read_the_files(world, folder):
    graphs = load_graphs(folder)
    assert list(graphs) == [house.scan_id for house in world.houses]
    for name, graph in world.graphs.items():
        assert graphs[name].viewpoint_ids == graph.viewpoint_ids
        assert np.array_equal(graphs[name].positions, graph.positions)
        assert np.array_equal(graphs[name].edges, graph.edges)
    for split in SPLITS:
        assert len(read_r2r(folder, split)) == len(world.r2r[split])
        assert len(read_ndh(folder, split)) == len(world.ndh[split])
        assert len(read_hanna(folder, HANNA_SPLITS[split])) == len(world.hanna[split])
    assert [len(world.r2r[split]) for split in SPLITS] == [48, 24, 24]
    assert {len(item.instructions) for item in read_r2r(folder, "train")} == {3}


def test_splits_keep_their_houses_apart(world):
    seen = {house.scan_id for house in world.seen}
    for rows in (world.r2r, world.ndh, world.hanna):
        assert {row["scan"] for row in rows["train"]} | {row["scan"] for row in rows["val_seen"]} <= seen
        assert seen.isdisjoint(row["scan"] for row in rows["val_unseen"])
    keys = [(row["scan"], row["path"][0], row["path"][-1]) for split in SPLITS for row in world.r2r[split]]
    assert len(set(keys)) == len(keys)


def test_configuration_tells_how_it_was_made(world, folder):
    stored = json.loads((folder / "config.json").read_text())
    assert HousesConfig(**stored["config"]) == SMALL
    assert stored["seen"] == ["seen000", "seen001", "seen002"]
    plan = json.loads((folder / "plans.json").read_text())[0]
    assert plan == json.loads(json.dumps(floor_plan(world.seen[0])))
    assert {"noun", "colour", "position"} == set(plan["landmarks"][0])


def test_tokeniser_saves_loads_and_knows_every_word(world, tmp_path):
    transformers = pytest.importorskip("transformers")
    word_tokenizer().save_pretrained(str(tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    texts = [text for split in SPLITS for row in world.r2r[split] for text in row["instructions"]]
    texts += [turn["message"] for row in world.ndh["train"] for turn in row["dialog_history"]]
    texts += [text for row in world.hanna["train"] for text in row["instructions"]]
    ids = tokenizer(texts)["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)
    assert {row[0] for row in ids} == {tokenizer.cls_token_id}
    assert {row[-1] for row in ids} == {tokenizer.sep_token_id}
    markers = tokenizer(" ".join(DIALOGUE_TOKENS), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(markers) == list(DIALOGUE_TOKENS)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).split() == texts[0].split()
    assert len(vocabulary()) < len(tokenizer) < 250


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("num_seen", 0), ("num_unseen", 0), ("train_groups", 1), ("val_groups", 0),
     ("group_size", 2), ("num_instructions", 0), ("feature_size", 16), ("noise", -0.1),
     ("noise", float("nan")), ("noise", float("inf"))],
)  # fmt: skip
def test_bad_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        HousesConfig(**{name: value})


def test_too_many_groups_for_the_houses_is_an_error():
    with pytest.raises(ValueError, match=r"groups of 40 paths in 1 houses"):
        generate(HousesConfig(num_seen=1, num_unseen=1, train_groups=2, val_groups=1, group_size=40))


def test_a_folder_is_written_whole_or_not_at_all(world, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="make it first"):
        write(world, tmp_path / "missing" / "world")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there already"):
        write(world, tmp_path / "there")

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(houses_module, "word_tokenizer", fail)
    pytest.importorskip("vln.features")
    with pytest.raises(OSError, match="disk full"):
        write(world, tmp_path / "world")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_command_writes_features_that_the_store_opens(tmp_path, capsys):
    features = pytest.importorskip("vln.features")
    pytest.importorskip("transformers")
    numbers = ["--num-seen", "1", "--num-unseen", "1", "--train-groups", "2", "--val-groups", "1"]
    main(["--out", str(tmp_path / "world"), *numbers])
    assert "2 houses with" in capsys.readouterr().out
    store = features.FeatureStore.open(tmp_path / "world" / "features")
    world = generate(HousesConfig(num_seen=1, num_unseen=1, train_groups=2, val_groups=1))
    keys, views = zip(*house_features(world), strict=True)
    scans, names = zip(*keys, strict=True)
    assert np.allclose(store.gather(scans, names), np.stack(views), atol=2e-3)
    with pytest.raises(SystemExit, match="there already"):
        main(["--out", str(tmp_path / "world"), *numbers])


def test_shares_are_shares():
    for shares in EDGE_SHARES.values():
        assert sum(shares.values()) == pytest.approx(1)


def test_a_missing_tokeniser_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install 'transformers"):
        word_tokenizer()
