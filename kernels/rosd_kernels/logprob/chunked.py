"""Strategy "chunked": a bounded workspace for the logits of a chunk of rows (tokens).

    logits = h W^T                      one GEMM
    values, slopes, G                   elementwise.py, in blocks of rows, see workspace.py
    dh = G W,  dW += G^T h,  db += G    two GEMMs

With `token_loss` all of it is one pass, 3 sweeps of the head's GEMM in all. Without, forward makes
the first of them and backward, which has the slopes, all three: 4. A head without a gradient saves
`dW`, one sweep. Where all inputs are bfloat16, a GPU multiplies them without conversion and sums in
float32; G is then rounded to bfloat16 too. With a sparsity, sparse_chunks.py restricts the last two
GEMMs to the entries that matter.

Where the vocabulary is sharded, normalizers, entropies and dh are summed over the ranks. Sums have
a fixed sequence and there are no atomics: equal calls give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.autograd import (
    Gradients,
    Needed,
    needed_of,
    precomputed,
    ranges,
    zero_gradients,
)
from rosd_kernels.logprob.autograd import Passes, differentiable
from rosd_kernels.logprob.elementwise import gradient, is_fused, row_factors, row_values
from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    Slopes,
    SpanLogprobOutput,
    TokenLoss,
    TokenValues,
)
from rosd_kernels.logprob.sparse_chunks import SparseChunks
from rosd_kernels.logprob.token_loss import evaluate
from rosd_kernels.plain import NUM_SCRATCH
from rosd_kernels.records import SpanStats
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan, multiply


def run_chunked(
    inputs: LogprobInputs,
    options: LogprobOptions,
    vocabulary: Vocabulary,
    token_loss: TokenLoss | None,
) -> SpanLogprobOutput:
    """Compute log-probs and entropies in chunks of rows that fit `options.workspace_mib`."""
    Rows = Chunks if options.sparsity.rule == "exact" else SparseChunks

    def forward(inputs: LogprobInputs) -> tuple[TokenValues, SpanStats, None]:
        chunks = Rows(inputs, options, vocabulary)
        return chunks.values(), chunks.stats, None

    def backward(
        inputs: LogprobInputs,
        values: TokenValues,
        slopes: Slopes,
        extra: Tensor | None,
        needed: Needed,
    ) -> Gradients:
        return Rows(inputs, options, vocabulary).gradients(values, slopes, needed)

    if token_loss is None:
        return differentiable(inputs, Passes(forward, backward))
    needed = needed_of(inputs.leaves)
    with torch.no_grad():
        chunks = Rows(inputs, options, vocabulary)
        losses, values, gradients = chunks.losses(token_loss, needed)
    return SpanLogprobOutput(
        loss=precomputed("span_logprob", inputs.leaves, losses.sum(), gradients, inputs.head_sum),
        logprob=values.logprob,
        entropy=values.entropy,
        stats=chunks.stats,
    )


class Chunks:
    """The passes over the rows of one call, through one workspace."""

    def __init__(
        self, inputs: LogprobInputs, options: LogprobOptions, vocabulary: Vocabulary
    ) -> None:
        self.inputs, self.vocabulary = inputs, vocabulary
        self.transform, self.scale = inputs.transform(options), inputs.scale(options)
        columns = vocabulary.columns(inputs.token_ids)
        assert columns is not None
        self.columns = columns
        fused = is_fused(inputs.hidden.new_empty(0, dtype=inputs.compute_dtype))
        self.plan = WorkspacePlan.of(
            [(inputs.hidden, inputs.head)],
            vocabulary,
            workspace_mib=options.workspace_mib,
            scratch_rows=0 if fused else NUM_SCRATCH + (options.softcap is not None),
            is_fused=fused,
        )
        self.workspace = Workspace(self.plan, inputs.hidden.device)

    @property
    def stats(self) -> SpanStats:
        return SpanStats(strategy="chunked", workspace_bytes=self.plan.num_bytes)

    def values(self) -> TokenValues:
        """One sweep: the values of all tokens."""
        found = TokenValues.empty(self.inputs)
        for chunk in self._chunks():
            for rows, logits, _ in self._blocks(chunk):
                self._store_values(found, rows, logits)
        return found

    def losses(
        self, token_loss: TokenLoss, needed: Needed
    ) -> tuple[Tensor, TokenValues, Gradients]:
        """Three sweeps: ([N] losses, values, gradients of the losses' sum)."""
        found = TokenValues.empty(self.inputs)
        losses = torch.empty_like(found.lse)
        gradients = self._empty_gradients(needed)
        for chunk in self._chunks():
            for rows, logits, out in self._blocks(chunk):
                self._store_values(found, rows, logits)
                values = found.at(rows)
                losses[rows], slopes = evaluate(token_loss, values, rows, any(needed))
                if slopes is not None:
                    self._gradient(rows, logits, values, slopes, out)
            self._add_gradients(gradients, chunk)
        return losses, found, self._summed(gradients)

    def gradients(self, values: TokenValues, slopes: Slopes, needed: Needed) -> Gradients:
        """Three sweeps: the gradients, given the slopes of all tokens."""
        gradients = self._empty_gradients(needed)
        for chunk in self._chunks():
            for rows, logits, out in self._blocks(chunk):
                self._gradient(rows, logits, values.at(rows), slopes.at(rows), out)
            self._add_gradients(gradients, chunk)
        return self._summed(gradients)

    def _empty_gradients(self, needed: Needed) -> Gradients:
        """Where chunks are added; the first one writes the head's, but not a caller's sum."""
        leaves, is_written = self.inputs.leaves, self.inputs.num_tokens > 0
        head_sum = self.inputs.head_sum
        return zero_gradients(leaves, needed, self.plan.dtype, head_sum, head_is_written=is_written)

    def _chunks(self) -> Iterator[slice]:
        """Yield the rows of each chunk, whose raw logits are then in the workspace."""
        for start, stop in ranges(self.inputs.num_tokens, self.plan.rows):
            hidden = self.workspace.operand(self.inputs.hidden[start:stop].detach())
            logits = self.workspace.logits[: stop - start]
            self.workspace.project(hidden, self.inputs.head.detach(), out=logits)
            yield slice(start, stop)

    def _blocks(self, chunk: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, their logits, the memory of their G), block after block of a chunk."""
        grad_logits = self.workspace.grad_operand(chunk.stop - chunk.start)
        for first, last in ranges(chunk.stop - chunk.start, self.plan.block):
            rows = slice(chunk.start + first, chunk.start + last)
            yield rows, self.workspace.logits[first:last], grad_logits[first:last]

    def _store_values(self, found: TokenValues, rows: slice, logits: Tensor) -> None:
        values = row_values(logits, self.transform, self.columns[rows], self.vocabulary)
        for of_all, of_rows in zip(found, values, strict=True):
            of_all[rows] = of_rows

    def _gradient(
        self, rows: slice, logits: Tensor, values: TokenValues, slopes: Slopes, out: Tensor
    ) -> None:
        factors = row_factors(values, slopes, self.scale)
        gradient(logits, self.transform, self.columns[rows], values.lse, factors, out=out)

    def _add_gradients(self, gradients: Gradients, chunk: slice) -> None:
        """Add a chunk whose G is in the workspace."""
        grad_logits = self.workspace.grad_operand(chunk.stop - chunk.start)
        if gradients.hidden is not None:
            head = self.inputs.head.detach()
            gradients.hidden[chunk] = self.workspace.backproject(grad_logits, head)
        if gradients.head is not None:
            hidden = self.workspace.operand(self.inputs.hidden[chunk].detach())
            multiply(
                grad_logits.T,
                hidden,
                out=gradients.head,
                add=chunk.start > 0 or self.inputs.head_sum is not None,
            )
        if gradients.bias is not None:
            gradients.bias.add_(grad_logits.sum(0, dtype=self.plan.dtype))

    def _summed(self, gradients: Gradients) -> Gradients:
        if gradients.hidden is not None:
            self.vocabulary.sum_(gradients.hidden)
        return gradients
