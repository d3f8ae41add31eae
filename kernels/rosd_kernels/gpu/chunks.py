"""Gradients over the active tiles, in chunks of the vocabulary: as many tiles as G fits the bound.

Who knows G writes a chunk of it; three GEMM kernels turn it into the gradients, see gradient.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed
from rosd_kernels.gpu.gradient import grad_dtype, grad_head, grad_hidden
from rosd_kernels.tiles import TILE, num_tiles
from rosd_kernels.workspace import MIB

# (active [B, tiles of the chunk], its first tile, out [N, tiles * TILE])
WriteGradient = Callable[[Tensor, int, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientChunks:
    """The chunks of one call, and the operands of the GEMMs."""

    hidden: Tensor  # [N, H], elements of a row side by side
    head: Tensor  # [V, H], likewise
    order: Tensor | None  # [V] int64: the head's row of each position of the vocabulary
    tiles: int  # of a chunk

    @classmethod
    def of(
        cls, hidden: Tensor, head: Tensor, order: Tensor | None, *, workspace_mib: float
    ) -> GradientChunks:
        """Return the largest chunks whose G fits `workspace_mib`, of at least one tile."""
        row_bytes = TILE * grad_dtype(hidden, head).itemsize
        fitting = int(workspace_mib * MIB) // (max(hidden.shape[0], 1) * row_bytes)
        tiles = min(max(1, fitting), num_tiles(head.shape[0]))
        return cls(hidden=hidden, head=head, order=order, tiles=tiles)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of G."""
        return grad_dtype(self.hidden, self.head)

    @property
    def workspace_bytes(self) -> int:
        return self.hidden.shape[0] * self.tiles * TILE * self.dtype.itemsize

    def gradients(self, active: Tensor, needed: Needed, write: WriteGradient) -> Gradients:
        """dh [N, H] and db [V] in float32, dW [V, H] in `head_grad_dtype`.

        active: [B, T] uint8. write: writes G of a chunk's active tiles.
        """
        hidden, head, order = self.hidden, self.head, self.order
        (N, H), V = hidden.shape, head.shape[0]
        needs_hidden, needs_head, needs_bias = needed
        dh = hidden.new_zeros(N, H, dtype=torch.float32) if needs_hidden else None
        dW = head.new_empty(head.shape, dtype=head_grad_dtype(head)) if needs_head else None
        db = head.new_empty(V, dtype=torch.float32) if needs_bias else None
        workspace = hidden.new_empty(N, self.tiles * TILE, dtype=self.dtype)
        for first in range(0, active.shape[1], self.tiles):
            chunk = active[:, first : first + self.tiles]
            G = workspace[:, : chunk.shape[1] * TILE]
            write(chunk, first, G)
            if dh is not None:
                grad_hidden(G, head, order, chunk, first_tile=first, out=dh)
            if dW is not None or db is not None:
                out = {"out": dW, "out_bias": db}
                grad_head(G, hidden, order, chunk, first_tile=first, vocab_size=V, **out)
        return Gradients(dh, dW, db)


def head_grad_dtype(head: Tensor) -> torch.dtype:
    """The dtype of dW until a backward scales it: float16 would underflow before the scale."""
    return torch.float32 if head.dtype == torch.float16 else head.dtype
