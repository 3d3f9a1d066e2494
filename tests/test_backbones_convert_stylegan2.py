"""Reading public StyleGAN2 state dicts: the configuration from shapes, and errors that say what differs."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from backbones.convert_stylegan2 import from_rosinality, infer_config, load_strictly
from backbones.stylegan2 import Discriminator, Generator, StyleGAN2Config


def small(**changes):
    sizes = {"resolution": 8, "latent_dim": 5, "w_dim": 6, "mapping_layers": 2, "d_mapping_layers": 2}
    return StyleGAN2Config(**(sizes | {"channel_base": 32, "channel_max": 6} | changes))


CONFIGS = [
    small(),
    small(resolution=16, num_classes=3, mbstd_channels=2, image_channels=1),
    small(resolution=32, g_architecture="resnet", d_architecture="skip", channel_base=96, channel_max=24),
    small(resolution=16, g_architecture="orig", d_architecture="orig", channel_base=80, channel_max=99),
    small(mapping_layers=5, num_classes=2, d_mapping_layers=4, mbstd_channels=0),
]


def described(config):
    """What the widths leave open is written as the smallest base and limit that give them."""
    widths = {size: config.channels(size) for size in config.resolutions}
    limit = max(widths.values())
    below = [size * width for size, width in widths.items() if width < limit]
    base = max(below or [config.resolution * limit])
    depth = config.d_mapping_layers if config.num_classes > 1 else 8
    return replace(config, channel_base=base, channel_max=limit, d_mapping_layers=depth)


@pytest.mark.parametrize("config", CONFIGS)
def test_configuration_is_read_from_the_states(config):
    states = Generator(config).state_dict(), Discriminator(config).state_dict()
    found = infer_config(*states)
    assert found == described(config)
    load_strictly(Generator(found), states[0])
    load_strictly(Discriminator(found), states[1])
    assert infer_config(g_state=states[0]).g_architecture == config.g_architecture
    assert infer_config(d_state=states[1]).d_architecture == config.d_architecture


def test_constructor_arguments_give_what_shapes_do_not_show():
    config = small()
    g_state, d_state = Generator(config).state_dict(), Discriminator(config).state_dict()
    known = {"activation": "lrelu", "resample_filter": (1, 3, 3, 1), "use_noise": True}
    g_arguments = {"mapping_kwargs": {"w_avg_beta": 0.995}, "synthesis_kwargs": {"conv_clamp": 256} | known}
    d_arguments = {"conv_clamp": 256, "epilogue_kwargs": {"mbstd_group_size": None}, "architecture": "resnet"}
    assert infer_config(g_state, init_kwargs=g_arguments).conv_clamp == 256
    assert infer_config(g_state, init_kwargs={"conv_clamp": 32, "num_fp16_res": 4}).conv_clamp == 32
    alone = infer_config(d_state=d_state, init_kwargs=d_arguments)
    assert (alone.conv_clamp, alone.mbstd_group) == (256, 0)
    both = infer_config(g_state, d_state, {"G": g_arguments, "D": d_arguments})
    assert (both.conv_clamp, both.mbstd_group) == (256, 0)
    plain = infer_config(d_state=d_state, init_kwargs={})
    assert (plain.conv_clamp, plain.mbstd_group) == (None, 4)
    assert infer_config(g_state, d_state, {"G": g_arguments}).conv_clamp == 256


def test_states_and_arguments_that_do_not_fit_are_refused():
    config = small()
    g_state, d_state = Generator(config).state_dict(), Discriminator(config).state_dict()
    with pytest.raises(ValueError, match="neither g_state nor d_state"):
        infer_config()
    with pytest.raises(ValueError, match=r"the state of G has no synthesis.b4.const: a StyleGAN2 G"):
        infer_config(d_state)
    with pytest.raises(ValueError, match=r"of a StyleGAN3 generator"):
        infer_config({"synthesis.input.freqs": torch.zeros(1)})
    with pytest.raises(ValueError, match="D says image_channels 1 but G says 3"):
        infer_config(g_state, Discriminator(small(image_channels=1)).state_dict())
    with pytest.raises(ValueError, match="D says conv_clamp None but G says 256"):
        infer_config(g_state, d_state, {"G": {"synthesis_kwargs": {"conv_clamp": 256}}, "D": {}})
    with pytest.raises(ValueError, match="init_kwargs of one network were given with the states of both"):
        infer_config(g_state, d_state, {"conv_clamp": 256})
    with pytest.raises(
        ValueError, match=r"G.synthesis_kwargs.activation is 'relu' but .* always has 'lrelu'"
    ):
        infer_config(g_state, init_kwargs={"synthesis_kwargs": {"activation": "relu"}})
    with pytest.raises(ValueError, match=r"D.block_kwargs.resample_filter is \[1, 2, 1\]"):
        infer_config(d_state=d_state, init_kwargs={"block_kwargs": {"resample_filter": [1, 2, 1]}})
    odd = {**g_state, "synthesis.b8.conv1.weight": torch.zeros(7, 7, 3, 3)}
    with pytest.raises(ValueError, match=r"G has the channels {4: 6, 8: 7} by resolution"):
        infer_config(odd)
    with pytest.raises(ValueError, match="a conditional model of a single class"):
        infer_config({**g_state, "mapping.embed.weight": torch.zeros(6, 1)})


def test_states_that_do_not_fit_a_model_are_described_by_key_and_shape():
    model, state = Discriminator(small()), Discriminator(small()).state_dict()
    before = copy.deepcopy(model.state_dict())
    del state["b8.conv0.bias"]
    state |= {"b8.extra": torch.zeros(2), "b4.fc.weight": torch.zeros(6, 7)}
    with pytest.raises(ValueError) as caught:
        load_strictly(model, state)
    for part in (
        "b8.conv0.bias is missing (ours (4,))",
        "b8.extra (2,) is not in the model",
        "b4.fc.weight has shape (6, 7) but the model (6, 96)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit this Discriminator: .*; and \d+ more"):
        load_strictly(model, {})


# ---- the other implementation

TAPS = torch.outer(torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])) / 64


def random(*shape):
    return 0.5 * torch.randn(shape)


def other_generator(widths, w_dim, depth):
    """A random state in the other layout; ``widths`` at 4, 8, ... pixels."""
    state = {}
    for index in range(1, depth + 1):
        state |= {f"style.{index}.weight": 100 * random(w_dim, w_dim), f"style.{index}.bias": random(w_dim)}
    state["input.input"] = random(1, widths[0], 4, 4)
    layers = [("conv1", widths[0], widths[0])]
    for index, (below, width) in enumerate(itertools.pairwise(widths)):
        layers += [(f"convs.{2 * index}", below, width), (f"convs.{2 * index + 1}", width, width)]
        state[f"convs.{2 * index}.conv.blur.kernel"] = 4 * TAPS
        state[f"to_rgbs.{index}.upsample.kernel"] = 4 * TAPS
    colours = [("to_rgb1", widths[0])] + [(f"to_rgbs.{i}", width) for i, width in enumerate(widths[1:])]
    for index, (name, _, width) in enumerate(layers):
        size = 4 << (index + 1) // 2
        state[f"{name}.noise.weight"], state[f"noises.noise_{index}"] = random(1), random(1, 1, size, size)
        state[f"{name}.activate.bias"] = random(width)
    for name, below, width, kernel in [(*layer, 3) for layer in layers] + [(n, w, 3, 1) for n, w in colours]:
        state[f"{name}.conv.weight"] = random(1, width, below, kernel, kernel)
        state[f"{name}.conv.modulation.weight"], state[f"{name}.conv.modulation.bias"] = (
            random(below, w_dim),
            1 + random(below),
        )
    return state | {f"{name}.bias": random(1, 3, 1, 1) for name, _ in colours}


def other_discriminator(widths):
    """The same of a discriminator."""
    *above, last = reversed(widths)
    state = {"convs.0.0.weight": random(above[0], 3, 1, 1), "convs.0.1.bias": random(above[0])}
    for index, (width, below) in enumerate(zip(above, [*above[1:], last], strict=True), start=1):
        state |= {
            f"convs.{index}.conv1.0.weight": random(width, width, 3, 3),
            f"convs.{index}.conv1.1.bias": random(width),
            f"convs.{index}.conv2.0.kernel": TAPS,
            f"convs.{index}.conv2.1.weight": random(below, width, 3, 3),
            f"convs.{index}.conv2.2.bias": random(below),
            f"convs.{index}.skip.0.kernel": TAPS,
            f"convs.{index}.skip.1.weight": random(below, width, 1, 1),
        }
    state |= {"final_conv.0.weight": random(last, last + 1, 3, 3), "final_conv.1.bias": random(last)}
    state |= {"final_linear.0.weight": random(last, last * 16), "final_linear.0.bias": random(last)}
    return state | {"final_linear.1.weight": random(1, last), "final_linear.1.bias": random(1)}


def act(x, bias):
    return F.leaky_relu(x + bias.reshape(1, -1, *[1] * (x.ndim - 2)), 0.2) * 2**0.5


def filtered(x, taps, pad):
    return F.conv2d(F.pad(x, pad), taps.expand(x.shape[1], 1, 4, 4), groups=x.shape[1])


def other_images(state, z):
    w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    for index in range(1, len([k for k in state if k.startswith("style.") and k.endswith("bias")]) + 1):
        weight = state[f"style.{index}.weight"]
        w = act(F.linear(w, weight * 0.01 / weight.shape[1] ** 0.5), 0.01 * state[f"style.{index}.bias"])

    def styled(name):
        weight = state[f"{name}.conv.weight"]
        affine = state[f"{name}.conv.modulation.weight"]
        style = F.linear(w, affine / w.shape[1] ** 0.5, state[f"{name}.conv.modulation.bias"])
        return weight * style[:, None, :, None, None]

    def layer(name, x, index, up):
        weight = styled(name)
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        if up:
            one = [
                F.conv_transpose2d(a[None], b.transpose(0, 1), stride=2)
                for a, b in zip(x, weight, strict=True)
            ]
            x = filtered(torch.cat(one), state[f"{name}.conv.blur.kernel"], (1, 1, 1, 1))
        else:
            x = torch.cat([F.conv2d(a[None], b, padding=1) for a, b in zip(x, weight, strict=True)])
        x = x + state[f"{name}.noise.weight"] * state[f"noises.noise_{index}"]
        return act(x, state[f"{name}.activate.bias"])

    def colours(name, x):
        return (
            torch.einsum("boi,bihw->bohw", styled(name)[..., 0, 0] / x.shape[1] ** 0.5, x)
            + state[f"{name}.bias"]
        )

    x = layer("conv1", state["input.input"].expand(len(z), -1, -1, -1), 0, False)
    image = colours("to_rgb1", x)
    for index in range(len([k for k in state if k.startswith("to_rgbs.") and k.endswith("upsample.kernel")])):
        x = layer(f"convs.{2 * index}", x, 2 * index + 1, True)
        x = layer(f"convs.{2 * index + 1}", x, 2 * index + 2, False)
        spread = torch.zeros(len(z), 3, *[2 * image.shape[2]] * 2)
        spread[:, :, ::2, ::2] = image
        image = filtered(spread, state[f"to_rgbs.{index}.upsample.kernel"], (2, 1, 2, 1)) + colours(
            f"to_rgbs.{index}", x
        )
    return image


def other_logits(state, x):
    def conv(name, x, **options):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight / weight[0].numel() ** 0.5, **options)

    x = act(conv("convs.0.0", x), state["convs.0.1.bias"])
    for index in range(1, len([k for k in state if k.endswith("skip.1.weight")]) + 1):
        name = f"convs.{index}"
        out = act(conv(f"{name}.conv1.0", x, padding=1), state[f"{name}.conv1.1.bias"])
        out = filtered(out, state[f"{name}.conv2.0.kernel"], (2, 2, 2, 2))
        out = act(conv(f"{name}.conv2.1", out, stride=2), state[f"{name}.conv2.2.bias"])
        skip = conv(f"{name}.skip.1", filtered(x, state[f"{name}.skip.0.kernel"], (1, 1, 1, 1)), stride=2)
        x = (out + skip) / 2**0.5
    deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean().expand(len(x), 1, 4, 4)
    x = act(
        conv("final_conv.0", torch.cat([x, deviation], 1), padding=1), state["final_conv.1.bias"]
    ).flatten(1)
    for index in (0, 1):
        weight, bias = state[f"final_linear.{index}.weight"], state[f"final_linear.{index}.bias"]
        x = F.linear(x, weight / weight.shape[1] ** 0.5)
        x = x + bias if index else act(x, bias)
    return x


def test_networks_of_the_other_layout_give_the_same_numbers():
    g_state, d_state = other_generator([6, 6, 4], 5, 2), other_discriminator([6, 6, 4])
    average = torch.randn(5)
    ours_g, ours_d = from_rosinality(g_state, w_avg=average), from_rosinality(d_state)
    config = infer_config(ours_g, ours_d)
    assert (config.resolution, config.latent_dim, config.mapping_layers) == (16, 5, 2)
    generator, discriminator = Generator(config), Discriminator(config)
    for model, state in ((generator, ours_g), (discriminator, ours_d)):
        assert list(state) == list(model.state_dict())
        load_strictly(model, state)
    assert torch.equal(generator.mapping.w_avg, average)
    assert not from_rosinality(g_state)["mapping.w_avg"].any()
    z, x = torch.randn(4, 5), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            generator(z, noise="const"), other_images(g_state, z), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(discriminator(x), other_logits(d_state, x), rtol=1e-4, atol=1e-5)


def test_keys_of_no_known_layout_are_refused_by_name():
    g_state, d_state = other_generator([4, 4], 5, 2), other_discriminator([4, 4])
    with pytest.raises(ValueError, match=r"conv1.gate is no key of rosinality's generator"):
        from_rosinality(g_state | {"conv1.gate": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"module.convs.0.0.weight is no key of rosinality's discriminator"):
        from_rosinality({f"module.{key}": value for key, value in d_state.items()})
    del g_state["convs.1.noise.weight"]
    with pytest.raises(ValueError, match=r"synthesis.b8.conv1.noise_strength is missing \(ours \(\)\)"):
        from_rosinality(g_state)
