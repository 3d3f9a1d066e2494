"""Pre-training of Prevalent on a device: triplets a second in bfloat16, share of the peak, memory."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vln.model import PrevalentConfig, PrevalentPretraining
from vln.pretrain import make_optimiser
from vln.pretrain_config import PAPER

MASK_SHARE = 0.15


class Triplets(NamedTuple):
    """Random ones."""

    input_ids: Tensor
    """int64 ``[B, T]``."""
    views: Tensor
    """float32 ``[B, 36, D]``."""
    mlm_labels: Tensor
    """int64 ``[B, T]``, -1 where nothing is asked."""
    action_labels: Tensor
    """int64 ``[B]``."""


FULL = PrevalentConfig()
"""The published sizes: 9 + 4 layers, 156.7 M parameters."""
TINY = PrevalentConfig(
    vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_text_layers=1,
    num_cross_layers=1, feature_size=12, angle_size=4, max_position_embeddings=32,
)  # fmt: skip


def random_triplets(config: PrevalentConfig, *, batch: int, tokens: int, device: torch.device) -> Triplets:
    """Triplets whose texts are all of one length.

    Args:
        config: sizes of the model.
        batch: B.
        tokens: T.
        device: of the tensors.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, config.vocab_size, (batch, tokens), generator=draw)
    hidden = torch.rand(batch, tokens, generator=draw) < MASK_SHARE
    parts = (
        ids,
        torch.randn(batch, 36, config.view_size, generator=draw),
        torch.where(hidden, ids, -1),
        torch.randint(int(config.num_actions or 1), (batch,), generator=draw),
    )
    return Triplets(*(part.to(device) for part in parts))


def measure(
    config: PrevalentConfig, *, batch: int, tokens: int, steps: int, device: torch.device, roof: float
) -> dict[str, Any]:
    """Whole steps under autocast, weights in float32: forward, backward, clipping, AdamW.

    Args:
        config: sizes of the model; its dropout is on.
        batch: triplets of a step.
        tokens: of every text.
        steps: timed ones, after three that warm up.
        device: to train on.
        roof: FLOP/s of the device in bfloat16.

    Returns:
        ``{"triplets_per_second", "step_ms", "percent_of_roof", "peak_mib", ...}``; no memory on a CPU. The
        share counts products and attention of forward and backward, as they are run.
    """
    torch.manual_seed(0)
    model = PrevalentPretraining(config).train()
    torch.nn.Module.to(model, device)
    optimiser = make_optimiser(model, PAPER.optim)
    given = random_triplets(config, batch=batch, tokens=tokens, device=device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = model(
                given.input_ids, given.views, mlm_labels=given.mlm_labels, action_labels=given.action_labels
            )
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), PAPER.optim.max_grad_norm)
        optimiser.step()
        if cuda:
            torch.cuda.synchronize()

    counter = FlopCounterMode(display=False)
    with counter:
        step()
    for _ in range(2):
        step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    found = {
        "batch": batch,
        "tokens": tokens,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "step_ms": seconds * 1e3,
        "triplets_per_second": batch / seconds,
        "flop_of_a_step": counter.get_total_flops(),
        "percent_of_roof": 100 * counter.get_total_flops() / seconds / roof,
    }
    if cuda:
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found
