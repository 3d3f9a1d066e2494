"""BigGAN generator and projection discriminator (Brock et al., ICLR 2019), 16 to 256 pixels.

Module names, key order and shapes of the state dicts are those of the public PyTorch checkpoints, so they
load with ``strict=True``. The file reads from top to bottom: configuration, spectral norm, blocks, the two
networks, orthogonal regularisation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_BATCH_NORM_MOMENTUM = 0.1
_BATCH_NORM_EPS = 1e-5


class Layout(NamedTuple):
    """Blocks of both networks at one resolution; widths count in ``g_channels`` or ``d_channels``."""

    g_in: tuple[int, ...]
    g_out: tuple[int, ...]
    d_out: tuple[int, ...]
    d_labels: tuple[int, ...]
    d_downsample: tuple[bool, ...]

    @property
    def g_labels(self) -> tuple[int, ...]:
        """Output resolution of every generator block; the first one starts from a 4x4 map."""
        return tuple(8 << index for index in range(len(self.g_out)))


# The labels at 32 px are wrong in the public table (the maps are 16, 8, 8, 8). They are kept because trained
# models depend on them: attention at "16" means attention after all four blocks. The 16 px row is ours.
LAYOUTS: dict[int, Layout] = {
    16: Layout((4, 4), (4, 4), (4, 4, 4, 4), (8, 8, 8, 8), (True, False, False, False)),
    32: Layout((4, 4, 4), (4, 4, 4), (4, 4, 4, 4), (16, 16, 16, 16), (True, True, False, False)),
    64: Layout(
        (16, 16, 8, 4), (16, 8, 4, 2), (1, 2, 4, 8, 16), (32, 16, 8, 4, 4), (True, True, True, True, False)
    ),
    128: Layout(
        (16, 16, 8, 4, 2),
        (16, 8, 4, 2, 1),
        (1, 2, 4, 8, 16, 16),
        (64, 32, 16, 8, 4, 4),
        (True, True, True, True, True, False),
    ),
    256: Layout(
        (16, 16, 8, 8, 4, 2),
        (16, 8, 8, 4, 2, 1),
        (1, 2, 4, 8, 8, 16, 16),
        (128, 64, 32, 16, 8, 4, 4),
        (True, True, True, True, True, True, False),
    ),
}


@dataclass(frozen=True, kw_only=True)
class BigGANConfig:
    """Everything that decides the shapes and the arithmetic of a BigGAN pair.

    Raises:
        ValueError: a field is out of range, an attention label names no block, or ``hierarchical`` is asked
            for without a shared class embedding.
    """

    resolution: int = 32
    """Width and height of the images: 16, 32, 64, 128 or 256."""
    num_classes: int = 10
    """Number of class labels."""
    g_channels: int = 64
    """Channel unit of the generator (public G_ch)."""
    d_channels: int = 64
    """Channel unit of the discriminator (public D_ch)."""
    latent_dim: int = 128
    """Width of z (public dim_z); a hierarchical generator rounds it down to a multiple of its slots."""
    shared_dim: int = 0
    """Width of the class embedding shared by all conditional norms; 0 gives every norm its own embedding."""
    hierarchical: bool = False
    """Feed one slice of z to the stem and one to every block; needs shared_dim > 0."""
    g_attention: tuple[int, ...] = ()
    """Output resolutions of the generator blocks that self-attention follows."""
    d_attention: tuple[int, ...] = ()
    """Labels of the discriminator blocks that self-attention follows; all four are labelled 16 at 32 px."""
    wide: bool = True
    """Hidden width of a discriminator block: its output channels (True) or its input channels (False)."""
    inplace_relu: bool = False
    """Rectify in place; the discriminator head then overwrites the output of the last block."""
    class_head: Literal["projection", "auxiliary", "auxiliary_projection", "twin"] = "projection"
    """How the discriminator sees classes: projection (BigGAN), an auxiliary classifier (AC-GAN), one whose
    row of the class also adds to the output, or a second, twin one for generated pictures (TAC-GAN)."""
    init: Literal["ortho", "normal02", "xavier"] = "ortho"
    """Initialisation of every convolution, linear and embedding weight."""
    sn_eps: float = 1e-8
    """Smallest norm that the power iteration divides by; 1e-8 for CIFAR and 1e-6 for ImageNet recipes."""
    spectral_norm: bool = True
    """Divide weights by their largest singular value; False for weights that are normalised already."""

    def __post_init__(self) -> None:
        if self.resolution not in LAYOUTS:
            raise ValueError(
                f"resolution is {self.resolution} but BigGAN is laid out for {', '.join(map(str, LAYOUTS))}: "
                "resize the images to one of these"
            )
        for field in ("num_classes", "g_channels", "d_channels", "latent_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)} but must be at least 1")
        if self.shared_dim < 0:
            raise ValueError(
                f"shared_dim is {self.shared_dim} but must be 0 (own embeddings) or a width above 0"
            )
        if self.sn_eps <= 0:
            raise ValueError(f"sn_eps is {self.sn_eps} but must be above 0, for example 1e-8")
        if self.init not in ("ortho", "normal02", "xavier"):
            raise ValueError(f"init is {self.init!r} but must be 'ortho', 'normal02' or 'xavier'")
        if self.class_head not in (heads := ("projection", "auxiliary", "auxiliary_projection", "twin")):
            raise ValueError(f"class_head is {self.class_head!r} but must be one of {', '.join(heads)}")
        self._check_latent()
        self._check_attention("g_attention", self.layout.g_labels, self.layout.g_out, self.g_channels)
        self._check_attention("d_attention", self.layout.d_labels, self.layout.d_out, self.d_channels)

    def _check_latent(self) -> None:
        if not self.hierarchical:
            return
        if self.shared_dim == 0:
            raise ValueError(
                "hierarchical is True with shared_dim 0: slices of z are joined to a shared class embedding, "
                "so set shared_dim (128 in the ImageNet recipes) or hierarchical=False"
            )
        if self.latent_dim < self.latent_slots:
            raise ValueError(
                f"latent_dim is {self.latent_dim} but a hierarchical generator at {self.resolution} px cuts "
                f"z into {self.latent_slots} slots: make it at least {self.latent_slots}"
            )

    def _check_attention(self, field: str, labels: tuple[int, ...], out: tuple[int, ...], unit: int) -> None:
        for label in getattr(self, field):
            if label not in labels:
                raise ValueError(
                    f"{field} holds {label} but the blocks at {self.resolution} px are labelled "
                    f"{', '.join(map(str, labels))}: name one of these, or leave {field} empty"
                )
            narrowest = min(unit * width for width, block in zip(out, labels, strict=True) if block == label)
            if narrowest < 8:
                raise ValueError(
                    f"{field} holds {label} but the block there has {narrowest} channels: attention uses an "
                    f"eighth of them, so {field[0]}_channels must give at least 8"
                )

    @property
    def layout(self) -> Layout:
        """Row of the public channel table for this resolution."""
        return LAYOUTS[self.resolution]

    @property
    def latent_slots(self) -> int:
        """Slices of a hierarchical z: one for the stem and one for each generator block."""
        return len(self.layout.g_out) + 1


class _SpectrallyNormalised(nn.Module):
    """Division of ``weight`` by an estimate of its largest singular value (Miyato et al., ICLR 2018).

    One step of power iteration per forward, in train and in eval mode; only train mode stores the result,
    also when gradients are off. The gradient flows through the singular value by way of the weight, with
    both singular vectors held constant.
    """

    weight: Tensor
    u0: Tensor
    sv0: Tensor
    sn_eps: float

    def _add_spectral_state(self, sn_eps: float) -> None:
        self.sn_eps = sn_eps
        self.register_buffer("u0", torch.randn(1, self.weight.shape[0]))
        self.register_buffer("sv0", torch.ones(1))

    def normalised_weight(self) -> Tensor:
        """Weight over its largest singular value, same shape as ``weight``."""
        # The estimate must not lose bits under autocast: every weight of the network is divided by it.
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)  # [out, fan_in]
            with torch.no_grad():
                v = F.normalize(self.u0 @ matrix, eps=self.sn_eps)  # [1, fan_in]
                u = F.normalize(v @ matrix.t(), eps=self.sn_eps)  # [1, out]
            sigma = (v @ matrix.t() @ u.t()).squeeze()
            if self.training:
                # The graph holds u and v, not the buffers, so writing these leaves earlier forwards intact.
                with torch.no_grad():
                    self.u0.copy_(u)
                    self.sv0.copy_(sigma.reshape(1))
            return self.weight / sigma


class SpectralConv2d(nn.Conv2d, _SpectrallyNormalised):
    """Convolution with a spectrally normalised weight; stride 1, the size of the map is kept."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool, sn_eps: float
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self._add_spectral_state(sn_eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalised_weight(), self.bias, padding=self.kernel_size[0] // 2)


class SpectralLinear(nn.Linear, _SpectrallyNormalised):
    """Linear layer with a spectrally normalised weight."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, sn_eps: float) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self._add_spectral_state(sn_eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised_weight(), self.bias)


class SpectralEmbedding(nn.Embedding, _SpectrallyNormalised):
    """Embedding whose whole table is spectrally normalised."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, sn_eps: float) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self._add_spectral_state(sn_eps)

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, self.normalised_weight())


def _conv(
    config: BigGANConfig, in_channels: int, out_channels: int, size: int, *, bias: bool = True
) -> nn.Conv2d:
    if config.spectral_norm:
        return SpectralConv2d(in_channels, out_channels, size, bias=bias, sn_eps=config.sn_eps)
    return nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=bias)


def _linear(config: BigGANConfig, in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    if config.spectral_norm:
        return SpectralLinear(in_features, out_features, bias=bias, sn_eps=config.sn_eps)
    return nn.Linear(in_features, out_features, bias=bias)


def _embedding(config: BigGANConfig, num_embeddings: int, embedding_dim: int) -> nn.Embedding:
    if config.spectral_norm:
        return SpectralEmbedding(num_embeddings, embedding_dim, sn_eps=config.sn_eps)
    return nn.Embedding(num_embeddings, embedding_dim)


def _initialise(module: nn.Module, init: str) -> None:
    fill = {
        "ortho": nn.init.orthogonal_,
        "normal02": lambda weight: nn.init.normal_(weight, 0.0, 0.02),
        "xavier": nn.init.xavier_uniform_,
    }[init]
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
            fill(layer.weight)


class BatchNorm(nn.Module):
    """Batch norm with an affine map shared by all classes; state names of the public checkpoints."""

    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.stored_mean,
            self.stored_var,
            self.gain,
            self.bias,
            self.training,
            _BATCH_NORM_MOMENTUM,
            _BATCH_NORM_EPS,
        )


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are functions of the class condition.

    With a shared embedding both are linear maps of it (and of this block's slice of z); without one they are
    class embeddings of their own, which the original never normalises.
    """

    stored_mean: Tensor
    stored_var: Tensor

    def __init__(self, config: BigGANConfig, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.gain: nn.Module
        self.bias: nn.Module
        if config.shared_dim:
            self.gain = _linear(config, condition_dim, channels, bias=False)
            self.bias = _linear(config, condition_dim, channels, bias=False)
        else:
            self.gain = nn.Embedding(config.num_classes, channels)
            self.bias = nn.Embedding(config.num_classes, channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        normal = F.batch_norm(
            x,
            self.stored_mean,
            self.stored_var,
            None,
            None,
            self.training,
            _BATCH_NORM_MOMENTUM,
            _BATCH_NORM_EPS,
        )
        gain = rearrange(1 + self.gain(condition), "b c -> b c 1 1")
        return normal * gain + rearrange(self.bias(condition), "b c -> b c 1 1")


class SelfAttention(nn.Module):
    """Self-attention over positions (Zhang et al., ICML 2019); keys and values come from a halved map."""

    def __init__(self, config: BigGANConfig, channels: int) -> None:
        super().__init__()
        self.theta = _conv(config, channels, channels // 8, 1, bias=False)
        self.phi = _conv(config, channels, channels // 8, 1, bias=False)
        self.g = _conv(config, channels, channels // 2, 1, bias=False)
        self.o = _conv(config, channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        query = rearrange(self.theta(x), "b c h w -> b (h w) c")
        key = rearrange(F.max_pool2d(self.phi(x), 2), "b c h w -> b c (h w)")
        value = rearrange(F.max_pool2d(self.g(x), 2), "b c h w -> b c (h w)")
        # Written out and not fused: gradient penalties need the second derivative, which fused kernels lack.
        weights = torch.softmax(query @ key, dim=-1)  # [B, H*W, H*W/4]
        # The public code multiplies in this order; the transposed product rounds differently.
        attended = value @ weights.transpose(1, 2)  # [B, C/2, H*W]
        attended = rearrange(attended, "b c (h w) -> b c h w", h=x.shape[2])
        return self.gamma * self.o(attended) + x


class GeneratorBlock(nn.Module):
    """Residual block that doubles the map: norm, rectify, upsample, convolve, norm, rectify, convolve."""

    def __init__(self, config: BigGANConfig, in_channels: int, out_channels: int, condition_dim: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.inplace_relu = config.inplace_relu
        self.conv1 = _conv(config, in_channels, out_channels, 3)
        self.conv2 = _conv(config, out_channels, out_channels, 3)
        self.conv_sc = _conv(config, in_channels, out_channels, 1)
        self.bn1 = ConditionalBatchNorm(config, in_channels, condition_dim)
        self.bn2 = ConditionalBatchNorm(config, out_channels, condition_dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.relu(self.bn1(x, condition), inplace=self.inplace_relu)
        h = self.conv1(F.interpolate(h, scale_factor=2))
        h = F.relu(self.bn2(h, condition), inplace=self.inplace_relu)
        return self.conv2(h) + self.conv_sc(F.interpolate(x, scale_factor=2))


class DiscriminatorBlock(nn.Module):
    """Residual block, optionally halving the map by 2x2 means.

    The shortcut always reads the raw input, never the rectified one. Block 0 sees pixels: it rectifies
    nothing before its first convolution and pools before its shortcut convolution.
    """

    def __init__(
        self, config: BigGANConfig, in_channels: int, out_channels: int, *, first: bool, downsample: bool
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.first = first
        self.downsample = downsample
        self.inplace_relu = config.inplace_relu
        hidden = out_channels if config.wide else in_channels
        self.conv1 = _conv(config, in_channels, hidden, 3)
        self.conv2 = _conv(config, hidden, out_channels, 3)
        self.has_shortcut_conv = downsample or in_channels != out_channels
        if self.has_shortcut_conv:
            self.conv_sc = _conv(config, in_channels, out_channels, 1)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.first and self.downsample:
            x = F.avg_pool2d(x, 2)
        if self.has_shortcut_conv:
            x = self.conv_sc(x)
        if self.downsample and not self.first:
            x = F.avg_pool2d(x, 2)
        return x

    def forward(self, x: Tensor) -> Tensor:
        # Out of place whatever the configuration says: the shortcut needs x as it came.
        h = x if self.first else F.relu(x)
        h = self.conv2(F.relu(self.conv1(h), inplace=self.inplace_relu))
        if self.downsample:
            h = F.avg_pool2d(h, 2)
        return h + self._shortcut(x)


class Generator(nn.Module):
    """Class-conditional BigGAN generator.

    Args:
        config: see `BigGANConfig`.

    Attributes:
        latent_dim: width of z that `forward` expects; below ``config.latent_dim`` when a hierarchical
            generator cannot cut that into equal slots.
        shared: class embedding to apply to the labels first; the identity without ``shared_dim``.

    Example:
        >>> G = Generator(BigGANConfig(g_channels=2, shared_dim=4))
        >>> G(torch.randn(3, G.latent_dim), G.shared(torch.tensor([0, 1, 9]))).shape
        torch.Size([3, 3, 32, 32])
    """

    def __init__(self, config: BigGANConfig) -> None:
        super().__init__()
        self.config = config
        layout, unit = config.layout, config.g_channels
        slot_dim = config.latent_dim // config.latent_slots
        self.latent_dim = slot_dim * config.latent_slots if config.hierarchical else config.latent_dim
        self.stem_dim = slot_dim if config.hierarchical else config.latent_dim
        condition_dim = config.shared_dim + (slot_dim if config.hierarchical else 0)
        self.shared: nn.Module = nn.Identity()
        if config.shared_dim:
            self.shared = nn.Embedding(config.num_classes, config.shared_dim)
        self.linear = _linear(config, self.stem_dim, layout.g_in[0] * unit * 16)
        self.blocks = nn.ModuleList()
        for width_in, width_out, label in zip(layout.g_in, layout.g_out, layout.g_labels, strict=True):
            block = nn.ModuleList([GeneratorBlock(config, width_in * unit, width_out * unit, condition_dim)])
            if label in config.g_attention:
                block.append(SelfAttention(config, width_out * unit))
            self.blocks.append(block)
        last = layout.g_out[-1] * unit
        self.output_layer = nn.Sequential(
            BatchNorm(last), nn.ReLU(inplace=config.inplace_relu), _conv(config, last, 3, 3)
        )
        _initialise(self, config.init)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images for latents and class conditions.

        Args:
            z: ``[B, latent_dim]``, floating.
            y: ``self.shared(labels)``: ``[B, shared_dim]`` floating, or the int64 labels ``[B]`` themselves
                without a shared embedding.

        Returns:
            ``[B, 3, resolution, resolution]`` in [-1, 1].

        Raises:
            ValueError: ``z`` has another width, or ``y`` is not what ``self.shared`` returns.
        """
        self._check(z, y)
        if self.config.hierarchical:
            stem, *slices = z.split(self.stem_dim, dim=1)
            conditions = [torch.cat([y, part], dim=1) for part in slices]
        else:
            stem, conditions = z, [y] * len(self.blocks)
        h = rearrange(self.linear(stem), "b (c h w) -> b c h w", h=4, w=4)
        for block, condition in zip(self.blocks, conditions, strict=True):
            upsample, *attention = cast(nn.ModuleList, block)
            h = upsample(h, condition)
            for layer in attention:
                h = layer(h)
        return torch.tanh(self.output_layer(h))

    def _check(self, z: Tensor, y: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"z has shape {tuple(z.shape)} but this generator takes [batch, {self.latent_dim}]: draw it "
                "with torch.randn(batch, generator.latent_dim)"
            )
        if self.config.shared_dim and (y.ndim != 2 or y.shape[1] != self.config.shared_dim):
            raise ValueError(
                f"y has shape {tuple(y.shape)} but the shared class embedding is [batch, "
                f"{self.config.shared_dim}]: pass generator.shared(labels)"
            )
        if not self.config.shared_dim and (y.ndim != 1 or y.is_floating_point()):
            raise ValueError(
                f"y is {y.dtype} of shape {tuple(y.shape)} but this generator has no shared embedding: "
                "pass the int64 labels [batch]"
            )


class Verdict(NamedTuple):
    """What a discriminator with auxiliary classifiers says of pictures."""

    realness: Tensor
    """``[B, 1]``, before any loss."""
    twin_scores: Tensor | None
    """``[B, classes]`` of the classifier that learns from generated pictures (TAC-GAN); None without one."""
    class_scores: Tensor
    """``[B, classes]`` of the classifier that learns from real pictures."""


class Discriminator(nn.Module):
    """Projection discriminator (Miyato & Koyama, ICLR 2018) on BigGAN's residual blocks.

    With another ``class_head`` it has classifiers instead (Odena et al. 2017; TAC-GAN, Gong et al. 2019,
    whose state names ``linear_c`` and ``linear_mi`` these are) and returns a `Verdict`.

    Args:
        config: see `BigGANConfig`.

    Example:
        >>> D = Discriminator(BigGANConfig(d_channels=2))
        >>> D(torch.zeros(3, 3, 32, 32), torch.tensor([0, 1, 9])).shape
        torch.Size([3, 1])
    """

    def __init__(self, config: BigGANConfig) -> None:
        super().__init__()
        self.config = config
        layout, unit = config.layout, config.d_channels
        self.blocks = nn.ModuleList()
        channels = 3
        for index, (width, label) in enumerate(zip(layout.d_out, layout.d_labels, strict=True)):
            residual = DiscriminatorBlock(
                config, channels, width * unit, first=index == 0, downsample=layout.d_downsample[index]
            )
            block = nn.ModuleList([residual])
            channels = width * unit
            if label in config.d_attention:
                block.append(SelfAttention(config, channels))
            self.blocks.append(block)
        self.linear = _linear(config, channels, 1)
        if config.class_head == "projection":
            self.embed = _embedding(config, config.num_classes, channels)
        else:
            self.linear_c = _linear(config, channels, config.num_classes)
        if config.class_head == "twin":
            self.linear_mi = _linear(config, channels, config.num_classes)
        _initialise(self, config.init)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor | Verdict:
        """Realness of images given their class, ``linear(h) + <embed(labels), h>``, unbounded.

        Args:
            images: ``[B, 3, resolution, resolution]`` in [-1, 1].
            labels: int64 ``[B]``.

        Returns:
            ``[B, 1]``, before any loss; a `Verdict` with another ``class_head`` than projection.

        Raises:
            ValueError: images of another size, or labels that are not one integer per image.
        """
        size = self.config.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)} but this discriminator takes [batch, 3, {size}, "
                f"{size}]: resize them, or build it with their resolution"
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)} but must be one integer for each "
                f"of the {images.shape[0]} images"
            )
        h = images
        for block in self.blocks:
            for layer in cast(nn.ModuleList, block):
                h = layer(h)
        # In place this overwrites the output of the last block, as the public head does.
        pooled = F.relu(h, inplace=self.config.inplace_relu).sum(dim=(2, 3))  # [B, C]
        if self.config.class_head == "projection":
            return self.linear(pooled) + (self.embed(labels) * pooled).sum(dim=1, keepdim=True)
        return self._verdict(pooled, labels)

    def _verdict(self, pooled: Tensor, labels: Tensor) -> Verdict:
        realness, class_scores = self.linear(pooled), self.linear_c(pooled)
        if self.config.class_head == "auxiliary_projection":
            realness = realness + class_scores.gather(1, labels[:, None])
        twin = self.linear_mi(pooled) if self.config.class_head == "twin" else None
        return Verdict(realness, twin, class_scores)


@torch.no_grad()
def orthogonal_gradient(weight: Tensor, strength: float) -> Tensor:
    """Gradient of BigGAN's modified orthogonal regularisation.

    ``strength * 2 (W W^T * (1 - I)) W`` with W the weight as [out, fan_in] (BigGAN, Eq. 3): rows are pushed
    apart and their norms left free.

    Args:
        weight: ``[out, ...]``, at least two axes.
        strength: 1e-4 in the paper, 0 in the public scripts.

    Returns:
        Tensor like ``weight``.

    Raises:
        ValueError: the weight has fewer than two axes.

    Example:
        >>> orthogonal_gradient(torch.eye(3), 1.0).abs().max()
        tensor(0.)
    """
    if weight.ndim < 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but rows to compare need at least two axes: "
            "skip biases and gains"
        )
    matrix = weight.flatten(1)
    overlap = matrix @ matrix.t()
    overlap.fill_diagonal_(0)
    return (2 * strength * overlap @ matrix).reshape(weight.shape)


@torch.no_grad()
def add_orthogonal_gradient(module: nn.Module, strength: float) -> None:
    """Add `orthogonal_gradient` to every gradient that a backward pass has left in ``module``.

    The shared class embedding is left out, as in the original; so is everything below two axes.

    Args:
        module: a `Generator` or `Discriminator` after ``backward``.
        strength: see `orthogonal_gradient`.
    """
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.ndim >= 2 and not name.startswith("shared."):
            parameter.grad += orthogonal_gradient(parameter, strength)
