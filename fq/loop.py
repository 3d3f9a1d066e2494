"""Small parts that the training loops of all packages share; those loops alone import this module."""

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

try:
    import numpy as np
    from accelerate import Accelerator
except ImportError as error:
    raise ImportError("fq.loop needs accelerate: pip install 'fq-gan[train]'") from error


def derived_seed(*numbers: int, bits: int = 64) -> int:
    """A seed that depends on these numbers alone, such as those of run, step and process.

    Args:
        numbers: not negative, the same count in all calls of a purpose: zeros at the end change nothing.
        bits: of the seed, 1 to 64.

    Returns:
        A number in ``[0, 2 ** bits)``; one of fewer bits is the beginning of that of 64.

    Example:
        >>> derived_seed(0, 1) >> 1 == derived_seed(0, 1, bits=63) != derived_seed(1, 0, bits=63)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> (64 - bits)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens now and then, and at the end, happens after a step.

    Args:
        step: finished steps.
        every: steps from one time to the next; 0 for at the end only.
        last: steps in all.

    Example:
        >>> [step for step in range(1, 6) if due(step, 2, 5)]
        [2, 4, 5]
    """
    return step == last or (every > 0 and step % every == 0)


def require_finite(figures: Mapping[str, float], *, step: int, checkpoints: Path, advice: str) -> None:
    """Stop a run whose losses have broken down.

    Args:
        figures: losses and norms by name.
        step: finished steps.
        checkpoints: folder of those of the run.
        advice: a sentence without its full stop on what to do about it.

    Raises:
        FloatingPointError: a figure is infinite or not a number; the text has all of the above.

    Example:
        >>> require_finite({"loss": 0.5}, step=3, checkpoints=Path("run"), advice="Lower --lr")
    """
    for name, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: stopped; the last good checkpoint is in {checkpoints}. "
                f"{advice}"
            )


def prepare(accelerator: Accelerator, *objects: Any) -> tuple[Any, ...]:
    """``accelerator.prepare`` without a warning that its user can do nothing about.

    Args:
        accelerator: of this process.
        objects: modules and optimisers.

    Returns:
        As many prepared objects.
    """
    with warnings.catch_warnings():
        # Newer PyTorch renames what accelerate's DistributedDataParallelKwargs still calls broadcast_buffers.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        prepared = accelerator.prepare(*objects)
    return prepared if isinstance(prepared, tuple) else (prepared,)


def summed_last(
    accelerator: Accelerator, model: nn.Module, micro: int, accumulation: int
) -> AbstractContextManager[Any]:
    """Sum gradients over processes once a step, in its last micro-batch.

    Args:
        accelerator: of this process.
        model: prepared.
        micro: number of the micro-batch, from 0.
        accumulation: micro-batches of a step.

    Returns:
        A context for forward and backward of the micro-batch.
    """
    return nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model)
