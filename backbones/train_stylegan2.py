"""Training of StyleGAN2 (Karras et al., CVPR 2020).

One step is a generator and a discriminator phase; every ``path_every`` steps the generator also has a path
length phase, every ``r1_every`` the discriminator an R1 phase, each with an optimiser step of its own. Every
random number is a function of (seed, purpose, step), and no global generator is read, so a run that was
killed and resumed repeats the losses of one that was not, bit for bit.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from backbones.configs import StyleGAN2Optim, StyleGAN2Training
from backbones.data import batches
from backbones.losses import nonsaturating_discriminator, nonsaturating_generator, path_lengths, r1_penalty
from backbones.sample import class_grid, real_grid, sampler, save_grid
from backbones.scores import make_extractor, score_generator
from backbones.stylegan2 import Discriminator, Generator
from backbones.train_setup import (
    Reports,
    announce,
    attach_fq,
    average_buffers,
    average_gradients,
    commitment_of,
    open_checked,
    open_run,
    parts,
    penalty,
    same_everywhere,
    seeded,
)
from fq.command import make_accelerator
from fq.loop import prepare
from fq.run import Steps

_TERMS = ("loss_d_real", "loss_d_fake", "commitment_d", "loss_g", "commitment_g", "r1", "path")


class Augment(Protocol):
    """Change of every picture that the discriminator sees, such as ADA's.

    It must be an ``nn.Module``; what it adapts is a buffer, so that checkpoints carry it.
    """

    def __call__(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Changed pictures [B, 3, R, R], differentiable; random numbers come from ``draw`` (on the CPU)."""

    def observe(self, real_logits: Tensor) -> None:
        """Adapt to the discriminator's logits for real pictures [B, 1], the same on all processes."""


class _PathMean(nn.Module):
    """Moving average of path lengths, as a buffer that checkpoints carry."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))


def train(config: StyleGAN2Training, *, augment: Augment | None = None) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see :class:`StyleGAN2Training`.
        augment: applied to real and generated pictures before the discriminator.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, samples/, checkpoints/.

    Raises:
        ValueError: data, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, optim, model = config.run, config.optim, config.model
    accelerator = make_accelerator(
        folder=config.folder, trackers=options.trackers, mixed_precision=options.mixed_precision
    )
    set_seed(options.seed)  # weights only: the loop itself draws from _Draws
    images = open_checked(
        config.data, resolution=model.resolution, num_classes=model.num_classes,
        batch_size=optim.batch_size, accelerator=accelerator,
    )  # fmt: skip

    generator = Generator(model)
    average = copy.deepcopy(generator).requires_grad_(False)
    discriminator = Discriminator(model)
    handle = attach_fq(discriminator, config.quantizer, seed=options.seed)
    opt_g: Any = _lazy_adam(generator, optim, optim.lr_g, optim.path_every if optim.path_weight else 0)
    opt_d: Any = _lazy_adam(discriminator, optim, optim.lr_d, optim.r1_every if optim.r1_gamma else 0)

    extractor = None
    if options.features != "none" and accelerator.is_main_process:
        extractor = make_extractor(options.features, images, device=accelerator.device)
    run = open_run(config, accelerator)
    # Unwrapped: penalties differentiate twice. average_gradients stands in for DistributedDataParallel.
    path_mean = _PathMean()
    extra: list[nn.Module] = [augment] if isinstance(augment, nn.Module) else []
    for module in (generator, discriminator, average, path_mean, *extra):
        accelerator.prepare_model(module, evaluation_mode=True)
        same_everywhere(accelerator, module)
    opt_g, opt_d = prepare(accelerator, opt_g, opt_d)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    stream = batches(
        images, batch_size=optim.batch_size, seed=options.seed, start=first * optim.accumulation,
        rank=accelerator.process_index, world_size=accelerator.num_processes, mirror=config.data.mirror,
        dequantize=config.data.dequantize, num_workers=config.data.num_workers,
    )  # fmt: skip

    def sample(path: Path) -> None:
        pictures, rows = class_grid(average, model, seed=options.seed)
        save_grid(pictures, path, rows=rows)

    def score() -> dict[str, float]:
        assert extractor is not None
        return score_generator(
            sampler(average, model, seed=options.seed), images, extractor, num_samples=options.num_eval,
            num_real=options.num_real, seed=options.seed, conditional=model.num_classes > 1,
            dequantize=config.data.dequantize,
        )  # fmt: skip

    reports = Reports(
        config, run, accelerator, terms=_TERMS, now_and_then=("r1", "path"), handles={"": handle},
        networks={"generator": generator, "discriminator": discriminator},
        sample=sample, score=score if extractor else None,
    )  # fmt: skip
    everyone = optim.batch_size * optim.accumulation * accelerator.num_processes
    announce(
        config, accelerator, run.path, first, f"{len(images)} pictures of {images.name}, effective batch "
        f"{everyone}, {options.steps * everyone / 1000:.0f} thousand pictures in all",
    )  # fmt: skip
    if first == 0 and accelerator.is_main_process:
        real, rows = real_grid(images)
        save_grid(real, run.path / "real.png", rows=rows)
        sample(run.samples / "000000.png")

    for step in reports.steps(first):
        draws = _Draws(config, accelerator, step)

        def seen(pictures: Tensor, draws: _Draws = draws) -> Tensor:
            return augment(pictures, draws.augment) if augment else pictures

        def made(batch: int, draws: _Draws = draws) -> tuple[Tensor, Tensor, Tensor]:
            """Pictures of new latents, with the styles and labels they come from."""
            with accelerator.autocast():
                ws, labels = draws.styles(generator, batch)
                return generator.synthesis(ws, noise="random", generator=draws.noise).float(), ws, labels

        # Generator: the discriminator's weights rest.
        discriminator.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        g_terms = []
        for _ in range(optim.accumulation):
            fake, _, labels = made(optim.batch_size)
            with accelerator.autocast(), parts(handle, "fake"):
                logits = discriminator(seen(fake), labels).float()
            loss_g = nonsaturating_generator(logits)
            commitment = commitment_of(handle, loss_g)
            accelerator.backward((loss_g + commitment) / optim.accumulation)
            g_terms.append(torch.stack([loss_g.detach(), commitment.detach()]))
        _descend(accelerator, opt_g, generator)

        # Path length: pictures should move evenly, whatever the direction in w.
        path = path_mean.value.new_tensor(math.nan)
        if optim.path_weight and step % optim.path_every == 0:
            path = path.new_zeros(())
            opt_g.zero_grad(set_to_none=True)
            for _ in range(optim.accumulation):
                fake, ws, _ = made(optim.batch_size // optim.path_shrink)
                lengths = path_lengths(fake, ws, draws.like(fake))
                mean = accelerator.reduce(lengths.detach().mean(), "mean")
                path_mean.value.lerp_(mean, optim.path_decay)
                spread = (lengths - path_mean.value).square().mean()
                accelerator.backward(optim.path_weight * optim.path_every * spread / optim.accumulation)
                path = path + spread.detach() / optim.accumulation
            _descend(accelerator, opt_g, generator)

        # Discriminator: fake and real in calls of their own, as the minibatch deviation demands.
        discriminator.requires_grad_(True)
        opt_d.zero_grad(set_to_none=True)
        d_terms, reals = [], []
        for _ in range(optim.accumulation):
            real, real_labels = (part.to(accelerator.device, non_blocking=True) for part in next(stream))
            if model.num_classes == 1:
                real_labels.zero_()  # an unconditional model, whatever labels the pictures have
            reals.append((real, real_labels))
            with torch.no_grad():
                fake, _, labels = made(optim.batch_size)
            with accelerator.autocast():
                with parts(handle, "fake"):
                    on_fake = discriminator(seen(fake), labels).float()
                with parts(handle, "real"):
                    on_real = discriminator(seen(real), real_labels).float()
            loss_real, loss_fake = nonsaturating_discriminator(on_real, on_fake)
            commitment = commitment_of(handle, loss_real)
            accelerator.backward((loss_real + loss_fake + commitment) / optim.accumulation)
            d_terms.append(torch.stack([loss_real.detach(), loss_fake.detach(), commitment.detach()]))
            if augment:
                augment.observe(accelerator.gather(on_real.detach()))
        _descend(accelerator, opt_d, discriminator)

        # R1: small gradients at real pictures.
        r1 = path_mean.value.new_tensor(math.nan)
        if optim.r1_gamma and step % optim.r1_every == 0:
            r1 = r1.new_zeros(())
            opt_d.zero_grad(set_to_none=True)
            for real, real_labels in reals:
                real = seen(real).detach().requires_grad_()
                with accelerator.autocast(), penalty(handle):
                    logits = discriminator(real, real_labels).float()
                steepness = r1_penalty(logits, real).mean()
                accelerator.backward(optim.r1_gamma / 2 * optim.r1_every * steepness / optim.accumulation)
                r1 = r1 + steepness.detach() / optim.accumulation
            _descend(accelerator, opt_d, discriminator)

        average_buffers(accelerator, generator)
        _follow(average, generator, _ema_decay(optim, everyone, step))
        done.advance()
        terms = [torch.stack(d_terms).mean(0), torch.stack(g_terms).mean(0), torch.stack([r1, path])]
        reports.finish(step + 1, torch.cat(terms))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


class _Draws:
    """This rank's random numbers of one step, in the order the step uses them."""

    def __init__(self, config: StyleGAN2Training, accelerator: Accelerator, step: int) -> None:
        self.config, self.device = config, accelerator.device
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        seed = config.run.seed
        self._latents = seeded(seed, step)
        self.augment = seeded(seed, 4, step, self.rank)
        self._path = seeded(seed, 5, step, self.rank)
        # Noise maps are large: they are drawn where they are used.
        self.noise = torch.Generator(self.device)
        self.noise.manual_seed(seeded(seed, 6, step, self.rank).initial_seed())

    def styles(self, generator: Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Styles [batch, num_ws, w_dim] and labels [batch]; with some probability mixed from two latents."""
        z, labels = self._share(batch)
        other, _ = self._share(batch)
        ws: Tensor = generator.mapping(z, labels, track_average=True)
        start = int(torch.randint(1, ws.shape[1], (), generator=self._latents))
        if float(torch.rand((), generator=self._latents)) < self.config.optim.style_mixing:
            ws = torch.cat([ws[:, :start], generator.mapping(other, labels)[:, start:]], dim=1)
        return ws, labels

    def like(self, images: Tensor) -> Tensor:
        """Standard normal noise, for the direction of a path length."""
        return torch.randn(images.shape, generator=self._path).to(images)

    def _share(self, batch: int) -> tuple[Tensor, Tensor]:
        mine = slice(self.rank * batch, (self.rank + 1) * batch)
        model = self.config.model
        z = torch.randn(batch * self.ranks, model.latent_dim, generator=self._latents)[mine]
        labels = torch.randint(model.num_classes, (batch * self.ranks,), generator=self._latents)[mine]
        return z.to(self.device), labels.to(self.device)


def _lazy_adam(module: nn.Module, optim: StyleGAN2Optim, lr: float, every: int) -> torch.optim.Adam:
    """Adam whose memory, counted in steps, is not shortened by a penalty's own steps (App. B)."""
    share = every / (every + 1) if every else 1.0
    betas = (optim.beta1**share, optim.beta2**share)
    return torch.optim.Adam(module.parameters(), lr=lr * share, betas=betas, eps=optim.adam_eps)


def _descend(accelerator: Accelerator, optimizer: Any, module: nn.Module) -> None:
    average_gradients(accelerator, module.parameters())
    optimizer.step()


def _ema_decay(optim: StyleGAN2Optim, batch: int, step: int) -> float:
    """Factor of the generator's moving average from its half-life in pictures."""
    half_life = optim.ema_kimg * 1000
    if optim.ema_rampup:
        half_life = min(half_life, step * batch * optim.ema_rampup)
    return float(0.5 ** (batch / max(half_life, 1e-8)))


@torch.no_grad()
def _follow(average: nn.Module, generator: nn.Module, decay: float) -> None:
    """Moving average of the weights; buffers, such as the mean style, are copied."""
    for mine, theirs in zip(average.parameters(), generator.parameters(), strict=True):
        mine.copy_(torch.lerp(theirs, mine, decay))
    for kept, latest in zip(average.buffers(), generator.buffers(), strict=True):
        kept.copy_(latest)
