"""Lessons of R2R and NDH for the training loop: walks to learn from, and walks that are scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vln.agent import Episodes, Noise, Rollout, predictions, rollout
from vln.agent_data import Split
from vln.agent_folder import trunk_of
from vln.metrics import NDHScores, R2RScores, mean_scores, score_ndh, score_r2r
from vln.pretrain_data import Stream
from vln.submission import Prediction
from vln.surroundings import Surroundings, environment_mask
from vln.train_config import Training
from vln.train_setup import Opened


class Lesson(NamedTuple):
    """One term of the loss: the sum of ``sums / counts``, both over all processes, times ``weight``."""

    sums: Tensor
    """``[K]``, with gradients."""
    counts: Tensor
    """float32 ``[K]``."""
    weight: float
    figures: dict[str, tuple[float, float]]
    """To report: sums and what they are divided by, of this process."""


class Scored(NamedTuple):
    """An evaluation."""

    scores: dict[str, float]
    predictions: list[Prediction]
    success: dict[Any, bool]
    """Of every prediction, by its id."""
    rows: list[dict[str, Any]] | None = None
    """Of the submission, where the task has more to say than a trajectory."""


class WalkTask:
    """R2R or NDH.

    Args:
        config: of the run.
        opened: data.
        accelerator: of this process.
        agent: to train.
    """

    def __init__(self, config: Training, opened: Opened, accelerator: Accelerator, agent: Any) -> None:
        self._config, self._opened, self._accelerator = config, opened, accelerator
        self._surroundings = Surroundings.of(
            trunk_of(agent).config, opened.world, opened.features, device=accelerator.device
        )
        self._feature_dropout: float = agent.config.feature_dropout
        seed = config.run.seed
        self._stream = Stream(len(opened.train.episodes.names), seed)
        self._num_more = len(opened.extra.episodes.names) if opened.extra else len(opened.teller or ())
        self._more = Stream(self._num_more, seed + 1) if self._num_more else None
        if opened.teller is not None:
            opened.teller.to(accelerator.device)

    @property
    def size(self) -> str:
        """What there is to learn from, for the line on start."""
        more = f" and {self._num_more} more" if self._num_more else ""
        scans = len(self._opened.train.scan_ids)
        return f"{len(self._opened.train.episodes.names)} episodes of {scans} scans{more}"

    def lessons(self, agent: Any, step: int) -> Iterator[Lesson]:
        """Terms of the loss of a step, one rollout at a time."""
        opened, learn = self._opened, self._config.learn
        episodes = opened.train.episodes.rows(self._share(self._stream, step))
        yield from self._lessons(agent, step, episodes, learn.imitation_weight, None)
        if self._more is None:
            return
        # One mask for all walks of the step: another environment (Tan et al., 2019, Sec. 3.4).
        keep = environment_mask(self._config.run.seed, step, opened.features.width, self._feature_dropout)
        rows = self._share(self._more, step)
        if opened.teller is not None:
            episodes = opened.teller.episodes(rows, keep)
        elif opened.extra is not None:
            episodes = opened.extra.episodes.rows(rows)
        yield from self._lessons(agent, step, episodes, learn.extra_weight, keep, prefix="extra_")

    def _share(self, stream: Stream, step: int) -> np.ndarray:
        """This process's rows of a step."""
        size, accelerator = self._config.learn.batch_size, self._accelerator
        return stream.rows(step * size, size)[accelerator.process_index :: accelerator.num_processes]

    def _lessons(
        self, agent: Any, step: int, episodes: Episodes, weight: float, keep: np.ndarray | None,
        *, prefix: str = "",
    ) -> Iterator[Lesson]:  # fmt: skip
        learn, accelerator = self._config.learn, self._accelerator
        options: dict[str, Any] = {
            "max_steps": learn.max_steps, "noise": Noise(self._config.run.seed, step), "keep": keep,
            "sample_share": learn.sample_share, "discount": learn.discount,
            "entropy_weight": learn.entropy_weight,
        }  # fmt: skip
        with accelerator.autocast():
            found = rollout(
                agent, self._surroundings, episodes, feedback=learn.feedback, imitate=True, **options
            )
        yield self._imitation(found, len(episodes.names), weight, prefix)
        if learn.reinforce:
            with accelerator.autocast():
                found = rollout(
                    agent, self._surroundings, episodes, feedback="sample", reinforce=True, **options
                )
            yield self._actor_critic(found, len(episodes.names), prefix)

    def _imitation(self, found: Rollout, num_rows: int, weight: float, prefix: str) -> Lesson:
        figures = {
            f"{prefix}imitation_loss": (float(found.imitation.detach().sum()), float(found.num_taught.sum()))
        }
        if self._config.items.task == "ndh":  # the mean over rows at each step, summed over steps
            return Lesson(found.imitation, found.num_taught, weight, figures)
        count = torch.tensor([float(num_rows)], device=found.imitation.device)
        return Lesson(found.imitation.sum()[None], count, weight, figures)

    def _actor_critic(self, found: Rollout, num_rows: int, prefix: str) -> Lesson:
        terms = found.actor_critic
        assert terms is not None
        counts = {"total": float(found.num_active), "batch": float(num_rows), "none": 0.0}
        count = torch.tensor([counts[self._config.learn.normalize]], device=terms.loss.device)
        figures = {
            f"{prefix}policy_loss": (float(terms.policy.detach()), float(found.num_active)),
            f"{prefix}value_loss": (float(terms.value.detach()), float(found.num_active)),
            f"{prefix}entropy": (float(terms.entropy.detach()) * found.num_active, float(found.num_active)),
            f"{prefix}reward": (found.reward, float(num_rows)),
        }
        return Lesson(terms.loss[None], count, 1.0, figures)

    @property
    def splits(self) -> list[str]:
        """Held-out splits."""
        return list(self._opened.val)

    @property
    def score_names(self) -> list[str]:
        """What an evaluation gives."""
        fields = (NDHScores if self._config.items.task == "ndh" else R2RScores)._fields
        return list(fields[1:])

    @torch.no_grad()
    def evaluate(self, agent: Any, split: str) -> Scored:
        """Walk a split and score it; the same on all processes."""
        run, accelerator = self._config.run, self._accelerator
        held_out = self._opened.val[split]
        chosen = subset(held_out, run.eval_items)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        with accelerator.autocast():
            found = walk_greedily(
                agent, self._surroundings, held_out, mine, batch_size=run.eval_batch_size,
                max_steps=run.eval_max_steps,
            )  # fmt: skip
        rows = sorted(gather_object(found), key=lambda row: row[0])
        told = [row for _, row in rows]
        items = self._config.items
        return score(
            held_out, told, items.task, self._opened.world.graphs, path_type=items.path_type,
            annotated_length=items.dataset == "r4r",
        )  # fmt: skip


def subset(split: Split, count: int) -> np.ndarray:
    """Rows to evaluate on, spread over the split; all of them for 0."""
    size = len(split.episodes.names)
    return (
        np.arange(size) if not 0 < count < size else np.linspace(0, size, count, endpoint=False).astype(int)
    )


def walk_greedily(
    agent: Any, surroundings: Surroundings, split: Split, rows: np.ndarray, *, batch_size: int,
    max_steps: int, avoid_loops: bool = False, turns: bool = False,
) -> list[tuple[int, Prediction]]:  # fmt: skip
    """Predictions of some episodes, each with the row it is of.

    Args:
        agent: put into eval mode.
        surroundings: of the agent's form.
        split: of the rows.
        rows: which episodes.
        batch_size: walked together; episodes of like length go together.
        max_steps: longest walk.
        avoid_loops: take no viewpoint again.
        turns: write the poses between viewpoints, too.
    """
    agent.eval()
    found: list[tuple[int, Prediction]] = []
    rows = rows[np.argsort(split.episodes.lengths[rows].max(axis=1), kind="stable")]
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        episodes = split.episodes.rows(part)
        walked = rollout(
            agent, surroundings, episodes, feedback="argmax", max_steps=max_steps, avoid_loops=avoid_loops
        )
        owners = [row for row, names in zip(part.tolist(), episodes.names, strict=True) for _ in names]
        told = predictions(walked.trace, episodes.names, surroundings.world.viewpoint_ids, turns=turns)
        found += zip(owners, told, strict=True)
    return found


def score(
    split: Split, told: list[Prediction], task: str, graphs: Mapping[str, Any], *, path_type: Any,
    annotated_length: bool = False,
) -> Scored:  # fmt: skip
    """Scores of predictions, for the items that have one."""
    paths: dict[Any, list[str]] = {
        row.item_id: [pose.viewpoint_id for pose in row.trajectory] for row in told
    }
    if task == "ndh":
        items = [item for item in split.items if item.inst_idx in paths]
        scores: Any = score_ndh(paths, items, graphs, path_type=path_type)
    else:
        items = [_told(item, paths) for item in split.items]
        walked = [item for item in items if item.instructions]
        scores = score_r2r(paths, walked, graphs, annotated_length=annotated_length)
    success = dict(zip(scores[0], (scores.success > 0).tolist(), strict=True))
    return Scored(mean_scores(scores), told, success)


class _Told(NamedTuple):
    """An item with the instructions that have a prediction."""

    path_id: Any
    scan_id: str
    heading: float
    path: tuple[str, ...]
    instructions: tuple[str, ...]
    distance: float | None
    instruction_ids: tuple[str, ...]


def _told(item: Any, paths: Mapping[Any, Any]) -> Any:
    kept = [place for place, name in enumerate(item.instruction_ids) if name in paths]
    return _Told(
        getattr(item, "path_id", None), item.scan_id, item.heading, item.path,
        tuple(item.instructions[place] for place in kept), getattr(item, "distance", None),
        tuple(item.instruction_ids[place] for place in kept),
    )  # fmt: skip
