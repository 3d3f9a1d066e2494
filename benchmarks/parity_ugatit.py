"""Parity of U-GAT-IT: a generator and discriminators of any depth, their gradients and spectral norms."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from backbones.convert_ugatit import infer_config
from backbones.ugatit import Discriminator, Generator, clip_rho
from benchmarks.golden import GRADIENT_NORMS, OUTPUTS, Case, gradient_norms

_RESULTS = re.compile(r"x|eval_.+|train_.+|after\..+|step_.+")


def check(case: Case) -> None:
    """U-GAT-IT networks: forwards, gradients, clipped mixtures; power iteration of the discriminators."""
    if any(key.startswith("G.") for key in case.arrays):
        _check_generator(case)
    depths = {int(match[1]) for key in case.arrays if (match := re.match(r"D(\d+)\.", key))}
    for depth in sorted(depths):
        _check_discriminator(case, depth)


def _check_generator(case: Case) -> None:
    state = {key[2:]: case.use(key) for key in case.arrays if key.startswith("G.")}
    x = case.use("G_x")
    generator = Generator(infer_config({"genA2B": state}, resolution=x.shape[-1]))
    _load(case, "G", generator, state)
    result = generator(x)
    for name, value in result._asdict().items():
        case.compare({"image": "G_out"}.get(name, f"G_{name}"), value, OUTPUTS)
    (result.image.square().mean() + result.cam_logit.square().mean()).backward()
    _compare_norms(case, "G_grad_norms", generator)
    clip_rho(generator)
    rho = [parameter for name, parameter in generator.named_parameters() if name.endswith("rho")]
    case.compare("G_rho_clipped_sum", torch.stack([value.double().sum() for value in rho]).sum(), OUTPUTS)


def _check_discriminator(case: Case, depth: int) -> None:
    prefix = f"D{depth}."
    names = [key.removeprefix(prefix) for key in case.arrays if key.startswith(prefix)]
    state = {name: case.use(prefix + name) for name in names if not _RESULTS.fullmatch(name)}
    x = case.use(prefix + "x")
    # It takes pictures of any size; the configuration, which also describes a generator, a multiple of 4.
    size = min(x.shape[2:])
    config = infer_config({"disGA": state}, resolution=size + -size % 4)
    discriminator = Discriminator(config, config.global_layers)
    _load(case, prefix[:-1], discriminator, state)

    discriminator.eval()
    features: dict[str, Tensor] = {}
    # Cloned at once: the next module may write into what it is given.
    hooks = [
        module.register_forward_hook(
            lambda _module, _args, output, name=name: features.update({name: output.clone()})
        )
        for name, module in discriminator.named_modules()
        if f"{prefix}eval_feat.{name}.stats" in case.arrays
    ]
    with torch.no_grad():
        judged = discriminator(x)
    for hook in hooks:
        hook.remove()
    for name, value in judged._asdict().items():
        case.compare(prefix + "eval_" + _short(name), value, OUTPUTS)
    for name, value in features.items():
        wide = value.double()
        stats = torch.tensor([*value.shape, wide.mean(), wide.std()], dtype=torch.float64)
        key = f"{prefix}eval_feat.{name}.stats"
        case.compare(key, stats, OUTPUTS)
        # Beside the shape, which sets the scale of that array, mean and spread would be compared loosely.
        for label, ours, expected in zip(("mean", "std"), stats[-2:], case.arrays[key][-2:], strict=True):
            case.compare_number(f"{key} ({label})", float(ours), float(expected), OUTPUTS)
    for name, buffer in discriminator.named_buffers():
        case.require(torch.equal(buffer, state[name]), f"an eval-mode forward changed {prefix}{name}")
    _check_train_step(case, prefix, discriminator.train(), state, x)


def _check_train_step(
    case: Case, prefix: str, discriminator: Discriminator, state: Mapping[str, Tensor], x: Tensor
) -> None:
    judged = discriminator(x)
    for name, value in judged._asdict().items():
        case.compare(prefix + "train_" + _short(name), value, OUTPUTS)
    loss = (judged.logit - 1).square().mean() + (judged.cam_logit - 1).square().mean()
    loss.backward()
    _compare_norms(case, f"{prefix[:-1]}_train_grad_norms", discriminator)
    for name, buffer in discriminator.named_buffers():
        key = f"{prefix}after.{name}"
        case.compare(key, buffer, OUTPUTS)
        same = torch.allclose(buffer, state[name], rtol=OUTPUTS.relative, atol=OUTPUTS.of_scale)
        case.require(same or key in case.arrays, f"the buffer {prefix}{name} changed but should not")


def _short(field: str) -> str:
    return {"logit": "out", "cam_logit": "cam"}.get(field, field)


def _load(case: Case, name: str, network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Strict load in the file's type, after comparing keys, their order and shapes."""
    network.to(next(iter(state.values())).dtype).load_state_dict(dict(state), strict=True)
    ours = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    case.require(ours == case.meta[f"{name}_keys"], f"the state keys of {name}, their order or shapes differ")


def _compare_norms(case: Case, start: str, network: nn.Module) -> None:
    """Compare the table of norms whose key begins like this; it ends with the loss in brackets."""
    keys = [key for key in case.meta if key.partition("(")[0] == start]
    case.require(len(keys) == 1, f"one table {start} was expected, found {len(keys)}")
    for key in keys:
        case.compare_table(key, gradient_norms(network), GRADIENT_NORMS)
