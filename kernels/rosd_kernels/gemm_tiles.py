"""The dense work of strategy "tiled" with library GEMMs and elementwise passes (CPU).

head_tiles.py cuts the heads into chunks of the vocabulary and those into ranges of active tiles.
If both logits of all active tiles fit into half of the workspace, they are kept from the loss to
the gradient instead of being computed twice: 2 + 4f units instead of 2 + 6f.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed, zero_gradients
from rosd_kernels.elementwise import subtract_total, terms_
from rosd_kernels.head_tiles import SWEEP_ROWS, HeadTiles, TileRange, active_chunks, chunk_width
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, select_tiles, sweep_sides
from rosd_kernels.tiles import ROW_BLOCK, TILE
from rosd_kernels.workspace import MIB


class GemmTiles:
    """Implements `tiled.Tiles` with library GEMMs.

    permutation: [V] int64, the head's row of each position of the vocabulary; None: its own order.
    """

    def __init__(
        self, inputs: SpanInputs, options: SpanOptions, permutation: Tensor | None
    ) -> None:
        self.inputs, self.options = inputs, options
        self.dtype = inputs.compute_dtype
        heads = inputs.student_head, inputs.teacher_head
        self.heads = [
            HeadTiles(head, transform, permutation, self.dtype)
            for head, transform in zip(heads, inputs.transforms(options), strict=True)
        ]
        self.hidden = (
            inputs.student_hidden.detach().to(self.dtype),
            inputs.teacher_hidden.to(self.dtype),
        )
        # Both sides' logits of a row block (twice that in a stacked sweep), and copies of heads.
        copied = sum(head.copied_width for head in self.heads)
        column_bytes = (SWEEP_ROWS + copied) * self.dtype.itemsize
        self.budget = int(options.workspace_mib * MIB)
        self.width = chunk_width(self.budget // 2, column_bytes, inputs.vocab_size)
        self.workspace_bytes = column_bytes * self.width
        self.logits = inputs.student_hidden.new_empty(SWEEP_ROWS * self.width, dtype=self.dtype)
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def sweep(self, columns: Tensor | None) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher; see `tiled.Tiles`."""
        is_stacked = self.inputs.is_stacked
        return sweep_sides(self._sweep, self.hidden, columns, is_stacked=is_stacked)

    def _sweep(
        self, hidden: Tensor, side: int, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ([4, M, T] statistics, [M] logits of the sampled tokens or None)."""
        return self.heads[side].sweep(hidden, columns, width=self.width, logits=self.logits)

    def select(
        self,
        student: TileStats,
        teacher: TileStats,
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,  # [N]
        rule: Sparsity,
    ) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile."""
        return select_tiles(student, teacher, student_lse, teacher_lse, rule)

    def loss(
        self, active: Tensor, student_lse: Tensor, teacher_lse: Tensor, needed: Needed
    ) -> tuple[Tensor, Tensor]:
        """([N] sum of c, [N] sum of e) over the active tiles of each row."""
        sums = student_lse.new_zeros(2, self.inputs.num_tokens)
        rows_of_tiles = active.sum(1, dtype=torch.int64) * TILE * ROW_BLOCK
        num_bytes = 2 * int(rows_of_tiles.sum()) * self.dtype.itemsize
        if any(needed) and num_bytes <= self.budget // 2:
            self.kept = {}
            self.workspace_bytes += num_bytes
        for tiles, heads in self._tile_ranges(active):
            student, teacher = self._logits(tiles, heads)
            sums[:, tiles.rows] += self._terms(tiles, student, teacher, student_lse, teacher_lse)
            if self.kept is not None:
                self.kept[tiles.rows.start, tiles.columns.start] = student, teacher
        return sums[0], sums[1]

    def gradients(
        self,
        active: Tensor,  # [B, T] uint8
        student_lse: Tensor,  # [N]
        teacher_lse: Tensor,  # [N]
        total: Tensor,  # [N] K
        row_scale: Tensor,  # [N] weight / temperature
        needed: Needed,
    ) -> Gradients:
        """Gradients from the active tiles, in the compute dtype."""
        hidden, head, bias = zero_gradients(
            self.inputs.students, needed, self.dtype, self.inputs.head_sum
        )
        weighted = self.hidden[0] * row_scale[:, None] if head is not None else None
        for tiles, heads in self._tile_ranges(active, is_student_only=self.kept is not None):
            if self.kept is None:
                student, teacher = self._logits(tiles, heads)
                self._terms(tiles, student, teacher, student_lse, teacher_lse)
            else:
                student, teacher = self.kept.pop((tiles.rows.start, tiles.columns.start))
            subtract_total(student, teacher, total[tiles.rows], self.options)
            if hidden is not None:
                hidden[tiles.rows].addmm_(student, heads[0][tiles.local])
            if head is not None and weighted is not None:
                self.heads[0].add(head, tiles.columns, student.T @ weighted[tiles.rows])
            if bias is not None:
                self.heads[0].add(bias, tiles.columns, student.T @ row_scale[tiles.rows])
        if hidden is not None:
            hidden.mul_(row_scale[:, None])
        return Gradients(hidden, head, bias)

    def _tile_ranges(
        self, active: Tensor, *, is_student_only: bool = False
    ) -> Iterator[tuple[TileRange, tuple[Tensor, Tensor | None]]]:
        """Yield every range with its chunk's rows of both heads, [C, H], chunk after chunk."""
        num_tokens, vocab_size = self.inputs.num_tokens, self.inputs.vocab_size
        for chunk, found in active_chunks(active, num_tokens, vocab_size, self.width):
            student = self.heads[0].rows(chunk)
            teacher = None
            if not is_student_only:
                shared = self.inputs.head_is_shared
                teacher = student if shared else self.heads[1].rows(chunk)
            for tiles in found:
                yield tiles, (student, teacher)

    def _logits(
        self, tiles: TileRange, heads: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Both sides' raw logits of a range, in the workspace or in memory that is kept."""
        num_rows = tiles.rows.stop - tiles.rows.start
        size = 2 * num_rows * (tiles.columns.stop - tiles.columns.start)
        memory = self.logits[:size] if self.kept is None else self.logits.new_empty(size)
        both = memory.view(2, num_rows, -1)
        for logits, hidden, head in zip(both, self.hidden, heads, strict=True):
            assert head is not None
            torch.mm(hidden[tiles.rows], head[tiles.local].T, out=logits)
        return both[0], both[1]

    def _terms(
        self,
        tiles: TileRange,
        student: Tensor,
        teacher: Tensor,
        student_lse: Tensor,
        teacher_lse: Tensor,
    ) -> Tensor:
        """[2, R] sums of c and e; the logits become p w and e w."""
        return terms_(
            student,
            teacher,
            self.heads[0].transform.at(tiles.columns),
            self.heads[1].transform.at(tiles.columns),
            student_lse[tiles.rows],
            teacher_lse[tiles.rows],
            self.options,
        )
