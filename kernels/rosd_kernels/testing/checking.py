"""Shared by the acceptance of `span_divergence` and `span_logprob`: results, bounds, timing."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.records import SpanStats
from rosd_kernels.sparsity import Sparsity

# (loss, gradients relative to their largest element). With bfloat16, G and the result are rounded.
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-4, 1e-2)}
SLACK = 1e-6  # float32's rounding of log-probabilities, for values near zero


class Shape(NamedTuple):
    """The sizes of a problem."""

    N: int  # tokens
    V: int  # vocabulary
    H: int  # width


EPS = 2.0**-12  # of `entry`: the resolution of a bfloat16 gradient
SHAPES = (
    Shape(300, 5003, 250),
    Shape(257, 8192, 512),
)  # one that no block divides, one that all blocks divide
SMALL = (Shape(1, 7, 3), Shape(0, 300, 64))
SIZE = Shape(4096, 151936, 2560)  # the head of Qwen3-4B


class Check(NamedTuple):
    """One line of the report."""

    name: str
    ok: bool
    text: str


class Timing(NamedTuple):
    """Time and memory of one candidate's forward and backward."""

    name: str
    median_s: float | None  # None: it did not run
    peak_bytes: int | None  # beyond inputs and gradients; None: not measured on a CPU
    text: str


def sparsity_check(
    name: str, exact: Tensor, sparse: Tensor, stats: SpanStats, rule: Sparsity
) -> Check:
    """Whether a sparse gradient [N, H] lies within its reported bounds, and drops something."""
    error = float((sparse - exact).abs().sum(1).max())
    bound = stats.grad_error_bound + 1e-5 * float(exact.abs().sum(1).max())
    fits = rule.rule != "mass" or stats.dropped_mass_max <= rule.bound * (1 + 1e-4)
    ok = error <= bound and fits and 0 < stats.active_frac < 1
    text = (
        f"error {error:.1e}, bound {bound:.1e}, dropped {stats.dropped_mass_max:.1e}, "
        f"active {stats.active_frac:.2f}"
    )
    return Check(name, ok, text)


def measure(name: str, step: Callable[[], Any], device: torch.device, repeats: int) -> Timing:
    """Median time and peak memory of a step; the reason, where a candidate cannot run."""
    is_cuda = device.type == "cuda"
    seconds: list[float] = []
    peak, text = None, ""
    try:
        step()
        if is_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        for _ in range(repeats):
            start = time.perf_counter()
            text = step() or ""
            if is_cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        if is_cuda:  # the first step's gradients already exist and are part of `before`
            peak = max(0, torch.cuda.max_memory_allocated(device) - before)
    except torch.OutOfMemoryError:
        return Timing(name, None, None, "out of memory")
    except ImportError as error:
        return Timing(name, None, None, f"not installed: {error.name}")
    return Timing(name, statistics.median(seconds), peak, text)


def error_ratio(got: Tensor, want: Tensor, tolerance: float, slack: float) -> float:
    """Largest error over the allowed one, which is `tolerance * max |want| + slack`."""
    if want.numel() == 0:
        return 0.0
    got, want = got.detach(), want.detach()
    allowed = tolerance * float(want.abs().max()) + slack
    worst = float((got.double() - want).abs().max())
    return worst / allowed if worst == worst else float("inf")  # NaN compares with nothing


@contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 GEMMs in float32, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that a read before the first write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that have no deterministic kernel
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            memory.fill_uninitialized_memory = filled
