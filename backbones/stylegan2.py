"""StyleGAN2 generator and discriminator (Karras et al., CVPR 2020 and NeurIPS 2020), 8 pixels and up.

Module names, key order and shapes of the state dicts are those of the public PyTorch checkpoints, so they
load with ``strict=True``. The file reads from top to bottom: configuration, resampling, equalised layers,
mapping, modulated convolution, generator, minibatch deviation, discriminator. Every operation can be
differentiated twice, which R1 and path-length regularisation need.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

Architecture = Literal["skip", "resnet", "orig"]
Noise = Literal["random", "const", "none"]

_SLOPE = 0.2
_SQRT2 = math.sqrt(2)
_SQRT_HALF = math.sqrt(0.5)
_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Config:
    """Everything that decides the shapes and the arithmetic of a StyleGAN2 pair.

    Raises:
        ValueError: a field is out of range, or the widths it implies are impossible.
    """

    resolution: int = 32
    """Width and height of the images, a power of two from 8 up."""
    num_classes: int = 1
    """Number of class labels; 1 is an unconditional pair."""
    image_channels: int = 3
    """Colour channels of the images."""
    latent_dim: int = 512
    """Width of z."""
    w_dim: int = 512
    """Width of w, the latent after mapping."""
    mapping_layers: int = 8
    """Layers from z to w: 8 in the paper, 2 in the ADA recipes for small data and CIFAR."""
    d_mapping_layers: int = 8
    """Layers from the label to the discriminator's head, in a conditional pair."""
    mapping_lr: float = 0.01
    """Learning rate of the mapping layers relative to all others."""
    w_avg_decay: float = 0.995
    """Factor of the moving average of w, which truncation moves towards."""
    channel_base: int = 16384
    """Channels times resolution below the limit: 32768 in configuration F, 16384 in A to E."""
    channel_max: int = 512
    """Largest number of channels of any layer."""
    g_architecture: Architecture = "skip"
    """Generator: sum upsampled images of all blocks (skip), residual blocks (resnet), or neither (orig)."""
    d_architecture: Architecture = "resnet"
    """Discriminator: residual blocks (resnet), downsampled images into all blocks (skip), or neither (orig)."""
    mbstd_group: int = 4
    """Images that share a minibatch deviation; 0 takes the whole batch."""
    mbstd_channels: int = 1
    """Channels of the minibatch deviation; 0 leaves it out."""
    conv_clamp: float | None = None
    """Clamp the output of convolutions to plus and minus this; 256 in the half-precision recipes."""

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution is {self.resolution} but must be a power of two from 8 up: resize the images to "
                "32, 64, 128, 256, 512 or 1024, for example"
            )
        counts = "num_classes image_channels latent_dim w_dim mapping_layers d_mapping_layers channel_max"
        for field in counts.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)} but must be at least 1")
        for field in ("g_architecture", "d_architecture"):
            if getattr(self, field) not in ("skip", "resnet", "orig"):
                raise ValueError(
                    f"{field} is {getattr(self, field)!r} but must be 'skip', 'resnet' or 'orig'"
                )
        if not 0 < self.mapping_lr < math.inf:
            raise ValueError(f"mapping_lr is {self.mapping_lr} but must be above 0, for example 0.01")
        if not 0 <= self.w_avg_decay < 1:
            raise ValueError(f"w_avg_decay is {self.w_avg_decay} but must be a factor from 0 to below 1")
        if self.conv_clamp is not None and not 0 < self.conv_clamp < math.inf:
            raise ValueError(f"conv_clamp is {self.conv_clamp} but must be None or above 0, for example 256")
        self._check_widths()

    def _check_widths(self) -> None:
        if self.channel_base < self.resolution:
            raise ValueError(
                f"channel_base is {self.channel_base}, which leaves no channel at {self.resolution} px: give "
                f"at least {self.resolution}, or 16384 as in the paper"
            )
        if self.mbstd_group < 0:
            raise ValueError(f"mbstd_group is {self.mbstd_group} but must be 0 (whole batch) or a group size")
        if self.mbstd_channels < 0 or (self.mbstd_channels and self.channels(4) % self.mbstd_channels):
            raise ValueError(
                f"mbstd_channels is {self.mbstd_channels} but must be 0 or divide the {self.channels(4)} "
                "channels at 4 px"
            )

    def channels(self, resolution: int) -> int:
        """Channels of the maps of ``resolution``, in both networks."""
        return min(self.channel_base // resolution, self.channel_max)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ... up to the size of the images."""
        return tuple(1 << power for power in range(2, self.resolution.bit_length()))

    @property
    def num_ws(self) -> int:
        """Copies of w that the synthesis network reads, one a layer."""
        return 2 * len(self.resolutions)


def _resample_filter() -> Tensor:
    """Low-pass filter of all resampling, ``[4, 4]`` with sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)


def blur(x: Tensor, taps: Tensor, *, padding: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    """Filter every channel on its own; the type of ``x`` is kept under autocast too.

    Args:
        x: ``[B, C, H, W]``.
        taps: symmetric filter ``[4, 4]``.
        padding: zeros added on each side.
        stride: step between two outputs.
        gain: factor of the result.

    Returns:
        ``[B, C, (H + 2 * padding - 4) // stride + 1, ...]``.
    """
    # A depthwise convolution beats separable passes, slices and banded matrices on the CPU, forward and back.
    with torch.autocast(x.device.type, enabled=False):
        weight = repeat((taps * gain).to(x.dtype), "h w -> c 1 h w", c=x.shape[1])
        return F.conv2d(x, weight, padding=padding, stride=stride, groups=x.shape[1])


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """Halve the map after filtering: ``[B, C, H, W]`` to ``[B, C, H/2, W/2]``; see `blur`."""
    return blur(x, taps, padding=1, stride=2)


def upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Double the map: zeros between pixels, then filter: ``[B, C, H, W]`` to ``[B, C, 2H, 2W]``.

    Args:
        x: ``[B, C, H, W]``; its type is kept under autocast too.
        taps: symmetric filter ``[4, 4]`` with sum 1.

    Returns:
        A map whose mean is that of ``x`` apart from its border.

    Example:
        >>> upsample(torch.ones(1, 1, 3, 3), _resample_filter())[0, 0, 2]
        tensor([0.7500, 1.0000, 1.0000, 1.0000, 1.0000, 0.7500])
    """
    with torch.autocast(x.device.type, enabled=False):
        # The gain 4 makes up for three zeros in every four pixels.
        weight = repeat((taps * 4).to(x.dtype), "h w -> c 1 h w", c=x.shape[1])
        return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=x.shape[1])


def _activate(x: Tensor, clamp: float | None) -> Tensor:
    """Leaky rectification in place, then the clamp; the paper's gain is already in ``x``."""
    x = F.leaky_relu(x, _SLOPE, inplace=True)
    return x if clamp is None else x.clamp(-clamp, clamp)


class EqualisedLinear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al., ICLR 2018, Sec. 4.1).

    Weights are drawn from N(0, 1 / lr_multiplier^2) and scaled by ``lr_multiplier / sqrt(fan_in)`` at run
    time. It computes in the type of its weights, also under autocast: latents, styles and logits carry few
    numbers, each of which scales a whole map.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.activate = activate
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.lr_multiplier * (_SQRT2 if self.activate else 1.0)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight * (gain / math.sqrt(self.weight.shape[1]))
            y = F.linear(x.to(weight.dtype), weight, self.bias * gain)
            return _activate(y, None) if self.activate else y


class EqualisedConv2d(nn.Module):
    """Convolution with equalised learning rate; optionally resamples, adds a bias and rectifies.

    Halving filters before it strides. Doubling is for 1x1 kernels, which commute with the filter.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        resample: Literal["up", "down"] | None = None,
        activate: bool = True,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        assert resample != "up" or kernel_size == 1
        self.resample = resample
        self.activate = activate
        self.conv_clamp = conv_clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        # What is rectified has a bias, what is not (the shortcuts) has none.
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activate else None
        self.register_buffer("resample_filter", _resample_filter())

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        # Rectification is homogeneous, so its gain goes into weight and bias: no extra pass over the map.
        gain_after = gain * (_SQRT2 if self.activate else 1.0)
        weight = self.weight * (gain_after / math.sqrt(self.weight[0].numel()))
        bias = None if self.bias is None else self.bias * gain_after
        size = weight.shape[2]
        padding, stride = size // 2, 1
        if self.resample == "down":
            # Before a 1x1 kernel only every second pixel of the filtered map is read.
            stride = 2 if size > 1 else 1
            x = blur(x, self.resample_filter, padding=1 + padding, stride=3 - stride)
            padding = 0
        y = F.conv2d(x, weight, bias, stride=stride, padding=padding)
        if self.resample == "up":
            y = upsample(y, self.resample_filter)
        if not self.activate:
            return y
        return _activate(y, None if self.conv_clamp is None else self.conv_clamp * gain)


def _normalise(x: Tensor) -> Tensor:
    """Scale every vector to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + _EPS).rsqrt()


class _MappingLayers(nn.Module):
    """Fully connected layers from z, a label, or both to a latent."""

    def __init__(self, config: StyleGAN2Config, latent_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.num_layers = num_layers
        width = latent_dim
        if self.num_classes > 1:
            self.embed = EqualisedLinear(self.num_classes, out_dim)
            width += out_dim
        for index in range(num_layers):
            layer = EqualisedLinear(width, out_dim, lr_multiplier=config.mapping_lr, activate=True)
            self.add_module(f"fc{index}", layer)
            width = out_dim

    def _run(self, z: Tensor | None, labels: Tensor | None) -> Tensor:
        """``[B, out_dim]`` of checked inputs."""
        parts = [] if z is None else [_normalise(z)]
        if self.num_classes > 1:
            assert labels is not None
            classes = labels if labels.is_floating_point() else F.one_hot(labels, self.num_classes)
            parts.append(_normalise(self.embed(classes)))
        x = torch.cat(parts, dim=1)
        for index in range(self.num_layers):
            x = self.get_submodule(f"fc{index}")(x)
        return x


def _check_labels(labels: Tensor | None, num_classes: int, batch: int) -> None:
    """Labels of a conditional network; an unconditional one reads none."""
    if num_classes == 1:
        return
    shape = None if labels is None else tuple(labels.shape)
    if labels is None or shape != ((batch, num_classes) if labels.is_floating_point() else (batch,)):
        seen = "missing" if labels is None else f"{labels.dtype} of shape {shape}"
        raise ValueError(
            f"labels are {seen} but this network has {num_classes} classes: pass one integer for each of the "
            f"{batch} samples, or [{batch}, {num_classes}] floating weights to mix classes"
        )


class LabelMapping(_MappingLayers):
    """Label to the vector that the discriminator's features are projected on."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__(config, 0, config.channels(4), config.d_mapping_layers)

    def forward(self, labels: Tensor) -> Tensor:
        return self._run(None, labels)


class Mapping(_MappingLayers):
    """Mapping network of the generator, from z and label to one w for every layer.

    Attributes:
        w_avg: ``[w_dim]``, moving average of w that truncation moves towards.
    """

    w_avg: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__(config, config.latent_dim, config.w_dim, config.mapping_layers)
        self.latent_dim = config.latent_dim
        self.num_ws = config.num_ws
        self.w_avg_decay = config.w_avg_decay
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        truncation: float = 1.0,
        cutoff: int | None = None,
        track_average: bool = False,
    ) -> Tensor:
        """Latents of all layers, in memory of their own: styles may be mixed in place.

        Args:
            z: ``[B, latent_dim]``, standard normal.
            labels: int64 ``[B]``, or floating ``[B, num_classes]`` to mix classes; not read by an
                unconditional network.
            truncation: psi; w becomes ``w_avg + psi * (w - w_avg)`` (StyleGAN, App. B). 0 gives the average.
            cutoff: layers that truncation reaches, counted from the coarsest; ``None`` is all.
            track_average: move ``w_avg`` towards the mean of this batch, if in train mode.

        Returns:
            ``[B, num_ws, w_dim]``.

        Raises:
            ValueError: z, the labels or the cutoff do not fit the network.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"z has shape {tuple(z.shape)} but this generator takes [batch, {self.latent_dim}]: draw it "
                "with torch.randn(batch, generator.latent_dim)"
            )
        _check_labels(labels, self.num_classes, len(z))
        if cutoff is not None and not 0 <= cutoff <= self.num_ws:
            raise ValueError(
                f"cutoff is {cutoff} but this generator has {self.num_ws} layers: give 0 to {self.num_ws}, "
                "or None for all"
            )
        w = self._run(z, labels)
        if track_average and self.training:
            with torch.no_grad():
                self.w_avg.lerp_(w.mean(dim=0), 1 - self.w_avg_decay)
        reached = 0 if truncation == 1 else self.num_ws if cutoff is None else cutoff
        near = torch.lerp(self.w_avg.to(w.dtype), w, truncation) if reached else w
        return torch.stack([near] * reached + [w] * (self.num_ws - reached), dim=1)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    bias: Tensor,
    *,
    up_taps: Tensor | None = None,
    gain: float = 1.0,
    fused: bool = False,
) -> Tensor:
    """Convolve every sample with a weight modulated by its style and demodulated (StyleGAN2, Sec. 2.2).

    ``w'_oik = s_i w_oik / sqrt(sum_ik (s_i w_oik)^2 + 1e-8)`` (Eq. 1 and 3). The fused form convolves with w'
    in one group a sample. The other scales the map by s before a plain convolution and by the root after it;
    they agree up to rounding.

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I, 3, 3]``.
        styles: ``[B, I]``.
        bias: ``[O]``, added at the end.
        up_taps: filter ``[4, 4]`` with sum 1; doubles the map by a transposed convolution, then filters.
        gain: factor of convolution and bias.
        fused: use the grouped form.

    Returns:
        ``[B, O, H, W]``, twice as high and wide with ``up_taps``.
    """
    # Under autocast too: a rounded factor would scale a whole map.
    with torch.autocast(x.device.type, enabled=False):
        power = styles.square() @ weight.square().sum(dim=(2, 3)).t()  # [B, O]
        scales = gain * (power + _EPS).rsqrt()
        if fused:
            styled = weight * rearrange(styles, "b i -> b 1 i 1 1")
            styled = styled * rearrange(scales, "b o -> b o 1 1 1")  # [B, O, I, 3, 3]
    if fused:
        batch = len(x)
        y = _conv3x3(rearrange(x, "b i h w -> 1 (b i) h w"), styled.flatten(0, 1), up_taps, groups=batch)
        y = rearrange(y, "1 (b o) h w -> b o h w", b=batch)
        return y + rearrange(gain * bias, "o -> o 1 1").to(y.dtype)
    y = _conv3x3(x * rearrange(styles.to(x.dtype), "b i -> b i 1 1"), weight, up_taps, groups=1)
    scales, bias = scales.to(y.dtype), (gain * bias).to(y.dtype)
    return torch.addcmul(rearrange(bias, "o -> o 1 1"), y, rearrange(scales, "b o -> b o 1 1"))


def _conv3x3(x: Tensor, weight: Tensor, up_taps: Tensor | None, *, groups: int) -> Tensor:
    if up_taps is None:
        return F.conv2d(x, weight, padding=1, groups=groups)
    # The filter merged into the kernel takes four times the products: on the CPU 2 to 20 times the time.
    swapped = rearrange(weight, "(g o) i h w -> (g i) o h w", g=groups)
    return blur(F.conv_transpose2d(x, swapped, stride=2, groups=groups), up_taps, padding=1, gain=4.0)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and leaky rectification; optionally doubles the map."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self, config: StyleGAN2Config, in_channels: int, out_channels: int, resolution: int, *, up: bool
    ) -> None:
        super().__init__()
        self.up = up
        self.conv_clamp = config.conv_clamp
        self.affine = EqualisedLinear(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", _resample_filter())
        self.register_buffer("noise_const", torch.randn(resolution, resolution))

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        *,
        noise: Noise,
        generator: torch.Generator | None,
        fused: bool,
        gain: float = 1.0,
    ) -> Tensor:
        # Rectification is homogeneous: its gain is applied before it, where scales are applied anyway.
        total = gain * _SQRT2
        taps = self.resample_filter if self.up else None
        y = modulated_conv2d(x, self.weight, self.affine(w), self.bias, up_taps=taps, gain=total, fused=fused)
        if noise != "none":
            y.add_(self._noise(noise, len(x), generator) * (total * self.noise_strength))
        return _activate(y, None if self.conv_clamp is None else self.conv_clamp * gain)

    def _noise(self, noise: Noise, batch: int, generator: torch.Generator | None) -> Tensor:
        """``[B, 1, H, W]``, or ``[H, W]`` for all samples."""
        if noise == "const":
            return self.noise_const
        # Drawn where its generator lives: the numbers are the same whatever device the network is on.
        device = self.noise_const.device if generator is None else generator.device
        shape = (batch, 1, *self.noise_const.shape)
        drawn = torch.randn(shape, generator=generator, device=device, dtype=self.noise_const.dtype)
        return drawn.to(self.noise_const.device)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation."""

    def __init__(self, config: StyleGAN2Config, in_channels: int) -> None:
        super().__init__()
        self.conv_clamp = config.conv_clamp
        self.affine = EqualisedLinear(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(config.image_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.image_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w) / math.sqrt(self.weight.shape[1])
        # A matrix a sample: three rows are few enough that scaling the whole map would cost more.
        weight = rearrange(self.weight, "o i 1 1 -> o i") * rearrange(styles, "b i -> b 1 i")
        y = torch.baddbmm(rearrange(self.bias, "o -> o 1"), weight, x.flatten(2))  # [B, O, H * W]
        y = rearrange(y, "b o (h w) -> b o h w", h=x.shape[2])
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class SynthesisBlock(nn.Module):
    """Layers of one resolution; the 4x4 block starts from a learned constant, all others double the map.

    Attributes:
        num_convs: latents that this block has for itself.
        num_ws: latents that it reads; the last one of a block with colours is the first of the next block.
    """

    resample_filter: Tensor

    def __init__(self, config: StyleGAN2Config, resolution: int) -> None:
        super().__init__()
        first, last = resolution == 4, resolution == config.resolution
        out_channels = config.channels(resolution)
        self.residual = config.g_architecture == "resnet" and not first
        self.num_convs = 1 if first else 2
        self.register_buffer("resample_filter", _resample_filter())
        if first:
            self.const = nn.Parameter(torch.randn(out_channels, 4, 4))
        else:
            in_channels = config.channels(resolution // 2)
            self.conv0 = SynthesisLayer(config, in_channels, out_channels, resolution, up=True)
        self.conv1 = SynthesisLayer(config, out_channels, out_channels, resolution, up=False)
        self.has_colours = last or config.g_architecture == "skip"
        if self.has_colours:
            self.torgb = ToRGB(config, out_channels)
        if self.residual:
            self.skip = EqualisedConv2d(in_channels, out_channels, 1, resample="up", activate=False)
        self.num_ws = self.num_convs + self.has_colours

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: Tensor,
        *,
        noise: Noise,
        generator: torch.Generator | None,
        fused: bool,
    ) -> tuple[Tensor, Tensor | None]:
        options = {"noise": noise, "generator": generator, "fused": fused}
        latents = iter(ws.unbind(dim=1))
        gain = _SQRT_HALF if self.residual else 1.0
        if x is None:
            x = self.conv1(repeat(self.const, "c h w -> b c h w", b=len(ws)), next(latents), **options)
        else:
            shortcut = self.skip(x, gain) if self.residual else None
            x = self.conv0(x, next(latents), **options)
            x = self.conv1(x, next(latents), gain=gain, **options)
            x = x if shortcut is None else x + shortcut
        if image is not None:
            image = upsample(image, self.resample_filter)
        if self.has_colours:
            colours = self.torgb(x, next(latents))
            # The image is a sum over all blocks: never in half precision.
            colours = colours.to(torch.promote_types(colours.dtype, torch.float32))
            image = colours if image is None else image + colours
        return x, image


class Synthesis(nn.Module):
    """Synthesis network: one w for each layer to an image."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        for resolution in config.resolutions:
            self.add_module(f"b{resolution}", SynthesisBlock(config, resolution))

    def forward(
        self,
        ws: Tensor,
        *,
        noise: Noise = "random",
        generator: torch.Generator | None = None,
        fused: bool | None = None,
    ) -> Tensor:
        """Images for latents.

        Args:
            ws: ``[B, num_ws, w_dim]`` of `Mapping`.
            noise: "random" draws it anew, "const" takes the stored maps, "none" leaves it out.
            generator: source of random noise, on any device; ``None`` is PyTorch's global one.
            fused: form of `modulated_conv2d`. ``None`` takes the grouped one in eval mode as the original
                does, but never on the CPU, where it is 1 to 19 times slower in either mode.

        Returns:
            ``[B, image_channels, resolution, resolution]``, mostly in [-1, 1] after training but unbounded;
            float32 under autocast.

        Raises:
            ValueError: ``ws`` has another shape, or ``noise`` is none of the three.
        """
        config = self.config
        if ws.ndim != 3 or ws.shape[1:] != (config.num_ws, config.w_dim):
            raise ValueError(
                f"ws have shape {tuple(ws.shape)} but this synthesis network takes [batch, {config.num_ws}, "
                f"{config.w_dim}]: pass what generator.mapping returns"
            )
        if noise not in ("random", "const", "none"):
            raise ValueError(f"noise is {noise!r} but must be 'random', 'const' or 'none'")
        if fused is None:
            fused = not self.training and ws.device.type != "cpu"
        x = image = None
        start = 0
        for resolution in config.resolutions:
            block = self.get_submodule(f"b{resolution}")
            taken = ws[:, start : start + block.num_ws]
            x, image = block(x, image, taken, noise=noise, generator=generator, fused=fused)
            start += block.num_convs
        return image


class Generator(nn.Module):
    """StyleGAN2 generator, a mapping and a synthesis network that can also be called apart.

    Args:
        config: see `StyleGAN2Config`.

    Attributes:
        latent_dim: width of z that `forward` expects.
        num_ws: copies of w that the synthesis network reads.

    Example:
        >>> G = Generator(StyleGAN2Config(latent_dim=8, w_dim=8, channel_max=4))
        >>> G(torch.randn(2, G.latent_dim), truncation=0.7, noise="const").shape
        torch.Size([2, 3, 32, 32])
        >>> ws = G.mapping(torch.randn(2, 8))
        >>> ws[:, 4:] = G.mapping(torch.randn(2, 8))[:, 4:]  # style mixing
        >>> G.synthesis(ws).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.latent_dim = config.latent_dim
        self.num_ws = config.num_ws
        self.synthesis = Synthesis(config)
        self.mapping = Mapping(config)

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        truncation: float = 1.0,
        cutoff: int | None = None,
        noise: Noise = "random",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images for latents and labels; see `Mapping.forward` and `Synthesis.forward`.

        Args:
            z: ``[B, latent_dim]``.
            labels: int64 ``[B]`` or floating ``[B, num_classes]``; not read by an unconditional generator.
            truncation: 1 is none, 0 gives the average image.
            cutoff: layers that truncation reaches; ``None`` is all.
            noise: "random", "const" or "none".
            generator: source of random noise.

        Returns:
            ``[B, image_channels, resolution, resolution]``.

        Raises:
            ValueError: an argument does not fit the network.
        """
        ws = self.mapping(z, labels, truncation=truncation, cutoff=cutoff)
        return self.synthesis(ws, noise=noise, generator=generator)


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the map, around them the wiring of the architecture.

    Returns the pair ``(map, image)``: the image goes on, halved, in the skip architecture and is ``None``
    in the others.
    """

    resample_filter: Tensor

    def __init__(self, config: StyleGAN2Config, resolution: int) -> None:
        super().__init__()
        channels, clamp = config.channels(resolution), config.conv_clamp
        self.out_channels = config.channels(resolution // 2)
        self.skips_images = config.d_architecture == "skip"
        self.residual = config.d_architecture == "resnet"
        self.reads_image = self.skips_images or resolution == config.resolution
        self.register_buffer("resample_filter", _resample_filter())
        if self.reads_image:
            self.fromrgb = EqualisedConv2d(config.image_channels, channels, 1, conv_clamp=clamp)
        self.conv0 = EqualisedConv2d(channels, channels, 3, conv_clamp=clamp)
        self.conv1 = EqualisedConv2d(channels, self.out_channels, 3, resample="down", conv_clamp=clamp)
        if self.residual:
            self.skip = EqualisedConv2d(channels, self.out_channels, 1, resample="down", activate=False)

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.reads_image:
            colours = self.fromrgb(image)
            x = colours if x is None else x + colours
        assert x is not None
        if self.skips_images:
            assert image is not None
            image = downsample(image, self.resample_filter)
        else:
            image = None
        if not self.residual:
            return self.conv1(self.conv0(x)), image
        shortcut = self.skip(x, _SQRT_HALF)
        return self.conv1(self.conv0(x), _SQRT_HALF) + shortcut, image


def minibatch_std(x: Tensor, *, group: int, channels: int = 1) -> Tensor:
    """Append the standard deviation within groups of images as constant maps (Karras et al., ICLR 2018, Sec. 3).

    Sample i stands in slot ``i mod (B / group)``. The variance is biased, with 1e-8 added; its roots are
    averaged over positions and over the C / channels maps that share an output channel.

    Args:
        x: ``[B, C, H, W]``; half-precision types are widened to float32 for the statistics.
        group: images in a group, at most B is taken; 0 is the whole batch.
        channels: maps to append; divides C.

    Returns:
        ``[B, C + channels, H, W]``.

    Raises:
        ValueError: the group does not divide the batch.

    Example:
        >>> minibatch_std(torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1), group=2).flatten(1)
        tensor([[0., 1.],
                [2., 1.]])
    """
    batch, _, height, width = x.shape
    group = min(group or batch, batch)
    if batch % group:
        raise ValueError(
            f"a batch of {batch} images cannot be cut into groups of {group} (mbstd_group): make the batch a "
            f"multiple of {group}, or set mbstd_group to a divisor of the batch or to 0 (whole batch)"
        )
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = rearrange(y, "(g n) (f c) h w -> g n f c h w", g=group, f=channels)
    deviation = (y.var(dim=0, correction=0) + _EPS).sqrt().mean(dim=(2, 3, 4))  # [n, f]
    maps = repeat(deviation, "n f -> (g n) f h w", g=group, h=height, w=width)
    return torch.cat([x, maps.to(x.dtype)], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """From the 4x4 map to the logit: minibatch deviation, a convolution, two linear layers, projection."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.mbstd_group = config.mbstd_group
        self.mbstd_channels = config.mbstd_channels
        channels, clamp = config.channels(4), config.conv_clamp
        self.reads_image = config.d_architecture == "skip"
        if self.reads_image:
            self.fromrgb = EqualisedConv2d(config.image_channels, channels, 1, conv_clamp=clamp)
        self.conv = EqualisedConv2d(channels + self.mbstd_channels, channels, 3, conv_clamp=clamp)
        self.fc = EqualisedLinear(channels * 16, channels, activate=True)
        self.out = EqualisedLinear(channels, channels if config.num_classes > 1 else 1)

    def forward(self, x: Tensor, image: Tensor | None, condition: Tensor | None) -> Tensor:
        if self.reads_image:
            x = x + self.fromrgb(image)
        if self.mbstd_channels:
            x = minibatch_std(x, group=self.mbstd_group, channels=self.mbstd_channels)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if condition is None:
            return x
        return (x * condition).sum(dim=1, keepdim=True) / math.sqrt(condition.shape[1])


class Discriminator(nn.Module):
    """StyleGAN2 discriminator, with a projection head (Miyato & Koyama, ICLR 2018) if there are classes.

    Args:
        config: see `StyleGAN2Config`.

    Example:
        >>> D = Discriminator(StyleGAN2Config(num_classes=10, channel_max=4))
        >>> D(torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, 2, 9])).shape
        torch.Size([4, 1])
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.block_names = [f"b{resolution}" for resolution in reversed(config.resolutions[1:])]
        for name, resolution in zip(self.block_names, reversed(config.resolutions), strict=False):
            self.add_module(name, DiscriminatorBlock(config, resolution))
        if config.num_classes > 1:
            self.mapping = LabelMapping(config)
        self.b4 = DiscriminatorEpilogue(config)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Realness of images given their class, unbounded.

        Args:
            images: ``[B, image_channels, resolution, resolution]`` in [-1, 1].
            labels: int64 ``[B]``, or floating ``[B, num_classes]`` to mix classes; not read by an
                unconditional discriminator.

        Returns:
            ``[B, 1]``, before any loss; float32 under autocast.

        Raises:
            ValueError: images of another size, labels that do not fit, or a batch that cannot be cut into
                groups of ``mbstd_group``.
        """
        config = self.config
        if images.ndim != 4 or images.shape[1:] != (config.image_channels, *[config.resolution] * 2):
            raise ValueError(
                f"images have shape {tuple(images.shape)} but this discriminator takes [batch, "
                f"{config.image_channels}, {config.resolution}, {config.resolution}]: resize them, or build "
                "it with their resolution"
            )
        _check_labels(labels, config.num_classes, len(images))
        x, image = None, images
        for name in self.block_names:
            x, image = self.get_submodule(name)(x, image)
        condition = self.mapping(labels) if config.num_classes > 1 else None
        return self.b4(x, image, condition)
