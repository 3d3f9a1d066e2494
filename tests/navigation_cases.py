"""Graphs to test navigation on, files of them, and a plain simulator of one agent to compare with."""

import json
import math

import numpy as np
from hypothesis import strategies as st

from vln.navgraph import NavGraph

RIGHT, UP = 2 * math.pi / 12, math.pi / 6


def graph_of(positions, links, *, scan_id="house", excluded=(), both_ways=True):
    """Graph from positions and pairs of indices; viewpoints are called after their scan."""
    size = len(positions)
    flags = np.zeros((size, size), bool)
    for a, b in links:
        flags[a, b] = True
        flags[b, a] |= both_ways
    included = np.array([number not in excluded for number in range(size)])
    np.fill_diagonal(flags, False)
    return NavGraph(
        scan_id,
        tuple(f"{scan_id}-{number}" for number in range(size)),
        np.array(positions, dtype=np.float64).reshape(size, 3),
        included,
        np.argwhere(flags & included),
    )


def house(scan_id="house"):
    """A ring of four rooms, a corridor of two, stairs straight up, a closed room, and an excluded spot."""
    positions = [
        (0.0, 0.0, 1.5), (2.0, 0.3, 1.5), (2.2, 2.1, 1.5), (-0.1, 2.0, 1.6), (4.1, 2.4, 1.5), (6.0, 2.5, 1.4),
        (6.3, 2.6, 4.2), (9.0, 9.0, 1.5), (1.0, 1.0, 1.5),
    ]  # fmt: skip
    links = [(0, 1), (1, 2), (2, 3), (3, 0), (2, 4), (4, 5), (5, 6), (0, 8), (2, 8)]
    return graph_of(positions, links, scan_id=scan_id, excluded=(8,))


@st.composite
def graphs(draw, scan_id="house", *, both_ways=None):
    """Small graphs with shared positions, ladders, one-way flags, excluded and lonely viewpoints."""
    size = draw(st.integers(1, 9))
    coordinate = st.one_of(st.integers(-2, 2).map(float), st.floats(-5, 5, width=32))
    positions = draw(st.lists(st.tuples(coordinate, coordinate, coordinate), min_size=size, max_size=size))
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    links = draw(st.lists(st.sampled_from(pairs), max_size=20)) if pairs else []
    excluded = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
    symmetric = draw(st.booleans()) if both_ways is None else both_ways
    return graph_of(positions, links, scan_id=scan_id, excluded=excluded, both_ways=symmetric)


def connectivity(graph):
    """The graph as a connectivity file holds it; an excluded viewpoint has its flags, too."""
    size = len(graph.viewpoint_ids)
    flags = np.zeros((size, size), bool)
    flags[graph.edges[:, 0], graph.edges[:, 1]] = True
    rows = []
    for number, viewpoint_id in enumerate(graph.viewpoint_ids):
        pose = np.eye(4)
        pose[:3, 3] = graph.positions[number]
        rows.append(
            {
                "image_id": viewpoint_id,
                "pose": pose.ravel().tolist(),
                "included": bool(graph.included[number]),
                "visible": [False] * size,
                "unobstructed": flags[number].tolist(),
                "height": 1.5,
            }
        )
    return rows


def write_connectivity(folder, *graphs, listed=True):
    """Write connectivity files, and the list of scans; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph in graphs:
        (folder / f"{graph.scan_id}_connectivity.json").write_text(json.dumps(connectivity(graph)))
    if listed:
        (folder / "scans.txt").write_text("\n".join(graph.scan_id for graph in graphs) + "\n")
    return folder


class OneAgent:
    """The rules of the simulator written out for one agent, number by number."""

    def __init__(self, graph, camera, *, discretized=True):
        self.graph, self.camera, self.discretized = graph, camera, discretized

    def begin(self, viewpoint, heading, elevation):
        self.viewpoint = viewpoint
        self._turn_to(heading, elevation)
        return self

    def act(self, index, turn, tilt):
        self.viewpoint = self.locations()[index][0]
        if self.discretized:
            turn, tilt = (math.copysign(s, x) if x else 0.0 for s, x in ((RIGHT, turn), (UP, tilt)))
        self._turn_to(self.heading + turn, self.elevation + tilt)
        return self

    def _turn_to(self, heading, elevation):
        heading = math.fmod(heading, 2 * math.pi)
        if heading < 0:
            heading += 2 * math.pi
        if not self.discretized:
            low, high = self.camera.elevation_limits
            self.heading, self.elevation, self.view = heading, max(min(elevation, high), low), 0
            return
        k, part = divmod(heading / RIGHT, 1)
        k = int(k + (part >= 0.5)) % 12
        row = 0 if elevation < -UP / 2 else 2 if elevation > UP / 2 else 1
        self.heading, self.elevation, self.view = k * RIGHT, (row - 1) * UP, 12 * row + k

    def locations(self):
        """``(viewpoint, rel_heading, rel_elevation, rel_distance)``, the own one first."""
        angle = math.pi / 2 - self.heading
        c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        here = self.graph.positions[self.viewpoint].astype(np.float32)
        found = []
        for source, target in self.graph.edges.tolist():
            if source != self.viewpoint:
                continue
            x, y, z = self.graph.positions[target].astype(np.float32) - here
            flat = np.sqrt(x * x + y * y)
            if self.camera.restricted:
                if flat == 0:
                    continue
                inverse = np.float32(1) / flat
                if float((x * inverse) * c + (y * inverse) * s) < self.camera.cosine:
                    continue
            right, ahead = float(x * s - y * c), float(x * c + y * s)
            heading = float(np.float32(math.atan2(right, ahead))) if flat else 0.0
            elevation = math.atan2(float(z), float(flat)) - self.elevation
            distance = float(np.sqrt(x * x + y * y + z * z))
            found.append((math.sqrt(heading**2 + elevation**2), target, heading, elevation, distance))
        found.sort(key=lambda entry: entry[:2])
        return [(self.viewpoint, 0.0, 0.0, 0.0), *(entry[1:] for entry in found)]
