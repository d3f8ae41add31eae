"""The bounded memory of strategy "chunked", and the GEMMs that go through it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rosd_kernels.records import SpanInputs, SpanOptions

MIB = 1 << 20
# Elementwise work on a CPU goes by blocks of this many elements (4 MiB in float32) and not by whole
# chunks, so that its passes find the rows in the cache. Much smaller blocks would only add thread
# synchronization.
CPU_BLOCK_ELEMENTS = 1 << 20
CAST_BYTES = 16 * MIB  # a converted tile of a head: long enough for a good GEMM


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspacePlan:
    """How many rows and which buffers fit the bound. Sizes are elements of `dtype`."""

    dtype: torch.dtype
    vocab_size: int
    rows: int  # rows of a chunk: both logits of it are held, [2 * rows, V]
    block: int  # rows of a block: it has num_scratch buffers [block, V]
    num_scratch: int
    cast_rows: int  # rows of a head converted at a time; 0: no head has to be converted
    cast_width: int
    num_bytes: int  # all of it

    @classmethod
    def of(cls, inputs: SpanInputs, options: SpanOptions) -> WorkspacePlan:
        """Fit `options.workspace_mib`, with at least one row."""
        dtype, vocab_size = inputs.compute_dtype, inputs.vocab_size
        budget = int(options.workspace_mib * MIB)
        cast_width = max(
            (
                head.shape[1]
                for head in (inputs.student_head, inputs.teacher_head)
                if not is_gemm_ready(head, dtype)
            ),
            default=0,
        )
        cast_rows = 0
        if cast_width:
            cast_budget = min(CAST_BYTES, budget // 4)
            cast_rows = min(max(1, cast_budget // (cast_width * dtype.itemsize)), vocab_size)
        cast_bytes = cast_rows * cast_width * dtype.itemsize
        # Three buffers for every divergence, tanh^2 of the soft cap, the mask of clipped entries.
        num_scratch = 3 + (options.softcap is not None)
        num_buffers = num_scratch + (options.entry_clip is not None)
        row_bytes = vocab_size * dtype.itemsize
        if options.top_k is not None:  # the ids and about ten buffers of k buckets
            num_buffers += -(-options.top_k * (8 + 10 * dtype.itemsize) // row_bytes)

        num_row_buffers = max(0, budget - cast_bytes) // row_bytes
        block = max(1, num_row_buffers // (2 + num_buffers))
        if inputs.student_hidden.device.type == "cpu":
            block = min(block, max(1, CPU_BLOCK_ELEMENTS // vocab_size))
        rows = max(1, (num_row_buffers - num_buffers * block) // 2)
        num_chunks = max(1, -(-inputs.num_tokens // rows))
        rows = -(-inputs.num_tokens // num_chunks)  # chunks of one size: no thin GEMM at the end
        block = min(block, rows)
        return cls(
            dtype=dtype,
            vocab_size=vocab_size,
            rows=rows,
            block=block,
            num_scratch=num_scratch,
            cast_rows=cast_rows,
            cast_width=cast_width,
            num_bytes=(2 * rows + num_buffers * block) * row_bytes + cast_bytes,
        )


class Workspace:
    """The buffers of a plan; lives for one call."""

    def __init__(self, plan: WorkspacePlan, device: torch.device) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=plan.dtype, device=device)

        self.plan = plan
        self.logits = empty(2 * plan.rows, plan.vocab_size)
        self.scratch = empty(plan.num_scratch, plan.block, plan.vocab_size)
        self.cast = empty(plan.cast_rows * plan.cast_width)

    def tiles(self, head: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary range, rows of the head in the compute dtype), in order.

        One tile that is the head itself where a GEMM can read it as it is.
        """
        vocab_size, width = head.shape
        if is_gemm_ready(head, self.plan.dtype):
            yield slice(0, vocab_size), head
            return
        for start in range(0, vocab_size, self.plan.cast_rows):
            columns = slice(start, min(start + self.plan.cast_rows, vocab_size))
            rows = columns.stop - columns.start
            yield columns, self.cast[: rows * width].view(rows, width).copy_(head[columns])

    def project(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
        """`out = hidden head^T`; hidden [R, H], head [V, H], out [R, V]."""
        for columns, rows in self.tiles(head):
            torch.mm(hidden, rows.T, out=out[:, columns])

    def backproject(self, grad_logits: Tensor, head: Tensor) -> Tensor:
        """`grad_logits head`, [R, H], summed over the tiles in the compute dtype."""
        total = grad_logits.new_zeros(grad_logits.shape[0], head.shape[1])
        for columns, rows in self.tiles(head):
            total.addmm_(grad_logits[:, columns], rows)
        return total


def is_gemm_ready(head: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GEMM reads the head as it is: no conversion, no hidden [V, H] copy."""
    return head.dtype == dtype and (head.is_contiguous() or head.T.is_contiguous())
