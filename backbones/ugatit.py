"""U-GAT-IT generators and discriminators for unpaired translation (Kim et al., ICLR 2020).

Module names, key order and shapes of the state dicts are those of the public PyTorch checkpoints, so they
load with ``strict=True``. The file reads from top to bottom: configuration, norms, spectral norm, class
activation map, the two networks, the six of a run.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_NORM_EPS = 1e-5
_SPECTRAL_EPS = 1e-12
_SLOPE = 0.2


def max_layers(resolution: int) -> int:
    """Largest number of layers of a discriminator that still gets a map to pad and to judge.

    A discriminator of L layers halves the picture L - 2 times; two more 4x4 convolutions, each after a
    padding by reflection, need 3 pixels there.

    Args:
        resolution: shorter side of the pictures in pixels.

    Example:
        >>> [max_layers(resolution) for resolution in (64, 96, 256)]
        [6, 7, 8]
    """
    return 1 + (resolution // 3).bit_length()


@dataclass(frozen=True, kw_only=True)
class UGATITConfig:
    """Everything that decides the shapes and the arithmetic of U-GAT-IT's networks.

    Raises:
        ValueError: a field is out of range, or a discriminator has more layers than the pictures allow.
    """

    resolution: int = 256
    """Width and height of the pictures: a multiple of 4, at least 8."""
    light: bool = False
    """Derive the norms' gain and bias from channel means (10.6 M parameters at 256 px) and not from the whole
    map (279 M)."""
    channels: int = 64
    """Channel unit of generators and discriminators (public ch)."""
    num_blocks: int = 4
    """Residual blocks on either side of the generator's attention (public n_res)."""
    global_layers: int = 7
    """Layers of the global discriminators; 7 need 96 px, 6 need 48 px."""
    local_layers: int = 5
    """Layers of the local discriminators."""

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 4:
            raise ValueError(
                f"resolution is {self.resolution} but the generator halves pictures twice and pads what is "
                "left: give a multiple of 4 from 8 on"
            )
        for field in ("channels", "num_blocks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)} but must be at least 1")
        most = max_layers(self.resolution)
        for field in ("global_layers", "local_layers"):
            if not 3 <= getattr(self, field) <= most:
                raise ValueError(
                    f"{field} is {getattr(self, field)} but at {self.resolution} px a discriminator has 3 to "
                    f"{most} layers: set {field} to {most} or less, or enlarge the pictures"
                )


class Translation(NamedTuple):
    """What a generator makes of pictures.

    Attributes:
        image: ``[B, 3, H, W]`` in [-1, 1].
        cam_logit: ``[B, 2]``, the domain as seen by the mean- and the max-pooled classifier.
        heatmap: ``[B, 1, H/4, W/4]``, where the attention lies; at least 0.
    """

    image: Tensor
    cam_logit: Tensor
    heatmap: Tensor


class Verdict(NamedTuple):
    """What a discriminator thinks of pictures; all unbounded, before any loss.

    Attributes:
        logit: ``[B, 1, h, w]``, one for each patch.
        cam_logit: ``[B, 2]``, from the mean- and the max-pooled classifier.
        heatmap: ``[B, 1, h + 1, w + 1]``.
    """

    logit: Tensor
    cam_logit: Tensor
    heatmap: Tensor


def _instance_layer_norm(x: Tensor, rho: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """``gamma (rho IN(x) + (1 - rho) LN(x)) + beta`` (U-GAT-IT, Eq. 1), both with unbiased variances.

    ``x`` is ``[B, C, H, W]`` with at least two places; the others broadcast to ``[B, C, 1, 1]``.
    """
    # Statistics must not lose bits under autocast.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels, places = x.shape[1], x.shape[2] * x.shape[3]
    # One pass for the mean, one for the squares: torch.var takes half as long again on a CPU, and the
    # statistics of the layer follow from those of its channels without another look at the map.
    mean = wide.mean(dim=(2, 3), keepdim=True)  # [B, C, 1, 1]
    centred = wide - mean
    squares = centred.square().sum(dim=(2, 3), keepdim=True)
    offset = mean - mean.mean(dim=1, keepdim=True)
    layer_squares = (squares + places * offset.square()).sum(dim=1, keepdim=True)  # [B, 1, 1, 1]
    by_channel = rho * (squares / (places - 1) + _NORM_EPS).rsqrt()
    by_layer = (1 - rho) * (layer_squares / (channels * places - 1) + _NORM_EPS).rsqrt()
    normal = centred * (gamma * (by_channel + by_layer)) + (beta + gamma * by_layer * offset)
    return normal.to(x.dtype)


class AdaLIN(nn.Module):
    """Adaptive layer-instance norm: gain and bias come from outside, the mixture ``rho`` is learnt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.full((1, channels, 1, 1), 0.9))

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        gamma, beta = (rearrange(value, "b c -> b c 1 1") for value in (gamma, beta))
        return _instance_layer_norm(x, self.rho, gamma, beta)


class ILN(nn.Module):
    """Layer-instance norm with a gain and a bias of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rho = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return _instance_layer_norm(x, self.rho, self.gamma, self.beta)


@torch.no_grad()
def clip_rho(generator: nn.Module) -> None:
    """Bring every mixture ``rho`` of a generator back into [0, 1]; due after each of its optimiser steps.

    Args:
        generator: a `Generator`, wrapped or not.

    Raises:
        ValueError: the module holds no `AdaLIN` and no `ILN`.
    """
    norms = [module for module in generator.modules() if isinstance(module, AdaLIN | ILN)]
    if not norms:
        raise ValueError(
            f"{type(generator).__name__} has no AdaLIN and no ILN with a rho to clip: pass a generator"
        )
    for norm in norms:
        norm.rho.clamp_(0, 1)


class _SpectrallyNormalised(nn.Module):
    """Division of ``weight_orig`` by an estimate of its largest singular value (Miyato et al., ICLR 2018).

    Keys and arithmetic are those of the spectral norm that the public checkpoints were written with: one step
    of power iteration per forward in train mode, also when gradients are off; none in eval mode. The gradient
    flows through the singular value by way of the weight, with both singular vectors held constant. No tensor
    of a graph stays on the module, so it can be copied at any time.
    """

    weight: Tensor
    weight_orig: Tensor
    weight_u: Tensor
    weight_v: Tensor

    def _add_spectral_state(self) -> None:
        weight = self.weight
        del self.weight
        self.weight_orig = weight  # registered anew, hence after the bias, as in the public key order
        rows, columns = weight.flatten(1).shape
        self.register_buffer("weight_u", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(columns), dim=0))

    def normalised_weight(self) -> Tensor:
        """Weight over its largest singular value, same shape as ``weight_orig``."""
        # The estimate must not lose bits under autocast: every weight of the network is divided by it.
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            matrix = self.weight_orig.flatten(1)  # [out, fan_in]
            with torch.no_grad():
                # Copies for the graph, so that writing the buffers leaves earlier forwards intact.
                u, v = self.weight_u.clone(), self.weight_v.clone()
                if self.training:
                    v = F.normalize(matrix.t() @ u, dim=0, eps=_SPECTRAL_EPS)
                    u = F.normalize(matrix @ v, dim=0, eps=_SPECTRAL_EPS)
                    self.weight_u.copy_(u)
                    self.weight_v.copy_(v)
            return self.weight_orig / (u @ (matrix @ v))


class SpectralConv2d(nn.Conv2d, _SpectrallyNormalised):
    """4x4 convolution with a spectrally normalised weight and no padding of its own."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 4, stride=stride, bias=bias)
        self._add_spectral_state()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised_weight(), self.bias, stride=self.stride)


class SpectralLinear(nn.Linear, _SpectrallyNormalised):
    """Linear layer without bias, with a spectrally normalised weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._add_spectral_state()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight())


def _cam_logits(x: Tensor, gap_fc: nn.Module, gmp_fc: nn.Module) -> Tensor:
    """Logits ``[B, 2]`` of the two auxiliary classifiers, on the mean and on the largest of every channel."""
    # Not amax, which shares the gradient among equal places where the original gives it to one of them.
    largest = F.adaptive_max_pool2d(x, 1).flatten(1)
    return torch.cat([gap_fc(x.mean(dim=(2, 3))), gmp_fc(largest)], dim=1)


def _weighted_twice(x: Tensor, gap_weight: Tensor, gmp_weight: Tensor) -> Tensor:
    """The map ``[B, 2 C, H, W]``: channels times the weights ``[1, C]`` of either classifier."""
    weights = (rearrange(weight, "1 c -> 1 c 1 1") for weight in (gap_weight, gmp_weight))
    return torch.cat([x * weight for weight in weights], dim=1)


def _padded_conv(in_channels: int, out_channels: int, size: int, *, stride: int = 1) -> list[nn.Module]:
    pad = nn.ReflectionPad2d(size // 2)
    return [pad, nn.Conv2d(in_channels, out_channels, size, stride=stride, bias=False)]


class ResnetBlock(nn.Module):
    """Residual block of the encoder: convolve, norm, rectify, convolve, norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            *_padded_conv(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(inplace=True),
            *_padded_conv(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class AdaLINBlock(nn.Module):
    """Residual block of the decoder; gain and bias of both norms come from the attended map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm1 = AdaLIN(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm2 = AdaLIN(channels)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(self.pad(x)), gamma, beta))
        return x + self.norm2(self.conv2(self.pad(h)), gamma, beta)


class Generator(nn.Module):
    """Translates pictures of one domain into the other.

    Args:
        config: see `UGATITConfig`.

    Example:
        >>> G = Generator(UGATITConfig(resolution=64, light=True, channels=2, global_layers=6))
        >>> [tuple(value.shape) for value in G(torch.zeros(3, 3, 64, 64))]
        [(3, 3, 64, 64), (3, 2), (3, 1, 16, 16)]
    """

    def __init__(self, config: UGATITConfig) -> None:
        super().__init__()
        self.config = config
        unit, width = config.channels, config.channels * 4
        # In the order of the public keys, which is not that of the forward pass.
        self.gap_fc = nn.Linear(width, 1, bias=False)
        self.gmp_fc = nn.Linear(width, 1, bias=False)
        self.conv1x1 = nn.Conv2d(width * 2, width, 1)
        self.gamma = nn.Linear(width, width, bias=False)
        self.beta = nn.Linear(width, width, bias=False)
        self.block_names = [f"UpBlock1_{number + 1}" for number in range(config.num_blocks)]
        for name in self.block_names:
            self.add_module(name, AdaLINBlock(width))
        down: list[nn.Module] = []
        for in_channels, out_channels, size, stride in (
            (3, unit, 7, 1),
            (unit, unit * 2, 3, 2),
            (unit * 2, width, 3, 2),
        ):
            down += _padded_conv(in_channels, out_channels, size, stride=stride)
            down += [nn.InstanceNorm2d(out_channels), nn.ReLU(inplace=True)]
        self.DownBlock = nn.Sequential(*down, *(ResnetBlock(width) for _ in self.block_names))
        places = 1 if config.light else (config.resolution // 4) ** 2
        self.FC = nn.Sequential(
            nn.Linear(width * places, width, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.ReLU(inplace=True),
        )
        up: list[nn.Module] = []
        for in_channels, out_channels in ((width, unit * 2), (unit * 2, unit)):
            up += [nn.Upsample(scale_factor=2), *_padded_conv(in_channels, out_channels, 3)]
            up += [ILN(out_channels), nn.ReLU(inplace=True)]
        self.UpBlock2 = nn.Sequential(*up, *_padded_conv(unit, 3, 7), nn.Tanh())

    def forward(self, images: Tensor) -> Translation:
        """Translate.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1]; the full generator takes ``config.resolution`` alone, the
                light one any multiple of 4 from 8 on.

        Returns:
            `Translation`; unpacks to image, cam_logit, heatmap.

        Raises:
            ValueError: images of another size or number of channels.
        """
        self._check(images)
        h = self.DownBlock(images)  # [B, C, H/4, W/4]
        cam_logit = _cam_logits(h, self.gap_fc, self.gmp_fc)
        h = F.relu(self.conv1x1(_weighted_twice(h, self.gap_fc.weight, self.gmp_fc.weight)))
        heatmap = h.sum(dim=1, keepdim=True)
        style = self.FC(h.mean(dim=(2, 3)) if self.config.light else h.flatten(1))  # [B, C]
        gamma, beta = self.gamma(style), self.beta(style)
        for name in self.block_names:
            h = self.get_submodule(name)(h, gamma, beta)
        return Translation(self.UpBlock2(h), cam_logit, heatmap)

    def _check(self, images: Tensor) -> None:
        size, light = self.config.resolution, self.config.light
        fits = images.ndim == 4 and images.shape[1] == 3
        if fits and light:
            fits = min(images.shape[2:]) >= 8 and not any(side % 4 for side in images.shape[2:])
        elif fits:
            fits = tuple(images.shape[2:]) == (size, size)
        if not fits:
            expected = "multiples of 4 from 8 on for H and W" if light else f"H and W {size}"
            raise ValueError(
                f"images have shape {tuple(images.shape)} but this generator takes [batch, 3, H, W] with "
                f"{expected}: resize them, or build it for their resolution"
            )


class Discriminator(nn.Module):
    """Judges patches of pictures, through an attention map of its own.

    The outputs of its in-place LeakyReLUs, where features are usually read or quantised, are ``model.2``,
    ``model.5``, ``model.8`` and so on, one for each convolution.

    Args:
        config: see `UGATITConfig`.
        num_layers: ``config.global_layers`` or ``config.local_layers``; the size of the patches.

    Raises:
        ValueError: ``num_layers`` is below 3 or above what the resolution allows.

    Example:
        >>> D = Discriminator(UGATITConfig(resolution=64, channels=2, global_layers=6), 5)
        >>> [tuple(value.shape) for value in D(torch.zeros(3, 3, 64, 64))]
        [(3, 1, 6, 6), (3, 2), (3, 1, 7, 7)]
    """

    def __init__(self, config: UGATITConfig, num_layers: int) -> None:
        super().__init__()
        most = max_layers(config.resolution)
        if not 3 <= num_layers <= most:
            raise ValueError(
                f"num_layers is {num_layers} but at {config.resolution} px a discriminator has 3 to {most} "
                "layers: pass config.global_layers or config.local_layers"
            )
        self.config = config
        self.num_layers = num_layers
        widths = [config.channels << index for index in range(num_layers - 1)]
        width = widths[-1]
        # In the order of the public keys, which is not that of the forward pass.
        self.gap_fc = SpectralLinear(width, 1)
        self.gmp_fc = SpectralLinear(width, 1)
        self.conv1x1 = nn.Conv2d(width * 2, width, 1)
        self.leaky_relu = nn.LeakyReLU(_SLOPE, inplace=True)
        self.pad = nn.ReflectionPad2d(1)
        self.conv = SpectralConv2d(width, 1, bias=False)
        layers: list[nn.Module] = []
        for in_channels, out_channels in zip([3, *widths], widths, strict=False):
            conv = SpectralConv2d(in_channels, out_channels, stride=1 if out_channels == width else 2)
            layers += [nn.ReflectionPad2d(1), conv, nn.LeakyReLU(_SLOPE, inplace=True)]
        self.model = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Verdict:
        """Judge.

        Args:
            images: ``[B, 3, H, W]`` in [-1, 1]; any size that the layers fit, not the config's alone.

        Returns:
            `Verdict`; unpacks to logit, cam_logit, heatmap.

        Raises:
            ValueError: images without 3 channels, or too small for the layers.
        """
        smallest = 3 << (self.num_layers - 2)
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < smallest:
            raise ValueError(
                f"images have shape {tuple(images.shape)} but a discriminator of {self.num_layers} layers "
                f"takes [batch, 3, H, W] from {smallest} px on: enlarge them, or use fewer layers"
            )
        h = self.model(images)
        cam_logit = _cam_logits(h, self.gap_fc, self.gmp_fc)
        # A quirk of the original that trained models depend on: the logits use the normalised weights, the
        # map is multiplied by the weights as they are stored.
        h = _weighted_twice(h, self.gap_fc.weight_orig, self.gmp_fc.weight_orig)
        h = self.leaky_relu(self.conv1x1(h))
        return Verdict(self.conv(self.pad(h)), cam_logit, h.sum(dim=1, keepdim=True))


class Networks(NamedTuple):
    """The six networks of a run, under the names that the public checkpoints give them.

    Attributes:
        genA2B: translates domain A into B.
        genB2A: translates domain B into A.
        disGA: global discriminator of domain A.
        disGB: global discriminator of domain B.
        disLA: local discriminator of domain A.
        disLB: local discriminator of domain B.
    """

    genA2B: Generator
    genB2A: Generator
    disGA: Discriminator
    disGB: Discriminator
    disLA: Discriminator
    disLB: Discriminator


def build_networks(config: UGATITConfig) -> Networks:
    """New networks in train mode, in the order of the public checkpoints."""
    return Networks(
        Generator(config),
        Generator(config),
        Discriminator(config, config.global_layers),
        Discriminator(config, config.global_layers),
        Discriminator(config, config.local_layers),
        Discriminator(config, config.local_layers),
    )
