"""What a pre-trained model makes of some triplets, to be read: masked words and the next action."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vln.model import Prevalent, PrevalentPretraining
from vln.pretrain_data import Batch
from vln.triplets import STOP_VIEW


@torch.no_grad()
def told_samples(
    model: PrevalentPretraining, batch: Batch, tokenizer: Any, *, mlm: bool = True, action: bool = True
) -> str:
    """Lines on every triplet of a batch.

    Args:
        model: put into eval mode, and back.
        batch: on the model's device.
        tokenizer: that made it.
        mlm: whether masked words are an objective: each is shown as ``[right word: answer]``.
        action: whether actions are.

    Returns:
        Markdown.
    """
    was_training = model.training
    model.eval()
    sequence = Prevalent.forward(model, batch.input_ids, batch.views)
    words = model.mlm_logits(sequence).argmax(-1) if mlm else batch.mlm_labels
    actions = model.action_logits(sequence).argmax(-1).tolist()
    model.train(was_training)
    by_view = model.config.action_target == "view"
    lines = ["Masked words are shown as [right word: answer].\n"] if mlm else []
    for row in range(len(batch.input_ids)):
        lines.append(f"* {_text(batch.input_ids[row], batch.mlm_labels[row], words[row], tokenizer)}")
        right = int(batch.action_labels[row])
        if action and right >= 0:
            told = [_action(number, by_view) for number in (right, actions[row])]
            lines.append(f"  Action: {told[0]}; answer: {told[1]}.")
    return "\n".join(lines) + "\n"


def _text(ids: Tensor, labels: Tensor, words: Tensor, tokenizer: Any) -> str:
    dropped = {tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    names = tokenizer.convert_ids_to_tokens
    parts = [
        f"[{names(right)}: {names(word)}]" if right >= 0 else names(token)
        for token, right, word in zip(ids.tolist(), labels.tolist(), words.tolist(), strict=True)
        if right >= 0 or token not in dropped
    ]
    return " ".join(parts).replace(" ##", "")


def _action(number: int, by_view: bool) -> str:
    if number == (STOP_VIEW if by_view else 0):
        return "STOP"
    return f"view {number}" if by_view else f"candidate {number}"
