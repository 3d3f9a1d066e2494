"""Maps to look at: ``python -m vln.render episodes --split val_seen --submission FILE --out maps``.

``episodes`` draws one PNG for each episode of a run, or of a split, and a page ``index.html`` with all of
them; ``scan`` draws whole scans.
"""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from vln.data import read_hanna, read_ndh, read_r2r, read_rxr
from vln.evaluate import COLUMNS, EvaluateConfig, evaluate
from vln.instructions import dialogue_text
from vln.items import HannaTask, NDHItem, R2RItem, RxRItem
from vln.maps import Episode, draw_episode, draw_scan
from vln.navgraph import load_graphs
from vln.plans import read_plans
from vln.submission import read_submission

_READERS: dict[str, Any] = {
    "r2r": read_r2r, "rxr": read_rxr, "ndh": read_ndh, "hanna": read_hanna,
}  # fmt: skip
_SHARES = ("SR %", "OSR %", "OPSR %")
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1140px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: right }
figure { margin: 3em 0; border-top: 1px solid #ccc; padding-top: 1em } img { max-width: 100%; height: auto }
figcaption { white-space: pre-line; color: #555 }
"""


class Drawn(NamedTuple):
    """An episode, what it scored, and its picture."""

    episode: Episode
    scores: dict[str, float]
    """By the names of the table's columns; empty without a submission or a goal."""
    picture: str
    """File name."""


def episodes_of(item: R2RItem | RxRItem | NDHItem | HannaTask) -> Iterator[tuple[str | int, Episode]]:
    """What to draw of an item, without a prediction: an episode for each instruction, with its id."""
    if isinstance(item, NDHItem):
        text = dialogue_text(item, "all")
        for marker in ("<NAV>", "<ORA>", "<TAR>"):
            text = text.replace(f" {marker}", f"\n{marker}")
        yield (
            item.inst_idx,
            Episode(
                item.scan_id, f"item {item.inst_idx}", item.start, item.heading, item.end_panos,
                item.trusted_path, (), text,
            ),
        )  # fmt: skip
        return
    if isinstance(item, HannaTask):
        start, radius, reference = item.paths[0][0], 2.0, item.paths[0]
        goals = tuple(dict.fromkeys(path[-1] for path in item.paths))
    else:
        start, radius, reference = item.path[0], 3.0, item.path if len(item.path) > 1 else ()
        goals = reference[-1:]
    for name, text in zip(item.instruction_ids, item.instructions, strict=True):
        yield (
            name,
            Episode(
                item.scan_id, name, start, item.heading, goals, reference, (), text.strip(), "",
                radius if goals else None,
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig:
    """Draw the episodes of a run, or of a split, and a page with them."""

    out: str
    """Folder for the pictures and index.html."""
    submission: str = ""
    """JSON file of the agent's paths; without it the annotated paths are drawn alone."""
    task: Literal["r2r", "rxr", "ndh", "hanna"] = "r2r"
    """Whose form the items have (R4R: r2r); a submission tells R2R, NDH and HANNA itself."""
    split: str = "val_unseen"
    """Split of the items."""
    data: str = "data/vln"
    """Folder with items and graphs, unpacked or in archives."""
    items: str = ""
    """File of the items instead."""
    graphs: str = ""
    """Folder or archive of the connectivity files instead."""
    ids: tuple[str, ...] = ()
    """Draw these alone, in this order."""
    order: Literal["file", "worst", "best"] = "file"
    """Which episodes come first: as in the file, or by navigation error."""
    limit: int = 50
    """Most episodes to draw."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit is {self.limit}: give at least 1")
        if self.order != "file" and not self.submission:
            raise ValueError(f"order is {self.order} but there is no submission to score: give --submission")


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Draw whole scans, one PNG each."""

    scan_ids: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Which."""
    out: str
    """Folder for the pictures."""
    graphs: str = "data/vln"
    """Folder or archive of the connectivity files, or a data folder."""


def render_scans(config: ScanConfig) -> list[Path]:
    """Draw scans; returns the files.

    Raises:
        FileNotFoundError: a scan is not there.
        ValueError: its file is damaged, or none is asked for.
    """
    if not config.scan_ids:
        raise ValueError("no scan is named: give the ids of those to draw")
    graphs, plans = load_graphs(config.graphs, config.scan_ids), read_plans(config.graphs)
    folder = _folder(config.out)
    paths = [folder / f"{scan_id}.png" for scan_id in graphs]
    for path, graph in zip(paths, graphs.values(), strict=True):
        draw_scan(graph, plan=plans.get(graph.scan_id)).save(path)
    return paths


def render_episodes(config: EpisodesConfig) -> Path:
    """Draw episodes and the page; returns the page.

    Raises:
        FileNotFoundError: submission, items or graphs are missing.
        ValueError: a file is damaged, an id of the submission has no item or the other way round, or an id to
            draw is unknown.
    """
    task: str = config.task
    paths: dict[Any, list[str]] = {}
    scores: dict[str, dict[str, float]] = {}
    means: dict[str, float] = {}
    if config.submission:
        submission = read_submission(config.submission)
        paths = submission.paths
        if task != "rxr":  # whose submissions look like those of R2R
            task = submission.task
        scores, means = _scores(config, task)
    source, split = (config.items, None) if config.items else (config.data, config.split)
    items = _READERS[task](source, split)
    found = dict(pair for item in items for pair in episodes_of(item))
    if not found:
        raise ValueError(f"there are no episodes in {source}")
    chosen = _chosen(config, {str(name): name for name in found}, scores, task)
    place = config.graphs or config.data
    graphs = load_graphs(place, sorted({found[name].scan_id for name in chosen}))
    plans = read_plans(place)
    folder = _folder(config.out)
    drawn = []
    for number, name in enumerate(chosen, start=1):
        values = scores.get(str(name), {})
        episode = found[name]._replace(predicted=tuple(paths.get(name, ())), note=_note(values))
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in episode.name)
        drawn.append(Drawn(episode, values, f"{number:04d}_{safe}.png"))
        picture = draw_episode(graphs[episode.scan_id], episode, plan=plans.get(episode.scan_id))
        picture.save(folder / drawn[-1].picture)
    title = f"{task} {config.items or config.split}"
    page = folder / "index.html"
    partial = page.with_name(f".index.{os.getpid()}.partial")
    partial.write_text(_page(title, config.submission, means, drawn, len(found)), encoding="utf-8")
    partial.replace(page)
    return page


def _folder(name: str) -> Path:
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _scored_on(task: str) -> Literal["r2r", "rxr"] | None:
    """Data set of R2R's form that a task is, if it is one: never what the submission's record says."""
    return "rxr" if task == "rxr" else "r2r" if task == "r2r" else None


def _scores(config: EpisodesConfig, task: str) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Scores of every item and their means, by the table's columns."""
    result = evaluate(
        EvaluateConfig(
            submission=config.submission, split=config.split, data=config.data, items=config.items,
            graphs=config.graphs, lenient=True, dataset=_scored_on(task),
        )
    )  # fmt: skip
    way = "trusted_path" if task == "ndh" else task
    if way not in result["scores"]:
        return {}, {}

    def columns(values: Mapping[str, float]) -> dict[str, float]:
        titles = COLUMNS[result["task"]]
        named = {title: field for title, field in titles.items() if field in values}
        return {title: values[field] * (100 if title.endswith("%") else 1) for title, field in named.items()}

    return {name: columns(row) for name, row in result["items"][way].items()}, columns(result["scores"][way])


def _chosen(
    config: EpisodesConfig, names: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]], task: str
) -> list[Any]:
    if config.ids:
        unknown = [name for name in config.ids if name not in names]
        if unknown:
            raise ValueError(
                f"no episode is called {unknown[0]}: there are {len(names)}, such as {next(iter(names))}"
            )
        return [names[name] for name in config.ids]
    listed = list(names)
    if config.order != "file":
        if not scores:
            raise ValueError(f"order is {config.order} but the items have no goals to score by")
        listed.sort(key=lambda name: scores[name]["NE"], reverse=config.order == "worst")
    return [names[name] for name in listed[: config.limit]]


def _note(scores: Mapping[str, float]) -> str:
    words = []
    for title, value in scores.items():
        name = title.removesuffix(" %")
        if title in _SHARES:
            words.append(f"{name} {'yes' if value else 'no'}")
        else:
            words.append(f"{name} {value:.1f} %" if title.endswith("%") else f"{name} {value:.2f}")
    return "   ".join(words)


def _page(title: str, submission: str, means: Mapping[str, float], drawn: Sequence[Drawn], total: int) -> str:
    """The page; all texts are escaped."""
    head = html.escape(f"{title}: {submission}" if submission else title)
    lines = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">', f"<title>{head}</title>",
        f"<style>{_STYLE}</style>", "</head>", "<body>", f"<h1>{head}</h1>",
        f"<p>{len(drawn)} of {total} episodes.</p>",
    ]  # fmt: skip
    if means:
        lines.append("<p>Mean scores of all episodes:</p>")
        lines += _table([("", means)], list(means))
    scored = [row for row in drawn if row.scores]
    if scored:
        lines.append("<p>Scores of those drawn:</p>")
        links = [
            (f'<a href="#{row.picture}">{html.escape(row.episode.name)}</a>', row.scores) for row in scored
        ]
        lines += _table(links, list(scored[0].scores))
    for row in drawn:
        name, text = html.escape(row.episode.name), html.escape(row.episode.text)
        lines += [
            f'<figure id="{row.picture}">',
            f'<img src="{row.picture}" alt="Map of episode {name}" loading="lazy">',
            f"<figcaption>{text}</figcaption>", "</figure>",
        ]  # fmt: skip
    return "\n".join([*lines, "</body>", "</html>", ""])


def _table(rows: Sequence[tuple[str, Mapping[str, float]]], columns: Sequence[str]) -> Iterator[str]:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    yield f"<table><tr><th></th>{heads}</tr>"
    for name, scores in rows:
        cells = "".join(
            f"<td>{scores[column]:.2f}</td>" if column in scores else "<td></td>" for column in columns
        )
        yield f"<tr><td>{name}</td>{cells}</tr>"
    yield "</table>"


Command = (
    Annotated[EpisodesConfig, tyro.conf.subcommand("episodes")]
    | Annotated[ScanConfig, tyro.conf.subcommand("scan")]
)


def main(arguments: list[str] | None = None) -> None:
    """Draw, and print where it is.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config: EpisodesConfig | ScanConfig = tyro.cli(
            Command,  # type: ignore[arg-type]
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vln.render",
            config=(tyro.conf.OmitArgPrefixes,),
        )
        written = render_scans(config) if isinstance(config, ScanConfig) else [render_episodes(config)]
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    for path in written:
        print(f"written to {path}")


if __name__ == "__main__":
    main()
