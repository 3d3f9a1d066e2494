"""Named settings of complete runs, as Python values."""

from __future__ import annotations

from dataclasses import replace

from backbones.biggan import BigGANConfig
from backbones.configs import (
    BigGANOptim,
    BigGANTraining,
    PairConfig,
    QuantizerConfig,
    RunConfig,
    StyleGAN2Optim,
    StyleGAN2Training,
    Training,
    UGATITOptim,
    UGATITTraining,
)
from backbones.data import DataConfig
from backbones.stylegan2 import StyleGAN2Config
from backbones.ugatit import UGATITConfig

DIGITS = BigGANTraining(
    preset="digits",
    data=DataConfig(data="digits", dequantize=1 / 16),
    model=BigGANConfig(resolution=16, g_channels=8, d_channels=8, latent_dim=64),
    quantizer=QuantizerConfig(codebook_size=64, decay=0.9, generator_step="loss"),
    optim=BigGANOptim(
        batch_size=32, d_steps=2, lr_g=5e-4, lr_d=2e-3, beta2=0.99, ema_decay=0.99, ema_start=50
    ),
    run=RunConfig(
        steps=1000,
        sample_every=200,
        eval_every=200,
        checkpoint_every=200,
        features="classifier",
        num_eval=2000,
    ),
)
CIFAR10 = BigGANTraining(
    preset="cifar10",
    data=DataConfig(data="cifar10"),
    model=BigGANConfig(resolution=32, init="normal02"),
    quantizer=QuantizerConfig(),
    optim=BigGANOptim(),
    run=RunConfig(steps=97_500),  # 500 epochs of 195 steps, each 4 x 64 pictures
)
_IMAGENET64 = BigGANTraining(
    preset="imagenet64",
    data=DataConfig(data="data/imagenet", resize=True, num_workers=8),
    model=BigGANConfig(
        resolution=64,
        num_classes=1000,
        latent_dim=120,
        shared_dim=128,
        hierarchical=True,
        g_attention=(32,),
        d_attention=(32,),
        inplace_relu=True,
        sn_eps=1e-6,
    ),
    quantizer=QuantizerConfig(layers=("blocks.2.0",), decay=0.7, commitment_weight=0.5),
    optim=BigGANOptim(
        batch_size=128, accumulation=4, d_steps=1, lr_g=1e-4, lr_d=4e-4, adam_eps=1e-6, ema_start=20_000
    ),
    run=RunConfig(steps=250_000, num_eval=50_000),
)

_TAC_CIFAR100 = replace(
    CIFAR10,
    preset="tac-cifar100",
    data=DataConfig(data="cifar100"),
    model=replace(CIFAR10.model, num_classes=100, class_head="twin"),
    quantizer=QuantizerConfig(codebook_size=64, decay=0.9, commitment_weight=10.0),
    optim=BigGANOptim(batch_size=100, d_steps=2, ema_start=10_000),
    run=RunConfig(steps=125_000),  # 500 epochs of 250 steps, each 2 x 100 pictures
)
_TAC_IMAGENET = replace(
    _IMAGENET64,
    preset="tac-imagenet128",
    model=replace(_IMAGENET64.model, resolution=128, g_attention=(64,), d_attention=(64,), class_head="twin"),
    quantizer=QuantizerConfig(layers=("blocks.[0-3].0",), commitment_weight=15.0),  # of six blocks
    optim=replace(_IMAGENET64.optim, batch_size=256, accumulation=8),
)


def _ffhq(resolution: int) -> StyleGAN2Training:
    """FQ-StyleGAN's settings (config E of StyleGAN2), with R1 weights that suit the size of the pictures."""
    batch = min(32, 4096 // resolution)
    return StyleGAN2Training(
        preset=f"ffhq{resolution}",
        data=DataConfig(data=f"data/ffhq{resolution}", mirror=True, num_workers=4),
        model=StyleGAN2Config(resolution=resolution, channel_base=16384),
        quantizer=QuantizerConfig(
            layers=("b16", "b32"), codebook_size=128, commitment_weight=0.25, generator_step="loss+ema"
        ),
        optim=StyleGAN2Optim(
            batch_size=batch,
            accumulation=32 // batch,
            r1_gamma=100.0 if resolution == 1024 else 0.0002 * resolution**2 / 32,
        ),
        run=RunConfig(steps=25_000_000 // 32, num_eval=50_000),
    )


_CIFAR_STYLEGAN2 = StyleGAN2Training(
    preset="cifar",
    data=DataConfig(data="cifar10"),
    model=StyleGAN2Config(
        resolution=32, num_classes=10, mapping_layers=2, channel_base=32768, d_architecture="orig",
        mbstd_group=32,
    ),
    quantizer=QuantizerConfig(layers=("b16", "b32"), codebook_size=128, commitment_weight=0.25),
    optim=StyleGAN2Optim(
        batch_size=64, lr_g=2.5e-3, lr_d=2.5e-3, r1_gamma=0.01, path_weight=0.0, style_mixing=0.0,
        ema_kimg=500.0, ema_rampup=0.05,
    ),
    run=RunConfig(steps=100_000_000 // 64, num_eval=50_000),
)  # fmt: skip
_FACES = StyleGAN2Training(
    preset="faces",
    data=DataConfig(data="data/faces", resize=True, mirror=True),
    model=StyleGAN2Config(
        resolution=32, latent_dim=128, w_dim=128, mapping_layers=2, channel_base=1024, channel_max=64
    ),
    quantizer=QuantizerConfig(
        layers=("b16", "b32"), codebook_size=128, commitment_weight=0.25, generator_step="loss"
    ),
    optim=StyleGAN2Optim(
        batch_size=16, lr_g=2.5e-3, lr_d=2.5e-3, r1_gamma=0.1, path_weight=0.0, style_mixing=0.0,
        ema_kimg=2.0, ema_rampup=0.05,
    ),
    run=RunConfig(steps=6000, sample_every=500, eval_every=500, checkpoint_every=500, num_eval=1000),
)  # fmt: skip
_SELFIE2ANIME = UGATITTraining(
    preset="selfie2anime",
    data=PairConfig(data="data/selfie2anime"),
    model=UGATITConfig(),
    quantizer=QuantizerConfig(
        layers=("model.5", "model.8", "model.11"), codebook_sizes=(64, 128, 128), decay=0.85,
        commitment_weight=2.0,
    ),
    optim=UGATITOptim(),
    run=RunConfig(steps=1_000_000, num_eval=100),
)  # fmt: skip

PRESETS: dict[str, tuple[str, Training]] = {
    "digits": ("Handwritten digits at 16 pixels: minutes on a laptop, nothing to fetch.", DIGITS),
    "smoke": (
        "Digits through a tiny model for a few steps: does everything work here?",
        replace(
            DIGITS,
            preset="smoke",
            model=replace(DIGITS.model, g_channels=2, d_channels=2, latent_dim=16),
            quantizer=replace(DIGITS.quantizer, codebook_size=16),
            optim=replace(DIGITS.optim, batch_size=16),
            run=RunConfig(
                steps=20,
                log_every=5,
                sample_every=10,
                eval_every=0,
                checkpoint_every=10,
                features="random",
                num_eval=200,
            ),
        ),
    ),
    "cifar10": ("CIFAR-10 with the paper's settings (FQ at all four blocks).", CIFAR10),
    "cifar100": (
        "CIFAR-100 with the paper's settings.",
        replace(
            CIFAR10,
            preset="cifar100",
            data=DataConfig(data="cifar100"),
            model=replace(CIFAR10.model, num_classes=100),
            quantizer=QuantizerConfig(codebook_size=64, decay=0.9, commitment_weight=10.0),
        ),
    ),
    "imagenet64": ("ImageNet (or any folder) at 64 pixels, effective batch 512.", _IMAGENET64),
    "imagenet128": (
        "ImageNet at 128 pixels, effective batch 1024; the published script's missing shared embedding is "
        "set.",
        replace(
            _IMAGENET64,
            preset="imagenet128",
            model=replace(_IMAGENET64.model, resolution=128, g_attention=(64,), d_attention=(64,)),
            quantizer=QuantizerConfig(layers=("blocks.[0-3].0",), commitment_weight=15.0),  # of six blocks
            optim=replace(_IMAGENET64.optim, batch_size=256),
        ),
    ),
    "tac-cifar10": (
        "CIFAR-10 with TAC-GAN's twin classifiers on BigGAN.",
        replace(
            _TAC_CIFAR100,
            preset="tac-cifar10",
            data=DataConfig(data="cifar10"),
            model=replace(_TAC_CIFAR100.model, num_classes=10),
            quantizer=QuantizerConfig(),
        ),
    ),
    "tac-cifar100": ("CIFAR-100 with TAC-GAN's settings.", _TAC_CIFAR100),
    "tac-imagenet128": ("ImageNet at 128 pixels with TAC-GAN's heads, effective batch 2048.", _TAC_IMAGENET),
    **{
        f"ffhq{size}": (f"StyleGAN2 on FFHQ at {size} pixels, FQ at the 8x8 and 16x16 maps.", _ffhq(size))
        for size in (32, 64, 128, 256, 512, 1024)
    },
    "cifar": ("StyleGAN2 on CIFAR-10, class-conditional.", _CIFAR_STYLEGAN2),
    "faces": ("StyleGAN2 at 32 pixels on any folder of faces: 20 minutes on one core.", _FACES),
    "selfie2anime": ("U-GAT-IT at 256 pixels, as published: 279 M parameters a generator.", _SELFIE2ANIME),
    "selfie2anime-light": (
        "U-GAT-IT at 256 pixels with light generators (10.6 M parameters).",
        replace(_SELFIE2ANIME, preset="selfie2anime-light", model=UGATITConfig(light=True)),
    ),
    "pets": (
        "U-GAT-IT light at 64 pixels on two folders of pictures: 20 minutes on one core.",
        replace(
            _SELFIE2ANIME,
            preset="pets",
            data=PairConfig(data="data/pets"),
            model=UGATITConfig(resolution=64, light=True, channels=16, num_blocks=2, global_layers=6),
            # In so few steps the CAM classifiers stay near chance, and their gradient times 1000 is noise.
            optim=UGATITOptim(schedule_steps=3500, lr=5e-4, cam_weight=10.0),
            run=RunConfig(steps=3500, sample_every=500, eval_every=250, checkpoint_every=500, num_eval=150),
        ),
    ),
}
