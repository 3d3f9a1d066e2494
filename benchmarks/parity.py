"""Run our code on stored inputs and compare every stored result: ``python -m benchmarks.parity DIR...``.

Every golden file below the folders is recognised by what it holds, whatever its name. A checker recomputes
all of its arrays; one that nobody recomputed is a failure too, so a pass means that the whole file was
reproduced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from backbones.biggan import Discriminator, Generator
    from fq import FeatureQuantize


class Tolerance(NamedTuple):
    """Allowed difference: ``relative * |expected| + of_scale * max |expected|``."""

    relative: float
    of_scale: float


FQ_TOLERANCES = {torch.float32: Tolerance(0.0, 2e-5), torch.float64: Tolerance(0.0, 1e-10)}
OUTPUTS = Tolerance(1e-4, 1e-5)
GRADIENT_NORMS = Tolerance(1e-3, 1e-6)


class Comparison(NamedTuple):
    """One reproduced array: its largest error, also as a share of what is allowed there."""

    name: str
    ratio: float
    error: float


class Case:
    """One golden file, and the record of what has been done with each of its arrays.

    Args:
        path: the file.
        arrays: everything in it but the metadata.
        meta: its metadata; a table of gradient norms in there counts as an array.
    """

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self.path, self.arrays, self.meta = path, arrays, meta
        self.comparisons: list[Comparison] = []
        self.failures: list[str] = []
        self._tables = {f"meta.{key}" for key, value in meta.items() if "norms" in key and value}
        self._open = set(arrays) | self._tables
        self._inputs: set[str] = set()

    def use(self, key: str) -> Tensor:
        """An input or a state as a tensor of its own, marked as dealt with."""
        if key not in self.arrays:
            raise KeyError(f"array {key} is missing")
        self._open.discard(key)
        self._inputs.add(key)
        return torch.from_numpy(np.array(self.arrays[key]))

    def compare(self, key: str, value: Tensor, tolerance: Tolerance, *, by_column: bool = False) -> None:
        """Compare a recomputed array, if the file stores it; integers must be equal.

        With ``by_column`` the tolerance of every column counts from that column's own largest magnitude.
        """
        if key not in self.arrays:
            return
        self._open.discard(key)
        expected, ours = np.asarray(self.arrays[key]), value.detach().cpu().numpy()
        if expected.shape != ours.shape:
            self.failures.append(f"{key} has shape {list(expected.shape)} but ours {list(ours.shape)}")
            return
        self._record(key, ours, expected, tolerance, by_column=by_column)

    def compare_table(self, key: str, values: Mapping[str, float], tolerance: Tolerance) -> None:
        """Compare a table of norms in the metadata, if there; its scale is its largest entry."""
        if key not in self.meta:
            return
        table = self.meta[key]
        self._open.discard(f"meta.{key}")
        if table.keys() != values.keys():
            odd = ", ".join(sorted(table.keys() ^ values.keys())[:5])
            self.failures.append(f"meta.{key} and ours do not name the same entries: {odd}")
            return
        expected = np.array([table[name] for name in values], dtype=np.float64)
        self._record(f"meta.{key}", np.array(list(values.values())), expected, tolerance)

    def compare_number(self, name: str, value: float, expected: float, tolerance: Tolerance) -> None:
        """Compare a number that follows from the file without being stored in it."""
        self._record(name, np.asarray(value), np.asarray(expected), tolerance)

    def require(self, condition: bool, message: str) -> None:
        """Note a failure unless the condition holds."""
        if not condition:
            self.failures.append(message)

    def finish(self) -> None:
        """Turn arrays that nobody used or compared into a failure, and a file without results as well."""
        if not self.comparisons and not self.failures:
            self.failures.append("the file stores no result to compare with")
        if self._open:
            names = sorted(self._open)
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self.failures.append(f"not reproduced: {', '.join(names[:5])}{rest}")

    @property
    def counts(self) -> tuple[int, int]:
        """Arrays reproduced within tolerance, and arrays to reproduce."""
        total = (set(self.arrays) | self._tables) - self._inputs
        return len({item.name for item in self.comparisons if item.ratio <= 1} & total), len(total)

    def _record(
        self,
        name: str,
        ours: np.ndarray,
        expected: np.ndarray,
        tolerance: Tolerance,
        *,
        by_column: bool = False,
    ) -> None:
        item = Comparison(name, *_measure(ours, expected, tolerance, by_column=by_column))
        self.comparisons.append(item)
        if item.ratio > 1:
            self.failures.append(f"{name} is off by {item.error:.3g}, {item.ratio:.3g} times its tolerance")


def _measure(
    ours: np.ndarray, expected: np.ndarray, tolerance: Tolerance, *, by_column: bool
) -> tuple[float, float]:
    """Largest error as a share of its allowance, and the largest error itself."""
    if expected.size == 0:
        return 0.0, 0.0
    if expected.dtype.kind in "iub":
        wrong = ours.dtype.kind not in "iub" or bool((ours != expected).any())
        return (np.inf if wrong else 0.0), float(np.abs(ours.astype(float) - expected.astype(float)).max())
    ours, expected = ours.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(expected).all()):
        same = np.array_equal(ours, expected, equal_nan=True)
        return (0.0, 0.0) if same else (np.inf, np.inf)
    error, size = np.abs(ours - expected), np.abs(expected)
    # The codes of one dictionary may differ by 1e5: one scale for all would let small ones be anything.
    scale = size.max(axis=0, keepdims=True) if by_column else size.max()
    allowed = tolerance.relative * size + tolerance.of_scale * scale
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    return float(ratio.max()), float(error.max())


# ---- fq: the layer in both original semantics, and a discriminator that carries it


def check_fq(case: Case) -> None:
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
    from fq import CodebookOptions, FeatureQuantize

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
    from fq.stats import perplexity

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
    from backbones.biggan import Discriminator
    from backbones.convert import from_fq_biggan, infer_config
    from fq import attach
    from fq.stats import perplexity

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


def check_biggan(case: Case) -> None:
    """BigGAN pairs: eval forwards, a discriminator step, a generator step, orthogonal regularisation."""
    from backbones.biggan import Discriminator, Generator, orthogonal_gradient
    from backbones.convert import infer_config

    meta = case.meta
    g_state = {key[2:]: case.use(key) for key in case.arrays if key.startswith("G.")}
    d_state = {key[2:]: case.use(key) for key in case.arrays if key.startswith("D.")}
    g_config = _with_arguments(infer_config(g_state=g_state, resolution=meta["resolution"]), meta, "G")
    d_config = _with_arguments(infer_config(d_state=d_state, resolution=meta["resolution"]), meta, "D")
    dtype = g_state["linear.weight"].dtype
    generator, discriminator = Generator(g_config).to(dtype), Discriminator(d_config).to(dtype)
    for name, model, state in (("G", generator, g_state), ("D", discriminator, d_state)):
        model.load_state_dict(state, strict=True)
        ours = [[key, list(value.shape)] for key, value in model.state_dict().items()]
        case.require(ours == meta[f"{name}_keys"], f"the state keys of {name}, their order or shapes differ")
        parameters = [key for key, _ in model.named_parameters()]
        case.require(parameters == meta[f"{name}_params"], f"the parameters of {name} or their order differ")
    case.require(generator.latent_dim == meta["G_dim_z"], f"G takes z of width {generator.latent_dim}")

    z, y, real, real_y = (case.use(key) for key in ("z", "y", "x_real", "y_real"))
    _check_biggan_eval(case, generator.eval(), discriminator.eval(), z, y, real, real_y)
    generator.train()
    discriminator.train()
    _check_biggan_d_step(case, generator, discriminator, z, y, real, real_y)
    for name, model, state in (("G", generator, g_state), ("D", discriminator, d_state)):
        _check_buffers(case, name, model, state)
    discriminator.requires_grad_(False)
    loss = -discriminator(generator(z, generator.shared(y)), y).mean()
    loss.backward()
    case.compare("G_loss", loss, OUTPUTS)
    case.compare_table("G_step_grad_norms", _gradient_norms(generator), GRADIENT_NORMS)
    orthogonal = {
        name: float(orthogonal_gradient(parameter, 1e-4).norm())
        for name, parameter in generator.named_parameters()
        if parameter.ndim >= 2 and not name.startswith("shared.")
    }
    case.compare_table("G_ortho_grad_norms_1e-4", orthogonal, GRADIENT_NORMS)


def _with_arguments(config: Any, meta: Mapping[str, Any], network: str) -> Any:
    """Add what shapes do not show, from the constructor arguments, which the files keep as text."""
    arguments = meta[f"{network}_kwargs"]
    return replace(
        config,
        inplace_relu="inplace=True" in arguments.get(f"{network}_activation", ""),
        sn_eps=float(arguments.get("SN_eps", config.sn_eps)),
    )


def _check_biggan_eval(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    y: Tensor,
    real: Tensor,
    real_y: Tensor,
) -> None:
    taps: dict[str, Tensor] = {}
    names = [key for key, _ in discriminator.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", key)]
    # Cloned at once: the head may rectify the last of them in place.
    hooks = [
        discriminator.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: taps.update({name: output.clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        case.compare("D_eval_real", discriminator(real, real_y), OUTPUTS)
        for hook in hooks:
            hook.remove()
        fake = generator(z, generator.shared(y))
        case.compare("G_eval_out", fake, OUTPUTS)
        case.compare("D_eval_fake", discriminator(fake, y), OUTPUTS)
    for name, features in taps.items():
        wide = features.double()
        stats = torch.stack([wide.mean(), wide.std(), wide.abs().max()])
        case.compare(f"D_eval_feat.{name}.stats", stats, OUTPUTS)
    last = names[-1]
    case.compare(f"D_eval_feat.{last.rpartition('.')[0]}.out", taps[last], OUTPUTS)


def _check_biggan_d_step(
    case: Case,
    generator: Generator,
    discriminator: Discriminator,
    z: Tensor,
    y: Tensor,
    real: Tensor,
    real_y: Tensor,
) -> None:
    with torch.no_grad():
        fake = generator(z, generator.shared(y))
    case.compare("G_train_out", fake, OUTPUTS)
    logits = discriminator(torch.cat([fake, real]), torch.cat([y, real_y]))
    on_fake, on_real = logits.split([len(fake), len(real)])
    loss_real, loss_fake = (1 - on_real).relu().mean(), (1 + on_fake).relu().mean()
    (loss_real + loss_fake).backward()
    case.compare("D_train_fake", on_fake, OUTPUTS)
    case.compare("D_train_real", on_real, OUTPUTS)
    case.compare("D_loss_real", loss_real, OUTPUTS)
    case.compare("D_loss_fake", loss_fake, OUTPUTS)
    for key in case.arrays:
        if key.startswith("D_step_grad."):
            gradient = discriminator.get_parameter(key.removeprefix("D_step_grad.")).grad
            assert gradient is not None
            case.compare(key, gradient, OUTPUTS)
    case.compare_table("D_step_grad_norms", _gradient_norms(discriminator), GRADIENT_NORMS)


def _check_buffers(case: Case, network: str, model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Stored buffers changed in these forwards; all the others must have stayed."""
    for name, buffer in model.named_buffers():
        key = f"{network}_after_dstep.{name}"
        if key in case.arrays:
            case.compare(key, buffer, OUTPUTS)
        else:
            same = torch.allclose(buffer, before[name], rtol=OUTPUTS.relative, atol=OUTPUTS.of_scale)
            case.require(same, f"the buffer {network}.{name} changed but should not")


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    return {
        name: float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


# ---- kinds of file, the run over folders, the report


CHECKERS: dict[str, Callable[[Case], None]] = {"fq": check_fq, "biggan": check_biggan}
"""Checker by kind of file; kinds that are known but not here count as "without a checker"."""

FOLDER_KINDS = ("navgraph", "optimus", "vln")
"""Kinds told apart by their folder: their files share no mark inside."""

KINDS = ("fq", "biggan", "stylegan2", "ugatit", *FOLDER_KINDS)

_MARKS = (
    ("fq", re.compile(r"init_embed|fq\d+\.embed")),
    ("stylegan2", re.compile(r"G\.synthesis\..+")),
    ("ugatit", re.compile(r"G_cam_logit|D[57]\..+")),
    ("biggan", re.compile(r"[GD]\.blocks\.\d+\.0\.conv1\.weight")),
)


def kind_of(path: Path, keys: Iterable[str]) -> str:
    """Kind of a golden file from its keys, or else from the nearest folder that is named like a kind."""
    keys = list(keys)
    for kind, mark in _MARKS:
        if any(mark.fullmatch(key) for key in keys):
            return kind
    folders = [folder.name for folder in path.resolve().parents]
    return next((name for name in folders if name in KINDS), folders[0])


def find_files(folders: Sequence[Path]) -> list[Path]:
    """Golden files below the folders (or given by name): every .npz, and .json of the kinds told by folder.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist: give a folder with golden .npz files")
        below = [folder] if folder.is_file() else sorted(folder.rglob("*"))
        for path in below:
            is_document = path.name.endswith((".json", ".json.gz")) and path.parent.name in FOLDER_KINDS
            if path.is_file() and (path.suffix == ".npz" or is_document):
                found.setdefault(path.resolve())
    return list(found)


def read_case(path: Path) -> Case:
    """Everything in a golden file; JSON files are left to their checker, which has the path.

    Raises:
        Exception: whatever a damaged archive or metadata makes NumPy or ``json`` raise.
    """
    if path.suffix != ".npz":
        return Case(path, {}, {})
    # Opened here: NumPy leaves a damaged archive open when it gives up.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    metas = [str(arrays.pop(key)) for key in ("meta", "meta_json") if key in arrays]
    meta = json.loads(metas[0]) if metas else {}
    return Case(path, arrays, meta if isinstance(meta, dict) else {"meta": meta})


def check_file(path: Path, only: Sequence[str]) -> tuple[str, str | None, str]:
    """Check one file.

    Returns:
        ``(status, kind, line)`` with status "pass", "fail", "unchecked" (no checker) or "excluded".
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        case = read_case(path)
    except Exception as error:  # a damaged file must be one failed line, not the end of the run
        return "fail", None, f"FAIL  {name}  unreadable: {type(error).__name__}: {error}"
    kind = kind_of(path, case.arrays)
    if only and kind not in only:
        return "excluded", kind, ""
    if kind not in CHECKERS:
        return "unchecked", kind, f"----  {name}  {kind}  no checker"
    try:
        CHECKERS[kind](case)
    except Exception as error:  # the same for a file of a known kind with contents nobody foresaw
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        case.failures.append(f"stopped by {type(error).__name__}: {message}")
    case.finish()
    return ("fail" if case.failures else "pass"), kind, _line(case, name, kind)


def _line(case: Case, name: str, kind: str) -> str:
    done, total = case.counts
    text = f"{'FAIL' if case.failures else 'pass'}  {name}  {kind}  {done} of {total} arrays"
    if case.comparisons:
        worst = max(case.comparisons, key=lambda item: item.ratio)
        text += f"  largest error {worst.ratio:.3f} of its tolerance ({worst.error:.2e} in {worst.name})"
    more = f"; {len(case.failures) - 3} more" if len(case.failures) > 3 else ""
    return text + (f"  | {'; '.join(case.failures[:3])}{more}" if case.failures else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all reproduced, 1 not, 2 nothing to check."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description="Compare with golden files."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="searched with all subfolders")
    parser.add_argument("--only", default="", help=f"kinds to check, comma-separated: {', '.join(KINDS)}")
    options = parser.parse_args(arguments)
    only = [kind for kind in options.only.split(",") if kind]
    unknown = [kind for kind in only if kind not in KINDS]
    if unknown:
        print(f"--only names {', '.join(unknown)} but the kinds are {', '.join(KINDS)}", file=sys.stderr)
        return 2
    try:
        paths = find_files(options.folders)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    counts: Counter[str] = Counter()
    unchecked: Counter[str] = Counter()
    for path in paths:
        status, kind, line = check_file(path, only)
        counts[status] += 1
        if status == "unchecked" and kind is not None:
            unchecked[kind] += 1
        if line:
            print(line, flush=True)
    if counts.total() == counts["excluded"]:
        kinds = f" of kind {', '.join(only)}" if only else ""
        places = ", ".join(map(str, options.folders))
        print(f"no golden file{kinds} below {places}: nothing was checked", file=sys.stderr)
        return 2
    if unchecked:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(unchecked.items()))
        print(f"{counts['unchecked']} without a checker: {kinds}")
    print(f"{counts['pass']} passed, {counts['fail']} failed")
    return 1 if counts["fail"] or counts["unchecked"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
