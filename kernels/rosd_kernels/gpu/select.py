"""Selection of tiles: `sparsity.select_tiles` in two kernels that read the statistics in place.

    entry(eps)  log max p or log max q of the tile > log eps, in some row of the block
    mass(tol)   log P or log Q of the tile > threshold of the row, in some row of the block

Bisection finds the threshold; each step is one pass over a row's T masses, which stay in cache.

Legend: N tokens, T tiles of the vocabulary, B row blocks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.launch import COMPILER_OPTIONS, rowwise
from rosd_kernels.sparsity import BISECTIONS, Sparsity, TileStats
from rosd_kernels.tiles import ROW_BLOCK, num_row_blocks

BLOCK_N = 8  # rows whose thresholds are found together
BLOCK_T = 128
FLAGS_BLOCK_T = 32


@triton.jit
def load_log_probs(student, teacher, student_lse, teacher_lse, mask):
    """Values at pointers [R, C] less the rows' lse [R], of both sides; -inf where masked."""
    s = tl.load(student, mask=mask, other=-float("inf")) - student_lse[:, None]
    t = tl.load(teacher, mask=mask, other=-float("inf")) - teacher_lse[:, None]
    return s, t


@triton.jit(do_not_specialize=["N"])
def mass_threshold_kernel(
    student_ptr,  # [N, T] lse of the tiles
    teacher_ptr,  # [N, T]
    student_lse_ptr,  # [N]
    teacher_lse_ptr,  # [N]
    threshold_ptr,  # [N] out
    N,
    T,
    student_stride,
    teacher_stride,
    tol,
    log_least,
    BISECTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Highest threshold found such that a row's tiles at or below it hold at most `tol`.

    Bisection between log_least = log(tol/T), which cannot drop too much, and 0, the whole row.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    student_lse = tl.load(student_lse_ptr + rows, mask=inside, other=0.0)
    teacher_lse = tl.load(teacher_lse_ptr + rows, mask=inside, other=0.0)
    student = student_ptr + rows.to(tl.int64)[:, None] * student_stride
    teacher = teacher_ptr + rows.to(tl.int64)[:, None] * teacher_stride
    low = tl.zeros((BLOCK_N,), tl.float32) + log_least
    high = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        student_mass = tl.zeros((BLOCK_N,), tl.float32)
        teacher_mass = tl.zeros((BLOCK_N,), tl.float32)
        for t in range(0, T, BLOCK_T):
            tiles = t + tl.arange(0, BLOCK_T)[None, :]
            log_p, log_q = load_log_probs(
                student + tiles,
                teacher + tiles,
                student_lse,
                teacher_lse,
                inside[:, None] & (tiles < T),
            )
            dropped = tl.maximum(log_p, log_q) <= middle[:, None]
            student_mass += tl.sum(tl.where(dropped, tl.exp(log_p), 0.0), axis=1)
            teacher_mass += tl.sum(tl.where(dropped, tl.exp(log_q), 0.0), axis=1)
        fits = tl.maximum(student_mass, teacher_mass) <= tol
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    tl.store(threshold_ptr + rows, low, mask=inside)


@triton.jit(do_not_specialize=["N"])
def flags_kernel(
    student_ptr,  # [N, T] max or lse of the tiles
    teacher_ptr,  # [N, T]
    student_lse_ptr,  # [N]
    teacher_lse_ptr,  # [N]
    threshold_ptr,  # [N]; with BY_ROW
    active_ptr,  # [B, T] uint8 out
    N,
    T,
    student_stride,
    teacher_stride,
    threshold,  # of all rows; without BY_ROW
    BY_ROW: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """1 where some row of the block has more than its threshold in the tile."""
    row_block = tl.program_id(0).to(tl.int64)
    rows = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    tiles = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = rows < N
    s, t = load_log_probs(
        student_ptr + rows[:, None] * student_stride + tiles[None, :],
        teacher_ptr + rows[:, None] * teacher_stride + tiles[None, :],
        tl.load(student_lse_ptr + rows, mask=inside, other=0.0),
        tl.load(teacher_lse_ptr + rows, mask=inside, other=0.0),
        inside[:, None] & (tiles < T)[None, :],
    )
    if BY_ROW:
        threshold = tl.load(threshold_ptr + rows, mask=inside, other=0.0)[:, None]
    wanted = tl.maximum(s, t) > threshold
    active = tl.max(wanted.to(tl.int32), axis=0)
    tl.store(active_ptr + row_block * T + tiles, active.to(tl.uint8), mask=tiles < T)


def select(
    student: TileStats,  # [N, T] each
    teacher: TileStats,  # [N, T] each
    student_lse: Tensor,  # [N] of whole rows
    teacher_lse: Tensor,  # [N]
    rule: Sparsity,
) -> Tensor:
    """[B, T] uint8: 1 where a row block computes a tile, as `sparsity.select_tiles` defines it."""
    N, T = student.lse.shape
    active = student.lse.new_empty(num_row_blocks(N), T, dtype=torch.uint8)
    if rule.rule == "exact":
        return active.fill_(1)
    if N == 0:
        return active
    sides = (student.max, teacher.max) if rule.rule == "entry" else (student.lse, teacher.lse)
    tables = tuple(map(rowwise, sides))
    tensors = (*tables, student_lse.float().contiguous(), teacher_lse.float().contiguous())
    sizes = (N, T, tables[0].stride(0), tables[1].stride(0))
    thresholds = None
    if rule.rule == "mass":
        thresholds = tensors[2].new_empty(N)
        mass_threshold_kernel[(-(-N // BLOCK_N),)](
            *tensors,
            thresholds,
            *sizes,
            rule.bound,
            math.log(rule.bound / T),
            BISECTIONS=BISECTIONS,
            BLOCK_N=BLOCK_N,
            BLOCK_T=BLOCK_T,
            **COMPILER_OPTIONS,
        )
    flags_kernel[(active.shape[0], -(-T // FLAGS_BLOCK_T))](
        *tensors,
        thresholds,
        active,
        *sizes,
        math.log(rule.bound),
        BY_ROW=thresholds is not None,
        ROW_BLOCK=ROW_BLOCK,
        BLOCK_T=FLAGS_BLOCK_T,
        **COMPILER_OPTIONS,
    )
    return active
