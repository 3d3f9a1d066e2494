"""StyleGAN2 generator and discriminator (Karras et al., CVPR 2020 and NeurIPS 2020), 8 pixels and up.

Module names, key order and shapes of the state dicts are those of the public PyTorch checkpoints, so they
load with ``strict=True``. The file reads from top to bottom: configuration, resampling, equalised layers,
mapping, modulated convolution, generator, minibatch deviation, discriminator. All of it can be differentiated
twice, which R1 and path-length regularisation need.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

Architecture = Literal["skip", "resnet", "orig"]
Noise = Literal["random", "const", "none"]

_SLOPE = 0.2
_SQRT_HALF = math.sqrt(0.5)
_EPS = 1e-8
_MAPPING_LR = 0.01  # learning rate of the mapping layers relative to all others
_W_AVG_DECAY = 0.995
# Numbers of a styled weight, one copy a sample, up to which it is formed outright as in the original: results
# then agree to the last bit, and no rectifier ends up on the other side of zero. More would cost too much.
_SMALL = 1 << 19


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
    channel_base: int = 16384
    """Channels times resolution below the limit: 32768 in configuration F, 16384 in A to E."""
    channel_max: int = 512
    """Largest number of channels of any map."""
    g_architecture: Architecture = "skip"
    """Generator: sum upsampled images of all blocks (skip), residual blocks (resnet), or neither (orig)."""
    d_architecture: Architecture = "resnet"
    """Discriminator: residual blocks (resnet), halved images into all blocks (skip), or neither (orig)."""
    mbstd_group: int = 4
    """Images that share a minibatch deviation; 0 takes the whole batch."""
    mbstd_channels: int = 1
    """Channels of the minibatch deviation; 0 leaves it out."""
    conv_clamp: float | None = None
    """Clamp the output of convolutions to plus and minus this; 256 in the half-precision recipes."""

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution is {self.resolution} but must be a power of two from 8 up: resize the images"
            )
        counts = "num_classes image_channels latent_dim w_dim mapping_layers d_mapping_layers channel_max"
        for field in counts.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)} but must be at least 1")
        for field in ("g_architecture", "d_architecture"):
            if (value := getattr(self, field)) not in ("skip", "resnet", "orig"):
                raise ValueError(f"{field} is {value!r} but must be 'skip', 'resnet' or 'orig'")
        if self.conv_clamp is not None and not 0 < self.conv_clamp < math.inf:
            raise ValueError(f"conv_clamp is {self.conv_clamp} but must be None or above 0, for example 256")
        if self.channel_base < self.resolution:
            raise ValueError(f"channel_base is {self.channel_base} but must be at least {self.resolution}")
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


def blur(x: Tensor, taps: Tensor, *, padding: int, stride: int = 1, gain: float = 1.0) -> Tensor:
    """Filter every channel of ``[B, C, H, W]`` with ``gain * taps``, symmetric ``[4, 4]``; keep its type."""
    # A depthwise convolution beats separable passes, slices and banded matrices on the CPU, forward and back.
    with torch.autocast(x.device.type, enabled=False):
        weight = repeat((taps * gain).to(x.dtype), "h w -> c 1 h w", c=x.shape[1])
        return F.conv2d(x, weight, padding=padding, stride=stride, groups=x.shape[1])


def upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Put zeros between the pixels, then filter: ``[B, C, H, W]`` to ``[B, C, 2H, 2W]``, of the same type."""
    # One transposed convolution with the filter would do, but rounds otherwise than the original.
    with torch.autocast(x.device.type, enabled=False):
        ones = x.new_ones(x.shape[1], 1, 1, 1)
        spread = F.conv_transpose2d(x, ones, stride=2, groups=x.shape[1])
    return blur(spread, taps, padding=2, gain=4.0)  # three zeros in every four pixels


class Filtering(nn.Module):
    """Module that keeps the low-pass filter of all resampling, ``[4, 4]`` with sum 1."""

    resample_filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("resample_filter", torch.outer(taps, taps))


class _ScaledLeakyReLU(torch.autograd.Function):
    """``gain * leaky_relu(x)`` in the memory of x; the derivative needs no more than the sign of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.gain = gain
        F.leaky_relu(x, _SLOPE, inplace=True).mul_(gain)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradients[0], y, _SLOPE, True) * ctx.gain, None


def _activate(x: Tensor, bias: Tensor, *, gain: float = 1.0, clamp: float | None = None) -> Tensor:
    """``clamp(sqrt(2) * gain * leaky_relu(x + bias))``, overwriting x; the clamp grows with the gain."""
    y = _ScaledLeakyReLU.apply(x.add_(bias.to(x.dtype)), math.sqrt(2) * gain)
    return y if clamp is None else y.clamp(-clamp * gain, clamp * gain)


class EqualisedLinear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al., ICLR 2018, Sec. 4.1).

    It computes in the type of its weights, also under autocast: latents, styles and logits are few numbers,
    but each of them scales a whole map or a whole gradient.
    """

    def __init__(self, fan_in: int, fan_out: int, *, bias: int = 0, lr: float = 1, act: bool = False) -> None:
        super().__init__()
        self.act = act
        self.lr = lr
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) / lr)
        self.bias = nn.Parameter(torch.full((fan_out,), float(bias)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight * (self.lr / math.sqrt(self.weight.shape[1]))
            x, bias = x.to(weight.dtype), self.bias * self.lr
            return _activate(F.linear(x, weight), bias) if self.act else F.linear(x, weight, bias)


class EqualisedConv2d(Filtering):
    """Convolution with equalised learning rate, bias, rectification and clamp; may halve the map."""

    def __init__(
        self, fan_in: int, fan_out: int, size: int, *, clamp: float | None, down: bool = False
    ) -> None:
        super().__init__()
        self.clamp = clamp
        self.down = down
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, size, size))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        weight = self.weight * (1 / math.sqrt(self.weight[0].numel()))
        padding = weight.shape[2] // 2
        if self.down:
            y = F.conv2d(blur(x, self.resample_filter, padding=1 + padding), weight, stride=2)
        else:
            y = F.conv2d(x, weight, padding=padding)
        return _activate(y, rearrange(self.bias, "o -> o 1 1"), gain=gain, clamp=self.clamp)


class Shortcut(Filtering):
    """1x1 convolution of a residual block that doubles or halves the map, times the root of one half."""

    def __init__(self, fan_in: int, fan_out: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (1 / math.sqrt(self.weight.shape[1]))
        if self.up:
            return upsample(F.conv2d(x, weight), self.resample_filter) * _SQRT_HALF
        return F.conv2d(blur(x, self.resample_filter, padding=1, stride=2), weight) * _SQRT_HALF


def _normalise(x: Tensor) -> Tensor:
    """Scale every vector to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + _EPS).rsqrt()


def _check_labels(labels: Tensor | None, num_classes: int, batch: int) -> None:
    """Labels of a conditional network; an unconditional one reads none."""
    seen = "missing" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
    soft = labels is not None and labels.is_floating_point()
    expected = (batch, num_classes) if soft else (batch,)
    if num_classes > 1 and (labels is None or labels.shape != expected):
        raise ValueError(
            f"labels are {seen} but this network has {num_classes} classes: pass one integer for each of the "
            f"{batch} samples, or [{batch}, {num_classes}] floating weights to mix classes"
        )


class MappingLayers(nn.Module):
    """Fully connected layers from z, a label, or both to a latent; the discriminator has them for labels."""

    def __init__(self, config: StyleGAN2Config, latent_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        self.layer_names = [f"fc{index}" for index in range(num_layers)]
        width = latent_dim
        if self.num_classes > 1:
            self.embed = EqualisedLinear(self.num_classes, out_dim)
            width += out_dim
        for name in self.layer_names:
            self.add_module(name, EqualisedLinear(width, out_dim, lr=_MAPPING_LR, act=True))
            width = out_dim

    def forward(self, z: Tensor | None, labels: Tensor | None = None) -> Tensor:
        parts = [] if z is None else [_normalise(z)]
        if labels is not None and self.num_classes > 1:
            weights = labels if labels.is_floating_point() else F.one_hot(labels, self.num_classes)
            parts.append(_normalise(self.embed(weights)))
        x = torch.cat(parts, dim=1)
        for name in self.layer_names:
            x = self.get_submodule(name)(x)
        return x


class Mapping(MappingLayers):
    """Mapping network of the generator, from z and label to one w for every layer.

    Attributes:
        w_avg: ``[w_dim]``, moving average of w that truncation moves towards.
    """

    w_avg: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__(config, config.latent_dim, config.w_dim, config.mapping_layers)
        self.config = config
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(
        self,
        z: Tensor | None,
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
        config = self.config
        if z is None or z.ndim != 2 or z.shape[1] != config.latent_dim:
            raise ValueError(
                f"z is {None if z is None else tuple(z.shape)} but must be [batch, {config.latent_dim}]: "
                "draw it with torch.randn(batch, generator.latent_dim)"
            )
        _check_labels(labels, config.num_classes, len(z))
        reached = config.num_ws if cutoff is None else cutoff
        if not 0 <= reached <= config.num_ws:
            raise ValueError(f"cutoff is {cutoff} but must be 0 to {config.num_ws}, or None for all layers")
        w = super().forward(z, labels)
        if track_average and self.training:
            with torch.no_grad():
                self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, _W_AVG_DECAY))
        near = w if truncation == 1 else self.w_avg.lerp(w, truncation)
        return torch.stack([near] * reached + [w] * (config.num_ws - reached), dim=1)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    noise: Tensor | None = None,
    up_taps: Tensor | None = None,
    fused: bool = False,
) -> Tensor:
    """Convolve every sample with a weight modulated by its style, and demodulated (StyleGAN2, Sec. 2.2).

    ``w'_oik = s_i w_oik / sqrt(sum_ik (s_i w_oik)^2 + 1e-8)`` (Eq. 1, 3). The fused form convolves with w',
    in one group a sample. The other scales the map by s before a plain convolution and by one over the root
    after it. They agree up to rounding.

    Args:
        x: ``[B, I, H, W]``.
        weight: ``[O, I, 3, 3]``.
        styles: ``[B, I]``.
        noise: added to the result, of any shape that fits it.
        up_taps: filter ``[4, 4]`` with sum 1: doubles the map by a transposed convolution, then filters.
        fused: use the grouped form.

    Returns:
        ``[B, O, H, W]``, twice as high and wide with ``up_taps``.
    """
    batch = len(styles)
    # Under autocast too: a rounded factor would scale a whole map.
    with torch.autocast(x.device.type, enabled=False):
        if fused or batch * weight.numel() <= _SMALL:
            styled = weight * rearrange(styles, "b i -> b 1 i 1 1")  # [B, O, I, 3, 3]
            power = styled.square().sum(dim=(2, 3, 4))
        else:
            power = styles.square() @ weight.square().sum(dim=(2, 3)).t()
        scales = (power + _EPS).rsqrt()  # [B, O]
        if fused:
            weight = (styled * rearrange(scales, "b o -> b o 1 1 1")).flatten(0, 1)
    if fused:
        y = _conv3x3(rearrange(x, "b i h w -> 1 (b i) h w"), weight, up_taps, groups=batch)
        y = rearrange(y, "1 (b o) h w -> b o h w", b=batch)
        return y if noise is None else y + noise.to(y.dtype)
    y = _conv3x3(x * rearrange(styles.to(x.dtype), "b i -> b i 1 1"), weight, up_taps, groups=1)
    scales = rearrange(scales.to(y.dtype), "b o -> b o 1 1")
    return y * scales if noise is None else torch.addcmul(noise.to(y.dtype), y, scales)


def _conv3x3(x: Tensor, weight: Tensor, up_taps: Tensor | None, *, groups: int) -> Tensor:
    if up_taps is None:
        return F.conv2d(x, weight, padding=1, groups=groups)
    # The filter merged into the kernel takes four times the products: on the CPU 2 to 20 times the time.
    swapped = rearrange(weight, "(g o) i h w -> (g i) o h w", g=groups)
    return blur(F.conv_transpose2d(x, swapped, stride=2, groups=groups), up_taps, padding=1, gain=4.0)


class _How(NamedTuple):
    """What every layer of one synthesis is told."""

    noise: Noise
    generator: torch.Generator | None
    fused: bool


class SynthesisLayer(Filtering):
    """Modulated 3x3 convolution, noise, bias and leaky rectification; optionally doubles the map."""

    noise_const: Tensor

    def __init__(self, config: StyleGAN2Config, fan_in: int, fan_out: int, size: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.clamp = config.conv_clamp
        self.affine = EqualisedLinear(config.w_dim, fan_in, bias=1)
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.register_buffer("noise_const", torch.randn(size, size))

    def forward(self, x: Tensor, w: Tensor, how: _How, *, gain: float = 1.0) -> Tensor:
        noise = None if how.noise == "none" else self._noise(len(x), how) * self.noise_strength
        taps = self.resample_filter if self.up else None
        y = modulated_conv2d(x, self.weight, self.affine(w), noise=noise, up_taps=taps, fused=how.fused)
        return _activate(y, rearrange(self.bias, "o -> o 1 1"), gain=gain, clamp=self.clamp)

    def _noise(self, batch: int, how: _How) -> Tensor:
        """``[B, 1, H, W]``, or ``[H, W]`` for all samples."""
        const = self.noise_const
        if how.noise == "const":
            return const
        # Drawn where its generator lives: the numbers are the same whatever device the network is on.
        device = const.device if how.generator is None else how.generator.device
        shape = (batch, 1, *const.shape)
        return torch.randn(shape, generator=how.generator, device=device, dtype=const.dtype).to(const.device)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation."""

    def __init__(self, config: StyleGAN2Config, fan_in: int) -> None:
        super().__init__()
        self.clamp = config.conv_clamp
        self.affine = EqualisedLinear(config.w_dim, fan_in, bias=1)
        self.weight = nn.Parameter(torch.randn(config.image_channels, fan_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(config.image_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w) * (1 / math.sqrt(self.weight.shape[1]))
        y = F.conv2d(x * rearrange(styles.to(x.dtype), "b i -> b i 1 1"), self.weight)
        # Images are summed over all blocks: never in half precision.
        y = y.to(torch.promote_types(y.dtype, torch.float32)).add_(rearrange(self.bias, "o -> o 1 1"))
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class SynthesisBlock(Filtering):
    """Layers of one resolution; the 4x4 block starts from a learned constant, all others double the map.

    It has ``num_convs`` latents for itself and reads ``num_ws``: the one for its colours, if it makes any, is
    also the first of the next block.
    """

    def __init__(self, config: StyleGAN2Config, resolution: int) -> None:
        super().__init__()
        first, last = resolution == 4, resolution == config.resolution
        width = config.channels(resolution)
        self.num_convs = 1 if first else 2
        self.has_colours = last or config.g_architecture == "skip"
        self.num_ws = self.num_convs + self.has_colours
        self.residual = config.g_architecture == "resnet" and not first
        if first:
            self.const = nn.Parameter(torch.randn(width, 4, 4))
        else:
            below = config.channels(resolution // 2)
            self.conv0 = SynthesisLayer(config, below, width, resolution, up=True)
        self.conv1 = SynthesisLayer(config, width, width, resolution, up=False)
        if self.has_colours:
            self.torgb = ToRGB(config, width)
        if self.residual:
            self.skip = Shortcut(below, width, up=True)

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, how: _How
    ) -> tuple[Tensor, Tensor | None]:
        latents = iter(ws.unbind(dim=1))
        if x is None:
            x = self.conv1(repeat(self.const, "c h w -> b c h w", b=len(ws)), next(latents), how)
        elif self.residual:
            shortcut = self.skip(x)
            x = self.conv0(x, next(latents), how)
            x = shortcut + self.conv1(x, next(latents), how, gain=_SQRT_HALF)
        else:
            x = self.conv1(self.conv0(x, next(latents), how), next(latents), how)
        if image is not None:
            image = upsample(image, self.resample_filter)
        if self.has_colours:
            colours = self.torgb(x, next(latents))
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
            ``[B, image_channels, resolution, resolution]``, unbounded; float32 under autocast.

        Raises:
            ValueError: ``ws`` has another shape, or ``noise`` is none of the three.
        """
        expected = (self.config.num_ws, self.config.w_dim)
        if ws.ndim != 3 or ws.shape[1:] != expected:
            raise ValueError(
                f"ws have shape {tuple(ws.shape)} but this synthesis network takes [batch, {expected[0]}, "
                f"{expected[1]}]: pass what generator.mapping returns"
            )
        if noise not in ("random", "const", "none"):
            raise ValueError(f"noise is {noise!r} but must be 'random', 'const' or 'none'")
        if fused is None:
            fused = not self.training and ws.device.type != "cpu"
        how, start = _How(noise, generator, fused), 0
        pair: Any = None, None  # map and image
        for resolution in self.config.resolutions:
            block: Any = self.get_submodule(f"b{resolution}")
            pair = block(*pair, ws[:, start : start + block.num_ws], how)
            start += block.num_convs
        return pair[1]


class Generator(nn.Module):
    """StyleGAN2 generator, a mapping and a synthesis network that can also be called apart.

    Args:
        config: see `StyleGAN2Config`.

    Example:
        >>> G = Generator(StyleGAN2Config(latent_dim=8, w_dim=8, channel_max=4))
        >>> ws = G.mapping(torch.randn(2, G.latent_dim), truncation=0.7)
        >>> ws[:, 4:] = G.mapping(torch.randn(2, G.latent_dim))[:, 4:]  # style mixing
        >>> G.synthesis(ws).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.latent_dim = config.latent_dim
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
        """Images for latents; arguments and errors are those of `Mapping.forward` and `Synthesis.forward`."""
        ws = self.mapping(z, labels, truncation=truncation, cutoff=cutoff)
        return self.synthesis(ws, noise=noise, generator=generator)


class DiscriminatorBlock(Filtering):
    """Two convolutions that halve the map, in the wiring of the architecture.

    Returns ``(map, image)``: the image, halved, in the skip architecture and ``None`` in the others.
    """

    def __init__(self, config: StyleGAN2Config, resolution: int) -> None:
        super().__init__()
        width, clamp = config.channels(resolution), config.conv_clamp
        self.out_channels = config.channels(resolution // 2)
        self.architecture = config.d_architecture
        self.reads_image = self.architecture == "skip" or resolution == config.resolution
        if self.reads_image:
            self.fromrgb = EqualisedConv2d(config.image_channels, width, 1, clamp=clamp)
        self.conv0 = EqualisedConv2d(width, width, 3, clamp=clamp)
        self.conv1 = EqualisedConv2d(width, self.out_channels, 3, clamp=clamp, down=True)
        if self.architecture == "resnet":
            self.skip = Shortcut(width, self.out_channels, up=False)

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.reads_image:
            colours = self.fromrgb(image)
            x = colours if x is None else x + colours
        if self.architecture == "resnet":
            shortcut = self.skip(x)
            return shortcut + self.conv1(self.conv0(x), _SQRT_HALF), None
        x = self.conv1(self.conv0(x))
        if self.architecture == "orig" or image is None:
            return x, None
        return x, blur(image, self.resample_filter, padding=1, stride=2)


def minibatch_std(x: Tensor, *, group: int, channels: int = 1) -> Tensor:
    """Append the deviation within groups of images as constant maps (Karras et al., ICLR 2018, Sec. 3).

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
    variance = (y - y.mean(dim=0)).square().mean(dim=0)
    deviation = (variance + _EPS).sqrt().mean(dim=(2, 3, 4))  # [n, f]
    maps = repeat(deviation, "n f -> (g n) f h w", g=group, h=height, w=width)
    return torch.cat([x, maps.to(x.dtype)], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """From the 4x4 map to the logit: minibatch deviation, a convolution, two linear layers, projection."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        width, clamp = config.channels(4), config.conv_clamp
        if config.d_architecture == "skip":
            self.fromrgb = EqualisedConv2d(config.image_channels, width, 1, clamp=None)  # never clamped
        self.conv = EqualisedConv2d(width + config.mbstd_channels, width, 3, clamp=clamp)
        self.fc = EqualisedLinear(width * 16, width, act=True)
        self.out = EqualisedLinear(width, width if config.num_classes > 1 else 1)

    def forward(self, x: Tensor, image: Tensor | None, condition: Tensor | None) -> Tensor:
        if self.config.d_architecture == "skip":
            x = x + self.fromrgb(image)
        if self.config.mbstd_channels:
            x = minibatch_std(x, group=self.config.mbstd_group, channels=self.config.mbstd_channels)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if condition is None:
            return x
        return (x * condition).sum(dim=1, keepdim=True) * (1 / math.sqrt(condition.shape[1]))


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
        for resolution in reversed(config.resolutions[1:]):
            self.add_module(f"b{resolution}", DiscriminatorBlock(config, resolution))
        if config.num_classes > 1:
            self.mapping = MappingLayers(config, 0, config.channels(4), config.d_mapping_layers)
        self.b4 = DiscriminatorEpilogue(config)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Realness of images given their class, unbounded.

        Args:
            images: ``[B, image_channels, resolution, resolution]`` in [-1, 1].
            labels: as in `Mapping.forward`; not read by an unconditional discriminator.

        Returns:
            ``[B, 1]``, before any loss; float32 under autocast.

        Raises:
            ValueError: images of another size, labels that do not fit, or a batch that cannot be cut into
                groups of ``mbstd_group``.
        """
        config, size = self.config, self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (config.image_channels, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)} but this discriminator takes [batch, "
                f"{config.image_channels}, {size}, {size}]: resize them, or build it with their resolution"
            )
        _check_labels(labels, config.num_classes, len(images))
        x, image = None, images
        for resolution in reversed(config.resolutions[1:]):
            x, image = self.get_submodule(f"b{resolution}")(x, image)
        condition = self.mapping(None, labels) if config.num_classes > 1 else None
        return self.b4(x, image, condition)
