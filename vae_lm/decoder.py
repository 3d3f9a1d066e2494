"""GPT-2 that is told a latent vector: through memory slots in every layer, the token embeddings, or both.

Optimus (Li et al., EMNLP 2020, Sec. 3.1) injects a sentence's latent z into GPT-2 by two linear maps.
*Memory*: one more position in front of each layer's keys and values, which every token may attend to.
*Embedding*: a vector added to the embedding of every token. Both go around transformers' own layers, so its
generation (greedy, sampling, beams, left padding), attention back ends and activation checkpointing work as
for a plain GPT-2.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)
from transformers.utils import can_return_tuple

from vae_lm.cache import growing_cache

INJECTIONS = ("both", "memory", "embedding")

_BACK_ENDS = {None: "memory_sdpa", "sdpa": "memory_sdpa", "eager": "memory_eager"}

_FEW_ROWS, _VOCABULARY_AT_ONCE = 256, 1024

_NEUTRAL_SETTINGS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "max_length", "output_attentions", "output_hidden_states"),
}
"""What a stored generation configuration may hold without changing greedy decoding to a given length."""


class LatentGPT2Config(GPT2Config):
    """A GPT-2 configuration with the size of the latent and the way it is injected.

    Args:
        latent_dim: size of z.
        injection: "both", "memory" or "embedding".
        num_memory_slots: positions that the memory takes in each layer; the original has one.
        **kwargs: of ``GPT2Config``.

    Raises:
        ValueError: one of these is not what it can be, or the rest asks for attention that has no memory.
    """

    model_type = "latent_gpt2"

    latent_dim: int = 32
    injection: str = "both"
    num_memory_slots: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("latent_dim", "num_memory_slots"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r} but must be an integer of at least 1")
        if self.injection not in INJECTIONS:
            raise ValueError(f"injection is {self.injection!r} but must be one of {', '.join(INJECTIONS)}")
        if not self.has_memory and self.num_memory_slots != 1:
            raise ValueError(
                f"num_memory_slots is {self.num_memory_slots} but injection 'embedding' has no memory: leave "
                "it out, or choose injection 'both' or 'memory'"
            )
        if self.add_cross_attention or self.reorder_and_upcast_attn:
            raise ValueError(
                "add_cross_attention and reorder_and_upcast_attn go past the attention that knows the "
                "latent: leave both False"
            )

    @property
    def has_memory(self) -> bool:
        """Whether z becomes memory slots."""
        return self.injection != "embedding"

    @property
    def has_embedding(self) -> bool:
        """Whether z is added to the token embeddings."""
        return self.injection != "memory"

    @property
    def first_position(self) -> int:
        """Position of the first token: 1 after a memory, however many slots; the slots have no embedding."""
        return int(self.has_memory)

    @property
    def max_tokens(self) -> int:
        """Tokens that fit, special ones included."""
        return self.n_positions - self.first_position


class LatentGPT2(GPT2LMHeadModel):
    """GPT-2 with a language-model head whose every forward takes ``latents``.

    ``generate(input_ids, latents=z, ...)`` repeats the latents for beams and returned sequences by itself.
    Masks and positions are those of the text alone: the slots are added here.

    Args:
        config: sizes and injection.
    """

    config_class = LatentGPT2Config
    config: LatentGPT2Config

    def __init__(self, config: LatentGPT2Config) -> None:
        super().__init__(config)
        if config.activation_function == "gelu_new":  # the same function in one operation instead of eight
            blocks: Any = self.transformer.h
            for block in blocks:
                block.mlp.act = nn.GELU(approximate="tanh")
        if config.has_memory:
            size = config.n_layer * config.num_memory_slots * config.n_embd
            self.memory_projection = nn.Linear(config.latent_dim, size, bias=False)
            config._attn_implementation = self.get_correct_attn_implementation(config._attn_implementation)
        # With one way of injection off its weights do not exist: DDP refuses parameters without a gradient.
        if config.has_embedding:
            self.embedding_projection = nn.Linear(config.latent_dim, config.n_embd, bias=False)
        self.post_init()

    def get_correct_attn_implementation(
        self, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        """Name of the attention with memory for "sdpa" or "eager"; plain names without a memory.

        Raises:
            ValueError: the attention is another one.
        """
        if not self.config.has_memory:
            return str(super().get_correct_attn_implementation(requested_attention, *args, **kwargs))
        name = _BACK_ENDS.get(requested_attention, requested_attention)
        if name not in _BACK_ENDS.values():
            raise ValueError(
                f"attention {requested_attention!r} cannot carry the memory of the latent: choose 'sdpa' or "
                "'eager'"
            )
        return str(name)

    def project(self, latents: Tensor) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
        """What z becomes inside the network.

        Args:
            latents: ``[B, latent_dim]``.

        Returns:
            ``(memory, embedding)``: for each layer ``[B, heads, slots, H / heads]`` or None, and
            ``[B, 1, H]`` or None.
        """
        latents = latents.to(self.transformer.wte.weight.dtype)
        memory = embedding = None
        if self.config.has_memory:
            slots = self.memory_projection(latents)
            sizes = {"l": self.config.n_layer, "h": self.config.n_head, "s": self.config.num_memory_slots}
            memory = tuple(rearrange(slots, "b (l s h d) -> l b h s d", **sizes).unbind())
        if self.config.has_embedding:
            embedding = self.embedding_projection(latents)[:, None]  # [B, 1, H]
        return memory, embedding

    def features(
        self,
        input_ids: Tensor,
        latents: Tensor,
        *,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        **recording: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Last states before the head; arguments as in `forward`."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        self._check(input_ids, latents, past, past_key_values, attention_mask)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, input_ids)
        memory, embedding = self.project(latents)
        if memory is not None:
            slots = self.config.num_memory_slots
            attention_mask = _mask_with_slots(attention_mask, past, input_ids, slots)
            recording["memory"] = memory
        embeds = self.transformer.wte(input_ids)
        output: BaseModelOutputWithPastAndCrossAttentions = self.transformer(
            inputs_embeds=embeds if embedding is None else embeds + embedding,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids + self.config.first_position,
            use_cache=use_cache,
            **recording,
        )
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        latents: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutputWithCrossAttentions:
        """Logits of the next token at every position.

        Right padding needs no mask: attention is causal.

        Args:
            input_ids: int64 ``[B, T]``.
            latents: ``[B, latent_dim]``.
            past_key_values: keys and values of P earlier tokens, without the slots.
            attention_mask: ``[B, P + T]``, 0 at padding; or ``[B or 1, 1, T, slots + P + T]``, taken as
                it is.
            position_ids: ``[B, T]``, counted from 0; by default from the mask.
            use_cache: return ``past_key_values``; by default as configured, and not in training.
            logits_to_keep: last positions (or a mask of positions) to give logits for; 0 for all.
            output_attentions: collect attention weights (attention "eager" only).
            output_hidden_states: collect the states of all layers.

        Returns:
            ``logits`` ``[B, T, V]``, ``past_key_values`` and whatever was to be collected.

        Raises:
            ValueError: no latents, latents of another size or number, a mask of another width, a text that is
                too long, or a static cache.
        """
        if latents is None:
            raise ValueError(
                f"latents are missing: pass latents=z with z [{len(input_ids)}, {self.config.latent_dim}]; "
                "a GPT-2 without a latent is transformers' GPT2LMHeadModel"
            )
        output = self.features(
            input_ids,
            latents,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=self.config.use_cache and not self.training if use_cache is None else use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = output.last_hidden_state
        assert states is not None
        return CausalLMOutputWithCrossAttentions(
            logits=self._logits(states[:, kept]),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _logits(self, states: Tensor) -> Tensor:
        weight = self.lm_head.weight
        plain = not torch.is_grad_enabled() and states.dtype == weight.dtype
        few = states.shape[:-1].numel() <= _FEW_ROWS
        if not (plain and few and states.device.type == "cpu") or torch.is_autocast_enabled("cpu"):
            logits: Tensor = self.lm_head(states)
            return logits
        # In a step of generation there are few rows. MKL takes 1.4 times as long for one product over the
        # whole vocabulary.
        logits = states.new_empty(*states.shape[:-1], len(weight))
        rows, flat = states.flatten(0, -2), logits.flatten(0, -2)
        for first in range(0, len(weight), _VOCABULARY_AT_ONCE):
            part = slice(first, first + _VOCABULARY_AT_ONCE)
            torch.mm(rows, weight[part].t(), out=flat[:, part])
        return logits

    def _check(
        self,
        input_ids: Tensor,
        latents: Tensor,
        past: int,
        past_key_values: Cache | None,
        attention_mask: Tensor | None,
    ) -> None:
        config, (batch, new) = self.config, input_ids.shape
        if latents.shape != (batch, config.latent_dim):
            raise ValueError(
                f"latents are {list(latents.shape)} but [{batch}, {config.latent_dim}] was expected: one "
                f"vector of latent_dim {config.latent_dim} for each of the {batch} texts"
            )
        if past + new > config.max_tokens:
            raise ValueError(
                f"the text has {past + new} tokens but at most {config.max_tokens} fit (n_positions is "
                f"{config.n_positions}, text starts at position {config.first_position}): shorten it"
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape != (batch, past + new):
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)} but [{batch}, {past + new}] was "
                    "expected: one column for each token so far, none for the memory"
                )
        elif attention_mask is not None:
            slots = config.num_memory_slots if config.has_memory else 0
            if attention_mask.ndim != 4 or attention_mask.shape[-2:] != (new, slots + past + new):
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)} but with four axes it must end in "
                    f"[{new}, {slots + past + new}]: {slots} memory columns, then one for each token so far"
                )
        if not config.has_memory:
            return
        if isinstance(past_key_values, StaticCache):
            raise _static_cache()
        if config._attn_implementation not in _BACK_ENDS.values():
            raise ValueError(
                f"the attention of the decoder was set to {config._attn_implementation!r}, which does not "
                "know the memory: use set_attn_implementation of this model, not of a part of it"
            )
        checkpoint = getattr(self.transformer.h[0], "_gradient_checkpointing_func", None)
        if self.training and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "re-entrant activation checkpointing loses the gradient of the latent: enable it with "
                "use_reentrant=False"
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """``GenerationMixin.generate``, which takes ``latents``.

        Raises:
            ValueError: a static cache is asked for, or an argument has no meaning.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        wanted = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
        # transformers compiles the forward for static caches and would hide the reason given there.
        if self.config.has_memory and wanted is not None and "static" in wanted:
            raise _static_cache()
        cached = kwargs.get("use_cache", True) and getattr(settings, "use_cache", True) is not False
        if cached and wanted is None and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = growing_cache()
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def greedy(self, latents: Tensor, *, max_new_tokens: int) -> Tensor:
        """What ``generate`` gives for BOS when nothing but the length is asked of it, with less to copy.

        Logits are formed for a part of the vocabulary at a time and never kept: fresh ones of the whole
        vocabulary and the copies that ``generate`` makes of them take a tenth of a step on a CPU.

        Args:
            latents: ``[B, latent_dim]``.
            max_new_tokens: longest text, EOS included.

        Returns:
            int64 ``[B, 1 + T]``: BOS, the tokens, and padding after EOS.
        """
        settings, device = self.generation_config, latents.device
        ends = (
            None if settings.eos_token_id is None else torch.as_tensor(settings.eos_token_id, device=device)
        )
        start, padding = self.config.bos_token_id, self.config.pad_token_id
        assert isinstance(start, int) and isinstance(padding, int)  # a model without them cannot be built
        tokens = torch.full((len(latents), 1), start, device=device)
        running = torch.ones_like(tokens, dtype=torch.bool)
        found, cache = [tokens], growing_cache()
        for _ in range(max_new_tokens):
            output = self.features(tokens, latents, past_key_values=cache, use_cache=True)
            assert output.last_hidden_state is not None
            best = self._most_likely(output.last_hidden_state[:, -1])[:, None]
            tokens = torch.where(running, best, padding)
            found.append(tokens)
            if ends is not None:
                running = running & ~torch.isin(tokens, ends)
                if not running.any():
                    break
        return torch.cat(found, 1)

    def is_plainly_greedy(self) -> bool:
        """Whether ``generate`` without further arguments takes the most likely token each time."""
        given = self.generation_config.to_diff_dict()
        return not {name for name, value in given.items() if value is not None} - _NEUTRAL_SETTINGS

    def _most_likely(self, states: Tensor) -> Tensor:
        """First of the tokens with the largest logit, ``[B]`` for ``states`` ``[B, H]``."""
        if torch.is_autocast_enabled(states.device.type):
            return self._logits(states).float().argmax(1)
        top = best = None
        for first in range(0, len(self.lm_head.weight), _VOCABULARY_AT_ONCE):
            part = states @ self.lm_head.weight[first : first + _VOCABULARY_AT_ONCE].t()
            value, index = part.max(1)
            if top is None or best is None:
                top, best = value, index
                continue
            better = value > top
            best = torch.where(better, index + first, best)
            top = torch.where(better, value, top)
        assert best is not None
        return best


def _static_cache() -> ValueError:
    return ValueError(
        "a static cache is sized and masked for the text alone, without the memory of the latent: leave "
        "cache_implementation out"
    )


def _positions(attention_mask: Tensor | None, past: int, input_ids: Tensor) -> Tensor:
    """Positions ``[1 or B, T]`` from 0, not counting padding on the left."""
    new = input_ids.shape[1]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(past, past + new, device=input_ids.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _mask_with_slots(
    attention_mask: Tensor | None, past: int, input_ids: Tensor, slots: int
) -> Tensor | None:
    """Who may attend to what, ``[1 or B, 1, T, slots + P + T]``; None where all may attend to all.

    Always spelt out: the causal flag of ``scaled_dot_product_attention`` counts keys from the first one, so
    with slots in front it would hide each token from itself.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    new = input_ids.shape[1]
    if attention_mask is None and new == 1:
        return None
    keys = torch.arange(past + new, device=input_ids.device)
    visible = (keys <= keys[past:, None])[None, None]  # [1, 1, T, P + T]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :].bool()
    return F.pad(visible, (slots, 0), value=True)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attention weights ``[B, heads, T, slots + K]``, without copying the keys behind the slots."""
    scores = torch.cat([query @ slots.mT, query @ key.mT], dim=-1) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)


def _memory_eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memory: tuple[Tensor, ...],
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of one layer over its slots and its text, after transformers' attention interface."""
    # One vector serves as key and as value (the original's choice).
    slots = memory[module.layer_idx].to(key.dtype)
    weights = _attend(query, key, value, slots, attention_mask, scaling)
    weights = F.dropout(weights, dropout, module.training)
    of_slots, of_text = weights.split([slots.shape[2], key.shape[2]], dim=-1)
    return (of_slots @ slots + of_text @ value).transpose(1, 2), weights


def _memory_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memory: tuple[Tensor, ...],
    scaling: float,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """The same through ``scaled_dot_product_attention``."""
    if query.shape[2] == 1:  # one new token: copying all keys behind the slots would cost more than the rest
        output, _ = _memory_eager(
            module, query, key, value, attention_mask, memory=memory, scaling=scaling, dropout=dropout
        )
        return output, None
    slots = memory[module.layer_idx].to(key.dtype)
    output = F.scaled_dot_product_attention(
        query,
        torch.cat([slots, key], dim=2),
        torch.cat([slots, value], dim=2),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return output.transpose(1, 2), None


AttentionInterface.register("memory_sdpa", _memory_sdpa)
AttentionInterface.register("memory_eager", _memory_eager)
