"""The strategy "tiled" of `span_logprob` on Triton.

    sweep      gpu/sweep.py
    select     gpu/select.py, with one side for both
    gradient   G of a chunk's active tiles (here), then the GEMM kernels of gradient.py

The formulas of G are in logprob/elementwise.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed
from rosd_kernels.gpu.active import active_pairs
from rosd_kernels.gpu.blocks import add_bias, head_rows, project
from rosd_kernels.gpu.chunks import GradientChunks
from rosd_kernels.gpu.launch import Gemm, launch, rowwise
from rosd_kernels.gpu.math import round_to, tanh_each
from rosd_kernels.gpu.select import select
from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.logits import LogitTransform
from rosd_kernels.logprob.records import LogprobInputs, LogprobOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats
from rosd_kernels.tiles import ROW_BLOCK


@triton.jit(do_not_specialize=["N", "first_tile", "num_tiles"])
def logprob_tile_kernel(
    hidden,  # [N, H], descriptor or pointer
    head,  # [V, H], descriptor or pointer
    bias_ptr,  # [V]
    order_ptr,  # [V] int64
    columns_ptr,  # [N] int64: position of the sampled token, -1: none
    lse_ptr,  # [N]
    factors_ptr,  # [3, N]: a, b, a + b entropy
    pairs_ptr,  # [B * num_tiles] int64: row block * num_tiles + tile, the active ones first
    num_pairs_ptr,  # [1] int32
    out_ptr,  # G [N, num_tiles * TILE]
    out_stride,
    N,
    V,
    H,
    first_tile,
    num_tiles,
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
    ROW_BLOCK: tl.constexpr,
):
    """BLOCK_M rows of one active pair of row block and tile; BLOCK_V is a tile.

    The grid covers all pairs, and programs without an active one return.
    """
    PARTS: tl.constexpr = ROW_BLOCK // BLOCK_M
    work = tl.program_id(0)
    if work >= tl.load(num_pairs_ptr) * PARTS:
        return
    pair = tl.load(pairs_ptr + work // PARTS)
    tile = (pair % num_tiles).to(tl.int32)
    first_row = (pair // num_tiles).to(tl.int32) * ROW_BLOCK + work % PARTS * BLOCK_M
    first_column = (first_tile + tile) * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_V)
    inside = rows < N
    vocab_rows = head_rows(order_ptr, columns, V, HAS_ORDER)
    logits = project(
        hidden,
        head,
        tl.minimum(rows, N - 1).to(tl.int64),
        vocab_rows,
        first_row,
        first_column,
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
    scale = inv_temperature
    if HAS_SOFTCAP:
        scale *= softcap
        logits = tanh_each(logits / softcap)
    log_p = logits * scale - tl.load(lse_ptr + rows, mask=inside, other=0.0)[:, None]
    p = tl.where((columns < V)[None, :], tl.exp(log_p), 0.0)
    factors = factors_ptr + rows
    of_sampled = tl.load(factors, mask=inside, other=0.0)[:, None]
    of_entropy = tl.load(factors + N, mask=inside, other=0.0)[:, None]
    total = tl.load(factors + 2 * N, mask=inside, other=0.0)[:, None]
    sampled = tl.load(columns_ptr + rows, mask=inside, other=-1).to(tl.int32)
    grad = tl.where(sampled[:, None] == columns[None, :], of_sampled, 0.0)
    grad -= p * (of_entropy * log_p + total)
    if HAS_SOFTCAP:
        grad *= 1.0 - logits * logits
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride
    out += (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
    tl.store(out, round_to(grad, out_ptr.dtype.element_ty), mask=inside[:, None])


class TritonLogprobTiles:
    """Implements `logprob.tiled.Tiles` with Triton kernels.

    permutation: [V] int64, the head's row of each position of the vocabulary; None: its own order.
    """

    def __init__(
        self, inputs: LogprobInputs, options: LogprobOptions, permutation: Tensor | None
    ) -> None:
        self.hidden, self.head = rowwise(inputs.hidden.detach()), rowwise(inputs.head.detach())
        bias = None if inputs.bias is None else inputs.bias.detach().contiguous()
        self.transform = LogitTransform(bias, options.softcap, options.temperature)
        self.order = permutation
        self.chunks = GradientChunks.of(
            self.hidden, self.head, permutation, workspace_mib=options.workspace_mib
        )
        self.sweep_bytes = 0
        self.workspace_bytes = self.chunks.workspace_bytes

    def sweep(self, columns: Tensor, rows: slice = slice(None)) -> Sweep:
        """Statistics of all tiles; see `logprob.tiled.Tiles`."""
        hidden, columns = self.hidden[rows], columns[rows]
        stats, sampled = sweep(hidden, self.head, self.transform, self.order, columns)
        return Sweep(TileStats(*stats), sampled)

    def select(self, stats: TileStats, lse: Tensor, rule: Sparsity) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile."""
        return select(stats, stats, lse, lse, rule)

    def gradients(
        self, active: Tensor, columns: Tensor, lse: Tensor, factors: Tensor, needed: Needed
    ) -> Gradients:
        """dh [N, H] and db [V] in float32, dW [V, H]: see `GradientChunks`."""
        rows = columns, lse.float().contiguous(), factors.float().contiguous()

        def write(chunk: Tensor, first_tile: int, out: Tensor) -> None:
            if out.shape[0]:
                self.grad_logits(chunk, *rows, first_tile=first_tile, out=out)

        return self.chunks.gradients(active, needed, write)

    def grad_logits(
        self,
        active: Tensor,  # [B, num_tiles] uint8: the chunk's, from first_tile on
        columns: Tensor,  # [N] int64
        lse: Tensor,  # [N] float32
        factors: Tensor,  # [3, N] float32
        *,
        first_tile: int,
        out: Tensor,  # [N, num_tiles * TILE]
    ) -> None:
        """Write G of the chunk's active tiles into `out`, 0 beyond the vocabulary; N >= 1."""
        hidden, head, (bias, softcap, temperature) = self.hidden, self.head, self.transform
        extras = bias is not None or softcap is not None
        gemm = Gemm.of("logprob_tile", hidden, head, order=self.order, extras=extras)
        config = gemm.config
        pairs, num_pairs = active_pairs(active, config.group)
        (N, H), V = hidden.shape, head.shape[0]
        launch(
            logprob_tile_kernel,
            (active.numel() * ROW_BLOCK // config.block_m,),
            config,
            hidden=gemm.operand(hidden, config.block_m, config.block_k),
            head=gemm.operand(head, config.block_n, config.block_k),
            bias_ptr=bias,
            order_ptr=self.order,
            columns_ptr=columns,
            lse_ptr=lse,
            factors_ptr=factors,
            pairs_ptr=pairs,
            num_pairs_ptr=num_pairs,
            out_ptr=out,
            out_stride=out.stride(0),
            N=N,
            V=V,
            H=H,
            first_tile=first_tile,
            num_tiles=active.shape[1],
            hidden_stride=hidden.stride(0),
            head_stride=head.stride(0),
            softcap=softcap or 1.0,
            inv_temperature=1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_ORDER=self.order is not None,
            HAS_SOFTCAP=softcap is not None,
            USE_TMA=gemm.use_tma,
            EVEN_H=H % config.block_k == 0,
            CAST=gemm.cast,
            PRECISION=gemm.precision,
            BLOCK_M=config.block_m,
            BLOCK_V=config.block_n,
            BLOCK_H=config.block_k,
            ROW_BLOCK=ROW_BLOCK,
        )
