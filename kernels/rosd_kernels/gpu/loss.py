"""Value and total K of each row over its active tiles.

    value_n = sum over active entries of c_v,    total_n = sum over active entries of e_v

The pair kernel writes one partial sum per row and tile; `add_tiles_kernel` adds them, first tile to
last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.pair import Pair
from rosd_kernels.tiles import ROW_BLOCK

BLOCK_T = 64
BLOCK_N = 32  # divides ROW_BLOCK


@triton.jit(do_not_specialize=["N"])
def add_tiles_kernel(
    partial_ptr,  # [2, T, N], written where active
    active_ptr,  # [B, T] uint8
    out_ptr,  # [2, N]
    N,
    T,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """BLOCK_N rows of one of the two sums, added over their active tiles in rising order."""
    first_row = tl.program_id(0) * BLOCK_N
    which = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_N)
    flags_ptr = active_ptr + (first_row // ROW_BLOCK).to(tl.int64) * T
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for t in range(0, T, BLOCK_T):
        tiles = t + tl.arange(0, BLOCK_T)
        flags = tl.load(flags_ptr + tiles, mask=tiles < T, other=0)
        slots = partial_ptr + (which * T + tiles)[:, None] * N + rows[None, :]
        mask = (flags != 0)[:, None] & (rows < N)[None, :]
        acc += tl.sum(tl.load(slots, mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + which * N + rows, acc, mask=rows < N)


def loss(
    pair: Pair,
    student_lse: Tensor,  # [N]
    teacher_lse: Tensor,  # [N]
    active: Tensor,  # [B, T] uint8, contiguous
) -> Tensor:
    """[2, N] float32: value and total of each row over its active tiles."""
    N, T = pair.student_hidden.shape[0], active.shape[1]
    out = pair.student_hidden.new_empty(2, N, dtype=torch.float32)
    if N == 0:
        return out
    partial = pair.student_hidden.new_empty(2, T, N, dtype=torch.float32)
    pair.launch(active, student_lse, teacher_lse, first_tile=0, out=partial)
    add_tiles_kernel[(-(-N // BLOCK_N), 2)](
        partial,
        active,
        out,
        N,
        T,
        BLOCK_N=BLOCK_N,
        BLOCK_T=BLOCK_T,
        ROW_BLOCK=ROW_BLOCK,
        **COMPILER_OPTIONS,
    )
    return out
