"""Copies from host memory to a GPU that the host does not wait for.

A copy from ordinary memory waits for all work that is queued on the device, so that one in each
micro-batch would leave the device idle at each. From pinned memory it is queued like any other
work; the allocator of pinned memory keeps what a queued copy still reads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself where it is there already."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
