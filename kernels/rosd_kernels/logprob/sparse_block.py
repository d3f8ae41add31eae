"""The elementwise work on a chunk of logits of which some entries have a gradient.

    values           of whole rows
    lost_mass        sums of p and of -p log p over the entries that have none
    add              G of the others, compacted in place to [R, A], and the GEMMs that read it

Its rows share their active entries, see active.py; compact.py has the GEMMs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rosd_kernels.active import Side, compact_, lost_mass, select_entries
from rosd_kernels.autograd import Gradients
from rosd_kernels.compact import add_gradients
from rosd_kernels.logits import LogitTransform
from rosd_kernels.logprob.elementwise import gradient
from rosd_kernels.logprob.records import TokenValues
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary
from rosd_kernels.workspace import Workspace


class Block(Protocol):
    """A chunk on one device."""

    values: TokenValues  # [R] each, over all shards
    num_computed: Tensor | int  # pairs of a row and an active entry

    def __init__(
        self,
        logits: Tensor,  # [R, V] raw; `add` overwrites them
        transform: LogitTransform,
        columns: Tensor,  # [R] int64 of the sampled tokens, -1: another shard's
        rule: Sparsity,
        vocabulary: Vocabulary,
    ) -> None: ...

    def lost_mass(self) -> Tensor:
        """[2, R] sums of p and of -p log p over this shard's entries without a gradient."""
        ...

    def add(
        self,
        gradients: Gradients,
        factors: Tensor,  # [3, R], see `row_factors`
        hidden: Tensor,  # [R, H]
        head: Tensor,  # [V, H]
        rows: slice,  # of gradients.hidden
        workspace: Workspace,
    ) -> None:
        """Add the chunk's gradients; the last call, after which the logits are no longer there."""
        ...


class SparseBlock:
    """`Block` in C++ or plain PyTorch, and library GEMMs."""

    def __init__(
        self,
        logits: Tensor,
        transform: LogitTransform,
        columns: Tensor,
        rule: Sparsity,
        vocabulary: Vocabulary,
    ) -> None:
        self.side = Side.of(logits, transform, columns, vocabulary)
        self.columns, self.values = columns, TokenValues.of(self.side.rows)
        self.entries = select_entries([self.side], rule, always=columns)
        num_rows, width = logits.shape
        num_active = width if self.entries.is_dense else len(self.entries.index)
        self.num_computed: Tensor | int = num_rows * num_active

    def lost_mass(self) -> Tensor:
        """See `Block.lost_mass`."""
        if self.entries.is_dense:
            return self.values.lse.new_zeros(2, len(self.columns))
        return lost_mass(self.side, self.entries)

    def add(
        self,
        gradients: Gradients,
        factors: Tensor,
        hidden: Tensor,
        head: Tensor,
        rows: slice,
        workspace: Workspace,
    ) -> None:
        """See `Block.add`."""
        logits, transform, columns = self.side.logits, self.side.transform, self.columns
        index = None if self.entries.is_dense else self.entries.index
        if index is not None:
            logits, transform = compact_(logits, index), transform.at(index)
            columns = torch.where(columns >= 0, torch.searchsorted(index, columns), -1)
        gradient(logits, transform, columns, self.values.lse, factors, out=logits)
        add_gradients(gradients, logits, hidden, head, rows, index, workspace)
