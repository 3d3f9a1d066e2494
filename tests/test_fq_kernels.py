"""The Triton kernels: interpreted on the CPU, run on a GPU where there is one, compiled for one anyway."""

import json
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import Shape, clustered, feature_like
from fq import CodebookOptions, FeatureQuantize
from fq.search import code_sums

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = ("NCHW", "channels-last", "tokens")
TILES = (32, 32, 32, 4, 3, False, False)  # several tiles of each axis even in small problems
CERTIFIED = (*TILES[:6], True)
WIDE = (128, *CERTIFIED[1:])  # of its tokens 32 may be uncertain before all are searched exactly
SEARCHES = {name: (dtype, TILES) for name, dtype in DTYPES.items()} | {
    "certified": (torch.float32, CERTIFIED)
}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def laid_out(tokens, layout):
    """Tokens [B, S, D] as features [B, D, S] in the memory of a layout."""
    if layout == "NCHW":
        return tokens.transpose(1, 2).contiguous()
    return (tokens.flatten(0, 1)[None] if layout == "tokens" else tokens).transpose(1, 2)


def rows(features):
    """Features [B, D, S] as tokens [B * S, D]."""
    return features.transpose(1, 2).flatten(0, 1)


def spread(kind, tokens, codebook):
    if kind == "offset":  # little distance between large vectors: what few bits cannot tell apart
        return tokens * 0.1 + 20, codebook * 0.1 + 20
    if kind == "halfway":  # hardly nearer to one code than to another, in a direction of its own
        first, second = codebook[:35], codebook.flip(0)[:35]
        return ((first + second) / 2 + 1e-5 * (first - second)).expand_as(tokens), codebook
    if kind == "exploded":
        codebook[1::2] *= 1e5 / codebook[1::2].norm(dim=1, keepdim=True)
    return tokens, codebook


def quantize_case(features, codebook, learn=None, config=TILES, per_sample=False, statistics=True, **more):
    options = {"statistics": statistics, "loss_scale": 0.125, "per_sample": per_sample, "config": config}
    return {"call": "quantize", "arguments": (features, codebook, learn), "options": options, **more}


def nearest_case(features, codebook, config=TILES, **more):
    return {"call": "nearest", "arguments": (features, codebook), "options": {"config": config}, **more}


def search_cases():
    """Problems whose indices are held to the contract; N = 105, D = 24 and K = 50 divide by no tile."""
    for (name, (dtype, tiles)), layout, kind in product(
        SEARCHES.items(), LAYOUTS, ("normal", "offset", "halfway", "exploded")
    ):
        if (name, kind) == ("certified", "normal") and layout != "NCHW":
            continue  # which is slow here, and the sums come after the search
        tokens, codebook = spread(kind, normal(0, 3, 35, 24), normal(1, 50, 24))
        features = laid_out(tokens.to(dtype), layout)
        per_sample = kind == "offset"
        yield f"{kind} {layout} {name}", quantize_case(features, codebook.float(), config=tiles,
                                                       per_sample=per_sample,
                                                       statistics=kind == "normal")  # fmt: skip
    for name, (dtype, tiles) in SEARCHES.items():  # whole tiles, several of each axis
        tokens, codebook = spread("offset", normal(2, 2, 32, 64), normal(3, 96, 64))
        features, codebook = laid_out(tokens.to(dtype), "NCHW"), codebook.float()
        yield f"even {name}", quantize_case(features, codebook, config=tiles, per_sample=True,
                                            statistics=False)  # fmt: skip
        yield f"flattened {name}", nearest_case(features, codebook, (*tiles[:5], True, tiles[6]))
    for batch, space, dim, size in ((1, 1, 1, 1), (1, 1, 5, 3), (2, 3, 1, 7), (1, 40, 33, 1), (40, 1, 3, 9)):
        features, codebook = normal(4, batch, dim, space).float(), normal(5, size, dim).float()
        name = f"B={batch} S={space} D={dim} K={size}"
        yield name, quantize_case(features, codebook, per_sample=True, config=None)
        yield f"{name} certified", nearest_case(features, codebook, CERTIFIED)
    yield "long", quantize_case(normal(8, 1, 2, 1100).float(), normal(9, 3, 2).float(), per_sample=True,
                                statistics=False)  # fmt: skip
    features = normal(6, 4, 24, 50).float()[::2, ::2, 1::2]
    yield "strided", quantize_case(features, normal(7, 300, 12).float(), config=None)
    yield "strided certified", nearest_case(features, normal(7, 300, 12).float(), CERTIFIED)
    yield "expanded", quantize_case(features[:1].expand(3, -1, -1), normal(7, 300, 12).float())
    for name, (features, codebook) in BOUNDED.items():
        if not name.endswith(tuple(f" {scale:g}" for scale in UNSQUARED)):
            yield f"{name} certified", nearest_case(features, codebook, WIDE)


UNSQUARED = (1e-30, 1e-22, 1e25)  # squares outside float32: nothing exact, but no wrong certificate either


def bounded():
    """Float32 problems that say something about the error bounds of a certified search, 108 tokens each."""
    shape = Shape(3, 24, 6, 50)
    for name, make in (("feature-like", feature_like), ("clustered", clustered)):
        features, state = make(shape)
        yield name, (features.flatten(2), state.codes)
    codebook = normal(12, 50, 24).float()
    yield "exploded", (features.flatten(2), spread("exploded", None, codebook.clone())[1])
    yield "crowded", ((0.4 * normal(13, 3, 12, 36) + 2).float(), (0.4 * normal(14, 300, 12) + 2).float())
    yield "mixed", mixed()
    for scale in (1e-17, 1e-12, 1e12, 1e17, 1e18, *UNSQUARED):
        scaled = codebook * torch.where(torch.arange(50) % 3 == 0, scale, 1.0)[:, None]
        yield f"codes by {scale:g}", (features.flatten(2), scaled)
        yield f"tokens by {scale:g}", (features.flatten(2) * scale, scaled)
    yield "against rounding", against_rounding()
    direction = torch.full((24,), 24**-0.5)  # the nearest code is the one too long to be squared
    codes = torch.stack([-1.83e19 * direction, 1.86e19 * direction])
    yield "overflow by 1e+25", (1e18 * direction[None, :, None], codes)


def mixed():
    """Tokens with three codes about them, then some with two, then some with one."""
    middles, near = normal(15, 50, 24).float(), torch.tensor([0.0, -0.01, 0.01])[:, None, None]
    codebook = torch.cat([*(middles[:22] + near), *(middles[22:32] + near[1:]), middles[32:]])
    tokens = torch.cat([middles[:32] + 0.006, middles[32 + torch.arange(76) % 18] * 0.9])
    return laid_out(tokens[normal(16, 108).argsort()].view(3, 36, 24), "NCHW"), codebook


def against_rounding():
    """Tokens whose errors of rounding favour the farther of two codes by 0.65 of what the bound allows."""
    middle = 1 + 2**-6 + 2**-11  # between two numbers of tf32
    low, high = middle - 2**-22, middle + 2**-22  # the last to be rounded down, the first to be rounded up
    near, far = torch.zeros(2, 32)
    near[:16], far[16:] = low, high - 8 * 2**-10
    token = torch.tensor([low, high]).repeat_interleave(16)
    return token.expand(1, 7, 32).transpose(1, 2).contiguous(), torch.stack([far, near])


BOUNDED = dict(bounded())


def statistics_cases():
    """Problems for the sums: a stretch of 16 sorted tokens lies within codes, and codes within a stretch."""
    features, codebook = normal(10, 5, 6, 21).float(), normal(11, 40, 6).float()
    learn = torch.tensor([True, False, True, True, False])
    yield "many codes", quantize_case(features, codebook, sorted_rows=16, scan_cells=64)
    far = torch.cat([codebook[:3] + 100, codebook[:1], codebook[:2] - 90])
    yield "collapsed", quantize_case(features, far, sorted_rows=8)
    yield "two codes", quantize_case(features, codebook[:2], sorted_rows=16, per_sample=True)
    yield "masked", quantize_case(features, codebook, learn, sorted_rows=16)
    yield "all masked", quantize_case(features, codebook, learn & False, sorted_rows=16)
    yield "masked, by library", quantize_case(features, codebook, learn, sorted_rows=16, histogram_bytes=0)
    yield "by library", quantize_case(features, codebook, sorted_rows=16, histogram_bytes=0)


EMA = {  # threshold, grace, updates before, seed, decay
    "young": (0.5, 5, 4, 3, 0.8),
    "replacing": (0.9, 5, 5, -7, 0.8),
    "replacing many, decay in memory": (0.99, 0, 70000, 2**40 + 3, torch.tensor(0.75)),
    "never replacing": (0.0, 0, 9, 1, torch.tensor(0.5, dtype=torch.float64)),
    "not finite": (0.9, 0, 9, 1, 0.8),
    "no token": (0.9, 0, 9, 1, 0.8),
}


def ema_parts(name):
    """A layer before an update, and the features [B, D, S] of the update."""
    threshold, grace, updates, seed, decay = EMA[name]
    options = CodebookOptions(init="normal", dead_code_threshold=threshold, dead_code_grace=grace)
    dim = 130 if "many" in name or "finite" in name else 8
    layer = FeatureQuantize(dim, 37, decay=float(decay), options=options)
    layer.ema_count.copy_(normal(20, 37).abs())
    layer.ema_sum.copy_(normal(21, 37, dim))
    layer.codebook.copy_(normal(22, 37, dim))
    layer.num_updates.fill_(updates)
    layer.seed.fill_(seed)
    features = normal(23, 5, dim, 21).float()
    if name == "not finite":
        features[4, -1, 20] = torch.nan
    return layer, laid_out(features.transpose(1, 2), "channels-last" if "many" in name else "NCHW")


def packed_statistics(features, indices, size):
    counts, sums = code_sums(rows(features).float(), indices.flatten(), size)
    return torch.cat([sums, counts[:, None]], 1)


def ema_cases():
    for name, (threshold, grace, _, _, decay) in EMA.items():
        layer, features = ema_parts(name)
        indices = layer.eval()(features).indices
        packed = packed_statistics(features, indices, 37) * (name != "no token")
        state = (layer.codebook, layer.ema_count, layer.ema_sum, layer.num_updates, layer.seed)
        options = {"decay": decay, "dead_code_threshold": threshold, "dead_code_grace": grace}
        yield name, {"call": "ema_update_", "arguments": (*state, packed, features), "options": options}


def tie_cases():
    """Small integers make every score exact, so that equal distances are equal scores."""
    draw = torch.Generator().manual_seed(30)
    for name, (dtype, tiles) in SEARCHES.items():
        options = {"config": tiles, "statistics": False, "per_sample": True}
        features = torch.randint(-2, 3, (2, 3, 35), generator=draw).to(dtype)
        codebook = torch.randint(-2, 3, (100, 3), generator=draw).float()
        yield f"integers {name}", nearest_case(features, codebook, tiles)
        tripled = normal(31, 50, 24).float().repeat(3, 1)
        yield f"tripled {name}", nearest_case(normal(32, 2, 24, 35).to(dtype), tripled, tiles)
        yield f"doubled {name}", nearest_case(normal(32, 2, 24, 35).to(dtype), tripled[:100], tiles)
        features = normal(33, 2, 24, 35).to(dtype)
        yield f"clean {name}", quantize_case(features, tripled[:50], **options)
        features = features.clone()
        features[0, 5, 3], features[1, :, 7] = torch.nan, torch.nan
        yield f"with NaN {name}", quantize_case(features, tripled[:50], **options)
        broken = tripled[:50].clone()
        broken[::7], broken[1::7, 3], broken[2::7] = torch.inf, torch.nan, -torch.inf
        yield f"broken codes {name}", nearest_case(features.nan_to_num(0.5), broken, tiles)
        features = features.clone()
        features[0, :, 3], features[1, 4, 7], features[1, :, 8] = torch.inf, -torch.inf, -torch.inf
        yield f"with infinity {name}", nearest_case(features, tripled[:50], tiles)


def certificate_cases():
    """First passes of certified searches, and searches that trust in too small an error bound."""
    for name, (features, codebook) in BOUNDED.items():
        case = nearest_case(features, codebook, WIDE)
        yield f"certify {name}", case | {"call": "certify"}
    for kind, factor in (("mixed", 0.0), ("against rounding", 0.0), ("against rounding", 0.64)):
        yield f"{kind}, {factor} of the bound", nearest_case(*BOUNDED[kind], WIDE, bound=factor)


SEARCH, STATISTICS, TIES = dict(search_cases()), dict(statistics_cases()), dict(tie_cases())
with torch.no_grad():
    CASES = SEARCH | STATISTICS | TIES | dict(certificate_cases()) | dict(ema_cases())
RUNS = ["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"]


def worker(*arguments, **environment):
    done = subprocess.run([sys.executable, "-W", "error", "-m", "tests.kernels_worker", *map(str, arguments)],
                          cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module", params=RUNS)
def results(request, tmp_path_factory):
    """What the kernels return for every case."""
    folder = tmp_path_factory.mktemp("kernels")
    torch.save(CASES, folder / "cases.pt")
    interpret = "1" if request.param == "interpreter" else "0"
    worker("run", folder / "cases.pt", folder / "results.pt", TRITON_INTERPRET=interpret, OMP_NUM_THREADS="1")
    return torch.load(folder / "results.pt")


def assert_nearest(indices, features, codebook):
    """The contract: excess over the true minimum at most 8 · 2^-24 · (||x|| + ||e||)²."""
    batch, _, space = features.shape
    assert indices.dtype == torch.int64 and indices.shape == (batch, space)
    tokens, codes, chosen = rows(features).double(), codebook.double(), indices.flatten()
    exact = (tokens[:, None] - codes).square().sum(2)
    best, true = exact.min(1)
    norms = codes.norm(dim=1)
    longer = torch.maximum(norms[chosen], norms[true])
    slack = 8 * 2.0**-24 * (tokens.norm(dim=1) + longer).square()
    excess = exact.gather(1, chosen[:, None])[:, 0] - best
    assert (excess <= slack).all(), (excess / slack).max()


@pytest.mark.parametrize("name", SEARCH)
def test_indices_meet_the_exactness_contract(results, name):
    features, codebook = CASES[name]["arguments"][:2]
    assert_nearest(results[name][0], features, codebook)


@pytest.mark.parametrize("name", [name for name in SEARCH | STATISTICS if CASES[name]["call"] == "quantize"])
def test_difference_is_that_of_the_chosen_codes_and_lies_like_the_features(results, name):
    features, codebook = CASES[name]["arguments"][:2]
    indices, difference = results[name][:2]
    assert torch.equal(difference, features.float() - codebook[indices].transpose(1, 2))
    assert difference.stride() == torch.empty_like(features, dtype=torch.float32).stride()


@pytest.mark.parametrize("name", [name for name in SEARCH | STATISTICS if CASES[name]["call"] == "quantize"])
def test_loss_is_the_scaled_sum_of_squares_of_the_batch_or_of_each_sample(results, name):
    _, difference, loss, _ = results[name]
    expected = 0.125 * difference.double().square().sum((1, 2))
    if not CASES[name]["options"]["per_sample"]:
        expected = expected.sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in SEARCH | STATISTICS if CASES[name]["call"] == "quantize"])
def test_packed_holds_the_sums_and_numbers_of_the_tokens_of_each_code(results, name):
    features, codebook, learn = CASES[name]["arguments"]
    indices, _, _, packed = results[name]
    if not CASES[name]["options"]["statistics"]:
        assert packed.shape == (0,) and packed.dtype == torch.float32
        return
    if learn is not None:
        features, indices = features[learn], indices[learn]
    expected = packed_statistics(features, indices, len(codebook))
    scale = packed_statistics(features.abs(), indices, len(codebook))
    assert torch.equal(packed[:, -1], expected[:, -1])
    assert ((packed - expected).abs() <= 8 * 2.0**-24 * scale).all()  # also: no token, exactly zero


def test_the_statistics_cases_cover_what_they_are_meant_to_cover(results):
    counts = {name: results[name][3][:, -1] for name in STATISTICS}
    assert counts["collapsed"].tolist() == [0, 0, 0, 105, 0, 0]
    assert (counts["two codes"] > 16).all() and counts["many codes"].min() == 0
    assert counts["masked"].sum() == 63 and counts["all masked"].sum() == 0


def test_both_sorts_give_the_same_bits(results):
    assert torch.equal(results["many codes"][3], results["by library"][3])
    assert torch.equal(results["masked"][3], results["masked, by library"][3])


@pytest.mark.parametrize("dtype", SEARCHES)
def test_of_equal_distances_the_lowest_index_is_returned(results, dtype):
    features, codebook = CASES[f"integers {dtype}"]["arguments"]
    exact = (rows(features).double()[:, None] - codebook.double()).square().sum(2)
    lowest = (exact == exact.min(1, keepdim=True).values).double().argmax(1)
    assert torch.equal(results[f"integers {dtype}"][0].flatten(), lowest)


@pytest.mark.parametrize("dtype", SEARCHES)
@pytest.mark.parametrize("copies", ["doubled", "tripled"])
def test_of_equal_codes_the_first_is_returned(results, dtype, copies):
    indices = results[f"{copies} {dtype}"][0]
    assert indices.max() < 50 and indices.unique().numel() > 10
    assert_nearest(indices, *CASES[f"{copies} {dtype}"]["arguments"])


@pytest.mark.parametrize("dtype", SEARCHES)
def test_a_token_with_nan_gets_code_zero_and_disturbs_no_other(results, dtype):
    (clean, clean_difference, clean_loss, _), (indices, difference, loss, _) = (
        results[f"{kind} {dtype}"] for kind in ("clean", "with NaN")
    )
    others = torch.ones_like(indices, dtype=torch.bool)
    others[0, 3] = others[1, 7] = False
    assert indices[~others].tolist() == [0, 0] and clean[~others].min() > 0
    assert torch.equal(indices[others], clean[others])
    untouched = others[:, None].expand_as(difference)
    assert torch.equal(difference[untouched], clean_difference[untouched])
    assert loss.isnan().all() and clean_loss.isfinite().all()


@pytest.mark.parametrize("dtype", SEARCHES)
def test_infinite_tokens_still_get_a_valid_index(results, dtype):
    indices = results[f"with infinity {dtype}"][0]
    assert indices.min() >= 0 and indices.max() < 50


@pytest.mark.parametrize("dtype", SEARCHES)
def test_codes_that_are_not_finite_are_never_the_nearest(results, dtype):
    features, codebook = CASES[f"broken codes {dtype}"]["arguments"]
    finite = codebook.isfinite().all(1).nonzero()[:, 0]
    indices = results[f"broken codes {dtype}"][0]
    assert torch.isin(indices, finite).all()
    assert_nearest(torch.searchsorted(finite, indices), features, codebook[finite])


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_certified_is_the_nearest_code_beyond_doubt(results, name):
    features, codebook = BOUNDED[name]
    index, rival, certain, paired = (result.flatten() for result in results[f"certify {name}"])
    scores = rows(features).double() @ codebook.double().t() - codebook.double().square().sum(1) / 2
    top = scores.topk(min(3, len(codebook)))
    first, second, nearest = top.values[:, 0], top.values[:, 1], top.indices[:, 0]
    assert torch.equal(index[certain], nearest[certain]) and (first > second)[certain].all()
    assert (certain <= paired).all()
    assert ((index == nearest) | (rival == nearest))[paired].all()
    if len(codebook) > 2:  # no third is as near as the first
        assert (first > top.values[:, 2])[paired].all()


@pytest.mark.parametrize("name", ["feature-like", "clustered", "exploded", "crowded", "mixed"])
def test_all_is_certified_that_the_bound_allows(results, name):
    features, codebook = (part.double() for part in BOUNDED[name])
    index, rival, certain, paired = (result.flatten() for result in results[f"certify {name}"])
    tokens, dim = rows(features), codebook.shape[1]
    delta, eta = 1.01 * (2**-10 + (dim + 16) * 2**-22), 1.01 * (dim + 16) * 2**-25
    norms = codebook.norm(dim=1)
    bound = delta * tokens.norm(dim=1)[:, None] * norms + eta * norms.square()
    upper = to_tf32(tokens) @ to_tf32(codebook).t() - norms.square() / 2 + bound  # [N, K]
    values, indices = upper.topk(3)
    lower = values[:, 0] - 2 * bound.gather(1, indices[:, :1])[:, 0]
    assert torch.equal(certain, lower > values[:, 1]) and torch.equal(paired, lower > values[:, 2])
    assert torch.equal(index[certain], indices[certain, 0])
    pair = torch.stack([index, rival], 1).sort(1).values
    assert torch.equal(pair[paired & ~certain], indices[paired & ~certain, :2].sort(1).values)


def to_tf32(values):
    """Float32 values, in float64, rounded to a mantissa of 10 bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


def test_most_tokens_like_features_are_certified_and_long_codes_spoil_none(results):
    certain, paired = (
        {name: results[f"certify {name}"][part].double().mean().item() for name in BOUNDED} for part in (2, 3)
    )
    assert certain["feature-like"] > 0.9 and certain["clustered"] > 0.9 and certain["exploded"] > 0.9
    assert certain["mixed"] == 76 / 108 and paired["mixed"] == 86 / 108  # so 22 are gathered, 16 at a time
    assert 0.3 < certain["crowded"] < paired["crowded"] < 0.7  # so the whole tile is searched
    assert certain["against rounding"] == 0


@pytest.mark.parametrize("name", [name for name in CASES if "of the bound" in name])
def test_with_less_than_the_bound_wrong_codes_would_be_certified(results, name):
    with pytest.raises(AssertionError):
        assert_nearest(results[name][0], *CASES[name]["arguments"])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 16385)])
def test_a_certified_search_is_refused_where_its_bound_does_not_hold(dtype, dim):
    from fq import kernels

    features, codebook = (
        torch.empty(1, dim, 4, dtype=dtype, device="meta"),
        torch.empty(3, dim, device="meta"),
    )
    config = kernels.Config(*CERTIFIED)
    text = f"needs float32 features of at most 16384 channels, got {dtype} with {dim}"
    with pytest.raises(ValueError, match=text):
        kernels.nearest(features, codebook, config=config)
    with pytest.raises(ValueError, match=text):
        kernels.quantize(features, codebook, None, statistics=False, loss_scale=1.0, per_sample=False,
                         config=config)  # fmt: skip


@pytest.mark.parametrize("name", EMA)
def test_an_update_does_what_the_layer_does_in_pytorch(results, name):
    layer, features = ema_parts(name)
    before = [buffer.clone() for buffer in (layer.codebook, layer.ema_count, layer.ema_sum)]
    skipped = name in ("not finite", "no token")
    if not skipped:
        layer.train()(features)
    valid, codebook, count, total, updates, seed = results[name][:6]
    assert valid.shape == () and valid.dtype == torch.bool and bool(valid) is not skipped
    assert updates == layer.num_updates and seed == layer.seed
    moved = (layer.codebook, layer.ema_count, layer.ema_sum)
    if skipped:
        assert all(map(torch.equal, (codebook, count, total), before))
        return
    assert not any(map(torch.equal, moved, before))
    for kernels, pytorch in zip((codebook, count, total), moved, strict=True):
        torch.testing.assert_close(kernels, pytorch, rtol=2e-6, atol=1e-6)
    # A replaced code is a token to the bit, so the same codes were replaced, and by the same tokens.
    replaced = (layer.codebook[:, None] == rows(features)).all(2).any(1)
    assert replaced.sum() >= {"young": 0, "never replacing": 0, "replacing": 8}.get(name, 15)
    assert torch.equal(codebook[replaced], layer.codebook[replaced])
    assert torch.equal((codebook[:, None] == rows(features)).all(2).any(1), replaced)


def test_the_layer_itself_skips_what_the_kernels_skip():
    layer, features = ema_parts("not finite")
    before = layer.codebook.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        layer.train()(features)
    assert torch.equal(layer.codebook, before) and layer.num_updates == 9


class Operations(TorchDispatchMode):
    """Names of the operations run, and the bytes and largest number of elements of what they made."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes, self.largest = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func._schema.name.split("::")[1])
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.bytes += sum(leaf.numel() * leaf.itemsize for leaf in made)
        self.largest = max([self.largest, *(leaf.numel() for leaf in made)])
        return result


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_a_step_is_few_launches_and_little_memory(monkeypatch, statistics, certified):
    from fq import kernels

    launches = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *_, **__: launches.append(kernel.__name__))
    tokens, dim, size = 65536, 64, 512
    features = torch.empty(64, dim, tokens // 64, device="meta")
    codebook, number = (
        torch.empty(size, dim, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
    )
    count = torch.empty(size, device="meta")
    config = kernels.Config(*CERTIFIED) if certified else None
    with Operations() as seen:
        *outputs, packed = kernels.quantize(features, codebook, None, statistics=statistics, loss_scale=1.0,
                                            per_sample=False, config=config)  # fmt: skip
        if statistics:
            kernels.ema_update_(codebook, count, codebook, number, number, packed, features, decay=0.8,
                                dead_code_threshold=0.03, dead_code_grace=10)  # fmt: skip
    assert len(launches) == (7 if statistics else 2)
    assert seen.names <= {"empty", "empty_like", "new_empty"}  # nothing that would be a launch of its own
    assert seen.largest == tokens * dim  # the difference; tokens times codes would be eight times as many
    made = sum(tensor.numel() * tensor.itemsize for tensor in (*outputs, packed))
    assert seen.bytes - made <= 16 * tokens + 64 * size * dim + (32 << 20)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Every launch of the benchmark's shapes, compiled for an H100 or H200."""
    path = tmp_path_factory.mktemp("kernels") / "compiled.json"
    worker("compile", path, TRITON_INTERPRET="0")
    return json.loads(path.read_text())


def test_all_kernels_compile_for_the_benchmarks_shapes_and_fit(compiled):
    kernels = {launch["kernel"] for launch in compiled}
    assert len(kernels) == 7 and len({launch["case"] for launch in compiled}) == 14
    for launch in compiled:
        assert launch["shared"] <= 163 * 1024, launch  # an A100's; an H100 has 227
        assert launch["stack"] <= 64, launch  # bytes that a thread keeps in memory for want of registers
        assert launch["tensor_cores"] == (launch["kernel"] == "search_kernel"), launch
