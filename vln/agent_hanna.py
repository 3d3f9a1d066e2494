"""Rollouts of the HANNA agent: it walks, asks the assistant ANNA, follows her routes and goes on.

Letters of shapes: B rows, S steps, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vln.candidates import PanoramicSimulator
from vln.draws import ACTIONS, uniforms
from vln.geometry import VIEW_ELEVATIONS, VIEW_HEADINGS
from vln.hanna import (
    Answer,
    Assistant,
    HannaStep,
    ask_teacher,
    curiosity_loss,
    nearest_target,
    negative_actions,
    normalised_entropy,
)
from vln.hanna_model import HannaAgent, HannaMemory, HannaStepOutput, bins, view_similarity
from vln.items import HannaRoute, HannaTask
from vln.metrics import HannaResult
from vln.recurrent import length_mask
from vln.submission import Pose, Prediction
from vln.surroundings import Surroundings
from vln.walks import teacher_actions

_ASKS, _ROUTES = 102, 103
"""Purposes of the draws (see `vln.draws`): whether to ask, and which of equally good routes is told."""

_MAIN = "main"


class HannaEpisode(NamedTuple):
    """One instruction of a task."""

    name: str
    number: int
    """What draws hang on."""
    task: HannaTask
    text: str


class HannaNoise(NamedTuple):
    """What draws hang on, besides the episode."""

    seed: int
    step: int


class Helpers(NamedTuple):
    """What the agent walks in and is helped by."""

    surroundings: Surroundings
    assistant: Assistant
    tokenizer: Any
    max_tokens: int
    split: str
    """Whose routes the assistant may name."""


class HannaRollout(NamedTuple):
    """What a batch did, and its losses."""

    predictions: list[Prediction]
    results: list[HannaResult]
    nav: Tensor
    """Curiosity-encouraging imitation, summed over rows, for each step: ``[S]``."""
    num_nav: Tensor
    """float32 ``[S]``."""
    ask: Tensor
    """Cross-entropy of asking and of its reasons, the same: ``[S]``."""
    num_ask: Tensor


def episodes_of_tasks(tasks: Sequence[HannaTask]) -> list[HannaEpisode]:
    """An episode for every instruction."""
    named = [
        (name, task, text)
        for task in tasks
        for name, text in zip(task.instruction_ids, task.instructions, strict=True)
    ]
    return [HannaEpisode(name, number, task, text) for number, (name, task, text) in enumerate(named)]


def route_split(split: str, routes: Sequence[HannaRoute]) -> str:
    """Under which name the routes of a split of the tasks stand: its own, or one that begins as it does.

    Raises:
        ValueError: there is none.
    """
    known = sorted({route.split for route in routes})
    alike = [name for name in known if name.split("_")[0] == split.split("_")[0]]
    if split in known or alike:
        return split if split in known else alike[0]
    raise ValueError(f"no route is of split {split}: there are {', '.join(known)}")


class _Row:
    """One episode on its way."""

    def __init__(self, episode: HannaEpisode, helpers: Helpers) -> None:
        self.episode, self.task = episode, episode.task
        self.goals = tuple(dict.fromkeys(path[-1] for path in episode.task.paths))
        self.graph = helpers.surroundings.world.graph(self.task.scan_id)
        self.targets, self.subgoal, self.text = self.goals, _MAIN, episode.text
        self.depart: int | None = None
        """Number of the viewpoint where to leave the route; ``None`` off routes."""
        self.since, self.fresh = 0, True
        self.steps: list[HannaStep] = []
        self.seen_targets: list[tuple[str, ...]] = []
        self.poses: list[Pose] = []
        self.moved: list[int] = []

    def follow(self, answer: Answer, depart: int) -> None:
        """Begin a route."""
        self.targets, self.subgoal = (answer.depart_node,), f"route {answer.route.path_id}"
        self.text, self.depart, self.since, self.fresh = answer.route.instruction, depart, 0, True

    def leave(self, here: str) -> None:
        """Go on with the task from where a route was left."""
        self.targets = (nearest_target(self.graph, here, self.goals)[0],)
        self.subgoal, self.text, self.depart, self.since, self.fresh = _MAIN, self.episode.text, None, 0, True

    def result(self) -> HannaResult:
        return HannaResult(
            tuple(pose.viewpoint_id for pose in self.poses),
            tuple(int(step.asked) for step in self.steps),
            tuple(self.moved),
            (*self.seen_targets, self.targets),
        )


class _Seen(NamedTuple):
    """One step of the model, for the losses after the walk."""

    rows: np.ndarray
    output: HannaStepOutput
    ids: np.ndarray
    """int64 ``[B, C]``: what the teachers call each candidate: 0 for STOP, else its viewpoint and 1."""


def rollout_hanna(
    agent: HannaAgent,
    helpers: Helpers,
    episodes: Sequence[HannaEpisode],
    *,
    max_steps: int,
    noise: HannaNoise | None = None,
    curiosity_weight: float = 1.0,
    learn: bool = False,
) -> HannaRollout:
    """Let a batch walk and ask until all have stopped.

    Args:
        agent: in training or eval mode.
        helpers: world, assistant and words.
        episodes: B rows.
        max_steps: most steps of a row, requests counted.
        noise: walks and requests are drawn with it; without, the likeliest are taken, and the assistant names
            the first of equally good routes.
        curiosity_weight: of running from past mistakes.
        learn: whether the losses are wanted; else they are empty.
    """
    walk = _HannaWalk(agent, helpers, episodes, noise, max_steps)
    for number in range(max_steps):
        if not walk.active.any():
            break
        walk.step(number, learn=learn)
    return walk.outcome(curiosity_weight, max_steps if learn else 0)


class _HannaWalk:
    """A batch on its way."""

    def __init__(
        self, agent: HannaAgent, helpers: Helpers, episodes: Sequence[HannaEpisode],
        noise: HannaNoise | None, max_steps: int,
    ) -> None:  # fmt: skip
        self.agent, self.helpers, self.noise, self.max_steps = agent, helpers, noise, max_steps
        self.place, self.world = helpers.surroundings, helpers.surroundings.world
        self.rows = [_Row(episode, helpers) for episode in episodes]
        self.numbers = np.array([episode.number for episode in episodes])
        self.simulator = PanoramicSimulator(self.world, batch_size=len(episodes), order="follower")
        tasks = [episode.task for episode in episodes]
        self.now = self.simulator.new_episodes(
            [task.scan_id for task in tasks], [task.paths[0][0] for task in tasks],
            [task.heading for task in tasks],
        )  # fmt: skip
        for number, row in enumerate(self.rows):
            row.poses.append(self._pose(number))
        self.active = np.ones(len(episodes), dtype=bool)
        count, device = len(episodes), self.place.device
        self.memories = (agent.walker.first(count), agent.asker.first(count))
        self.action = torch.zeros(count, agent.view_size, device=device)
        self.words: list[Tensor] = [torch.empty(0)] * count
        self.seen: list[_Seen] = []
        self._answers: dict[tuple[int, str], Answer | None] = {}

    def _pose(self, row: int) -> Pose:
        view = self.now.view[row]
        name = self.world.viewpoint_ids[self.now.viewpoint[row]]
        return Pose(name, float(VIEW_HEADINGS[view]), float(VIEW_ELEVATIONS[view]))

    def answer(self, row: int, viewpoint_id: str) -> Answer | None:
        """What the assistant would say."""
        key = (row, viewpoint_id)
        if key not in self._answers:
            state, noise = self.rows[row], self.noise

            def draw(count: int) -> int:
                assert noise is not None
                number = [state.episode.number]
                return int(uniforms(noise.seed, _ROUTES, noise.step, number, 1)[0, 0] * count)

            self._answers[key] = self.helpers.assistant.answer(
                state.task.scan_id, viewpoint_id, state.goals, split=self.helpers.split,
                draw=None if noise is None else draw,
            )  # fmt: skip
        return self._answers[key]

    def step(self, number: int, *, learn: bool) -> None:
        rows = np.flatnonzero(self.active)
        index = torch.from_numpy(rows).to(self.place.device)
        self._read(rows)
        views = self.place.look(self.now, rows)
        words = [self.words[row] for row in rows]
        mask = length_mask(torch.tensor([len(text) for text in words]), max(map(len, words))).to(
            self.place.device
        )
        fresh = torch.tensor([self.rows[row].fresh for row in rows], device=self.place.device)
        memories = [memory.rows(index).begin(fresh) for memory in self.memories]
        output = self.agent(
            views, self.action[index], self._similarity(rows),
            torch.tensor([float(self.rows[row].since) for row in rows], device=self.place.device),
            (memories[0], memories[1]), pad_sequence(words, batch_first=True), mask,
        )  # fmt: skip
        self.memories = tuple(
            HannaMemory(*(old.index_copy(0, index, new) for old, new in zip(both[0], both[1], strict=True)))
            for both in ((self.memories[0], output.walk), (self.memories[1], output.ask))
        )  # type: ignore[assignment]
        action, asked = self._choose(rows, output, number)
        ids = self._ids(rows, views.candidates.shape[1])
        teacher = self._teacher()[rows]
        entropy = normalised_entropy(bins(output.nav_logits.detach().float()).double())
        best = output.nav_logits.detach().argmax(-1).cpu().numpy()
        for place, row in enumerate(rows):
            state, asks = self.rows[row], bool(asked[place])
            state.seen_targets.append(state.targets)
            state.moved.append(-1 if asks else int(action[place]))
            state.steps.append(
                HannaStep(
                    self.world.viewpoint_ids[self.now.viewpoint[row]], state.targets, state.subgoal, False,
                    float(entropy[place]), int(ids[place, best[place]]),
                    -1 if asks else int(ids[place, teacher[place]]),
                    -1 if asks else int(ids[place, action[place]]), asks,
                )
            )  # fmt: skip
        if learn:
            self.seen.append(_Seen(rows, output, ids))
        here = torch.arange(len(rows), device=self.place.device)
        taken = views.candidates[here, torch.from_numpy(action).to(self.place.device)]
        taken = taken * torch.from_numpy(~asked).to(taken)[:, None]
        self.action = self.action.index_copy(0, index, taken)
        self._move(rows, action, asked)

    def _read(self, rows: np.ndarray) -> None:
        """Encode the words of rows that have new ones."""
        new = [row for row in rows if self.rows[row].fresh]
        if not new:
            return
        tokenizer, limit = self.helpers.tokenizer, self.helpers.max_tokens
        texts = [self.rows[row].text for row in new]
        ids = tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        lengths = torch.tensor([len(text) for text in ids])
        padded = pad_sequence(
            [torch.tensor(text) for text in ids], batch_first=True, padding_value=tokenizer.pad_token_id
        )
        device = self.place.device
        found = self.agent.encoder(padded.to(device), lengths.to(device))
        for place, row in enumerate(new):
            self.words[row] = found[place, : lengths[place]]

    def _similarity(self, rows: np.ndarray) -> Tensor:
        """With the views of the point where to leave the route; 0 off routes."""
        here = self.place.gather(self.now.viewpoint[rows]).astype(np.float32)
        departs = [self.rows[row].depart for row in rows]
        goal = np.zeros_like(here)
        known = [place for place, depart in enumerate(departs) if depart is not None]
        if known:
            goal[known] = self.place.gather(np.array([departs[place] for place in known]))
        return view_similarity(*(torch.from_numpy(part).to(self.place.device) for part in (here, goal)))

    def _choose(
        self, rows: np.ndarray, output: HannaStepOutput, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        legal = np.array(
            [self.answer(row, self.world.viewpoint_ids[self.now.viewpoint[row]]) is not None for row in rows]
        )
        parts = []
        for logits, purpose in ((output.nav_logits, ACTIONS), (output.ask_logits, _ASKS)):
            shares = logits.detach().double().softmax(-1).cumsum(-1).cpu()
            if self.noise is None:
                parts.append(logits.detach().argmax(-1).cpu().numpy())
                continue
            drawn = uniforms(self.noise.seed, purpose, self.noise.step, self.numbers[rows], self.max_steps)[
                :, number
            ]
            at = torch.from_numpy(drawn)[:, None] * shares[:, -1:]
            found = torch.searchsorted(shares, at, right=True)[:, 0]
            parts.append(found.clamp(max=logits.shape[1] - 1).numpy())
        return parts[0], (parts[1] == 1) & legal

    def _ids(self, rows: np.ndarray, width: int) -> np.ndarray:
        candidate = self.now.candidate[rows, :width].astype(np.int64)
        ids = np.where(candidate < 0, -2, candidate + 1)  # behind the list there is nothing to run from
        ids[np.arange(len(rows)), self.now.stop[rows]] = 0
        return ids

    def _teacher(self) -> np.ndarray:
        """First step to the nearest target, for all rows."""
        ends = []
        for row, viewpoint in zip(self.rows, self.now.viewpoint, strict=True):
            name = nearest_target(row.graph, self.world.viewpoint_ids[viewpoint], row.targets)[0]
            ends.append(self.world.index(row.task.scan_id, name))
        following = self.place.hops.towards(self.now.viewpoint, np.array(ends, dtype=np.int64))
        return teacher_actions(self.now, following)

    def _move(self, rows: np.ndarray, action: np.ndarray, asked: np.ndarray) -> None:
        choice = self.now.stop.copy()
        choice[rows] = np.where(asked, choice[rows], action)
        before = self.now
        self.now = self.simulator.choose(choice)
        viewpoint, view = self.now.viewpoint.copy(), self.now.view.copy()
        for place, row in enumerate(rows):
            state = self.rows[row]
            state.since, state.fresh = state.since + 1, False
            name = self.world.viewpoint_ids[before.viewpoint[row]]
            if asked[place]:
                answer = self.answer(row, name)
                assert answer is not None
                scan = state.task.scan_id
                viewpoint[row] = self.world.index(scan, answer.start_node)
                view[row] = answer.route.view_id
                state.follow(answer, self.world.index(scan, answer.depart_node))
            elif action[place] == before.stop[row]:
                if state.depart is None:
                    self.active[row] = False
                else:
                    state.leave(name)
        if asked.any():
            self.now = self.simulator.place(viewpoint, VIEW_HEADINGS[view], VIEW_ELEVATIONS[view])
        for row in rows:
            self.rows[row].poses.append(self._pose(row))

    def outcome(self, curiosity_weight: float, size: int) -> HannaRollout:
        """Submission rows, and the losses that the teachers tell now."""
        told = [Prediction(row.episode.name, tuple(row.poses)) for row in self.rows]
        results = [row.result() for row in self.rows]
        device = self.place.device
        counts = [torch.zeros(size, device=device) for _ in range(2)]
        if not size:
            empty = torch.zeros(0, device=device)
            return HannaRollout(told, results, empty, counts[0], empty, counts[1])
        wrong = [negative_actions(row.steps) for row in self.rows]
        requests = [self._requests(number) for number in range(len(self.rows))]
        nav, ask = [], []
        for number, seen in enumerate(self.seen):
            steps = [self.rows[row].steps[number] for row in seen.rows]
            right = np.array([step.nav_target for step in steps])
            negatives = np.array(
                [np.isin(ids, wrong[row][number]) for row, ids in zip(seen.rows, seen.ids, strict=True)]
            )
            place = np.where(right < 0, -1, (seen.ids == right[:, None]).argmax(1))
            teacher = torch.from_numpy(place).to(device)
            mean = curiosity_loss(
                seen.output.nav_logits.float(), teacher, torch.from_numpy(negatives).to(device),
                weight=curiosity_weight,
            )  # fmt: skip
            active = int((place >= 0).sum())
            counts[0][number] = active
            nav.append(mean * active)
            targets = [requests[row][number] for row in seen.rows]
            counts[1][number] = float(sum(target.target >= 0 for target in targets))
            ask.append(_ask_loss(seen.output, targets))
        rest = torch.zeros(size - len(nav), device=device)
        return HannaRollout(
            told, results, torch.cat([torch.stack(nav), rest]), counts[0],
            torch.cat([torch.stack(ask), rest]), counts[1],
        )  # fmt: skip

    def _requests(self, number: int) -> list[Any]:
        row = self.rows[number]
        last = row.steps[-1]._replace(
            viewpoint_id=row.poses[-1].viewpoint_id, targets=row.targets, subgoal=row.subgoal, ended=True
        )
        return ask_teacher(
            row.steps, row.graph, lambda name: self.answer(number, name) is not None, last=last
        )


def _ask_loss(output: HannaStepOutput, targets: Sequence[Any]) -> Tensor:
    """Cross-entropy of asking, and the mean of that of the reasons, summed over rows that count."""
    device = output.ask_logits.device
    target = torch.tensor([one.target for one in targets], device=device)
    reasons = torch.tensor([one.reasons for one in targets], dtype=torch.float32, device=device)
    asked = F.cross_entropy(output.ask_logits.float(), target, ignore_index=-1, reduction="sum")
    why = F.binary_cross_entropy_with_logits(output.reason_logits.float(), reasons, reduction="none").mean(1)
    return asked + torch.where(target >= 0, why, 0.0).sum()


def submission_rows(told: Sequence[Prediction], results: Sequence[HannaResult]) -> list[dict[str, Any]]:
    """Rows of a HANNA submission."""
    return [
        {
            "instr_id": row.item_id,
            "agent_pose": [list(pose) for pose in row.trajectory],
            "agent_ask": list(result.asked),
            "agent_nav": list(result.moved),
            "target_viewpoints": [list(targets) for targets in result.targets],
        }
        for row, result in zip(told, results, strict=True)
    ]
