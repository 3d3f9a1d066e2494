"""Parity of the FQ layer (PyTorch and TensorFlow semantics) and of a discriminator that carries it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.biggan import Discriminator
from backbones.convert import from_fq_biggan, infer_config
from benchmarks.golden import Case, Tolerance
from fq import CodebookOptions, FeatureQuantize, attach
from fq.stats import perplexity

FQ_TOLERANCES = {torch.float32: Tolerance(0.0, 2e-5), torch.float64: Tolerance(0.0, 1e-10)}


def check(case: Case) -> None:
    """FQ layer files (PyTorch and TensorFlow semantics) and FQ discriminators."""
    if "init_embed" in case.arrays:
        _check_fq_layer(case)
    else:
        _check_fq_discriminator(case)


def _check_fq_layer(case: Case) -> None:
    names = ("init_embed", "init_embed_avg", "init_cluster_size")
    layer = _fq_layer([case.use(name) for name in names], case.meta)
    steps = sorted({int(m[1]) for key in case.arrays if (m := re.match(r"s(\d+)_x$", key))})
    case.require(
        steps == list(range(case.meta.get("steps", len(steps)))),
        f"the inputs of {case.meta.get('steps')} steps were expected, found {len(steps)}",
    )
    for step in steps:
        _check_fq_forward(case, f"s{step:03d}_", layer)
    if "eval_x" in case.arrays:
        layer.eval()
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        _check_fq_forward(case, "eval_", layer)
        for name, buffer in layer.named_buffers():
            case.require(torch.equal(buffer, before[name]), f"an eval-mode forward changed {name}")


def _fq_layer(buffers: Sequence[Tensor], meta: Mapping[str, Any]) -> FeatureQuantize:
    """A layer in the file's semantics, from embed and embed_avg [D, K] and cluster_size [K]."""
    layer = FeatureQuantize(
        *buffers[0].shape,
        decay=meta["decay"],
        commitment_weight=meta["commitment"],
        mode="replace",
        compat="tf" if meta.get("zero_debias") else "torch",
        reduction="none",
        options=CodebookOptions(epsilon=meta.get("eps", 1e-5)),
    ).to(buffers[0].dtype)
    layer.load_original(*buffers)
    return layer


def _check_fq_forward(case: Case, prefix: str, layer: FeatureQuantize) -> None:
    """One forward; every array under the prefix that belongs to it is compared."""
    x = case.use(prefix + "x").requires_grad_()
    tolerance = FQ_TOLERANCES[x.dtype]
    features, codes, loss = layer(x)
    counts = torch.bincount(codes.flatten(), minlength=layer.codebook_size)
    results = {
        "out": features,
        "loss": _like_stored(case, prefix + "loss", loss),
        "perplexity": perplexity(counts.to(x.dtype)),
        "codes": codes,
        "counts": counts,
        "grad_commit": torch.autograd.grad(loss.mean(), x, retain_graph=True)[0],
    }
    if prefix + "gy" in case.arrays:
        objective = loss.mean() + (features * case.use(prefix + "gy")).sum()
        results["grad_total"] = torch.autograd.grad(objective, x)[0]
    state = {
        "embed": layer.codebook.t(),
        "embed_avg": layer.ema_sum.t(),
        "cluster_size": layer.ema_count,
    }
    for name, value in (results | state).items():
        case.compare(prefix + name, value, tolerance, by_column=name in ("embed", "embed_avg"))


def _like_stored(case: Case, key: str, loss: Tensor) -> Tensor:
    """A loss per sample in the form the file stores it: [B], [B, 1], or the mean over the batch."""
    if key not in case.arrays:
        return loss
    shape = case.arrays[key].shape
    return loss.mean() if shape == () else loss.reshape(shape)


def _check_fq_discriminator(case: Case) -> None:
    meta, sites = case.meta, case.meta["layers"]
    dictionaries = {
        site: [case.use(f"fq{site}.{name}") for name in ("embed", "embed_avg", "cluster_size")]
        for site in sites
    }
    plain = _attention_beside_block({key[2:]: case.use(key) for key in case.arrays if key.startswith("w.")})
    config = infer_config(d_state=plain, resolution=meta["resolution"])
    model = Discriminator(config).to(plain["linear.weight"].dtype)
    model.load_state_dict(plain, strict=True)
    taps: dict[int, Tensor] = {}
    for site in sites:
        model.get_submodule(f"blocks.{site}.0").register_forward_hook(
            lambda _module, _args, output, site=site: taps.update({site: output.clone()})
        )
    handle = attach(
        model,
        [f"blocks.{site}.0" for site in sites],
        codebook_size=meta["K"],
        decay=meta["decay"],
        commitment_weight=meta["commitment"],
        mode=meta["mode"],
        compat="torch",
    )
    original = {
        f"blocks.{site}.1.{name}": value
        for site, buffers in dictionaries.items()
        for name, value in zip(("embed", "embed_avg", "cluster_size"), buffers, strict=True)
    }
    model.load_state_dict({**plain, **from_fq_biggan(original)}, strict=True)
    model.eval()

    x = case.use("x").requires_grad_()
    tolerance = FQ_TOLERANCES[x.dtype]
    logit = model(x, case.use("y"))
    total = torch.zeros_like(logit)
    for site in sites:
        layer = _fq_layer(dictionaries[site], meta).eval()
        _, codes, loss = layer(taps[site])
        counts = torch.bincount(codes.flatten(), minlength=meta["K"])
        total = total + loss[:, None]
        case.compare(f"h{site}", taps[site], tolerance)
        case.compare(f"loss{site}", loss[:, None], tolerance)
        case.compare(f"ppl{site}", perplexity(counts.to(x.dtype)), tolerance)
    case.compare("logit", logit, tolerance)
    case.compare("quant_loss", total, tolerance)
    attached = handle.loss()
    if "quant_loss" in case.arrays:
        stored = float(case.arrays["quant_loss"].mean(dtype=np.float64))
        case.compare_number("handle.loss()", float(attached.detach()), stored, tolerance)
    case.compare("grad_logit", torch.autograd.grad(logit.sum(), x, retain_graph=True)[0], tolerance)
    case.compare("grad_quant", torch.autograd.grad(attached, x)[0], tolerance)


def _attention_beside_block(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention at ``blocks.i.1``: the files keep it after the quantiser, at ``blocks.i.2``."""
    return {re.sub(r"^(blocks\.\d+)\.2\.", r"\1.1.", key): value for key, value in state.items()}


# ---- biggan: generator and discriminator, their gradients and their buffers
