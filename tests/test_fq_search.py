import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch._dynamo.testing import CompileCounter

import fq.search as search_module
from fq import CodebookOptions, FeatureQuantize, ops
from fq.search import code_sums, nearest, pack

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Squared distances in float64, difference first: no cancellation."""
    return (features.double()[:, None] - codebook.double()).square().sum(2)


def assert_nearest(indices: torch.Tensor, features: torch.Tensor, codebook: torch.Tensor) -> None:
    """The contract: excess over the true minimum at most 8 · 2^-24 · (||x|| + ||e||)²."""
    assert indices.dtype == torch.int64 and indices.shape == (len(features),)
    exact = distances(features, codebook)
    best, true = exact.min(1)
    norms = codebook.double().norm(dim=1)
    longer = torch.maximum(norms[indices], norms[true])
    slack = 8 * 2.0**-24 * (features.double().norm(dim=1) + longer).square()
    excess = exact.gather(1, indices[:, None])[:, 0] - best
    assert (excess <= slack).all(), (excess / slack).max()


@pytest.fixture(params=["linear", "conv", "mm"])
def product(request, monkeypatch):
    """Every product that a CPU may choose from."""
    if request.param not in search_module._usable_products():
        pytest.skip(f"this PyTorch has no {request.param}")
    monkeypatch.setattr(search_module, "_cpu_product", lambda: request.param)
    for least in ("_LAYOUT_CHANNELS", "_LAYOUT_WORK"):  # whatever the size
        monkeypatch.setattr(search_module, least, 0)
    return request.param


# The product is chosen once for all examples of a test.
settings.register_profile("fixtures", suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("fixtures")


@settings(max_examples=200, deadline=None)
@given(
    seed=seeds,
    n=st.integers(1, 90),
    k=st.sampled_from([1, 2, 31, 32, 33, 50, 64, 256, 257, 300, 511, 1024, 1100]),
    d=st.sampled_from([1, 2, 7, 16, 33, 130]),
    kind=st.sampled_from(
        ["normal", "relu", "offset", "tiny", "alive among exploded", "sphere", "duplicated", "at the codes"]
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_nearest_meets_the_exactness_contract(product, seed, n, k, d, kind, dtype):
    features, codebook = normal(seed, n, d), normal(seed + 1, k, d)
    if kind == "relu":
        features = features.relu()
    elif kind == "offset":
        features, codebook = features * 0.1 + 20, codebook * 0.1 + 20
    elif kind == "tiny":
        features = features * 1e-3
    elif kind == "sphere":
        codebook = codebook / codebook.norm(dim=1, keepdim=True)
    elif kind == "alive among exploded":
        codebook[1::2] *= 1e5 / codebook[1::2].norm(dim=1, keepdim=True)
    elif kind == "duplicated":
        codebook = codebook[torch.arange(k) % max(1, k // 3)]
    elif kind == "at the codes":
        features = codebook[torch.arange(n) % k] + 1e-4 * features
    features = features.to(dtype)
    codebook = codebook.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert_nearest(nearest(features, codebook), features, codebook)


@settings(max_examples=120, deadline=None)
@given(
    seed=seeds,
    n=st.integers(1, 70),
    k=st.sampled_from([1, 2, 5, 50, 300, 1030]),
    d=st.sampled_from([1, 2, 3, 40]),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_between_different_codes_go_to_the_lowest_index(product, seed, n, k, d, dtype):
    # Small integers make every score exact, so that equal distances are equal scores, and there are many.
    draw = torch.Generator().manual_seed(seed)
    features = torch.randint(-2, 3, (n, d), generator=draw).to(dtype)
    codebook = torch.randint(-2, 3, (k, d), generator=draw).float()
    exact = distances(features, codebook)
    lowest = (exact == exact.min(1, keepdim=True).values).double().argmax(1)
    assert torch.equal(nearest(features, codebook), lowest)


@settings(max_examples=120, deadline=None)
@given(seed=seeds, n=st.integers(1, 70), k=st.integers(1, 400), d=st.integers(1, 70),
       dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_of_equal_codes_the_first_is_returned(product, seed, n, k, d, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codebook = normal(seed, k, d).to(wide)
    features = normal(seed + 1, n, d).to(dtype)
    tripled = torch.cat([codebook, codebook, codebook])
    indices = nearest(features, tripled)
    assert indices.max() < k
    assert_nearest(indices, features, codebook)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook_size", [1, 50, 300])
@pytest.mark.parametrize("tokens", [7, 16, 50])
def test_a_token_with_nan_gets_code_zero_and_disturbs_no_other(product, dtype, codebook_size, tokens):
    features = normal(0, tokens, 24).to(dtype)
    codebook = normal(1, codebook_size, 24).float()
    clean = nearest(features, codebook)
    features[3, 5] = torch.nan
    features[5] = torch.nan
    indices = nearest(features, codebook)
    assert indices[3] == 0 and indices[5] == 0
    others = [row for row in range(tokens) if row not in (3, 5)]
    assert torch.equal(indices[others], clean[others])


def test_infinite_tokens_still_get_a_valid_index(product):
    features = normal(0, 40, 8).float()
    features[0], features[1, 2], features[2] = torch.inf, -torch.inf, -torch.inf
    for codebook_size in (5, 64, 300):
        indices = nearest(features, normal(1, codebook_size, 8).float())
        assert indices.min() >= 0 and indices.max() < codebook_size


@settings(max_examples=40, deadline=None)
@given(chunk_size=st.integers(1, 400), k=st.sampled_from([3, 50, 700]), dtype=st.sampled_from(DTYPES))
def test_any_chunk_size_gives_the_same_codes(product, chunk_size, k, dtype):
    codebook = normal(0, k, 12).float()
    features = (codebook[torch.arange(333) % k] + 0.05 * normal(1, 333, 12)).to(dtype)
    assert torch.equal(nearest(features, codebook, chunk_size=chunk_size), torch.arange(333) % k)


@pytest.mark.parametrize("codebook_size", [4, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_give_no_indices(codebook_size, dtype):
    indices = nearest(torch.zeros(0, 6, dtype=dtype), torch.zeros(codebook_size, 6, dtype=dtype))
    assert indices.shape == (0,) and indices.dtype == torch.int64


def test_tokens_and_codes_may_be_strided_views():
    features, codebook = normal(0, 20, 16).float(), normal(1, 16, 40).float()
    assert torch.equal(nearest(features.t().contiguous().t(), codebook.t()),
                       nearest(features, codebook.t().contiguous()))  # fmt: skip
    assert torch.equal(nearest(features[:, ::2], codebook[::2].t()),
                       nearest(features[:, ::2].contiguous(), codebook[::2].t().contiguous()))  # fmt: skip


def test_search_stays_float32_under_autocast_and_keeps_no_graph():
    codebook = torch.tensor([[1.0], [1.001]], requires_grad=True)  # equal in bfloat16
    features = torch.tensor([[1.0009]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = nearest(features, codebook)
    assert indices.tolist() == [1] and not indices.requires_grad


@pytest.mark.parametrize(
    ("features", "codebook", "chunk_size", "message"),
    [
        ((4, 3), (2, 5), None, "features have 3 channels but the codebook has 5"),
        ((4, 3), (0, 3), None, "the codebook has 0 codes: give it at least one"),
        ((4, 3, 2), (2, 3), None, r"shape \[4, 3, 2\] .* pass matrices \[N, D\] and \[K, D\]"),
        ((4, 3), (3,), None, r"the codebook \[3\]: pass matrices"),
        ((4, 3), (2, 3), 0, "chunk_size is 0: give a positive number"),
    ],
)
def test_unusable_input_is_refused(features, codebook, chunk_size, message):
    with pytest.raises(ValueError, match=message):
        nearest(torch.zeros(features), torch.zeros(codebook), chunk_size=chunk_size)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, n=st.integers(0, 60), k=st.integers(1, 40), d=st.integers(1, 9))
def test_code_sums_equal_a_loop(seed, n, k, d):
    features = normal(seed, n, d)
    indices = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed))
    counts, sums = code_sums(features, indices, k)
    expected_counts, expected_sums = torch.zeros(k, dtype=torch.float64), features.new_zeros(k, d)
    for token, code in zip(features, indices.tolist(), strict=True):
        expected_counts[code] += 1
        expected_sums[code] += token
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected_sums, rtol=0, atol=1e-13)


def test_code_sums_keep_counts_that_half_precision_would_lose():
    counts, sums = code_sums(torch.ones(5001, 2), torch.zeros(5001, dtype=torch.int64), 2)
    assert counts.tolist() == [5001.0, 0.0] and sums.tolist() == [[5001.0, 5001.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_of_tokens_times_codes_is_made(dtype):
    tokens, codes = 1 << 15, 512
    features, codebook = torch.randn(tokens, 2, dtype=dtype), torch.randn(codes, 2, dtype=dtype)
    with LargestTensor() as seen:
        indices = nearest(features, codebook)
        code_sums(features, indices, codes)
    assert tokens * 2 <= seen.largest <= tokens * codes // 8


@pytest.mark.parametrize("training", [True, False])
def test_no_step_of_a_layer_makes_a_tensor_of_tokens_times_codes(training):
    layer = FeatureQuantize(4, 512, mode="replace", options=CodebookOptions(init="normal")).train(training)
    features = torch.randn(32, 4, 32, 32, requires_grad=True)  # 32768 tokens
    with LargestTensor() as seen:
        output, _, loss = layer(features)
        (output.sum() + loss).backward()
    assert seen.largest <= 32768 * 512 // 8


def test_the_statistics_of_a_frozen_or_evaluated_layer_are_not_made(monkeypatch):
    layer = FeatureQuantize(4, 8, options=CodebookOptions(init="normal"))
    monkeypatch.setattr(search_module, "pack", lambda *_: pytest.fail("statistics were made"))
    layer.eval()(torch.randn(3, 4, 2))
    layer.train().freeze()
    layer(torch.randn(3, 4, 2))
    layer.freeze(False)
    with pytest.raises(pytest.fail.Exception):
        layer(torch.randn(3, 4, 2))


def test_the_detector_of_large_tensors_sees_one():
    with LargestTensor() as seen:
        torch.cdist(torch.randn(100, 2), torch.randn(50, 2))
    assert seen.largest == 5000


# The choice of the product


@pytest.fixture
def unchosen(monkeypatch):
    monkeypatch.delenv(search_module.GEMM_VARIABLE, raising=False)
    search_module._cpu_product.cache_clear()
    yield
    search_module._cpu_product.cache_clear()


def test_the_environment_may_choose_the_product(monkeypatch, unchosen):
    monkeypatch.setattr(search_module.time, "perf_counter", lambda: pytest.fail("a clock was read"))
    for value in search_module._usable_products():
        search_module._cpu_product.cache_clear()
        monkeypatch.setenv(search_module.GEMM_VARIABLE, value)
        assert search_module._cpu_product() == value


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"linear": 1.0, "conv": 2.0, "mm": 2.0}, "linear"),
        ({"linear": 2.0, "conv": 1.0, "mm": 2.0}, "conv"),
        ({"linear": 2.0, "conv": 2.0, "mm": 1.0}, "mm"),
        ({"linear": 1.4, "conv": 1.0, "mm": 1.0}, "linear"),  # too close to call
        ({"conv": 1.1, "mm": 1.0}, "conv"),
        ({"mm": 1.0}, "mm"),
    ],
)
def test_the_clearly_faster_product_is_chosen_once(monkeypatch, unchosen, seconds, chosen):
    now, built = [0.0], []

    def build(self, codebook, product):
        built.append(product)
        self.product = product

    def run(self, features):
        now[0] += seconds[self.product]

    monkeypatch.setattr(search_module, "_usable_products", lambda: list(seconds))
    monkeypatch.setattr(search_module._BestOnCPU, "__init__", build)
    monkeypatch.setattr(search_module._BestOnCPU, "__call__", run)
    monkeypatch.setattr(search_module.time, "perf_counter", lambda: now[0])
    assert search_module._cpu_product() == search_module._cpu_product() == chosen
    assert built == list(seconds)


def test_an_unknown_product_is_refused(monkeypatch, unchosen):
    monkeypatch.setenv(search_module.GEMM_VARIABLE, "blas")
    with pytest.raises(ValueError, match=r"FQ_CPU_GEMM is 'blas': set it to one of .*mm, or leave it out"):
        nearest(torch.zeros(3, 2), torch.zeros(2, 2))


def test_a_program_that_lowers_precision_gets_it_back_and_does_not_reach_the_search(monkeypatch):
    matmul, conv, seen = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, []
    argmax = search_module._BestOnCPU._argmax

    def look(self, scores):
        seen.append((matmul.fp32_precision, conv.fp32_precision))
        return argmax(self, scores)

    monkeypatch.setattr(search_module._BestOnCPU, "_argmax", look)
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision = conv.fp32_precision = "bf16"
        nearest(torch.randn(40, 8), torch.randn(300, 8))
        assert set(seen) == {("ieee", "ieee")}
        assert (matmul.fp32_precision, conv.fp32_precision) == ("bf16", "bf16")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before


# The operators


def arguments(dtype: torch.dtype, layout: str, *, per_sample: bool, learn: bool = True) -> tuple:
    features = normal(0, 3, 5, 7).to(dtype)
    if layout == "rows":
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    codebook = normal(1, 4, 5).to(torch.float64 if dtype == torch.float64 else torch.float32)
    mask = torch.tensor([True, False, True]) if learn else None
    return features.requires_grad_(), codebook, mask, None, True, per_sample


# The check itself reads gradients of tensors that are no leaves.
reads_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@reads_gradients
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operator_keeps_every_promise_of_an_operator(dtype, layout, per_sample):
    given_to_it = arguments(dtype, layout, per_sample=per_sample)
    torch.library.opcheck(torch.ops.fq.quantize.default, given_to_it)


@reads_gradients
@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 5, 1), (3, 5, 1), (1, 5, 1100)])
def test_the_operator_keeps_its_promises_of_one_sample_or_one_place(shape):
    codebook = normal(1, 4, 5).float()
    for features in (normal(0, *shape).float(), normal(0, *shape[::-1]).float().permute(2, 1, 0)):
        torch.library.opcheck(torch.ops.fq.quantize.default, (features, codebook, None, None, True, False))


@reads_gradients
def test_the_operator_for_classes_and_the_search_do_too():
    features, codebook, *rest = arguments(torch.float32, "columns", per_sample=False)
    labels = torch.tensor([1, 0, 1])
    books = torch.stack([codebook, codebook + 1])
    torch.library.opcheck(torch.ops.fq.quantize.default, (features, books, None, labels, *rest[2:]))
    torch.library.opcheck(torch.ops.fq.nearest.default, (features.detach()[0].t(), codebook, 0))


@pytest.mark.parametrize("per_sample", [True, False])
def test_first_and_second_derivatives_are_those_for_fixed_codes(per_sample):
    features, codebook, *_ = arguments(torch.float64, "columns", per_sample=per_sample)
    for operator in (ops.quantize, through_the_dispatcher):

        def outputs(x, operator=operator):
            return operator(x, codebook, statistics=True, per_sample=per_sample)[:2]

        assert torch.autograd.gradcheck(outputs, (features,))
        assert torch.autograd.gradgradcheck(outputs, (features,))


def through_the_dispatcher(x, codebook, *, statistics, per_sample):
    return torch.ops.fq.quantize(x, codebook, None, None, statistics, per_sample)


def test_both_routes_to_the_operator_agree():
    for dtype in DTYPES:
        given_to_it = arguments(dtype, "columns", per_sample=True)
        eager = ops.quantize(*given_to_it[:3], statistics=True, per_sample=True)
        for one, other in zip(eager, torch.ops.fq.quantize(*given_to_it), strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("mode", ["regularize", "replace", "blend"])
def test_one_graph_serves_all_batch_sizes(mode):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = FeatureQuantize(4, 8, mode=mode, options=CodebookOptions(init="normal"))
    graph = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 9, 30):  # none like another size: equal sizes are taken for one
        graph(torch.randn(batch, 4, 3, 3))
    assert counter.frame_count == 1


def test_two_graphs_serve_all_batch_sizes_without_asking_for_it():
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = FeatureQuantize(4, 8, options=CodebookOptions(init="normal"))
    graph = torch.compile(layer, fullgraph=True, backend=counter)
    for batch in (5, 9, 30, 17):
        graph(torch.randn(batch, 4, 3, 3))
    assert counter.frame_count == 2  # the first is taken for a constant


def test_statistics_leave_out_the_code_that_stands_for_none():
    features = normal(0, 6, 3)
    packed = pack(features, torch.tensor([0, 2, 1, 2, 0, 2]), 2)
    torch.testing.assert_close(
        packed[0], torch.cat([features[0] + features[4], torch.tensor([2.0])]).double()
    )
    torch.testing.assert_close(packed[1], torch.cat([features[2], torch.tensor([1.0])]).double())
