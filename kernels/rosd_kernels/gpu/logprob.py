"""The elementwise passes of `span_logprob` over a chunk of logits.

    stats   one program per row: log sum exp, entropy, the sampled token's scaled logit
    grad    one program per row and BLOCK_V columns: G, in place or into narrower memory

A row's loss is known in between, see logprob/elementwise.py, which has the formulas as well.

Legend: R rows, V vocabulary (of this rank).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.math import round_to
from rosd_kernels.gpu.rows import BLOCK_V, NUM_WARPS, load_logits, sampled_logit, stats_of_row
from rosd_kernels.logits import LogitTransform


@triton.jit(do_not_specialize=["R"])
def logprob_stats_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    columns_ptr,  # [R] int64, -1: none
    out_ptr,  # [3, R]: lse, entropy, sampled
    R,
    V,
    logits_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Statistics of one row."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_stride
    lse, entropy = stats_of_row(
        logits, bias_ptr, V, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP, BLOCK_V
    )
    column = tl.load(columns_ptr + row)
    sampled = sampled_logit(
        logits, bias_ptr, column, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(out_ptr + row, lse)
    tl.store(out_ptr + R + row, entropy)
    tl.store(out_ptr + 2 * R + row, sampled)


@triton.jit(do_not_specialize=["R"])
def logprob_grad_kernel(
    logits_ptr,  # [R, V] raw
    bias_ptr,  # [V]
    columns_ptr,  # [R] int64, -1: none
    lse_ptr,  # [R]
    factors_ptr,  # [3, R]: a, b, a + b entropy
    out_ptr,  # [R, V] G; may be the logits
    R,
    V,
    logits_stride,
    out_stride,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V columns of one row of G."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    s, slope = load_logits(
        logits_ptr + row * logits_stride,
        bias_ptr,
        columns,
        V,
        softcap,
        inv_temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    log_p = s - tl.load(lse_ptr + row)
    of_sampled = tl.load(factors_ptr + row)
    of_entropy = tl.load(factors_ptr + R + row)
    total = tl.load(factors_ptr + 2 * R + row)
    sampled = tl.where(columns == tl.load(columns_ptr + row), of_sampled, 0.0)
    grad = (sampled - tl.exp(log_p) * (of_entropy * log_p + total)) * slope
    out = out_ptr + row * out_stride + columns
    tl.store(out, round_to(grad, out_ptr.dtype.element_ty), mask=columns < V)


def logprob_stats(
    logits: Tensor,  # [R, V] float32, elements of a row side by side
    transform: LogitTransform,
    columns: Tensor,  # [R] int64, -1: none
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ([R, 1] lse, [R, 1] entropy, [R] scaled logit at `columns`, 0 where that is -1)."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    out = logits.new_empty(3, R)
    if R:
        logprob_stats_kernel[(R,)](
            logits,
            bias,
            columns,
            out,
            R,
            V,
            logits.stride(0),
            softcap or 1.0,
            1.0 / temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            **COMPILER_OPTIONS,
        )
    return out[0, :, None], out[1, :, None], out[2]


def logprob_grad(
    logits: Tensor,  # [R, V] float32, elements of a row side by side
    transform: LogitTransform,
    columns: Tensor,  # [R] int64, -1: none
    lse: Tensor,  # [R]
    factors: Tensor,  # [3, R]
    *,
    out: Tensor,  # [R, V]
) -> None:
    """Write G into `out`: the logits themselves, or memory of any float dtype."""
    assert logits.dtype == torch.float32 and logits.stride(1) == out.stride(1) == 1
    (R, V), (bias, softcap, temperature) = logits.shape, transform
    if R == 0:
        return
    logprob_grad_kernel[(R, triton.cdiv(V, BLOCK_V))](
        logits,
        bias,
        columns,
        lse.contiguous(),
        factors.contiguous(),
        out,
        R,
        V,
        logits.stride(0),
        out.stride(0),
        softcap or 1.0,
        1.0 / temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_V=BLOCK_V,
        num_warps=NUM_WARPS,
        **COMPILER_OPTIONS,
    )
