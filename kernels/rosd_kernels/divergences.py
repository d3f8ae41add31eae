"""In-place arithmetic of the divergences: value and gradient w.r.t. logits, for a block of rows.

Let `c_v(p_v, q_v)` be what entry v contributes to the divergence D of a row, `entry_clip`
applied, and `e_v = p_v dc_v/dp_v`, which is 0 where the entry is clipped. With
`dp_v/ds_u = p_v (delta_uv - p_u)` every divergence has the gradient

    dD/ds_u = e_u - p_u K,     K = sum_v e_v,

for single entries and for buckets (top-k and tail) alike. Unclipped, with `m = b q + (1-b) p`:

    divergence   e_v                      dD/ds_v
    forward_kl   -q_v                     p_v - q_v
    reverse_kl   p_v (log(p_v/q_v) + 1)   p_v (log p_v - log q_v - KL(p, q))
    jsd          (1-b) p_v log(p_v/m_v)   (1-b) p_v (log p_v - log m_v - KL(p, m))

A multiple of p may be added to e without changing the gradient, so the `+ 1` is needed only
where entries are clipped. Constant factors are left to `gradient_scale`: they are applied to rows
after the GEMMs, where there are H columns and not V.

Self-distillation lives where teacher and student nearly agree, so values keep their digits there:
`jsd` forms `log(m/p) = log1p(b expm1(r))` from `r = log(q/p)`. In the KLs the rounding of the two
log-normalizers shifts all of r, and the value, by some 1e-7. Adding `sum p - sum q`, which is zero
but for that same shift, takes most of it out (10 to 1000 times less error); in `jsd` it cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels.records import SpanOptions

# exp overflows float32 at 88.7. Where two probabilities differ by a factor of e^80, the smaller one
# is below 1e-34, so bounding the ratio there changes no digit of the result.
MAX_LOG_RATIO = 80.0


class Terms(NamedTuple):
    """Value and gradient, which is `gradient_scale(options) * (e - p * total)`."""

    value: Tensor  # [R] divergence
    e: Tensor  # [R, K]
    total: Tensor  # [R, 1] sum of e


def gradient_scale(options: SpanOptions) -> float:
    """The constant factor that `Terms` leaves out of the gradient."""
    return {"forward_kl": -1.0, "reverse_kl": 1.0, "jsd": options.beta - 1.0}[options.divergence]


def divergence_terms(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> Terms:
    """Terms of [R, K] log-probabilities; `p` and `q` are their exponentials.

    Overwrites `log_p` and `log_q`; `e` lies in one of them or in `q`. `p` and `q` keep their values
    but for what `entry_clip` cuts from `e`.
    """
    divergence = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
    entries, e = divergence[options.divergence](log_p, log_q, p, q, options)
    if options.entry_clip is not None:
        e.masked_fill_(entries > options.entry_clip, 0)
        value = entries.clamp_(max=options.entry_clip).sum(-1)
        return Terms(value, e, e.sum(-1, keepdim=True))
    value = entries.sum(-1)
    if options.divergence == "forward_kl":
        value += torch.sub(p, q, out=log_p).sum(-1)
    elif options.divergence == "reverse_kl":
        value -= torch.sub(p, q, out=log_q).sum(-1)
    # A divergence is never negative; its rounded sum may be.
    return Terms(value.clamp_(min=0), e, e.sum(-1, keepdim=True))


def _forward_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    return log_q.sub_(log_p).mul_(q), q  # log_p is free now


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    entries = log_p.sub_(log_q).mul_(p)  # log_q is free now
    e = entries if options.entry_clip is None else torch.add(entries, p, out=log_q)
    return entries, e


def _jsd(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    beta = options.beta
    log_q_over_p = log_q.sub_(log_p).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_p = torch.expm1(log_q_over_p, out=log_p).mul_(beta).log1p_()
    of_teacher = log_q_over_p.sub_(log_m_over_p).mul_(q)  # q log(q/m)
    e = log_m_over_p.mul_(p)  # -p log(p/m)
    return of_teacher.mul_(beta).sub_(e, alpha=1 - beta), e
