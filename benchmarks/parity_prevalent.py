"""Parity of Prevalent's networks: pre-training model, agent and speaker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.golden import Case, Tolerance
from vln.checkpoints import infer_config, load_released, released_names, to_released
from vln.model import PretrainingOutput, PrevalentPretraining
from vln.recurrent import length_mask
from vln.snapshots import (
    follower_from_released,
    follower_to_released,
    speaker_from_released,
    speaker_to_released,
)

FORWARD = Tolerance(0.0, 0.0, 1e-5)
GRADIENT = Tolerance(1e-4, 0.0)
ROUNDING = Tolerance(0.0, 0.0, 1e-6)
"""A bias of the keys shifts all scores alike: its gradient is 0, and what is stored is rounding."""


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


def _model(config: Mapping[str, Any], state: dict[str, Tensor]) -> PrevalentPretraining:
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


# ---- agent and speaker


def check_agent(case: Case) -> None:
    """Encoder, two steps of the decoder, critic, speaker, all without dropout."""
    with torch.no_grad():
        _check_follower(case)
        _check_speaker(case)


def _check_follower(case: Case) -> None:
    parts = {name: states(case, f"state/{name}/") for name in ("encoder", "decoder", "critic")}
    snapshot = follower_from_released(
        parts, num_attention_heads=case.meta["heads"], orientation="interleaved"
    )
    agent = snapshot.follower.eval()
    returned = follower_to_released(snapshot)
    for name, state in parts.items():
        case.require(
            returned[name].keys() == state.keys()
            and all(torch.equal(returned[name][key], state[key]) for key in state),
            f"weights of the {name} do not return under the released names to the bit",
        )
    lengths, panorama = case.use("in/lengths"), case.use("in/panorama")
    text = agent.encoder.encode_text(case.use("in/input_ids"), lengths)
    context = agent.encoder(text, lengths, panorama)
    case.compare("out/ctx", context.words[:, 0], FORWARD)
    case.compare("out/h0", context.hidden, FORWARD)
    case.compare("out/c0", context.cell, FORWARD)
    candidates, angle = case.use("in/candidates"), case.use("in/angle")
    masked = case.use("in/num_candidates_with_stop")
    tilde, cell = context.hidden, context.cell
    for number, facing in ((1, angle), (2, angle * 0.5)):
        step = agent.decoder(facing, panorama, candidates, tilde, cell, context)
        case.compare(f"out/step{number}_h", step.hidden, FORWARD)
        case.compare(f"out/step{number}_c", step.cell, FORWARD)
        case.compare(f"out/step{number}_htilde", step.tilde, FORWARD)
        case.compare(f"out/step{number}_logit_unmasked", step.logits, FORWARD)
        if number == 1:
            case.compare("out/value_step1", agent.critic(step.hidden), FORWARD)
        limited = agent.decoder(
            facing, panorama, candidates, tilde, cell, context, num_candidates=masked
        ).logits
        case.require(
            bool((limited.isfinite().sum(1) == masked).all()), f"step {number}: candidates are not masked"
        )
        tilde, cell = step.tilde, step.cell


def _check_speaker(case: Case) -> None:
    parts = {name: states(case, f"state/speaker_{name}/") for name in ("encoder", "decoder")}
    snapshot = speaker_from_released(parts, angle_size=case.meta["angle_feat_size"])
    speaker = snapshot.speaker.eval()
    returned = speaker_to_released(snapshot)
    for name, state in parts.items():
        case.require(
            returned[name].keys() == state.keys()
            and all(torch.equal(returned[name][key], state[key]) for key in state),
            f"weights of the speaker's {name} do not return under the released names to the bit",
        )
    lengths = case.use("in/speaker_lengths")
    path = speaker.encoder(case.use("in/speaker_actions"), case.use("in/speaker_panorama"), lengths)
    case.compare("out/speaker_ctx", path, FORWARD)
    mask = length_mask(lengths, path.shape[1])
    said = speaker.decoder(case.use("in/speaker_words"), path, mask)
    case.compare("out/speaker_logits", said.logits, FORWARD)
    case.compare("out/speaker_h", said.hidden, FORWARD)
    case.compare("out/speaker_c", said.cell, FORWARD)
