"""Put FQ into a discriminator that knows nothing of it, and take it out again without a trace.

A forward hook on each chosen layer quantises the layer's output. The quantiser is a child ``fq`` of that
layer, so devices, checkpoints and data parallelism see it; the layer itself is neither wrapped nor replaced.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fq import outputs
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
    codebook_size: int,
    decay: float = 0.8,
    commitment_weight: float = 1.0,
    mode: Mode = "regularize",
    concat_parts: int = 1,
    generator_step: GeneratorStep = "loss",
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

    Args:
        model: a discriminator; a DDP or DataParallel wrapper is looked through.
        layers: module names: exact, the end of a name (``"conv2"`` for every ``….conv2``), a glob
            (``"blocks.*.0"``), a list of these, or ``{name: overrides}`` with overrides of ``codebook_size,
            decay, commitment_weight, mode, options, dim`` and ``select`` (index or key of the tensor in a
            tuple or dict).
        codebook_size: K of every layer.
        decay: of the moving averages.
        commitment_weight: factor of the loss.
        mode: ``"regularize"``, ``"replace"`` or ``"blend"``.
        concat_parts: number of equal parts, such as fake and real, that a batch holds outside generator
            steps. The loss is the sum of the parts' means, as if each had its own forward: BigGAN
            concatenates two.
        generator_step: what a generator step does: ``"loss"`` the generator pays and nothing is updated,
            ``"loss+ema"`` (the paper's released code) the codebook also follows, ``"none"`` neither.
        compat: as for :class:`FeatureQuantize`.
        options: as for :class:`FeatureQuantize`.
        example_input: a tensor, or tuple of arguments, for one probing forward in eval mode when the channels
            of a layer cannot be read off its attributes; the random state is restored afterwards.

    Returns:
        The handle: ``loss()``, ``stats()``, ``freeze()``, ``detach()`` and the contexts.

    Raises:
        ValueError: nothing matches (the five nearest names are given), a layer already carries FQ, its
            channels cannot be told, or a setting is out of range.
        TypeError: the model is compiled: attach first, then compile.

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
    sites = _resolve(root, layers)
    channels = _channels(root, sites, example_input, options)
    quantizers = {}
    for name, overrides in sites.items():
        chosen: CodebookOptions = overrides.get("options", options)
        quantizer = _Attached(
            channels[name],
            overrides.get("codebook_size", codebook_size),
            decay=overrides.get("decay", decay),
            commitment_weight=overrides.get("commitment_weight", commitment_weight),
            mode=overrides.get("mode", mode),
            compat=compat,
            # Every site draws from a stream of its own that depends on its name alone.
            options=replace(chosen, seed=zlib.crc32(name.encode()) ^ chosen.seed),
        )
        like = _tensor_beside(root, name)
        quantizers[name] = quantizer.to(like.device, like.dtype)
    # Everything that can fail has been done: from here on the model changes.
    handle = Handle(root, list(sites), concat_parts, generator_step)
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

    ``names`` lists the layers, ``quantizers`` maps them to their :class:`FeatureQuantize`.

    Args:
        model: the model itself, not its wrapper.
        names: attached layers.
        concat_parts: as for :func:`attach`.
        generator_step: as for :func:`attach`.
    """

    def __init__(
        self, model: nn.Module, names: list[str], concat_parts: int, generator_step: GeneratorStep
    ) -> None:
        self.model, self.names = model, names
        self.concat_parts, self.generator_policy = concat_parts, generator_step
        self._losses: list[Tensor] = []
        self._without_graph: set[str] = set()  # layers whose latest loss was made with gradients off
        self._tallies: dict[str, Tally] = {}
        self._parts: tuple[str, ...] = (MIXED,)
        self._labels: Tensor | None = None
        self._labels_then: dict[str, Tensor] = {}  # of each layer's latest pass, for its re-computation
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
            forwards.
        """
        losses, self._losses = self._losses, []
        self._unreached -= self._tallies.keys()
        if losses and self._unreached:
            unreached, self._unreached = sorted(self._unreached), set()
            warnings.warn(
                f"the model's forward never came to the attached layers {', '.join(unreached)}: attach to "
                "layers that it runs (fq.suggest(model, example_input) lists them)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        if losses:
            return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        quantizers = self.quantizers
        return next(iter(quantizers.values())).codebook.new_zeros(()) if quantizers else torch.zeros(())

    def stats(self) -> dict[str, SiteStats]:
        """Figures of every layer since the last call, which starts a new window; tokens of this process only.

        Returns:
            ``{layer: SiteStats}``, for all layers; draw them with ``fq.stats.draw``.
        """
        tallies, self._tallies = self._tallies, {}
        self._unreached -= tallies.keys()
        return {
            name: tallies.get(name, Tally(layer.num_codes)).report(layer.ema_count)
            for name, layer in self.quantizers.items()
        }

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
            _check_width(name, quantizer, features)
        if len(features) % len(self._parts):
            parts = ", ".join(self._parts)
            raise ValueError(
                f"a batch of {len(features)} does not hold the parts {parts} in equal shares: "
                "give a batch that is a multiple of their number, or label separate forwards"
            )
        learn = self._learn(name, quantizer, len(features), features.device) if updating else None
        result = quantizer.run(features, updating, self._labels_of(name, quantizer, len(features)), learn)
        silent = self._in_penalty or (generating and self.generator_policy == "none")
        # A re-computed segment must build the same graph, but its loss was counted the first time.
        if recomputing():
            self._refuse_reentrant(name)
        else:
            if not self._in_penalty:
                tally = self._tallies.setdefault(name, Tally(quantizer.num_codes))
                tally.add(result.indices, result.error.detach().mean(), self._parts)
            if not silent and quantizer.commitment_weight > 0:
                # A generator step sees its fakes alone: one part.
                self._keep(name, result.loss if generating else result.loss * self.concat_parts)
        return None if quantizer.mode == "regularize" else result.features

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


def _resolve(
    root: nn.Module, layers: str | Iterable[str] | Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Full names of the chosen layers, in the model's order, with their overrides."""
    wanted: Mapping[str, Mapping[str, Any]]
    if isinstance(layers, str):
        wanted = {layers: {}}
    elif hasattr(layers, "items"):
        wanted = layers  # type: ignore[assignment]
    else:
        wanted = {pattern: {} for pattern in layers}
    if not wanted:
        raise ValueError("layers is empty: name at least one module of the model")
    names = [name for name, module in root.named_modules() if name and puts_out_features(name, module)]
    found: dict[str, dict[str, Any]] = {}
    for pattern, overrides in wanted.items():
        unknown = set(overrides) - set(_OVERRIDES)
        if unknown:
            raise ValueError(
                f"overrides of {pattern!r} name {sorted(unknown)}: known are {', '.join(_OVERRIDES)}"
            )
        for name in _matches(pattern, names):
            found[name] = dict(overrides)
    for name in found:
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


def _matches(pattern: str, names: list[str]) -> list[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"layer {pattern!r} is a {type(pattern).__name__}: give module names as strings")
    if pattern in names:
        return [pattern]
    if any(sign in pattern for sign in "*?["):
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    else:
        matches = [name for name in names if name.endswith(f".{pattern}")]
    if matches:
        return matches
    near = ", ".join(map(repr, difflib.get_close_matches(pattern, names, n=5, cutoff=0.0)))
    raise ValueError(
        f"no module matches {pattern!r}: nearest names are {near or 'none, for the model has none'}; "
        "fq.suggest(model, example_input) lists layers worth attaching to"
    )


def _channels(
    root: nn.Module, sites: Mapping[str, Mapping[str, Any]], example_input: Any, options: CodebookOptions
) -> dict[str, int]:
    found: dict[str, int | None] = {}
    probed: dict[str, Any] = {}
    if example_input is not None:
        with silent(root):
            probed = outputs.probe(root, list(sites), example_input)
    for name, overrides in sites.items():
        axis = -1 if overrides.get("options", options).channel_last else 1
        if "dim" in overrides:
            found[name] = overrides["dim"]
        elif name in probed:
            found[name] = outputs.find(probed[name], None, overrides.get("select"), name).shape[axis]
        else:
            found[name] = outputs.declared_channels(root, name)
    unknown = [name for name, dim in found.items() if dim is None]
    if unknown:
        raise ValueError(
            f"cannot tell how many channels {unknown[0]!r} puts out: pass example_input=… for one probing "
            f"forward, or layers={{{unknown[0]!r}: {{'dim': …}}}}"
        )
    return {name: dim for name, dim in found.items() if dim is not None}


def _check_width(name: str, quantizer: FeatureQuantize, features: Tensor) -> None:
    axis = -1 if quantizer.options.channel_last else 1
    if features.ndim < 2 or features.shape[axis] != quantizer.dim:
        raise ValueError(
            f"layer {name!r} put out features of shape {list(features.shape)}, but FQ was attached for "
            f"{quantizer.dim} channels: attach with example_input=…, or layers={{{name!r}: {{'dim': "
            f"{features.shape[axis]}}}}}"
        )


def _tensor_beside(root: nn.Module, name: str) -> Tensor:
    """A floating tensor of the layer, or else of the model: the quantiser follows its device and dtype."""
    for module in (root.get_submodule(name), root):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    return torch.empty(0)


def _remove_hooks(hooks: dict[int, Any], handle: Handle, module: nn.Module) -> None:
    """Drop this handle's hooks, and the flags PyTorch keeps beside them."""
    mine = [key for key, hook in hooks.items() if getattr(hook, "handle", None) is handle]
    for key in mine:
        del hooks[key]
        for flags in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called,
                      module._forward_pre_hooks_with_kwargs):  # fmt: skip
            flags.pop(key, None)
