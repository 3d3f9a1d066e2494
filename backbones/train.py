"""Train a GAN, with or without feature quantisation: ``python -m backbones.train PRESET --fq MODE``.

The preset decides which model: BigGAN or TAC-GAN, StyleGAN2, U-GAT-IT. Their loops are ``train_biggan``,
``train_stylegan2`` and ``train_ugatit``.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from pathlib import Path

import tyro

from backbones import train_biggan, train_stylegan2, train_ugatit
from backbones.configs import (
    BigGANTraining,
    QuantizerConfig,
    StyleGAN2Training,
    Training,
    stored_training,
)
from backbones.presets import PRESETS
from fq.run import load_config


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


def train(config: Training) -> Path:
    """Run (or resume) a training of any of the models and return its folder.

    Args:
        config: of :mod:`backbones.configs`; its type decides the model.

    Returns:
        The run folder.

    Raises:
        ValueError, FileNotFoundError, FloatingPointError: as the loop of the model says.
    """
    if isinstance(config, BigGANTraining):
        return train_biggan.train(config)
    if isinstance(config, StyleGAN2Training):
        return train_stylegan2.train(config)
    return train_ugatit.train(config)


def parse(arguments: list[str]) -> Training:
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
        chosen = tyro.cli(type(preset), default=preset, args=arguments[1:], config=flat, description=about,
                          prog=f"{command} {first}")  # fmt: skip
        _note_unused(chosen.quantizer, preset.quantizer)
        return chosen
    if first.startswith("--config"):
        source, *rest = [*first.split("=", 1)[1:], *arguments[1:]] or [""]
        if first.split("=")[0] != "--config" or not source:
            raise ValueError("--config needs a run folder or a config.json after it")
        about, stored = f"The run of {source}, with changes.", stored_training(load_config(source))
        return tyro.cli(type(stored), default=stored, args=rest, config=flat, description=about,
                        prog=f"{command} --config {source}")  # fmt: skip
    about = (
        "Train BigGAN, TAC-GAN, StyleGAN2 or U-GAT-IT, plain or with feature quantisation. Every option of a "
        f"preset can be changed: see `{command} digits --help`. `{command} --config RUN [options]` takes the "
        "stored configuration of a run instead of a preset. A run that was stopped is resumed by the same "
        "command."
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


if __name__ == "__main__":
    main()
