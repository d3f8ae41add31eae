"""Strategy "auto": the cheaper of "chunked" and "tiled".

Both cost GEMM sweeps over the head, "tiled" in proportion to the active fraction f:

    function           chunked   tiled    tiled is cheaper below
    span_divergence    4         2 + 6f   f = 1/3
    span_logprob       3         1 + 3f   f = 2/3

With sparsity "exact" it never is. With another sparsity the last f that a call of the same kind
measured decides. It is read one call later, when it is usually there; while "chunked" is in use,
every 64th call measures again. The choice therefore depends on earlier calls, and results differ by
what `sparsity` skips: name the strategy where runs must be repeatable to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rosd_kernels.records import SpanStats
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary

BREAK_EVEN = {"span_divergence": 1 / 3, "span_logprob": 2 / 3}
MEASURE_EVERY = 64  # calls of "chunked"


@dataclass(slots=True)
class Memory:
    """What earlier calls of one kind showed."""

    stats: SpanStats | None = None  # of the last call of "tiled"
    since: int = 0  # calls of "chunked" after it


Kind = tuple[object, ...]  # the name of the function first
_memories: dict[Kind, Memory] = {}


def kind_of(
    function: str, sparsity: Sparsity, heads: tuple[Tensor, ...], vocabulary: Vocabulary
) -> Kind | None:
    """What calls have in common whose active fractions are similar; None: all is computed."""
    if sparsity.rule == "exact":
        return None
    widths = tuple(head.shape[1] for head in heads)
    order = id(sparsity.order) if sparsity.order is not None else None
    sizes = vocabulary.size, vocabulary.num_shards
    return function, *sizes, widths, sparsity.rule, sparsity.bound, order


def choose(kind: Kind | None) -> str:
    """Return the strategy for a call; with shards, the same one on every rank."""
    if kind is None:
        return "chunked"
    memory = _memories.get(kind)
    if memory is None or memory.stats is None or memory.since >= MEASURE_EVERY:
        return "tiled"
    return "tiled" if memory.stats.active_frac < BREAK_EVEN[str(kind[0])] else "chunked"


def remember(kind: Kind | None, stats: SpanStats, num_tokens: int) -> None:
    """Record the result of a call whose strategy `choose` returned."""
    if num_tokens == 0 or kind is None:
        return
    memory = _memories.setdefault(kind, Memory())
    if stats.strategy == "tiled":
        memory.stats, memory.since = stats, 0
    else:
        memory.since += 1
