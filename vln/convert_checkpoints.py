"""Released checkpoints to folders of ours and back, as files: what ``vln.convert`` does with them.

Weights that a released file holds but nothing uses are kept beside ours, so that the way back gives all
tensors of the file again, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fq.run import write_atomically
from vln.agent_data import Reading
from vln.agent_folder import load_agent, save_agent, trunk_of
from vln.checkpoints import State, from_released, save_released
from vln.follower import Follower
from vln.model import PrevalentPretraining
from vln.places import new_folder, require_new
from vln.snapshots import (
    FollowerSnapshot,
    SpeakerSnapshot,
    follower_from_released,
    follower_to_released,
    read_snapshot,
    speaker_from_released,
    speaker_to_released,
    write_snapshot,
)
from vln.speaker_folder import MODEL, load_speaker, save_speaker

UNUSED = "unused.safetensors"
"""Weights of a released file that ours does not use."""


def import_pretrained(source: Path, out: Path, *, angle_size: int) -> str:
    """A released pre-training folder to one of ours.

    Args:
        source: with config.json and pytorch_model.bin.
        out: folder to write.
        angle_size: orientation numbers behind a view's features, which no tensor shows.

    Returns:
        What was written, in words.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` is there.
        ValueError: a file is damaged or holds pickled objects, or the weights are others.
    """
    with new_folder(out) as partial:
        model = from_released(source, angle_size=angle_size)
        model.save_pretrained(partial)
    return f"{out}: {_sizes(model)}"


def export_pretrained(source: Path, out: Path) -> str:
    """A pre-trained model of ours to the released layout.

    Args:
        source: run of ``vln.pretrain``, or a folder of `save_pretrained`.
        out: folder to write.

    Raises:
        FileNotFoundError: there is no model.
        FileExistsError: ``out`` is there.
        ValueError: it is damaged, or its actions are views, which the released layout does not know.
    """
    with new_folder(out) as partial:
        inside = source / "model"
        model = PrevalentPretraining.from_pretrained(inside if inside.is_dir() else source)
        save_released(model, partial)
    return f"{out}: {_sizes(model)}, under the released names"


def _sizes(model: PrevalentPretraining) -> str:
    config, count = model.config, sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{config.num_text_layers}+{config.num_cross_layers} layers, {count / 1e6:.1f} M parameters, "
        f"{config.feature_size} features and {config.angle_size} orientation numbers a view"
    )


def import_agent(
    source: Path, out: Path, *, num_attention_heads: int, num_instructions: int, max_tokens: int
) -> str:
    """A released snapshot of an R2R agent to a folder for `load_agent`, with orientation interleaved.

    Args:
        source: the file.
        out: folder to write.
        num_attention_heads: of the encoder, which no tensor shows.
        num_instructions: 1 or 3, read together.
        max_tokens: longest text.

    Returns:
        What was written, in words.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: ``out`` is there.
        ValueError: it is damaged, holds pickled objects, or is no snapshot of such an agent.
    """
    with new_folder(out) as partial:
        snapshot = follower_from_released(
            read_snapshot(source), num_attention_heads=num_attention_heads, num_instructions=num_instructions
        )
        reading = Reading(max_tokens=max_tokens, num_instructions=num_instructions)
        save_agent(partial, snapshot.follower, task="r2r", reading=reading)
        _keep_unused(partial, snapshot.unused)
    config = trunk_of(snapshot.follower).config
    return (
        f"{out}: R2R agent that reads {num_instructions} instruction(s), {config.vocab_size} words, "
        f"{config.feature_size} features and {config.angle_size} orientation numbers a view, interleaved"
    )


def export_agent(source: Path, out: Path) -> str:
    """An R2R agent to a snapshot under the released names.

    Args:
        source: run of ``vln.train``, or folder of an agent.
        out: file to write.

    Raises:
        FileNotFoundError: there is no agent.
        FileExistsError: ``out`` is there.
        ValueError: it is damaged, of another task, or of a form that the released code does not know.
    """
    require_new(out)
    loaded = load_agent(source)
    if not isinstance(loaded.agent, Follower):
        raise ValueError(f"{source} holds an agent for {loaded.task}: the released layout is that of R2R")
    trunk = trunk_of(loaded.agent).config
    if trunk.feature_scale != 1:
        raise ValueError(
            f"{source} reads features times {trunk.feature_scale:g}, which the released code does not know: "
            "train with --feature-scale 1 to export"
        )
    _require_interleaved(trunk.orientation, trunk.angle_size, source)
    snapshot = FollowerSnapshot(loaded.agent, loaded.reading.num_instructions, _unused(loaded.folder))
    write_snapshot(follower_to_released(snapshot), out)
    return f"{out}: R2R agent under the released names"


def import_speaker(source: Path, out: Path, *, words: Path, angle_size: int) -> str:
    """A released snapshot of EnvDrop's speaker to a folder for `load_speaker`.

    Args:
        source: the file.
        out: folder to write.
        words: the original's list, one word a line.
        angle_size: orientation numbers of a view, which no tensor shows.

    Returns:
        What was written, in words.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: ``out`` is there.
        ValueError: a file is damaged, holds pickled objects, or does not fit the other.
    """
    with new_folder(out) as partial:
        if not source.is_file():
            raise FileNotFoundError(f"{source} is no file: give a released snapshot of a speaker")
        trained = load_speaker(source, words=words, angle_size=angle_size)
        save_speaker(trained, partial)
        _keep_unused(partial, speaker_from_released(read_snapshot(source), angle_size=angle_size).unused)
    return f"{out}: speaker of {len(trained.words)} words, {trained.feature_size} features a view"


def export_speaker(source: Path, out: Path, *, words: Path) -> str:
    """A speaker of ours to a snapshot under the released names, and its words.

    Args:
        source: run of ``vln.speaker``, or folder of a speaker.
        out: file to write.
        words: file to write its words to, one a line.

    Raises:
        FileNotFoundError: there is no speaker.
        FileExistsError: ``out`` or ``words`` is there.
        ValueError: it is damaged, or of a form that the released code does not know.
    """
    require_new(out)
    require_new(words)
    if source.is_file():
        raise ValueError(f"{source} is a file: give a run of vln.speaker, or the folder of a speaker")
    trained = load_speaker(source)
    if trained.words.tokenizer is not None:
        raise ValueError(f"{source} speaks in pieces of a tokeniser, the released code in whole words")
    _require_interleaved(trained.orientation, trained.speaker.config.angle_size, source)
    folder = source / MODEL if (source / MODEL).is_dir() else source
    parts = speaker_to_released(SpeakerSnapshot(trained.speaker, _unused(folder)))
    write_atomically(words, "\n".join(trained.words.entries[:-1]) + "\n")  # the original adds BOS itself
    write_snapshot(parts, out)
    return f"{out}: speaker under the released names; {words}: its words"


def _require_interleaved(orientation: str, angle_size: int, source: Path) -> None:
    # With four numbers both layouts are the same.
    if orientation != "interleaved" and angle_size != 4:
        raise ValueError(
            f"{source} reads orientation in {orientation}, the released code interleaved: train with "
            "--orientation interleaved to export"
        )


# ---- leftovers


def _keep_unused(folder: Path, unused: Mapping[str, State]) -> None:
    tensors = {
        f"{part}/{name}": value.contiguous()
        for part, state in unused.items()
        for name, value in state.items()
    }
    if tensors:
        save_file(tensors, folder / UNUSED)


def _unused(folder: Path) -> dict[str, State]:
    file, found = folder / UNUSED, dict[str, State]()
    if not file.is_file():
        return found
    try:
        for name, value in load_file(file).items():
            part, _, key = name.partition("/")
            found.setdefault(part, {})[key] = value
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: convert the released file again ({error})") from error
    return found
