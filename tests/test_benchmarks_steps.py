"""Timing of whole training steps by turns."""

import pytest

from backbones import train_setup
from benchmarks import steps

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("name", steps.BACKBONES)
def test_every_backbone_takes_turns_with_its_quantised_twins(name):
    finish = train_setup.Reports.finish
    result = steps.on_gpu(name, steps=2, small=True)
    assert train_setup.Reports.finish is finish  # put back
    assert result["plain_ms"] > 0 and set(result["ratio"]) == {"regularize", "replace"}
    assert all(0.2 < ratio < 20 for ratio in result["ratio"].values())
    rates = result["pictures_per_second"]
    assert rates["none"] == pytest.approx(result["pictures_per_step"] / result["plain_ms"] * 1e3)
    assert rates["replace"] == pytest.approx(rates["none"] / result["ratio"]["replace"])


def test_steps_alternate_and_an_error_ends_all(monkeypatch):
    from pathlib import Path

    order: list[int] = []
    turns = steps._Turns([None, None, None])  # type: ignore[list-item]
    monkeypatch.setattr(steps.train, "train", lambda config: [order_step(turns, order) for _ in range(3)])
    times = turns.run()
    assert order == [0, 1, 2] * 3 and [len(spent) for spent in times] == [3, 3, 3]

    def fails(config: object) -> Path:
        raise ValueError("no pictures")

    monkeypatch.setattr(steps.train, "train", fails)
    with pytest.raises(ValueError, match="no pictures"):
        steps._Turns([None, None]).run()  # type: ignore[list-item]


def order_step(turns: steps._Turns, order: list[int]) -> None:
    import threading

    import torch

    order.append(turns._numbers[threading.get_ident()])
    turns._step_done(torch.zeros(()))
