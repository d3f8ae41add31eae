"""The elementwise part of the strategy "chunked": whole rows of logits, turned into G in place.

    s = softcap(x + b) / temperature                        from raw logits x, for both sides
    stats   lse = log sum exp s,  entropy of exp(s - lse),  sampled = s at the row's column
    terms   value = sum c,  total = K = sum e               of math.py, p = exp(s - lse)
    grad    G = (e - p K) (1 - tanh^2)                      written over the student's logits

One program per row makes one pass over the row for each line. Where the vocabulary is sharded, each
pass is a launch of its own, because lse and K are reduced across ranks in between.

Legend: R rows, V vocabulary (of this rank).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from rosd_kernels.gpu.configs import rows_config
from rosd_kernels.gpu.launch import COMPILER_OPTIONS
from rosd_kernels.gpu.math import MASKED, entry_terms, formula, transform_logits
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.rows import RowStats, row_stats
from rosd_kernels.vocabulary import Vocabulary

Stage = Literal["all", "value", "stats", "terms", "grad"]
BLOCK_V, NUM_WARPS, MAX_REGISTERS = rows_config()


@triton.jit
def load_logits(
    logits_ptr,
    bias_ptr,
    columns,
    V,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scaled logits of a part of a row, and their slope; entries beyond the vocabulary read 0."""
    inside = columns < V
    logits = tl.load(logits_ptr + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        logits += tl.maximum(bias, MASKED)
    return transform_logits(logits, softcap, inv_temperature, HAS_SOFTCAP)


@triton.jit
def stats_of_row(
    logits_ptr,
    bias_ptr,
    V,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """(lse, entropy) of a row; sums are relative to the highest logit so far."""
    high = -float("inf")
    total = 0.0
    weighted = 0.0
    for v in range(0, V, BLOCK_V):
        columns = v + tl.arange(0, BLOCK_V)
        s, _ = load_logits(
            logits_ptr, bias_ptr, columns, V, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        inside = columns < V
        new_high = tl.maximum(high, tl.max(tl.where(inside, s, -float("inf"))))
        if v == 0:  # avoids -inf - -inf
            high = new_high
        shrink = tl.exp(high - new_high)
        weighted = shrink * (weighted + (high - new_high) * total)
        total = shrink * total
        weight = tl.where(inside, tl.exp(s - new_high), 0.0)
        total += tl.sum(weight)
        weighted += tl.sum(weight * (s - new_high))
        high = new_high
    return high + tl.log(total), tl.log(total) - weighted / total


@triton.jit
def sampled_logit(
    logits_ptr,
    bias_ptr,
    column,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Scaled logit at a column; 0 where the column is -1."""
    logit = tl.load(logits_ptr + column, mask=column >= 0, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=column >= 0, other=0.0).to(tl.float32)
        logit += tl.maximum(bias, MASKED)
    s, _ = transform_logits(logit, softcap, inv_temperature, HAS_SOFTCAP)
    return s


@triton.jit(do_not_specialize=["R"])
def rows_kernel(
    student_ptr,  # [R, V] raw logits in; G out
    teacher_ptr,  # [R, V] raw logits
    student_bias_ptr,  # [V]
    teacher_bias_ptr,  # [V]
    columns_ptr,  # [R] int64, -1: none
    stats_ptr,  # [2, 3, R] out: side; lse, entropy, sampled
    terms_ptr,  # [2, R] out: value, total
    lse_ptr,  # [2, R] in, unless STATS
    total_ptr,  # [R] in, unless TERMS
    R,
    V,
    student_stride,
    teacher_stride,
    beta,
    rest,
    clip,
    softcap,
    inv_temperature,
    STATS: tl.constexpr,
    TERMS: tl.constexpr,
    GRAD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_STUDENT_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row: the passes that STATS, TERMS and GRAD ask for, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    student = student_ptr + row * student_stride
    teacher = teacher_ptr + row * teacher_stride
    if STATS:
        student_lse, student_entropy = stats_of_row(
            student,
            student_bias_ptr,
            V,
            softcap,
            inv_temperature,
            HAS_STUDENT_BIAS,
            HAS_SOFTCAP,
            BLOCK_V,
        )
        teacher_lse, teacher_entropy = stats_of_row(
            teacher,
            teacher_bias_ptr,
            V,
            softcap,
            inv_temperature,
            HAS_TEACHER_BIAS,
            HAS_SOFTCAP,
            BLOCK_V,
        )
        stats = stats_ptr + row
        tl.store(stats, student_lse)
        tl.store(stats + R, student_entropy)
        tl.store(stats + 3 * R, teacher_lse)
        tl.store(stats + 4 * R, teacher_entropy)
        student_sampled = 0.0
        teacher_sampled = 0.0
        if HAS_COLUMNS:
            column = tl.load(columns_ptr + row)
            student_sampled = sampled_logit(
                student,
                student_bias_ptr,
                column,
                softcap,
                inv_temperature,
                HAS_STUDENT_BIAS,
                HAS_SOFTCAP,
            )
            teacher_sampled = sampled_logit(
                teacher,
                teacher_bias_ptr,
                column,
                softcap,
                inv_temperature,
                HAS_TEACHER_BIAS,
                HAS_SOFTCAP,
            )
        tl.store(stats + 2 * R, student_sampled)
        tl.store(stats + 5 * R, teacher_sampled)
    else:
        student_lse = tl.load(lse_ptr + row)
        teacher_lse = tl.load(lse_ptr + R + row)

    # Pass 0 sums value and total, pass 1 writes G.
    value_sum = 0.0
    total = 0.0
    if not TERMS and GRAD:
        total = tl.load(total_ptr + row)
    for grad_pass in tl.static_range(0 if TERMS else 1, 2 if GRAD else 1):
        for v in range(0, V, BLOCK_V):
            columns = v + tl.arange(0, BLOCK_V)
            inside = columns < V
            s, slope = load_logits(
                student,
                student_bias_ptr,
                columns,
                V,
                softcap,
                inv_temperature,
                HAS_STUDENT_BIAS,
                HAS_SOFTCAP,
            )
            t, _ = load_logits(
                teacher,
                teacher_bias_ptr,
                columns,
                V,
                softcap,
                inv_temperature,
                HAS_TEACHER_BIAS,
                HAS_SOFTCAP,
            )
            log_p, log_q = s - student_lse, t - teacher_lse
            p = tl.where(inside, tl.exp(log_p), 0.0)
            q = tl.where(inside, tl.exp(log_q), 0.0)
            value, e = entry_terms(log_p, log_q, p, q, beta, rest, clip, DIVERGENCE, HAS_CLIP)
            if grad_pass == 0:
                value_sum += tl.sum(value)
                total += tl.sum(e)
            else:
                tl.store(student + columns, (e - p * total) * slope, mask=inside)
    if TERMS:
        tl.store(terms_ptr + row, value_sum)
        tl.store(terms_ptr + R + row, total)


def rows(
    student: Tensor,  # [R, V] float32 raw logits; G after "all" and "grad"
    teacher: Tensor,  # [R, V] float32 raw logits
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [V]
    columns: Tensor | None,  # [R] int64, -1: none
    options: SpanOptions,
    *,
    stage: Stage = "all",
    lse: Tensor | None = None,  # [2, R]: for "terms" and "grad"
    total: Tensor | None = None,  # [R]: for "grad"
) -> tuple[Tensor | None, Tensor | None]:
    """Return (stats [2, 3, R]: side; lse, entropy, sampled, terms [2, R]: value, total).

    "all" and "value" return both, "stats" and "terms" one of them and None, "grad" none. "all" and
    "grad" write G, without a row scale, over `student`; the other stages leave the logits alone.
    """
    has_stats, has_terms = stage in ("all", "value", "stats"), stage in ("all", "value", "terms")
    assert student.dtype == teacher.dtype == torch.float32
    assert student.stride(1) == teacher.stride(1) == 1
    assert has_stats or lse is not None
    assert stage != "grad" or total is not None
    R, V = student.shape
    stats, terms = student.new_empty(2, 3, R), student.new_empty(2, R)
    if R:
        rows_kernel[(R,)](
            student,
            teacher,
            student_bias,
            teacher_bias,
            columns,
            stats,
            terms,
            None if lse is None else lse.contiguous(),
            None if total is None else total.contiguous(),
            R,
            V,
            student.stride(0),
            teacher.stride(0),
            options.beta,
            1 - options.beta,
            options.entry_clip or 0.0,
            options.softcap or 1.0,
            1.0 / options.temperature,
            STATS=has_stats,
            TERMS=has_terms,
            GRAD=stage in ("all", "grad"),
            DIVERGENCE=formula(options),
            HAS_CLIP=options.entry_clip is not None,
            HAS_SOFTCAP=options.softcap is not None,
            HAS_STUDENT_BIAS=student_bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_COLUMNS=columns is not None,
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
            **COMPILER_OPTIONS,
        )
    return stats if has_stats else None, terms if has_terms else None


def block_divergence(
    student: Tensor,  # [R, V] raw logits in, G out
    teacher: Tensor,  # [R, V] raw logits
    transforms: tuple[LogitTransform, LogitTransform],
    columns: Tensor | None,  # [R] of the sampled tokens
    options: SpanOptions,
    vocabulary: Vocabulary,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, RowStats, RowStats]:
    """The elementwise work of "chunked": ([R] divergence, statistics of both sides)."""
    biases = (transforms[0].bias, transforms[1].bias)
    call = partial(rows, student, teacher, *biases, columns, options)
    whole = "all" if needs_gradient else "value"
    stats, terms = call(stage="stats" if vocabulary.is_sharded else whole)
    assert stats is not None
    of_student, of_teacher = (
        row_stats(
            side[0][:, None],
            side[1][:, None],
            None if columns is None else side[2],
            vocabulary,
        )
        for side in stats
    )
    if vocabulary.is_sharded:
        lse = torch.stack([of_student.lse, of_teacher.lse])
        _, terms = call(stage="terms", lse=lse)
        assert terms is not None
        vocabulary.sum_(terms)
        if needs_gradient:
            call(stage="grad", lse=lse, total=terms[1])
    assert terms is not None
    return terms[0], of_student, of_teacher
