"""Discriminators built as the public ones are, in loops that call them in the public trainers' order."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

import fq
from fq.attach import CHILD


class Counted:
    """A loss scale that counts its readings: one for each injection."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.reads = value, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.value

    def since(self) -> int:
        reads, self.reads = self.reads, 0
        return reads


def updates(handle: fq.Handle) -> list[int]:
    return [int(quantizer.num_updates) for quantizer in handle.quantizers.values()]


def toggle(model: nn.Module, on: bool) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = on


def assert_trained(*models: nn.Module) -> None:
    """Every parameter has a finite gradient that is not zero throughout."""
    for model in models:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


# Structures


def conv(
    channels_in: int, channels_out: int, size: int = 3, norm: Any = parametrizations.spectral_norm
) -> Any:
    return norm(nn.Conv2d(channels_in, channels_out, size, padding=size // 2))


class BigGANBlock(nn.Module):
    def __init__(self, channels_in, channels_out, down):
        super().__init__()
        self.in_channels, self.out_channels, self.down = channels_in, channels_out, down
        self.conv1, self.conv2 = conv(channels_in, channels_out), conv(channels_out, channels_out)
        self.conv_sc = conv(channels_in, channels_out, 1)

    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(F.relu(x)))) + self.conv_sc(x)
        return F.avg_pool2d(h, 2) if self.down else h


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.theta, self.o = conv(channels, 4, 1), conv(4, channels, 1)
        self.gamma = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return x + self.gamma * self.o(self.theta(x))


class BigGAN(nn.Module):
    """``blocks.i.0``, attention behind it; the head overwrites the last block's output."""

    def __init__(self, widths=(8, 8, 12, 12), classes=10, heads=("linear", "embed")):
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.blocks = nn.ModuleList(
            nn.ModuleList([BigGANBlock(a, b, i < 2), *([Attention(b)] if i == 1 else [])])
            for i, (a, b) in enumerate(pairs)
        )
        self.linear = parametrizations.spectral_norm(nn.Linear(widths[-1], 1))
        self.embed = parametrizations.spectral_norm(nn.Embedding(classes, widths[-1]))
        if "linear_c" in heads:
            self.linear_c = nn.Linear(widths[-1], classes)

    def forward(self, x, y):
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        h = F.relu(x, inplace=True).sum((2, 3))
        out = self.linear(h) + (self.embed(y) * h).sum(1, keepdim=True)
        return (out, self.linear_c(h)) if hasattr(self, "linear_c") else out


class StudioBlock(nn.Module):
    def __init__(self, channels_in, channels_out, first):
        super().__init__()
        self.first, self.activation = first, nn.ReLU(inplace=True)
        self.conv2d0 = conv(channels_in, channels_out, 1, spectral_norm)
        self.conv2d1 = conv(channels_in, channels_out, 3, spectral_norm)
        self.conv2d2 = conv(channels_out, channels_out, 3, spectral_norm)
        self.average_pooling = nn.AvgPool2d(2)

    def forward(self, x):
        h = self.conv2d1(x if self.first else F.relu(x))
        return self.average_pooling(self.conv2d2(self.activation(h)) + self.conv2d0(x))


class Studio(nn.Module):
    """Attention has an entry of its own in ``blocks``; the result is a dict."""

    def __init__(self, widths=(8, 8, 12, 12, 16), classes=10):
        super().__init__()
        blocks = []
        for i, (a, b) in enumerate(zip((3, *widths), widths, strict=False)):
            blocks += [[StudioBlock(a, b, i == 0)], *([[Attention(b)]] if i == 0 else [])]
        self.blocks = nn.ModuleList([nn.ModuleList(block) for block in blocks])
        self.linear1 = spectral_norm(nn.Linear(widths[-1], 1))
        self.embedding = spectral_norm(nn.Embedding(classes, widths[-1]))

    def forward(self, x, label, adc_fake=False):
        for block in self.blocks:
            for layer in block:
                x = layer(x)
        h = x.relu_().sum((2, 3))
        return {
            "h": h,
            "adv_output": (self.linear1(h) + (self.embedding(label) * h).sum(1, keepdim=True))[:, 0],
        }


class DeepBlock(nn.Module):
    """Bottleneck: 1x1, 3x3, 3x3, 1x1, and a shortcut convolution for the added channels alone."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv2d1, self.conv2d2 = conv(channels_in, 4, 1), conv(4, 4)
        self.conv2d3, self.conv2d4 = conv(4, 4), conv(4, channels_out, 1)
        self.conv2d0 = conv(channels_in, channels_out - channels_in, 1)

    def forward(self, x):
        h = self.conv2d4(F.relu(self.conv2d3(F.relu(self.conv2d2(F.relu(self.conv2d1(F.relu(x))))))))
        return F.avg_pool2d(h + torch.cat([x, self.conv2d0(x)], 1), 2)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_conv = conv(3, 6)
        self.blocks = nn.ModuleList(nn.ModuleList([DeepBlock(a, a + 2)]) for a in (6, 8, 10))
        self.linear = nn.Linear(12, 1)

    def forward(self, x):
        x = self.input_conv(x)
        for block in self.blocks:
            x = block[0](x)
        return self.linear(F.relu(x).sum((2, 3)))


class Generator(nn.Module):
    """BigGAN's generator has residual ``blocks.i.0`` as well, and a ``linear``."""

    def __init__(self, latent=8, blocks=3):
        super().__init__()
        self.linear = nn.Linear(latent, 8 * 16)
        self.blocks = nn.ModuleList(nn.ModuleList([BigGANBlock(8, 8, False)]) for _ in range(blocks))
        self.output_layer = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, z, y):
        x = self.linear(z).view(-1, 8, 4, 4)
        for block in self.blocks:
            x = block[0](F.interpolate(x, scale_factor=2))
        return self.output_layer(x).tanh()


class EqualConv(nn.Module):
    """A convolution that tells its channels by its weight alone."""

    def __init__(self, channels_in, channels_out, size=3, down=1):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, size, size))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.register_buffer("resample_filter", torch.ones(4, 4) / 16)
        self.down = down

    def forward(self, x, act=True):
        weight = self.weight / self.weight[0].numel() ** 0.5
        x = F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)
        x = F.avg_pool2d(x, self.down) if self.down > 1 else x
        return F.leaky_relu(x, 0.2) if act else x


class EqualLinear(nn.Module):
    def __init__(self, features_in, features_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_out, features_in))
        self.bias = nn.Parameter(torch.zeros(features_out))

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.shape[1] ** 0.5, self.bias)


class StyleBlock(nn.Module):
    """Takes and returns ``(x, img)``; sums into the shortcut in place."""

    def __init__(self, channels_in, hidden, channels_out, low_precision):
        super().__init__()
        self.in_channels, self.low_precision = channels_in, low_precision
        if channels_in == 0:
            self.fromrgb = EqualConv(3, hidden, 1)
        self.conv0, self.conv1 = EqualConv(hidden, hidden), EqualConv(hidden, channels_out, down=2)
        self.skip = EqualConv(hidden, channels_out, 1, down=2)

    def forward(self, x, img, force_fp32=False):
        dtype = torch.bfloat16 if self.low_precision and not force_fp32 else torch.float32
        if x is not None:
            x = x.to(dtype)
        if self.in_channels == 0:
            x, img = self.fromrgb(img.to(dtype)), None
        y = self.skip(x, act=False)
        x = y.add_(self.conv1(self.conv0(x)))
        assert x.dtype == dtype
        return x, img


class StyleEpilogue(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = EqualConv(channels + 1, channels)
        self.fc, self.out = EqualLinear(channels * 16, channels), EqualLinear(channels, 1)

    def forward(self, x, img, cmap):
        x = x.float()
        deviation = (x.var(0, correction=0) + 1e-8).sqrt().mean().expand(len(x), 1, *x.shape[2:])
        return self.out(F.leaky_relu(self.fc(self.conv(torch.cat([x, deviation], 1)).flatten(1)), 0.2))


class StyleGAN2(nn.Module):
    def __init__(self, resolution=32, widths=(6, 8, 12, 16, 16), low_precision=False):
        super().__init__()
        self.sizes = [resolution >> i for i in range(resolution.bit_length() - 3)]
        for i, size in enumerate(self.sizes):
            block = StyleBlock(widths[i] if i else 0, widths[i], widths[i + 1], low_precision and i == 0)
            setattr(self, f"b{size}", block)
        self.b4 = StyleEpilogue(widths[len(self.sizes)])

    def forward(self, img, c, **block_kwargs):
        x = None
        for size in self.sizes:
            x, img = getattr(self, f"b{size}")(x, img, **block_kwargs)
        return self.b4(x, img, None)


class ResBlock(nn.Module):
    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.conv1 = nn.Sequential(EqualConv(channels_in, channels_in), nn.LeakyReLU(0.2))
        self.conv2 = nn.Sequential(EqualConv(channels_in, channels_out, down=2), nn.LeakyReLU(0.2))
        self.skip = nn.Sequential(EqualConv(channels_in, channels_out, 1, down=2))

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.skip(x)) / 2**0.5


class Rosinality(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(EqualConv(3, 6, 1), ResBlock(6, 8), ResBlock(8, 12))
        self.final_linear = nn.Sequential(EqualLinear(12 * 16, 8), EqualLinear(8, 1))

    def forward(self, x):
        return self.final_linear(self.convs(x).flatten(1))


class UGATIT(nn.Module):
    """Judges with an attention map; its activations work in place."""

    def __init__(self, layers=7, width=4):
        super().__init__()
        trunk, channels = [], 3
        for i in range(layers - 1):
            stride = 2 if i < layers - 2 else 1
            trunk += [nn.ReflectionPad2d(1), spectral_norm(nn.Conv2d(channels, width << i, 4, stride)),
                      nn.LeakyReLU(0.2, True)]  # fmt: skip
            channels = width << i
        self.gap_fc = spectral_norm(nn.Linear(channels, 1, bias=False))
        self.gmp_fc = spectral_norm(nn.Linear(channels, 1, bias=False))
        self.conv1x1 = nn.Conv2d(channels * 2, channels, 1)
        self.leaky_relu, self.pad = nn.LeakyReLU(0.2, True), nn.ReflectionPad2d(1)
        self.conv = spectral_norm(nn.Conv2d(channels, 1, 4, bias=False))
        self.model = nn.Sequential(*trunk)

    def forward(self, x):
        x = self.model(x)
        cam = torch.cat([self.gap_fc(x.mean((2, 3))), self.gmp_fc(x.amax((2, 3)))], 1)
        weights = [next(iter(fc.parameters()))[:, :, None, None] for fc in (self.gap_fc, self.gmp_fc)]
        x = self.leaky_relu(self.conv1x1(torch.cat([x * weight for weight in weights], 1)))
        return self.conv(self.pad(x)), cam, x.sum(1, keepdim=True)


def pictures(batch: int = 4, size: int = 32) -> Tensor:
    return torch.rand(batch, 3, size, size) * 2 - 1


# Presets know a discriminator by how it is built

PAPER = {  # discriminator, preset, layers, codes, channels, decay, commitment weight
    "BigGAN 32": (BigGAN, "biggan", ["blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0"],
                  [1024] * 4, [8, 8, 12, 12], 0.8, 1.0),
    "BigGAN 32, 100 classes": (lambda: BigGAN(classes=100), "biggan", [f"blocks.{i}.0" for i in range(4)],
                               [64] * 4, [8, 8, 12, 12], 0.9, 10.0),
    "TAC-GAN": (lambda: BigGAN(classes=100, heads=("linear_c",)), "biggan",
                [f"blocks.{i}.0" for i in range(4)], [64] * 4, [8, 8, 12, 12], 0.9, 10.0),
    "BigGAN 64": (lambda: BigGAN((4, 5, 6, 7, 8), 1000), "biggan", ["blocks.2.0"], [1024], [6], 0.7, 0.5),
    "BigGAN 128": (lambda: BigGAN((4, 5, 6, 7, 8, 8), 1000), "biggan", [f"blocks.{i}.0" for i in range(4)],
                   [1024] * 4, [4, 5, 6, 7], 0.8, 15.0),
    "StudioGAN 32": (lambda: Studio((8, 8, 12, 12)), "biggan",
                     ["blocks.0.0", "blocks.2.0", "blocks.3.0", "blocks.4.0"],
                     [1024] * 4, [8, 8, 12, 12], 0.8, 1.0),
    "StudioGAN 64": (Studio, "biggan", ["blocks.3.0"], [1024], [12], 0.7, 0.5),
    "deep": (Deep, "biggan", [f"blocks.{i}.0" for i in range(3)], [1024] * 3, [8, 10, 12], 0.8, 1.0),
    "StyleGAN2 32": (StyleGAN2, "stylegan2", ["b32", "b16"], [128] * 2, [8, 12], 0.8, 0.25),
    "StyleGAN2 64": (lambda: StyleGAN2(64), "stylegan2", ["b32", "b16"], [128] * 2, [12, 16], 0.8, 0.25),
    "StyleGAN2 16": (lambda: StyleGAN2(16), "stylegan2", ["b16"], [128], [8], 0.8, 0.25),
    "U-GAT-IT": (UGATIT, "ugatit", ["model.5", "model.8", "model.11"], [64, 128, 128],
                 [8, 16, 32], 0.85, 2.0),
    "U-GAT-IT 64 px": (lambda: UGATIT(6), "ugatit", ["model.5", "model.8", "model.11"], [64, 128, 128],
                       [8, 16, 32], 0.85, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_presets_find_the_papers_layers_and_settings(name):
    make, preset, layers, sizes, channels, decay, weight = PAPER[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    handle = fq.attach(model, preset)
    assert handle.names == layers
    found = [(q.codebook_size, q.dim, q.decay, q.commitment_weight) for q in handle.quantizers.values()]
    assert found == [(size, dim, decay, weight) for size, dim in zip(sizes, channels, strict=True)]
    plain = handle.strip(model.state_dict())
    assert all(torch.equal(plain[key], before[key]) for key in before), "recognising ran a spectral norm"


def test_what_the_caller_gives_wins_over_the_preset():
    handle = fq.attach(UGATIT(), "ugatit", codebook_size=16, commitment_weight=0.5, mode="replace")
    found = [(q.codebook_size, q.decay, q.commitment_weight, q.mode) for q in handle.quantizers.values()]
    assert found == [(16, 0.85, 0.5, "replace")] * 3


def test_a_module_of_a_presets_name_is_the_module():
    model = nn.ModuleDict({"biggan": nn.Conv2d(3, 4, 1)})
    assert fq.attach(model, "biggan", codebook_size=4).names == ["biggan"]


@pytest.mark.parametrize(
    ("make", "preset", "message"),
    [
        (UGATIT, "biggan", r"UGATIT is not built like .* 'biggan': looked for three or more residual bl.*"
                           r"nearest names are '.*; it is built like preset 'ugatit': give that, or the"),
        (Generator, "biggan", r"Generator is not built .* names are 'blocks\.0\.0', .* give the names"),
        (BigGAN, "stylegan2", r"looked for blocks 'b<size>' for every power of two .* like preset 'biggan'"),
        (lambda: StyleGAN2(8), "stylegan2", "looked for blocks 'b<size>' for every power of two from 8 to"),
        (lambda: UGATIT(5), "ugatit", r"LeakyReLUs .* \(the local discriminator, which ends at 'model\.11'"),
        (lambda: UGATIT(4), "ugatit", r"LeakyReLUs 'model\.5'.* nearest names are 'model\.5', .*'gap_fc'"),
        (nn.Identity, "ugatit", "nearest names are none, for the model has none; give the names of the"),
    ],
)  # fmt: skip
def test_a_model_of_another_build_is_told_what_was_looked_for(make, preset, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        fq.attach(model, preset)
    assert not any(CHILD in module._modules for module in model.modules())


def test_names_need_a_codebook_size_and_unknown_names_list_the_presets():
    model = BigGAN()
    with pytest.raises(ValueError, match=r"codebook_size of layer 'blocks\.1\.0' is missing: give .* 256"):
        fq.attach(model, {"blocks.0.0": {"codebook_size": 4}, "blocks.1.0": {}})
    with pytest.raises(ValueError, match="there are the presets biggan, stylegan2, ugatit"):
        fq.attach(model, "stylegan3", codebook_size=4)


@pytest.mark.parametrize(
    ("make", "layers", "channels"),
    [
        (StyleGAN2, ["b32", "b16", "b8"], [8, 12, 16]),
        (UGATIT, ["model.2", "model.4", "model.17"], [4, 8, 128]),
        (Rosinality, ["convs.1", "convs.2"], [8, 12]),
        (Studio, ["blocks.0.0", "blocks.1.0", "blocks.5.0"], [8, 8, 16]),
    ],
)
def test_channels_of_public_layers_are_read_off_their_weights(make, layers, channels):
    handle = fq.attach(make(), layers, codebook_size=4)
    assert sorted(q.dim for q in handle.quantizers.values()) == sorted(channels)


# BigGAN-PyTorch: toggled gradients, several D steps a G step, accumulation, one batch or two


def biggan_iteration(G: nn.Module, D: nn.Module, optimizers: Any, *, split: bool, accumulations: int,
                     d_steps: int = 4, batch: int = 4) -> None:  # fmt: skip
    optimizer_g, optimizer_d = optimizers

    def fakes() -> tuple[Tensor, Tensor]:
        y = torch.randint(10, (batch,))
        return G(torch.randn(batch, 8), y), y

    optimizer_g.zero_grad(), optimizer_d.zero_grad()
    toggle(D, True), toggle(G, False)
    for _ in range(d_steps):
        optimizer_d.zero_grad()
        for _ in range(accumulations):
            real, y = pictures(batch), torch.randint(10, (batch,))
            with torch.no_grad():
                fake, y_fake = fakes()
            if split:
                on_fake, on_real = D(fake, y_fake), D(real, y)
            else:
                on_fake, on_real = D(torch.cat([fake, real]), torch.cat([y_fake, y])).split(batch)
            (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()).div(accumulations).backward()
        optimizer_d.step()
    toggle(D, False), toggle(G, True)
    optimizer_g.zero_grad()
    for _ in range(accumulations):
        (-D(*fakes()).mean() / accumulations).backward()
    optimizer_g.step()


@pytest.mark.parametrize("mode", ["regularize", "replace"])
@pytest.mark.parametrize("accumulations", [1, 2])
@pytest.mark.parametrize("split", [False, True])
def test_bigganlike_training_runs_untouched(split, accumulations, mode):
    torch.manual_seed(0)
    G, D, scale = Generator(), BigGAN(), Counted(1 / accumulations)
    handle = fq.attach(D, "biggan", codebook_size=16, mode=mode, concat_parts=1 if split else 2,
                       inject=True, loss_scale=scale)  # fmt: skip
    optimizers = [torch.optim.Adam(model.parameters(), 2e-4, betas=(0.0, 0.999)) for model in (G, D)]
    for iteration in range(1, 3):
        biggan_iteration(G, D, optimizers, split=split, accumulations=accumulations)
        forwards = 4 * accumulations * (2 if split else 1)  # of D steps; the G step is for the codes to rest
        assert updates(handle) == [forwards * iteration] * 4
        assert scale.since() == 4 * (forwards + accumulations)
        assert_trained(G, D)
    assert handle.loss() == 0 and all(report.commitment > 0 for report in handle.stats().values())


def test_injection_trains_bigganlike_models_as_the_explicit_loss_does():
    """A loop with the loss in it, beside the same loop without."""
    results = []
    for inject in (False, True):
        torch.manual_seed(0)
        D = BigGAN()
        handle = fq.attach(D, "biggan", codebook_size=16, concat_parts=2, inject=inject)
        optimizer = torch.optim.SGD(D.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            on_fake, on_real = D(torch.cat([pictures(), pictures()]), torch.randint(10, (8,))).split(4)
            loss = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
            (loss if inject else loss + handle.loss()).backward()
            optimizer.step()
        results.append(D.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5)


def test_studiolike_and_taclike_models_with_dicts_and_tuples_train():
    torch.manual_seed(0)
    for D, score in ((Studio(), lambda out: out["adv_output"]), (BigGAN(heads=("linear_c",)), sum_of_heads)):
        scale = Counted()
        handle = fq.attach(D, "biggan", codebook_size=8, inject=True, loss_scale=scale)
        for _ in range(2):
            score(D(pictures(4, 64), torch.randint(10, (4,)))).mean().backward()
        assert scale.reads == 2 * len(handle.names) and updates(handle) == [2] * len(handle.names)
        assert_trained(D)


def sum_of_heads(out: tuple[Tensor, Tensor]) -> Tensor:
    return out[0].mean() + F.cross_entropy(out[1], torch.arange(len(out[1])))


# stylegan2-ada-pytorch: phases with a backward pass for each part


class StyleGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.mapping, self.synthesis = nn.Linear(8, 12), nn.Sequential(
            nn.Unflatten(1, (12, 1, 1)), nn.ConvTranspose2d(12, 8, 8), nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=4), nn.Conv2d(8, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, z, c):
        return self.synthesis(self.mapping(z))


def accumulate_gradients(
    phase: str,
    G: nn.Module,
    D: nn.Module,
    real: Tensor,
    gain: float,
    augment: Any = None,
    gamma=10.0,
) -> None:
    main, regularise = phase.endswith(("main", "both")), phase.endswith(("reg", "both"))
    z, c = torch.randn(len(real), 8), torch.zeros(len(real), 0)
    if phase[0] == "G":
        if main:
            F.softplus(-D(G(z, c), c)).mean().mul(gain).backward()
        if regularise:
            ws = G.mapping(z)
            image = G.synthesis(ws)
            noise = torch.randn_like(image) / 32
            (jacobian,) = torch.autograd.grad((image * noise).sum(), ws, create_graph=True)
            lengths = jacobian.square().sum(1).sqrt()
            (image[:, 0, 0, 0] * 0 + (lengths - lengths.mean().detach()).square()).mean().mul(gain).backward()
        return
    if main:
        F.softplus(D(G(z, c), c)).mean().mul(gain).backward()
    leaf = real.detach().requires_grad_(regularise)
    scores, loss, penalty = D(augment(leaf) if augment else leaf, c), 0, 0
    if main:
        loss = F.softplus(-scores)
    if regularise:
        (gradient,) = torch.autograd.grad([scores.sum()], [leaf], create_graph=True)
        penalty = gradient.square().sum([1, 2, 3]) * (gamma / 2)
    (scores * 0 + loss + torch.as_tensor(penalty).view(-1, 1)).mean().mul(gain).backward()


def run_phase(
    phase: str, G: nn.Module, D: nn.Module, optimizer: Any, gain: float = 1.0, augment: Any = None
) -> list[nn.Module]:
    model = {"G": G, "D": D}[phase[0]]
    optimizer.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    for real in pictures(8).chunk(2):  # rounds of accumulation
        accumulate_gradients(phase, G, D, real, gain, augment)
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
    optimizer.step()
    return [model]


def summary(D: nn.Module, fill: float) -> None:
    """A forward on memory that nobody has written, as a printed table of the modules takes it."""
    D(torch.full((4, 3, 32, 32), fill), torch.empty(4, 0))


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("mode", ["regularize", "replace"])
@pytest.mark.parametrize("inject_on", ["always", "first_order_only"])
def test_styleganlike_phases_run_untouched(inject_on, mode, low_precision):
    torch.manual_seed(0)
    G, D, scale = StyleGenerator(), StyleGAN2(low_precision=low_precision), Counted()
    handle = fq.attach(D, "stylegan2", codebook_size=8, mode=mode, inject=True, inject_on=inject_on,
                       loss_scale=scale)  # fmt: skip
    layers, rounds = 2, 2
    G.requires_grad_(False), D.requires_grad_(False)
    summary(D, float("nan"))
    assert not any(quantizer.is_ready() for quantizer in handle.quantizers.values())
    G_opt, D_opt = (torch.optim.Adam(model.parameters(), 2e-3, betas=(0.0, 0.99)) for model in (G, D))
    seen = {}
    for step in range(2):
        for phase, optimizer, gain in (("Gmain", G_opt, 1.0), ("Greg", G_opt, 4.0), ("Dmain", D_opt, 1.0),
                                       ("Dreg", D_opt, 16.0)):  # fmt: skip
            before = updates(handle)
            trained = run_phase(phase, G, D, optimizer, gain)
            moved = [now - then for now, then in zip(updates(handle), before, strict=True)]
            seen[phase] = (scale.since(), moved)
            if phase.endswith("main"):
                assert_trained(*trained)
            else:
                assert all(
                    p.grad is not None and p.grad.isfinite().all() for p in (*trained[0].parameters(),)
                )
        if step == 0:
            assert seen["Gmain"] == (0, [0, 0]), "the codes have yet to come from the first D step"
            summary(D, float("nan"))
    assert seen["Gmain"] == (layers * rounds, [0, 0])
    assert seen["Greg"] == (0, [0, 0])
    assert seen["Dmain"] == (layers * rounds * 2, [rounds * 2] * 2)
    assert seen["Dreg"] == (layers * rounds if inject_on == "always" else 0, [0, 0])
    assert all(quantizer.codebook.isfinite().all() for quantizer in handle.quantizers.values())


def test_one_phase_of_both_injects_the_real_half_only_if_always():
    for inject_on, reads in (("always", 8), ("first_order_only", 4)):
        torch.manual_seed(0)
        G, D, scale = StyleGenerator(), StyleGAN2(), Counted()
        fq.attach(D, "stylegan2", codebook_size=8, inject=True, inject_on=inject_on, loss_scale=scale)
        D(pictures(), None)
        G.requires_grad_(False)
        optimizer = torch.optim.Adam(D.parameters(), 2e-3)
        run_phase("Dboth", G, D, optimizer)
        assert scale.reads == reads


def test_behind_an_augmentation_the_pictures_of_r1_teach_the_codes():
    torch.manual_seed(0)
    G, D = StyleGenerator().requires_grad_(False), StyleGAN2()
    handle = fq.attach(D, "stylegan2", codebook_size=8, inject=True)
    optimizer = torch.optim.Adam(D.parameters(), 2e-3)
    for phase, moved in (("Dmain", 4), ("Dreg", 2)):
        before = updates(handle)
        run_phase(phase, G, D, optimizer, augment=lambda x: x.flip(3))
        assert updates(handle) == [count + moved for count in before]


def test_snapshots_of_styleganlike_models_load_and_stay_as_they_were():
    torch.manual_seed(0)
    G, D = StyleGenerator(), StyleGAN2()
    handle = fq.attach(D, "stylegan2", codebook_size=8, inject=True, loss_scale=lambda: 1.0)
    optimizer = torch.optim.Adam(D.parameters(), 2e-3)
    run_phase("Dmain", G.requires_grad_(False), D, optimizer)
    D.requires_grad_(True)(pictures(), None)  # a graph is pending
    snapshot = copy.deepcopy(D).eval().requires_grad_(False).cpu()
    loaded = pickle.loads(pickle.dumps({"D": snapshot}))["D"]
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    batch = pictures()
    expected = snapshot(batch, None)
    run_phase("Dmain", G, D, optimizer)
    assert updates(handle) == [9, 9] and updates(fq.handle_of(loaded)) == [5, 5]
    assert torch.equal(loaded(batch, None), expected)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    fresh = StyleGAN2()
    fresh.load_state_dict(fq.handle_of(loaded).strip(loaded.state_dict()), strict=True)
    assert torch.equal(fresh(batch, None), expected)


# UGATIT-pytorch: the discriminators are never frozen


def test_ugatitlike_iterations_charge_the_generator_inside_its_context():
    torch.manual_seed(0)
    gens = nn.ModuleDict({side: nn.Conv2d(3, 3, 3, padding=1) for side in "AB"})
    dis = nn.ModuleDict({"GA": UGATIT(6), "GB": UGATIT(6), "LA": UGATIT(5), "LB": UGATIT(5)})
    scale = Counted()
    handles = [fq.attach(dis[side], "ugatit", codebook_size=8, inject=True, loss_scale=scale)
               for side in ("GA", "GB")]  # fmt: skip
    g_opt, d_opt = (torch.optim.Adam(model.parameters(), 1e-4, betas=(0.5, 0.999)) for model in (gens, dis))

    def adversarial(fake: Tensor, real: Tensor | None, side: str) -> Tensor:
        loss = torch.zeros(())
        for scope in "GL":
            for x, target in ((real, 1.0), (fake, 0.0)) if real is not None else ((fake, 1.0),):
                logit, cam, _ = dis[scope + side](x)
                loss = loss + (logit - target).square().mean() + (cam - target).square().mean()
        return loss

    for iteration in range(1, 3):
        real_a, real_b = pictures(2, 128), pictures(2, 128)
        d_opt.zero_grad()
        fake_b, fake_a = gens["A"](real_a).detach(), gens["B"](real_b).detach()
        (adversarial(fake_a, real_a, "A") + adversarial(fake_b, real_b, "B")).backward()
        assert_trained(dis)
        d_opt.step()
        assert scale.since() == 2 * 3 * 2  # sides, layers, real and fake
        g_opt.zero_grad()
        fake_b, fake_a = gens["A"](real_a), gens["B"](real_b)
        with handles[0].generator_step(), handles[1].generator_step():
            (adversarial(fake_a, None, "A") + adversarial(fake_b, None, "B")).backward()
        assert_trained(gens)
        g_opt.step()
        assert scale.since() == 2 * 3
        assert [updates(handle) for handle in handles] == [[2 * iteration] * 3] * 2


def test_without_the_context_a_generator_step_of_unfrozen_models_would_teach_the_codes():
    torch.manual_seed(0)
    D = UGATIT(6)
    handle = fq.attach(D, "ugatit", codebook_size=8, inject=True)
    D(pictures(2, 64))
    assert updates(handle) == [1, 1, 1]
    D(pictures(2, 64))
    assert updates(handle) == [2, 2, 2]


# Mixed precision: the scale moves from step to step


def test_scaled_losses_and_injected_ones_keep_their_proportion():
    torch.manual_seed(0)
    plain, D = BigGAN(), BigGAN()
    D.load_state_dict(plain.state_dict())
    explicit = fq.attach(plain, "biggan", codebook_size=8, commitment_weight=4.0)
    scaler = {"scale": 1024.0}
    fq.attach(D, "biggan", codebook_size=8, commitment_weight=4.0, inject=True,
              loss_scale=lambda: scaler["scale"])  # fmt: skip
    for scale in (1024.0, 512.0, 2048.0):
        scaler["scale"] = scale
        batch, labels = pictures(), torch.randint(10, (4,))
        (plain(batch, labels).mean() + explicit.loss()).backward()
        (D(batch, labels).mean() * scale).backward()
        for (name, first), second in zip(plain.named_parameters(), D.parameters(), strict=True):
            error = (second.grad / scale - first.grad).abs().max() / first.grad.abs().max()
            assert error < 1e-4, name
        plain.zero_grad(), D.zero_grad()


# DataParallel: replicas in threads, each with a copy of the buffers


def replicate(model: nn.Module, first: bool) -> nn.Module:
    """A replica as DataParallel makes them: the first one on the model's own buffers."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            setattr(copied, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(copied, name, parameter * 1 if parameter is not None else None)
        for name, buffer in module._buffers.items():
            copied._buffers[name] = buffer if first else buffer.clone()
    return copies[model]


@pytest.mark.parametrize("mode", ["regularize", "replace"])
def test_replicas_inject_each_on_its_own_codes(mode):
    torch.manual_seed(0)
    model, scale = StyleGAN2(), Counted(0.5)  # one over the number of replicas
    handle = fq.attach(model, "stylegan2", codebook_size=8, mode=mode, inject=True, loss_scale=scale)
    whole = copy.deepcopy(model)
    shares, outputs = [pictures(4), pictures(4)], [torch.empty(0)] * 2
    for net in (model, whole):
        net(shares[0], None)
    replicas = [replicate(model, first=i == 0) for i in (0, 1)]

    def run(i: int) -> None:
        outputs[i] = replicas[i](shares[i], None)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
        thread.join()
    torch.cat(outputs).mean().backward()
    assert scale.reads == 2 * 2 and updates(handle) == [2, 2], "the second replica's update is lost"
    assert [int(getattr(replicas[1], name).fq.num_updates) for name in ("b32", "b16")] == [2, 2]
    assert_trained(model)
    (0.5 * (whole.eval()(shares[0], None).mean() + whole(shares[1], None).mean())).backward()
    for first, second in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-6)
