"""What the training loops share: stored configurations, pictures, FQ, and what is written at which step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, tqdm
from torch import Tensor, nn

import fq
from backbones.configs import (
    MAY_CHANGE,
    BigGANTraining,
    QuantizerConfig,
    StyleGAN2Training,
    Training,
    UGATITTraining,
)
from backbones.data import DataConfig, Images, open_images
from fq.command import flat_settings, from_dict
from fq.loop import derived_seed, due, require_finite
from fq.run import RunFolder


def stored_training(values: Mapping[str, Any]) -> Training:
    """The configuration of a run of any model, told apart by what its ``model`` group holds.

    Args:
        values: contents of a ``config.json``.

    Returns:
        The configuration, checked as ever.

    Raises:
        ValueError: a key is unknown or missing, or a value is out of range.
    """
    model = values.get("model")
    given = set(model) if isinstance(model, Mapping) else set()
    kinds: tuple[type[Training], ...] = (BigGANTraining, StyleGAN2Training, UGATITTraining)

    def known(kind: type[Training]) -> int:
        return len(given & {field.name for field in fields(get_type_hints(kind)["model"])})

    return from_dict(max(kinds, key=known), values)


def open_checked(
    data: DataConfig, *, resolution: int, num_classes: int, batch_size: int, accelerator: Accelerator
) -> Images:
    """The real pictures, checked against model and batch size before anything is built or written.

    Raises:
        FileNotFoundError: pictures are missing.
        ValueError: they do not fit.
    """
    images = open_images(data, resolution=resolution, conditional=num_classes > 1)
    if num_classes > 1 and images.num_classes != num_classes:
        raise ValueError(
            f"{images.name} has {images.num_classes} classes but the model {num_classes}: pass "
            f"--num-classes {images.num_classes}"
        )
    everyone = batch_size * accelerator.num_processes
    if everyone > len(images):
        raise ValueError(
            f"a batch of {everyone} pictures (--batch-size {batch_size} x "
            f"{accelerator.num_processes} processes) is larger than {images.name} with {len(images)}: lower "
            "--batch-size or add pictures"
        )
    return images


def attach_fq(
    discriminator: nn.Module, chosen: QuantizerConfig, *, seed: int, concat_parts: int = 1
) -> fq.Handle | None:
    """Quantise the configured layers of a discriminator; nothing for the plain GAN."""
    if chosen.fq == "none":
        return None
    sizes = chosen.codebook_sizes or (chosen.codebook_size,) * len(chosen.layers)
    return fq.attach(
        discriminator,
        {name: {"codebook_size": size} for name, size in zip(chosen.layers, sizes, strict=True)},
        codebook_size=chosen.codebook_size,
        decay=chosen.decay,
        commitment_weight=chosen.commitment_weight,
        mode=chosen.fq,
        concat_parts=concat_parts,
        generator_step=chosen.generator_step,
        compat=chosen.compat,
        options=fq.CodebookOptions(blend_steps=chosen.blend_steps, blend_end=chosen.blend_end, seed=seed),
    )


def parts(handle: fq.Handle | None, *names: str) -> AbstractContextManager[None]:
    """Label the tokens of a forward: one name for all, or one for each equal share of the batch."""
    return handle.part(parts=names) if handle else nullcontext()


def penalty(handle: fq.Handle | None) -> AbstractContextManager[None]:
    """A forward for a gradient penalty, of which FQ takes no notice."""
    return handle.penalty() if handle else nullcontext()


def commitment_of(handle: fq.Handle | None, like: Tensor) -> Tensor:
    """The commitment losses of the forwards since the last call; zero without FQ."""
    return handle.loss() if handle else like.new_zeros(())


def open_run(config: Training, accelerator: Accelerator) -> RunFolder:
    """The run folder, new or gone on with, and its trackers.

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
    """
    values = asdict(config)
    run = RunFolder.open(config.folder, values, accelerator, seed=config.run.seed, may_change=MAY_CHANGE)
    accelerator.init_trackers("fq-gan", config=flat_settings(values))
    return run


def seeded(*numbers: int) -> torch.Generator:
    """A source of random numbers on the CPU that depends on these numbers alone."""
    return torch.Generator().manual_seed(derived_seed(*numbers))


@torch.no_grad()
def same_everywhere(accelerator: Accelerator, module: nn.Module) -> None:
    """Weights and buffers of the first process on all of them."""
    if accelerator.num_processes > 1:
        for tensor in module.state_dict().values():
            tensor.copy_(broadcast(tensor.clone()))


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Give all processes the mean of their gradients, in one exchange, and tidy non-finite numbers.

    For networks that are not wrapped: penalties differentiate twice and in part, which
    DistributedDataParallel does not support. NaN becomes 0 and infinity 1e5 as in StyleGAN2's code; a loss
    that is not finite stops the run all the same.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(flat, "mean")
    flat = torch.nan_to_num(flat, nan=0.0, posinf=1e5, neginf=-1e5)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def average_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give all processes the mean of a network's running statistics; each has seen other pictures."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer.clone(), "mean"))


class Reports:
    """What a run writes, each at its steps: metrics, samples, scores and checkpoints.

    Args:
        config: of the run.
        run: its folder.
        accelerator: of this process.
        terms: names of the losses that :meth:`finish` is given.
        now_and_then: those among them that not every step has; NaN stands for one that a step lacks.
        networks: refused in a checkpoint when a weight is not finite.
        handles: of FQ; a name goes before those of its layers.
        sample: writes a sample picture to a path.
        score: scores the model, on the main process; None for never.
    """

    def __init__(
        self,
        config: Training,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        terms: tuple[str, ...],
        now_and_then: tuple[str, ...] = (),
        networks: Mapping[str, nn.Module],
        handles: Mapping[str, fq.Handle | None],
        sample: Callable[[Path], None],
        score: Callable[[], dict[str, float]] | None,
    ) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.terms, self.networks, self.handles = terms, networks, handles
        self.now_and_then = now_and_then
        self.sample, self.score = sample, score
        self._window: list[Tensor] = []
        self._started = time.perf_counter()
        self._progress: Any = None

    def steps(self, first: int) -> Iterator[int]:
        """The steps that are left, behind a progress bar."""
        last = self.config.run.steps
        self._progress = tqdm(range(first, last), initial=first, total=last, desc=self.config.preset)
        self._started = time.perf_counter()
        yield from self._progress

    def finish(self, now: int, terms: Tensor) -> None:
        """Note the losses of the step that makes it ``now`` steps, and write what is due.

        Args:
            now: finished steps.
            terms: ``[len(self.terms)]`` of this process.

        Raises:
            FloatingPointError: a loss, or a weight that a checkpoint would keep, is not finite.
        """
        options = self.config.run
        self._window.append(self._finite(self.accelerator.reduce(terms, "mean"), now))
        saving = due(now, options.checkpoint_every, options.steps)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or due(now, options.log_every, options.steps):
            self._log(now)
        paused = time.perf_counter()
        if due(now, options.sample_every, options.steps) and self.accelerator.is_main_process:
            self.sample(self.run.samples / f"{now:06d}.png")
        if self.score and due(now, options.eval_every, options.steps):
            self.run.log(now, self.score(), prefix="score")
        if saving:
            self._refuse_broken_weights(now)
            self.run.save(now, keep=options.keep_checkpoints)
        self._started += time.perf_counter() - paused

    def _log(self, now: int) -> None:
        means = torch.stack(self._window).nanmean(0).tolist()
        values = {name: mean for name, mean in zip(self.terms, means, strict=True) if not math.isnan(mean)}
        shown = {name.removeprefix("loss_"): f"{values[name]:.3f}" for name in values if "loss" in name}
        values["seconds_per_step"] = (time.perf_counter() - self._started) / len(self._window)
        self.run.log(now, values | self._figures())
        if self._progress is not None:
            self._progress.set_postfix(shown)
        self._window, self._started = [], time.perf_counter()

    def _figures(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for model, handle in self.handles.items():
            for name, site in handle.stats().items() if handle else ():
                values = {"usage": site.usage, "perplexity": site.perplexity,
                          "ema_perplexity": site.ema_perplexity, "dead_codes": site.dead_codes,
                          "commitment": site.commitment}  # fmt: skip
                if site.divergence is not None:
                    values["divergence"] = site.divergence
                figures |= {f"fq/{model}{name}/{key}": value for key, value in values.items()}
        return figures

    def _finite(self, terms: Tensor, step: int) -> Tensor:
        terms = terms.cpu()
        # NaN stands for a term that the step lacks.
        figures = {
            name: value
            for name, value in zip(self.terms, terms.tolist(), strict=True)
            if not (name in self.now_and_then and math.isnan(value))
        }
        require_finite(
            figures, step=step, checkpoints=self.run.checkpoints,
            advice="Lower the learning rates or the commitment weight, or look for broken pictures",
        )  # fmt: skip
        return terms

    def _refuse_broken_weights(self, step: int) -> None:
        """Losses are from before the last update, which may have broken what a checkpoint would keep."""
        for kind, network in self.networks.items():
            for name, parameter in network.named_parameters():
                if not parameter.isfinite().all():
                    raise FloatingPointError(
                        f"weight {name} of the {kind} is not finite after step {step}: stopped; the last "
                        f"good checkpoint is in {self.run.checkpoints}. Lower the learning rates"
                    )


def announce(config: Training, accelerator: Accelerator, folder: Path, first: int, what: str) -> None:
    """One line on start that says what will happen and where."""
    if first >= config.run.steps:
        accelerator.print(f"{folder} has reached step {first} already: raise --steps to go on")
        return
    doing = f"resuming {config.preset} at step {first}" if first else f"training {config.preset}"
    accelerator.print(
        f"{doing} with fq={config.quantizer.fq} to step {config.run.steps}: {what}, "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, into {folder}"
    )
