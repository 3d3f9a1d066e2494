"""Navigation graphs: viewpoints of a scan, the edges between them, shortest paths.

Reads the connectivity files of the Matterport3D Simulator (Anderson et al., 2018), from folders or archives.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vln.sources import ARCHIVES, Document, digest, parse_json, read_documents

try:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra
except ImportError as error:
    raise ImportError("vln.navgraph needs scipy: pip install 'fq-gan[vln]'") from error

SUFFIX = "_connectivity.json"
_FIELDS = ("image_id", "pose", "included", "unobstructed")
_CACHE_FORMAT = 1
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class NavGraph:
    """Viewpoints of one scan and where one can walk from each.

    A viewpoint's index is its place in the connectivity file, excluded ones counted.

    Raises:
        ValueError: arrays do not fit together, an id occurs twice, a position is not finite, or an edge does
            not join two viewpoints.

    Example:
        >>> graph = NavGraph(
        ...     "house", ("hall", "bath", "loft"), np.array([[0, 0, 0], [3, 0, 0], [3, 4, 0.0]]),
        ...     np.array([True, True, True]), np.array([[0, 1], [1, 0], [1, 2], [2, 1]]),
        ... )
        >>> graph.shortest_path("hall", "loft"), float(graph.distances[0, 2])
        (['hall', 'bath', 'loft'], 7.0)
    """

    scan_id: str
    viewpoint_ids: tuple[str, ...]
    positions: np.ndarray
    """float64 ``[V, 3]``, metres, z up."""
    included: np.ndarray
    """bool ``[V]``: whether one can be there."""
    edges: np.ndarray
    """integer ``[E, 2]``, ascending: from the first index one can walk to the second, an included one."""

    def __post_init__(self) -> None:
        size = len(self.viewpoint_ids)
        if (
            self.positions.shape != (size, 3)
            or self.included.shape != (size,)
            or self.edges.shape[1:] != (2,)
        ):
            raise ValueError(
                f"scan {self.scan_id}: {size} viewpoints need positions [{size}, 3], included [{size}] and "
                f"edges [E, 2], got {list(self.positions.shape)}, {list(self.included.shape)} and "
                f"{list(self.edges.shape)}"
            )
        if len(self.edges) and not (
            0 <= self.edges.min() and self.edges.max() < size and (self.edges[:, 0] != self.edges[:, 1]).all()
        ):
            raise ValueError(f"scan {self.scan_id}: edges must join two different ones of {size} viewpoints")
        if len(self._index) != size:
            twice = sorted({name for name in self.viewpoint_ids if self.viewpoint_ids.count(name) > 1})
            raise ValueError(f"scan {self.scan_id} has viewpoint {twice[0]} twice: ids must differ")
        if not np.isfinite(self.positions).all():
            odd = self.viewpoint_ids[int(np.argmin(np.isfinite(self.positions).all(axis=1)))]
            raise ValueError(f"scan {self.scan_id}: the position of viewpoint {odd} is not finite")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.viewpoint_ids)}

    def index(self, viewpoint_id: str) -> int:
        """Index of a viewpoint.

        Raises:
            ValueError: the scan has no such viewpoint.
        """
        try:
            return self._index[viewpoint_id]
        except KeyError:
            raise ValueError(
                f"scan {self.scan_id} has no viewpoint {viewpoint_id} among its {len(self.viewpoint_ids)}"
            ) from None

    @cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """Indices one can walk to from each viewpoint, ascending."""
        lists: list[list[int]] = [[] for _ in self.viewpoint_ids]
        for source, target in self.edges.tolist():
            lists[source].append(target)
        return tuple(map(tuple, lists))

    @property
    def distances(self) -> np.ndarray:
        """Shortest walking distance of every pair, float64 ``[V, V]`` metres (R2R, Sec. 4.1).

        Edges weigh their length in float64. Infinite where there is no path; an excluded viewpoint is
        nowhere, not even at itself.

        Raises:
            ValueError: an edge between included viewpoints has no reverse.
        """
        return self._shortest[0]

    @property
    def next_hops(self) -> np.ndarray:
        """First step of a shortest path of every pair, int32 ``[V, V]``.

        The viewpoint itself on the diagonal, -1 without a path.

        Raises:
            ValueError: an edge between included viewpoints has no reverse.
        """
        return self._shortest[1]

    @cached_property
    def _shortest(self) -> tuple[np.ndarray, np.ndarray]:
        size = len(self.viewpoint_ids)
        walkable = self.edges[self.included[self.edges].all(axis=1)]
        flags = np.zeros((size, size), dtype=bool)
        flags[walkable[:, 0], walkable[:, 1]] = True
        one_way = np.argwhere(flags & ~flags.T)
        if len(one_way):
            source, target = (self.viewpoint_ids[index] for index in one_way[0])
            raise ValueError(
                f"scan {self.scan_id}: one can walk from {source} to {target} but not back; distances are "
                "defined where every edge has its reverse"
            )
        offsets = self.positions[walkable[:, 0]] - self.positions[walkable[:, 1]]
        lengths = np.sqrt((offsets**2).sum(axis=1))
        # Explicit zeros stay edges in a sparse array: two viewpoints may share a position.
        graph = csr_array((lengths, (walkable[:, 0], walkable[:, 1])), shape=(size, size))
        distances, previous = dijkstra(graph, return_predecessors=True)
        # Undirected: the node before `a` on the way from `b` is the node after `a` on the way to `b`.
        hops = np.where(previous.T < 0, -1, previous.T)
        inside = np.flatnonzero(self.included)
        hops[inside, inside] = inside
        outside = np.flatnonzero(~self.included)
        distances[outside, outside] = np.inf
        for table in (distances, hops):
            table.setflags(write=False)
        return distances, hops

    def shortest_path(self, start: str, goal: str) -> list[str]:
        """Viewpoints of a shortest path, both ends included; empty when there is none.

        Raises:
            ValueError: the scan has no such viewpoint, or :attr:`distances` cannot be told.
        """
        here, end = self.index(start), self.index(goal)
        hops = self.next_hops
        if hops[here, end] < 0:
            return []
        path = [start]
        while here != end:
            here = int(hops[here, end])
            path.append(self.viewpoint_ids[here])
        return path

    def has_edge(self, source: str, target: str) -> bool:
        """Whether one can walk from one viewpoint to the other in one step.

        Raises:
            ValueError: the scan has no such viewpoint.
        """
        return self.index(target) in self.neighbours[self.index(source)]


def parse_connectivity(scan_id: str, document: Document) -> NavGraph:
    """Graph of one connectivity file.

    Only row ``i`` of the flags counts for ``i``: an edge leads from ``i`` to every included ``j`` that is
    unobstructed there.

    Args:
        scan_id: name of the scan.
        document: JSON list of viewpoints with ``image_id``, ``pose`` (16 numbers, row-major camera to world),
            ``included`` and ``unobstructed``.

    Raises:
        ValueError: it is not JSON, or not such a list; the text names file, viewpoint and fault.
    """
    rows = parse_json(document)
    if not isinstance(rows, list) or not rows:
        raise ValueError(
            f"{document.origin}: expected a list of viewpoints, found {type(rows).__name__} {rows!s:.40}"
        )
    for number, row in enumerate(rows):
        missing = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{document.origin}: viewpoint {number} lacks {', '.join(missing)}")
        if len(row["unobstructed"]) != len(rows) or len(row["pose"]) != 16:
            raise ValueError(
                f"{document.origin}: viewpoint {number} ({row['image_id']}) has {len(row['unobstructed'])} "
                f"flags and {len(row['pose'])} pose numbers, expected {len(rows)} and 16"
            )
    poses = _array([row["pose"] for row in rows], "iuf", "pose", document)
    included = _array([row["included"] for row in rows], "b", "included", document)
    unobstructed = _array([row["unobstructed"] for row in rows], "b", "unobstructed", document)
    walkable = unobstructed & included
    np.fill_diagonal(walkable, False)
    return NavGraph(
        scan_id=scan_id,
        viewpoint_ids=tuple(str(row["image_id"]) for row in rows),
        positions=poses[:, [3, 7, 11]].astype(np.float64),
        included=included,
        edges=np.argwhere(walkable).astype(np.int32),
    )


def _array(values: list[Any], kinds: str, name: str, document: Document) -> np.ndarray:
    array = np.array(values)
    if array.dtype.kind not in kinds:
        expected = "true or false" if kinds == "b" else "numbers"
        raise ValueError(f"{document.origin}: {name} must hold {expected} alone")
    return array


def find_connectivity(place: str | Path) -> Path:
    """Folder or archive of connectivity files: the place itself, ``connectivity/`` or ``connectivity.tar*``
    in it.

    Raises:
        FileNotFoundError: there is none; the text names what was looked for.
    """
    place = Path(place)
    if place.is_file():
        return place
    candidates = [place, place / "connectivity", *(place / f"connectivity{ending}" for ending in ARCHIVES)]
    for candidate in candidates:
        if candidate.is_file() or any(candidate.glob(f"*{SUFFIX}*")):
            return candidate
    raise FileNotFoundError(
        f"no connectivity files at {place}: looked for SCAN{SUFFIX}[.gz] there, in connectivity/ and in "
        "connectivity.tar*"
    )


def load_graphs(
    source: str | Path, scan_ids: Sequence[str] | None = None, *, cache: str | Path | None = None
) -> dict[str, NavGraph]:
    """Graphs of scans.

    Args:
        source: see :func:`find_connectivity`; files may be gzipped.
        scan_ids: which scans; ``None`` takes those that ``scans.txt`` lists, or all there are if there is no
            list.
        cache: ``.npz`` file to read instead, which is written first if it is not there or if the digest of
            the sources in it is another. It always holds all scans.

    Returns:
        Scan ids to graphs, in the order asked for.

    Raises:
        FileNotFoundError: source or the file of a scan is missing; the text names the scan.
        ValueError: a file is damaged, or ``cache`` is some other file.
    """
    place = find_connectivity(source)
    if cache is None:
        return _read_graphs(place, scan_ids)
    state = digest(place, _is_graph_file)
    graphs = _read_cache(Path(cache), state)
    if graphs is None:
        graphs = _read_graphs(place, None)
        write_cache(graphs, cache, digest_of_source=state)
    return graphs if scan_ids is None else _pick(graphs, scan_ids, place)


def _is_graph_file(name: str) -> bool:
    return name.endswith(SUFFIX) or name == "scans.txt"


def _read_graphs(place: Path, scan_ids: Sequence[str] | None) -> dict[str, NavGraph]:
    chosen = None if scan_ids is None else {f"{scan_id}{SUFFIX}" for scan_id in scan_ids}
    documents = read_documents(place, _is_graph_file if chosen is None else chosen.__contains__)
    listed = documents.pop("scans.txt", None)
    if scan_ids is None:
        names = listed.content.decode().split() if listed else None
        scan_ids = names or [name.removesuffix(SUFFIX) for name in documents]
    available = {name.removesuffix(SUFFIX): document for name, document in documents.items()}
    return {
        scan_id: parse_connectivity(scan_id, document)
        for scan_id, document in _pick(available, scan_ids, place).items()
    }


def _pick(available: Mapping[str, _T], scan_ids: Iterable[str], place: Path) -> dict[str, _T]:
    for scan_id in scan_ids:
        if scan_id not in available:
            raise FileNotFoundError(f"{place} has no {scan_id}{SUFFIX}: scan {scan_id} cannot be loaded")
    return {scan_id: available[scan_id] for scan_id in scan_ids}


def write_cache(graphs: Mapping[str, NavGraph], path: str | Path, *, digest_of_source: str) -> None:
    """Write graphs into one ``.npz``, under a temporary name first.

    Args:
        graphs: scan ids to graphs.
        path: the file.
        digest_of_source: tells later whether the sources are still the same.

    Raises:
        OSError: the folder is missing or not writable.
    """
    path = Path(path)
    header = {
        "format": _CACHE_FORMAT,
        "digest": digest_of_source,
        "scans": [[graph.scan_id, graph.viewpoint_ids, len(graph.edges)] for graph in graphs.values()],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
                positions=np.concatenate([graph.positions for graph in graphs.values()]),
                included=np.concatenate([graph.included for graph in graphs.values()]),
                edges=np.concatenate([graph.edges for graph in graphs.values()]),
            )
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _read_cache(path: Path, digest_of_source: str) -> dict[str, NavGraph] | None:
    """Graphs of a cache, ``None`` when there is none or its sources were others."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            positions, included, edges = (archive[name] for name in ("positions", "included", "edges"))
            if header["format"] != _CACHE_FORMAT or header["digest"] != digest_of_source:
                return None
            scans = header["scans"]
    except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        # It may be anything, and must not be overwritten: the path is the caller's.
        raise ValueError(
            f"{path} is not a cache of graphs, or damaged: delete it or name another file"
        ) from error
    at, first, graphs = 0, 0, {}
    for scan_id, names, count in scans:
        graphs[scan_id] = NavGraph(
            scan_id=scan_id,
            viewpoint_ids=tuple(names),
            positions=positions[at : at + len(names)],
            included=included[at : at + len(names)],
            edges=edges[first : first + count],
        )
        at, first = at + len(names), first + count
    return graphs
