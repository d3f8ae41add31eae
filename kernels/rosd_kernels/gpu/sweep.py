"""The sweep: statistics of all logits, tile by tile, without storing a logit.

    s = softcap(h W^T + b) / temperature                  scaled logits, [M, V]
    lse = log sum exp s,  max,  min,  entropy of exp(s - lse)    over each tile's columns

and, in a kernel of its own, one scaled logit per row, that of the sampled token.

Legend: M rows (of student and teacher, stacked where they share the head), V vocabulary, H hidden,
T tiles of the vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.blocks import add_bias, grouped, head_rows, project, sum_both
from rosd_kernels.gpu.launch import COMPILER_OPTIONS, Gemm, launch, num_programs, rowwise
from rosd_kernels.gpu.math import MASKED, transform_logits
from rosd_kernels.logits import LogitTransform
from rosd_kernels.tiles import TILE, num_tiles

TILE_SIZE = tl.constexpr(TILE)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


@triton.jit(do_not_specialize=["M"])
def sweep_kernel(
    hidden,  # [M, H], descriptor or pointer
    head,  # [V, H], descriptor or pointer
    bias_ptr,  # [V]
    order_ptr,  # [V] int64
    stats_ptr,  # [4, M, T] out
    M,
    V,
    H,
    hidden_stride,
    head_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A persistent kernel: each program takes every num_programs-th block of `grouped`."""
    TILES: tl.constexpr = BLOCK_V // TILE_SIZE
    T = tl.cdiv(V, TILE_SIZE)
    plane = M.to(tl.int64) * T
    num_rows = tl.cdiv(M, BLOCK_M)
    num_columns = tl.cdiv(V, BLOCK_V)
    for work in range(tl.program_id(0), num_rows * num_columns, tl.num_programs(0)):
        row, column = grouped(work, num_rows, num_columns, GROUP)
        rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column * BLOCK_V + tl.arange(0, BLOCK_V)
        vocab_rows = head_rows(order_ptr, columns, V, HAS_ORDER)
        logits = project(
            hidden,
            head,
            tl.minimum(rows, M - 1).to(tl.int64),
            vocab_rows,
            row * BLOCK_M,
            column * BLOCK_V,
            H,
            hidden_stride,
            head_stride,
            BLOCK_M,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
            EVEN_H,
            CAST,
            PRECISION,
        )
        logits = add_bias(logits, bias_ptr, vocab_rows, HAS_BIAS)
        s, _ = transform_logits(logits, softcap, inv_temperature, HAS_SOFTCAP)
        s = tl.reshape(s, (BLOCK_M, TILES, TILE_SIZE))
        valid = tl.reshape(columns < V, (1, TILES, TILE_SIZE))
        tile = column * TILES + tl.arange(0, TILES)
        tile_min = tl.min(tl.where(valid, s, float("inf")), axis=2)
        s = tl.where(valid, s, MASKED)
        tile_max = tl.max(s, axis=2)
        # In powers of 2, the hardware's own: one vector of registers less than with exp.
        shifted = (s - tile_max[:, :, None]) * LOG2_E
        weight = tl.exp2(shifted)
        total, weighted = sum_both(weight, weight * shifted, 2)

        slots = stats_ptr + rows.to(tl.int64)[:, None] * T + tile[None, :]
        mask = (rows < M)[:, None] & (tile < T)[None, :]
        tl.store(slots, tile_max + tl.log(total), mask=mask)
        tl.store(slots + plane, tile_max, mask=mask)
        tl.store(slots + 2 * plane, tile_min, mask=mask)
        tl.store(slots + 3 * plane, tl.log(total) - weighted * LN_2 / total, mask=mask)


@triton.jit
def sampled_kernel(
    hidden_ptr,  # [M, H]
    head_ptr,  # [V, H]
    bias_ptr,  # [V]
    order_ptr,  # [V] int64
    columns_ptr,  # [M] int64, -1: none
    sampled_ptr,  # [M] out
    V,
    H,
    hidden_stride,
    head_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """h . W of a row's column, one program per row. In the sweep it would cost 60 registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(columns_ptr + row)
    vocab_row = head_rows(order_ptr, tl.maximum(column, 0), V, HAS_ORDER)
    offsets = tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for h in range(0, H, BLOCK_H):
        inside = offsets < H - h
        a = tl.load(hidden_ptr + row * hidden_stride + h + offsets, mask=inside, other=0.0)
        b = tl.load(head_ptr + vocab_row * head_stride + h + offsets, mask=inside, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    logit = tl.sum(acc)
    if HAS_BIAS:
        logit += tl.maximum(tl.load(bias_ptr + vocab_row).to(tl.float32), MASKED)
    s, _ = transform_logits(logit, softcap, inv_temperature, HAS_SOFTCAP)
    tl.store(sampled_ptr + row, tl.where(column >= 0, s, 0.0))


def sweep(
    hidden: Tensor,  # [M, H]
    head: Tensor,  # [V, H]
    transform: LogitTransform,
    order: Tensor | None,  # [V] int64: head row of each position
    columns: Tensor | None,  # [M] int64: positions in that order, -1: none
) -> tuple[Tensor, Tensor | None]:
    """Return (stats, sampled), both float32.

    stats [4, M, T]: lse, max, min and entropy of each row and tile. sampled [M]: the scaled logit
    at `columns` (0 where that is -1), or None.
    """
    hidden, head = rowwise(hidden), rowwise(head)
    stats = _sweep(hidden, head, transform, order)
    if columns is None:
        return stats, None
    return stats, _sampled(hidden, head, transform, order, columns)


def _sweep(hidden: Tensor, head: Tensor, transform: LogitTransform, order: Tensor | None) -> Tensor:
    bias, softcap, temperature = transform
    M, (V, H) = hidden.shape[0], head.shape
    stats = hidden.new_empty(4, M, num_tiles(V), dtype=torch.float32)
    if M == 0:
        return stats
    extras = bias is not None or softcap is not None
    gemm = Gemm.of("sweep", hidden, head, order=order, extras=extras)
    config = gemm.config
    blocks = -(-M // config.block_m) * -(-V // config.block_n)
    launch(
        sweep_kernel,
        (min(blocks, num_programs(hidden.device)),),
        config,
        hidden=gemm.operand(hidden, config.block_m, config.block_k),
        head=gemm.operand(head, config.block_n, config.block_k),
        bias_ptr=bias,
        order_ptr=order,
        stats_ptr=stats,
        M=M,
        V=V,
        H=H,
        hidden_stride=hidden.stride(0),
        head_stride=head.stride(0),
        softcap=softcap or 1.0,
        inv_temperature=1.0 / temperature,
        HAS_BIAS=bias is not None,
        HAS_ORDER=order is not None,
        HAS_SOFTCAP=softcap is not None,
        USE_TMA=gemm.use_tma,
        EVEN_H=H % config.block_k == 0,
        CAST=gemm.cast,
        PRECISION=gemm.precision,
        BLOCK_M=config.block_m,
        BLOCK_V=config.block_n,
        BLOCK_H=config.block_k,
        GROUP=config.group,
    )
    return stats


def _sampled(
    hidden: Tensor,
    head: Tensor,
    transform: LogitTransform,
    order: Tensor | None,
    columns: Tensor,
) -> Tensor:
    bias, softcap, temperature = transform
    sampled = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if hidden.shape[0]:
        sampled_kernel[(hidden.shape[0],)](
            hidden,
            head,
            bias,
            order,
            columns,
            sampled,
            *head.shape,
            hidden.stride(0),
            head.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_ORDER=order is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_H=1024,
            **COMPILER_OPTIONS,
        )
    return sampled
