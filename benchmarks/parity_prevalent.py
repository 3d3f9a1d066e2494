"""Parity of Prevalent's networks: pre-training model, agent and speaker."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden import Case, Tolerance
from vln.checkpoints import infer_config, load_released, released_names, to_released
from vln.model import PretrainingOutput, PrevalentPretraining

FORWARD = Tolerance(0.0, 0.0, 1e-5)
GRADIENT = Tolerance(1e-4, 0.0)
ROUNDING = Tolerance(0.0, 0.0, 1e-6)
"""A bias of the keys shifts all scores of a query alike: its gradient is 0, and what is stored is rounding."""


def states(case: Case, prefix: str) -> dict[str, Tensor]:
    """The file's weights below a prefix, by the rest of their names."""
    return {key.removeprefix(prefix): case.use(key) for key in case.arrays if key.startswith(prefix)}


def check_pretraining(case: Case) -> None:
    """The model with its heads: outputs, losses, gradients, with and without an image."""
    state = states(case, "state/")
    model = _model(case.meta, state)
    ids, mask = case.use("in/input_ids"), case.use("in/attention_mask")
    labels = {"mlm_labels": case.use("in/mlm_labels"), "action_labels": case.use("in/action_labels")}
    views = case.use("in/img_feats")
    returned = to_released(model)
    case.require(
        returned.keys() == state.keys() and all(torch.equal(returned[key], state[key]) for key in state),
        "weights do not return under the released names to the bit",
    )
    for prefix, seen in (("out", views), ("out_text_only", None)):
        model.zero_grad()
        losses: PretrainingOutput = model(ids, seen, attention_mask=mask, **labels)
        _compare_outputs(case, prefix, model, ids, mask, seen)
        for name, value in (("loss", losses.loss), ("mlm_loss", losses.mlm_loss),
                            ("action_loss", losses.action_loss)):  # fmt: skip
            case.compare(f"{prefix}/{name}", value.double(), FORWARD)
        if seen is not None:
            losses.loss.backward()
            _compare_gradients(case, model)


def _model(config: dict[str, Any], state: dict[str, Tensor]) -> PrevalentPretraining:
    ours = infer_config(
        state, num_attention_heads=config["heads"], angle_size=0, layer_norm_eps=config["layer_norm_eps"]
    )
    model = PrevalentPretraining(ours)
    load_released(model, state)
    return model.eval()


@torch.no_grad()
def _compare_outputs(
    case: Case, prefix: str, model: PrevalentPretraining, ids: Tensor, mask: Tensor, views: Tensor | None
) -> None:
    embedded = None if views is None else model.embed_views(views)
    sequence = model.fuse(model.encode_text(ids, mask), embedded, mask)
    if embedded is not None:
        case.compare(f"{prefix}/vision_embedding", embedded, FORWARD)
    case.compare(f"{prefix}/sequence", sequence, FORWARD)
    case.compare(f"{prefix}/pooled", model.pool(sequence), FORWARD)
    case.compare(f"{prefix}/mlm_logits", model.mlm_logits(sequence), FORWARD)
    case.compare(f"{prefix}/action_logprobs", model.action_logits(sequence).log_softmax(-1), FORWARD)


def _compare_gradients(case: Case, model: nn.Module) -> None:
    """Norms of all gradients; the file's NaN stands for a weight that none reaches."""
    parameters = dict(model.named_parameters())
    names = released_names(model)  # type: ignore[arg-type]
    for ours, released in names.items():
        key, gradient = f"grad_norm/{released}", parameters[ours].grad
        norm = 0.0 if gradient is None else float(gradient.norm())
        unreached = norm == 0 and bool(np.isnan(case.arrays[key]))
        value = torch.tensor(float("nan") if unreached else norm, dtype=torch.float64)
        # The larger of the two allowances, not their sum.
        small = case.arrays[key] * GRADIENT.relative < ROUNDING.absolute
        case.compare(key, value, ROUNDING if small else GRADIENT)
