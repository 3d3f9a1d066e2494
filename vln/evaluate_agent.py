"""Agents of a run walk a split; what they did goes into a submission."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm

from fq.run import write_atomically
from vln.agent_data import Split, make_split, read_items
from vln.agent_folder import TOKENIZER, Loaded, load_agent, trunk_of
from vln.agent_hanna import Helpers, episodes_of_tasks, route_split, submission_rows
from vln.data import read_hanna, read_hanna_routes
from vln.evaluate_config import EvaluateConfig
from vln.evaluate_provenance import write_provenance
from vln.hanna import Assistant
from vln.navgraph import load_graphs
from vln.pretrain_config import TripletsConfig
from vln.pretrain_data import open_features, open_tokenizer
from vln.search import search_prediction, speaker_rank, state_factored_search
from vln.speaker_folder import TrainedSpeaker, load_speaker
from vln.submission import Prediction, write_submission
from vln.surroundings import Surroundings
from vln.train_hanna import walk_and_ask
from vln.train_walk import walk_greedily
from vln.world import World

_MAX_STEPS = {"r2r": 35, "ndh": 40, "hanna": 50}
"""Of the originals, for agents that name none."""


def walk(config: EvaluateConfig) -> Path:
    """Walk a split in the setting that is asked for, and write the submission and its provenance.

    Args:
        config: whose ``submission`` is a run, or the folder of an agent.

    Returns:
        The submission.

    Raises:
        FileNotFoundError: agent, speaker, items, graphs, features or tokeniser are missing.
        ValueError: a file is damaged, the features are of another width than those of agent or speaker, or
            the setting is not for such an agent.
    """
    run, options, setting = Path(config.submission), config.agent, config.setting
    loaded = load_agent(run)
    if loaded.task != "r2r" and (setting.name != "greedy" or config.dataset):
        wanted = config.dataset if setting.name == "greedy" else setting.name
        raise ValueError(f"{run} holds an agent for {loaded.task}: {wanted} is for those of R2R")
    if loaded.task == "hanna" and (options.avoid_loops or options.turns):
        raise ValueError(f"{run} holds an agent for hanna: --avoid-loops and --turns are for R2R and NDH")
    dataset: Any = config.dataset or loaded.dataset
    ending = f".{dataset}" if dataset in ("r4r", "rxr") else ""
    ending += "" if setting.name == "greedy" else f".{setting.name}"
    target = Path(options.submission_out or run / f"{config.split}{ending}.json")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.absolute().parent} does not exist: make it first")
    if loaded.task == "hanna":
        write_atomically(target, json.dumps(_walk_and_ask(config, loaded)) + "\n")
    else:
        write_submission(target, _walk(config, loaded, dataset, target))
    write_provenance(target, setting.name, {"dataset": dataset, "config": asdict(config)})
    return target


def longest_walk(config: EvaluateConfig, loaded: Loaded) -> int:
    """Steps after which an agent is stopped."""
    return config.agent.max_steps or loaded.max_steps or _MAX_STEPS[loaded.task]


def exploration_folder(submission: Path) -> Path:
    """Where the pre-exploration for a submission is kept."""
    return submission.with_name(f"{submission.name}.exploration")


def _walk(config: EvaluateConfig, loaded: Loaded, dataset: Any, target: Path) -> list[Prediction]:
    """Rows of an R2R or NDH submission."""
    options, setting = config.agent, config.setting
    items = read_items(config.items or config.data, dataset, None if config.items else config.split)
    scans = sorted({item.scan_id for item in items})
    world = World(load_graphs(config.graphs or config.data, scans))
    surroundings = open_surroundings(config, loaded, world)
    tokenizer = open_words(config, loaded)
    split = make_split(config.split, items, world, tokenizer, loaded.reading)
    if setting.explore:
        from vln.evaluate_explore import explore  # which brings all of the training

        trained = open_speaker(config, surroundings)
        loaded = explore(config, loaded, surroundings, trained, tokenizer, exploration_folder(target))
    loaded.agent.to(surroundings.device)
    with torch.no_grad():
        if setting.search:
            return _search(config, loaded, surroundings, split)
        found = walk_greedily(
            loaded.agent, surroundings, split, np.arange(len(split.episodes.names)),
            batch_size=options.batch_size, max_steps=longest_walk(config, loaded),
            avoid_loops=options.avoid_loops, turns=options.turns,
        )  # fmt: skip
    return [row for _, row in sorted(found, key=lambda row: row[0])]


def _search(
    config: EvaluateConfig, loaded: Loaded, surroundings: Surroundings, split: Split
) -> list[Prediction]:
    """Rows of a search, each with all that was walked for it."""
    setting, told = config.setting, list[Prediction]()
    trained = open_speaker(config, surroundings) if setting.speaker else None
    texts = {
        name: text
        for item in split.items
        for name, text in zip(item.instruction_ids, item.instructions, strict=True)
    }
    for row in tqdm(range(len(split.episodes.names)), desc="search"):
        episode = split.episodes.rows(np.array([row]))
        names, heading = episode.names[0], float(episode.heading[0])
        rank = None
        if trained is not None:
            said = [texts[str(name)] for name in names]
            rank = speaker_rank(trained, said, surroundings, start_heading=heading)
        found = state_factored_search(
            loaded.agent, surroundings, episode, num_routes=setting.search,
            max_expansions=setting.max_expansions,
            max_steps=longest_walk(config, loaded), rank=rank,
            speaker_weight=0.5 if setting.speaker_weight is None else setting.speaker_weight,
        )  # fmt: skip
        told += [search_prediction(found, name, surroundings, start_heading=heading) for name in names]
    return told


def open_speaker(config: EvaluateConfig, surroundings: Surroundings) -> TrainedSpeaker:
    """The speaker of a setting, on the device of the surroundings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a released file, damaged, or was trained with features of another width.
    """
    source = config.setting.speaker
    if Path(source).is_file():
        raise ValueError(f"{source} is a file: make a folder of it first, python -m vln.convert speaker")
    trained = load_speaker(source)
    trained.require_width(surroundings.features.width, config.agent.features)
    trained.speaker.to(surroundings.device)
    return trained


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
        batch_size=config.agent.batch_size, max_steps=longest_walk(config, loaded),
    )  # fmt: skip
    return submission_rows([row for row, _ in found], [result for _, result in found])


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
