"""Is the embedded world honest? ``python -m benchmarks.probes`` trains bilinear probes on it and says.

A world is honest if one finds the way in houses never seen before by matching words to views, and not without
the words, nor without the views. Every seed makes a world of its own and a probe of each kind; the habits of
walkers that neither read nor look are set beside pure chance. Writes ``probes.json`` and ``probes.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.navigation import SHARED_DATA
from benchmarks.probe_models import (
    Items,
    Probe,
    Sight,
    action_hits,
    exchanged,
    read_items,
    rollout,
    teacher_rows,
    train_probe,
)
from fq.provenance import provenance
from fq.run import write_atomically
from vln.candidates import PanoramicSimulator
from vln.data import R2RItem
from vln.house_language import vocabulary
from vln.houses import EDGE_SHARES, Houses, HousesConfig, generate, house_features
from vln.navgraph import NavGraph, load_graphs
from vln.world import World

UNSEEN = "val_unseen"
PROBES = {"full": {}, "deaf": {"deaf": True}, "blind": {"blind": True}}
MARGINS = {"deaf": 20.0, "blind": 15.0}
"""Points by which the full probe must be ahead, each by more than three standard deviations."""
EXCHANGED_MARGIN, HABIT_RATIO = 3.0, 1.2
SUCCESS_RADIUS, LONGEST_WALK, REPEATS = 3.0, 10, 40
PERCENTILES = (5, 25, 50, 75, 95, 99)


def r2r_items(rows: Sequence[Mapping[str, Any]]) -> list[R2RItem]:
    """Generated rows as items."""
    return [
        R2RItem(row["path_id"], row["scan"], row["heading"], tuple(row["path"]), tuple(row["instructions"]),
                row["distance"])
        for row in rows
    ]  # fmt: skip


def successes(items: Items, ends: np.ndarray, world: World) -> np.ndarray:
    """Whether walks end within 3 m of the goals, bool ``[N]``."""
    tables = {name: graph.distances for name, graph in world.graphs.items()}
    first = [world.starts[name] for name in items.scan_ids]
    rows = zip(items.scan_ids, ends - first, items.goals - first, strict=True)
    return np.array([tables[name][end, goal] < SUCCESS_RADIUS for name, end, goal in rows])


def probe_world(world: Houses, *, seed: int, epochs: int) -> dict[str, Any]:
    """Train a probe of each kind and score it in unseen houses.

    Returns:
        Percent: for each probe, and for the full one with exchanged instructions, ``accuracy`` of teacher
        actions without STOP and ``sr`` of greedy walks; of the full one in seen houses, too.
    """
    graphs, words = World(world.graphs), vocabulary()
    sight = Sight.of(np.stack([views for _, views in house_features(world)]))
    items = {split: read_items(r2r_items(rows), graphs, words) for split, rows in world.r2r.items()}
    steps = {split: teacher_rows(items[split], graphs) for split in items}

    def score(probe: Probe, told: Items, split: str) -> dict[str, float]:
        hits = action_hits(probe, told, steps[split], sight)
        reached = successes(told, rollout(probe, told, sight, graphs), graphs)
        return {"accuracy": 100 * float(hits.mean()), "sr": 100 * float(reached.mean())}

    result: dict[str, Any] = {"num_items": len(items[UNSEEN].starts)}
    for name, options in PROBES.items():
        probe = Probe(len(words), sight.views.shape[2], **options)
        train_probe(probe, items["train"], steps["train"], sight, epochs=epochs, seed=seed)
        result[name] = score(probe, items[UNSEEN], UNSEEN)
        if name == "full":
            result["exchanged"] = score(probe, exchanged(items[UNSEEN]), UNSEEN)
            result["full, seen houses"] = score(probe, items["val_seen"], "val_seen")
    return result


def habits(items: Items, world: World, *, seed: int) -> dict[str, Any]:
    """What walkers get that neither read nor look, and chance, in percent.

    Args:
        items: one instruction a path.
        world: with the items' scans.
        seed: of walks at random.
    """
    size = len(items.starts)
    simulator = PanoramicSimulator(world, batch_size=size, order="follower")
    now = simulator.new_episodes(items.scan_ids, items.starts, items.headings)
    longest = max(map(len, items.paths))
    paths = np.array([path + path[-1:] * (longest - len(path)) for path in items.paths])
    taken, by_chance = [], []
    for step in range(longest - 1):
        walks = paths[:, step + 1] != paths[:, step]
        taken.append((now.candidate[:, 1] == paths[:, step + 1])[walks])
        by_chance.append(1 / (now.num_choices[walks] - 1))
        right = (now.candidate[:, 1:] == paths[:, step + 1, None]).argmax(axis=1) + 1
        now = simulator.choose(np.where(walks, right, now.stop))
    success: dict[str, float] = {}
    now = simulator.new_episodes(items.scan_ids, items.starts, items.headings)
    dead_end = np.full(size, -1)
    for step in range(1, LONGEST_WALK + 1):
        now = simulator.choose(np.ones(size, dtype=np.int64))
        if step < 9:
            success[f"straight on {step} steps"] = _percent(successes(items, now.viewpoint, world))
        closed = (now.num_choices == 2) | (step == LONGEST_WALK)
        dead_end = np.where((dead_end < 0) & closed, now.viewpoint, dead_end)
    success["straight on to a dead end"] = _percent(successes(items, dead_end, world))
    for name in ("random", "random, but stop at dead ends", "random, never straight back"):
        success[name] = _percent(_random_walks(items, world, name, seed))
    action = {"candidate 1": _percent(np.concatenate(taken)), "random": _percent(np.concatenate(by_chance))}
    return {"action accuracy": action, "sr": success}


def _percent(values: np.ndarray) -> float:
    return 100 * float(values.mean())


def _random_walks(items: Items, world: World, name: str, seed: int) -> np.ndarray:
    """Success of walks at random, ``[REPEATS, N]``; as many steps as paths have."""
    random = np.random.default_rng(seed)
    size, shares = len(items.starts), EDGE_SHARES["r2r"]
    simulator = PanoramicSimulator(world, batch_size=size, order="follower")
    reached = []
    for _ in range(REPEATS):
        steps = random.choice(list(shares), p=list(shares.values()), size=size)
        now = simulator.new_episodes(items.scan_ids, items.starts, items.headings)
        stopped, before = np.zeros(size, dtype=bool), np.full(size, -1)
        for step in range(max(shares)):
            ways = now.num_choices - 1
            choice = 1 + random.integers(ways)
            if "back" in name:
                back = (now.candidate == before[:, None]) & (now.point_id >= 0)
                order = np.where((now.point_id >= 0) & ~back, random.uniform(size=back.shape), -1)
                choice = np.where(ways > 1, order.argmax(axis=1), 1)
            if "dead" in name and step:
                stopped |= ways == 1
            before = now.viewpoint
            now = simulator.choose(np.where(stopped | (step >= steps), now.stop, choice))
        reached.append(successes(items, now.viewpoint, world))
    return np.stack(reached)


def graph_statistics(graphs: Mapping[str, NavGraph]) -> dict[str, list[float]]:
    """Size, degree, edge length and slope of graphs: mean, percentiles of :data:`PERCENTILES`, maximum."""
    sizes, degrees, lengths, slopes = [], [], [], []
    for graph in graphs.values():
        edges = graph.edges[graph.included[graph.edges].all(axis=1)]
        way = graph.positions[edges[:, 1]] - graph.positions[edges[:, 0]]
        sizes.append(np.array([graph.included.sum()]))
        degrees.append(np.bincount(edges[:, 0], minlength=len(graph.included))[graph.included])
        lengths.append(np.linalg.norm(way, axis=1))
        slopes.append(np.degrees(np.abs(np.arctan2(way[:, 2], np.hypot(way[:, 0], way[:, 1])))))
    named = {
        "viewpoints a scan": sizes,
        "degree": degrees,
        "edge, m": lengths,
        "slope of an edge, degrees": slopes,
    }
    result = {}
    for name, parts in named.items():
        values = np.concatenate(parts)
        row = [values.mean(), *np.percentile(values, PERCENTILES), values.max()]
        result[name] = [round(float(value), 2) for value in row]
    return result


def split_statistics(world: Houses) -> dict[str, dict[str, Any]]:
    """Where the paths of each split end: shares of numbers of edges, and of the goals' degrees."""
    neighbours = {name: graph.neighbours for name, graph in world.graphs.items()}
    result = {}
    for split, rows in world.r2r.items():
        degrees = [
            min(7, len(neighbours[row["scan"]][world.graphs[row["scan"]].index(row["path"][-1])]))
            for row in rows
        ]
        result[split] = {
            "paths": len(rows),
            "length_m": round(float(np.mean([row["distance"] for row in rows])), 2),
            "edges": _shares([len(row["path"]) - 1 for row in rows]),
            "goal degree, 7 or more together": _shares(degrees),
        }
    return result


def _shares(values: Sequence[int]) -> dict[str, float]:
    return {str(value): round(count / len(values), 3) for value, count in sorted(Counter(values).items())}


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every claim with its figures and whether it holds."""
    found = []
    for measure in ("accuracy", "sr"):
        scores = {
            name: np.array([run[name][measure] for run in result["probes"].values()])
            for name in (*PROBES, "exchanged")
        }
        for other, margin in MARGINS.items():
            ahead = scores["full"] - scores[other]
            spread = float(ahead.std(ddof=1)) if len(ahead) > 1 else float("nan")
            found.append({
                "claim": f"{measure}: full {margin:.0f} points and three deviations ahead of {other}",
                "value": round(float(ahead.mean()), 2), "deviation": round(spread, 2),
                "holds": bool(ahead.mean() >= margin and ahead.mean() > 3 * spread),
            })  # fmt: skip
        over = float((scores["exchanged"] - scores["deaf"]).mean())
        found.append({
            "claim": f"{measure}: exchanged at most {EXCHANGED_MARGIN:.0f} points above deaf",
            "value": round(over, 2), "holds": over <= EXCHANGED_MARGIN,
        })  # fmt: skip
    for measure, key in (("action accuracy", "candidate 1"), ("sr", "straight"), ("sr", "dead")):
        ratios = [
            value / run[measure]["random"]
            for run in result["habits"].values()
            for name, value in run[measure].items()
            if key in name and "back" not in name
        ]
        found.append({
            "claim": f"{measure}: habits with '{key}' at most {HABIT_RATIO} times random",
            "value": round(max(ratios), 2), "holds": max(ratios) <= HABIT_RATIO,
        })  # fmt: skip
    return found


def run(
    config: HousesConfig, *, seeds: Sequence[int], epochs: int, data: Path | None, log: Any = print
) -> dict[str, Any]:
    """Everything, for worlds of several seeds.

    Args:
        config: of the worlds; its seed is replaced.
        seeds: each makes a world and trains probes.
        epochs: passes over the training steps.
        data: folder with the real graphs to compare with.
        log: told what was found on the way.
    """
    result: dict[str, Any] = {"config": vars(config) | {"seed": list(seeds)}, "epochs": epochs, "probes": {},
                              "habits": {}, "seconds": {}}  # fmt: skip
    for seed in seeds:
        started = time.process_time()
        world = generate(HousesConfig(**(vars(config) | {"seed": seed})))
        generated = time.process_time()
        result["probes"][str(seed)] = probe_world(world, seed=seed, epochs=epochs)
        once = [item._replace(instructions=item.instructions[:1]) for item in r2r_items(world.r2r[UNSEEN])]
        graphs = World(world.graphs)
        result["habits"][str(seed)] = habits(read_items(once, graphs, vocabulary()), graphs, seed=seed)
        result["seconds"][str(seed)] = {"generate": round(generated - started, 1),
                                        "probe": round(time.process_time() - generated, 1)}  # fmt: skip
        log(json.dumps({seed: result["probes"][str(seed)]}))
        if seed == seeds[0]:
            result["graphs"] = {"houses": graph_statistics(world.graphs)}
            result["splits"] = split_statistics(world)
    if data is not None:
        result["graphs"]["real scans"] = graph_statistics(load_graphs(data))
    return result | {"verdicts": verdicts(result), "provenance": provenance(seeds[0])}


def report(result: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    seeds = list(result["probes"])
    lines = ["# Is the embedded world honest?", "", "`python -m benchmarks.probes`", "",
             f"Bilinear probes in houses never seen before, {result['probes'][seeds[0]]['num_items']} "
             f"instructions, {result['epochs']} epochs; percent, worlds of seeds {', '.join(seeds)}.", "",
             "| probe | measure | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |",
             "|---|---|" + "---|" * (len(seeds) + 1)]  # fmt: skip
    for name in (*PROBES, "exchanged", "full, seen houses"):
        for measure, title in (("accuracy", "teacher actions, no STOP"), ("sr", "SR, greedy walks")):
            values = [result["probes"][seed][name][measure] for seed in seeds]
            cells = " | ".join(f"{value:.1f}" for value in [*values, float(np.mean(values))])
            lines.append(f"| {name} | {title} | {cells} |")
    lines += ["", "Blind: features zero, angles kept. Deaf: one constant instruction. Exchanged: the full",
              "probe is given the instruction of another goal from the same start.", "",
              "| habit | measure | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
              "|---|---|" + "---|" * len(seeds)]  # fmt: skip
    first = result["habits"][seeds[0]]
    for measure in first:
        for name in first[measure]:
            cells = " | ".join(f"{result['habits'][seed][measure][name]:.1f}" for seed in seeds)
            lines.append(f"| {name} | {measure} | {cells} |")
    lines += ["", "| claim | value | deviation over seeds | holds |", "|---|---|---|---|"]
    lines += [
        f"| {row['claim']} | {row['value']} | {row.get('deviation', '')} | {('NO', 'yes')[row['holds']]} |"
        for row in result["verdicts"]
    ]
    header = " | ".join(f"{point} %" for point in PERCENTILES)
    lines += ["", f"| graphs | of | mean | {header} | max |", "|---|---|" + "---|" * (len(PERCENTILES) + 2)]
    for name in result["graphs"]["houses"]:
        for source, table in result["graphs"].items():
            lines.append(f"| {name} | {source} | " + " | ".join(map(str, table[name])) + " |")
    lines += ["", "| split | paths | mean length, m | edges | goal degree |", "|---|---|---|---|---|"]
    for split, entry in result["splits"].items():
        lines.append(f"| {split} | " + " | ".join(str(value) for value in entry.values()) + " |")
    return "\n".join([*lines, "", f"Seconds of one core: {json.dumps(result['seconds'])}", ""])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write.

    Args:
        arguments: instead of ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each makes a world")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training steps")
    defaults = HousesConfig()
    for name in ("num_seen", "num_unseen", "train_groups", "val_groups", "feature_size"):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(defaults, name), help="of the worlds")
    parser.add_argument("--noise", type=float, default=defaults.noise, help="of the features")
    parser.add_argument("--data", type=Path, help="folder with the real graphs, to compare with")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    options = vars(parser.parse_args(arguments))
    seeds, epochs, out, data = (options.pop(name) for name in ("seeds", "epochs", "out", "data"))
    if epochs < 1:
        parser.error(f"--epochs is {epochs}: give at least 1")
    try:
        config = HousesConfig(**options)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    data = data or (SHARED_DATA if SHARED_DATA.is_dir() else None)
    result = run(config, seeds=seeds, epochs=epochs, data=data)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "probes.json", json.dumps(result, indent=1) + "\n")
    write_atomically(out / "probes.md", report(result))
    print(report(result))
    print(f"written to {out / 'probes.json'} and probes.md")


if __name__ == "__main__":
    main()
