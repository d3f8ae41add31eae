"""The strategy "tiled" on Triton: sweep, loss and gradients of one call, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed
from rosd_kernels.gpu.chunks import GradientChunks
from rosd_kernels.gpu.gradient import grad_logits
from rosd_kernels.gpu.loss import loss
from rosd_kernels.gpu.pair import Pair
from rosd_kernels.gpu.select import select
from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.row_groups import RowGroups
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, sweep_sides
from rosd_kernels.tiles import ROW_BLOCK, num_row_blocks

LOSS_PLANES = 2  # partial sums of a row and tile, see gpu/loss.py


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
        student = self.pair.student_hidden, self.pair.student_head
        self.chunks = GradientChunks.of(*student, permutation, workspace_mib=options.workspace_mib)
        self.groups = RowGroups.of(
            inputs.num_tokens,
            inputs.vocab_size,
            torch.float32,
            planes=LOSS_PLANES,
            budget=options.workspace_mib,
        )
        self.sweep_bytes = 0
        self.workspace_bytes = max(self.chunks.workspace_bytes, self.groups.num_bytes)

    def sweep(self, columns: Tensor | None, rows: slice = slice(None)) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher; see `tiled.Tiles`."""
        return sweep_sides(self._sweep, self.pair.hidden, columns, rows, is_stacked=self.is_stacked)

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
        found = []
        for rows in self.groups.slices():
            blocks = slice(rows.start // ROW_BLOCK, num_row_blocks(rows.stop))
            of_rows = student_lse[rows], teacher_lse[rows], active[blocks]
            found.append(loss(self.pair.at(rows), *of_rows))
        value, total = torch.cat(found, dim=1)
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
        """dh [N, H] and db [V] in float32, dW [V, H]: see `GradientChunks`."""

        def write(chunk: Tensor, first_tile: int, out: Tensor) -> None:
            lse = student_lse, teacher_lse
            grad_logits(self.pair, *lse, chunk, total, row_scale, first_tile=first_tile, out=out)

        return self.chunks.gradients(active, needed, write)
