"""The active entries of row blocks, found in kept logits; active.py has the rules.

    tile_stats       lse, max, min and entropy of each row and tile: one read of the logits
    mass_threshold   the threshold of `mass`: four more reads
    active_index     entries above some row's threshold, read in scanned (row, tile) pairs only

A row block is `index_rows` rows, which share their active entries. How many entries are active is
known to the device only: kernels read the count from memory, and no call waits for it. Logits are
those of a student and a teacher, or of one side.

Legend: R rows of a chunk, V vocabulary (of this rank), T tiles of SCAN_TILE entries, B row blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.math import MASKED, transform_logits
from rosd_kernels.logits import LogitTransform
from rosd_kernels.tiles import SCAN_TILE, num_tiles
from rosd_kernels.workspace import INDEX_ROWS

STATS_TILES = 8  # tiles of a program
MARK_ROWS = 8  # rows that are read at once; divides INDEX_UNIT
INDEX_UNIT = 128  # a multiple of each block of rows in configs.py
LEVELS = 8  # thresholds that are tried at once
STEPS = 4  # reads of the logits: the threshold is one of (LEVELS + 1)^STEPS
BLOCK_V = 1024


class ActiveIndex(NamedTuple):
    """The active entries of each row block."""

    entries: Tensor  # [B, V] int32, rising; only the first `counts` of a row block are written
    counts: Tensor  # [B] int32
    marks: Tensor  # [B, V] uint8: 1 where an entry is active
    rows: int  # of a row block; the last one may have fewer


@triton.jit
def scaled_logits(
    pointers,
    bias_ptr,
    columns,
    mask,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(scaled logits at pointers, their slope); `columns`, of the pointers' shape, say whose."""
    logits = tl.load(pointers, mask=mask, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        logits += tl.maximum(bias, MASKED)
    return transform_logits(logits, softcap, inv_temperature, HAS_SOFTCAP)


@triton.jit
def load_log_p(
    logits,  # a row of raw logits
    bias_ptr,
    columns,
    mask,
    lse,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """(log p, p, slope) at columns of a row; p = 0 where masked."""
    s, slope = scaled_logits(
        logits + columns,
        bias_ptr,
        columns,
        mask,
        softcap,
        inv_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    log_p = s - lse
    return log_p, tl.where(mask, tl.exp(log_p), 0.0), slope


@triton.jit(do_not_specialize=["R"])
def tile_stats_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    out_ptr,  # [4, R, T]: lse, max, min, entropy
    R,
    V,
    T,
    logits_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILES tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = columns < V
    s, _ = scaled_logits(
        logits_ptr + row * logits_stride + columns,
        bias_ptr,
        columns,
        inside,
        softcap,
        inv_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    lowest = tl.min(tl.where(inside, s, float("inf")), axis=1)
    s = tl.where(inside, s, MASKED)
    highest = tl.max(s, axis=1)
    shifted = s - highest[:, None]
    weight = tl.where(inside, tl.exp(shifted), 0.0)
    total = tl.where(tiles < T, tl.sum(weight, axis=1), 1.0)
    weighted = tl.sum(weight * shifted, axis=1)
    plane = R.to(tl.int64) * T
    slots = out_ptr + row * T + tiles
    tl.store(slots, highest + tl.log(total), mask=tiles < T)
    tl.store(slots + plane, highest, mask=tiles < T)
    tl.store(slots + 2 * plane, lowest, mask=tiles < T)
    tl.store(slots + 3 * plane, tl.log(total) - weighted / total, mask=tiles < T)


@triton.jit
def mass_level_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    lse_ptr,  # [R]
    threshold_ptr,  # [R] out, scaled logits
    V,
    logits_stride,
    softcap,
    inv_temperature,
    tol,
    log_least,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LEVELS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Highest threshold found such that a row's entries at or below it hold at most `tol`.

    Between log_least = log(tol/V), which cannot drop too much, and 0: each step keeps one of
    LEVELS + 1 parts of the range.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_stride
    lse = tl.load(lse_ptr + row)
    low = lse * 0.0 + log_least
    width = -low
    for _step in range(STEPS):
        width = width / (LEVELS + 1)
        levels = low + (1 + tl.arange(0, LEVELS)).to(tl.float32) * width
        below = tl.zeros((LEVELS,), tl.float32)
        for v in range(0, V, BLOCK_V):
            columns = v + tl.arange(0, BLOCK_V)
            inside = columns < V
            log_p, p, _ = load_log_p(
                logits,
                bias_ptr,
                columns,
                inside,
                lse,
                softcap,
                inv_temperature,
                HAS_BIAS,
                HAS_SOFTCAP,
            )
            dropped = log_p[None, :] <= levels[:, None]
            below += tl.sum(tl.where(dropped, p[None, :], 0.0), axis=1)
        low += tl.sum((below <= tol).to(tl.int32)).to(tl.float32) * width
    # More than the rounding of the sum.
    tl.store(threshold_ptr + row, low + lse - 1e-5 * (1.0 + tl.abs(lse)))


@triton.jit(do_not_specialize=["R"])
def mark_kernel(
    student_ptr,  # [R, V] raw
    teacher_ptr,  # [R, V] raw
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    threshold_ptr,  # [1 or 2, R] scaled
    always_ptr,  # [R] int64: a row's entry that is active in any case; -1: none
    scanned_ptr,  # [R, T] uint8
    marks_ptr,  # [B, V] uint8, out
    R,
    V,
    T,
    index_rows,
    student_stride,
    teacher_stride,
    softcap,
    inv_temperature,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_ALWAYS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of a row block: 1 where some row has more than its threshold, or NaN."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < V
    found = tl.zeros((TILE,), tl.int32)
    first = block * index_rows
    for r in range(first, tl.minimum(first + index_rows, R), BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        scanned = tl.load(scanned_ptr + rows * T + tile, mask=rows < R, other=0) != 0
        mask = scanned[:, None] & inside[None, :]
        wide = tl.broadcast_to(columns[None, :], (BLOCK_R, TILE))
        s, _ = scaled_logits(
            student_ptr + rows[:, None] * student_stride + wide,
            student_bias_ptr,
            wide,
            mask,
            softcap,
            inv_temperature,
            HAS_STUDENT_BIAS,
            HAS_SOFTCAP,
        )
        of_student = tl.load(threshold_ptr + rows, mask=rows < R, other=0.0)
        unlikely = s <= of_student[:, None]  # NaN is not
        if HAS_TEACHER:
            t, _ = scaled_logits(
                teacher_ptr + rows[:, None] * teacher_stride + wide,
                teacher_bias_ptr,
                wide,
                mask,
                softcap,
                inv_temperature,
                HAS_TEACHER_BIAS,
                HAS_SOFTCAP,
            )
            of_teacher = tl.load(threshold_ptr + R + rows, mask=rows < R, other=0.0)
            unlikely = unlikely & (t <= of_teacher[:, None])
        found = tl.maximum(found, tl.max(tl.where(mask & (unlikely == 0), 1, 0), axis=0))
        if HAS_ALWAYS:
            always = tl.load(always_ptr + rows, mask=rows < R, other=-1).to(tl.int32)
            is_sampled = columns[None, :] == always[:, None]
            found = tl.maximum(found, tl.max(is_sampled.to(tl.int32), axis=0))
    marks = marks_ptr + block.to(tl.int64) * V + columns
    tl.store(marks, found.to(tl.uint8), mask=inside)


@triton.jit
def index_kernel(
    marks_ptr,  # [B, V] uint8
    ranks_ptr,  # [B, V] int32: number of marks up to and with an entry
    index_ptr,  # [B, V] int32, out
    V,
    BLOCK_V: tl.constexpr,
):
    """Write each marked entry to its place."""
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < V
    first = tl.program_id(1).to(tl.int64) * V
    marked = tl.load(marks_ptr + first + columns, mask=inside, other=0) != 0
    rank = tl.load(ranks_ptr + first + columns, mask=inside, other=1)
    tl.store(index_ptr + first + rank - 1, columns, mask=marked)


def index_rows(num_rows: int) -> int:
    """Rows of each row block of a chunk: at most INDEX_ROWS, and blocks of about equal size."""
    blocks = max(1, -(-num_rows // INDEX_ROWS))
    return max(1, -(-num_rows // (blocks * INDEX_UNIT))) * INDEX_UNIT


def tile_stats(logits: Tensor, transform: LogitTransform) -> Tensor:
    """[4, R, T] lse, max, min and entropy of the scaled logits of each tile; logits [R, V] raw."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    T = num_tiles(V, SCAN_TILE)
    out = logits.new_empty(4, R, T)
    if R:
        tile_stats_kernel[(R, -(-T // STATS_TILES))](
            logits,
            bias,
            out,
            R,
            V,
            T,
            logits.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            TILES=STATS_TILES,
            TILE=SCAN_TILE,
            num_warps=8,
            **COMPILER_OPTIONS,
        )
    return out


def mass_threshold(
    logits: Tensor, transform: LogitTransform, lse: Tensor, tolerance: float
) -> Tensor:
    """[R] scaled logits at or below which a row's entries hold at most `tolerance` of its mass."""
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    out = logits.new_empty(R)
    if R:
        mass_level_kernel[(R,)](
            logits,
            bias,
            lse.contiguous(),
            out,
            V,
            logits.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            tolerance,
            math.log(tolerance / V),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            LEVELS=LEVELS,
            STEPS=STEPS,
            BLOCK_V=BLOCK_V,
            num_warps=8,
            **COMPILER_OPTIONS,
        )
    return out


def active_index(
    logits: Sequence[Tensor],  # [R, V] raw, of one side or of both
    transforms: Sequence[LogitTransform],  # likewise
    thresholds: Tensor,  # [1 or 2, R] scaled, likewise
    scanned: Tensor,  # [R, T] bool
    always: Tensor | None = None,  # [R] int64 columns that are active in any case; -1: none
) -> ActiveIndex:
    """The entries that some row of a block has above its threshold, on any side."""
    # The last side is the teacher, or the only one, which is then not read twice.
    student, teacher, of_student, of_teacher = logits[0], logits[-1], transforms[0], transforms[-1]
    R, V = student.shape
    rows = index_rows(R)
    B = -(-R // rows)
    marks = torch.empty(B, V, dtype=torch.uint8, device=student.device)
    index = torch.empty(B, V, dtype=torch.int32, device=student.device)
    if R == 0:
        return ActiveIndex(index, index.new_empty(0), marks, rows)
    T = num_tiles(V, SCAN_TILE)
    mark_kernel[(T, B)](
        student,
        teacher,
        of_student.bias,
        of_teacher.bias,
        thresholds.contiguous(),
        None if always is None else always.contiguous(),
        scanned.contiguous().view(torch.uint8),
        marks,
        R,
        V,
        T,
        rows,
        student.stride(0),
        teacher.stride(0),
        of_student.softcap or 1.0,
        1.0 / of_student.temperature,
        HAS_STUDENT_BIAS=of_student.bias is not None,
        HAS_TEACHER_BIAS=of_teacher.bias is not None,
        HAS_SOFTCAP=of_student.softcap is not None,
        HAS_TEACHER=len(logits) > 1,
        HAS_ALWAYS=always is not None,
        TILE=SCAN_TILE,
        BLOCK_R=MARK_ROWS,
        num_warps=4,
        **COMPILER_OPTIONS,
    )
    ranks = marks.cumsum(1, dtype=torch.int32)
    index_kernel[(-(-V // BLOCK_V), B)](marks, ranks, index, V, BLOCK_V=BLOCK_V, num_warps=4)
    return ActiveIndex(index, ranks[:, -1].contiguous(), marks, rows)
