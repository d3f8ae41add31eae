"""Strategy "auto": the cheaper of "chunked" and "tiled".

"chunked" costs 4 GEMM sweeps over the head and "tiled" 2 + 6f, where f is the active fraction. So
"tiled" is cheaper below f = 1/3, and never with sparsity "exact". With another sparsity the last f
that a call of the same kind measured decides. It is read one call later, when it is usually there;
while "chunked" is in use, every 64th call measures again. The choice therefore depends on earlier
calls, and results differ by what `sparsity` skips: name the strategy where runs must be repeatable
to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from rosd_kernels.records import SpanDivergenceStats, SpanInputs, SpanOptions
from rosd_kernels.vocabulary import Vocabulary

BREAK_EVEN = 1 / 3
MEASURE_EVERY = 64  # calls of "chunked"


@dataclass(slots=True)
class Memory:
    """What earlier calls of one kind showed."""

    stats: SpanDivergenceStats | None = None  # of the last call of "tiled"
    since: int = 0  # calls of "chunked" after it


_memories: dict[tuple[object, ...], Memory] = {}


def choose(inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary) -> str:
    """Return the strategy for a call; with shards, the same one on every rank."""
    if options.sparsity.rule == "exact" or options.top_k is not None:
        return "chunked"
    memory = _memories.get(_kind(inputs, options, vocabulary))
    if memory is None or memory.stats is None or memory.since >= MEASURE_EVERY:
        return "tiled"
    return "tiled" if memory.stats.active_frac < BREAK_EVEN else "chunked"


def remember(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, stats: SpanDivergenceStats
) -> None:
    """Record the result of a call whose strategy `choose` returned."""
    if inputs.num_tokens == 0 or options.sparsity.rule == "exact":
        return
    memory = _memories.setdefault(_kind(inputs, options, vocabulary), Memory())
    if stats.strategy == "tiled":
        memory.stats, memory.since = stats, 0
    else:
        memory.since += 1


def _kind(inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary) -> tuple[object, ...]:
    sparsity = options.sparsity
    widths = inputs.student_head.shape[1], inputs.teacher_head.shape[1]
    order = id(sparsity.order) if sparsity.order is not None else None
    return vocabulary.size, vocabulary.num_shards, widths, sparsity.rule, sparsity.bound, order
