"""The sheet that a map is drawn on: panels of floors, a legend, and text below. ``vln.maps`` draws on it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vln.navgraph import NavGraph
from vln.plans import FloorPlan, Landmark

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.colors import is_color_like
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Rectangle
except ImportError as error:
    raise ImportError("maps need matplotlib: pip install 'fq-gan[vln]'") from error

STRIP_M, DPI = 1.1, 110
DASHES, DOTS = (0, (3.5, 1.6)), (0, (1, 2))
_WIDTH, _TALLEST, _OVERVIEW = 10.0, 6.2, 2.3
_TOP, _MARGIN, _LABEL, _GAP = 0.42, 0.15, 0.3, 0.1
_LINE, _TEXT_COLUMNS = 0.19, 118
_GHOST, _FLOOR, _EDGE, _NODE = "#f6f6f6", "#e6e6e6", "#bdbdbd", "#8f8f8f"
_EYES_M, _NEAR_M = 1.65, 2.5
"""How far the floor is below the viewpoints, and a little more; how near to a path landmarks are named."""
_ROOM, _WALL, _WORDS = "#f1f1f1", "#6a6a6a", "#404040"
REFERENCE, _RIM, PREDICTED, _GOAL = "#a9cbe8", "#4a7ba6", "#8c1515", "#f5c542"


class Area(NamedTuple):
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

    def overlaps(self, other: Area) -> bool:
        """Whether the two have more than an edge in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top


def area_around(positions: np.ndarray, margin: float, least: float) -> Area:
    """Area about positions ``[N, 2 or 3]`` with a margin, at least so many metres each way, and no strip."""
    low, high = positions[:, :2].min(axis=0) - margin, positions[:, :2].max(axis=0) + margin
    least = max(least, float((high - low).max()) / 5)  # marks beside each other need room on the panel
    short = np.maximum(least - (high - low), 0) / 2
    (left, bottom), (right, top) = low - short, high + short
    return Area(float(left), float(right), float(bottom), float(top))


def area_within(part: Area, whole: Area) -> Area:
    """The part moved, and if need be cut, so that it shows nothing beyond the whole."""
    edges = []
    for low, high, least, most in (
        (part.left, part.right, whole.left, whole.right),
        (part.bottom, part.top, whole.bottom, whole.top),
    ):
        shift = max(least - low, 0.0) + min(most - high, 0.0)
        edges.append((max(low + shift, least), min(high + shift, most)))
    return Area(*edges[0], *edges[1])


class Caption(NamedTuple):
    """What is written on a sheet."""

    title: str
    note: str = ""
    text: str = ""
    legend: tuple[Line2D, ...] = ()


class Sheet:
    """Panels of floors over a legend and text; paths are drawn on the panel of their floor.

    Args:
        area: what the panels show.
        shown: floors, ascending.
        graph: of the scan.
        floors: of its viewpoints, ``[V]``.
        caption: what is written.
        plan: rooms to draw instead of strips along the edges.
        overview: whether a small map of the whole scan is put beside.
        visited: viewpoints; what stands in their rooms is named.
    """

    def __init__(
        self,
        area: Area,
        shown: Sequence[int],
        graph: NavGraph,
        floors: np.ndarray,
        caption: Caption,
        *,
        plan: FloorPlan | None = None,
        overview: bool = False,
        visited: Sequence[int] = (),
    ) -> None:
        self.graph, self.floors, self.area, self.plan = graph, floors, area, plan
        self.panels: dict[int, Axes] = {}
        wide = _WIDTH - 2 * _MARGIN - (_OVERVIEW if overview else 0.0)
        columns, self.scale = _arrange(area, len(shown), wide)
        label = _LABEL if overview or floors.max() > 0 else 0.0
        lines = _wrapped(caption.text)
        across, down = area.width * self.scale, area.height * self.scale
        panels = max(-(-len(shown) // columns) * (down + label), _OVERVIEW if overview else 0.0)
        below = 0.15 + 0.32 * bool(caption.legend) + 0.26 * bool(caption.note) + _LINE * len(lines)
        height = round((_TOP + panels + below) * DPI) / DPI
        self.figure = Figure(figsize=(_WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._height = float(self.figure.get_size_inches()[1])
        self._write(caption.title, _MARGIN, 0.12, 12, weight="bold")
        left = _MARGIN + (wide - columns * across - (columns - 1) * _GAP) / 2
        for number, floor in enumerate(shown):
            row, column = divmod(number, columns)
            x, y = left + column * (across + _GAP), _TOP + row * (down + label)
            if floors.max() > 0:
                self._write(self._floor_name(floor, shown[0]), x, y + 0.06, 9, color=_WORDS)
            self.panels[floor] = self._panel(x, y + label, across, down, area)
            self._draw_floor(floor, visited, caption.text)
        self._scale_bar(self.panels[shown[0]])
        if overview:
            self._overview(shown, _MARGIN + wide + _GAP, _TOP + label)
        self._write_below(_TOP + panels + 0.08, caption, lines)

    def _write_below(self, y: float, caption: Caption, lines: Sequence[str]) -> None:
        if caption.legend:
            self.figure.legend(
                handles=list(caption.legend), loc="upper left", ncols=len(caption.legend), frameon=False,
                fontsize=9, bbox_to_anchor=(0.1 / _WIDTH, 1 - y / self._height), borderaxespad=0,
                columnspacing=1.6,
            )  # fmt: skip
            y += 0.32
        if caption.note:
            self._write(caption.note, _MARGIN, y, 10, weight="bold")
            y += 0.26
        for number, line in enumerate(lines):
            self._write(line, _MARGIN, y + number * _LINE, 10)

    def _floor_name(self, floor: int, lowest: int) -> str:
        def level(number: int) -> float:
            return float(self.graph.positions[self.floors == number, 2].mean())

        words = f", {level(floor) - level(lowest):.1f} m above it" if floor > lowest else ""
        return f"floor {floor + 1} of {self.floors.max() + 1}{words}"

    def _draw_floor(self, floor: int, visited: Sequence[int], text: str) -> None:
        axes = self.panels[floor]
        if self.plan is None:
            self._strips(axes, self.floors >= 0, self.scale, _GHOST)
            self._strips(axes, self.floors == floor, self.scale, _FLOOR)
        else:
            self._rooms(axes, floor, visited, text)
        self._graph(axes, floor)

    def _rooms(self, axes: Axes, floor: int, visited: Sequence[int], text: str) -> None:
        """Rooms, doorways and landmarks; those near the viewpoints visited have names, as far as there is
        room.
        """
        assert self.plan is not None
        inch = 1 / self.scale
        taken: list[Area] = []
        for room in self.plan.rooms:
            if room.floor == floor:
                left, bottom, right, top = room.box
                axes.add_patch(
                    Rectangle((left, bottom), right - left, top - bottom, fc=_ROOM, ec=_WALL, lw=1.6)
                )
                x, y = left + 0.07 * inch, top - 0.07 * inch
                axes.text(
                    x, y, room.kind, fontsize=8, style="italic", color="#707070", va="top", clip_on=True
                )
                taken.append(Area(x, x + 0.075 * len(room.kind) * inch, y - 0.13 * inch, y))
        for door in self.plan.doorways:
            if door.floor == floor:
                along = np.array([0.0, 0.5] if door.upright else [0.5, 0.0]) * door.width
                middle = np.array([door.x, door.y])
                ends = np.array([middle - along, middle + along])
                axes.plot(*ends.T, color=_ROOM, linewidth=3, solid_capstyle="butt", zorder=1.5)
        spots = self.graph.positions[[node for node in visited if self.floors[node] == floor], :2]
        self._landmarks(axes, list(self._things(floor)), spots, taken, text)

    def _things(self, floor: int) -> Iterator[Landmark]:
        """Landmarks of a floor."""
        assert self.plan is not None
        heights = self.graph.positions[:, 2]
        grounds = [heights[self.floors == n].mean() - _EYES_M for n in range(1, self.plan.num_floors)]
        for thing in self.plan.landmarks:
            if sum(thing.position[2] >= ground for ground in grounds) == floor:
                yield thing

    def _landmarks(
        self, axes: Axes, things: Sequence[Landmark], spots: np.ndarray, taken: list[Area], text: str
    ) -> None:
        inch, text = 1 / self.scale, text.lower()
        marks = [Area(x - 0.1 * inch, x + 0.1 * inch, y - 0.1 * inch, y + 0.1 * inch) for x, y in spots]

        def away(thing: Landmark) -> float:
            return min((math.dist(thing.position[:2], spot) for spot in spots), default=0.0)

        def order(thing: Landmark) -> tuple[bool, float]:
            return thing.name not in text, away(thing)

        for thing in sorted(things, key=order):
            x, y, _ = thing.position
            near = away(thing) <= _NEAR_M
            colour = thing.colour if is_color_like(thing.colour) else "grey"
            axes.plot(
                x, y, "s", color=colour if near else "#bdbdbd", markersize=4.5 if near else 2.5,
                markeredgecolor="black", mew=0.5 * near, zorder=1.7,
            )  # fmt: skip
            if not len(spots) or not near:
                continue
            wanted = thing.name in text
            size = 0.066 if wanted else 0.058  # inches a letter, bold or not
            reach, low = size * len(thing.name) * inch, y - 0.06 * inch
            for side, left in (("left", x + 0.06 * inch), ("right", x - 0.06 * inch - reach)):
                box = Area(left, left + reach, low, low + 0.12 * inch)
                inside = self.area.left < left and box.right < self.area.right and low > self.area.bottom
                # What the instruction names is written even where a path passes.
                others = taken if wanted else taken + marks
                if inside and not any(box.overlaps(other) for other in others):
                    axes.text(
                        x + (0.06 if side == "left" else -0.06) * inch, y, thing.name, fontsize=6.5, ha=side,
                        va="center_baseline", weight="bold" if wanted else "normal", color="#202020",
                        zorder=3.5, clip_on=True,
                    )  # fmt: skip
                    taken.append(box)
                    break

    def _write(self, text: str, x: float, y: float, size: float, **style: Any) -> None:
        """Text with its upper left corner at inches from that of the page."""
        self.figure.text(
            x / _WIDTH, 1 - y / self._height, text, fontsize=size, va="top", parse_math=False, **style
        )

    def _panel(self, x: float, y: float, width: float, height: float, area: Area) -> Axes:
        axes = self.figure.add_axes(
            (x / _WIDTH, 1 - (y + height) / self._height, width / _WIDTH, height / self._height)
        )
        axes.set(xlim=(area.left, area.right), ylim=(area.bottom, area.top), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#b0b0b0", linewidth=0.8)
        return axes

    def _graph(self, axes: Axes, floor: int) -> None:
        """Edges and viewpoints of a floor, and where one leaves it."""
        places, edges = self.graph.positions[:, :2], self.graph.edges
        here = (self.floors == floor) & self.graph.included
        same = edges[here[edges].all(axis=1)]
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

    def _overview(self, shown: Sequence[int], x: float, y: float) -> None:
        whole = area_around(self.graph.positions[self.graph.included], 1.5, 4.0)
        scale = (_OVERVIEW - 0.25) / max(whole.width, whole.height)
        axes = self._panel(x, y, whole.width * scale, whole.height * scale, whole)
        self._strips(axes, np.isin(self.floors, shown), scale, _FLOOR)
        corner, size = (self.area.left, self.area.bottom), (self.area.width, self.area.height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="black", linewidth=1.2))
        self._write("where it is", x, y - 0.24, 9, color=_WORDS)

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
        patch = Circle(tuple(self.graph.positions[node, :2]), radius, fill=False, linestyle=DOTS)
        patch.set(edgecolor="#606060", linewidth=1.1)
        self.panels[int(self.floors[node])].add_patch(patch)

    def band(self, path: Sequence[int]) -> None:
        """The annotated path."""
        for axes, steps in self._segments(path):
            for width, colour, order in ((7.5, _RIM, 3.0), (5.5, REFERENCE, 3.1)):
                lines = LineCollection(list(steps), colors=colour, linewidths=width, capstyle="round")
                lines.set_zorder(order)
                axes.add_collection(lines)

    def dashes(self, path: Sequence[int]) -> None:
        """The agent's path."""
        head = {"arrowstyle": "-|>,head_width=0.26,head_length=0.5", "color": PREDICTED, "lw": 0}
        for axes, steps in self._segments(path):
            lines = LineCollection(list(steps), colors=PREDICTED, linewidths=1.8, linestyles=DASHES)
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
        if aside:  # towards the middle, so that it stays on the panel
            middle = np.array([self.area.left + self.area.right, self.area.bottom + self.area.top]) / 2
            place = place + np.where(place < middle, 0.16, -0.16) / self.scale
        axes.plot(*place, linestyle="", **MARKS[kind])
        if kind == "start":
            x, y = (float(number) for number in place)
            axes.text(x, y, "S", fontsize=8, ha="center", va="center_baseline", weight="bold", zorder=6.3)
        x, y = axes.transData.transform(place)
        return float(x), float(self._height * DPI - y)


MARKS: dict[str, dict[str, Any]] = {
    "goal": {"marker": "*", "markersize": 20, "mfc": _GOAL, "mec": "black", "mew": 1.1, "zorder": 5},
    "start": {"marker": "o", "markersize": 12, "mfc": "white", "mec": "black", "mew": 1.5, "zorder": 6},
    "end": {"marker": "X", "markersize": 10, "mfc": PREDICTED, "mec": "white", "mew": 1.0, "zorder": 7},
}


def _arrange(area: Area, number: int, wide: float) -> tuple[int, float]:
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
