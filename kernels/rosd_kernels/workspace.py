"""The bounded memory of strategy "chunked", and the GEMMs that use it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rosd_kernels.logits import compute_dtype
from rosd_kernels.tiles import SCAN_TILE, num_tiles
from rosd_kernels.vocabulary import Vocabulary

MIB = 1 << 20
# On a CPU, a GEMM of this many rows is as fast as a larger one: more memory would gain nothing.
CPU_CHUNK_ROWS = 128
# Elementwise work on a CPU processes blocks of this many elements (4 MiB in float32) instead of
# whole chunks, so that its later passes find the rows in the cache. Much smaller blocks would only
# add thread synchronization.
CPU_BLOCK_ELEMENTS = 1 << 20
# Part of a head or of its gradient that is converted at a time: long enough for a good GEMM.
CAST_BYTES = 16 * MIB
# Statistics of tiles that a sparse block holds per side, temporary ones included.
SCAN_PLANES = 10
# Rows that share an index of active entries in Triton's kernels. dW is read and written once per
# index, so few rows are limited by memory; the entries of many are more than each row needs.
INDEX_ROWS = 512
INDEX_BYTES = 9  # per entry of an index: mark, rank, place
# Chunks by default. A CPU gains nothing from larger ones. A GPU reads and writes the float32 sum of
# dW once per chunk, so chunks are few; the size follows the whole memory, never the free one, as
# results would otherwise differ in their last bits from call to call.
CPU_MIB = 256
LARGEST_MIB = 2048
DEVICE_SHARE = 32  # of the memory
ROW_ALIGNMENT = 16  # bytes; GEMMs read whole vectors where rows begin at multiples of it
# Devices on which a GEMM of bfloat16 operands returns its float32 sums unrounded.
NARROW_DEVICES = ("cuda",)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspacePlan:
    """How many rows fit the bound, and which buffers they need."""

    dtype: torch.dtype  # of logits and sums
    gemm_dtype: torch.dtype  # of the GEMMs' operands: `dtype`, or bfloat16 where all inputs are
    vocab_size: int
    sides: int  # 2 for student and teacher
    rows: int  # rows of a chunk, whose logits of all sides are held: [sides * rows, V]
    block: int  # rows that are turned from logits into gradients at a time
    cast_rows: int  # rows of a head that are converted at a time; 0: no conversion is needed
    cast_width: int  # columns of such a head
    has_narrow: bool  # G has memory of its own, in `gemm_dtype`
    num_bytes: int  # all buffers together

    @classmethod
    def of(
        cls,
        sides: Sequence[tuple[Tensor, Tensor]],
        vocabulary: Vocabulary,
        *,
        workspace_mib: float,
        scratch_rows: int,
        is_fused: bool,
        is_sparse: bool = False,
        is_gathered: bool = False,
    ) -> WorkspacePlan:
        """Return the largest plan within `workspace_mib`, with at least one row.

        sides: hidden states [N, H] and head [V, H] of each. scratch_rows: buffers of one row of
        logits that elementwise work on a row allocates. is_fused: that work is one launch for any
        number of rows. is_sparse: a chunk is one block, with statistics of tiles, and rows of the
        first side's head are gathered. is_gathered: Triton's kernels gather them, through an index
        per row block (gpu/entries.py), and compact G in place in the operands' dtype; the others
        copy them, for operands in the logits' dtype. Where the vocabulary is sharded, every rank
        gets the same plan, the one for the largest shard.
        """
        vocab_size = vocabulary.largest
        operands = [operand for side in sides for operand in side]
        hidden, heads = sides[0][0], [head for _, head in sides]
        num_tokens, device = hidden.shape[0], hidden.device
        dtype = compute_dtype(*operands)
        budget = int(workspace_mib * MIB)
        is_narrow = (
            device.type in NARROW_DEVICES
            and all(operand.dtype == torch.bfloat16 for operand in operands)
            and (is_gathered or not is_sparse)
        )
        gemm_dtype = torch.bfloat16 if is_narrow else dtype
        cast_width = max(
            (head.shape[1] for head in heads if not is_gemm_ready(head, gemm_dtype)), default=0
        )
        if is_sparse and not is_gathered:
            cast_width = max(cast_width, heads[0].shape[1])
        cast_rows = 0
        if cast_width:
            cast_budget = min(CAST_BYTES, budget // 4)
            cast_rows = min(max(1, cast_budget // (cast_width * gemm_dtype.itemsize)), vocab_size)
        cast_bytes = cast_rows * cast_width * gemm_dtype.itemsize
        scratch_bytes = scratch_rows * vocab_size * dtype.itemsize
        held_bytes = len(sides) * row_bytes(vocab_size, dtype)  # of a row, from GEMM to GEMM
        has_narrow = is_narrow and len(sides) == 1 and not is_sparse
        if has_narrow:
            held_bytes += row_bytes(vocab_size, gemm_dtype)
        if is_sparse:
            held_bytes += (
                len(sides) * num_tiles(vocab_size, SCAN_TILE) * SCAN_PLANES * dtype.itemsize
            )

        index_bytes = 0
        if is_gathered:
            blocks = max(1, -(-min(budget // held_bytes, num_tokens) // INDEX_ROWS))
            index_bytes = INDEX_BYTES * vocab_size * blocks
        free = max(0, budget - cast_bytes - index_bytes)
        block = max(1, free // (held_bytes + scratch_bytes))
        is_cpu = device.type == "cpu"
        if is_cpu and not is_sparse:
            block = min(block, max(1, CPU_BLOCK_ELEMENTS // vocab_size))
        rows = max(1, (free - scratch_bytes * block) // held_bytes)
        if is_cpu:
            rows = min(rows, CPU_CHUNK_ROWS)
        if vocabulary.is_sharded:
            # Ranks communicate per chunk and block, so all need the same sizes, whatever the layout
            # of their heads and with or without the C++ extension.
            rows, block, fused = vocabulary.fewest(rows, block, int(is_fused))
            is_fused = bool(fused)
        if is_sparse:
            rows = min(rows, block)
        num_chunks = max(1, -(-num_tokens // rows))
        rows = -(-num_tokens // num_chunks)  # chunks of equal size: no thin GEMM at the end
        if is_fused and (vocabulary.is_sharded or not is_cpu):
            block = rows  # one collective, or one launch, per chunk
        block = rows if is_sparse else min(block, rows)
        return cls(
            dtype=dtype,
            gemm_dtype=gemm_dtype,
            vocab_size=vocabulary.local_size,
            sides=len(sides),
            rows=rows,
            block=block,
            cast_rows=cast_rows,
            cast_width=cast_width,
            has_narrow=has_narrow,
            num_bytes=held_bytes * rows + scratch_bytes * block + cast_bytes + index_bytes,
        )


class Workspace:
    """The buffers of a plan, for one call."""

    def __init__(self, plan: WorkspacePlan, device: torch.device) -> None:
        self.plan = plan
        shape = plan.sides * plan.rows, plan.vocab_size
        self.logits = empty_rows(shape, plan.dtype, device)
        self.narrow: Tensor | None = None
        if plan.has_narrow:
            self.narrow = empty_rows(shape, plan.gemm_dtype, device)
        num_cast = plan.cast_rows * plan.cast_width
        self.cast = torch.empty(num_cast, dtype=plan.gemm_dtype, device=device)

    def operand(self, tensor: Tensor) -> Tensor:
        """A matrix in the dtype of the GEMMs' operands."""
        return tensor.to(self.plan.gemm_dtype)

    def grad_operand(self, num_rows: int) -> Tensor:
        """G, [R, V], in the dtype of the GEMMs' operands.

        G is where the student's logits were. A narrow copy overwrites the teacher's logits, which
        are no longer needed; where there is one side only, G is written into `narrow`.
        """
        if self.narrow is not None:
            return self.narrow[:num_rows]
        grad_logits = self.logits[:num_rows]
        if self.plan.gemm_dtype == self.plan.dtype:
            return grad_logits
        narrow = self.logits[num_rows : 2 * num_rows].view(self.plan.gemm_dtype)
        return narrow[:, : self.plan.vocab_size].copy_(grad_logits)

    def tiles(self, head: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (vocabulary range, rows of the head in the GEMMs' dtype), in rising order.

        Where a GEMM can read the head without conversion, the head itself is the only tile.
        """
        vocab_size, width = head.shape
        if is_gemm_ready(head, self.plan.gemm_dtype):
            yield slice(0, vocab_size), head
            return
        for start in range(0, vocab_size, self.plan.cast_rows):
            columns = slice(start, min(start + self.plan.cast_rows, vocab_size))
            rows = columns.stop - columns.start
            yield columns, self.cast[: rows * width].view(rows, width).copy_(head[columns])

    def project(self, hidden: Tensor, head: Tensor, *, out: Tensor) -> None:
        """`out = hidden head^T`; hidden [R, H], head [V, H], out [R, V]."""
        for columns, rows in self.tiles(head):
            multiply(hidden, rows.T, out=out[:, columns])

    def backproject(self, grad_logits: Tensor, head: Tensor) -> Tensor:
        """`grad_logits head`, [R, H], summed over the tiles in the compute dtype."""
        shape = grad_logits.shape[0], head.shape[1]
        total = grad_logits.new_empty(shape, dtype=self.plan.dtype)
        for columns, rows in self.tiles(head):
            multiply(grad_logits[:, columns], rows, out=total, add=columns.start > 0)
        return total


def row_bytes(columns: int, dtype: torch.dtype) -> int:
    """Bytes from row to row of `empty_rows`."""
    return -(-columns * dtype.itemsize // ROW_ALIGNMENT) * ROW_ALIGNMENT


def empty_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An [R, C] matrix whose rows all begin at multiples of ROW_ALIGNMENT, whatever C is."""
    stride = row_bytes(shape[1], dtype) // dtype.itemsize
    return torch.empty((shape[0], stride), dtype=dtype, device=device)[:, : shape[1]]


def default_workspace_mib(device: torch.device) -> int:
    """The bound on logit-sized buffers where a caller names none.

    256 on a CPU; on a GPU 1/32 of its memory, at least 256 and at most 2048.
    """
    if device.type != "cuda":
        return CPU_MIB
    memory = torch.cuda.get_device_properties(device).total_memory
    return gpu_workspace_mib(memory)


def gpu_workspace_mib(memory: int) -> int:
    """`default_workspace_mib` of a GPU with `memory` bytes."""
    return min(max(memory // DEVICE_SHARE // MIB, CPU_MIB), LARGEST_MIB)


def multiply(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> None:
    """`out = a b`, or `out += a b`. Products of narrow operands are not rounded to their dtype."""
    narrow: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **narrow, out=out)
    else:
        torch.mm(a, b, **narrow, out=out)


def is_gemm_ready(head: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GEMM reads the head directly: no conversion, no hidden [V, H] copy."""
    return head.dtype == dtype and (head.is_contiguous() or head.T.is_contiguous())
