"""Train an agent: ``accelerate launch -m vln.train PRESET --task r2r|ndh|hanna --data FOLDER``.

Imitation, and for R2R advantage actor-critic beside it, first around a frozen pre-trained model, then through
it (Hao et al., 2020; Tan et al., 2019). Every random number is a function of the seed and the step, drawn
actions also of the episode, so a run that was killed and resumed repeats the losses of one that was not, bit
for bit, and what is drawn does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fq.command import flat_settings, from_dict, make_accelerator, parse_preset, run_command
from fq.loop import derived_seed, due, require_finite
from fq.run import RunFolder, Steps, write_atomically
from vln.agent_folder import BEST, TOKENIZER, save_agent
from vln.maps import draw_episode
from vln.plans import read_plans
from vln.render import episodes_of
from vln.submission import write_submission
from vln.train_config import MAY_CHANGE, PRESETS, Training
from vln.train_hanna import HannaTeaching, open_hanna
from vln.train_setup import (
    Best,
    build_agent,
    clip_gradients,
    make_optimiser,
    open_data,
    refuse_idle_processes,
    set_stage,
)
from vln.train_walk import Scored, WalkTask

Task = WalkTask | HannaTeaching
Figures = dict[str, Tensor]
"""Names to float64 ``[2]``: a sum, and what it is divided by."""


def train(config: Training) -> Path:
    """Run (or resume) a training and return its folder.

    Args:
        config: see `Training`.

    Returns:
        The run folder: config.json, provenance.json, metrics.jsonl, checkpoints/, tokenizer/, best/ for
        `vln.agent_folder.load_agent`, and in samples/ submissions of the best and the last agent, their
        scores and maps.

    Raises:
        ValueError: data, agent, configuration or run folder do not fit; nothing has been written then.
        FileNotFoundError: data or weights are missing.
        FloatingPointError: a loss is not finite; the last checkpoint is from before.
    """
    options, learn = config.run, config.learn
    transformers_logging.disable_progress_bar()  # one file of weights is no news
    accelerator = make_accelerator(
        folder=config.folder, trackers=options.trackers, mixed_precision=options.mixed_precision
    )
    refuse_idle_processes(accelerator, learn.batch_size)
    is_hanna = config.items.task == "hanna"
    opened: Any = open_hanna(config.items) if is_hanna else open_data(config.items, seed=options.seed)
    set_seed(options.seed)  # for weights made anew
    agent = build_agent(
        config, num_words=len(opened.tokenizer), pad_id=opened.tokenizer.pad_token_id,
        feature_size=opened.features.width,
    )  # fmt: skip
    task: Task = (HannaTeaching if is_hanna else WalkTask)(config, opened, accelerator, agent)
    _check_selection(config, task)

    run = RunFolder.open(config.folder, asdict(config), accelerator, seed=options.seed, may_change=MAY_CHANGE)
    accelerator.init_trackers("fq-gan", config=flat_settings(asdict(config)))
    optimiser = make_optimiser(agent, learn)
    # Not wrapped for data parallelism: a step has several walks and passes, whose gradients are summed once.
    agent = accelerator.prepare_model(agent, evaluation_mode=True)
    optimiser = accelerator.prepare_optimizer(optimiser)
    best = accelerator.prepare_model(Best(agent), evaluation_mode=True)
    done = accelerator.prepare_model(Steps(), evaluation_mode=True)
    first = run.resume() or 0
    if accelerator.is_main_process:
        opened.tokenizer.save_pretrained(run.path / TOKENIZER)
    _announce(config, accelerator, run.path, first, task, agent)

    window: Figures = {}
    steps_in_window, started = 0, time.perf_counter()
    progress = tqdm(range(first, options.steps), initial=first, total=options.steps, desc=config.preset)
    for step in progress:
        set_stage(agent, learn, step)
        rate = learn.tune_lr if learn.tune != "none" and step >= learn.tune_from else learn.lr
        if step == learn.tune_from and learn.tune != "none" and int(best.step) >= 0:
            agent.load_state_dict(best.agent.state_dict())
            optimiser.optimizer.state.clear()
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        torch.manual_seed(derived_seed(options.seed, step, accelerator.process_index, bits=63))  # dropout
        figures: Figures = {}
        for lesson in task.lessons(agent, step):
            counts = accelerator.reduce(lesson.counts, "sum").clamp(min=1)
            loss = lesson.weight * (lesson.sums / counts).sum()
            accelerator.backward(loss)
            _add(figures, {"loss": (float(loss.detach()), 1 / accelerator.num_processes)} | lesson.figures)
        _sum_gradients(agent, accelerator)
        norm = clip_gradients(agent, learn.max_grad_norm)
        optimiser.step()
        done.advance()

        now, last = step + 1, options.steps
        figures = _over_processes(figures, accelerator)
        # The loss of a step is a sum over its lessons, all other figures are means.
        figures["loss"][1] = 1.0
        _require_finite(figures, norm, now, run)
        _add(window, {name: (float(pair[0]), float(pair[1])) for name, pair in figures.items()})
        steps_in_window += 1
        saving = due(now, options.checkpoint_every, last)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or due(now, options.log_every, last):
            seconds = (time.perf_counter() - started) / steps_in_window
            means = {name: float(pair[0] / pair[1]) for name, pair in window.items() if pair[1]}
            more = {"lr": rate, "grad_norm": float(norm), "seconds_per_step": seconds}
            run.log(now, means | more | {"episodes_per_second": learn.batch_size / seconds})
            progress.set_postfix(loss=f"{means['loss']:.3f}")
            window, steps_in_window, started = {}, 0, time.perf_counter()
        paused = time.perf_counter()
        if due(now, options.eval_every, last):
            _evaluate(config, accelerator, run, task, agent, best, now, opened, is_last=now == last)
        if saving:
            run.save(now, keep=options.keep_checkpoints)
        started += time.perf_counter() - paused
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run.path


def _evaluate(
    config: Training, accelerator: Accelerator, run: RunFolder, task: Task, agent: nn.Module, best: Best,
    now: int, opened: Any, *, is_last: bool,
) -> None:  # fmt: skip
    """Score the held-out splits; keep the agent if it is the best, and what it did."""
    found = {split: task.evaluate(agent, split) for split in task.splits}
    for split, scored in found.items():
        run.log(now, scored.scores, prefix=split)
    total = sum(found[name.partition("/")[0]].scores[name.partition("/")[2]] for name in config.select)
    improved = best.update(agent, total, now)
    if accelerator.is_main_process:
        for name in [BEST] * improved + ["last"] * is_last:
            _write_samples(run.samples, name, found, now)
        if improved:
            items = config.items
            save_agent(
                run.path / BEST, agent, task=items.task, reading=items.reading, dataset=items.dataset,
                max_steps=config.run.eval_max_steps,
            )  # fmt: skip
        if is_last and config.run.maps:
            _draw(config, run.samples / "maps", found, opened)
    accelerator.wait_for_everyone()


def _write_samples(folder: Path, name: str, found: dict[str, Scored], step: int) -> None:
    for split, scored in found.items():
        path = folder / f"{name}_{split}.json"
        if scored.rows is None:
            write_submission(path, scored.predictions)
        else:
            write_atomically(path, json.dumps(scored.rows) + "\n")
    scores = {"step": step, "scores": {split: scored.scores for split, scored in found.items()}}
    write_atomically(folder / f"{name}_scores.json", json.dumps(scores, indent=1) + "\n")


def _draw(config: Training, folder: Path, found: dict[str, Scored], opened: Any) -> None:
    """Maps of some episodes of each split: as many failures as successes, if there are."""
    folder.mkdir(exist_ok=True)
    plans = read_plans(config.items.data)
    for split, scored in found.items():
        episodes = dict(pair for item in opened.val[split].items for pair in episodes_of(item))
        paths = {
            row.item_id: tuple(pose.viewpoint_id for pose in row.trajectory) for row in scored.predictions
        }
        wanted = _mixed(scored.success, config.run.maps)
        for number, name in enumerate(wanted):
            verdict = "reached the goal" if scored.success[name] else "missed the goal"
            episode = episodes[name]._replace(predicted=paths[name], note=verdict)
            graph = opened.world.graph(episode.scan_id)
            picture = draw_episode(graph, episode, plan=plans.get(episode.scan_id))
            picture.save(folder / f"{split}_{number:02d}.png")


def _mixed(success: dict[Any, bool], count: int) -> list[Any]:
    good, bad = ([name for name, value in success.items() if value is wanted] for wanted in (True, False))
    num_bad = min(len(bad), max(count // 2, count - len(good)))
    return bad[:num_bad] + good[: count - num_bad]


def _sum_gradients(agent: nn.Module, accelerator: Accelerator) -> None:
    """Sum gradients over processes, as every process has divided by counts of all."""
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    present = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    present = accelerator.reduce(present.to(accelerator.device), "sum") > 0
    trained = [parameter for parameter, has in zip(trained, present.tolist(), strict=True) if has]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    summed = accelerator.reduce(torch.cat([part.reshape(-1) for part in parts]), "sum")
    for parameter, part in zip(trained, summed.split([part.numel() for part in parts]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def _add(figures: Figures, more: dict[str, tuple[float, float]]) -> None:
    for name, pair in more.items():
        figures[name] = figures.get(name, torch.zeros(2, dtype=torch.float64)) + torch.tensor(
            pair, dtype=torch.float64
        )


def _over_processes(figures: Figures, accelerator: Accelerator) -> Figures:
    summed = accelerator.reduce(torch.stack(list(figures.values())).to(accelerator.device), "sum").cpu()
    return dict(zip(figures, summed.unbind(), strict=True))


def _require_finite(figures: Figures, norm: Any, step: int, run: RunFolder) -> None:
    named = {name: float(pair[0]) for name, pair in figures.items()} | {"grad_norm": float(norm)}
    require_finite(
        named, step=step, checkpoints=run.checkpoints,
        advice="Lower the learning rate, or look for broken features",
    )  # fmt: skip


def _check_selection(config: Training, task: Task) -> None:
    """Raise if the best agent cannot be told by what is scored."""
    names = task.score_names
    for name in config.select:
        split, _, field = name.partition("/")
        if split not in task.splits or field not in names:
            raise ValueError(
                f"the best agent is to be told by {name!r}, but there are the splits "
                f"{', '.join(task.splits) or '(none)'} with {', '.join(names)}: give --select SPLIT/SCORE"
            )


def _announce(
    config: Training, accelerator: Accelerator, folder: Path, first: int, task: Task, agent: nn.Module
) -> None:
    """One line on start that says what will happen and where."""
    if first >= config.run.steps:
        accelerator.print(f"{folder} has reached step {first} already: raise --steps to go on")
        return
    learn = config.learn
    doing = f"resuming {config.preset} at step {first}" if first else f"training {config.preset}"
    how = f"imitation ({learn.feedback})" + (" and actor-critic" if learn.reinforce else "")
    tuned = "frozen" if learn.tune == "none" else f"tuned ({learn.tune}) from step {learn.tune_from}"
    size = sum(parameter.numel() for parameter in agent.parameters())
    accelerator.print(
        f"{doing} for {config.items.task} by {how}, pre-trained model {config.model.pretrained} {tuned}, to "
        f"step {config.run.steps}: {task.size}, {size / 1e6:.1f} M parameters, batch {learn.batch_size}, "
        f"{accelerator.num_processes} process(es) on {accelerator.device}, into {folder}"
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


def parse(arguments: list[str]) -> Training:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    ``--task ndh`` takes the preset's variant for that task, if it has one.

    Args:
        arguments: of the command line.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
    """
    variant = f"{arguments[0] if arguments else ''}-{_option(arguments, '--task')}"
    if variant in PRESETS:
        arguments = [variant, *arguments[1:]]
    return parse_preset(
        arguments, PRESETS, command="python -m vln.train", about="Train an agent for R2R, NDH or HANNA.",
        stored=lambda values: from_dict(Training, values),
    )  # fmt: skip


def _option(arguments: Sequence[str], name: str) -> str:
    for place, argument in enumerate(arguments):
        if argument == name:
            return next(iter(arguments[place + 1 : place + 2]), "")
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return ""


if __name__ == "__main__":
    main()
