"""The gradients of a block of rows of which some columns are computed: G is [R, A] and not [R, V].

    dh = G W[index]        dW[index] += G^T h        db[index] += G^T 1

Rows of the head are gathered into a buffer of the workspace, piece by piece, for library GEMMs; the
rows of dW leave through the same buffer. The indices of a piece are unique: equal calls give equal
bits. Work on [A, H] instead of [V, H]: the share A/V of a sweep each.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Leaves, Needed, zero_gradients
from rosd_kernels.records import HeadSum
from rosd_kernels.workspace import Workspace, multiply

UNTOUCHED_BYTES = 1 << 20  # of a gradient for which pages are worth the trouble


def untouched_gradients(
    leaves: Leaves, needed: Needed, dtype: torch.dtype, head_sum: HeadSum | None = None
) -> Gradients:
    """`zero_gradients`, with pages of dW that cost neither time nor memory until they are written.

    Most rows of dW never are. Filling 113 MB with zeros takes as long as two thirds of a sweep of
    128 tokens over that head, nearly all of it for page faults. Where backward multiplies the
    gradient by something else than 1, it writes all of it.
    """
    head = leaves[1]
    num_bytes = head.numel() * dtype.itemsize
    if (
        not needed[1]
        or head_sum is not None
        or head.device.type != "cpu"
        or num_bytes < UNTOUCHED_BYTES
    ):
        return zero_gradients(leaves, needed, dtype, head_sum)
    rest = zero_gradients(leaves, (needed[0], False, needed[2]), dtype)
    memory = mmap.mmap(-1, num_bytes)  # the tensor keeps it alive
    return rest._replace(head=torch.frombuffer(memory, dtype=dtype).view(head.shape))


def add_gradients(
    gradients: Gradients,
    grad_logits: Tensor,  # [R, A] G, or [R, V]
    hidden: Tensor,  # [R, H]
    head: Tensor,  # [V, H]
    rows: slice,  # of gradients.hidden
    index: Tensor | None,  # [A] int64; None: all columns
    workspace: Workspace,
    *,
    row_scale: Tensor | None = None,  # [R] factor of G's rows; None: 1
) -> None:
    """Add a block of rows."""
    of_hidden, of_head, of_bias = gradients
    if of_hidden is not None:
        found = (
            workspace.backproject(grad_logits, head)
            if index is None
            else backproject(grad_logits, head, index, workspace)
        )
        of_hidden[rows] = found if row_scale is None else found.mul_(row_scale[:, None])
    if of_head is not None:
        scaled = workspace.operand(hidden)
        if row_scale is not None:
            scaled = scaled * row_scale[:, None]
        if index is None:
            multiply(grad_logits.T, scaled, out=of_head, add=True)
        else:
            add_to_head(of_head, grad_logits, scaled, index, workspace)
    if of_bias is not None:
        part = grad_logits.sum(0) if row_scale is None else grad_logits.T @ row_scale
        if index is None:
            of_bias.add_(part)
        else:
            of_bias.index_add_(0, index, part)


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
