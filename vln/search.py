"""State-factored best-first search, re-ranked by a speaker (Fried et al., 2018, Sec. 3.3; "beam search").

The follower explores: again and again it walks to the likeliest state that it has seen but not been in, until
it has stopped at several places or explored enough. A speaker then says which of those routes fits the words
best. All that walking counts: success rises, path length explodes, and SPL comes near 0, so figures of search
must never stand beside those of a single walk.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from vln.agent import Episodes, Memory, NDHFollower, Walker, order_of
from vln.candidates import Panorama, PanoramicSimulator
from vln.follower import Step
from vln.geometry import VIEW_ELEVATIONS, VIEW_HEADINGS
from vln.speaker_folder import TrainedSpeaker
from vln.submission import Pose, Prediction
from vln.surroundings import Surroundings, Views
from vln.walks import Walk, path_batch, roll_walks

Rank = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""``rank(routes)``: a score of each route (the world's numbers), such as a speaker's mean log-prob."""


class Route(NamedTuple):
    """A way that ended in a STOP."""

    viewpoints: tuple[int, ...]
    """The world's numbers."""
    log_prob: float
    """Summed over its actions, STOP included."""

    @property
    def mean_log_prob(self) -> float:
        """For each action."""
        return self.log_prob / len(self.viewpoints)


class Searched(NamedTuple):
    """What a search found."""

    routes: tuple[Route, ...]
    """Finished ones, the likeliest first as they were found."""
    chosen: int
    """Place of the best by rank; -1 if none was finished."""
    walked: tuple[int, ...]
    """All viewpoints in the order walked: the exploration, the way back to the start, the chosen route."""
    num_expansions: int


class _State(NamedTuple):
    """One end of the exploration."""

    viewpoints: tuple[int, ...]
    view: int
    log_prob: float
    memory: Memory | None
    stopped: bool

    @property
    def key(self) -> tuple[int, ...]:
        """Viewpoint and action: the last move, or where the agent stopped, which no move is."""
        return self.viewpoints[-1:] * 2 if self.stopped else self.viewpoints[-2:]


@torch.no_grad()
def state_factored_search(
    agent: Walker,
    surroundings: Surroundings,
    episode: Episodes,
    *,
    num_routes: int = 40,
    max_expansions: int = 300,
    max_steps: int = 35,
    rank: Rank | None = None,
    speaker_weight: float = 0.5,
) -> Searched:
    """Search for one episode.

    A state is a viewpoint and the action taken there; the likeliest way to each is kept, so that a viewpoint
    may be looked at from once for every neighbour that it was entered from.

    Args:
        agent: that of R2R or NDH, put into eval mode.
        surroundings: of the agent's form.
        episode: one row.
        num_routes: finished routes after which the search ends.
        max_expansions: states looked at from.
        max_steps: longest route.
        rank: scores of finished routes; the follower alone ranks without.
        speaker_weight: alpha: of the rank beside the follower's mean log-prob.

    Raises:
        ValueError: more than one row, a number below 1, or a weight outside [0, 1].
    """
    if len(episode.names) != 1:
        raise ValueError(f"search is for one episode at a time, not {len(episode.names)}")
    if min(num_routes, max_expansions, max_steps) < 1 or not 0 <= speaker_weight <= 1:
        raise ValueError(
            f"num_routes {num_routes}, max_expansions {max_expansions} and max_steps {max_steps} must be at "
            f"least 1, and speaker_weight {speaker_weight} a share from 0 to 1"
        )
    explorer = _Explorer(agent.eval(), surroundings, episode)
    order = itertools.count()  # of equally likely states the first one found goes first
    heap: list[tuple[float, int, _State]] = [(0.0, next(order), explorer.start)]
    done: set[tuple[int, ...]] = set()
    routes: list[Route] = []
    expansions = 0
    while heap and len(routes) < num_routes and expansions < max_expansions:
        _, _, state = heapq.heappop(heap)
        if state.key in done:
            continue
        done.add(state.key)
        if state.stopped:
            routes.append(Route(state.viewpoints, state.log_prob))
            continue
        expansions += 1
        for child in explorer.expand(state, may_move=len(state.viewpoints) < max_steps):
            if child.key not in done:
                heapq.heappush(heap, (-child.log_prob, next(order), child))
    chosen = _best(routes, rank, speaker_weight)
    if chosen >= 0:
        explorer.walk_to(explorer.start.viewpoints[0])
        explorer.walked += routes[chosen].viewpoints[1:]
    return Searched(tuple(routes), chosen, tuple(explorer.walked), expansions)


def _best(routes: Sequence[Route], rank: Rank | None, weight: float) -> int:
    if not routes:
        return -1
    own = np.array([route.mean_log_prob for route in routes])
    if rank is not None:
        own = weight * np.asarray(rank([route.viewpoints for route in routes])) + (1 - weight) * own
    return int(own.argmax())


class _Explorer:
    """One agent that walks to states through the part of the graph that it has seen."""

    def __init__(self, agent: Walker, surroundings: Surroundings, episode: Episodes) -> None:
        self._agent, self._place = agent, surroundings
        self._simulator = PanoramicSimulator(surroundings.world, order=order_of(agent))
        first = self._simulator.place(episode.start, episode.heading)
        device = surroundings.device
        self._lengths = torch.from_numpy(episode.lengths).to(device)
        self._text = agent.encoder.encode_text(torch.from_numpy(episode.token_ids).to(device), self._lengths)
        self.start = _State((int(first.viewpoint[0]),), int(first.view[0]), 0.0, None, False)
        self.walked = [self.start.viewpoints[0]]
        self._edges: dict[int, dict[int, float]] = {}

    def expand(self, state: _State, *, may_move: bool) -> list[_State]:
        """Walk to a state, look around, and list what may come next."""
        here = state.viewpoints[-1]
        self.walk_to(here)
        now = self._simulator.place([here], VIEW_HEADINGS[[state.view]], VIEW_ELEVATIONS[[state.view]])
        views = self._place.look(now, np.array([0]))
        step, memory = self._think(views, state.memory)
        log_probs = step.logits[0].float().log_softmax(-1).tolist()
        self._learn_edges(here, now)
        found = []
        for choice in range(int(now.num_choices[0])):
            total = state.log_prob + log_probs[choice]
            if choice == now.stop[0]:
                found.append(_State(state.viewpoints, state.view, total, None, True))
            elif may_move:
                there = (*state.viewpoints, int(now.candidate[0, choice]))
                kept = memory._replace(action=None if memory.action is None else views.candidates[:, choice])
                found.append(_State(there, int(now.point_id[0, choice]), total, kept, False))
        return found

    def _think(self, views: Views, memory: Memory | None) -> tuple[Step, Memory]:
        agent = self._agent
        context = agent.encoder(self._text, self._lengths, views.panorama)
        if memory is None:
            first = agent.decoder.first_action(1) if isinstance(agent, NDHFollower) else None
            memory = Memory(context.hidden, context.cell, first)
        given = (views.panorama, views.candidates, memory.tilde, memory.cell, context)
        own = views.angle if memory.action is None else memory.action
        step = agent.decoder(own, *given, num_candidates=views.num_candidates)
        return step, Memory(step.tilde, step.cell, memory.action)

    def _learn_edges(self, here: int, now: Panorama) -> None:
        others = now.candidate[0][(now.candidate[0] >= 0) & (now.candidate[0] != here)].astype(np.int64)
        lengths = self._place.distances.between(np.full(len(others), here), others)
        for other, length in zip(others.tolist(), lengths.tolist(), strict=True):
            self._edges.setdefault(here, {})[other] = length
            self._edges.setdefault(other, {})[here] = length

    def walk_to(self, goal: int) -> None:
        """Walk the shortest way through what has been seen."""
        source = self.walked[-1]
        if source == goal:
            return
        heap, before, done = [(0.0, source, source)], dict[int, int](), set[int]()
        while heap:
            length, here, origin = heapq.heappop(heap)
            if here in done:
                continue
            done.add(here)
            before[here] = origin
            if here == goal:
                break
            for there, more in self._edges.get(here, {}).items():
                heapq.heappush(heap, (length + more, there, here))
        way = [goal]
        while way[-1] != source:
            way.append(before[way[-1]])
        self.walked += way[-2::-1]


def search_prediction(
    found: Searched, name: str | int, surroundings: Surroundings, *, start_heading: float
) -> Prediction:
    """Row of a submission: everything walked, each viewpoint faced in the direction of the walk.

    Args:
        found: of the search.
        name: of the item.
        surroundings: whose world was walked.
        start_heading: radians.
    """
    world = surroundings.world
    poses, heading = [], start_heading
    for number, place in enumerate(found.walked):
        if number:
            graph = world.graph(world.scan_ids[place])
            first = world.starts[graph.scan_id]
            east, north, _ = (
                graph.positions[place - first] - graph.positions[found.walked[number - 1] - first]
            )
            heading = math.atan2(east, north) % (2 * math.pi)
        poses.append(Pose(world.viewpoint_ids[place], heading, 0.0))
    return Prediction(name, tuple(poses))


def speaker_rank(
    trained: TrainedSpeaker, texts: Sequence[str], surroundings: Surroundings, *, start_heading: float
) -> Rank:
    """How well a speaker would say given texts on a route: mean log-prob of a word, without dropout.

    The speaker is shown views as it was trained with: features as stored, without the scale of the agent's
    pre-trained model, and its own layout of the orientation.

    Args:
        trained: put into eval mode; on the device of the surroundings.
        texts: whole ones, unknown words and all; a rank is the mean over them.
        surroundings: of the agent: world, features and device.
        start_heading: of the routes, radians.
    """
    speaker, words = trained.speaker.eval(), trained.words
    world, device = surroundings.world, surroundings.device
    lines = [
        torch.from_numpy(words.encode([text], max_words=len(words.split(text)) + 1)).to(device)
        for text in texts
    ]

    def score(routes: Sequence[Sequence[int]]) -> list[float]:
        walks = [
            Walk(
                world.scan_ids[route[0]], tuple(world.viewpoint_ids[place] for place in route), start_heading
            )
            for route in routes
        ]
        batch = path_batch(
            roll_walks(world, walks, shortest=False), range(len(walks)), world, surroundings.features,
            angle_size=speaker.config.angle_size, orientation=trained.orientation,
        )  # fmt: skip
        actions, panoramas, lengths = (part.to(device) for part in batch)
        found = []
        for line in lines:
            loss, count = speaker(actions, panoramas, lengths, line.expand(len(walks), -1))
            found.append(-loss / count)
        return torch.stack(found).mean(0).tolist()

    @torch.no_grad()
    def rank(routes: Sequence[Sequence[int]]) -> list[float]:
        if speaker.config.packed:
            return score(routes)
        # What a released speaker says of a route depends on how long those beside it are.
        return [value for route in routes for value in score([route])]

    return rank
