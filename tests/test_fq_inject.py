import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

import fq
from fq import CodebookOptions
from fq.attach import CHILD
from fq.inject import Injector

MODES = ("regularize", "replace", "blend")
SETTINGS = {"codebook_size": 8, "commitment_weight": 3.0, "options": CodebookOptions(blend_steps=4)}


class Block(nn.Module):
    """A block that wraps its features as its caller says."""

    def __init__(self, channels_in, channels_out, wrap=None):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.wrap = wrap

    def forward(self, x):
        h = self.conv(x)
        return h if self.wrap is None else self.wrap(h)


class Net(nn.Module):
    """A smooth discriminator that works in place on what its blocks return."""

    def __init__(self, wrap=None, unwrap=None, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8), Block(8, 8, wrap)])
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.linear = nn.Linear(8, 1)
        self.unwrap, self.reentrant = unwrap, reentrant

    def forward(self, x):
        h = self.act(self.blocks[0](x))
        if self.reentrant is not None:
            h = checkpoint(self.blocks[1], h, use_reentrant=self.reentrant)
        else:
            h = self.blocks[1](h)
        h = self.act(h if self.unwrap is None else self.unwrap(h))
        return self.linear(h.tanh().square().mean((2, 3)))


@dataclasses.dataclass
class Record:
    features: Tensor
    step: int = 3


class Pair(NamedTuple):
    features: Tensor
    image: None = None


def images(seed: int, batch: int = 4, size: int = 6) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Case(NamedTuple):
    """A discriminator to attach to: how to make it, where, its arguments for a seed, its scores."""

    make: Callable[[], nn.Module]
    layers: Any
    inputs: Callable[[int], tuple[Any, ...]] = lambda seed: (images(seed),)
    scores: Callable[[Any], Tensor] = lambda output: output


def wrapped(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> Case:
    return Case(lambda: Net(wrap, unwrap), ["blocks.0", "blocks.1"])


CASES = {
    "tensor": Case(Net, ["blocks.0", "blocks.1"]),
    "tuple": wrapped(lambda h: (h, None), lambda out: out[0]),
    "named tuple": wrapped(Pair, lambda out: out.features),
    "list": wrapped(lambda h: [None, h], lambda out: out[1]),
    "dict": wrapped(lambda h: {"x": h, "n": 1}, lambda out: out["x"]),
    "dataclass": wrapped(Record, lambda out: out.features),
}


class Counted:
    """A loss scale that knows how often it was read; counted and shared by reference."""

    def __init__(self, value: float = 1.0) -> None:
        self.value, self.reads = value, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.value


def build(
    case: Case = CASES["tensor"], *, warm: bool = True, **arguments: Any
) -> tuple[nn.Module, fq.Handle]:
    """The case's model with FQ, its codebooks filled by one forward."""
    torch.manual_seed(0)
    model = case.make()
    handle = fq.attach(model, case.layers, **{**SETTINGS, **arguments})
    if warm:
        model(*case.inputs(99))
        handle.loss(), handle.stats()
    return model, handle


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` times the largest entry of each tensor."""
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{CHILD}." in key}


def pure(case: Case = CASES["tensor"], seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    """Gradients of the scores' loss alone, FQ in place."""
    model, _ = build(case, **arguments)
    softplus(case.scores(model(*case.inputs(seed)))).mean().backward()
    return grads(model)


# The same gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_injected_gradients_are_those_of_the_explicit_loss(name, mode):
    case, scale = CASES[name], 7.0
    model, handle = build(case, warm=False, mode=mode)
    other, injecting = build(case, warm=False, mode=mode, inject=True, loss_scale=scale)
    for seed in range(4):
        output = case.scores(model(*case.inputs(seed)))
        loss = handle.loss()
        (scale * (softplus(output).mean() + loss)).backward()
        injected = case.scores(other(*case.inputs(seed)))
        assert torch.equal(injected, output) and injecting.loss() == 0 and loss > 0
        (scale * softplus(injected).mean()).backward()
        expected = grads(model)
        assert len(expected) == len(list(model.parameters()))
        assert_close(grads(other), expected)
        assert_equal(codes(other), codes(model))
    assert injecting.stats() == handle.stats()
    alone = pure(case, 3, mode=mode, commitment_weight=0.0)  # the loss is no small part of all this
    assert max((alone[key] - expected[key] / scale).abs().max() for key in alone) > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"stages": 2},
        {"normalize": True},
        {"divide_by_variance": True},
        {"warmup_updates": 5},
        {"gradient": "rotation"},
        {"deferred_update": True},
        {"num_classes": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_codebook_option_is_injected_as_it_is_charged(options):
    case, labels = CASES["tensor"], torch.tensor([0, 1, 2, 0])
    chosen = {"mode": "replace", "options": CodebookOptions(**options)}
    results = []
    for inject in (False, True):
        model, handle = build(warm=False, inject=inject, **chosen)
        for seed in range(3):
            with handle.labels(labels):
                (softplus(model(*case.inputs(seed))).mean() + handle.loss()).backward()
            if "deferred_update" in options:
                handle.apply_update()
        results.append(grads(model))
    assert_close(results[1], results[0])


def test_a_loss_per_sample_counts_with_its_mean():
    results = []
    for inject in (False, True):
        model, handle = build(inject=inject)
        for quantizer in handle.quantizers.values():
            quantizer.reduction = "none"
        (model(images(0)).mean() + handle.loss()).backward()
        results.append(grads(model))
    model, handle = build()
    (model(images(0)).mean() + handle.loss()).backward()
    expected = grads(model)
    assert_close(results[0], expected)
    assert_close(results[1], expected)


def test_regularized_features_pass_through_to_the_bit_in_a_tensor_of_their_own():
    class Kept(nn.Module):
        """Sigmoid keeps its output for its backward pass; the trunk then overwrites what it was given."""

        def __init__(self):
            super().__init__()
            self.features, self.conv = nn.Sigmoid(), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.features(self.conv(x)).mul_(3.0).sum((1, 2, 3))

    model = Kept()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(images(0)).sum().backward()
    plain = copy.deepcopy(model)
    fq.attach(model, {"features": {"dim": 8}}, codebook_size=4, inject=True)
    seen = []
    model.features.register_forward_hook(lambda _m, _a, output: seen.append((output, output.clone())))
    batch = images(0).to(memory_format=torch.channels_last)
    model(batch).sum().backward()
    output, features = seen[0]
    assert torch.equal(features, plain.features(plain.conv(batch))) and output._base is None
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert model.conv.weight.grad.isfinite().all() and model.conv.weight.grad.abs().max() > 0


def test_without_a_graph_nothing_is_done():
    scale = Counted()
    model, _ = build(inject=True, loss_scale=scale)
    seen = []
    model.blocks[1].conv.register_forward_hook(lambda _m, _a, output: seen.append(output))
    model.blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    model.act.inplace = False
    model.requires_grad_(False)
    model(images(0))
    assert seen[0] is seen[1], "frozen, and the pictures need no gradient"
    model.requires_grad_(True)
    with torch.no_grad():
        model(images(0))
    assert seen[2] is seen[3]
    model(images(0))
    assert seen[4] is not seen[5] and torch.equal(seen[4], seen[5]) and scale.reads == 0


def test_a_weight_of_zero_injects_nothing():
    scale = Counted()
    model, _ = build(inject=True, loss_scale=scale, commitment_weight=0.0)
    model(images(0)).sum().backward()
    assert scale.reads == 0


# Rule (a): gradient penalties see the scores alone


def r1(model: nn.Module, batch: Tensor, gain: float = 16.0) -> tuple[Tensor, Tensor]:
    """The pictures' gradient and the loss of StyleGAN2's lazy R1."""
    leaf = batch.clone().requires_grad_()
    scores = model(leaf)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf, create_graph=True)
    return gradient, (0 * scores + gradient.square().sum((1, 2, 3))[:, None]).mean() * gain


@pytest.mark.parametrize("mode", MODES)
def test_penalties_see_the_gradient_of_the_scores_to_the_bit(mode):
    (plain, _), scale = build(mode=mode), Counted(50.0)
    model, _ = build(mode=mode, inject=True, loss_scale=scale)
    (expected, loss), (gradient, other_loss) = r1(plain, images(1)), r1(model, images(1))
    assert torch.equal(gradient, expected) and torch.equal(loss, other_loss) and scale.reads == 0
    parameters = [dict(net.named_parameters()) for net in (plain, model)]
    second = [
        torch.autograd.grad(value, list(named.values()), create_graph=True, allow_unused=True)
        for value, named in zip((loss, other_loss), parameters, strict=True)
    ]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*second, strict=True))
    assert scale.reads == 0 and sum(grad is not None for grad in second[0]) > 3


def test_second_derivatives_are_those_of_the_identity():
    torch.manual_seed(0)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    inject = Injector(3.0, "first_order_only")
    cubes = (inject(x, x.square().mean()) ** 3).sum()
    (first,) = torch.autograd.grad(cubes, x, create_graph=True)
    assert torch.equal(first, 3 * x**2)
    first.square().sum().backward()
    torch.testing.assert_close(x.grad, 36 * x**3)
    assert torch.autograd.gradgradcheck(lambda x: inject(x, x.square().mean()) ** 3, x)


# Rule (c): what a penalty's own backward pass brings


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("inject_on", "reads"), [("always", 2), ("first_order_only", 0)])
def test_the_backward_pass_of_a_penalty_injects_unless_told_otherwise(mode, inject_on, reads):
    (plain, handle), scale = build(mode=mode), Counted(5.0)
    model, _ = build(mode=mode, inject=True, inject_on=inject_on, loss_scale=scale)
    _, penalty = r1(plain, images(1))
    loss = handle.loss()
    (penalty + (5.0 * loss if reads else 0.0)).backward()
    _, penalty = r1(model, images(1))
    penalty.backward()
    assert scale.reads == reads
    assert_close(grads(model), grads(plain))


def test_first_order_only_still_injects_where_no_penalty_was():
    scale = Counted()
    model, _ = build(inject=True, inject_on="first_order_only", loss_scale=scale)
    r1(model, images(1))[1].backward()
    model(images(0)).mean().backward()
    assert scale.reads == 2


def test_r1_and_the_main_loss_over_one_graph_inject_once():
    (plain, handle), scale = build(), Counted()
    model, _ = build(inject=True, loss_scale=scale)
    for net in (plain, model):
        leaf = images(1).requires_grad_()
        scores = net(leaf)
        (gradient,) = torch.autograd.grad(scores.sum(), leaf, create_graph=True)
        (softplus(-scores).mean() + gradient.square().sum() + handle.loss()).backward()
    assert scale.reads == 2
    assert_close(grads(model), grads(plain))


def test_every_first_order_pass_injects():
    scale = Counted()
    model, _ = build(inject=True, loss_scale=scale)
    scores = model(images(0))
    scores.mean().backward(retain_graph=True)
    scores.mean().backward()
    assert scale.reads == 4


def test_where_no_gradient_arrives_nothing_is_added():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None

    scale = Counted()
    model, _ = build(inject=True, loss_scale=scale)
    model.blocks[1].register_forward_hook(lambda _m, _a, output: Cut.apply(output))
    model(images(0)).mean().backward()
    assert scale.reads == 0 and set(grads(model)) == {"linear.weight", "linear.bias"}


# Rule (b): the scale


def test_a_callable_scale_is_read_in_every_backward_pass_and_not_before():
    scale = Counted(1.0)
    model, _ = build(inject=True, loss_scale=scale)
    results = []
    for value in (1.0, 1024.0, 0.25):
        before = copy.deepcopy(codes(model))
        output = model.eval()(images(0)).mean()
        reads, scale.value = scale.reads, value  # after the forward
        output.backward()
        assert scale.reads == reads + 2
        assert_equal(codes(model), before)
        results.append(grads(model))
    scores = {key: value for key, value in pure_in_eval(model).items() if key.startswith("blocks.0")}
    for key, alone in scores.items():
        one, many, quarter = (found[key] - alone for found in results)
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(many, 1024 * one, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(quarter, one / 4, rtol=1e-4, atol=1e-5)


def pure_in_eval(model: nn.Module) -> dict[str, Tensor]:
    with fq.handle_of(model).penalty():
        model(images(0)).mean().backward()
    return grads(model)


def test_the_scale_may_be_a_tensor_and_may_be_set_anew():
    model, handle = build(inject=True, loss_scale=lambda: torch.tensor(2.0))
    results = []
    for scale in (None, 2, 3.0):
        if scale is not None:
            handle.injector.loss_scale = scale
        model.eval()(images(0)).mean().backward()
        results.append(grads(model))
    assert_equal(results[0], results[1])
    assert (results[2]["blocks.0.conv.weight"] - results[1]["blocks.0.conv.weight"]).abs().max() > 1e-3


def test_accumulated_steps_divide_the_injected_loss_as_they_divide_their_own():
    model, handle = build()
    other, _ = build(inject=True, loss_scale=1 / 4)
    for seed in range(4):
        ((model(images(seed)).mean() + handle.loss()) / 4).backward()
        (other(images(seed)).mean() / 4).backward()
    assert_close(grads(other), grads(model))


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_scaler_scales_both_losses_alike(mode):
    results = []
    for inject in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scale = {"inject": True, "loss_scale": scaler.get_scale} if inject else {}
        model, handle = build(mode=mode, **scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss = softplus(model(images(0))).mean() + handle.loss()
        scaler.scale(loss).backward()
        assert model.blocks[0].conv.weight.grad.abs().max() > 10
        scaler.unscale_(optimizer)
        results.append(grads(model))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_get_a_gradient_computed_in_float32(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5, 5).to(dtype).requires_grad_()
    model = nn.Sequential(nn.Identity(), nn.Flatten())
    scale = 1e5  # beyond float16
    handle = fq.attach(model, {"0": {"dim": 8}}, codebook_size=4, inject=True, loss_scale=scale)
    model(x * 1)
    quantizer = handle.quantizers["0"]
    output = model.eval()(x * 1)
    assert output.dtype == dtype and torch.equal(output, x.flatten(1))
    arriving = torch.randn(4, 200).to(dtype)
    x.grad = None
    output.backward(arriving)
    distance = x.float() - quantizer.decode(quantizer.run(x.float(), False).indices)
    expected = arriving.view_as(x) + (2 * scale * distance / x.numel()).to(dtype)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_features_of_bfloat16_agree_with_the_explicit_loss(mode):
    results = []
    for inject in (False, True):
        model, handle = build(mode=mode, inject=inject)
        seen = []
        model.blocks[1].register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = softplus(model(images(0)).float()).mean() + handle.loss()
        loss.backward()
        assert seen == [torch.bfloat16]
        results.append(grads(model))
    assert_close(results[1], results[0], 0.02)


# Rule (d): generator steps


@pytest.mark.parametrize("by", ["requires_grad", "context"])
@pytest.mark.parametrize("policy", ["loss", "loss+ema", "none"])
def test_generator_steps_inject_by_their_policy(by, policy):
    def fake_gradient(inject: bool, parts: int) -> Tensor:
        model, handle = build(generator_step=policy, concat_parts=parts, inject=inject)
        noise = images(1).requires_grad_()
        if by == "requires_grad":
            model.requires_grad_(False)
            output = model(noise * 1.0)
        else:
            with handle.generator_step():
                output = model(noise * 1.0)
        (output.mean() + handle.loss()).backward()
        updates = {int(quantizer.num_updates) for quantizer in handle.quantizers.values()}
        assert updates == {2 if policy == "loss+ema" else 1}
        return noise.grad

    model, handle = build()
    noise = images(1).requires_grad_()
    with handle.penalty():
        model(noise * 1.0).mean().backward()
    explicit, injected = fake_gradient(False, 1), fake_gradient(True, 2)  # fakes alone are one part
    assert_close({"noise": injected}, {"noise": explicit})
    assert torch.equal(injected, noise.grad) == (policy == "none")


# Rule (e): parts of a batch


def test_concatenated_parts_are_injected_as_if_each_had_its_forward():
    (joint, _), (model, _) = (build(inject=True, concat_parts=parts) for parts in (2, 1))
    joint.eval(), model.eval()
    fake, real = images(1), images(2)
    (2 * joint(torch.cat([fake, real])).mean()).backward()
    (model(fake).mean() + model(real).mean()).backward()
    assert_close(grads(joint), grads(model))


def test_the_penalty_context_injects_nothing():
    model, handle = build(inject=True, loss_scale=1e6)
    with handle.penalty():
        model(images(0)).mean().backward()
    plain, explicit = build()
    with explicit.penalty():
        plain(images(0)).mean().backward()
    assert_equal(grads(model), grads(plain))


# Re-computation, compilation, processes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_segments_inject_once(mode, reentrant):
    results = []
    for kind in (None, reentrant):
        scale = Counted(2.0)
        model, handle = build(
            Case(lambda kind=kind: Net(reentrant=kind), ["blocks.0", "blocks.1"]),
            mode=mode, inject=True, loss_scale=scale, decay=0.1,
        )  # fmt: skip
        for seed in range(3):
            model(images(seed)).mean().backward()
        assert scale.reads == 6
        results.append((grads(model), codes(model), handle.stats()))
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1])
    assert results[0][2] == results[1][2] and results[0][2]["blocks.1"].tokens == 3 * 4 * 36


@pytest.mark.parametrize("policy", ["loss", "none"])
def test_a_recomputation_after_the_generator_step_still_belongs_to_it(policy):
    results = []
    for kind in (None, True):
        model, handle = build(
            Case(lambda kind=kind: Net(reentrant=kind), ["blocks.1"]),
            inject=True, generator_step=policy, concat_parts=2,
        )  # fmt: skip
        noise = images(1).requires_grad_()
        with handle.generator_step():
            output = model(noise * 1.0)
        output.mean().backward()
        results.append(noise.grad)
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_is_one_graph_and_injects_the_same():
    case = Case(Net, {"blocks.0": {}, "blocks.1": {"mode": "replace"}})
    model, handle = build(case)
    other, injecting = build(case, inject=True, loss_scale=3.0)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for seed, batch in enumerate((2, 3, 4)):
        (model(images(seed, batch)).mean() + 3.0 * handle.loss()).backward()
        compiled(images(seed, batch)).mean().backward()
        assert_close(grads(other), grads(model))
    torch._dynamo.reset()
    assert injecting.loss() == 0 and injecting.stats()["blocks.1"].tokens == 9 * 36


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_with_a_callable_scale_reads_it_in_every_pass():
    case, scaler = Case(Net, ["blocks.1"]), {"scale": 1.0}
    model, handle = build(case)
    other, _ = build(case, inject=True, loss_scale=lambda: scaler["scale"])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(copy.deepcopy(other), backend="aot_eager", fullgraph=True)(images(0))
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    for seed, value in enumerate((1.0, 64.0, 0.5)):
        (model(images(seed)).mean() + value * handle.loss()).backward()
        output = compiled(images(seed)).mean()
        scaler["scale"] = value
        output.backward()
        assert_close(grads(other), grads(model))
    torch._dynamo.reset()


def train(rank: int | None, mode: str) -> dict[str, Tensor]:
    """Five steps in one process, or on this rank's half of every batch."""
    torch.manual_seed(1)
    model = Net().double()
    net = model
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    fq.attach(net, ["blocks.0", "blocks.1"], mode=mode, inject=True, loss_scale=4.0, **SETTINGS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for seed in range(5):
        batch = images(seed, 8).double()
        optimizer.zero_grad()
        (4.0 * softplus(net(batch if rank is None else batch.chunk(2)[rank])).mean()).backward()
        optimizer.step()
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=20))  # fmt: skip
    torch.save({mode: train(rank, mode) for mode in ("regularize", "replace")}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    context = torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2, join=False)
    while not context.join(timeout=60, grace_period=5):
        pass
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mode in first:
        whole = train(None, mode)
        assert_equal(first[mode], second[mode])
        for key, value in whole.items():
            torch.testing.assert_close(first[mode][key], value, rtol=1e-11, atol=1e-12)


# Copies, pickles, removal


def test_a_deep_copy_reads_the_same_scale_and_a_set_one_is_its_own():
    scale = Counted(2.0)
    model, _ = build(inject=True, inject_on="first_order_only", loss_scale=scale)
    other = copy.deepcopy(model)
    other(images(0)).mean().backward()
    injector = fq.handle_of(other).injector
    assert scale.reads == 2 and injector.loss_scale is scale and injector.inject_on == "first_order_only"
    injector.loss_scale = 1.0
    other(images(0)).mean().backward()
    assert scale.reads == 2
    model(images(0)).mean().backward()
    assert scale.reads == 4


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickled_model_keeps_a_number_but_no_callable(way):
    def through(model):
        if way == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    model, _ = build(inject=True, loss_scale=lambda: 2.0)
    model(images(0)).mean().backward()
    grads(model)
    other = through(model)
    other.eval().requires_grad_(False)(images(0))  # a snapshot that is only looked at needs no scale
    other.train().requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"a callable loss_scale does not travel .*injector\.loss_scale"):
        other(images(1))
    fq.handle_of(other).injector.loss_scale = 2.0
    third = through(other)
    third.eval(), model.eval(), other.eval()
    assert_equal(codes(other), codes(third))
    model.load_state_dict(other.state_dict())
    for net in (model, other, third):
        net(images(2)).mean().backward()
    expected = grads(model)
    assert_equal(grads(other), expected)
    assert_equal(grads(third), expected)


def test_detach_leaves_no_trace_and_no_injection():
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    before = str(model), list(model.state_dict()), set(vars(model)), len(model.blocks[1]._forward_hooks)
    handle = fq.attach(model, "blocks.*.conv", inject=True, loss_scale=9.0, **SETTINGS)
    model(images(0)).mean().backward()
    grads(model)
    handle.detach()
    after = str(model), list(model.state_dict()), set(vars(model)), len(model.blocks[1]._forward_hooks)
    assert after == before
    for net in (model, plain):
        net(images(0)).mean().backward()
    assert_equal(grads(model), grads(plain))


# What is refused, and what is said


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inject": True, "inject_on": "never"}, ValueError, "inject_on is 'never': choose one of 'always'"),
        ({"inject": True, "loss_scale": -1.0}, ValueError, "loss_scale is -1.0: give a finite number of at"),
        ({"inject": True, "loss_scale": float("inf")}, ValueError, "loss_scale is inf: give a finite number"),
        ({"inject": True, "loss_scale": "2"}, TypeError, "loss_scale is a str: give a number, or a callable"),
        ({"inject": True, "loss_scale": True}, TypeError, "loss_scale is a bool: give a number"),
        ({"loss_scale": 2.0}, ValueError, "loss_scale=2.0 shape an injected loss, but inject is False"),
        ({"inject_on": "first_order_only"}, ValueError, "inject_on='first_order_only' .* inject is False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, error, message):
    model = Net()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        fq.attach(model, "blocks.1", codebook_size=4, **arguments)
    assert list(model.state_dict()) == before


def test_a_callable_that_returns_no_number_is_named():
    model, _ = build(inject=True, loss_scale=lambda: None)
    with pytest.raises(TypeError, match=r"loss_scale\(\) returned a NoneType: let it return a number"):
        model(images(0)).mean().backward()


def test_layers_never_reached_are_named_by_the_figures():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.used(x)

    model = Branches()
    handle = fq.attach(model, ["used", "idle"], codebook_size=4, inject=True)
    assert handle.stats()["used"].tokens == 0  # before any forward there is nothing to say
    model(images(0))
    with pytest.warns(RuntimeWarning, match="the model's forward never came to the attached layers idle"):
        handle.stats()
    model(images(0))
    handle.stats()
