import pytest
import torch

from fq import FQOutput
from fq.controls import FiniteScalarQuantize, SimVQ


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("levels", [(2,), (3, 2), (8, 5, 5, 5), (7, 4)])
def test_fsq_reaches_every_level_of_every_channel_and_no_other(levels):
    layer = FiniteScalarQuantize(len(levels), levels)
    with torch.no_grad():
        for map_ in (layer.reduce, layer.expand):
            map_.weight.copy_(torch.eye(len(levels)))
            map_.bias.zero_()
    x = 3 * normal(4000, len(levels))
    done = layer(x)
    assert isinstance(done, FQOutput) and done.loss == 0
    for channel, number in enumerate(levels):
        values = done.features[:, channel].unique()
        expected = (torch.arange(number) - number // 2) / (number // 2)
        torch.testing.assert_close(values, expected)
    # The index names the values, one to one.
    table = {}
    for row, index in zip(done.features.tolist(), done.indices.tolist(), strict=True):
        assert table.setdefault(index, row) == row
    assert len({tuple(row) for row in table.values()}) == len(table)
    assert 0 <= min(table) and max(table) < layer.codebook_size
    # Monotone: larger features never get smaller levels.
    first = done.features[x[:, 0].argsort(), 0]
    assert (first.diff() >= 0).all()


def test_fsq_passes_gradients_through_the_rounding():
    layer = FiniteScalarQuantize(6, (5, 5))
    x = normal(3, 6, 4, 4).requires_grad_()
    done = layer(x)
    assert done.features.shape == x.shape and done.indices.shape == (3, 4, 4)
    done.features.square().sum().backward()
    assert x.grad.abs().sum() > 0 and layer.reduce.weight.grad.abs().sum() > 0


def test_simvq_finds_the_nearest_mapped_code_and_trains_its_map():
    layer, x = SimVQ(6, 16), normal(8, 6, 4, 4)
    done = layer(x)
    tokens, codes = x.movedim(1, -1).reshape(-1, 6), layer.map(layer.frozen)
    assert torch.equal(done.indices.flatten(), torch.cdist(tokens.double(), codes.double()).argmin(1))
    torch.testing.assert_close(done.features, codes[done.indices].movedim(-1, 1))
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    frozen, first = layer.frozen.clone(), done.loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = layer(x).loss
        loss.backward()
        optimizer.step()
    assert torch.equal(layer.frozen, frozen) and loss.item() < 0.8 * first


def test_simvq_pulls_features_to_their_codes_and_passes_gradients_through():
    layer = SimVQ(4, 8, commitment_weight=0.5).double()
    x = normal(3, 4, 5, dtype=torch.float64).requires_grad_()
    done = layer(x)
    (pull,) = torch.autograd.grad(done.loss, x, retain_graph=True)
    torch.testing.assert_close(pull, 0.5 * 2 / x.numel() * (x - done.features).detach())
    (passed,) = torch.autograd.grad(done.features.sum(), x)
    assert torch.equal(passed, torch.ones_like(x))


@pytest.mark.parametrize("build", [lambda: FiniteScalarQuantize(4), lambda: SimVQ(4, 8)])
def test_controls_refuse_other_widths(build):
    with pytest.raises(ValueError, match=r"features of shape \[2, 5, 3, 3\] do not have 4 channels"):
        build()(normal(2, 5, 3, 3))


def test_controls_refuse_settings_out_of_range():
    with pytest.raises(ValueError, match="levels is 1: give an integer of at least 2"):
        FiniteScalarQuantize(4, (1, 5))
    with pytest.raises(ValueError, match="at least one number of levels"):
        FiniteScalarQuantize(4, ())
    with pytest.raises(ValueError, match="commitment_weight is -1"):
        SimVQ(4, 8, commitment_weight=-1)
