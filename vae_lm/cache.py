"""Keys and values of the text so far, for generation: with room to write into instead of a copy a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_LEAST_ROOM = 32


class GrowingLayer(DynamicLayer):
    """A layer of transformers' dynamic cache whose room doubles when it is full.

    The usual one copies everything it holds for every new token. With gradients on, this one does so too,
    since writing in place would spoil what the backward pass needs.
    """

    _key_room: Tensor | None = None
    _value_room: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the states ``[B, heads, T, D]`` of new tokens; returns those of all tokens."""
        if torch.is_grad_enabled():
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_room = _append(self.keys, self._key_room, key_states)
        self.values, self._value_room = _append(self.values, self._value_room, value_states)
        return self.keys, self.values


def growing_cache() -> Cache:
    """An empty cache of such layers, for ``past_key_values``."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _append(held: Tensor | None, room: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """``held`` and then ``new``, and the room that both are in."""
    length = held.shape[-2] if held is not None and held.ndim == 4 else 0
    total = length + new.shape[-2]
    # Beam search and the like put another tensor in place of ours: then start from that one.
    if (
        room is None
        or total > room.shape[-2]
        or (length and held is not None and held.data_ptr() != room.data_ptr())
    ):
        room = new.new_empty(*new.shape[:2], max(_LEAST_ROOM, 2 * total), new.shape[-1])
        if held is not None and length:
            room[..., :length, :] = held
    room[..., length:total, :] = new
    return room[..., :total, :], room
