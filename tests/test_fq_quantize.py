import copy
import json
import math
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fq import CodebookOptions, FeatureQuantize, stats

GOLDEN = Path(__file__).parent / "data" / "golden" / "fq"
MODES = ("regularize", "replace", "blend")
KEEP = CodebookOptions(init="normal", dead_code_threshold=0.0)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_with(codes: torch.Tensor, **settings) -> FeatureQuantize:
    """A layer that holds exactly these codes, as if it had been initialised with them."""
    settings.setdefault("options", KEEP)
    layer = FeatureQuantize(codes.shape[1], len(codes), **settings).to(codes.dtype)
    layer.codebook.copy_(codes)
    layer.ema_sum.copy_(codes if layer.compat else torch.zeros_like(codes))
    return layer


def state(layer: FeatureQuantize) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def shares_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# Values of one forward


def test_output_indices_and_loss_of_each_mode_by_hand():
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    features = torch.tensor([[1.0, 1.0], [9.0, 2.0]])  # squared distances 2 and 5 over two channels
    quarter = 0.75 * features + 0.25 * codes
    for mode, values in (("regularize", features), ("replace", codes), ("blend", quarter)):
        options = CodebookOptions(init="normal", dead_code_threshold=0.0, blend_steps=4)
        layer = layer_with(codes, mode=mode, commitment_weight=3.0, options=options).eval()
        layer.num_updates.fill_(1)
        output, indices, loss = layer(features)
        assert indices.tolist() == [0, 1]
        torch.testing.assert_close(output, values)
        assert loss.item() == pytest.approx(3.0 * (2 + 5) / 4)
        none = layer_with(codes, reduction="none", commitment_weight=3.0).eval()
        assert none(features).loss.tolist() == pytest.approx([3.0, 7.5])


def test_regularize_returns_the_features_themselves():
    features = normal(0, 2, 4, 3, 3)
    assert FeatureQuantize(4, 8)(features).features is features


def test_blend_grows_linearly_between_start_and_end():
    options = CodebookOptions(init="normal", blend_start=2, blend_steps=4, blend_end=0.8)
    codes, features = torch.tensor([[4.0]]), torch.tensor([[3.0]])
    layer = layer_with(codes, mode="blend", decay=0.0, options=options)
    shares = []
    for _ in range(9):
        shares.append(layer(features).features - features)
        layer.codebook.copy_(codes)  # undo the update: one unit from the feature
    expected = [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    assert [share.item() for share in shares] == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    mode=st.sampled_from(MODES),
    channel_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_every_layout_quantises_each_token_by_itself(batch, spatial, mode, channel_last, dtype):
    options = CodebookOptions(init="normal", blend_steps=1, channel_last=channel_last)
    codes = normal(0, 7, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    layer = layer_with(codes, mode=mode, options=options).eval()
    layer.num_updates.fill_(1)
    features = normal(1, batch, *spatial, 5, dtype=dtype)
    given_features = features if channel_last else features.movedim(-1, 1)
    output, indices, loss = layer(given_features)
    assert output.shape == given_features.shape and output.dtype == dtype
    assert indices.shape == (batch, *spatial) and loss.dtype == codes.dtype
    expected = (features[..., None, :].double() - codes.double()).square().sum(-1)
    assert torch.equal(indices, expected.argmin(-1))
    assert loss.item() == pytest.approx(expected.min(-1).values.mean().item() / 5, rel=1e-5)
    if mode != "regularize":
        decoded = layer.decode(indices)
        assert decoded.shape == output.shape
        tolerance = 1e-2 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(output, decoded.to(dtype), rtol=tolerance, atol=tolerance)


def test_decode_gives_the_codes_of_the_indices():
    layer = layer_with(normal(0, 6, 3))
    decoded = layer.decode(torch.tensor([[[0, 5], [2, 2]]]))
    assert decoded.shape == (1, 3, 2, 2)
    assert torch.equal(decoded[0, :, 0, 1], layer.codebook[5])
    assert torch.equal(decoded[0, :, 1, 0], layer.codebook[2])


@pytest.mark.parametrize("mode", ["replace", "blend"])
@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 1, 1), (2, 4), (1, 4, 5)])
def test_output_keeps_the_memory_format_and_is_never_a_view_of_its_input(mode, shape):
    layer = layer_with(normal(0, 6, 4), mode=mode).eval()
    features = normal(1, *shape)
    output = layer(features).features
    assert output.is_contiguous() and not shares_memory(output, features)
    if len(shape) == 4:
        last = features.to(memory_format=torch.channels_last)
        output = layer(last).features
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert not shares_memory(output, last)


# Gradients


def separated(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes far apart and features near them: no small step changes an index."""
    codes = 4.0 * torch.eye(5, 3, dtype=dtype) - 4.0 * torch.eye(5, 3, dtype=dtype).roll(3, 0)
    features = codes[torch.tensor([0, 1, 2, 3, 4, 1, 0, 2])] + 0.3 * normal(1, 8, 3, dtype=dtype)
    return codes, features.view(2, 2, 2, 3).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_the_identity_plus_the_pull_to_the_code(mode, reduction):
    codes, features = separated()
    layer = layer_with(codes, mode=mode, reduction=reduction, commitment_weight=1.7, decay=0.5)
    features.requires_grad_()
    output, indices, loss = layer(features)
    cotangent, scale = normal(2, *features.shape, dtype=torch.float64), torch.tensor([0.4, 2.5]).double()
    weight = scale if reduction == "none" else torch.tensor(0.9, dtype=torch.float64)
    (output * cotangent).sum().add((loss * weight).sum()).backward()
    quantized = codes[indices].permute(0, 3, 1, 2)  # the codes before the update that the forward made
    if reduction == "none":
        pull = 2 * 1.7 * (features - quantized) / features[0].numel() * scale[:, None, None, None]
    else:
        pull = 2 * 1.7 * (features - quantized) / features.numel() * 0.9
    torch.testing.assert_close(features.grad, cotangent + pull, rtol=0, atol=1e-12)
    assert not torch.equal(layer.codebook, codes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives_agree_with_finite_differences(mode, reduction):
    codes, features = separated()
    layer = layer_with(codes, mode=mode, reduction=reduction, commitment_weight=1.7).eval()
    indices = layer(features).indices

    def forward(x):
        output, found, loss = layer(x)
        assert torch.equal(found, indices)
        # A straight-through gradient is not that of the value; test_gradient_is_the_identity has it.
        return loss if mode != "regularize" else (output.square(), loss)

    assert torch.autograd.gradcheck(forward, features.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(forward, features.clone().requires_grad_())


@pytest.mark.parametrize("mode", MODES)
def test_gradient_penalty_sees_the_identity(mode):
    codes, features = separated()
    layer = layer_with(codes, mode=mode).eval()
    features.requires_grad_()
    head = normal(3, 3, dtype=torch.float64).requires_grad_()
    scores = torch.einsum("bchw,c->b", layer(features).features, head)
    (gradient,) = torch.autograd.grad(scores.sum(), features, create_graph=True)
    penalty = gradient.square().sum()
    penalty.backward()
    assert penalty.item() == pytest.approx(8 * head.square().sum().item())
    torch.testing.assert_close(head.grad, 2 * 8 * head.detach())
    hessian = torch.autograd.functional.hessian(lambda x: layer(x).loss, features.detach())
    count = features.numel()
    identity = torch.eye(count, dtype=torch.float64)
    torch.testing.assert_close(hessian.reshape(count, count), 2 / count * identity)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channel_last", [False, True])
def test_in_place_operations_on_output_and_input_leave_the_gradient_right(mode, channel_last):
    options = CodebookOptions(init="normal", dead_code_threshold=0.0, channel_last=channel_last)
    codes = normal(0, 6, 4)
    source = normal(1, 2, 4, 3, 3) if not channel_last else normal(1, 2, 3, 4)
    layer = layer_with(codes, mode=mode, options=options).eval()
    leaf = source.clone().requires_grad_()
    features = leaf * 1.0
    output, indices, loss = layer(features)
    quantized = layer.decode(indices)
    output.mul_(3.0)
    if mode != "regularize":
        features.add_(100.0)
    (output.sum() + loss).backward()
    torch.testing.assert_close(leaf.grad, 3 + 2 * (source - quantized) / source.numel(), rtol=1e-5, atol=1e-5)


def test_codebook_updates_between_forward_and_backward_do_not_reach_the_gradient():
    codes, features = separated()
    layer = layer_with(codes, mode="replace", decay=0.0)
    features.requires_grad_()
    loss = layer(features).loss
    for seed in range(3):
        layer(normal(seed, 4, 3, 2, 2, dtype=torch.float64))
    loss.backward()
    still = layer_with(codes).eval()
    other = features.detach().clone().requires_grad_()
    still(other).loss.backward()
    assert torch.equal(features.grad, other.grad)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_forward_updates_once_and_has_the_gradient_of_the_first_pass(mode, reentrant):
    codes, features = separated()

    def step(run):
        layer = layer_with(codes, mode=mode, decay=0.0)
        inputs = features.clone().requires_grad_()
        output, loss = run(lambda x: layer(x)[::2], inputs)
        (output.square().sum() + loss).backward()
        return inputs.grad, state(layer)

    plain, expected = step(lambda function, x: function(x))
    again, actual = step(lambda function, x: checkpoint(function, x, use_reentrant=reentrant))
    assert torch.equal(plain, again) and same(expected, actual) and actual["num_updates"] == 1


# The dictionary


def test_update_moves_hit_codes_to_the_ratio_of_their_averages_and_keeps_the_others_exactly():
    codes = torch.tensor([[0.0, 0.0], [10.0, 0.0], [500.0, 500.0]], dtype=torch.float64)
    layer = layer_with(codes, decay=0.75)
    first = torch.tensor([[1.0, 0.0], [3.0, 2.0], [8.0, 0.0]], dtype=torch.float64)
    layer(first)
    assert layer.ema_count.tolist() == [0.5, 0.25, 0.0]
    assert layer.ema_sum.tolist() == [[1.0, 0.5], [2.0, 0.0], [0.0, 0.0]]
    assert layer.codebook.tolist() == [[2.0, 1.0], [8.0, 0.0], [500.0, 500.0]]
    layer(torch.tensor([[6.0, 1.0]], dtype=torch.float64))  # nearest to the moved second code
    assert layer.ema_count.tolist() == [0.375, 0.4375, 0.0]
    assert layer.codebook[0].tolist() == [2.0, 1.0]
    torch.testing.assert_close(layer.codebook[1], torch.tensor([3.0, 0.25], dtype=torch.float64) / 0.4375)
    assert layer.codebook[2].tolist() == [500.0, 500.0]
    assert layer.num_updates == 2


def test_decay_zero_puts_hit_codes_on_the_mean_of_the_batch():
    layer = layer_with(torch.tensor([[0.0], [10.0]]), decay=0.0)
    layer(torch.tensor([[1.0], [2.0], [9.0]]))
    layer(torch.tensor([[2.0], [4.0]]))
    assert layer.codebook.tolist() == [[3.0], [9.0]]


def test_unused_codes_keep_their_vectors_over_many_updates():
    codes = torch.cat([normal(0, 4, 3), 100 + normal(1, 4, 3)])
    layer = layer_with(codes, decay=0.5)
    for seed in range(60):
        layer(normal(seed, 16, 3))
    assert torch.equal(layer.codebook[4:], codes[4:]) and layer.codebook[:4].abs().max() < 5


def test_original_pytorch_dictionary_follows_its_closed_forms():
    codes = torch.cat([torch.eye(2), torch.full((3, 2), 50.0)]).double()
    options = CodebookOptions(epsilon=1e-5)
    layer = layer_with(codes, decay=0.8, compat="torch", options=options)
    batch = torch.eye(2, dtype=torch.float64).repeat(8, 1)  # 16 tokens on codes 0 and 1
    for step in range(1, 13):
        layer(batch)
        total = (1 - 0.8**step) * 16
        factor = 0.8**step * (total + 5 * 1e-5) / (1e-5 * total)  # a code that was never hit explodes
        torch.testing.assert_close(layer.codebook[2:], codes[2:] * factor, rtol=1e-9, atol=0)
        # Code 0 is the centroid, up to its first vector that fades, and to epsilon.
        used = (0.8**step + 8 * (1 - 0.8**step)) / (8 * (1 - 0.8**step) + 1e-5) * (total + 5e-5) / total
        torch.testing.assert_close(layer.codebook[0], codes[0] * used, rtol=1e-9, atol=0)
    count, average = layer.ema_count.clone(), layer.ema_sum[1].clone()
    for step in range(1, 80):  # code 1 is abandoned: it stays for long, then goes to zero
        layer(torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(16, 1))
        total = layer.ema_count.sum()
        expected = average * 0.8**step / ((count[1] * 0.8**step + 1e-5) / (total + 5e-5) * total)
        torch.testing.assert_close(layer.codebook[1], expected, rtol=1e-8, atol=0)
    assert layer.codebook[1].norm() < 0.3


def test_original_tensorflow_dictionary_forgets_its_first_codes():
    layer = layer_with(torch.tensor([[0.0, 0.0], [10.0, 0.0], [99.0, 99.0]]).double(), decay=0.9, compat="tf")
    layer(torch.tensor([[1.0, 1.0], [3.0, 1.0], [8.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(layer.codebook[0], torch.tensor([2.0, 1.0]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.codebook[1], torch.tensor([8.0, 2.0]).double(), rtol=1e-4, atol=0)
    assert layer.codebook[2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(layer.ema_count, torch.tensor([2.0, 1.0, 0.0]).double())
    layer(torch.tensor([[8.0, 4.0]], dtype=torch.float64))  # weights 0.9 and 1 of two debiased batches
    torch.testing.assert_close(layer.ema_count, torch.tensor([0.9 * 2, 0.9 + 1, 0.0]).double() / 1.9)
    torch.testing.assert_close(
        layer.codebook[1], torch.tensor([8.0, (0.9 * 2 + 4) / 1.9]).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("case", ["small_k16_f64", "tf_ugatit_k16_f32"])
def test_stored_runs_of_the_original_layers_are_repeated(case):
    with np.load(GOLDEN / f"{case}.npz") as file:
        data = {key: file[key] for key in file.files}
    meta = json.loads(str(data["meta"]))
    tolerance = 1e-10 if case.endswith("f64") else 2e-5
    layer = FeatureQuantize(
        meta["C"], meta["K"], decay=meta["decay"], commitment_weight=meta["commitment"], mode="replace",
        compat="tf" if case.startswith("tf") else "torch",
    )  # fmt: skip
    if case.endswith("f64"):
        layer.double()
    layer.load_original(*(torch.as_tensor(data[f"init_{key}"]) if f"init_{key}" in data else zeros
                          for key, zeros in (("embed", None), ("embed_avg", layer.ema_sum.t()),
                                             ("cluster_size", layer.ema_count))))  # fmt: skip
    for step in meta["kept_steps"] if "kept_steps" in meta else range(meta["steps"]):
        output = layer(torch.as_tensor(data[f"s{step:03d}_x"]))
        assert np.array_equal(output.indices.numpy(), data[f"s{step:03d}_codes"])
        assert np.allclose(output.loss.item(), data[f"s{step:03d}_loss"].mean(), rtol=tolerance)
        codes = layer.codebook.t().numpy()
        scale = np.abs(data[f"s{step:03d}_embed"]).max(0) + 1e-30
        assert (np.abs(codes - data[f"s{step:03d}_embed"]) / scale).max() < tolerance


# Where codes come from


@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_codebook_is_used_from_the_first_updates_on_the_data_that_collapse_the_original(init):
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(64, 64, generator=draw)
    rows = {  # perplexity of the original at its third update
        "mixture": (66, lambda: centres[torch.randint(64, (2048,), generator=draw)]
                    + 0.5 * torch.randn(2048, 64, generator=draw)),
        "normal": (31, lambda: torch.randn(2048, 64, generator=draw)),
        "small and rectified": (1, lambda: 0.1 * torch.randn(2048, 64, generator=draw).relu()),
    }  # fmt: skip
    for original, batch in rows.values():
        layer = FeatureQuantize(64, 1024, options=CodebookOptions(init=init))
        for _ in range(5):
            perplexity = stats.perplexity(torch.bincount(layer(batch()).indices, minlength=1024))
            assert perplexity > 0.5 * 64 and perplexity > 1.5 * original


def test_kmeans_finds_well_separated_clusters_and_their_sizes():
    centres = 20 * normal(0, 8, 6, dtype=torch.float64)
    labels = torch.arange(8).repeat_interleave(torch.arange(8) + 3)
    tokens = centres[labels] + 0.1 * normal(1, len(labels), 6, dtype=torch.float64)
    layer = FeatureQuantize(6, 8, options=CodebookOptions(deferred_update=True)).double()
    assert not layer.is_ready()
    layer(tokens[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))])
    assert layer.is_ready()
    means = torch.stack([tokens[labels == label].mean(0) for label in range(8)])
    nearest = torch.cdist(means, layer.codebook).argmin(1)
    assert sorted(nearest.tolist()) == list(range(8))
    torch.testing.assert_close(layer.codebook[nearest], means, rtol=0, atol=1e-12)
    assert layer.ema_count[nearest].tolist() == list(range(3, 11))
    torch.testing.assert_close(layer.ema_sum, layer.codebook * layer.ema_count[:, None])


def test_data_init_takes_different_tokens_of_the_first_batch():
    tokens = normal(0, 40, 3)
    layer = FeatureQuantize(3, 16, options=CodebookOptions(init="data", deferred_update=True))
    layer(tokens)
    hits = (layer.codebook[:, None] == tokens).all(2)
    assert hits.any(1).all() and len(set(hits.int().argmax(1).tolist())) == 16
    assert layer.ema_count.sum() == 40


@pytest.mark.parametrize("init", ["kmeans", "data"])
def test_fewer_tokens_than_codes_still_give_a_working_codebook(init):
    layer = FeatureQuantize(3, 16, options=CodebookOptions(init=init))
    tokens = normal(0, 5, 3)
    for _ in range(30):
        output = layer(tokens)
    assert output.loss < 1e-10 and layer.codebook.isfinite().all()


def test_uniform_and_normal_codes_have_their_moments_and_are_ready_at_once():
    uniform = FeatureQuantize(64, 100, options=CodebookOptions(init="uniform"))
    assert uniform.is_ready() and uniform.codebook.abs().max() <= 0.01
    assert uniform.codebook.std() == pytest.approx(0.01 / math.sqrt(3), rel=0.05)
    gauss = FeatureQuantize(64, 100, options=CodebookOptions(init="normal"))
    assert gauss.codebook.std() == pytest.approx(1.0, rel=0.05) and gauss.is_ready()
    assert torch.equal(FeatureQuantize(64, 100, compat="torch").codebook, gauss.codebook)
    other = FeatureQuantize(64, 100, options=CodebookOptions(init="normal", seed=1))
    assert not torch.equal(other.codebook, gauss.codebook)


def test_evaluation_before_training_does_not_initialise():
    layer = FeatureQuantize(3, 4).eval()
    before = state(layer)
    layer(normal(0, 8, 3))
    assert same(before, state(layer)) and not layer.is_ready()


def with_dead_codes(grace: int = 3, **settings) -> FeatureQuantize:
    options = CodebookOptions(init="normal", dead_code_threshold=0.1, dead_code_grace=grace, **settings)
    layer = layer_with(torch.tensor([[0.0], [10.0], [700.0], [900.0]]).double(), decay=0.5, options=options)
    layer.ema_count.fill_(2.0)
    layer.ema_sum.copy_(layer.codebook * 2)
    return layer


def test_dead_codes_are_replaced_by_batch_tokens_with_both_averages_reset():
    layer = with_dead_codes(grace=5)
    batches = [torch.tensor([[0.0 + s / 100], [10.0 + s / 100], [9.0 + s / 100]]).double() for s in range(6)]
    for batch in batches[:5]:
        layer(batch)
        assert layer.codebook[2:].flatten().tolist() == [700.0, 900.0]  # spared, though dead since update 4
    layer(batches[5])
    fresh = layer.codebook[2:].flatten()
    assert all(code in batches[5].flatten() for code in fresh)
    count = layer.ema_count[2:]
    assert count[0] == count[1] and count[0] > 0.1 * layer.ema_count.mean()
    torch.testing.assert_close(layer.ema_sum[2:, 0], fresh * count)
    # The ones in use are not touched by a replacement.
    torch.testing.assert_close(layer.ema_sum[:2], layer.codebook[:2] * layer.ema_count[:2, None])
    assert layer.codebook[0] < 1 and layer.codebook[1] > 8


def test_a_replaced_code_stays_where_it_is_used():
    layer = with_dead_codes(grace=0)
    groups = torch.tensor([[0.0], [10.0], [20.0], [30.0]]).double()
    places = []
    for _ in range(40):
        layer(groups)
        places.append(sorted(layer.codebook.flatten().round(decimals=3).tolist()))
    settled = places.index(places[-1])
    assert places[-1] == [0.0, 10.0, 20.0, 30.0] and places[settled:] == [places[-1]] * (40 - settled)


def test_threshold_zero_and_compat_never_replace():
    for compat in (None, "torch", "tf"):
        options = KEEP if compat is None else CodebookOptions(dead_code_grace=0)
        layer = layer_with(torch.tensor([[0.0], [1e4]]).double(), decay=0.0, compat=compat, options=options)
        for _ in range(30):
            layer(torch.tensor([[0.5]]).double())
        assert layer.codebook[1] != 0.5 and layer.ema_count[1] == 0


# Updates by hand


def test_evaluation_never_changes_the_state():
    layer = FeatureQuantize(4, 6, mode="replace")
    layer(normal(0, 32, 4))
    before = state(layer.eval())
    for seed in range(3):
        layer(normal(seed, 32, 4))
    assert same(before, state(layer))


def test_update_argument_context_and_freeze_decide_over_updates():
    layer, batch = FeatureQuantize(4, 6), normal(0, 32, 4)

    def moved(update=None) -> bool:
        before = int(layer.num_updates)
        layer(batch, update)
        return int(layer.num_updates) == before + 1

    assert moved() and not moved(False)
    with layer.no_update():
        assert not moved() and moved(True)
        with layer.no_update():
            pass
        assert not moved()
    layer.eval()
    assert not moved() and moved(True)
    layer.train().freeze()
    assert not moved() and not moved(True)
    layer.freeze(False)
    assert moved()


def test_deferred_update_equals_one_step_on_all_tokens_together():
    parts = [normal(seed, count, 4, dtype=torch.float64) for seed, count in ((0, 30), (1, 7), (2, 11))]
    codes = normal(3, 6, 4, dtype=torch.float64)
    options = CodebookOptions(init="normal", dead_code_threshold=0.0, deferred_update=True)
    deferred, direct = layer_with(codes, options=options), layer_with(codes)
    for _ in range(3):
        before = deferred.codebook.clone()
        for part in parts:
            deferred(part)
        assert torch.equal(deferred.codebook, before)
        assert deferred.apply_update() and not deferred.apply_update()
        direct(torch.cat(parts))
        for name in ("codebook", "ema_count", "ema_sum"):
            torch.testing.assert_close(getattr(deferred, name), getattr(direct, name), rtol=0, atol=1e-12)
    assert deferred.num_updates == direct.num_updates == 3


def test_deferred_update_replaces_dead_codes_and_survives_a_checkpoint_between():
    layer = with_dead_codes(grace=0, deferred_update=True)
    batch = torch.tensor([[0.0], [10.0]]).double()
    for _ in range(6):
        layer(batch)
        layer.apply_update()
    assert layer.codebook.max() <= 10.0
    layer = with_dead_codes(grace=0, deferred_update=True)
    layer(batch)
    restored = with_dead_codes(grace=0, deferred_update=True)
    restored.load_state_dict(layer.state_dict())
    assert restored.apply_update() and restored.ema_count.tolist() == [1.5, 1.5, 1.0, 1.0]


def test_manual_update_needs_the_deferred_option():
    with pytest.raises(RuntimeError, match="build it with options=CodebookOptions\\(deferred_update=True\\)"):
        FeatureQuantize(4, 6).apply_update()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("deferred", [False, True])
def test_tokens_that_are_not_finite_skip_the_update_and_warn_once(bad, deferred):
    layer = FeatureQuantize(4, 6, options=CodebookOptions(deferred_update=deferred))

    def step(batch):
        layer(batch)
        return layer.apply_update() if deferred else None

    poisoned = normal(0, 32, 4)
    poisoned[7, 2] = bad
    with pytest.warns(RuntimeWarning, match="features with NaN or infinity") as caught:
        step(poisoned)
        step(poisoned)
    assert len(caught) == 1 and not layer.is_ready() and layer.num_updates == 0
    step(normal(1, 32, 4))
    before = state(layer)
    assert layer.is_ready() and before["num_updates"] == 1
    step(poisoned)
    assert same(before, state(layer))
    step(normal(2, 32, 4))
    assert layer.num_updates == 2 and layer.codebook.isfinite().all()


# Settings and input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0}, "codebook_size is 0: give an integer of at least 1"),
        ({"dim": 0}, "dim is 0: give an integer of at least 1"),
        ({"decay": 1.5}, "decay is 1.5: give a moving-average factor from 0 to below 1"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"decay": -0.1}, "decay is -0.1"),
        ({"decay": math.nan}, "decay is nan"),
        ({"commitment_weight": -1.0}, "commitment_weight is -1.0: give a number of at least 0"),
        ({"mode": "replaced"}, "mode is 'replaced': choose one of 'regularize', 'replace', 'blend'"),
        ({"compat": "jax"}, "compat is 'jax': choose one of None, 'torch', 'tf'"),
        ({"reduction": "sum"}, "reduction is 'sum': choose one of 'mean', 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureQuantize(**{"dim": 4, "codebook_size": 8, **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pca"}, "init is 'pca': choose one of 'auto', 'kmeans'"),
        ({"init_tokens": 0}, "init_tokens is 0: give an integer of at least 1"),
        ({"kmeans_iterations": -1}, "kmeans_iterations is -1"),
        ({"dead_code_threshold": 1.0}, "dead_code_threshold is 1.0: give a share from 0 to below 1"),
        ({"dead_code_grace": -1}, "dead_code_grace is -1"),
        ({"blend_steps": 0}, "blend_steps is 0"),
        ({"blend_start": -1}, "blend_start is -1"),
        ({"blend_end": 1.1}, "blend_end is 1.1: give a share from 0 to 1"),
        ({"epsilon": 0.0}, "epsilon is 0.0: give a positive number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodebookOptions(**options)


@pytest.mark.parametrize("options", [{"init": "kmeans"}, {"dead_code_threshold": 0.1}])
def test_compat_refuses_options_that_the_originals_do_not_have(options):
    with pytest.raises(ValueError, match="compat='torch' reproduces an original dictionary"):
        FeatureQuantize(4, 8, compat="torch", options=CodebookOptions(**options))


def test_unusable_features_are_refused():
    layer = FeatureQuantize(4, 8)
    message = r"shape \[2, 5, 3, 3\] do not have 4 channels .*dim equal to the channels"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match="do not have 4 channels"):
        layer(torch.zeros(4))
    with pytest.raises(ValueError, match=r"layout \[B, \*spatial, dim\]"):
        FeatureQuantize(4, 8, options=CodebookOptions(channel_last=True))(torch.zeros(2, 4, 3, 3))
    with pytest.raises(TypeError, match=r"features are torch\.int64: pass a floating tensor"):
        layer(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="features are list"):
        layer([1.0])
    with pytest.raises(ValueError, match="hold no token: give at least one sample"):
        layer(torch.zeros(0, 4, 3, 3))
    assert layer.num_updates == 0 and not layer.is_ready()


def test_original_buffers_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"embed has shape \[8, 4\] but this layer needs \[4, 8\]"):
        FeatureQuantize(4, 8).load_original(torch.zeros(8, 4), torch.zeros(4, 8), torch.zeros(8))


# Precision


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to"])
def test_buffers_stay_float32_and_updates_exact_when_the_model_is_cast_down(cast):
    layer, reference = FeatureQuantize(4, 6, mode="replace"), FeatureQuantize(4, 6, mode="replace")
    parent = torch.nn.Sequential(torch.nn.Linear(4, 4), layer)
    parent.to(torch.float16) if cast == "to" else getattr(parent, cast)()
    dtype = parent[0].weight.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} == {torch.float32}
    batch = normal(0, 4096, 4, dtype=dtype)
    output = layer(batch)
    expected = reference(batch.float())
    assert output.features.dtype == dtype and output.loss.dtype == torch.float32
    assert torch.equal(output.indices, expected.indices) and torch.equal(output.loss, expected.loss)
    assert same(state(layer), state(reference))


def test_double_widens_the_buffers_and_float_narrows_them_again():
    layer = FeatureQuantize(4, 6).double()
    assert layer.codebook.dtype == layer.ema_count.dtype == layer.ema_sum.dtype == torch.float64
    assert layer(normal(0, 32, 4)).loss.dtype == torch.float64
    assert layer.half().codebook.dtype == torch.float64
    assert layer.float().codebook.dtype == torch.float32
    assert layer.initialized.dtype == torch.bool and layer.num_updates.dtype == torch.int64


def test_autocast_changes_nothing_inside():
    # Seeding alone: Lloyd iterations could lead back from a seed that bfloat16 has spoilt.
    options = CodebookOptions(kmeans_iterations=0)
    layer, reference = (FeatureQuantize(16, 32, mode="replace", options=options) for _ in range(2))
    batch = 5 + normal(0, 256, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(batch)
    expected = reference(batch)
    assert output.loss.dtype == torch.float32 and torch.equal(output.loss, expected.loss)
    assert torch.equal(output.features, expected.features) and same(state(layer), state(reference))


# Random state, checkpoints, copies, compilation


def test_global_random_generators_are_left_alone():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for init in ("kmeans", "data", "normal", "uniform"):
        options = CodebookOptions(init=init, dead_code_grace=0, dead_code_threshold=0.9)
        layer = FeatureQuantize(4, 6, options=options)
        for seed in range(4):
            layer(normal(seed, 32, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_the_global_seed_does_not_change_the_codebook():
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layer = FeatureQuantize(4, 16, options=CodebookOptions(dead_code_grace=0, dead_code_threshold=0.5))
        for step in range(5):
            layer(normal(step, 32, 4))
        results.append(state(layer))
    assert same(*results)


def test_default_device_is_followed_without_changing_the_draws():
    before = FeatureQuantize(4, 6, options=KEEP).codebook
    try:
        torch.set_default_device("meta")
        assert FeatureQuantize(4, 6, options=KEEP).codebook.is_meta
    finally:
        torch.set_default_device(None)
    built = FeatureQuantize(4, 6, options=KEEP, mode="replace")
    with torch.device("meta"):
        empty = FeatureQuantize(4, 6)
    empty.to_empty(device="cpu").load_state_dict(built.state_dict())
    assert torch.equal(empty.codebook, before) and empty.is_ready()


@pytest.mark.parametrize("copier", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_restored_layer_continues_bit_for_bit(copier, deferred):
    options = CodebookOptions(dead_code_grace=2, dead_code_threshold=0.5, deferred_update=deferred, seed=5)
    layer = FeatureQuantize(4, 16, mode="blend", options=options)

    def train(model, steps):
        losses = []
        for step in steps:
            losses.append(model(normal(step, 40, 4).requires_grad_()).loss.item())
            if deferred:
                model.apply_update()
        return losses

    train(layer, range(6))
    if copier == "state_dict":
        other = FeatureQuantize(4, 16, mode="blend", options=CodebookOptions(
            dead_code_grace=2, dead_code_threshold=0.5, deferred_update=deferred, seed=99))  # fmt: skip
        other.load_state_dict(layer.state_dict(), strict=True)
    else:
        other = copy.deepcopy(layer) if copier == "deepcopy" else pickle.loads(pickle.dumps(layer))
    before = state(other)
    expected = train(layer, range(6, 12))
    assert same(before, state(other)), "the copy shares memory with the original"
    assert train(other, range(6, 12)) == expected and same(state(layer), state(other))


@pytest.mark.parametrize("deferred", [False, True])
def test_copies_leave_the_latest_batch_and_codes_behind(deferred):
    layer = FeatureQuantize(8, 16, options=CodebookOptions(init="normal", deferred_update=deferred))
    size = len(pickle.dumps(layer))
    layer(normal(0, 1000, 8))
    assert abs(len(pickle.dumps(layer)) - size) < 200


def test_strict_loading_names_what_is_missing():
    layer = FeatureQuantize(4, 16)
    entries = layer.state_dict()
    assert set(entries) == {"codebook", "ema_count", "ema_sum", "initialized", "num_updates", "seed"}
    del entries["ema_sum"]
    with pytest.raises(RuntimeError, match="ema_sum"):
        layer.load_state_dict(entries)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_layer_has_one_graph_and_the_values_of_the_eager_one(mode, dtype):
    options = CodebookOptions(dead_code_grace=0, dead_code_threshold=0.3)
    eager = FeatureQuantize(4, 24, mode=mode, options=options).to(dtype)
    eager(normal(0, 2, 4, 5, 5, dtype=dtype))
    torch._dynamo.reset()
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for step, batch in enumerate((2, 3, 5, 4, 7, 6)):
        first, second = (normal(step, batch, 4, 5, 5, dtype=dtype).requires_grad_() for _ in range(2))
        (expected, indices, loss), output = eager(first), compiled(second)
        ((expected * 3).sum() + loss).backward()
        ((output.features * 3).sum() + output.loss).backward()
        assert torch.equal(indices, output.indices)
        torch.testing.assert_close(output.features, expected)
        torch.testing.assert_close(second.grad, first.grad)
        for name in ("codebook", "ema_count", "ema_sum", "num_updates"):
            torch.testing.assert_close(getattr(compiled_layer, name), getattr(eager, name))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs <= 2, "one graph for the first batch size and one for all others"


def test_compiled_layer_skips_batches_that_are_not_finite():
    layer = FeatureQuantize(4, 8)
    layer(normal(0, 32, 4))
    before = state(layer)
    torch._dynamo.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.full((32, 4), torch.nan))
    torch._dynamo.reset()
    assert same(before, state(layer))


def test_deterministic_algorithms_are_enough_and_runs_repeat():
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            layer = FeatureQuantize(8, 32, options=CodebookOptions(dead_code_grace=0))
            for step in range(4):
                features = normal(step, 4, 8, 6, 6).requires_grad_()
                layer(features).loss.backward()
            results.append({**state(layer), "gradient": features.grad})
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*results)


def test_printing_the_layer_names_its_settings():
    text = repr(FeatureQuantize(4, 8, mode="replace", compat="tf"))
    assert "dim=4, codebook_size=8, decay=0.8" in text and "mode='replace', compat='tf'" in text


def test_clean_batches_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = FeatureQuantize(4, 8)
        for seed in range(3):
            layer(normal(seed, 2, 4, 3, 3))
    assert layer.num_updates == 3


def test_layer_may_be_compiled_before_it_is_initialised():
    batch = normal(0, 32, 4)
    eager, layer = FeatureQuantize(4, 8), FeatureQuantize(4, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(batch).indices, eager(batch).indices)
    torch._dynamo.reset()
    assert same(state(eager), state(layer)) and layer.num_updates == 2


def test_skipped_updates_on_a_device_that_must_not_wait_are_warned_about_once():
    layer = FeatureQuantize(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(100):
            layer.num_updates += number != 7  # the eighth update is skipped
            layer._watch(torch.device("cpu"))
    layer.num_updates += 1
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        layer._watch(torch.device("cpu"))
    for _ in range(250):
        layer._watch(torch.device("cpu"))  # warnings are errors: it does not warn again


def test_updates_that_are_all_made_are_not_warned_about():
    layer = FeatureQuantize(2, 2)
    for _ in range(350):
        layer.num_updates += 1
        layer._watch(torch.device("cpu"))
    layer.load_state_dict(FeatureQuantize(2, 2).state_dict())  # fewer updates, and none of them lost
    for _ in range(150):
        layer.num_updates += 1
        layer._watch(torch.device("cpu"))
