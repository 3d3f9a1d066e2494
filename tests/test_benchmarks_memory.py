"""The peak of a program is its own, whoever started it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import peak_mib

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def test_the_peak_does_not_come_from_the_program_that_started_it():
    held = bytearray(b"x") * (200 << 20)
    assert peak_mib() > 200
    assert peak_mib_of_a_child() < 100
    assert len(held) == 200 << 20


def peak_mib_of_a_child(code: str = "") -> float:
    command = f"{code}\nfrom benchmarks.memory import peak_mib; print(peak_mib())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True, capture_output=True)
    return float(done.stdout)


def test_memory_that_was_given_back_counts():
    assert peak_mib_of_a_child("x = bytearray(b'x') * (300 << 20); del x") > 300
