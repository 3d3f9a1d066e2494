"""Pre-train Prevalent: ``accelerate launch -m vln.pretrain PRESET --data FOLDER``.

Masked words and the teacher's next action are predicted from instruction and panorama (Hao et al., 2020).
Every random number is a function of the seed and the step, masks also of the triplet, so a run that was
killed and resumed repeats the losses of one that was not, bit for bit, and masks do not depend on how many
processes there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fq.command import flat_settings, from_dict, make_accelerator, parse_preset, run_command
from fq.loop import derived_seed, due, prepare, require_finite, summed_last
from fq.run import RunFolder, Steps, write_atomically
from vln.checkpoints import (
    WEIGHTS,
    from_released,
    initialise_from_bert,
    initialise_from_lxmert,
    save_released,
)
from vln.model import PretrainingOutput, PrevalentPretraining
from vln.pretrain_config import MAY_CHANGE, PRESETS, OptimConfig, Pretraining, SizesConfig, sized
from vln.pretrain_data import Batch, Opened, PretrainingData, Stream, open_data
from vln.pretrain_samples import told_samples

MODEL, RELEASED, TOKENIZER = "model", "released", "tokenizer"
"""Folders in a run: the finished model, the same under the released names, and its tokeniser."""

_EVAL_STEP = 2**40
"""Masks of evaluations: those of a step that no training reaches, so that all evaluations are alike."""

_NUM_SAMPLES = 12

_NUM_TERMS = len(PretrainingOutput._fields)


def train(config: Pretraining) -> Path:
    """Run (or resume) a pre-training and return its folder.

    Args:
        config: see `Pretraining`.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, checkpoints/, tokenizer/, samples/ with
        what it answers for held-out triplets, and model/ for ``PrevalentPretraining.from_pretrained``;
        released/ if asked for.

    Raises:
        ValueError: data, model, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, optim = config.run, config.optim
    transformers_logging.disable_progress_bar()  # one file of weights is no news
    accelerator = make_accelerator(
        folder=config.folder, trackers=options.trackers, mixed_precision=options.mixed_precision
    )
    opened = open_data(config.data)
    set_seed(options.seed)  # for weights made anew
    model = build_model(config.model, opened, num_words=len(opened.tokenizer))
    if options.export and model.config.action_target != "candidate_rank":
        raise ValueError(
            f"--export is for models that tell candidate_ranks, as the released layout, but that of init "
            f"{config.model.init} tells {model.config.action_target}s: leave it out, or pre-train another"
        )
    freeze_idle(model, optim)

    run = RunFolder.open(config.folder, asdict(config), accelerator, seed=options.seed, may_change=MAY_CHANGE)
    accelerator.init_trackers("fq-gan", config=flat_settings(asdict(config)))
    net, optimiser = prepare(accelerator, model.train(), make_optimiser(model, optim))
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    if accelerator.is_main_process:
        opened.tokenizer.save_pretrained(run.path / TOKENIZER)
    stream, source = Stream(len(opened.train), options.seed), _Source(config, accelerator, model)
    _announce(config, accelerator, run.path, first, opened, model)

    window, started = torch.zeros(_NUM_TERMS + 1, dtype=torch.float64), time.perf_counter()
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc=config.preset)
    for step in progress:
        rate = learning_rate(optim, step, config.schedule_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        size = optim.batch_size * optim.accumulation
        rows = stream.rows(step * size, size)
        shares = [source.batch(opened.train, part, step) for part in np.split(rows, optim.accumulation)]
        counts = source.counts(shares)
        terms = torch.zeros(_NUM_TERMS, device=accelerator.device, dtype=torch.float64)
        for micro, share in enumerate(shares):
            numbers = (options.seed, step, micro, accelerator.process_index)
            torch.manual_seed(derived_seed(*numbers, bits=63))  # dropout
            with summed_last(accelerator, net, micro, optim.accumulation):
                output = source.forward(net, share)
                # Each word and each action counts the same, whatever process or micro-batch it is in.
                loss = output.mlm_sum / counts[0] + output.action_sum / counts[1]
                accelerator.backward(loss * accelerator.num_processes)
            terms += torch.stack([term.detach().double() for term in output])
        norm = accelerator.clip_grad_norm_(net.parameters(), optim.max_grad_norm)
        optimiser.step()
        done.advance()

        now, last = step + 1, options.steps
        terms = _finite(accelerator.reduce(terms, "sum").cpu(), norm, now, run)
        window += torch.cat([terms, torch.ones(1, dtype=torch.float64)])
        saving = due(now, options.checkpoint_every, last)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or due(now, options.log_every, last):
            seconds = (time.perf_counter() - started) / float(window[-1])
            figures = summary(window[:-1], optim) | {"lr": rate, "grad_norm": float(norm)}
            run.log(now, figures | {"seconds_per_step": seconds, "triplets_per_second": size / seconds})
            progress.set_postfix({name: f"{figures[name]:.3f}" for name in ("mlm_accuracy", "action_accuracy")
                                  if name in figures})  # fmt: skip
            window, started = torch.zeros_like(window), time.perf_counter()
        paused = time.perf_counter()
        if due(now, options.eval_every, last):
            for split, data in opened.val.items():
                run.log(now, evaluate(net, data, source, optim, options.eval_triplets), prefix=split)
                if accelerator.is_main_process:
                    text = source.samples(data, opened.tokenizer)
                    write_atomically(run.samples / f"{split}_{now:06}.md", text)
        if saving:
            run.save(now, keep=options.keep_checkpoints)
        started += time.perf_counter() - paused
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        model.save_pretrained(run.path / MODEL)
        if options.export:
            save_released(model, run.path / RELEASED)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


class _Source:
    """This process's share of batches, and passes through the model."""

    def __init__(self, config: Pretraining, accelerator: Accelerator, model: PrevalentPretraining) -> None:
        self.config, self.accelerator, self._model = config, accelerator, model
        self.sizes: dict[str, Any] = {
            "angle_size": model.config.angle_size,
            "orientation": model.config.orientation,
            "action_target": model.config.action_target,
            "feature_scale": model.config.feature_scale,
        }

    def batch(self, data: PretrainingData, rows: np.ndarray, step: int) -> Batch:
        """This process's share of some triplets; one triplet without labels if it has none."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine, optim = rows[rank::world], self.config.optim
        batch = data.batch(
            mine if len(mine) else rows[:1], seed=self.config.run.seed, step=step,
            mask_share=optim.mask_share if optim.mlm else 0.0, **self.sizes,
        )  # fmt: skip
        if not len(mine):
            batch.mlm_labels.fill_(-1)
            batch.action_labels.fill_(-1)
        return batch

    def samples(self, data: PretrainingData, tokenizer: Any) -> str:
        """What the model makes of some triplets of a split, spread evenly over it."""
        optim, size = self.config.optim, min(_NUM_SAMPLES, len(data))
        rows = np.linspace(0, len(data), num=size, endpoint=False).astype(np.int64)
        batch = data.batch(
            rows, seed=self.config.run.seed, step=_EVAL_STEP, mask_share=optim.mask_share if optim.mlm else 0,
            **self.sizes,
        )  # fmt: skip
        batch = batch.to(self.accelerator.device)
        return told_samples(self._model, batch, tokenizer, mlm=optim.mlm, action=optim.action)

    def counts(self, shares: Sequence[Batch]) -> Tensor:
        """Words and actions to predict in a step, over all processes, at least 1 each: float32 ``[2]``."""
        own = [[(share.mlm_labels >= 0).sum(), (share.action_labels >= 0).sum()] for share in shares]
        total = torch.tensor(own).sum(0).to(self.accelerator.device)
        return self.accelerator.reduce(total, "sum").clamp(min=1).float()

    def forward(self, net: nn.Module, share: Batch) -> PretrainingOutput:
        """Losses of a share, under autocast if the run says so."""
        batch, optim = share.to(self.accelerator.device), self.config.optim
        with self.accelerator.autocast():
            output: PretrainingOutput = net(
                batch.input_ids, batch.views,
                mlm_labels=batch.mlm_labels if optim.mlm else None,
                action_labels=batch.action_labels if optim.action else None,
            )  # fmt: skip
        return output


@torch.no_grad()
def evaluate(
    net: nn.Module, data: PretrainingData, source: _Source, optim: OptimConfig, num_triplets: int
) -> dict[str, float]:
    """Losses and accuracies on some triplets of a split, spread evenly over it.

    Args:
        net: in training mode, to which it returns.
        data: of the split.
        source: of batches.
        optim: objectives, and size of the batches.
        num_triplets: how many, or all there are.

    Returns:
        mlm_loss, mlm_accuracy, action_loss, action_accuracy, as far as they are objectives; and action_floor,
        the accuracy of the commonest answer.
    """
    picked = np.linspace(0, len(data), num=min(num_triplets, len(data)), endpoint=False).astype(np.int64)
    terms = torch.zeros(_NUM_TERMS, device=source.accelerator.device, dtype=torch.float64)
    net.eval()
    try:
        for first in range(0, len(picked), optim.batch_size):
            share = source.batch(data, picked[first : first + optim.batch_size], _EVAL_STEP)
            terms += torch.stack([term.double() for term in source.forward(net, share)])
    finally:
        net.train()
    figures = summary(source.accelerator.reduce(terms, "sum").cpu(), optim)
    if optim.action:
        chosen = type(data.triplets)(*(column[picked] for column in data.triplets))
        figures["action_floor"] = chosen.floor(source.sizes["action_target"])
    return figures


def summary(terms: Tensor, optim: OptimConfig) -> dict[str, float]:
    """Means of summed terms, in the order of `PretrainingOutput`."""
    sums = PretrainingOutput(*terms.unbind())
    figures = {"loss": float(sums.loss)}
    if optim.mlm:
        figures["mlm_loss"] = float(sums.mlm_loss)
        figures["mlm_accuracy"] = float(sums.mlm_correct / sums.mlm_count.clamp(min=1))
    if optim.action:
        figures["action_loss"] = float(sums.action_loss)
        figures["action_accuracy"] = float(sums.action_correct / sums.action_count.clamp(min=1))
    return figures


# ---- what a run starts from


def build_model(sizes: SizesConfig, opened: Opened, *, num_words: int) -> PrevalentPretraining:
    """The model to train, with the weights it starts from.

    Args:
        sizes: configuration.
        opened: data, whose features the model must fit.
        num_words: of the vocabulary.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: they do not fit, or are for other features or words.
    """
    width = opened.train.features.width
    kind, _, source = sizes.init.partition(":")
    if sizes.init != "scratch" and kind not in ("bert", "lxmert"):
        folder = Path(sizes.init)
        released = (folder / WEIGHTS).is_file()
        if (folder / MODEL).is_dir() and not released:
            folder = folder / MODEL  # of a run
        model: PrevalentPretraining = (
            from_released(folder, angle_size=sizes.angle_size)
            if released
            else PrevalentPretraining.from_pretrained(folder)
        )
        have = model.config
        if (have.feature_size, have.vocab_size) != (width, num_words):
            raise ValueError(
                f"{folder} was trained with {have.feature_size} features a view and {have.vocab_size} words, "
                f"but the data have {width} and {num_words}: give those that it was trained with"
            )
        return model.train()
    options = sized(
        sizes, vocab_size=num_words, feature_size=width, dropout=sizes.dropout,
        pad_token_id=opened.train.vocabulary.pad_id, action_target=sizes.action_target,
    )  # fmt: skip
    model = PrevalentPretraining(options)
    if kind == "bert":
        initialise_from_bert(model, source)
    elif kind == "lxmert":
        initialise_from_lxmert(model, source)
    return model


def freeze_idle(model: PrevalentPretraining, optim: OptimConfig) -> None:
    """Take the head of an objective that is off from training: no gradient would reach it."""
    if not optim.mlm:
        model.mlm_head.requires_grad_(False)
    if not optim.action:
        model.action_head.requires_grad_(False)
        model.pooler.requires_grad_(False)


def make_optimiser(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; biases and layer norms do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, eps=optim.adam_eps)


def learning_rate(optim: OptimConfig, step: int, schedule_steps: int) -> float:
    """Rate of a step: a linear rise, then a linear fall to 0 at the schedule's end."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    left = max(1, schedule_steps - optim.warmup_steps)
    return optim.lr * max(0.0, (schedule_steps - step) / left)


def _finite(terms: Tensor, norm: Any, step: int, run: RunFolder) -> Tensor:
    named = dict(zip(PretrainingOutput._fields, terms.tolist(), strict=True)) | {"grad_norm": float(norm)}
    require_finite(
        named, step=step, checkpoints=run.checkpoints,
        advice="Lower the learning rate, or look for broken features",
    )  # fmt: skip
    return terms


def _announce(
    config: Pretraining, accelerator: Accelerator, folder: Path, first: int, opened: Opened,
    model: PrevalentPretraining,
) -> None:  # fmt: skip
    """One line on start that says what will happen and where."""
    if first >= config.run.steps:
        accelerator.print(f"{folder} has reached step {first} already: raise --steps to go on")
        return
    doing = f"resuming {config.preset} at step {first}" if first else f"pre-training {config.preset}"
    objectives = " and ".join(name for name in ("mlm", "action") if getattr(config.optim, name))
    size = sum(parameter.numel() for parameter in model.parameters())
    accelerator.print(
        f"{doing} ({objectives}, init {config.model.init}) to step {config.run.steps}: {len(opened.train)} "
        f"triplets of {len(opened.train.scan_ids)} scans, {size / 1e6:.1f} M parameters, batch "
        f"{config.optim.batch_size} x {config.optim.accumulation}, {accelerator.num_processes} process(es) "
        f"on {accelerator.device}, into {folder}"
    )


# ---- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given, or the run was interrupted; the text says what.
    """
    run_command(train, parse, arguments)


def parse(arguments: list[str]) -> Pretraining:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    Args:
        arguments: of the command line.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
    """
    return parse_preset(
        arguments, PRESETS, command="python -m vln.pretrain",
        about="Pre-train Prevalent on image-text-action triplets.",
        stored=lambda values: from_dict(Pretraining, values),
    )  # fmt: skip


if __name__ == "__main__":
    main()
