"""A chunk of strategy "chunked" with a sparsity in Triton: sparse_chunks.py without its host.

    statistics, active entries     entries.py
    loss and K, G of active ones   sparse_rows.py
    dh, dW, db                     gather.py

The bounds are those of active.py, with row blocks of up to INDEX_ROWS rows. How many entries are
active stays on the device, so that no call waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rosd_kernels.active import Side
from rosd_kernels.divergences import known_total
from rosd_kernels.gpu.entries import ActiveIndex, active_index, mass_threshold, tile_stats
from rosd_kernels.gpu.gather import add_gradients as add_gradients
from rosd_kernels.gpu.sparse_rows import scanned_sums, write_grad
from rosd_kernels.logits import LogitTransform, transform_
from rosd_kernels.records import SpanOptions
from rosd_kernels.rows import row_stats
from rosd_kernels.sparse_block import SparseBlock, add_tiles, gradient_error
from rosd_kernels.sparsity import Sparsity, TileStats
from rosd_kernels.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """The active entries of a chunk's row blocks."""

    sides: list[Side]
    scanned: Tensor  # [R, T] bool
    index: ActiveIndex

    @classmethod
    def of(
        cls,
        logits: Sequence[Tensor],  # [R, V] raw, of one side or of both
        transforms: Sequence[LogitTransform],  # likewise
        columns: Tensor | None,  # [R] of the sampled tokens
        rule: Sparsity,
        vocabulary: Vocabulary,
        *,
        keeps_sampled: bool = False,
    ) -> Scan:
        """Find them; keeps_sampled: the sampled tokens are active in any case."""
        sides = [
            _side(of_side, transform, columns, vocabulary)
            for of_side, transform in zip(logits, transforms, strict=True)
        ]
        thresholds = torch.stack([_threshold(side, rule) for side in sides])
        scanned = torch.zeros_like(sides[0].tiles.max, dtype=torch.bool)
        for side, threshold in zip(sides, thresholds, strict=True):
            scanned |= ~(side.tiles.max <= threshold[:, None])  # NaN is scanned
        always = columns if keeps_sampled else None
        index = active_index(logits, transforms, thresholds, scanned, always)
        return cls(sides=sides, scanned=scanned, index=index)

    @property
    def num_computed(self) -> Tensor:
        """Pairs of a row and an active entry, a scalar."""
        index, logits = self.index, self.sides[0].logits
        last = logits.shape[0] - (len(index.counts) - 1) * index.rows
        sizes = torch.full_like(index.counts, index.rows)
        sizes[-1:].fill_(last)
        return (index.counts.to(logits.dtype) * sizes).sum()


def sparse_block(
    student: Tensor,  # [R, V] raw logits in, G out
    teacher: Tensor,  # [R, V] raw logits
    transforms: tuple[LogitTransform, LogitTransform],
    columns: Tensor | None,  # [R] of the sampled tokens
    options: SpanOptions,
    vocabulary: Vocabulary,
    *,
    needs_gradient: bool,
    grad_dtype: torch.dtype,
) -> SparseBlock:
    """All elementwise work of a chunk, as `sparse_chunks.sparse_block`."""
    rule = options.sparsity.of_shard(vocabulary.num_shards)
    scan = Scan.of((student, teacher), transforms, columns, rule, vocabulary)
    sides, scanned, index = scan.sides, scan.scanned, scan.index
    lse = torch.stack([side.rows.lse for side in sides])
    found = scanned_sums(student, teacher, transforms, lse, scanned, index, options)
    value, total, known_error, lost_p, lost_q, kept_p, kept_q = found
    # What active entries hold of the other tiles is not lost; rounding may make the rest negative.
    masses = [
        lost + (_unscanned_mass(side, scanned) - kept).clamp_(min=0)
        for side, lost, kept in zip(sides, (lost_p, lost_q), (kept_p, kept_q), strict=True)
    ]
    value, total, tile_error = add_tiles(sides, scanned, value, total, options)
    sums = torch.stack([value, total, *masses, known_error, tile_error])
    value, total, student_mass, teacher_mass, known_error, tile_error = vocabulary.sum_(sums)
    grad = student
    if needs_gradient:
        known = known_total(options)
        K = total if known is None else torch.full_like(total, known)
        grad = write_grad(student, teacher, transforms, lse, K, index, options, dtype=grad_dtype)
    return SparseBlock(
        value=value,
        student=sides[0].rows,
        teacher=sides[1].rows,
        grad=grad,
        index=index,
        num_computed=scan.num_computed,
        lost_mass=torch.maximum(student_mass, teacher_mass),
        grad_error=gradient_error(total, student_mass, known_error, tile_error, options),
    )


def _side(
    logits: Tensor, transform: LogitTransform, columns: Tensor | None, vocabulary: Vocabulary
) -> Side:
    """`active.Side.of`, by one read of the logits."""
    tiles = TileStats(*tile_stats(logits, transform))
    sampled = None
    if columns is not None:
        places = columns.clamp(min=0)
        raw = logits.gather(1, places[:, None])
        sampled = transform_(raw.squeeze(1), transform.at(places)).masked_fill_(columns < 0, 0)
    return Side(logits, transform, tiles, row_stats(tiles.lse, tiles.entropy, sampled, vocabulary))


def _threshold(side: Side, rule: Sparsity) -> Tensor:
    """[R] scaled logits; entries above them are active."""
    if rule.rule == "entry":
        return side.rows.lse + math.log(rule.bound)
    return mass_threshold(side.logits, side.transform, side.rows.lse, rule.bound)


def _unscanned_mass(side: Side, scanned: Tensor) -> Tensor:
    """[R] mass of the tiles that are not scanned."""
    return (side.tiles.lse - side.rows.lse[:, None]).exp().masked_fill_(scanned, 0).sum(1)
