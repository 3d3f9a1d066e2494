"""Agents of a run walk a split; what they did goes into a submission."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fq.run import write_atomically
from vln.agent_data import make_split, read_items
from vln.agent_folder import TOKENIZER, Loaded, load_agent, trunk_of
from vln.agent_hanna import Helpers, episodes_of_tasks, route_split, submission_rows
from vln.data import read_hanna, read_hanna_routes
from vln.evaluate import EvaluateConfig
from vln.hanna import Assistant
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig
from vln.pretrain_data import open_features, open_tokenizer
from vln.submission import write_submission
from vln.surroundings import Surroundings
from vln.train_hanna import walk_and_ask
from vln.train_walk import walk_greedily
from vln.world import World

_MAX_STEPS = {"r2r": 35, "ndh": 40, "hanna": 50}


def walk(config: EvaluateConfig) -> Path:
    """Walk a split greedily and write the submission.

    Args:
        config: whose ``submission`` is a run, or the folder of an agent.

    Returns:
        The submission.

    Raises:
        FileNotFoundError: agent, items, graphs, features or tokeniser are missing.
        ValueError: a file is damaged, or the features are of another width than the agent's.
    """
    run, options = Path(config.submission), config.agent
    loaded = load_agent(run)
    target = Path(options.submission_out or run / f"{config.split}.json")
    if loaded.task == "hanna":
        write_atomically(target, json.dumps(_walk_and_ask(config, loaded)) + "\n")
        return target
    items = read_items(config.items or config.data, _dataset(loaded), None if config.items else config.split)
    scans = sorted({item.scan_id for item in items})
    world = World(load_graphs(config.graphs or config.data, scans))
    surroundings = open_surroundings(config, loaded, world)
    tokenizer = open_words(config, loaded)
    split = make_split(config.split, items, world, tokenizer, loaded.reading)
    with torch.no_grad():
        found = walk_greedily(
            loaded.agent.to(surroundings.device), surroundings, split, np.arange(len(split.episodes.names)),
            batch_size=options.batch_size, max_steps=options.max_steps or _MAX_STEPS[loaded.task],
            avoid_loops=options.avoid_loops, turns=options.turns,
        )  # fmt: skip
    write_submission(target, [row for _, row in sorted(found, key=lambda row: row[0])])
    return target


@torch.no_grad()
def _walk_and_ask(config: EvaluateConfig, loaded: Loaded) -> list[dict[str, Any]]:
    """Rows of a HANNA submission."""
    tasks = read_hanna(config.items or config.data, None if config.items else config.split)
    scans = {task.scan_id for task in tasks}
    world = World(load_graphs(config.graphs or config.data, sorted(scans)))
    routes = [route for route in read_hanna_routes(config.data) if route.scan_id in scans]
    surroundings = open_surroundings(config, loaded, world)
    helpers = Helpers(
        surroundings, Assistant(routes, world.graphs), open_words(config, loaded), loaded.reading.max_tokens,
        route_split(config.split, routes),
    )  # fmt: skip
    found = walk_and_ask(
        loaded.agent.to(surroundings.device), helpers, episodes_of_tasks(tasks),
        batch_size=config.agent.batch_size, max_steps=config.agent.max_steps or _MAX_STEPS["hanna"],
    )  # fmt: skip
    return submission_rows([row for row, _ in found], [result for _, result in found])


def _dataset(loaded: Loaded) -> Any:
    return "ndh" if loaded.task == "ndh" else "r2r"


def open_surroundings(config: EvaluateConfig, loaded: Loaded, world: World) -> Surroundings:
    """World and features in the form that an agent wants.

    Raises:
        FileNotFoundError: there is no such store.
        ValueError: the features are of another width.
    """
    features = open_features(_sources(config), world)
    if features.width != loaded.feature_size:
        raise ValueError(
            f"{config.agent.features} has features of width {features.width} but the agent of "
            f"{loaded.folder} was trained with {loaded.feature_size}: give those that it was trained with"
        )
    return Surroundings.of(trunk_of(loaded.agent).config, world, features, device=config.agent.device)


def open_words(config: EvaluateConfig, loaded: Loaded) -> Any:
    """The tokeniser that an agent was trained with.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has another number of words.
    """
    tokenizer = open_tokenizer(_sources(config, loaded))
    if len(tokenizer) != trunk_of(loaded.agent).config.vocab_size:
        raise ValueError(
            f"the tokeniser has {len(tokenizer)} words but the agent "
            f"{trunk_of(loaded.agent).config.vocab_size}: give that of its training"
        )
    return tokenizer


def _sources(config: EvaluateConfig, loaded: Loaded | None = None) -> TripletsConfig:
    own: Sequence[Path] = (
        [folder / TOKENIZER for folder in (loaded.folder, loaded.folder.parent)] if loaded else []
    )
    beside = next((str(folder.absolute()) for folder in own if folder.is_dir()), TOKENIZER)
    return TripletsConfig(
        data=config.data, features=config.agent.features, tokenizer=config.agent.tokenizer or beside
    )
