"""One head in chunks of the vocabulary, for the dense work of "tiled" with library GEMMs (CPU).

Within a chunk each row block multiplies one range of consecutive active tiles at a time, so that
only logits of [128, <= chunk] are in memory. A head that no GEMM can read directly (another dtype,
an order of the vocabulary) is copied per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rosd_kernels.autograd import ranges
from rosd_kernels.elementwise import stats
from rosd_kernels.logits import LogitTransform
from rosd_kernels.tiles import ROW_BLOCK, TILE, num_tiles
from rosd_kernels.workspace import is_gemm_ready

CHUNK_TILES = 16  # 2048 columns: enough for a good GEMM, few enough that logits stay in the cache
SWEEP_ROWS = 4 * ROW_BLOCK  # rows whose logits a sweep holds at once


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRange:
    """Consecutive active tiles of a row block, within a chunk of the vocabulary."""

    rows: slice  # tokens
    columns: slice  # positions in the vocabulary's order
    local: slice  # the same columns, counted from the chunk's first


class HeadTiles:
    """The head's rows [V, H] at positions of the vocabulary, and the transform of their logits.

    permutation: [V] int64, the head's row of each position; None: its own order.
    """

    def __init__(
        self,
        head: Tensor,
        transform: LogitTransform,
        permutation: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.head, self.permutation, self.dtype = head.detach(), permutation, dtype
        self.transform = transform if permutation is None else transform.at(permutation)
        self.needs_copy = permutation is not None or not is_gemm_ready(head, dtype)

    @property
    def copied_width(self) -> int:
        """Elements of a head's row that are copied; 0: a GEMM reads the head itself."""
        return self.head.shape[1] if self.needs_copy else 0

    def rows(self, columns: slice) -> Tensor:
        """[C, H] rows of the head at positions `columns`, in the compute dtype."""
        if self.permutation is not None:
            return self.head[self.permutation[columns]].to(self.dtype)
        return self.head[columns].to(self.dtype) if self.needs_copy else self.head[columns]

    def sweep(
        self,
        hidden: Tensor,  # [M, H] in the compute dtype
        columns: Tensor | None,  # [M] positions of the sampled tokens, -1: none
        *,
        width: int,  # columns of a chunk
        logits: Tensor,  # memory of at least SWEEP_ROWS * width elements
    ) -> tuple[Tensor, Tensor | None]:
        """Return ([4, M, T] statistics, [M] logits of the sampled tokens or None)."""
        num_rows, vocab_size = hidden.shape[0], self.head.shape[0]
        found = hidden.new_empty(4, num_rows, num_tiles(vocab_size))
        sampled = None if columns is None else hidden.new_zeros(num_rows)
        for start, stop in ranges(vocab_size, width):
            head = self.rows(slice(start, stop))
            tiles = slice(start // TILE, -(-stop // TILE))
            transform = self.transform.at(slice(start, stop))
            for first, last in ranges(num_rows, SWEEP_ROWS):
                rows = slice(first, last)
                part = logits[: (last - first) * (stop - start)].view(last - first, -1)
                torch.mm(hidden[rows], head.T, out=part)
                local = None if columns is None else within(columns[rows], slice(start, stop))
                found[:, rows, tiles], picked = stats(part, transform, local, TILE)
                if sampled is not None and picked is not None:
                    sampled[rows] += picked
        return found, sampled

    def add(self, gradient: Tensor, columns: slice, part: Tensor) -> None:
        """Add rows at positions `columns` to a gradient in the head's natural order."""
        if self.permutation is None:
            gradient[columns] += part
        else:
            gradient.index_add_(0, self.permutation[columns], part)  # indices are unique: no race


def chunk_width(budget: int, column_bytes: int, vocab_size: int) -> int:
    """Columns of a chunk that takes at most `budget` bytes, in whole tiles, at least one."""
    return min(max(1, budget // (column_bytes * TILE)), CHUNK_TILES, num_tiles(vocab_size)) * TILE


def within(columns: Tensor, part: slice) -> Tensor:
    """Columns counted from the part's first; -1 outside of it."""
    inside = (columns >= part.start) & (columns < part.stop)
    return torch.where(inside, columns - part.start, -1)


def active_chunks(
    active: Tensor, num_tokens: int, vocab_size: int, width: int
) -> Iterator[tuple[slice, list[TileRange]]]:
    """Yield each chunk of `width` positions that has active tiles, with its ranges of them.

    active: [B, T] uint8.
    """
    flags = active.tolist()
    for start, stop in ranges(vocab_size, width):
        tiles = range(start // TILE, -(-stop // TILE))
        found = []
        for block, row in enumerate(flags):
            rows = slice(block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, num_tokens))
            for first, last in _consecutive([tile for tile in tiles if row[tile]]):
                columns = slice(first * TILE, min(last * TILE, vocab_size))
                local = slice(columns.start - start, columns.stop - start)
                found.append(TileRange(rows=rows, columns=columns, local=local))
        if found:
            yield slice(start, stop), found


def _consecutive(tiles: list[int]) -> list[tuple[int, int]]:
    """Half-open ranges that cover rising numbers, one per run of consecutive ones."""
    found: list[tuple[int, int]] = []
    for tile in tiles:
        if found and found[-1][1] == tile:
            found[-1] = found[-1][0], tile + 1
        else:
            found.append((tile, tile + 1))
    return found
