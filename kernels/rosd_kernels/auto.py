"""Strategy "auto": "chunked", or "tiled" where that is cheaper or memory is short.

Costs in GEMM sweeps over the head, with f the active fraction of tiles and g that of entries, which
is smaller:

    function           chunked, all entries   chunked with a sparsity   tiled
    span_divergence    4                      2 + 2g                    2 + 6f
    span_logprob       3                      1 + 2g                    1 + 3f

Without Triton "chunked" is never dearer, and the choice depends on the arguments alone: "tiled"
only where the workspace does not hold MIN_ROWS rows of logits, so that the GEMMs would be thin.

In Triton's kernels "chunked" gathers rows of the head, and a sweep does not take the same time in
both strategies. So the device times a call of each, and the faster one per token is used; until
both were timed, f decides as if sweeps were equal and "chunked" computed all entries, below 1/3 and
2/3. Every 64th call takes the other one. Times and f are copied to the CPU behind the call and read
by a later call that finds them there: no call waits for the device, and while a CUDA graph is
captured nothing is measured. The choice then depends on earlier calls, and results differ by what
`sparsity` skips: name the strategy where runs must be repeatable to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.backends import uses_triton
from rosd_kernels.records import SpanStats
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import MIB

BREAK_EVEN = {"span_divergence": 1 / 3, "span_logprob": 2 / 3}  # f, where sweeps take equally long
SIDES = {"span_divergence": 2, "span_logprob": 1}  # logits per token and entry
MEASURE_EVERY = 64  # calls
MIN_ROWS = 16  # a GEMM of fewer rows reads the head more often than its products are worth


class Pending(NamedTuple):
    """A measurement that the device is still to make."""

    is_ready: Callable[[], bool]
    store: Callable[[], None]


@dataclass(slots=True)
class Memory:
    """What earlier calls of one kind showed."""

    active_frac: float | None = None  # of the last measured call of "tiled"
    seconds: dict[str, float] = field(default_factory=dict)  # per token, by strategy
    pending: list[Pending] = field(default_factory=list)
    calls: int = 0  # since one of the strategy that is not in use


class Kind(NamedTuple):
    """What calls have in common whose active fractions are similar."""

    function: str
    is_timed: bool  # shards must choose the same, and would measure different times
    sizes: tuple[object, ...]


_memories: dict[Kind, Memory] = {}


def choose(
    function: str,
    sparsity: Sparsity,
    hidden: Tensor,  # [N, H]
    heads: tuple[Tensor, ...],
    dtype: torch.dtype,  # of the logits
    vocabulary: Vocabulary,
    workspace_mib: float,
) -> tuple[str, Kind | None]:
    """The strategy for a call, with shards the same one on every rank, and what to measure it for.

    The kind is None where the choice depends on the arguments alone.
    """
    if sparsity.rule == "exact":
        return "chunked", None
    if not uses_triton(hidden, dtype):
        row_bytes = SIDES[function] * vocabulary.largest * dtype.itemsize
        fitting = int(workspace_mib * MIB) // row_bytes
        return "chunked" if fitting >= min(MIN_ROWS, hidden.shape[0]) else "tiled", None
    widths = tuple(head.shape[1] for head in heads)
    order = id(sparsity.order) if sparsity.order is not None else None
    sizes = vocabulary.size, vocabulary.num_shards, widths, sparsity.rule, sparsity.bound, order
    kind = Kind(function, hidden.is_cuda and not vocabulary.is_sharded, sizes)
    return _measured_choice(kind), kind


def _measured_choice(kind: Kind) -> str:
    memory = _memories.setdefault(kind, Memory())
    if not _is_capturing():  # which must not query events
        waiting = []
        for pending in memory.pending:
            if pending.is_ready():
                pending.store()
            else:
                waiting.append(pending)
        memory.pending = waiting
    if memory.active_frac is None:
        return "tiled"
    if len(memory.seconds) == 2:
        best = min(memory.seconds, key=lambda name: memory.seconds[name])
    else:
        best = "tiled" if memory.active_frac < BREAK_EVEN[kind.function] else "chunked"
    other = "tiled" if best == "chunked" else "chunked"
    # Without times, "chunked" has nothing to show.
    if memory.calls >= MEASURE_EVERY and (kind.is_timed or other == "tiled"):
        memory.calls = 0
        return other
    memory.calls += 1
    return best


def start_of(kind: Kind | None) -> Any:
    """What `remember` wants of a call that begins."""
    if kind is None or not kind.is_timed or _is_capturing():
        return None
    start = torch.cuda.Event(enable_timing=True)
    start.record()
    return start


def remember(kind: Kind | None, stats: SpanStats, num_tokens: int, start: Any) -> None:
    """Have the device report on a call that ends; `start`: what `start_of` returned."""
    if kind is None or num_tokens == 0:
        return
    memory, name = _memories[kind], stats.strategy
    measured = stats.measured if name == "tiled" else None  # f is of tiles, not of entries
    if measured is not None and not measured.is_cuda:
        memory.active_frac = float(measured[0])
    if start is None:
        if measured is not None and measured.is_cuda:
            _report(memory, measured)
        return
    stop = torch.cuda.Event(enable_timing=True)
    stop.record()

    def store() -> None:
        memory.seconds[name] = start.elapsed_time(stop) / 1e3 / num_tokens

    memory.pending.append(Pending(stop.query, store))
    if measured is not None:
        _report(memory, measured)


def _report(memory: Memory, measured: Tensor) -> None:
    """Copy the active fraction to the CPU behind the work that is queued."""
    if _is_capturing():
        return
    copy = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True)
    copy.copy_(measured, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def store() -> None:
        memory.active_frac = float(copy[0])

    memory.pending.append(Pending(done.query, store))


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
