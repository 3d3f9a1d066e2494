"""What the training commands of all packages share: command line, processes and trackers.

`fq` itself does not need it, and it needs what training needs: `accelerate` and `tyro`.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

try:
    import tyro
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
        LoggerType,
        ProjectConfiguration,
    )
except ImportError as error:
    raise ImportError("fq.command needs accelerate and tyro: pip install 'fq-gan[train]'") from error

from fq.run import load_config

T = TypeVar("T")
C = TypeVar("C")


def run_command(
    train: Callable[[C], Any], parse: Callable[[list[str]], C], arguments: Sequence[str] | None
) -> None:
    """Read a command line and train.

    Args:
        train: takes the configuration.
        parse: makes it out of the words of the command line.
        arguments: the words; ``None`` for those of this process.

    Raises:
        SystemExit: something is wrong with what was given, or the run was interrupted; the text says what.
    """
    try:
        train(parse(list(sys.argv[1:] if arguments is None else arguments)))
        # The wrapped models hold the process group, whose threads must end before Python itself does.
        gc.collect()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def parse_preset(
    arguments: list[str],
    presets: Mapping[str, tuple[str, T]],
    *,
    command: str,
    about: str,
    stored: Callable[[Mapping[str, Any]], T],
) -> T:
    """Configuration from ``PRESET [options]`` or ``--config RUN|config.json [options]``.

    Args:
        arguments: the words of the command line.
        presets: by name a sentence about each, and the configuration; the first is the example in the help.
        command: as a user writes it, ``python -m ...``.
        about: a sentence on what it does.
        stored: makes a configuration out of the contents of a ``config.json``.

    Returns:
        The configuration, checked.

    Raises:
        ValueError: the stored configuration, or a value, is not valid.
        SystemExit: help was asked for, or an option is unknown.
    """
    flat, first = (
        (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        arguments[0] if arguments else "",
    )
    if first in presets:  # on its own, its errors and suggestions speak of this preset alone
        told, preset = presets[first]
        return tyro.cli(
            type(preset),
            default=preset,
            args=arguments[1:],
            config=flat,
            description=told,
            prog=f"{command} {first}",
        )
    if first.startswith("--config"):
        source, *rest = [*first.split("=", 1)[1:], *arguments[1:]] or [""]
        if first.split("=")[0] != "--config" or not source:
            raise ValueError("--config needs a run folder or a config.json after it")
        kept = stored(load_config(source))
        return tyro.cli(
            type(kept), default=kept, args=rest, config=flat, prog=f"{command} --config {source}",
            description=f"The run of {source}, with changes.",
        )  # fmt: skip
    example = next(iter(presets))
    description = (
        f"{about} Every option of a preset can be changed: see `{command} {example} --help`. `{command} "
        "--config RUN [options]` takes the stored configuration of a run instead of a preset. A run that was "
        "stopped is resumed by the same command."
    )
    return tyro.extras.overridable_config_cli(
        dict(presets), args=arguments, config=flat, description=description, prog=command
    )


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a configuration from what ``dataclasses.asdict`` and JSON made of it.

    Args:
        kind: the dataclass.
        values: nested mapping with every field; lists stand for tuples.

    Returns:
        The configuration, checked as ever.

    Raises:
        ValueError: a key is unknown or missing, or a value is of another type or out of range.

    Example:
        >>> from dataclasses import make_dataclass
        >>> from_dict(make_dataclass("Sizes", [("widths", tuple)]), {"widths": [8, 16]})
        Sizes(widths=(8, 16))
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown, missing = sorted(set(values) - set(names)), sorted(set(names) - set(values))
    if unknown or missing:
        raise ValueError(
            f"configuration of {kind.__name__} has unknown keys {unknown} and lacks {missing}: it was "
            "written by another version; start from a preset instead"
        )
    hints = get_type_hints(kind)
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint) and isinstance(value, Mapping):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hint):
            expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
            raise ValueError(
                f"configuration of {kind.__name__}: {name} is {value!r}, expected {expected}: was it edited? "
                "Mend it, or start from a preset"
            )
        built[name] = value
    return kind(**built)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field says, as far as plain types go."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple or hint is tuple:
        rows = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and (
            not inner or (len(rows) == len(value) and all(map(_fits, value, rows)))
        )
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if hint is int else int | float)
    return not isinstance(hint, type) or isinstance(value, hint)


def make_accelerator(
    *, folder: str, trackers: Sequence[str], mixed_precision: str | None = None
) -> Accelerator:
    """The processes of a run, with its trackers.

    Args:
        folder: of the run.
        trackers: names, as accelerate knows them.
        mixed_precision: "no", "bf16" or "fp16"; ``None`` leaves it to ``accelerate launch``.

    Returns:
        The accelerator.

    Raises:
        ValueError: a tracker is unknown.
        ImportError: a tracker is not installed.
    """
    known = [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]
    for name in trackers:
        if name not in known:
            raise ValueError(f"tracker {name!r} is unknown: accelerate knows {', '.join(known)}")
        if importlib.util.find_spec(name) is None:
            raise ImportError(
                f"tracker {name!r} is not installed: pip install {name}, or leave it out of --trackers"
            )
    # Buffers need no broadcast: spectral norm sees equal weights everywhere, codebooks equal statistics, and
    # loops with batch statistics average those after every step.
    return Accelerator(
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(folder) / "trackers")),
        # An evaluation keeps the other processes waiting, perhaps for longer than the usual ten minutes.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
        step_scheduler_with_optimizer=False,
    )


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as trackers take it: one level, plain values.

    Args:
        config: groups of options by name, and the preset.

    Returns:
        ``group.option`` to value; what is no plain value becomes text.

    Example:
        >>> flat_settings({"preset": "a", "run": {"steps": 2, "trackers": ()}})
        {'preset': 'a', 'run.steps': 2, 'run.trackers': '()'}
    """
    groups = {group: values for group, values in config.items() if isinstance(values, dict)}
    return {"preset": config["preset"]} | {
        f"{group}.{name}": value if isinstance(value, int | float | str | bool) else str(value)
        for group, values in groups.items()
        for name, value in values.items()
    }
