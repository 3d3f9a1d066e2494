"""A trained speaker in a folder: sizes, weights (safetensors), words, and what it was trained on.

``config.json``, ``model.safetensors``, ``words.json`` and perhaps ``tokenizer/``. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vln.checkpoints import check_names
from vln.model import Orientation
from vln.snapshots import read_snapshot, speaker_from_released
from vln.speaker_model import Speaker, SpeakerConfig
from vln.speaker_words import Words

FORMAT = 1
MODEL, CONFIG, WEIGHTS = "model", "config.json", "model.safetensors"


@dataclass(frozen=True)
class TrainedSpeaker:
    """A speaker with what is needed to use it."""

    speaker: Speaker
    words: Words
    orientation: Orientation
    """Layout of the orientation numbers it was trained with."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Data, splits, scans and step of its training, as far as known."""

    @property
    def feature_size(self) -> int:
        """Image features of a view."""
        return self.speaker.config.view_size - self.speaker.config.angle_size

    def require_width(self, width: int, source: str) -> None:
        """Refuse features of another width.

        Args:
            width: of the features at hand.
            source: where they are from, for the text.

        Raises:
            ValueError: the speaker was trained with another.
        """
        if width != self.feature_size:
            raise ValueError(
                f"the speaker was trained with {self.feature_size} features a view but {source} has {width}: "
                "give --features of that width"
            )


def save_speaker(trained: TrainedSpeaker, folder: str | Path) -> None:
    """Write a speaker, whole or not at all; an older one at that place is replaced.

    Args:
        trained: its weights may be on any device.
        folder: its parent must exist.
    """
    folder = Path(folder)
    partial, aside = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old.partial")
    )
    content = {
        "format": FORMAT,
        "speaker": asdict(trained.speaker.config),
        "orientation": trained.orientation,
        "origin": dict(trained.origin),
    }
    try:
        partial.mkdir()
        (partial / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        state = {
            key: value.detach().cpu().contiguous() for key, value in trained.speaker.state_dict().items()
        }
        save_file(state, partial / WEIGHTS)
        trained.words.save(partial)
        if folder.exists():  # a folder cannot be renamed onto another one
            folder.rename(aside)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def load_speaker(source: str | Path, *, words: str | Path = "", angle_size: int = 128) -> TrainedSpeaker:
    """Read a speaker, in eval mode.

    Args:
        source: a run of ``vln.speaker``, the ``model`` folder in one, or a released snapshot (a file).
        words: of a released snapshot, which has none in it: the original's list, one word a line.
        angle_size: of a released snapshot, orientation numbers of a view.

    Raises:
        FileNotFoundError: a file is missing; the text names it.
        ValueError: a file is damaged or holds pickled objects, or things do not fit together.
    """
    source = Path(source)
    if source.is_file():
        return _released(source, words, angle_size)
    if words:
        raise ValueError(f"--words is for a released snapshot: {source} has words of its own")
    folder = source / MODEL if (source / MODEL).is_dir() else source
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"{source} holds no speaker: looked for {CONFIG} and {WEIGHTS} there and in {MODEL}/; give a run "
            "of vln.speaker that has evaluated or finished, or the file of a released snapshot"
        )
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config, orientation = SpeakerConfig(**content["speaker"]), content["orientation"]
        if content["format"] != FORMAT or orientation not in get_args(Orientation):
            raise ValueError(f"format {content['format']}, orientation {orientation!r}")
        state = load_file(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged, or no speaker of this program: {error}") from error
    return _checked(config, state, TrainedSpeaker(Speaker(config), Words.load(folder), orientation,
                                                  content.get("origin", {})), folder)  # fmt: skip


def _checked(
    config: SpeakerConfig, state: Mapping[str, Tensor], trained: TrainedSpeaker, folder: Path
) -> TrainedSpeaker:
    check_names(state, trained.speaker.state_dict(), f"{folder / WEIGHTS}")
    trained.speaker.load_state_dict(dict(state))
    trained.speaker.eval()
    _require_words(trained.words, config, str(folder))
    return trained


def _released(file: Path, words: str | Path, angle_size: int) -> TrainedSpeaker:
    if not words:
        raise ValueError(
            f"{file} is a released snapshot, which has no words in it: give its list, --words FILE"
        )
    listed = Words.listed(words)
    snapshot = speaker_from_released(read_snapshot(file), angle_size=angle_size)
    _require_words(listed, snapshot.speaker.config, str(words))
    # The released speakers were trained beside the agents of that layout.
    return TrainedSpeaker(snapshot.speaker, listed, "interleaved", {"snapshot": file.name})


def _require_words(words: Words, config: SpeakerConfig, source: str) -> None:
    if len(words) != config.vocab_size:
        raise ValueError(
            f"{source} has {len(words)} words but the speaker {config.vocab_size}: give those that "
            "it was trained with"
        )


def fingerprint(trained: TrainedSpeaker) -> str:
    """Digest of a speaker's weights and words: two that say the same have the same."""
    found = hashlib.sha256(json.dumps(trained.words.entries).encode())
    for name, value in sorted(trained.speaker.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
