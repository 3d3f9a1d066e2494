"""Navigation graphs: files, shortest paths, the cache, and what is wrong with a file."""

import gzip
import json
import math
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from navigation_cases import connectivity, graph_of, graphs, house, write_connectivity

from vln.navgraph import NavGraph, find_connectivity, load_graphs, parse_connectivity
from vln.sources import Document

SHARED = Path(__file__).parents[2] / "shared" / "data" / "vln"


def parsed(rows):
    return parse_connectivity("house", Document("house.json", json.dumps(rows).encode()))


def same(a, b):
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("positions", "included", "edges")
    )
    return arrays and (a.scan_id, a.viewpoint_ids) == (b.scan_id, b.viewpoint_ids)


def as_networkx(graph):
    flat = networkx.Graph()
    for a, b in graph.edges.tolist():
        if graph.included[a] and graph.included[b]:
            flat.add_edge(a, b, weight=math.dist(graph.positions[a], graph.positions[b]))
    return flat


# ---- files


def test_a_connectivity_file_is_read_row_by_row():
    rows = connectivity(house())
    rows[0]["unobstructed"][0] = True  # a loop to itself is none
    rows[8]["unobstructed"][1] = True  # an excluded viewpoint may lead out
    rows[6]["unobstructed"] = [False] * 9  # one way: only 5 leads to 6
    graph = parsed(rows)
    assert graph.neighbours[0] == (1, 3)
    assert 8 not in graph.neighbours[2] and graph.neighbours[8] == (0, 1, 2)
    assert 6 in graph.neighbours[5] and graph.neighbours[6] == ()
    assert graph.positions[6].tolist() == [6.3, 2.6, 4.2] and not graph.included[8]
    assert graph.index("house-4") == 4 and graph.has_edge("house-4", "house-5")
    assert not graph.has_edge("house-0", "house-5")


def test_folder_gzip_and_archives_hold_the_same(tmp_path):
    scans = [house("b"), house("a"), graph_of([(0, 0, 0)], [], scan_id="lonely")]
    folder = write_connectivity(tmp_path / "plain" / "connectivity", *scans)
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for path in folder.glob("*.json"):
        (zipped / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    places = [folder, folder.parent, zipped]
    for ending, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        (tmp_path / ending).mkdir()
        places.append(tmp_path / ending / f"connectivity{ending}")
        with tarfile.open(places[-1], mode) as archive:
            archive.add(folder, "connectivity")
    places.append(tmp_path / ".tar.xz")
    for place in places:
        loaded = load_graphs(place)
        # A list of scans gives their order; without one it is that of the names.
        assert list(loaded) == (["a", "b", "lonely"] if place == zipped else ["b", "a", "lonely"]), place
        assert all(same(loaded[scan.scan_id], scan) for scan in scans)
    assert list(load_graphs(folder, ["lonely", "a"])) == ["lonely", "a"]
    assert find_connectivity(folder.parent) == folder


def test_a_missing_file_is_named(tmp_path):
    folder = write_connectivity(tmp_path, house("a"), house("b"))
    (folder / "b_connectivity.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no b_connectivity\.json: scan b cannot be loaded"):
        load_graphs(folder)
    with pytest.raises(FileNotFoundError, match="scan c cannot be loaded"):
        load_graphs(folder, ["a", "c"])
    assert list(load_graphs(folder, ["a"])) == ["a"]
    with pytest.raises(FileNotFoundError, match=r"no connectivity files at .*nowhere"):
        load_graphs(tmp_path / "nowhere")
    (tmp_path / "other.zip").touch()
    with pytest.raises(ValueError, match=r"other\.zip is not a folder, nor a tar archive"):
        load_graphs(tmp_path / "other.zip")


def test_damaged_archives_and_files_are_named(tmp_path):
    folder = write_connectivity(tmp_path / "connectivity", house("a"))
    (tmp_path / "connectivity.tar.xz").write_bytes(b"\xfd7zXZ\x00 no more")
    with pytest.raises(ValueError, match=r"connectivity\.tar\.xz cannot be read as a tar archive"):
        load_graphs(tmp_path / "connectivity.tar.xz")
    text = (folder / "a_connectivity.json").read_text()
    (folder / "a_connectivity.json").write_text(text[:100])
    with pytest.raises(ValueError, match=r"a_connectivity\.json is not valid JSON, perhaps cut short"):
        load_graphs(folder)
    (folder / "a_connectivity.json").unlink()
    (folder / "a_connectivity.json.gz").write_bytes(gzip.compress(text.encode())[:50])
    with pytest.raises(ValueError, match=r"a_connectivity\.json\.gz is damaged"):
        load_graphs(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], r"house\.json: expected a list of viewpoints, found list \[\]"),
        (lambda rows: {"a": 1}, "expected a list of viewpoints, found dict"),
        (lambda rows: [1], "viewpoint 0 lacks image_id, pose, included, unobstructed"),
        (
            lambda rows: [*rows[:3], {**rows[3], "pose": [1.0]}, *rows[4:]],
            r"viewpoint 3 \(house-3\) has 9 flags and 1 pose",
        ),
        (
            lambda rows: rows[:-1],
            r"viewpoint 0 \(house-0\) has 9 flags and 16 pose numbers, expected 8 and 16",
        ),
        (lambda rows: [{**row, "included": 1} for row in rows], "included must hold true or false alone"),
        (lambda rows: [{**row, "pose": ["x"] * 16} for row in rows], "pose must hold numbers alone"),
        (lambda rows: [{**row, "image_id": "same"} for row in rows], "scan house has viewpoint same twice"),
        (
            lambda rows: [{**rows[0], "pose": [math.nan] * 16}, *rows[1:]],
            "position of viewpoint house-0 is not finite",
        ),
    ],
)
def test_a_file_that_is_no_graph_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parsed(change(connectivity(house())))


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"scan s: 1 viewpoints need positions \[1, 3\].*got \[2, 3\]"):
        NavGraph("s", ("a",), np.zeros((2, 3)), np.ones(1, bool), np.zeros((0, 2), int))


@pytest.mark.parametrize("edges", [[(0, 9)], [(-1, 0)], [(3, 3)]])
def test_an_edge_must_join_two_viewpoints(edges):
    graph = house()
    with pytest.raises(ValueError, match="edges must join two different ones of 9 viewpoints"):
        NavGraph("house", graph.viewpoint_ids, graph.positions, graph.included, np.array(edges))


# ---- shortest paths


@settings(deadline=None, max_examples=60)
@given(graphs(both_ways=True))
def test_distances_are_those_of_networkx_and_a_metric(graph):
    flat, distances, hops = as_networkx(graph), graph.distances, graph.next_hops
    expected = dict(networkx.all_pairs_dijkstra_path_length(flat))
    for a, start in enumerate(graph.viewpoint_ids):
        for b, goal in enumerate(graph.viewpoint_ids):
            alone = a == b and graph.included[a]
            value = expected.get(a, {}).get(b, 0.0 if alone else math.inf)
            assert distances[a, b] == pytest.approx(value, abs=1e-9)
            path = graph.shortest_path(start, goal)
            if math.isinf(value):
                assert path == [] and hops[a, b] == -1
                continue
            assert path[0] == start and path[-1] == goal
            steps = list(pairwise(path))
            assert all(graph.has_edge(*step) for step in steps)
            walked = [distances[graph.index(x), graph.index(y)] for x, y in steps]
            assert sum(walked) == pytest.approx(value, abs=1e-9)
    through = distances[:, :, None] + distances[None]  # [a, b, c]: from a over b to c
    assert (distances[:, None] <= through.transpose(0, 1, 2) + 1e-9).all()
    assert np.allclose(distances, distances.T, atol=1e-9)


def test_lonely_and_excluded_viewpoints_are_nowhere_near():
    graph = house()
    assert np.isinf(graph.distances[7, :7]).all() and graph.distances[7, 7] == 0
    assert graph.shortest_path("house-7", "house-0") == [] and graph.shortest_path("house-7", "house-7") == [
        "house-7"
    ]
    assert np.isinf(graph.distances[8]).all() and (graph.next_hops[8] == -1).all()
    assert graph.next_hops[0, 4] in (1, 3) and graph.next_hops[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        graph.distances[0, 0] = 1.0


def test_two_viewpoints_at_one_place_are_linked_by_no_distance():
    graph = graph_of([(0, 0, 0), (0, 0, 0), (3, 4, 0)], [(0, 1), (1, 2)])
    assert graph.distances[0].tolist() == [0, 0, 5]
    assert graph.shortest_path("house-0", "house-2") == ["house-0", "house-1", "house-2"]


def test_a_one_way_edge_has_no_distance_and_is_named():
    graph = graph_of([(0, 0, 0), (1, 0, 0)], [(0, 1)], both_ways=False)
    with pytest.raises(ValueError, match="from house-0 to house-1 but not back"):
        graph.distances  # noqa: B018
    with pytest.raises(ValueError, match="scan house has no viewpoint attic among its 2"):
        graph.index("attic")


# ---- cache


def test_the_cache_is_read_while_the_sources_stay_and_made_again_when_they_change(tmp_path, monkeypatch):
    folder, cache = write_connectivity(tmp_path / "graphs", house("a"), house("b")), tmp_path / "graphs.npz"
    first = load_graphs(folder, cache=cache)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["graphs.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "vln.navgraph.parse_connectivity", lambda *_: pytest.fail("the files were parsed again")
        )
        again = load_graphs(folder, ["b"], cache=cache)
    assert list(again) == ["b"] and same(again["b"], first["b"])
    moved = connectivity(house("b"))
    moved[0]["pose"][3] = 0.5
    (folder / "b_connectivity.json").write_text(json.dumps(moved))
    assert load_graphs(folder, cache=cache)["b"].positions[0, 0] == 0.5
    with monkeypatch.context() as patch:
        patch.setattr("vln.navgraph.parse_connectivity", lambda *_: pytest.fail("the new cache was not kept"))
        assert load_graphs(folder, cache=cache)["b"].positions[0, 0] == 0.5
    with pytest.raises(FileNotFoundError, match="scan c cannot be loaded"):
        load_graphs(folder, ["c"], cache=cache)


@pytest.mark.parametrize("content", [b"", b"my thesis", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_cache_is_not_overwritten(tmp_path, content):
    folder, cache = write_connectivity(tmp_path / "graphs", house("a")), tmp_path / "thesis"
    cache.write_bytes(content)
    with pytest.raises(ValueError, match="thesis is not a cache of graphs, or damaged"):
        load_graphs(folder, cache=cache)
    assert cache.read_bytes() == content


def test_a_cache_with_pickled_objects_is_refused(tmp_path):
    folder, cache = write_connectivity(tmp_path / "graphs", house("a")), tmp_path / "c.npz"
    np.savez(cache, header=np.array([{"format": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a cache of graphs"):
        load_graphs(folder, cache=cache)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = write_connectivity(tmp_path / "graphs", house("a"))

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        load_graphs(folder, cache=tmp_path / "c.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


# ---- the real graphs, where they are


def test_the_real_graphs_have_their_known_sizes():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    loaded = load_graphs(SHARED)
    assert len(loaded) == 90
    assert sum(len(graph.viewpoint_ids) for graph in loaded.values()) == 10_800
    assert sum(int(graph.included.sum()) for graph in loaded.values()) == 10_567
    assert sum(int(graph.included[graph.edges].all(axis=1).sum()) for graph in loaded.values()) == 42_936
    lonely = {
        scan_id: count
        for scan_id, graph in loaded.items()
        if (count := sum(graph.included[i] and not near for i, near in enumerate(graph.neighbours)))
    }
    assert lonely == {
        "B6ByNegPMKs": 3,
        **dict.fromkeys(["JF19kD82Mey", "PuKPg4mmafe", "q9vSo1VnCiC", "r1Q1Z4BcV1o", "SN83YJsR3w2"], 1),
    }


def test_navigation_needs_numpy_and_scipy_alone():
    code = "import sys, vln.simulator, vln.candidates, vln.metrics, vln.submission; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert not {"torch", "accelerate", "tyro", "fq"} & set(done.stdout.split())
