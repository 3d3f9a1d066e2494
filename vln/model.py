"""Prevalent's pre-training model: an instruction and a panorama, read together.

Hao et al., "Towards Learning a Generic Agent for Vision-and-Language Navigation via Pre-training", CVPR 2020.
Words pass a stack of BERT layers that sees no picture; then cross layers of the kind of LXMERT (Tan & Bansal,
2019) join them with the 36 views of one viewpoint. Masked words are read from the joined words, the next
action from the first of them. The words' own stack does not depend on the views: compute it once an episode
(`Prevalent.encode_text`) and join it with every panorama (`Prevalent.fuse`).

Letters of shapes: B rows, T tokens, V views (36), D width of a view (features and orientation), H hidden.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

ActionTarget = Literal["candidate_rank", "view"]
Orientation = Literal["blocks", "interleaved"]

NUM_ACTIONS: dict[str, int] = {"candidate_rank": 36, "view": 37}
"""Classes of the action head: ranks among the candidates (0 is STOP), or views 0 to 35 and STOP last."""

_IGNORED = -1
"""Label of what is not to be predicted."""

_BLOCKED = -1e4
"""Added to the scores of padding, as in BERT; a row of nothing but padding then still has a softmax."""


class PrevalentConfig(PreTrainedConfig):
    """Sizes of the model, and what its inputs and answers mean.

    Args:
        vocab_size: tokens.
        hidden_size: H.
        num_attention_heads: a divisor of H.
        intermediate_size: width of the feed-forward blocks.
        num_text_layers: layers over the words alone.
        num_cross_layers: layers over words and views.
        feature_size: image features of a view.
        angle_size: orientation numbers of a view, behind the features.
        max_position_embeddings: longest text.
        type_vocab_size: rows of the token types, of which row 0 is used.
        hidden_dropout: after embeddings and blocks.
        attention_dropout: of the attention's weights.
        layer_norm_eps: of all layer norms.
        initializer_range: standard deviation of new weights.
        action_target: what the action head's classes are.
        num_actions: classes of the action head; ``None`` takes those of the target.
        orientation: layout of the orientation numbers the model was trained with (`vln.orientation`).
        feature_scale: factor of the image features the model was trained with; readers of features apply it.
        train_text: whether gradients reach the text layers and embeddings through the cross layers.
        train_cross: whether gradients reach anything below the pooled state; without it nothing does.

    Raises:
        ValueError: a size is below 1, the scale is not above 0, the heads do not divide the hidden size, or a
            choice is unknown.
    """

    model_type = "prevalent"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_text_layers: int = 9
    num_cross_layers: int = 4
    feature_size: int = 2048
    angle_size: int = 128
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    action_target: str = "candidate_rank"
    num_actions: int | None = None
    orientation: str = "blocks"
    feature_scale: float = 1.0
    train_text: bool = True
    train_cross: bool = True
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name, choices in (("action_target", ActionTarget), ("orientation", Orientation)):
            if getattr(self, name) not in get_args(choices):
                listed = ", ".join(get_args(choices))
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be one of {listed}")
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
                     "num_cross_layers", "feature_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1")
        if not 0 < self.feature_scale < float("inf"):
            raise ValueError(f"feature_scale is {self.feature_scale} but must be above 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_actions is None:
            self.num_actions = NUM_ACTIONS[self.action_target]

    @property
    def view_size(self) -> int:
        """D: features and orientation of a view."""
        return self.feature_size + self.angle_size


# ---- blocks, all post-LN as in BERT


class Attention(nn.Module):
    """Multi-head attention with its residual: ``LN(x + W_o MHA(q=x, kv=memory))``."""

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.attention_dropout = config.num_attention_heads, config.attention_dropout
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.output = nn.Linear(size, size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor, memory: Tensor, blocked: Tensor | None = None) -> Tensor:
        """Look from ``states`` at ``memory``.

        Args:
            states: ``[B, N, H]``.
            memory: ``[B, M, H]``.
            blocked: what to add to the scores, broadcast to ``[B, heads, N, M]``.

        Returns:
            ``[B, N, H]``.
        """
        queries, keys, values = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=self.num_heads)
            for part in (self.query(states), self.key(memory), self.value(memory))
        )
        if blocked is not None:
            blocked = blocked.to(queries.dtype)
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, blocked, self.attention_dropout if self.training else 0.0
        )
        mixed = rearrange(mixed, "b heads n d -> b n (heads d)")
        return self.norm(states + self.dropout(self.output(mixed)))


class FeedForward(nn.Module):
    """``LN(x + W_2 gelu(W_1 x))``; ``[..., H]`` to the same."""

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.hidden_size, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states: Tensor) -> Tensor:
        """One block."""
        return self.norm(states + self.dropout(self.contract(F.gelu(self.expand(states)))))


class Embeddings(nn.Module):
    """Words, positions and token type 0: int64 ``[B, T]`` to ``[B, T, H]``."""

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        # Padding's row gets no gradient as an input, as in BERT; it does as a class of the masked words.
        self.words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed a batch."""
        placed = self.positions.weight[: input_ids.shape[1]] + self.token_types.weight[0]
        return self.dropout(self.norm(self.words(input_ids) + placed))


class TextLayer(nn.Module):
    """A layer of BERT, ``[B, T, H]`` to the same."""

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, text: Tensor, blocked: Tensor | None) -> Tensor:
        """One layer; ``blocked`` as in `Attention`."""
        return self.feed_forward(self.attention(text, text, blocked))


class CrossLayer(nn.Module):
    """A layer of LXMERT: words and views look at each other, then each at themselves.

    One cross attention serves both directions, and both look at the layer's inputs (Tan & Bansal, 2019).
    """

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        self.cross_attention = Attention(config)
        self.text_attention = Attention(config)
        self.text_feed_forward = FeedForward(config)
        self.view_attention = Attention(config)
        self.view_feed_forward = FeedForward(config)

    def forward(
        self, text: Tensor, views: Tensor, blocked: Tensor | None, *, with_views: bool = True
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            text: ``[B, T, H]``.
            views: ``[B, V, H]``.
            blocked: of the words, as in `Attention`.
            with_views: whether anybody needs the views; without, they are returned as they came.

        Returns:
            Text and views, of the same shapes.
        """
        seen = self.text_attention(*[self.cross_attention(text, views)] * 2, blocked)
        if with_views:
            told = self.cross_attention(views, text, blocked)
            views = self.view_feed_forward(self.view_attention(told, told))
        return self.text_feed_forward(seen), views


class MaskedWordHead(nn.Module):
    """Scores of all words at a position, ``[..., H]`` to ``[..., vocab]``, with the embeddings as weights."""

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__()
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Scores under the word embeddings ``[vocab, H]``."""
        return F.linear(self.norm(F.gelu(self.transform(states))), words, self.bias)


# ---- the model


class Prevalent(PreTrainedModel):
    """The model without its heads, as the agents use it.

    Args:
        config: sizes.

    Example:
        >>> config = PrevalentConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8,
        ...     num_text_layers=1, num_cross_layers=1, feature_size=3, angle_size=4)
        >>> model = Prevalent(config).eval()
        >>> ids, views = torch.tensor([[2, 5, 3]]), torch.zeros(1, 36, 7)
        >>> text = model.encode_text(ids)  # once
        >>> model.fuse(text, model.embed_views(views)).shape  # at every step
        torch.Size([1, 3, 8])
    """

    config_class = PrevalentConfig
    config: PrevalentConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^action_head\.", r"^mlm_head\."]  # noqa: RUF012

    def __init__(self, config: PrevalentConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_text_layers))
        self.view_projection = nn.Linear(config.view_size, config.hidden_size)
        self.view_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.view_dropout = nn.Dropout(config.hidden_dropout)
        self.cross_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.num_cross_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self._finish()

    def _finish(self) -> None:
        self.post_init()
        self._rest_idle()

    def _rest_idle(self) -> None:
        # Nothing reads the views of the last layer: distributed training refuses weights without a gradient.
        last = self.cross_layers[-1]
        last.view_attention.requires_grad_(False)
        last.view_feed_forward.requires_grad_(False)

    def set_trained(self, *, text: bool, cross: bool) -> None:
        """Let an agent train all of the model, its cross layers alone, or nothing (Hao et al., Sec. 5).

        Writes ``train_text`` and ``train_cross`` of the configuration, and keeps the rest from optimisers and
        distributed training. What does not train still has its dropout in training mode.

        Args:
            text: embeddings and text layers.
            cross: cross layers and the projection of the views.

        Raises:
            ValueError: the text without the cross layers, through which its gradient comes.
        """
        if text and not cross:
            raise ValueError("text=True needs cross=True: gradients reach the text through the cross layers")
        self.config.train_text, self.config.train_cross = text, cross
        of_text: list[nn.Module] = [self.embeddings, self.text_layers]
        of_both: list[nn.Module] = [self.view_projection, self.view_norm, self.cross_layers]
        for modules, trains in ((of_text, text), (of_both, cross)):
            for module in modules:
                module.requires_grad_(trains)
        self._rest_idle()

    def get_input_embeddings(self) -> nn.Embedding:
        """Embeddings of the words."""
        return self.embeddings.words

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *_: Any, **__: Any
    ) -> nn.Embedding:
        """Change the number of words, as after a tokeniser got new ones.

        Args:
            new_num_tokens: words in all; the first ones keep their weights, new ones are drawn from
                N(0, initializer_range^2). ``None`` changes nothing. What else transformers offers here is not
                looked at.

        Returns:
            The embeddings.
        """
        old = self.embeddings.words
        if new_num_tokens is None or new_num_tokens == old.num_embeddings:
            return old
        kept = min(new_num_tokens, old.num_embeddings)
        new = nn.Embedding(new_num_tokens, old.embedding_dim, padding_idx=old.padding_idx).to(old.weight)
        with torch.no_grad():
            new.weight.normal_(std=self.config.initializer_range)
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        self.embeddings.words, self.config.vocab_size = new, new_num_tokens
        return new

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Words before they see a view (T^0); the same for all steps of an episode.

        Args:
            input_ids: int64 ``[B, T]``.
            attention_mask: ``[B, T]``, 1 or true for words; default: everywhere but at padding.

        Returns:
            ``[B, T, H]``; without a gradient if the configuration says so.

        Raises:
            ValueError: the text is longer than there are positions.
        """
        if input_ids.shape[-1] > self.config.max_position_embeddings:
            raise ValueError(
                f"texts have {input_ids.shape[-1]} tokens but the model takes at most "
                f"{self.config.max_position_embeddings}: cut them"
            )
        blocked = self._blocked(self._mask(input_ids, attention_mask))
        trains = torch.is_grad_enabled() and self.config.train_text and self.config.train_cross
        with torch.set_grad_enabled(trains):
            text: Tensor = self.embeddings(input_ids)
            for layer in self.text_layers:
                text = layer(text, blocked)
        return text

    def embed_views(self, views: Tensor) -> Tensor:
        """Views before they meet the words (V^0): ``[B, V, D]`` to ``[B, V, H]``.

        Raises:
            ValueError: the views are of another width.
        """
        if views.shape[-1] != self.config.view_size:
            raise ValueError(
                f"views have {views.shape[-1]} numbers but the model was made for {self.config.view_size} "
                f"({self.config.feature_size} features, {self.config.angle_size} of orientation): give the "
                "features that it was trained with"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_cross):
            return self.view_dropout(self.view_norm(self.view_projection(views)))

    def fuse(self, text: Tensor, views: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """Join words with views; without views the words stay as they are.

        Args:
            text: ``[B, T, H]`` of `encode_text`.
            views: ``[B, V, H]`` of `embed_views`, or ``None``.
            mask: ``[B, T]``, true for words; ``None`` says there is no padding.

        Returns:
            ``[B, T, H]``.
        """
        blocked = self._blocked(mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_cross):
            for number, layer in enumerate(self.cross_layers if views is not None else ()):
                text, views = layer(text, views, blocked, with_views=number + 1 < len(self.cross_layers))
        return text

    def pool(self, sequence: Tensor) -> Tensor:
        """State of the whole text from that of its first token: ``[B, T, H]`` to ``[B, H]``."""
        return torch.tanh(self.pooler(sequence[:, 0]))

    def forward(
        self, input_ids: Tensor, views: Tensor | None = None, *, attention_mask: Tensor | None = None
    ) -> Any:
        """Everything at once.

        Args:
            input_ids: int64 ``[B, T]``.
            views: ``[B, V, D]``, or ``None`` for the text alone.
            attention_mask: as in `encode_text`.

        Returns:
            Joined words ``[B, T, H]``.
        """
        mask = self._mask(input_ids, attention_mask)
        text = self.encode_text(input_ids, mask)
        return self.fuse(text, None if views is None else self.embed_views(views), mask)

    def _mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return input_ids != (self.config.pad_token_id or 0) if attention_mask is None else attention_mask

    def _blocked(self, mask: Tensor | None) -> Tensor | None:
        """What to add to the scores of words, float32 ``[B, 1, 1, T]``."""
        if mask is None:
            return None
        return ((1 - mask.to(torch.float32)) * _BLOCKED)[:, None, None, :]

    # ---- one folder

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Write configuration and weights (safetensors), beside the folder first and then moved into it.

        Args:
            save_directory: made if need be; files of an older model in it are replaced.
            **kwargs: of transformers, as ``max_shard_size``.
        """
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            super().save_pretrained(partial, **kwargs)
            folder.mkdir(exist_ok=True)
            written = {path.name for path in partial.iterdir()}
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
            for stale in folder.glob("model*.safetensors*"):
                if stale.name not in written:
                    stale.unlink()
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Read a folder that `save_pretrained` wrote; no code of it is run.

        Args:
            pretrained_model_name_or_path: the folder.
            *args: of transformers.
            **kwargs: of transformers, as ``dtype``.

        Returns:
            The model in eval mode.

        Raises:
            FileNotFoundError: there is no such folder, or no model in it.
            ValueError: weights are missing, unknown or of another shape.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no config.json: give a folder written by save_pretrained, or make one of a "
                "released checkpoint by vln.checkpoints.from_released"
            )
        kwargs.update(output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True)
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, info = loaded
        wrong = {
            "missing": sorted(info["missing_keys"]),
            "unknown": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(item[0]) for item in info["mismatched_keys"]),
        }
        if any(wrong.values()):
            found = "; ".join(f"{name}: {', '.join(keys[:5])}" for name, keys in wrong.items() if keys)
            raise ValueError(
                f"the weights in {folder} do not fit its config.json ({found}): save the model again"
            )
        return model


class PretrainingOutput(NamedTuple):
    """Summed losses and counts of a batch; a term without anything to predict is 0 of 0."""

    mlm_sum: Tensor
    """Cross-entropy summed over the masked words, float32 ``[]``."""
    mlm_count: Tensor
    """int64 ``[]``."""
    mlm_correct: Tensor
    """int64 ``[]``."""
    action_sum: Tensor
    """Cross-entropy summed over the rows with an action, float32 ``[]``."""
    action_count: Tensor
    """int64 ``[]``."""
    action_correct: Tensor
    """int64 ``[]``."""

    @property
    def mlm_loss(self) -> Tensor:
        """Mean over the masked words; 0 without any (the original's is not a number)."""
        return self.mlm_sum / self.mlm_count.clamp(min=1)

    @property
    def action_loss(self) -> Tensor:
        """Mean over the rows with an action; 0 without any."""
        return self.action_sum / self.action_count.clamp(min=1)

    @property
    def loss(self) -> Tensor:
        """Both, unweighted."""
        return self.mlm_loss + self.action_loss


class PrevalentPretraining(Prevalent):
    """The model with both heads: masked words, and the next action.

    Args:
        config: sizes, and what the actions are.
    """

    _keys_to_ignore_on_load_unexpected = []  # noqa: RUF012

    def _finish(self) -> None:
        config = self.config
        assert config.num_actions is not None
        self.action_head = nn.Linear(config.hidden_size, config.num_actions)
        self.mlm_head = MaskedWordHead(config)
        super()._finish()

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *_: Any, **__: Any
    ) -> nn.Embedding:
        """The same; new words begin without a bias as answers."""
        new = super().resize_token_embeddings(new_num_tokens)
        bias, more = self.mlm_head.bias, new.num_embeddings - len(self.mlm_head.bias)
        changed = bias.detach()[: new.num_embeddings] if more < 0 else F.pad(bias.detach(), (0, more))
        self.mlm_head.bias = nn.Parameter(changed.clone(), requires_grad=bias.requires_grad)
        return new

    def mlm_logits(self, states: Tensor) -> Tensor:
        """Scores of all words, ``[..., H]`` to ``[..., vocab]``."""
        return self.mlm_head(states, self.embeddings.words.weight)

    def action_logits(self, sequence: Tensor) -> Tensor:
        """Scores of all actions, ``[B, T, H]`` to ``[B, num_actions]``."""
        return self.action_head(self.pool(sequence))

    def forward(
        self,
        input_ids: Tensor,
        views: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        action_labels: Tensor | None = None,
    ) -> PretrainingOutput:
        """Losses of a batch (Hao et al., Eq. 1 and 2).

        Args:
            input_ids: int64 ``[B, T]``, some words masked.
            views: ``[B, V, D]``, or ``None`` for the text alone.
            attention_mask: ``[B, T]``; default: everywhere but at padding.
            mlm_labels: int64 ``[B, T]``, the word where one was chosen, else -1; ``None`` for no such term.
            action_labels: int64 ``[B]``, -1 for none; ``None`` for no such term.

        Returns:
            Sums and counts.

        Raises:
            ValueError: a label is outside its classes.
        """
        sequence = super().forward(input_ids, views, attention_mask=attention_mask)
        mlm = action = _loss(sequence.new_zeros(0, 1), input_ids.new_zeros(0), "")
        if mlm_labels is not None:
            # Only chosen words go through the vocabulary, the dearest product of all.
            chosen = mlm_labels != _IGNORED
            mlm = _loss(self.mlm_logits(sequence[chosen]), mlm_labels[chosen], "masked word")
        if action_labels is not None:
            labelled = action_labels != _IGNORED
            action = _loss(self.action_logits(sequence)[labelled], action_labels[labelled], "action")
        return PretrainingOutput(*mlm, *action)


def _loss(logits: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy, count and correct answers; the sum of nothing keeps its graph."""
    if (
        logits.device.type == "cpu"
        and len(labels)
        and not 0 <= int(labels.min()) <= int(labels.max()) < (logits.shape[-1])
    ):
        raise ValueError(
            f"a label of the {name}s is {int(labels.min())} or {int(labels.max())} but there are "
            f"{logits.shape[-1]} classes: the labels are of another vocabulary or action target"
        )
    logits = logits.float()
    total = F.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(-1) == labels).sum()
    return total, torch.tensor(len(labels), device=labels.device), correct
