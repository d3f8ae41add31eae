"""The two elementwise passes over one chunk's logits, and the choice of their implementation.

    row_values   raw logits -> log sum exp, entropy and the sampled token's log-prob of each row
    gradient     raw logits -> G, the gradient of the loss w.r.t. them

With the slopes `a = dloss/dlogprob` and `b = dloss/dentropy` of a row, and y its sampled token,

    G_v = a [v = y] - p_v (a + b (log p_v + entropy))      times the soft cap's slope, / temperature

Triton (gpu/logprob.py) implements them on a GPU, C++ (csrc/) on a CPU, and plain PyTorch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosd_kernels import native
from rosd_kernels.backends import gpu_logprob
from rosd_kernels.elementwise import stats, uses_native
from rosd_kernels.logits import LogitTransform, transform_
from rosd_kernels.logprob.records import Slopes, TokenValues
from rosd_kernels.rows import row_stats
from rosd_kernels.vocabulary import Vocabulary


def is_fused(logits_like: Tensor) -> bool:
    """Whether the passes over such logits need no scratch memory."""
    return gpu_logprob(logits_like, logits_like.dtype) is not None or uses_native(logits_like)


def row_values(
    logits: Tensor,  # [R, V] raw
    transform: LogitTransform,
    columns: Tensor,  # [R] int64, -1: another shard's
    vocabulary: Vocabulary,
) -> TokenValues:
    """The values of whole rows, over all shards; the logits stay as they are."""
    kernels: Any = gpu_logprob(logits, logits.dtype)
    if kernels is not None:
        lse, entropy, sampled = kernels.logprob_stats(logits, transform, columns)
    else:
        found, sampled = stats(logits, transform, columns)
        lse, entropy = found[0], found[3]
    return TokenValues.of(row_stats(lse, entropy, sampled, vocabulary))


def gradient(
    logits: Tensor,  # [R, V] raw; overwritten
    transform: LogitTransform,
    columns: Tensor,  # [R] int64, -1: none of these
    lse: Tensor,  # [R] of whole rows
    factors: Tensor,  # [3, R], see `row_factors`
    *,
    out: Tensor,  # [R, V]: `logits` itself, or narrower memory
) -> None:
    """Write G into `out`; the logits may be some columns of their rows."""
    kernels: Any = gpu_logprob(logits, logits.dtype)
    if kernels is not None:
        kernels.logprob_grad(logits, transform, columns, lse, factors, out=out)
        return
    if uses_native(logits):
        native.logprob_grad_(logits, transform, columns, lse, factors.contiguous())
    else:
        plain_gradient_(logits, transform, columns, lse, factors)
    if out.data_ptr() != logits.data_ptr():
        out.copy_(logits)


def row_factors(values: TokenValues, slopes: Slopes, scale: float) -> Tensor:
    """[3, N] a, b and a + b entropy, times `scale`: all that G reads of a row's loss."""
    a, b = slopes
    return torch.stack([a, b, a + b * values.entropy]).mul_(scale)


def plain_gradient_(
    logits: Tensor, transform: LogitTransform, columns: Tensor, lse: Tensor, factors: Tensor
) -> None:
    """`gradient` in plain PyTorch, in place: any device, any float dtype, more memory."""
    a, b, total = factors[:, :, None]
    transform_(logits, transform)
    slope = transform.slope(logits)
    log_p = logits.sub_(lse[:, None])
    p = log_p.exp()
    log_p.mul_(b).add_(total).mul_(p).neg_()
    index = columns.clamp(min=0)[:, None]
    logits.scatter_(1, index, logits.gather(1, index) + a.masked_fill(columns[:, None] < 0, 0))
    if slope is not None:
        logits.mul_(slope)
