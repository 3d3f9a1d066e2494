"""Score trained models on sentences: ``python -m vae_lm.evaluate MODEL [MODEL ...] --data FILE``.

All figures of Optimus (Li et al. 2020, Sec. 5.1) in one pass over the sentences: importance-weighted
perplexity, reconstruction and KL, mutual information, active units, and how well sentences come back. The
noise belongs to (seed, sentence, draw), so that no figure depends on the batch size.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from fq.provenance import provenance
from fq.run import write_atomically
from vae_lm import latent, sources
from vae_lm.bleu import bleu, self_bleu
from vae_lm.model import Optimus, Posterior
from vae_lm.sources import Released
from vae_lm.tokenizers import pad_rows

MOST_REFERENCES = 500
"""Texts that samples are compared with, as in the original."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score sentence VAEs on a file of sentences; several models make a table.

    Raises:
        ValueError: a number is outside its range.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of models, of runs, or of released checkpoints."""
    data: str
    """Text file, one sentence a line; - reads the standard input. Blank lines are left out."""
    num_sentences: int = 0
    """Score the first ones only; 0 takes all."""
    num_importance: int = 100
    """S, draws of the posterior for each sentence."""
    samples_at_once: int = 5
    """Of them, how many go through the decoder together."""
    batch_size: int = 16
    """Sentences that go through the networks together."""
    reconstruct: bool = True
    """Decode every sentence from its mean, greedily, and compare."""
    samples: int = 0
    """Texts to draw from the prior and score by BLEU-5 and Self-BLEU-5; 0 leaves that out."""
    top_p: float = 0.9
    """Of the tokens of these texts."""
    seed: int = 0
    """Of all noise."""
    out: str = ""
    """JSON to write."""
    released: Annotated[Released, tyro.conf.arg(name="")] = field(default_factory=Released)

    def __post_init__(self) -> None:
        wanted = {"num_importance": 1, "samples_at_once": 1, "batch_size": 1, "num_sentences": 0, "seed": 0}
        for name, least in wanted.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least {least}")
        if self.samples < 0 or self.samples == 1:
            raise ValueError(f"samples is {self.samples}: give two or more to compare, or 0 for none")
        if not self.models:
            raise ValueError("no model was named: give the folder of at least one")


class Bound(NamedTuple):
    """Figures of each sentence, ``[N]`` each, float64.

    ``log_prob`` is the importance-weighted bound of log p(x), ``reconstruction`` the mean of -log p(x | z)
    over the draws, ``one_draw`` the same of the first draw alone, ``num_tokens`` counts BOS and EOS.
    """

    log_prob: Tensor
    reconstruction: Tensor
    one_draw: Tensor
    num_tokens: Tensor


class Reconstruction(NamedTuple):
    """Greedy decoding from mu.

    ``token_accuracy`` is the share of predicted tokens that stand in their place, EOS included, ``exact`` the
    share of sentences of which all do; ``texts`` are what was decoded.
    """

    token_accuracy: float
    exact: float
    texts: list[str]


def keyed_noise(seed: int, item: int, *, num_draws: int, dim: int) -> Tensor:
    """Standard normal numbers that depend on their key alone: draw s of an item is the same for any S.

    Args:
        seed: not negative.
        item: number of the sentence.
        num_draws: S.
        dim: size of z.

    Returns:
        float32 ``[S, dim]``.
    """
    # Philox counts: unlike PyTorch's generators, the first numbers do not depend on how many follow.
    numbers = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, item))))
    return torch.from_numpy(numbers.standard_normal((num_draws, dim), dtype=np.float32))


def bound(
    model: Optimus,
    texts: Sequence[str],
    posterior: Posterior,
    *,
    num_importance: int = 100,
    samples_at_once: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> Bound:
    """Importance-weighted bound of each sentence, in batches of like length.

    Args:
        model: in eval mode.
        texts: N sentences.
        posterior: of them, from ``model.encode``.
        num_importance: S.
        samples_at_once: draws that go through the decoder together.
        batch_size: sentences that do.
        seed: of the draws.

    Raises:
        ValueError: a sentence is too long, or the model gives a number that is not finite.
    """
    rows = model.tokenizers.decoder_rows(texts)
    pad = model.tokenizers.decoder.pad_token_id
    found = torch.zeros(4, len(rows), dtype=torch.float64)
    found[3] = torch.tensor([len(row) for row in rows])
    for chosen in _like_lengths(rows, batch_size):
        ids = pad_rows([rows[index] for index in chosen], pad).to(model.device)
        draws = [keyed_noise(seed, i, num_draws=num_importance, dim=model.config.latent_dim) for i in chosen]
        noise = torch.stack(draws).to(model.device)
        first: list[Tensor] = []

        def log_likelihood(z: Tensor, ids: Tensor = ids, first: list[Tensor] = first) -> Tensor:
            values = model.log_likelihood(ids, z).double()
            first.append(values[:, 0])
            return values

        with torch.no_grad():
            estimate = latent.importance_weighted(
                log_likelihood,
                posterior.mu[chosen].double(),
                posterior.logvar[chosen].double(),
                num_samples=num_importance,
                samples_at_once=samples_at_once,
                noise=noise.double(),
            )
        for row, values in zip(found, (estimate.log_prob, estimate.reconstruction, -first[0]), strict=False):
            row[chosen] = values.cpu()
    broken = (~found.isfinite().all(0)).nonzero().flatten().tolist()
    if broken:
        index = broken[0]
        raise ValueError(
            f"sentence {index} ({texts[index][:40]!r}) has log p(x) {float(found[0, index])}: the model's "
            "weights or its posterior are broken"
        )
    return Bound(*found)


def reconstruction(
    model: Optimus, texts: Sequence[str], mu: Tensor, *, batch_size: int = 16
) -> Reconstruction:
    """Decode every sentence from its mean, token by token from BOS, and compare in place.

    Args:
        model: in eval mode.
        texts: N sentences.
        mu: ``[N, latent_dim]``.
        batch_size: sentences decoded together.

    Raises:
        ValueError: a sentence is too long.
    """
    rows, tokenizer = model.tokenizers.decoder_rows(texts), model.tokenizers.decoder
    # One limit for all: what is decoded must not depend on the company in a batch.
    limit = min(max(map(len, rows)) - 1, model.decoder.config.max_tokens - 1)
    correct = total = exact = 0
    decoded = [""] * len(rows)
    for chosen in _like_lengths(rows, batch_size):
        target = pad_rows([rows[index][1:] for index in chosen], tokenizer.pad_token_id).to(model.device)
        start = torch.full((len(chosen), 1), tokenizer.bos_token_id, device=model.device)
        with torch.no_grad():
            ids = model.decoder.generate(
                start,
                latents=mu[chosen],
                attention_mask=torch.ones_like(start),
                max_new_tokens=limit,
                do_sample=False,
            )[:, 1:]
        width = max(ids.shape[1], target.shape[1])
        ids, target = (_widened(tokens, width, tokenizer.pad_token_id) for tokens in (ids, target))
        predicted = target != tokenizer.pad_token_id
        right = (ids == target) & predicted
        correct, total = correct + int(right.sum()), total + int(predicted.sum())
        exact += int((right == predicted).all(1).sum())
        for index, text in zip(chosen, model.tokenizers.texts(ids), strict=True):
            decoded[index] = text
    return Reconstruction(correct / total, exact / len(rows), decoded)


def evaluate_model(model: Optimus, texts: Sequence[str], config: EvaluateConfig) -> dict[str, Any]:
    """All figures of one model.

    Args:
        model: with tokenisers, in eval mode.
        texts: the sentences.
        config: its numbers; files and models named there are not read.

    Returns:
        Figures by name, those of `DEFINITIONS` and ``kl_per_dimension``; None for what was left out.

    Raises:
        ValueError: a sentence is too long, or the model gives a number that is not finite.
    """
    model.tokenize(texts)  # names a text over the limit before any work
    posterior = model.encode(texts, batch_size=config.batch_size)
    per_sentence = bound(
        model,
        texts,
        posterior,
        num_importance=config.num_importance,
        samples_at_once=config.samples_at_once,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    words = sum(len(text.split()) for text in texts)
    perplexities = latent.perplexity(
        float(per_sentence.log_prob.sum()),
        num_tokens=int(per_sentence.num_tokens.sum()),
        num_words=words,
        num_sentences=len(texts),
    )
    figures: dict[str, Any] = {f"ppl_{name}": value for name, value in perplexities._asdict().items()}
    per_dimension = latent.kl_per_dimension(*(part.double() for part in posterior)).mean(0)
    rec, kl = float(per_sentence.reconstruction.mean()), float(per_dimension.sum())
    figures |= {"log_prob": float(per_sentence.log_prob.mean()), "rec": rec, "kl": kl, "neg_elbo": rec + kl}
    figures |= _of_the_space(posterior, config.seed)
    figures["nll_sentence"] = float(per_sentence.one_draw.mean())
    figures["nll_word"] = float(per_sentence.one_draw.sum()) / (words + len(texts))
    figures |= _of_the_texts(model, texts, posterior.mu, config)
    return figures | {"kl_per_dimension": per_dimension.tolist()}


def _of_the_space(posterior: Posterior, seed: int) -> dict[str, Any]:
    mu, logvar = posterior
    noise = torch.cat([keyed_noise(seed, item, num_draws=1, dim=mu.shape[1]) for item in range(len(mu))])
    information = latent.mutual_information(mu, logvar, noise=noise.to(mu.device))
    return {
        "mi": information.nats,
        "mi_at_most": math.log(information.num_sentences),
        "au": latent.active_units(mu).num_active if len(mu) > 1 else None,
    }


def _of_the_texts(
    model: Optimus, texts: Sequence[str], mu: Tensor, config: EvaluateConfig
) -> dict[str, float | None]:
    names = ("token_accuracy", "exact", "bleu", "sample_bleu5", "sample_self_bleu5")
    figures: dict[str, float | None] = dict.fromkeys(names)
    if config.reconstruct:
        back = reconstruction(model, texts, mu, batch_size=config.batch_size)
        figures |= {"token_accuracy": back.token_accuracy, "exact": back.exact}
        figures["bleu"] = _corpus_bleu(back.texts, texts)
    if config.samples:
        room = model.decoder.config.max_tokens - 1
        drawn = model.sample(
            config.samples,
            seed=config.seed,
            do_sample=True,
            top_p=config.top_p,
            max_new_tokens=min(room, 128),
        )
        figures["sample_bleu5"] = bleu(drawn, texts[:MOST_REFERENCES])
        figures["sample_self_bleu5"] = self_bleu(drawn)
    return figures


def _corpus_bleu(found: Sequence[str], texts: Sequence[str]) -> float | None:
    """Corpus BLEU-4 by sacrebleu, in [0, 100]; None without the library."""
    try:
        import sacrebleu
    except ImportError:
        return None
    return float(sacrebleu.corpus_bleu(list(found), [list(texts)]).score)


def _like_lengths(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Numbers of the rows in batches of like length, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _widened(ids: Tensor, width: int, pad: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=pad)


# ---- command line

DEFINITIONS = {
    "ppl_original": "importance-weighted perplexity over sub-words, BOS and EOS counted (the paper's)",
    "ppl_token": "the same over predicted sub-words: BOS, never predicted, not counted",
    "ppl_word": "the same over words between blanks, and one end a sentence",
    "log_prob": "importance-weighted bound of log p(x), nats a sentence",
    "rec": "-log p(x | z), mean over the draws, nats a sentence",
    "kl": "analytic KL, no threshold, nats a sentence",
    "neg_elbo": "rec + kl",
    "mi": "mutual information of x and z, nats",
    "mi_at_most": "log N, which mi cannot exceed",
    "au": "dimensions whose mean has a variance of at least 0.01",
    "nll_sentence": "-log p(x | z) of one draw, nats a sentence",
    "nll_word": "the same a word, the end of a sentence counted as one",
    "token_accuracy": "sub-words in their place, EOS included, greedy from mu",
    "exact": "sentences of which all are",
    "bleu": "BLEU-4 of these reconstructions by sacrebleu, 0 to 100",
    "sample_bleu5": "BLEU-5 of samples of the prior against the sentences, mean over samples, smoothing 1",
    "sample_self_bleu5": "BLEU-5 of each sample against the others",
}
"""What each figure is."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score all models of a configuration.

    Args:
        config: see `EvaluateConfig`.

    Returns:
        ``{"data", "num_sentences", "settings", "models": {folder: figures}, "definitions", "provenance"}``.

    Raises:
        FileNotFoundError: a model or the file is missing.
        ValueError: they do not fit together.
    """
    texts = sources.texts(config.data, limit=config.num_sentences)
    results = {
        name: evaluate_model(sources.open_model(name, config.released), texts, config)
        for name in dict.fromkeys(config.models)
    }
    return {
        "data": config.data,
        "num_sentences": len(texts),
        "settings": {key: value for key, value in asdict(config).items() if key not in ("models", "out")},
        "models": results,
        "definitions": DEFINITIONS,
        "provenance": provenance(config.seed),
    }


def table(result: dict[str, Any]) -> str:
    """A line for each figure and a column for each model, below a header that says what was done."""
    settings, models = result["settings"], result["models"]
    count = result["num_sentences"]
    head = (
        f"{count} sentences of {result['data']}, S = {settings['num_importance']} importance draws, MI of "
        f"N = {count} sentences (at most log N = {math.log(count):.2f}), seed {settings['seed']}"
    )
    if settings["samples"]:
        references = min(count, MOST_REFERENCES)
        head += f"; {settings['samples']} samples, top_p {settings['top_p']}, {references} references"
    lines = [head]
    if len(models) > 1:
        lines += [f"  ({column}) {name}" for column, name in enumerate(models, 1)]
        numbers = [f"({column})".rjust(12) for column in range(1, len(models) + 1)]
        lines.append(" " * 18 + " ".join(numbers))
    for name, meaning in DEFINITIONS.items():
        values = [figures[name] for figures in models.values()]
        if all(value is None for value in values):
            continue
        cells = [f"{'-' if value is None else f'{value:.4f}':>12}" for value in values]
        lines.append(f"{name:18}{' '.join(cells)}  {meaning}")
    if settings["reconstruct"] and all(figures["bleu"] is None for figures in models.values()):
        lines.append("no BLEU of the reconstructions: pip install sacrebleu")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, print the table and write the figures.

    Args:
        arguments: instead of ``sys.argv[1:]``.

    Raises:
        SystemExit: something is wrong with what was given; the text says what.
    """
    try:
        config = tyro.cli(
            EvaluateConfig,
            args=sys.argv[1:] if arguments is None else arguments,
            prog="python -m vae_lm.evaluate",
        )
        result = evaluate(config)
        print(table(result))
        if config.out:
            write_atomically(config.out, json.dumps(result, indent=1) + "\n")
            print(f"written to {config.out}")
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
