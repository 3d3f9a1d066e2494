"""Train a speaker: ``accelerate launch -m vln.speaker PRESET --data FOLDER``.

A walked path is put into words (Tan et al., 2019, Sec. 3.4.3); ``vln.augment`` then writes instructions for
paths that nobody described. Every random number is a function of the seed and the step, so a run that was
killed and resumed repeats the losses of one that was not, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import nn

from fq.command import flat_settings, from_dict, make_accelerator, parse_preset, run_command
from fq.loop import derived_seed, due, prepare, require_finite
from fq.run import RunFolder, Steps, write_atomically
from vln.pretrain_data import Stream
from vln.speaker_config import MAY_CHANGE, PRESETS, SizesConfig, SpeakerTraining
from vln.speaker_data import Opened, SpeakerBatch, SpeakerData, open_data
from vln.speaker_folder import MODEL, TrainedSpeaker, load_speaker, save_speaker
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_scores import evaluate, require_sacrebleu, sample_lines


def train(config: SpeakerTraining) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see `SpeakerTraining`.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, samples/, checkpoints/, and model/ for
        `vln.speaker_folder.load_speaker`.

    Raises:
        ValueError: data, speaker, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or weights are missing.
        ImportError: a tracker or sacrebleu is not installed.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, optim = config.run, config.optim
    if options.sacrebleu:
        require_sacrebleu()
    accelerator = make_accelerator(folder=config.folder, trackers=options.trackers)
    set_seed(options.seed)  # for weights made anew
    trained, opened = build(config)
    speaker = trained.speaker

    run = RunFolder.open(config.folder, asdict(config), accelerator, seed=options.seed, may_change=MAY_CHANGE)
    accelerator.init_trackers("fq-gan", config=flat_settings(asdict(config)))
    optimiser = torch.optim.Adam(speaker.parameters(), lr=optim.lr)
    net, optimiser = prepare(accelerator, speaker.train(), optimiser)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    stream = Stream(len(opened.train), options.seed)
    _announce(config, accelerator, run.path, first, opened, speaker)
    if not first:
        _report(config, accelerator, run, trained, opened, 0)

    window, started = torch.zeros(3, dtype=torch.float64), time.perf_counter()  # loss, norm, steps
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc=config.preset)
    for step in progress:
        optimiser.zero_grad(set_to_none=True)
        rows = stream.rows(step * optim.batch_size, optim.batch_size)
        batch = _share(opened.train, rows, trained, accelerator).to(accelerator.device)
        torch.manual_seed(derived_seed(options.seed, step, accelerator.process_index, bits=63))  # dropout
        losses, counts = net(*batch)
        # Each word counts the same, whatever process it is in.
        count = accelerator.reduce(counts.sum(), "sum").clamp(min=1)
        loss = losses.sum() / count
        accelerator.backward(loss * accelerator.num_processes)
        norm = accelerator.clip_grad_norm_(net.parameters(), optim.max_grad_norm)
        optimiser.step()
        done.advance()

        now, last = step + 1, options.steps
        figures = [float(accelerator.reduce(loss.detach().double(), "sum")), float(norm)]
        require_finite(
            dict(zip(("loss", "grad_norm"), figures, strict=True)), step=now, checkpoints=run.checkpoints,
            advice="Lower the learning rate, or look for broken features",
        )  # fmt: skip
        window += torch.tensor([*figures, 1.0], dtype=torch.float64)
        saving = due(now, options.checkpoint_every, last)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or due(now, options.log_every, last):
            loss_mean, norm_mean, passed = window.tolist()
            seconds = (time.perf_counter() - started) / passed
            run.log(now, {"loss": loss_mean / passed, "grad_norm": norm_mean / passed,
                          "seconds_per_step": seconds,
                          "instructions_per_second": optim.batch_size / seconds})  # fmt: skip
            progress.set_postfix(loss=f"{loss_mean / passed:.3f}")
            window, started = torch.zeros_like(window), time.perf_counter()
        paused = time.perf_counter()
        if due(now, options.eval_every, last):
            _report(config, accelerator, run, trained, opened, now)
        if saving:
            run.save(now, keep=options.keep_checkpoints)
        started += time.perf_counter() - paused
    if accelerator.is_main_process and not options.select:
        save_speaker(_with_step(trained, options.steps), run.path / MODEL)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


def build(config: SpeakerTraining) -> tuple[TrainedSpeaker, Opened]:
    """The speaker to train, with the weights it starts from, and its data.

    Raises:
        FileNotFoundError: data or weights are missing.
        ValueError: they do not fit together.
    """
    sizes = config.model
    start = _start(config) if sizes.init else None
    opened = open_data(config.data, words=start.words if start else None)
    selecting = config.run.select
    if selecting and selecting not in opened.val:
        raise ValueError(
            f"{config.data.data} has no {selecting} items to select the speaker by: give --select another, "
            "or '' for the last speaker"
        )
    origin = {"data": config.data.data, "splits": list(config.data.splits), "scan_ids": opened.train.scan_ids}
    if start is not None:
        start.require_width(opened.train.features.width, config.data.features)
        speaker, orientation = start.speaker.train(), start.orientation
        origin["init"] = sizes.init
    else:
        speaker, orientation = Speaker(_model_config(sizes, opened)), sizes.orientation
        if sizes.match_features:
            match_features(speaker, opened.train.feature_size())
    return TrainedSpeaker(speaker, opened.words, orientation, origin), opened


def _start(config: SpeakerTraining) -> TrainedSpeaker:
    """The speaker that ``init`` names."""
    listed = next(
        (place for place in (Path(config.data.data) / config.data.tokenizer, Path(config.data.tokenizer))
         if config.data.tokenizer and place.is_file()), "")  # fmt: skip
    if Path(config.model.init).is_file() and not listed:
        raise ValueError(
            f"{config.model.init} is a released snapshot, which has no words in it: give --tokenizer the "
            "text file that lists them"
        )
    return load_speaker(config.model.init, words=listed, angle_size=config.model.angle_size)


def _model_config(sizes: SizesConfig, opened: Opened) -> SpeakerConfig:
    return SpeakerConfig(
        vocab_size=len(opened.words),
        view_size=opened.train.features.width + sizes.angle_size,
        angle_size=sizes.angle_size,
        hidden_size=sizes.hidden_size,
        word_size=sizes.word_size,
        dropout=sizes.dropout,
        feature_dropout=sizes.feature_dropout,
    )


@torch.no_grad()
def match_features(speaker: Speaker, size: float) -> None:
    """Enlarge the first weights over the image features so that these count as if their size were 1.

    Args:
        speaker: changed in place; what it makes of orientations stays.
        size: root mean square of the features.

    Raises:
        ValueError: the features are all 0, or not finite.
    """
    if not 0 < size < math.inf:
        raise ValueError(f"the features have a root mean square of {size}: they are empty or broken")
    width = speaker.config.view_size - speaker.config.angle_size
    encoder = speaker.encoder
    for name, weight in encoder.lstm.named_parameters():
        if name.startswith("weight_ih"):
            weight[:, :width] /= size
    attention = encoder.attention
    attention.linear_in.weight[:width] /= size  # meets the views as keys
    if attention.linear_out is not None:
        attention.linear_out.weight[:, :width] /= size  # and as what was attended


def _share(
    data: SpeakerData, rows: np.ndarray, trained: TrainedSpeaker, accelerator: Accelerator
) -> SpeakerBatch:
    """This process's share of some instructions; one of padding alone if it has none."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    config = trained.speaker.config
    batch = data.batch(
        mine if len(mine) else rows[:1], angle_size=config.angle_size, orientation=trained.orientation
    )
    if not len(mine):
        batch.words[:, 1:] = config.pad_id
    return batch


def _report(
    config: SpeakerTraining, accelerator: Accelerator, run: RunFolder, trained: TrainedSpeaker,
    opened: Opened, step: int,
) -> None:  # fmt: skip
    """Scores of the validation splits, what is said there, and the best speaker so far in model/."""
    options = config.run
    lines: list[str] = []
    best = max(
        (record.get(f"{options.select}/bleu_original", -1.0) for record in run.metrics()), default=-1.0
    )
    accelerator.wait_for_everyone()  # all have read the figures before one more is written
    for split, data in opened.val.items():
        found = evaluate(
            trained, data, accelerator, batch_size=config.optim.batch_size, num_paths=options.eval_paths,
            max_words=options.eval_words, sacrebleu=options.sacrebleu,
        )  # fmt: skip
        run.log(step, found.figures, prefix=split)
        lines += sample_lines(split, data, found.said, options.samples)
        better = split == options.select and found.figures["bleu_original"] > best
        if better and accelerator.is_main_process:
            save_speaker(_with_step(trained, step), run.path / MODEL)
    if accelerator.is_main_process:
        write_atomically(run.samples / f"{step:06d}.txt", "\n".join([*lines, ""]))


def _with_step(trained: TrainedSpeaker, step: int) -> TrainedSpeaker:
    return TrainedSpeaker(
        trained.speaker, trained.words, trained.orientation, {**trained.origin, "step": step}
    )


def _announce(
    config: SpeakerTraining, accelerator: Accelerator, folder: Path, first: int, opened: Opened,
    speaker: nn.Module,
) -> None:  # fmt: skip
    """One line on start that says what will happen and where."""
    if first >= config.run.steps:
        accelerator.print(f"{folder} has reached step {first} already: raise --steps to go on")
        return
    doing = f"resuming {config.preset} at step {first}" if first else f"training speaker {config.preset}"
    size = sum(parameter.numel() for parameter in speaker.parameters())
    accelerator.print(
        f"{doing} to step {config.run.steps}: {len(opened.train)} instructions of "
        f"{len(opened.train.items)} paths in {len(opened.train.scan_ids)} scans, {len(opened.words)} words, "
        f"{size / 1e6:.1f} M parameters, batch {config.optim.batch_size}, {accelerator.num_processes} "
        f"process(es) on {accelerator.device}, into {folder}"
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


def parse(arguments: list[str]) -> SpeakerTraining:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    Args:
        arguments: of the command line.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
    """
    return parse_preset(
        arguments, PRESETS, command="python -m vln.speaker",
        about="Train a speaker, which puts paths into words.",
        stored=lambda values: from_dict(SpeakerTraining, values),
    )  # fmt: skip


if __name__ == "__main__":
    main()
