"""Strategy "chunked" with a sparsity: gradients of the entries that matter, in 2 + 2f units.

    logits = h W^T                         2 units: all entries, both sides, a block of rows
    statistics of tiles, active entries    active.py: one read of the logits, and a few tiles again
    loss and K                             over the tiles that were scanned; the others as one entry
    G of the active entries [R, A]         compacted in place
    dh = a G W[index], dW[index] += G^T a h    compact.py: 2f units, or f without dW

with f = A/V. A chunk is one block, whose rows share their active entries; on a GPU, where chunks
are larger and gpu/sparse.py has all passes but the first, it has several. The loss is at most the
exact one (but for a clipped forward_kl, see sparsity.py), the gradient's error at most
`grad_error_bound`, see active.py. In reverse_kl a tile of which a bias masks only a part is
scanned: as one entry it would have no bound.
"""

from __future__ import annotations

import math
from functools import partial

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
from rosd_kernels.backends import gpu_sparse
from rosd_kernels.compact import add_gradients, untouched_gradients
from rosd_kernels.elementwise import subtract_total, terms_, uses_native
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanInputs, SpanOptions, SpanStats
from rosd_kernels.row_chunks import empty_results, project_sides, store
from rosd_kernels.sparse_block import SparseBlock, add_tiles, gradient_error
from rosd_kernels.sparsity import measured_counts
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan

PLAIN_SCRATCH = 8  # buffers of one row of logits per row, without the C++ extension


def compute_sparse(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, needed: Needed
) -> Computed:
    """Loss, results and gradients of one call."""
    hidden = inputs.student_hidden
    kernels = gpu_sparse(hidden, inputs.compute_dtype)
    is_fused = kernels is not None or uses_native(hidden.new_empty(0, dtype=inputs.compute_dtype))
    plan = WorkspacePlan.of(
        [(hidden, inputs.student_head), (inputs.teacher_hidden, inputs.teacher_head)],
        vocabulary,
        workspace_mib=options.workspace_mib,
        scratch_rows=0 if is_fused else PLAIN_SCRATCH,
        is_fused=is_fused,
        is_sparse=True,
        is_gathered=kernels is not None,
    )
    workspace = Workspace(plan, hidden.device)
    block_of, add = sparse_block, add_gradients
    if kernels is not None:
        block_of = partial(kernels.sparse_block, grad_dtype=plan.gemm_dtype)
        add = kernels.add_gradients
    results = empty_results(inputs)
    gradients = untouched_gradients(inputs.students, needed, inputs.compute_dtype, inputs.head_sum)
    transforms = inputs.transforms(options)
    skipped = torch.zeros_like(results.per_token), torch.zeros_like(results.per_token)
    num_computed = results.per_token.new_zeros(())
    for start, stop in ranges(inputs.num_tokens, plan.rows):
        rows, chunk = slice(start, stop), inputs.rows(start, stop)
        logits = project_sides(chunk, workspace)
        columns = vocabulary.columns(chunk.token_ids)
        block = block_of(
            *logits, transforms, columns, options, vocabulary, needs_gradient=any(needed)
        )
        store(results, rows, block.value, block.student, block.teacher)
        for of_all, of_block in zip(skipped, (block.lost_mass, block.grad_error), strict=True):
            of_all[rows] = of_block
        num_computed += block.num_computed
        if any(needed):
            logprob = results.student_logprob
            of_chunk = None if logprob is None else logprob[rows]
            row_scale = chunk.row_scale(chunk.token_weights(of_chunk, options), options)
            add(
                gradients,
                block.grad,
                chunk.student_hidden,
                chunk.student_head,
                rows,
                block.index,
                workspace,
                row_scale=row_scale,
            )
    if gradients.hidden is not None:
        vocabulary.sum_(gradients.hidden)
    num_pairs = torch.full_like(num_computed, inputs.num_tokens * inputs.vocab_size)
    counts = torch.stack([num_computed, num_pairs])
    found = measured_counts(counts, *skipped, vocabulary)
    weights = inputs.token_weights(results.student_logprob, options)
    return Computed(
        loss=(weights * results.per_token).sum(),
        results=results,
        gradients=gradients,
        stats=SpanStats(strategy="chunked", workspace_bytes=plan.num_bytes, measured=found),
    )


def sparse_block(
    student: Tensor,  # [R, V] raw logits in, `grad` out
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
    return SparseBlock(
        value=value,
        student=sides[0].rows,
        teacher=sides[1].rows,
        grad=student,
        index=None if entries.is_dense else entries.index,
        num_computed=len(lses[0])
        * (sides[0].logits.shape[1] if entries.is_dense else len(entries.index)),
        lost_mass=torch.maximum(student_mass, teacher_mass),
        grad_error=gradient_error(total, student_mass, known_error, tile_error, options),
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
    value, total, tile_error = add_tiles(sides, entries.scanned, value, total, options)
    student_mass, teacher_mass = (lost_mass(side, entries)[0] for side in sides)
    return torch.stack([value, total, student_mass, teacher_mass, known_error, tile_error])
