"""Optimus: a variational auto-encoder of sentences, from a BERT-like encoder and a GPT-2 decoder.

Li et al., "Optimus: Organizing Sentences via Pre-trained Modeling of a Latent Space", EMNLP 2020. A sentence
goes through the encoder into a normal posterior over z; z goes into the decoder (see `vae_lm.decoder`), which
says the sentence again. A model with its tokenisers lives in one folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from vae_lm import latent
from vae_lm.cross_entropy import token_nll
from vae_lm.decoder import LatentGPT2, LatentGPT2Config
from vae_lm.latent import LatentStatistics, PosteriorMode
from vae_lm.tokenizers import DECODER_FOLDER, ENCODER_FOLDER, Batch, TextTokenizers, pad_rows

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")

POOLINGS = ("pooler", "first", "mean")

STATISTICS = "latent_statistics.safetensors"

_OWN_FILES = (STATISTICS, f"{ENCODER_FOLDER}/*", f"{DECODER_FOLDER}/*", "model*.safetensors*")

_MAX_SPARE_ROWS = 128
"""Encoders pad their embeddings to round numbers; that many rows without a token: another vocabulary."""


class Posterior(NamedTuple):
    """Means and log-variances of q(z | x), ``[B, latent_dim]`` each."""

    mu: Tensor
    logvar: Tensor


class VAELoss(NamedTuple):
    """Loss and its parts for each sentence, ``[B]`` each; average ``loss`` and call ``backward``.

    ``reconstruction`` sums over the predicted tokens; ``kl`` is the plain KL, ``kl_counted`` what is left of
    it above the threshold; ``num_tokens`` counts the decoder's tokens, BOS and EOS included.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    kl_counted: Tensor
    num_tokens: Tensor


class OptimusConfig(PreTrainedConfig):
    """Configuration of both networks and of how they are joined.

    Args:
        encoder: configuration of any encoder that ``AutoModel`` knows.
        decoder: a `LatentGPT2Config`, which holds the size of the latent and its injection.
        pooling: feature of a sentence: "pooler" (BERT's own, the original's), "first" token, or "mean" over
            tokens.
        initializer_range: standard deviation of a new posterior head.

    Raises:
        ValueError: a part is missing, or the pooling is unknown.
    """

    model_type = "optimus"
    # As transformers declares it: what the parts of a stored configuration are read with.
    sub_configs = {"encoder": AutoConfig, "decoder": LatentGPT2Config}  # noqa: RUF012

    encoder: dict[str, Any] | PreTrainedConfig | None = None
    decoder: dict[str, Any] | LatentGPT2Config | None = None
    pooling: str = "pooler"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder, dict):
            self.encoder = AutoConfig.for_model(**self.encoder)
        if isinstance(self.decoder, dict):
            self.decoder = LatentGPT2Config(**self.decoder)
        super().__post_init__(**kwargs)
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r} but must be one of {', '.join(POOLINGS)}")

    @property
    def latent_dim(self) -> int:
        """Size of z."""
        assert isinstance(self.decoder, LatentGPT2Config)
        return self.decoder.latent_dim


class Optimus(PreTrainedModel):
    """A sentence VAE.

    Texts in, texts out: `encode`, `decode`, `reconstruct`, `sample`, `interpolate`, `analogy`; these run
    without gradients and with dropout off. For training, call the model (or `loss`) on a `Batch`.

    Args:
        config: of both networks.
        tokenizers: needed by whatever takes or returns texts.

    Raises:
        ValueError: networks, tokenisers or pooling do not fit together.
    """

    config_class = OptimusConfig
    config: OptimusConfig
    main_input_name = "encoder_ids"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: OptimusConfig, tokenizers: TextTokenizers | None = None) -> None:
        if not isinstance(config.encoder, PreTrainedConfig) or not isinstance(
            config.decoder, LatentGPT2Config
        ):
            raise ValueError("the configuration lacks a network: give OptimusConfig an encoder and a decoder")
        special = [getattr(config.decoder, name) for name in _SPECIAL_IDS]
        if None in special or len(set(special)) < len(special):
            raise ValueError(
                f"the decoder's pad, bos and eos tokens are {special} but must be three different ones: set "
                "pad_token_id, bos_token_id and eos_token_id of its configuration"
            )
        super().__init__(config)
        self._pad = int(special[0])
        self.encoder = AutoModel.from_config(config.encoder)
        if config.pooling != "pooler" and hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # unused parameters would stop distributed training
        if config.pooling == "pooler" and getattr(self.encoder, "pooler", None) is None:
            kind = config.encoder.model_type
            raise ValueError(f"a {kind} encoder has no pooler: choose pooling 'first' or 'mean'")
        # mu and log sigma^2 in one layer, without a bias (as in the original).
        self.posterior_head = nn.Linear(config.encoder.hidden_size, 2 * config.latent_dim, bias=False)
        self.decoder = LatentGPT2(config.decoder)
        self._tokenizers: TextTokenizers | None = None
        self.latent_statistics: LatentStatistics | None = None
        """Moments of z over a corpus, if somebody set them; saved with the model."""
        self.post_init()
        if tokenizers is not None:
            self.tokenizers = tokenizers

    @classmethod
    def from_backbones(
        cls,
        encoder: str | Path | PreTrainedConfig,
        decoder: str | Path | GPT2Config,
        *,
        latent_dim: int = 32,
        injection: str = "both",
        num_memory_slots: int = 1,
        pooling: str = "pooler",
        initializer_range: float = 0.02,
        tokenizers: TextTokenizers | None = None,
    ) -> Optimus:
        """A new VAE around two language models.

        What is new beside the posterior head (injection, embeddings of added tokens, networks from a
        configuration) is drawn from N(0, s^2) with the s of its own network's configuration, usually 0.02.

        Args:
            encoder: folder or Hub name of a pre-trained encoder, or a configuration for random weights.
            decoder: the same for a GPT-2.
            latent_dim: size of z.
            injection: "both", "memory" or "embedding".
            num_memory_slots: positions of the memory in each layer.
            pooling: see `OptimusConfig`.
            initializer_range: standard deviation of the posterior head.
            tokenizers: by default those beside two pre-trained networks; none for configurations.

        Raises:
            ValueError: an option or the tokenisers do not fit the networks.
            FileNotFoundError: a folder or name leads to no tokeniser.
        """
        if tokenizers is None and isinstance(encoder, str | Path) and isinstance(decoder, str | Path):
            tokenizers = TextTokenizers.load(encoder, decoder)
        head, head_config = None, encoder
        if isinstance(head_config, str | Path):
            head = AutoModel.from_pretrained(str(head_config))
            head_config = head.config
        tail, tail_config = None, decoder
        if isinstance(tail_config, str | Path):
            tail = GPT2LMHeadModel.from_pretrained(str(tail_config))
            if tokenizers is not None and len(tokenizers.decoder) > tail.config.vocab_size:
                # Not the mean of the old rows, transformers' default: the original draws new ones afresh.
                tail.resize_token_embeddings(len(tokenizers.decoder), mean_resizing=False)
            tail_config = tail.config
        options = tail_config.to_dict() | {"model_type": "latent_gpt2", "latent_dim": latent_dim}
        options |= {"injection": injection, "num_memory_slots": num_memory_slots}
        if tokenizers is not None:
            options |= {name: getattr(tokenizers.decoder, name) for name in _SPECIAL_IDS}
        config = OptimusConfig(
            encoder=head_config, decoder=LatentGPT2Config(**options), pooling=pooling,
            initializer_range=initializer_range,
        )  # fmt: skip
        model = cls(config, tokenizers)
        for part, trained in ((model.encoder, head), (model.decoder, tail)):
            if trained is not None:
                state = trained.state_dict()
                # A pooler that is not used is gone, and the projections are new; all else has its weights.
                part.load_state_dict({name: state.get(name, own) for name, own in part.state_dict().items()})
        return model

    # ---- tokenisers

    @property
    def tokenizers(self) -> TextTokenizers:
        """Both tokenisers; setting them checks that they fit.

        Raises:
            ValueError: the model has none, or those set do not fit.
        """
        if self._tokenizers is None:
            raise ValueError(
                "the model has no tokenisers and knows token ids only: set model.tokenizers first"
            )
        return self._tokenizers

    @tokenizers.setter
    def tokenizers(self, tokenizers: TextTokenizers) -> None:
        encoder, decoder = self.encoder.config, self.decoder.config
        spare = encoder.vocab_size - len(tokenizers.encoder)
        if not 0 <= spare < _MAX_SPARE_ROWS or tokenizers.encoder.pad_token_id != (encoder.pad_token_id or 0):
            raise ValueError(
                f"the encoder's tokeniser has {len(tokenizers.encoder)} tokens and pads with "
                f"{tokenizers.encoder.pad_token_id}, but the encoder was made for {encoder.vocab_size} and "
                f"{encoder.pad_token_id}: give the tokeniser that it was trained with"
            )
        theirs = [len(tokenizers.decoder), *(getattr(tokenizers.decoder, name) for name in _SPECIAL_IDS)]
        ours = [decoder.vocab_size, *(getattr(decoder, name) for name in _SPECIAL_IDS)]
        if theirs != ours:
            raise ValueError(
                f"the decoder's tokeniser has [size, pad, bos, eos] {theirs} but the decoder was made for "
                f"{ours}: give the tokeniser that it was trained with"
            )
        self._tokenizers = tokenizers

    def _encoder_ids(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self.tokenizers.encoder_rows(texts)
        positions = getattr(self.encoder.config, "max_position_embeddings", None) or 10**9
        _check_lengths(rows, texts, min(positions, self.tokenizers.encoder.model_max_length), "encoder")
        return rows

    def tokenize(self, texts: Sequence[str]) -> Batch:
        """Token ids of texts for both networks, on the model's device.

        Raises:
            ValueError: a text is too long for one of the networks.
        """
        tail = self.tokenizers.decoder_rows(texts)
        _check_lengths(tail, texts, self.decoder.config.max_tokens, "decoder")
        head = pad_rows(self._encoder_ids(texts), self.tokenizers.encoder.pad_token_id)
        return Batch(
            head.to(self.device), pad_rows(tail, self.tokenizers.decoder.pad_token_id).to(self.device)
        )

    # ---- the networks on token ids, with gradients

    def posterior(self, encoder_ids: Tensor, *, attention_mask: Tensor | None = None) -> Posterior:
        """Posterior of each sentence.

        Args:
            encoder_ids: int64 ``[B, T0]``.
            attention_mask: ``[B, T0]``, 0 where not to look; default: everywhere but at padding. (The
                original's evaluation looks at padding too; a mask of ones repeats that.)

        Returns:
            mu and logvar ``[B, latent_dim]``, float32 or wider.
        """
        if attention_mask is None:
            attention_mask = (encoder_ids != (self.encoder.config.pad_token_id or 0)).long()
        output = self.encoder(input_ids=encoder_ids, attention_mask=attention_mask)
        if self.config.pooling == "pooler":
            feature = output.pooler_output
        elif self.config.pooling == "first":
            feature = output.last_hidden_state[:, 0]
        else:
            weights = attention_mask[..., None].to(output.last_hidden_state.dtype)
            feature = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
        moments = self.posterior_head(feature)
        # exp(logvar) of a half-precision number would be a poor variance.
        return Posterior(*moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=-1))

    def log_likelihood(self, decoder_ids: Tensor, latents: Tensor) -> Tensor:
        """log p(x | z) of sentences, summed over predicted tokens (all but BOS and padding).

        Args:
            decoder_ids: int64 ``[B, T1]``, BOS ... EOS, padded on the right.
            latents: ``[B, latent_dim]``, or ``[B, S, latent_dim]`` for S latents each.

        Returns:
            ``[B]`` or ``[B, S]``.

        Raises:
            ValueError: a row is too short or too long, or the latents do not fit.
        """
        if latents.ndim == 3:
            count = latents.shape[1]
            rows = repeat(decoder_ids, "b t -> (b s) t", s=count)
            return rearrange(
                self.log_likelihood(rows, rearrange(latents, "b s d -> (b s) d")), "(b s) -> b s", s=count
            )
        return -self._nll(decoder_ids, latents)

    def _nll(self, decoder_ids: Tensor, latents: Tensor, *, row_scale: Tensor | None = None) -> Tensor:
        """Summed negative log-likelihood ``[B]``, each sentence multiplied by its ``row_scale`` ``[B]``."""
        if decoder_ids.ndim != 2 or decoder_ids.shape[1] < 2:
            raise ValueError(
                f"decoder_ids are {list(decoder_ids.shape)} but [B, T] with BOS and EOS was expected"
            )
        targets = decoder_ids[:, 1:]
        predicted = targets != self._pad
        # Nothing follows the last column; and only predicted tokens go to the head, the dearest layer of all.
        output = self.decoder.features(decoder_ids[:, :-1], latents)
        assert output.last_hidden_state is not None
        states = output.last_hidden_state[predicted]
        scale = None if row_scale is None else row_scale[:, None].expand_as(targets)[predicted]
        nll = token_nll(states, self.decoder.lm_head.weight, targets[predicted], row_scale=scale)
        sentence = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[predicted]
        return nll.new_zeros(len(targets)).index_add(0, sentence, nll)

    def forward(
        self,
        encoder_ids: Tensor,
        decoder_ids: Tensor,
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        mode: PosteriorMode = "sample",
        length_weighted: bool = False,
        noise: Tensor | None = None,
    ) -> VAELoss:
        """Loss of a batch (Optimus, Eq. 7): reconstruction + beta * KL, for each sentence.

        Args:
            encoder_ids: int64 ``[B, T0]``.
            decoder_ids: int64 ``[B, T1]``.
            beta: weight of the KL.
            free_bits: threshold of the KL by sentence and dimension, in nats.
            mode: how z is taken from the posterior.
            length_weighted: divide the reconstruction by the number of tokens, BOS and EOS included.
            noise: standard normal ``[B, latent_dim]`` instead of a draw.

        Returns:
            A `VAELoss`.

        Raises:
            ValueError: rows, noise or threshold are not what they can be.
        """
        mu, logvar = self.posterior(encoder_ids)
        z = latent.draw(mu, logvar, mode=mode, noise=noise)
        per_dimension = latent.kl_per_dimension(mu, logvar, mode=mode)
        counted = latent.thresholded_kl(per_dimension, free_bits)
        num_tokens = (decoder_ids != self._pad).sum(-1)
        scale = 1 / num_tokens.to(mu.dtype) if length_weighted else torch.ones_like(mu[:, 0])
        weighted = self._nll(decoder_ids, z, row_scale=scale)
        return VAELoss(
            weighted + beta * counted, weighted / scale, per_dimension.sum(-1), counted, num_tokens
        )

    def loss(self, batch: Batch | Sequence[str], **options: Any) -> VAELoss:
        """The same for a batch of rows or a list of texts; options as in `forward`."""
        rows = batch if isinstance(batch, Batch) else self.tokenize(batch)
        result: VAELoss = self(*rows, **options)
        return result

    # ---- texts in, texts out

    @contextmanager
    def _inference(self) -> Iterator[None]:
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    def encode(self, texts: Sequence[str], *, batch_size: int = 64) -> Posterior:
        """Posteriors of texts; ``mu`` is the latent to work with.

        Args:
            texts: N texts.
            batch_size: texts encoded together; texts of like length are.

        Returns:
            mu and logvar ``[N, latent_dim]``, on the model's device.

        Raises:
            TypeError: not a list of strings.
            ValueError: a text is too long, or the model has no tokenisers.
        """
        rows = self._encoder_ids(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        parts = [Posterior(*torch.empty(2, 0, self.config.latent_dim, device=self.device))]
        with self._inference():
            for first in range(0, len(order), _at_least_one(batch_size)):
                chosen = [rows[index] for index in order[first : first + batch_size]]
                ids = pad_rows(chosen, self.tokenizers.encoder.pad_token_id)
                parts.append(self.posterior(ids.to(self.device)))
        back = torch.tensor(order, dtype=torch.int64).argsort().to(self.device)
        return Posterior(*(torch.cat(values)[back] for values in zip(*parts, strict=True)))

    def decode(
        self,
        latents: Tensor,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 64,
        seed: int | None = None,
        **generation: Any,
    ) -> list[str]:
        """Texts of latents; greedy unless told otherwise.

        Args:
            latents: ``[N, latent_dim]``.
            max_new_tokens: longest text, EOS included; default 128, or what fits.
            batch_size: latents decoded together.
            seed: of the draws, if there are any; None goes on with PyTorch's own generators.
            **generation: of transformers' ``generate``: ``do_sample=True`` with ``temperature``, ``top_k``
                and ``top_p`` (all off by default), ``num_beams``, ``num_return_sequences``, ...

        Returns:
            N texts, or N times ``num_return_sequences``, those of one latent together.

        Raises:
            ValueError: latents of another size, more tokens than fit, an unknown argument, no tokenisers.
        """
        decoder, config = self.decoder, self.decoder.config
        if latents.ndim != 2 or latents.shape[1] != config.latent_dim:
            raise ValueError(f"latents are {list(latents.shape)} but [N, {config.latent_dim}] was expected")
        room = config.max_tokens - 1
        limit = min(128, room) if max_new_tokens is None else max_new_tokens
        if not 1 <= limit <= room:
            raise ValueError(f"max_new_tokens is {limit} but 1 to {room} tokens fit after BOS")
        if generation.get("do_sample"):
            generation.setdefault("top_k", 0)  # transformers would keep 50
        tokenizers, texts, bos = self.tokenizers, [], self.tokenizers.decoder.bos_token_id
        with self._inference(), _seeded(seed, self.device):
            for first in range(0, len(latents), _at_least_one(batch_size)):
                part = latents[first : first + batch_size].to(self.device)
                if not generation and decoder.is_plainly_greedy():
                    texts += tokenizers.texts(decoder.greedy(part, max_new_tokens=limit))
                    continue
                start = torch.full((len(part), 1), bos, device=self.device)
                ids = decoder.generate(
                    start,
                    latents=part,
                    attention_mask=torch.ones_like(start),
                    max_new_tokens=limit,
                    **generation,
                )
                texts += tokenizers.texts(ids)
        return texts

    def reconstruct(self, texts: Sequence[str], **generation: Any) -> list[str]:
        """Each text through the latent and back, z = mu; options as in `decode`."""
        return self.decode(self.encode(texts).mu, **generation)

    def sample(self, count: int, *, seed: int | None = None, **generation: Any) -> list[str]:
        """Texts of latents from the prior N(0, I); options as in `decode`, with ``seed`` of the latents too.

        Raises:
            ValueError: a negative count, or see `decode`.
        """
        if count < 0:
            raise ValueError(f"count is {count} but the number of texts cannot be negative")
        with _seeded(seed, self.device):
            z = torch.randn(count, self.config.latent_dim)
            return self.decode(z, **generation)

    def interpolate(
        self, first: str, second: str, *, steps: int = 10, mode: str = "linear", **generation: Any
    ) -> list[str]:
        """Texts on the way from one text to another: ``steps + 1``, the ends reconstructed.

        Raises:
            ValueError: steps below 1, a mode other than "linear" and "slerp", or see `decode`.
        """
        ends = self.encode([first, second]).mu
        return self.decode(latent.interpolate(*ends, steps=steps, mode=mode), **generation)

    @overload
    def analogy(self, a: str, b: str, c: str, *, scale: float = ..., **generation: Any) -> str: ...

    @overload
    def analogy(
        self, a: Sequence[str], b: Sequence[str], c: Sequence[str], *, scale: float = ..., **generation: Any
    ) -> list[str]: ...

    def analogy(
        self,
        a: str | Sequence[str],
        b: str | Sequence[str],
        c: str | Sequence[str],
        *,
        scale: float = 1.0,
        **generation: Any,
    ) -> str | list[str]:
        """To c what b is to a: the text of mu_c + scale * (mu_b - mu_a).

        Args:
            a: a text, or a list of N.
            b: the same text with something changed.
            c: the text to change likewise.
            scale: how far.
            **generation: see `decode`.

        Returns:
            One text, or a list of N.

        Raises:
            ValueError: lists of different length, or see `decode`.
        """
        lists = [[texts] if isinstance(texts, str) else list(texts) for texts in (a, b, c)]
        if len({len(texts) for texts in lists}) > 1:
            raise ValueError(
                f"a, b and c have {[len(texts) for texts in lists]} texts: give the same number of each"
            )
        of_a, of_b, of_c = self.encode([text for texts in lists for text in texts]).mu.chunk(3)
        found = self.decode(latent.analogy(of_a, of_b, of_c, scale=scale), **generation)
        return found[0] if isinstance(a, str) else found

    # ---- one folder

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Write configuration, weights (safetensors), both tokenisers and latent statistics into a folder.

        Everything is written beside the folder and then moved, so that no file is ever half there.

        Args:
            save_directory: made if need be; files of an older model in it are replaced.
            **kwargs: of transformers, as ``max_shard_size``.
        """
        folder = Path(save_directory)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            super().save_pretrained(partial, **kwargs)
            if self._tokenizers is not None:
                self._tokenizers.save(partial)
            if self.latent_statistics is not None:
                mean, covariance, count = self.latent_statistics
                tensors = {"mean": mean, "covariance": covariance, "num_sentences": torch.tensor(count)}
                save_file({name: value.contiguous() for name, value in tensors.items()}, partial / STATISTICS)
            _move_into(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Read a folder that `save_pretrained` wrote; no code of it is run.

        Args:
            pretrained_model_name_or_path: the folder.
            *args: of transformers.
            **kwargs: of transformers, as ``dtype`` or ``attn_implementation``.

        Returns:
            The `Optimus`, in eval mode.

        Raises:
            FileNotFoundError: there is no such folder, or no model in it.
            ValueError: weights are missing, unknown or of another shape, or the tokenisers do not fit.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no config.json: give a folder written by save_pretrained, or make one of a "
                "released checkpoint by python -m vae_lm.convert"
            )
        kwargs.update(output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True)
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, info = loaded
        wrong = {
            "missing": sorted(info["missing_keys"]),
            "unknown": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(item[0]) for item in info["mismatched_keys"]),
        }
        if any(wrong.values()):
            found = "; ".join(f"{name}: {', '.join(keys[:5])}" for name, keys in wrong.items() if keys)
            raise ValueError(
                f"the weights in {folder} do not fit its config.json ({found}): save the model again"
            )
        if (folder / ENCODER_FOLDER / "tokenizer_config.json").is_file():
            model.tokenizers = TextTokenizers.from_folder(folder)
        if (folder / STATISTICS).is_file():
            stored = load_file(folder / STATISTICS)
            model.latent_statistics = LatentStatistics(
                stored["mean"], stored["covariance"], int(stored["num_sentences"])
            )
        return model


def _check_lengths(rows: Sequence[Sequence[int]], texts: Sequence[str], limit: int, network: str) -> None:
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        if len(row) > limit:
            raise ValueError(
                f"text {number} ({text.strip()[:40]!r}...) has {len(row)} tokens but the {network} takes at "
                f"most {limit}, special tokens included: shorten or drop it"
            )


def _at_least_one(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1")
    return batch_size


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """PyTorch's generators set to a seed for a while and then put back; nothing for None."""
    devices = [device] if device.type == "cuda" else []
    with nullcontext() if seed is None else torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _move_into(partial: Path, folder: Path) -> None:
    """Move the files of a folder into another, each at one stroke; all at one if the other is not there."""
    if not folder.exists():
        partial.replace(folder)
        return
    moved = set()
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        target = folder / path.relative_to(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
        moved.add(target)
    # What the older model had and this one has not would be read together with it.
    for pattern in _OWN_FILES:
        for stale in set(folder.glob(pattern)) - moved:
            stale.unlink()
