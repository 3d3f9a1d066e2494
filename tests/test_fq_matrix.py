"""FQ on every backbone's discriminator: explicit and injected, in all modes, and gone without a trace."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import fq
from backbones import biggan, stylegan2, ugatit
from backbones.losses import r1_penalty
from fq import CodebookOptions

MODES = ("regularize", "replace", "blend")


class Model(NamedTuple):
    """How to make a discriminator, what it takes besides pictures, and its scores."""

    make: Callable[[], nn.Module]
    layers: tuple[str, ...]
    size: int
    labels: bool
    scores: Callable[[Any], Tensor]


def of_biggan(head: str) -> Model:
    config = biggan.BigGANConfig(d_channels=4, num_classes=3, class_head=head, inplace_relu=True)
    layers = ("blocks.0.0", "blocks.2.0", "blocks.3.0")
    scores = (lambda out: out) if head == "projection" else (lambda out: torch.cat(out, dim=1))
    return Model(lambda: biggan.Discriminator(config), layers, 32, True, scores)


def of_stylegan2(architecture: str) -> Model:
    config = stylegan2.StyleGAN2Config(
        resolution=32, channel_base=256, channel_max=16, d_architecture=architecture, mbstd_group=2
    )
    return Model(lambda: stylegan2.Discriminator(config), ("b16", "b32"), 32, False, lambda out: out)


def of_ugatit() -> Model:
    config = ugatit.UGATITConfig(resolution=64, channels=4, global_layers=6)
    layers = ("model.5", "model.8", "model.11")
    return Model(lambda: ugatit.Discriminator(config, 6), layers, 64, False, lambda out: torch.cat(
        [out.logit.flatten(1), out.cam_logit], dim=1))  # fmt: skip


MODELS = {
    "biggan": of_biggan("projection"),
    "tac": of_biggan("twin"),
    "stylegan2-resnet": of_stylegan2("resnet"),
    "stylegan2-skip": of_stylegan2("skip"),
    "stylegan2-orig": of_stylegan2("orig"),
    "ugatit-global": of_ugatit(),
}


def run(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Scores; every call starts from the same spectral norm vectors."""
    kind = MODELS[name]
    arguments = (torch.arange(len(images)) % 3,) if kind.labels else ()
    return kind.scores(model(images, *arguments))


def images(name: str, seed: int) -> Tensor:
    size = MODELS[name].size
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def built(name: str, mode: str, **arguments: Any) -> tuple[nn.Module, fq.Handle]:
    """A discriminator with FQ whose codebooks have been filled by one forward."""
    torch.manual_seed(0)
    model = MODELS[name].make()
    handle = fq.attach(
        model, MODELS[name].layers, codebook_size=8, commitment_weight=3.0, mode=mode,
        options=CodebookOptions(blend_steps=4), **arguments,
    )  # fmt: skip
    run(name, model, images(name, 9))
    handle.loss()
    return model, handle


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_explicit_and_injected_gradients_agree(name, mode):
    explicit, handle = built(name, mode)
    softplus(run(name, explicit, images(name, 1))).mean().add(handle.loss()).backward()
    injected, other = built(name, mode, inject=True)
    softplus(run(name, injected, images(name, 1))).mean().backward()
    assert other.loss() == 0
    ours, theirs = gradients(injected), gradients(explicit)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.norm()) for gradient in theirs.values())
    for key, gradient in theirs.items():
        distance = float((ours[key] - gradient).norm())
        assert distance <= 1e-5 * float(gradient.norm()) + 1e-7 * largest, key
    # The commitment loss was there: without it the gradients are others.
    plain, _ = built(name, mode)
    softplus(run(name, plain, images(name, 1))).mean().backward()
    assert any(
        (theirs[key] - gradient).norm() > 1e-3 * gradient.norm() for key, gradient in gradients(plain).items()
    )
    assert {site: s.commitment > 0 for site, s in other.stats().items()} == dict.fromkeys(
        MODELS[name].layers, True
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_r1_does_not_see_the_injected_loss(name, mode):
    def penalised(inject: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model, _ = built(name, mode, inject=inject)
        codes = {key: value.clone() for key, value in model.state_dict().items() if "fq." in key}
        leaf = images(name, 2).requires_grad_()
        steepness = r1_penalty(run(name, model, leaf), leaf)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in codes.items())
        # Along a direction of its own, so that the gradient of the penalty needs no first-order pass.
        found = torch.autograd.grad(
            steepness.sum(), list(model.parameters()), allow_unused=True, create_graph=True
        )
        names = [key for key, _ in model.named_parameters()]
        return steepness.detach(), {k: g.detach() for k, g in zip(names, found, strict=True) if g is not None}

    (with_it, ours), (without, theirs) = penalised(True), penalised(False)
    assert torch.equal(with_it, without) and with_it.min() > 0
    assert ours.keys() == theirs.keys() and len(ours) > 3
    assert all(torch.equal(ours[key], gradient) for key, gradient in theirs.items())


@pytest.mark.parametrize("name", MODELS)
def test_regularized_scores_are_the_plain_ones(name):
    torch.manual_seed(0)
    plain = MODELS[name].make()
    run(name, plain, images(name, 9))
    for inject in (False, True):
        model, _ = built(name, "regularize", inject=inject)
        twin = copy.deepcopy(plain)
        assert torch.equal(run(name, model, images(name, 1)), run(name, twin, images(name, 1)))


@pytest.mark.parametrize("inject", [False, True], ids=["explicit", "injected"])
@pytest.mark.parametrize("name", MODELS)
def test_detached_it_is_what_it_was_byte_for_byte(name, inject):
    torch.manual_seed(0)
    model = MODELS[name].make().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {key: sorted(vars(module)) for key, module in model.named_modules()}
    expected = run(name, model, images(name, 1))
    handle = fq.attach(
        model, MODELS[name].layers, codebook_size=8, mode="replace", inject=inject,
        options=CodebookOptions(init="normal"),
    )  # fmt: skip
    model.train()
    with torch.no_grad():
        run(name, copy.deepcopy(model), images(name, 3))
    model.eval()
    handle.detach()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert {key: sorted(vars(module)) for key, module in model.named_modules()} == attributes
    hooked = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooked
    assert torch.equal(run(name, model, images(name, 1)), expected)


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("biggan", ("biggan", "tac")),
        ("ugatit", ("ugatit-global",)),
        ("stylegan2", ("stylegan2-resnet", "stylegan2-orig")),
    ],
)
def test_presets_recognise_our_backbones_by_structure(preset, names):
    for name in names:
        model = MODELS[name].make()
        handle = fq.attach(model, preset, codebook_size=8)
        run(name, model, images(name, 0))
        assert handle.loss() > 0
        if preset != "biggan":
            assert set(handle.names) == set(MODELS[name].layers)


def test_a_local_discriminator_is_not_taken_for_a_global_one():
    config = ugatit.UGATITConfig(resolution=64, channels=4, global_layers=6)
    with pytest.raises(ValueError, match="ugatit"):
        fq.attach(ugatit.Discriminator(config, 5), "ugatit")
