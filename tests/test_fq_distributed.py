import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fq
from fq import CodebookOptions, FeatureQuantize

STEPS = 15
BATCH = 12
SPLITS = {"equal": (6, 6), "unequal": (9, 3)}
REVIVING = {"dead_code_threshold": 0.5, "dead_code_grace": 2}


def batches(*shape: int) -> list[torch.Tensor]:
    """A stream of float64 batches whose clusters wander off, so that codes die and are replaced."""
    draw = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, 5, generator=draw, dtype=torch.float64)
    found = []
    for _ in range(STEPS):
        centres[torch.randint(10, (3,), generator=draw)] += 8.0
        kinds = torch.randint(10, (BATCH, *shape), generator=draw)
        noise = torch.randn(BATCH, *shape, 5, generator=draw, dtype=torch.float64)
        found.append((centres[kinds] + 0.3 * noise).movedim(-1, 1))
    return found


def share(batch: torch.Tensor, rank: int | None, split: str) -> torch.Tensor:
    return batch if rank is None else batch.split(SPLITS[split])[rank]


def state(layer: FeatureQuantize) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def run_bare(rank: int | None, split: str, init: str, **options: Any) -> dict[str, Any]:
    """States, indices and losses of a bare layer over the stream; ``rank=None`` is one process."""
    layer = FeatureQuantize(5, 24, options=CodebookOptions(init=init, **REVIVING, **options)).double()
    result: dict[str, Any] = {"states": [], "indices": [], "losses": []}
    for batch in batches(2, 2):
        _, indices, loss = layer(share(batch, rank, split))
        result["states"].append(state(layer))
        result["indices"].append(indices)
        result["losses"].append(loss.detach())
    return result


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: what FQ has seen is overwritten before its statistics have come back.
        return self.head(self.body(self.stem(x).relu_()).relu_().mean((2, 3)))


def run_attached(rank: int | None, mode: str) -> dict[str, Any]:
    """Train a discriminator, wrapped in DDP when there are ranks, on hinge and FQ losses."""
    torch.manual_seed(1)
    model = Discriminator().double()

    def wrapped() -> nn.Module:
        return model if rank is None else nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    # FQ is attached before the model is wrapped in one mode and afterwards in the other.
    net = wrapped() if mode == "replace" else model
    options = CodebookOptions(**REVIVING)
    handle = fq.attach(net, ["stem", "body"], codebook_size=24, mode=mode, options=options)
    net = net if mode == "replace" else wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches(3, 3):
        optimizer.zero_grad()
        loss = (1 - net(share(batch, rank, "equal"))).relu().mean() + handle.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"state": model.state_dict(), "losses": losses}


def run_counting(rank: int) -> dict[str, Any]:
    """Collectives of one forward of a discriminator with two sites, and when each site's update lands."""
    model = Discriminator().double()
    options = CodebookOptions(init="normal", dead_code_threshold=0.0)
    handle = fq.attach(model, ["stem", "body"], codebook_size=24, options=options)
    quantizers, calls, seen = handle.quantizers, [], {}
    all_reduce = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((tuple(tensor.shape), kwargs.get("async_op", False)))
        return all_reduce(tensor, *args, **kwargs)

    def look(*_: Any) -> None:
        seen["in the middle"] = quantizers["stem"].num_updates.item()

    model.body.register_forward_pre_hook(look)
    dist.all_reduce = counting
    model(share(batches(3, 3)[0], rank, "equal"))
    dist.all_reduce = all_reduce
    seen["after"] = quantizers["stem"].num_updates.item()
    return {"calls": calls, **seen}


def run_not_finite(rank: int) -> dict[str, Any]:
    layer = FeatureQuantize(5, 8).double()
    stream = batches(2)
    layer(stream[0])
    before, messages = state(layer), []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(stream[1] * torch.nan if rank == 1 else stream[1])
        messages.append([str(warning.message) for warning in caught])
    skipped = state(layer)
    layer(stream[2])
    return {"before": before, "skipped": skipped, "after": state(layer), "messages": messages}


def run_empty(rank: int | None, codebook_size: int) -> dict[str, Any]:
    """Rank 1 never has a token, from the very first batch on; None is one process with rank 0's."""
    options = CodebookOptions(dead_code_threshold=0.5, dead_code_grace=0)
    layer = FeatureQuantize(5, codebook_size, mode="replace", options=options).double()
    for batch in batches(2, 2)[:6]:
        features = (batch[:0] if rank == 1 else batch).clone().requires_grad_()
        output, indices, loss = layer(features)
        (output.sum() + loss).backward()
    none = {}
    if rank is not None:  # not a single token anywhere
        before = state(layer)
        none = {"before": before, "loss": layer(batch[:0]).loss, "after": state(layer)}
    return {"state": state(layer), "shape": indices.shape, "output": output.shape, "loss": loss.detach(),
            "gradient": features.grad, "none": none}  # fmt: skip


def run_deferred(rank: int | None, threshold: float) -> dict[str, torch.Tensor]:
    """Rank 0 sees two shares a step and rank 1 one, or in every third step none at all."""
    options = CodebookOptions(deferred_update=True, dead_code_threshold=threshold, dead_code_grace=0)
    layer = FeatureQuantize(5, 24, options=options).double()
    for step, batch in enumerate(batches(2, 2)):
        parts = batch.split(4)
        if step == 0:
            layer(batch if rank is None else share(batch, rank, "equal"))  # all must take part in the first
        elif rank is None:
            layer(torch.cat(parts[: 2 if step % 3 == 1 else 3]))
        else:
            for part in parts[:2] if rank == 0 else parts[2:] if step % 3 != 1 else ():
                layer(part)
        layer.apply_update()
    return state(layer)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=20))  # fmt: skip
    results: dict[str, Any] = {
        "apart": run_bare(rank, "equal", "data", sync=False),
        "not finite": run_not_finite(rank),
        "counting": run_counting(rank),
        "deferred": run_deferred(rank, 0.0),
        "deferred, reviving": run_deferred(rank, 0.5),
    }
    for init in ("kmeans", "data", "normal"):
        for split in SPLITS:
            results[f"bare {init} {split}"] = run_bare(rank, split, init)
    for mode in ("regularize", "replace"):
        results[f"attached {mode}"] = run_attached(rank, mode)
    for codebook_size in (24, 300):
        results[f"empty {codebook_size}"] = run_empty(rank, codebook_size)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What two real processes got, in rank order."""
    folder = tmp_path_factory.mktemp("group")
    context = torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2, join=False)
    while not context.join(timeout=60, grace_period=5):
        pass
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-12, atol=1e-12)


def test_the_stream_kills_codes_and_has_them_replaced():
    replaced, states = [], run_bare(None, "equal", "kmeans")["states"]
    for old, new, batch in zip(states, states[1:], batches(2, 2)[1:], strict=False):
        tokens = batch.movedim(1, -1).reshape(-1, 5)
        is_token = (new["codebook"][:, None] == tokens).all(2).any(1)
        moved = (new["codebook"] != old["codebook"]).any(1)
        replaced.append(int((is_token & moved).sum()))
    assert replaced[0] == 0 and sum(replaced) > 10


@pytest.mark.parametrize("init", ["kmeans", "data", "normal"])
@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_equal_one_process_with_the_whole_batch(ranks, split, init):
    whole = run_bare(None, split, init)
    parts = [result[f"bare {init} {split}"] for result in ranks]
    weights = [count / BATCH for count in SPLITS[split]]
    for step in range(STEPS):
        first, second = (part["states"][step] for part in parts)
        assert_identical(first, second)
        assert_close(first, whole["states"][step])
        assert torch.equal(torch.cat([part["indices"][step] for part in parts]), whole["indices"][step])
        loss = sum(weight * part["losses"][step] for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(loss, whole["losses"][step], rtol=1e-12, atol=0)


def test_without_sync_the_ranks_drift_apart(ranks):
    first, second = (result["apart"]["states"][-1]["codebook"] for result in ranks)
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["regularize", "replace"])
def test_an_attached_discriminator_trains_on_two_ranks_as_on_one(ranks, mode):
    first, second = (result[f"attached {mode}"] for result in ranks)
    assert_identical(first["state"], second["state"])
    whole = run_attached(None, mode)
    assert_close(first["state"], whole["state"])
    assert whole["state"]["stem.fq.num_updates"] == whole["state"]["body.fq.num_updates"] == STEPS
    for one, two, both in zip(first["losses"], second["losses"], whole["losses"], strict=True):
        torch.testing.assert_close((one + two) / 2, both, rtol=1e-12, atol=0)


def test_a_site_sends_one_tensor_a_step_and_does_not_wait_for_it(ranks):
    for result in (rank["counting"] for rank in ranks):
        assert result["calls"] == [((24, 7), True), ((24, 7), True)]  # sums and counts of either site
        assert (result["in the middle"], result["after"]) == (0, 1)


def test_one_rank_with_nan_makes_all_skip_and_warn_once(ranks):
    for result in (rank["not finite"] for rank in ranks):
        assert_identical(result["before"], result["skipped"])
        assert len(result["messages"][0]) == 1 and "on this or another rank" in result["messages"][0][0]
        assert result["messages"][1] == []
        assert result["after"]["num_updates"] == 2 and result["after"]["codebook"].isfinite().all()
    assert_identical(*(rank["not finite"]["after"] for rank in ranks))


@pytest.mark.parametrize("codebook_size", [24, 300])
def test_an_empty_rank_contributes_zeros_and_follows(ranks, codebook_size):
    full, empty = (result[f"empty {codebook_size}"] for result in ranks)
    assert_identical(full["state"], empty["state"])
    assert_close(full["state"], run_empty(None, codebook_size)["state"])
    assert empty["loss"] == 0 and full["loss"] > 0
    assert empty["shape"] == (0, 2, 2) and empty["output"] == empty["gradient"].shape == (0, 5, 2, 2)
    assert full["gradient"].isfinite().all()


def test_no_token_on_any_rank_is_no_update(ranks):
    for result in ranks:
        none = result["empty 24"]["none"]
        assert none["loss"] == 0
        assert_identical(none["before"], none["after"])


def test_deferred_updates_of_a_group_sum_all_forwards_of_all_ranks(ranks):
    assert_identical(ranks[0]["deferred"], ranks[1]["deferred"])
    assert_close(ranks[0]["deferred"], run_deferred(None, 0.0))


def test_deferred_replacement_does_not_hang_when_a_rank_had_no_forward(ranks):
    first, second = (result["deferred, reviving"] for result in ranks)
    assert_identical(first, second)
    assert first["num_updates"] == STEPS
    assert (first["codebook"] - ranks[0]["deferred"]["codebook"]).abs().max() > 1
