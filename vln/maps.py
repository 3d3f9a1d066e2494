"""Floor plans of navigation graphs with paths on them, to look at on a screen or in grey print.

A graph has no walls: what is drawn as floor is a strip along every edge. Floors of a building are told apart
by how its viewpoints bunch in height, and are drawn side by side.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vln.navgraph import NavGraph

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Rectangle
except ImportError as error:
    raise ImportError("maps need matplotlib: pip install 'fq-gan[vln]'") from error

STOREY_M, BUNCH_M = 1.9, 0.4
"""Least height of a storey, and how far the viewpoints of one spread about their middle."""
SMALL_HOUSE_M = 26.0
"""Houses up to this size are drawn whole, larger ones around the paths, with an overview beside."""
MARGIN_M, CLOSE_UP_M = 3.5, 12.0
STRIP_M, DPI = 1.1, 110
_DASHES = (0, (3.5, 1.6))
_WIDTH, _TALLEST, _OVERVIEW = 10.0, 6.2, 2.3
_LINE, _TEXT_COLUMNS = 0.19, 118
_GHOST, _FLOOR, _EDGE, _NODE = "#f6f6f6", "#e6e6e6", "#bdbdbd", "#8f8f8f"
_REFERENCE, _RIM, _PREDICTED, _GOAL = "#a9cbe8", "#4a7ba6", "#8c1515", "#f5c542"


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


class _Area(NamedTuple):
    """What a panel shows, metres."""

    left: float
    right: float
    bottom: float
    top: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.top - self.bottom


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


def draw_scan(graph: NavGraph) -> Map:
    """Map of a whole scan, a panel for each floor."""
    floors = find_floors(graph)
    shown = sorted(set(floors[graph.included].tolist())) or [0]
    area = _around(graph.positions[graph.included] if graph.included.any() else graph.positions, 1.5, 4.0)
    number, edges = int(graph.included.sum()), len(graph.edges) // 2
    title = f"{graph.scan_id}: {number} viewpoints, {edges} edges"
    page = _Page(area, shown, graph, floors, title=title, note="", text="", overview=False)
    return Map(page.figure, {})


def draw_episode(graph: NavGraph, episode: Episode) -> Map:
    """Map of an episode: the floors it passes, its paths, and the instruction below.

    The annotated path is a broad pale band, the agent's a thin dark dashed line with arrows; S is the start,
    with the direction first looked at, stars are goals, X is where the agent stopped.

    Args:
        graph: of the episode's scan.
        episode: what to draw.

    Raises:
        ValueError: the graph is of another scan, or lacks a viewpoint.
    """
    if graph.scan_id != episode.scan_id:
        raise ValueError(f"episode {episode.name} is in scan {episode.scan_id}, the graph of {graph.scan_id}")
    floors = find_floors(graph)
    start, goals = graph.index(episode.start), [graph.index(name) for name in episode.goals]
    reference = [graph.index(name) for name in episode.reference]
    predicted = _without_repeats([graph.index(name) for name in episode.predicted])
    touched = np.array([start, *goals, *reference, *predicted])
    inside = graph.positions[graph.included | np.isin(np.arange(len(floors)), touched)]
    area = _around(inside, 1.5, 4.0)
    part = _within(_around(graph.positions[touched], MARGIN_M, CLOSE_UP_M), area)
    small = max(area.width, area.height) <= SMALL_HOUSE_M
    close_up = not small and part.width * part.height < 0.6 * area.width * area.height
    area = part if close_up else area
    shown = sorted(set(floors[touched].tolist()))
    page = _Page(
        area, shown, graph, floors, title=f"{episode.scan_id}, {episode.name}", note=episode.note,
        text=episode.text, overview=close_up, legend=_legend(episode),
    )  # fmt: skip
    if episode.success_radius is not None:
        for goal in goals:
            page.circle(goal, episode.success_radius)
    page.band(reference)
    page.dashes(predicted)
    marks = {
        "goal": [page.mark(goal, "goal") for goal in goals],
        "start": [page.start(start, episode.heading)],
    }
    marks["end"] = [page.mark(predicted[-1], "end", aside=predicted[-1] == start)] if predicted else []
    return Map(page.figure, marks)


def _without_repeats(path: Sequence[int]) -> list[int]:
    return [node for step, node in enumerate(path) if step == 0 or node != path[step - 1]]


def _around(positions: np.ndarray, margin: float, least: float) -> _Area:
    low, high = positions[:, :2].min(axis=0) - margin, positions[:, :2].max(axis=0) + margin
    short = np.maximum(least - (high - low), 0) / 2
    (left, bottom), (right, top) = low - short, high + short
    return _Area(float(left), float(right), float(bottom), float(top))


def _within(part: _Area, whole: _Area) -> _Area:
    """The part moved, and if need be cut, so that it shows nothing beyond the whole."""
    edges = []
    for low, high, least, most in (
        (part.left, part.right, whole.left, whole.right),
        (part.bottom, part.top, whole.bottom, whole.top),
    ):
        shift = max(least - low, 0.0) + min(most - high, 0.0)
        edges.append((max(low + shift, least), min(high + shift, most)))
    return _Area(*edges[0], *edges[1])


class _Page:
    """Panels of floors over a legend and text; paths are drawn on the panel of their floor."""

    def __init__(
        self, area: _Area, shown: list[int], graph: NavGraph, floors: np.ndarray, *, title: str, note: str,
        text: str, overview: bool, legend: Sequence[Line2D] = (),
    ) -> None:  # fmt: skip
        self.graph, self.floors, self.area = graph, floors, area
        wide = _WIDTH - 0.3 - (_OVERVIEW if overview else 0.0)
        columns, self.scale = _arrange(area, len(shown), wide)
        rows = -(-len(shown) // columns)
        lines = _wrapped(text)
        label = 0.3 if overview or floors.max() > 0 else 0.0
        below = 0.15 + (0.32 if legend else 0.0) + (0.26 if note else 0.0) + _LINE * len(lines)
        panel_width, panel_height = area.width * self.scale, area.height * self.scale
        panels = max(rows * (panel_height + label), _OVERVIEW if overview else 0.0)
        height = 0.42 + panels + below
        self.figure = Figure(figsize=(_WIDTH, round(height * DPI) / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._height = float(self.figure.get_size_inches()[1])
        self._write(title, 0.15, 0.12, 12, weight="bold")
        self.panels: dict[int, Axes] = {}
        left = 0.15 + (wide - columns * panel_width - (columns - 1) * 0.1) / 2
        level = float(graph.positions[floors == shown[0], 2].mean()) if (floors == shown[0]).any() else 0.0
        for number, floor in enumerate(shown):
            row, column = divmod(number, columns)
            x, y = left + column * (panel_width + 0.1), 0.42 + row * (panel_height + label)
            if floors.max() > 0:
                above = float(graph.positions[floors == floor, 2].mean()) - level
                words = f", {above:.1f} m above it" if number else ""
                self._write(
                    f"floor {floor + 1} of {floors.max() + 1}{words}", x, y + 0.06, 9, color="#404040"
                )
            self.panels[floor] = self._panel(x, y + label, panel_width, panel_height, area)
            self._strips(self.panels[floor], floors >= 0, self.scale, _GHOST)
            self._plan(self.panels[floor], floor, self.scale)
        self._scale_bar(self.panels[shown[0]])
        if overview:
            self._overview(shown, 0.15 + wide + 0.1, 0.42 + label)
        y = 0.42 + panels + 0.08
        if legend:
            self.figure.legend(
                handles=list(legend), loc="upper left", ncols=len(legend), frameon=False, fontsize=9,
                bbox_to_anchor=(0.1 / _WIDTH, 1 - y / self._height), borderaxespad=0, columnspacing=1.6,
            )  # fmt: skip
            y += 0.32
        if note:
            self._write(note, 0.15, y, 10, weight="bold")
            y += 0.26
        for number, line in enumerate(lines):
            self._write(line, 0.15, y + number * _LINE, 10)

    def _write(self, text: str, x: float, y: float, size: float, **style: Any) -> None:
        """Text with its upper left corner at inches from that of the page."""
        self.figure.text(
            x / _WIDTH, 1 - y / self._height, text, fontsize=size, va="top", parse_math=False, **style
        )

    def _panel(self, x: float, y: float, width: float, height: float, area: _Area) -> Axes:
        axes = self.figure.add_axes(
            (x / _WIDTH, 1 - (y + height) / self._height, width / _WIDTH, height / self._height)
        )
        axes.set(xlim=(area.left, area.right), ylim=(area.bottom, area.top), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#b0b0b0", linewidth=0.8)
        return axes

    def _plan(self, axes: Axes, floor: int, scale: float, *, detail: bool = True) -> None:
        """Strips, edges and viewpoints of a floor."""
        places, edges = self.graph.positions[:, :2], self.graph.edges
        here = (self.floors == floor) & self.graph.included
        same = edges[here[edges].all(axis=1)]
        self._strips(axes, here, scale, _FLOOR)
        if not detail:
            return
        axes.add_collection(LineCollection(places[same], colors=_EDGE, linewidths=0.7))
        axes.plot(*places[here].T, "o", color=_NODE, markersize=2.4, markeredgewidth=0)
        leaving = edges[here[edges[:, 0]] & ~here[edges[:, 1]] & self.graph.included[edges[:, 1]]]
        axes.add_collection(LineCollection(places[leaving], colors=_NODE, linewidths=0.9, linestyles=":"))
        up = self.floors[leaving[:, 1]] > floor
        for marker, rows in (("^", up), ("v", ~up)):
            axes.plot(*places[leaving[rows, 0]].T, marker=marker, color="#6a6a6a", markersize=5, mew=0, ls="")

    def _strips(self, axes: Axes, here: np.ndarray, scale: float, colour: str) -> None:
        """What can be walked on between some of the viewpoints, as wide as a corridor."""
        places, edges = self.graph.positions[:, :2], self.graph.edges
        here = here & self.graph.included
        same, width = edges[here[edges].all(axis=1)], STRIP_M * scale * 72
        lines = LineCollection(places[same], colors=colour, linewidths=width, capstyle="round", zorder=0.5)
        axes.add_collection(lines)
        axes.plot(*places[here].T, "o", color=colour, markersize=width, markeredgewidth=0, zorder=0.5)

    def _overview(self, shown: list[int], x: float, y: float) -> None:
        whole = _around(self.graph.positions[self.graph.included], 1.5, 4.0)
        room = _OVERVIEW - 0.25
        scale = room / max(whole.width, whole.height)
        axes = self._panel(x, y, whole.width * scale, whole.height * scale, whole)
        for floor in shown:
            self._plan(axes, floor, scale, detail=False)
        corner, size = (self.area.left, self.area.bottom), (self.area.width, self.area.height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=1.2))
        self._write("where it is", x, y - 0.24, 9, color="#404040")

    def _scale_bar(self, axes: Axes) -> None:
        length = 5.0 if self.area.width > 15 else 2.0
        x, y = self.area.left + 0.12 / self.scale, self.area.bottom + 0.14 / self.scale
        axes.plot([x, x + length], [y, y], color="black", linewidth=2.2, solid_capstyle="butt")
        axes.text(x + length + 0.07 / self.scale, y, f"{length:.0f} m", fontsize=8, va="center")

    def _segments(self, path: Sequence[int]) -> Iterator[tuple[Axes, np.ndarray]]:
        """Steps of a path ``[S, 2, 2]`` for every panel that shows one of their ends."""
        steps = np.array([path[:-1], path[1:]], dtype=np.int64).T
        for floor, axes in self.panels.items():
            seen = steps[(self.floors[steps] == floor).any(axis=1)]
            if len(seen):
                yield axes, self.graph.positions[seen, :2]

    def circle(self, node: int, radius: float) -> None:
        """Where a stop counts as success."""
        patch = Circle(tuple(self.graph.positions[node, :2]), radius, fill=False, linestyle=(0, (1, 2)))
        patch.set(edgecolor="#606060", linewidth=1.1)
        self.panels[int(self.floors[node])].add_patch(patch)

    def band(self, path: Sequence[int]) -> None:
        """The annotated path."""
        for axes, steps in self._segments(path):
            for width, colour, order in ((7.5, _RIM, 3.0), (5.5, _REFERENCE, 3.1)):
                lines = LineCollection(list(steps), colors=colour, linewidths=width, capstyle="round")
                lines.set_zorder(order)
                axes.add_collection(lines)

    def dashes(self, path: Sequence[int]) -> None:
        """The agent's path."""
        head = {"arrowstyle": "-|>,head_width=0.26,head_length=0.5", "color": _PREDICTED, "lw": 0}
        for axes, steps in self._segments(path):
            lines = LineCollection(list(steps), colors=_PREDICTED, linewidths=1.8, linestyles=_DASHES)
            lines.set_zorder(4)
            axes.add_collection(lines)
            for here, there in steps:
                away = there - here
                if np.hypot(*away) * self.scale > 0.12:  # an arrow on a shorter step would hide it
                    tip, tail = here + 0.62 * away, here + 0.5 * away
                    axes.annotate(
                        "", tuple(tip), tuple(tail), arrowprops=head, annotation_clip=True, zorder=4.1
                    )

    def start(self, node: int, heading: float | None) -> tuple[float, float]:
        """The start, and where the agent looks."""
        axes, place = self.panels[int(self.floors[node])], self.graph.positions[node, :2]
        if heading is not None:
            tip = place + 0.42 / self.scale * np.array([math.sin(heading), math.cos(heading)])
            arrow = {"arrowstyle": "-|>,head_width=0.2,head_length=0.4", "color": "black", "lw": 1.4}
            axes.annotate("", tuple(tip), tuple(place), arrowprops=arrow, annotation_clip=False, zorder=5.9)
        return self.mark(node, "start")

    def mark(self, node: int, kind: str, *, aside: bool = False) -> tuple[float, float]:
        """Draw a mark, or draw it beside what is there already; returns its pixel from the upper left."""
        axes, place = self.panels[int(self.floors[node])], self.graph.positions[node, :2]
        place = place + (0.16 / self.scale if aside else 0.0)
        axes.plot(*place, linestyle="", **_MARKS[kind])
        if kind == "start":
            x, y = (float(number) for number in place)
            axes.text(x, y, "S", fontsize=8, ha="center", va="center_baseline", weight="bold", zorder=6.3)
        x, y = axes.transData.transform(place)
        return float(x), float(self._height * DPI - y)


_MARKS: dict[str, dict[str, Any]] = {
    "goal": {"marker": "*", "markersize": 20, "mfc": _GOAL, "mec": "black", "mew": 1.1, "zorder": 5},
    "start": {"marker": "o", "markersize": 12, "mfc": "white", "mec": "black", "mew": 1.5, "zorder": 6},
    "end": {"marker": "X", "markersize": 10, "mfc": _PREDICTED, "mec": "white", "mew": 1.0, "zorder": 7},
}


def _legend(episode: Episode) -> list[Line2D]:
    """Handles of what the episode has."""
    small = {"markersize": 10}
    handles = [Line2D([], [], ls="", label="start, and where it looks", **_MARKS["start"] | small)]
    if episode.goals:
        handles.append(Line2D([], [], ls="", label="goal", **_MARKS["goal"] | {"markersize": 14}))
    if episode.reference:
        handles.append(Line2D([], [], color=_REFERENCE, lw=5.5, label="annotated path", markeredgewidth=0))
    if episode.predicted:
        handles.append(Line2D([], [], color=_PREDICTED, lw=1.8, ls=_DASHES, label="agent's path"))
        handles.append(Line2D([], [], ls="", label="agent's stop", **_MARKS["end"] | small))
    if episode.success_radius is not None and episode.goals:
        label = f"{episode.success_radius:g} m about the goal"
        handles.append(Line2D([], [], color="#606060", lw=1.1, ls=(0, (1, 2)), label=label))
    return handles


def _arrange(area: _Area, number: int, wide: float) -> tuple[int, float]:
    """Columns of panels and inches a metre that make them largest."""
    best = (1, 0.0)
    for columns in range(1, number + 1):
        rows = -(-number // columns)
        across = (wide - 0.1 * (columns - 1)) / columns / area.width
        scale = min(across, (_TALLEST / rows - 0.3) / area.height)
        best = max(best, (columns, scale), key=lambda pair: (pair[1], -pair[0]))
    return best


def _wrapped(text: str) -> list[str]:
    """Lines of a text, with what the font lacks replaced; a text it lacks for the most part is left out."""
    charmap = get_font(findfont(FontProperties())).get_charmap()
    missing = sum(ord(letter) not in charmap for letter in text if letter.isalpha())
    if missing > 0.2 * max(1, sum(letter.isalpha() for letter in text)):
        return ["(a script that the font of maps lacks; the page has the text)"]
    known = "".join(letter if letter == "\n" or ord(letter) in charmap else "?" for letter in text)
    return [line for part in known.splitlines() for line in _fold(part)]


def _fold(line: str) -> Iterable[str]:
    return textwrap.wrap(line, _TEXT_COLUMNS) or [""]
