"""FeatureQuantize: features to their nearest codes, and the codes to the moving average of their features."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fq import codebook as books
from fq.losses import commitment, straight_through
from fq.search import code_sums, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_READ_EVERY = 100

Mode = Literal["regularize", "replace", "blend"]
Compat = Literal["torch", "tf"]
Reduction = Literal["mean", "none"]
Init = Literal["auto", "kmeans", "data", "normal", "uniform"]


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}: give {expected}")


def _in(value: object, choices: tuple[object, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, choices))}")


class FQOutput(NamedTuple):
    """What one forward returns: ``features, indices, loss``."""

    features: Tensor
    """``[B, dim, *spatial]``, dtype of the input: the input itself under ``regularize``, else fresh."""
    indices: Tensor
    """int64 ``[B, *spatial]``: the code of every token."""
    loss: Tensor
    """Weighted commitment loss, float32 or wider: a scalar, or ``[B]`` with ``reduction="none"``."""


@dataclass(frozen=True, kw_only=True)
class CodebookOptions:
    """How a codebook starts, stays alive and is updated.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> CodebookOptions(init="data", dead_code_threshold=0.0).init
        'data'
    """

    init: Init = "auto"
    """First codes: k-means or a sample of the first training batch, N(0, 1), or U(-1/K, 1/K).
    ``auto`` is ``kmeans``, and ``normal`` under ``compat``."""
    init_tokens: int = 4096
    """Tokens of the first batch that k-means looks at; never fewer than codes."""
    kmeans_iterations: int = 10
    """Lloyd iterations of ``init="kmeans"``."""
    dead_code_threshold: float | None = None
    """A code whose EMA count is below this share of the mean count is replaced by a token of the batch; 0
    never replaces. ``None`` is 0.03, and 0 under ``compat``."""
    dead_code_grace: int = 10
    """Updates after the start before any code may be replaced."""
    blend_start: int = 0
    """Codebook updates before ``mode="blend"`` begins to mix codes in."""
    blend_steps: int = 1000
    """Codebook updates over which the share of the code in the output grows linearly to ``blend_end``."""
    blend_end: float = 1.0
    """Largest share of the code in the output of ``mode="blend"``."""
    deferred_update: bool = False
    """Training forwards only add to pending statistics; ``apply_update()`` makes them one EMA step."""
    channel_last: bool = False
    """Input is ``[B, *spatial, dim]``, for instance tokens ``[B, T, dim]``."""
    sync: bool = True
    """Sum the statistics over all processes when ``torch.distributed`` is initialised."""
    epsilon: float = 1e-5
    """Laplace smoothing of the two original dictionaries; read under ``compat`` only."""
    seed: int = 0
    """Seed of the layer's own draws; the global generators are never touched."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        _in(self.init, ("auto", "kmeans", "data", "normal", "uniform"), "init")
        for name, least in (("init_tokens", 1), ("kmeans_iterations", 0), ("dead_code_grace", 0),
                            ("blend_start", 0), ("blend_steps", 1)):  # fmt: skip
            _require(
                getattr(self, name) >= least, name, getattr(self, name), f"an integer of at least {least}"
            )
        _require(0.0 <= self.blend_end <= 1.0, "blend_end", self.blend_end, "a share from 0 to 1")
        _require(self.epsilon > 0, "epsilon", self.epsilon, "a positive number")
        threshold = self.dead_code_threshold
        _require(
            threshold is None or 0 <= threshold < 1,
            "dead_code_threshold",
            threshold,
            "a share from 0 to below 1",
        )


class FeatureQuantize(nn.Module):
    """Quantise features against a codebook that follows them by exponential moving averages (FQ-GAN, Sec. 3).

    ``loss = commitment_weight · mean (sg(q) - x)²`` with ``q`` the nearest code before this forward's update.
    The output is ``x`` (``regularize``: what the paper's released scripts do), ``x + sg(q - x)``
    (``replace``: the paper's equations), or ``x + b·sg(q - x)`` with ``b`` growing from 0 (``blend``). All
    three have second derivatives.

    A training forward then moves the codebook: ``count ← decay·count + (1 - decay)·n``, likewise ``sum``, and
    ``code = sum / count`` for the codes that were hit. Codes that are hardly used are replaced by tokens of
    the batch. With a process group the statistics are those of all ranks, and the codebooks stay equal to the
    bit.

    Buffers: ``codebook`` [K, D], ``ema_count`` [K], ``ema_sum`` [K, D] (never below float32, whatever
    ``half()`` or autocast say), ``initialized``, ``num_updates``, ``seed``; with ``deferred_update`` also
    ``pending_*``.

    Args:
        dim: D, channels of the features.
        codebook_size: K.
        decay: of the moving averages, in [0, 1).
        commitment_weight: factor of the loss; at least 0.
        mode: ``"regularize"``, ``"replace"`` or ``"blend"``.
        compat: ``None`` for the rules above; ``"torch"`` or ``"tf"`` reproduces the dictionary of the
            original PyTorch or TensorFlow code, its flaws included (Laplace-smoothed counts; zero-debiased
            averages).
        reduction: ``"mean"`` for a scalar loss, ``"none"`` for one value a sample.
        options: everything else.

    Raises:
        ValueError: a setting is outside its range, or contradicts ``compat``.

    Example:
        >>> layer = FeatureQuantize(8, 4, mode="replace")
        >>> features, indices, loss = layer(torch.randn(2, 8, 5, 5))
        >>> features.shape, indices.shape, loss.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([2, 5, 5]), torch.Size([]))
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    initialized: Tensor
    num_updates: Tensor
    seed: Tensor
    pending_count: Tensor
    pending_sum: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.8,
        commitment_weight: float = 1.0,
        mode: Mode = "regularize",
        compat: Compat | None = None,
        reduction: Reduction = "mean",
        options: CodebookOptions = CodebookOptions(),
    ) -> None:
        super().__init__()
        _require(dim >= 1, "dim", dim, "the number of channels, at least 1")
        _require(codebook_size >= 1, "codebook_size", codebook_size, "at least one code")
        _require(0.0 <= decay < 1.0, "decay", decay, "a moving-average factor from 0 to below 1")
        _require(commitment_weight >= 0.0, "commitment_weight", commitment_weight, "a number of at least 0")
        _in(mode, ("regularize", "replace", "blend"), "mode")
        _in(compat, (None, "torch", "tf"), "compat")
        _in(reduction, ("mean", "none"), "reduction")
        self.dim, self.codebook_size = dim, codebook_size
        self.decay, self.commitment_weight = decay, commitment_weight
        self.mode, self.compat, self.reduction, self.options = mode, compat, reduction, options
        self.init, self.dead_code_threshold = _resolve(options, compat)
        self.frozen = False
        self._held = 0  # depth of no_update()
        self._warned = False
        self._skipped: Tensor | int = 0  # updates skipped on a GPU since the count was read
        self._unread = 0
        self._pending_tokens: Tensor | None = None
        self._before: Tensor | None = None  # the codes that the latest forward searched and then moved

        codes = books.draw_codes(codebook_size, dim, self.init, options.seed)
        self.register_buffer("codebook", codes)
        self.register_buffer("ema_count", torch.zeros(codebook_size))
        # The original starts its sum at the codes themselves, with a count of zero.
        self.register_buffer("ema_sum", codes.clone() if compat else torch.zeros_like(codes))
        self.register_buffer("initialized", torch.tensor(self.init in ("normal", "uniform")))
        self.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("seed", torch.tensor(options.seed))
        if options.deferred_update:
            self.register_buffer("pending_count", torch.zeros(codebook_size))
            self.register_buffer("pending_sum", torch.zeros(codebook_size, dim))
        self._ready = self.init in ("normal", "uniform")

    def forward(self, features: Tensor, update: bool | None = None) -> FQOutput:
        """Quantise, and in training move the codebook.

        Args:
            features: ``[B, dim, *spatial]`` with any number of spatial axes, or ``[B, *spatial, dim]`` with
                ``channel_last``; floating.
            update: ``None`` updates in training mode outside ``no_update()``; True and False decide by hand.
                A frozen layer never updates, and neither does the re-computation of a checkpointed segment,
                which searches the codes that the layer's latest forward searched. (With several updating
                forwards before one backward, only ``deferred_update`` keeps them the same for all.)

        Returns:
            ``FQOutput(features, indices, loss)``.

        Raises:
            ValueError: the channels differ from ``dim``, or the batch is empty in a single process.
            TypeError: ``features`` is not a floating tensor.
        """
        return self.quantize(features, update)

    def quantize(self, features: Tensor, update: bool | None = None) -> FQOutput:
        """Same as :meth:`forward`, for callers that must not run module hooks.

        Args:
            features: as for :meth:`forward`.
            update: as for :meth:`forward`.

        Returns:
            ``FQOutput(features, indices, loss)``.

        Raises:
            ValueError: as for :meth:`forward`.
            TypeError: as for :meth:`forward`.
        """
        self._check(features)
        with torch.autocast(features.device.type, enabled=False):
            tokens = self._tokens(features)  # [N, D]
            values = tokens.detach()
            updating = self.updates(update)
            if updating and not self.is_ready():
                # Not the decorator, which would make `import fq` load the compiler: seconds, for everybody.
                initialize = self._initialize
                if torch.compiler.is_compiling():
                    initialize = torch.compiler.disable(initialize)  # type: ignore[no-untyped-call]
                initialize(values)
            codes = self._codes_to_search(updating)
            indices = nearest(values, codes)
            quantized = F.embedding(indices, codes.to(tokens.dtype))
            loss = self.commitment_weight * commitment(
                tokens, quantized, len(features), reduction=self.reduction
            )
            output = features
            if self.mode != "regularize":
                blend = self.blend()
                output = self._like(straight_through(tokens, quantized, blend), features)
            if updating:
                self._observe(values, indices)
        spatial = features.shape[1:-1] if self.options.channel_last else features.shape[2:]
        return FQOutput(output, indices.view(len(features), *spatial), loss)

    def updates(self, update: bool | None = None) -> bool:
        """Whether a forward called now with this ``update`` would move the codebook.

        Args:
            update: the argument of :meth:`forward`.

        Returns:
            False when frozen, or while a backward pass re-computes a checkpointed segment; else ``update``,
            or for ``None`` whether the layer is in training mode outside :meth:`no_update`.
        """
        wanted = (self.training and not self._held) if update is None else update
        return wanted and not self.frozen and not recomputing()

    def is_ready(self) -> bool:
        """Whether the codebook has its first codes; before, a data-dependent one holds N(0, 1) placeholders.

        Returns:
            The value of the buffer ``initialized``, read from its device only until it is True.
        """
        if not self._ready:
            self._ready = bool(self.initialized)
        return self._ready

    def blend(self) -> Tensor | float:
        """Share of the code in the output: 1 for ``replace``, the schedule's value for ``blend``.

        Returns:
            A number in [0, 1], as a 0-dim tensor under ``blend``.
        """
        if self.mode != "blend":
            return float(self.mode == "replace")
        options = self.options
        progress = (self.num_updates - options.blend_start).to(self.codebook.dtype) / options.blend_steps
        return progress.clamp(0.0, 1.0) * options.blend_end

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of the given indices.

        Args:
            indices: int64 ``[B, *spatial]``, values in ``[0, K)``.

        Returns:
            ``[B, dim, *spatial]``, or ``[B, *spatial, dim]`` with ``channel_last``; the dtype of
            ``codebook``.
        """
        codes = F.embedding(indices, self.codebook)
        return codes if self.options.channel_last else codes.movedim(-1, 1)

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or, with False, resume) every update of the codebook.

        Args:
            frozen: the new state.
        """
        self.frozen = frozen

    @contextmanager
    def no_update(self) -> Iterator[None]:
        """Forwards inside do not move the codebook: for gradient penalties and probes."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    @torch.no_grad()
    def apply_update(self) -> bool:
        """Turn the statistics gathered under ``deferred_update`` into one EMA step.

        Returns:
            Whether the codebook moved; False when nothing was pending, or a token was not finite on any rank.

        Raises:
            RuntimeError: the layer was not built with ``deferred_update``.
        """
        if not self.options.deferred_update:
            raise RuntimeError(
                "apply_update() was called on a layer that updates in every forward: "
                "build it with options=CodebookOptions(deferred_update=True)"
            )
        tokens, self._pending_tokens = self._pending_tokens, None
        if tokens is None:  # no forward on this rank, or a checkpoint was loaded since
            tokens = self.codebook.new_zeros(0, self.dim)
        moved = not self.frozen and self._step(self.pending_count, self.pending_sum, tokens)
        self.pending_count.zero_()
        self.pending_sum.zero_()
        return moved

    def load_original(
        self, embed: Tensor, embed_avg: Tensor, cluster_size: Tensor, *, num_updates: int = 0
    ) -> None:
        """Take over the three buffers of an original FQ layer.

        Args:
            embed: ``[D, K]``, codes in columns.
            embed_avg: ``[D, K]``.
            cluster_size: ``[K]``.
            num_updates: forwards the original has seen; the debiasing of ``compat="tf"`` depends on it.

        Raises:
            ValueError: a shape does not fit this layer.
        """
        expected = {"embed": (self.dim, self.codebook_size), "embed_avg": (self.dim, self.codebook_size),
                    "cluster_size": (self.codebook_size,)}  # fmt: skip
        for (name, shape), value in zip(expected.items(), (embed, embed_avg, cluster_size), strict=True):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)} but this layer needs {list(shape)} "
                    f"(dim {self.dim}, codebook_size {self.codebook_size}): build the layer for the file's "
                    "sizes"
                )
        with torch.no_grad():
            self.codebook.copy_(embed.t())
            self.ema_sum.copy_(embed_avg.t())
            self.ema_count.copy_(cluster_size)
            self.num_updates.fill_(num_updates)
            self.initialized.fill_(True)
        self._ready = True

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        compat = f", compat={self.compat!r}" if self.compat else ""
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, decay={self.decay}, "
            f"commitment_weight={self.commitment_weight}, mode={self.mode!r}{compat}"
        )

    def _codes_to_search(self, updating: bool) -> Tensor:
        """The codebook; in a re-computation what it was in the first pass, before that pass moved it."""
        if torch.compiler.is_compiling():
            return self.codebook
        if recomputing():
            return self.codebook if self._before is None else self._before
        moving = updating and not self.options.deferred_update
        self._before = self.codebook.clone() if moving else None
        return self.codebook

    @torch.no_grad()
    def _observe(self, tokens: Tensor, indices: Tensor) -> None:
        counts, sums = code_sums(tokens, indices, self.codebook_size)
        if not self.options.deferred_update:
            self._step(counts, sums, tokens)
            return
        self.pending_count += counts
        self.pending_sum += sums
        if self.dead_code_threshold > 0:
            self._pending_tokens = (
                tokens.clone()
            )  # the trunk may change its features in place before apply_update

    def _step(self, counts: Tensor, sums: Tensor, tokens: Tensor) -> bool:
        """One EMA update from this rank's counts [K] and sums [K, D]; none if any rank's is not finite."""
        packed = torch.cat([sums, counts[:, None]], 1).to(self.codebook.dtype)  # [K, D + 1]: one collective
        group = self._group()
        if group:
            torch.distributed.all_reduce(packed)
        sums, counts = packed[:, :-1], packed[:, -1]
        valid = packed.isfinite().all() & (counts.sum() > 0)
        # Reading a flag stops a GPU's queue and breaks a compiled graph, so only an eager CPU (and a group,
        # which must agree before its next collective) looks at it here; elsewhere the masked copy below does
        # the skipping.
        if torch.compiler.is_compiling():
            pass
        elif not group and packed.device.type != "cpu":
            self._watch(valid)
        elif not valid:
            if not packed.isfinite().all():
                self._warn_not_finite()
            return False
        new = books.ema_step(self._state(), counts, sums, decay=self.decay, compat=self.compat,
                             epsilon=self.options.epsilon, num_updates=self.num_updates)  # fmt: skip
        if self.dead_code_threshold > 0:
            new = self._revive(new, tokens, group)
        for buffer, value in zip(self._state(), new, strict=True):
            buffer.copy_(torch.where(valid, value, buffer))
        self.num_updates += valid
        return True

    def _revive(self, state: books.State, tokens: Tensor, group: bool) -> books.State:
        """Replace codes with hardly any mass by tokens of the batch, the same on all ranks."""
        dead = state.number < self.dead_code_threshold * state.number.mean()
        dead &= self.num_updates >= self.options.dead_code_grace
        if group and not dead.any():
            return state
        sizes = books.tokens_per_rank(len(tokens), tokens.device, group)
        if sum(sizes) == 0:  # a deferred update whose last forward's tokens are gone
            return state
        draws = books.random_bits(self.codebook_size, self.seed, self.num_updates) % sum(sizes)
        found = books.take_tokens(tokens, draws, sizes, group).to(state.codes.dtype)
        # Both averages restart together: a fresh code with a stale sum would jump back at its next update.
        mean = state.number.mean()
        return books.State(
            torch.where(dead[:, None], found, state.codes),
            torch.where(dead, mean, state.number),
            torch.where(dead[:, None], found * mean, state.total),
        )

    @torch.no_grad()
    def _initialize(self, tokens: Tensor) -> None:
        """Codes from the first training batch whose tokens are finite."""
        group = self._group()
        sizes = books.tokens_per_rank(len(tokens), tokens.device, group)
        at_most = max(self.options.init_tokens, self.codebook_size)
        drawn = books.sample_tokens(tokens, sizes, at_most, self.seed, group)
        if not len(drawn) or not drawn.isfinite().all():
            return
        codes, counts = books.codes_from_tokens(
            drawn, self.codebook_size, int(self.seed),
            iterations=self.options.kmeans_iterations if self.init == "kmeans" else None,
        )  # fmt: skip
        if group:  # the same tokens need not give the same bits on different hardware
            torch.distributed.broadcast(codes, 0)
            torch.distributed.broadcast(counts, 0)
        self.codebook.copy_(codes)
        self.ema_count.copy_(counts * (sum(sizes) / len(drawn)))
        self.ema_sum.copy_(self.codebook * self.ema_count[:, None])
        self.initialized.fill_(True)
        self._ready = True

    def _state(self) -> books.State:
        return books.State(self.codebook, self.ema_count, self.ema_sum)

    def _group(self) -> bool:
        distributed = torch.distributed
        return self.options.sync and distributed.is_available() and distributed.is_initialized()

    def _watch(self, valid: Tensor) -> None:
        """Count skipped updates on the device, and read the count once in a hundred updates."""
        self._skipped = self._skipped + ~valid
        self._unread += 1
        if self._unread == _READ_EVERY:
            if self._skipped:
                self._warn_not_finite()
            self._skipped, self._unread = 0, 0

    def _warn_not_finite(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "features with NaN or infinity reached FeatureQuantize (on this or another rank): the "
                "codebook keeps its state and skips such batches; look for the first layer that produces "
                "them",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _check(self, features: Tensor) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"features are {kind}: pass a floating tensor [B, {self.dim}, *spatial]")
        axis = -1 if self.options.channel_last else 1
        if features.ndim < 2 or features.shape[axis] != self.dim:
            layout = "[B, *spatial, dim]" if self.options.channel_last else "[B, dim, *spatial]"
            raise ValueError(
                f"features of shape {list(features.shape)} do not have {self.dim} channels in layout "
                f"{layout}: build FeatureQuantize with dim equal to the channels of the layer, and "
                "channel_last to match its layout"
            )
        if features.numel() == 0 and not self._group():
            raise ValueError(
                f"features of shape {list(features.shape)} hold no token: give at least one sample, or leave "
                "the forward out (only a process group may have ranks with an empty batch)"
            )

    def _tokens(self, features: Tensor) -> Tensor:
        dtype = torch.promote_types(features.dtype, self.codebook.dtype)
        pattern = "b ... d -> (b ...) d" if self.options.channel_last else "b d ... -> (b ...) d"
        return rearrange(features, pattern).to(dtype)

    def _like(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Tokens [N, D] back in the shape, memory format and dtype of ``features``; never a view of them."""
        if self.options.channel_last:
            return tokens.view(features.shape).to(features.dtype)
        shape = (len(features), *features.shape[2:], self.dim)
        output = tokens.view(shape).movedim(-1, 1).to(features.dtype)
        return output.contiguous() if features.is_contiguous() else output

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FeatureQuantize:
        """Follow ``to``, ``half`` and the like, but keep every floating buffer at float32 or wider."""

        def wide(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            if tensor.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(wide, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = not self.initialized.is_meta and bool(self.initialized)

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy, without what is kept of the latest forward."""
        return self.__dict__ | {"_pending_tokens": None, "_before": None}


def recomputing() -> bool:
    """Whether a backward pass is running: a forward now is the re-computation of a checkpointed segment."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def _resolve(options: CodebookOptions, compat: str | None) -> tuple[str, float]:
    """Concrete ``init`` and ``dead_code_threshold``; the originals know neither data nor replacement."""
    if compat is None:
        threshold = options.dead_code_threshold
        return ("kmeans" if options.init == "auto" else options.init), (
            0.03 if threshold is None else threshold
        )
    if options.init not in ("auto", "normal") or options.dead_code_threshold:
        raise ValueError(
            f"compat={compat!r} reproduces an original dictionary, which starts from N(0, 1) and replaces no "
            f"code, but options ask for init={options.init!r}, "
            f"dead_code_threshold={options.dead_code_threshold}: leave both at their defaults, or drop compat"
        )
    return "normal", 0.0
