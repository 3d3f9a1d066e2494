"""The commitment loss as a gradient added on the way back, for trainers whose loss one cannot touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fq.options import one_of

InjectOn = Literal["always", "first_order_only"]
LossScale = float | Callable[[], float | Tensor]


class Injector:
    """Adds the gradient of a loss to the one that flows back through some features.

    After ``features = injector(features, loss)`` a backward pass through ``features`` gives all that made
    them ``loss_scale · d loss`` on top of what it brings, as ``(… + loss_scale · loss).backward()`` would.
    Three cases bring nothing on top: a pass with ``create_graph=True``, so that R1, path-length and gradient
    penalties see the gradient of the scores alone, to the bit; a part of the graph that no gradient reaches;
    and with ``"first_order_only"`` every pass through a graph that ``create_graph=True`` has passed before.

    Args:
        loss_scale: what the trainer multiplies its own loss with: a number of at least 0, or a callable
            without arguments that returns it (a number or a 0-dim tensor), called in every backward pass.
        inject_on: ``"always"`` or ``"first_order_only"``.

    Raises:
        ValueError: ``loss_scale`` is negative or not finite, or ``inject_on`` is another word.
        TypeError: ``loss_scale`` is neither a number nor callable.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> out = Injector(10.0)(x, x.square().mean())
        >>> torch.equal(out, x)
        True
        >>> out.sum().backward()
        >>> x.grad  # 1, and 10 times x
        tensor([11., 21.])
    """

    def __init__(self, loss_scale: LossScale = 1.0, inject_on: InjectOn = "always") -> None:
        one_of(inject_on, ("always", "first_order_only"), "inject_on")
        self.inject_on = inject_on
        self.loss_scale = loss_scale

    @property
    def loss_scale(self) -> LossScale | None:
        """Factor of the loss, or what returns it; None in a model that was unpickled without its callable."""
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, loss_scale: LossScale) -> None:
        if not callable(loss_scale):
            if isinstance(loss_scale, bool) or not isinstance(loss_scale, int | float):
                raise TypeError(
                    f"loss_scale is a {type(loss_scale).__name__}: give a number, or a callable without "
                    "arguments that returns one, such as scaler.get_scale"
                )
            if not 0.0 <= loss_scale < math.inf:
                raise ValueError(f"loss_scale is {loss_scale}: give a finite number of at least 0")
        self._loss_scale: LossScale | None = loss_scale

    def __call__(self, features: Tensor, loss: Tensor) -> Tensor:
        """The features with the loss behind them.

        Args:
            features: any shape; part of a graph.
            loss: scalar that depends on what ``features`` depend on.

        Returns:
            The same values in a fresh tensor: the trunk may change it in place.

        Raises:
            RuntimeError: the model was unpickled, and its callable ``loss_scale`` stayed behind.
        """
        scale = self._loss_scale
        if scale is None:
            raise RuntimeError(
                "this model was unpickled, and a callable loss_scale does not travel in a pickle: set "
                "fq.handle_of(model).injector.loss_scale to it, or to a number, before training goes on"
            )
        if not torch.compiler.is_compiling():
            injected: Tensor = _Inject.apply(features, loss, scale, self.inject_on == "first_order_only")
        elif callable(scale):
            # A compiled backward pass would keep the value of its first reading. Not the decorator, which
            # would make `import fq` load the compiler.
            injected = torch.compiler.disable(_Inject.apply)(  # type: ignore[no-untyped-call]
                features, loss, scale, self.inject_on == "first_order_only"
            )
        else:
            injected = torch.ops.fq.inject(features, loss, scale, self.inject_on == "first_order_only")
        return injected

    def __deepcopy__(self, memo: dict[int, Any]) -> Injector:
        """A copy that reads the same callable: a copied scaler would not hear of the next scale."""
        other = Injector.__new__(Injector)
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle: a callable stays behind, for it may hold anything."""
        return self.__dict__ | ({"_loss_scale": None} if callable(self._loss_scale) else {})


def _forward(features: Tensor, loss: Tensor, scale: LossScale, first_order_only: bool) -> Tensor:
    # A copy: neither a view, which may not be changed in place, nor the features themselves, which the layer
    # before may have kept for its backward pass.
    return features.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, loss, ctx.scale, ctx.first_order_only = inputs
    ctx.dtype, ctx.device = loss.dtype, loss.device
    ctx.penalised = False
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    if torch.is_grad_enabled():  # that is, create_graph=True
        ctx.penalised = True
        return gradient, None, None, None
    if gradient is None or (ctx.penalised and ctx.first_order_only):
        return gradient, None, None, None
    scale = ctx.scale() if callable(ctx.scale) else ctx.scale
    if isinstance(scale, Tensor):
        of_loss = scale.detach().to(ctx.device, ctx.dtype).reshape(())
    elif isinstance(scale, int | float):
        of_loss = torch.full((), scale, dtype=ctx.dtype, device=ctx.device)
    else:
        raise TypeError(f"loss_scale() returned a {type(scale).__name__}: let it return a number")
    return gradient, of_loss, None, None


class _Inject(torch.autograd.Function):
    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


@torch.library.custom_op("fq::inject", mutates_args=())
def _inject_op(features: Tensor, loss: Tensor, scale: float, first_order_only: bool) -> Tensor:
    return features.clone()


@_inject_op.register_fake
def _(features: Tensor, loss: Tensor, scale: float, first_order_only: bool) -> Tensor:
    return torch.empty_like(features)


_inject_op.register_autograd(_backward, setup_context=_setup_context)
