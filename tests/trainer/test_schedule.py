"""The learning rate as a function of the number of updates, against torch's schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from rosd_fast.config import Config, OptimConfig
from rosd_fast.trainer.schedule import describe_change, learning_rate, num_updates, warmup_updates

LR = 3e-4


def options(**changes: Any) -> OptimConfig:
    return OptimConfig.model_validate({"lr": LR, "warmup_steps": 0} | changes)


def curve(horizon: int, **changes: Any) -> list[float]:
    return [learning_rate(k, horizon, options(**changes)) for k in range(horizon)]


def torch_curve(count: int, make: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=LR)
    scheduler: LRScheduler = make(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def warm_up(optimizer: Any, updates: int) -> LRScheduler:
    """The first of `updates` has 1 / updates of the rate, and the last one all of it."""
    return LinearLR(optimizer, 1 / updates, 1.0, total_iters=updates - 1)


@pytest.mark.parametrize("warmup", [0, 2, 7])
@pytest.mark.parametrize("low", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_curves_are_those_of_torch(schedule: str, low: float, warmup: int) -> None:
    horizon = 30

    def fall(optimizer: Any) -> LRScheduler:
        length = horizon - warmup
        if schedule == "linear":
            return LinearLR(optimizer, 1.0, low, total_iters=length)
        return CosineAnnealingLR(optimizer, length, eta_min=low * LR)

    def make(optimizer: Any) -> LRScheduler:
        if not warmup:
            return fall(optimizer)
        return SequentialLR(optimizer, [warm_up(optimizer, warmup), fall(optimizer)], [warmup])

    ours = curve(horizon, schedule=schedule, min_lr_frac=low, warmup_steps=warmup)
    assert ours == pytest.approx(torch_curve(horizon, make), rel=1e-9)
    after = learning_rate(horizon, horizon, options(schedule=schedule, min_lr_frac=low))
    assert after == pytest.approx(low * LR, abs=1e-18)


def test_constant_after_warm_up() -> None:
    def make(optimizer: Any) -> LRScheduler:
        return warm_up(optimizer, 4)

    assert curve(12, warmup_steps=4) == pytest.approx(torch_curve(12, make))
    assert curve(3) == [LR] * 3


def test_wsd_is_stable_and_then_falls() -> None:
    rates = curve(40, schedule="wsd", warmup_steps=5, decay_frac=0.25, min_lr_frac=0.2)
    assert rates[:5] == pytest.approx([LR * k / 5 for k in range(1, 6)])
    assert rates[5:31] == [LR] * 26
    assert rates[30:] == pytest.approx([LR * (1 - 0.8 * k / 10) for k in range(10)])
    assert curve(40, schedule="wsd", decay_frac=1.0) == curve(40, schedule="linear")
    assert curve(10, schedule="wsd", warmup_steps=6, decay_frac=0.9)[5:7] == [LR, LR]


def test_a_share_of_warm_up_follows_the_length_of_the_run() -> None:
    share = {"warmup_steps": None, "warmup_frac": 0.1}
    assert warmup_updates(200, options(**share)) == 20
    assert curve(200, **share) == curve(200, warmup_steps=20)
    assert curve(4, **share) == [LR] * 4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_a_rate_never_rises_after_warm_up_and_stays_after_the_end(schedule: str) -> None:
    for horizon in (1, 2, 3, 17):
        for warmup in (0, 1, 5, 40):
            picked = options(schedule=schedule, warmup_steps=warmup, min_lr_frac=0.1)
            rates = [learning_rate(k, horizon, picked) for k in range(60)]
            assert all(0 < rate <= LR for rate in rates)
            assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
            assert len(set(rates[max(warmup, horizon) :])) == 1


def test_a_longer_run_says_what_it_changes() -> None:
    assert describe_change(10, 20, 40, options()) is None
    assert describe_change(10, 20, 20, options(schedule="cosine")) is None
    line = describe_change(10, 20, 40, options(schedule="linear"))
    assert line is not None and "40 updates, not 20: it is 0.000225 now" in line
    assert "would have been 0.00015" in line
    ended = describe_change(20, 20, 40, options(schedule="cosine"))
    assert ended is not None and "would have been 0" in ended
    assert describe_change(2, 20, 40, options(schedule="wsd")) is not None  # its fall comes later
    share = options(warmup_steps=None, warmup_frac=0.5)
    assert describe_change(8, 20, 40, share) is not None
    assert describe_change(20, 20, 40, share) is None


def test_the_horizon_is_the_number_of_updates() -> None:
    assert num_updates(Config(steps=7)) == 7
    config = Config.model_validate({"steps": 7, "optim": {"updates_per_step": 3}})
    assert num_updates(config) == 21
