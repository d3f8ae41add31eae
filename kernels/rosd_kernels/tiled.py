"""Strategy "tiled": logits of one tile at a time, and only of the tiles that matter.

    sweep     log sum exp, max, min and entropy of each tile of 128 entries    2 units
    select    lse of the rows; a row block's active tiles (sparsity.py)
    loss      value and K over the active tiles                                2f units
    gradient  G of the active tiles again, then dh = G W and dW = G^T h        4f units

A unit is one sweep of the head's GEMM over all tokens, f the active fraction. The loop goes over
chunks of the vocabulary, not of the tokens: after the last row block of a chunk, the chunk's rows
of dW are complete.

Where the vocabulary is sharded, each rank selects among its own tiles; normalizers, values, K and
dh are summed over the ranks. Sums have a fixed sequence and there are no atomics.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rosd_kernels.autograd import Computed, Gradients, Needed, TokenResults, differentiable
from rosd_kernels.backends import make_tiles
from rosd_kernels.divergences import entry_terms, known_total
from rosd_kernels.order import positions
from rosd_kernels.records import (
    SpanDivergenceOutput,
    SpanInputs,
    SpanOptions,
    SpanStats,
)
from rosd_kernels.rows import RowStats, row_stats
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, is_dropped, measured
from rosd_kernels.vocabulary import Vocabulary


class Tiles(Protocol):
    """The dense work of one call of `span_divergence` on one device."""

    workspace_bytes: int  # logit-sized buffers held at once

    def sweep(self, columns: Tensor | None) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher.

        `columns` [N]: positions of the sampled tokens. Sides that share head and bias are one GEMM
        on stacked rows.
        """
        ...

    def select(
        self,
        student: TileStats,
        teacher: TileStats,
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,
        rule: Sparsity,
    ) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile; see sparsity.py."""
        ...

    def loss(
        self, active: Tensor, student_lse: Tensor, teacher_lse: Tensor, needed: Needed
    ) -> tuple[Tensor, Tensor]:
        """([N] sum of c, [N] sum of e) over the active tiles of each row."""
        ...

    def gradients(
        self,
        active: Tensor,  # [B, T] uint8
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,
        total: Tensor,  # [N] K
        row_scale: Tensor,  # [N] weight / temperature
        needed: Needed,
    ) -> Gradients:
        """Gradients from the active tiles."""
        ...


def run_tiled(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary
) -> SpanDivergenceOutput:
    """Compute the divergence tile by tile; `options.sparsity` says which tiles."""
    return differentiable(inputs, lambda needed: _compute(inputs, options, vocabulary, needed))


def _compute(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, needed: Needed
) -> Computed:
    sparsity = options.sparsity
    permutation = sparsity.permutation(inputs.student_hidden.device)
    tiles = make_tiles(inputs, options, permutation)

    student, teacher = tiles.sweep(positions(vocabulary.columns(inputs.token_ids), permutation))
    of_student, of_teacher = (
        row_stats(side.stats.lse, side.stats.entropy, side.sampled, vocabulary)
        for side in (student, teacher)
    )
    if sparsity.order is not None:
        _update_order(sparsity, inputs, options, of_student, of_teacher)
    rule = sparsity.of_shard(vocabulary.num_shards)
    active = tiles.select(student.stats, teacher.stats, of_student.lse, of_teacher.lse, rule)

    value, total = tiles.loss(active, of_student.lse, of_teacher.lse, needed)
    sums = [value, total]
    if sparsity.rule != "exact":
        lost = dropped(student.stats, teacher.stats, of_student, of_teacher, active, options)
        sums = [value + lost.value, total, *lost[1:]]
    summed = vocabulary.sum_(torch.stack(sums))
    value, total = summed[0], summed[1]
    known = known_total(options)
    if known is not None:
        total = torch.full_like(total, known)
    found = None
    if sparsity.rule != "exact":
        found = _measure(active, summed[2:], total, options, vocabulary)

    results = TokenResults(
        value, of_student.logprob, of_teacher.logprob, of_student.entropy, of_teacher.entropy
    )
    weights = inputs.token_weights(results.student_logprob, options)
    gradients = Gradients(None, None, None)
    if any(needed):
        row_scale = inputs.row_scale(weights, options)
        gradients = tiles.gradients(
            active, of_student.lse, of_teacher.lse, total, row_scale, needed
        )
        if gradients.hidden is not None:
            vocabulary.sum_(gradients.hidden)
    return Computed(
        loss=(weights * value).sum(),
        results=results,
        gradients=gradients,
        stats=SpanStats(strategy="tiled", workspace_bytes=tiles.workspace_bytes, measured=found),
    )


class Dropped(NamedTuple):
    """What each row loses with its inactive tiles, [N] each."""

    value: Tensor  # the divergence of the tiles as single entries
    student_mass: Tensor
    teacher_mass: Tensor
    e_bound: Tensor  # E_D: at least sum |e_v|


def dropped(
    student: TileStats,
    teacher: TileStats,
    of_student: RowStats,
    of_teacher: RowStats,
    active: Tensor,
    options: SpanOptions,
) -> Dropped:
    """Compute what the rows lose; sparsity.py has the formulas."""
    log_p = student.lse - of_student.lse[:, None]
    log_q = teacher.lse - of_teacher.lse[:, None]
    lost = is_dropped(active, log_p.shape[0])
    p, q = log_p.exp().mul_(lost), log_q.exp().mul_(lost)
    beta = options.beta
    if options.divergence == "forward_kl":
        e_bound = q
    elif options.divergence == "reverse_kl":
        highest = (student.max - of_student.lse[:, None]) - (teacher.min - of_teacher.lse[:, None])
        e_bound = torch.where(p > 0, p * highest.clamp(min=0), 0) + q / math.e
    else:
        e_bound = (1 - beta) * (p * -math.log1p(-beta) + beta * q)
    c, _ = entry_terms(log_p, log_q, log_p.exp(), log_q.exp(), options)
    return Dropped((c * lost).sum(1), p.sum(1), q.sum(1), e_bound.sum(1))


def _measure(
    active: Tensor, lost: Tensor, total: Tensor, options: SpanOptions, vocabulary: Vocabulary
) -> Tensor:
    """[3] active fraction, largest dropped mass, bound on the gradient error; see sparsity.py."""
    student_mass, teacher_mass, e_bound = lost
    if known_total(options) is None:
        bound = 2 * e_bound + student_mass * (total.abs() + e_bound)
    else:
        bound = e_bound + student_mass
    bound = bound / options.temperature  # it is of the gradient w.r.t. scaled logits
    return measured(active, torch.maximum(student_mass, teacher_mass), bound, vocabulary)


def _update_order(
    sparsity: Sparsity,
    inputs: SpanInputs,
    options: SpanOptions,
    of_student: RowStats,
    of_teacher: RowStats,
) -> None:
    """Update the vocabulary order with student and teacher probabilities."""
    assert sparsity.order is not None
    student, teacher = inputs.transforms(options)
    for hidden, head, transform, side in (
        (inputs.student_hidden, inputs.student_head, student, of_student),
        (inputs.teacher_hidden, inputs.teacher_head, teacher, of_teacher),
    ):
        sparsity.order.observe(
            hidden.detach(),
            head.detach(),
            transform.bias,
            side.lse,
            softcap=options.softcap,
            temperature=options.temperature,
        )
    sparsity.order.settle()
