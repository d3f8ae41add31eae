"""The dense work of strategy "tiled" with library GEMMs and elementwise passes (CPU).

The vocabulary is processed in chunks of columns. Within a chunk each row block multiplies one range
of consecutive active tiles at a time, so that only logits of [128, <= chunk] are in memory. A head
that no GEMM can read directly (another dtype, an order of the vocabulary) is copied per chunk.

If both logits of all active tiles fit into half of the workspace, they are kept from the loss to
the gradient instead of being computed twice: 2 + 4f units instead of 2 + 6f.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed, ranges, zero_gradients
from rosd_kernels.elementwise import stats, subtract_total, terms_
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, select_tiles, sweep_sides
from rosd_kernels.tiles import ROW_BLOCK, TILE, num_tiles
from rosd_kernels.workspace import MIB, is_gemm_ready

CHUNK_TILES = 16  # 2048 columns: enough for a good GEMM, few enough that logits stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRange:
    """Consecutive active tiles of a row block, within a chunk of the vocabulary."""

    rows: slice  # tokens
    columns: slice  # positions in the vocabulary's order
    local: slice  # the same columns, counted from the chunk's first


class GemmTiles:
    """Implements `tiled.Tiles` with library GEMMs.

    permutation: [V] int64, the head's row of each position of the vocabulary; None: its own order.
    """

    def __init__(
        self, inputs: SpanInputs, options: SpanOptions, permutation: Tensor | None
    ) -> None:
        self.inputs, self.options, self.permutation = inputs, options, permutation
        self.dtype = inputs.compute_dtype
        self.transforms = inputs.transforms(options)
        if permutation is not None:
            student, teacher = self.transforms
            self.transforms = student.at(permutation), teacher.at(permutation)
        self.hidden = (
            inputs.student_hidden.detach().to(self.dtype),
            inputs.teacher_hidden.to(self.dtype),
        )
        self.heads = inputs.student_head.detach(), inputs.teacher_head
        self.needs_copy = [
            permutation is not None or not is_gemm_ready(head, self.dtype) for head in self.heads
        ]
        # Both sides' logits of a row block (twice that in a stacked sweep), and copies of heads.
        copied = (h.shape[1] for h, copy in zip(self.heads, self.needs_copy, strict=True) if copy)
        column_bytes = (4 * ROW_BLOCK + sum(copied)) * self.dtype.itemsize
        self.budget = int(options.workspace_mib * MIB)
        fitting = self.budget // 2 // (column_bytes * TILE)
        self.width = min(max(1, fitting), CHUNK_TILES, num_tiles(inputs.vocab_size)) * TILE
        self.workspace_bytes = column_bytes * self.width
        self.logits = inputs.student_hidden.new_empty(4 * ROW_BLOCK * self.width, dtype=self.dtype)
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def sweep(self, columns: Tensor | None) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher; see `tiled.Tiles`."""
        is_stacked = self.inputs.is_stacked
        return sweep_sides(self._sweep, self.hidden, columns, is_stacked=is_stacked)

    def _sweep(
        self, hidden: Tensor, side: int, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ([4, M, T] statistics, [M] logits of the sampled tokens or None)."""
        num_rows = hidden.shape[0]
        found = hidden.new_empty(4, num_rows, num_tiles(self.inputs.vocab_size))
        sampled = None if columns is None else hidden.new_zeros(num_rows)
        for start, stop in ranges(self.inputs.vocab_size, self.width):
            head = self._head(side, slice(start, stop))
            tiles = slice(start // TILE, -(-stop // TILE))
            transform = self.transforms[side].at(slice(start, stop))
            for first, last in ranges(num_rows, 4 * ROW_BLOCK):
                rows = slice(first, last)
                logits = self.logits[: (last - first) * (stop - start)].view(last - first, -1)
                torch.mm(hidden[rows], head.T, out=logits)
                local = None
                if columns is not None:
                    inside = (columns[rows] >= start) & (columns[rows] < stop)
                    local = torch.where(inside, columns[rows] - start, -1)
                found[:, rows, tiles], picked = stats(logits, transform, local, TILE)
                if sampled is not None and picked is not None:
                    sampled[rows] += picked
        return found, sampled

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
        hidden, head, bias = zero_gradients(self.inputs.students, needed, self.dtype)
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
                self._add(head, tiles.columns, student.T @ weighted[tiles.rows])
            if bias is not None:
                self._add(bias, tiles.columns, student.T @ row_scale[tiles.rows])
        if hidden is not None:
            hidden.mul_(row_scale[:, None])
        return Gradients(hidden, head, bias)

    def _tile_ranges(
        self, active: Tensor, *, is_student_only: bool = False
    ) -> Iterator[tuple[TileRange, tuple[Tensor, Tensor | None]]]:
        """Yield every range with its chunk's rows of both heads, [C, H], chunk after chunk."""
        flags = active.tolist()
        for start, stop in ranges(self.inputs.vocab_size, self.width):
            tiles = range(start // TILE, -(-stop // TILE))
            if not any(row[tile] for row in flags for tile in tiles):
                continue
            student = self._head(0, slice(start, stop))
            teacher = None
            if not is_student_only:
                shared = self.inputs.head_is_shared
                teacher = student if shared else self._head(1, slice(start, stop))
            for block, row in enumerate(flags):
                rows = slice(
                    block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, self.inputs.num_tokens)
                )
                for first, last in _consecutive([tile for tile in tiles if row[tile]]):
                    columns = slice(first * TILE, min(last * TILE, self.inputs.vocab_size))
                    local = slice(columns.start - start, columns.stop - start)
                    yield TileRange(rows=rows, columns=columns, local=local), (student, teacher)

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
            self.transforms[0].at(tiles.columns),
            self.transforms[1].at(tiles.columns),
            student_lse[tiles.rows],
            teacher_lse[tiles.rows],
            self.options,
        )

    def _head(self, side: int, columns: slice) -> Tensor:
        """[C, H] rows of a head at positions `columns`, in the compute dtype, copied if needed."""
        head = self.heads[side]
        if self.permutation is not None:
            return head[self.permutation[columns]].to(self.dtype)
        return head[columns].to(self.dtype) if self.needs_copy[side] else head[columns]

    def _add(self, gradient: Tensor, columns: slice, part: Tensor) -> None:
        """Add rows at positions `columns` to a gradient in the head's natural order."""
        if self.permutation is None:
            gradient[columns] += part
        else:
            gradient.index_add_(0, self.permutation[columns], part)  # indices are unique: no race


def _consecutive(tiles: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges that cover rising numbers, one per run of consecutive ones."""
    found: list[tuple[int, int]] = []
    for tile in tiles:
        if found and found[-1][1] == tile:
            found[-1] = found[-1][0], tile + 1
        else:
            found.append((tile, tile + 1))
    return found
