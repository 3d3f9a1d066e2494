"""Put FQ into a discriminator that knows nothing of it, and take it out again without a trace.

A forward hook on each chosen layer quantises the layer's output. The quantiser is a child ``fq`` of that
layer, so devices, checkpoints and data parallelism see it; the layer itself is neither wrapped nor replaced.
"""

from __future__ import annotations

import warnings
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fq import outputs, presets
from fq.inject import InjectOn, Injector, LossScale
from fq.options import CodebookOptions
from fq.quantize import Compat, FeatureQuantize, Mode, recomputing
from fq.stats import MIXED, SiteStats, Tally

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

GeneratorStep = Literal["loss", "loss+ema", "none"]
CHILD = "fq"
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # DistributedDataParallel's name for it
_OVERRIDES = ("codebook_size", "decay", "commitment_weight", "mode", "options", "dim", "select")
_MANY_LOSSES = 1024


def attach(
    model: nn.Module,
    layers: str | Iterable[str] | Mapping[str, Mapping[str, Any]],
    *,
    codebook_size: int | None = None,
    decay: float | None = None,
    commitment_weight: float | None = None,
    mode: Mode = "regularize",
    concat_parts: int = 1,
    generator_step: GeneratorStep = "loss",
    inject: bool = False,
    inject_on: InjectOn = "always",
    loss_scale: LossScale = 1.0,
    compat: Compat | None = None,
    options: CodebookOptions = CodebookOptions(),  # noqa: B008  (frozen)
    example_input: Any = None,
) -> Handle:
    """Quantise the outputs of some layers of a model from now on.

    In training the codebooks follow every forward, except: a forward whose root input is a leaf that requires
    grad (a gradient penalty), one inside ``handle.penalty()``, and generator steps, unless ``generator_step``
    says so. A generator step is a forward inside ``handle.generator_step()``, or one while no parameter of
    the model requires grad. A layer does nothing at all until its codebook has been initialised by its first
    updating forward.

    Under ``regularize`` the model's outputs are untouched and only ``handle.loss()`` matters; otherwise the
    layer returns a fresh tensor (in place of the one tensor in its tuple, list, named tuple, dict or
    dataclass).

    With ``inject`` the trainer stays as it is: each layer returns a fresh tensor of the same values, whose
    backward pass adds the gradients that ``loss_scale * handle.loss()`` would have (:class:`Injector` says
    which passes do not). They come in every first-order pass through the layer, in eval mode and in
    ``torch.autograd.grad`` as well: forwards that are no training belong inside ``handle.penalty()``, and a
    trainer whose own backward pass says ``create_graph=True`` needs ``handle.loss()``. Both kinds of
    activation checkpointing work. A compiled graph is whole with a constant ``loss_scale``; a callable breaks
    it at each layer (``fullgraph=True`` fails), so that each backward pass can call it.

    Args:
        model: a discriminator; a DDP or DataParallel wrapper is looked through.
        layers: module names: exact, the end of a name (``"conv2"`` for every ``….conv2``), a glob
            (``"blocks.*.0"``), a list of these, ``{name: overrides}`` with overrides of ``codebook_size,
            decay, commitment_weight, mode, options, dim`` and ``select`` (index or key of the tensor in a
            tuple or dict); or a preset, ``"biggan"``, ``"stylegan2"`` or ``"ugatit"``, for a discriminator
            that is built like these: the paper's layers, and what it sets for each of the next three.
        codebook_size: K of every layer; a preset has its own.
        decay: of the moving averages; 0.8, or the preset's.
        commitment_weight: factor of the loss; 1, or the preset's.
        mode: ``"regularize"``, ``"replace"`` or ``"blend"``.
        concat_parts: number of equal parts, such as fake and real, that a batch holds outside generator
            steps. The loss is the sum of the parts' means, as if each had its own forward: BigGAN
            concatenates two.
        generator_step: what a generator step does: ``"loss"`` the generator pays and nothing is updated,
            ``"loss+ema"`` (the paper's released code) the codebook also follows, ``"none"`` neither.
        inject: add the loss to the gradients on their way back instead of collecting it for
            ``handle.loss()``, which is 0 then.
        inject_on: ``"first_order_only"`` leaves out graphs that a backward pass with ``create_graph=True``
            has passed before: what StyleGAN2's lazy R1 runs, whose gain would not hold for the loss.
        loss_scale: of an injected loss, what the trainer multiplies its own with (AMP's scale, 1 /
            accumulation steps): a number, or a callable read in each backward pass (``scaler.get_scale``).
        compat: as for :class:`FeatureQuantize`.
        options: as for :class:`FeatureQuantize`.
        example_input: a tensor, or tuple of arguments, for one probing forward in eval mode when the channels
            of a layer cannot be read off its attributes; the random state is restored afterwards.

    Returns:
        The handle: ``loss()``, ``stats()``, ``freeze()``, ``detach()`` and the contexts.

    Raises:
        ValueError: nothing matches (the five nearest names are given), the model is not built like the
            preset's, a layer already carries FQ, its channels cannot be told, a setting is missing or out of
            range, or ``inject_on`` or ``loss_scale`` is given without ``inject``.
        TypeError: the model is compiled (attach first, then compile), or ``loss_scale`` is no number.

    Warns:
        RuntimeWarning: a layer lies inside another that is attached.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))
        >>> handle = attach(model, "0", codebook_size=16)
        >>> _ = model(torch.randn(4, 3, 8, 8))
        >>> handle.loss() > 0
        tensor(True)
        >>> handle.detach()
    """
    root = root_of(model)
    refuse_compiled(root)
    if concat_parts < 1:
        raise ValueError(
            f"concat_parts is {concat_parts}: give the number of equal parts in a batch, 1 or more"
        )
    if generator_step not in ("loss", "loss+ema", "none"):
        raise ValueError(f"generator_step is {generator_step!r}: choose 'loss', 'loss+ema' or 'none'")
    injector = Injector(loss_scale, inject_on)
    if not inject and (inject_on, loss_scale) != ("always", 1.0):
        raise ValueError(
            f"inject_on={inject_on!r} and loss_scale={loss_scale!r} shape an injected loss, but inject is "
            "False: pass inject=True, or leave them out and scale handle.loss() yourself"
        )
    given = {"codebook_size": codebook_size, "decay": decay, "commitment_weight": commitment_weight}
    given = {key: value for key, value in given.items() if value is not None}
    sites = _sites(root, layers, given)
    probed: dict[str, Any] = {}
    if example_input is not None:
        with silent(root):
            probed = outputs.probe(root, list(sites), example_input)
    channels = outputs.channels(root, sites, probed, options)
    quantizers = {}
    for name, overrides in sites.items():
        chosen: CodebookOptions = overrides.get("options", options)
        settings = {"decay": 0.8, "commitment_weight": 1.0} | given | overrides
        if "codebook_size" not in settings:
            raise ValueError(
                f"codebook_size of layer {name!r} is missing: give the number of codes, for instance 256 "
                f"(only the presets {', '.join(presets.NAMES)} have one of their own)"
            )
        quantizer = _Attached(
            channels[name],
            settings["codebook_size"],
            decay=settings["decay"],
            commitment_weight=settings["commitment_weight"],
            mode=overrides.get("mode", mode),
            compat=compat,
            # Every site draws from a stream of its own that depends on its name alone.
            options=replace(chosen, seed=zlib.crc32(name.encode()) ^ chosen.seed),
        )
        like = outputs.tensor_beside(root, name)
        quantizers[name] = quantizer.to(like.device, like.dtype)
    _warn_of_nested(root, list(sites))
    # Everything that can fail has been done: from here on the model changes.
    handle = Handle(root, list(sites), concat_parts, generator_step, injector if inject else None)
    for name, overrides in sites.items():
        layer = root.get_submodule(name)
        layer.add_module(CHILD, quantizers[name].train(layer.training))
        layer.register_forward_hook(_SiteHook(handle, name, overrides.get("select")))
    # Each process has its own; DistributedDataParallel would overwrite them with the first one's.
    pending = [f"{name}.{CHILD}.pending" for name in sites if quantizers[name].options.deferred_update]
    if pending:
        kept = getattr(root, _IGNORED, [])
        setattr(root, _IGNORED, [*kept, *pending])
    root.register_forward_pre_hook(_RootHook(handle), with_kwargs=True)
    root.register_forward_hook(_RootExit(handle), always_call=True)
    return handle


def handle_of(model: nn.Module) -> Handle:
    """The handle of a model that carries FQ, for instance of a deep copy or an unpickled model.

    Args:
        model: the model, or its DDP or ``torch.compile`` wrapper.

    Returns:
        Its handle; the latest one if FQ was attached several times.

    Raises:
        ValueError: the model carries none.
    """
    root = root_of(model)
    handles = _handles(getattr(root, "_orig_mod", root))
    if not handles:
        raise ValueError(f"{type(model).__name__} carries no FQ: call fq.attach(model, layers, ...) first")
    return handles[-1]


class Handle:
    """What ``attach`` returns: the losses, figures and switches of all attached layers.

    ``names`` lists the layers, ``quantizers`` maps them to their :class:`FeatureQuantize`; ``injector`` is
    the :class:`Injector` whose ``loss_scale`` may be set anew, or None without ``inject``.

    Args:
        model: the model itself, not its wrapper.
        names: attached layers.
        concat_parts: as for :func:`attach`.
        generator_step: as for :func:`attach`.
        injector: adds the losses to the gradients; None collects them for :meth:`loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        concat_parts: int,
        generator_step: GeneratorStep,
        injector: Injector | None = None,
    ) -> None:
        self.model, self.names, self.injector = model, names, injector
        self.concat_parts, self.generator_policy = concat_parts, generator_step
        self._losses: list[Tensor] = []
        self._without_graph: set[str] = set()  # layers whose latest loss was made with gradients off
        self._tallies: dict[str, Tally] = {}
        self._parts: tuple[str, ...] = (MIXED,)
        self._labels: Tensor | None = None
        # Of each layer's latest pass, for its re-computation:
        self._labels_then: dict[str, Tensor] = {}
        self._charges_then: dict[str, int] = {}
        self._in_generator_step = self._in_penalty = False
        self._leaf_input = False  # of the root forward that is running
        self._unreached = set(names)  # layers that no forward has come to yet

    @property
    def quantizers(self) -> dict[str, FeatureQuantize]:
        """The quantiser of every attached layer."""
        return {name: getattr(self.model.get_submodule(name), CHILD) for name in self.names}

    def loss(self) -> Tensor:
        """Sum over layers and forwards of the commitment losses since the last call, which it forgets.

        Returns:
            A float32 scalar (float64 for a float64 model), also under autocast; 0 when there were no
            forwards, and always under ``inject``, where the gradients have the losses already and
            :meth:`stats` tells their values.
        """
        losses, self._losses = self._losses, []
        if losses:
            self._warn_of_unreached()
            return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        quantizers = self.quantizers
        return next(iter(quantizers.values())).codebook.new_zeros(()) if quantizers else torch.zeros(())

    def stats(self) -> dict[str, SiteStats]:
        """Figures of every layer since the last call, which starts a new window; tokens of this process only.

        Returns:
            ``{layer: SiteStats}``, for all layers; draw them with ``fq.stats.draw``.
        """
        if self._tallies and self.injector is not None:  # nobody asks for the loss
            self._warn_of_unreached()
        tallies, self._tallies = self._tallies, {}
        self._unreached -= tallies.keys()
        return {
            name: tallies.get(name, Tally(layer.num_codes)).report(layer.ema_count)
            for name, layer in self.quantizers.items()
        }

    def _warn_of_unreached(self) -> None:
        self._unreached -= self._tallies.keys()
        unreached, self._unreached = sorted(self._unreached), set()
        if unreached:
            warnings.warn(
                f"the model's forward never came to the attached layers {', '.join(unreached)}: attach to "
                "layers that it runs (fq.suggest(model, example_input) lists them)",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    def freeze(self, frozen: bool = True) -> None:
        """Stop (or, with False, resume) all codebook updates.

        Args:
            frozen: the new state.
        """
        for quantizer in self.quantizers.values():
            quantizer.freeze(frozen)

    def apply_update(self) -> None:
        """One EMA step of every layer from the statistics pending under ``deferred_update``.

        Raises:
            RuntimeError: a layer updates in every forward.
        """
        for name, quantizer in self.quantizers.items():
            if not quantizer.options.deferred_update:
                raise RuntimeError(
                    f"apply_update() was called but layer {name!r} updates in every forward: attach all "
                    "layers with options=CodebookOptions(deferred_update=True)"
                )
        for quantizer in self.quantizers.values():
            quantizer.apply_update()

    def detach(self) -> None:
        """Remove hooks and quantisers: the model is what it was before ``attach``, key for key."""
        for name in self.names:
            layer = self.model.get_submodule(name)
            _remove_hooks(layer._forward_hooks, self, layer)
            delattr(layer, CHILD)
        _remove_hooks(self.model._forward_pre_hooks, self, self.model)
        _remove_hooks(self.model._forward_hooks, self, self.model)
        if hasattr(self.model, _IGNORED):
            mine = {f"{name}.{CHILD}.pending" for name in self.names}
            left = [name for name in getattr(self.model, _IGNORED) if name not in mine]
            setattr(self.model, _IGNORED, left) if left else delattr(self.model, _IGNORED)
        self.names, self._losses, self._tallies = [], [], {}

    def strip(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the model without the quantisers' entries.

        Args:
            state_dict: of the attached model.

        Returns:
            The entries a plain model has.
        """
        prefixes = tuple(f"{name}.{CHILD}." for name in self.names)
        return {key: value for key, value in state_dict.items() if not key.startswith(prefixes)}

    @contextmanager
    def generator_step(self) -> Iterator[None]:
        """Forwards inside are a generator step, for trainers that do not freeze the discriminator."""
        before, self._in_generator_step = self._in_generator_step, True
        try:
            yield
        finally:
            self._in_generator_step = before

    @contextmanager
    def penalty(self) -> Iterator[None]:
        """Forwards inside serve a gradient penalty or a probe: no update, no loss, no figures."""
        before, self._in_penalty = self._in_penalty, True
        try:
            yield
        finally:
            self._in_penalty = before

    @contextmanager
    def part(self, name: str | None = None, *, parts: tuple[str, ...] | None = None) -> Iterator[None]:
        """Label the tokens of the forwards inside, so that ``stats`` can set real against fake.

        Args:
            name: label of the whole batch, usually ``"real"`` or ``"fake"``.
            parts: labels of equal shares of one batch, in order, such as ``("fake", "real")``.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        if (name is None) == (not parts):
            raise ValueError(
                'give one label, part("real"), or the labels of equal shares, part(parts=("fake", "real"))'
            )
        before, self._parts = self._parts, parts or (str(name),)
        try:
            yield
        finally:
            self._parts = before

    @contextmanager
    def labels(self, labels: Tensor) -> Iterator[None]:
        """Forwards inside have these classes, for layers with class-conditional codes (``num_classes``).

        Args:
            labels: int64 ``[B]``.
        """
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy: graph-carrying losses and figures of the moment stay behind."""
        return self.__dict__ | {
            "_losses": [],
            "_tallies": {},
            "_labels": None,
            "_labels_then": {},
            "_parts": (MIXED,),
            "_in_penalty": False,
            "_in_generator_step": False,
            "_leaf_input": False,
        }

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self._leaf_input = any(tensor.requires_grad and tensor.is_leaf for tensor in tensors)
        # The exchange of statistics between processes runs beside the rest of this forward.
        if _in_group():
            for quantizer in self.quantizers.values():
                quantizer.overlap = True

    def _leave(self, failed: bool) -> None:
        self._leaf_input = False
        if _in_group():
            for quantizer in self.quantizers.values():
                quantizer.overlap = False
                if not failed:  # else other processes may not be there to answer
                    quantizer.finish()

    def _is_generator_step(self) -> bool:
        if self._in_generator_step:
            return True
        parameter = None
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                return False
        return parameter is not None

    def _quantize(self, name: str, quantizer: FeatureQuantize, features: Tensor) -> Tensor | None:
        """Run one site; returns the tensor to put in place of ``features``, or None to leave them."""
        generating = self._is_generator_step()
        held = self._in_penalty or self._leaf_input or (generating and self.generator_policy != "loss+ema")
        # Fakes alone teach a codebook of real pictures nothing.
        held |= quantizer.options.learn_from == "real" and not {"real", MIXED} & set(self._parts)
        updating = quantizer.updates(False if held else None)
        if not updating and not quantizer.is_ready():
            return None
        if features.numel():
            outputs.check_width(name, quantizer.dim, quantizer.options.channel_last, features)
        if len(features) % len(self._parts):
            parts = ", ".join(self._parts)
            raise ValueError(
                f"a batch of {len(features)} does not hold the parts {parts} in equal shares: "
                "give a batch that is a multiple of their number, or label separate forwards"
            )
        learn = self._learn(name, quantizer, len(features), features.device) if updating else None
        result = quantizer.run(features, updating, self._labels_of(name, quantizer, len(features)), learn)
        charge = self._charge(name, generating) if quantizer.commitment_weight > 0 else 0
        loss = (result.loss.mean() if result.loss.ndim else result.loss) * charge
        # A re-computed segment must build the same graph, but its loss was counted the first time.
        if recomputing():
            self._refuse_reentrant(name)
        else:
            if not self._in_penalty:
                tally = self._tallies.setdefault(name, Tally(quantizer.num_codes))
                tally.add(result.indices, result.error.detach().mean(), self._parts)
            if charge and self.injector is None:
                self._keep(name, loss)
        output = None if quantizer.mode == "regularize" else result.features
        if charge and self.injector is not None and loss.requires_grad:
            return self.injector(features if output is None else output, loss)
        if output is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # Reentrant checkpointing hands it on, and of what that returns no view may be changed in place.
            return output.clone() if output._is_view() else output
        return output

    def _charge(self, name: str, generating: bool) -> int:
        """How often the loss of this pass counts."""
        if recomputing() and name in self._charges_then:  # the contexts of the first pass may be over
            return self._charges_then[name]
        silent = self._in_penalty or (generating and self.generator_policy == "none")
        # A generator step sees its fakes alone: one part.
        charge = 0 if silent else 1 if generating else self.concat_parts
        self._charges_then[name] = charge
        return charge

    def _refuse_reentrant(self, name: str) -> None:
        """Reentrant checkpointing runs the first pass without gradients: the loss kept then leads nowhere."""
        if torch.is_grad_enabled() and name in self._without_graph:
            raise RuntimeError(
                f"layer {name!r} is inside a checkpointed segment with use_reentrant=True, which would lose "
                "its FQ loss: call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )

    def _keep(self, name: str, loss: Tensor) -> None:
        (self._without_graph.discard if torch.is_grad_enabled() else self._without_graph.add)(name)
        self._losses.append(loss)
        if len(self._losses) > _MANY_LOSSES:
            self._losses.clear()
            warnings.warn(
                f"handle.loss() has not been called for {_MANY_LOSSES} layer outputs, which are now dropped: "
                "add it to the discriminator's and the generator's loss, or attach with commitment_weight=0",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip

    def _learn(
        self, name: str, quantizer: FeatureQuantize, batch_size: int, device: torch.device
    ) -> Tensor | None:
        """Which samples may move the codebook: bool ``[B]``, or None for all."""
        if quantizer.options.learn_from == "all":
            return None
        if MIXED in self._parts:
            raise ValueError(
                f"layer {name!r} learns from real pictures alone, but this batch has no label: run the "
                'forward inside handle.part("real"), part("fake") or part(parts=("fake", "real"))'
            )
        real = torch.tensor([part == "real" for part in self._parts], device=device)
        return real.repeat_interleave(batch_size // len(self._parts))

    def _labels_of(self, name: str, quantizer: FeatureQuantize, batch_size: int) -> Tensor | None:
        if not quantizer.options.num_classes:
            return None
        if recomputing() and name in self._labels_then:
            return self._labels_then[name]
        if self._labels is None or self._labels.shape != (batch_size,):
            given = (
                "there are none" if self._labels is None else f"they have shape {list(self._labels.shape)}"
            )
            raise ValueError(
                f"layer {name!r} has codes for each class and needs the {batch_size} samples' labels, but "
                f"{given}: run the forward inside handle.labels(labels)"
            )
        self._labels_then[name] = self._labels
        return self._labels


class _Attached(FeatureQuantize):
    """A quantiser that lives as a child of a foreign layer."""

    def forward(self, features: Any, *rest: Any, **options: Any) -> Any:
        """Pass through: a container that runs all its children must not run this one; the hook quantises."""
        return features

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # A checkpoint from before FQ was attached still loads strictly and leaves the codebook as it is.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *rest)


class _SiteHook:
    """Forward hook of one layer; a class, not a closure: models stay picklable, copies independent."""

    def __init__(self, handle: Handle, name: str, select: int | str | None) -> None:
        self.handle, self.name, self.select = handle, name, select

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        quantizer: FeatureQuantize = module._modules[CHILD]  # type: ignore[assignment]
        features = outputs.find(output, quantizer.dim, self.select, self.name)
        quantized = self.handle._quantize(self.name, quantizer, features)
        return None if quantized is None else outputs.put(output, features, quantized)


class _RootHook:
    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.handle._enter(args, kwargs)


class _RootExit:
    def __init__(self, handle: Handle) -> None:
        self.handle = handle

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.handle._leave(failed=output is None)


@contextmanager
def silent(root: nn.Module) -> Iterator[None]:
    """Forwards inside are probes: the FQ that the model carries already neither learns nor counts them.

    Args:
        root: the model itself.
    """
    with ExitStack() as stack:
        for handle in _handles(root):
            stack.enter_context(handle.penalty())
        yield


def _in_group() -> bool:
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized()


def _handles(root: nn.Module) -> list[Handle]:
    return [hook.handle for hook in root._forward_pre_hooks.values() if isinstance(hook, _RootHook)]


def root_of(model: nn.Module) -> nn.Module:
    """The model itself, out of its data-parallel wrapper.

    Args:
        model: a module, or its DDP or DataParallel wrapper.

    Returns:
        The module whose children carry the names that ``attach`` takes.

    Raises:
        TypeError: it is no module.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module of the discriminator")
    return model


def refuse_compiled(root: nn.Module) -> None:
    """Say no to a model whose compiled graph would never call our hooks.

    Args:
        root: the model itself.

    Raises:
        TypeError: it, or a module in it, is compiled.
    """
    compiled = [name or "the model" for name, module in root.named_modules() if _is_compiled(module)]
    if compiled:
        raise TypeError(
            f"{compiled[0]} is already compiled, and a compiled graph never calls hooks added later: "
            "attach FQ to the plain model first, then compile it"
        )


def puts_out_features(name: str, module: nn.Module) -> bool:
    """Whether a layer can be attached to: not a quantiser, nor what computes a parametrised weight.

    Args:
        name: of the layer in its model.
        module: the layer.

    Returns:
        False for quantisers and for modules below ``parametrizations`` (spectral norm, weight norm).
    """
    return not isinstance(module, FeatureQuantize) and "parametrizations" not in name.split(".")


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _warn_of_nested(root: nn.Module, sites: list[str]) -> None:
    carriers = [name for name, module in root.named_modules() if hasattr(module, CHILD)]
    pairs = [(a, b) for a in sites for b in {*carriers, *sites}]
    pairs += [(b, a) for a in sites for b in carriers]
    nested = sorted({(inner, outer) for inner, outer in pairs if inner.startswith(f"{outer}.")})
    if nested:
        inside = ", ".join(f"{inner!r} inside {outer!r}" for inner, outer in nested[:5])
        warnings.warn(
            f"attached layers lie inside other attached layers ({inside}{', …' * (len(nested) > 5)}): each "
            "has codes and a loss of its own, even over the same features; name one of each pair if that was "
            "not meant",
            RuntimeWarning, stacklevel=3,
        )  # fmt: skip


def _sites(
    root: nn.Module, layers: str | Iterable[str] | Mapping[str, Mapping[str, Any]], given: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Full names of the chosen layers, in the model's order, with their overrides."""
    names = [name for name, module in root.named_modules() if name and puts_out_features(name, module)]
    found = presets.resolve(root, layers, names, given)
    for name, overrides in found.items():
        unknown = set(overrides) - set(_OVERRIDES)
        if unknown:
            raise ValueError(
                f"overrides of {name!r} name {sorted(unknown)}: known are {', '.join(_OVERRIDES)}"
            )
        if isinstance(root.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"layer {name!r} is a {type(root.get_submodule(name)).__name__}, which has no forward of its "
                f"own: name the layers in it, such as '{name}.*'"
            )
        if hasattr(root.get_submodule(name), CHILD):
            raise ValueError(
                f"layer {name!r} already has an attribute {CHILD!r}: detach the FQ it carries first"
            )
    return {name: found[name] for name in names if name in found}


def _remove_hooks(hooks: dict[int, Any], handle: Handle, module: nn.Module) -> None:
    """Drop this handle's hooks, and the flags PyTorch keeps beside them."""
    mine = [key for key, hook in hooks.items() if getattr(hook, "handle", None) is handle]
    for key in mine:
        del hooks[key]
        for flags in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called,
                      module._forward_pre_hooks_with_kwargs):  # fmt: skip
            flags.pop(key, None)
