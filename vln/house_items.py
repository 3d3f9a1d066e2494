"""R2R, NDH and HANNA items of the houses, as the rows of their published files."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vln.house_language import Speaker
from vln.house_plans import NOUNS, House
from vln.house_tasks import Group, Walks

Row = dict[str, Any]
_LONGEST_ANSWER = 5
"""Edges that an oracle of NDH describes at once (CVDN)."""
_SILENT = 0.3
"""Share of the NDH groups without a walk before that have no dialogue either."""
_WITHIN_REACH_M = 2.5
"""From which a HANNA object counts as found."""


class Place(NamedTuple):
    """One house with what is known about it."""

    house: House
    walks: Walks
    speaker: Speaker

    def names(self, path: Iterable[int]) -> list[str]:
        """Viewpoint ids."""
        return [self.house.graph.viewpoint_ids[viewpoint] for viewpoint in path]

    def length(self, path: Sequence[int]) -> float:
        """Metres."""
        return float(sum(self.walks.distances[a, b] for a, b in itertools.pairwise(path)))


def r2r_rows(
    place: Place, group: Group, random: np.random.Generator, *, first_id: int, num_instructions: int
) -> Iterator[Row]:
    """R2R items of a group, one a path."""
    for number, path in enumerate(group.paths):
        told = [place.speaker.describe(path, group.heading, random).text for _ in range(num_instructions)]
        yield {
            "distance": round(place.length(path), 2),
            "scan": group.scan_id,
            "path_id": first_id + number,
            "path": place.names(path),
            "heading": group.heading,
            "instructions": told,
        }


def ndh_rows(place: Place, group: Group, random: np.random.Generator, *, first_id: int) -> Iterator[Row]:
    """NDH items of a group: one walk so far, and for each path the answer that leads along it.

    The oracle sees a few steps only: its path ends on the way to the goal region, and the player goes on from
    there, or falls short, as people do.
    """
    silent = len(group.before) == 1 and random.uniform() < _SILENT
    so_far = [] if silent else _dialogue(place, group, random)
    start = {"heading": group.heading, "elevation": 0.0, "pano": place.names(group.before)[-1]}
    for number, path in enumerate(group.paths):
        goal = _farther(place, path, random)
        onward = place.walks.path(path[-1], goal)
        walked = path[:-1] if random.uniform() < 0.3 else (*path, *onward[1 : 1 + int(random.integers(4))])
        told = place.speaker.describe(path, group.heading, random, stop=goal == path[-1]).text
        turn = len(group.before) - 1
        last = [] if silent else [_message(turn, "navigator", place.speaker.ask(path[0], random)),
                                  _message(turn, "oracle", told)]  # fmt: skip
        near = place.speaker.nearest_landmarks(goal)
        house = place.house
        yield {
            "inst_idx": first_id + number,
            "game_idx": first_id + number,
            "scan": group.scan_id,
            "target": NOUNS[house.nouns[near[0]]] if len(near) else house.rooms[house.room_of[goal]].kind,
            "start_pano": start,
            "nav_history": place.names(group.before),
            "nav_camera": [{**start, "pano": name} for name in place.names(group.before)],
            "dialog_history": so_far + last,
            "end_panos": place.names(np.flatnonzero(place.walks.distances[goal] < _WITHIN_REACH_M)),
            "planner_path": place.names(path),
            "player_path": place.names(walked),
            "oracle_avg_quality": 5.0,
            "navigator_avg_quality": 5.0,
            "oracle_game_quality": 5,
            "navigator_game_quality": 5,
            "R2R_success": int(path[-1] in walked),
            "R2R_oracle_success": int(path[-1] in walked),
            "R2R_spl": float(path[-1] == walked[-1]),
            "R2R_oracle_spl": float(path[-1] in walked),
        }


def hanna_rows(place: Place, group: Group, random: np.random.Generator, *, first_id: int) -> Iterator[Row]:
    """HANNA tasks of a group: an object near each path's end, and a path to every viewpoint that finds it."""
    house, distances = place.house, place.walks.distances
    start = group.paths[0][0]
    for number, path in enumerate(group.paths):
        near = place.speaker.nearest_landmarks(path[-1], within_m=_WITHIN_REACH_M)
        goals = [path[-1]]
        if len(near):
            offset = house.graph.positions - house.positions[near[0]]
            close = house.visible[:, near[0]] & (np.hypot(offset[:, 0], offset[:, 1]) < _WITHIN_REACH_M)
            # The nearest goal stays the path's end, so that the tasks of a group need equally many edges.
            farther = distances[start] > distances[start, path[-1]]
            goals += np.flatnonzero(close & farther).tolist()
        room = int(house.room_of[path[-1]])
        find = (
            place.speaker.find(int(near[0]), room, random)
            if len(near)
            else f"find the {house.rooms[room].kind} ."
        )
        yield {
            "path_id": first_id + number,
            "scan": group.scan_id,
            "heading": group.heading,
            "paths": [place.names(place.walks.path(start, goal)) for goal in goals],
            "instructions": [find],
        }


def hanna_routes(place: Place, splits: Sequence[str], random: np.random.Generator) -> list[Row]:
    """Routes that the assistant knows: from every viewpoint, for every split, a way with words for it."""
    rows: list[Row] = []
    for start in range(len(place.house.room_of)):
        fits = np.flatnonzero((place.walks.edges[start] >= 3) & (place.walks.edges[start] <= 6))
        if not len(fits):
            continue
        path = place.walks.path(start, int(random.choice(fits)))
        view = place.speaker.arrival(*path[:2])
        for split in splits:
            rows.append(
                {
                    "path_id": f"{place.house.scan_id}-{len(rows)}",
                    "path": place.names(path),
                    "instruction": place.speaker.describe(path, view % 12 * np.pi / 6, random).text,
                    "view_id": view,
                    "split": split,
                }
            )
    return rows


def _dialogue(place: Place, group: Group, random: np.random.Generator) -> list[Row]:
    """Questions and answers on the walk before the start."""
    messages: list[Row] = []
    heading = float(random.uniform(0, 2 * np.pi))
    for first in range(0, len(group.before) - 1, _LONGEST_ANSWER):
        part = group.before[first : first + _LONGEST_ANSWER + 1]
        told = place.speaker.describe(part, heading, random, stop=False).text
        messages += [
            _message(first, "navigator", place.speaker.ask(part[0], random)),
            _message(first, "oracle", told),
        ]
        heading = place.speaker.arrival(*part[-2:]) % 12 * np.pi / 6
    return messages


def _message(turn: int, role: str, text: str) -> Row:
    return {"nav_idx": turn, "role": role, "message": text}


def _farther(place: Place, path: Sequence[int], random: np.random.Generator) -> int:
    """A goal behind the end of a path: the shortest path to it leads along the whole path."""
    distances, start, end = place.walks.distances, path[0], path[-1]
    detour = distances[start, end] + distances[end] - distances[start]
    behind = np.flatnonzero((detour < 1e-6) & (place.walks.edges[end] <= 4))
    return int(random.choice(behind))
