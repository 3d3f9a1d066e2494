"""Named settings of complete runs, as Python values."""

from __future__ import annotations

from dataclasses import replace

from vae_lm.configs import (
    NetworkConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    Training,
)
from vae_lm.grammar import VOCAB_SIZE

# With 0.02 and the pooler, what a narrow network says of a sentence is lost in the noise of z for long.
_SMALL_NETWORKS = NetworkConfig(
    width=128, encoder_layers=2, decoder_layers=2, num_heads=4,
    pooling="mean", initializer_range=0.05, head_range=0.5,
)  # fmt: skip

SMALL = Training(
    preset="small",
    text=TextConfig(max_words=0, max_tokens=64),
    network=_SMALL_NETWORKS,
    objective=ObjectiveConfig(),
    optim=OptimConfig(batch_size=64, lr=1e-3, warmup_steps=100),
    run=RunConfig(epochs=10),
)
_LARGE_NETWORKS = NetworkConfig(encoder="bert-base-cased", decoder="gpt2")
_WIKIPEDIA = Training(
    preset="wikipedia",
    text=TextConfig(
        data="data/wikipedia", held_out=0.0, max_words=0, max_tokens=256, too_long="refuse", stream=True
    ),
    network=_LARGE_NETWORKS,
    objective=ObjectiveConfig(cycles=10, free_bits=1.0),
    optim=OptimConfig(batch_size=128),
    run=RunConfig(steps=508_523, mixed_precision="bf16", checkpoint_every=5000, eval_every=5000,
                  sample_every=5000),
)  # fmt: skip


def _fine_tuning(name: str, *, words: int, batch_size: int, labelled: bool = False) -> Training:
    """The paper's language modelling: an epoch from the pre-trained VAE (--init), one cycle of the weight."""
    return Training(
        preset=name,
        text=TextConfig(
            data=f"data/{name}", max_words=words, max_tokens=min(512, 2 * words), labelled=labelled
        ),
        network=_LARGE_NETWORKS,
        objective=ObjectiveConfig(),
        optim=OptimConfig(batch_size=batch_size),
        run=RunConfig(),
    )


PRESETS: dict[str, tuple[str, Training]] = {
    "small": (
        "Any text file through small networks with a vocabulary of their own: minutes on two cores.",
        SMALL,
    ),
    "grammar": (
        "The embedded sentences, whose factors are known, through small networks: minutes on two cores.",
        replace(
            SMALL,
            preset="grammar",
            text=replace(SMALL.text, data="grammar", max_tokens=32),
            network=replace(
                _SMALL_NETWORKS, width=64, vocab_size=VOCAB_SIZE, initializer_range=0.08, dropout=0.0
            ),
            objective=ObjectiveConfig(beta=0.15, zero_share=0.4, rise_share=0.2, free_bits=0.0),
            optim=OptimConfig(batch_size=32, lr=1e-3),
            run=RunConfig(steps=2500),
        ),
    ),
    "overfit": (
        "Two hundred sentences by heart through a plain auto-encoder: does the latent carry a sentence?",
        replace(
            SMALL,
            preset="overfit",
            text=replace(SMALL.text, limit=200, held_out=0.0),
            network=replace(_SMALL_NETWORKS, vocab_size=1000, dropout=0.0),
            objective=ObjectiveConfig(posterior="mean", beta=0.0, cycles=0, free_bits=0.0),
            optim=OptimConfig(batch_size=50, lr=1e-3, warmup_steps=50),
            run=RunConfig(steps=600, sample_every=200, eval_every=200, checkpoint_every=200, num_eval=200),
        ),
    ),
    "wikipedia": (
        "Pre-training on the sentences of Wikipedia: BERT base and GPT-2, ten cycles, 65 M sentences.",
        _WIKIPEDIA,
    ),
    "ptb": (
        "Penn Treebank; start from a pre-trained VAE by --init.",
        _fine_tuning("ptb", words=100, batch_size=5),
    ),
    "snli": (
        "Captions of SNLI; start from a pre-trained VAE by --init.",
        _fine_tuning("snli", words=100, batch_size=10),
    ),
    "yahoo": (
        "Yahoo answers; start from a pre-trained VAE by --init.",
        _fine_tuning("yahoo", words=300, batch_size=5),
    ),
    "yelp": (
        "Yelp reviews (label<TAB>text); start from a pre-trained VAE by --init.",
        _fine_tuning("yelp", words=300, batch_size=5, labelled=True),
    ),
}
