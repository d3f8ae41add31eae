"""The gradients of row blocks of which some entries are active: compact.py in Triton.

    dh = a G W[index]        dW[index] += G^T (a h)        db[index] += G^T a

G is compacted, [R, C], see sparse_rows.py. Rows of the head are gathered by pointer, and rows of dW
are read, added to and written by the one program that owns them. The number of active entries is
read from memory: the loop of dh ends there, and programs of dW beyond it return at once. dW takes a
launch per row block, in order; the entries of a launch are unique, so equal calls give equal bits.

Legend: R rows of a chunk, V vocabulary (of this rank), H hidden, B row blocks, C active entries of
a row block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.autograd import Gradients
from rosd_kernels.gpu.blocks import dot
from rosd_kernels.gpu.entries import ActiveIndex
from rosd_kernels.gpu.launch import COMPILER_OPTIONS, Gemm, launch, rowwise
from rosd_kernels.workspace import Workspace

BIAS_ENTRIES = 64  # of a program
BIAS_ROWS = 64


@triton.jit
def gathered_step(
    acc,
    grad,  # [BLOCK_M, 1] pointers to the rows of G
    head,  # [1, BLOCK_N] pointers to the columns of row 0
    index_ptr,  # [C] int32
    k,
    count,
    inside,  # [1, BLOCK_N]
    head_stride,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc + G[:, k : k + BLOCK_K] W[index]; MASKED: C ends within these entries."""
    places = k + tl.arange(0, BLOCK_K)
    if MASKED:
        entries = tl.load(index_ptr + tl.minimum(places, count - 1)).to(tl.int64)
        a = tl.load(grad + places[None, :], mask=(places < count)[None, :], other=0.0)
    else:
        entries = tl.load(index_ptr + places).to(tl.int64)
        a = tl.load(grad + places[None, :])
    b = tl.load(head + entries[:, None] * head_stride, mask=inside, other=0.0)
    return dot(a, b, acc, CAST, PRECISION)


@triton.jit(do_not_specialize=["R"])
def gather_hidden_kernel(
    grad,  # G [R, V], the first C columns
    head,  # [V, H]
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    scale_ptr,  # [R]
    out_ptr,  # dh [R, H] float32, contiguous, written
    R,
    V,
    H,
    index_rows,
    grad_stride,
    head_stride,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_N] of dh; the row blocks of a column run together and share W in L2."""
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_N
    block = (first_row // index_rows).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = (columns < H)[None, :]
    grad_rows = grad + tl.minimum(rows, R - 1).to(tl.int64)[:, None] * grad_stride
    head_columns = head + columns[None, :]
    index = index_ptr + block * V
    count = tl.load(counts_ptr + block)
    whole = count // BLOCK_K * BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, whole, BLOCK_K):
        acc = gathered_step(
            acc,
            grad_rows,
            head_columns,
            index,
            k,
            count,
            inside,
            head_stride,
            CAST,
            PRECISION,
            BLOCK_K,
            False,
        )
    if whole < count:
        acc = gathered_step(
            acc,
            grad_rows,
            head_columns,
            index,
            whole,
            count,
            inside,
            head_stride,
            CAST,
            PRECISION,
            BLOCK_K,
            True,
        )
    acc *= tl.load(scale_ptr + rows, mask=rows < R, other=0.0)[:, None]
    # 32-bit offsets from one 64-bit address: a 64-bit address per entry takes two registers.
    out = out_ptr + first_row.to(tl.int64) * H + first_column
    out += tl.arange(0, BLOCK_M)[:, None] * H + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out, acc, mask=(rows < R)[:, None] & inside)


@triton.jit(do_not_specialize=["R", "block"])
def gather_head_kernel(
    grad,  # G [R, V], the first C columns
    hidden,  # a h [R, H]
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    out_ptr,  # dW [V, H] float32, added to
    R,
    V,
    H,
    index_rows,
    block,
    grad_stride,
    hidden_stride,
    out_stride,
    CAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of the rows of dW of BLOCK_M active entries."""
    first_place = tl.program_id(1) * BLOCK_M
    count = tl.load(counts_ptr + block)
    if first_place >= count:
        return
    places = first_place + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (columns < H)[None, :]
    # Columns of G from C on hold what was there before; they end in rows that are not stored.
    in_memory = (places < V)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_row = block * index_rows
    for k in range(first_row, tl.minimum(first_row + index_rows, R), BLOCK_K):
        rows = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        a_ptrs = grad + rows[None, :] * grad_stride + places[:, None]
        a = tl.load(a_ptrs, mask=(rows < R)[None, :] & in_memory, other=0.0)
        b_ptrs = hidden + rows[:, None] * hidden_stride + columns[None, :]
        b = tl.load(b_ptrs, mask=(rows < R)[:, None] & inside, other=0.0)
        acc = dot(a, b, acc, CAST, PRECISION)
    active = places < count
    index = index_ptr + block.to(tl.int64) * V
    entries = tl.load(index + places, mask=active, other=0).to(tl.int64)
    out = out_ptr + entries[:, None] * out_stride + columns[None, :]
    mask = active[:, None] & inside
    tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit(do_not_specialize=["R", "block"])
def gather_bias_kernel(
    grad_ptr,  # G [R, V], the first C columns
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    scale_ptr,  # [R]
    out_ptr,  # db [V] float32, added to
    R,
    V,
    index_rows,
    block,
    grad_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """db of BLOCK_C active entries."""
    first_place = tl.program_id(0) * BLOCK_C
    count = tl.load(counts_ptr + block)
    if first_place >= count:
        return
    places = first_place + tl.arange(0, BLOCK_C)
    active = places < count
    acc = tl.zeros((BLOCK_C,), tl.float32)
    first_row = block * index_rows
    for r in range(first_row, tl.minimum(first_row + index_rows, R), BLOCK_R):
        rows = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        slots = grad_ptr + rows[:, None] * grad_stride + places[None, :]
        grad = tl.load(slots, mask=(rows < R)[:, None] & active[None, :], other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < R, other=0.0)
        acc += tl.sum(grad.to(tl.float32) * scale[:, None], axis=0)
    entries = tl.load(index_ptr + block.to(tl.int64) * V + places, mask=active, other=0)
    out = out_ptr + entries
    tl.store(out, tl.load(out, mask=active, other=0.0) + acc, mask=active)


def add_gradients(
    gradients: Gradients,
    grad_logits: Tensor,  # [R, V] G, of which the active entries' columns are written
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [V, H]
    rows: slice,  # of gradients.hidden
    index: ActiveIndex,
    workspace: Workspace,
    *,
    row_scale: Tensor | None = None,  # [R] factor of G's rows; None: 1
) -> None:
    """Add a chunk of rows, all of its row blocks."""
    of_hidden, of_head, of_bias = gradients
    if row_scale is None:
        scale = torch.ones(len(hidden), device=hidden.device)
    else:
        scale = row_scale.contiguous()
    if of_hidden is not None:
        gather_hidden(grad_logits, head, index, scale, out=of_hidden[rows])
    if of_head is not None:
        scaled = hidden if row_scale is None else hidden.to(scale.dtype) * scale[:, None]
        scaled = workspace.operand(scaled)
        gather_head(grad_logits, scaled, index, out=of_head)
    if of_bias is not None:
        gather_bias(grad_logits, index, scale, out=of_bias)


def gather_hidden(
    grad: Tensor,  # G [R, V]
    head: Tensor,  # [V, H]
    index: ActiveIndex,
    scale: Tensor,  # [R] float32
    *,
    out: Tensor,  # [R, H] float32, contiguous
) -> None:
    """Write `scale G W[index]`."""
    (R, V), H = grad.shape, head.shape[1]
    if R == 0:
        return
    assert out.is_contiguous() and out.dtype == torch.float32
    head = rowwise(head)
    gemm = Gemm.of("gather_hidden", grad, head, order=index.entries)
    config = gemm.config
    launch(
        gather_hidden_kernel,
        (-(-R // config.block_m), -(-H // config.block_n)),
        config,
        grad=grad,
        head=head,
        index_ptr=index.entries,
        counts_ptr=index.counts,
        scale_ptr=scale,
        out_ptr=out,
        R=R,
        V=V,
        H=H,
        index_rows=index.rows,
        grad_stride=grad.stride(0),
        head_stride=head.stride(0),
        CAST=gemm.cast,
        PRECISION=gemm.precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


def gather_head(
    grad: Tensor,  # G [R, V]
    hidden: Tensor,  # [R, H], G's rows' factors included
    index: ActiveIndex,
    *,
    out: Tensor,  # [V, H] float32
) -> None:
    """Add `G^T hidden` to the rows `index` of `out`, one row block after the other."""
    (R, V), H = grad.shape, hidden.shape[1]
    assert out.stride(1) == 1 and out.dtype == torch.float32
    hidden = rowwise(hidden)
    gemm = Gemm.of("gather_head", grad, hidden, order=index.entries)
    config = gemm.config
    for block in range(index.counts.shape[0]):
        launch(
            gather_head_kernel,
            (-(-H // config.block_n), -(-V // config.block_m)),
            config,
            grad=grad,
            hidden=hidden,
            index_ptr=index.entries,
            counts_ptr=index.counts,
            out_ptr=out,
            R=R,
            V=V,
            H=H,
            index_rows=index.rows,
            block=block,
            grad_stride=grad.stride(0),
            hidden_stride=hidden.stride(0),
            out_stride=out.stride(0),
            CAST=gemm.cast,
            PRECISION=gemm.precision,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
        )


def gather_bias(
    grad: Tensor,  # G [R, V]
    index: ActiveIndex,
    scale: Tensor,  # [R] float32
    *,
    out: Tensor,  # [V] float32
) -> None:
    """Add `G^T scale` to the entries `index` of `out`, one row block after the other."""
    R, V = grad.shape
    for block in range(index.counts.shape[0]):
        gather_bias_kernel[(-(-V // BIAS_ENTRIES),)](
            grad,
            index.entries,
            index.counts,
            scale,
            out,
            R,
            V,
            index.rows,
            block,
            grad.stride(0),
            BLOCK_C=BIAS_ENTRIES,
            BLOCK_R=BIAS_ROWS,
            **COMPILER_OPTIONS,
        )
