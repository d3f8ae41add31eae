"""Times of calls on a device: medians of repeats after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

LEAST = 3  # repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """median_s: median seconds of a call. spread: (slowest - fastest) / median."""

    median_s: float
    spread: float
    repeats: int


def timed(
    call: Callable[[], Any], device: torch.device, *, limit_s: float = 2.0, most: int = 50
) -> Timed:
    """Time a call until `limit_s` is over, 3 to `most` times, after one that is not counted.

    On a GPU each call is timed by events of its stream.
    """
    call()
    synchronize(device)
    end = time.perf_counter() + limit_s
    seconds: list[float] = []
    while len(seconds) < LEAST or (len(seconds) < most and time.perf_counter() < end):
        seconds.append(_once(call, device))
    median = statistics.median(seconds)
    return Timed(
        median_s=median, spread=(max(seconds) - min(seconds)) / median, repeats=len(seconds)
    )


def _once(call: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
