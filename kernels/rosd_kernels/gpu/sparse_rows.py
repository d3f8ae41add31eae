"""The elementwise passes of "chunked" with a sparsity, over kept logits.

    scanned_sums   sums over the entries of scanned tiles and over active ones: see active.py
    write_grad     G of the active entries, [R, C], compacted in place at the head of each row

One program per row. Places rise with the entries they come from, and none is above its entry, so a
row is compacted from left to right: what is written was read before.

Legend: R rows of a chunk, V vocabulary (of this rank), T tiles of SCAN_TILE entries, B row blocks,
C active entries of a row block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.configs import sums_registers
from rosd_kernels.gpu.entries import ActiveIndex, load_log_p
from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.math import entry_terms, formula, round_to
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.tiles import SCAN_TILE, num_tiles

SCAN_TILES = 4  # tiles that are read, or skipped, at once
BLOCK_C = 1024  # active entries that are read at once
NUM_WARPS = 8


@triton.jit
def load_sides(
    student,
    teacher,
    student_bias_ptr,
    teacher_bias_ptr,
    columns,
    mask,
    student_lse,
    teacher_lse,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
):
    """(log p, log q, p, q, slope) at columns of a row; p = q = 0 where masked."""
    log_p, p, slope = load_log_p(
        student,
        student_bias_ptr,
        columns,
        mask,
        student_lse,
        softcap,
        inv_temperature,
        HAS_STUDENT_BIAS,
        HAS_SOFTCAP,
    )
    log_q, q, _ = load_log_p(
        teacher,
        teacher_bias_ptr,
        columns,
        mask,
        teacher_lse,
        softcap,
        inv_temperature,
        HAS_TEACHER_BIAS,
        HAS_SOFTCAP,
    )
    return log_p, log_q, p, q, slope


@triton.jit(do_not_specialize=["R"])
def scanned_sums_kernel(
    student_ptr,  # [R, V] raw
    teacher_ptr,  # [R, V] raw
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    lse_ptr,  # [2, R]
    scanned_ptr,  # [R, T] uint8
    marks_ptr,  # [B, V] uint8
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    out_ptr,  # [7, R]
    R,
    V,
    T,
    index_rows,
    student_stride,
    teacher_stride,
    beta,
    rest,
    clip,
    softcap,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of c, e and, of what is not active, |e|, p and q; then of p and q that are."""
    row = tl.program_id(0).to(tl.int64)
    block = row // index_rows
    student = student_ptr + row * student_stride
    teacher = teacher_ptr + row * teacher_stride
    student_lse = tl.load(lse_ptr + row)
    teacher_lse = tl.load(lse_ptr + R + row)
    value = tl.zeros((TILES, TILE), tl.float32)
    total = tl.zeros((TILES, TILE), tl.float32)
    lost_e = tl.zeros((TILES, TILE), tl.float32)
    lost_p = tl.zeros((TILES, TILE), tl.float32)
    lost_q = tl.zeros((TILES, TILE), tl.float32)
    for tile in range(0, T, TILES):
        tiles = tile + tl.arange(0, TILES)
        scanned = tl.load(scanned_ptr + row * T + tiles, mask=tiles < T, other=0).to(tl.int32)
        if tl.max(scanned) > 0:
            columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            mask = (scanned != 0)[:, None] & (columns < V)
            log_p, log_q, p, q, _ = load_sides(
                student,
                teacher,
                student_bias_ptr,
                teacher_bias_ptr,
                columns,
                mask,
                student_lse,
                teacher_lse,
                softcap,
                inv_temperature,
                HAS_SOFTCAP,
                HAS_STUDENT_BIAS,
                HAS_TEACHER_BIAS,
            )
            marked = tl.load(marks_ptr + block * V + columns, mask=mask, other=1) != 0
            c, e = entry_terms(log_p, log_q, p, q, beta, rest, clip, DIVERGENCE, HAS_CLIP)
            value += tl.where(mask, c, 0.0)
            total += tl.where(mask, e, 0.0)
            lost_e += tl.where(marked, 0.0, tl.abs(e))
            lost_p += tl.where(marked, 0.0, p)
            lost_q += tl.where(marked, 0.0, q)
    kept_p = tl.zeros((BLOCK_C,), tl.float32)
    kept_q = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.load(counts_ptr + block)
    for first in range(0, count, BLOCK_C):
        places = first + tl.arange(0, BLOCK_C)
        active = places < count
        columns = tl.load(index_ptr + block * V + places, mask=active, other=0)
        scanned = tl.load(scanned_ptr + row * T + columns // TILE, mask=active, other=1)
        _, _, p, q, _ = load_sides(
            student,
            teacher,
            student_bias_ptr,
            teacher_bias_ptr,
            columns,
            active & (scanned == 0),
            student_lse,
            teacher_lse,
            softcap,
            inv_temperature,
            HAS_SOFTCAP,
            HAS_STUDENT_BIAS,
            HAS_TEACHER_BIAS,
        )
        kept_p += p
        kept_q += q
    out = out_ptr + row
    tl.store(out, tl.sum(value))
    tl.store(out + R, tl.sum(total))
    tl.store(out + 2 * R, tl.sum(lost_e))
    tl.store(out + 3 * R, tl.sum(lost_p))
    tl.store(out + 4 * R, tl.sum(lost_q))
    tl.store(out + 5 * R, tl.sum(kept_p))
    tl.store(out + 6 * R, tl.sum(kept_q))


@triton.jit(do_not_specialize=["R"])
def sparse_grad_kernel(
    student_ptr,  # [R, V] raw
    teacher_ptr,  # [R, V] raw
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    lse_ptr,  # [2, R]
    total_ptr,  # [R]
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    out_ptr,  # [R, V] G, in the memory of the student's logits
    R,
    V,
    index_rows,
    student_stride,
    teacher_stride,
    out_stride,
    beta,
    rest,
    clip,
    softcap,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of G, as many columns as its row block has active entries."""
    row = tl.program_id(0).to(tl.int64)
    block = row // index_rows
    student = student_ptr + row * student_stride
    teacher = teacher_ptr + row * teacher_stride
    student_lse = tl.load(lse_ptr + row)
    teacher_lse = tl.load(lse_ptr + R + row)
    total = tl.load(total_ptr + row)
    count = tl.load(counts_ptr + block)
    for first in range(0, count, BLOCK_C):
        places = first + tl.arange(0, BLOCK_C)
        active = places < count
        columns = tl.load(index_ptr + block * V + places, mask=active, other=0)
        log_p, log_q, p, q, slope = load_sides(
            student,
            teacher,
            student_bias_ptr,
            teacher_bias_ptr,
            columns,
            active,
            student_lse,
            teacher_lse,
            softcap,
            inv_temperature,
            HAS_SOFTCAP,
            HAS_STUDENT_BIAS,
            HAS_TEACHER_BIAS,
        )
        _, e = entry_terms(log_p, log_q, p, q, beta, rest, clip, DIVERGENCE, HAS_CLIP)
        grad = (e - p * total) * slope
        tl.debug_barrier()  # other threads have read what is overwritten
        out = out_ptr + row * out_stride + places
        tl.store(out, round_to(grad, out_ptr.dtype.element_ty), mask=active)


def scanned_sums(
    student: Tensor,  # [R, V] float32 raw logits
    teacher: Tensor,  # [R, V] float32 raw logits
    transforms: tuple[LogitTransform, LogitTransform],
    lse: Tensor,  # [2, R]
    scanned: Tensor,  # [R, T] bool
    index: ActiveIndex,
    options: SpanOptions,
) -> Tensor:
    """[7, R] sums of c, e, |e|, p, q, p, q over sets of entries.

    The first two are over scanned tiles, the next three over what is not active there, and the last
    two over what is active in other tiles.
    """
    R, V = student.shape
    out = student.new_empty(7, R)
    if R:
        scanned_sums_kernel[(R,)](
            student,
            teacher,
            transforms[0].bias,
            transforms[1].bias,
            lse.contiguous(),
            scanned.contiguous().view(torch.uint8),
            index.marks,
            index.entries,
            index.counts,
            out,
            R,
            V,
            num_tiles(V, SCAN_TILE),
            index.rows,
            student.stride(0),
            teacher.stride(0),
            *_scalars(options),
            **_constants(transforms, options),
            TILES=SCAN_TILES,
            TILE=SCAN_TILE,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
            maxnreg=sums_registers(),
            **COMPILER_OPTIONS,
        )
    return out


def write_grad(
    student: Tensor,  # [R, V] float32 raw logits
    teacher: Tensor,  # [R, V] float32 raw logits
    transforms: tuple[LogitTransform, LogitTransform],
    lse: Tensor,  # [2, R]
    total: Tensor,  # [R] K
    index: ActiveIndex,
    options: SpanOptions,
    *,
    dtype: torch.dtype,  # float32 or bfloat16
) -> Tensor:
    """G of the active entries, in the memory of `student`: [R, V], of which C columns are written.

    Rows have no scale. Column j is for entry `index.entries[block, j]`.
    """
    R, V = student.shape
    out = student if dtype == student.dtype else student.view(dtype)[:, :V]
    if R:
        sparse_grad_kernel[(R,)](
            student,
            teacher,
            transforms[0].bias,
            transforms[1].bias,
            lse.contiguous(),
            total.contiguous(),
            index.entries,
            index.counts,
            out,
            R,
            V,
            index.rows,
            student.stride(0),
            teacher.stride(0),
            out.stride(0),
            *_scalars(options),
            **_constants(transforms, options),
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return out


def _scalars(options: SpanOptions) -> tuple[float, ...]:
    clip, softcap = options.entry_clip or 0.0, options.softcap or 1.0
    return options.beta, 1 - options.beta, clip, softcap, 1.0 / options.temperature


def _constants(
    transforms: tuple[LogitTransform, LogitTransform], options: SpanOptions
) -> dict[str, bool | str]:
    return {
        "DIVERGENCE": formula(options),
        "HAS_CLIP": options.entry_clip is not None,
        "HAS_SOFTCAP": options.softcap is not None,
        "HAS_STUDENT_BIAS": transforms[0].bias is not None,
        "HAS_TEACHER_BIAS": transforms[1].bias is not None,
    }
