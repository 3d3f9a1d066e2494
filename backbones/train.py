"""Train BigGAN, with or without feature quantisation: ``python -m backbones.train PRESET --fq MODE``.

One step is ``d_steps`` discriminator steps and one generator step, each over ``accumulation`` micro-batches.
Every random number is a function of (seed, purpose, step), and no global generator is read, so a run that was
killed and resumed repeats the losses of one that was not, bit for bit.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import LoggerType, ProjectConfiguration, set_seed, tqdm
from torch import Tensor, nn

import fq
from backbones.biggan import Discriminator, Generator, add_orthogonal_gradient
from backbones.configs import MAY_CHANGE, PRESETS, QuantizerConfig, TrainConfig, from_dict
from backbones.data import Images, batches, open_images
from backbones.losses import hinge_discriminator, hinge_generator
from backbones.sample import class_grid, generate, save_grid, spread
from backbones.scores import make_extractor, score_generator
from fq.run import RunFolder, Steps, load_config


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given, or the run was interrupted; the text says what.
    """
    try:
        train(parse(sys.argv[1:] if arguments is None else arguments))
        # The wrapped models hold the process group, whose threads must end before Python itself does.
        gc.collect()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def parse(arguments: list[str]) -> TrainConfig:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    Args:
        arguments: of the command line.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
    """
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    command, first = "python -m backbones.train", arguments[0] if arguments else ""
    if first in PRESETS:  # on its own, its errors and suggestions speak of this preset alone
        about, preset = PRESETS[first]
        chosen = tyro.cli(TrainConfig, default=preset, args=arguments[1:], config=flat, description=about,
                          prog=f"{command} {first}")  # fmt: skip
        _note_unused(chosen.quantizer, preset.quantizer)
        return chosen
    if first.startswith("--config"):
        source, *rest = [*first.split("=", 1)[1:], *arguments[1:]] or [""]
        if first.split("=")[0] != "--config" or not source:
            raise ValueError("--config needs a run folder or a config.json after it")
        about, stored = f"The run of {source}, with changes.", from_dict(TrainConfig, load_config(source))
        return tyro.cli(TrainConfig, default=stored, args=rest, config=flat, description=about,
                        prog=f"{command} --config {source}")  # fmt: skip
    about = (
        "Train BigGAN, plain or with feature quantisation. Every option of a preset can be changed: see "
        f"`{command} digits --help`. `{command} --config RUN [options]` takes the stored configuration of a "
        "run instead of a preset. A run that was stopped is resumed by the same command."
    )
    return tyro.extras.overridable_config_cli(
        PRESETS, args=arguments, config=flat, description=about, prog=command
    )


def _note_unused(chosen: QuantizerConfig, preset: QuantizerConfig) -> None:
    """A baseline that was given the quantiser's options may be meant so, or be a forgotten --fq."""
    changed = [name for name, value in asdict(chosen).items() if value != asdict(preset)[name]]
    if chosen.fq == "none" and changed:
        print(
            f"note: without --fq, {', '.join(changed)} change nothing: this is the plain GAN", file=sys.stderr
        )


def train(config: TrainConfig) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see :class:`TrainConfig`.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, samples/, checkpoints/.

    Raises:
        ValueError: data, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, optim = config.run, config.optim
    accelerator = _accelerator(config)
    set_seed(options.seed)  # weights only: the loop itself draws from _latents
    images = _images(config, accelerator)

    generator = Generator(config.model).to(memory_format=torch.channels_last)
    average = copy.deepcopy(generator).requires_grad_(False)
    discriminator = Discriminator(config.model).to(memory_format=torch.channels_last)
    handle = _attach(discriminator, config)
    adam = {"betas": (optim.beta1, optim.beta2), "eps": optim.adam_eps}
    opt_g: Any = torch.optim.Adam(generator.parameters(), lr=optim.lr_g, **adam)  # type: ignore[arg-type]
    opt_d: Any = torch.optim.Adam(discriminator.parameters(), lr=optim.lr_d, **adam)  # type: ignore[arg-type]

    extractor = None
    if options.features != "none" and accelerator.is_main_process:
        extractor = make_extractor(options.features, images, device=accelerator.device)
    run = RunFolder.open(config.folder, asdict(config), accelerator, seed=options.seed, may_change=MAY_CHANGE)
    accelerator.init_trackers("fq-gan", config=_flat(asdict(config)))

    with warnings.catch_warnings():
        # Newer PyTorch renames what accelerate's DistributedDataParallelKwargs still calls broadcast_buffers.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        net_g, net_d, opt_g, opt_d = accelerator.prepare(generator, discriminator, opt_g, opt_d)
    average = accelerator.prepare_model(average, evaluation_mode=True)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    per_step = optim.d_steps * optim.accumulation
    stream = batches(
        images, batch_size=optim.batch_size, seed=options.seed, start=first * per_step,
        rank=accelerator.process_index, world_size=accelerator.num_processes, mirror=config.data.mirror,
        dequantize=config.data.dequantize, num_workers=config.data.num_workers,
    )  # fmt: skip
    _announce(config, images, accelerator, run.path, first)
    if first == 0 and accelerator.is_main_process:
        real, rows = _real_grid(images)
        save_grid(real, run.path / "real.png", rows=rows)
        _save_samples(average, config, run.samples / "000000.png")

    window: list[Tensor] = []
    started = time.perf_counter()
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc=config.preset)
    for step in progress:
        latents = _latents(config, generator.latent_dim, accelerator, step)

        # Discriminator: fake and real in one batch, fake first, as in the original.
        discriminator.requires_grad_(True)
        d_terms = []
        for _ in range(optim.d_steps):
            opt_d.zero_grad(set_to_none=True)
            for micro in range(optim.accumulation):
                real, real_labels = (part.to(accelerator.device, non_blocking=True) for part in next(stream))
                if config.model.num_classes == 1:
                    real_labels.zero_()  # an unconditional model, whatever labels the pictures have
                z, labels = next(latents)
                with torch.no_grad(), accelerator.autocast():
                    fake = net_g(z, generator.shared(labels))
                both = torch.cat([fake.float(), real]).contiguous(memory_format=torch.channels_last)
                with _summed_last(accelerator, net_d, micro, optim.accumulation):
                    with accelerator.autocast(), _parts(handle, "fake", "real"):
                        logits = net_d(both, torch.cat([labels, real_labels])).float()
                    on_fake, on_real = logits.chunk(2)
                    loss_real, loss_fake = hinge_discriminator(on_real, on_fake)
                    commitment = handle.loss() if handle else loss_real.new_zeros(())
                    accelerator.backward((loss_real + loss_fake + commitment) / optim.accumulation)
                d_terms.append(torch.stack([loss_real.detach(), loss_fake.detach(), commitment.detach()]))
            opt_d.step()

        # Generator: through the bare discriminator, whose weights rest and need no synchronisation.
        discriminator.requires_grad_(False)
        opt_g.zero_grad(set_to_none=True)
        g_terms = []
        for micro in range(optim.accumulation):
            z, labels = next(latents)
            with _summed_last(accelerator, net_g, micro, optim.accumulation):
                with accelerator.autocast(), _parts(handle, "fake"):
                    fake = net_g(z, generator.shared(labels)).float()
                    loss_g = hinge_generator(discriminator(fake, labels).float())
                commitment = handle.loss() if handle else loss_g.new_zeros(())
                accelerator.backward((loss_g + commitment) / optim.accumulation)
            g_terms.append(torch.stack([loss_g.detach(), commitment.detach()]))
        if optim.g_orthogonal:
            add_orthogonal_gradient(generator, optim.g_orthogonal)
        opt_g.step()

        _average_buffers(generator, accelerator)
        _follow(average, generator, optim.ema_decay if step >= optim.ema_start else 0.0)
        done.advance()
        now = step + 1
        terms = torch.cat([torch.stack(d_terms).mean(0), torch.stack(g_terms).mean(0)])
        window.append(_finite(accelerator.reduce(terms, "mean"), now, run.path))

        saving = _due(now, options.checkpoint_every, options.steps)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or _due(now, options.log_every, options.steps):
            values = dict(zip(_TERMS, torch.stack(window).mean(0).tolist(), strict=True))
            values["seconds_per_step"] = (time.perf_counter() - started) / len(window)
            run.log(now, values | (_figures(handle) if handle else {}))
            loss_d = values["loss_d_real"] + values["loss_d_fake"]
            progress.set_postfix(d=f"{loss_d:.3f}", g=f"{values['loss_g']:.3f}")
            window, started = [], time.perf_counter()
        paused = time.perf_counter()
        if _due(now, options.sample_every, options.steps) and accelerator.is_main_process:
            _save_samples(average, config, run.samples / f"{now:06d}.png")
        if extractor and _due(now, options.eval_every, options.steps):
            run.log(now, _scores(average, config, images, extractor), prefix="score")
        if saving:
            _refuse_broken_weights({"generator": generator, "discriminator": discriminator}, now, run.path)
            run.save(now, keep=options.keep_checkpoints)
        started += time.perf_counter() - paused
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


_TERMS = ("loss_d_real", "loss_d_fake", "commitment_d", "loss_g", "commitment_g")


def _accelerator(config: TrainConfig) -> Accelerator:
    known = [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]
    for name in config.run.trackers:
        if name not in known:
            raise ValueError(f"tracker {name!r} is unknown: accelerate knows {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"tracker {name!r} is not installed: pip install {name}, or leave it out of --trackers"
            )
    # Buffers need no broadcast: spectral norm sees equal weights on all ranks, codebooks equal statistics,
    # and the generator's batch statistics are averaged after every step.
    return Accelerator(
        mixed_precision=config.run.mixed_precision,
        log_with=list(config.run.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.folder) / "trackers")),
        # Scoring 50,000 samples keeps the other processes waiting for longer than the usual ten minutes.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
        step_scheduler_with_optimizer=False,
    )


def _images(config: TrainConfig, accelerator: Accelerator) -> Images:
    """The real pictures, checked against model and batch size before anything is built or written."""
    classes = config.model.num_classes
    images = open_images(config.data, resolution=config.model.resolution, conditional=classes > 1)
    if classes > 1 and images.num_classes != classes:
        raise ValueError(
            f"{images.name} has {images.num_classes} classes but the model {classes}: pass "
            f"--num-classes {images.num_classes}"
        )
    everyone = config.optim.batch_size * accelerator.num_processes
    if everyone > len(images):
        raise ValueError(
            f"a batch of {everyone} pictures (--batch-size {config.optim.batch_size} x "
            f"{accelerator.num_processes} processes) is larger than {images.name} with {len(images)}: lower "
            "--batch-size or add pictures"
        )
    return images


def _attach(discriminator: Discriminator, config: TrainConfig) -> fq.Handle | None:
    chosen = config.quantizer
    if chosen.fq == "none":
        return None
    return fq.attach(
        discriminator,
        chosen.layers,
        codebook_size=chosen.codebook_size,
        decay=chosen.decay,
        commitment_weight=chosen.commitment_weight,
        mode=chosen.fq,
        concat_parts=2,
        generator_step=chosen.generator_step,
        compat=chosen.compat,
        options=fq.CodebookOptions(
            blend_steps=chosen.blend_steps, blend_end=chosen.blend_end, seed=config.run.seed
        ),
    )


def _latents(
    config: TrainConfig, latent_dim: int, accelerator: Accelerator, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the latents and labels of one step, in the order the step uses them."""
    seed = np.random.SeedSequence([config.run.seed, step]).generate_state(1, np.uint64)[0]
    draw = torch.Generator().manual_seed(int(seed))
    size, everyone = config.optim.batch_size, config.optim.batch_size * accelerator.num_processes
    mine = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
    while True:
        z = torch.randn(everyone, latent_dim, generator=draw)[mine]
        labels = torch.randint(config.model.num_classes, (everyone,), generator=draw)[mine]
        yield z.to(accelerator.device), labels.to(accelerator.device)


def _summed_last(
    accelerator: Accelerator, model: nn.Module, micro: int, accumulation: int
) -> AbstractContextManager[Any]:
    """Gradients are summed over processes once, in the last micro-batch."""
    return nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model)


def _parts(handle: fq.Handle | None, *names: str) -> AbstractContextManager[None]:
    return handle.part(parts=names) if handle else nullcontext()


@torch.no_grad()
def _average_buffers(generator: nn.Module, accelerator: Accelerator) -> None:
    """Give all ranks the mean of the batch statistics; each has seen other pictures."""
    if accelerator.num_processes > 1:
        for buffer in generator.buffers():
            buffer.copy_(accelerator.reduce(buffer.clone(), "mean"))


@torch.no_grad()
def _follow(average: nn.Module, generator: nn.Module, decay: float) -> None:
    """Moving average of every entry, buffers too (BigGAN's public code)."""
    mine, theirs = average.state_dict(), generator.state_dict()
    for key, value in mine.items():
        value.copy_(torch.lerp(theirs[key], value, decay) if value.is_floating_point() else theirs[key])


def _finite(terms: Tensor, step: int, folder: Path) -> Tensor:
    terms = terms.cpu()
    for name, value in zip(_TERMS, terms.tolist(), strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: stopped; the last good checkpoint is in "
                f"{folder / 'checkpoints'}. Lower the learning rates or the commitment weight, or look for "
                "broken pictures"
            )
    return terms


def _refuse_broken_weights(networks: dict[str, nn.Module], step: int, folder: Path) -> None:
    """Losses are from before the last update, which may have broken what a checkpoint would keep."""
    for kind, network in networks.items():
        for name, parameter in network.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"weight {name} of the {kind} is not finite after step {step}: stopped; the last good "
                    f"checkpoint is in {folder / 'checkpoints'}. Lower the learning rates"
                )


def _figures(handle: fq.Handle) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, site in handle.stats().items():
        values = {"usage": site.usage, "perplexity": site.perplexity, "ema_perplexity": site.ema_perplexity,
                  "dead_codes": site.dead_codes, "commitment": site.commitment}  # fmt: skip
        if site.divergence is not None:
            values["divergence"] = site.divergence
        figures |= {f"fq/{name}/{key}": value for key, value in values.items()}
    return figures


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _save_samples(average: nn.Module, config: TrainConfig, path: Path) -> None:
    images, rows = class_grid(average, config.model, seed=config.run.seed)
    save_grid(images, path, rows=rows)


def _real_grid(images: Images) -> tuple[Tensor, int]:
    """Up to ten pictures of each of up to ten classes, laid out like the samples, and the number of rows."""
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    rows = [np.flatnonzero(labels == c) for c in spread(max(images.num_classes, 1))]
    rows = [row for row in rows if len(row)]
    columns = min(10, *map(len, rows))
    pictures = torch.stack([images[int(i)][0] for row in rows for i in row[:columns]])
    return pictures.float() / 127.5 - 1, len(rows)


def _scores(average: nn.Module, config: TrainConfig, images: Images, extractor: Any) -> dict[str, float]:
    def sample(labels: Tensor, start: int) -> Tensor:
        return generate(average, config.model, labels, seed=config.run.seed, first=start)

    return score_generator(
        sample,
        images,
        extractor,
        num_samples=config.run.num_eval,
        num_real=config.run.num_real,
        seed=config.run.seed,
        conditional=config.model.num_classes > 1,
        dequantize=config.data.dequantize,
    )


def _announce(
    config: TrainConfig, images: Images, accelerator: Accelerator, folder: Path, first: int
) -> None:
    optim, ranks = config.optim, accelerator.num_processes
    if first >= config.run.steps:
        accelerator.print(f"{folder} has reached step {first} already: raise --steps to go on")
        return
    doing = f"resuming {config.preset} at step {first}" if first else f"training {config.preset}"
    accelerator.print(
        f"{doing} with fq={config.quantizer.fq} to step {config.run.steps}: {len(images)} pictures of "
        f"{images.name}, effective batch {optim.batch_size * optim.accumulation * ranks}, {optim.d_steps} "
        f"discriminator steps a step, {ranks} process(es) on {accelerator.device}, into {folder}"
    )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Configuration as trackers take it: one level, plain values."""
    groups = {group: values for group, values in config.items() if isinstance(values, dict)}
    return {"preset": config["preset"]} | {
        f"{group}.{name}": value if isinstance(value, int | float | str | bool) else str(value)
        for group, values in groups.items()
        for name, value in values.items()
    }


if __name__ == "__main__":
    main()
