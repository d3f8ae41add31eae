"""Value and total K of each row over its active tiles.

    value_n = sum over active entries of c_v,    total_n = sum over active entries of e_v

The pair kernel leaves one partial sum per row and tile; they are added in the order of the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.launch import COMPILER_OPTIONS, rowwise
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


@torch.library.custom_op("rosd_gpu::loss", mutates_args=())
def _loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    order: Tensor | None,
    student_lse: Tensor,
    teacher_lse: Tensor,
    active: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    entry_clip: float | None,
) -> Tensor:
    N, T = student_hidden.shape[0], active.shape[1]
    out = student_hidden.new_empty(2, N, dtype=torch.float32)
    if N == 0:
        return out
    partial = student_hidden.new_empty(2, T, N, dtype=torch.float32)
    pair = Pair(
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        student_head=student_head,
        teacher_head=teacher_head,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        order=order,
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        softcap=softcap,
        entry_clip=entry_clip,
    )
    pair.launch(active, first_tile=0, out=partial)
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


@_loss.register_fake
def _(student_hidden, *_):
    return student_hidden.new_empty(2, student_hidden.shape[0], dtype=torch.float32)


def loss(
    student_hidden: Tensor,  # [N, H]
    teacher_hidden: Tensor,  # [N, Ht]
    student_head: Tensor,  # [V, H]
    teacher_head: Tensor,  # [V, Ht]; the student's own tensor is read once for both
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [V]
    order: Tensor | None,  # [V] int64
    student_lse: Tensor,  # [N]
    teacher_lse: Tensor,  # [N]
    active: Tensor,  # [B, T] uint8
    *,
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
    entry_clip: float | None,
) -> Tensor:
    """[2, N] float32: value and total of each row over its active tiles."""
    return _loss(
        rowwise(student_hidden),
        rowwise(teacher_hidden),
        rowwise(student_head),
        rowwise(teacher_head),
        student_bias,
        teacher_bias,
        order,
        student_lse.float().contiguous(),
        teacher_lse.float().contiguous(),
        active.contiguous(),
        divergence,
        beta,
        temperature,
        softcap,
        entry_clip,
    )
