"""Strategy "chunked" with a sparsity: gradients of the entries that matter, in 1 + 2f units.

    logits = h W^T                       1 unit: all entries, a block of rows
    values, active entries               active.py: one read of the logits, and a few tiles again
    slopes, G of the active entries      compacted in place, [R, A]
    dh = G W[index], dW[index] += G^T h  compact.py: 2f units, or f without dW

with f = A/V. Log-probs and entropies are those of all entries, and every active entry's G is exact,
so the error is what the others would have had. With their mass P_D and the slopes a and b,

    |a| P_D + |b| sum_D p_v |log p_v + entropy| <= |a| P_D + |b| (sum_D -p_v log p_v + entropy P_D).

A sampled token is active in any case.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.active import ActiveEntries, Side, compact_, lost_mass, select_entries
from rosd_kernels.autograd import Gradients, Needed, ranges
from rosd_kernels.compact import add_gradients, untouched_gradients
from rosd_kernels.elementwise import uses_native
from rosd_kernels.logprob.elementwise import gradient, row_factors
from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    Slopes,
    TokenLoss,
    TokenValues,
)
from rosd_kernels.logprob.token_loss import evaluate
from rosd_kernels.records import SpanStats
from rosd_kernels.sparse_chunks import PLAIN_SCRATCH
from rosd_kernels.sparsity import measured_counts
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace, WorkspacePlan


class SparseChunks:
    """The passes over the rows of one call, through one workspace; as `chunked.Chunks`."""

    def __init__(
        self, inputs: LogprobInputs, options: LogprobOptions, vocabulary: Vocabulary
    ) -> None:
        self.inputs, self.vocabulary = inputs, vocabulary
        self.transform, self.scale = inputs.transform(options), inputs.scale(options)
        self.rule = options.sparsity.of_shard(vocabulary.num_shards)
        columns = vocabulary.columns(inputs.token_ids)
        assert columns is not None
        self.columns = columns
        self.hidden, self.head = inputs.hidden.detach(), inputs.head.detach()
        is_fused = uses_native(inputs.hidden.new_empty(0, dtype=inputs.compute_dtype))
        self.plan = WorkspacePlan.of(
            [(inputs.hidden, inputs.head)],
            vocabulary,
            workspace_mib=options.workspace_mib,
            scratch_rows=0 if is_fused else PLAIN_SCRATCH,
            is_fused=is_fused,
            is_sparse=True,
        )
        self.workspace = Workspace(self.plan, inputs.hidden.device)
        self.num_computed = 0
        # [2, N] mass and `sum -p log p` of what has no gradient; [N] bound on the gradient's error
        self.lost = self.hidden.new_zeros(2, inputs.num_tokens, dtype=self.plan.dtype)
        self.bound = torch.zeros_like(self.lost[0])

    @property
    def stats(self) -> SpanStats:
        """What was skipped; a collective."""
        num_pairs = self.inputs.num_tokens * self.inputs.vocab_size
        counts = self.bound.new_tensor([self.num_computed, num_pairs])
        found = measured_counts(counts, self.lost[0], self.bound, self.vocabulary)
        return SpanStats(strategy="chunked", workspace_bytes=self.plan.num_bytes, measured=found)

    def values(self) -> TokenValues:
        """One sweep: the values of all tokens. The bound is for a slope of one."""
        found = TokenValues.empty(self.inputs)
        for rows, side in self._sides(found):
            self._select(rows, side)
            self.bound[rows] = torch.maximum(self.lost[0, rows], self._entropy_error(rows, side))
        self.bound /= self.transform.temperature
        return found

    def losses(
        self, token_loss: TokenLoss, needed: Needed
    ) -> tuple[Tensor, TokenValues, Gradients]:
        """1 + 2f sweeps: ([N] losses, values, gradients of the losses' sum)."""
        found = TokenValues.empty(self.inputs)
        losses = torch.empty_like(found.lse)
        gradients = self._empty(needed)
        for rows, side in self._sides(found):
            entries = self._select(rows, side)
            values = found.at(rows)
            losses[rows], slopes = evaluate(token_loss, values, rows, any(needed))
            if slopes is not None:
                of_entropy = slopes.entropy.abs() * self._entropy_error(rows, side)
                self.bound[rows] = slopes.logprob.abs() * self.lost[0, rows] + of_entropy
                self._add(gradients, rows, side, entries, slopes)
        self.bound /= self.transform.temperature
        return losses, found, self._summed(gradients)

    def gradients(self, values: TokenValues, slopes: Slopes, needed: Needed) -> Gradients:
        """1 + 2f sweeps: the gradients, given the slopes of all tokens."""
        gradients = self._empty(needed)
        for rows, side in self._sides(None):
            self._add(gradients, rows, side, self._select(rows, side), slopes.at(rows))
        return self._summed(gradients)

    def _empty(self, needed: Needed) -> Gradients:
        inputs = self.inputs
        return untouched_gradients(inputs.leaves, needed, self.plan.dtype, inputs.head_sum)

    def _sides(self, found: TokenValues | None) -> Iterator[tuple[slice, Side]]:
        """Yield the rows of each chunk with their logits, and store their values in `found`."""
        for start, stop in ranges(self.inputs.num_tokens, self.plan.rows):
            rows, logits = slice(start, stop), self.workspace.logits[: stop - start]
            self.workspace.project(self.workspace.operand(self.hidden[rows]), self.head, out=logits)
            side = Side.of(logits, self.transform, self.columns[rows], self.vocabulary)
            if found is not None:
                for of_all, of_rows in zip(found, _values(side), strict=True):
                    of_all[rows] = of_rows
            yield rows, side

    def _select(self, rows: slice, side: Side) -> ActiveEntries:
        """The active entries of a chunk; what the others lose goes to `lost`."""
        entries = select_entries([side], self.rule, always=self.columns[rows])
        lost = self.lost[:, rows]
        if not entries.is_dense:
            lost.copy_(lost_mass(side, entries))
        self.lost[:, rows] = self.vocabulary.sum_(lost.contiguous())
        width = self.inputs.vocab_size if entries.is_dense else len(entries.index)
        self.num_computed += width * (rows.stop - rows.start)
        return entries

    def _entropy_error(self, rows: slice, side: Side) -> Tensor:
        """[R] bound on the error of an entropy's gradient, w.r.t. scaled logits."""
        mass, entropy = self.lost[:, rows]
        return entropy + side.rows.entropy * mass

    def _add(
        self,
        gradients: Gradients,
        rows: slice,
        side: Side,
        entries: ActiveEntries,
        slopes: Slopes,
    ) -> None:
        """Turn a chunk's logits into G and add its gradients."""
        logits, transform, columns = side.logits, self.transform, self.columns[rows]
        index = None if entries.is_dense else entries.index
        if index is not None:
            logits, transform = compact_(logits, index), transform.at(index)
            columns = torch.where(columns >= 0, torch.searchsorted(index, columns), -1)
        factors = row_factors(_values(side), slopes, self.scale)
        gradient(logits, transform, columns, side.rows.lse, factors, out=logits)
        add_gradients(gradients, logits, self.hidden[rows], self.head, rows, index, self.workspace)

    def _summed(self, gradients: Gradients) -> Gradients:
        if gradients.hidden is not None:
            self.vocabulary.sum_(gradients.hidden)
        return gradients


def _values(side: Side) -> TokenValues:
    lse, entropy, logprob = side.rows
    assert logprob is not None
    return TokenValues(lse, entropy, logprob)
