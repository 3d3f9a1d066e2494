"""Released Optimus checkpoints to ours and back: ``python -m vae_lm.convert CHECKPOINT OUT``.

The original writes three folders for step S, ``checkpoint-encoder-S`` and ``checkpoint-decoder-S``
(config.json, pytorch_model.bin) and ``checkpoint-full-S`` (training.bin: the same weights, and the
optimiser). Any of them can be read; only tensors and plain values are unpickled, never code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from transformers import BertConfig, GPT2Config

from vae_lm.model import Optimus
from vae_lm.tokenizers import TextTokenizers

State = dict[str, Tensor]
Layout = Literal["auto", "folders", "full"]

_RENAMED = {
    "encoder.linear.weight": "posterior_head.weight",
    "decoder.transformer.linear.weight": "decoder.memory_projection.weight",
    "decoder.transformer.linear_emb.weight": "decoder.embedding_projection.weight",
}

# Buffers of the causal mask. Not by the ending "attn.bias": that of c_attn, a weight, ends the same.
_BUFFER = re.compile(r"\.attn\.(masked_)?bias$|\.position_ids$")

_HEAD, _WORDS = "decoder.lm_head.weight", "decoder.transformer.wte.weight"

_GPT2_WORDS = 50257
"""Vocabulary of GPT-2 before the three special tokens are added."""

_OLD_GPT2 = (
    "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "layer_norm_epsilon", "initializer_range", "vocab_size",
)  # fmt: skip
_OLD_BERT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "intermediate_size", "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings",
    "type_vocab_size", "initializer_range", "layer_norm_eps",
)  # fmt: skip


def from_released(
    checkpoint: str | Path,
    *,
    step: int | None = None,
    layout: Layout = "auto",
    injection: str = "both",
    tokenizers: TextTokenizers | None = None,
) -> Optimus:
    """A released checkpoint as an `Optimus`, on the CPU and in eval mode.

    A decoder saved before the special tokens were added gets them, drawn from N(0, 0.02^2).

    Args:
        checkpoint: the folder that holds ``checkpoint-encoder-S`` and the others.
        step: S; may be left out if there is one.
        layout: "folders" reads encoder and decoder, "full" training.bin (of 2.8 GB at BERT base and GPT-2,
            for it holds the optimiser; the two config.json must be there too), "auto" the folders if they are
            there.
        injection: "both", "memory" or "embedding". The files do not say which one was trained, and those of
            all three look alike; the released ones use both.
        tokenizers: of the model; without them it works on token ids.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: several steps to choose from, a file that is damaged or holds more than plain values, or
            weights that are not those of an Optimus.
    """
    folder = Path(checkpoint)
    step = _find_step(folder) if step is None else step
    places = {name: folder / f"checkpoint-{name}-{step}" for name in ("encoder", "decoder", "full")}
    configs = {name: _read_json(places[name] / "config.json") for name in ("encoder", "decoder")}
    weights = [places[name] / "pytorch_model.bin" for name in ("encoder", "decoder")]
    if layout == "full" or (layout == "auto" and not all(path.is_file() for path in weights)):
        state = _read_training(places["full"] / "training.bin")
    else:
        encoder, decoder = map(_read_tensors, weights)
        state = {f"encoder.{key}": value for key, value in encoder.items()}
        state |= {f"decoder.{key}": value for key, value in decoder.items()}
    ours = rename_released(state, injection=injection)
    return _build(ours, configs["encoder"], configs["decoder"], injection, tokenizers)


def rename_released(state: Mapping[str, Tensor], *, injection: str = "both") -> State:
    """Weights of the original's whole model under our names.

    Args:
        state: keys ``encoder.*`` and ``decoder.*`` of the original.
        injection: the projection that it does not use is left out.

    Returns:
        Keys and tensors for ``Optimus.load_state_dict``.

    Raises:
        ValueError: the latent head or a projection is missing, or head and embeddings of words differ.
    """
    missing = [key for key in (*_RENAMED, _WORDS) if key not in state]
    if missing:
        hint = "; a classifier's checkpoint keeps its encoder below 'bert.' and has lost the latent" * any(
            ".bert." in key for key in state
        )
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}: an Optimus VAE was expected{hint}")
    if _HEAD in state and not torch.equal(state[_HEAD], state[_WORDS]):
        raise ValueError(f"{_HEAD} and {_WORDS} differ but the original ties them: the file is damaged")
    ours = {}
    for key, value in state.items():
        if _BUFFER.search(key):
            continue
        # Names from TensorFlow, in files that came from there.
        key = re.sub(
            r"(LayerNorm|ln_\w)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm|ln_\w)\.beta$", r"\1.bias", key)
        )
        ours[_RENAMED.get(key, key)] = value
    unused = {
        "memory": "decoder.embedding_projection.weight",
        "embedding": "decoder.memory_projection.weight",
    }
    ours.pop(unused.get(injection, ""), None)
    ours[_HEAD] = ours[_WORDS]
    return ours


def _build(
    state: State,
    encoder: Mapping[str, Any],
    decoder: Mapping[str, Any],
    injection: str,
    tokenizers: TextTokenizers | None,
) -> Optimus:
    rows = len(state[_WORDS])
    target = len(tokenizers.decoder) if tokenizers is not None else rows + 3 * (rows == _GPT2_WORDS)
    if target not in (rows, rows + 3):
        raise ValueError(
            f"the decoder has {rows} tokens but its tokeniser {target}: give the tokeniser that it was "
            "trained with"
        )
    latent_dim = state["posterior_head.weight"].shape[0] // 2
    # The old configurations know no special tokens: the three are the last of the vocabulary.
    special: dict[str, Any] = {
        f"{name}_token_id": target - 3 + i for i, name in enumerate(("pad", "bos", "eos"))
    }
    shape = {key: decoder[key] for key in _OLD_GPT2 if key in decoder} | {"vocab_size": target}
    model = Optimus.from_backbones(
        BertConfig(**{key: encoder[key] for key in _OLD_BERT if key in encoder}, pad_token_id=0),
        GPT2Config(**shape, **special),
        latent_dim=latent_dim,
        injection=injection,
        tokenizers=tokenizers,
    )
    if target > rows:
        drawn = model.decoder.transformer.wte.weight.detach()[rows:]
        state[_HEAD] = state[_WORDS] = torch.cat([state[_WORDS], drawn])
    expected = model.state_dict()
    odd = sorted(state.keys() ^ expected.keys())
    odd += [key for key in state if key in expected and state[key].shape != expected[key].shape]
    if odd:
        raise ValueError(
            f"weights and config.json do not fit: {', '.join(odd[:5])} missing, unknown or of another shape"
        )
    model.load_state_dict(state)
    return model.eval()


def _find_step(folder: Path) -> int:
    found = {
        int(match[1]) for path in folder.glob("checkpoint-*-*") if (match := re.search(r"-(\d+)$", path.name))
    }
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint-encoder-S, checkpoint-decoder-S or checkpoint-full-S: give the "
            "folder that a released archive was unpacked into"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds the steps {', '.join(map(str, sorted(found)))}: choose one by step="
        )
    return found.pop()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the sizes of the networks stand there, copy it too")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__} but an object was expected")
    return found


def _read_plain(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: copy it from the released archive")
    try:
        # A bag of settings in training.bin; making one runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways, all meaning the same to the caller
        raise ValueError(
            f"{path} is damaged or holds more than tensors and plain values, which is not loaded because it "
            f"could run code ({type(error).__name__}): download it again"
        ) from error


def _read_tensors(path: Path) -> State:
    state = _read_plain(path)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__} but tensors by name were expected")
    return dict(state)


def _read_training(path: Path) -> State:
    training = _read_plain(path)
    state = training.get("model_state_dict") if isinstance(training, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} has no model_state_dict: the original's training.bin was expected")
    return dict(state)


# ---- and back


def to_released(model: Optimus) -> State:
    """Weights under the original's names, with its buffers of the causal mask.

    A model with memory alone gets an embedding projection of zeros, which adds nothing. One with the
    embedding alone gets a memory projection of zeros, which is **not** nothing: load it with the original's
    memory off.

    Raises:
        ValueError: the original cannot hold the model.
    """
    config = model.config
    reasons = [
        f"its encoder is a {model.encoder.config.model_type}"
        if model.encoder.config.model_type != "bert"
        else "",
        f"its pooling is {config.pooling!r}" if config.pooling != "pooler" else "",
        f"it has {model.decoder.config.num_memory_slots} memory slots"
        if model.decoder.config.num_memory_slots != 1
        else "",
    ]
    if any(reasons):
        raise ValueError(f"the original cannot hold this model: {', '.join(filter(None, reasons))}")
    theirs = {ours: name for name, ours in _RENAMED.items()}
    state = {
        theirs.get(key, key): value.detach().cpu().contiguous() for key, value in model.state_dict().items()
    }
    sizes, width = model.decoder.config, model.decoder.config.n_embd
    for name, rows in (("linear", sizes.n_layer * width), ("linear_emb", width)):
        state.setdefault(f"decoder.transformer.{name}.weight", torch.zeros(rows, config.latent_dim))
    mask = torch.ones(sizes.n_positions, sizes.n_positions).tril()[None, None]
    state |= {f"decoder.transformer.h.{layer}.attn.bias": mask for layer in range(sizes.n_layer)}
    return state


def save_released(model: Optimus, folder: str | Path, *, step: int) -> None:
    """Write the original's three folders, in its serialisation; training.bin has no optimiser state.

    Args:
        model: as for `to_released`.
        folder: made if need be.
        step: S in the names.

    Raises:
        ValueError: the original cannot hold the model.
    """
    state = to_released(model)
    encoder, decoder = model.encoder.config, model.decoder.config
    configs = {
        "encoder": {key: getattr(encoder, key) for key in _OLD_BERT},
        "decoder": {key: getattr(decoder, key) for key in _OLD_GPT2}
        | {"n_ctx": decoder.n_positions, "latent_size": decoder.latent_dim},
    }
    for name, config in configs.items():
        place = Path(folder) / f"checkpoint-{name}-{step}"
        prefix = f"{name}."
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        _save(part, place / "pytorch_model.bin")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        _replace(place / "config.json", lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
    training = {"iter": step, "model_state_dict": state, "optimizer_state_dict": {}}
    _save(training, Path(folder) / f"checkpoint-full-{step}" / "training.bin")


def _save(content: Mapping[str, Any], path: Path) -> None:
    # The original's PyTorch reads the old format only.
    _replace(path, lambda partial: torch.save(content, partial, _use_new_zipfile_serialization=False))


def _replace(path: Path, write: Any) -> None:
    """Let ``write`` fill a file beside ``path``, and put it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- command line


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a released Optimus checkpoint into a folder for Optimus.from_pretrained, or back."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder with checkpoint-encoder-S and checkpoint-decoder-S (or checkpoint-full-S); with --back ours."""
    target: Annotated[str, tyro.conf.Positional]
    """Folder to write."""
    step: int | None = None
    """S; needed if there are several, and for --back."""
    layout: Layout = "auto"
    """Which of the files to read."""
    injection: Literal["both", "memory", "embedding"] = "both"
    """How the latent was injected in training; the files do not say."""
    encoder_tokenizer: str = ""
    """Folder or Hub name, as of bert-base-cased; empty for a model of token ids."""
    decoder_tokenizer: str = ""
    """Folder or Hub name, as of gpt2."""
    back: bool = False
    """Write the original's layout."""

    def __post_init__(self) -> None:
        if bool(self.encoder_tokenizer) != bool(self.decoder_tokenizer):
            raise ValueError("give both --encoder-tokenizer and --decoder-tokenizer, or neither")
        if self.back and self.step is None:
            raise ValueError("--back needs --step, the number in the names of the folders")
        if self.back and self.encoder_tokenizer:
            raise ValueError("--back takes no tokenisers: the original's folders hold none")


def convert(config: ConvertConfig) -> Optimus:
    """Convert as told and return the model."""
    if config.back:
        model: Optimus = Optimus.from_pretrained(config.source)
        assert config.step is not None
        save_released(model, config.target, step=config.step)
        return model
    named = (config.encoder_tokenizer, config.decoder_tokenizer)
    tokenizers = TextTokenizers.load(*named) if config.encoder_tokenizer else None
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    chosen = {name: options[name] for name in ("step", "layout", "injection")}
    model = from_released(config.source, tokenizers=tokenizers, **chosen)
    model.save_pretrained(config.target)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Command line.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(
            ConvertConfig,
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vae_lm.convert",
        )
        model = convert(config)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, latent {model.config.latent_dim}, written to {config.target}")


if __name__ == "__main__":
    main()
