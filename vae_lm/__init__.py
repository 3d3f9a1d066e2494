"""Sentence VAEs: Optimus (BERT encoder, GPT-2 decoder) with a latent space to sample, mix and steer."""

from vae_lm.decoder import LatentGPT2, LatentGPT2Config
from vae_lm.latent import LatentStatistics
from vae_lm.model import Optimus, OptimusConfig, Posterior, VAELoss
from vae_lm.tokenizers import Batch, TextTokenizers

__all__ = [
    "Batch",
    "LatentGPT2",
    "LatentGPT2Config",
    "LatentStatistics",
    "Optimus",
    "OptimusConfig",
    "Posterior",
    "TextTokenizers",
    "VAELoss",
]
