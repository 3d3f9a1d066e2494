"""Analogies with a known truth: ``python -m benchmarks.grammar RUN/model``.

For 1,000 items of `vae_lm.grammar` a model says D from A, B and C: greedy decoding of mu_C + mu_B - mu_A,
right if it is the very string. Beside it stand edits by the mean difference of two values over the training
sentences, and controls that must fail or must not.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.compare import portable
from fq.provenance import provenance
from fq.run import write_atomically
from vae_lm import Optimus
from vae_lm.grammar import FACTORS, AnalogyItem, analogy_items, factors_of, splits

SEED, NUM_ITEMS = 20_200, 1_000
"""Fixed before any model was asked."""

LEAST_ANALOGY, LEAST_SCALE_0, MOST_SHUFFLED = 0.6, 0.9, 0.1

_LONGEST = 24  # tokens of an answer; the longest sentence has 13


class Answers(NamedTuple):
    """What was said to each item, and what should have been said."""

    name: str
    said: list[str]
    expected: list[str]

    @property
    def right(self) -> list[bool]:
        return [one == other for one, other in zip(self.said, self.expected, strict=True)]


def answer(model: Optimus, items: Sequence[AnalogyItem], train: Sequence[str]) -> list[Answers]:
    """Analogies, edits and controls.

    Args:
        model: trained on ``train``.
        items: whose C and D are not in ``train``.
        train: sentences for the mean of each value and for the nearest sentence.

    Returns:
        Answers of each way, the analogies first.
    """
    _, _, b_texts, c_texts, d_texts = map(list, zip(*items, strict=True))
    texts = [text for item in items for text in item[1:4]]
    a, b, c = model.encode(texts).mu.unflatten(0, (len(items), 3)).unbind(1)
    known = model.encode(train).mu
    order = list(range(len(items)))
    random.Random(SEED).shuffle(order)

    def said(latents: Tensor) -> list[str]:
        return model.decode(latents, max_new_tokens=min(_LONGEST, model.decoder.config.max_tokens - 1))

    nearest = torch.cdist(c + b - a, known).argmin(1).tolist()
    moved = value_differences(known, train, items)
    return [
        Answers("analogy", said(c + b - a), d_texts),
        Answers("edit by mean difference", said(c + moved), d_texts),
        Answers("copy B", b_texts, d_texts),
        Answers("copy C", c_texts, d_texts),
        Answers("scale 0 (should say C)", said(c), c_texts),
        Answers("shuffled pairs", said(c + (b - a)[order]), d_texts),
        Answers("nearest training sentence", [train[index] for index in nearest], d_texts),
    ]


def value_differences(known: Tensor, train: Sequence[str], items: Sequence[AnalogyItem]) -> Tensor:
    """From C's value to D's: differences of the mean latents of training sentences with them.

    Args:
        known: ``[N, d]``, latents of the training sentences.
        train: the N sentences.
        items: n items.

    Returns:
        ``[n, d]``.
    """
    told = [factors_of(text) for text in train]
    means = {}
    for name, values in FACTORS.items():
        for value in values:
            chosen = [index for index, factors in enumerate(told) if getattr(factors, name) == value]
            means[name, value] = known[chosen].mean(0)

    def mean(text: str, name: str) -> Tensor:
        return means[name, getattr(factors_of(text), name)]

    return torch.stack([mean(item.d, item.factor) - mean(item.c, item.factor) for item in items])


def summarise(answers: Sequence[Answers], items: Sequence[AnalogyItem]) -> dict[str, Any]:
    """Share of right answers of each way, overall and by factor, and what is wrong in the analogies.

    Args:
        answers: as of `answer`.
        items: that they answer.
    """
    rates: dict[str, dict[str, float]] = {}
    for each in answers:
        rates[each.name] = {"all": sum(each.right) / len(items)}
        for name in FACTORS:
            own = [right for right, item in zip(each.right, items, strict=True) if item.factor == name]
            if own:
                rates[each.name][name] = sum(own) / len(own)
    analogy = rates["analogy"]
    lowest = min((name for name in FACTORS if name in analogy), key=analogy.__getitem__)
    passed = (
        analogy["all"] >= LEAST_ANALOGY
        and rates["scale 0 (should say C)"]["all"] >= LEAST_SCALE_0
        and rates["shuffled pairs"]["all"] <= MOST_SHUFFLED
    )
    return {
        "num_items": len(items),
        "rates": rates,
        "lowest_factor": lowest,
        "wrong_analogies": _mistakes(answers[0], items),
        "passed": passed,
    }


def _mistakes(analogies: Answers, items: Sequence[AnalogyItem]) -> dict[str, int]:
    """Wrong answers by what is wrong: the factor to change, another one, several, or no sentence at all."""
    found = Counter[str]()
    for said, item in zip(analogies.said, items, strict=True):
        if said == item.d:
            continue
        try:
            pairs = zip(FACTORS, factors_of(said), factors_of(item.d), strict=True)
        except ValueError:
            found["not of the grammar"] += 1
            continue
        wrong = [name for name, one, other in pairs if one != other]
        kind = "the factor to change" if wrong == [item.factor] else "another factor"
        found["several factors" if len(wrong) > 1 else kind] += 1
    return dict(found)


def markdown(record: dict[str, Any]) -> str:
    """The results as tables.

    Args:
        record: as `main` writes it.
    """
    rates, names = record["rates"], list(FACTORS)
    lines = [
        "# Analogies of the grammar",
        "",
        f"{record['num_items']} items of seed {record['seed']}; {record['train_sentences']:,} of "
        f"{record['combinations']:,} combinations were trained on, C and D are not among them. Exact "
        f"strings, greedy decoding of mu_C + mu_B - mu_A, {record['parameters']:,} parameters, latent of "
        f"{record['latent_dim']}. Lowest factor: {record['lowest_factor']} "
        f"({100 * rates['analogy'][record['lowest_factor']]:.1f} %).",
        "",
        "| % right | all | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, rate in rates.items():
        cells = [f"{100 * rate[key]:.1f}" if key in rate else "" for key in ("all", *names)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    mistakes = ", ".join(f"{count} {kind}" for kind, count in record["wrong_analogies"].items())
    lines += ["", f"Wrong analogies: {mistakes or 'none'}.", "", "## The first items", ""]
    lines += ["| A → B | C | said | |", "|---|---|---|---|"]
    for row in record["examples"]:
        mark = "✓" if row["said"] == row["d"] else f"✗ {row['d']}"
        lines.append(f"| {row['a']} → {row['b']} | {row['c']} | {row['said']} | {mark} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the items with a model and write JSON and Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grammar", description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("--items", type=int, default=NUM_ITEMS)
    parser.add_argument("--split-seed", type=int, default=0, help="of the sentences that it was trained on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grammar"), help="without suffix")
    options = parser.parse_args(arguments)
    model = Optimus.from_pretrained(options.model)
    given = provenance(SEED)
    items = analogy_items(SEED, options.items, split_seed=options.split_seed)
    sets = splits(options.split_seed)
    begin = time.perf_counter()
    answers = answer(model, items, sets["train"])
    examples = [
        item._asdict() | {"said": text} for item, text in zip(items[:20], answers[0].said, strict=False)
    ]
    record = {
        "seed": SEED,
        "train_sentences": len(sets["train"]),
        "combinations": sum(map(len, sets.values())),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "latent_dim": model.config.latent_dim,
        **summarise(answers, items),
        "seconds": round(time.perf_counter() - begin, 1),
        "examples": examples,
        "provenance": given | {"command": portable(given["command"])},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        options.out.with_suffix(".json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    )
    write_atomically(options.out.with_suffix(".md"), markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
