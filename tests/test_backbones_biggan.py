"""Behaviour of the BigGAN networks; their numbers are compared in test_benchmarks_parity."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from backbones.biggan import (
    LAYOUTS,
    BigGANConfig,
    Discriminator,
    Generator,
    add_orthogonal_gradient,
    orthogonal_gradient,
)

LOCAL = Path(__file__).parent / "data" / "golden" / "backbones"
SHARED = Path(__file__).parents[2] / "shared" / "golden" / "backbones"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def small(**changes):
    return BigGANConfig(**({"g_channels": 2, "d_channels": 2, "latent_dim": 8, "num_classes": 5} | changes))


def labels(number=2):
    return torch.arange(number) % 5


def pictures(config, number=2):
    return torch.randn(number, 3, config.resolution, config.resolution)


@pytest.mark.parametrize(
    ("folder", "name", "config"),
    [
        (LOCAL, "biggan32_cifar.npz", BigGANConfig(g_channels=8, d_channels=8, latent_dim=16)),
        (
            SHARED,
            "biggan64_hier_attn.npz",
            BigGANConfig(
                resolution=64,
                num_classes=7,
                g_channels=4,
                d_channels=8,
                latent_dim=20,
                shared_dim=12,
                hierarchical=True,
                g_attention=(32,),
                d_attention=(32,),
            ),
        ),
    ],
)
def test_state_keys_have_the_public_order_and_shapes(folder, name, config):
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is not here")
    meta = json.loads(str(np.load(folder / name)["meta_json"]))
    for network, model in (("G", Generator(config)), ("D", Discriminator(config))):
        assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == meta[f"{network}_keys"]
        assert [k for k, _ in model.named_parameters()] == meta[f"{network}_params"]


@pytest.mark.parametrize(
    ("config", "g_millions", "d_millions"),
    [
        (BigGANConfig(init="normal02"), 4.30, 4.21),
        (BigGANConfig(init="normal02", num_classes=100), 4.58, 4.23),
        (
            BigGANConfig(
                resolution=64,
                num_classes=1000,
                latent_dim=120,
                shared_dim=128,
                hierarchical=True,
                g_attention=(32,),
                d_attention=(32,),
                init="normal02",
            ),
            31.97,
            20.57,
        ),
        (
            BigGANConfig(
                resolution=128,
                num_classes=1000,
                g_channels=96,
                d_channels=96,
                latent_dim=120,
                shared_dim=128,
                hierarchical=True,
                g_attention=(64,),
                d_attention=(64,),
                init="normal02",
            ),
            70.43,
            87.98,
        ),
    ],
    ids=["cifar10", "cifar100", "imagenet64", "imagenet128"],
)
def test_parameter_counts_of_the_published_models(config, g_millions, d_millions):
    with torch.device("meta"):
        models = Generator(config), Discriminator(config)
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    assert counts == pytest.approx([g_millions, d_millions], abs=0.006)


@pytest.mark.parametrize("resolution", sorted(LAYOUTS))
def test_every_resolution_makes_and_judges_its_pictures(resolution):
    config = small(resolution=resolution, g_channels=1, d_channels=1)
    generator, discriminator = Generator(config), Discriminator(config)
    images = generator(torch.randn(2, 8), generator.shared(labels()))
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1
    assert discriminator(images, labels()).shape == (2, 1)


@pytest.mark.parametrize(
    ("resolution", "sizes"),
    [(16, [8, 8, 8, 8]), (32, [16, 8, 8, 8]), (64, [32, 16, 8, 4, 4]), (128, [64, 32, 16, 8, 4, 4])],
)
def test_discriminator_maps_shrink_as_in_the_table(resolution, sizes):
    discriminator = Discriminator(small(resolution=resolution))
    seen = []
    for block in discriminator.blocks:
        block[0].register_forward_hook(lambda module, args, out: seen.append((module, out.shape)))
    discriminator(pictures(discriminator.config), labels())
    assert [shape[-1] for _, shape in seen] == sizes
    assert all(module.out_channels == shape[1] for module, shape in seen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "resolution is 48 .* 16, 32, 64, 128, 256"),
        ({"num_classes": 0}, "num_classes is 0 but must be at least 1"),
        ({"g_channels": 0}, "g_channels is 0"),
        ({"shared_dim": -1}, "shared_dim is -1"),
        ({"sn_eps": 0.0}, "sn_eps is 0.0"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"hierarchical": True}, "hierarchical is True with shared_dim 0"),
        ({"hierarchical": True, "shared_dim": 4, "latent_dim": 3}, "latent_dim is 3 .* 4 slots"),
        ({"d_attention": (8,)}, "d_attention holds 8 .* labelled 16, 16, 16, 16"),
        ({"g_attention": (64,)}, "g_attention holds 64 .* labelled 8, 16, 32"),
        ({"g_attention": (32,), "g_channels": 1}, "has 4 channels: .* g_channels"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_calls_with_wrong_inputs_are_refused():
    config = small(shared_dim=4)
    generator, discriminator, own = Generator(config), Discriminator(config), Generator(small())
    with pytest.raises(ValueError, match=r"z has shape \(2, 7\) .* \[batch, 8\]"):
        generator(torch.randn(2, 7), generator.shared(labels()))
    with pytest.raises(ValueError, match=r"pass generator.shared\(labels\)"):
        generator(torch.randn(2, 8), labels())
    with pytest.raises(ValueError, match="no shared embedding"):
        own(torch.randn(2, 8), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"images have shape \(2, 3, 64, 64\)"):
        discriminator(torch.randn(2, 3, 64, 64), labels())
    with pytest.raises(ValueError, match="one integer for each of the 2 images"):
        discriminator(pictures(config), labels(3))


def test_hierarchical_latent_is_cut_into_equal_slots():
    config = small(resolution=128, g_channels=1, latent_dim=128, shared_dim=4, hierarchical=True)
    generator = Generator(config)
    assert generator.latent_dim == 126  # 6 slots of 21
    assert generator.linear.in_features == 21
    assert generator.blocks[0][0].bn1.gain.in_features == 4 + 21


def test_every_slice_of_a_hierarchical_latent_changes_the_picture():
    generator = Generator(small(latent_dim=8, shared_dim=4, hierarchical=True)).eval()
    z, y = torch.randn(1, 8), generator.shared(labels(1))
    plain = generator(z, y)
    for slot in range(4):
        moved = z.clone()
        moved[:, 2 * slot] += 1
        assert (generator(moved, y) - plain).abs().max() > 1e-6


def test_attention_label_16_at_32_px_follows_all_four_blocks():
    assert [len(b) for b in Discriminator(small(d_attention=(16,))).blocks] == [2, 2, 2, 2]
    assert [len(b) for b in Discriminator(small()).blocks] == [1, 1, 1, 1]
    config = small(resolution=64, d_channels=8, d_attention=(32,))
    assert [len(b) for b in Discriminator(config).blocks] == [2, 1, 1, 1, 1]
    assert [len(b) for b in Generator(small(g_attention=(8, 32))).blocks] == [2, 1, 2]


def test_attention_starts_as_the_identity():
    attention = Discriminator(small(d_attention=(16,))).blocks[0][1]
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(attention(x), x)


def test_thin_blocks_are_as_wide_inside_as_their_input():
    config = small(resolution=64, wide=False)
    hidden = [block[0].conv1.out_channels for block in Discriminator(config).blocks]
    assert hidden == [3, 2, 4, 8, 16]


def test_shortcut_reads_the_raw_input_of_a_block():
    block = Discriminator(small(spectral_norm=False)).blocks[1][0]
    x = torch.randn(2, 8, 8, 8)
    before = x.clone()
    main = F.avg_pool2d(block.conv2(F.relu(block.conv1(F.relu(x)))), 2)
    torch.testing.assert_close(block(x), main + F.avg_pool2d(block.conv_sc(x), 2))
    assert torch.equal(x, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_head_overwrites_the_last_block_output(inplace):
    discriminator = Discriminator(small(inplace_relu=inplace)).eval()
    kept = []
    discriminator.blocks[-1][0].register_forward_hook(lambda module, args, out: kept.append(out))
    discriminator(pictures(discriminator.config), labels())
    assert bool((kept[0] < 0).any()) is not inplace


def test_inplace_relu_changes_neither_outputs_nor_gradients():
    models = [Discriminator(small(inplace_relu=inplace)) for inplace in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x = pictures(models[0].config)
    outputs = [model(x, labels()) for model in models]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first.grad, second.grad)


def test_power_iteration_is_stored_in_train_mode_only():
    discriminator = Discriminator(small(init="normal02"))
    conv, x = discriminator.blocks[0][0].conv1, pictures(discriminator.config)
    before = {k: v.clone() for k, v in discriminator.state_dict().items()}
    discriminator.eval()(x, labels())
    assert all(torch.equal(v, before[k]) for k, v in discriminator.state_dict().items())
    with torch.no_grad():
        discriminator.train()(x, labels())
    assert not torch.equal(conv.u0, before["blocks.0.0.conv1.u0"])
    assert not torch.equal(conv.sv0, before["blocks.0.0.conv1.sv0"])


def test_repeated_forwards_find_the_largest_singular_value():
    conv = Discriminator(small()).blocks[1][0].conv1
    for _ in range(300):
        conv.normalised_weight()
    expected = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), ord=2)
    assert conv.sv0.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.linalg.matrix_norm(conv.normalised_weight().flatten(1), ord=2).item() == pytest.approx(
        1, rel=1e-4
    )


def test_gradient_flows_through_sigma_with_constant_vectors():
    linear = Generator(small()).linear.eval()
    cotangent = torch.randn_like(linear.weight)
    (gradient,) = torch.autograd.grad((linear.normalised_weight() * cotangent).sum(), linear.weight)
    weight = linear.weight.detach()
    v = F.normalize(linear.u0 @ weight)
    u = F.normalize(v @ weight.t())
    sigma = (v @ weight.t() @ u.t()).item()
    expected = (cotangent - (cotangent * weight / sigma).sum() * u.t() @ v) / sigma
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_two_forwards_before_one_backward_give_the_sum_of_gradients():
    config = small(d_attention=(16,), inplace_relu=True)
    together = Discriminator(config)
    apart = copy.deepcopy(together)
    first, second = pictures(config), pictures(config)
    (together(first, labels()).sum() + together(second, labels()).sum()).backward()
    for x in (first, second):
        apart(x, labels()).sum().backward()
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_generator_survives_two_forwards_before_one_backward():
    generator = Generator(small(shared_dim=4, hierarchical=True))
    images = [generator(torch.randn(3, 8), generator.shared(labels(3))) for _ in range(2)]
    (images[0].sum() + images[1].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_gradient_penalty_reaches_all_blocks_and_attention():
    discriminator = Discriminator(small(d_attention=(16,), inplace_relu=True))
    for block in discriminator.blocks:
        torch.nn.init.ones_(block[1].gamma)
    x = pictures(discriminator.config).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x, labels()).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    weights = [p for n, p in discriminator.named_parameters() if n.endswith("weight")]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(way):
    config = small(shared_dim=4, hierarchical=True, g_attention=(16,), d_attention=(16,))
    generator, discriminator = Generator(config), Discriminator(config)
    z, y, x = torch.randn(2, 8), labels(), pictures(config)
    discriminator(x, y).sum().backward()
    generator(z, generator.shared(y))
    other_g, other_d = way(generator).eval(), way(discriminator).eval()
    assert other_g.config == config
    expected = generator.eval()(z, generator.shared(y)), discriminator.eval()(x, y)
    torch.nn.init.zeros_(generator.linear.weight)
    torch.nn.init.zeros_(discriminator.linear.weight)
    assert torch.equal(other_g(z, other_g.shared(y)), expected[0])
    assert torch.equal(other_d(x, y), expected[1])


def test_channels_last_gives_the_same_numbers():
    config = small(shared_dim=4, g_attention=(16,), d_attention=(16,))
    generator, discriminator = Generator(config).eval(), Discriminator(config).eval()
    z, y, x = torch.randn(2, 8), labels(), pictures(config)
    expected = generator(z, generator.shared(y)), discriminator(x, y)
    for model in (generator, discriminator):
        model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(generator(z, generator.shared(y)), expected[0], rtol=1e-4, atol=1e-5)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(discriminator(last, y), expected[1], rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_singular_value_in_float32():
    plain = Discriminator(small())
    cast, x = copy.deepcopy(plain), pictures(plain.config)
    plain(x, labels())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(x, labels())
    for (name, one), other in zip(plain.named_buffers(), cast.buffers(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other), name


def test_plain_layers_keep_the_names_of_the_normalised_ones():
    for network in (Generator, Discriminator):
        plain = network(small(spectral_norm=False, shared_dim=4)).state_dict()
        normalised = network(small(shared_dim=4)).state_dict()
        assert list(plain) == [k for k in normalised if not k.endswith((".u0", ".sv0"))]


def test_normalised_weights_in_plain_layers_give_the_same_logits():
    normalised = Discriminator(small()).eval()
    state = {k: v for k, v in normalised.state_dict().items() if not k.endswith((".u0", ".sv0"))}
    for name, module in normalised.named_modules():
        if hasattr(module, "normalised_weight"):
            state[f"{name}.weight"] = module.normalised_weight().detach()
    plain = Discriminator(small(spectral_norm=False))
    plain.load_state_dict(state, strict=True)
    x = pictures(plain.config)
    torch.testing.assert_close(plain(x, labels()), normalised(x, labels()))


@pytest.mark.parametrize("shared_dim", [0, 4])
def test_labels_change_pictures_and_logits(shared_dim):
    config = small(shared_dim=shared_dim)
    generator, discriminator = Generator(config).eval(), Discriminator(config).eval()
    z, x = torch.randn(1, 8).expand(2, 8), pictures(config, 1).expand(2, 3, 32, 32)
    images = generator(z, generator.shared(labels()))
    assert (images[0] - images[1]).abs().max() > 1e-4
    logits = discriminator(x, labels())
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_no_generator_embedding_is_spectrally_normalised():
    for shared_dim in (0, 4):
        generator = Generator(small(shared_dim=shared_dim))
        tables = [m for m in generator.modules() if isinstance(m, torch.nn.Embedding)]
        assert tables and not any(hasattr(table, "u0") for table in tables)


def test_initialisation_follows_the_configuration():
    weights = {
        init: Discriminator(small(d_channels=16, init=init)).blocks[1][0].conv2.weight.detach().flatten(1)
        for init in ("ortho", "normal02", "xavier")
    }
    torch.testing.assert_close(weights["ortho"] @ weights["ortho"].t(), torch.eye(64), rtol=0, atol=1e-5)
    assert weights["normal02"].std().item() == pytest.approx(0.02, rel=0.02)
    bound = (6 / (2 * 64 * 9)) ** 0.5
    assert 0.99 * bound < weights["xavier"].abs().max().item() <= bound


def test_orthogonal_gradient_is_that_of_half_the_squared_overlaps():
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    matrix = weight.flatten(1)
    overlap = (matrix @ matrix.t()) * (1 - torch.eye(4, dtype=torch.float64))
    (expected,) = torch.autograd.grad(0.5 * overlap.square().sum(), weight)
    torch.testing.assert_close(orthogonal_gradient(weight, 0.1), 0.1 * expected)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        orthogonal_gradient(torch.ones(3), 1.0)


def test_orthogonal_gradient_is_added_to_weights_but_not_to_the_shared_embedding():
    generator = Generator(small(shared_dim=4, init="xavier"))
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    generator.linear.weight.grad = None
    add_orthogonal_gradient(generator, 1.0)
    changed = {n for n, p in generator.named_parameters() if p.grad is not None and (p.grad != 1).any()}
    matrices = {n for n, p in generator.named_parameters() if p.ndim >= 2}
    assert changed == matrices - {"shared.weight", "linear.weight"}
