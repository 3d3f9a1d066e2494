"""Training of U-GAT-IT (Kim et al., ICLR 2020).

One step is a phase of the four discriminators and one of the two generators. Every random number is a
function of (seed, purpose, step), and no global generator is read, so a run that was killed and resumed
repeats the losses of one that was not, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn

import fq
from backbones.configs import UGATITOptim, UGATITTraining
from backbones.losses import least_squares_discriminator, least_squares_generator
from backbones.scores import make_extractor
from backbones.train_setup import (
    Reports,
    announce,
    attach_fq,
    average_gradients,
    commitment_of,
    open_run,
    parts,
    same_everywhere,
)
from backbones.translate import save_translations, score_translations
from backbones.ugatit import Networks, build_networks, clip_rho
from backbones.unpaired import Pair, Split, open_pair, unpaired_batches
from fq.command import make_accelerator
from fq.loop import prepare
from fq.run import Steps

SPLITS: tuple[Split, ...] = ("train", "test")
_TERMS = ("loss_d", "commitment_d", "loss_g", "cycle", "identity", "cam", "commitment_g")


def train(config: UGATITTraining) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see :class:`UGATITTraining`.

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
    set_seed(options.seed)  # weights only
    source = config.data
    train_pair, test_pair = (
        open_pair(
            source.data, model.resolution, split=split, root=source.data_root,
            skip_corrupt=source.skip_corrupt, num_workers=source.num_workers,
        )
        for split in SPLITS
    )  # fmt: skip
    _refuse_small(train_pair, optim.batch_size * accelerator.num_processes)

    networks = build_networks(model)
    generators = nn.ModuleList([networks.genA2B, networks.genB2A])
    discriminators = nn.ModuleList([networks.disGA, networks.disGB, networks.disLA, networks.disLB])
    handles = {
        name: attach_fq(network, config.quantizer, seed=options.seed + domain)
        for domain, (name, network) in enumerate((("A", networks.disGA), ("B", networks.disGB)))
    }
    opt_g: Any = _adam(generators, optim)
    opt_d: Any = _adam(discriminators, optim)

    extractor = None
    if options.features != "none" and accelerator.is_main_process:
        extractor = make_extractor(options.features, test_pair.a, device=accelerator.device)
    run = open_run(config, accelerator)
    # Unwrapped: average_gradients stands in for DistributedDataParallel, as in the other siblings' penalties.
    for network in networks:
        accelerator.prepare_model(network, evaluation_mode=True)
        same_everywhere(accelerator, network)
    opt_g, opt_d = prepare(accelerator, opt_g, opt_d)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    stream = unpaired_batches(
        train_pair, batch_size=optim.batch_size, seed=options.seed, start=first,
        rank=accelerator.process_index, world_size=accelerator.num_processes, mirror=source.mirror,
        num_workers=source.num_workers,
    )  # fmt: skip

    def score() -> dict[str, float]:
        assert extractor is not None
        return score_translations(
            networks.genA2B, networks.genB2A, test_pair, extractor, num_samples=options.num_eval,
            num_real=options.num_real, seed=options.seed,
        )  # fmt: skip

    reports = Reports(
        config, run, accelerator, terms=_TERMS, networks=networks._asdict(),
        handles={f"{name}/": handle for name, handle in handles.items()},
        sample=lambda path: save_translations(networks.genA2B, networks.genB2A, test_pair, path),
        score=score if extractor else None,
    )  # fmt: skip
    announce(
        config, accelerator, run.path, first, f"{len(train_pair.a)} pictures of {train_pair.a.name} and "
        f"{len(train_pair.b)} of {train_pair.b.name}, effective batch "
        f"{optim.batch_size * accelerator.num_processes} of each",
    )  # fmt: skip
    if first == 0 and accelerator.is_main_process:
        reports.sample(run.samples / "000000.png")

    for step in reports.steps(first):
        for optimizer in (opt_g, opt_d):
            for group in optimizer.param_groups:
                group["lr"] = optim.lr * min(1.0, 2 * (1 - step / optim.schedule_steps))
        real_a, real_b = (part.to(accelerator.device, non_blocking=True) for part in next(stream))

        # Discriminators: global and local of both domains, on real pictures and on translations.
        discriminators.requires_grad_(True)
        opt_d.zero_grad(set_to_none=True)
        with torch.no_grad(), accelerator.autocast():
            fake_a, fake_b = networks.genB2A(real_b).image, networks.genA2B(real_a).image
        loss_d = real_a.new_zeros(())
        commitment_d = real_a.new_zeros(())
        for name, real, fake, of_domain in (
            ("A", real_a, fake_a, (networks.disGA, networks.disLA)),
            ("B", real_b, fake_b, (networks.disGB, networks.disLB)),
        ):
            for network in of_domain:
                with accelerator.autocast():
                    with parts(handles[name], "real"):
                        on_real = network(real)
                    with parts(handles[name], "fake"):
                        on_fake = network(fake.float())
                loss_d = loss_d + _discriminator_loss(on_real, on_fake)
            commitment_d = commitment_d + commitment_of(handles[name], loss_d)
        accelerator.backward(optim.adversarial_weight * loss_d + commitment_d)
        average_gradients(accelerator, discriminators.parameters())
        opt_d.step()

        # Generators: the discriminators' weights rest.
        discriminators.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        with accelerator.autocast():
            losses = _generator_losses(networks, handles, real_a, real_b)
        commitment_g = sum(
            (commitment_of(handle, loss_d) for handle in handles.values()), start=loss_d.new_zeros(())
        )
        loss = (
            optim.adversarial_weight * losses.adversarial + optim.cycle_weight * losses.cycle
            + optim.identity_weight * losses.identity + optim.cam_weight * losses.cam + commitment_g
        )  # fmt: skip
        accelerator.backward(loss)
        average_gradients(accelerator, generators.parameters())
        opt_g.step()
        clip_rho(generators)

        done.advance()
        terms = [loss_d, commitment_d, *losses, commitment_g]
        reports.finish(step + 1, torch.stack([term.detach() for term in terms]))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


def _refuse_small(pair: Pair, batch: int) -> None:
    for images in pair[:2]:
        if batch > len(images):
            raise ValueError(
                f"a batch of {batch} pictures over all processes is larger than {images.name} with "
                f"{len(images)}: lower --batch-size or add pictures"
            )


class _GeneratorLosses(NamedTuple):
    """Losses of both generators, summed over the directions, before their weights."""

    adversarial: Tensor
    cycle: Tensor
    identity: Tensor
    cam: Tensor


def _generator_losses(
    networks: Networks, handles: dict[str, fq.Handle | None], real_a: Tensor, real_b: Tensor
) -> _GeneratorLosses:
    """Losses of U-GAT-IT, Sec. 2.2: adversarial, cycle, identity and CAM."""
    directions = (
        (networks.genB2A, networks.genA2B, real_b, real_a, networks.disGA, networks.disLA, handles["A"]),
        (networks.genA2B, networks.genB2A, real_a, real_b, networks.disGB, networks.disLB, handles["B"]),
    )
    losses = []
    for there, back, source, target, *discriminators, handle in directions:
        translated, cam, _ = there(source)
        same, same_cam, _ = there(target)
        with parts(handle, "fake"):
            verdicts = [discriminator(translated.float()) for discriminator in discriminators]
        cycle = F.l1_loss(back(translated).image.float(), source)
        adversarial = sum(
            least_squares_generator(part.float())
            for logit, cam_logit, _ in verdicts
            for part in (logit, cam_logit)
        )
        # The classifier within the generator tells pictures of the other domain from those of its own.
        attention = F.binary_cross_entropy_with_logits(cam.float(), torch.ones_like(cam.float()))
        attention = attention + F.binary_cross_entropy_with_logits(
            same_cam.float(), torch.zeros_like(same_cam.float())
        )
        losses.append((adversarial, cycle, F.l1_loss(same.float(), target), attention))
    return _GeneratorLosses(*(one + other for one, other in zip(*losses, strict=True)))


def _discriminator_loss(on_real: tuple[Tensor, ...], on_fake: tuple[Tensor, ...]) -> Tensor:
    """Least squares on the logits of the patches and on those of the attention's classifiers."""
    terms = [
        torch.stack(least_squares_discriminator(real.float(), fake.float())).sum()
        for real, fake in zip(on_real[:2], on_fake[:2], strict=True)
    ]
    return terms[0] + terms[1]


def _adam(module: nn.Module, optim: UGATITOptim) -> torch.optim.Adam:
    return torch.optim.Adam(
        module.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
