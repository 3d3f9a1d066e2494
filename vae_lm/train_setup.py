"""What a training run starts from: sentences, tokenisers, networks, optimiser, schedules."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from fq.command import flat_settings
from fq.run import RunFolder, write_atomically
from vae_lm.configs import NetworkConfig, ObjectiveConfig, OptimConfig, TextConfig, Training, may_change
from vae_lm.convert import from_released
from vae_lm.cross_entropy import token_nll
from vae_lm.data import (
    ItemBatch,
    Split,
    TokenRows,
    filter_texts,
    find_files,
    read_file,
    read_texts,
    training_batches,
)
from vae_lm.latent import beta_schedule
from vae_lm.model import Optimus, VAELoss
from vae_lm.tokenizers import ENCODER_FOLDER, TextTokenizers

TOKENIZERS, CORPUS, MODEL = "tokenizers", "corpus.json", "model"

_MOST_HELD_OUT = 2000

_VOCABULARY_LINES = 200_000
"""Sentences of a stream that a vocabulary is learnt from."""

_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop",
)  # fmt: skip


def quieten_libraries() -> None:
    """Keep from the user what they say about a tied head and one file of weights: no news to anybody."""
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()


# ---- sentences


class Sentences(NamedTuple):
    """Filtered texts of both sets, what became of the rest, and sources of a stream instead of ``train``."""

    train: list[str]
    valid: list[str]
    empty: int
    wordy: int
    stream: list[Path]


def read_sentences(config: TextConfig, *, seed: int) -> Sentences:
    """The sentences of a run, filtered by words; of a stream only the held-out ones.

    Raises:
        FileNotFoundError, ImportError, ValueError: as ``vae_lm.data.read_texts``; or nothing is left.
    """
    drop = config.too_long == "drop"

    def texts(source: str, split: Split) -> tuple[list[str], int, int]:
        found = read_texts(source, split=split, column=config.column, labelled=config.labelled)
        return filter_texts(found, max_words=config.max_words, drop=drop)

    valid: list[str] = []
    if config.valid:
        # A file is what it is; a folder is asked for its valid split.
        is_folder = Path(config.valid).expanduser().is_dir()
        valid = texts(config.valid, "valid" if is_folder else "train")[0]
        if not valid:
            raise ValueError(f"{config.valid} holds no held-out sentence: one a line was expected")
    source = Path(config.data).expanduser()
    if config.stream and source.is_dir():
        valid = valid or texts(config.data, "valid")[0]
        return Sentences([], valid, 0, 0, find_files(source) or [source])
    if config.stream:
        return Sentences([], valid, 0, 0, [source])
    train, empty, wordy = texts(config.data, "train")
    if config.limit:
        train = train[: config.limit]
    if not train:
        raise ValueError(f"{config.data} has no sentence left to train on ({empty} empty, {wordy} too long)")
    if not config.valid:
        valid = texts(config.data, "valid")[0] if config.held_out else []
    if not valid and config.held_out:
        train, valid = _hold_out(train, config.held_out, seed)
    return Sentences(train, valid, empty, wordy, [])


def _hold_out(texts: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    count = min(_MOST_HELD_OUT, max(2, round(share * len(texts))))
    if count >= len(texts):
        raise ValueError(
            f"{len(texts)} sentences cannot spare {count} to evaluate on: give more, or --held-out 0"
        )
    chosen = set(np.random.default_rng([seed, 1]).permutation(len(texts))[:count].tolist())
    return (
        [text for index, text in enumerate(texts) if index not in chosen],
        [text for index, text in enumerate(texts) if index in chosen],
    )


def choose_tokenizers(config: Training, sentences: Sentences) -> TextTokenizers:
    """Tokenisers of the run that is resumed, those given, those of the networks, or newly learnt ones.

    Raises:
        FileNotFoundError, ValueError: there are none where they should be.
    """
    network, stored = config.network, Path(config.folder).expanduser() / TOKENIZERS
    if (stored / ENCODER_FOLDER).is_dir():
        return TextTokenizers.from_folder(stored)
    if len(network.vocab) == 2:
        return TextTokenizers.load(*network.vocab)
    if network.vocab:
        return TextTokenizers.from_folder(network.vocab[0])
    if network.init:
        if not (Path(network.init) / ENCODER_FOLDER).is_dir():
            raise ValueError(f"{network.init} has no tokenisers: give --vocab ENCODER DECODER")
        return TextTokenizers.from_folder(network.init)
    if network.encoder:
        return TextTokenizers.load(network.encoder, network.decoder)
    vocabulary: Any = importlib.import_module("vae_lm.vocabulary")
    texts: Any = sentences.train
    if sentences.stream:
        texts = _first_lines(sentences.stream, _VOCABULARY_LINES)
    learnt: TextTokenizers = vocabulary.train_tokenizers(texts, vocab_size=network.vocab_size)
    return learnt


def _first_lines(sources: list[Path], count: int) -> Iterator[str]:
    text = [source for source in sources if not source.name.endswith((".json", ".json.gz"))]
    files = [path for source in text for path in find_files(source)]
    if not files:
        raise ValueError(f"{sources[0]} has no text to learn a vocabulary from: give --vocab ENCODER DECODER")
    lines = (line for path in files for line in read_file(path))
    return itertools.islice((line for line in lines if line.strip()), count)


class Corpus(NamedTuple):
    """Token ids of both sets; ``train`` is None for a stream, ``described`` goes into the first line."""

    train: TokenRows | None
    valid: TokenRows | None
    digest: str
    described: str


def tokenise(config: TextConfig, sentences: Sentences, tokenizers: TextTokenizers) -> Corpus:
    """Token ids of the sentences.

    Raises:
        ValueError: a sentence is too long and must not be dropped, or none is left.
    """
    options: dict[str, Any] = {
        "max_tokens": config.max_tokens,
        "drop": config.too_long == "drop",
        "cache": config.cache or None,
    }
    valid = TokenRows.build(sentences.valid, tokenizers, **options) if sentences.valid else None
    if sentences.stream:
        names = ", ".join(map(str, sentences.stream[:3])) + ", ..." * (len(sentences.stream) > 3)
        return Corpus(None, valid, "", f"a stream of {names}, {len(valid or ())} sentences held out")
    train = TokenRows.build(sentences.train, tokenizers, **options)
    digest = hashlib.sha256("\n".join([*train.texts, "", *sentences.valid]).encode()).hexdigest()
    held = f"{len(valid)} held out" if valid else "evaluated on themselves"
    dropped = {
        "empty": sentences.empty,
        "with too many words": sentences.wordy,
        "with too many tokens": train.num_long,
    }
    told = ", ".join(f"{count} {name}" for name, count in dropped.items() if count)
    return Corpus(
        train, valid, digest, f"{len(train)} sentences, {held}" + (f" (left out: {told})" if told else "")
    )


class Batches(Protocol):
    """Where batches come from."""

    def batches(self, start_step: int) -> Iterator[ItemBatch]:
        """Shares of batches from a number on."""


def open_batches(
    config: Training,
    sentences: Sentences,
    corpus: Corpus,
    tokenizers: TextTokenizers,
    accelerator: Accelerator,
) -> Batches:
    """Batches of this process, from memory or from a stream.

    Raises:
        FileNotFoundError, ValueError: sources or settings of a stream do not fit.
    """
    shared: dict[str, Any] = {
        "batch_size": config.optim.batch_size,
        "seed": config.run.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
    }
    if corpus.train is not None:
        return _FromMemory(corpus.train, shared)
    stream: Any = importlib.import_module("vae_lm.stream")
    found: Batches = stream.TextStream(
        sentences.stream,
        tokenizers,
        max_tokens=config.text.max_tokens,
        shuffle_buffer=config.text.shuffle_buffer,
        **shared,
    )
    return found


class _FromMemory(NamedTuple):
    rows: TokenRows
    options: dict[str, Any]

    def batches(self, start_step: int) -> Iterator[ItemBatch]:
        return training_batches(self.rows, start_step=start_step, **self.options)


# ---- networks


class PlainGPT2(nn.Module):
    """GPT-2 without a latent, called and counted like the VAE.

    Args:
        gpt2: the language model.
    """

    def __init__(self, gpt2: GPT2LMHeadModel) -> None:
        super().__init__()
        self.gpt2 = gpt2
        assert isinstance(gpt2.config.pad_token_id, int)
        self._pad = gpt2.config.pad_token_id

    def log_likelihood(self, decoder_ids: Tensor) -> Tensor:
        """log p(x) ``[B]`` of rows ``[B, T]``, summed over predicted tokens."""
        targets = decoder_ids[:, 1:]
        predicted: Tensor = targets.ne(self._pad)
        states = self.gpt2.transformer(input_ids=decoder_ids[:, :-1], use_cache=False).last_hidden_state
        nll = token_nll(states[predicted], self.gpt2.lm_head.weight, targets[predicted])
        sentence = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[predicted]
        return -nll.new_zeros(len(targets)).index_add(0, sentence, nll)

    def forward(
        self, encoder_ids: Tensor, decoder_ids: Tensor, *, length_weighted: bool = False, **latent: Any
    ) -> VAELoss:
        """The same as ``Optimus.forward``, with a KL of 0; what concerns the latent changes nothing."""
        rec = -self.log_likelihood(decoder_ids)
        count = decoder_ids.ne(self._pad).sum(-1)
        return VAELoss(
            rec / count if length_weighted else rec, rec, 0 * rec.detach(), 0 * rec.detach(), count
        )


def build_network(
    config: NetworkConfig, tokenizers: TextTokenizers, *, max_tokens: int
) -> Optimus | PlainGPT2:
    """The network to train, on the CPU and in training mode.

    Raises:
        FileNotFoundError, ValueError: a folder is missing, or what is in it does not fit the configuration.
    """
    network: Optimus | PlainGPT2
    if not config.latent:
        network = PlainGPT2(_plain_gpt2(config, tokenizers, max_tokens))
    elif config.init:
        network = _started(config, tokenizers)
    else:
        network = Optimus.from_backbones(
            config.encoder or _bert_config(config, tokenizers, max_tokens),
            config.decoder or _gpt2_config(config, tokenizers, max_tokens),
            latent_dim=config.latent_dim,
            injection=config.injection,
            num_memory_slots=config.num_memory_slots,
            pooling=config.pooling,
            initializer_range=config.head_range,
            tokenizers=tokenizers,
        )
    room = _room(network)
    if max_tokens > room:
        raise ValueError(f"max_tokens is {max_tokens} but the networks take {room}: lower --max-tokens")
    _set_dropout(network, config.dropout)
    return network.train()


def _bert_config(config: NetworkConfig, tokenizers: TextTokenizers, max_tokens: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizers.encoder), hidden_size=config.width, num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.num_heads, intermediate_size=4 * config.width,
        max_position_embeddings=max_tokens, pad_token_id=tokenizers.encoder.pad_token_id,
        initializer_range=config.initializer_range,
    )  # fmt: skip


def _gpt2_config(config: NetworkConfig, tokenizers: TextTokenizers, max_tokens: int) -> GPT2Config:
    tail = tokenizers.decoder
    return GPT2Config(
        vocab_size=len(tail), n_positions=max_tokens + 1, n_embd=config.width, n_layer=config.decoder_layers,
        n_head=config.num_heads, pad_token_id=tail.pad_token_id, bos_token_id=tail.bos_token_id,
        eos_token_id=tail.eos_token_id, initializer_range=config.initializer_range,
    )  # fmt: skip


def _plain_gpt2(config: NetworkConfig, tokenizers: TextTokenizers, max_tokens: int) -> GPT2LMHeadModel:
    if not config.decoder:
        return GPT2LMHeadModel(_gpt2_config(config, tokenizers, max_tokens))
    gpt2: Any = GPT2LMHeadModel.from_pretrained(config.decoder)
    if len(tokenizers.decoder) > gpt2.config.vocab_size:
        gpt2.resize_token_embeddings(len(tokenizers.decoder), mean_resizing=False)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(gpt2.config, name, getattr(tokenizers.decoder, name))
    found: GPT2LMHeadModel = gpt2
    return found


def _started(config: NetworkConfig, tokenizers: TextTokenizers) -> Optimus:
    if any(Path(config.init).glob("checkpoint-*")):
        network = from_released(config.init, injection=config.injection, tokenizers=tokenizers)
    else:
        network = Optimus.from_pretrained(config.init)
        network.tokenizers = tokenizers
    has = network.decoder.config
    for name in ("latent_dim", "injection", "num_memory_slots"):
        if getattr(has, name) != getattr(config, name):
            raise ValueError(
                f"{name} is {getattr(config, name)!r} but that of {config.init} is {getattr(has, name)!r}: "
                f"pass --{name.replace('_', '-')} {getattr(has, name)}"
            )
    return network


def _room(network: Optimus | PlainGPT2) -> int:
    """Tokens that fit into both networks."""
    if isinstance(network, PlainGPT2):
        return int(network.gpt2.config.n_positions)
    positions = getattr(network.encoder.config, "max_position_embeddings", None) or 10**9
    return min(int(positions), network.decoder.config.max_tokens)


def _set_dropout(network: nn.Module, probability: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        configured = getattr(module, "config", None)
        for name in _DROPOUTS:
            if hasattr(configured, name):
                setattr(configured, name, probability)


# ---- optimiser and schedules


def make_optimiser(network: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; vectors (all biases and layer norms) do not decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        groups[parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps,
    )  # fmt: skip


def learning_rate(config: OptimConfig, step: int, schedule_steps: int) -> float:
    """Rate of a step, from 0: a rise over ``warmup_steps``, then level, or linearly down to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    return config.lr * (schedule_steps - step) / max(1, schedule_steps - config.warmup_steps)


def kl_weights(config: ObjectiveConfig, num_batches: int) -> list[float]:
    """KL weight of every batch; a run shorter than its cycles has a cycle a batch."""
    if not config.cycles:
        return [config.beta] * num_batches
    weights: list[float] = beta_schedule(
        num_batches, start=config.beta_start, stop=config.beta, num_cycles=min(config.cycles, num_batches),
        zero_share=config.zero_share, rise_share=config.rise_share,
    ).tolist()  # fmt: skip
    return weights


# ---- run folder


def open_run(
    config: Training, accelerator: Accelerator, corpus: Corpus, tokenizers: TextTokenizers
) -> RunFolder:
    """The run folder, new or gone on with, its trackers, and the tokenisers in it.

    Raises:
        ValueError: the folder holds something else, a run with other settings, or one with other sentences.
    """
    values = asdict(config)
    run = RunFolder.open(
        config.folder, values, accelerator, seed=config.run.seed, may_change=may_change(config)
    )
    note = run.path / CORPUS
    if note.is_file():
        stored = json.loads(note.read_text(encoding="utf-8")).get("digest")
        if stored != corpus.digest:
            raise ValueError(
                f"{run.path} was started with other sentences than {config.text.data} holds now: bring "
                "those back, or use another --out"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not note.is_file():
        tokenizers.save(run.path / TOKENIZERS)
        write_atomically(note, json.dumps({"digest": corpus.digest, "about": corpus.described}) + "\n")
    accelerator.init_trackers("fq-gan", config=flat_settings(values))
    return run


def announce(
    config: Training, accelerator: Accelerator, folder: Path, first: int, total: int, what: str
) -> None:
    """One line on start that says what will happen and where."""
    if first >= total:
        accelerator.print(f"{folder} has reached step {first} already")
        return
    doing = f"resuming {config.preset} at step {first}" if first else f"training {config.preset}"
    size = f"{config.optim.batch_size} x {config.optim.accumulation}"
    accelerator.print(
        f"{doing} to step {total}: {what}, batches of {size}, {accelerator.num_processes} process(es) on "
        f"{accelerator.device}, into {folder}"
    )
