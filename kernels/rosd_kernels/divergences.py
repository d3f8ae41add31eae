"""In-place arithmetic of the divergences in plain PyTorch: what each entry contributes.

Let `c_v(p_v, q_v)` be what entry v contributes to the divergence D of a row, `entry_clip` applied,
and `e_v = p_v dc_v/dp_v`, which is 0 where the entry is clipped. With
`dp_v/ds_u = p_v (delta_uv - p_u)` every divergence has the gradient

    G_u = dD/ds_u = e_u - p_u K,     K = sum_v e_v,

for single entries and for buckets (top-k and tail). Unclipped, with `m = b q + (1-b) p`:

    divergence   c_v                               e_v                dD/ds_v
    forward_kl   q log(q/p) + p - q                -q                 p - q
    reverse_kl   p log(p/q) - p + q                p log(p/q)         p (log(p/q) - KL(p, q))
    jsd          b q log(q/m) + (1-b) p log(p/m)   (1-b) p log(p/m)   (1-b) p (log(p/m) - KL(p, m))

Three choices keep digits where teacher and student nearly agree, the usual case in
self-distillation. `p - q` sums to zero over the vocabulary, except for the rounding of the two
normalizers, and it cancels the error that this rounding causes in `q log(q/p)`; it also makes every
entry >= 0. `jsd` forms `log(m/p) = log1p(b expm1(r))` from `r = log(q/p)`, or for b > 1/2, where
that would subtract near 1, `log(m/q) = log1p((1-b) expm1(-r))`. And K of forward_kl is -1, not a
rounded sum.

With `entry_clip` forward_kl is bounded as published, without `p - q`, so a row's value may be
negative; in the other two each bounded entry is >= 0, and so is the row's value. (A multiple of p
may be added to e without changing G only if it is added to all entries, clipped ones too.)

An entry with `p = q = 0`, masked by a bias of -inf on both sides, contributes nothing: its r is 0.

The same formulas are in C++ (csrc/terms.h) and in Triton (gpu/math.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.records import SpanOptions

# exp overflows float32 at 88.7. Where two probabilities differ by a factor of e^80, the smaller one
# is below 1e-34, so bounding the ratio there changes no digit of the result.
MAX_LOG_RATIO = 80.0


def known_total(options: SpanOptions) -> float | None:
    """Return K where it is the same for every row, None where it has to be summed."""
    is_known = options.divergence == "forward_kl" and options.entry_clip is None
    return -1.0 if is_known else None


def is_never_negative(options: SpanOptions) -> bool:
    """Whether every entry's contribution is >= 0, bounded or not."""
    return options.entry_clip is None or options.divergence != "forward_kl"


def entry_terms(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    """Return (c, e), [R, K] each, for log-probabilities whose exponentials are `p` and `q`.

    The results overwrite the memory of `log_p` and `log_q`; `p` and `q` are kept.
    """
    divergence = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
    c, e = divergence[options.divergence](log_p, log_q, p, q, options)
    if options.entry_clip is not None:
        e.masked_fill_(c > options.entry_clip, 0)
        c.clamp_(max=options.entry_clip)
    return c, e


def row_value(c: Tensor, options: SpanOptions) -> Tensor:
    """[R] sum of [R, K] contributions, without the negative values that only rounding causes."""
    value = c.sum(-1)
    return value.clamp_(min=0) if is_never_negative(options) else value


def _forward_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    c = _log_ratio(log_q, log_p).mul_(q)
    if options.entry_clip is None:
        c.add_(p).sub_(q)
    return c, torch.neg(q, out=log_p)


def _reverse_kl(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    c = _log_ratio(log_p, log_q).mul_(p)
    e = log_q.copy_(c)
    return c.sub_(p).add_(q), e


def _jsd(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor]:
    beta = options.beta
    if beta > 0.5:
        return _jsd_of_teacher(log_p, log_q, p, q, 1 - beta)
    log_q_over_p = _log_ratio(log_q, log_p).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_p = torch.expm1(log_q_over_p, out=log_p).mul_(beta).log1p_()
    of_teacher = log_q_over_p.sub_(log_m_over_p).mul_(q).mul_(beta)  # b q log(q/m)
    e = log_m_over_p.mul_(p).mul_(beta - 1)  # (1-b) p log(p/m)
    return of_teacher.add_(e), e


def _jsd_of_teacher(
    log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """`_jsd` with the teacher as the base; share: 1 - b, below 1/2."""
    log_p_over_q = _log_ratio(log_p, log_q).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_m_over_q = torch.expm1(log_p_over_q, out=log_q).mul_(share).log1p_()
    e = log_p_over_q.sub_(log_m_over_q).mul_(p).mul_(share)  # (1-b) p log(p/m)
    return log_m_over_q.mul_(q).mul_(share - 1).add_(e), e


def _log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """`log_a - log_b` in the memory of `log_a`; 0 where both are -inf."""
    equal = log_a == log_b
    return log_a.sub_(log_b).masked_fill_(equal, 0)
