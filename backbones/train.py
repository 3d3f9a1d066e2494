"""Train a GAN, with or without feature quantisation: ``python -m backbones.train PRESET --fq MODE``.

The preset decides which model: BigGAN or TAC-GAN, StyleGAN2, U-GAT-IT. Their loops are ``train_biggan``,
``train_stylegan2`` and ``train_ugatit``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from backbones import train_biggan, train_stylegan2, train_ugatit
from backbones.configs import BigGANTraining, QuantizerConfig, StyleGAN2Training, Training
from backbones.presets import PRESETS
from backbones.train_setup import stored_training
from fq.command import parse_preset, run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given, or the run was interrupted; the text says what.
    """
    run_command(train, parse, arguments)


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
    chosen = parse_preset(
        arguments, PRESETS, command="python -m backbones.train", stored=stored_training,
        about="Train BigGAN, TAC-GAN, StyleGAN2 or U-GAT-IT, plain or with feature quantisation.",
    )  # fmt: skip
    if arguments and arguments[0] in PRESETS:
        _note_unused(chosen.quantizer, PRESETS[arguments[0]][1].quantizer)
    return chosen


def _note_unused(chosen: QuantizerConfig, preset: QuantizerConfig) -> None:
    """A baseline that was given the quantiser's options may be meant so, or be a forgotten --fq."""
    changed = [name for name, value in asdict(chosen).items() if value != asdict(preset)[name]]
    if chosen.fq == "none" and changed:
        print(
            f"note: without --fq, {', '.join(changed)} change nothing: this is the plain GAN", file=sys.stderr
        )


if __name__ == "__main__":
    main()
