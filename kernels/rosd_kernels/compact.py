"""The gradients of a block of rows of which some columns are computed: G is [R, A] and not [R, V].

    dh = G W[index]        dW[index] += G^T h        db[index] += G^T 1

Rows of the head are gathered into a buffer of the workspace, piece by piece, for library GEMMs; the
rows of dW leave through the same buffer. The indices of a piece are unique: equal calls give equal
bits. Work on [A, H] instead of [V, H]: the share A/V of a sweep each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients
from rosd_kernels.records import SpanInputs
from rosd_kernels.workspace import Workspace, multiply


def add_gradients(
    gradients: Gradients,
    chunk: SpanInputs,
    rows: slice,
    row_scale: Tensor,  # [R] weight / temperature
    index: Tensor | None,  # [A] int64; None: all columns
    workspace: Workspace,
) -> None:
    """Add a chunk whose G is in the first columns of the workspace."""
    width = chunk.vocab_size if index is None else len(index)
    grad_logits = workspace.logits[: chunk.num_tokens, :width]
    head, column = chunk.student_head, row_scale[:, None]
    scaled = workspace.operand(chunk.student_hidden.to(column.dtype) * column)
    if index is None:
        if gradients.hidden is not None:
            torch.mul(workspace.backproject(grad_logits, head), column, out=gradients.hidden[rows])
        if gradients.head is not None:
            multiply(grad_logits.T, scaled, out=gradients.head, add=True)
        if gradients.bias is not None:
            gradients.bias.addmv_(grad_logits.T, row_scale)
        return
    if gradients.hidden is not None:
        found = backproject(grad_logits, head, index, workspace)
        torch.mul(found, column, out=gradients.hidden[rows])
    if gradients.head is not None:
        add_to_head(gradients.head, grad_logits, scaled, index, workspace)
    if gradients.bias is not None:
        gradients.bias.index_add_(0, index, grad_logits.T @ row_scale)


def backproject(grad_logits: Tensor, head: Tensor, index: Tensor, workspace: Workspace) -> Tensor:
    """`G W[index]`, [R, H], of [R, A] G and [V, H] W; index [A] int64."""
    total = grad_logits.new_zeros(grad_logits.shape[0], head.shape[1])
    for columns, buffer in _pieces(index, head.shape[1], workspace):
        if head.dtype == buffer.dtype:
            torch.index_select(head, 0, index[columns], out=buffer)
        else:
            buffer.copy_(head.index_select(0, index[columns]))
        multiply(grad_logits[:, columns], buffer, out=total, add=True)
    return total


def add_to_head(
    gradient: Tensor,  # [V, H], in the dtype of G
    grad_logits: Tensor,  # [R, A] G
    hidden: Tensor,  # [R, H], in the dtype of G
    index: Tensor,  # [A] int64
    workspace: Workspace,
) -> None:
    """`gradient[index] += G^T hidden`."""
    for columns, buffer in _pieces(index, hidden.shape[1], workspace):
        multiply(grad_logits[:, columns].T, hidden, out=buffer)
        gradient.index_add_(0, index[columns], buffer)


def _pieces(index: Tensor, width: int, workspace: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns of G, a buffer [their number, width]) until all of them are done."""
    rows = len(workspace.cast) // width
    for start in range(0, len(index), max(1, rows)):
        columns = slice(start, min(start + rows, len(index)))
        size = columns.stop - start
        yield columns, workspace.cast[: size * width].view(size, width)
