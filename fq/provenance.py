"""Where numbers come from: the command, the code and the machine behind a run or a report."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    from accelerate.state import PartialState
except ImportError as error:
    raise ImportError("fq.provenance needs accelerate: pip install 'fq-gan[train]'") from error


def provenance(seed: int) -> dict[str, Any]:
    """Where numbers come from: what was run, on what, with which versions.

    Args:
        seed: of the run; stored as given.

    Returns:
        ``command``, ``seed``, ``commit`` and ``dirty`` of this package's repository (``"unknown"`` for an
        installed package; untracked files do not make it dirty), ``versions``, ``device``, ``device_name``,
        ``world_size`` (processes) and ``started`` (UTC, ISO 8601). Ready for JSON.
    """
    state = PartialState()
    on_cuda = state.device.type == "cuda"
    commit, dirty = _git_state(Path(__file__).resolve())
    return {
        # Not sys.argv: after `python -m` it names a file, which is not how modules here can be run.
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "seed": seed,
        "commit": commit,
        "dirty": dirty,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # unlike the package metadata, it names the CUDA build
            **{name: _version(name) for name in ("accelerate", "numpy", "fq-gan")},
        },
        "device": str(state.device),
        "device_name": torch.cuda.get_device_name(state.device) if on_cuda else _processor(),
        "world_size": state.num_processes,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """Model and number of the processors; Linux alone tells the model."""
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _git_state(file: Path) -> tuple[str, bool | str]:
    """Commit of the repository that tracks ``file`` and whether tracked files differ from it."""
    # An installed package may lie in somebody else's repository, whose commit would be misleading.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return "unknown", "unknown"
    commit = _git(file.parent, "rev-parse", "HEAD")
    status = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return commit or "unknown", "unknown" if status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git, ``None`` when there is no git, no repository, or no answer in time."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
