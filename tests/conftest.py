import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from fq import search

# Tests compare runs of several processes to the bit: none of them may choose its product by a clock.
os.environ.setdefault(search.GEMM_VARIABLE, search._usable_products()[0])


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of PyTorch: small tensors are no work for more, and sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not used accelerate yet, on the CPU, with a terminal wide enough for messages."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setenv("COLUMNS", "200")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
