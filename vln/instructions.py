"""Instructions as token ids: texts of dialogues, markers, and cutting to the length that agents read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from vln.items import HannaTask, NDHItem, R2RItem, RxRItem

History = Literal["none", "target", "oracle_ans", "nav_q_oracle_ans", "all"]
"""How much of a dialogue an agent reads."""

MARKERS = ("<NAV>", "<ORA>", "<TAR>")
"""Before a question, an answer, and the name of the target."""
RELEASED_MARKERS = ("<NAV>", "ORA", "TAR")
"""What the released NDH snapshots were trained with: the last two lost their brackets."""
MAX_TOKENS, MAX_DIALOGUE_TOKENS = 80, 300


class Encoded(NamedTuple):
    """Instructions as numbers."""

    names: tuple[str | int, ...]
    """``[N]``: what a submission calls each."""
    item: np.ndarray
    """int64 ``[N]``: which item each is of."""
    token_ids: np.ndarray
    """int64 ``[N, L]``, as long as the longest one, padded on the right."""
    mask: np.ndarray
    """bool ``[N, L]``: where there are tokens."""


def dialogue_text(item: NDHItem, history: History = "nav_q_oracle_ans") -> str:
    """Text of a dialogue so far, parts set off by :data:`MARKERS`.

    Without a dialogue every history but ``none`` is the target alone (CVDN, Thomason et al., 2019, Sec. 5).

    Args:
        item: the dialogue and its target.
        history: nothing; the target; the last answer too; the last question too; or every turn.

    Raises:
        ValueError: ``history`` is another.

    Example:
        >>> from vln.items import Turn
        >>> turns = (Turn("navigator", "left or right?", 1), Turn("oracle", "left", 1))
        >>> dialogue_text(NDHItem(0, "house", "hall", 0.0, (), (), (), "sofa", turns))
        '<NAV> left or right? <ORA> left <TAR> sofa'
    """
    if history not in get_args(History):
        raise ValueError(f"history is {history!r}, expected one of {', '.join(get_args(History))}")
    if history == "none":
        return ""
    nav, ora, tar = MARKERS
    target = f"{tar} {item.target}"
    if history == "target" or not item.turns:
        return target
    if history == "all":
        said = (f"{ora if turn.role == 'oracle' else nav} {turn.message}" for turn in item.turns)
        return " ".join([*said, target])
    # By place, not by role, as the originals take them: the last turn answers, the one before it asks.
    answer = f"{ora} {item.turns[-1].message} {target}"
    if history == "oracle_ans" or len(item.turns) < 2:
        return answer
    return f"{nav} {item.turns[-2].message} {answer}"


def add_markers(tokenizer: Any, *, released: bool = False) -> int:
    """Make each marker one token; resize the model's word embedding to ``len(tokenizer)`` afterwards.

    Args:
        tokenizer: of ``transformers``; changed in place.
        released: the misspelt markers of the released NDH snapshots, for models from those.

    Returns:
        How many tokens are new.
    """
    return tokenizer.add_tokens(list(RELEASED_MARKERS if released else MARKERS), special_tokens=True)


def encode_instructions(
    items: Sequence[R2RItem | RxRItem | HannaTask | NDHItem],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    history: History = "nav_q_oracle_ans",
) -> Encoded:
    """Token ids of every instruction of the items, or of every dialogue.

    An instruction that is too long loses its end, and its last id becomes the one that closes a text
    (``[SEP]``). A dialogue loses its oldest words: the cut comes after the id that opens a text (``[CLS]``).

    Args:
        items: of one task.
        tokenizer: of ``transformers``; it needs a padding token, and for dialogues the markers.
        max_tokens: most ids of a text, those that open and close it included; 80, for dialogues 300.
        history: what is read of dialogues.

    Raises:
        ValueError: there is no item, ``max_tokens`` is below 3, the tokenizer has no padding token, or it
            lacks the markers that a dialogue needs.
    """
    if not items:
        raise ValueError("there are no items to encode")
    spoken = isinstance(items[0], NDHItem)
    limit = (MAX_DIALOGUE_TOKENS if spoken else MAX_TOKENS) if max_tokens is None else max_tokens
    if limit < 3:
        raise ValueError(f"max_tokens is {limit}: give at least 3, for one word between [CLS] and [SEP]")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token")
    if spoken and history != "none":
        _require_markers(tokenizer)
    names: list[str | int] = []
    owners, rows = [], []
    for number, item in enumerate(items):
        if isinstance(item, NDHItem):
            named: list[tuple[str | int, str]] = [(item.inst_idx, dialogue_text(item, history))]
        else:
            named = list(zip(item.instruction_ids, item.instructions, strict=True))
        for name, text in named:
            ids = tokenizer(text, verbose=False)["input_ids"]
            names.append(name)
            owners.append(number)
            rows.append(_cut_left(ids, limit, tokenizer) if spoken else _cut_right(ids, limit, tokenizer))
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    token_ids = np.full(mask.shape, tokenizer.pad_token_id, dtype=np.int64)
    token_ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return Encoded(tuple(names), np.array(owners, dtype=np.int64), token_ids, mask)


def _require_markers(tokenizer: Any) -> None:
    known = tokenizer.get_added_vocab()
    if not any(all(marker in known for marker in markers) for markers in (MARKERS, RELEASED_MARKERS)):
        raise ValueError(
            f"the tokenizer does not know the markers {' '.join(MARKERS)} and would take them apart: call "
            "vln.instructions.add_markers(tokenizer), and resize the model's word embedding"
        )


def _cut_right(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    closes = ids[-1:] if ids and ids[-1] in tokenizer.all_special_ids else []
    return ids if len(ids) <= limit else ids[: limit - len(closes)] + closes


def _cut_left(ids: list[int], limit: int, tokenizer: Any) -> list[int]:
    opens = ids[:1] if ids and ids[0] in (tokenizer.cls_token_id, tokenizer.bos_token_id) else []
    return ids if len(ids) <= limit else opens + ids[len(ids) - limit + len(opens) :]
