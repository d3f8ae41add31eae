"""Elementwise arithmetic of the kernels, accurate where the hardware's approximations are not.

Triton has no tanh, expm1 and log1p that also run in its interpreter, and the hardware's logarithm
is accurate to 2^-22 absolute only, which near 1 leaves no digits. All functions here keep a
relative error of a few 2^-24.

`entry_terms` is what one vocabulary entry adds to the divergence (`value`, >= 0 but for clipped
KLs) and to the gradient (`e`, constant factors included), with r = log q - log p:

    forward_kl   value = q r + p - q                               e = -q
    reverse_kl   value = -p r - p + q                              e = -p r    (+ p where clipping)
    jsd          value = b q log(q/m) + (1-b) p log(p/m)           e = (1-b) p log(p/m)

    m = b q + (1-b) p;  gradient of the row w.r.t. its logits: e - p K,  K = sum of e

`p - q` sums to zero, so it changes nothing but the rounding: each entry's value is then a Bregman
divergence, of second order in r, and so are its errors in the log-normalizers. In jsd that holds
already. With `clip` the KLs are taken without it, and an entry above `clip` counts `clip`, e = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rosd_kernels.gpu.modes import INTERPRET


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
    z = expm1(tl.minimum(2.0 * tl.abs(x), 40.0))
    y = z / (z + 2.0)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def atanh_rest(t):
    """atanh(t) - t for |t| < 0.25."""
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
def finish_logits(logits, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """(finished logits, their derivative w.r.t. the raw ones times temperature)."""
    if HAS_SOFTCAP:
        bounded = tanh(logits / softcap)
        return bounded * (softcap * inv_temperature), 1.0 - bounded * bounded
    else:
        return logits * inv_temperature, 1.0


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
    y = c * x  # from -1 to 6.4
    t = y / (2.0 + y)
    rest = 2.0 * atanh_rest(t)
    log_m_over_base = tl.where(tl.abs(t) < 0.25, 2.0 * t + rest, tl.log(1.0 + y))
    near = c * bregman_gamma(r) - (y * t + (1.0 + y) * rest)
    apart = c * (1.0 + x) * r - (1.0 + y) * log_m_over_base
    value = base * tl.maximum(tl.where(tl.abs(r) < 0.5, near, apart), 0.0)
    log_m_over_p = tl.where(of_teacher, log_m_over_base - r, log_m_over_base)
    return value, (beta - 1.0) * p * log_m_over_p


@triton.jit
def entry_terms(log_p, log_q, p, q, beta, clip, DIVERGENCE: tl.constexpr, HAS_CLIP: tl.constexpr):
    """(value, e) of the docstring; entries that do not exist have p = q = 0 and count nothing."""
    r = log_q - log_p
    if DIVERGENCE == "forward_kl":
        e = -q
        value = q * r
        if not HAS_CLIP:
            value = tl.where(tl.abs(r) < 0.5, q * bregman_exp(-r), value + (p - q))
    elif DIVERGENCE == "reverse_kl":
        e = -p * r
        value = e
        if HAS_CLIP:
            e += p
        else:
            value = tl.where(tl.abs(r) < 0.5, p * bregman_exp(r), value + (q - p))
    else:
        value, e = jsd_terms(r, p, q, beta)
    if HAS_CLIP:
        e = tl.where(value > clip, 0.0, e)
        value = tl.minimum(value, clip)
    return value, e


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x in `dtype`, to nearest even. The interpreter's own conversion to bf16 cuts off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)
