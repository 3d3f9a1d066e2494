"""Parity of StyleGAN2: both networks, both forms of convolution, R1, path lengths and their gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.convert_stylegan2 import infer_config, load_strictly
from backbones.stylegan2 import Discriminator, Generator
from benchmarks.golden import GRADIENT_NORMS, OUTPUTS, Case, Tolerance, gradient_norms

_DOUBLE = Tolerance(1e-9, 1e-10)
# Two roundings of one thing are compared: theirs may be exceeded ten times, and come short of.
_ROUNDING = Tolerance(9.0, 0.0)
_R1_TABLE = re.compile(r"Dreal_plus_R1_gamma([\d.]+)_grad_norms")


class _Tolerances(NamedTuple):
    outputs: Tolerance
    gradient_norms: Tolerance


def check(case: Case) -> None:
    """StyleGAN2 pairs: latents, images, features and logits, a generator step, R1 and path lengths."""
    states = {name: _state(case, name) for name in ("G", "D")}
    # What the original computed in, which may be narrower than what its state is stored in.
    dtype = torch.float64 if case.arrays["img_const"].dtype == np.float64 else torch.float32
    g_config = infer_config(g_state=states["G"], init_kwargs=case.meta["G_kwargs"])
    d_config = infer_config(d_state=states["D"], init_kwargs=case.meta["D_kwargs"])
    generator, discriminator = Generator(g_config).to(dtype), Discriminator(d_config).to(dtype)
    for name, model in (("G", generator), ("D", discriminator)):
        load_strictly(model, states[name])
        _check_names(case, name, model)
    _check_arguments(case, generator, discriminator)

    double, single = _Tolerances(_DOUBLE, _DOUBLE), _Tolerances(OUTPUTS, GRADIENT_NORMS)
    allowed = double if dtype == torch.float64 else single
    z, c, real = (case.use(key).to(dtype) for key in ("z", "c", "x_real"))
    labels = c if c.shape[1] else None
    with torch.no_grad():
        _check_forwards(case, generator.eval(), discriminator.eval(), z, labels, real, allowed)
    generator.train()
    discriminator.train()
    _check_generator_step(case, generator, discriminator, z, labels, allowed)
    _check_r1(case, discriminator, real, labels, allowed)
    _check_path_lengths(case, generator, z, labels, allowed)
    with torch.no_grad():
        generator.mapping(z, labels, track_average=True)
    case.compare("w_avg_after", generator.mapping.w_avg, allowed.outputs)


def _state(case: Case, network: str) -> dict[str, Tensor]:
    prefix = f"{network}."
    return {key.removeprefix(prefix): case.use(key) for key in case.arrays if key.startswith(prefix)}


def _check_names(case: Case, network: str, model: nn.Module) -> None:
    ours = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    case.require(ours == case.meta[f"{network}_keys"], f"the state keys of {network} or their order differ")
    parameters = [key for key, _ in model.named_parameters()]
    case.require(parameters == case.meta[f"{network}_params"], f"the parameters of {network} differ")


def _check_arguments(case: Case, generator: Generator, discriminator: Discriminator) -> None:
    """Sizes that the constructors were given, against those that the states gave us."""
    g_config, d_config = generator.config, discriminator.config
    ours: Mapping[str, Any] = {
        "z_dim": (g_config.latent_dim,),
        "w_dim": (g_config.w_dim,),
        "c_dim": tuple(0 if n == 1 else n for n in (g_config.num_classes, d_config.num_classes)),
        "img_resolution": (g_config.resolution, d_config.resolution),
        "img_channels": (g_config.image_channels, d_config.image_channels),
        "num_ws": (g_config.num_ws,),
    }
    for key, values in ours.items():
        theirs = case.meta.get(key)
        case.require(
            theirs is None or set(values) == {theirs}, f"{key} is {theirs} but the states say {values}"
        )


def _check_forwards(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    labels: Tensor | None,
    real: Tensor,
    allowed: _Tolerances,
) -> None:
    ws = generator.mapping(z, labels)
    case.compare("ws", ws, allowed.outputs)
    near = generator.mapping(z, labels, truncation=0.5)
    case.compare("ws_psi0.5", near, allowed.outputs)
    near = generator.mapping(z, labels, truncation=0.7, cutoff=3)
    case.compare("ws_psi0.7_cut3", near, allowed.outputs)

    fake = generator.synthesis(ws, noise="const", fused=True)
    case.compare("img_const", fake, allowed.outputs)
    case.compare("img_none", generator.synthesis(ws, noise="none", fused=True), allowed.outputs)
    difference = (fake - generator.synthesis(ws, noise="const", fused=False)).abs().max()
    case.compare("img_const_unfused_maxdiff", difference, _ROUNDING)

    features: dict[str, Tensor] = {}
    hooks = [
        discriminator.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: features.update({name: output[0]})
        )
        for name in (f"b{size}" for size in discriminator.config.resolutions[1:])
    ]
    case.compare("D_real", discriminator(real, labels), allowed.outputs)
    for hook in hooks:
        hook.remove()
    for name, value in features.items():
        key, wide = f"D_feat.{name}", value.double()
        stats = torch.stack([wide.mean(), wide.std(), wide.abs().max()])
        is_whole = key in case.arrays and case.arrays[key].ndim == value.ndim
        case.compare(key, value if is_whole else stats, allowed.outputs)
    case.compare("D_fake", discriminator(fake, labels), allowed.outputs)


def _check_generator_step(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    labels: Tensor | None,
    allowed: _Tolerances,
) -> None:
    fake = generator.synthesis(generator.mapping(z, labels), noise="const", fused=False)
    loss = F.softplus(-discriminator(fake, labels))
    loss.mean().backward()
    case.compare("Gmain_loss", loss, allowed.outputs)
    case.compare_table("Gmain_grad_norms", gradient_norms(generator), allowed.gradient_norms)


def _check_r1(
    case: Case, discriminator: Discriminator, real: Tensor, labels: Tensor | None, allowed: _Tolerances
) -> None:
    real = real.clone().requires_grad_()
    logits = discriminator(real, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = gradient.square().sum(dim=(1, 2, 3))
    case.compare("r1_penalty", penalty, allowed.outputs)
    case.compare("r1_grads", gradient[:1], allowed.outputs)
    for key in case.meta:
        if table := _R1_TABLE.fullmatch(key):
            discriminator.zero_grad()
            loss = F.softplus(-logits) + 0.5 * float(table[1]) * penalty[:, None]
            loss.mean().backward(retain_graph=True)
            case.compare_table(key, gradient_norms(discriminator), allowed.gradient_norms)


def _check_path_lengths(
    case: Case, generator: Generator, z: Tensor, labels: Tensor | None, allowed: _Tolerances
) -> None:
    noise = case.use("pl_noise").to(z.dtype)
    half = len(noise)
    ws = generator.mapping(z[:half], None if labels is None else labels[:half])
    image = generator.synthesis(ws, noise="const", fused=False)
    (gradient,) = torch.autograd.grad((image * noise).sum(), ws, create_graph=True)
    case.compare("pl_lengths", gradient.square().sum(dim=2).mean(dim=1).sqrt(), allowed.outputs)
