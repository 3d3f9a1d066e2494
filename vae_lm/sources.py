"""What the commands are given: models from folders or released checkpoints, lines of text, latents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vae_lm.convert import from_released
from vae_lm.latent import LatentStatistics
from vae_lm.model import Optimus
from vae_lm.tokenizers import TextTokenizers

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Released:
    """For a released checkpoint (a folder with checkpoint-encoder-S), whose files do not say these.

    Raises:
        ValueError: one tokeniser without the other.
    """

    encoder_tokenizer: str = ""
    """Folder or Hub name of the encoder's tokeniser, as of bert-base-cased."""
    decoder_tokenizer: str = ""
    """The same of the decoder, as of gpt2."""
    injection: Literal["both", "memory", "embedding"] = "both"
    """How the latent was injected in training."""
    step: int | None = None
    """S, if there are several."""

    def __post_init__(self) -> None:
        if bool(self.encoder_tokenizer) != bool(self.decoder_tokenizer):
            raise ValueError("give both --encoder-tokenizer and --decoder-tokenizer, or neither")


def open_model(source: str | Path, released: Released | None = None) -> Optimus:
    """A model with tokenisers, in eval mode, on the GPU if there is one.

    Args:
        source: folder that ``save_pretrained`` wrote, a run folder of vae_lm.train, or one with those of
            a released checkpoint.
        released: what the files of a released checkpoint do not say; nothing for a folder of ours.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: weights, tokenisers and options do not fit together.
    """
    folder, released = model_folder(source), released or Released()
    if any(folder.glob("checkpoint-*-*")) and not (folder / "config.json").is_file():
        if not released.encoder_tokenizer:
            raise ValueError(
                f"{folder} is a released checkpoint and holds no tokenisers: give --encoder-tokenizer and "
                "--decoder-tokenizer, as bert-base-cased and gpt2"
            )
        model = from_released(
            folder,
            step=released.step,
            injection=released.injection,
            tokenizers=TextTokenizers.load(released.encoder_tokenizer, released.decoder_tokenizer),
        )
    elif released != Released():
        raise ValueError(
            f"{folder} is no released checkpoint: its folder says itself which tokenisers, injection and "
            "step it has, leave those options out"
        )
    else:
        model = Optimus.from_pretrained(folder)
    model.tokenizers  # noqa: B018  a model of token ids alone is refused before any work
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(source: str | Path) -> Path:
    """The folder of a model: the one given, or ``model`` in a run folder of vae_lm.train."""
    inner = Path(source) / "model"
    return inner if (inner / "config.json").is_file() else Path(source)


def lines(source: str | Path) -> Iterator[str]:
    """Lines of a text file, or of the standard input for ``-``, stripped; one at a time.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8.
    """
    if str(source) == STDIN:
        yield from (line.strip() for line in sys.stdin)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a file with one text a line, or - for the input"
        )
    with path.open(encoding="utf-8") as file:
        try:
            yield from (line.strip() for line in file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it first") from error


def texts(source: str | Path, *, limit: int = 0) -> list[str]:
    """All lines that are not blank.

    Args:
        source: as for `lines`.
        limit: take the first ones only; 0 takes all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no text in it, or it is not UTF-8.
    """
    found = []
    for line in lines(source):
        if line:
            found.append(line)
        if len(found) == limit > 0:
            break
    if not found:
        raise ValueError(f"{_name(source)} holds no text: one sentence a line was expected")
    return found


def fields(source: str | Path, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Lines of several texts with tabulators between them.

    Args:
        source: as for `lines`.
        names: what the texts of a line are called, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has another number of texts, or there is none.
    """
    rows = []
    for number, line in enumerate(texts(source), 1):
        row = tuple(part.strip() for part in line.split("\t"))
        if len(row) != len(names) or not all(row):
            raise ValueError(
                f"text {number} of {_name(source)} has {len(row)} fields ({line[:60]!r}) but "
                f"{'<TAB>'.join(names)} was expected"
            )
        rows.append(row)
    return rows


def latents(path: str | Path, latent_dim: int | None = None) -> Tensor:
    """A file of latents, as ``python -m vae_lm.embed`` writes them.

    Args:
        path: .npy, or .safetensors with a tensor ``mu`` or with one tensor alone.
        latent_dim: size they must have; None takes any.

    Returns:
        float32 ``[N, latent_dim]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else, damaged, or of another size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: python -m vae_lm.embed writes files of latents")
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
            found = stored["mu"] if "mu" in stored else next(iter(stored.values()), torch.empty(0))
        elif path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            raise ValueError("the name must end in .npy or .safetensors")
    except (ValueError, TypeError, EOFError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of latents ({error}): write one with vae_lm.embed") from error
    size = latent_dim or "latent_dim"
    if found.ndim != 2 or found.shape[1] != (latent_dim or found.shape[1]) or not found.is_floating_point():
        raise ValueError(
            f"{path} holds {found.dtype} {list(found.shape)} but floats [N, {size}] were expected: give "
            "latents of this model"
        )
    if not bool(found.isfinite().all()):
        raise ValueError(f"{path} holds numbers that are not finite: write it again")
    return found.float()


def statistics(model: Optimus) -> LatentStatistics:
    """Mean and covariance of a model's latents.

    Raises:
        ValueError: it has none.
    """
    if model.latent_statistics is None:
        raise ValueError(
            "the model has no latent statistics to whiten by: python -m vae_lm.embed MODEL --statistics "
            "takes them from a corpus and stores them with it"
        )
    return model.latent_statistics


def _name(source: str | Path) -> str:
    return "the standard input" if str(source) == STDIN else str(source)
