"""Building blocks of the GEMM kernels: projection on a tile of the vocabulary, and its order.

Operands are loaded through tensor descriptors (TMA: the hardware pads out-of-range elements with
zeros) or through pointers, where row indices are clamped instead of masked: the repeated rows are
never written. `order` maps positions of the vocabulary to rows of the head, so the head is never
copied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rosd_kernels.gpu.math import MASKED
from rosd_kernels.gpu.modes import INTERPRET


@triton.jit
def dot(a, b, acc, CAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b with a float32 accumulator; CAST: the operands' dtypes differ, use float32."""
    if CAST or INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped(work, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column) of a work item: GROUP rows in turn read one column, which stays in L2."""
    first = work // (GROUP * num_columns) * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    rest = work % (GROUP * num_columns)
    return first + rest % height, rest // height


@triton.jit
def head_rows(order_ptr, position, V, HAS_ORDER: tl.constexpr):
    """Rows of the head (int64) at positions of the vocabulary, clamped to its last one."""
    position = tl.minimum(position, V - 1)
    if HAS_ORDER:
        return tl.load(order_ptr + position)
    else:
        return position.to(tl.int64)


@triton.jit
def project(
    hidden,  # [N, H] descriptor of [BLOCK_M, BLOCK_H], or pointer
    head,  # [V, H] descriptor of [BLOCK_V, BLOCK_H], or pointer
    rows,  # [BLOCK_M] rows of hidden, clamped; int64
    vocab_rows,  # [BLOCK_V] rows of head; int64
    first_row,
    first_column,
    H,
    hidden_stride,
    head_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_V] logits without bias, float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if USE_TMA:
        for h in range(0, H, BLOCK_H):
            a = hidden.load([first_row, h])
            b = head.load([first_column, h])
            acc = dot(a, b.T, acc, CAST, PRECISION)
    else:
        offsets = tl.arange(0, BLOCK_H)
        a_ptrs = hidden + rows[:, None] * hidden_stride + offsets[None, :]
        b_ptrs = head + vocab_rows[None, :] * head_stride + offsets[:, None]
        for h in range(0, H, BLOCK_H):
            if EVEN_H:
                a = tl.load(a_ptrs)
                b = tl.load(b_ptrs)
            else:
                a = tl.load(a_ptrs, mask=offsets[None, :] < H - h, other=0.0)
                b = tl.load(b_ptrs, mask=offsets[:, None] < H - h, other=0.0)
            acc = dot(a, b, acc, CAST, PRECISION)
            a_ptrs += BLOCK_H
            b_ptrs += BLOCK_H
    return acc


@triton.jit
def add_bias(logits, bias_ptr, vocab_rows, HAS_BIAS: tl.constexpr):
    """logits [BLOCK_M, BLOCK_V] plus the bias of their columns."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + vocab_rows).to(tl.float32)
        logits += tl.maximum(bias, MASKED)[None, :]
    return logits


@triton.jit
def _add_both(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit
def sum_both(a, b, AXIS: tl.constexpr):
    """Sums of a and b along an axis in one pass; two passes would keep `a` and `b` in registers."""
    if INTERPRET:
        return tl.sum(a, axis=AXIS), tl.sum(b, axis=AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_both)
