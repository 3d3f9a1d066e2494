"""Speed and memory of the sentence VAE beside plain transformers: ``python -m benchmarks.language_speed``.

Decoding: ours (cached, in batches) against forming the whole text again for every token, against one sentence
at a time, and against a plain GPT-2. Training: a step of ours against one of a BERT and one of a GPT-2.
Memory: the peak and the largest tensor of a long step. Weights are random; no time depends on them. What
is compared takes turns in one process of one thread, and is timed by what it had of the processor.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from benchmarks.memory import peak_mib
from fq.provenance import provenance
from fq.run import write_atomically
from vae_lm import Batch, Optimus, TextTokenizers

PARTS = ("decoding", "training", "memory")
LEAST_GAIN, LEAST_SHARE = 8.0, 0.9
"""What is wanted: of decoding over forming the text again, and of training over the sum of its parts."""


class Sizes(NamedTuple):
    """Networks, and how much goes through them."""

    vocabulary: int = 50_260
    encoder_vocabulary: int = 28_996
    width: int = 768
    layers: int = 12
    heads: int = 12
    latent_dim: int = 32
    sentences: int = 64
    tokens: int = 32
    one_at_a_time: int = 8
    batches: tuple[int, ...] = (4, 32)
    lengths: tuple[int, int] = (32, 64)
    long_batch: int = 32
    long_tokens: int = 128


FULL = Sizes()
QUICK = Sizes(
    vocabulary=5_000, encoder_vocabulary=5_000, width=128, layers=2, heads=4, sentences=16, tokens=12,
    one_at_a_time=4, long_batch=8,
)  # fmt: skip
TINY = QUICK._replace(
    vocabulary=60, encoder_vocabulary=60, width=16, heads=2, sentences=4, tokens=4, one_at_a_time=2,
    batches=(2,), lengths=(4, 8), long_batch=2, long_tokens=16,
)  # fmt: skip


def bert_config(sizes: Sizes) -> BertConfig:
    """BERT base, or a small one of the sizes."""
    return BertConfig(
        vocab_size=sizes.encoder_vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
    )


def gpt2_config(sizes: Sizes) -> GPT2Config:
    """GPT-2 small with three tokens more, or a small one of the sizes."""
    special: dict[str, Any] = {
        f"{name}_token_id": sizes.vocabulary - 3 + i for i, name in enumerate(("pad", "bos", "eos"))
    }
    return GPT2Config(
        vocab_size=sizes.vocabulary,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        **special,
    )


def stand_in_tokenizers(sizes: Sizes) -> TextTokenizers:
    """Tokenisers of the right sizes whose words are numbers: those of the networks need not be at hand."""
    head = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(sizes.encoder_vocabulary - 4))]
    tail = [*map(str, range(sizes.vocabulary - 3)), "<PAD>", "<BOS>", "<EOS>"]
    first, second = (
        Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1]))
        for words in (head, tail)
    )
    return TextTokenizers(
        PreTrainedTokenizerFast(tokenizer_object=first, pad_token="[PAD]", unk_token="[UNK]"),
        PreTrainedTokenizerFast(
            tokenizer_object=second, pad_token="<PAD>", bos_token="<BOS>", eos_token="<EOS>"
        ),
    )


def take_turns(
    calls: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each call in each round, and what each returned in the round before, which warms up."""
    results = {name: call() for name, call in calls.items()}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = clock()
            call()
            spent[name].append(clock() - begin)
    return spent, results


def ratios(above: list[float], below: list[float]) -> dict[str, Any]:
    """Median and extremes of the ratio of two times of the same round."""
    values = [one / other for one, other in zip(above, below, strict=True)]
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


# ---- decoding


@torch.no_grad()
def recompute(model: Optimus, latents: Tensor, *, num_tokens: int) -> Tensor:
    """Greedy decoding that forms the whole text again for every token, logits of its last position alone.

    Args:
        model: in eval mode.
        latents: ``[B, d]``.
        num_tokens: of each text; EOS does not end it.

    Returns:
        int64 ``[B, 1 + num_tokens]``, BOS first.
    """
    config = model.decoder.config
    ids = torch.full((len(latents), 1), int(config.bos_token_id or 0))
    for _ in range(num_tokens):
        logits = model.decoder(ids, latents, use_cache=False, logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def decoding(sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Texts of one length, for nothing ends them, by turns in four ways."""
    torch.manual_seed(0)
    encoder = bert_config(sizes._replace(layers=1))  # no decoding needs it
    model = Optimus.from_backbones(
        encoder, gpt2_config(sizes), latent_dim=sizes.latent_dim, tokenizers=stand_in_tokenizers(sizes)
    ).eval()
    plain = GPT2LMHeadModel(gpt2_config(sizes)).eval()
    latents = torch.randn(sizes.sentences, sizes.latent_dim)
    for decoder in (model.decoder, plain):
        decoder.generation_config.eos_token_id = None  # all texts get as long as they may
    length = {"max_new_tokens": sizes.tokens}
    start = torch.full((sizes.sentences, 1), plain.config.bos_token_id)
    once: Any = plain.generate
    few = latents[: sizes.one_at_a_time]
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: model.decode(latents, **length),
        "formed again": lambda: recompute(model, latents, num_tokens=sizes.tokens),
        "one at a time": lambda: model.decode(few, batch_size=1, **length),
        "plain GPT-2": lambda: once(start, attention_mask=torch.ones_like(start), do_sample=False, **length),
    }
    spent, results = take_turns(calls, rounds)
    ours, again = results["ours"], model.tokenizers.texts(results["formed again"])
    # What a sentence takes alone, times all of them.
    alone = [seconds * sizes.sentences / len(few) for seconds in spent["one at a time"]]
    medians = {
        name: statistics.median(seconds) for name, seconds in (spent | {"one at a time": alone}).items()
    }
    gain = ratios(spent["formed again"], spent["ours"])
    return {
        "sentences": sizes.sentences,
        "tokens": sizes.tokens,
        "rounds": rounds,
        "seconds": medians,
        "tokens_per_second": {
            name: sizes.sentences * sizes.tokens / seconds for name, seconds in medians.items()
        },
        "gain over forming again": gain,
        "gain over one at a time": ratios(alone, spent["ours"]),
        "price of the latent": ratios(spent["ours"], spent["plain GPT-2"]),
        # Rounding may turn a tie of random weights; a wrong cache would leave next to nothing equal.
        "equal texts": sum(one == other for one, other in zip(ours, again, strict=True)) / len(ours),
        "met": gain["median"] >= LEAST_GAIN,
    }


# ---- training


def random_batch(sizes: Sizes, batch: int, *, shortest: int, longest: int) -> Batch:
    """Rows of random tokens, of ``shortest`` to ``longest`` of them, special ones included, padded.

    Both networks get rows of the same lengths, and the longest is there.
    """
    numbers = torch.Generator().manual_seed(batch)
    lengths = torch.randint(shortest, longest + 1, (batch, 1), generator=numbers)
    lengths[0] = longest
    place = torch.arange(longest)
    most = min(sizes.encoder_vocabulary, sizes.vocabulary - 3)
    ids = torch.randint(4, most, (batch, longest), generator=numbers)
    head = ids.where(place < lengths, 0)
    special = sizes.vocabulary - 3
    tail = ids.where(place < lengths - 1, special + 2).where(place < lengths, special)
    tail[:, 0] = special + 1
    return Batch(head, tail)


class Trainer:
    """A model, its loss on a batch, and AdamW."""

    def __init__(self, model: Any, loss: Callable[[Any, Batch], Tensor]) -> None:
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    def step(self, batch: Batch) -> None:
        """Forward, backward and optimiser."""
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        self.optimizer.step()


def our_loss(model: Optimus, batch: Batch) -> Tensor:
    """The VAE's, as in training."""
    return model.loss(batch, beta=0.5, free_bits=0.5).loss.mean()


def bert_loss(model: BertModel, batch: Batch) -> Tensor:
    """Something of the pooled feature: what is timed is the way there and back."""
    pooled = model(input_ids=batch.encoder_ids, attention_mask=(batch.encoder_ids != 0).long()).pooler_output
    return pooled.square().mean()


def gpt2_loss(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    """Transformers' own; right padding needs no mask, so that it is as fast as it can be."""
    ids = batch.decoder_ids
    pad: Any = model.config.pad_token_id
    labels = ids.masked_fill(ids == pad, -100)
    loss: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def our_model(sizes: Sizes) -> Optimus:
    """Both networks, of random weights."""
    torch.manual_seed(0)
    return Optimus.from_backbones(bert_config(sizes), gpt2_config(sizes), latent_dim=sizes.latent_dim)


def training(sizes: Sizes, *, rounds: int) -> dict[str, Any]:
    """Steps of ours, of a BERT and of a GPT-2 by turns."""
    trainers = {
        "ours": Trainer(our_model(sizes), our_loss),
        "BERT": Trainer(BertModel(bert_config(sizes)), bert_loss),
        "GPT-2": Trainer(GPT2LMHeadModel(gpt2_config(sizes)), gpt2_loss),
    }
    found: dict[str, Any] = {"lengths": list(sizes.lengths), "rounds": rounds, "batches": {}}
    shortest, longest = sizes.lengths
    for size in sizes.batches:
        batch = random_batch(sizes, size, shortest=shortest, longest=longest)
        calls: dict[str, Callable[[], Any]] = {
            name: functools.partial(one.step, batch) for name, one in trainers.items()
        }
        spent, _ = take_turns(calls, rounds)
        parts = [one + other for one, other in zip(spent["BERT"], spent["GPT-2"], strict=True)]
        tokens = int((batch.decoder_ids != sizes.vocabulary - 3).sum())
        share = ratios(parts, spent["ours"])
        found["batches"][str(size)] = {
            "tokens": tokens,
            "padded": batch.decoder_ids.numel(),
            "seconds": {name: statistics.median(seconds) for name, seconds in spent.items()},
            "tokens_per_second": tokens / statistics.median(spent["ours"]),
            "share": share,
            "met": share["median"] >= LEAST_SHARE,
        }
    return found


# ---- memory


class Largest(TorchDispatchMode):
    """Elements and name of the largest tensor that any operation gives, forward or backward.

    Parameters and what is laid out like one (gradients, moments) are not activations: their sizes are passed
    over, since a model has them at any batch.
    """

    def __init__(self, passed_over: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.passed_over, self.elements, self.name = passed_over, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what was asked and look at the result."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and tuple(leaf.shape) not in self.passed_over:
                if leaf.numel() > self.elements:
                    self.elements, self.name = leaf.numel(), f"{func} {list(leaf.shape)}"
        return result


def joined_loss(model: torch.nn.ModuleDict, batch: Batch) -> Tensor:
    """A BERT and a GPT-2 side by side, whose head gives all logits at once."""
    return bert_loss(model["bert"], batch) + gpt2_loss(model["gpt2"], batch)  # type: ignore[arg-type]


def long_step(sizes: Sizes, kind: str) -> dict[str, Any]:
    """One long step in this process; the peak is that of the process so far, libraries and weights included.

    Args:
        sizes: of networks, batch and rows.
        kind: "ours", or "plain": a BERT and a GPT-2.
    """
    if kind == "ours":
        trainer = Trainer(our_model(sizes), our_loss)
    else:
        parts = {"bert": BertModel(bert_config(sizes)), "gpt2": GPT2LMHeadModel(gpt2_config(sizes))}
        trainer = Trainer(torch.nn.ModuleDict(parts), joined_loss)
    batch = random_batch(sizes, sizes.long_batch, shortest=sizes.long_tokens, longest=sizes.long_tokens)
    parameters = list(trainer.model.parameters())
    shapes = {tuple(weight.shape) for weight in parameters} | {
        tuple(weight.shape)[::-1] for weight in parameters
    }
    with Largest(shapes) as largest:
        trainer.step(batch)
    return {"peak_mib": peak_mib(), "largest": largest.elements, "largest_is": largest.name}


def memory(sizes: Sizes) -> dict[str, Any]:
    """A long step of each kind in a fresh process."""
    found: dict[str, Any] = {"batch": sizes.long_batch, "tokens": sizes.long_tokens}
    for kind in ("ours", "plain"):
        given = json.dumps(sizes._asdict())
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.language_speed", "--long-step", kind, given],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    logits = sizes.long_batch * sizes.long_tokens * sizes.vocabulary
    found["logits"] = logits
    found["met"] = found["ours"]["largest"] < logits / 4
    return found


# ---- on a GPU


def flop_of_a_step(sizes: Sizes, batch: int, tokens: int) -> float:
    """Operations of a training step on full rows: products with weights, attention; three times forward."""
    width, layers = sizes.width, sizes.layers
    row = 2 * 12 * layers * width**2 + 4 * layers * tokens * width  # both networks are of that shape
    head = 2 * sizes.vocabulary * width
    return 3.0 * batch * (tokens * row + (tokens - 1) * (row + head))


def on_gpu(
    sizes: Sizes, *, latent_dim: int, batch: int, tokens: int, steps: int, device: torch.device, roof: float
) -> dict[str, Any]:
    """Training in bfloat16 (autocast, weights in float32): rate, share of the peak, memory.

    Args:
        sizes: of the networks.
        latent_dim: size of z.
        batch: rows, all of one length.
        tokens: of a row.
        steps: timed ones, after three that warm up.
        device: to train on.
        roof: FLOP/s of the device in bfloat16.

    Returns:
        ``{"tokens_per_second", "step_ms", "percent_of_roof", "peak_mib", ...}``; no memory on a CPU.
    """

    def loss(model: Optimus, rows: Batch) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return our_loss(model, rows)

    cuda = device.type == "cuda"
    model: torch.nn.Module = our_model(sizes._replace(latent_dim=latent_dim))
    trainer = Trainer(model.to(device), loss)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rows = Batch(*(ids.to(device) for ids in random_batch(sizes, batch, shortest=tokens, longest=tokens)))

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(3):
        trainer.step(rows)
    spent, _ = take_turns({"step": lambda: trainer.step(rows)}, steps, clock)
    seconds = statistics.median(spent["step"])
    found = {
        "latent_dim": latent_dim,
        "batch": batch,
        "tokens": tokens,
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "step_ms": seconds * 1e3,
        "tokens_per_second": batch * tokens / seconds,
        "percent_of_roof": 100 * flop_of_a_step(sizes, batch, tokens) / seconds / roof,
    }
    if cuda:
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


# ---- report


def markdown(results: dict[str, Any]) -> str:
    """The figures as Markdown."""
    text = ["# Speed and memory of the sentence VAE", ""]
    sections = {"decoding": _decoding_lines, "training": _training_lines, "memory": _memory_lines}
    for name in [name for name in sections if name in results]:
        source = results[name]["provenance"]
        versions = source["versions"]
        text += [*sections[name](results[name]), ""]
        text.append(
            f"`{source['command']}`, {source['device_name']}, one thread, torch {versions['torch']}, "
            f"transformers {versions['transformers']}.\n"
        )
    return "\n".join(text)


def _spread(ratio: dict[str, float], sign: str = "x") -> str:
    return f"{ratio['median']:.2f}{sign} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _decoding_lines(found: dict[str, Any]) -> list[str]:
    rows = [
        f"| {name} | {seconds:.2f} | {found['tokens_per_second'][name]:.0f} |"
        for name, seconds in found["seconds"].items()
    ]
    again, alone, price = (
        _spread(found[name])
        for name in ("gain over forming again", "gain over one at a time", "price of the latent")
    )
    return [
        f"## Decoding {found['sentences']} sentences of {found['tokens']} tokens",
        "",
        "| way | seconds | tokens/s |",
        "|---|---|---|",
        *rows,
        "",
        f"Ours against forming the text again for every token, same batch: {again}, at least "
        f"{LEAST_GAIN:.0f}x wanted. Against one sentence at a time: {alone}. Time over that of a plain "
        f"GPT-2, which has no latent: {price}. {found['equal texts']:.0%} of the texts are equal both ways. "
        f"Medians of {found['rounds']} rounds, extremes in brackets.",
    ]


def _training_lines(found: dict[str, Any]) -> list[str]:
    rows = []
    for size, row in found["batches"].items():
        ours, bert, gpt2 = (f"{row['seconds'][name]:.2f}" for name in ("ours", "BERT", "GPT-2"))
        rows.append(
            f"| {size} | {row['tokens']} ({row['padded']}) | {ours} | {bert} | {gpt2} | "
            f"{row['tokens_per_second']:.0f} | {_spread(row['share'], '')} |"
        )
    shortest, longest = found["lengths"]
    return [
        f"## Training step, rows of {shortest} to {longest} tokens",
        "",
        "| batch | tokens (padded) | ours, s | BERT, s | GPT-2, s | tokens/s | share of 1 / (BERT + GPT-2) |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Forward, backward and AdamW; BERT through its pooler, without a head; GPT-2 with transformers' "
        f"loss. At least {LEAST_SHARE} is wanted. Medians of {found['rounds']} rounds, extremes in brackets.",
    ]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    rows = []
    for kind in ("ours", "plain"):
        row = found[kind]
        share = row["largest"] / found["logits"]
        rows.append(f"| {kind} | {row['peak_mib']:.0f} | {row['largest']:,} | {share:.3f} |")
    return [
        f"## Memory of a step of {found['batch']} rows of {found['tokens']} tokens",
        "",
        "| model | peak of the process, MiB | largest tensor but weights, elements | share of all logits |",
        "|---|---|---|---|",
        *rows,
        "",
        "Plain is a BERT and a GPT-2 with transformers' loss. A share below 0.25 is wanted.",
    ]


def run(parts: list[str], sizes: Sizes, out: Path, *, rounds: int) -> dict[str, Any]:
    """Measure parts, keep what is in the file of the others, and write JSON and Markdown after each.

    Args:
        parts: of `PARTS`.
        sizes: of networks and batches.
        out: the JSON; the Markdown goes beside it.
        rounds: timed ones.
    """
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in parts:
        if name == "memory":
            found = memory(sizes)
        else:
            found = (decoding if name == "decoding" else training)(sizes, rounds=rounds)
        source = provenance(0)
        source["versions"]["transformers"] = transformers.__version__
        results[name] = found | {"sizes": sizes._asdict(), "provenance": source}
        write_atomically(out, json.dumps(results, indent=1) + "\n")
        write_atomically(out.with_suffix(".md"), markdown(results))
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_speed", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small networks: does everything run?")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="JSON (default: benchmarks/results/language_speed.json)")
    parser.add_argument("--long-step", nargs=2, metavar=("KIND", "SIZES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.long_step:
        kind, given = options.long_step
        print(json.dumps(long_step(Sizes(**json.loads(given)), kind)))
        return
    usual = Path("language_speed_quick.json" if options.quick else "benchmarks/results/language_speed.json")
    out = options.out or usual
    run(options.parts, QUICK if options.quick else FULL, out, rounds=options.rounds)
    print(out.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
