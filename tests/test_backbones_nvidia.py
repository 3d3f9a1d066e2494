"""From a network pickle to pictures, by the commands that people use."""

import numpy as np
import pytest
import torch
from network_pickles import (
    WIDTHS,
    EasyDict,
    discriminator_shapes,
    dump,
    generator_shapes,
    network,
    only,
    save,
)
from PIL import Image

from backbones.convert_stylegan2 import load_nvidia
from backbones.sample import generate, load_generator
from backbones.sample import main as sample_main


def small_networks():
    shapes = generator_shapes({4: 8, 8: 8, 16: 4}, z=5, width=7, labels=3)
    synthesis = EasyDict(channel_base=64, channel_max=8, num_fp16_res=0, conv_clamp=256)
    arguments = {
        "mapping_kwargs": EasyDict(num_layers=2),
        "synthesis_kwargs": synthesis,
        "z_dim": 5,
        "w_dim": 7,
    }
    return {name: network("Generator", dict(shapes), **arguments) for name in ("G", "G_ema")}


def test_a_network_pickle_becomes_a_generator_with_its_numbers(tmp_path):
    networks = small_networks()
    path = save(tmp_path, networks)
    generator, config = load_generator(path)
    assert (config.resolution, config.num_classes, config.latent_dim, config.w_dim) == (16, 3, 5, 7)
    assert (config.mapping_layers, config.channel_base, config.conv_clamp) == (2, 64, 256)
    state, (found, stored) = generator.state_dict(), load_nvidia(path)
    assert found == config and state.keys() == stored.keys()
    assert all(torch.equal(state[key], stored[key]) for key in stored)
    pictures = generate(generator, config, torch.tensor([0, 2]), truncation=0.7)
    assert pictures.shape == (2, 3, 16, 16) and pictures.isfinite().all()


def test_half_precision_numbers_become_float32(tmp_path):
    _, state = load_nvidia(save(tmp_path, {"G_ema": small_networks()["G_ema"].half()}))
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_a_pickle_without_generator_is_named(tmp_path):
    part = network("Discriminator", discriminator_shapes(WIDTHS, labels=0, skip=True), 0, 16, 3)
    with pytest.raises(ValueError, match="holds D but no generator: give a file with G_ema or G"):
        load_nvidia(save(tmp_path, only(part)))


def test_the_command_draws_from_a_pickle_and_refuses_a_hostile_one(tmp_path):
    path = save(tmp_path, small_networks())
    sample_main([str(path), "--classes", "1", "--num", "3", "--out", str(tmp_path / "drawn.png")])
    assert np.asarray(Image.open(tmp_path / "drawn.png")).std() > 0

    class Runs:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    path.write_bytes(dump({"G_ema": Runs()}))
    with pytest.raises(SystemExit, match=r"error: .*system"):
        sample_main([str(path), "--out", str(tmp_path / "not_drawn.png")])
    assert not (tmp_path / "ran").exists() and not (tmp_path / "not_drawn.png").exists()
