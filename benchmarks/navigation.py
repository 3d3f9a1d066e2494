"""Speed of the navigation simulator, of loading graphs, scoring and reading features, and agents without a
model beside published figures: ``python -m benchmarks.navigation``.

Process time of one thread, median of rounds in which all figures take turns with a matrix product, whose time
tells how fast the machine was. Without the real graphs everything runs on random ones; only the baselines are
left out then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import navigation_agents as agents
from benchmarks.parity import SHARED_DATA
from fq.provenance import provenance
from fq.run import write_atomically
from vln.candidates import Order, PanoramicSimulator
from vln.data import R2RItem, read_r2r
from vln.geometry import ELEVATION_STEP, HEADING_STEP, Camera
from vln.metrics import mean_scores, score_r2r
from vln.navgraph import NavGraph, find_connectivity, load_graphs
from vln.simulator import Simulator
from vln.sources import Document, parse_json, read_document, read_documents
from vln.store import FeatureStore
from vln.submission import parse_submission
from vln.world import World

BATCHES = (1, 8, 64, 256)
EPISODE_STEPS = 10
SCORED = 10_000
PRODUCT_SIZE = 512
NUM_RANDOM_SCANS = 90
STORED, STORED_WIDTH, STORED_BATCH = 1000, 2048, 64
"""Viewpoints of the feature store, numbers a view, and panoramas read at once."""

ORIGINAL = {"random": {1: 116e3, 8: 123e3, 64: 93e3, 256: 74e3}, "panoramic": {8: 19e3, 64: 34e3}}
"""Steps a second of the original simulator on a machine of this kind: every field of the state read, and the
panoramic pattern with its cache warm (without it, 1.4 thousand)."""

TARGETS = {"random": {8: 0.49e6, 64: 1.1e6, 256: 2.2e6}, "panoramic": {64: 34e3}}
"""Steps a second to reach."""


PUBLISHED_RANDOM = {"val_seen": {"nav_error": 9.45, "success": 0.159},
                    "val_unseen": {"nav_error": 9.23, "success": 0.163}}  # fmt: skip
"""The random agent of Anderson et al. (2018)."""
PUBLISHED_AGENT = {"length": 10.30, "nav_error": 3.32, "oracle_success": 0.726, "success": 0.661,
                   "spl": 0.631, "ndtw": 0.747, "sdtw": 0.600, "cls": 0.732}  # fmt: skip
"""Prevalent's agent with three instructions on val_seen, its published trajectories by the original
evaluators."""

PANORAMIC: dict[str, Order] = {"panoramic": "envdrop", "panoramic, follower order": "follower"}
"""Patterns and the order of their choices."""


class Walk(NamedTuple):
    """One episode of a batch, recorded, so that only the simulator is timed when it is walked again."""

    viewpoints: np.ndarray
    headings: np.ndarray
    actions: list[tuple[np.ndarray, ...]]


def record_random(simulator: Simulator, episodes: int, rng: np.random.Generator) -> list[Walk]:
    """Random moves and turns from random places.

    Args:
        simulator: takes the actions.
        episodes: batches of them.
        rng: of places and actions.
    """
    walks, scan_ids, batch_size = [], list(simulator.world.graphs), simulator.batch_size
    for _ in range(episodes):
        state = simulator.new_random_episodes(
            [scan_ids[i] for i in rng.integers(len(scan_ids), size=batch_size)]
        )
        walk = Walk(state.viewpoint.astype(np.int64), state.heading, [])
        for _ in range(EPISODE_STEPS):
            index = (rng.random(batch_size) * state.num_navigable).astype(np.int64)
            turn, tilt = (rng.integers(-1, 2, batch_size) * step for step in (HEADING_STEP, ELEVATION_STEP))
            walk.actions.append((index, turn, tilt))
            state = simulator.step(*walk.actions[-1])
        walks.append(walk)
    return walks


def record_panoramic(agent: PanoramicSimulator, episodes: int, rng: np.random.Generator) -> list[Walk]:
    """Random choices of neighbours from random places.

    Args:
        agent: takes the choices.
        episodes: batches of them.
        rng: of places and choices.
    """
    walks, scan_ids, batch_size = [], list(agent.world.graphs), agent.batch_size
    for _ in range(episodes):
        now = agent.new_random_episodes([scan_ids[i] for i in rng.integers(len(scan_ids), size=batch_size)])
        walk = Walk(now.viewpoint, now.heading, [])
        for _ in range(EPISODE_STEPS):
            choice = (rng.random(batch_size) * now.num_choices).astype(np.int64)
            walk.actions.append((choice,))
            now = agent.choose(choice)
        walks.append(walk)
    return walks


def measure_steps(world: World, *, rounds: int, seed: int) -> dict[str, Any]:
    """Steps a second of both patterns at every batch size.

    Args:
        world: scans.
        rounds: of which the median is taken.
        seed: of places and actions.

    Returns:
        ``{"product_ms", "random": {batch: {"steps_per_second", "steps_per_product", "quartiles"}},
        "panoramic": ..., "panoramic, follower order": ...}``.
    """
    rng = np.random.default_rng(seed)
    jobs: dict[tuple[str, int], Callable[[], float]] = {}
    for batch in BATCHES:
        episodes = max(4, 256 // batch)
        simulator = Simulator(world, batch_size=batch, seed=seed)
        walks = record_random(simulator, episodes, rng)
        jobs["random", batch] = _job(simulator.place, simulator.step, walks)
        for name, order in PANORAMIC.items():
            agent = PanoramicSimulator(world, batch_size=batch, order=order, seed=seed)
            jobs[name, batch] = _job(agent.place, agent.choose, record_panoramic(agent, episodes, rng))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    products = []
    for _ in range(rounds):
        products.append(_product_time(rng))
        for key, job in jobs.items():
            times[key].append(job())
    product = statistics.median(products)
    result: dict[str, Any] = {
        "product": f"float32 {PRODUCT_SIZE} x {PRODUCT_SIZE}",
        "product_ms": product * 1e3,
    }
    for (pattern, batch), spent in times.items():
        low, high = statistics.quantiles(spent, n=4)[::2]
        result.setdefault(pattern, {})[str(batch)] = {
            "steps_per_second": batch / statistics.median(spent),
            "quartiles": [batch / high, batch / low],
            "steps_per_product": batch / statistics.median(spent) * product,
        }
    return result


def _job(place: Callable[..., Any], step: Callable[..., Any], walks: list[Walk]) -> Callable[[], float]:
    """Walk all again and return the process time of one step."""

    def again() -> float:
        spent = 0.0
        for walk in walks:
            place(walk.viewpoints, walk.headings)
            begin = time.process_time()
            for action in walk.actions:
                step(*action)
            spent += time.process_time() - begin
        return spent / (len(walks) * EPISODE_STEPS)

    return again


def _product_time(rng: np.random.Generator) -> float:
    left, right = torch.from_numpy(rng.standard_normal((2, PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32))
    left @ right
    begin = time.process_time()
    for _ in range(10):
        left @ right
    return (time.process_time() - begin) / 10


def measure_loading(source: Path, *, rounds: int) -> dict[str, Any]:
    """Process time of loading all graphs, from their files and from a cache, and of building tables.

    Args:
        source: folder or archive of connectivity files.
        rounds: of which the median is taken.

    Returns:
        Seconds, by what was done.
    """
    with tempfile.TemporaryDirectory() as folder:
        cache, files = Path(folder) / "graphs.npz", Path(folder) / "connectivity"
        files.mkdir()
        for name, document in read_documents(source, lambda name: name.endswith((".json", ".txt"))).items():
            (files / name).write_bytes(document.content)
        graphs = load_graphs(files, cache=cache)

        def shortest_paths() -> None:
            for graph in load_graphs(files, cache=cache).values():
                graph.distances  # noqa: B018

        steps: dict[str, Callable[[], Any]] = {
            "load_json_s": lambda: load_graphs(files),
            "load_as_found_s": lambda: load_graphs(source),
            "load_cache_s": lambda: load_graphs(files, cache=cache),
            "load_cache_and_shortest_paths_s": shortest_paths,
            "view_table_s": lambda: World(graphs).views(Camera()),
            "candidate_table_s": lambda: World(graphs).candidates(Camera()),
        }
        result: dict[str, Any] = {name: _median(step, rounds) for name, step in steps.items()}
        result |= {"num_scans": len(graphs), "cache_bytes": cache.stat().st_size}
    result["view_table_bytes"] = World(graphs).views(Camera()).records.nbytes
    return result


def _median(step: Callable[[], Any], rounds: int, *, clock: Callable[[], float] = time.process_time) -> float:
    times = []
    for _ in range(rounds):
        begin = clock()
        step()
        times.append(clock() - begin)
    return statistics.median(times)


def measure_scoring(
    graphs: Mapping[str, NavGraph], items: list[R2RItem], *, rounds: int, seed: int
) -> dict[str, Any]:
    """Process time of scoring trajectories, all R2R scores with nDTW and CLS.

    Args:
        graphs: of the items' scans.
        items: as many trajectories are scored as they have instructions.
        rounds: of which the median is taken.
        seed: of the walks.

    Returns:
        ``{"num_trajectories", "mean_viewpoints", "score_s"}``.
    """
    world = World(graphs)
    walks = agents.random_walk(world, items, seed=seed)
    paths = {walk.item_id: [pose.viewpoint_id for pose in walk.trajectory] for walk in walks}
    for graph in graphs.values():
        graph.distances  # noqa: B018  (computed once; it is among the loading times)
    return {
        "num_trajectories": len(paths),
        "mean_viewpoints": float(np.mean([len(path) for path in paths.values()])),
        "score_s": _median(lambda: score_r2r(paths, items, graphs), rounds),  # type: ignore[arg-type]
    }


def measure_store(*, viewpoints: int, width: int, rounds: int, seed: int) -> dict[str, Any]:
    """Wall time of reading random panoramas of a float16 store that the system has in its file cache.

    Args:
        viewpoints: in the store.
        width: numbers a view.
        rounds: of which the median is taken.
        seed: of the features and of what is read.

    Returns:
        ``{"viewpoints", "width", "store_bytes", "open_s", "gather_s", "panoramas_per_second",
        "bytes_per_second", "verify_s"}``; one gather reads :data:`STORED_BATCH` panoramas.
    """
    rng = np.random.default_rng(seed)
    names = [("scan", f"{number:032x}") for number in range(viewpoints)]
    with tempfile.TemporaryDirectory() as folder:
        features = rng.random((36, width), dtype=np.float32)
        store = FeatureStore.write(Path(folder) / "store", ((name, features) for name in names))
        opening = _median(lambda: FeatureStore.open(store.path), rounds, clock=time.perf_counter)
        asked = rng.integers(viewpoints, size=(64, STORED_BATCH))
        chosen = [[names[row][1] for row in batch] for batch in asked]

        def gather() -> None:
            for viewpoint_ids in chosen:
                store.gather(["scan"] * STORED_BATCH, viewpoint_ids)

        reading = _median(gather, rounds, clock=time.perf_counter) / len(chosen)
        return {
            "viewpoints": viewpoints,
            "width": width,
            "store_bytes": (store.path / "features.npy").stat().st_size,
            "open_s": opening,
            "gather_s": reading,
            "panoramas_per_second": STORED_BATCH / reading,
            "bytes_per_second": STORED_BATCH * 36 * width * 2 / reading,
            "verify_s": _median(store.verify, min(rounds, 3), clock=time.perf_counter),
        }


def score_published(stored: Path, graphs: Mapping[str, NavGraph], data: Path) -> dict[str, float]:
    """Mean scores of trajectories that are stored with the original evaluators' results.

    Args:
        stored: gzipped JSON with ``split`` and ``predictions``.
        graphs: of all scans.
        data: folder with the items.
    """
    document = parse_json(read_document(stored))
    content = json.dumps(document["predictions"]).encode()
    paths = parse_submission(Document(str(stored), content)).paths
    return mean_scores(score_r2r(paths, read_r2r(data, document["split"]), graphs))


def measure_baselines(graphs: Mapping[str, NavGraph], data: Path, *, seed: int) -> dict[str, Any]:
    """Scores of agents without a model on the splits of R2R that have goals.

    Args:
        graphs: of all scans.
        data: folder with the items.
        seed: of the random agent.

    Returns:
        ``{split: {"num_instructions", agent: mean scores}}``.
    """
    result: dict[str, Any] = {}
    for split in ("train", "val_seen", "val_unseen"):
        items = read_r2r(data, split)
        world = World([graphs[scan_id] for scan_id in dict.fromkeys(item.scan_id for item in items)])
        runs = {
            "shortest": agents.shortest_path(world, items),
            "random": agents.random_walk(world, items, seed=seed),
            "standing": agents.standing(items),
        }
        result[split] = {"num_instructions": sum(len(item.instructions) for item in items)}
        for name, walks in runs.items():
            paths = {str(walk.item_id): [pose.viewpoint_id for pose in walk.trajectory] for walk in walks}
            result[split][name] = mean_scores(score_r2r(paths, items, world.graphs))
    return result


def random_graphs(num_scans: int, *, seed: int) -> dict[str, NavGraph]:
    """Connected random graphs of about the real ones' size and degree.

    Args:
        num_scans: how many.
        seed: of all of them.
    """
    rng = np.random.default_rng(seed)
    graphs = {}
    for number in range(num_scans):
        size = int(rng.integers(20, 220))
        positions = rng.uniform(0, 1.6 * np.sqrt(size), (size, 3)) * [1.0, 1.0, 0.05]
        away = np.linalg.norm(positions[:, None] - positions[None], axis=2)
        linked = away < 2.4
        for here in range(1, size):  # each to the nearest before it: one component
            linked[here, np.argmin(away[here, :here])] = True
        linked |= linked.T
        np.fill_diagonal(linked, False)
        scan_id = f"random{number:02d}"
        ids = tuple(f"{scan_id}_{viewpoint:03d}" for viewpoint in range(size))
        graphs[scan_id] = NavGraph(scan_id, ids, positions, np.ones(size, dtype=bool), np.argwhere(linked))
    return graphs


def random_items(graphs: Mapping[str, NavGraph], number: int, *, seed: int) -> list[R2RItem]:
    """Shortest paths between random viewpoints, with one instruction each.

    Args:
        graphs: connected ones.
        number: of items.
        seed: of the ends.
    """
    rng, listed = np.random.default_rng(seed), list(graphs.values())
    items = []
    for path_id in range(number):
        graph = listed[int(rng.integers(len(listed)))]
        start, goal = rng.choice(np.flatnonzero(graph.included), 2, replace=False)
        path = graph.shortest_path(graph.viewpoint_ids[start], graph.viewpoint_ids[goal])[:8]
        items.append(R2RItem(path_id, graph.scan_id, float(rng.uniform(0, 6.28)), tuple(path), ("",), 0.0))
    return items


def run(data: Path | None, *, rounds: int, seed: int, published: Path | None = None) -> dict[str, Any]:
    """All measurements.

    Args:
        data: folder with graphs and items; ``None`` takes random graphs.
        published: stored trajectories of the published agent, on the items of ``data``.
        rounds: of which medians are taken.
        seed: of everything random.

    Returns:
        The figures, ready for JSON.
    """
    result: dict[str, Any] = {"rounds": rounds, "clock": "process time", "threads": torch.get_num_threads()}
    if data is None:
        graphs = random_graphs(NUM_RANDOM_SCANS, seed=seed)
        items = random_items(graphs, SCORED, seed=seed)
        result["graphs"] = "random"
    else:
        source = find_connectivity(data)
        graphs = load_graphs(source)
        items = _first_instructions(read_r2r(data, "train"), SCORED)
        result |= {
            "graphs": f"{len(graphs)} scans of {source.name}",
            "loading": measure_loading(source, rounds=rounds),
        }
    result["steps"] = measure_steps(World(graphs), rounds=rounds, seed=seed)
    result["scoring"] = measure_scoring(graphs, items, rounds=rounds, seed=seed)
    result["store"] = measure_store(viewpoints=STORED, width=STORED_WIDTH, rounds=rounds, seed=seed)
    if data is not None:
        result["baselines"] = measure_baselines(graphs, data, seed=seed)
        if published is not None:
            result["published_agent"] = score_published(published, graphs, data)
    return result | {"provenance": provenance(seed)}


def _first_instructions(items: list[R2RItem], number: int) -> list[R2RItem]:
    """The first items, with no more than that number of instructions in all."""
    taken: list[R2RItem] = []
    for item in items:
        left = number - sum(len(other.instructions) for other in taken)
        if left > 0:
            taken.append(item._replace(instructions=item.instructions[:left]))
    return taken


def table(result: Mapping[str, Any]) -> str:
    """The figures as text."""
    steps = result["steps"]
    lines = [f"matrix product, {steps['product']}: {steps['product_ms']:.2f} ms; steps a second:"]
    for pattern in ("random", *PANORAMIC):
        for batch, entry in steps[pattern].items():
            rate, original = entry["steps_per_second"], ORIGINAL.get(pattern, {}).get(int(batch))
            target = TARGETS.get(pattern, {}).get(int(batch))
            text = f"{pattern:>26}, batch {batch:>3}: {rate / 1e3:8.0f} k"
            text += f", {rate / original:5.1f} times the original" if original else ""
            lines.append(text + (f", {rate / target:5.2f} of the target" if target else ""))
    for name, value in result.get("loading", {}).items():
        lines.append(f"{name:>26}: {value:,.3f}" if name.endswith("_s") else f"{name:>26}: {value:,}")
    scoring = result["scoring"]
    lines.append(
        f"{'score_s':>26}: {scoring['score_s']:.3f} for {scoring['num_trajectories']:,} trajectories, "
        "nDTW and CLS among the scores"
    )
    store = result["store"]
    lines.append(
        f"{'features':>26}: {store['panoramas_per_second'] / 1e3:.1f} k panoramas a second of width "
        f"{store['width']} in float16 ({store['bytes_per_second'] / 1e9:.1f} GB/s), batch {STORED_BATCH}"
    )
    for split, entries in result.get("baselines", {}).items():
        for agent in ("shortest", "random", "standing"):
            scores = entries[agent]
            lines.append(
                f"{split:>12} {agent:>13}: SR {100 * scores['success']:.1f}, SPL {100 * scores['spl']:.1f}, "
                f"NE {scores['nav_error']:.2f} m, nDTW {100 * scores['ndtw']:.1f}"
                + (_beside(PUBLISHED_RANDOM.get(split, {})) if agent == "random" else "")
            )
    if "published_agent" in result:
        ours = {name: result["published_agent"][name] for name in PUBLISHED_AGENT}
        lines.append(f"{'val_seen':>12} {'Prevalent':>13}:{_named(ours)}{_beside(PUBLISHED_AGENT)}")
    return "\n".join(lines)


def _named(scores: Mapping[str, float]) -> str:
    """Scores in a line, shares in percent."""
    parts = (
        f" {name} {value:.2f} m" if name in ("length", "nav_error") else f" {name} {100 * value:.1f}"
        for name, value in scores.items()
    )
    return ",".join(parts)


def _beside(published: Mapping[str, float]) -> str:
    return f" (published:{_named(published)})" if published else ""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        arguments: instead of ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.navigation", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with connectivity and R2R; random graphs if there is none"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of which medians are taken; at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of places, actions and the random agent")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/navigation.json"), help="JSON to write"
    )
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: quartiles need at least 2")
    data = options.data or (SHARED_DATA if SHARED_DATA.is_dir() else None)
    torch.set_num_threads(1)
    stored = SHARED_DATA.parents[1] / "golden" / "vln" / "r2r_val_seen_agent.json.gz"
    published = stored if stored.is_file() else None
    result = run(data, rounds=options.rounds, seed=options.seed, published=published)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
