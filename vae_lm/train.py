"""Train a sentence VAE: ``python -m vae_lm.train PRESET --data PATH --steps N``.

Pre-training, fine-tuning, auto-encoding, and a plain GPT-2 for comparison. Every random number (noise of z,
dropout, order of sentences) is a function of the seed and the step, so a run that was killed and resumed
repeats the losses of one that was not, bit for bit; the noise of z also does not depend on which process has
a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from fq.command import from_dict, make_accelerator, parse_preset, run_command
from fq.loop import derived_seed, prepare, summed_last
from fq.run import Steps
from vae_lm.configs import Training
from vae_lm.data import ItemBatch, item_noise
from vae_lm.presets import PRESETS
from vae_lm.tokenizers import Batch
from vae_lm.train_reports import Reports
from vae_lm.train_setup import (
    announce,
    build_network,
    choose_tokenizers,
    kl_weights,
    learning_rate,
    make_optimiser,
    open_batches,
    open_run,
    quieten_libraries,
    read_sentences,
    tokenise,
)


def train(config: Training) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see `Training`.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, samples/, checkpoints/, tokenizers/, and
        model/ for ``Optimus.from_pretrained``.

    Raises:
        ValueError: data, networks, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or networks are missing.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, optim, objective = config.run, config.optim, config.objective
    quieten_libraries()
    accelerator = make_accelerator(
        folder=config.folder, trackers=options.trackers, mixed_precision=options.mixed_precision
    )
    sentences = read_sentences(config.text, seed=options.seed)
    tokenizers = choose_tokenizers(config, sentences)
    set_seed(options.seed)  # for weights made anew
    network = build_network(config.network, tokenizers, max_tokens=config.text.max_tokens)
    if options.gradient_checkpointing:
        _checkpoint_activations(network)
    corpus = tokenise(config.text, sentences, tokenizers)
    source = open_batches(config, sentences, corpus, tokenizers, accelerator)
    total = options.steps or _steps_of_epochs(config, len(corpus.train or ()))
    schedule = optim.schedule_steps or total
    weights = kl_weights(objective, schedule * optim.accumulation)

    run = open_run(config, accelerator, corpus, tokenizers)
    net, optimiser = prepare(accelerator, network, make_optimiser(network, optim))
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    stream = source.batches(first * optim.accumulation)
    reports = Reports(
        config, run, accelerator, network=network, corpus=corpus.train, held_out=corpus.valid or corpus.train
    )
    size = sum(parameter.numel() for parameter in network.parameters())
    announce(
        config, accelerator, run.path, first, total, f"{corpus.described}, {size / 1e6:.1f} M parameters"
    )
    if first == 0 and options.sample_every:
        reports.sample(0)

    for step in reports.steps(first, total):
        rate = learning_rate(optim, step, schedule)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        shares = [next(stream) for _ in range(optim.accumulation)]
        num_items = sum(share.num_items for share in shares)
        terms = torch.zeros(5, device=accelerator.device)
        for micro, share in enumerate(shares):
            beta = weights[share.step]
            torch.manual_seed(derived_seed(options.seed, 3, share.step, accelerator.process_index))  # dropout
            batch, noise, counted = _on_device(share, config, tokenizers, accelerator.device)
            with summed_last(accelerator, net, micro, optim.accumulation):
                with accelerator.autocast():
                    loss = net(
                        *batch, beta=beta, free_bits=objective.free_bits, mode=objective.posterior,
                        length_weighted=objective.length_weighted, noise=noise,
                    )  # fmt: skip
                # Each sentence counts the same, however many a process has: DDP divides by their number.
                mean = (loss.loss * counted).sum() / num_items
                accelerator.backward(mean * accelerator.num_processes)
            parts = (loss.loss, loss.reconstruction, loss.kl, loss.kl_counted, loss.num_tokens)
            scale = torch.tensor([1 / num_items] * 4 + [1.0], device=accelerator.device)
            terms += torch.stack([(part.detach() * counted).sum() for part in parts]) * scale
        norm = accelerator.clip_grad_norm_(net.parameters(), optim.max_grad_norm)
        optimiser.step()
        done.advance()
        others = {"beta": beta, "lr": rate, "grad_norm": float(norm)}
        reports.finish(step + 1, total, terms, others)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


def _on_device(
    share: ItemBatch, config: Training, tokenizers: Any, device: torch.device
) -> tuple[Batch, Tensor, Tensor]:
    """Ids, noise, and 1 for each sentence; an empty share becomes a sentence without words that counts 0."""
    batch, items, counted = share.batch, share.items, torch.ones(len(share.items))
    if not len(items):
        batch, items, counted = tokenizers.batch([""]), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    noise = item_noise(items, config.network.latent_dim, seed=config.run.seed, step=share.step)
    moved = [part.to(device, non_blocking=True) for part in (*batch, noise, counted)]
    return Batch(*moved[:2]), moved[2], moved[3]


def _steps_of_epochs(config: Training, num_sentences: int) -> int:
    """Steps in which every sentence is seen as often as the epochs say; a last one may hold fewer."""
    batches = math.ceil(num_sentences / config.optim.batch_size) * config.run.epochs
    return max(1, math.ceil(batches / config.optim.accumulation))


def _checkpoint_activations(network: nn.Module) -> None:
    inner: Any = getattr(network, "gpt2", network)
    # transformers renames it; the old name is the only one in older versions and warns in newer ones.
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given, or the run was interrupted; the text says what.
    """
    run_command(train, parse, arguments)


def parse(arguments: list[str]) -> Training:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    Args:
        arguments: of the command line.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
    """
    return parse_preset(
        arguments, PRESETS, command="python -m vae_lm.train", about="Train a sentence VAE (Optimus).",
        stored=lambda values: from_dict(Training, values),
    )  # fmt: skip


if __name__ == "__main__":
    main()
