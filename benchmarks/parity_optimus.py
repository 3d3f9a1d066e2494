"""Parity of Optimus: losses, gradients, decoding, bounds, schedules, filters, tokenisers, a checkpoint."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.golden import EXACT, OUTPUTS, Case, Tolerance
from vae_lm import latent
from vae_lm.convert import State, from_released, rename_released
from vae_lm.decoder import INJECTIONS
from vae_lm.generate import filter_logits
from vae_lm.latent import PosteriorMode
from vae_lm.model import Optimus, Posterior
from vae_lm.tokenizers import TextTokenizers

SCHEDULES = Tolerance(0.0, 1e-12)

# A bias of the keys shifts all scores of a query alike: its gradient is 0, and the file holds rounding.
GRADIENTS = Tolerance(1e-4, 1e-5, absolute=1e-5)

_BETA = 0.7
"""Weight of the KL in all stored losses."""


def check(case: Case) -> None:
    """Whatever the original stored about its sentence VAE."""
    if case.path.name == "tokenization.json":
        _check_tokenization(case)
    elif "logits_at_mu" in case.arrays:
        _check_checkpoint(case)
    elif "combos" in case.arrays:
        _check_filters(case)
    elif "zt" in case.arrays:
        _check_vae(case)
    elif "s0" in case.arrays:
        _check_schedules(case)
    else:
        case.leave(case.arrays, "models of dialogue and of labels")


# ---- one model in all its uses


def _check_vae(case: Case) -> None:
    state = {key.removeprefix("sd/"): case.use(key) for key in case.arrays if key.startswith("sd/")}
    model = _model(case.meta, state)
    encoder_ids, decoder_ids = case.use("bert_ids"), case.use("gpt_ids")
    case.compare("lengths", _lengths(model, encoder_ids, decoder_ids), EXACT)
    with torch.no_grad():
        _check_encoder(case, model, encoder_ids)
        _check_losses(case, model, encoder_ids, decoder_ids)
        _check_decoder(case, state, decoder_ids)
        _check_bounds(case, model, encoder_ids, decoder_ids)
        _check_corpus(case, model)
    _check_gradients(case, model, encoder_ids, decoder_ids)


def _model(config: Any, state: State, injection: str = "both") -> Optimus:
    """The file's model, with dropout off."""
    model = Optimus.from_backbones(
        BertConfig(**config["bert"], pad_token_id=config["bert_pad"]),
        _gpt2(config),
        latent_dim=config["latent_size"],
        injection=injection,
    )
    model.load_state_dict(rename_released(state, injection=injection), strict=True)
    return model.eval()


def _gpt2(config: Any) -> GPT2Config:
    sizes = {key: value for key, value in config["gpt2"].items() if key != "activation"}
    special = {f"{name}_token_id": config[name] for name in ("pad", "bos", "eos")}
    return GPT2Config(**sizes, **special, activation_function=config["gpt2"]["activation"])


def _lengths(model: Optimus, encoder_ids: Tensor, decoder_ids: Tensor) -> Tensor:
    pads = (model.encoder.config.pad_token_id, model.decoder.config.pad_token_id)
    return torch.stack(
        [(ids != pad).sum(-1) for ids, pad in zip((encoder_ids, decoder_ids), pads, strict=True)], -1
    )


def _check_encoder(case: Case, model: Optimus, ids: Tensor) -> None:
    for name, mask in (("enc", (ids > 0).long()), ("enc_nomask", torch.ones_like(ids))):
        output = model.encoder(input_ids=ids, attention_mask=mask)
        case.compare(f"{name}/last_hidden", output.last_hidden_state, OUTPUTS)
        case.compare(f"{name}/pooled", output.pooler_output, OUTPUTS)
        _compare_posterior(case, name, model.posterior(ids, attention_mask=mask))
    # The mask that is taken when none is given.
    _compare_posterior(case, "enc", model.posterior(ids))


def _compare_posterior(case: Case, name: str, posterior: Posterior) -> None:
    case.compare(f"{name}/mu", posterior.mu, OUTPUTS)
    case.compare(f"{name}/logvar", posterior.logvar, OUTPUTS)


def _check_losses(case: Case, model: Optimus, encoder_ids: Tensor, decoder_ids: Tensor) -> None:
    noise = case.use("eps")
    mu, logvar = model.posterior(encoder_ids)
    case.compare("z", latent.draw(mu, logvar, noise=noise), OUTPUTS)
    case.compare("kl_per_dim", latent.kl_per_dimension(mu, logvar), OUTPUTS)
    modes = {key.split("/")[1] for key in case.arrays if key.startswith("loss/")}
    for name in sorted(modes):
        matched = re.fullmatch(r"fb(\d)(?:_lam([\d.]+))?(_lenw)?", name)
        if matched is None:
            continue  # left over, and so reported
        kind, threshold, length_weighted = matched.groups()
        mode: PosteriorMode = "unit_variance" if kind == "2" else "sample"
        found = model(
            encoder_ids,
            decoder_ids,
            beta=_BETA,
            free_bits=float(threshold or 0),
            mode=mode,
            length_weighted=bool(length_weighted),
            noise=noise,
        )
        case.compare(f"loss/{name}/rec", found.reconstruction, OUTPUTS)
        case.compare(f"loss/{name}/kl", found.kl_counted, OUTPUTS)
        case.compare(f"loss/{name}/loss", found.loss, OUTPUTS)


def _check_gradients(case: Case, model: Optimus, encoder_ids: Tensor, decoder_ids: Tensor) -> None:
    loss = model(encoder_ids, decoder_ids, beta=_BETA, free_bits=0.5, noise=case.use("eps")).loss.mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for key in (key for key in case.arrays if key.startswith("grad/")):
        name = key.removeprefix("grad/")
        gradient = gradients[_OURS.get(name, name)]
        assert gradient is not None
        case.compare(key, gradient, GRADIENTS)


_OURS = {
    "encoder.linear.weight": "posterior_head.weight",
    "decoder.transformer.linear.weight": "decoder.memory_projection.weight",
    "decoder.transformer.linear_emb.weight": "decoder.embedding_projection.weight",
}


def _check_decoder(case: Case, state: State, ids: Tensor) -> None:
    latents = case.use("zt")
    for injection in INJECTIONS:
        model, name = _model(case.meta, state, injection), f"dec/{injection}"
        case.compare(f"{name}/logits", model.decoder(ids, latents).logits, OUTPUTS)
        case.compare(f"{name}/rec", -model.log_likelihood(ids, latents), OUTPUTS)
        steps = case.arrays[f"{name}/greedy_logits"].shape[1]
        told = model.decoder.generate(
            torch.full_like(ids[:, :1], case.meta["bos"]),
            latents=latents,
            attention_mask=torch.ones_like(ids[:, :1]),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        case.compare(f"{name}/greedy", told.sequences, EXACT)
        case.compare(f"{name}/greedy_logits", torch.stack(told.logits, dim=1), OUTPUTS)
    plain = GPT2LMHeadModel(_gpt2(case.meta)).eval()
    prefix, injected = "decoder.", (".linear.weight", ".linear_emb.weight")
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    plain.load_state_dict(
        {key: value for key, value in weights.items() if not key.endswith(injected)}, strict=True
    )
    case.compare("dec/none/logits", plain(ids).logits, OUTPUTS)


def _check_bounds(case: Case, model: Optimus, encoder_ids: Tensor, decoder_ids: Tensor) -> None:
    own = (case.use("iw/equal/bert_ids"), case.use("iw/equal/gpt_ids"))
    case.compare("iw/equal/lengths", _lengths(model, *own), EXACT)
    for name, ids, texts in (
        ("equal", *own),
        *((f"padded_{kind}", encoder_ids, decoder_ids) for kind in ("upstream", "masked")),
    ):
        # In its evaluation the original let the encoder see the padding.
        mask = torch.ones_like(ids) if name == "padded_upstream" else None
        posterior = model.posterior(ids, attention_mask=mask)
        noise = rearrange(case.use(f"iw/{name}/eps"), "draws b s d -> b (draws s) d")
        found = _estimate(model, texts, posterior, noise)
        case.compare(f"iw/{name}/log_prob_iw", found.log_prob, OUTPUTS)
        case.compare(f"iw/{name}/log_gen", -found.reconstruction, OUTPUTS)
        case.compare(f"iw/{name}/kl", found.kl, OUTPUTS)


def _estimate(
    model: Optimus, decoder_ids: Tensor, posterior: Posterior, noise: Tensor
) -> latent.ImportanceEstimate:
    return latent.importance_weighted(
        lambda z: model.log_likelihood(decoder_ids, z), *posterior, num_samples=noise.shape[1], noise=noise
    )


def _check_corpus(case: Case, model: Optimus) -> None:
    count = len(case.arrays["corpus/mu"])
    rows = [(case.use(f"corpus/{i}/bert_ids"), case.use(f"corpus/{i}/gpt_ids")) for i in range(count)]
    posteriors = [model.posterior(encoder_ids) for encoder_ids, _ in rows]
    mu, logvar = (torch.cat(values) for values in zip(*posteriors, strict=True))
    case.compare("corpus/mu", mu, OUTPUTS)
    case.compare("corpus/logvar", logvar, OUTPUTS)
    information = latent.mutual_information(mu, logvar, noise=case.use("corpus/mi_eps"))
    case.compare("corpus/mi", torch.tensor(information.nats, dtype=torch.float64), OUTPUTS)
    units = latent.active_units(mu)
    case.compare("corpus/au", torch.tensor(units.num_active), EXACT)
    case.compare("corpus/au_var", units.variance, OUTPUTS)
    noise = rearrange(case.use("corpus/iw_eps"), "n draws s d -> n 1 (draws s) d")
    parts = [
        _estimate(model, ids, posterior, draws)
        for (_, ids), posterior, draws in zip(rows, posteriors, noise, strict=True)
    ]
    log_prob, rec, kl = (torch.cat(values).double() for values in zip(*parts, strict=True))
    tokens = sum(ids.numel() for _, ids in rows)
    # Words are not stored; the perplexity that is counts tokens.
    perplexity = latent.perplexity(float(log_prob.sum()), num_tokens=tokens, num_words=0, num_sentences=count)
    figures = {
        "ppl": torch.tensor(perplexity.original, dtype=torch.float64),
        "neg_elbo": (rec + kl).mean(),
        "rec": rec.mean(),
        "kl": kl.mean(),
    }
    for name, value in figures.items():
        case.compare(f"corpus/{name}", value, OUTPUTS)


# ---- the rest


def _check_checkpoint(case: Case) -> None:
    encoder_ids, decoder_ids = case.use("bert_ids"), case.use("gpt_ids")
    for layout in ("folders", "full"):
        model = from_released(case.path.parent, layout=layout)
        case.compare("pad", torch.tensor(model.decoder.config.pad_token_id), EXACT)
        with torch.no_grad():
            mu, logvar = model.posterior(encoder_ids)
            case.compare("mu", mu, OUTPUTS)
            case.compare("logvar", logvar, OUTPUTS)
            case.compare("logits_at_mu", model.decoder(decoder_ids, mu).logits, OUTPUTS)
            case.compare("rec_at_mu", -model.log_likelihood(decoder_ids, mu), OUTPUTS)


def _check_schedules(case: Case) -> None:
    for entry in case.meta["meta"]:
        # The older kind has no flat part, and another name for the share of the rise.
        shares = {
            "zero_share": entry.get("ratio_zero", 0.0),
            "rise_share": entry.get("ratio_increase", entry.get("ratio")),
        }
        ours = latent.beta_schedule(
            entry["n_iter"], start=entry["start"], stop=entry["stop"], num_cycles=entry["n_cycle"], **shares
        )
        case.compare(entry["key"], ours, SCHEDULES)


def _check_filters(case: Case) -> None:
    logits = case.use("logits")
    for index, (top_k, top_p) in enumerate(case.use("combos").tolist()):
        case.compare(f"keep{index}", filter_logits(logits, top_k=int(top_k), top_p=top_p).isfinite(), EXACT)


def _check_tokenization(case: Case) -> None:
    vocabularies = case.path.parents[2] / "data" / "vocab"
    if not vocabularies.is_dir():
        case.require(False, f"{vocabularies} is not here, and with it the vocabularies")
        return
    tokenizers = TextTokenizers.load(vocabularies / "bert-base-cased", vocabularies / "gpt2")
    stored = json.loads(case.path.read_text(encoding="utf-8"))
    texts = [entry["text"] for entry in stored]
    for name, rows in (
        ("bert_token", tokenizers.encoder_rows(texts)),
        ("gpt2_token", tokenizers.decoder_rows(texts)),
    ):
        case.add({f"{index}/{name}": np.array(entry[name]) for index, entry in enumerate(stored)})
        for index, row in enumerate(rows):
            case.compare(f"{index}/{name}", torch.tensor(row), EXACT)
