"""Strategy "chunked": a bounded workspace, and the gradients in the same pass as the loss.

The rows (tokens) are taken in chunks of R. Both logits of a chunk lie in one workspace, where they
are turned in place into the loss and into `G = dD/d(h W^T + b)`; then

    logits = h W^T + b                              2 GEMMs, stacked where the head is shared
    G      = see divergences.py                     in blocks of rows, see workspace.py
    dh = c G W,  dW += G^T (c h),  db += G^T c      2 GEMMs

with `c_n = weight_n * scale / temperature`, applied where there are H columns and not V. That is
4 GEMM sweeps over the head, the least that dense gradients take. `backward` only multiplies by the
gradient of the loss. What is not needed is not computed.

With the soft cap, `dD/d(raw) = dD/ds (1 - tanh^2)`. With top-k and tail, a token v of the tail has
the gradient of the tail's bucket times its share of it, `p_v / sum of p over the tail`.

Sums have a fixed order and there are no atomics: equal calls give equal bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.divergences import divergence_terms, gradient_scale
from rosd_kernels.records import (
    SpanDivergenceOutput,
    SpanDivergenceStats,
    SpanInputs,
    SpanOptions,
)
from rosd_kernels.workspace import CAST_BYTES, Workspace, WorkspacePlan


def run_chunked(inputs: SpanInputs, options: SpanOptions) -> SpanDivergenceOutput:
    """Compute the divergence in chunks of rows that fit `options.workspace_mib`."""
    plan = WorkspacePlan.of(inputs, options)
    students = (inputs.student_hidden, inputs.student_head, inputs.student_bias)
    # ctx.needs_input_grad would stay true under torch.no_grad.
    needed = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in students
    )
    loss, *rest = _Chunked.apply(*students, inputs, options, plan, needed)
    results = TokenResults(*rest)
    return SpanDivergenceOutput(
        loss=loss,
        **results._asdict(),
        stats=SpanDivergenceStats(
            strategy="chunked",
            active_frac=1.0,
            dropped_mass_max=0.0,
            workspace_bytes=plan.num_bytes,
        ),
    )


class TokenResults(NamedTuple):
    """Detached results per token, [N] each; field names are those of SpanDivergenceOutput."""

    per_token: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor

    def rows(self, start: int, stop: int) -> TokenResults:
        """Views of tokens start..stop."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return TokenResults(
            per_token=self.per_token[start:stop],
            student_logprob=cut(self.student_logprob),
            teacher_logprob=cut(self.teacher_logprob),
            student_entropy=self.student_entropy[start:stop],
            teacher_entropy=self.teacher_entropy[start:stop],
        )

    @classmethod
    def empty(cls, inputs: SpanInputs) -> TokenResults:
        def empty() -> Tensor:
            return inputs.student_hidden.new_empty(inputs.num_tokens, dtype=inputs.compute_dtype)

        has_ids = inputs.token_ids is not None
        logprobs = (empty(), empty()) if has_ids else (None, None)
        return cls(empty(), *logprobs, empty(), empty())


class Gradients(NamedTuple):
    """Gradients of the loss in the compute dtype, summed over chunks; None where not needed."""

    hidden: Tensor | None  # [N, H]
    head: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]

    @classmethod
    def zeros(cls, inputs: SpanInputs, needed: tuple[bool, ...]) -> Gradients:
        students = (inputs.student_hidden, inputs.student_head, inputs.student_bias)
        return cls(
            *(
                tensor.new_zeros(tensor.shape, dtype=inputs.compute_dtype)
                if need and tensor is not None
                else None
                for tensor, need in zip(students, needed, strict=True)
            )
        )

    def add(self, chunk: SpanInputs, rows: slice, row_scale: Tensor, workspace: Workspace) -> None:
        """Add a chunk whose G lies in the workspace; `row_scale` [R] is c of the docstring."""
        grad_logits = workspace.logits[: chunk.num_tokens]
        column = row_scale[:, None]
        if self.hidden is not None:
            grad_hidden = workspace.backproject(grad_logits, chunk.student_head)
            torch.mul(grad_hidden, column, out=self.hidden[rows])
        if self.head is not None:
            self.head.addmm_(grad_logits.T, chunk.student_hidden.to(column.dtype) * column)
        if self.bias is not None:
            self.bias.addmv_(grad_logits.T, row_scale)


class _Chunked(torch.autograd.Function):
    """Loss and gradients in forward; backward scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        inputs: SpanInputs,
        options: SpanOptions,
        plan: WorkspacePlan,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        loss, results, gradients = _compute(inputs, options, plan, needed)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = tuple(
            None if tensor is None else tensor.dtype
            for tensor in (student_hidden, student_head, student_bias)
        )
        ctx.mark_non_differentiable(*(tensor for tensor in results if tensor is not None))
        ctx.set_materialize_grads(False)
        return (loss, *results)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "span_divergence: strategy 'chunked' has no second derivative "
                "(create_graph=True); use strategy='reference' for one"
            )
        grad_loss = grad_outputs[0]
        if grad_loss is None:
            return (None,) * 7
        scaled = (
            None if gradient is None else _scale(gradient, grad_loss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def _compute(
    inputs: SpanInputs, options: SpanOptions, plan: WorkspacePlan, needed: tuple[bool, ...]
) -> tuple[Tensor, TokenResults, Gradients]:
    """Loss, results and gradients, chunk by chunk, block by block."""
    workspace = Workspace(plan, inputs.student_hidden.device)
    results = TokenResults.empty(inputs)
    gradients = Gradients.zeros(inputs, needed)
    factor = gradient_scale(options) / options.temperature
    for start, stop in _ranges(0, inputs.num_tokens, plan.rows):
        chunk = inputs.rows(start, stop)
        student, teacher = _project(chunk, workspace)
        for first, last in _ranges(0, stop - start, plan.block):
            _finish_block(
                chunk.rows(first, last),
                student[first:last],
                teacher[first:last],
                workspace.scratch[:, : last - first],
                options,
                results.rows(start + first, start + last),
                needs_gradient=any(needed),
            )
        if any(needed):
            student_logprob = results.rows(start, stop).student_logprob
            row_scale = chunk.token_weights(student_logprob, options) * factor
            gradients.add(chunk, slice(start, stop), row_scale, workspace)
    weights = inputs.token_weights(results.student_logprob, options)
    return (weights * results.per_token).sum(), results, gradients


def _project(chunk: SpanInputs, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Logits without bias, [R, V] of the student and of the teacher, in the workspace."""
    num_rows, dtype = chunk.num_tokens, workspace.plan.dtype
    both = workspace.logits[: 2 * num_rows]
    student, teacher = both[:num_rows], both[num_rows:]
    student_hidden, teacher_hidden = chunk.student_hidden.to(dtype), chunk.teacher_hidden.to(dtype)
    if chunk.head_is_shared:
        workspace.project(torch.cat([student_hidden, teacher_hidden]), chunk.student_head, out=both)
    else:
        workspace.project(student_hidden, chunk.student_head, out=student)
        workspace.project(teacher_hidden, chunk.teacher_head, out=teacher)
    return student, teacher


def _finish_block(
    block: SpanInputs,
    student: Tensor,  # [R, V] logits without bias in; G without its row scale out
    teacher: Tensor,  # [R, V] logits without bias in; overwritten
    scratch: Tensor,  # [num_scratch, R, V]
    options: SpanOptions,
    out: TokenResults,  # [R] each
    *,
    needs_gradient: bool,
) -> None:
    """All elementwise work of a block of rows."""
    log_p, log_q, spare, *more = scratch
    tanh_squared = more[0] if more else None
    _finish_logits(teacher, block.teacher_bias, options, tanh_squared)
    _finish_logits(student, block.student_bias, options, tanh_squared)  # last: its tanh^2 stays
    torch.log_softmax(student, -1, out=log_p)
    torch.log_softmax(teacher, -1, out=log_q)
    p, q = torch.exp(log_p, out=student), torch.exp(log_q, out=teacher)
    torch.sum(torch.mul(p, log_p, out=spare), -1, out=out.student_entropy).neg_()
    torch.sum(torch.mul(q, log_q, out=spare), -1, out=out.teacher_entropy).neg_()
    if block.token_ids is not None:
        assert out.student_logprob is not None and out.teacher_logprob is not None
        ids = block.token_ids[:, None]
        torch.gather(log_p, -1, ids, out=out.student_logprob[:, None])
        torch.gather(log_q, -1, ids, out=out.teacher_logprob[:, None])
    if options.top_k is None or options.top_k == block.vocab_size:
        terms = divergence_terms(log_p, log_q, p, q, options)
        out.per_token.copy_(terms.value)
        if needs_gradient:
            torch.addcmul(terms.e, p, terms.total, value=-1, out=student)
    else:
        out.per_token.copy_(_finish_top_k(log_p, log_q, spare, options, gradient=student))
    if needs_gradient and tanh_squared is not None:
        student.addcmul_(student, tanh_squared, value=-1)


def _finish_logits(
    logits: Tensor, bias: Tensor | None, options: SpanOptions, tanh_squared: Tensor | None
) -> None:
    """`softcap(logits + bias) / temperature` in place; keeps tanh^2 for the gradient."""
    if bias is not None:
        logits.add_(bias)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_()
        torch.mul(logits, logits, out=tanh_squared)
        logits.mul_(options.softcap / options.temperature)
    elif options.temperature != 1:
        logits.div_(options.temperature)


def _finish_top_k(
    log_p: Tensor, log_q: Tensor, spare: Tensor, options: SpanOptions, *, gradient: Tensor
) -> Tensor:
    """[R] divergence over the top-k buckets; G into `gradient`. Overwrites all [R, V] buffers."""
    assert options.top_k is not None
    ids = torch.topk(log_p, options.top_k, dim=-1, sorted=False).indices
    bucket_p, log_tail = _buckets(log_p, ids, spare, tail=options.tail)
    bucket_q, _ = _buckets(log_q, ids, spare, tail=options.tail)
    p, q = bucket_p.exp(), bucket_q.exp()
    terms = divergence_terms(bucket_p, bucket_q, p, q, options)
    of_buckets = terms.e - p * terms.total  # [R, k] or, with the tail, [R, k + 1]
    if log_tail is None:
        gradient.zero_()
    else:  # log_p is -inf at ids: exp gives the shares of the tail's tokens, and 0 elsewhere
        torch.sub(log_p, log_tail, out=gradient).exp_().mul_(of_buckets[:, -1:])
    gradient.scatter_(-1, ids, of_buckets[:, : options.top_k])
    return terms.value


def _buckets(
    log_p: Tensor, ids: Tensor, spare: Tensor, *, tail: bool
) -> tuple[Tensor, Tensor | None]:
    """([R, k] or [R, k + 1] log-probs of the buckets, [R, 1] log-mass of the tail or None).

    With a tail, sets `log_p` to -inf at `ids`. The logsumexp is spelled out, as the library's own
    allocates [R, V].
    """
    kept = log_p.gather(-1, ids)
    if not tail:
        return kept - kept.logsumexp(-1, keepdim=True), None
    log_p.scatter_(-1, ids, -math.inf)
    highest = log_p.amax(-1, keepdim=True)
    mass = torch.sub(log_p, highest, out=spare).exp_().sum(-1, keepdim=True)
    log_tail = mass.log_().add_(highest)
    return torch.cat([kept, log_tail], dim=-1), log_tail


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * gradient` rounded once to `dtype`; holds no second wide copy of the gradient."""
    if gradient.dtype == dtype:
        return gradient * factor
    result = gradient.new_empty(gradient.shape, dtype=dtype)
    step = max(1, CAST_BYTES // max(1, gradient[:1].nbytes))
    for start, stop in _ranges(0, gradient.shape[0], step):
        result[start:stop] = gradient[start:stop] * factor
    return result


def _ranges(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """Consecutive half-open ranges of at most `step` that cover start..stop."""
    return [(first, min(first + step, stop)) for first in range(start, stop, max(1, step))]
