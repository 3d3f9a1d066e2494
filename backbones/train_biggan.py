"""Training of BigGAN and TAC-GAN.

One step is ``d_steps`` discriminator steps and one generator step, each over ``accumulation`` micro-batches.
Every random number is a function of (seed, purpose, step), and no global generator is read, so a run that was
killed and resumed repeats the losses of one that was not, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from backbones.biggan import Discriminator, Generator, Verdict, add_orthogonal_gradient
from backbones.configs import BigGANTraining
from backbones.data import batches
from backbones.losses import ADVERSARIAL, gradient_penalty, multiclass_hinge
from backbones.sample import class_grid, real_grid, sampler, save_grid
from backbones.scores import make_extractor, score_generator
from backbones.train_setup import (
    Reports,
    announce,
    attach_fq,
    average_buffers,
    commitment_of,
    open_checked,
    open_run,
    parts,
    penalty,
    seeded,
)
from fq.command import make_accelerator
from fq.loop import prepare, summed_last
from fq.run import Steps

_TERMS = ("loss_d_real", "loss_d_fake", "commitment_d", "loss_g", "commitment_g")
_CLASS_TERMS = ("class_loss_d", "class_loss_g")


def train(config: BigGANTraining) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see :class:`BigGANTraining`.

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
    set_seed(options.seed)  # weights only: the loop itself draws from _latents
    images = open_checked(
        config.data, resolution=model.resolution, num_classes=model.num_classes,
        batch_size=optim.batch_size, accelerator=accelerator,
    )  # fmt: skip

    generator = Generator(model).to(memory_format=torch.channels_last)
    average = copy.deepcopy(generator).requires_grad_(False)
    discriminator = Discriminator(model).to(memory_format=torch.channels_last)
    handle = attach_fq(discriminator, config.quantizer, seed=options.seed, concat_parts=2)
    adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.adam_eps}
    opt_g: Any = torch.optim.Adam(generator.parameters(), lr=optim.lr_g, **adam)  # type: ignore[arg-type]
    opt_d: Any = torch.optim.Adam(discriminator.parameters(), lr=optim.lr_d, **adam)  # type: ignore[arg-type]
    adversarial = ADVERSARIAL[optim.loss]

    extractor = None
    if options.features != "none" and accelerator.is_main_process:
        extractor = make_extractor(options.features, images, device=accelerator.device)
    run = open_run(config, accelerator)
    net_g, net_d, opt_g, opt_d = prepare(accelerator, generator, discriminator, opt_g, opt_d)
    average = accelerator.prepare_model(average, evaluation_mode=True)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    stream = batches(
        images, batch_size=optim.batch_size, seed=options.seed,
        start=first * optim.d_steps * optim.accumulation,
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
        config, run, accelerator, terms=_TERMS + (() if model.class_head == "projection" else _CLASS_TERMS),
        networks={"generator": generator, "discriminator": discriminator}, handles={"": handle},
        sample=sample, score=score if extractor else None,
    )  # fmt: skip
    announce(
        config, accelerator, run.path, first, f"{len(images)} pictures of {images.name}, effective batch "
        f"{optim.batch_size * optim.accumulation * accelerator.num_processes}, {optim.d_steps} discriminator "
        "steps a step",
    )  # fmt: skip
    if first == 0 and accelerator.is_main_process:
        real, rows = real_grid(images)
        save_grid(real, run.path / "real.png", rows=rows)
        sample(run.samples / "000000.png")

    for step in reports.steps(first):
        latents = _latents(config, generator.latent_dim, accelerator, step)
        shares = seeded(options.seed, 3, step)  # of the ways from real to fake in a gradient penalty

        # Discriminator: fake and real in one batch, fake first, as in the original.
        discriminator.requires_grad_(True)
        d_terms = []
        for _ in range(optim.d_steps):
            opt_d.zero_grad(set_to_none=True)
            for micro in range(optim.accumulation):
                real, real_labels = (part.to(accelerator.device, non_blocking=True) for part in next(stream))
                if model.num_classes == 1:
                    real_labels.zero_()  # an unconditional model, whatever labels the pictures have
                z, labels = next(latents)
                with torch.no_grad(), accelerator.autocast():
                    fake = net_g(z, generator.shared(labels))
                both = torch.cat([fake.float(), real]).contiguous(memory_format=torch.channels_last)
                both_labels = torch.cat([labels, real_labels])
                with summed_last(accelerator, net_d, micro, optim.accumulation):
                    with accelerator.autocast(), parts(handle, "fake", "real"):
                        verdict = _verdict(net_d(both, both_labels))
                    on_fake, on_real = verdict.realness.chunk(2)
                    loss_real, loss_fake = adversarial.discriminator(on_real, on_fake)
                    commitment = commitment_of(handle, loss_real)
                    class_loss = _discriminator_class_loss(config, verdict, both_labels)
                    loss = loss_real + loss_fake + commitment + class_loss
                    if optim.gradient_penalty:
                        with penalty(handle):
                            steepness = _steepness(discriminator, real, fake.float(), real_labels, shares)
                        loss = loss + optim.gradient_penalty * steepness
                    accelerator.backward(loss / optim.accumulation)
                d_terms.append(_detached(loss_real, loss_fake, commitment, class_loss))
            opt_d.step()

        # Generator: through the bare discriminator, whose weights rest and need no synchronisation.
        discriminator.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        g_terms = []
        for micro in range(optim.accumulation):
            z, labels = next(latents)
            with summed_last(accelerator, net_g, micro, optim.accumulation):
                with accelerator.autocast(), parts(handle, "fake"):
                    fake = net_g(z, generator.shared(labels)).float()
                    verdict = _verdict(discriminator(fake, labels))
                loss_g = adversarial.generator(verdict.realness)
                commitment = commitment_of(handle, loss_g)
                class_loss = _generator_class_loss(config, verdict, labels)
                accelerator.backward((loss_g + commitment + class_loss) / optim.accumulation)
            g_terms.append(_detached(loss_g, commitment, class_loss))
        if optim.g_orthogonal:
            add_orthogonal_gradient(generator, optim.g_orthogonal)
        opt_g.step()

        average_buffers(accelerator, generator)
        _follow(average, generator, optim.ema_decay if step >= optim.ema_start else 0.0)
        done.advance()
        of_d, of_g = torch.stack(d_terms).mean(0), torch.stack(g_terms).mean(0)
        terms = torch.cat([of_d[:3], of_g[:2], of_d[3:], of_g[2:]])
        reports.finish(step + 1, terms[: len(reports.terms)])
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


def _latents(
    config: BigGANTraining, latent_dim: int, accelerator: Accelerator, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the latents and labels of one step, in the order the step uses them."""
    draw = seeded(config.run.seed, step)
    size, everyone = config.optim.batch_size, config.optim.batch_size * accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    while True:
        z = torch.randn(everyone, latent_dim, generator=draw)[mine]
        labels = torch.randint(config.model.num_classes, (everyone,), generator=draw)[mine]
        yield z.to(accelerator.device), labels.to(accelerator.device)


def _detached(*terms: Tensor) -> Tensor:
    return torch.stack([term.detach() for term in terms])


def _verdict(outputs: Tensor | Verdict) -> Verdict:
    """Outputs of any head in float32."""
    if isinstance(outputs, Tensor):
        return Verdict(outputs.float(), None, outputs.new_zeros(len(outputs), 0))
    return Verdict(*(None if part is None else part.float() for part in outputs))  # type: ignore[arg-type]


def _class_loss(config: BigGANTraining, scores: Tensor, labels: Tensor) -> Tensor:
    if config.optim.class_loss == "multiclass_hinge":
        return multiclass_hinge(scores, labels)
    return F.cross_entropy(scores, labels)


def _discriminator_class_loss(config: BigGANTraining, verdict: Verdict, labels: Tensor) -> Tensor:
    """The classifier learns from real pictures, its twin from fakes (TAC-GAN, Eq. 4); fakes come first."""
    if config.model.class_head == "projection":
        return verdict.realness.new_zeros(())
    fake_labels, real_labels = labels.chunk(2)
    loss = _class_loss(config, verdict.class_scores.chunk(2)[1], real_labels)
    if verdict.twin_scores is not None:
        loss = loss + _class_loss(config, verdict.twin_scores.chunk(2)[0], fake_labels)
    return config.optim.class_weight * loss


def _generator_class_loss(config: BigGANTraining, verdict: Verdict, labels: Tensor) -> Tensor:
    """The generator pleases the classifier and, so that classes stay varied, confuses the twin."""
    if config.model.class_head == "projection":
        return verdict.realness.new_zeros(())
    loss = _class_loss(config, verdict.class_scores, labels)
    if verdict.twin_scores is not None:
        loss = loss - _class_loss(config, verdict.twin_scores, labels)
    return config.optim.class_weight * loss


def _steepness(
    discriminator: Discriminator, real: Tensor, fake: Tensor, labels: Tensor, shares: torch.Generator
) -> Tensor:
    share = torch.rand(len(real), generator=shares)
    return gradient_penalty(
        lambda images: _verdict(discriminator(images, labels)).realness, real, fake, share
    )


@torch.no_grad()
def _follow(average: nn.Module, generator: nn.Module, decay: float) -> None:
    """Moving average of every entry, buffers too (BigGAN's public code)."""
    mine, theirs = average.state_dict(), generator.state_dict()
    for key, value in mine.items():
        value.copy_(torch.lerp(theirs[key], value, decay) if value.is_floating_point() else theirs[key])
