"""Lessons of HANNA for the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vln.agent_folder import trunk_of
from vln.agent_hanna import (
    HannaEpisode,
    HannaNoise,
    Helpers,
    episodes_of_tasks,
    rollout_hanna,
    route_split,
    submission_rows,
)
from vln.checks import warn_of_findings
from vln.data import read_hanna, read_hanna_routes
from vln.hanna import Assistant
from vln.items import HannaRoute, HannaTask
from vln.metrics import HannaResult, HannaScores, mean_scores, score_hanna
from vln.navgraph import load_graphs
from vln.pretrain_data import Stream, open_features
from vln.submission import Prediction
from vln.surroundings import Surroundings
from vln.train_config import ItemsConfig, Training
from vln.train_setup import open_words, sources
from vln.train_walk import Lesson, Scored
from vln.walks import PanoramaFeatures
from vln.world import World


class HannaSplit(NamedTuple):
    """Tasks and their episodes."""

    items: tuple[HannaTask, ...]
    episodes: tuple[HannaEpisode, ...]


class HannaOpened(NamedTuple):
    """Data of a run."""

    world: World
    features: PanoramaFeatures
    tokenizer: Any
    routes: tuple[HannaRoute, ...]
    train: HannaSplit
    val: dict[str, HannaSplit]


def open_hanna(config: ItemsConfig) -> HannaOpened:
    """Everything that a configuration of HANNA names.

    Raises:
        FileNotFoundError: a file is missing; the text names it.
        ValueError: a file is damaged, or things do not fit together.
    """
    tasks = {config.split: read_hanna(config.data, config.split)}
    for split in config.val_splits:
        try:
            tasks[split] = read_hanna(config.data, split)
        except FileNotFoundError:
            continue  # a folder may have no such split
    scans = {task.scan_id for rows in tasks.values() for task in rows}
    routes = tuple(route for route in read_hanna_routes(config.data) if route.scan_id in scans)
    tokenizer = open_words(config)
    world = World(load_graphs(config.data, sorted(scans)))
    warn_of_findings(tasks, world.graphs)
    splits = {name: HannaSplit(tuple(rows), tuple(episodes_of_tasks(rows))) for name, rows in tasks.items()}
    val = {name: split for name, split in splits.items() if name in config.val_splits}
    features = open_features(sources(config), world)
    return HannaOpened(world, features, tokenizer, routes, splits[config.split], val)


class HannaTeaching:
    """HANNA, as the training loop wants it; see `vln.train_walk.WalkTask`.

    Args:
        config: of the run.
        opened: data.
        accelerator: of this process.
        agent: to train.
    """

    def __init__(
        self, config: Training, opened: HannaOpened, accelerator: Accelerator, agent: nn.Module
    ) -> None:
        self._config, self._opened, self._accelerator = config, opened, accelerator
        surroundings = Surroundings.of(
            trunk_of(agent).config, opened.world, opened.features, device=accelerator.device
        )
        assistant = Assistant(opened.routes, opened.world.graphs)
        self._helpers = {
            split: Helpers(
                surroundings, assistant, opened.tokenizer, config.items.max_tokens,
                route_split(split, opened.routes),
            )
            for split in (config.items.split, *opened.val)
        }  # fmt: skip
        self._stream = Stream(len(opened.train.episodes), config.run.seed)

    @property
    def size(self) -> str:
        """What there is to learn from, for the line on start."""
        train, routes = self._opened.train, self._opened.routes
        scans = {task.scan_id for task in train.items}
        return f"{len(train.episodes)} episodes of {len(scans)} scans, {len(routes)} routes"

    @property
    def splits(self) -> list[str]:
        """Held-out splits."""
        return list(self._opened.val)

    @property
    def score_names(self) -> list[str]:
        """What an evaluation gives."""
        fields = set(HannaScores._fields[1:]) - {"num_targets", "num_targets_reached"}
        return sorted(fields | {"target_success_rate"})

    def lessons(self, agent: Any, step: int) -> Iterator[Lesson]:
        """Terms of the loss of a step, of one rollout."""
        learn, accelerator = self._config.learn, self._accelerator
        rows = self._stream.rows(step * learn.batch_size, learn.batch_size)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            found = rollout_hanna(
                agent, self._helpers[self._config.items.split],
                [self._opened.train.episodes[row] for row in mine], max_steps=learn.max_steps,
                noise=HannaNoise(self._config.run.seed, step), curiosity_weight=learn.curiosity_weight,
                learn=True,
            )  # fmt: skip
        requests = float(sum(sum(result.asked) for result in found.results))
        figures = {
            "nav_loss": (float(found.nav.detach().sum()), float(found.num_nav.sum())),
            "ask_loss": (float(found.ask.detach().sum()), float(found.num_ask.sum())),
            "requests": (requests, float(len(mine))),
        }
        # Both terms at once: they share the walk.
        yield Lesson(
            torch.cat([found.nav, found.ask]), torch.cat([found.num_nav, found.num_ask]),
            learn.imitation_weight, figures,
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(self, agent: Any, split: str) -> Scored:
        """Walk a split and score it; the same on all processes."""
        run, accelerator = self._config.run, self._accelerator
        episodes = self._opened.val[split].episodes
        chosen = _evenly(episodes, run.eval_items)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            found = walk_and_ask(
                agent, self._helpers[split], [episodes[row] for row in mine], batch_size=run.eval_batch_size,
                max_steps=run.eval_max_steps,
            )  # fmt: skip
        place = {episode.name: number for number, episode in enumerate(episodes)}
        rows = sorted(gather_object(found), key=lambda row: place[str(row[0].item_id)])
        return score(self._opened.val[split], rows, self._opened.world.graphs)


def _evenly(episodes: Sequence[HannaEpisode], count: int) -> np.ndarray:
    """About so many episodes, 0 for all, of tasks spread over the split: tasks are scored whole."""
    if not 0 < count < len(episodes):
        return np.arange(len(episodes))
    number = dict[Any, int]()
    task_of = [number.setdefault((row.task.scan_id, row.task.path_id), len(number)) for row in episodes]
    some = max(1, round(count * len(number) / len(episodes)))
    return np.flatnonzero(np.isin(task_of, np.linspace(0, len(number), some, endpoint=False).astype(int)))


def walk_and_ask(
    agent: Any, helpers: Helpers, episodes: list[HannaEpisode], *, batch_size: int, max_steps: int
) -> list[tuple[Prediction, HannaResult]]:
    """What an agent does without draws, in eval mode."""
    agent.eval()
    found: list[tuple[Prediction, HannaResult]] = []
    for first in range(0, len(episodes), batch_size):
        walked = rollout_hanna(agent, helpers, episodes[first : first + batch_size], max_steps=max_steps)
        found += zip(walked.predictions, walked.results, strict=True)
    return found


def score(split: HannaSplit, rows: list[tuple[Prediction, HannaResult]], graphs: Mapping[str, Any]) -> Scored:
    """Scores of what was done, for the instructions that were walked."""
    results = {str(row.item_id): result for row, result in rows}
    tasks = []
    for task in split.items:
        kept = [place for place, name in enumerate(task.instruction_ids) if name in results]
        if len(kept) == len(task.instructions):
            tasks.append(task)
    names = {name for task in tasks for name in task.instruction_ids}
    scores = score_hanna(results, tasks, graphs)
    told = [row for row, _ in rows if row.item_id in names]
    success = dict(zip(scores[0], (scores.success > 0).tolist(), strict=True))
    return Scored(
        mean_scores(scores),
        told,
        dict(success),
        submission_rows(told, [results[str(row.item_id)] for row in told]),
    )
