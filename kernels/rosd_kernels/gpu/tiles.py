"""The strategy "tiled" on Triton: sweep, loss and gradients of one call, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed
from rosd_kernels.gpu.gradient import grad_dtype, grad_head, grad_hidden, grad_logits
from rosd_kernels.gpu.loss import loss
from rosd_kernels.gpu.pair import Pair
from rosd_kernels.gpu.select import select
from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, sweep_sides
from rosd_kernels.tiles import TILE, num_tiles
from rosd_kernels.workspace import MIB


class TritonTiles:
    """Implements `tiled.Tiles` with Triton kernels.

    permutation: [V] int64, the head's row of each position of the vocabulary; None: its own order.
    """

    def __init__(
        self, inputs: SpanInputs, options: SpanOptions, permutation: Tensor | None
    ) -> None:
        self.pair = Pair.of(inputs, options, permutation)
        same_dtype = inputs.student_hidden.dtype == inputs.teacher_hidden.dtype
        self.is_stacked = inputs.is_stacked and same_dtype
        self.grad_dtype = grad_dtype(self.pair.student_hidden, self.pair.student_head)
        # Tiles whose G fits the budget, at least one.
        row_bytes = TILE * self.grad_dtype.itemsize
        fitting = int(options.workspace_mib * MIB) // (max(inputs.num_tokens, 1) * row_bytes)
        self.chunk_tiles = min(max(1, fitting), num_tiles(inputs.vocab_size))
        self.workspace_bytes = inputs.num_tokens * self.chunk_tiles * row_bytes

    def sweep(self, columns: Tensor | None) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher; see `tiled.Tiles`."""
        return sweep_sides(self._sweep, self.pair.hidden, columns, is_stacked=self.is_stacked)

    def _sweep(
        self, hidden: Tensor, side: int, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        pair = self.pair
        return sweep(hidden, pair.heads[side], pair.transforms[side], pair.order, columns)

    def select(
        self,
        student: TileStats,
        teacher: TileStats,
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,  # [N]
        rule: Sparsity,
    ) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile."""
        return select(student, teacher, student_lse, teacher_lse, rule)

    def loss(
        self, active: Tensor, student_lse: Tensor, teacher_lse: Tensor, needed: Needed
    ) -> tuple[Tensor, Tensor]:
        """([N] sum of c, [N] sum of e) over the active tiles of each row."""
        value, total = loss(self.pair, student_lse, teacher_lse, active)
        return value, total

    def gradients(
        self,
        active: Tensor,  # [B, T] uint8
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,  # [N]
        total: Tensor,  # [N] K
        row_scale: Tensor,  # [N] weight / temperature
        needed: Needed,
    ) -> Gradients:
        """dh [N, H] and db [V] in float32, dW [V, H] in the head's dtype.

        The vocabulary is processed in chunks of as many tiles as the workspace holds G of.
        """
        hidden, head, order = self.pair.student_hidden, self.pair.student_head, self.pair.order
        (N, H), V = hidden.shape, head.shape[0]
        needs_hidden, needs_head, needs_bias = needed
        dh = hidden.new_zeros(N, H, dtype=torch.float32) if needs_hidden else None
        dW = torch.empty_like(head, memory_format=torch.contiguous_format) if needs_head else None
        db = head.new_empty(V, dtype=torch.float32) if needs_bias else None
        workspace = hidden.new_empty(N, self.chunk_tiles * TILE, dtype=self.grad_dtype)
        rows = (total, row_scale)
        for first in range(0, active.shape[1], self.chunk_tiles):
            chunk = active[:, first : first + self.chunk_tiles]
            G = workspace[:, : chunk.shape[1] * TILE]
            grad_logits(self.pair, student_lse, teacher_lse, chunk, *rows, first_tile=first, out=G)
            if dh is not None:
                grad_hidden(G, head, order, chunk, first_tile=first, out=dh)
            if dW is not None or db is not None:
                out = {"out": dW, "out_bias": db}
                grad_head(G, hidden, order, chunk, first_tile=first, vocab_size=V, **out)
        return Gradients(dh, dW, db)
