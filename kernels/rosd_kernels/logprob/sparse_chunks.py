"""Strategy "chunked" with a sparsity: gradients of the entries that matter, in 1 + 2f units.

    logits = h W^T                       1 unit: all entries, a block of rows
    values, active entries               one read of the logits, and a few tiles again
    slopes, G of the active entries      compacted in place, [R, A]
    dh = G W[index], dW[index] += G^T h  2f units, or f without dW

with f = A/V. All but the first is sparse_block.py's, or on a GPU, where chunks are larger and have
several row blocks, gpu/logprob_sparse.py's. Log-probs and entropies are those of all entries, and
every active entry's G is exact, so the error is what the others would have had. With their mass P_D
and the slopes a and b,

    |a| P_D + |b| sum_D p_v |log p_v + entropy| <= |a| P_D + |b| (sum_D -p_v log p_v + entropy P_D).

A sampled token is active in any case.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed, ranges
from rosd_kernels.backends import gpu_logprob_sparse
from rosd_kernels.compact import untouched_gradients
from rosd_kernels.elementwise import uses_native
from rosd_kernels.logprob.elementwise import row_factors
from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    Slopes,
    TokenLoss,
    TokenValues,
)
from rosd_kernels.logprob.sparse_block import Block, SparseBlock
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
        like = inputs.hidden.new_empty(0, dtype=inputs.compute_dtype)
        of_gpu: type[Block] | None = gpu_logprob_sparse(like, like.dtype)
        self.Block: type[Block] = of_gpu or SparseBlock
        is_fused = of_gpu is not None or uses_native(like)
        self.plan = WorkspacePlan.of(
            [(inputs.hidden, inputs.head)],
            vocabulary,
            workspace_mib=options.workspace_mib,
            scratch_rows=0 if is_fused else PLAIN_SCRATCH,
            is_fused=is_fused,
            is_sparse=True,
            is_gathered=of_gpu is not None,
        )
        self.workspace = Workspace(self.plan, inputs.hidden.device)
        # Pairs of a row and an active entry; [N] mass of what has no gradient, and bound on the
        # gradient's error.
        self.num_computed = like.new_zeros(())
        self.lost_mass, self.bound = like.new_zeros(2, inputs.num_tokens)

    @property
    def stats(self) -> SpanStats:
        """What was skipped; a collective."""
        num_pairs = self.inputs.num_tokens * self.inputs.vocab_size
        counts = torch.stack([self.num_computed, torch.full_like(self.num_computed, num_pairs)])
        found = measured_counts(counts, self.lost_mass, self.bound, self.vocabulary)
        return SpanStats(strategy="chunked", workspace_bytes=self.plan.num_bytes, measured=found)

    def values(self) -> TokenValues:
        """One sweep: the values of all tokens. The bound is for a slope of one."""
        found = TokenValues.empty(self.inputs)
        for rows, block in self._blocks(found):
            self.bound[rows] = torch.maximum(*self._errors(rows, block))
        self.bound /= self.transform.temperature
        return found

    def losses(
        self, token_loss: TokenLoss, needed: Needed
    ) -> tuple[Tensor, TokenValues, Gradients]:
        """1 + 2f sweeps: ([N] losses, values, gradients of the losses' sum)."""
        found = TokenValues.empty(self.inputs)
        losses = torch.empty_like(found.lse)
        gradients = self._empty(needed)
        for rows, block in self._blocks(found):
            of_logprob, of_entropy = self._errors(rows, block)
            losses[rows], slopes = evaluate(token_loss, block.values, rows, any(needed))
            if slopes is not None:
                self.bound[rows] = slopes.logprob.abs() * of_logprob
                self.bound[rows] += slopes.entropy.abs() * of_entropy
                self._add(gradients, rows, block, slopes)
        self.bound /= self.transform.temperature
        return losses, found, self._summed(gradients)

    def gradients(self, values: TokenValues, slopes: Slopes, needed: Needed) -> Gradients:
        """1 + 2f sweeps: the gradients, given the slopes of all tokens."""
        gradients = self._empty(needed)
        for rows, block in self._blocks(None):
            self._add(gradients, rows, block, slopes.at(rows))
        return self._summed(gradients)

    def _empty(self, needed: Needed) -> Gradients:
        inputs = self.inputs
        return untouched_gradients(inputs.leaves, needed, self.plan.dtype, inputs.head_sum)

    def _blocks(self, found: TokenValues | None) -> Iterator[tuple[slice, Block]]:
        """Yield the rows of each chunk with their logits, and store their values in `found`."""
        for start, stop in ranges(self.inputs.num_tokens, self.plan.rows):
            rows, logits = slice(start, stop), self.workspace.logits[: stop - start]
            self.workspace.project(self.workspace.operand(self.hidden[rows]), self.head, out=logits)
            block = self.Block(
                logits, self.transform, self.columns[rows], self.rule, self.vocabulary
            )
            if found is not None:
                for of_all, of_rows in zip(found, block.values, strict=True):
                    of_all[rows] = of_rows
            yield rows, block

    def _errors(self, rows: slice, block: Block) -> tuple[Tensor, Tensor]:
        """[R] bounds on the gradients' errors w.r.t. scaled logits: log-probs', entropies'.

        They are what the entries without a gradient hold, which is noted.
        """
        mass, entropy = self.vocabulary.sum_(block.lost_mass())
        self.lost_mass[rows] = mass
        self.num_computed += block.num_computed
        return mass, entropy + block.values.entropy * mass

    def _add(self, gradients: Gradients, rows: slice, block: Block, slopes: Slopes) -> None:
        """Turn a chunk's logits into G and add its gradients."""
        factors = row_factors(block.values, slopes, self.scale)
        block.add(gradients, factors, self.hidden[rows], self.head, rows, self.workspace)

    def _summed(self, gradients: Gradients) -> Gradients:
        if gradients.hidden is not None:
            self.vocabulary.sum_(gradients.hidden)
        return gradients
