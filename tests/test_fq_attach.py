import copy
import dataclasses
import functools
import io
import pickle
from typing import NamedTuple

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fq
from fq import CodebookOptions, FeatureQuantize, stats
from fq.attach import CHILD

MODES = ("regularize", "replace", "blend")
LAYERS = ["layer1", "layer2", "layer3", "layer4"]


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
    """A discriminator with an in-place trunk; ``unwrap`` takes the features out of what block 1 returns."""

    def __init__(self, wrap=None, unwrap=None, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(3, 8), Block(8, 8, wrap)])
        self.act = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 1)
        self.unwrap, self.reentrant = unwrap, reentrant

    def forward(self, x):
        h = self.act(self.blocks[0](x))
        run = self.blocks[1]
        if self.reentrant is not None:
            h = checkpoint(run, h, use_reentrant=self.reentrant)
        else:
            h = run(h)
        h = self.act(h if self.unwrap is None else self.unwrap(h))
        return self.linear(h.sum((2, 3)))


def images(seed: int, batch: int = 4, size: int = 6, **kind) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(**kind)


def net(**arguments) -> Net:
    torch.manual_seed(0)
    return Net(**arguments)


def attached(layers="blocks.1", *, model=None, **arguments):
    model = net() if model is None else model
    arguments.setdefault("codebook_size", 8)
    return model, fq.attach(model, layers, **arguments)


def hooks_of(model: nn.Module) -> dict[str, list[int]]:
    """Number of entries in every hook dictionary of every module."""
    found = {}
    for name, module in model.named_modules():
        kinds = [key for key in vars(module) if "hook" in key]
        assert len(kinds) > 8
        found[name] = {key: len(vars(module)[key]) for key in kinds if hasattr(vars(module)[key], "__len__")}
    return found


def codebook_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{CHILD}." in key}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def updates(model: nn.Module, layer: str = "blocks.1") -> int:
    return int(model.get_submodule(layer).fq.num_updates)


# Names


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        ("layer4", ["layer4"]),
        ("downsample", ["layer2.0.downsample", "layer3.0.downsample", "layer4.0.downsample"]),
        ("1.conv2", [f"layer{i}.1.conv2" for i in (1, 2, 3, 4)]),
        ("layer?", LAYERS),
        ("layer[12].*.bn1", ["layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer2.1.bn1"]),
        (["layer3", "layer1"], ["layer1", "layer3"]),
        (("layer1", "layer1"), ["layer1"]),
        ({"layer2": {}, "layer4": {"codebook_size": 5}}, ["layer2", "layer4"]),
    ],
)
def test_layers_are_found_by_name_suffix_glob_list_and_dict(layers, names):
    model = torchvision.models.resnet18()
    handle = fq.attach(model, layers, codebook_size=4)
    assert handle.names == names == list(handle.quantizers)
    carriers = [name for name, module in model.named_modules() if CHILD in module._modules]
    assert carriers == names


def test_channels_are_read_off_the_layers():
    model = torchvision.models.resnet18()
    handle = fq.attach(model, [*LAYERS, "conv1"], codebook_size=4)
    assert [quantizer.dim for quantizer in handle.quantizers.values()] == [64, 64, 128, 256, 512]


def test_overrides_hold_for_their_layer_alone():
    overrides = {"codebook_size": 5, "decay": 0.5, "commitment_weight": 2.0, "mode": "replace",
                 "options": CodebookOptions(init="data")}  # fmt: skip
    _, handle = attached({"blocks.0": {}, "blocks.1": overrides}, codebook_size=9, decay=0.7)
    first, second = handle.quantizers["blocks.0"], handle.quantizers["blocks.1"]
    settings = [(q.codebook_size, q.decay, q.commitment_weight, q.mode) for q in (first, second)]
    assert settings == [(9, 0.7, 1.0, "regularize"), (5, 0.5, 2.0, "replace")]
    assert first.init == "kmeans" and second.init == "data"


def test_sites_draw_from_streams_of_their_own():
    _, handle = attached(["blocks.0", "blocks.1"], options=CodebookOptions(init="normal"))
    assert not torch.equal(*(quantizer.codebook for quantizer in handle.quantizers.values()))
    _, again = attached(["blocks.1"], options=CodebookOptions(init="normal"))
    assert torch.equal(again.quantizers["blocks.1"].codebook, handle.quantizers["blocks.1"].codebook)


def test_a_name_that_matches_nothing_lists_the_five_nearest():
    model = torchvision.models.resnet18()
    with pytest.raises(
        ValueError, match=r"no module matches 'layer1\.0\.conv3': nearest names are"
    ) as caught:
        fq.attach(model, "layer1.0.conv3", codebook_size=4)
    near = str(caught.value).split("nearest names are ")[1].split(";")[0].split(", ")
    assert len(near) == 5 and set(near) <= {repr(name) for name, _ in model.named_modules()}
    assert {"'layer1.0.conv1'", "'layer1.0.conv2'"} <= set(near)


@pytest.mark.parametrize(
    ("layers", "arguments", "error", "message"),
    [
        ("none*", {}, ValueError, "no module matches 'none\\*'"),
        ([], {}, ValueError, "layers is empty"),
        ([3], {}, TypeError, "layer 3 is a int: give module names as strings"),
        ({"act": {"size": 3}}, {}, ValueError, r"overrides of 'act' name \['size'\]: known are"),
        ("blocks", {}, ValueError, r"layer 'blocks' is a ModuleList, which has no forward .* 'blocks\.\*'"),
        ("blocks.1", {"codebook_size": 0}, ValueError, "codebook_size is 0"),
        ("blocks.1", {"decay": 1.5}, ValueError, "decay is 1.5"),
        ("blocks.1", {"concat_parts": 0}, ValueError, "concat_parts is 0: give the number of equal parts"),
        ("blocks.1", {"generator_step": "ema"}, ValueError, "generator_step is 'ema': choose 'loss'"),
        (["blocks.0", "act"], {}, ValueError, "cannot tell how many channels 'act' puts out: pass"),
    ],
)
def test_refused_attachments_leave_the_model_as_it_was(layers, arguments, error, message):
    model = net()
    before = hooks_of(model), list(model.state_dict()), model.training
    with pytest.raises(error, match=message):
        fq.attach(model, layers, **{"codebook_size": 4, **arguments})
    assert (hooks_of(model), list(model.state_dict()), model.training) == before


def test_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model is a function: pass the torch\.nn\.Module"):
        fq.attach(lambda x: x, "layer1", codebook_size=4)


def test_a_layer_carries_one_quantizer_but_other_layers_may_follow():
    model, first = attached("blocks.1")
    with pytest.raises(ValueError, match=r"layer 'blocks\.1' already has an attribute 'fq': detach"):
        fq.attach(model, ["blocks.0", "blocks.1"], codebook_size=4)
    assert CHILD not in model.blocks[0]._modules
    with pytest.warns(RuntimeWarning, match=r"lie inside other .* \('blocks\.0\.conv' inside 'blocks\.0'\)"):
        second = fq.attach(model, "blocks.0*", codebook_size=4)
    assert second.names == ["blocks.0", "blocks.0.conv"] and fq.handle_of(model) is second
    model(images(0))
    assert first.loss() > 0 and second.loss() > 0
    second.detach()
    assert fq.handle_of(model) is first
    model(images(0))
    assert first.loss() > 0
    first.detach()
    with pytest.raises(ValueError, match=r"Net carries no FQ: call fq\.attach"):
        fq.handle_of(model)


def test_a_pattern_never_matches_a_quantizer():
    model, _ = attached("blocks.1")
    with pytest.warns(RuntimeWarning, match=r"\('blocks\.1\.conv' inside 'blocks\.1'\)"):
        handle = fq.attach(model, "blocks.1.*", codebook_size=4)
    assert handle.names == ["blocks.1.conv"]


def test_width_of_an_activation_comes_from_the_layer_before_or_from_a_probe():
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2))
    assert fq.attach(trunk, ["1", "2"], codebook_size=4).quantizers["2"].dim == 6
    model = net(wrap=lambda h: h + torch.randn_like(h))
    before = torch.get_rng_state()
    handle = fq.attach(model, "act", codebook_size=4, example_input=images(0))
    assert handle.quantizers["act"].dim == 8 and model.training
    assert torch.equal(before, torch.get_rng_state())


def test_features_of_another_width_name_the_layer_and_the_way_out():
    model = net()
    fq.attach(model, {"blocks.1": {"dim": 5}}, codebook_size=4)
    message = r"'blocks.1' put out features of shape \[4, 8, 6, 6\], but .* for 5 channels: .*'dim': 8"
    with pytest.raises(ValueError, match=message):
        model(images(0))


# What the model returns


def test_regularize_leaves_every_output_and_gradient_of_resnet18_as_it_was():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=3)
    model = copy.deepcopy(plain)
    handle = fq.attach(model, LAYERS, codebook_size=8)
    for seed in range(2):
        batch = images(seed, 2, 32)
        torch.manual_seed(seed)
        expected, actual = plain(batch), model(batch)
        assert torch.equal(expected, actual)
        expected.square().sum().backward()
        actual.square().sum().backward()
    for first, second in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)
    assert handle.loss() > 0 and all(q.num_updates == 2 for q in handle.quantizers.values())
    assert torch.equal(plain.eval()(batch), model.eval()(batch))


def test_loss_is_the_weighted_commitment_at_each_layer():
    model = net()
    seen = {}
    for name in ("blocks.0", "blocks.1"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: seen.setdefault(name, output.detach().clone())
        )
    handle = fq.attach(model, {"blocks.0": {}, "blocks.1": {"commitment_weight": 3.0}}, codebook_size=8,
                       options=CodebookOptions(init="normal"))  # fmt: skip
    expected = 0.0
    for name, weight in (("blocks.0", 1.0), ("blocks.1", 3.0)):
        codes = handle.quantizers[name].codebook.clone()
        seen.clear()
        model.eval()(images(0))
        tokens = seen[name].movedim(1, -1).reshape(-1, 8)
        expected += weight * torch.cdist(tokens, codes).min(1).values.square().mean() / 8
    handle.loss()
    model(images(0))
    assert handle.loss().item() == pytest.approx(float(expected), rel=1e-4)


class Pair(NamedTuple):
    features: torch.Tensor
    image: None = None


@dataclasses.dataclass
class Record:
    features: torch.Tensor
    step: int = 3


class Listing(list):
    pass


CONTAINERS = {
    "tuple": (lambda h: (h, None), lambda out: out[0], tuple),
    "list": (lambda h: [None, h], lambda out: out[1], list),
    "list subclass": (lambda h: Listing([h]), lambda out: out[0], Listing),
    "named tuple": (lambda h: Pair(h), lambda out: out.features, Pair),
    "dict": (lambda h: {"x": h, "n": 1}, lambda out: out["x"], dict),
    "dataclass": (lambda h: Record(h), lambda out: out.features, Record),
    "nothing else": (None, lambda out: out, torch.Tensor),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CONTAINERS)
def test_features_are_exchanged_in_any_container_and_the_trunk_may_work_in_place(kind, mode):
    wrap, unwrap, container = CONTAINERS[kind]
    model = net(wrap=wrap, unwrap=unwrap)
    options = CodebookOptions(blend_steps=1)
    handle = fq.attach(model, "blocks.1", codebook_size=8, mode=mode, options=options)
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _a, out: seen.append((out, unwrap(out).clone())))
    for seed in range(3):
        output = model(images(seed))
        (output.square().mean() + handle.loss()).backward()
        assert model.blocks[1].conv.weight.grad.isfinite().all()
    model.eval()
    seen.clear()
    with torch.no_grad():
        model(images(0))
        features = model.blocks[1].conv(model.act(model.blocks[0](images(0))))
    (returned, actual), quantizer = seen[0], handle.quantizers["blocks.1"]
    assert type(returned) is container
    if kind == "dict":
        assert list(returned) == ["x", "n"] and returned["n"] == 1
    elif kind == "dataclass":
        assert returned.step == 3
    elif kind == "list":
        assert len(returned) == 2 and returned[0] is None
    if mode == "regularize":
        assert torch.equal(actual, features)
    else:
        codes = quantizer.decode(quantizer.run(features, False).indices)
        torch.testing.assert_close(actual, codes, rtol=1e-5, atol=1e-5)


def test_the_other_members_of_a_container_are_the_same_objects():
    image = torch.zeros(4, 3, 6, 6)
    model = net(wrap=lambda h: (h, image), unwrap=lambda out: out[0])
    fq.attach(model, "blocks.1", codebook_size=8, mode="replace")  # told from the image by its channels
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(images(0))
    assert seen[0][1] is image


def test_ambiguous_and_missing_features_ask_for_select():
    model = net(wrap=lambda h: (h, -h), unwrap=lambda out: out[0])
    handle = fq.attach(model, "blocks.1", codebook_size=8)
    with pytest.raises(ValueError, match=r"layer 'blocks.1' returns several 4-D tensors .*'select'"):
        model(images(0))
    handle.detach()
    chosen = fq.attach(model, {"blocks.1": {"select": 1}}, codebook_size=8, mode="replace")
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    model(images(0))
    first, second = seen[0]
    codes = chosen.quantizers["blocks.1"]
    different = [
        len(out.detach().movedim(1, -1).reshape(-1, 8).round(decimals=4).unique(dim=0))
        for out in (first, second)
    ]
    assert different[0] > 100 and different[1] <= codes.codebook_size
    chosen.detach()
    wrong = fq.attach(model, {"blocks.1": {"select": "x"}}, codebook_size=8)
    with pytest.raises(ValueError, match=r"has no tensor at select='x' in its tuple: it has \[0, 1\]"):
        model(images(0))
    wrong.detach()
    flat = net(wrap=lambda h: (h.flatten(1), None), unwrap=lambda out: out[0].view(4, 8, 6, 6))
    fq.attach(flat, "blocks.1", codebook_size=8)
    with pytest.raises(ValueError, match="returns a tuple without a 4-D tensor"):
        flat(images(0))


@pytest.mark.parametrize(("layer", "channel_last"), [("0", False), ("1", True)])
def test_vectors_and_token_sequences_are_quantised_too(layer, channel_last):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5))
    options = CodebookOptions(channel_last=channel_last)
    handle = fq.attach(model, layer, codebook_size=4, mode="replace", options=options)
    shape = (10, 7, 6) if channel_last else (10, 6)
    output = model(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    assert output.shape == (*shape[:-1], 5)
    assert handle.stats()[layer].tokens == (70 if channel_last else 10)


# Second derivatives and gradient penalties


def r1(model: nn.Module, batch: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    leaf = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
    penalty = gradient.square().sum((1, 2, 3)).mean()
    grads = torch.autograd.grad(penalty, list(model.parameters()), allow_unused=True)
    return penalty.item(), [grad for grad in grads if grad is not None]


def test_r1_under_regularize_equals_plain_r1_and_does_not_update():
    plain, (model, handle) = net(), attached()
    model(images(0))
    handle.loss()
    before = codebook_state(model)
    expected, actual = r1(plain, images(1)), r1(model, images(1))
    assert expected[0] == actual[0] and len(expected[1]) == len(actual[1]) > 3
    assert all(torch.equal(a, b) for a, b in zip(expected[1], actual[1], strict=True))
    assert same(before, codebook_state(model))


@pytest.mark.parametrize("mode", MODES)
def test_r1_has_finite_gradients_together_with_the_loss(mode):
    model, handle = attached(["blocks.0", "blocks.1"], mode=mode)
    model(images(0))
    handle.loss()
    leaf = images(1).requires_grad_()
    scores = model(leaf)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf, create_graph=True)
    (nn.functional.softplus(scores).mean() + gradient.square().sum() + handle.loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert updates(model) == 1


def test_leaf_input_given_by_keyword_is_seen_and_forgotten_after_the_forward():
    model, handle = attached()
    model(images(0))
    model(x=images(0).requires_grad_())
    assert updates(model) == 1
    model(images(0))
    assert updates(model) == 2
    model(images(0).requires_grad_())
    model.forward(images(0))  # calls the layers' hooks, not the root's
    assert updates(model) == 3
    with pytest.raises(RuntimeError):
        model(torch.zeros(4, 2, 6, 6, requires_grad=True))
    model.forward(images(0))
    assert updates(model) == 4 and handle.loss() > 0


def test_generated_images_are_no_leaf_and_do_update():
    model, _ = attached()
    scale = torch.ones(1, requires_grad=True)
    model(images(0) * scale)
    assert updates(model) == 1


def test_penalty_context_stops_updates_losses_and_figures():
    model, handle = attached(mode="replace")
    model(images(0))
    handle.loss(), handle.stats()
    before = codebook_state(model)
    with handle.penalty():
        quantized = model(images(1))
    assert same(before, codebook_state(model))
    assert handle.loss() == 0 and handle.stats()["blocks.1"].tokens == 0
    assert torch.equal(quantized, model.eval()(images(1)))
    assert updates(model.train()) == 1
    model(images(1))
    assert updates(model) == 2


# Discriminator and generator steps


@pytest.mark.parametrize("by", ["requires_grad", "context"])
@pytest.mark.parametrize(("policy", "moves", "pays"), [("loss", False, True), ("loss+ema", True, True),
                                                        ("none", False, False)])  # fmt: skip
def test_generator_step_follows_its_policy(by, policy, moves, pays):
    model, handle = attached(generator_step=policy, concat_parts=2)
    model(images(0))
    discriminator_loss = handle.loss()
    before = codebook_state(model)
    fakes = images(0).requires_grad_() * 1.0
    if by == "requires_grad":
        model.requires_grad_(False)
        model(fakes)
        model.requires_grad_(True)
    else:
        with handle.generator_step():
            model(fakes)
    loss = handle.loss()
    assert same(before, codebook_state(model)) == (not moves)
    assert (loss > 0) == pays and loss.requires_grad == pays
    model.eval()(images(0))  # a generator step counts one part, whatever concat_parts says
    assert policy != "loss" or loss.item() == pytest.approx(handle.loss().item() / 2, rel=1e-5)
    model.train()(images(0))
    assert updates(model) == 2 + moves and discriminator_loss > 0


def test_generator_pays_for_the_distance_of_its_own_features():
    model, handle = attached()
    model(images(0))
    handle.loss()
    fakes = images(1).requires_grad_()
    with handle.generator_step():
        model(fakes * 1.0)
    handle.loss().backward()
    assert fakes.grad.abs().max() > 0


def test_concatenated_parts_are_charged_as_if_each_had_its_forward():
    (joint_model, joint), (model, single) = attached(concat_parts=2), attached()
    joint_model(images(0)), model(images(0))
    joint.loss(), single.loss()
    joint_model.eval(), model.eval()
    fake, real = images(1), images(2)
    joint_model(torch.cat([fake, real]))
    model(fake), model(real)
    assert joint.loss().item() == pytest.approx(single.loss().item(), rel=1e-5)


def test_loss_is_summed_over_forwards_once_and_then_forgotten():
    model, handle = attached()
    assert handle.loss() == 0
    model(images(0))
    handle.loss()
    model.eval()
    model(images(1))
    first = handle.loss()
    model(images(2))
    second = handle.loss()
    model(images(1)), model(images(2))
    assert handle.loss().item() == pytest.approx((first + second).item())
    assert handle.loss() == 0 and handle.loss().dtype == torch.float32


def test_losses_that_nobody_asks_for_are_dropped_with_a_warning():
    model, _ = attached(model=nn.Sequential(nn.Linear(2, 2)), layers="0")
    batch = torch.randn(4, 2)
    with pytest.warns(RuntimeWarning, match="loss\\(\\) has not been called for 1024 layer outputs"):
        for _ in range(1025):
            model(batch)


@pytest.mark.parametrize("mode", ["regularize"])
def test_weight_zero_trains_bit_for_bit_like_the_plain_model(mode):
    def train(with_fq):
        model = net()
        torch.manual_seed(1)
        handle = fq.attach(model, ["blocks.0", "blocks.1"], codebook_size=8, mode=mode, commitment_weight=0.0,
                           options=CodebookOptions(dead_code_grace=0)) if with_fq else None  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = (model(torch.randn(4, 3, 6, 6)) + torch.randn(4, 1)).square().mean()
            (loss + handle.loss() if handle else loss).backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, handle

    (plain, _), (with_fq, handle) = train(False), train(True)
    assert plain == with_fq and handle.stats()["blocks.0"].commitment > 0


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_reported_commitment_is_the_same_for_any_weight(weight):
    model, handle = attached(commitment_weight=weight, options=CodebookOptions(init="normal", seed=3))
    model(images(0))
    assert handle.stats()["blocks.1"].commitment == pytest.approx(attached_commitment(), rel=1e-5)


@functools.cache
def attached_commitment() -> float:
    model, handle = attached(options=CodebookOptions(init="normal", seed=3))
    model(images(0))
    return handle.loss().item()


def test_freeze_stops_all_updates_and_keeps_the_loss():
    model, handle = attached(["blocks.0", "blocks.1"])
    model(images(0))
    handle.loss()
    before = codebook_state(model)
    handle.freeze()
    model(images(1))
    assert same(before, codebook_state(model)) and handle.loss() > 0
    handle.freeze(False)
    model(images(1))
    assert updates(model) == updates(model, "blocks.0") == 2


def test_deferred_updates_wait_for_the_handle():
    model, handle = attached(["blocks.0", "blocks.1"], options=CodebookOptions(deferred_update=True))
    for seed in range(3):
        model(images(seed))
    assert updates(model) == 0
    handle.apply_update()
    assert updates(model) == updates(model, "blocks.0") == 1


def test_nothing_happens_before_the_first_update():
    model, handle = attached(mode="replace")
    plain = net()
    model.eval()
    assert torch.equal(model(images(0)), plain(images(0)))
    with handle.generator_step():
        assert torch.equal(model.train()(images(0)), plain(images(0)))
    assert handle.loss() == 0 and handle.stats()["blocks.1"].tokens == 0
    assert handle.stats()["blocks.1"].dead_codes == 0


def test_a_poisoned_dry_run_leaves_the_codebook_alone():
    model, handle = attached()
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        model(torch.full((4, 3, 6, 6), torch.nan))
    assert not model.blocks[1].fq.is_ready()
    handle.loss()
    model(images(0))
    assert handle.loss().isfinite() and updates(model) == 1


# Keys, copies, removal


def test_the_state_dict_gains_entries_below_the_layer_and_nothing_else():
    plain, (model, handle) = net(), attached(["blocks.0", "blocks.1"])
    entries = model.state_dict()
    added = [key for key in entries if key not in plain.state_dict()]
    names = ("codebook", "ema_count", "ema_sum", "initialized", "num_updates", "seed")
    assert added == [f"blocks.{i}.fq.{name}" for i in (0, 1) for name in names]
    assert list(handle.strip(entries)) == list(plain.state_dict())
    plain.load_state_dict(handle.strip(entries), strict=True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_strict_loading_takes_plain_and_full_checkpoints_but_no_partial_one():
    model, _ = attached()
    model(images(0))
    before = codebook_state(model)
    model.load_state_dict(net().state_dict(), strict=True)
    assert same(before, codebook_state(model)) and model.blocks[1].fq.is_ready()
    other, handle = attached()
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(before, codebook_state(other)) and handle.quantizers["blocks.1"].is_ready()
    partial = model.state_dict()
    del partial["blocks.1.fq.ema_sum"]
    with pytest.raises(RuntimeError, match=r"blocks.1.fq.ema_sum"):
        other.load_state_dict(partial, strict=True)


def train_step(model: nn.Module, handle: fq.Handle, seed: int) -> float:
    model.zero_grad()
    loss = model(images(seed)).square().mean() + handle.loss()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    return loss.item()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_complete_and_independent(way):
    model, handle = attached(["blocks.0", "blocks.1"], mode="replace", generator_step="none", concat_parts=2)
    for seed in range(3):
        train_step(model, handle, seed)
    model(images(3))  # a loss with a graph is pending when the copy is taken
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    copied = fq.handle_of(other)
    assert copied is not handle and copied.model is other and copied.loss() == 0 and handle.loss() > 0
    frozen = {key: value.clone() for key, value in other.state_dict().items()}
    losses = [train_step(model, handle, seed) for seed in range(4, 7)]
    assert same(frozen, other.state_dict()), "training the original moved the copy"
    frozen = {key: value.clone() for key, value in model.state_dict().items()}
    assert [train_step(other, copied, seed) for seed in range(4, 7)] == losses
    assert same(frozen, model.state_dict()) and same(model.state_dict(), other.state_dict())
    copied.detach()
    assert model(images(0)) is not None and handle.loss() > 0


@pytest.mark.filterwarnings("ignore:attached layers lie inside:RuntimeWarning")
@settings(max_examples=15, deadline=None)
@given(
    layers=st.lists(st.sampled_from(["blocks.0", "blocks.1", "blocks.1.conv", "act", "linear"]), min_size=1),
    mode=st.sampled_from(MODES),
    steps=st.integers(0, 2),
)
def test_detach_leaves_no_trace(layers, mode, steps):
    torch.manual_seed(0)
    model = net()
    user_hook = model.blocks[1].register_forward_hook(lambda _m, _a, output: None, with_kwargs=False)
    before = hooks_of(model), list(model.state_dict()), str(model), set(vars(model))
    batch = images(0)
    expected = model(batch)
    overrides = {name: {"dim": 1 if name == "linear" else 8} for name in layers}
    handle = fq.attach(model, overrides, codebook_size=4, mode=mode)
    assert hooks_of(model) != before[0]
    for seed in range(steps):
        model(images(seed))
    handle.detach()
    assert (hooks_of(model), list(model.state_dict()), str(model), set(vars(model))) == before
    assert torch.equal(model(batch), expected)
    assert handle.loss() == 0 and handle.stats() == {}
    handle.detach()  # twice does no harm
    user_hook.remove()


def test_container_layers_do_not_run_the_quantizer_as_their_child():
    trunk = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Flatten())
    handle = fq.attach(trunk, "0", codebook_size=4)
    trunk(images(0))
    assert handle.stats()["0"].tokens == 4 * 16 and handle.quantizers["0"].num_updates == 1


def test_quantizer_follows_device_dtype_and_mode_of_its_layer():
    model = net().double().eval()
    handle = fq.attach(model, "blocks.1", codebook_size=4)
    quantizer = handle.quantizers["blocks.1"]
    assert quantizer.codebook.dtype == torch.float64 and not quantizer.training
    model.train()(images(0).double())
    assert handle.loss().dtype == torch.float64
    model.half()
    assert quantizer.codebook.dtype == torch.float64
    model.float()(images(0))
    assert quantizer.codebook.dtype == torch.float32 and handle.loss().dtype == torch.float32


def test_loss_is_float32_under_autocast_and_replaced_features_keep_their_dtype():
    model, handle = attached(mode="replace")
    seen = []
    model.blocks[1].register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(0))
        loss = handle.loss()
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    (output.float().sum() + loss).backward()
    assert model.blocks[1].fq.codebook.dtype == torch.float32


def test_data_parallel_wrapper_is_looked_through():
    model = net()
    handle = fq.attach(nn.DataParallel(model), "blocks.1", codebook_size=4)
    assert handle.model is model and fq.handle_of(nn.DataParallel(model)) is handle


def test_calling_forward_directly_skips_the_root_but_not_the_layers():
    model, handle = attached()
    model.forward(images(0))
    assert handle.loss() > 0 and updates(model) == 1


# Compilation and checkpointed segments


def test_compiled_models_are_refused_with_advice():
    wrapped, itself, part = torch.compile(net(), backend="eager"), net(), net()
    itself.compile(backend="eager")
    part.blocks[1].compile(backend="eager")
    for model, name in ((wrapped, "the model"), (itself, "the model"), (part, r"blocks\.1")):
        before = list(model.state_dict())
        with pytest.raises(TypeError, match=f"{name} is already compiled, .*to the plain model first, then"):
            fq.attach(model, "blocks.0", codebook_size=4)
        assert list(model.state_dict()) == before
        with pytest.raises(TypeError, match=f"{name} is already compiled"):
            fq.suggest(model, images(0))


def test_handle_of_a_model_compiled_after_attaching_is_found():
    model, handle = attached()
    assert fq.handle_of(torch.compile(model, backend="eager")) is handle
    model.compile(backend="eager")
    assert fq.handle_of(model) is handle


# PyTorch 2.11 itself reads .grad of a non-leaf while it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("mode", ["regularize", "replace"])
def test_attached_model_compiles_and_agrees_with_eager(mode):
    model, handle = attached(["blocks.0", "blocks.1"], mode=mode)
    model(images(0))
    handle.loss(), handle.stats()
    other = copy.deepcopy(model)
    copied = fq.handle_of(other)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager")
    for seed, batch in enumerate((2, 3, 4)):
        expected, actual = model(images(seed, batch)), compiled(images(seed, batch))
        loss, copied_loss = handle.loss(), copied.loss()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(copied_loss, loss)
        (expected.mean() + loss).backward()
        (actual.mean() + copied_loss).backward()
    torch._dynamo.reset()
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)
    for key, value in codebook_state(model).items():
        torch.testing.assert_close(codebook_state(other)[key], value)
    assert updates(other) == 4 and copied.stats()["blocks.1"].tokens == 9 * 36


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_segment_updates_once_pays_once_and_has_the_same_gradients(mode):
    def run(reentrant):
        model = net(reentrant=reentrant)
        handle = fq.attach(model, "blocks.1", codebook_size=8, mode=mode, decay=0.1)
        losses = []
        for seed in range(3):
            model.zero_grad()
            loss = handle.loss()
            output = model(images(seed))
            loss = handle.loss()
            (output.square().mean() + loss).backward()
            losses.append(loss.item())
            assert handle.loss() == 0, "the re-computation counted its loss again"
        figures = handle.stats()["blocks.1"]
        return losses, [p.grad for p in model.parameters()], codebook_state(model), figures

    plain, again = run(None), run(False)
    assert plain[0] == again[0] and same(plain[2], again[2]) and plain[3] == again[3]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_recomputation_in_a_generator_step_uses_the_codes_of_that_step():
    def run(reentrant):
        model = net(reentrant=reentrant)
        handle = fq.attach(model, "blocks.1", codebook_size=8, mode="replace", decay=0.1)
        model(images(0)).sum().backward()
        handle.loss()
        fakes = images(1).requires_grad_()
        with handle.generator_step():
            output = model(fakes * 1.0)
        (output.mean() + handle.loss()).backward()
        return fakes.grad

    assert torch.equal(run(None), run(False))


def test_reentrant_checkpointing_is_refused_rather_than_losing_the_loss():
    model = net(reentrant=True)
    handle = fq.attach(model, "blocks.1", codebook_size=8)
    loss = model(images(0)).mean() + handle.loss()
    with pytest.raises(RuntimeError, match=r"use_reentrant=True, which would lose .*use_reentrant=False"):
        loss.backward()


def test_checkpointing_without_a_loss_may_be_reentrant():
    model = net(reentrant=True)
    handle = fq.attach(model, "blocks.1", codebook_size=8, commitment_weight=0.0)
    model(images(0)).mean().backward()
    assert updates(model) == 1 and handle.loss() == 0


def test_no_grad_forwards_between_training_steps_are_no_reason_to_refuse():
    model, handle = attached(model=net(reentrant=False))
    for seed in range(2):
        with torch.no_grad():
            model(images(seed))
        (model(images(seed)).mean() + handle.loss()).backward()
    assert model.blocks[0].conv.weight.grad.abs().max() > 0


# Figures


def test_parts_get_histograms_of_their_own_and_a_divergence():
    model, handle = attached(model=nn.Sequential(nn.Conv2d(1, 1, 1)), layers="0", codebook_size=2,
                             options=CodebookOptions(init="normal", dead_code_threshold=0.0))  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[0].bias.zero_()
    handle.quantizers["0"].codebook.copy_(torch.tensor([[0.0], [10.0]]))
    handle.freeze()
    low, high = torch.zeros(3, 1, 1, 2), torch.full((3, 1, 1, 2), 10.0)
    with handle.part(parts=("fake", "real")):
        model(torch.cat([low, high]))
    report = handle.stats()["0"]
    assert report.histograms == {"fake": [6, 0], "real": [0, 6]} and report.divergence == pytest.approx(1.0)
    assert report.tokens == 12 and report.usage == 1.0 and report.perplexity == pytest.approx(2.0)
    with handle.part("real"):
        model(low)
        with handle.part("fake"):
            model(torch.cat([low, low, low, high]))
        model(high)
    model(high)
    report = handle.stats()["0"]
    assert report.histograms == {"real": [6, 6], "fake": [18, 6], "mixed": [0, 6]}
    half, middle = torch.tensor([0.5, 0.5]), torch.tensor([0.625, 0.375])
    fake = torch.tensor([0.75, 0.25])
    expected = ((half * (half / middle).log2()).sum() + (fake * (fake / middle).log2()).sum()) / 2
    assert report.divergence == pytest.approx(expected.item(), rel=1e-5)


def test_unlabelled_tokens_are_mixed_and_have_no_divergence():
    model, handle = attached()
    model(images(0))
    report = handle.stats()["blocks.1"]
    assert list(report.histograms) == [stats.MIXED] and report.divergence is None
    with handle.part("real"):
        model(images(0))
    assert handle.stats()["blocks.1"].divergence is None


def test_stats_cover_the_window_since_the_last_call():
    model, handle = attached(["blocks.0", "blocks.1"])
    losses = []
    for seed in range(2):
        model(images(seed))
        losses.append(handle._losses[-1].item())
        handle.loss()
    report = handle.stats()["blocks.1"]
    assert report.tokens == 2 * 4 * 36 and report.commitment == pytest.approx(sum(losses) / 2)
    count = model.blocks[1].fq.ema_count
    assert report.ema_perplexity == pytest.approx(stats.perplexity(count).item())
    assert report.dead_codes == int((count < 0.03 * count.mean()).sum())
    empty = handle.stats()["blocks.1"]
    assert empty.tokens == 0 and empty.usage == 0.0 and empty.commitment != empty.commitment
    model(images(3))
    assert handle.stats()["blocks.1"].tokens == 4 * 36


def test_parts_must_divide_the_batch_and_be_named_one_way():
    model, handle = attached()
    message = "a batch of 3 does not hold the parts fake, real in equal shares"
    with handle.part(parts=("fake", "real")), pytest.raises(ValueError, match=message):
        model(images(0, 3))
    assert not model.blocks[1].fq.initialized  # refused before anything was learnt
    for arguments in ({}, {"name": "real", "parts": ("fake", "real")}, {"parts": ()}):
        with pytest.raises(ValueError, match="give one label"), handle.part(**arguments):
            pass


def test_draw_writes_a_picture_of_every_site(tmp_path):
    model, handle = attached(["blocks.0", "blocks.1"])
    with handle.part(parts=("fake", "real")):
        model(images(0))
    path = stats.draw(handle.stats(), tmp_path / "codes.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    stats.draw(handle.stats(), tmp_path / "empty.png")  # a window without tokens is drawn as well
    with pytest.raises(ValueError, match="stats has no sites"):
        stats.draw({}, tmp_path / "none.png")


# Suggestions


def test_suggest_lists_the_maps_of_resnet18_and_leaves_no_trace():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().train()
    model.layer3.eval()
    modes = [module.training for module in model.modules()]
    before = hooks_of(model), {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    rows = fq.suggest(model, images(0, 1, 64), codebook_size=8)
    assert torch.equal(random_state, torch.get_rng_state())
    assert hooks_of(model) == before[0] and same(before[1], model.state_dict())
    assert [module.training for module in model.modules()] == modes
    found = {row.name: row for row in rows}
    assert found["layer2"].output_shape == (1, 128, 8, 8) and found["layer2"].channels == 128
    assert found["layer2"].tokens == 64 and found["layer2"].added_ms > 0 and "fc" not in found
    recommended = [row.name for row in rows if row.recommended]
    assert recommended == ["bn1", "layer1", "layer2", "layer3"]  # one a size, 4x4 the smallest
    lines = str(rows).splitlines()
    assert len(lines) == len(rows) + 1 and any(line.startswith("* layer2 ") for line in lines)
    handle = fq.attach(model, recommended, codebook_size=8)
    assert handle.names == recommended


def test_suggest_needs_feature_maps_and_keeps_the_modes_when_the_model_fails():
    with pytest.raises(ValueError, match="no layer of Sequential puts out features"):
        fq.suggest(nn.Sequential(nn.Linear(3, 3)), torch.zeros(2, 3))
    model = net()
    with pytest.raises(RuntimeError):
        fq.suggest(model, torch.zeros(1, 7, 4, 4))
    assert model.training and all(not hooks["_forward_hooks"] for hooks in hooks_of(model).values())


def test_suggest_skips_what_is_attached_already():
    model, handle = attached()
    model(images(0))
    handle.loss(), handle.stats()
    names = [row.name for row in fq.suggest(model, images(0), codebook_size=4)]
    assert "blocks.1" in names and "blocks.1.fq" not in names
    assert handle.loss() == 0 and handle.stats()["blocks.1"].tokens == 0


# The golden rule: three lines on any model


def test_three_lines_attach_to_resnet18_in_every_mode():
    for mode in MODES:
        torch.manual_seed(0)
        model = torchvision.models.resnet18(num_classes=1)
        handle = fq.attach(model, ["layer1", "layer2"], codebook_size=16, mode=mode)
        for seed in range(2):
            (model(images(seed, 2, 32)).mean() + handle.loss()).backward()
        assert all(isinstance(quantizer, FeatureQuantize) for quantizer in handle.quantizers.values())
        assert all(0 < report.usage <= 1 for report in handle.stats().values())
        assert model.conv1.weight.grad.isfinite().all()


def test_globs_and_suggestions_pass_over_what_computes_a_parametrised_weight():
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Conv2d(3, 8, 3, padding=1)), norm(nn.Conv2d(8, 8, 3, padding=1)))
    names = [row.name for row in fq.suggest(model, torch.randn(2, 3, 8, 8), codebook_size=4)]
    assert names == ["0", "1"]
    assert fq.attach(model, "*", codebook_size=4).names == ["0", "1"]


def test_a_layer_that_the_forward_never_comes_to_is_named_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.used(x)

    model = Branches()
    handle = fq.attach(model, ["used", "idle"], codebook_size=4)
    model(torch.randn(2, 3, 4, 4))
    with pytest.warns(
        RuntimeWarning, match="the model's forward never came to the attached layers idle: attach"
    ):
        handle.loss()
    model(torch.randn(2, 3, 4, 4))
    handle.loss()
