"""Parity of navigation with stored results, made here by plain code, and its benchmark."""

import gzip
import json
import math
import shutil
from pathlib import Path

import networkx
import numpy as np
import pytest
from navigation_cases import RIGHT, UP, OneAgent, house, write_connectivity

from benchmarks import navigation, navigation_agents, parity
from benchmarks.parity_navgraph import ReferenceRandom
from vln.data import NDHItem, R2RItem, hanna_task
from vln.geometry import Camera
from vln.metrics import HannaResult, mean_scores, score_hanna, score_ndh, score_r2r
from vln.submission import find_faults, read_submission, write_submission
from vln.world import World

SHARED = Path(__file__).parents[2] / "shared" / "golden"
HOUSE = house()
GRAPHS = {"house": HOUSE}
CONFIGS = [
    {"id": 0, "discretized": 1, "restricted": 1, "batch": 1, "width": 640, "height": 480, "vfov": math.pi / 3,
     "elevation_limits": [-0.94, 0.94]},
    {"id": 1, "discretized": 0, "restricted": 0, "batch": 2, "width": 640, "height": 480, "vfov": math.pi / 3,
     "elevation_limits": [-0.5, 0.94]},
]  # fmt: skip
R2R = [
    {"path_id": 4, "scan": "house", "heading": 1.0, "path": ["house-0", "house-1", "house-2"],
     "distance": 4.0, "instructions": ["go"]},
    {"path_id": 9, "scan": "house", "heading": 0.0, "path": ["house-2", "house-4"], "distance": 2.0,
     "instructions": ["stop"]},
]  # fmt: skip


def run(capsys, *arguments):
    code = parity.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


# ---- stored results, made by plain code


def walks():
    rng = np.random.default_rng(0)
    rows, lists, episode = [], [], 0
    for config in CONFIGS:
        camera = Camera(
            restricted=bool(config["restricted"]), elevation_limits=tuple(config["elevation_limits"])
        )
        for _ in range(2):
            agents = [
                OneAgent(HOUSE, camera, discretized=bool(config["discretized"]))
                for _ in range(config["batch"])
            ]
            start = rng.uniform(-7, 7, (len(agents), 2))
            for agent, pose in zip(agents, start, strict=True):
                agent.begin(int(rng.integers(7)), *pose)
            for t in range(4):
                for number, agent in enumerate(agents):
                    seen = agent.locations()
                    action = (
                        int(rng.integers(len(seen))),
                        rng.choice([-RIGHT, 0, 3.0]),
                        rng.choice([-UP, 0, 0.1]),
                    )
                    lists.append(seen)
                    rows.append((config["id"], episode, number, t, 0, agent.viewpoint, agent.heading,
                                 agent.elevation, agent.view, t, *(action if t < 3 else (-1, 0.0, 0.0)),
                                 *start[number]))  # fmt: skip
                    agent.act(*action)
            episode += 1
    names = ("config episode row t scan ix heading elevation view step act_index act_heading act_elevation "
             "in_heading in_elevation").split()  # fmt: skip
    arrays = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    arrays["nav_ptr"] = np.cumsum([0, *map(len, lists)])
    columns = zip(*(entry for seen in lists for entry in seen), strict=True)
    listed = ("nav_ix", "nav_rel_heading", "nav_rel_elevation", "nav_rel_distance")
    arrays |= {name: np.array(column) for name, column in zip(listed, columns, strict=True)}
    return arrays | {"meta": np.array(json.dumps({"scans": ["house"], "configs": CONFIGS}))}


def shortest_paths():
    flat = networkx.Graph()
    for a, b in HOUSE.edges[HOUSE.included[HOUSE.edges].all(axis=1)].tolist():
        flat.add_edge(a, b, weight=math.dist(HOUSE.positions[a], HOUSE.positions[b]))
    nodes = sorted(flat)
    ways = dict(networkx.all_pairs_dijkstra_path(flat))
    lengths = dict(networkx.all_pairs_dijkstra_path_length(flat))
    table = np.array([[lengths[a][b] for b in nodes] for a in nodes])
    facts = {"viewpoints": 9, "included": 8, "graph_nodes": 7, "edges": 7, "isolated_included": 1,
             "components": 1, "diameter_m": table.max(), "mean_distance_m": table.sum() / 42,
             "max_hops": max(len(way) for some in ways.values() for way in some.values()) - 1}  # fmt: skip
    return {
        "house_nodes": np.array(nodes),
        "house_dist": table,
        "house_next": np.array([[[*ways[a][b], b][1] for b in nodes] for a in nodes]),
        "house_hops": np.array([[len(ways[a][b]) - 1 for b in nodes] for a in nodes]),
        "meta": np.array(json.dumps({"scans": ["house"], "house": facts})),
    }


def snap():
    heading, elevation = np.array([0.0, 0.5 * RIGHT, -1e-17, 7.0]), np.array([0.0, 0.3, -2.0, UP / 2])
    return {
        "in_heading": heading, "in_elevation": elevation, "disc_view": np.array([12, 25, 0, 13]),
        "disc_heading": np.array([0, RIGHT, 0, RIGHT]), "disc_elevation": np.array([0.0, UP, -UP, 0.0]),
        "cont_heading": np.array([0.0, 0.5 * RIGHT, 2 * math.pi, math.fmod(7.0, 2 * math.pi)]),
        "cont_elevation": np.array([0.0, 0.3, -0.94, UP / 2]),
    }  # fmt: skip


def candidates():
    found, count = [], []
    for viewpoint in range(8):
        best = {}
        for view in range(36):
            agent = OneAgent(HOUSE, Camera()).begin(viewpoint, view % 12 * RIGHT, (view // 12 - 1) * UP)
            for slot, (other, heading, elevation, _) in enumerate(agent.locations()):
                away = math.hypot(heading, elevation)
                if slot and (other not in best or away < best[other][-1]):
                    best[other] = (
                        other,
                        view,
                        slot,
                        agent.heading + heading,
                        agent.elevation + elevation,
                        away,
                    )
        found += best.values()
        count.append(len(best))
    names = "ix point_id idx normalized_heading elevation distance".split()
    columns = zip(names, zip(*found, strict=True), strict=True)
    return {f"cand_{name}": np.array(column) for name, column in columns} | {
        "scan": np.zeros(8, int), "ix": np.arange(8), "cand_ptr": np.cumsum([0, *count]),
        "meta": np.array(json.dumps({"scans": ["house"], "width": 640, "height": 480, "vfov_degrees": 60})),
    }  # fmt: skip


def random_episodes():
    heading = 0.8264762952590881  # what the original's second generator gives first, whatever the seed
    number = 16807 * 5 - 1  # its first draw after seed 5
    first = number // ((2**31 - 3) // 9)
    return {"runs": [{"seed": 5, "scans": ["house"], "calls": [[{"ix": first, "heading": heading}]]}]}


def poses(*numbers):
    return [[f"house-{number}", 0.0, 0.0] for number in numbers]


def stored(scores, names, rename, key):
    """Items and summary as an evaluator's file has them."""
    fields = {name: getattr(scores, name) for name in names}
    items = {
        str(k): {n: float(v[row]) for n, v in fields.items()} for row, k in enumerate(getattr(scores, key))
    }
    means = mean_scores(scores)
    return {"items": items, "summary": {name: means[field] for name, field in rename.items()}}


def r2r():
    predictions = [
        {"instr_id": "4_0", "trajectory": poses(0, 3, 2)},
        {"instr_id": "9_0", "trajectory": poses(2, 2, 1)},
    ]
    items = [
        R2RItem(r["path_id"], "house", r["heading"], tuple(r["path"]), tuple(r["instructions"]), 1.0)
        for r in R2R
    ]
    paths = {row["instr_id"]: [pose[0] for pose in row["trajectory"]] for row in predictions}
    scores = score_r2r(paths, items, GRAPHS)
    rename = {"nav_error": "nav_error", "lengths": "length", "success_rate": "success"}
    document = stored(scores, ("nav_error", "spl", "ndtw", "cls"), rename, "instruction_ids")
    reference = {
        "length": float(scores.length.mean()),
        "oracle success_rate": float(scores.oracle_success.mean()),
    }
    return document | {"task": "r2r", "split": "val_seen", "predictions": predictions,
                       "summary_reference_toolkit": reference}  # fmt: skip


NDH = [
    {"inst_idx": 3, "scan": "house", "start_pano": {"pano": "house-0", "heading": 0.5, "elevation": 17.5},
     "target": "sofa", "end_panos": ["house-5", "house-6"], "planner_path": ["house-0", "house-1", "house-2"],
     "player_path": ["house-0", "house-3", "house-2", "house-4"]},
]  # fmt: skip


def ndh():
    row = NDH[0]
    item = NDHItem(
        3,
        "house",
        "house-0",
        0.5,
        *(tuple(row[name]) for name in ("end_panos", "planner_path", "player_path")),
    )
    rename = {"dist_to_end_reduction": "goal_progress", "sc_dr": "success_progress"}
    by_type = {}
    for path_type in ("planner_path", "trusted_path"):
        scores = score_ndh({3: ["house-0", "house-1", "house-2"]}, [item], GRAPHS, path_type=path_type)
        by_type[path_type] = stored(scores, ("nav_error", "goal_progress", "spl"), rename, "inst_idx")
    return {"task": "ndh", "split": "val_seen", "by_path_type": by_type,
            "predictions": [{"inst_idx": 3, "trajectory": poses(0, 1, 2)}]}  # fmt: skip


def hanna():
    task = {
        "path_id": "t",
        "scan": "house",
        "heading": 0.0,
        "paths": [["house-0", "house-1"]],
        "instructions": ["find"],
    }
    prediction = {"instr_id": "t_0", "agent_pose": poses(0, 3), "agent_ask": [0], "agent_nav": [1],
                  "target_viewpoints": [["house-1"], ["house-1"]]}  # fmt: skip
    result = HannaResult(("house-0", "house-3"), (0,), (1,), (("house-1",), ("house-1",)))
    scores = score_hanna({"t_0": result}, [hanna_task(task)], GRAPHS)
    query = {"scan": "house", "viewpoint": "house-0", "goal_viewpoints": ["house-1"], "can_request": False,
             "answer": None}  # fmt: skip
    document = stored(
        scores, ("error", "oracle_length"), {"target_success_rate": "target_success_rate"}, "instruction_ids"
    )
    return document | {"task": "hanna", "tasks": [task], "predictions": [prediction], "success_radius": 2.0,
                       "routes": {"house": []}, "anna_split": "train", "uncertain_threshold": 0.25,
                       "anna_queries": [query], "teacher_episodes": []}  # fmt: skip


def triplets():
    stop = ["house-1", -1]
    step = {"viewpoint": "house-1", "heading": 0.0, "elevation": 0.0, "view_index": 12, "teacher_action": 1}
    agent = OneAgent(HOUSE, Camera())
    listed = []
    for other in (2, 0):
        flat = HOUSE.positions[other] - HOUSE.positions[1]
        heading, elevation = math.atan2(flat[0], flat[1]), math.atan2(flat[2], math.hypot(*flat[:2]))
        view = agent.begin(1, heading, elevation).view
        listed.append([f"house-{other}", view, heading, elevation])
    first = step | {"candidates": [stop, *listed], "teacher_action_emd": listed[0][1:]}
    other = HOUSE.positions
    seen = []
    for number in (1, 3, 4):
        flat = other[number] - other[2]
        heading, elevation = math.atan2(flat[0], flat[1]), math.atan2(flat[2], math.hypot(*flat[:2]))
        seen.append([f"house-{number}", agent.begin(2, heading, elevation).view, heading, elevation])
    seen.sort(key=lambda entry: abs(entry[2]))
    last = {"viewpoint": "house-2", "heading": 0.0, "elevation": 0.0, "view_index": 12, "teacher_action": 0,
            "candidates": [["house-2", -1], *seen], "teacher_action_emd": [-1, 90, 90]}  # fmt: skip
    return {"split": "val_seen", "seed": 0,
            "episodes": [{"path_id": 7, "scan": "house", "heading": 0, "steps": [first, last]}]}  # fmt: skip


@pytest.fixture
def golden(tmp_path):
    """Two folders of stored results: navgraph with its graphs, vln with a data folder elsewhere."""
    write_connectivity(tmp_path / "golden" / "navgraph" / "connectivity", HOUSE)
    for make in (walks, shortest_paths, snap, candidates):
        np.savez(tmp_path / "golden" / "navgraph" / f"{make.__name__}.npz", **make())
    (tmp_path / "golden" / "navgraph" / "random_episodes.json").write_text(json.dumps(random_episodes()))
    write_connectivity(tmp_path / "data" / "connectivity", HOUSE)
    for group, name, rows in (("r2r", "R2R_val_seen", R2R), ("ndh", "val_seen", NDH)):
        (tmp_path / "data" / group).mkdir()
        extra = [R2R[0] | {"path_id": 7, "path": ["house-1", "house-2"], "instructions": []}] * (
            group == "r2r"
        )
        (tmp_path / "data" / group / f"{name}.json").write_text(json.dumps(rows + extra))
    (tmp_path / "golden" / "vln").mkdir()
    for make in (r2r, ndh, hanna, triplets):
        content = gzip.compress(json.dumps(make()).encode())
        (tmp_path / "golden" / "vln" / f"{make.__name__}.json.gz").write_bytes(content)
    return tmp_path / "golden"


def change(path, alter):
    """Rewrite a stored file after ``alter`` has worked on its arrays or its document."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = {key: archive[key].copy() for key in archive.files}
        alter(arrays)
        np.savez(path, **arrays)
        return
    zipped = path.suffix == ".gz"
    document = json.loads(gzip.decompress(path.read_bytes()) if zipped else path.read_bytes())
    alter(document)
    content = json.dumps(document).encode()
    path.write_bytes(gzip.compress(content) if zipped else content)


def add(arrays, key, index, amount):
    arrays[key].reshape(-1)[index] += amount


# ---- parity


def test_results_of_plain_code_are_reproduced(capsys, golden):
    code, lines, _ = run(capsys, golden, "--data", golden.parent / "data")
    assert code == 0, lines
    assert lines[-1] == "9 passed, 0 failed"
    [task] = [line for line in lines if "hanna" in line]
    assert task.startswith("pass") and "15 of 15 arrays" in task  # scores, answers and teachers


def test_the_originals_results_are_reproduced(capsys):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    code, lines, _ = run(capsys, SHARED / "navgraph", SHARED / "vln")
    assert (code, lines[-1]) == (0, "14 passed, 0 failed"), lines


@pytest.mark.parametrize(
    ("file", "alter", "named"),
    [
        ("navgraph/walks.npz", lambda a: add(a, "nav_ix", 3, 1), "nav_ix is off"),
        ("navgraph/walks.npz", lambda a: add(a, "nav_rel_heading", 5, 1e-6), "nav_rel_heading is off"),
        ("navgraph/walks.npz", lambda a: add(a, "heading", 2, 1e-12), "heading is off"),
        ("navgraph/walks.npz", lambda a: add(a, "step", 2, 1), "step is off"),
        ("navgraph/snap.npz", lambda a: add(a, "disc_view", 0, 1), "disc_view is off"),
        ("navgraph/snap.npz", lambda a: add(a, "cont_elevation", 2, 1e-9), "cont_elevation is off"),
        ("navgraph/candidates.npz", lambda a: add(a, "cand_idx", 1, 1), "cand_idx is off"),
        ("navgraph/candidates.npz", lambda a: add(a, "cand_normalized_heading", 1, 1e-5),
         "normalized_heading is off"),
        ("navgraph/shortest_paths.npz", lambda a: add(a, "house_dist", 1, 1e-7), "house_dist is off"),
        ("navgraph/shortest_paths.npz", lambda a: add(a, "house_next", 1, 1), "house_next is off"),
        ("navgraph/shortest_paths.npz", lambda a: a.update(
            meta=np.array(str(a["meta"]).replace('"edges": 7', '"edges": 8'))), "meta.house.edges is off"),
        ("navgraph/random_episodes.json", lambda d: d["runs"][0].update(seed=9_000_000), "ix is off"),
        ("vln/r2r.json.gz", lambda d: d["items"]["4_0"].update(cls=0.5), "items.cls is off"),
        ("vln/r2r.json.gz", lambda d: d["summary"].update(lengths=1.0), "summary.lengths is off"),
        ("vln/r2r.json.gz", lambda d: d["summary_reference_toolkit"].update(length=1.0),
         "summary_reference_toolkit.length"),
        ("vln/r2r.json.gz", lambda d: d["items"].pop("4_0"), "items: 1 are stored, 2 scored"),
        ("vln/ndh.json.gz", lambda d: d["by_path_type"]["planner_path"]["items"]["3"].update(spl=0.1),
         "planner_path.items.spl is off"),
        ("vln/hanna.json.gz", lambda d: d["summary"].update(target_success_rate=0),
         "target_success_rate is off"),
        ("vln/triplets.json.gz", lambda d: d["episodes"][0]["steps"][0].update(teacher_action=2),
         "teacher_action is off"),
        ("vln/triplets.json.gz", lambda d: d["episodes"][0]["steps"].pop(),
         "viewpoint has shape [1] but ours [2]"),
    ],
)  # fmt: skip
def test_an_altered_number_fails(capsys, golden, file, alter, named):
    change(golden / file, alter)
    code, lines, _ = run(capsys, golden / file, "--data", golden.parent / "data")
    assert code == 1
    assert lines[0].startswith("FAIL") and named in lines[0], lines


def test_graphs_are_looked_for_beside_the_file_and_then_in_the_data(capsys, golden, monkeypatch):
    monkeypatch.setattr(parity, "SHARED_DATA", golden.parent / "nothing")
    shutil.rmtree(golden / "navgraph" / "connectivity")
    code, lines, _ = run(capsys, golden / "navgraph" / "candidates.npz")
    assert code == 1
    assert "no connectivity files at" in lines[0] and str(golden / "navgraph") in lines[0]
    assert run(capsys, golden / "navgraph" / "candidates.npz", "--data", golden.parent / "data")[0] == 0
    (golden.parent / "data" / "connectivity" / "house_connectivity.json").unlink()
    write_connectivity(golden.parent / "data" / "connectivity", house("other"))
    code, lines, _ = run(capsys, golden / "vln" / "r2r.json.gz", "--data", golden.parent / "data")
    assert code == 1 and "scan house cannot be loaded" in lines[0]
    monkeypatch.setattr(parity, "SHARED_DATA", write_connectivity(golden.parent / "late", HOUSE))
    assert run(capsys, golden / "navgraph" / "candidates.npz", "--data", golden.parent / "data")[0] == 0
    (golden.parent / "data" / "r2r" / "R2R_val_seen.json").unlink()
    code, lines, _ = run(capsys, golden / "vln" / "r2r.json.gz", "--data", golden.parent / "data")
    assert code == 1 and "no R2R_val_seen.json: looked for" in lines[0]


def test_the_originals_random_headings_repeat():
    random = ReferenceRandom(1)
    expected = [
        0.8264762952590881,
        2.881783770664272,
        1.3757611416822468,
        4.265432813787707,
        5.872848672296979,
    ]
    assert [random.heading() for _ in range(5)] == expected
    assert ReferenceRandom(0).draw() == ReferenceRandom(1).draw() == ReferenceRandom(2**31).draw() == 16806


# ---- agents and the benchmark


def test_the_shortest_path_agent_is_perfect_and_its_walk_is_accepted(tmp_path):
    graphs = navigation.random_graphs(3, seed=1)
    items = navigation.random_items(graphs, 40, seed=2)
    world = World(graphs)
    walks_taken = navigation_agents.shortest_path(world, items)
    paths = {walk.item_id: [pose.viewpoint_id for pose in walk.trajectory] for walk in walks_taken}
    means = mean_scores(score_r2r(paths, items, graphs))
    assert means["success"] == 1 and means["nav_error"] == 0 and means["spl"] == pytest.approx(1, abs=1e-12)
    assert means["steps"] > np.mean([len(item.path) for item in items])  # turns are logged
    for agent in (
        walks_taken,
        navigation_agents.random_walk(world, items, seed=3),
        navigation_agents.standing(items),
    ):
        write_submission(tmp_path / "walk.json", agent)
        assert find_faults(read_submission(tmp_path / "walk.json"), items, graphs) == []


def test_the_random_agent_walks_straight_on_after_turning():
    graphs = navigation.random_graphs(2, seed=1)
    items = navigation.random_items(graphs, 60, seed=2)
    taken = navigation_agents.random_walk(World(graphs), items, seed=3)
    again = navigation_agents.random_walk(World(graphs), items, seed=3)
    assert taken == again != navigation_agents.random_walk(World(graphs), items, seed=4)
    moves = [sum(a[0] != b[0] for a, b in zip(w.trajectory, w.trajectory[1:], strict=False)) for w in taken]
    assert max(moves) == navigation_agents.FORWARD_STEPS and np.mean(moves) > 3
    first_moves = {
        next(
            (n for n, (a, b) in enumerate(zip(w.trajectory, w.trajectory[1:], strict=False)) if a[0] != b[0]),
            99,
        )
        for w in taken
    }
    assert len(first_moves) > 8  # as many headings


def test_the_benchmark_runs_on_random_graphs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(navigation, "SHARED_DATA", tmp_path / "nothing")
    monkeypatch.setattr(navigation, "BATCHES", (1, 8))
    monkeypatch.setattr(navigation, "SCORED", 50)
    monkeypatch.setattr(navigation, "NUM_RANDOM_SCANS", 3)
    monkeypatch.setattr(navigation, "STORED", 20)
    monkeypatch.setattr(navigation, "STORED_WIDTH", 8)
    navigation.main(["--rounds", "2", "--out", str(tmp_path / "n.json")])
    result = json.loads((tmp_path / "n.json").read_text())
    assert result["graphs"] == "random" and result["scoring"]["num_trajectories"] == 50
    for pattern in ("random", "panoramic", "panoramic, follower order"):
        assert list(result["steps"][pattern]) == ["1", "8"]
        assert all(entry["steps_per_second"] > 0 for entry in result["steps"][pattern].values())
    assert result["provenance"]["seed"] == 0 and "baselines" not in result
    printed = capsys.readouterr().out
    assert (
        result["store"]["store_bytes"] == 256 + 20 * 36 * 8 * 2 and "panoramas a second of width 8" in printed
    )
    assert "matrix product" in printed and "batch   8" in printed and "n.json" in printed


def test_the_benchmark_measures_loading_and_baselines_of_a_data_folder(golden, monkeypatch):
    data = golden.parent / "data"
    for split in ("train", "val_unseen"):
        shutil.copy(data / "r2r" / "R2R_val_seen.json", data / "r2r" / f"R2R_{split}.json")
    monkeypatch.setattr(navigation, "STORED", 20)
    result = navigation.run(data, rounds=2, seed=0, published=golden / "vln" / "r2r.json.gz")
    assert result["graphs"] == "1 scans of connectivity" and result["loading"]["num_scans"] == 1
    assert result["baselines"]["train"]["shortest"]["spl"] == pytest.approx(1)
    assert result["baselines"]["val_seen"]["standing"]["success"] == 0.5
    stored = json.loads(gzip.decompress((golden / "vln" / "r2r.json.gz").read_bytes()))
    assert result["published_agent"]["success"] == pytest.approx(stored["summary"]["success_rate"])
    table = navigation.table(result)
    assert "val_unseen        random:" in table and "(published: nav_error 9.23 m, success 16.3)" in table
    assert table.splitlines()[-1].startswith("    val_seen     Prevalent: length")
