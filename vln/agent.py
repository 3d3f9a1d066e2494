"""Rollouts: a batch of agents reads, looks and walks; what it did, and what it can learn from that.

The agent of R2R and that of NDH share them; HANNA's has its own in `vln.agent_hanna`. Rows that have stopped
are left out of all later steps. Random actions hang on (seed, training step, episode), so that a row does
the same in any batch.

Letters of shapes: B rows, S steps, I instructions of a row, T tokens, C candidates, P waypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from vln.candidates import Order, Panorama, PanoramicSimulator
from vln.draws import ACTIONS, uniforms
from vln.follower import Context, Follower, FollowerConfig, InstructionEncoder, Step
from vln.geometry import NUM_HEADINGS, VIEW_ELEVATIONS, VIEW_HEADINGS
from vln.model import Prevalent
from vln.ndh_decoder import NDHDecoder
from vln.rewards import (
    ActorCritic,
    actor_critic_loss,
    discounted_returns,
    policy_entropy,
    step_rewards,
)
from vln.submission import Pose, Prediction
from vln.surroundings import Clock, Course, Surroundings, Views
from vln.walks import teacher_actions

Feedback = Literal["teacher", "argmax", "sample", "mixed"]
"""Whose actions are taken: the teacher's, the likeliest, drawn ones, or at each step for the whole batch the
teacher's or drawn ones."""

_COIN = 101
"""Purpose of the draws that choose between teacher and sample."""


class Episodes(NamedTuple):
    """What is to be walked, a row each."""

    names: tuple[tuple[str | int, ...], ...]
    """What a submission calls each row: several names where several instructions are read together."""
    number: np.ndarray
    """int64 ``[B]``: what draws hang on."""
    start: np.ndarray
    """int64 ``[B]``, the world's numbers."""
    heading: np.ndarray
    """float64 ``[B]``, radians."""
    waypoints: np.ndarray | None
    """int64 ``[B, P]``, see `vln.surroundings.Course`; ``None`` where goals are unknown."""
    token_ids: np.ndarray
    """int64 ``[B, I, T]``, padded on the right."""
    lengths: np.ndarray
    """int64 ``[B, I]``."""

    def rows(self, which: Any) -> Episodes:
        """Some rows, their texts no wider than the longest."""
        which = np.asarray(which, dtype=np.int64)
        lengths = self.lengths[which]
        return Episodes(
            tuple(self.names[row] for row in which),
            self.number[which],
            self.start[which],
            self.heading[which],
            None if self.waypoints is None else self.waypoints[which],
            self.token_ids[which, :, : int(lengths.max(initial=1))],
            lengths,
        )


class NDHFollower(nn.Module):
    """The NDH agent: speaker-follower's decoder on Prevalent's encoder (Hao et al., Sec. 5.2).

    Args:
        trunk: the pre-trained model.
        config: sizes.
    """

    def __init__(self, trunk: Prevalent, config: FollowerConfig | None = None) -> None:
        super().__init__()
        self.config = FollowerConfig() if config is None else config
        self.encoder = InstructionEncoder(trunk, self.config)
        self.decoder = NDHDecoder(
            self.config, view_size=trunk.config.view_size, words_size=self.encoder.words_size
        )


Walker = Follower | NDHFollower


class Memory(NamedTuple):
    """What a decoder carries from step to step."""

    tilde: Tensor
    """``[B, H]``."""
    cell: Tensor
    """``[B, H]``."""
    action: Tensor | None
    """Views of the candidates taken last, ``[B, D]``; for NDH alone."""

    def rows(self, which: Tensor) -> Memory:
        """Some rows."""
        return Memory(*(None if part is None else part[which] for part in self))  # type: ignore[arg-type]


def order_of(agent: nn.Module) -> Order:
    """Order of the candidates that an agent was made for."""
    return "envdrop" if isinstance(agent, Follower) else "follower"


def caching_is_exact(agent: nn.Module) -> bool:
    """Whether words can be encoded once an episode and give what encoding at every step does.

    They can unless the text stack has a dropout that draws anew: in eval mode, without dropout, or when it is
    frozen, as `freeze` puts it in eval mode.
    """
    trunk: Any = agent.encoder.trunk  # type: ignore[union-attr]
    return not trunk.text_layers.training or not (
        trunk.config.hidden_dropout or trunk.config.attention_dropout
    )


def freeze(trunk: Prevalent, *, text: bool, cross: bool) -> None:
    """Choose what of the pre-trained model learns; the rest goes into eval mode, without dropout.

    Args:
        trunk: in training mode.
        text: whether embeddings and text layers learn.
        cross: whether the cross layers and the projection of the views learn.

    Raises:
        ValueError: the text without the cross layers.
    """
    trunk.set_trained(text=text, cross=cross)
    of_text: list[nn.Module] = [trunk.embeddings, trunk.text_layers]
    of_both: list[nn.Module] = [
        trunk.view_projection,
        trunk.view_norm,
        trunk.view_dropout,
        trunk.cross_layers,
    ]
    for modules, learns in ((of_text, text), (of_both, cross)):
        for module in modules:
            module.train(learns)


class Noise(NamedTuple):
    """What random actions hang on, besides the episode."""

    seed: int = 0
    step: int = 0


class Trace(NamedTuple):
    """Where rows went."""

    viewpoint: np.ndarray
    """int64 ``[S + 1, B]``."""
    view: np.ndarray
    """int64 ``[S + 1, B]``."""
    num_moves: np.ndarray
    """int64 ``[B]``: moves until the row stopped; what comes behind in its columns repeats."""
    stopped: np.ndarray
    """bool ``[B]``: whether the row stopped by itself."""


class Rollout(NamedTuple):
    """What a batch did."""

    trace: Trace
    imitation: Tensor
    """Cross-entropy with the teacher, summed over rows, for each step: ``[S]``; 0 unless asked for."""
    num_taught: Tensor
    """Rows of each of those sums, float32 ``[S]``."""
    actor_critic: ActorCritic | None
    """Not divided by anything; ``None`` unless asked for."""
    num_active: int
    """Steps of all rows."""
    reward: float
    """Summed over rows and steps; 0 unless asked for."""


def rollout(
    agent: Walker,
    surroundings: Surroundings,
    episodes: Episodes,
    *,
    feedback: Feedback,
    max_steps: int,
    noise: Noise | None = None,
    imitate: bool = False,
    reinforce: bool = False,
    discount: float = 0.9,
    entropy_weight: float = 0.01,
    sample_share: float = 0.2,
    keep: np.ndarray | None = None,
    avoid_loops: bool = False,
    cache_text: bool | None = None,
    clock: Clock | None = None,
) -> Rollout:
    """Let a batch walk until all have stopped.

    Args:
        agent: that of R2R or NDH, in training or eval mode.
        surroundings: of the agent's form.
        episodes: B rows.
        feedback: whose actions are taken.
        max_steps: most actions of a row; who has not stopped by then stays where it is.
        noise: of random actions; needed where actions are drawn.
        imitate: whether the cross-entropy with the teacher is wanted.
        reinforce: whether the terms of advantage actor-critic are wanted (Tan et al., 2019).
        discount: of the rewards.
        entropy_weight: of the policy's entropy.
        sample_share: with ``mixed`` feedback, the chance of drawn actions.
        keep: ``[F]``: factors of the features; the decoder's own feature dropout is off then.
        avoid_loops: take no viewpoint again (for submissions).
        cache_text: encode the words once; by default wherever that changes nothing.
        clock: takes the seconds of ``simulator``, ``features`` and ``model``.

    Raises:
        ValueError: unknown feedback; no noise for drawn actions; goals are unknown but needed; or
            ``reinforce`` for an agent without a critic.
    """
    _check(agent, episodes, feedback, noise, imitate=imitate, reinforce=reinforce)
    walk = _Walk(agent, surroundings, episodes, keep, avoid_loops, cache_text, clock)
    learn = _Lessons(len(episodes.names), max_steps, walk.device, imitate=imitate, reinforce=reinforce)
    for number in range(max_steps):
        rows = np.flatnonzero(walk.active)
        if not len(rows):
            break
        step = walk.think(rows)
        with walk.part("simulator"):
            teacher = walk.teacher(rows)
            if feedback == "teacher":
                assert teacher is not None
                action = teacher
            elif feedback == "argmax":
                action = step.logits.argmax(-1).cpu().numpy()
            else:
                assert noise is not None
                drawn = _sample(step.logits, episodes.number[rows], noise, number, max_steps)
                taught = feedback == "mixed" and _coin(noise, number) >= sample_share
                action = teacher if taught and teacher is not None else drawn
        with walk.part("model"):
            if imitate and teacher is not None:
                learn.imitate(number, step.logits, teacher)
        before = walk.remaining() if reinforce else None
        stops = walk.act(rows, action, step)
        with walk.part("model"):
            if reinforce and before is not None:
                was, now = (torch.from_numpy(part[rows]) for part in (before, walk.remaining()))
                rewards = step_rewards(
                    was, now, torch.from_numpy(stops), torch.ones(len(rows), dtype=torch.bool)
                )
                learn.reinforce(rows, step, action, rewards, agent)
    with walk.part("model"):
        outcome = learn.outcome(walk, agent, discount, entropy_weight) if reinforce else None
    return Rollout(
        walk.trace(), learn.imitation, learn.num_taught, outcome, walk.num_active, float(learn.reward)
    )


def _check(
    agent: Walker, episodes: Episodes, feedback: str, noise: Noise | None, *, imitate: bool, reinforce: bool
) -> None:
    if feedback not in get_args(Feedback):
        raise ValueError(f"feedback is {feedback!r}, expected one of {', '.join(get_args(Feedback))}")
    if noise is None and feedback in ("sample", "mixed"):
        raise ValueError(f"feedback {feedback} draws actions: give noise=Noise(seed, step)")
    if episodes.waypoints is None and (imitate or reinforce or feedback in ("teacher", "mixed")):
        raise ValueError(f"feedback {feedback}, imitation and rewards need goals, which these items lack")
    if reinforce and not isinstance(agent, Follower):
        raise ValueError(f"{type(agent).__name__} has no critic: train it by imitation alone")


class _Walk:
    """A batch on its way; everything but the simulator holds the active rows alone."""

    def __init__(
        self, agent: Walker, surroundings: Surroundings, episodes: Episodes, keep: np.ndarray | None,
        avoid_loops: bool, cache_text: bool | None, clock: Clock | None,
    ) -> None:  # fmt: skip
        self._agent, self._surroundings, self._keep = agent, surroundings, keep
        self._avoid_loops, self._clock, self.device = avoid_loops, clock, surroundings.device
        count = len(episodes.names)
        with self.part("simulator"):
            self._simulator = PanoramicSimulator(surroundings.world, batch_size=count, order=order_of(agent))
            self.now: Panorama = self._simulator.place(episodes.start, episodes.heading)
            self._course: Course | None = None
            if episodes.waypoints is not None:
                self._course = Course(surroundings, episodes.waypoints)
                self._course.arrive(self.now.viewpoint)
        self.active = np.ones(count, dtype=bool)
        self.stopped = np.zeros(count, dtype=bool)
        self._moves, self.num_active = np.zeros(count, dtype=np.int64), 0
        self._viewpoints, self._views = [self.now.viewpoint], [self.now.view]
        self._ids = torch.from_numpy(episodes.token_ids).to(self.device)
        self._lengths = torch.from_numpy(episodes.lengths)  # packing wants them on the CPU
        cached = caching_is_exact(agent) if cache_text is None else cache_text
        with self.part("model"):
            self._text = agent.encoder.encode_text(self._ids, self._lengths_there()) if cached else None
        self._memory: Memory | None = None
        self._views_now: Views | None = None

    def _lengths_there(self) -> Tensor:
        return self._lengths.to(self.device)

    def part(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._clock is None else self._clock.measure(name)

    def teacher(self, rows: np.ndarray) -> np.ndarray | None:
        if self._course is None:
            return None
        return teacher_actions(self.now, self._course.following(self.now.viewpoint))[rows]

    def remaining(self) -> np.ndarray:
        assert self._course is not None
        with self.part("simulator"):
            return self._course.remaining(self.now.viewpoint)

    def think(self, rows: np.ndarray) -> Step:
        """One step of the model for the active rows."""
        with self.part("features"):
            views = self._surroundings.look(self.now, rows, keep=self._keep)
        with self.part("model"):
            text = self._text
            if text is None:
                text = self._agent.encoder.encode_text(self._ids, self._lengths_there())
            context = self._agent.encoder(
                text, self._lengths_there(), views.panorama, first=self._memory is None
            )
            step = self._decide(views, context)
            if self._avoid_loops:
                step = step._replace(logits=step.logits.masked_fill(self._visited(rows, views), -torch.inf))
        self._views_now = views
        return step

    def _decide(self, views: Views, context: Context) -> Step:
        agent, memory = self._agent, self._memory
        if memory is None:
            first = agent.decoder.first_action(len(views.angle)) if isinstance(agent, NDHFollower) else None
            assert context.hidden is not None and context.cell is not None
            memory = Memory(context.hidden, context.cell, first)
        if isinstance(agent, NDHFollower):
            assert memory.action is not None
            return agent.decoder(
                memory.action, views.panorama, views.candidates, memory.tilde, memory.cell, context,
                num_candidates=views.num_candidates,
            )  # fmt: skip
        return agent.decoder(
            views.angle, views.panorama, views.candidates, memory.tilde, memory.cell, context,
            num_candidates=views.num_candidates, features_dropped=self._keep is not None,
        )  # fmt: skip

    def _visited(self, rows: np.ndarray, views: Views) -> Tensor:
        candidate = self.now.candidate[rows, : views.candidates.shape[1]]
        past = np.stack(self._viewpoints, axis=1)[rows]
        seen = (candidate[:, :, None] == past[:, None, :]).any(-1)
        seen[np.arange(len(rows)), self.now.stop[rows]] = False
        return torch.from_numpy(seen).to(self.device)

    def act(self, rows: np.ndarray, action: np.ndarray, step: Step) -> np.ndarray:
        """Walk on; returns which of the rows stopped."""
        with self.part("simulator"):
            choice = self.now.stop.copy()
            choice[rows] = action
            stops = action == self.now.stop[rows]
            self.num_active += len(rows)
            self.stopped[rows], self.active[rows] = stops, ~stops
            self._moves[rows] += ~stops
            self.now = self._simulator.choose(choice)
            if self._course is not None:
                self._course.arrive(self.now.viewpoint)
            self._viewpoints.append(self.now.viewpoint)
            self._views.append(self.now.view)
        with self.part("model"):
            self._remember(step, action, np.flatnonzero(~stops))
        return stops

    def _remember(self, step: Step, action: np.ndarray, going: np.ndarray) -> None:
        taken = None
        if isinstance(self._agent, NDHFollower):
            assert self._views_now is not None
            index = torch.arange(len(action), device=self.device)
            taken = self._views_now.candidates[index, torch.from_numpy(action).to(self.device)]
        memory = Memory(step.tilde, step.cell, taken)
        if len(going) == len(action):
            self._memory = memory
            return
        kept = torch.from_numpy(going).to(self.device)
        self._memory = memory.rows(kept)
        self._ids, self._lengths = self._ids[kept], self._lengths[kept.cpu()]
        if self._text is not None:
            self._text = self._text[kept]
        if len(going):  # the others' words need no padding to the length of those that left
            longest = int(self._lengths.max())
            self._ids = self._ids[..., :longest]
            if self._text is not None:
                self._text = self._text[..., :longest, :]

    def trace(self) -> Trace:
        return Trace(np.stack(self._viewpoints), np.stack(self._views), self._moves, self.stopped)


class _Lessons:
    """Terms of the losses while a batch walks."""

    def __init__(
        self, count: int, max_steps: int, device: torch.device, *, imitate: bool, reinforce: bool
    ) -> None:
        self._count, self._device = count, device
        self._imitation: list[Tensor] = []
        self._size = max_steps if imitate else 0
        self.num_taught = torch.zeros(self._size, device=device)
        self._taken: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        self.reward = 0.0

    @property
    def imitation(self) -> Tensor:
        rest = torch.zeros(self._size - len(self._imitation), device=self._device)
        return torch.cat([torch.stack(self._imitation), rest]) if self._imitation else rest

    def imitate(self, number: int, logits: Tensor, teacher: np.ndarray) -> None:
        right = torch.from_numpy(teacher).to(self._device)
        self._imitation.append(nn.functional.cross_entropy(logits.float(), right, reduction="sum"))
        self.num_taught[number] = len(teacher)

    def reinforce(
        self, rows: np.ndarray, step: Step, action: np.ndarray, rewards: Tensor, agent: Walker
    ) -> None:
        assert isinstance(agent, Follower)
        logits, taken = step.logits.float(), torch.from_numpy(action).to(self._device)
        log_probs = logits.log_softmax(-1).gather(1, taken[:, None])[:, 0]
        index = torch.from_numpy(rows).to(self._device)
        values, entropy = agent.critic(step.hidden).float(), policy_entropy(logits)
        self._taken.append((index, log_probs, values, entropy, rewards.to(self._device)))
        self.reward += float(rewards.sum())

    def outcome(self, walk: _Walk, agent: Walker, discount: float, entropy_weight: float) -> ActorCritic:
        """Terms of all steps; episodes cut short are continued by the critic's guess."""
        assert isinstance(agent, Follower)
        bootstrap = torch.zeros(self._count, device=self._device)
        rows = np.flatnonzero(walk.active)
        if len(rows):
            with torch.no_grad():
                guess = agent.critic(walk.think(rows).hidden).float()
            bootstrap[torch.from_numpy(rows).to(self._device)] = guess
        spread = [
            [torch.zeros(self._count, device=self._device).index_copy(0, index, part) for part in parts]
            for index, *parts in self._taken
        ]
        log_probs, values, entropies, rewards = (torch.stack(parts) for parts in zip(*spread, strict=True))
        active = torch.zeros(log_probs.shape, dtype=torch.bool, device=self._device)
        for number, (index, *_) in enumerate(self._taken):
            active[number, index] = True
        returns = discounted_returns(rewards, bootstrap, discount=discount)
        return actor_critic_loss(
            log_probs, values, entropies, returns, active, entropy_weight=entropy_weight, normalize="none"
        )


def _sample(logits: Tensor, numbers: np.ndarray, noise: Noise, step: int, max_steps: int) -> np.ndarray:
    """Actions drawn from the policy, by numbers that hang on seed, training step, episode and step."""
    drawn = uniforms(noise.seed, ACTIONS, noise.step, numbers, max_steps)[:, step]
    shares = logits.detach().double().softmax(-1).cumsum(-1)
    at = torch.from_numpy(drawn).to(shares)[:, None] * shares[:, -1:]
    found = torch.searchsorted(shares, at, right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1).cpu().numpy()


def _coin(noise: Noise, step: int) -> float:
    return float(uniforms(noise.seed, _COIN, noise.step, [step], 1)[0, 0])


def predictions(
    trace: Trace, names: Sequence[Sequence[str | int]], viewpoint_ids: Sequence[str], *, turns: bool = False
) -> list[Prediction]:
    """Rows of a submission.

    Args:
        trace: of a rollout.
        names: of its rows; several names get the same trajectory.
        viewpoint_ids: of the world.
        turns: also write the poses between, as the originals do: up or down to the view of the next
            viewpoint, then right turns of 30 degrees.
    """
    found = []
    for row, called in enumerate(names):
        end = trace.num_moves[row] + 1
        places, views = trace.viewpoint[:end, row].tolist(), trace.view[:end, row].tolist()
        poses = [_pose(viewpoint_ids, places[0], views[0])]
        for before, view, source, place in zip(views, views[1:], places, places[1:], strict=False):
            if turns:
                poses += [_pose(viewpoint_ids, source, between) for between in turned(before, view)]
            poses.append(_pose(viewpoint_ids, place, view))
        found += [Prediction(name, tuple(poses)) for name in called]
    return found


def _pose(viewpoint_ids: Sequence[str], place: int, view: int) -> Pose:
    return Pose(viewpoint_ids[place], float(VIEW_HEADINGS[view]), float(VIEW_ELEVATIONS[view]))


def turned(view: int, target: int) -> list[int]:
    """Views on the way from one to another: first level by level, then to the right.

    Example:
        >>> turned(11, 12)
        [23, 12]
    """
    found, level, heading = [], view // NUM_HEADINGS, view % NUM_HEADINGS
    while level != target // NUM_HEADINGS:
        level += 1 if level < target // NUM_HEADINGS else -1
        found.append(level * NUM_HEADINGS + heading)
    while heading != target % NUM_HEADINGS:
        heading = (heading + 1) % NUM_HEADINGS
        found.append(level * NUM_HEADINGS + heading)
    return found
