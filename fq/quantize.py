"""FeatureQuantize: features to their nearest codes, and the codes to the moving average of their features."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fq import codebook as books
from fq import ops
from fq.losses import rotate
from fq.options import CodebookOptions, check_samples, integer, one_of, require
from fq.search import kernels, wide_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_READ_EVERY = 100

Mode = Literal["regularize", "replace", "blend"]
Compat = Literal["torch", "tf"]
Reduction = Literal["mean", "none"]


class FQOutput(NamedTuple):
    """What one forward returns: ``features, indices, loss``."""

    features: Tensor
    """``[B, dim, *spatial]``, dtype of the input: the input itself under ``regularize``, else fresh."""
    indices: Tensor
    """int64 ``[B, *spatial]``: the code of every token."""
    loss: Tensor
    """Weighted commitment loss, float32 or wider: a scalar, or ``[B]`` with ``reduction="none"``."""


class Pass(NamedTuple):
    """One forward in full: what :class:`FQOutput` tells, and the commitment before its weight."""

    features: Tensor
    indices: Tensor
    loss: Tensor
    error: Tensor


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
    ``pending``, with ``divide_by_variance`` also ``ema_variance``. D is ``dim / heads``; K counts the codes
    of all stages, classes and heads, in this order.

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
        ValueError: a setting is outside its range, or contradicts another.
        TypeError: a size is no integer.

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
    ema_variance: Tensor
    pending: Tensor

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
        options: CodebookOptions = CodebookOptions(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        integer(dim, "dim", 1)
        integer(codebook_size, "codebook_size", 1)
        require(0.0 <= decay < 1.0, "decay", decay, "a moving-average factor from 0 to below 1")
        require(commitment_weight >= 0.0, "commitment_weight", commitment_weight, "a number of at least 0")
        one_of(mode, ("regularize", "replace", "blend"), "mode")
        one_of(compat, (None, "torch", "tf"), "compat")
        one_of(reduction, ("mean", "none"), "reduction")
        self.dim, self.codebook_size = dim, codebook_size
        self.decay, self.commitment_weight = decay, commitment_weight
        self.mode, self.compat, self.reduction, self.options = mode, compat, reduction, options
        self.init, self.dead_code_threshold = options.resolve(compat)
        require(dim % options.heads == 0, "heads", options.heads, f"a divisor of dim, which is {dim}")
        require(
            mode != "regularize" or options.gradient == "straight-through",
            "gradient", repr(options.gradient),
            "'straight-through' under mode='regularize', whose output is its input; or another mode",
        )  # fmt: skip
        self.width = dim // options.heads  # of a code
        # One matrix holds all codes, in this order.
        self.layout = books.Layout(options.stages, max(options.num_classes, 1), options.heads, codebook_size)
        self.num_codes = math.prod(self.layout)
        self.frozen = False
        self._held = 0  # depth of no_update()
        self._warned = False
        self._made: int | None = None  # updates that a GPU had made when it was last asked
        self._unread = 0  # and forwards since
        self._pending_pools: list[books.Pool] | None = None
        self.overlap = False  # let the exchange between processes run on until finish()
        self._sent: tuple[Any, Tensor, list[books.Pool]] | None = None
        # What the latest forward used and then moved: codes, number of updates, variance.
        self._before: dict[str, Tensor] | None = None

        codes = books.draw_codes(self.num_codes, self.width, self.init, options.seed)
        self.register_buffer("codebook", books.unit_rms(codes) if options.normalize else codes)
        self.register_buffer("ema_count", torch.zeros(self.num_codes))
        # The original starts its sum at the codes themselves, with a count of zero.
        self.register_buffer("ema_sum", codes.clone() if compat else torch.zeros_like(codes))
        self.register_buffer("initialized", torch.tensor(self.init in ("normal", "uniform")))
        self.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("seed", torch.tensor(options.seed))
        if options.divide_by_variance:
            self.register_buffer("ema_variance", torch.tensor(1.0))
        if options.deferred_update:
            rows = self.num_codes + int(self._counts_images())
            self.register_buffer("pending", torch.zeros(rows, self.width + 1))
        self._ready = self.init in ("normal", "uniform")

    def forward(
        self,
        features: Tensor,
        update: bool | None = None,
        *,
        labels: Tensor | None = None,
        learn: Tensor | None = None,
    ) -> FQOutput:
        """Quantise, and in training move the codebook.

        Args:
            features: ``[B, dim, *spatial]`` with any number of spatial axes, or ``[B, *spatial, dim]`` with
                ``channel_last``; floating.
            update: ``None`` updates in training mode outside ``no_update()``; True and False decide by hand.
                A frozen layer never updates, and neither does the re-computation of a checkpointed segment,
                which searches the codes that the layer's latest forward searched. (If the layer runs again
                before that backward, only ``deferred_update`` keeps the codes the same. Of a compiled layer
                in a checkpointed segment that is not itself compiled, the re-computation updates again.)
            labels: int64 ``[B]``, the class of each sample; needed with ``num_classes``.
            learn: bool ``[B]``, samples whose tokens may move the codebook; ``None`` for all. In a process
                group give it on all ranks or on none.

        Returns:
            ``FQOutput(features, indices, loss)``.

        Raises:
            ValueError: the channels differ from ``dim``, ``labels`` or ``learn`` do not fit the batch, or the
                batch is empty in a single process.
            TypeError: ``features`` is not a floating tensor, ``labels`` not int64, or ``learn`` not bool.
        """
        done = self.run(features, update, labels, learn)
        return FQOutput(done.features, done.indices, done.loss)

    def run(
        self,
        features: Tensor,
        update: bool | None = None,
        labels: Tensor | None = None,
        learn: Tensor | None = None,
    ) -> Pass:
        """Same as :meth:`forward`, with more to tell, for callers that must not run module hooks.

        Args:
            features: as for :meth:`forward`.
            update: as for :meth:`forward`.
            labels: as for :meth:`forward`.
            learn: as for :meth:`forward`.

        Returns:
            The pass.

        Raises:
            ValueError: as for :meth:`forward`.
            TypeError: as for :meth:`forward`.
        """
        self._check(features, labels, learn)
        self.finish()  # a layer that runs twice in one forward of its model
        with torch.autocast(features.device.type, enabled=False):
            raw = tokens = self._tokens(features)  # [B, dim, S]
            scale = None
            if self.options.normalize:
                # A copy: autograd keeps it, and the trunk may change its features in place afterwards.
                raw = tokens = tokens.to(wide_dtype(tokens, self.codebook), copy=True)
                parts = tokens.view(len(tokens), self.layout.heads, self.width, tokens.shape[2])
                scale = books.rms(parts, dim=2)  # [B, heads, 1, S]
                scale = scale.expand(-1, -1, self.width, -1).flatten(1, 2)
                tokens = tokens / scale
            updating = self.updates(update)
            if updating and not self.is_ready():
                # Not the decorator, which would make `import fq` load the compiler: seconds, for everybody.
                initialize = self._initialize
                if torch.compiler.is_compiling():
                    initialize = torch.compiler.disable(initialize)  # type: ignore[no-untyped-call]
                initialize(tokens.detach(), learn)
            codes = self._codes_to_search(updating)
            difference, error, indices, packed, pools = self._search(tokens, codes, labels, learn, updating)
            weight = self._weight()
            loss = error if isinstance(weight, float) and weight == 1.0 else weight * error
            output = features
            if self.mode != "regularize":
                output = self._output(features, raw, difference, scale)
            if updating:
                self._observe(tokens, packed, pools, learn)
        return Pass(output, self._shape_of_indices(indices, features), loss, error)

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
        updates = self._then("num_updates") - options.blend_start
        progress = updates.to(self.codebook.dtype) / options.blend_steps
        return progress.clamp(0.0, 1.0) * options.blend_end

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of the given indices: heads side by side, stages added up.

        Args:
            indices: int64 ``[B, *spatial]``, as :meth:`forward` returns them (``[B, heads, *spatial]``,
                ``[B, stages, *spatial]`` or both with these options).

        Returns:
            ``[B, dim, *spatial]``, or ``[B, *spatial, dim]`` with ``channel_last``; the dtype of
            ``codebook``. With ``normalize`` each code has a root mean square of 1.
        """
        codes = F.embedding(indices, self.codebook)
        if self.options.stages > 1:
            codes = codes.sum(1)
        if self.options.heads > 1:
            codes = codes.movedim(1, -2).flatten(-2)
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
        pools, self._pending_pools = self._pending_pools, None
        moved = not self.frozen and self._step(self.pending, pools)
        self.pending.zero_()
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
        if not recomputing():
            moving = updating and not self.options.deferred_update
            used = {
                "codebook": moving,
                "num_updates": moving and (self.mode == "blend" or self.options.warmup_updates > 0),
                "ema_variance": moving and self.options.divide_by_variance,
            }
            self._before = {name: getattr(self, name).clone() for name in used if used[name]} or None
        return self._then("codebook")

    def _then(self, name: str) -> Tensor:
        """A buffer; in a re-computation what it was in the first pass."""
        if self._before is not None and recomputing():
            return self._before[name]
        value: Tensor = getattr(self, name)
        return value

    def _search(
        self, tokens: Tensor, codes: Tensor, labels: Tensor | None, learn: Tensor | None, statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[books.Pool]]:
        """All heads and stages: ``(difference, error, indices [B, stages, heads, S], packed, pools)``."""
        options = self.options
        batch, _, places = tokens.shape
        marks = labels
        if learn is not None:  # a token that must not learn is of no class that a dead code could ask for
            marks = torch.where(learn, 0 if labels is None else labels, self.layout.classes)
        if self.num_codes == self.codebook_size and not options.num_classes:
            difference, error, indices, packed = ops.quantize(
                tokens, codes, learn, statistics=statistics, per_sample=self.reduction == "none"
            )
            return difference, error, indices[:, None, None], packed, [books.Pool(tokens.detach(), marks)]
        by_place = codes.view(*self.layout, self.width)
        numbers = torch.arange(self.num_codes, device=tokens.device).view(self.layout)
        packed = codes.new_zeros(*self.layout, self.width + 1) if statistics else codes.new_zeros(0)
        left = list(tokens.view(batch, options.heads, self.width, places).unbind(1))
        found, pools, errors = [], [], codes.new_zeros(())
        for stage in range(options.stages):
            errors = codes.new_zeros(())  # what the last stage leaves is the commitment
            for head in range(options.heads):
                book = by_place[stage, :, head]  # [classes, K, width]
                pools.append(books.Pool(left[head].detach(), marks))
                left[head], error, inside, part = ops.quantize(
                    left[head], book[0] if labels is None else book, learn, labels,
                    statistics=statistics, per_sample=self.reduction == "none",
                )  # fmt: skip
                errors = errors + error / options.heads
                found.append(numbers[stage, :, head].flatten()[inside])
                if statistics:
                    packed[stage, :, head] = part.view(-1, self.codebook_size, self.width + 1)
        indices = torch.stack(found, 1).view(batch, options.stages, options.heads, places)
        return torch.cat(left, 1), errors, indices, packed.view(-1, self.width + 1), pools

    def _weight(self) -> Tensor | float:
        """Factor of the loss in this forward."""
        weight: Tensor | float = self.commitment_weight
        if self.options.warmup_updates:
            progress = self._then("num_updates").to(self.codebook.dtype) / self.options.warmup_updates
            weight = weight * progress.clamp(max=1.0)
        if self.options.divide_by_variance:
            weight = weight / self._then("ema_variance").clamp(min=1e-12)
        return weight

    def _output(self, features: Tensor, tokens: Tensor, difference: Tensor, scale: Tensor | None) -> Tensor:
        """The codes in place of the features, or a share of them, in their shape, layout and dtype."""
        tokens = tokens.to(difference.dtype)
        away = difference.detach() if scale is None else (difference * scale).detach()  # tokens minus codes
        plain = scale is None and self.options.gradient == "straight-through"
        if not plain and self.options.gradient == "rotation":
            away = tokens - rotate(tokens, tokens.detach() - away)
        blend = self.blend()
        if isinstance(blend, Tensor) or blend != 1.0:
            away = away * blend
        if plain and not torch.compiler.is_compiling():
            output = ops.straight_through(difference, tokens.detach() - away)
        else:
            output = tokens - away
        output = output.transpose(1, 2) if self.options.channel_last else output
        return output.reshape(features.shape).to(features.dtype)

    def _shape_of_indices(self, indices: Tensor, features: Tensor) -> Tensor:
        spatial = features.shape[1:-1] if self.options.channel_last else features.shape[2:]
        several = [n for n in (self.options.stages, self.options.heads) if n > 1]
        return indices.reshape(len(features), *several, *spatial)

    def _counts_images(self) -> bool:
        return self.options.divide_by_variance or self.options.memory_images is not None

    @torch.no_grad()
    def _observe(self, tokens: Tensor, packed: Tensor, pools: list[books.Pool], learn: Tensor | None) -> None:
        if self._counts_images():  # one row more: squares of the channels of a code, number of images
            tokens = tokens.to(packed.dtype)
            learns = tokens.new_ones(len(tokens), dtype=torch.bool) if learn is None else learn
            squares = torch.where(learns[:, None], tokens.square().sum(2), 0.0)  # [B, dim]
            squares = squares.sum(0).view(-1, self.width).sum(0)
            packed = torch.cat([packed, torch.cat([squares, learns.sum().to(squares.dtype)[None]])[None]])
        if not self.options.deferred_update:
            self._step(packed, pools)
            return
        self.pending += packed
        if self.dead_code_threshold > 0:  # the trunk may change its features in place before apply_update
            self._pending_pools = [books.Pool(pool.tokens.clone(), pool.labels) for pool in pools]

    def _step(self, packed: Tensor, pools: list[books.Pool] | None) -> bool:
        """One EMA update from this rank's ``packed``; none if any rank's is not finite."""
        packed = packed.to(self.codebook.dtype)
        group = self._group()
        if group and self.overlap and pools is not None and not torch.compiler.is_compiling():
            work = torch.distributed.all_reduce(packed, async_op=True)
            if self.dead_code_threshold > 0:  # the trunk may change its features in place before the end
                pools = [books.Pool(pool.tokens.clone(), pool.labels) for pool in pools]
            self._sent = (work, packed, pools)
            return True
        if group:
            torch.distributed.all_reduce(packed)
        elif self._fused(packed, pools):
            return True
        return self._move(packed, pools, group)

    @torch.no_grad()
    def finish(self) -> None:
        """Make the update whose statistics are on their way between processes, if there is one."""
        if self._sent is None:
            return
        (work, packed, pools), self._sent = self._sent, None
        work.wait()
        self._move(packed, pools, True)

    def _move(self, packed: Tensor, pools: list[books.Pool] | None, group: bool) -> bool:
        """One EMA step from the statistics of all ranks."""
        sums, counts = packed[: self.num_codes, :-1], packed[: self.num_codes, -1]
        valid = packed.isfinite().all() & (counts.sum() > 0)
        # Reading a flag stops a GPU's queue and breaks a compiled graph, so only an eager CPU (and a group,
        # which must agree before its next collective) looks at it here; elsewhere the masked copy below does
        # the skipping.
        if torch.compiler.is_compiling():
            pass
        elif not group and packed.device.type != "cpu":
            self._watch(valid.device)
        elif not valid:
            if not packed.isfinite().all():
                self._warn_not_finite()
            return False
        decay = self._decay(packed)
        new = books.ema_step(self._state(), counts, sums, decay=decay, compat=self.compat,
                             epsilon=self.options.epsilon, num_updates=self.num_updates)  # fmt: skip
        if self.options.normalize:
            new = new._replace(codes=books.unit_rms(new.codes))
        if self.dead_code_threshold > 0:
            new = self._revive(new, pools, group)
        for buffer, value in zip(self._state(), new, strict=True):
            buffer.copy_(torch.where(valid, value, buffer))
        if self.options.divide_by_variance:
            self._follow_variance(packed, decay, valid)
        self.num_updates += valid
        return True

    def _decay(self, packed: Tensor) -> Tensor | float:
        if self.options.memory_images is None:
            return self.decay
        return torch.exp(-packed[-1, -1] / self.options.memory_images)

    def _follow_variance(self, packed: Tensor, decay: Tensor | float, valid: Tensor) -> None:
        variance = books.variance_of(packed, self.layout)
        following = self.ema_variance * decay + variance * (1 - decay)
        following = torch.where(self.num_updates > 0, following, variance)
        self.ema_variance.copy_(torch.where(valid, following, self.ema_variance))

    def _fused(self, packed: Tensor, pools: list[books.Pool] | None) -> bool:
        """The same step by the fused kernels, where they know all of it."""
        if torch.compiler.is_compiling() or self.compat or self.options.normalize:
            return False
        if self.num_codes > self.codebook_size or self._counts_images() or not pools:
            return False
        if pools[0].labels is not None or self.codebook.dtype != torch.float32:
            return False
        fused = kernels(packed, packed.dtype)
        if fused is None:
            return False
        fused.ema_update_(
            *self._state(), self.num_updates, self.seed, packed, pools[0].tokens, decay=self.decay,
            dead_code_threshold=self.dead_code_threshold, dead_code_grace=self.options.dead_code_grace,
        )  # fmt: skip
        self._watch(packed.device)
        return True

    def _revive(self, state: books.State, pools: list[books.Pool] | None, group: bool) -> books.State:
        """Replace codes with hardly any mass by tokens of the batch, the same on all ranks."""
        dead = state.number < self.dead_code_threshold * state.number.mean()
        dead &= self.num_updates >= self.options.dead_code_grace
        cheap_to_ask = dead.device.type == "cpu" and not torch.compiler.is_compiling()
        if (group or cheap_to_ask) and not dead.any():
            return state
        if pools is None:  # no forward on this rank since a checkpoint was loaded
            choosy = self.options.num_classes or self.options.learn_from == "real"
            labels = self.num_updates.new_zeros(0) if choosy else None  # as on the ranks that had a forward
            nothing = books.Pool(self.codebook.new_zeros(0, self.width, 1), labels)
            pools = [nothing] * (self.layout.stages * self.layout.heads)
        draws = books.random_bits(self.num_codes, self.seed, self.num_updates)
        return books.revive(state, dead, draws, pools, self.layout, group)

    @torch.no_grad()
    def _initialize(self, tokens: Tensor, learn: Tensor | None) -> None:
        """Codes from the first training batch whose tokens are finite."""
        group = self._group()
        tokens = tokens if learn is None else tokens[learn]
        sizes = books.tokens_per_rank(tokens.shape[0] * tokens.shape[2], tokens.device, group)
        at_most = max(self.options.init_tokens, self.codebook_size)
        dtype = self.codebook.dtype
        drawn = books.sample_tokens(tokens, sizes, at_most, self.seed, group, dtype)  # [n, dim]
        if not len(drawn) or not drawn.isfinite().all():
            return
        codes, counts = books.first_codes(
            drawn, self.layout, int(self.seed), normalize=self.options.normalize,
            iterations=self.options.kmeans_iterations if self.init == "kmeans" else None,
        )  # fmt: skip
        if group:  # the same tokens need not give the same bits on different hardware
            torch.distributed.broadcast(codes, 0)
            torch.distributed.broadcast(counts, 0)
        self.codebook.copy_(codes)
        self.ema_count.copy_(counts * (sum(sizes) / len(drawn)))
        self.ema_sum.copy_(self.codebook * self.ema_count[:, None])
        if self.options.divide_by_variance:
            self.ema_variance.copy_(drawn.var(0, correction=0).mean())
        self.initialized.fill_(True)
        self._ready = True

    def _state(self) -> books.State:
        return books.State(self.codebook, self.ema_count, self.ema_sum)

    def _group(self) -> bool:
        distributed = torch.distributed
        return self.options.sync and distributed.is_available() and distributed.is_initialized()

    def _watch(self, device: torch.device) -> None:
        """Ask a GPU once in a hundred updates whether it has made them all; a skipped one met NaN."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # nothing may be read in there
            return
        self._unread += 1
        if self._made is None or self._unread == _READ_EVERY:
            made = int(self.num_updates)
            if self._made is not None and made < self._made + self._unread:
                self._warn_not_finite()
            self._made, self._unread = made, 0

    def _warn_not_finite(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "features with NaN or infinity reached FeatureQuantize (on this or another rank): the "
                "codebook keeps its state and skips such batches; look for the first layer that produces "
                "them",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip

    def _check(self, features: Tensor, labels: Tensor | None, learn: Tensor | None) -> None:
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
        check_samples(features, self.options.num_classes, labels, learn)
        if features.numel() == 0 and not self._group():
            raise ValueError(
                f"features of shape {list(features.shape)} hold no token: give at least one sample, or leave "
                "the forward out (only a process group may have ranks with an empty batch)"
            )

    def _tokens(self, features: Tensor) -> Tensor:
        """``[B, dim, S]``, a view where the layout allows one; on a CPU, tokens lie in rows."""
        if self.options.channel_last:
            tokens = features.reshape(len(features), math.prod(features.shape[1:-1]), self.dim).transpose(
                1, 2
            )
        else:
            tokens = features.reshape(len(features), self.dim, math.prod(features.shape[2:]))
        return tokens

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
        # Nothing of the state before belongs to the one just read.
        self._sent = self._pending_pools = self._before = self._made = None

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy, without what is kept of the latest forward."""
        return self.__dict__ | {
            "_pending_pools": None,
            "_before": None,
            "_sent": None,
            "_held": 0,
            "overlap": False,
        }


def recomputing() -> bool:
    """Whether a backward pass is running: a forward now is the re-computation of a checkpointed segment."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
