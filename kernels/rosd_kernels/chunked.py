"""Strategy "chunked": a bounded workspace, and the gradients in the same pass as the loss.

The rows (tokens) are processed in chunks of R. One workspace holds both sides' logits of a chunk
and turns them in place into the loss and into `G`, the gradient of a row's divergence w.r.t. its
raw logits; then

    logits = h W^T                                  2 GEMMs, stacked where the head is shared
    G      = e - p K, see divergences.py            in blocks of rows, see workspace.py
    dh = a G W,  dW += G^T (a h),  db += G^T a      2 GEMMs

with `a_n = weight_n / temperature`, applied where there are H columns and not V. That is 4 GEMM
sweeps over the head, the minimum for dense gradients. Where all inputs are bfloat16, a GPU
multiplies them without conversion and sums in float32; G and a h are then rounded to bfloat16 too.

With a sparsity, sparse_chunks.py keeps the logits and the first two GEMMs, and restricts the others
to the entries that matter.

With top-k, a row consists of k buckets and, with a tail, one more for the tail. The gradient of a
token v of the tail is that of the tail's bucket times `p_v / sum of p over the tail`.

Where the vocabulary is sharded, normalizers, values, K and dh are summed over the ranks. Sums have
a fixed sequence and there are no atomics: equal calls give equal bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rosd_kernels.autograd import (
    Computed,
    Gradients,
    Needed,
    differentiable,
    ranges,
    zero_gradients,
)
from rosd_kernels.backends import gpu_rows
from rosd_kernels.divergences import entry_terms, known_total, row_value
from rosd_kernels.elementwise import stats, subtract_total, terms_, uses_native
from rosd_kernels.logits import SCALED, LogitTransform, transform_
from rosd_kernels.plain import NUM_SCRATCH
from rosd_kernels.records import (
    SpanDivergenceOutput,
    SpanInputs,
    SpanOptions,
    SpanStats,
)
from rosd_kernels.row_chunks import empty_results, project_sides, store
from rosd_kernels.rows import RowStats, row_stats
from rosd_kernels.sparse_chunks import compute_sparse
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan, multiply


def run_chunked(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary
) -> SpanDivergenceOutput:
    """Compute the divergence in chunks of rows that fit `options.workspace_mib`."""
    is_dense = options.sparsity.rule == "exact" or options.top_k is not None
    compute = _compute if is_dense else compute_sparse
    return differentiable(inputs, lambda needed: compute(inputs, options, vocabulary, needed))


def _compute(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, needed: Needed
) -> Computed:
    hidden = inputs.student_hidden
    rows_kernel = gpu_rows(hidden, inputs.compute_dtype) if options.top_k is None else None
    is_fused = rows_kernel is not None or uses_native(
        hidden.new_empty(0, dtype=inputs.compute_dtype)
    )
    student_side = inputs.student_hidden, inputs.student_head
    plan = WorkspacePlan.of(
        [student_side, (inputs.teacher_hidden, inputs.teacher_head)],
        vocabulary,
        workspace_mib=options.workspace_mib,
        scratch_rows=_scratch_rows(inputs, options, vocabulary, is_fused=is_fused),
        is_fused=is_fused and options.top_k is None,
    )
    workspace = Workspace(plan, hidden.device)
    results = empty_results(inputs)
    gradients = zero_gradients(
        inputs.students,
        needed,
        inputs.compute_dtype,
        inputs.head_sum,
        head_is_written=inputs.num_tokens > 0,
    )
    transforms = inputs.transforms(options)
    block_divergence = rows_kernel or (
        _block_divergence if options.top_k is None else _block_divergence_top_k
    )
    for start, stop in ranges(inputs.num_tokens, plan.rows):
        chunk = inputs.rows(start, stop)
        student, teacher = project_sides(chunk, workspace)
        for first, last in ranges(stop - start, plan.block):
            block = chunk.rows(first, last)
            values, *sides = block_divergence(
                student[first:last],
                teacher[first:last],
                transforms,
                vocabulary.columns(block.token_ids),
                options,
                vocabulary,
                needs_gradient=any(needed),
            )
            store(results, slice(start + first, start + last), values, *sides)
        if any(needed):
            logprob = results.student_logprob
            of_chunk = None if logprob is None else logprob[start:stop]
            row_scale = chunk.row_scale(chunk.token_weights(of_chunk, options), options)
            _add_gradients(gradients, chunk, slice(start, stop), row_scale, workspace)
    if gradients.hidden is not None:
        vocabulary.sum_(gradients.hidden)
    weights = inputs.token_weights(results.student_logprob, options)
    return Computed(
        loss=(weights * results.per_token).sum(),
        results=results,
        gradients=gradients,
        stats=SpanStats(strategy="chunked", workspace_bytes=plan.num_bytes),
    )


def _scratch_rows(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary, *, is_fused: bool
) -> int:
    """Buffers of one row of logits that the elementwise work on a row allocates."""
    found = 0 if is_fused else NUM_SCRATCH + (options.softcap is not None)
    if options.top_k is not None:  # the soft cap's slope, and about 20 buffers of k buckets
        found += 1 + -(-options.top_k * 20 // vocabulary.largest)
    return found


def _block_divergence(
    student: Tensor,  # [R, V] raw logits in, G out
    teacher: Tensor,  # [R, V] raw logits in, overwritten
    transforms: tuple[LogitTransform, LogitTransform],
    columns: Tensor | None,  # [R] of the sampled tokens
    options: SpanOptions,
    vocabulary: Vocabulary,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, RowStats, RowStats]:
    """All elementwise work of a block of rows: ([R] divergence, statistics of both sides)."""
    of_student = _whole_rows(student, transforms[0], columns, vocabulary)
    of_teacher = _whole_rows(teacher, transforms[1], columns, vocabulary)
    sums = terms_(student, teacher, *transforms, of_student.lse, of_teacher.lse, options)
    value, total = vocabulary.sum_(sums)
    if needs_gradient:
        subtract_total(student, teacher, total, options)
    return value, of_student, of_teacher


def _block_divergence_top_k(
    student: Tensor,  # [R, V] raw logits in, G out
    teacher: Tensor,  # [R, V] raw logits in, overwritten
    transforms: tuple[LogitTransform, LogitTransform],
    columns: Tensor | None,
    options: SpanOptions,
    vocabulary: Vocabulary,
    *,
    needs_gradient: bool,
) -> tuple[Tensor, RowStats, RowStats]:
    """`_block_divergence` over the student's k most likely entries and the tail's bucket."""
    assert options.top_k is not None
    for logits, transform in zip((student, teacher), transforms, strict=True):
        transform_(logits, transform)
    slope = transforms[0].slope(student)
    of_student = _whole_rows(student, SCALED, columns, vocabulary)
    of_teacher = _whole_rows(teacher, SCALED, columns, vocabulary)

    # Every shard offers k candidates, of which the k best of all shards are kept.
    top, ids = student.topk(min(options.top_k, student.shape[1]), dim=-1)
    size = min(options.top_k, vocabulary.largest)
    candidates = vocabulary.gather(_widened(top, size))
    teacher_candidates = vocabulary.gather(_widened(teacher.gather(-1, ids), size))
    best = candidates.topk(options.top_k, dim=-1).indices
    is_kept = torch.zeros_like(candidates, dtype=torch.bool).scatter_(-1, best, True)
    of_shard = slice(vocabulary.rank * size, vocabulary.rank * size + top.shape[1])
    is_kept_here = is_kept[:, of_shard]
    for logits in (student, teacher):
        logits.scatter_(-1, ids, logits.gather(-1, ids).masked_fill_(is_kept_here, -math.inf))

    log_p = candidates.gather(-1, best) - of_student.lse[:, None]
    log_q = teacher_candidates.gather(-1, best) - of_teacher.lse[:, None]
    tail = None
    if options.tail:
        tail = _log_mass(student, vocabulary)
        log_p = torch.cat([log_p, tail - of_student.lse[:, None]], dim=-1)
        rest = _log_mass(teacher, vocabulary) - of_teacher.lse[:, None]
        log_q = torch.cat([log_q, rest], dim=-1)
    else:
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    c, e = entry_terms(log_p, log_q, p, log_q.exp(), options)
    if needs_gradient:
        known = known_total(options)
        total = e.sum(-1, keepdim=True) if known is None else known
        of_buckets = e - p * total  # [R, k] or, with the tail, [R, k + 1]
        if tail is None:
            student.zero_()
        else:  # -inf at the kept ids: exp gives p_v / tail in the tail, and 0 elsewhere
            student.sub_(tail).exp_().mul_(of_buckets[:, -1:])
        of_kept = torch.zeros_like(candidates).scatter_(-1, best, of_buckets[:, : options.top_k])
        chosen = torch.where(is_kept_here, of_kept[:, of_shard], student.gather(-1, ids))
        student.scatter_(-1, ids, chosen)
        if slope is not None:
            student.mul_(slope)
    return row_value(c, options), of_student, of_teacher


def _whole_rows(
    logits: Tensor, transform: LogitTransform, columns: Tensor | None, vocabulary: Vocabulary
) -> RowStats:
    found, sampled = stats(logits, transform, columns)
    return row_stats(found[0], found[3], sampled, vocabulary)


def _log_mass(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[R, 1] log sum exp of scaled logits, over all shards."""
    return vocabulary.logsumexp(stats(logits, SCALED)[0][0])


def _widened(values: Tensor, size: int) -> Tensor:
    """[R, k] values padded with -inf to [R, size]."""
    return torch.nn.functional.pad(values, (0, size - values.shape[1]), value=-math.inf)


def _add_gradients(
    gradients: Gradients, chunk: SpanInputs, rows: slice, row_scale: Tensor, workspace: Workspace
) -> None:
    """Add a chunk whose G is in the workspace; `row_scale` [R] is `a` of the module's docstring."""
    column = row_scale[:, None]
    if gradients.bias is not None:
        gradients.bias.addmv_(workspace.logits[: chunk.num_tokens].T, row_scale)
    grad_logits = workspace.grad_operand(chunk.num_tokens)
    if gradients.hidden is not None:
        grad_hidden = workspace.backproject(grad_logits, chunk.student_head)
        torch.mul(grad_hidden, column, out=gradients.hidden[rows])
    if gradients.head is not None:
        scaled = workspace.operand(chunk.student_hidden.to(column.dtype) * column)
        is_first = rows.start == 0 and chunk.head_sum is None
        multiply(grad_logits.T, scaled, out=gradients.head, add=not is_first)
