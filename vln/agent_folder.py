"""Agents as folders: ``agent.json`` says what an agent is and how it reads, ``agent.safetensors`` has its
weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vln.agent import NDHFollower
from vln.agent_data import Reading
from vln.follower import Follower, FollowerConfig
from vln.hanna_model import HannaAgent, HannaAgentConfig
from vln.model import Prevalent, PrevalentConfig

SETTINGS, WEIGHTS, TOKENIZER = "agent.json", "agent.safetensors", "tokenizer"
BEST = "best"
"""Folder of a run with the agent that did best on the held-out data."""

_FORMAT = 1
KINDS: dict[str, Any] = {"r2r": Follower, "ndh": NDHFollower, "hanna": HannaAgent}
"""Task to agent."""


class Loaded(NamedTuple):
    """An agent and what it needs to know."""

    agent: Any
    """In eval mode."""
    task: str
    reading: Reading
    feature_size: int
    folder: Path
    dataset: str = "r2r"
    """Whose items it learned: r2r, r4r or rxr; for another task that task's own name."""
    max_steps: int = 0
    """Longest walk that it was chosen by; 0 if unknown."""


def save_agent(
    folder: str | Path, agent: nn.Module, *, task: str, reading: Reading, dataset: str = "r2r",
    max_steps: int = 0,
) -> None:  # fmt: skip
    """Write an agent; each file under a temporary name first, the settings last.

    Args:
        folder: made if need be.
        agent: of the task.
        task: r2r, ndh or hanna.
        reading: how items become its episodes.
        dataset: r2r, r4r or rxr, whose items an agent for R2R learned.
        max_steps: longest walk of its evaluations, if there were any.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trunk, config = trunk_of(agent), agent.config
    settings = {
        "format": _FORMAT,
        "task": task,
        "dataset": dataset if task == "r2r" else task,
        "max_steps": max_steps,
        "trunk": trunk.config.to_dict(),
        "agent": asdict(config),  # type: ignore[call-overload, arg-type]
        "reading": reading._asdict(),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in agent.state_dict().items()}
    partial = folder / f".{WEIGHTS}.{os.getpid()}.partial"
    save_file(weights, partial)
    partial.replace(folder / WEIGHTS)
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SETTINGS)


def load_agent(folder: str | Path) -> Loaded:
    """Read an agent.

    Args:
        folder: of `save_agent`, or a run, whose best agent is taken.

    Raises:
        FileNotFoundError: there is no agent.
        ValueError: a file is damaged, or the weights are of another agent.
    """
    given = Path(folder)
    place = given if (given / SETTINGS).is_file() else given / BEST
    if not (place / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{given} holds no agent: looked for {given / SETTINGS} and {place / SETTINGS}; give a run of "
            "vln.train that has been evaluated once, or its folder best"
        )
    try:
        settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != _FORMAT:
            raise ValueError(f"it has format {settings['format']}, expected {_FORMAT}")
        task, reading = settings["task"], Reading(**settings["reading"])
        # Folders of earlier versions name none.
        dataset = settings.get("dataset", task)
        max_steps = int(settings.get("max_steps", 0))
        if dataset not in (("r2r", "r4r", "rxr") if task == "r2r" else (task,)):
            raise ValueError(f"it learned the items of {dataset!r}, which are not for {task}")
        trunk = Prevalent(PrevalentConfig.from_dict(settings["trunk"]))
        options = HannaAgentConfig if task == "hanna" else FollowerConfig
        agent = KINDS[task](trunk, options(**settings["agent"]))
        agent.load_state_dict(load_file(place / WEIGHTS), strict=True)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{place} is damaged, or of another version: {error}") from error
    return Loaded(agent.eval(), task, reading, trunk.config.feature_size, place, dataset, max_steps)


def trunk_of(agent: Any) -> Prevalent:
    """The pre-trained model in an agent of any task."""
    trunk = agent.encoder.trunk
    assert isinstance(trunk, Prevalent)
    return trunk
