"""What a training run writes: metrics, evaluations, sample sentences, checkpoints and the model."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor

from fq.loop import derived_seed, require_finite
from fq.run import RunFolder, write_atomically
from vae_lm import latent
from vae_lm.configs import Training
from vae_lm.data import TokenRows, evaluation_batches
from vae_lm.generate import interpolation_table, markdown_table
from vae_lm.latent import PosteriorMode
from vae_lm.model import Optimus
from vae_lm.tokenizers import DECODER_FOLDER, TextTokenizers
from vae_lm.train_setup import MODEL, TOKENIZERS, PlainGPT2

TERMS = ("loss", "rec", "kl", "kl_counted")

_EVALUATION_BATCH, _DRAWS_AT_ONCE = 32, 5
_NUM_SHOWN = 8
_NUM_DECODED = 200
_STATISTICS_SENTENCES = 2000


# ---- evaluation


class Accuracy(NamedTuple):
    """Shares of tokens that greedy decoding puts in their place, EOS included.

    ``own`` with each sentence's latent, ``permuted`` with that of another sentence.
    """

    own: float
    permuted: float


@torch.no_grad()
def reconstruction_accuracy(model: Optimus, rows: TokenRows, *, seed: int = 0) -> Accuracy:
    """Free-running reconstruction from BOS and z = mu alone: tokens t with the same token at place t.

    Args:
        model: on any device; put into eval mode and back.
        rows: sentences.
        seed: of the permutation, in which no sentence keeps its latent.

    Returns:
        Both shares, over all tokens but BOS.
    """
    training = model.training
    model.eval()
    batches = list(evaluation_batches(rows, batch_size=_EVALUATION_BATCH))
    items = torch.cat([share.items for share in batches])
    means = torch.cat([model.posterior(share.batch.encoder_ids.to(model.device)).mu for share in batches])
    mu = means[items.argsort().to(means.device)]
    order = np.random.default_rng(seed).permutation(len(rows))
    other = torch.empty(len(rows), dtype=torch.int64)
    other[torch.from_numpy(order)] = torch.from_numpy(np.roll(order, 1))
    right = [0, 0]
    for share in batches:
        targets = share.batch.decoder_ids[:, 1:].to(model.device)
        counted = targets != rows.pad_ids[1]
        for which, numbers in enumerate((share.items, other[share.items])):
            found = _greedy(model, mu[numbers.to(mu.device)], targets.shape[1])
            right[which] += int(((found == targets) & counted).sum())
    model.train(training)
    total = int((rows.decoder.lengths - 1).sum())
    return Accuracy(right[0] / total, right[1] / total)


def _greedy(model: Optimus, latents: Tensor, length: int) -> Tensor:
    """Greedy tokens after BOS, ``[B, length]``, padded."""
    config = model.decoder.config
    start = torch.full((len(latents), 1), int(config.bos_token_id), device=latents.device)  # type: ignore[arg-type]
    ids: Tensor = model.decoder.generate(
        start, latents=latents, attention_mask=torch.ones_like(start), max_new_tokens=length, do_sample=False
    )
    pad = int(config.pad_token_id)  # type: ignore[arg-type]
    return torch.nn.functional.pad(ids[:, 1:], (0, length + 1 - ids.shape[1]), value=pad)


class Evaluation(NamedTuple):
    """Figures by name, and mean KL and variance of the means of every dimension (empty without a latent)."""

    figures: dict[str, float]
    kl: Tensor
    variance: Tensor


@torch.no_grad()
def evaluate(
    network: Optimus | PlainGPT2,
    rows: TokenRows,
    *,
    posterior: PosteriorMode = "sample",
    num_samples: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Reconstruction, KL, bound, perplexities, mutual information and active units of a set of sentences.

    Args:
        network: put into eval mode and back.
        rows: N sentences, at least two.
        posterior: as in training. "mean" has no likelihood: no bound, perplexity or mutual information.
        num_samples: draws of z for the importance-weighted bound.
        seed: of all draws.
        device: of the network.

    Returns:
        `Evaluation`. ``rec``, ``kl`` (plain), ``neg_elbo`` and ``neg_bound`` are means over sentences in
        nats; ``ppl_*`` as in ``vae_lm.latent.Perplexity``, from the bound; ``mi`` cannot exceed log of
        ``num_sentences``.
    """
    training = network.training
    network.eval()
    counts = {
        "num_tokens": int(rows.decoder.lengths.sum()),
        "num_words": sum(len(text.split()) for text in rows.texts),
        "num_sentences": len(rows),
    }
    if isinstance(network, PlainGPT2):
        found = _evaluate_plain(network, rows, counts, device)
    else:
        found = _evaluate_vae(network, rows, counts, posterior, num_samples, seed, device)
    network.train(training)
    return found


def _evaluate_plain(
    network: PlainGPT2, rows: TokenRows, counts: dict[str, int], device: torch.device | str
) -> Evaluation:
    total = 0.0
    for share in evaluation_batches(rows, batch_size=_EVALUATION_BATCH):
        total += float(network.log_likelihood(share.batch.decoder_ids.to(device)).sum())
    figures = {"rec": -total / len(rows), "neg_elbo": -total / len(rows)}
    return Evaluation(figures | _perplexities(total, counts), torch.empty(0), torch.empty(0))


def _evaluate_vae(
    network: Optimus,
    rows: TokenRows,
    counts: dict[str, int],
    posterior: PosteriorMode,
    num_samples: int,
    seed: int,
    device: torch.device | str,
) -> Evaluation:
    draw = torch.Generator(device).manual_seed(derived_seed(seed, 11))
    sums, means, logvars = np.zeros(2), [], []
    for share in evaluation_batches(rows, batch_size=_EVALUATION_BATCH):
        ids = share.batch.decoder_ids.to(device)
        mu, logvar = network.posterior(share.batch.encoder_ids.to(device))
        if posterior == "unit_variance":
            logvar = torch.zeros_like(logvar)
        means.append(mu)
        logvars.append(logvar)
        if posterior == "mean":
            sums[0] -= float(network.log_likelihood(ids, mu).sum())
            continue
        estimate = latent.importance_weighted(
            partial(network.log_likelihood, ids), mu, logvar,
            num_samples=num_samples, samples_at_once=min(_DRAWS_AT_ONCE, num_samples), generator=draw,
        )  # fmt: skip
        sums += float(estimate.reconstruction.sum()), float(estimate.log_prob.sum())
    mu, logvar = torch.cat(means), torch.cat(logvars)
    per_dimension = latent.kl_per_dimension(mu, logvar, mode=posterior).mean(0).cpu()
    units = latent.active_units(mu)
    rec, kl = sums[0] / len(rows), float(per_dimension.sum())
    figures = {"rec": rec, "kl": kl, "au": float(units.num_active)}
    if posterior != "mean":
        information = latent.mutual_information(mu, logvar, generator=draw)
        figures |= {"neg_elbo": rec + kl, "neg_bound": -sums[1] / len(rows), "mi": information.nats}
        figures |= _perplexities(sums[1], counts) | {"importance_samples": float(num_samples)}
    accuracy = reconstruction_accuracy(network, rows.select(range(min(_NUM_DECODED, len(rows)))), seed=seed)
    figures |= {"accuracy": accuracy.own, "accuracy_permuted": accuracy.permuted, "num_sentences": len(rows)}
    return Evaluation(figures, per_dimension, units.variance.cpu())


def _perplexities(log_prob: float, counts: dict[str, int]) -> dict[str, float]:
    try:
        values = latent.perplexity(float(log_prob), **counts)
    except OverflowError:  # a network that knows nothing yet, or a decoder lost without its latent
        return {}
    return {f"ppl_{name}": value for name, value in values._asdict().items()}


# ---- what is written


class Reports:
    """What a run writes, each at its steps: metrics, evaluations, sentences, checkpoints and the model.

    Args:
        config: of the run.
        run: its folder.
        accelerator: of this process.
        network: without any wrapping.
        held_out: sentences to evaluate on, or None.
        corpus: sentences for the statistics of z, or None for the held-out ones.
    """

    def __init__(
        self,
        config: Training,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        network: Optimus | PlainGPT2,
        held_out: TokenRows | None,
        corpus: TokenRows | None,
    ) -> None:
        self.config, self.run, self.accelerator, self.network = config, run, accelerator, network
        self.held_out = _subset(held_out, config.run.num_eval, config.run.seed) if held_out else None
        source = corpus or held_out
        self._counted = _subset(source, _STATISTICS_SENTENCES, config.run.seed) if source else None
        self._window: list[Tensor] = []
        self._started, self._progress = time.perf_counter(), None

    def steps(self, first: int, last: int) -> Iterator[int]:
        """The steps that are left, behind a progress bar."""
        self._progress = progress = tqdm(
            range(first, last), initial=first, total=last, desc=self.config.preset
        )
        self._started = time.perf_counter()
        yield from progress

    def finish(self, now: int, last: int, terms: Tensor, others: dict[str, float]) -> None:
        """Note the losses of the step that makes it ``now`` of ``last`` steps, and write what is due.

        Args:
            now: finished steps.
            last: steps of the run.
            terms: this process's part of the mean loss, its terms, and the number of tokens, ``[5]``.
            others: further values, the same in all processes.

        Raises:
            FloatingPointError: a loss, or a weight that a checkpoint would keep, is not finite.
        """
        options = self.config.run
        self._window.append(self._finite(self.accelerator.reduce(terms, "sum"), now))
        saving = now == last or _due(now, options.checkpoint_every, last)
        # Also at checkpoints: a window that spans one would be cut short in a resumed run.
        if saving or _due(now, options.log_every, last):
            self._log(now, others)
        paused = time.perf_counter()
        if _due(now, options.eval_every, last):
            self.evaluate(now)
        if _due(now, options.sample_every, last):
            self.sample(now)
        if saving:
            self._refuse_broken_weights(now)
            self.run.save(now, keep=options.keep_checkpoints)
            self.save_model()
        self._started += time.perf_counter() - paused

    def evaluate(self, now: int) -> None:
        """Evaluate on the held-out sentences, and draw the KL of each dimension; on the main process."""
        if self.held_out is None or not self.accelerator.is_main_process:
            return
        with self.accelerator.autocast():
            found = evaluate(
                self.network, self.held_out, posterior=self.config.objective.posterior,
                num_samples=self.config.run.importance_samples, seed=self.config.run.seed,
                device=self.accelerator.device,
            )  # fmt: skip
        self.run.log(now, found.figures, prefix="valid")
        if len(found.kl):
            draw_dimensions(found, self.run.samples / f"{now:06d}.png")

    def sample(self, now: int) -> None:
        """Write sentences into samples/, and to the trackers; on the main process."""
        if not self.accelerator.is_main_process:
            return
        with self.accelerator.autocast():
            text = self._sentences(now)
        write_atomically(self.run.samples / f"{now:06d}.md", text)
        if self.config.run.trackers:
            self.accelerator.log({"samples": text}, step=now)

    def save_model(self) -> None:
        """Write the network, its tokenisers and the statistics of z into model/; on the main process."""
        if not self.accelerator.is_main_process:
            return
        folder, network = self.run.path / MODEL, self.network
        if isinstance(network, PlainGPT2):
            network.gpt2.save_pretrained(folder)
            self._tokenizers().decoder.save_pretrained(folder / DECODER_FOLDER)
            return
        if self._counted is not None:
            network.latent_statistics = self._statistics(network, self._counted)
        network.save_pretrained(folder)

    @torch.no_grad()
    def _statistics(self, network: Optimus, rows: TokenRows) -> latent.LatentStatistics:
        network.eval()
        with self.accelerator.autocast():
            found = latent.latent_statistics(
                [
                    network.posterior(share.batch.encoder_ids.to(self.accelerator.device))
                    for share in evaluation_batches(rows, batch_size=_EVALUATION_BATCH)
                ]
            )
        network.train()
        return found

    def _tokenizers(self) -> TextTokenizers:
        return TextTokenizers.from_folder(self.run.path / TOKENIZERS)

    def _sentences(self, now: int) -> str:
        length, seed, network = self.config.text.max_tokens - 1, self.config.run.seed, self.network
        if isinstance(network, PlainGPT2):
            rows = _sampled(network, length, derived_seed(seed, 13))
            return f"# Step {now}\n\n## Samples\n\n" + _listed(self._tokenizers().texts(rows))
        drawn = network.sample(_NUM_SHOWN, seed=seed, max_new_tokens=length)
        text = f"# Step {now}\n\n## Samples of the prior, greedy\n\n{_listed(drawn)}"
        if self.held_out is None:
            return text
        shown = self.held_out.texts[:_NUM_SHOWN]
        back = network.reconstruct(shown, max_new_tokens=length)
        text += "\n## Reconstructions\n\n" + markdown_table(
            ["sentence", "from z = mu"], zip(shown, back, strict=True)
        )
        way = interpolation_table(network, shown[0], shown[1], max_new_tokens=length)
        return f"{text}\n## Interpolation\n\nFrom {shown[0]!r} to {shown[1]!r}.\n\n{way}"

    def _log(self, now: int, others: dict[str, float]) -> None:
        means = torch.stack(self._window).mean(0).tolist()
        values = dict(zip(TERMS, means, strict=False)) | others
        seconds = (time.perf_counter() - self._started) / len(self._window)
        values |= {"seconds_per_step": seconds, "tokens_per_second": means[len(TERMS)] / seconds}
        self.run.log(now, values)
        if self._progress is not None:
            self._progress.set_postfix({name: f"{values[name]:.2f}" for name in ("rec", "kl", "beta")})
        self._window, self._started = [], time.perf_counter()

    def _finite(self, terms: Tensor, step: int) -> Tensor:
        terms = terms.cpu()
        figures = dict(zip(TERMS, terms.tolist(), strict=False))
        require_finite(figures, step=step, checkpoints=self.run.checkpoints, advice="Lower --lr")
        return terms

    def _refuse_broken_weights(self, step: int) -> None:
        """Losses are from before the last update, which may have broken what a checkpoint would keep."""
        for name, parameter in self.network.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"weight {name} is not finite after step {step}: stopped; the last good checkpoint is in "
                    f"{self.run.checkpoints}. Lower --lr"
                )


def draw_dimensions(found: Evaluation, path: Path) -> None:
    """A picture of KL and variance of the means of every latent dimension, the largest KL first."""
    pyplot: Any = importlib.import_module("matplotlib.figure")
    figure = pyplot.Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    order = found.kl.argsort(descending=True)
    axes.bar(range(len(order)), found.kl[order].tolist(), color="tab:blue")
    axes.set(xlabel=f"{len(order)} latent dimensions, by KL", ylabel="mean KL (nats)")
    beside = axes.twinx()
    beside.plot(range(len(order)), found.variance[order].clamp(min=1e-8).tolist(), "k.", markersize=4)
    beside.set(ylabel="variance of mu (dots)", yscale="log")
    unfinished = path.with_name(f".{path.name}.partial")
    figure.savefig(unfinished, dpi=100, format="png")
    unfinished.replace(path)


def _sampled(network: PlainGPT2, length: int, seed: int) -> Tensor:
    config, device = network.gpt2.config, next(network.parameters()).device
    start = torch.full((_NUM_SHOWN, 1), int(config.bos_token_id), device=device)  # type: ignore[arg-type]
    training = network.training
    network.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids: Any = network.gpt2.generate(  # type: ignore[misc]
            start, attention_mask=torch.ones_like(start), max_new_tokens=length, do_sample=True, top_k=0
        )
    network.train(training)
    found: Tensor = ids
    return found


def _subset(rows: TokenRows, count: int, seed: int) -> TokenRows:
    chosen = np.random.default_rng([seed, 2]).permutation(len(rows))[:count]
    return rows.select(np.sort(chosen).tolist())


def _listed(texts: list[str]) -> str:
    return "".join(f"- {text}\n" for text in texts)


def _due(step: int, every: int, last: int) -> bool:
    return every > 0 and (step == last or step % every == 0)
