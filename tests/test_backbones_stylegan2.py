"""Behaviour of the StyleGAN2 networks, and their numbers beside those of the original."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fq
from backbones import stylegan2
from backbones.stylegan2 import (
    Discriminator,
    EqualisedConv2d,
    Generator,
    StyleGAN2Config,
    blur,
    minibatch_std,
    modulated_conv2d,
    upsample,
)
from benchmarks import parity

LOCAL = Path(__file__).parent / "data" / "golden" / "backbones"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "backbones"
ARCHITECTURES = ("skip", "resnet", "orig")
TAPS = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**changes):
    sizes = {"resolution": 8, "latent_dim": 5, "w_dim": 6, "mapping_layers": 2, "d_mapping_layers": 2}
    return StyleGAN2Config(**(sizes | {"channel_base": 32, "channel_max": 6} | changes))


def pictures(config, number=4):
    return torch.randn(number, config.image_channels, config.resolution, config.resolution)


def stirred(model):
    """Noise strengths and biases start at zero, where nothing would be seen of them."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


# ---- numbers of the original


@pytest.mark.parametrize(
    "path", [LOCAL / "stylegan2_32_cond_cifar.npz", SHARED / "stylegan2_32_uncond.npz"], ids=lambda p: p.stem
)
def test_numbers_of_the_original_are_reproduced(path):
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    status, kind, line = parity.check_file(path, ())
    assert (status, kind) == ("pass", "stylegan2"), line
    assert "  18 of 18 arrays  " in line


def from_ours(path, config, arguments, dtype):
    """What the files hold, from our own networks: it exercises the checker, not the numbers."""
    generator, discriminator = (stirred(kind(config)).to(dtype) for kind in (Generator, Discriminator))
    networks = {"G": generator, "D": discriminator}
    arrays = {f"{n}.{k}": v.clone() for n, m in networks.items() for k, v in m.state_dict().items()}
    classes = config.num_classes if config.num_classes > 1 else 0
    z = torch.randn(4, config.latent_dim, dtype=dtype)
    c = F.one_hot(torch.arange(4) % max(classes, 1), max(classes, 1)).to(dtype)[:, :classes]
    labels, real = (c if classes else None), pictures(config).to(dtype)
    taps = {}
    for name, module in discriminator.named_children():
        if name.startswith("b") and name != "b4":
            module.register_forward_hook(
                lambda m, a, out, name=name: taps.update({name: taps.get(name, out[0])})
            )
    with torch.no_grad():
        ws = generator.mapping(z, labels)
        fake = generator.synthesis(ws, noise="const", fused=True)
        plain = generator.synthesis(ws, noise="const", fused=False)
        arrays |= {"z": z, "c": c, "x_real": real, "ws": ws, "img_const": fake}
        arrays["ws_psi0.5"] = generator.mapping.w_avg.lerp(ws, 0.5)
        arrays["ws_psi0.7_cut3"] = torch.cat([generator.mapping.w_avg.lerp(ws, 0.7)[:, :3], ws[:, 3:]], 1)
        arrays["img_none"] = generator.synthesis(ws, noise="none", fused=True)
        arrays["img_const_unfused_maxdiff"] = (fake - plain).abs().max()
        arrays |= {"D_real": discriminator(real, labels), "D_fake": discriminator(fake, labels)}
        arrays |= {f"D_feat.{name}": value for name, value in taps.items()}
        arrays["w_avg_after"] = ws[:, 0].mean(0).lerp(generator.mapping.w_avg, 0.995)
    loss = F.softplus(-discriminator(generator(z, labels, noise="const"), labels))
    loss.mean().backward()
    norms = {"Gmain_grad_norms": {k: p.grad.norm().item() for k, p in generator.named_parameters()}}
    discriminator.zero_grad()
    x = real.clone().requires_grad_()
    logits = discriminator(x, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = gradient.square().sum((1, 2, 3))
    (F.softplus(-logits) + 5 * penalty[:, None]).mean().backward()
    norms["Dreal_plus_R1_gamma10_grad_norms"] = {
        k: p.grad.norm().item() for k, p in discriminator.named_parameters()
    }
    arrays |= {"Gmain_loss": loss, "r1_penalty": penalty, "r1_grads": gradient[:1]}
    noise = torch.randn(2, *fake.shape[1:], dtype=dtype) / config.resolution
    ws = generator.mapping(z[:2], None if labels is None else labels[:2])
    image = generator.synthesis(ws, noise="const", fused=False)
    (gradient,) = torch.autograd.grad((image * noise).sum(), ws)
    arrays |= {"pl_noise": noise, "pl_lengths": gradient.square().sum(2).mean(1).sqrt()}
    meta = {"z_dim": config.latent_dim, "c_dim": classes, "num_ws": config.num_ws} | arguments | norms
    for name, model in networks.items():
        meta[f"{name}_keys"] = [[k, list(v.shape)] for k, v in model.state_dict().items()]
        meta[f"{name}_params"] = [k for k, _ in model.named_parameters()]
    np.savez(path, meta_json=json.dumps(meta), **{k: v.detach().numpy() for k, v in arrays.items()})


@pytest.mark.parametrize(
    ("g_architecture", "d_architecture", "changes", "dtype"),
    [
        ("skip", "resnet", {"mbstd_group": 0, "mbstd_channels": 2}, torch.float64),
        ("resnet", "skip", {"conv_clamp": 0.5, "num_classes": 3}, torch.float64),
        ("orig", "orig", {"resolution": 32, "channel_base": 128, "mbstd_group": 2}, torch.float32),
    ],
)
def test_other_files_are_understood(tmp_path, g_architecture, d_architecture, changes, dtype):
    config = small(g_architecture=g_architecture, d_architecture=d_architecture, **changes)
    arguments = {
        "G_kwargs": {"synthesis_kwargs": {"conv_clamp": config.conv_clamp}},
        "D_kwargs": {
            "conv_clamp": config.conv_clamp,
            "epilogue_kwargs": {"mbstd_group_size": config.mbstd_group or None},
        },
    }
    from_ours(tmp_path / "nameless.npz", config, arguments, dtype)
    status, kind, line = parity.check_file(tmp_path / "nameless.npz", ())
    assert (status, kind) == ("pass", "stylegan2"), line


@pytest.mark.parametrize("key", ["img_none", "D_feat.b8", "r1_grads", "pl_lengths", "w_avg_after"])
def test_an_altered_number_fails(tmp_path, key):
    source = LOCAL / "stylegan2_32_cond_cifar.npz"
    with np.load(source) as archive:
        arrays = {name: archive[name] for name in archive.files}
    place = np.unravel_index(np.abs(arrays[key]).argmax(), arrays[key].shape)
    arrays[key] = arrays[key].copy()
    arrays[key][place] *= 1.001
    np.savez(tmp_path / "copy.npz", **arrays)
    status, _, line = parity.check_file(tmp_path / "copy.npz", ())
    assert status == "fail" and f"{key} is off" in line


# ---- shapes


@pytest.mark.parametrize(
    ("resolution", "base", "g_millions", "d_millions", "num_ws"),
    [
        (32, 16384, 21.5, 21.5, 8),
        (64, 16384, 23.8, 23.4, 10),
        (128, 16384, 24.5, 23.9, 12),
        (256, 16384, 24.8, 24.0, 14),
        (512, 16384, 24.9, 24.0, 16),
        (1024, 16384, 24.9, 24.0, 18),
        (1024, 32768, 30.4, 29.0, 18),
    ],
)
def test_parameter_counts_of_the_published_models(resolution, base, g_millions, d_millions, num_ws):
    config = StyleGAN2Config(resolution=resolution, channel_base=base)
    with torch.device("meta"):
        models = Generator(config), Discriminator(config)
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    assert counts == pytest.approx([g_millions, d_millions], abs=0.051)
    assert config.num_ws == num_ws


def test_channels_follow_the_table():
    config = StyleGAN2Config(resolution=1024)
    table = {1024: 16, 512: 32, 256: 64, 128: 128, 64: 256, 32: 512, 16: 512, 8: 512, 4: 512}
    assert {size: config.channels(size) for size in config.resolutions} == table
    assert StyleGAN2Config(resolution=1024, channel_base=32768).channels(1024) == 32


@pytest.mark.parametrize(
    ("g_architecture", "d_architecture"), [("skip", "orig"), ("resnet", "resnet"), ("orig", "skip")]
)
@pytest.mark.parametrize(
    "changes", [{}, {"resolution": 32, "num_classes": 3, "image_channels": 1, "channel_base": 64}]
)
def test_every_architecture_makes_and_judges_its_pictures(g_architecture, d_architecture, changes):
    config = small(g_architecture=g_architecture, d_architecture=d_architecture, **changes)
    generator, discriminator = Generator(config), Discriminator(config)
    labels = torch.tensor([0, 2, 1, 0])
    images = generator(torch.randn(4, 5), labels)
    assert images.shape == pictures(config).shape
    logits = discriminator(images, labels)
    assert logits.shape == (4, 1)
    logits.sum().backward()
    untouched = [n for n, p in generator.named_parameters() if p.grad is None]
    untouched += [n for n, p in discriminator.named_parameters() if p.grad is None]
    assert untouched == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "resolution is 48 but must be a power of two from 8 up"),
        ({"resolution": 4}, "resolution is 4 but"),
        ({"num_classes": 0}, "num_classes is 0 but must be at least 1"),
        ({"mapping_layers": 0}, "mapping_layers is 0"),
        ({"g_architecture": "deep"}, "g_architecture is 'deep' but must be 'skip', 'resnet' or 'orig'"),
        ({"d_architecture": ""}, "d_architecture is ''"),
        ({"conv_clamp": 0}, "conv_clamp is 0 but must be None or above 0"),
        ({"conv_clamp": float("inf")}, "conv_clamp is inf"),
        ({"channel_base": 7}, "channel_base is 7 but must be at least 8"),
        ({"mbstd_group": -1}, r"mbstd_group is -1 but must be 0 \(whole batch\)"),
        ({"mbstd_channels": 4}, "mbstd_channels is 4 but must be 0 or divide the 6 channels"),
        ({"mbstd_channels": -1}, "mbstd_channels is -1"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_calls_with_wrong_inputs_are_refused():
    config = small(num_classes=3)
    generator, discriminator = Generator(config), Discriminator(config)
    z, labels, x = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), pictures(config)
    with pytest.raises(ValueError, match=r"z is \(4, 7\) but must be \[batch, 5\]"):
        generator(torch.randn(4, 7), labels)
    with pytest.raises(ValueError, match="z is None"):
        generator.mapping(None, labels)
    with pytest.raises(ValueError, match="labels are missing but this network has 3 classes"):
        generator(z)
    with pytest.raises(ValueError, match=r"labels are torch.int64 of shape \(3,\)"):
        generator(z, labels[:3])
    with pytest.raises(ValueError, match=r"labels are torch.float32 of shape \(4,\)"):
        discriminator(x, labels.float())
    with pytest.raises(ValueError, match=r"cutoff is 5 but must be 0 to 4"):
        generator(z, labels, cutoff=5)
    with pytest.raises(ValueError, match=r"ws have shape \(4, 3, 6\) .* \[batch, 4, 6\]"):
        generator.synthesis(torch.randn(4, 3, 6))
    with pytest.raises(ValueError, match="noise is 'loud'"):
        generator(z, labels, noise="loud")
    with pytest.raises(ValueError, match=r"images have shape \(4, 3, 16, 16\) .* \[batch, 3, 8, 8\]"):
        discriminator(torch.randn(4, 3, 16, 16), labels)
    with pytest.raises(ValueError, match="batch of 6 images cannot be cut into groups of 4"):
        discriminator(pictures(config, 6), torch.zeros(6, dtype=torch.long))


# ---- resampling


def test_upsampling_is_zeros_between_pixels_and_the_filter():
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    spread = torch.zeros(2, 3, 13, 13, dtype=torch.float64)
    spread[:, :, 2:12:2, 2:12:2] = x
    expected = 4 * F.conv2d(spread, TAPS.double().expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(upsample(x, TAPS), expected, rtol=0, atol=0)
    inner = upsample(torch.ones(1, 1, 4, 4), TAPS)[0, 0, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones(6, 6))


def test_halving_is_the_adjoint_of_doubling():
    x, y = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        (upsample(x, TAPS) * y).sum(), 4 * (x * blur(y, TAPS, padding=1, stride=2)).sum()
    )


def test_convolution_of_a_shrinking_block_strides_over_the_filtered_map():
    conv = EqualisedConv2d(2, 3, 3, clamp=None, down=True).double()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    filtered = F.conv2d(F.pad(x, (2, 2, 2, 2)), TAPS.double().expand(2, 1, 4, 4), groups=2)
    expected = F.leaky_relu(F.conv2d(filtered, conv.weight / 18**0.5, stride=2), 0.2) * 2**0.5
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("case", ["blur", "halve", "upsample", "shrinking conv", "clamped conv"])
def test_resampling_layers_can_be_differentiated_twice(case):
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    conv = stirred(EqualisedConv2d(2, 2, 3, clamp=1.0 if "clamped" in case else None, down=True)).double()
    run = {
        "blur": lambda x: blur(x, TAPS, padding=1),
        "halve": lambda x: blur(x, TAPS, padding=1, stride=2),
        "upsample": lambda x: upsample(x, TAPS),
    }.get(case, conv)
    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


# ---- modulated convolution


def modulation(batch=2, fan_in=3, fan_out=2, size=3):
    shapes = (batch, fan_in, size, size), (fan_out, fan_in, 3, 3), (batch, fan_in)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_is_one_convolution_a_sample(fused, up):
    x, weight, styles = modulation()
    noise = torch.randn(1, 1, *([6 if up else 3] * 2), dtype=torch.float64)
    taps = TAPS if up else None
    for sample in range(2):
        own = weight * styles[sample][None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        one = x[sample : sample + 1]
        if up:
            one = F.pad(F.conv_transpose2d(one, own.transpose(0, 1), stride=2), (1, 1, 1, 1))
            expected = F.conv2d(one, 4 * TAPS.double().expand(2, 1, 4, 4), groups=2)
        else:
            expected = F.conv2d(one, own, padding=1)
        both = modulated_conv2d(x, weight, styles, noise=noise, up_taps=taps, fused=fused)
        torch.testing.assert_close(both[sample : sample + 1], expected + noise)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("limit", [0, 1 << 19], ids=["product", "outright"])
def test_modulated_convolution_can_be_differentiated_twice(monkeypatch, fused, up, limit):
    monkeypatch.setattr(stylegan2, "_SMALL", limit)

    def run(x, weight, styles):
        return modulated_conv2d(x, weight, styles, up_taps=TAPS if up else None, fused=fused)

    inputs = modulation(fan_in=2, size=2)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_both_ways_to_the_norms_of_the_weights_agree(monkeypatch):
    inputs = modulation()
    outright = modulated_conv2d(*inputs)
    monkeypatch.setattr(stylegan2, "_SMALL", 0)
    torch.testing.assert_close(modulated_conv2d(*inputs), outright, rtol=1e-12, atol=1e-12)


def test_demodulation_undoes_the_scale_of_a_style():
    x, weight, styles = modulation()
    torch.testing.assert_close(
        modulated_conv2d(x, weight, 100 * styles), modulated_conv2d(x, weight, styles), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_fused_and_unfused_generators_agree(architecture, dtype, limit):
    generator = stirred(Generator(small(resolution=16, g_architecture=architecture))).to(dtype)
    ws = generator.mapping(torch.randn(3, 5, dtype=dtype))
    images = [generator.synthesis(ws, noise="const", fused=fused) for fused in (False, True)]
    assert (images[0] - images[1]).abs().max() <= limit * images[0].abs().max()
    gradients = [
        torch.autograd.grad(image.square().mean(), [*generator.synthesis.parameters()], retain_graph=True)
        for image in images
    ]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 10 * limit * one.abs().max()


# ---- latents, truncation, noise


def test_truncation_zero_gives_the_average_for_every_latent():
    generator = Generator(small())
    torch.nn.init.normal_(generator.mapping.w_avg)
    ws = generator.mapping(torch.randn(3, 5), truncation=0.0)
    assert torch.equal(ws, generator.mapping.w_avg.expand(3, 4, 6))


def test_truncation_pulls_the_layers_below_the_cutoff():
    mapping = Generator(small()).mapping
    torch.nn.init.normal_(mapping.w_avg)
    z = torch.randn(3, 5)
    plain, near = mapping(z), mapping(z, truncation=0.7, cutoff=2)
    torch.testing.assert_close(near[:, :2], mapping.w_avg + 0.7 * (plain[:, :2] - mapping.w_avg))
    assert torch.equal(near[:, 2:], plain[:, 2:])
    assert torch.equal(mapping(z, truncation=0.7, cutoff=0), plain)
    assert torch.equal(mapping(z, truncation=0.7)[:, 3], near[:, 0])


def test_mapping_does_not_see_the_length_of_z():
    mapping, z = Generator(small()).mapping, torch.randn(3, 5)
    torch.testing.assert_close(mapping(7 * z), mapping(z))


def test_average_is_tracked_only_when_asked_and_in_train_mode():
    mapping, z = Generator(small()).mapping, torch.randn(50, 5)
    mapping.train()(z)
    mapping.eval()(z, track_average=True)
    assert not mapping.w_avg.any()
    ws = mapping.train()(z, track_average=True)
    torch.testing.assert_close(mapping.w_avg, 0.005 * ws[:, 0].mean(0))
    assert not mapping.w_avg.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_latent_is_read_and_colours_share_the_next_one(architecture):
    config = small(resolution=16, g_architecture=architecture)
    generator = Generator(config)
    ws = generator.mapping(torch.randn(2, 5)).requires_grad_()
    (gradient,) = torch.autograd.grad(generator.synthesis(ws, noise="none").square().sum(), ws)
    assert gradient.abs().sum((0, 2)).min() > 0
    blocks = [generator.synthesis.get_submodule(f"b{size}") for size in config.resolutions]
    assert sum(block.num_convs for block in blocks) + 1 == config.num_ws == 6
    assert [block.num_ws - block.num_convs for block in blocks] == [architecture == "skip"] * 2 + [True]


def test_styles_are_mixed_by_writing_latents():
    generator = Generator(small())
    first, second = (generator.mapping(torch.randn(2, 5)) for _ in range(2))
    expected = generator.synthesis(torch.cat([first[:, :3], second[:, 3:]], dim=1), noise="none")
    first[:, 3:] = second[:, 3:]
    assert torch.equal(generator.synthesis(first, noise="none"), expected)


def test_random_noise_comes_from_the_generator_of_the_caller():
    generator, z = stirred(Generator(small())), torch.randn(2, 5)
    state = torch.get_rng_state()
    images = [generator(z, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    torch.manual_seed(1)
    assert torch.equal(generator(z), images[0])
    same = generator(z[:1].expand(2, 5), noise="random")
    assert not torch.equal(same[0], same[1]), "samples must not share their noise"


def test_constant_noise_is_stored_and_no_noise_ignores_its_strength():
    generator, z = stirred(Generator(small())), torch.randn(2, 5)
    const, none = generator(z, noise="const"), generator(z, noise="none")
    assert torch.equal(generator(z, noise="const"), const) and not torch.equal(const, none)
    for name, buffer in generator.named_buffers():
        if name.endswith("noise_const"):
            buffer.zero_()
    torch.testing.assert_close(generator(z, noise="const"), none)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.zeros_(parameter)
    assert torch.equal(generator(z, noise="none"), none)
    torch.testing.assert_close(generator(z, noise="random"), none)


# ---- discriminator


def test_minibatch_deviation_of_known_numbers():
    x = torch.tensor([[1.0, 10.0], [5.0, 0.0], [3.0, 10.0], [5.0, 4.0]])[:, :, None, None]
    expected = torch.tensor([0.5, 1.0, 0.5, 1.0])  # slot 0: |1 - 3| / 2 and 0; slot 1: 0 and |0 - 4| / 2
    out = minibatch_std(x, group=2)[:, 2].flatten()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    apart = minibatch_std(x, group=2, channels=2)[:, 2:].flatten(1)
    torch.testing.assert_close(apart, torch.tensor([[1.0, 0], [0, 2], [1, 0], [0, 2]]), rtol=0, atol=1e-3)


def test_minibatch_deviation_ignores_shifts_and_the_order_within_a_group():
    x = torch.randn(6, 4, 2, 2)
    plain = minibatch_std(x, group=3)
    assert torch.equal(plain[:, :4], x)
    shifted = minibatch_std(x + torch.randn(4, 2, 2), group=3)
    torch.testing.assert_close(shifted[:, 4], plain[:, 4])
    swapped = minibatch_std(x[[2, 1, 0, 3, 4, 5]], group=3)  # slots of two: 0, 2, 4 and 1, 3, 5
    torch.testing.assert_close(swapped[:, 4], plain[:, 4])
    moved = x.clone()
    moved[2] += torch.randn(4, 2, 2)
    changed = (minibatch_std(moved, group=3)[:, 4] != plain[:, 4]).flatten(1).any(1)
    assert changed.tolist() == [True, False] * 3
    same = minibatch_std(x[:1].expand(4, 4, 2, 2), group=0)[:, 4]
    torch.testing.assert_close(same, torch.full((4, 2, 2), 1e-4))


def test_groups_larger_than_the_batch_are_the_whole_batch():
    x = torch.randn(6, 4, 2, 2)
    assert torch.equal(minibatch_std(x, group=32), minibatch_std(x, group=0))
    assert not torch.equal(minibatch_std(x, group=3), minibatch_std(x, group=0))
    with pytest.raises(ValueError, match=r"batch of 6 .* groups of 4 \(mbstd_group\): .* multiple of 4"):
        minibatch_std(x, group=4)


def test_without_minibatch_deviation_images_are_judged_alone():
    config = small(mbstd_channels=0)
    discriminator, x = stirred(Discriminator(config)), pictures(small(), 3)
    assert discriminator.b4.conv.weight.shape[1] == 6
    torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_return_the_map_and_the_image_of_the_skip_architecture(architecture):
    config = small(resolution=16, d_architecture=architecture)
    discriminator, seen = Discriminator(config), {}
    for size in (16, 8):
        block = discriminator.get_submodule(f"b{size}")
        block.register_forward_hook(lambda m, a, out, size=size: seen.update({size: out}))
        assert block.out_channels == config.channels(size // 2)
    x = pictures(config)
    discriminator(x)
    for size, out in seen.items():
        assert isinstance(out, tuple) and out[0].shape == (4, config.channels(size // 2), *[size // 2] * 2)
        assert (out[1] is None) is (architecture != "skip")
    if architecture == "skip":
        torch.testing.assert_close(seen[16][1], blur(x, TAPS, padding=1, stride=2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantiser_can_be_attached_to_the_blocks(architecture):
    discriminator = stirred(Discriminator(small(resolution=16, d_architecture=architecture)))
    x = pictures(discriminator.config)
    before = discriminator(x)
    sites = {"b16": {"select": 0}, "b8": {"select": 0}}  # the map, not the image
    handle = fq.attach(discriminator, sites, codebook_size=4)
    assert torch.equal(discriminator(x), before)
    loss = handle.loss()
    loss.backward()
    assert loss > 0 and discriminator.b16.conv0.weight.grad.any()
    handle.detach()
    assert torch.equal(discriminator(x), before)


def test_clamp_bounds_the_convolutions_but_not_the_shortcuts():
    config = small(conv_clamp=0.01)
    discriminator, generator, outputs = Discriminator(config), Generator(config), {}
    torch.nn.init.constant_(discriminator.b8.skip.weight, 1e4)
    for name, module in [*discriminator.named_modules(), *generator.named_modules()]:
        module.register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
    discriminator(100 * pictures(config))
    generator(torch.randn(4, 5))
    for name in ("b8.fromrgb", "b8.conv0", "b4.conv", "synthesis.b8.conv0", "synthesis.b8.torgb"):
        assert outputs[name].abs().max().item() == pytest.approx(0.01), name
    assert outputs["b8.conv1"].abs().max().item() == pytest.approx(0.01 * 0.5**0.5)
    assert outputs["b8.skip"].abs().max() > 1


# ---- conditions


def test_labels_are_integers_or_weights_of_classes():
    config = small(num_classes=3)
    generator, discriminator = stirred(Generator(config)), stirred(Discriminator(config))
    z, x, labels = torch.randn(1, 5).expand(4, 5), pictures(config, 1).expand(4, 3, 8, 8), torch.arange(4) % 3
    ws, logits = generator.mapping(z, labels), discriminator(x, labels)
    one_hot = F.one_hot(labels, 3).float()
    torch.testing.assert_close(generator.mapping(z, one_hot), ws)
    torch.testing.assert_close(discriminator(x, one_hot), logits)
    torch.testing.assert_close(ws[0], ws[3])
    assert not torch.allclose(ws[0], ws[1])
    torch.testing.assert_close(logits[0], logits[3])
    assert not torch.allclose(logits[0], logits[1])
    half = generator.mapping(z[:1], torch.tensor([[0.5, 0.5, 0.0]]))
    assert not torch.allclose(half, ws[:1]) and not torch.allclose(half, ws[1:2])


def test_unconditional_networks_read_no_labels():
    generator, discriminator = Generator(small()), Discriminator(small())
    z, x = torch.randn(2, 5), pictures(small(), 2)
    assert torch.equal(generator(z, torch.tensor([0, 0]), noise="none"), generator(z, noise="none"))
    assert torch.equal(discriminator(x, torch.tensor([0, 0])), discriminator(x))


# ---- gradients of gradients


def penalty(discriminator, x):
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_r1_and_its_gradient_equal_finite_differences(architecture):
    discriminator = stirred(Discriminator(small(d_architecture=architecture, channel_max=3))).double()
    x = pictures(discriminator.config).double().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x)
    for place in [(0, 0, 3, 4), (2, 1, 0, 7)]:
        step = torch.zeros_like(x)
        step[place] = 1e-6
        with torch.no_grad():
            slope = (discriminator(x + step).sum() - discriminator(x - step).sum()) / 2e-6
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)
    penalty(discriminator, x).backward()
    for name in ("b8.conv0.weight", "b8.conv1.weight", "b4.fc.weight"):
        weight = discriminator.get_parameter(name)
        place = tuple(int(i) for i in np.unravel_index(weight.grad.abs().argmax().item(), weight.shape))
        values = []
        for step in (1e-6, -2e-6, 1e-6):
            with torch.no_grad():
                weight[place] += step
            values.append(penalty(discriminator, x).item())
        slope = (values[0] - values[1]) / 2e-6
        assert weight.grad[place].item() == pytest.approx(slope, rel=1e-4), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("noise", ["const", "none"])
def test_path_lengths_reach_every_parameter_below_them(fused, noise):
    generator = stirred(Generator(small(resolution=16)))
    ws = generator.mapping(torch.randn(2, 5))
    image = generator.synthesis(ws, noise=noise, fused=fused)
    (gradient,) = torch.autograd.grad((image * torch.randn_like(image)).sum(), ws, create_graph=True)
    gradient.square().sum(2).mean(1).sqrt().mean().backward()
    weights = {n: p.grad for n, p in generator.named_parameters() if n.endswith("weight")}
    assert [n for n, g in weights.items() if g is None or not g.isfinite().all() or not g.any()] == []


def test_two_forwards_before_one_backward_give_the_sum_of_gradients():
    together = stirred(Discriminator(small()))
    apart = copy.deepcopy(together)
    first, second = pictures(small()), pictures(small())
    (together(first).sum() + together(second).sum()).backward()
    for x in (first, second):
        apart(x).sum().backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# ---- how weights start, precision, layouts, copies


def test_weights_start_with_variance_one_and_are_scaled_at_run_time():
    config = small(resolution=16, channel_base=4096, channel_max=64, w_dim=64, latent_dim=64)
    generator, discriminator = Generator(config), Discriminator(config)
    assert discriminator.b16.conv0.weight.std().item() == pytest.approx(1, rel=0.02)
    assert generator.synthesis.b8.conv0.weight.std().item() == pytest.approx(1, rel=0.02)
    assert generator.mapping.fc0.weight.std().item() == pytest.approx(100, rel=0.05)
    affine = generator.synthesis.b8.conv0.affine
    assert torch.equal(affine.bias, torch.ones(64)) and affine.weight.std().item() == pytest.approx(
        1, rel=0.05
    )
    strengths = [p for n, p in generator.named_parameters() if n.endswith("noise_strength")]
    assert len(strengths) == 5 and not any(strength.any() for strength in strengths)
    deviation = generator.mapping(torch.randn(500, 64))[:, 0].std().item()
    assert 0.5 < deviation < 2, "the gains of layers and rectifiers must cancel"
    assert 0.3 < discriminator.b16(None, pictures(config, 32))[0].std().item() < 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_autocast_is_close_and_leaves_images_and_logits_in_float32(architecture):
    config = small(resolution=16, num_classes=3, g_architecture=architecture, d_architecture=architecture)
    generator, discriminator = stirred(Generator(config)), stirred(Discriminator(config))
    z, labels, types = torch.randn(4, 5), torch.arange(4) % 3, {}
    for name, module in [*generator.named_modules(), *discriminator.named_modules()]:
        module.register_forward_hook(
            lambda m, a, out, name=name: types.update({name: getattr(out, "dtype", 0)})
        )
    with torch.no_grad():
        plain = generator(z, labels, noise="const")
        plain_logits = discriminator(plain, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for fused in (True, False):
            ws = generator.mapping(z, labels)
            images = generator.synthesis(ws, noise="const", fused=fused)
            logits = discriminator(images, labels)
        logits.sum().backward()
    assert images.dtype == logits.dtype == ws.dtype == torch.float32
    low = ("synthesis.b16.conv0", "synthesis.b16.conv1", "b16.conv0", "b8.conv1", "b4.conv")
    assert {types[name] for name in low} == {torch.bfloat16}
    assert types["b4.fc"] == types["synthesis.b16.conv0.affine"] == torch.float32
    assert (images - plain).abs().max() < 0.05 * plain.abs().max()
    assert (logits - plain_logits).abs().max() < 0.1 * plain_logits.abs().max() + 0.05
    gradients = [p.grad for p in (*generator.parameters(), *discriminator.parameters())]
    assert all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in gradients)


def test_channels_last_gives_the_same_numbers():
    config = small(resolution=16, g_architecture="resnet")
    generator, discriminator = stirred(Generator(config)), stirred(Discriminator(config))
    z = torch.randn(4, 5)
    images = generator(z, noise="const")
    logits = discriminator(images)
    for model in (generator, discriminator):
        model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(generator(z, noise="const"), images, rtol=1e-4, atol=1e-5)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(discriminator(last), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(way):
    config = small(num_classes=3)
    generator, discriminator = stirred(Generator(config)), stirred(Discriminator(config))
    z, labels, x = torch.randn(4, 5), torch.arange(4) % 3, pictures(config)
    other_g, other_d = way(generator), way(discriminator)
    expected = generator(z, labels, noise="const"), discriminator(x, labels)
    assert other_g.config == config
    torch.nn.init.zeros_(generator.synthesis.b4.const)
    torch.nn.init.zeros_(discriminator.b4.out.weight)
    assert torch.equal(other_g(z, labels, noise="const"), expected[0])
    assert torch.equal(other_d(x, labels), expected[1])


def test_both_networks_compile_into_one_graph():
    config = small()
    for model, inputs in ((Discriminator(config), pictures(config)), (Generator(config), torch.randn(4, 5))):
        options = {"noise": "const"} if isinstance(model, Generator) else {}
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs, **options), model(inputs, **options))
