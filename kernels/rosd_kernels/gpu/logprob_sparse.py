"""A chunk of `span_logprob`'s "chunked" with a sparsity in Triton: a `Block` of sparse_block.py.

    statistics, active entries     sparse.py, entries.py, for one side
    lost mass                      `dropped_mass`: scanned tiles, and active entries of the others
    G of the active entries        `write_grad`: [R, C], compacted in place at the head of each row
    dh, dW, db                     gather.py

With log p = s - lse, the slopes a and b of a row's loss w.r.t. log-prob and entropy, and its
sampled token y, which is active in any case, an active entry v has

    G_v = (a [v = y] - p_v (b log p_v + a + b entropy)) slope_v      all times 1 / temperature

with slope_v the soft cap's. What is not active has no gradient; its sums of p and of -p log p give
the bounds of sparse_chunks.py. The kernels have one program per row. Places rise with the entries
they come from, and none is above its entry, so what `write_grad` writes was read before. How many
entries are active stays on the device, so that no call waits for it.

Legend: R rows of a chunk, V vocabulary (of this rank), T tiles of SCAN_TILE entries, B row blocks,
C active entries of a row block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.active import with_other_tiles
from rosd_kernels.autograd import Gradients
from rosd_kernels.gpu.entries import ActiveIndex, load_log_p
from rosd_kernels.gpu.gather import add_gradients
from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.math import round_to
from rosd_kernels.gpu.sparse import Scan
from rosd_kernels.gpu.sparse_rows import BLOCK_C, NUM_WARPS, SCAN_TILES
from rosd_kernels.logits import LogitTransform
from rosd_kernels.logprob.records import TokenValues
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.tiles import SCAN_TILE, num_tiles
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace


class SparseBlock:
    """All elementwise work on a chunk of [R, V] float32 logits, and its gradients."""

    def __init__(
        self,
        logits: Tensor,
        transform: LogitTransform,
        columns: Tensor,
        rule: Sparsity,
        vocabulary: Vocabulary,
    ) -> None:
        self.scan = Scan.of((logits,), (transform,), columns, rule, vocabulary, keeps_sampled=True)
        self.side, self.columns = self.scan.sides[0], columns
        self.values = TokenValues.of(self.side.rows)
        self.num_computed: Tensor | int = self.scan.num_computed

    def lost_mass(self) -> Tensor:
        """See `Block.lost_mass`."""
        logits, transform = self.side.logits, self.side.transform
        scanned = self.scan.scanned
        sums = dropped_mass(logits, transform, self.values.lse, scanned, self.scan.index)
        return with_other_tiles(self.side, scanned, sums)

    def add(
        self,
        gradients: Gradients,
        factors: Tensor,
        hidden: Tensor,
        head: Tensor,
        rows: slice,
        workspace: Workspace,
    ) -> None:
        """See `Block.add`; G is in the dtype of the GEMMs' operands."""
        G = write_grad(
            self.side.logits,
            self.side.transform,
            self.columns,
            self.values.lse,
            factors,
            self.scan.index,
            dtype=workspace.plan.gemm_dtype,
        )
        add_gradients(gradients, G, hidden, head, rows, self.scan.index, workspace)


@triton.jit(do_not_specialize=["R"])
def dropped_mass_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    lse_ptr,  # [R]
    scanned_ptr,  # [R, T] uint8
    marks_ptr,  # [B, V] uint8
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    out_ptr,  # [4, R]
    R,
    V,
    T,
    index_rows,
    logits_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of p and -p log p of what is scanned and not active, then of the opposite."""
    row = tl.program_id(0).to(tl.int64)
    block = row // index_rows
    logits = logits_ptr + row * logits_stride
    lse = tl.load(lse_ptr + row)
    lost_p = tl.zeros((TILES, TILE), tl.float32)
    lost_h = tl.zeros((TILES, TILE), tl.float32)
    for tile in range(0, T, TILES):
        tiles = tile + tl.arange(0, TILES)
        scanned = tl.load(scanned_ptr + row * T + tiles, mask=tiles < T, other=0).to(tl.int32)
        if tl.max(scanned) > 0:
            columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            mask = (scanned != 0)[:, None] & (columns < V)
            marks = tl.load(marks_ptr + block * V + columns, mask=mask, other=1)
            log_p, p, _ = load_log_p(
                logits,
                bias_ptr,
                columns,
                mask & (marks == 0),
                lse,
                softcap,
                inv_temperature,
                HAS_BIAS,
                HAS_SOFTCAP,
            )
            lost_p += p
            lost_h -= p * log_p
    kept_p = tl.zeros((BLOCK_C,), tl.float32)
    kept_h = tl.zeros((BLOCK_C,), tl.float32)
    count = tl.load(counts_ptr + block)
    for first in range(0, count, BLOCK_C):
        places = first + tl.arange(0, BLOCK_C)
        active = places < count
        columns = tl.load(index_ptr + block * V + places, mask=active, other=0)
        scanned = tl.load(scanned_ptr + row * T + columns // TILE, mask=active, other=1)
        log_p, p, _ = load_log_p(
            logits,
            bias_ptr,
            columns,
            active & (scanned == 0),
            lse,
            softcap,
            inv_temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        kept_p += p
        kept_h -= p * log_p
    out = out_ptr + row
    tl.store(out, tl.sum(lost_p))
    tl.store(out + R, tl.sum(lost_h))
    tl.store(out + 2 * R, tl.sum(kept_p))
    tl.store(out + 3 * R, tl.sum(kept_h))


@triton.jit(do_not_specialize=["R"])
def logprob_sparse_grad_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    columns_ptr,  # [R] int64, -1: none
    lse_ptr,  # [R]
    factors_ptr,  # [3, R]: a, b, a + b entropy
    index_ptr,  # [B, V] int32
    counts_ptr,  # [B] int32
    out_ptr,  # [R, V] G, in the memory of the logits
    R,
    V,
    index_rows,
    logits_stride,
    out_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of G, as many columns as its row block has active entries."""
    row = tl.program_id(0).to(tl.int64)
    block = row // index_rows
    lse = tl.load(lse_ptr + row)
    sampled = tl.load(columns_ptr + row)
    of_sampled = tl.load(factors_ptr + row)
    of_entropy = tl.load(factors_ptr + R + row)
    total = tl.load(factors_ptr + 2 * R + row)
    count = tl.load(counts_ptr + block)
    for first in range(0, count, BLOCK_C):
        places = first + tl.arange(0, BLOCK_C)
        active = places < count
        columns = tl.load(index_ptr + block * V + places, mask=active, other=0)
        log_p, p, slope = load_log_p(
            logits_ptr + row * logits_stride,
            bias_ptr,
            columns,
            active,
            lse,
            softcap,
            inv_temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        of_token = tl.where(columns == sampled, of_sampled, 0.0)
        grad = (of_token - p * (of_entropy * log_p + total)) * slope
        tl.debug_barrier()  # other threads have read what is overwritten
        out = out_ptr + row * out_stride + places
        tl.store(out, round_to(grad, out_ptr.dtype.element_ty), mask=active)


def dropped_mass(
    logits: Tensor,  # [R, V] float32, raw
    transform: LogitTransform,
    lse: Tensor,  # [R]
    scanned: Tensor,  # [R, T] bool
    index: ActiveIndex,
) -> Tensor:
    """[4, R] sums of p and of -p log p, over two sets, as `active.dropped_mass`.

    They are the entries of scanned tiles that are not active, then the active ones of other tiles.
    """
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    out = logits.new_empty(4, R)
    if R:
        dropped_mass_kernel[(R,)](
            logits,
            bias,
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
            logits.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            TILES=SCAN_TILES,
            TILE=SCAN_TILE,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return out


def write_grad(
    logits: Tensor,  # [R, V] float32, raw
    transform: LogitTransform,
    columns: Tensor,  # [R] int64 of the sampled tokens, -1: none
    lse: Tensor,  # [R]
    factors: Tensor,  # [3, R] a, b, a + b entropy, each over the temperature
    index: ActiveIndex,
    *,
    dtype: torch.dtype,  # float32 or bfloat16
) -> Tensor:
    """G of the active entries, in the memory of `logits`: [R, V], of which C columns are written.

    Column j is for entry `index.entries[block, j]`.
    """
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    out = logits if dtype == logits.dtype else logits.view(dtype)[:, :V]
    if R:
        logprob_sparse_grad_kernel[(R,)](
            logits,
            bias,
            columns.contiguous(),
            lse.contiguous(),
            factors.contiguous(),
            index.entries,
            index.counts,
            out,
            R,
            V,
            index.rows,
            logits.stride(0),
            out.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_C=BLOCK_C,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return out
