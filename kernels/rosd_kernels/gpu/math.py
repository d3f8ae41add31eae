"""Elementwise arithmetic of the kernels, accurate where the hardware's approximations are not.

Triton has no tanh, expm1 and log1p that also run in its interpreter, and the hardware's logarithm
has an absolute error of 2^-22, which leaves no digits near 1. All functions here keep a relative
error of a few 2^-24.

`entry_terms` returns what one vocabulary entry contributes to the divergence (`value`, >= 0 except
for clipped KLs) and to the gradient (`e`, constant factors included), with r = log q - log p:

    forward_kl   value = q r + p - q                               e = -q
    reverse_kl   value = -p r - p + q                              e = -p r
    jsd          value = b q log(q/m) + (1-b) p log(p/m)           e = (1-b) p log(p/m)

    m = b q + (1-b) p;  gradient of the row w.r.t. its logits: e - p K,  K = sum of e

`p - q` sums to zero, so it changes only the rounding: each entry's value is then a Bregman
divergence, of second order in r, and so is the effect of errors in the log-normalizers. For jsd
that holds without it. With `clip` forward_kl omits it, and an entry above `clip` has the value
`clip` and e = 0. A bias of -inf reads as MASKED, so r is 0 where both sides are masked.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from rosd_kernels import divergences
from rosd_kernels.gpu.modes import INTERPRET
from rosd_kernels.records import SpanOptions

SKEWED = 0.1  # a JSD whose beta is within this of 0 or 1 takes the formulas for any beta
LN_2 = tl.constexpr(math.log(2))
MAX_LOG_RATIO = tl.constexpr(divergences.MAX_LOG_RATIO)
MASKED = tl.constexpr(-1e30)  # its exp is 0, and 0 * MASKED is 0, unlike 0 * -inf


def formula(options: SpanOptions) -> str:
    """The kernels' constexpr DIVERGENCE."""
    if options.divergence == "jsd" and min(options.beta, 1 - options.beta) < SKEWED:
        return "skewed_jsd"
    return options.divergence


@triton.jit
def expm1(x):
    """exp(x) - 1; Taylor up to x^9 below 0.5."""
    series = 1.0 / 40320 + x * (1.0 / 362880)
    series = 1.0 / 5040 + x * series
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    series = x + x * x * (0.5 + x * series)
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x), from expm1(2 |x|)."""
    z = expm1(tl.minimum(2.0 * tl.abs(x), 40.0))
    y = z / (z + 2.0)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def atanh_rest(t):
    """atanh(t) - t for |t| <= 0.2."""
    w = t * t
    series = 1.0 / 9 + w * (1.0 / 11)
    series = 1.0 / 7 + w * series
    series = 1.0 / 5 + w * series
    series = 1.0 / 3 + w * series
    return t * w * series


@triton.jit
def bregman_exp(r):
    """exp(r) - 1 - r for |r| < 0.5, by Taylor."""
    series = 1.0 / 40320 + r * (1.0 / 362880)
    series = 1.0 / 5040 + r * series
    series = 1.0 / 720 + r * series
    series = 1.0 / 120 + r * series
    series = 1.0 / 24 + r * series
    series = 1.0 / 6 + r * series
    return r * r * (0.5 + r * series)


@triton.jit
def bregman_gamma(r):
    """1 - (1 - r) exp(r) for |r| < 0.5, by Taylor: the sum of (n-1)/n! r^n from n = 2."""
    series = 7.0 / 40320 + r * (8.0 / 362880)
    series = 6.0 / 5040 + r * series
    series = 5.0 / 720 + r * series
    series = 4.0 / 120 + r * series
    series = 3.0 / 24 + r * series
    series = 2.0 / 6 + r * series
    return r * r * (0.5 + r * series)


@triton.jit
def transform_logits(logits, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """(scaled logits, their derivative w.r.t. the raw ones times temperature)."""
    if HAS_SOFTCAP:
        bounded = tanh(logits / softcap)
        return bounded * (softcap * inv_temperature), 1.0 - bounded * bounded
    else:
        return logits * inv_temperature, 1.0


@triton.jit
def log1p(y):
    """(log(1 + y), (1 + y) log(1 + y) - y) for y > -1.

    With 1 + y = 2^k (1 + a), 1 + a from 2/3 to 4/3: log(1 + y) = k log 2 + 2 atanh(a / (2 + a)).
    There is no branch, unlike in CUDA's library: a branch per entry spills a block's other entries.
    """
    z = 1.0 + y
    bits = z.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000
    near = exponent == 0
    a = tl.where(near, y, (bits - exponent).to(tl.float32, bitcast=True) - 1.0)
    t = a / (2.0 + a)
    rest = 2.0 * atanh_rest(t)
    log = exponent.to(tl.float32) * (LN_2 / 0x800000) + (2.0 * t + rest)
    return log, tl.where(near, y * t + z * rest, z * log - y)


@triton.jit
def jsd_terms(r, p, q, beta):
    """Value and e of jsd.

    The base is p, or q where it is e^2 times more likely, so that no exponential overflows. With
    r the log ratio of the other side to the base, c the weight of the other side and
    x = exp(r) - 1: log(m / base) = log1p(c x), and with F(y) = (1 + y) log1p(y) - y

        value = base (c F(x) - F(c x)).
    """
    of_teacher = r > 2.0
    base = tl.where(of_teacher, q, p)
    c = tl.where(of_teacher, 1.0 - beta, beta)
    r = tl.where(of_teacher, -r, r)
    x = expm1(r)
    log_m_over_base, f_of_m = log1p(c * x)
    f = tl.where(tl.abs(r) < 0.5, bregman_gamma(r), (1.0 + x) * r - x)
    log_m_over_p = tl.where(of_teacher, log_m_over_base - r, log_m_over_base)
    return base * tl.maximum(c * f - f_of_m, 0.0), (beta - 1.0) * p * log_m_over_p


@triton.jit
def skewed_jsd_terms(r, p, q, beta, rest):
    """`jsd_terms` for a beta near 0 or 1; rest: 1 - beta, rounded once.

    `jsd_terms` would subtract near 1. Here the base is the side whose weight in m is near 1, and
    log(m / base) = log1p(c x) has c < SKEWED. Where the sides differ much,

        value = c other (r - log(m / base)) - (1 - c) base log(m / base).
    """
    swap = beta > rest
    base, other = tl.where(swap, q, p), tl.where(swap, p, q)
    c, of_base = tl.minimum(beta, rest), tl.maximum(beta, rest)
    r = tl.minimum(tl.maximum(tl.where(swap, -r, r), -MAX_LOG_RATIO), MAX_LOG_RATIO)
    x = expm1(r)
    log_m_over_base, f_of_m = log1p(c * x)
    f = tl.where(tl.abs(r) < 0.5, bregman_gamma(r), (1.0 + x) * r - x)
    near = base * (c * f - f_of_m)
    far = c * other * (r - log_m_over_base) - of_base * base * log_m_over_base
    value = tl.maximum(tl.where(tl.abs(r) < 2.0, near, far), 0.0)
    log_p_over_m = tl.where(swap, r - log_m_over_base, -log_m_over_base)
    return value, rest * p * log_p_over_m


@triton.jit
def entry_terms(
    log_p, log_q, p, q, beta, rest, clip, DIVERGENCE: tl.constexpr, HAS_CLIP: tl.constexpr
):
    """(value, e) of the module's docstring; both are 0 for padding, where p = q = 0."""
    r = log_q - log_p
    if DIVERGENCE == "forward_kl":
        e = -q
        value = q * r
        if not HAS_CLIP:
            value = tl.where(tl.abs(r) < 0.5, q * bregman_exp(-r), value + (p - q))
    elif DIVERGENCE == "reverse_kl":
        e = -p * r
        value = tl.where(tl.abs(r) < 0.5, p * bregman_exp(r), e + (q - p))
    elif DIVERGENCE == "skewed_jsd":
        value, e = skewed_jsd_terms(r, p, q, beta, rest)
    else:
        value, e = jsd_terms(r, p, q, beta)
    if HAS_CLIP:
        e = tl.where(value > clip, 0.0, e)
        value = tl.minimum(value, clip)
    return value, e


@triton.jit
def compiler_fence(x):
    """x, behind which the compiler moves no computation that depends on it."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def pair_entry(
    student,
    teacher,
    student_lse,
    teacher_lse,
    total,
    valid,
    scale,
    beta,
    rest,
    clip,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """(value, e - p total) from both sides' logits, still to be multiplied by `scale`."""
    if not INTERPRET:
        student = compiler_fence(student)
    log_p = student * scale - student_lse
    log_q = teacher * scale - teacher_lse
    p = tl.where(valid, tl.exp(log_p), 0.0)
    q = tl.where(valid, tl.exp(log_q), 0.0)
    value, e = entry_terms(log_p, log_q, p, q, beta, rest, clip, DIVERGENCE, HAS_CLIP)
    e -= p * total
    if not INTERPRET:
        value, e = compiler_fence(value), compiler_fence(e)
    return value, e


# map_elementwise passes no constexprs, hence one function for each of their combinations.
@triton.jit
def forward_kl_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(
        s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "forward_kl", False
    )


@triton.jit
def forward_kl_entry_clipped(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "forward_kl", True)


@triton.jit
def reverse_kl_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(
        s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "reverse_kl", False
    )


@triton.jit
def reverse_kl_entry_clipped(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "reverse_kl", True)


@triton.jit
def jsd_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "jsd", False)


@triton.jit
def jsd_entry_clipped(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "jsd", True)


@triton.jit
def skewed_jsd_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(
        s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "skewed_jsd", False
    )


@triton.jit
def skewed_jsd_entry_clipped(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip):
    return pair_entry(s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, "skewed_jsd", True)


@triton.jit
def pair_entries(
    s,
    t,
    lse_s,
    lse_t,
    total,
    valid,
    scale,
    beta,
    rest,
    clip,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
):
    """`pair_entry` on blocks, one entry at a time.

    A formula on whole blocks keeps a register per entry for each of its steps, and a thread holds
    64 entries per side: more than it has registers for. The interpreter, which has no registers and
    no map_elementwise, evaluates whole blocks.
    """
    if INTERPRET:
        return pair_entry(
            s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip, DIVERGENCE, HAS_CLIP
        )
    elif DIVERGENCE == "forward_kl" and HAS_CLIP:
        return tl.map_elementwise(
            forward_kl_entry_clipped, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif DIVERGENCE == "forward_kl":
        return tl.map_elementwise(
            forward_kl_entry, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif DIVERGENCE == "reverse_kl" and HAS_CLIP:
        return tl.map_elementwise(
            reverse_kl_entry_clipped, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif DIVERGENCE == "reverse_kl":
        return tl.map_elementwise(
            reverse_kl_entry, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif DIVERGENCE == "skewed_jsd" and HAS_CLIP:
        return tl.map_elementwise(
            skewed_jsd_entry_clipped, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif DIVERGENCE == "skewed_jsd":
        return tl.map_elementwise(
            skewed_jsd_entry, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    elif HAS_CLIP:
        return tl.map_elementwise(
            jsd_entry_clipped, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )
    else:
        return tl.map_elementwise(
            jsd_entry, s, t, lse_s, lse_t, total, valid, scale, beta, rest, clip
        )


@triton.jit
def tanh_each(x):
    """`tanh` of a block, one entry at a time like `pair_entries`."""
    if INTERPRET:
        return tanh(x)
    else:
        return tl.map_elementwise(tanh, x)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even; the interpreter's own conversion to bf16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
