"""From the results of ``benchmarks.search`` to verdicts, Markdown and a picture: no number is typed here."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.compare import portable

Results = dict[str, Any]
GATED = ("S1", "S2", "S3", "S4")
COLUMNS = (*GATED, "S5", "C1", "C2")
FLAT_MIB = 4.0
"""A search whose growth at four times the tokens is that close to its growth counts as independent of N."""

# Mode, peer, every shape must reach, aim, and whether the aim is for the geometric mean.
RATIOS = (
    ("search", "upstream", 3.0, 5.0, True),
    ("search", "lucidrains", 4.0, 7.0, True),
    ("search", "addmm", 1.8, 2.4, False),
    ("search", "faiss", 1.0, 1.4, False),
    ("train_forward", "upstream", 4.0, 8.0, True),
    ("train_forward", "lucidrains", 5.0, 10.0, True),
    ("train_step", "upstream", 3.0, 6.0, True),
    ("train_step", "lucidrains", 4.0, 9.0, True),
)
LIMITS = ((256, 0.75, 0.90), (128, 0.60, 0.80), (0, 0.40, 0.60))  # from this many channels on: must, aim
STEP = (0.12, 0.08)  # of a discriminator step

LABELS = {
    "ours": "ours",
    "ours_regularize": "ours, regularize",
    "ours_channels_last": "ours, channels-last",
    "ours_from_nchw": "ours, from NCHW",
    "upstream": "upstream form",
    "lucidrains": "lucidrains",
    "lucidrains_rotation": "lucidrains, rotation",
    "taming": "taming-style",
    "cdist": "cdist",
    "addmm": "addmm + argmin",
    "addmm_compiled": "addmm, compiled",
    "kmeans": "fast-pytorch-kmeans",
    "faiss": "faiss",
}
MODE_NAMES = {"search": "search", "train_forward": "train-forward", "train_step": "train-step"}
DATA_NAMES = {"clustered": "clustered data", "feature_like": "feature-like data"}
_COLORS = {
    "upstream": "#d62728", "lucidrains": "#ff7f0e", "lucidrains_rotation": "#ffbb78", "taming": "#9467bd",
    "cdist": "#8c564b", "addmm": "#1f77b4", "addmm_compiled": "#aec7e8", "kmeans": "#e377c2",
    "faiss": "#2ca02c",
}  # fmt: skip


class Row(NamedTuple):
    """One target and what was reached; a verdict is None when something it needs was not measured."""

    quantity: str
    must: str
    aim: str
    cells: dict[str, str]
    overall: str
    must_met: bool | None
    aim_met: bool | None


def judge(results: Results) -> list[Row]:
    """Every CPU target with its figures.

    Args:
        results: of ``benchmarks.search``.

    Returns:
        One row a target. A ratio is the worse one of the two kinds of data.
    """
    rows = [_ratio_row(results, *target) for target in RATIOS[:4]]
    rows.append(_limit_row(results))
    rows += [_ratio_row(results, *target) for target in RATIOS[4:]]
    return [*rows, _search_memory(results), _step_memory(results), _step_row(results)]


def _ratio_row(results: Results, mode: str, peer: str, must: float, aim: float, mean: bool) -> Row:
    found = {shape: value for shape in COLUMNS if (value := ratio(results, shape, mode, peer)) is not None}
    gated = {shape: value for shape, value in found.items() if shape in GATED}
    overall = statistics.geometric_mean(gated.values()) if gated else None
    complete = len(gated) == len(GATED)
    aims = [overall or 0.0] if mean else list(gated.values())
    return Row(
        f"{MODE_NAMES[mode]} vs {LABELS[peer]}",
        f"≥ {must:g}x each",
        f"≥ {aim:g}x {'mean' if mean else 'each'}",
        {shape: f"{value:.2f}x" for shape, value in found.items()},
        f"{overall:.2f}x" if overall and complete else "",
        _verdict([value >= must for value in gated.values()], complete),
        _verdict([value >= aim for value in aims], complete, partial=not mean),
    )


def _limit_row(results: Results) -> Row:
    cells, must, aim = {}, [], []
    for shape, measured in results["shapes"].items():
        shares = [entry["share"] for data in measured["times"].values()
                  if (entry := data.get("search", {}).get("limit"))]  # fmt: skip
        if shares:
            _, least, wished = next(row for row in LIMITS if measured["shape"]["dim"] >= row[0])
            cells[shape] = f"{min(shares):.0%}"
            must.append(min(shares) >= least)
            aim.append(min(shares) >= wished)
    musts, aims = (" / ".join(f"{100 * row[i]:.0f}" for row in LIMITS) for i in (1, 2))
    complete = set(GATED) <= set(cells)
    return Row("search, share of L", f"≥ {musts} % (D ≥ 256 / 128 / 64)", f"≥ {aims} %", cells, "",
               _verdict(must, complete), _verdict(aim, complete))  # fmt: skip


def _search_memory(results: Results) -> Row:
    cells, values, apart = {}, [], []
    for shape, modes in results["memory"].items():
        here, four = modes["search"].get("ours"), modes["search"].get("ours, 4N")
        if here is not None and four is not None:
            cells[shape] = f"{here:.1f}, at 4N {four:.1f}"
            values += [here, four]
            apart.append(abs(four - here) <= FLAT_MIB)
    complete = {"S2", "S3"} <= set(cells)
    return Row("search, memory beyond indices", f"≤ 24 MiB, ±{FLAT_MIB:g} at 4N", "≤ 8 MiB", cells, "MiB",
               _verdict([*(value <= 24 for value in values), *apart], complete),
               _verdict([value <= 8 for value in values], complete))  # fmt: skip


def _step_memory(results: Results) -> Row:
    cells, must, aim = {}, [], []
    for shape, modes in results["memory"].items():
        value = modes["train_step"].get("ours")
        if value is None:
            continue
        sizes = results["shapes"][shape]["shape"]
        matrix = 4 * sizes["batch"] * sizes["dim"] * sizes["side"] ** 2 / 2**20
        cells[shape] = f"{value:.1f} ({(value - 16) / matrix:.1f}·4M + 16)"
        must.append(value <= 6 * matrix + 16)
        aim.append(value <= 4 * matrix + 16)
    complete = {"S2", "S3"} <= set(cells)
    return Row("train-step, memory with leaf and grad", "≤ 6·4M + 16 MiB", "≤ 4·4M + 16 MiB", cells,
               "MiB", _verdict(must, complete), _verdict(aim, complete))  # fmt: skip


def _step_row(results: Results) -> Row:
    shares = results.get("discriminator_step", {}).get("overhead", {})
    return Row(
        "BigGAN-CIFAR discriminator step, overhead", f"≤ {STEP[0]:.0%}", f"≤ {STEP[1]:.0%}", {},
        ", ".join(f"{mode} {share:.1%}" for mode, share in shares.items()),
        *(_verdict([share <= bound for share in shares.values()], bool(shares)) for bound in STEP),
    )  # fmt: skip


def _verdict(reached: list[bool], complete: bool, *, partial: bool = True) -> bool | None:
    """One miss decides, unless it is of a mean over too few; success needs everything."""
    if not all(reached) and (partial or complete):
        return False
    return True if complete else None


def ratio(results: Results, shape: str, mode: str, peer: str) -> float | None:
    """A peer's time over ours, the worse of the kinds of data.

    Args:
        results: of ``benchmarks.search``.
        shape: its name.
        mode: its name.
        peer: its name.

    Returns:
        The smaller median, or None if there is none.
    """
    measured = results["shapes"].get(shape, {"times": {}})["times"].values()
    found = [entry["ratio"] for data in measured if "ratio" in (entry := data.get(mode, {}).get(peer, {}))]
    return min(found) if found else None


def table(rows: list[Row]) -> str:
    """The targets as a Markdown table.

    Args:
        rows: from :func:`judge`.

    Returns:
        The table.
    """
    words = {True: "met", False: "**NOT met**", None: "not measured"}
    lines = [
        "| quantity | must | aim | " + " | ".join(COLUMNS) + " | overall | must | aim |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for row in rows:
        cells = [row.cells.get(shape, "") for shape in COLUMNS]
        texts = [
            row.quantity,
            row.must,
            row.aim,
            *cells,
            row.overall,
            words[row.must_met],
            words[row.aim_met],
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def report(results: Results) -> str:
    """The whole report.

    Args:
        results: of ``benchmarks.search``.

    Returns:
        Markdown.
    """
    settings = results["settings"]
    gate = "" if settings["threads"] == 1 else " **Wall time of several threads: not gated.**"
    lines = [
        "# Search and layer beside other ways to do the same",
        "",
        f"{settings['threads']} CPU thread(s), {settings['clock']}, float32. A ratio is a peer's time over "
        "that of the run of ours just before it, in one process; the median of all rounds, above 1 where "
        f"ours is faster.{gate} Search goes from tokens [N, D] to indices. train-forward takes contiguous "
        "NCHW features that need gradients and does search, gather, loss, straight-through output and "
        "codebook update; train-step adds a copy of the features as leaf and the backward of ⟨y, g⟩ + Σ "
        "loss. L is the matrix product of the search alone, the faster one of `torch.mm(out=)` and a chunked "
        "1x1 convolution.",
        "",
        "![ratios and memory](search.png)",
        "",
        "## Targets",
        "",
        "S1 to S4 decide the ratios, all shapes the share of L; the worse one of both kinds of data counts, "
        "and “mean” is the geometric mean of S1 to S4.",
        "",
        table(judge(results)),
        "",
        *ceilings(results),
        *_shapes(results),
    ]
    for mode in MODE_NAMES:
        for data in DATA_NAMES:
            lines += _mode_table(results, mode, data)
    lines += [*_exactness(results), *_memory(results), *_origin(results)]
    return "\n".join(lines) + "\n"


_CEILINGS = {
    "search": ("upstream", "lucidrains", "addmm", "faiss"),
    "train_forward": ("upstream", "lucidrains"),
    "train_step": ("upstream", "lucidrains"),
}


def ceilings(results: Results) -> list[str]:
    """What the ratios would be at the limit of each mode: each ratio over our share of that limit.

    Args:
        results: of ``benchmarks.search``.

    Returns:
        Lines of Markdown.
    """
    lines = []
    for mode, peers in _CEILINGS.items():
        for peer in peers:
            cells = []
            for shape in COLUMNS:
                measured = results["shapes"].get(shape, {"times": {}})["times"].values()
                entries = [data[mode] for data in measured if mode in data]
                found = [entry[peer]["ratio"] / entry["limit"]["share"] for entry in entries
                         if "ratio" in entry.get(peer, {}) and "limit" in entry]  # fmt: skip
                cells.append(f"{min(found):.2f}x" if found else "")
            lines.append(f"| {MODE_NAMES[mode]} vs {LABELS[peer]} | " + " | ".join(cells) + " |")
    return [
        "What a layer at the limit would reach on this machine: for a search nothing but the product L; for "
        "train-forward L and one fresh tensor like the input, for train-step three (leaf, output and the "
        "gradient). No reduction, no statistics:",
        "",
        _header("at the limit", COLUMNS),
        *lines,
        "",
    ]


def _header(first: str, columns: tuple[str, ...]) -> str:
    return f"| {first} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|"


def _shapes(results: Results) -> list[str]:
    lines = [
        "## Shapes",
        "",
        "| | input | N | D | K | rounds | L, GFLOP/s | best form of L |",
        "|---" * 8 + "|",
    ]
    for name, measured in results["shapes"].items():
        batch, dim, side, codes = measured["shape"].values()
        limits = [data["search"]["limit"] for data in measured["times"].values() if "limit" in data["search"]]
        best = max(limits, key=lambda limit: limit["gflops"]) if limits else {"gflops": 0.0, "best": "-"}
        lines.append(
            f"| {name} | {batch}x{dim}x{side}x{side} | {batch * side * side} | {dim} | {codes} | "
            f"{measured['repeats']} | {best['gflops']:.0f} | {best['best']} |"
        )
    return [*lines, ""]


def _mode_table(results: Results, mode: str, data: str) -> list[str]:
    found = {shape: measured["times"][data][mode] for shape, measured in results["shapes"].items()
             if mode in measured["times"].get(data, {})}  # fmt: skip
    peers = [peer for peer in LABELS if any(peer in entries for entries in found.values())]
    lines = [f"## {MODE_NAMES[mode].capitalize()}, {DATA_NAMES[data]}", ""]
    lines += ["Peer over ours, median (quartiles).", "", _header("", tuple(found))]
    for peer in peers:
        cells = [_cell(peer, entries.get(peer)) for entries in found.values()]
        lines.append(f"| {LABELS[peer]} | " + " | ".join(cells) + " |")
    if mode == "search":
        gflops = [_gflops(results["shapes"][shape]["shape"], entries["ours"]["ms"])
                  for shape, entries in found.items()]  # fmt: skip
        lines.append("| ours, GFLOP/s | " + " | ".join(f"{value:.0f}" for value in gflops) + " |")
    return [*lines, ""]


def _gflops(shape: dict[str, int], ms: float) -> float:
    return 2 * shape["batch"] * shape["side"] ** 2 * shape["dim"] * shape["codebook_size"] / ms / 1e6


def _cell(peer: str, entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "left out"
    if "skipped" in entry:
        return entry["skipped"]
    if peer == "ours":
        return f"{entry['ms']:.1f} ms"
    lower, upper = entry["quartiles"]
    return f"{entry['ratio']:.2f} ({lower:.2f} to {upper:.2f})"


def _exactness(results: Results) -> list[str]:
    """Peers whose first call found codes beyond rounding."""
    worst: dict[str, tuple[float, float]] = {}
    for measured in results["shapes"].values():
        for data in measured["times"].values():
            for entries in data.values():
                for peer, entry in entries.items():
                    if "differ" in entry:
                        old = worst.get(peer, (0.0, 0.0))
                        worst[peer] = (max(old[0], entry["differ"]), max(old[1], entry["beyond"]))
    beyond = [f"{LABELS[peer]} {share[1]:.2%}" for peer, share in worst.items() if share[1] > 0]
    differ = [f"{LABELS[peer]} {share[0]:.3%}" for peer, share in worst.items() if share[0] > 0]
    return [
        "Codes against float64, on up to 4096 tokens of each first call, largest share over all shapes: "
        f"beyond the rounding allowed ({', '.join(beyond) or 'none'}); other than the nearest, within "
        f"rounding or not ({', '.join(differ) or 'none'}).",
        "",
    ]


def _memory(results: Results) -> list[str]:
    if not results["memory"]:
        return []
    columns = [(shape, mode) for mode in ("search", "train_step") for shape in results["memory"]]
    names = tuple(f"{MODE_NAMES[mode]}, {shape}" for shape, mode in columns)
    lines = [
        "## Memory",
        "",
        "Growth of the peak of a fresh process by one call, MiB (of ours, which has targets, the largest of "
        "three processes); a search without the indices it returns, a train-step with the copy of the "
        "features and their gradient.",
        "",
        _header("", names),
    ]
    for peer in [*LABELS, "ours, 4N"]:
        cells = []
        for shape, mode in columns:
            value = results["memory"][shape][mode].get(peer, "")
            value = "no /proc on this system" if value is None else value
            cells.append(value if isinstance(value, str) else f"{value:.1f}")
        if any(cells):
            lines.append(f"| {LABELS.get(peer, peer)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _origin(results: Results) -> list[str]:
    lines = [
        "## Where these numbers come from",
        "",
        "Peers: the upstream form is re-stated from the released layer's mathematics; lucidrains is "
        "`VectorQuantize` of vector-quantize-pytorch with EMA of decay 0.8 and its codebook set to ours "
        "(`rotation_trick=False`, or its default); taming-style and cdist have an `index_add_` EMA of ours "
        'in training. Ours is `FeatureQuantize(mode="replace")` with its defaults, replacement of dead codes '
        "included. “left out”: shapes beyond S1 to S4 have few peers on feature-like data; S5, at seconds a "
        "call, has few peers on clustered and only searches on feature-like data, and fewer rounds.",
        "",
    ]
    for record in results["provenance"]:
        versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        dirty = {True: " with local changes", False: ""}.get(record["dirty"], "")
        lines.append(
            f"* `{portable(record['command'])}`; commit `{record['commit'][:12]}`{dirty}, "
            f"{record['device_name']}, {versions}, {record['started']}"
        )
    if "discriminator_step" in results:
        record = results["discriminator_step"]["provenance"]
        lines.append(
            f"* the discriminator step: `{portable(record['command'])}`; commit `{record['commit'][:12]}`, "
            f"{record['device_name']}, {record['started']}"
        )
    return lines


def draw(results: Results, path: Path) -> None:
    """Ratios of all peers by shape, a panel a mode, and memory growth.

    Args:
        results: of ``benchmarks.search``.
        path: PNG to write.
    """
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for axis, mode in zip(panels, MODE_NAMES, strict=False):
        _ratio_panel(axis, results, mode)
    _memory_panel(panels[3], results)
    entries = {label: handle for axis in panels
               for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    order = [LABELS[peer] for peer in ("ours", *_COLORS) if LABELS[peer] in entries]
    figure.legend(
        [entries[label] for label in order], order, loc="outside upper center", ncols=5, fontsize=11
    )
    figure.savefig(path, dpi=110)


def _ratio_panel(axis: Any, results: Results, mode: str) -> None:
    shapes = list(results["shapes"])
    heights = {peer: [ratio(results, shape, mode, peer) for shape in shapes] for peer in _COLORS}
    _bars(axis, shapes, {peer: row for peer, row in heights.items() if any(row)}, bottom=1.0)
    axis.axhline(1.0, color="black", linewidth=1)
    axis.set_title(f"{MODE_NAMES[mode]}: time of peer / time of ours", fontsize=12)
    axis.set_ylabel("above 1: ours is faster", fontsize=10)


def _memory_panel(axis: Any, results: Results) -> None:
    columns = [(shape, mode) for mode in ("search", "train_step") for shape in results["memory"]]

    def value(shape: str, mode: str, peer: str) -> float | None:
        found = results["memory"][shape][mode].get(peer)
        return max(found, 1.0) if isinstance(found, int | float) else None  # a logarithm has no zero

    heights = {peer: [value(shape, mode, peer) for shape, mode in columns] for peer in ("ours", *_COLORS)}
    shown = {peer: row for peer, row in heights.items() if any(row)}
    _bars(axis, [f"{MODE_NAMES[mode]}\n{shape}" for shape, mode in columns], shown, bottom=1.0)
    axis.set_title("memory growth of one call, MiB", fontsize=12)


def _bars(axis: Any, groups: list[str], heights: dict[str, list[float | None]], *, bottom: float) -> None:
    """Bars side by side in every group, on a logarithmic axis with plain numbers."""
    width = 0.85 / max(len(heights), 1)
    places = np.arange(len(groups))
    axis.set_yscale("log")
    for number, (peer, row) in enumerate(heights.items()):
        offset = (number - (len(heights) - 1) / 2) * width
        drawn = [np.nan if height is None else height - bottom for height in row]
        color = _COLORS.get(peer, "#111111")
        axis.bar(places + offset, drawn, width, bottom=bottom, color=color, label=LABELS[peer])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xticks(places, groups)
    axis.tick_params(labelsize=10)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
