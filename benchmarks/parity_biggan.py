"""Parity of BigGAN: generator and discriminator, their gradients and their buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backbones.biggan import Discriminator, Generator, orthogonal_gradient
from backbones.convert import infer_config
from benchmarks.golden import GRADIENT_NORMS, OUTPUTS, Case, gradient_norms


def check(case: Case) -> None:
    """BigGAN pairs: eval forwards, a discriminator step, a generator step, orthogonal regularisation."""
    meta = case.meta
    g_state = {key[2:]: case.use(key) for key in case.arrays if key.startswith("G.")}
    d_state = {key[2:]: case.use(key) for key in case.arrays if key.startswith("D.")}
    g_config = _with_arguments(infer_config(g_state=g_state, resolution=meta["resolution"]), meta, "G")
    d_config = _with_arguments(infer_config(d_state=d_state, resolution=meta["resolution"]), meta, "D")
    dtype = g_state["linear.weight"].dtype
    generator, discriminator = Generator(g_config).to(dtype), Discriminator(d_config).to(dtype)
    for name, model, state in (("G", generator, g_state), ("D", discriminator, d_state)):
        model.load_state_dict(state, strict=True)
        ours = [[key, list(value.shape)] for key, value in model.state_dict().items()]
        case.require(ours == meta[f"{name}_keys"], f"the state keys of {name}, their order or shapes differ")
        parameters = [key for key, _ in model.named_parameters()]
        case.require(parameters == meta[f"{name}_params"], f"the parameters of {name} or their order differ")
    case.require(generator.latent_dim == meta["G_dim_z"], f"G takes z of width {generator.latent_dim}")

    z, y, real, real_y = (case.use(key) for key in ("z", "y", "x_real", "y_real"))
    _check_biggan_eval(case, generator.eval(), discriminator.eval(), z, y, real, real_y)
    generator.train()
    discriminator.train()
    _check_biggan_d_step(case, generator, discriminator, z, y, real, real_y)
    for name, model, state in (("G", generator, g_state), ("D", discriminator, d_state)):
        _check_buffers(case, name, model, state)
    discriminator.requires_grad_(False)
    loss = -discriminator(generator(z, generator.shared(y)), y).mean()
    loss.backward()
    case.compare("G_loss", loss, OUTPUTS)
    case.compare_table("G_step_grad_norms", gradient_norms(generator), GRADIENT_NORMS)
    orthogonal = {
        name: float(orthogonal_gradient(parameter, 1e-4).norm())
        for name, parameter in generator.named_parameters()
        if parameter.ndim >= 2 and not name.startswith("shared.")
    }
    case.compare_table("G_ortho_grad_norms_1e-4", orthogonal, GRADIENT_NORMS)


def _with_arguments(config: Any, meta: Mapping[str, Any], network: str) -> Any:
    """Add what shapes do not show, from the constructor arguments, which the files keep as text."""
    arguments = meta[f"{network}_kwargs"]
    return replace(
        config,
        inplace_relu="inplace=True" in arguments.get(f"{network}_activation", ""),
        sn_eps=float(arguments.get("SN_eps", config.sn_eps)),
    )


def _check_biggan_eval(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    y: Tensor,
    real: Tensor,
    real_y: Tensor,
) -> None:
    taps: dict[str, Tensor] = {}
    names = [key for key, _ in discriminator.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", key)]
    # Cloned at once: the head may rectify the last of them in place.
    hooks = [
        discriminator.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: taps.update({name: output.clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        case.compare("D_eval_real", discriminator(real, real_y), OUTPUTS)
        for hook in hooks:
            hook.remove()
        fake = generator(z, generator.shared(y))
        case.compare("G_eval_out", fake, OUTPUTS)
        case.compare("D_eval_fake", discriminator(fake, y), OUTPUTS)
    for name, features in taps.items():
        wide = features.double()
        stats = torch.stack([wide.mean(), wide.std(), wide.abs().max()])
        case.compare(f"D_eval_feat.{name}.stats", stats, OUTPUTS)
    last = names[-1]
    case.compare(f"D_eval_feat.{last.rpartition('.')[0]}.out", taps[last], OUTPUTS)


def _check_biggan_d_step(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    y: Tensor,
    real: Tensor,
    real_y: Tensor,
) -> None:
    with torch.no_grad():
        fake = generator(z, generator.shared(y))
    case.compare("G_train_out", fake, OUTPUTS)
    logits = discriminator(torch.cat([fake, real]), torch.cat([y, real_y]))
    on_fake, on_real = logits.split([len(fake), len(real)])
    loss_real, loss_fake = (1 - on_real).relu().mean(), (1 + on_fake).relu().mean()
    (loss_real + loss_fake).backward()
    case.compare("D_train_fake", on_fake, OUTPUTS)
    case.compare("D_train_real", on_real, OUTPUTS)
    case.compare("D_loss_real", loss_real, OUTPUTS)
    case.compare("D_loss_fake", loss_fake, OUTPUTS)
    for key in case.arrays:
        if key.startswith("D_step_grad."):
            gradient = discriminator.get_parameter(key.removeprefix("D_step_grad.")).grad
            assert gradient is not None
            case.compare(key, gradient, OUTPUTS)
    case.compare_table("D_step_grad_norms", gradient_norms(discriminator), GRADIENT_NORMS)


def _check_buffers(case: Case, network: str, model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Stored buffers changed in these forwards; all the others must have stayed."""
    for name, buffer in model.named_buffers():
        key = f"{network}_after_dstep.{name}"
        if key in case.arrays:
            case.compare(key, buffer, OUTPUTS)
        else:
            same = torch.allclose(buffer, before[name], rtol=OUTPUTS.relative, atol=OUTPUTS.of_scale)
            case.require(same, f"the buffer {network}.{name} changed but should not")
