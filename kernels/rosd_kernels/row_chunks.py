"""What the dense and the sparse passes of strategy "chunked" have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.autograd import TokenResults
from rosd_kernels.records import SpanInputs
from rosd_kernels.rows import RowStats
from rosd_kernels.workspace import Workspace


def project_sides(chunk: SpanInputs, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Raw logits, [R, V] of the student and of the teacher, in the workspace."""
    num_rows = chunk.num_tokens
    both = workspace.logits[: 2 * num_rows]
    student, teacher = both[:num_rows], both[num_rows:]
    student_hidden = workspace.operand(chunk.student_hidden)
    teacher_hidden = workspace.operand(chunk.teacher_hidden)
    if chunk.head_is_shared:
        workspace.project(torch.cat([student_hidden, teacher_hidden]), chunk.student_head, out=both)
    else:
        workspace.project(student_hidden, chunk.student_head, out=student)
        workspace.project(teacher_hidden, chunk.teacher_head, out=teacher)
    return student, teacher


def empty_results(inputs: SpanInputs) -> TokenResults:
    def empty() -> Tensor:
        return inputs.student_hidden.new_empty(inputs.num_tokens, dtype=inputs.compute_dtype)

    logprobs = (None, None) if inputs.token_ids is None else (empty(), empty())
    return TokenResults(empty(), *logprobs, empty(), empty())


def store(
    results: TokenResults, rows: slice, value: Tensor, student: RowStats, teacher: RowStats
) -> None:
    found = TokenResults(value, student.logprob, teacher.logprob, student.entropy, teacher.entropy)
    for result, part in zip(results, found, strict=True):
        if result is not None and part is not None:
            result[rows] = part
