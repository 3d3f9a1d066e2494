"""Readers of the tasks' items in their published formats.

R2R, R4R, RxR, CVDN dialogues, NDH, HANNA tasks and routes. A source is a file, or with a split a data folder
with that file unpacked, in the task's subfolder, or in an archive ``task.tar*``. With graphs the items are
held against them (``vln.checks``): a fault is an error, a path of another length than stated a warning.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vln.checks import validate
from vln.items import (
    Dialogue,
    HannaRoute,
    HannaTask,
    Item,
    NDHItem,
    R2RItem,
    RxRItem,
    TimedWord,
    Turn,
)
from vln.navgraph import NavGraph
from vln.sources import Document, find_document, parse_json, read_document

Graphs = Mapping[str, NavGraph]
_T = TypeVar("_T", bound=Item)


def read_r2r(source: str | Path, split: str | None = None, *, graphs: Graphs | None = None) -> list[R2RItem]:
    """R2R items.

    Args:
        source: the JSON file, or with a split a data folder: one with ``R2R_{split}.json`` in it, in ``r2r/``
            or in ``r2r.tar*``.
        split: ``train``, ``val_seen``, ``val_unseen`` or ``test``.
        graphs: to hold the items against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, an item lacks a field, or cannot be on the graphs; the text names file,
            item and fault.
    """
    return _read(source, ("r2r", f"R2R_{split}.json") if split else None, _r2r_item, graphs)


def read_r4r(source: str | Path, split: str | None = None, *, graphs: Graphs | None = None) -> list[R2RItem]:
    """R4R items (Jain et al., 2019), which have the form of R2R's; ``vln.joined`` makes them.

    Args:
        source: the JSON file, or with a split a data folder: one with ``R4R_{split}.json`` in it, in ``r4r/``
            or in ``r4r.tar*``.
        split: ``train``, ``val_seen`` or ``val_unseen``.
        graphs: to hold the items against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_r2r`.
    """
    return _read(source, ("r4r", f"R4R_{split}.json") if split else None, _r2r_item, graphs)


def read_rxr(source: str | Path, split: str | None = None, *, graphs: Graphs | None = None) -> list[RxRItem]:
    """RxR items, one a line.

    Args:
        source: the ``.jsonl`` or ``.jsonl.gz`` file, or with a split a data folder: one with
            ``rxr_{split}_guide.jsonl[.gz]`` in it, in ``rxr/`` or in ``rxr.tar*``.
        split: such as ``train``, ``val_seen``, ``val_unseen`` or ``test_standard_public``.
        graphs: to hold the items against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not JSON, lacks a field, or cannot be on the graphs; the text names file and
            line.
    """
    return _read(source, ("rxr", f"rxr_{split}_guide.jsonl") if split else None, _rxr_item, graphs)


def read_cvdn(
    source: str | Path, split: str | None = None, *, graphs: Graphs | None = None
) -> list[Dialogue]:
    """CVDN dialogues, whole games.

    Args:
        source: the JSON file, or with a split a data folder: one with ``cvdn/{split}.json`` or ``cvdn.tar*``.
        split: ``train``, ``val_seen``, ``val_unseen`` or ``test``.
        graphs: to hold the dialogues against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_r2r`.
    """
    return _read(source, ("cvdn", f"{split}.json") if split else None, _dialogue, graphs)


def read_ndh(source: str | Path, split: str | None = None, *, graphs: Graphs | None = None) -> list[NDHItem]:
    """NDH items.

    Args:
        source: the JSON file, or with a split a data folder: one with ``ndh/{split}.json`` or ``ndh.tar*``.
        split: ``train``, ``val_seen``, ``val_unseen`` or ``test``.
        graphs: to hold the items against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_r2r`.
    """
    return _read(source, ("ndh", f"{split}.json") if split else None, _ndh_item, graphs)


def read_hanna(
    source: str | Path, split: str | None = None, *, graphs: Graphs | None = None
) -> list[HannaTask]:
    """HANNA tasks.

    Args:
        source: the JSON file, or with a split a data folder: one with ``hanna_{split}.json`` in it, in
            ``hanna/`` or in ``hanna.tar*``.
        split: such as ``val_seen_env``.
        graphs: to hold the tasks against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_r2r`.
    """
    return _read(source, ("hanna", f"hanna_{split}.json") if split else None, hanna_task, graphs)


def read_hanna_routes(source: str | Path, *, graphs: Graphs | None = None) -> list[HannaRoute]:
    """Routes that HANNA's assistant knows, of all scans.

    Args:
        source: the JSON file (an object with a list of routes for each scan), or a data folder with
            ``routes.json`` in it, in ``hanna/`` or in ``hanna.tar*``.
        graphs: to hold the routes against.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see :func:`read_r2r`.
    """
    place = Path(source)
    document = find_document(place, "hanna", "routes.json") if place.is_dir() else read_document(place)
    scans = parse_json(document)
    if not isinstance(scans, dict) or not all(isinstance(routes, list) for routes in scans.values()):
        raise ValueError(f"{document.origin}: expected an object with a list of routes for each scan")
    rows = [{"scan": scan_id, "route": route} for scan_id, routes in scans.items() for route in routes]
    return _items(document, rows, lambda row: hanna_route(row["scan"], row["route"]), graphs)


def _read(
    source: str | Path, member: tuple[str, str] | None, convert: Callable[[Any], _T], graphs: Graphs | None
) -> list[_T]:
    place = Path(source)
    if place.is_dir() and member is None:
        raise FileNotFoundError(f"{place} is a folder: name the file of the items in it, or a split")
    document = find_document(place, *member) if member else read_document(place)
    if document.origin.removesuffix(".gz").endswith(".jsonl"):
        return _items(document, list(_lines(document)), convert, graphs)
    rows = parse_json(document)
    if not isinstance(rows, list):
        raise ValueError(f"{document.origin} holds a JSON {type(rows).__name__}, expected a list of items")
    return _items(document, rows, convert, graphs)


def _lines(document: Document) -> Iterator[Any]:
    for number, line in enumerate(document.content.splitlines(), start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{document.origin}: line {number} is not valid JSON, perhaps cut short: {error}"
            ) from error


def _items(
    document: Document, rows: list[Any], convert: Callable[[Any], _T], graphs: Graphs | None
) -> list[_T]:
    items = [_convert(document, number, row, convert) for number, row in enumerate(rows)]
    findings = [] if graphs is None else validate(items, graphs, origin=document.origin)
    faults = [finding for finding in findings if finding.serious]
    if faults:
        more = f" (and {len(faults) - 1} more items have faults)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")
    for finding in findings:
        warnings.warn(str(finding), stacklevel=4)
    return items


def _convert(document: Document, number: int, row: Any, convert: Callable[[Any], _T]) -> _T:
    try:
        return convert(row)
    except KeyError as error:
        raise ValueError(f"{document.origin}: item {number} lacks the field {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{document.origin}: item {number} is not as expected: {error}") from error


def _texts(row: Mapping[str, Any], name: str, default: Any = None) -> tuple[str, ...]:
    """A list of texts, such as viewpoint ids; a bare text would fall apart into letters."""
    value = row[name] if default is None else row.get(name, default)
    return _as_texts(value, name)


def _as_texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {value!s:.60}, expected a list of texts")
    return tuple(value)


def _path(row: Mapping[str, Any], name: str = "path") -> tuple[str, ...]:
    path = _texts(row, name)
    if not path:
        raise ValueError(f"{name} is empty, expected at least the start")
    return path


def _heading(value: Any) -> float:
    heading = float(value)
    if not math.isfinite(heading):
        raise ValueError(f"heading is {heading}, expected a finite angle in radians")
    return heading


def _r2r_item(row: Any) -> R2RItem:
    distance = row.get("distance")
    return R2RItem(
        path_id=row["path_id"],
        scan_id=row["scan"],
        heading=_heading(row["heading"]),
        path=_path(row),
        instructions=_texts(row, "instructions"),
        distance=None if distance is None else float(distance),
    )


def _rxr_item(row: Any) -> RxRItem:
    timed = (
        TimedWord(str(word["word"]), word.get("start_time"), word.get("end_time"))
        for word in row.get("timed_instruction") or ()
    )
    return RxRItem(
        instruction_id=row["instruction_id"],
        path_id=row.get("path_id"),
        scan_id=row["scan"],
        heading=_heading(row["heading"]),
        path=_path(row),
        language=row["language"],
        instruction=row["instruction"],
        annotator=row.get("annotator", row.get("annotator_id")),
        timed_words=tuple(timed),
    )


def _turns(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    turns = tuple(Turn(turn["role"], turn["message"], int(turn["nav_idx"])) for turn in row["dialog_history"])
    for turn in turns:
        if turn.role not in ("navigator", "oracle"):
            raise ValueError(f"a turn's role is {turn.role!r}, expected navigator or oracle")
    return turns


def _dialogue(row: Any) -> Dialogue:
    ratings = {name: value for name, value in row.items() if name.endswith("quality")}
    return Dialogue(
        idx=int(row["idx"]),
        scan_id=row["scan"],
        target=row["target"],
        start=row["start_pano"]["pano"],
        heading=_heading(row["start_pano"]["heading"]),
        end_panos=_texts(row, "end_panos", ()),
        nav_steps=_texts(row, "nav_steps", ()),
        planner_nav_steps=_texts(row, "planner_nav_steps", ()),
        turns=_turns(row),
        nav_camera=row.get("nav_camera", []),
        stop_history=tuple(row.get("stop_history", ())),
        ratings={name: float(value) for name, value in (ratings | row.get("ratings", {})).items()},
        problem=bool(row.get("problem", False)),
    )


def _ndh_item(row: Any) -> NDHItem:
    return NDHItem(
        inst_idx=int(row["inst_idx"]),
        scan_id=row["scan"],
        start=row["start_pano"]["pano"],
        heading=_heading(row["start_pano"]["heading"]),
        end_panos=_texts(row, "end_panos", ()),
        planner_path=_texts(row, "planner_path", ()),
        player_path=_texts(row, "player_path", ()),
        target=row["target"],
        turns=_turns(row) if "dialog_history" in row else (),
        nav_history=_texts(row, "nav_history", ()),
    )


def hanna_task(row: Any) -> HannaTask:
    """Task from its JSON object.

    Raises:
        KeyError: it lacks a field.
        TypeError: a field is of another kind.
        ValueError: the same.
    """
    paths = tuple(_as_texts(path, "a path") for path in row["paths"])
    if not paths or not all(paths):
        raise ValueError("paths are empty, expected at least one with a start")
    return HannaTask(
        path_id=row["path_id"],
        scan_id=row["scan"],
        heading=_heading(row["heading"]),
        paths=paths,
        instructions=_texts(row, "instructions"),
    )


def hanna_route(scan_id: str, row: Any) -> HannaRoute:
    """Route of a scan from its JSON object.

    Raises:
        KeyError: it lacks a field.
        TypeError: a field is of another kind.
        ValueError: the same, or the view is not one of 36.
    """
    view = int(row["view_id"])
    if not 0 <= view < 36:
        raise ValueError(f"view_id is {view}, expected 0 to 35")
    return HannaRoute(
        path_id=row["path_id"],
        scan_id=scan_id,
        path=_path(row),
        instruction=row["instruction"],
        view_id=view,
        split=row["split"],
    )
