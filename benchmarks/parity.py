"""Run our code on stored inputs and compare every stored result: ``python -m benchmarks.parity DIR...``.

Every golden file below the folders is recognised by what it holds, whatever its name; the module
``benchmarks.parity_KIND`` recomputes it.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.golden import Case, read_case

CHECKED = ("fq", "biggan", "stylegan2", "ugatit", "navgraph", "vln", "optimus")
"""Kinds with a checker, ``check(case)`` of ``benchmarks.parity_KIND``."""

WITH_DATA = ("navgraph", "vln")
"""Kinds whose checker also takes where graphs and items may lie, ``check(case, places)``."""

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "vln"
"""Where graphs and items are looked for last."""

FOLDER_KINDS = ("navgraph", "optimus", "vln")
"""Kinds told apart by their folder: their files share no mark inside."""

KINDS = ("fq", "biggan", "stylegan2", "ugatit", *FOLDER_KINDS)

_MARKS = (
    ("fq", re.compile(r"init_embed|fq\d+\.embed")),
    ("stylegan2", re.compile(r"G\.synthesis\..+")),
    ("ugatit", re.compile(r"G_cam_logit|D\d+\..+")),
    ("biggan", re.compile(r"[GD]\.blocks\.\d+\.0\.conv1\.weight")),
)


def kind_of(path: Path, keys: Iterable[str]) -> str:
    """Kind of a golden file from its keys, or else from the nearest folder that is named like a kind."""
    keys = list(keys)
    for kind, mark in _MARKS:
        if any(mark.fullmatch(key) for key in keys):
            return kind
    folders = [folder.name for folder in path.resolve().parents]
    return next((name for name in folders if name in KINDS), folders[0])


def find_files(folders: Sequence[Path]) -> list[Path]:
    """Golden files below the folders (or given by name): every .npz, and .json of the kinds told by folder.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist: give a folder with golden .npz files")
        below = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        for path in below:
            is_document = path.name.endswith((".json", ".json.gz")) and path.parent.name in FOLDER_KINDS
            if path.is_file() and (path.suffix == ".npz" or is_document):
                found.setdefault(path.resolve())
    return list(found)


def check_file(path: Path, only: Sequence[str], data: Path | None = None) -> tuple[str, str | None, str]:
    """Check one file.

    Args:
        path: the file.
        only: kinds to check; all if empty.
        data: folder with graphs and items, if they do not lie beside the file.

    Returns:
        ``(status, kind, line)`` with status "pass", "fail", "open" (nothing of ours can recompute it yet),
        "unchecked" (no checker) or "excluded".
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        case = read_case(path)
    except Exception as error:  # a damaged file must be one failed line, not the end of the run
        return "fail", None, f"FAIL  {name}  unreadable: {type(error).__name__}: {error}"
    kind = kind_of(path, case.arrays)
    if only and kind not in only:
        return "excluded", kind, ""
    if kind not in CHECKED:
        return "unchecked", kind, f"----  {name}  {kind}  no checker"
    try:
        checker = importlib.import_module(f"benchmarks.parity_{kind}")
        if kind in WITH_DATA:
            checker.check(case, [place for place in (path.parent, data, SHARED_DATA) if place is not None])
        else:
            checker.check(case)
    except Exception as error:  # the same for a file of a known kind with contents nobody foresaw
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        case.failures.append(f"stopped by {type(error).__name__}: {message}")
    case.finish()
    status = "fail" if case.failures else "pass" if case.comparisons else "open"
    return status, kind, _line(case, name, kind, status)


def _line(case: Case, name: str, kind: str, status: str) -> str:
    done, total = case.counts
    mark = {"fail": "FAIL", "pass": "pass", "open": "----"}[status]
    text = f"{mark}  {name}  {kind}  {done} of {total} arrays"
    if case.comparisons:
        worst = max(case.comparisons, key=lambda item: item.ratio)
        text += f"  largest error {worst.ratio:.3f} of its tolerance ({worst.error:.2e} in {worst.name})"
    for reason in dict.fromkeys(case.left.values()):
        names = [key for key in case.left if case.left[key] == reason]
        text += f"  not covered yet ({reason}): {', '.join(names[:3])}"
        text += f" and {len(names) - 3} more" if len(names) > 3 else ""
    more = f"; {len(case.failures) - 3} more" if len(case.failures) > 3 else ""
    return text + (f"  | {'; '.join(case.failures[:3])}{more}" if case.failures else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all reproduced that can be, 1 not, 2 nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description="Compare with golden files."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched with all subfolders")
    parser.add_argument("--only", default="", help=f"kinds to check, comma-separated: {', '.join(KINDS)}")
    parser.add_argument(
        "--data", type=Path, help="folder with connectivity and items, if not beside the files"
    )
    options = parser.parse_args(arguments)
    only = [kind for kind in options.only.split(",") if kind]
    unknown = [kind for kind in only if kind not in KINDS]
    if unknown:
        print(f"--only names {', '.join(unknown)} but the kinds are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    try:
        paths = find_files(options.folders)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    counts: Counter[str] = Counter()
    unchecked: Counter[str] = Counter()
    for path in paths:
        status, kind, line = check_file(path, only, options.data)
        counts[status] += 1
        if status == "unchecked" and kind is not None:
            unchecked[kind] += 1
        if line:
            print(line, flush=True)
    if counts.total() == counts["excluded"]:
        kinds = f" of kind {', '.join(only)}" if only else ""
        places = ", ".join(map(str, options.folders))
        print(f"no golden file{kinds} below {places}: nothing was checked", file=sys.stderr)
        return 2
    if unchecked:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(unchecked.items()))
        print(f"{counts['unchecked']} without a checker: {kinds}")
    still_open = f", {counts['open']} not covered yet" if counts["open"] else ""
    print(f"{counts['pass']} passed, {counts['fail']} failed{still_open}")
    return 1 if counts["fail"] or counts["unchecked"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
