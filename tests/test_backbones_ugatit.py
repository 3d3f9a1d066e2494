"""Behaviour of the U-GAT-IT networks, their checkpoints and their parity with stored reference results."""

import copy
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.convert_ugatit import infer_config, load_public, read_public, save_public
from backbones.ugatit import (
    ILN,
    AdaLIN,
    Discriminator,
    Generator,
    Networks,
    UGATITConfig,
    build_networks,
    clip_rho,
    max_layers,
)
from benchmarks import parity
from fq import attach

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "backbones" / "ugatit_full32.npz"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**changes):
    defaults = {"resolution": 32, "channels": 2, "num_blocks": 2, "global_layers": 5, "local_layers": 4}
    return UGATITConfig(**(defaults | changes))


def pictures(config, number=2, **options):
    return torch.randn(number, 3, config.resolution, config.resolution, **options)


def discriminator(num_layers=5, **changes):
    return Discriminator(small(**changes), num_layers)


def state_dicts(networks):
    return {name: network.state_dict() for name, network in networks._asdict().items()}


# ---- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 4}, "resolution is 4 .* multiple of 4 from 8 on"),
        ({"resolution": 66}, "resolution is 66 .* multiple of 4"),
        ({"channels": 0}, "channels is 0 but must be at least 1"),
        ({"num_blocks": 0}, "num_blocks is 0 but must be at least 1"),
        ({"resolution": 64, "global_layers": 7}, "global_layers is 7 but at 64 px .* set global_layers to 6"),
        ({"resolution": 16}, "global_layers is 5 but at 16 px .* 3 to 4 layers"),
        ({"local_layers": 2}, "local_layers is 2 but at 32 px a discriminator has 3 to 5 layers"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("resolution", [8, 12, 24, 47, 48, 64, 95, 96, 100])
def test_deepest_discriminator_works_and_a_deeper_one_would_not(resolution):
    most = max_layers(resolution)
    model = Discriminator(UGATITConfig(channels=1), most)
    assert min(model(torch.randn(1, 3, resolution, resolution)).logit.shape[2:]) >= 1
    deeper = Discriminator(UGATITConfig(channels=1), most + 1) if most < 8 else model
    with pytest.raises(ValueError, match=rf"discriminator of {most + 1} layers takes .* px on"):
        deeper(torch.randn(1, 3, resolution, resolution))
    with pytest.raises(RuntimeError):  # what would happen without that check
        deeper.pad(deeper.model(torch.randn(1, 3, resolution, resolution)))


def test_seven_layers_are_refused_at_64_px_and_six_are_fine():
    config = small(resolution=64, global_layers=6)
    with pytest.raises(ValueError, match="num_layers is 7 but at 64 px a discriminator has 3 to 6 layers"):
        Discriminator(config, 7)
    assert Discriminator(config, 6)(pictures(config)).logit.shape == (2, 1, 2, 2)


@pytest.mark.parametrize(
    ("light", "millions"),
    [(False, [279.0, 279.0, 53.13, 53.13, 3.29, 3.29]), (True, [10.6, 10.6, 53.13, 53.13, 3.29, 3.29])],
)
def test_parameter_counts_of_the_published_models(light, millions):
    with torch.device("meta"):
        networks = build_networks(UGATITConfig(light=light))
    counts = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert counts == pytest.approx(millions, rel=2e-3)


# ---- norms


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 1, 1, 2)])
def test_instance_and_layer_norm_are_mixed_with_unbiased_variances(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 40
    norm = AdaLIN(shape[1]).double()
    norm.rho.data.uniform_(0, 1)
    gamma, beta = torch.randn(2, shape[0], shape[1], dtype=torch.float64)
    channel = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
    layer = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    mixed = norm.rho * channel + (1 - norm.rho) * layer
    expected = mixed * gamma[..., None, None] + beta[..., None, None]
    torch.testing.assert_close(norm(x, gamma, beta), expected)


def test_own_gain_and_bias_start_as_plain_layer_norm():
    norm, x = ILN(3), torch.randn(2, 3, 4, 4)
    layer = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), layer, rtol=1e-5, atol=1e-6)
    nn.init.constant_(norm.gamma, 2.0)
    nn.init.constant_(norm.beta, 5.0)
    torch.testing.assert_close(norm(x), 2 * layer + 5, rtol=1e-5, atol=1e-5)


def test_norm_keeps_its_precision_on_an_offset_and_on_a_constant_map():
    norm, gamma, beta = AdaLIN(2), torch.ones(1, 2), torch.zeros(1, 2)
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(norm(x + 1000, gamma, beta), norm(x, gamma, beta), rtol=0, atol=1e-3)
    assert torch.equal(norm(torch.full((1, 2, 4, 4), 7.0), gamma, beta), torch.zeros(1, 2, 4, 4))


def test_rho_starts_as_published_and_is_clipped():
    generator = Generator(small())
    starts = {
        type(m): m.rho.detach().unique().item() for m in generator.modules() if isinstance(m, AdaLIN | ILN)
    }
    assert starts == {AdaLIN: pytest.approx(0.9), ILN: 0.0}
    rho = [p for name, p in generator.named_parameters() if name.endswith(".rho")]
    assert len(rho) == 2 * 2 + 2
    others = {n: p.clone() for n, p in generator.named_parameters() if not n.endswith(".rho")}
    before = [nn.init.uniform_(p, -1, 2).detach().clone() for p in rho]
    clip_rho(nn.Sequential(generator))  # wrapped
    for start, now in zip(before, rho, strict=True):
        assert torch.equal(now, start.clamp(0, 1)) and now.requires_grad
        assert (start < 0).any() or (start > 1).any()
    assert all(torch.equal(p, others[n]) for n, p in generator.named_parameters() if n in others)
    with pytest.raises(ValueError, match="Discriminator has no AdaLIN and no ILN"):
        clip_rho(discriminator())


# ---- generator


@pytest.mark.parametrize("light", [False, True])
def test_pictures_attention_and_gradients(light):
    generator = Generator(small(light=light))
    result = generator(pictures(generator.config))
    image, cam_logit, heatmap = result
    assert image is result.image and image.shape == (2, 3, 32, 32) and image.abs().max() <= 1
    assert cam_logit.shape == (2, 2) and heatmap.shape == (2, 1, 8, 8) and heatmap.min() >= 0
    (image.square().mean() + cam_logit.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_light_generator_pools_where_the_full_one_flattens():
    """A full generator whose first layer repeats the light one's for every place, divided by the places."""
    light = Generator(small(light=True))
    full = Generator(small())
    state = dict(light.state_dict())
    weight = state["FC.0.weight"]  # [8, 8]
    state["FC.0.weight"] = weight[:, :, None].expand(-1, -1, 64).flatten(1) / 64
    full.load_state_dict(state, strict=True)
    x = pictures(light.config)
    for ours, other in zip(full(x), light(x), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_light_generator_takes_other_sizes_and_the_full_one_does_not():
    light, full = Generator(small(light=True)), Generator(small())
    assert light(torch.randn(1, 3, 40, 24)).image.shape == (1, 3, 40, 24)
    for x in (
        torch.randn(1, 3, 30, 32),
        torch.randn(1, 3, 4, 4),
        torch.randn(1, 1, 32, 32),
        torch.randn(3, 32, 32),
    ):
        with pytest.raises(ValueError, match="multiples of 4 from 8 on for H and W"):
            light(x)
    with pytest.raises(ValueError, match=r"images have shape \(1, 3, 40, 24\) .* H and W 32"):
        full(torch.randn(1, 3, 40, 24))


def test_gain_and_bias_come_from_the_picture():
    generator = Generator(small())
    seen = []
    generator.UpBlock1_1.register_forward_hook(lambda module, args, out: seen.append(args[1:]))
    generator(pictures(generator.config))
    ((gamma, beta),) = seen
    assert gamma.shape == beta.shape == (2, 8)
    assert not torch.equal(gamma[0], gamma[1])


# ---- spectral norm and attention of the discriminator


def test_normalised_weight_is_what_the_power_iteration_says():
    conv = discriminator().model[4]
    u, matrix = conv.weight_u.clone(), conv.weight_orig.detach().flatten(1)
    normalised = conv.normalised_weight()
    v = F.normalize(matrix.t() @ u, dim=0)
    u = F.normalize(matrix @ v, dim=0)
    torch.testing.assert_close(conv.weight_v, v)
    torch.testing.assert_close(conv.weight_u, u)
    torch.testing.assert_close(normalised, conv.weight_orig / (u @ matrix @ v))
    for _ in range(300):
        conv.normalised_weight()
    largest = torch.linalg.matrix_norm(conv.normalised_weight().detach().flatten(1), ord=2)
    assert float(largest) == pytest.approx(1, rel=1e-4)


def test_singular_vectors_move_in_train_mode_only():
    model = discriminator()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(before) == 2 * (4 + 3)
    model.eval()(pictures(model.config))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    with torch.no_grad():
        model.train()(pictures(model.config))
    assert not any(torch.equal(b, before[n]) for n, b in model.named_buffers() if b.numel() > 1)


def test_gradient_flows_through_sigma_with_constant_vectors():
    conv = discriminator().model[1].eval()
    cotangent = torch.randn_like(conv.weight_orig)
    (gradient,) = torch.autograd.grad((conv.normalised_weight() * cotangent).sum(), conv.weight_orig)
    weight = conv.weight_orig.detach()
    sigma = conv.weight_u @ weight.flatten(1) @ conv.weight_v
    outer = torch.outer(conv.weight_u, conv.weight_v).reshape(weight.shape)
    expected = (cotangent - (cotangent * weight).sum() / sigma * outer) / sigma
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_logits_see_the_normalised_weight_and_the_map_the_stored_one():
    model = discriminator().eval()
    x = pictures(model.config)
    before = model(x)
    model.gap_fc.weight_u.mul_(2)  # doubles sigma
    after = model(x)
    torch.testing.assert_close(after.cam_logit[:, 0], before.cam_logit[:, 0] / 2)
    assert torch.equal(after.cam_logit[:, 1], before.cam_logit[:, 1])
    assert torch.equal(after.heatmap, before.heatmap) and torch.equal(after.logit, before.logit)
    with torch.no_grad():
        model.gmp_fc.weight_orig.mul_(3)  # sigma follows: the logit stays
    scaled = model(x)
    torch.testing.assert_close(scaled.cam_logit, after.cam_logit)
    assert (scaled.heatmap - after.heatmap).abs().max() > 1e-3


def test_features_are_the_outputs_of_in_place_rectifiers():
    model = discriminator(resolution=64, global_layers=6, num_layers=6)
    seen = {}
    for name, module in model.model.named_children():
        if isinstance(module, nn.LeakyReLU):
            assert module.inplace and module.negative_slope == 0.2
            module.register_forward_hook(lambda m, a, out, name=name: seen.update({int(name): out.shape[1:]}))
    model(torch.randn(1, 3, 64, 64))
    assert seen == {2: (2, 32, 32), 5: (4, 16, 16), 8: (8, 8, 8), 11: (16, 4, 4), 14: (32, 3, 3)}


def test_images_that_do_not_fit_are_refused():
    model = discriminator()
    with pytest.raises(ValueError, match=r"images have shape \(2, 1, 32, 32\) .* of 5 layers takes"):
        model(torch.randn(2, 1, 32, 32))
    with pytest.raises(ValueError, match="from 24 px on"):
        model(torch.randn(2, 3, 32, 23))
    assert model(torch.randn(2, 3, 24, 60)).logit.shape == (2, 1, 1, 5)


# ---- differentiation, hooks, copies


def test_second_derivatives_are_right():
    model = Discriminator(small(resolution=8, channels=1, global_layers=3, local_layers=3), 3).double().eval()
    names = [name for name, _ in model.named_parameters()]

    def judge(x, *parameters):
        judged = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        return judged.logit, judged.cam_logit

    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(judge, (x, *parameters))
    assert torch.autograd.gradgradcheck(judge, (x, *parameters))


def test_gradient_penalty_reaches_all_weights_in_train_mode():
    model = discriminator()
    x = pictures(model.config).requires_grad_()
    judged = model(x)
    (gradient,) = torch.autograd.grad(judged.logit.sum() + judged.cam_logit.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    weights = {n: p for n, p in model.named_parameters() if "weight" in n}
    assert len(weights) == 4 + 4
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights.values())


def test_two_forwards_before_one_backward_give_the_sum_of_gradients():
    together = discriminator()
    apart = copy.deepcopy(together)
    first, second = pictures(together.config), pictures(together.config)
    (together(first).logit.sum() + together(second).logit.sum()).backward()
    for x in (first, second):
        apart(x).logit.sum().backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_a_train_forward_leaves_the_graph_of_an_eval_forward_intact():
    model = discriminator().eval()
    x = pictures(model.config)
    expected = torch.autograd.grad(model(x).logit.sum(), model.conv.weight_orig)[0]
    logit = model(x).logit
    model.train()(x)
    assert torch.equal(torch.autograd.grad(logit.sum(), model.conv.weight_orig)[0], expected)


@pytest.mark.parametrize("place", ["model.2", "model.5", "model.11", "leaky_relu"])
def test_a_hook_may_replace_the_output_of_a_rectifier(place):
    model = discriminator().eval()
    x = pictures(model.config).requires_grad_()
    plain = model(x)
    hook = model.get_submodule(place).register_forward_hook(
        lambda module, args, out: out + (out.round() - out).detach()
    )
    replaced = model(x)
    hook.remove()
    assert (replaced.logit - plain.logit).abs().max() > 1e-4
    assert torch.equal(model(x).logit, plain.logit)
    (gradient,) = torch.autograd.grad(replaced.logit.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("mode", ["regularize", "replace"])
def test_feature_quantisation_attaches_to_the_rectifiers(mode):
    model = discriminator()
    state, x = copy.deepcopy(model.state_dict()), pictures(model.config)
    handle = attach(model, ["model.5", "model.8", "model.11"], codebook_size=4, mode=mode)
    (model(x).logit.square().mean() + model(x * 0.5).logit.square().mean() + handle.loss()).backward()
    gradient = model.model[1].weight_orig.grad
    assert gradient.isfinite().all() and gradient.any()
    handle.detach()
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_after_a_forward_are_equal_and_independent(way):
    generator, model = Generator(small()), discriminator()
    x = pictures(model.config)
    model(generator(x).image).logit.sum().backward()
    other_g, other_d = way(generator).eval(), way(model).eval()
    expected = generator.eval()(x).image, model.eval()(x).logit
    for network in (generator, model):
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(other_g(x).image, expected[0])
    assert torch.equal(other_d(x).logit, expected[1])


def test_autocast_leaves_the_singular_vectors_in_float32():
    plain = discriminator()
    cast, x = copy.deepcopy(plain), pictures(plain.config)
    plain(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(x)
        image = Generator(small())(x).image
    for (name, one), other in zip(plain.named_buffers(), cast.buffers(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other), name
    assert image.isfinite().all()


# ---- checkpoints


@pytest.fixture(scope="module", params=[False, True], ids=["full", "light"])
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(3)
    networks = build_networks(small(light=request.param))
    path = tmp_path_factory.mktemp("public") / "model.pt"
    save_public(path, state_dicts(networks))
    return path, networks


def test_saved_networks_come_back_to_the_bit(checkpoint):
    path, networks = checkpoint
    loaded = load_public(path, resolution=32)
    assert loaded.genA2B.config == networks.genA2B.config == small(light=networks.genA2B.config.light)
    x = pictures(small())
    for name, network in networks._asdict().items():
        ours, theirs = getattr(loaded, name), network.state_dict()
        assert list(ours.state_dict()) == list(theirs)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())
        assert [p.requires_grad for p in ours.parameters()] == [True] * len(list(network.parameters()))
        assert torch.equal(ours.eval()(x)[0], copy.deepcopy(network).eval()(x)[0])
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_file_written_elsewhere_loads_whatever_stands_beside(tmp_path):
    networks = build_networks(small())
    shared = networks.disLA.state_dict()
    states = state_dicts(networks) | {"disLB": shared}
    torch.save(
        {"step": 3} | dict(reversed(states.items())), tmp_path / "m.pt", _use_new_zipfile_serialization=False
    )
    assert list(read_public(tmp_path / "m.pt")) == list(Networks._fields)
    loaded = load_public(tmp_path / "m.pt")
    nn.init.zeros_(loaded.disLA.conv.weight_orig)
    assert torch.equal(loaded.disLB.conv.weight_orig, shared["conv.weight_orig"])


def test_light_model_of_unknown_resolution_is_taken_for_256_px(checkpoint):
    path, networks = checkpoint
    config = load_public(path).genA2B.config
    assert config.resolution == (256 if networks.genA2B.config.light else 32)


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path, checkpoint):
    path, networks = checkpoint
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.pt"):
        load_public(tmp_path / "absent.pt")
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.pt is not a plain tensor file or is truncated"):
        load_public(tmp_path / "half.pt")
    states = state_dicts(networks)
    for content, message in [
        (
            {k: v for k, v in states.items() if k not in ("disGB", "disLB")},
            r"lacks disGB, disLB \(it holds genA2B",
        ),
        ([1], r"lacks genA2B, .* \(it holds a list\)"),
        (states | {"disLA": [1]}, r"disLA in .* is not a state dict"),
        (
            states | {"genB2A": {"x": torch.zeros(2, dtype=torch.int64)}},
            r"genB2A in .* not a state dict .floating tensors",
        ),
    ]:
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_public(tmp_path / "bad.pt")


class _RunsACommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    states = state_dicts(build_networks(small()))
    torch.save(states | {"extra": _RunsACommand(tmp_path / "made")}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt is not a plain tensor file"):
        load_public(tmp_path / "m.pt")
    assert not (tmp_path / "made").exists()


def test_first_differing_keys_are_named_with_both_shapes(tmp_path):
    states = state_dicts(build_networks(small()))
    other = dict(states["disGB"])
    other["model.4.weight_orig"] = torch.zeros(4, 3, 4, 4)
    del other["model.4.weight_u"]
    other["model.5.fq.codebook"] = torch.zeros(4, 4)
    with pytest.raises(ValueError) as caught:
        save_public(tmp_path / "m.pt", states | {"disGB": other})
    assert not list(tmp_path.iterdir())
    torch.save(states | {"disGB": other}, tmp_path / "m.pt")
    with pytest.raises(ValueError) as again:
        load_public(tmp_path / "m.pt")
    assert str(again.value) == str(caught.value)
    for part in (
        "disGB is not a network of U-GAT-IT",
        "model.4.weight_orig is [4, 3, 4, 4] but [4, 2, 4, 4] was expected",
        "model.4.weight_u is missing but [4] was expected",
        "model.5.fq.codebook is [4, 4] but unknown was expected",
        "without attached quantisers",
    ):
        assert part in str(caught.value)


def test_an_unfinished_file_is_not_left_behind(tmp_path, monkeypatch):
    states = state_dicts(build_networks(small()))
    save_public(tmp_path / "m.pt", states)
    whole = (tmp_path / "m.pt").read_bytes()

    def fail(content, file):
        file.write(b"part")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_public(tmp_path / "m.pt", states)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == whole


def test_missing_network_is_not_saved(tmp_path):
    states = state_dicts(build_networks(small()))
    del states["genB2A"]
    with pytest.raises(ValueError, match="states lacks genB2A"):
        save_public(tmp_path / "m.pt", states)


CONFIGS = [
    UGATITConfig(),
    UGATITConfig(light=True, channels=32, num_blocks=6),
    small(),
    small(resolution=64, num_blocks=1, global_layers=6, local_layers=3),
    small(resolution=8, channels=1, global_layers=3, local_layers=3),
    small(light=True, channels=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.resolution}px-{c.channels}ch-{c.light}")
def test_configuration_is_recovered_from_shapes(config):
    with torch.device("meta"):
        states = state_dicts(build_networks(config))
    assert infer_config(states, resolution=config.resolution) == config
    alone = infer_config({"disLB": states["disLB"]}, resolution=config.resolution)
    assert (alone.local_layers, alone.channels) == (config.local_layers, config.channels)
    assert alone.global_layers == min(7, max_layers(config.resolution))
    alone = infer_config({"genB2A": states["genB2A"]}, resolution=config.resolution)
    assert (alone.light, alone.num_blocks) == (config.light, config.num_blocks)


def test_states_that_do_not_fit_are_refused():
    states = state_dicts(build_networks(small()))
    with pytest.raises(ValueError, match="states is empty: pass at least one of genA2B"):
        infer_config({})
    with pytest.raises(ValueError, match="states names 'G' but the networks are genA2B"):
        infer_config({"G": states["genA2B"]})
    with pytest.raises(ValueError, match="genA2B says resolution 32 but the resolution argument says 64"):
        infer_config(states, resolution=64)
    with pytest.raises(ValueError, match="disGB says global_layers 4 but disGA says 5"):
        infer_config(states | {"disGB": states["disLA"]})
    with pytest.raises(ValueError, match=r"disGA has no model\.1\.weight_orig: .* prefix such as 'module\.'"):
        infer_config({"disGA": {f"module.{k}": v for k, v in states["disGA"].items()}})
    with pytest.raises(ValueError, match=r"genA2B has no DownBlock\.1\.weight"):
        infer_config({"genA2B": states["disGA"]})
    with pytest.raises(ValueError, match=r"FC\.0\.weight of genA2B reads 500 numbers .* of 8 channels"):
        infer_config({"genA2B": states["genA2B"] | {"FC.0.weight": torch.zeros(8, 500)}})
    with pytest.raises(
        ValueError, match=r"FC\.0\.weight of genA2B has shape \[8\] but a weight has two axes"
    ):
        infer_config({"genA2B": states["genA2B"] | {"FC.0.weight": torch.zeros(8)}})


# ---- parity with stored reference results


def run(capsys, path):
    code = parity.main([str(path)])
    return code, capsys.readouterr().out.splitlines()


def test_state_keys_have_the_public_order_and_shapes():
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is not here")
    meta = json.loads(str(np.load(GOLDEN)["meta_json"]))
    models = {
        "G": Generator(small(channels=8)),
        "D5": Discriminator(small(channels=8), 5),
        "D7": Discriminator(UGATITConfig(channels=4), 7),
    }
    for name, model in models.items():
        assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == meta[f"{name}_keys"]


def test_stored_reference_is_reproduced(capsys):
    if not GOLDEN.is_file():
        pytest.skip(f"{GOLDEN} is not here")
    code, lines = run(capsys, GOLDEN)
    assert code == 0 and "59 of 59 arrays" in lines[0], lines


def stored(networks, inputs):
    """What the reference run stores, from our own networks: it exercises the checker, not the numbers."""
    arrays, meta = {}, {}
    for name, model in networks.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
        arrays |= {f"{name}.{k}": v.clone() for k, v in model.state_dict().items()}
        meta[f"{name}_keys"] = [[k, list(v.shape)] for k, v in model.state_dict().items()]
        if name == "G":
            arrays["G_x"] = inputs[name]
            arrays["G_out"], arrays["G_cam_logit"], arrays["G_heatmap"] = model(inputs[name])
            (arrays["G_out"].square().mean() + arrays["G_cam_logit"].square().mean()).backward()
            table = "G_grad_norms(mean(out^2)+mean(cam^2))"
            rho = [p.detach() for n, p in model.named_parameters() if n.endswith("rho")]
            arrays["G_rho_clipped_sum"] = sum(p.clamp(0, 1).double().sum() for p in rho)
        else:
            arrays |= discriminator_results(name, model, inputs[name])
            table = f"{name}_train_grad_norms(lsgan real)"
        meta[table] = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    return {key: torch.as_tensor(value).detach().numpy() for key, value in arrays.items()}, meta


def discriminator_results(name, model, x):
    arrays, features = {f"{name}.x": x}, {}
    for layer, module in model.named_modules():
        if isinstance(module, nn.LeakyReLU) and layer.startswith("model."):
            # Cloned, as the next module could write into it.
            module.register_forward_hook(
                lambda m, a, out, layer=layer: features.update({layer: out.detach().clone()})
            )
    with torch.no_grad():
        results = zip(("out", "cam", "heatmap"), model.eval()(x), strict=True)
        arrays |= {f"{name}.eval_{key}": value for key, value in results}
    for layer, value in features.items():
        stats = torch.stack([value.mean(), value.std()])
        arrays[f"{name}.eval_feat.{layer}.stats"] = torch.cat([torch.tensor(value.shape), stats])
    out, cam, _ = model.train()(x)
    arrays |= {f"{name}.train_out": out, f"{name}.train_cam": cam}
    ((out - 1).square().mean() + (cam - 1).square().mean()).backward()
    return arrays | {f"{name}.after.{k}": v.clone() for k, v in model.named_buffers()}


@pytest.fixture
def other_file(tmp_path):
    """A light generator of another width and depth, discriminators of 3 and 6 layers, all in float64."""
    networks = {
        "G": Generator(
            small(resolution=20, light=True, channels=3, num_blocks=3, global_layers=3, local_layers=3)
        ),
        "D3": Discriminator(UGATITConfig(channels=2), 3),
        "D6": Discriminator(UGATITConfig(channels=1), 6),
    }
    sizes = {"G": (20, 20), "D3": (18, 30), "D6": (54, 54)}
    inputs = {name: torch.randn(2, 3, *size, dtype=torch.float64) for name, size in sizes.items()}
    arrays, meta = stored({name: network.double() for name, network in networks.items()}, inputs)

    def write(**changes):
        np.savez(tmp_path / "nameless.npz", **(arrays | changes), meta_json=np.array(json.dumps(meta)))
        return tmp_path / "nameless.npz"

    return arrays, write


def test_other_files_are_understood(capsys, other_file):
    code, lines = run(capsys, other_file[1]())
    assert code == 0, lines
    done, total = re.search(r"ugatit  (\d+) of (\d+) arrays", lines[0]).groups()
    assert done == total and int(total) > 40


@pytest.mark.parametrize(
    "key",
    [
        "G_out",
        "G_heatmap",
        "G_cam_logit",
        "G_rho_clipped_sum",
        "D3.eval_heatmap",
        "D6.eval_feat.model.5.stats",
        "D6.train_cam",
        "D6.after.model.4.weight_u",
        "G.UpBlock2.8.gamma",
        "D6.gmp_fc.weight_orig",
    ],
)
def test_an_altered_number_fails(capsys, other_file, key):
    arrays, write = other_file
    value = arrays[key].copy()
    value.flat[-1] += 1e-2 * (np.abs(value).max() or 1)
    code, lines = run(capsys, write(**{key: value}))
    assert code == 1
    assert lines[0].startswith("FAIL") and "is off" in lines[0]


def test_an_array_that_nobody_reproduces_fails_by_name(capsys, other_file):
    code, lines = run(capsys, other_file[1](**{"D6.eval_surprise": np.zeros(3)}))
    assert code == 1 and "not reproduced: D6.eval_surprise" in lines[0]
