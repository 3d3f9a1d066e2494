"""Floor plans of navigation graphs with paths on them, to look at on a screen or in grey print.

A graph has no walls: what is drawn as floor is a strip along every edge, or the rooms of a plan if there is
one. Floors of a building are told apart by how its viewpoints bunch in height, and are drawn side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vln.navgraph import NavGraph
from vln.plans import FloorPlan
from vln.sheet import (
    DASHES,
    DOTS,
    MARKS,
    PREDICTED,
    REFERENCE,
    Area,
    Caption,
    Figure,
    Line2D,
    Sheet,
    area_around,
    area_within,
)

STOREY_M, BUNCH_M = 1.9, 0.4
"""Least height of a storey, and how far the viewpoints of one spread about their middle."""
SMALL_HOUSE_M = 26.0
"""Houses up to this size are drawn whole, larger ones around the paths, with an overview beside."""
MARGIN_M, CLOSE_UP_M = 3.5, 12.0


class Episode(NamedTuple):
    """What to draw of one episode."""

    scan_id: str
    name: str
    """What the item is called."""
    start: str
    """Viewpoint id."""
    heading: float | None = None
    """At the start, radians."""
    goals: tuple[str, ...] = ()
    """Viewpoint ids."""
    reference: tuple[str, ...] = ()
    """Viewpoint ids of the annotated path."""
    predicted: tuple[str, ...] = ()
    """Viewpoint ids of the agent's path, repeats allowed."""
    text: str = ""
    """Instruction or dialogue; lines are kept."""
    note: str = ""
    """Scores, in one line."""
    success_radius: float | None = None
    """Metres about each goal."""


class Map(NamedTuple):
    """A drawing, and where on it the ends of the paths are."""

    figure: Figure
    marks: dict[str, list[tuple[float, float]]]
    """``start``, ``goal`` and ``end`` (of the prediction): pixels from the upper left corner."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, pixels."""
        width, height = self.figure.get_size_inches() * self.figure.dpi
        return round(width), round(height)

    def save(self, path: str | Path) -> None:
        """Write a PNG, under a temporary name first.

        Raises:
            OSError: the folder is missing or not writable.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                self.figure.savefig(file, format="png", dpi=self.figure.dpi)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def find_floors(graph: NavGraph) -> np.ndarray:
    """Floor of every viewpoint, int64 ``[V]``, 0 the lowest.

    Floors are the heights at which viewpoints bunch, at least :data:`STOREY_M` apart; stairs belong to the
    nearer one.

    Example:
        >>> positions = np.array([[0, 0, 0.1], [1, 0, 0], [2, 0, 1.2], [3, 0, 3], [4, 0, 3.1]])
        >>> flat = NavGraph("house", tuple("abcde"), positions, np.ones(5, bool), np.zeros((0, 2), int))
        >>> find_floors(flat).tolist()
        [0, 0, 0, 1, 1]
    """
    height = graph.positions[:, 2]
    counted = height[graph.included] if graph.included.any() else height
    grid = np.arange(counted.min(), counted.max() + 0.05, 0.05)
    density = np.exp(-(((grid[:, None] - counted) / BUNCH_M) ** 2) / 2).sum(axis=1)
    around = np.pad(density, 1, constant_values=-1.0)
    peaks = np.flatnonzero((density >= around[:-2]) & (density > around[2:]))
    levels: list[float] = []
    # The fullest first; a few viewpoints on a landing make no floor.
    for peak in peaks[np.argsort(-density[peaks], kind="stable")]:
        apart = all(abs(grid[peak] - level) >= STOREY_M for level in levels)
        if apart and (not levels or density[peak] >= 0.06 * density[peaks].max()):
            levels.append(float(grid[peak]))
    return np.abs(height[:, None] - np.sort(levels)).argmin(axis=1)


def draw_scan(graph: NavGraph, *, plan: FloorPlan | None = None) -> Map:
    """Map of a whole scan, a panel for each floor.

    Args:
        graph: of the scan.
        plan: its rooms; left out if it has another number of floors than the graph.
    """
    floors = find_floors(graph)
    shown = sorted(set(floors[graph.included].tolist())) or [0]
    inside = graph.positions[graph.included] if graph.included.any() else graph.positions
    plan = _fitting(plan, floors)
    number, edges = int(graph.included.sum()), len(graph.edges) // 2
    caption = Caption(f"{graph.scan_id}: {number} viewpoints, {edges} edges")
    return Map(Sheet(_whole(inside, plan), shown, graph, floors, caption, plan=plan).figure, {})


def draw_episode(graph: NavGraph, episode: Episode, *, plan: FloorPlan | None = None) -> Map:
    """Map of an episode: the floors it passes, its paths, and the instruction below.

    The annotated path is a broad pale band, the agent's a thin dark dashed line with arrows; S is the start,
    with the direction first looked at, stars are goals, X is where the agent stopped.

    Args:
        graph: of the episode's scan.
        episode: what to draw.
        plan: the scan's rooms; left out if it has another number of floors than the graph.

    Raises:
        ValueError: the graph is of another scan, or lacks a viewpoint.
    """
    if graph.scan_id != episode.scan_id:
        raise ValueError(f"episode {episode.name} is in scan {episode.scan_id}, the graph of {graph.scan_id}")
    floors = find_floors(graph)
    plan = _fitting(plan, floors)
    start, goals = graph.index(episode.start), [graph.index(name) for name in episode.goals]
    reference = [graph.index(name) for name in episode.reference]
    predicted = _without_repeats([graph.index(name) for name in episode.predicted])
    touched = [start, *goals, *reference, *predicted]
    area = _whole(graph.positions[graph.included | np.isin(np.arange(len(floors)), touched)], plan)
    part = area_within(area_around(graph.positions[touched], MARGIN_M, CLOSE_UP_M), area)
    small = max(area.width, area.height) <= SMALL_HOUSE_M
    close_up = not small and part.width * part.height < 0.6 * area.width * area.height
    caption = Caption(f"{episode.scan_id}, {episode.name}", episode.note, episode.text, _legend(episode))
    sheet = Sheet(
        part if close_up else area, sorted(set(floors[touched].tolist())), graph, floors, caption, plan=plan,
        overview=close_up, visited=touched,
    )  # fmt: skip
    for goal in goals if episode.success_radius is not None else ():
        sheet.circle(goal, episode.success_radius or 0.0)
    sheet.band(reference)
    sheet.dashes(predicted)
    marks = {"goal": [sheet.mark(goal, "goal") for goal in goals]}
    marks["start"] = [sheet.start(start, episode.heading)]
    marks["end"] = [sheet.mark(predicted[-1], "end", aside=predicted[-1] == start)] if predicted else []
    return Map(sheet.figure, marks)


def _whole(positions: np.ndarray, plan: FloorPlan | None) -> Area:
    """What shows a whole scan, its rooms included."""
    if plan is None:
        return area_around(positions, 1.5, 4.0)
    corners = np.array([room.box for room in plan.rooms]).reshape(-1, 2)
    return area_around(np.concatenate([positions[:, :2], corners]), 0.9, 4.0)


def _fitting(plan: FloorPlan | None, floors: np.ndarray) -> FloorPlan | None:
    """The plan, if its floors are those of the graph."""
    return plan if plan is not None and plan.num_floors == floors.max() + 1 else None


def _without_repeats(path: Sequence[int]) -> list[int]:
    return [node for step, node in enumerate(path) if step == 0 or node != path[step - 1]]


def _legend(episode: Episode) -> tuple[Line2D, ...]:
    """Handles of what the episode has."""
    small = {"markersize": 10}
    handles = [Line2D([], [], ls="", label="start, and where it looks", **MARKS["start"] | small)]
    if episode.goals:
        handles.append(Line2D([], [], ls="", label="goal", **MARKS["goal"] | {"markersize": 14}))
    if episode.reference:
        handles.append(Line2D([], [], color=REFERENCE, lw=5.5, label="annotated path", markeredgewidth=0))
    if episode.predicted:
        handles.append(Line2D([], [], color=PREDICTED, lw=1.8, ls=DASHES, label="agent's path"))
        handles.append(Line2D([], [], ls="", label="agent's stop", **MARKS["end"] | small))
    if episode.success_radius is not None and episode.goals:
        label = f"{episode.success_radius:g} m about the goal"
        handles.append(Line2D([], [], color="#606060", lw=1.1, ls=DOTS, label=label))
    return tuple(handles)
