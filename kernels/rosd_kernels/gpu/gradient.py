"""Gradients over the active tiles of a chunk of the vocabulary.

    G_nv  = row_scale_n (e_nv - p_nv K_n) (1 - tanh^2)     w.r.t. the raw logits, N x chunk
    dh   += G W        dW = G^T h        db = sum_n G      over active pairs of row block and tile

Since K is known, each chunk of dW and db is complete after one visit: it is summed in float32
registers and rounded once. Only dh is accumulated from chunk to chunk, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.active import active_per_row
from rosd_kernels.gpu.blocks import dot, head_rows
from rosd_kernels.gpu.launch import COMPILER_OPTIONS, Gemm, launch
from rosd_kernels.gpu.math import round_to
from rosd_kernels.gpu.pair import Pair
from rosd_kernels.tiles import ROW_BLOCK, TILE


@triton.jit(do_not_specialize=["N", "first_tile", "num_tiles"])
def grad_hidden_kernel(
    grad,  # G [N, num_tiles * TILE], descriptor of [BLOCK_M, BLOCK_K] or pointer
    head,  # [V, H], descriptor of [BLOCK_K, BLOCK_N] or pointer
    order_ptr,  # [V] int64
    tiles_ptr,  # [B, num_tiles] int64: active tiles first
    counts_ptr,  # [B] int32
    out_ptr,  # [N, H] float32, contiguous, added to
    N,
    V,
    H,
    first_tile,
    num_tiles,
    grad_stride,
    head_stride,
    HAS_ORDER: tl.constexpr,
    USE_TMA: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] of dh, summed over the active tiles of its row block."""
    STEPS: tl.constexpr = TILE // BLOCK_K
    first_row = tl.program_id(1) * BLOCK_M
    first_column = tl.program_id(0) * BLOCK_N
    row_block = (first_row // ROW_BLOCK).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    grad_rows = tl.minimum(rows, N - 1).to(tl.int64)[:, None] * grad_stride
    inside = (columns < H)[None, :]
    mask = (rows < N)[:, None] & inside
    # 32-bit offsets from one 64-bit address: a 64-bit address per entry takes two registers.
    out = out_ptr + first_row.to(tl.int64) * H + first_column
    out += tl.arange(0, BLOCK_M)[:, None] * H + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.load(out, mask=mask, other=0.0)
    for step in range(tl.load(counts_ptr + row_block) * STEPS):
        tile = tl.load(tiles_ptr + row_block * num_tiles + step // STEPS).to(tl.int32)
        k = tile * TILE + step % STEPS * BLOCK_K
        if USE_TMA:
            a = grad.load([first_row, k])
            b = head.load([first_tile * TILE + k, first_column])
        else:
            offsets = k + tl.arange(0, BLOCK_K)
            vocab_rows = head_rows(order_ptr, first_tile * TILE + offsets, V, HAS_ORDER)
            a = tl.load(grad + grad_rows + offsets[None, :])
            b_ptrs = head + vocab_rows[:, None] * head_stride + columns[None, :]
            b = tl.load(b_ptrs, mask=inside, other=0.0)
        acc = dot(a, b, acc, CAST, PRECISION)
    tl.store(out, acc, mask=mask)


@triton.jit(do_not_specialize=["N", "first_tile", "num_tiles", "num_row_blocks"])
def grad_head_kernel(
    grad,  # G [N, num_tiles * TILE], descriptor of [BLOCK_K, BLOCK_M] or pointer
    hidden,  # [N, H], descriptor of [BLOCK_K, BLOCK_N] or pointer
    order_ptr,  # [V] int64
    row_blocks_ptr,  # [num_tiles, B] int64: active row blocks first
    counts_ptr,  # [num_tiles] int32
    out_ptr,  # [V, H], written
    N,
    V,
    H,
    first_tile,
    num_tiles,
    num_row_blocks,
    grad_stride,
    hidden_stride,
    out_stride,
    HAS_ORDER: tl.constexpr,
    USE_TMA: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One [BLOCK_M vocabulary, BLOCK_N] of dW, summed over the active row blocks of its tile."""
    STEPS: tl.constexpr = ROW_BLOCK // BLOCK_K
    position = tl.program_id(1) * BLOCK_M  # within the chunk
    first_column = tl.program_id(0) * BLOCK_N
    tile = (position // TILE).to(tl.int64)
    positions = position + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (columns < H)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.load(counts_ptr + tile) * STEPS):
        row_block = tl.load(row_blocks_ptr + tile * num_row_blocks + step // STEPS).to(tl.int32)
        k = row_block * ROW_BLOCK + step % STEPS * BLOCK_K
        if USE_TMA:
            a = grad.load([k, position]).T
            b = hidden.load([k, first_column])
        else:
            rows = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            a_ptrs = grad + rows[None, :] * grad_stride + positions[:, None]
            a = tl.load(a_ptrs, mask=(rows < N)[None, :], other=0.0)
            b_ptrs = hidden + rows[:, None] * hidden_stride + columns[None, :]
            b = tl.load(b_ptrs, mask=(rows < N)[:, None] & inside, other=0.0)
        acc = dot(a, b, acc, CAST, PRECISION)
    vocabulary = first_tile * TILE + positions
    vocab_rows = head_rows(order_ptr, vocabulary, V, HAS_ORDER)
    out = out_ptr + vocab_rows[:, None] * out_stride + columns[None, :]
    mask = (vocabulary < V)[:, None] & inside
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "first_tile", "num_row_blocks"])
def grad_bias_kernel(
    grad_ptr,  # G [N, num_tiles * TILE]
    order_ptr,  # [V] int64
    row_blocks_ptr,  # [num_tiles, B] int64: active row blocks first
    counts_ptr,  # [num_tiles] int32
    out_ptr,  # [V] float32, written
    N,
    V,
    first_tile,
    num_row_blocks,
    grad_stride,
    HAS_ORDER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """BLOCK_V entries of db, summed over the active row blocks of their tile."""
    position = tl.program_id(0) * BLOCK_V
    tile = (position // TILE).to(tl.int64)
    positions = position + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for i in range(tl.load(counts_ptr + tile)):
        row_block = tl.load(row_blocks_ptr + tile * num_row_blocks + i)
        rows = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
        slots = grad_ptr + rows[:, None] * grad_stride + positions[None, :]
        grad = tl.load(slots, mask=(rows < N)[:, None], other=0.0)
        acc += tl.sum(grad.to(tl.float32), axis=0)
    vocabulary = first_tile * TILE + positions
    vocab_rows = head_rows(order_ptr, vocabulary, V, HAS_ORDER)
    tl.store(out_ptr + vocab_rows, acc, mask=vocabulary < V)


def grad_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The dtype of G: bfloat16 where hidden states and head are, otherwise float32."""
    both = hidden.dtype == head.dtype == torch.bfloat16
    return torch.bfloat16 if both else torch.float32


def grad_logits(
    pair: Pair,
    student_lse: Tensor,  # [N]
    teacher_lse: Tensor,  # [N]
    active: Tensor,  # [B, num_tiles] uint8: the chunk's, from first_tile on
    total: Tensor,  # [N]
    row_scale: Tensor,  # [N]
    *,
    first_tile: int,
    out: Tensor,  # [N, num_tiles * TILE] in grad_dtype
) -> None:
    """Write G of the chunk's active tiles into `out`, 0 beyond the vocabulary."""
    if pair.student_hidden.shape[0] == 0:
        return
    pair.launch(
        active,
        student_lse,
        teacher_lse,
        first_tile=first_tile,
        out=out,
        total=total.float().contiguous(),
        row_scale=row_scale.float().contiguous(),
    )


def grad_hidden(
    grad: Tensor,  # G [N, num_tiles * TILE]
    head: Tensor,  # [V, H], elements of a row side by side
    order: Tensor | None,  # [V] int64
    active: Tensor,  # [B, num_tiles] uint8: the chunk's, from first_tile on
    *,
    first_tile: int,
    out: Tensor,  # [N, H] float32
) -> None:
    """Add G W of the chunk's active tiles to `out`."""
    N, (V, H) = grad.shape[0], head.shape
    if N == 0:
        return
    gemm = Gemm.of("grad_hidden", grad, head, order=order)
    config = gemm.config
    tiles, counts = active_per_row(active)
    launch(
        grad_hidden_kernel,
        (-(-H // config.block_n), -(-N // config.block_m)),
        config,
        grad=gemm.operand(grad, config.block_m, config.block_k),
        head=gemm.operand(head, config.block_k, config.block_n),
        order_ptr=order,
        tiles_ptr=tiles,
        counts_ptr=counts,
        out_ptr=out,
        N=N,
        V=V,
        H=H,
        first_tile=first_tile,
        num_tiles=active.shape[1],
        grad_stride=grad.stride(0),
        head_stride=head.stride(0),
        HAS_ORDER=order is not None,
        USE_TMA=gemm.use_tma,
        CAST=gemm.cast,
        PRECISION=gemm.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ROW_BLOCK=ROW_BLOCK,
        TILE=TILE,
    )


def grad_head(
    grad: Tensor,  # G [N, num_tiles * TILE]
    hidden: Tensor,  # [N, H], elements of a row side by side
    order: Tensor | None,  # [V] int64
    active: Tensor,  # [B, num_tiles] uint8: the chunk's, from first_tile on
    *,
    first_tile: int,
    out: Tensor | None,  # dW [V, H] in the head's dtype
    out_bias: Tensor | None,  # db [V] float32
    vocab_size: int,
) -> None:
    """Write the chunk's rows of dW and db, zeros for tiles that no row block computes."""
    N, H = hidden.shape
    row_blocks, counts = active_per_row(active.T)
    num_row_blocks, num_tiles = active.shape
    if out is not None:
        # dW is scattered row by row in any case: with an `order` TMA still loads G and h.
        gemm = Gemm.of("grad_head", grad, hidden, order=None)
        config = gemm.config
        launch(
            grad_head_kernel,
            (-(-H // config.block_n), num_tiles * TILE // config.block_m),
            config,
            grad=gemm.operand(grad, config.block_k, config.block_m),
            hidden=gemm.operand(hidden, config.block_k, config.block_n),
            order_ptr=order,
            row_blocks_ptr=row_blocks,
            counts_ptr=counts,
            out_ptr=out,
            N=N,
            V=vocab_size,
            H=H,
            first_tile=first_tile,
            num_tiles=num_tiles,
            num_row_blocks=num_row_blocks,
            grad_stride=grad.stride(0),
            hidden_stride=hidden.stride(0),
            out_stride=out.stride(0),
            HAS_ORDER=order is not None,
            USE_TMA=gemm.use_tma,
            CAST=gemm.cast,
            PRECISION=gemm.precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            ROW_BLOCK=ROW_BLOCK,
            TILE=TILE,
        )
    if out_bias is not None:
        block = 64
        grad_bias_kernel[(num_tiles * TILE // block,)](
            grad,
            order,
            row_blocks,
            counts,
            out_bias,
            N,
            vocab_size,
            first_tile,
            num_row_blocks,
            grad.stride(0),
            HAS_ORDER=order is not None,
            BLOCK_V=block,
            ROW_BLOCK=ROW_BLOCK,
            TILE=TILE,
            **COMPILER_OPTIONS,
        )
