"""The embedded world: houses with items and features, made here, with nothing licensed in them.

``python -m vln.houses --out FOLDER`` writes graphs, R2R, NDH and HANNA items, view features and a tokeniser
in the formats of the real data, so that every other command runs on the folder as on the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vln.house_features import NUM_CONCEPTS, view_features
from vln.house_items import Place, Row, hanna_routes, hanna_rows, ndh_rows, r2r_rows
from vln.house_language import Speaker, word_tokenizer
from vln.house_plans import COLOURS, NOUNS, House, build_house
from vln.house_tasks import Group, Walks, draw_groups, edge_pattern
from vln.navgraph import NavGraph

FORMAT = 1
SPLITS = ("train", "val_seen", "val_unseen")
HANNA_SPLITS = {"train": "train", "val_seen": "val_seen_env", "val_unseen": "val_unseen_all"}
EDGE_SHARES = {
    "r2r": {3: 0.01, 4: 0.35, 5: 0.30, 6: 0.34},
    "ndh": {3: 0.2, 4: 0.4, 5: 0.4},
    "hanna": {5: 0.3, 6: 0.4, 7: 0.3},
}
"""Numbers of edges of the paths, R2R's as in its unseen validation split."""
_LONGEST_M = {"r2r": 20.0, "ndh": 20.0, "hanna": 25.0}


@dataclass(frozen=True, kw_only=True)
class HousesConfig:
    """Make houses and write them as a data folder.

    Raises:
        ValueError: a number is outside its range.
    """

    seed: int = 0
    """Of everything; the same seed and numbers give the same bytes."""
    num_seen: int = 40
    """Houses to train on; ``val_seen`` is in them, too."""
    num_unseen: int = 12
    """Houses of ``val_unseen``, never seen before."""
    train_groups: int = 800
    """Groups of R2R paths with one start pose in ``train``; NDH and HANNA get half as many."""
    val_groups: int = 144
    """Groups in each of the other splits, for each task; a small world with many takes what there is,
    balanced or not."""
    group_size: int = 4
    """Paths of a group, at least 3: of one start pose, equally many edges, and goals far from each other."""
    num_instructions: int = 3
    """Of each R2R path."""
    feature_size: int = 64
    """Width of a view's features."""
    noise: float = 0.05
    """Of the features; a thing within reach in the middle of a view counts 1."""

    def __post_init__(self) -> None:
        bounds = {
            "seed": 0,
            "num_seen": 1,
            "num_unseen": 1,
            "train_groups": 2,
            "val_groups": 1,
            "group_size": 3,
            "num_instructions": 1,
            "feature_size": NUM_CONCEPTS,
            "noise": 0,
        }
        for name, least in bounds.items():
            value = getattr(self, name)
            if not value >= least or value == float("inf"):
                raise ValueError(f"{name} is {value}: give at least {least}")


@dataclass(frozen=True)
class Houses:
    """A generated world; rows are those of the published files."""

    config: HousesConfig
    seen: tuple[House, ...]
    unseen: tuple[House, ...]
    r2r: dict[str, list[Row]] = field(default_factory=dict)
    """Split to rows."""
    ndh: dict[str, list[Row]] = field(default_factory=dict)
    hanna: dict[str, list[Row]] = field(default_factory=dict)
    routes: dict[str, list[Row]] = field(default_factory=dict)
    """Scan id to HANNA's routes."""

    @property
    def houses(self) -> tuple[House, ...]:
        """All, the seen ones first."""
        return self.seen + self.unseen

    @property
    def graphs(self) -> dict[str, NavGraph]:
        """Scan ids to graphs."""
        return {house.scan_id: house.graph for house in self.houses}


def generate(config: HousesConfig) -> Houses:
    """Make a world.

    Args:
        config: its numbers.

    Raises:
        ValueError: the houses are too few or too small for so many groups.

    Example:
        >>> world = generate(HousesConfig(num_seen=2, num_unseen=1, train_groups=2, val_groups=1))
        >>> [len(world.r2r[split]) for split in SPLITS]
        [8, 4, 4]
    """
    seen = _build(config, 0, config.num_seen)
    unseen = _build(config, 1, config.num_unseen)
    world = Houses(config, seen, unseen)
    most = max(max(shares) for shares in EDGE_SHARES.values())
    places = {
        house.scan_id: Place(house, Walks(house, EDGE_SHARES["r2r"], most_edges=most), Speaker(house))
        for house in world.houses
    }
    for number, task in enumerate(EDGE_SHARES):
        used: set[tuple[str, int, int]] = set()
        first_id = 1
        for part, split in enumerate(SPLITS):
            random = np.random.default_rng([config.seed, 2, number, part])
            homes = world.unseen if split == "val_unseen" else world.seen
            chosen = {house.scan_id: places[house.scan_id] for house in homes}
            rows: list[Row] = []
            for group in _groups(config, task, split, chosen, used, random):
                rows += _rows(config, task, chosen[group.scan_id], group, random, first_id + len(rows))
            first_id += len(rows)
            getattr(world, task)[split] = rows
        if task == "hanna":
            random = np.random.default_rng([config.seed, 3])
            inside = {house.scan_id for house in seen}
            for name, place in places.items():
                splits = ("train", "val_seen_env") if name in inside else ("val_unseen_all",)
                world.routes[name] = hanna_routes(place, splits, random)
    return world


def _build(config: HousesConfig, kind: int, count: int) -> tuple[House, ...]:
    """Houses; each has its own seed, so that more of them leave the first ones as they are."""
    name = ("seen", "unseen")[kind]
    return tuple(
        build_house(f"{name}{number:03d}", np.random.default_rng([config.seed, kind, number]))
        for number in range(count)
    )


def _groups(
    config: HousesConfig,
    task: str,
    split: str,
    places: Mapping[str, Place],
    used: set[tuple[str, int, int]],
    random: np.random.Generator,
) -> Iterator[Group]:
    shared = 1 if task == "r2r" else 2
    count = config.train_groups // shared if split == "train" else config.val_groups
    return draw_groups(
        {name: place.walks for name, place in places.items()},
        edge_pattern(EDGE_SHARES[task], count, random),
        random,
        group_size=config.group_size,
        longest_m=_LONGEST_M[task],
        taken=used,
        longest_before=7 if task == "ndh" else 0,
    )


def _rows(
    config: HousesConfig, task: str, place: Place, group: Group, random: np.random.Generator, first_id: int
) -> list[Row]:
    if task == "r2r":
        count = config.num_instructions
        return list(r2r_rows(place, group, random, first_id=first_id, num_instructions=count))
    make = ndh_rows if task == "ndh" else hanna_rows
    return list(make(place, group, random, first_id=first_id))


def house_features(world: Houses) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Scan and viewpoint id with the features of its 36 views, float32 ``[36, D]``, house by house."""
    config = world.config
    for kind, houses in enumerate((world.seen, world.unseen)):
        for number, house in enumerate(houses):
            random = np.random.default_rng([config.seed, 4, kind, number])
            features = view_features(house, random, feature_size=config.feature_size, noise=config.noise)
            for viewpoint_id, views in zip(house.graph.viewpoint_ids, features, strict=True):
                yield (house.scan_id, viewpoint_id), views


def connectivity(graph: NavGraph) -> list[Row]:
    """A graph as its connectivity file holds it."""
    size = len(graph.viewpoint_ids)
    flags = np.zeros((size, size), dtype=bool)
    flags[graph.edges[:, 0], graph.edges[:, 1]] = True
    rows = []
    for number, viewpoint_id in enumerate(graph.viewpoint_ids):
        pose = np.eye(4)
        pose[:3, 3] = graph.positions[number]
        rows.append(
            {
                "image_id": viewpoint_id,
                "pose": pose.ravel().tolist(),
                "included": bool(graph.included[number]),
                "visible": flags[number].tolist(),
                "unobstructed": flags[number].tolist(),
                "height": 1.5,
            }
        )
    return rows


def floor_plan(house: House) -> dict[str, Any]:
    """Rooms, doorways and things of a house for maps, in metres."""
    return {
        "scan": house.scan_id,
        "rooms": [room._asdict() for room in house.rooms],
        "doorways": [doorway._asdict() for doorway in house.doorways],
        "landmarks": [
            {"noun": NOUNS[noun], "colour": COLOURS[colour], "position": position}
            for noun, colour, position in zip(
                house.nouns.tolist(), house.colours.tolist(), house.positions.tolist(), strict=True
            )
            if colour >= 0
        ],
    }


def require_free(folder: str | Path) -> Path:
    """The folder, if it can be made.

    Raises:
        FileExistsError: there is something at ``folder``.
        FileNotFoundError: its parent is missing.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: delete it or name another folder")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder.absolute().parent} does not exist: make it first")
    return folder


def write(world: Houses, folder: str | Path) -> Path:
    """Write a world as a data folder, whole or not at all.

    ``connectivity/``, ``r2r/``, ``ndh/`` and ``hanna/`` are as in the real data, ``features`` is a
    :class:`vln.features.FeatureStore`, ``tokenizer/`` one of transformers; ``plans.json`` has what a map of
    the houses needs, ``config.json`` what makes them again.

    Args:
        world: from :func:`generate`.
        folder: must not exist yet; its parent must.

    Returns:
        The folder.

    Raises:
        FileExistsError: there is something at ``folder``.
        FileNotFoundError: its parent is missing.
    """
    folder = require_free(folder)
    # Imported here: whoever only generates needs neither the store nor its libraries.
    from vln.features import FeatureStore

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        for path, content in documents(world).items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(content, encoding="utf-8")
        word_tokenizer().save_pretrained(str(partial / "tokenizer"))
        FeatureStore.write(partial / "features", house_features(world), dtype="float16")
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def documents(world: Houses) -> dict[str, str]:
    """Text files of a world's data folder, by their names in it."""
    rows: dict[str, Any] = {
        f"connectivity/{name}_connectivity.json": connectivity(graph) for name, graph in world.graphs.items()
    }
    for split in SPLITS:
        rows[f"r2r/R2R_{split}.json"] = world.r2r[split]
        rows[f"ndh/{split}.json"] = world.ndh[split]
        rows[f"hanna/hanna_{HANNA_SPLITS[split]}.json"] = world.hanna[split]
    rows["hanna/routes.json"] = world.routes
    rows["plans.json"] = [floor_plan(house) for house in world.houses]
    files = {name: json.dumps(content) + "\n" for name, content in rows.items()}
    files["connectivity/scans.txt"] = "\n".join(world.graphs) + "\n"
    versions = {"format": FORMAT, "numpy": np.__version__}
    seen, unseen = ([house.scan_id for house in houses] for houses in (world.seen, world.unseen))
    origin = {"config": asdict(world.config), "made_by": "python -m vln.houses", "versions": versions,
              "seen": seen, "unseen": unseen}  # fmt: skip
    return files | {"config.json": json.dumps(origin, indent=1) + "\n"}


@dataclass(frozen=True, kw_only=True)
class HousesCommand:
    """Make houses with R2R, NDH and HANNA items and view features, and write them as a data folder."""

    out: str
    """Folder to make; it must not exist yet."""
    world: tyro.conf.OmitArgPrefixes[HousesConfig] = field(default_factory=HousesConfig)


def main(arguments: list[str] | None = None) -> None:
    """Make a world, write it and say what is in it.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    command = tyro.cli(HousesCommand, args=sys.argv[1:] if arguments is None else arguments,
                       prog="python -m vln.houses")  # fmt: skip
    try:
        require_free(command.out)
        world = generate(command.world)
        folder = write(world, command.out)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    counts = ", ".join(f"{split} {len(world.r2r[split])}" for split in SPLITS)
    viewpoints = sum(len(house.room_of) for house in world.houses)
    print(
        f"{len(world.houses)} houses with {viewpoints} viewpoints, R2R paths: {counts}; written to {folder}"
    )


if __name__ == "__main__":
    main()
