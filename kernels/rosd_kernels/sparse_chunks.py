"""Strategy "chunked" with a sparsity: gradients of the entries that matter, in 2 + 2f units.

    logits = h W^T                         2 units: all entries, both sides, a block of rows
    statistics of tiles, active entries    active.py: one read of the logits, and a few tiles again
    loss and K                             over the tiles that were scanned; the others as one entry
    G of the active entries [R, A]         compacted in place
    dh = a G W[index], dW[index] += G^T a h    compact.py: 2f units, or f without dW

with f = A/V. A chunk is one block, whose rows share their active entries. The loss is at most the
exact one (but for a clipped forward_kl, see sparsity.py), the gradient's error at most
`grad_error_bound`, see active.py. In reverse_kl a tile of which a bias masks only a part is
scanned: as one entry it would have no bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels.active import (
    ActiveEntries,
    Side,
    compact_,
    lost_mass,
    scanned_terms,
    select_entries,
)
from rosd_kernels.autograd import Computed, Needed, ranges
from rosd_kernels.compact import add_gradients, untouched_gradients
from rosd_kernels.divergences import entry_terms, is_never_negative, known_total
from rosd_kernels.elementwise import subtract_total, terms_, uses_native
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanInputs, SpanOptions, SpanStats
from rosd_kernels.row_chunks import empty_results, project_sides, store
from rosd_kernels.rows import RowStats
from rosd_kernels.sparsity import measured_counts, tile_error_bound
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan

PLAIN_SCRATCH = 8  # buffers of one row of logits per row, without the C++ extension


def compute_sparse(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, needed: Needed
) -> Computed:
    """Loss, results and gradients of one call."""
    hidden = inputs.student_hidden
    is_fused = uses_native(hidden.new_empty(0, dtype=inputs.compute_dtype))
    plan = WorkspacePlan.of(
        [(hidden, inputs.student_head), (inputs.teacher_hidden, inputs.teacher_head)],
        vocabulary,
        workspace_mib=options.workspace_mib,
        scratch_rows=0 if is_fused else PLAIN_SCRATCH,
        is_fused=is_fused,
        is_sparse=True,
    )
    workspace = Workspace(plan, hidden.device)
    results = empty_results(inputs)
    gradients = untouched_gradients(inputs.students, needed, inputs.compute_dtype, inputs.head_sum)
    transforms = inputs.transforms(options)
    skipped = torch.zeros_like(results.per_token), torch.zeros_like(results.per_token)
    num_computed = 0
    for start, stop in ranges(inputs.num_tokens, plan.rows):
        rows, chunk = slice(start, stop), inputs.rows(start, stop)
        logits = project_sides(chunk, workspace)
        columns = vocabulary.columns(chunk.token_ids)
        block = sparse_block(
            *logits, transforms, columns, options, vocabulary, needs_gradient=any(needed)
        )
        store(results, rows, block.value, block.student, block.teacher)
        for of_all, of_block in zip(skipped, (block.lost_mass, block.grad_error), strict=True):
            of_all[rows] = of_block
        size = inputs.vocab_size if block.index is None else len(block.index)
        num_computed += size * (stop - start)
        if any(needed):
            logprob = results.student_logprob
            of_chunk = None if logprob is None else logprob[rows]
            row_scale = chunk.row_scale(chunk.token_weights(of_chunk, options), options)
            add_gradients(
                gradients,
                logits[0][:, :size],
                chunk.student_hidden,
                chunk.student_head,
                rows,
                block.index,
                workspace,
                row_scale=row_scale,
            )
    if gradients.hidden is not None:
        vocabulary.sum_(gradients.hidden)
    counts = results.per_token.new_tensor([num_computed, inputs.num_tokens * inputs.vocab_size])
    found = measured_counts(counts, *skipped, vocabulary)
    weights = inputs.token_weights(results.student_logprob, options)
    return Computed(
        loss=(weights * results.per_token).sum(),
        results=results,
        gradients=gradients,
        stats=SpanStats(strategy="chunked", workspace_bytes=plan.num_bytes, measured=found),
    )


class SparseBlock(NamedTuple):
    """What is known of a block of rows."""

    value: Tensor  # [R] divergence
    student: RowStats
    teacher: RowStats
    index: Tensor | None  # [A] columns of G, which are then the first ones; None: all
    lost_mass: Tensor  # [R] the larger one of p and of q that have no gradient
    grad_error: Tensor  # [R] bound


def sparse_block(
    student: Tensor,  # [R, V] raw logits in, G out in the first A columns
    teacher: Tensor,  # [R, V] raw logits in, overwritten
    transforms: tuple[LogitTransform, LogitTransform],
    columns: Tensor | None,  # [R] of the sampled tokens
    options: SpanOptions,
    vocabulary: Vocabulary,
    *,
    needs_gradient: bool,
) -> SparseBlock:
    """All elementwise work of a block."""
    sides = [
        Side.of(logits, transform, columns, vocabulary)
        for logits, transform in zip((student, teacher), transforms, strict=True)
    ]
    entries = select_entries(sides, options.sparsity.of_shard(vocabulary.num_shards))
    if options.divergence == "reverse_kl":
        entries.scanned.logical_or_(_unbounded(sides))
    lses = sides[0].rows.lse, sides[1].rows.lse
    if entries.is_dense:
        sums = torch.cat([terms_(student, teacher, *transforms, *lses, options), zeros(lses[0], 4)])
    else:
        sums = _sums(sides, entries, options)
    value, total, student_mass, teacher_mass, known_error, tile_error = vocabulary.sum_(sums)
    if needs_gradient:
        if not entries.is_dense:
            student, teacher = compact_(student, entries.index), compact_(teacher, entries.index)
            of_student, of_teacher = (transform.at(entries.index) for transform in transforms)
            terms_(student, teacher, of_student, of_teacher, *lses, options)
        subtract_total(student, teacher, total, options)
    of_total = 1.0 if known_total(options) is not None else total.abs()
    error = known_error + tile_error + student_mass * of_total
    if known_total(options) is None:
        error = error + tile_error
    return SparseBlock(
        value=value,
        student=sides[0].rows,
        teacher=sides[1].rows,
        index=None if entries.is_dense else entries.index,
        lost_mass=torch.maximum(student_mass, teacher_mass),
        grad_error=error / options.temperature,
    )


def _unbounded(sides: list[Side]) -> Tensor:
    """[R, T] tiles in which reverse_kl has no bound on log(p/q): only some entries are masked."""
    student, teacher = (side.tiles for side in sides)
    return (teacher.min == -math.inf) & (student.max > -math.inf)


def zeros(like: Tensor, count: int) -> Tensor:
    """[count, R] zeros."""
    return like.new_zeros(count, len(like))


def _sums(sides: list[Side], entries: ActiveEntries, options: SpanOptions) -> Tensor:
    """[6, R] value, K, lost mass of both sides, and the two parts of the lost `sum |e|`."""
    student, teacher = sides
    value, total, known_error = scanned_terms(
        student.logits,
        teacher.logits,
        student.transform,
        teacher.transform,
        student.rows.lse,
        teacher.rows.lse,
        entries,
        options,
    )
    lowest = torch.finfo(value.dtype).min / 4  # -inf - -inf is not 0
    log_p = (student.tiles.lse - student.rows.lse[:, None]).clamp_(min=lowest)
    log_q = (teacher.tiles.lse - teacher.rows.lse[:, None]).clamp_(min=lowest)
    p, q = log_p.exp(), log_q.exp()
    ratio = None
    if options.divergence == "reverse_kl":
        highest = student.tiles.max - student.rows.lse[:, None]
        ratio = highest - (teacher.tiles.min - teacher.rows.lse[:, None])
    bound = tile_error_bound(p, q, ratio, options).masked_fill_(entries.scanned, 0)
    c, e = entry_terms(log_p, log_q, p, q, options)
    c.masked_fill_(entries.scanned, 0)
    e.masked_fill_(entries.scanned, 0)
    value, total = value + c.sum(1), total + e.sum(1)
    if is_never_negative(options):
        value = value.clamp_(min=0)
    student_mass, teacher_mass = (lost_mass(side, entries)[0] for side in sides)
    return torch.stack([value, total, student_mass, teacher_mass, known_error, bound.sum(1)])
