"""How much memory a process has used at most."""

from __future__ import annotations

from pathlib import Path


def peak_mib() -> float:
    """Peak resident memory of this process's program, MiB.

    ``ru_maxrss`` would not do: a program that a large process starts inherits that one's peak.

    Raises:
        OSError: the system has no ``/proc``.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
