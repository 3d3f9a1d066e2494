"""Reading public BigGAN checkpoints, and FQ-BigGAN's names to ours and back."""

import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backbones.biggan import BigGANConfig, Discriminator, Generator
from backbones.convert import from_fq_biggan, infer_config, load_public, to_fq_biggan
from fq import attach


def small(**changes):
    return BigGANConfig(**({"g_channels": 3, "d_channels": 2, "latent_dim": 6, "num_classes": 5} | changes))


def equal_states(first, second):
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


# ---- load_public


def test_file_and_folder_give_the_tensors_of_the_network(tmp_path):
    states = {name: Generator(small()).state_dict() for name in ("G", "G_ema")}
    for name, state in states.items():
        torch.save(state, tmp_path / f"{name}.pth")
    assert equal_states(load_public(tmp_path), states["G_ema"])
    assert equal_states(load_public(tmp_path, which="G"), states["G"])
    assert equal_states(load_public(str(tmp_path / "G.pth")), states["G"])


def test_statistics_one_level_down_get_the_plain_names(tmp_path):
    plain = Generator(small()).state_dict()
    nested = {k.replace(".stored_", ".bn.stored_"): v for k, v in plain.items()}
    nested["blocks.0.0.bn1.bn.accumulation_counter"] = torch.zeros(1)
    torch.save(nested, tmp_path / "G.pth")
    assert equal_states(load_public(tmp_path / "G.pth"), plain)


def test_missing_files_are_named(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "G_ema_best0.pth")
    with pytest.raises(FileNotFoundError, match=re.escape("has no G_ema.pth but G_ema_best0.pth")):
        load_public(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        load_public(tmp_path / "absent.pth")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_file_is_refused_by_name(tmp_path, share):
    path = tmp_path / "G_ema.pth"
    torch.save(Generator(small()).state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"G_ema\.pth is not a plain tensor file or is truncated"):
        load_public(path)


class _RunsACommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"w": _RunsACommand(tmp_path / "made")}, tmp_path / "G.pth")
    with pytest.raises(ValueError, match=r"G\.pth is not a plain tensor file"):
        load_public(tmp_path / "G.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        ({"itr": 3, "epoch": 1}, "a mapping with keys 'itr', 'epoch'"),
        ([torch.zeros(1)], "a list"),
        ({}, "an empty mapping"),
    ],
)
def test_files_that_are_no_state_dict_are_described(tmp_path, content, seen):
    torch.save(content, tmp_path / "state_dict.pth")
    with pytest.raises(ValueError, match=f"holds {seen} but a state dict"):
        load_public(tmp_path / "state_dict.pth")


# ---- infer_config

CONFIGS = [
    small(),
    small(resolution=16),
    small(resolution=16, wide=False, num_classes=1),
    small(spectral_norm=False, wide=False),
    small(shared_dim=4, g_attention=(8, 32), d_attention=(16,)),
    small(resolution=64, shared_dim=4, hierarchical=True, latent_dim=15, g_attention=(16,)),
    small(resolution=64, d_channels=8, d_attention=(32, 4), shared_dim=7),
    small(resolution=128, shared_dim=4, hierarchical=True, latent_dim=12, d_attention=(16, 8)),
    small(resolution=256, g_attention=(64,), d_attention=(4,), wide=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.resolution}px")
def test_configuration_is_recovered_from_shapes(config):
    with torch.device("meta"):
        g_state, d_state = Generator(config).state_dict(), Discriminator(config).state_dict()
    assert infer_config(g_state, d_state) == config
    assert infer_config(g_state, d_state, resolution=config.resolution) == config
    alone = infer_config(d_state=d_state)
    assert (alone.resolution, alone.wide, alone.d_attention) == (
        config.resolution,
        config.wide,
        config.d_attention,
    )
    assert infer_config(g_state).shared_dim == config.shared_dim


def test_rounded_down_latent_is_inferred_as_it_is_read():
    generator = Generator(small(shared_dim=4, hierarchical=True, latent_dim=11))
    inferred = infer_config(generator.state_dict())
    assert inferred.latent_dim == generator.latent_dim == 8
    Generator(inferred).load_state_dict(generator.state_dict(), strict=True)


def test_quantisers_do_not_disturb_inference():
    model = Discriminator(small(d_attention=(16,)))
    attach(model, ["blocks.0.0", "blocks.2.0"], codebook_size=4, compat="torch")
    assert infer_config(d_state=model.state_dict()) == infer_config(
        d_state=Discriminator(model.config).state_dict()
    )


def test_states_that_do_not_fit_are_refused():
    g_state, d_state = Generator(small()).state_dict(), Discriminator(small()).state_dict()
    with pytest.raises(ValueError, match="neither g_state nor d_state"):
        infer_config()
    with pytest.raises(
        ValueError, match="the generator state says resolution 32 but the resolution argument says 64"
    ):
        infer_config(g_state, resolution=64)
    with pytest.raises(
        ValueError, match="discriminator state says num_classes 7 but the generator state says 5"
    ):
        infer_config(g_state, Discriminator(small(num_classes=7)).state_dict())
    with pytest.raises(ValueError, match=r"the generator state has 0 blocks .* 'module\.'"):
        infer_config({f"module.{k}": v for k, v in g_state.items()})
    with pytest.raises(ValueError, match=r"generator state has no blocks\.0\.0\.bn1\.gain\.weight"):
        infer_config(d_state)
    with pytest.raises(ValueError, match=r"discriminator blocks give \[8, 8, 9, 8\] channels"):
        infer_config(d_state=d_state | {"blocks.2.0.conv2.weight": torch.zeros(9, 8, 3, 3)})
    with pytest.raises(ValueError, match=r"attention after blocks \[2\]"):
        infer_config(d_state=d_state | {"blocks.2.1.gamma": torch.zeros(())})
    with pytest.raises(ValueError, match="pass it through from_fq_biggan first"):
        infer_config(d_state=d_state | {"blocks.2.1.embed": torch.zeros(8, 4)})


# ---- FQ-BigGAN's names


def original_state(sites, attention, *, dim=8, codes=4):
    """A discriminator as the original FQ-BigGAN stores it."""
    state = {}
    for index in range(4):
        state[f"blocks.{index}.0.conv1.weight"] = torch.randn(dim, dim, 3, 3)
        place = 1
        if index in sites:
            state[f"blocks.{index}.1.embed"] = torch.randn(dim, codes)
            state[f"blocks.{index}.1.cluster_size"] = torch.rand(codes)
            state[f"blocks.{index}.1.embed_avg"] = torch.randn(dim, codes)
            place = 2
        if index in attention:
            state[f"blocks.{index}.{place}.gamma"] = torch.randn(())
            for name in ("theta", "phi", "g", "o"):
                state[f"blocks.{index}.{place}.{name}.weight"] = torch.randn(2, 8, 1, 1)
                state[f"blocks.{index}.{place}.{name}.u0"] = torch.randn(1, 2)
    return state | {"linear.weight": torch.randn(1, dim), "embed.weight": torch.randn(5, dim)}


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
def test_round_trip_is_exact(sites, attention):
    state = original_state(sites, attention)
    ours = from_fq_biggan(state)
    assert equal_states(to_fq_biggan(ours), state)
    assert equal_states(from_fq_biggan(to_fq_biggan(ours)), ours)


def test_quantiser_goes_below_its_block_and_attention_back_beside_it():
    state = original_state({1}, {1, 2})
    ours = from_fq_biggan(state)
    assert torch.equal(ours["blocks.1.0.fq.codebook"], state["blocks.1.1.embed"].t())
    assert torch.equal(ours["blocks.1.0.fq.ema_sum"], state["blocks.1.1.embed_avg"].t())
    assert torch.equal(ours["blocks.1.0.fq.ema_count"], state["blocks.1.1.cluster_size"])
    scalars = {name: ours[f"blocks.1.0.fq.{name}"] for name in ("initialized", "num_updates", "seed")}
    assert scalars["initialized"].dtype == torch.bool and scalars["initialized"].item() is True
    assert all(scalars[name].dtype == torch.int64 and not scalars[name] for name in ("num_updates", "seed"))
    assert torch.equal(ours["blocks.1.1.gamma"], state["blocks.1.2.gamma"])
    assert torch.equal(ours["blocks.2.1.gamma"], state["blocks.2.1.gamma"])
    assert not any(re.match(r"blocks\.1\.(1\.embed|2\.)", key) for key in ours)


def test_converted_state_loads_strictly_into_a_model_with_quantisers():
    model = Discriminator(small(d_attention=(16,)))
    plain = {k: torch.randn(v.shape) for k, v in model.state_dict().items()}
    sites = (0, 3)
    original = {re.sub(r"^(blocks\.[03])\.1\.", r"\1.2.", k): v for k, v in plain.items()}
    for site in sites:
        original[f"blocks.{site}.1.embed"] = torch.randn(8, 4)
        original[f"blocks.{site}.1.cluster_size"] = torch.rand(4)
        original[f"blocks.{site}.1.embed_avg"] = torch.randn(8, 4)
    attach(model, [f"blocks.{site}.0" for site in sites], codebook_size=4, compat="torch")
    model.load_state_dict(from_fq_biggan(original), strict=True)
    back = to_fq_biggan(model.state_dict())
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


def test_damaged_quantisers_are_refused():
    state = original_state({2}, set())
    with pytest.raises(ValueError, match=r"blocks\.2\.1 lacks embed_avg"):
        from_fq_biggan({k: v for k, v in state.items() if not k.endswith("embed_avg")})
    with pytest.raises(ValueError, match=r"embed \[8, 4\], embed_avg \[8, 4\] and cluster_size \[5\]"):
        from_fq_biggan(state | {"blocks.2.1.cluster_size": torch.zeros(5)})
    ours = from_fq_biggan(state)
    with pytest.raises(ValueError, match=r"has the buffers .*pending.* can be converted"):
        to_fq_biggan(ours | {"blocks.2.0.fq.pending": torch.zeros(4, 9)})
    with pytest.raises(ValueError, match="has no codes yet"):
        to_fq_biggan(ours | {"blocks.2.0.fq.initialized": torch.tensor(False)})
