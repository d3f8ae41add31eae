"""The strategy "tiled" on Triton: sweep, loss and gradients of one call, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed
from rosd_kernels.gpu.gradient import grad_dtype, grad_head, grad_hidden, grad_logits
from rosd_kernels.gpu.loss import loss
from rosd_kernels.gpu.select import select
from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.records import SpanInputs, SpanOptions
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, sweep_sides
from rosd_kernels.tiles import TILE, num_tiles
from rosd_kernels.workspace import MIB


class TritonTiles:
    """A `tiled.Tiles`. permutation: [V] int64 or None, the head's row of each position."""

    def __init__(
        self, inputs: SpanInputs, options: SpanOptions, permutation: Tensor | None
    ) -> None:
        self.inputs = inputs
        self.order = permutation
        self.finish: dict[str, Any] = {
            "softcap": options.softcap,
            "temperature": options.temperature,
        }
        self.terms: dict[str, Any] = self.finish | {
            "divergence": options.divergence,
            "beta": options.beta,
            "entry_clip": options.entry_clip,
        }
        self.hidden = (inputs.student_hidden.detach(), inputs.teacher_hidden)
        self.heads = (inputs.student_head.detach(), inputs.teacher_head)
        if inputs.head_is_shared:
            self.heads = (self.heads[0], self.heads[0])
        # The kernels take rows of any stride, but a bias only as a whole.
        self.biases = tuple(
            None if bias is None else bias.detach().contiguous()
            for bias in (inputs.student_bias, inputs.teacher_bias)
        )
        self.grad_dtype = grad_dtype(*(side[0] for side in (self.hidden, self.heads)))
        self.chunk_tiles = self._chunk_tiles(int(options.workspace_mib * MIB))
        num_tokens = inputs.num_tokens
        self.workspace_bytes = num_tokens * self.chunk_tiles * TILE * self.grad_dtype.itemsize

    def sweep(self, columns: Tensor | None) -> tuple[Sweep, Sweep]:
        """Statistics of all tiles of the student and of the teacher; see `tiled.Tiles`."""
        is_stacked = self.inputs.is_stacked and self.hidden[0].dtype == self.hidden[1].dtype
        return sweep_sides(self._sweep, self.hidden, columns, is_stacked=is_stacked)

    def _sweep(
        self, hidden: Tensor, side: int, columns: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        head, bias = self.heads[side], self.biases[side]
        return sweep(hidden, head, bias, self.order, columns, **self.finish)

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
        value, total = loss(
            *self.hidden,
            *self.heads,
            *self.biases,
            self.order,
            student_lse,
            teacher_lse,
            active,
            **self.terms,
        )
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

        The vocabulary is walked in chunks of as many tiles as the workspace holds G of.
        """
        hidden, head = self.hidden[0], self.heads[0]
        (N, H), V = hidden.shape, head.shape[0]
        needs_hidden, needs_head, needs_bias = needed
        dh = hidden.new_zeros(N, H, dtype=torch.float32) if needs_hidden else None
        dW = torch.empty_like(head, memory_format=torch.contiguous_format) if needs_head else None
        db = head.new_empty(V, dtype=torch.float32) if needs_bias else None
        workspace = hidden.new_empty(N, self.chunk_tiles * TILE, dtype=self.grad_dtype)
        tiles = num_tiles(V)
        for first in range(0, tiles, self.chunk_tiles):
            chunk = {"first_tile": first, "num_tiles": min(self.chunk_tiles, tiles - first)}
            grad = workspace[:, : chunk["num_tiles"] * TILE]
            grad_logits(
                *self.hidden,
                *self.heads,
                *self.biases,
                self.order,
                student_lse,
                teacher_lse,
                active,
                total,
                row_scale,
                out=grad,
                **chunk,
                **self.terms,
            )
            if dh is not None:
                grad_hidden(grad, head, self.order, active, out=dh, **chunk)
            if dW is not None or db is not None:
                grad_head(
                    grad, hidden, active, self.order, out=dW, out_bias=db, vocab_size=V, **chunk
                )
        return Gradients(dh, dW, db)

    def _chunk_tiles(self, budget_bytes: int) -> int:
        """Tiles whose G fits the budget, at least one."""
        tile_bytes = max(self.inputs.num_tokens, 1) * TILE * self.grad_dtype.itemsize
        return min(max(1, budget_bytes // tile_bytes), num_tiles(self.inputs.vocab_size))
