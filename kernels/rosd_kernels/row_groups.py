"""Groups of rows whose statistics of tiles are in memory at once, for strategy "tiled".

Statistics are [N, T] per plane. For a large vocabulary and many tokens they would outgrow what is
bounded: at N = 65536 and V = 151936 the eight planes of both sides are 2.5 GB. So a sweep, the
selection of tiles and what they drop are computed group after group; only values of whole rows and
flags of row blocks outlive a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rosd_kernels.autograd import ranges
from rosd_kernels.tiles import ROW_BLOCK, num_row_blocks, num_tiles
from rosd_kernels.workspace import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGroups:
    """Consecutive groups of whole row blocks, of nearly equal size."""

    num_tokens: int
    rows: int  # of a group
    num_bytes: int  # of the largest group's planes

    @classmethod
    def of(
        cls, num_tokens: int, vocab_size: int, dtype: torch.dtype, *, planes: int, budget: float
    ) -> RowGroups:
        """Return the largest groups whose planes fit `budget` MiB, of at least one row block.

        vocab_size: of the largest shard, so that all ranks get the same groups. planes: statistics
        of a row and tile that are held at once, temporary ones included.
        """
        row_bytes = planes * num_tiles(vocab_size) * dtype.itemsize
        fitting = max(1, int(budget * MIB) // max(1, row_bytes * ROW_BLOCK))
        blocks = num_row_blocks(num_tokens)
        num_groups = max(1, -(-blocks // fitting))
        rows = max(1, -(-blocks // num_groups)) * ROW_BLOCK
        return cls(num_tokens=num_tokens, rows=rows, num_bytes=row_bytes * min(rows, num_tokens))

    def slices(self) -> list[slice]:
        """The groups' tokens; one empty group where there are none."""
        if self.num_tokens == 0:
            return [slice(0, 0)]
        return [slice(first, last) for first, last in ranges(self.num_tokens, self.rows)]
