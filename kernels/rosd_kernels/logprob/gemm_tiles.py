"""The dense work of strategy "tiled" with library GEMMs and elementwise passes (CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed, zero_gradients
from rosd_kernels.head_tiles import (
    SWEEP_ROWS,
    HeadTiles,
    TileRange,
    active_chunks,
    chunk_width,
    within,
)
from rosd_kernels.logprob.elementwise import gradient
from rosd_kernels.logprob.records import LogprobInputs, LogprobOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, select_tiles
from rosd_kernels.workspace import MIB


class GemmLogprobTiles:
    """Implements `logprob.tiled.Tiles` with library GEMMs.

    permutation: [V] int64, the head's row of each position of the vocabulary; None: its own order.
    """

    def __init__(
        self, inputs: LogprobInputs, options: LogprobOptions, permutation: Tensor | None
    ) -> None:
        self.inputs, self.dtype = inputs, inputs.compute_dtype
        self.head = HeadTiles(inputs.head, inputs.transform(options), permutation, self.dtype)
        self.hidden = inputs.hidden.detach().to(self.dtype)
        column_bytes = (SWEEP_ROWS + self.head.copied_width) * self.dtype.itemsize
        budget = int(options.workspace_mib * MIB) // 2  # the other half is for statistics
        self.width = chunk_width(budget, column_bytes, inputs.vocab_size)
        self.sweep_bytes = self.workspace_bytes = column_bytes * self.width
        self.logits = self.hidden.new_empty(SWEEP_ROWS * self.width)

    def sweep(self, columns: Tensor, rows: slice = slice(None)) -> Sweep:
        """Statistics of all tiles; see `logprob.tiled.Tiles`."""
        found, sampled = self.head.sweep(
            self.hidden[rows], columns[rows], width=self.width, logits=self.logits
        )
        return Sweep(TileStats(*found), sampled)

    def select(self, stats: TileStats, lse: Tensor, rule: Sparsity) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile."""
        return select_tiles(stats, stats, lse, lse, rule)

    def gradients(
        self, active: Tensor, columns: Tensor, lse: Tensor, factors: Tensor, needed: Needed
    ) -> Gradients:
        """Gradients from the active tiles, in the compute dtype."""
        hidden, head, bias = zero_gradients(
            self.inputs.leaves, needed, self.dtype, self.inputs.head_sum
        )
        num_tokens, vocab_size = self.inputs.num_tokens, self.inputs.vocab_size
        for chunk, found in active_chunks(active, num_tokens, vocab_size, self.width):
            of_chunk = self.head.rows(chunk)
            for tiles in found:
                of_tiles = of_chunk[tiles.local]
                G = self._grad_logits(tiles, of_tiles, columns, lse, factors)
                if hidden is not None:
                    hidden[tiles.rows].addmm_(G, of_tiles)
                if head is not None:
                    self.head.add(head, tiles.columns, G.T @ self.hidden[tiles.rows])
                if bias is not None:
                    self.head.add(bias, tiles.columns, G.sum(0))
        return Gradients(hidden, head, bias)

    def _grad_logits(
        self, tiles: TileRange, head: Tensor, columns: Tensor, lse: Tensor, factors: Tensor
    ) -> Tensor:
        """G of a range, in the workspace."""
        rows = tiles.rows
        shape = rows.stop - rows.start, head.shape[0]
        logits = self.logits[: shape[0] * shape[1]].view(shape)
        torch.mm(self.hidden[rows], head.T, out=logits)
        transform = self.head.transform.at(tiles.columns)
        local = within(columns[rows], tiles.columns)
        gradient(logits, transform, local, lse[rows], factors[:, rows], out=logits)
        return logits
