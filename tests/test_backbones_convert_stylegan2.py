"""Reading public StyleGAN2 state dicts: the configuration from shapes, and errors that say what differs."""

import copy
from dataclasses import replace

import pytest
import torch

from backbones.convert_stylegan2 import infer_config, load_strictly
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
    g_arguments = {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"conv_clamp": 256}}
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
