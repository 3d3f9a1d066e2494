"""Each option of a codebook does what its line says; what two options change together is tested together."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fq
from fq import CodebookOptions, FeatureQuantize
from fq.losses import rotate


def features(seed: int = 0, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (6, 8, 4, 4)), generator=draw, dtype=dtype)


def layer(codebook_size: int = 8, dim: int = 8, *, mode: str = "replace", **options) -> FeatureQuantize:
    chosen = {"init": "data", "dead_code_threshold": 0.0} | options
    return FeatureQuantize(dim, codebook_size, mode=mode, options=CodebookOptions(**chosen))


def nearest_in(tokens: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.cdist(tokens.double(), codes.double()).argmin(1)


# Cosine codes


def test_normalized_codes_ignore_the_scale_of_features_and_keep_it_in_the_output():
    small, x = layer(normalize=True), features()
    large = copy.deepcopy(small)
    for step in range(3):
        one, other = small(features(step)), large(features(step) * 1000)
    assert torch.equal(one.indices, other.indices)
    torch.testing.assert_close(other.loss, one.loss)
    torch.testing.assert_close(other.features, one.features * 1000, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(small.codebook.square().mean(1), torch.ones(8))
    # The output points along its code and is as long as its token.
    done = small.eval()(x)
    torch.testing.assert_close(done.features.norm(dim=1), x.norm(dim=1))
    cosine = nn.functional.cosine_similarity(done.features, small.decode(done.indices), dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    every = (
        nn.functional.normalize(x, dim=1).movedim(1, -1) @ nn.functional.normalize(small.codebook, dim=1).t()
    )
    assert torch.equal(done.indices, every.argmax(-1))
    # Without the option the scale does matter.
    assert layer()(x * 1000).loss > 1000 * layer()(x).loss


def test_normalized_loss_has_right_derivatives():
    quantizer = layer(normalize=True).double()
    quantizer(features(0, 3, 8, 2, dtype=torch.float64))
    quantizer.eval()
    x = features(1, 3, 8, 2, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda t: quantizer(t).loss, (x,))
    assert gradgradcheck(lambda t: quantizer(t).loss, (x,))


# Heads and stages


def test_heads_quantize_groups_of_channels_each_by_its_own_codebook():
    x = features()
    both = layer(heads=2)
    halves = [layer(dim=4), layer(dim=4)]
    both(x)
    with torch.no_grad():
        for head, half in enumerate(halves):
            half(x[:, head * 4 : head * 4 + 4])
            for name in ("codebook", "ema_count", "ema_sum"):
                getattr(half, name).copy_(getattr(both, name)[head * 8 : head * 8 + 8])
    for step in range(1, 4):
        batch = features(step)
        done = both(batch)
        apart = [half(batch[:, head * 4 : head * 4 + 4]) for head, half in enumerate(halves)]
        assert done.indices.shape == (6, 2, 4, 4)
        for head, half in enumerate(apart):
            assert torch.equal(done.indices[:, head], half.indices + 8 * head)
        torch.testing.assert_close(done.features, torch.cat([half.features for half in apart], 1))
        torch.testing.assert_close(done.loss, (apart[0].loss + apart[1].loss) / 2)
    torch.testing.assert_close(both.codebook, torch.cat([half.codebook for half in halves]))
    torch.testing.assert_close(both.decode(done.indices).shape, done.features.shape)
    assert both.codebook.shape == (16, 4) and both.num_codes == 16


def test_each_stage_quantizes_what_the_former_left():
    quantizer = layer(stages=3)
    for step in range(3):
        quantizer(features(step, 64, 8, 4, 4))
    quantizer.eval()
    x = features(9)
    done = quantizer(x)
    left = x.movedim(1, -1).reshape(-1, 8)
    for stage in range(3):
        codes = quantizer.codebook[stage * 8 : stage * 8 + 8]
        found = nearest_in(left, codes)
        assert torch.equal(done.indices[:, stage].flatten(), found + stage * 8)
        left = left - codes[found]
    torch.testing.assert_close(done.loss, left.square().mean())
    torch.testing.assert_close(done.features, quantizer.decode(done.indices))


def test_more_stages_come_closer():
    errors = []
    for stages in (1, 2, 4):
        quantizer = layer(16, stages=stages, init="kmeans")
        for step in range(10):
            loss = quantizer(features(step, 64, 8, 4, 4)).loss
        errors.append(loss.item())
    assert errors[1] < 0.8 * errors[0] and errors[2] < 0.8 * errors[1]


def test_heads_and_stages_together_have_right_derivatives_and_channel_last_agrees():
    quantizer = layer(heads=2, stages=2).double()
    quantizer(features(0, 3, 8, 2, dtype=torch.float64))
    quantizer.eval()
    x = features(1, 3, 8, 2, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda t: quantizer(t).loss, (x,)) and gradgradcheck(lambda t: quantizer(t).loss, (x,))
    (gradient,) = torch.autograd.grad(quantizer(x).features.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))
    last = layer(heads=2, stages=2, channel_last=True).double()
    last.load_state_dict(quantizer.state_dict())
    done, other = quantizer(x), last.eval()(x.transpose(1, 2))
    assert done.indices.shape == (3, 2, 2, 2) and torch.equal(done.indices, other.indices)
    torch.testing.assert_close(done.features, other.features.transpose(1, 2))
    torch.testing.assert_close(quantizer.decode(done.indices), done.features)
    torch.testing.assert_close(last.decode(done.indices), other.features)


def test_dead_codes_of_each_head_and_stage_are_replaced_by_what_it_has_seen():
    quantizer = layer(4, heads=2, stages=2, dead_code_threshold=0.2, dead_code_grace=0)
    x = features(0, 16, 8, 4)
    x[:, :4] += 100  # the two heads see very different numbers
    quantizer(x)
    for start in range(0, 16, 4):
        quantizer.codebook[start] = 1e4  # unreachable
        quantizer.ema_count[start] = 0
    quantizer(x)
    head = torch.arange(16) // 4 % 2
    stage = torch.arange(16) // 8
    near = quantizer.codebook.mean(1)
    assert (near[(stage == 0) & (head == 0)] - 100).abs().max() < 4
    assert near[(stage == 0) & (head == 1)].abs().max() < 4
    assert near[stage == 1].abs().max() < 4


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="heads is 3: give a divisor of dim, which is 8"):
        layer(heads=3)


# Classes


def test_each_class_has_codes_of_its_own():
    quantizer = layer(4, num_classes=3, init="normal")
    x, labels = features(0, 30, 8, 5), torch.arange(30) % 2  # no sample of class 2
    before = quantizer.codebook.clone()
    done = quantizer(x, labels=labels)
    for label in (0, 1):
        chosen = done.indices[labels == label]
        own = before[4 * label : 4 * label + 4]
        tokens = x[labels == label].movedim(1, -1).reshape(-1, 8)
        assert torch.equal(chosen.flatten(), nearest_in(tokens, own) + 4 * label)
    assert torch.equal(quantizer.codebook[8:], before[8:])
    torch.testing.assert_close(done.features, before[done.indices].movedim(-1, 1))
    with pytest.raises(ValueError, match="num_classes is 3 but labels are missing"):
        quantizer(x)
    with pytest.raises(
        ValueError, match=r"labels have shape \[4\]: give one value for each of the 30 samples"
    ):
        quantizer(x, labels=labels[:4])
    with pytest.raises(ValueError, match="num_classes is 0 but labels are given"):
        layer()(x, labels=labels)


def test_dead_codes_of_a_class_are_replaced_by_tokens_of_that_class():
    quantizer = layer(4, num_classes=3, dead_code_threshold=0.3, dead_code_grace=0)
    x, labels = features(0, 12, 8, 5), torch.arange(12) % 2
    x[labels == 1] += 50
    quantizer(x, labels=labels)
    quantizer.codebook.fill_(1e4)
    quantizer.codebook[::4] = 0.0
    quantizer.ema_count.fill_(1e-6)
    quantizer(x, labels=labels)
    mean = quantizer.codebook.mean(1)
    assert mean[:4].abs().max() < 4 and (mean[5:8] - 50).abs().max() < 4
    assert torch.equal(quantizer.codebook[9:], torch.full((3, 8), 1e4))  # nobody to replace them


def test_an_attached_class_conditional_codebook_takes_labels_from_the_handle():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    handle = fq.attach(model, "0", codebook_size=4, options=CodebookOptions(num_classes=3, init="normal"))
    x, labels = features(0, 6, 3, 5, 5), torch.tensor([0, 0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"needs the 6 samples' labels, but there are none.*handle.labels"):
        model(x)
    with handle.labels(labels):
        model(x)
    histogram = handle.stats()["0"].histograms["mixed"]
    assert sum(histogram[:8]) == 6 * 9 and sum(histogram[8:]) == 0
    with handle.labels(labels[:2]), pytest.raises(ValueError, match=r"they have shape \[2\]"):
        model(x)


# Whose tokens count


def test_only_samples_that_may_learn_move_the_codebook():
    one, other = layer(), layer()
    x = features()
    learn = torch.tensor([True, False, True, False, False, True])
    for step in range(3):
        done = one(features(step), learn=learn)
        other(features(step)[learn])
    for name in ("codebook", "ema_count", "ema_sum"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert done.indices.shape == (6, 4, 4)
    before = one.codebook.clone()
    one(x, learn=torch.zeros(6, dtype=torch.bool))
    assert torch.equal(one.codebook, before) and one.num_updates == 3


def test_an_attached_codebook_of_real_pictures_learns_from_no_fake():
    def attached():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
        chosen = CodebookOptions(learn_from="real", init="data", dead_code_threshold=0.0)
        return model, fq.attach(model, "0", codebook_size=4, options=chosen)

    (model, handle), (apart, handle_apart) = attached(), attached()
    real, fake = features(0, 6, 3, 5, 5), features(1, 6, 3, 5, 5) + 3
    for _ in range(3):
        with handle.part(parts=("fake", "real")):
            model(torch.cat([fake, real]))
        with handle_apart.part("fake"):
            apart(fake)
        with handle_apart.part("real"):
            apart(real)
    codes, codes_apart = handle.quantizers["0"].codebook, handle_apart.quantizers["0"].codebook
    torch.testing.assert_close(codes, codes_apart)
    assert handle_apart.quantizers["0"].num_updates == 3
    assert handle.loss() > 0  # fakes pay
    with pytest.raises(ValueError, match="learns from real pictures alone, but this batch has no label"):
        model(real)


# Gradients and the loss


def test_rotation_turns_the_gradient_as_it_turns_the_token():
    x = features(0, 2, 8, 5, dtype=torch.float64).requires_grad_()
    goal = features(1, 2, 8, 5, dtype=torch.float64)
    turned = rotate(x, goal)
    torch.testing.assert_close(turned, goal)
    # A gradient along the code becomes one along the token, stretched by the ratio of their lengths.
    (gradient,) = torch.autograd.grad((turned * goal).sum(), x)
    expected = x * (goal.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True)).square()
    torch.testing.assert_close(gradient, expected.detach())
    # Second derivatives of a penalty exist.
    quantizer = layer(gradient="rotation").double()
    quantizer(x.detach())
    quantizer.eval()
    done = quantizer(x)
    torch.testing.assert_close(done.features, quantizer.decode(done.indices))
    (gradient,) = torch.autograd.grad(done.features.square().sum(), x, create_graph=True)
    straight = layer().double()
    straight.load_state_dict(quantizer.state_dict())
    (other,) = torch.autograd.grad(straight.eval()(x).features.square().sum(), x)
    assert not torch.allclose(gradient, other)
    torch.testing.assert_close(gradient.norm(), gradient.detach().norm())
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all() and second.abs().max() > 0


def test_rotation_blends_and_is_refused_where_the_output_is_the_input():
    quantizer = layer(mode="blend", gradient="rotation", blend_steps=2)
    quantizer(features())
    x = features(1).requires_grad_()
    done = quantizer.eval()(x)
    codes = quantizer.decode(done.indices)
    torch.testing.assert_close(done.features, (x + codes) / 2)
    with pytest.raises(
        ValueError, match="gradient is 'rotation': give 'straight-through' under mode='regularize'"
    ):
        layer(mode="regularize", gradient="rotation")


def test_warmup_lets_the_weight_grow_with_the_updates():
    quantizer, plain = layer(warmup_updates=4), layer()
    shares = [(quantizer(features(step)).loss / plain(features(step)).loss).item() for step in range(6)]
    assert shares == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])


def test_a_loss_divided_by_the_variance_does_not_know_the_scale_of_the_features():
    losses = {}
    for scale in (1.0, 1000.0):
        quantizer = layer(divide_by_variance=True, mode="regularize")
        for step in range(4):
            loss = quantizer(scale * features(step) + 5 * scale).loss
        losses[scale] = loss.item()
        recent = torch.stack([scale * features(step) for step in range(4)])
        assert quantizer.ema_variance.item() == pytest.approx(recent.var().item(), rel=0.15)
    assert losses[1000.0] == pytest.approx(losses[1.0], rel=1e-3)
    two_heads = layer(divide_by_variance=True, mode="regularize", heads=2, stages=2)
    for step in range(4):
        two_heads(features(step) + 5)
    plain = layer(divide_by_variance=True, mode="regularize")
    for step in range(4):
        plain(features(step) + 5)
    assert two_heads.ema_variance.item() == pytest.approx(plain.ema_variance.item(), rel=0.02)


def test_memory_in_images_does_not_depend_on_how_images_are_batched():
    whole = layer(memory_images=20.0)
    whole(features(0, 12, 8, 4))
    parts = copy.deepcopy(whole)
    assert whole.ema_count.sum() > 0
    counts = whole.ema_count.clone()
    batch = features(1, 12, 8, 4)
    whole(batch)
    decay = math.exp(-12 / 20)
    hits = torch.bincount(whole_indices(parts, batch), minlength=8)
    torch.testing.assert_close(whole.ema_count, counts * decay + hits * (1 - decay))
    # Twelve images in one forward or in three: the past weighs the same.
    for part in batch.chunk(3):
        parts(part)
    past = torch.zeros(8)
    past[0] = 1.0
    assert parts.num_updates == whole.num_updates + 2
    weight = {name: forgetting(memory) for name, memory in (("whole", (12,)), ("parts", (4, 4, 4)))}
    assert weight["whole"] == pytest.approx(weight["parts"])
    deferred = layer(memory_images=20.0, deferred_update=True)
    deferred.load_state_dict({**deferred.state_dict(), **copy.deepcopy(layer_state(whole))})
    before = deferred.ema_count.clone()
    for part in batch.chunk(3):
        done = deferred(part)
    deferred.apply_update()
    assert done.indices.numel() == 16
    torch.testing.assert_close(
        deferred.ema_count.sum(), before.sum() * decay + 48 * (1 - decay), rtol=1e-5, atol=1e-5
    )


def whole_indices(quantizer: FeatureQuantize, batch: torch.Tensor) -> torch.Tensor:
    return quantizer(batch, update=False).indices.flatten()


def layer_state(quantizer: FeatureQuantize) -> dict[str, torch.Tensor]:
    return {name: value for name, value in quantizer.state_dict().items() if name != "pending"}


def forgetting(batches: tuple[int, ...]) -> float:
    """Share of a first codebook's count that is left after these batches of nothing but code 1."""
    quantizer = FeatureQuantize(
        2, 2, options=CodebookOptions(init="normal", dead_code_threshold=0.0, memory_images=20.0)
    )
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]))
        quantizer.ema_count.copy_(torch.tensor([1.0, 0.0]))
    for size in batches:
        quantizer(torch.full((size, 2), 5.0))
    return quantizer.ema_count[0].item()


# Together


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True},
        {"heads": 2},
        {"stages": 2},
        {"heads": 2, "stages": 2, "divide_by_variance": True, "memory_images": 50.0},
        {"heads": 2, "normalize": True, "divide_by_variance": True},
        {"gradient": "rotation", "warmup_updates": 3},
        {"num_classes": 3, "heads": 2},
    ],
)
def test_options_survive_compile_checkpoint_deferral_and_half_precision(options, tmp_path):
    labels = torch.arange(6) % 3 if "num_classes" in options else None
    quantizer = layer(**options, init="kmeans", dead_code_threshold=0.1, dead_code_grace=1)
    quantizer(features(), labels=labels)
    copied = copy.deepcopy(quantizer)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for step in range(1, 3):
        one, other = quantizer(features(step), labels=labels), compiled(features(step), labels=labels)
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.features, other.features)
        torch.testing.assert_close(one.loss, other.loss)
    for name, value in quantizer.state_dict().items():
        torch.testing.assert_close(value, copied.state_dict()[name], msg=name)
    loaded = layer(**options)
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    half = loaded.half()(features(5).half(), labels=labels)
    assert half.features.dtype == torch.float16 and half.loss.dtype == torch.float32 and half.loss.isfinite()

    deferred = layer(**options, deferred_update=True)
    deferred.load_state_dict({**deferred.state_dict(), **quantizer.state_dict()})
    deferred(features(7), labels=labels)
    assert torch.equal(deferred.codebook, quantizer.codebook)
    assert deferred.apply_update()
    quantizer.dead_code_threshold = 0.0
    quantizer(features(7), labels=labels)
    torch.testing.assert_close(deferred.codebook, quantizer.codebook)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 5}, "stages is 5: give 1 to 4"),
        ({"stages": 2, "normalize": True}, "stages is 2: give 1 with normalize=True"),
        ({"seed": -1}, "seed is -1: give an integer of at least 0"),
        ({"memory_images": math.inf}, "memory_images is inf: give a positive number"),
        ({"heads": 0}, "heads is 0: give an integer of at least 1"),
        ({"memory_images": 0.0}, "memory_images is 0.0: give a positive number of images"),
        ({"gradient": "none"}, "gradient is 'none': choose one of 'straight-through', 'rotation'"),
        ({"learn_from": "fake"}, "learn_from is 'fake': choose one of 'all', 'real'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CodebookOptions(**options)


def test_sizes_must_be_integers():
    with pytest.raises(TypeError, match=r"codebook_size is 64.0: give an integer of at least 1"):
        FeatureQuantize(8, 64.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="heads is '2': give an integer"):
        CodebookOptions(heads="2")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"normalize": True}, {"stages": 2}, {"memory_images": 9.0}])
def test_the_originals_know_no_such_codebook(option):
    with pytest.raises(ValueError, match=f"compat='torch' reproduces .*{next(iter(option))}="):
        FeatureQuantize(8, 4, compat="torch", options=CodebookOptions(**option))


# What users of a discriminator do around the layer


@pytest.mark.parametrize("options", [{"normalize": True}, {"heads": 2}, {"stages": 2}, {}])
@pytest.mark.parametrize("mode", ["regularize", "replace"])
def test_the_trunk_may_change_features_in_place_under_every_option(options, mode):
    quantizer, conv = layer(mode=mode, **options), nn.Conv2d(8, 8, 1)
    x = features()
    done = quantizer(conv(x))
    torch.relu_(done.features)
    (done.features.sum() + done.loss).backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{"normalize": True}, {"gradient": "rotation"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_of_zeros_get_their_code_and_a_gradient_like_the_others(options, dtype):
    quantizer = layer(**options)
    quantizer(features())
    x = features(1).to(dtype)
    x[0, :, 0, 0] = 0.0
    x.requires_grad_()
    done = quantizer.eval()(x)
    if options == {"gradient": "rotation"}:
        torch.testing.assert_close(
            done.features.float(), quantizer.decode(done.indices), atol=2e-3, rtol=2e-3
        )
    (done.features.float().sum() + done.loss).backward()
    zero, others = x.grad[0, :, 0, 0].abs().max(), x.grad[1:].abs().max()
    assert x.grad.isfinite().all() and zero <= 2 * others


@pytest.mark.parametrize(
    "options", [{"warmup_updates": 4}, {"divide_by_variance": True}, {"mode": "blend", "blend_steps": 4}]
)
def test_a_recomputed_segment_uses_the_weights_of_its_first_pass(options):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        conv, after, quantizer = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1), layer(**options)
        quantizer(features())

        def segment(x, conv=conv, after=after, quantizer=quantizer):
            done = quantizer(conv(x))
            return after(done.features.square()).sum() + done.loss

        x = features(1).requires_grad_()
        out = checkpoint(segment, x, use_reentrant=False) if checkpointed else segment(x)
        out.backward()
        assert quantizer.num_updates == 2
        gradients.append([x.grad, conv.weight.grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_sample_that_must_not_learn_may_hold_nan():
    learn = torch.tensor([True, True, False, True, True, True])
    for options in ({}, {"divide_by_variance": True}, {"memory_images": 9.0}):
        quantizer = layer(**options)
        quantizer(features(), learn=learn)
        x = features(1)
        x[2] = torch.nan
        quantizer(x, learn=learn)
        assert quantizer.num_updates == 2 and quantizer.codebook.isfinite().all()


def test_a_mask_may_be_strided_and_must_be_a_mask():
    one, other = layer(), layer()
    table = torch.tensor([[True, False], [False, True], [True, True]] * 2)
    one(features(), learn=table[:, 0])
    other(features(), learn=table[:, 0].contiguous())
    assert torch.equal(one.codebook, other.codebook) and torch.equal(one.ema_count, other.ema_count)
    with pytest.raises(TypeError, match=r"learn are torch.int64 on cpu: give torch.bool"):
        one(features(), learn=torch.ones(6, dtype=torch.int64))
    classes = layer(num_classes=2)
    with pytest.raises(TypeError, match=r"labels are torch.float32 on cpu: give torch.int64"):
        classes(features(), labels=torch.ones(6))
    with pytest.raises(ValueError, match="labels run from 0 to 2: give classes from 0 to 1"):
        classes(features(), labels=torch.arange(6) % 3)


def test_a_copy_made_inside_a_context_is_not_bound_by_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    handle = fq.attach(model, "0", codebook_size=4, options=CodebookOptions(init="normal"))
    with handle.penalty(), handle.quantizers["0"].no_update():
        copied = copy.deepcopy(model)
    copied(features(0, 6, 3, 5, 5))
    assert fq.handle_of(copied).quantizers["0"].num_updates == 1 and fq.handle_of(copied).loss() > 0


def test_pending_statistics_are_kept_from_data_parallel_broadcasts_and_given_back():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    handle = fq.attach(model, "0", codebook_size=4, options=CodebookOptions(deferred_update=True))
    assert model._ddp_params_and_buffers_to_ignore == ["0.fq.pending"]
    handle.detach()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_a_gradient_penalty_on_a_list_of_inputs_is_recognised():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, images):
            return self.conv(images[0])

    model = Listed()
    handle = fq.attach(model, "conv", codebook_size=4, options=CodebookOptions(init="normal"))
    model([features(0, 6, 3, 5, 5)])
    model([features(0, 6, 3, 5, 5).requires_grad_()])
    assert handle.quantizers["conv"].num_updates == 1


def test_channel_last_options_for_all_layers_hold_for_the_probing_forward_too():
    model = nn.Sequential(nn.Linear(16, 12), nn.Identity())
    options = CodebookOptions(channel_last=True)
    handle = fq.attach(model, "1", codebook_size=4, options=options, example_input=torch.randn(3, 5, 16))
    model(torch.randn(3, 5, 16))
    assert handle.quantizers["1"].dim == 12


def test_class_conditional_codes_survive_a_backward_outside_the_labels():
    class Segmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return checkpoint(self.conv, x, use_reentrant=False)

    model = Segmented()
    handle = fq.attach(model, "conv", codebook_size=4, options=CodebookOptions(num_classes=2, init="normal"))
    with handle.labels(torch.tensor([0, 1, 0, 1, 1, 1])):
        out = model(features(0, 6, 3, 5, 5))
    (out.sum() + handle.loss()).backward()
    assert handle.quantizers["conv"].num_updates == 1
