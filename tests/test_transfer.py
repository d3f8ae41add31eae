"""Copies to a GPU, with a device that records how it was asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rosd_fast.utils.transfer import on_device


def test_a_copy_to_a_gpu_is_queued_from_pinned_memory(monkeypatch):
    calls: list[tuple] = []
    pinned = torch.ones(3)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned)

    def to(self, *args, **kwargs):
        calls.append((self, args, kwargs))
        return self

    monkeypatch.setattr(Tensor, "to", to)
    gpu = torch.device("cuda", 0)
    assert on_device(torch.zeros(3), gpu) is pinned
    assert calls == [(pinned, (gpu,), {"non_blocking": True})]


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3)])
def test_on_a_cpu_nothing_is_copied(shape):
    tensor = torch.zeros(shape)
    assert on_device(tensor, torch.device("cpu")) is tensor


def test_what_is_on_the_device_already_stays(monkeypatch):
    def pin_memory(self):
        raise AssertionError("a tensor of a device cannot be pinned")

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    tensor = torch.zeros(3, device="meta")
    assert on_device(tensor, torch.device("meta")) is tensor
