"""The vocabulary entries that matter to a block of rows, found in the block's logits.

With the logits in memory nothing forces the tiles of sparsity.py: what a block computes is a set of
*entries*, the same for all of its rows, which library GEMMs read as gathered rows of the head. Of
real states it is several times smaller than the tiles that hold it. A row has a threshold for its
probabilities p and one for q:

    entry(eps)  eps
    mass(tol)   the largest of a grid at or below which the row's entries hold at most tol

An entry is *active* if p or q of some row of the block is above its threshold. So no row loses
entries above eps, and with `mass` no row loses more than tol of p or of q. A (row, tile) pair is
*scanned* if one of the tile's entries is above the row's threshold: all entries of scanned tiles
enter the loss and K one by one, and every other tile as one entry with its mass. Only the
gradients' GEMMs are restricted to active entries.

The error. Let D be a row's entries that are not active: those of scanned tiles, D1, of which
`sum |e|` is summed as it is, and the others, D2, of which sparsity.py bounds it by E_2, tile by
tile. A tile as one entry has an e within the same bounds, so K is known up to E_2:

    sum_D |e_v - p_v K| + sum_A p_v |K - K'|
        <= sum_D1 |e_v| + E_2 + P_D (|K'| + E_2) + (1 - P_D) E_2
         = sum_D1 |e_v| + 2 E_2 + P_D |K'|,
    sum_D1 |e_v| + E_2 + P_D                        where K = -1 is known.

Legend: R rows of a block, C entries of the vocabulary, A active ones, T tiles of SCAN_TILE entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rosd_kernels import native, plain
from rosd_kernels.elementwise import stats, uses_native
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.rows import RowStats, row_stats
from rosd_kernels.sparsity import Sparsity, TileStats
from rosd_kernels.tiles import SCAN_TILE
from rosd_kernels.vocabulary import Vocabulary

# From this share of active entries on, a block is computed as if all were: gathering rows of the
# head and scattering those of its gradient costs what the smaller GEMMs save.
DENSE_FRAC = 0.8


class Side(NamedTuple):
    """One side's logits of a block, and their statistics."""

    logits: Tensor  # [R, C] raw
    transform: LogitTransform
    tiles: TileStats  # [R, T] each
    rows: RowStats  # [R] each, over all shards

    @classmethod
    def of(
        cls,
        logits: Tensor,
        transform: LogitTransform,
        columns: Tensor | None,  # [R] of the sampled tokens
        vocabulary: Vocabulary,
    ) -> Side:
        """One read of the logits."""
        found, sampled = stats(logits, transform, columns, SCAN_TILE)
        tiles = TileStats(*found)
        return cls(
            logits, transform, tiles, row_stats(tiles.lse, tiles.entropy, sampled, vocabulary)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveEntries:
    """What a block computes."""

    index: Tensor  # [A] int64, rising
    is_dropped: Tensor  # [C] in the logits' dtype: 0 where an entry is active, else 1
    scanned: Tensor  # [R, T] bool
    tile: int = SCAN_TILE

    @property
    def is_dense(self) -> bool:
        """Whether to compute all entries."""
        return len(self.index) >= DENSE_FRAC * len(self.is_dropped)


def select_entries(
    sides: Sequence[Side], rule: Sparsity, always: Tensor | None = None
) -> ActiveEntries:
    """The entries that `rule` wants of a block; `always` [R]: columns that are active in any case.

    A column of -1 stands for none.
    """
    logits = sides[0].logits
    active = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    scanned = torch.zeros_like(sides[0].tiles.max, dtype=torch.bool)
    for side in sides:
        threshold = _threshold(side, rule)
        wanted = ~(side.tiles.max <= threshold[:, None])  # NaN is wanted
        mark_active_(active, side.logits, side.transform, threshold, wanted, SCAN_TILE)
        scanned |= wanted
    if always is not None:
        active[always[always >= 0]] = True
    index = active.nonzero().squeeze(1)
    return ActiveEntries(index=index, is_dropped=(~active).to(logits.dtype), scanned=scanned)


def _threshold(side: Side, rule: Sparsity) -> Tensor:
    """[R] scaled logits; entries above them are active."""
    lse = side.rows.lse
    if rule.rule == "entry":
        return lse + math.log(rule.bound)
    return mass_threshold(side.logits, side.transform, lse, rule.bound)


def lost_mass(side: Side, entries: ActiveEntries) -> Tensor:
    """[2, R] sums of p and of -p log p over the entries that are not active."""
    sums = dropped_mass(side.logits, side.transform, side.rows.lse, entries)
    return with_other_tiles(side, entries.scanned, sums)


def with_other_tiles(side: Side, scanned: Tensor, sums: Tensor) -> Tensor:
    """`lost_mass` from the [4, R] sums of `dropped_mass` and the tiles that are not scanned."""
    of_scanned_p, of_scanned_h, taken_p, taken_h = sums
    log_mass = side.tiles.lse - side.rows.lse[:, None]
    mass = log_mass.exp().masked_fill_(scanned, 0)
    entropy = (mass * (side.tiles.entropy - log_mass).nan_to_num_(nan=0.0)).sum(1)
    # What active entries hold of the other tiles is not lost; rounding may make the rest negative.
    return torch.stack(
        [
            of_scanned_p + (mass.sum(1) - taken_p).clamp_(min=0),
            of_scanned_h + (entropy - taken_h).clamp_(min=0),
        ]
    )


def mark_active_(
    active: Tensor,  # [C] bool
    logits: Tensor,  # [R, C] raw
    transform: LogitTransform,
    threshold: Tensor,  # [R] scaled
    scanned: Tensor,  # [R, T] bool
    tile: int,
) -> None:
    """Set `active` where a row's scanned tile has an entry above the row's threshold, or NaN."""
    implementation = native if uses_native(logits) else plain
    implementation.mark_active_(active, logits, transform, threshold, scanned, tile)


def dropped_mass(
    logits: Tensor,  # [R, C] raw
    transform: LogitTransform,
    lse: Tensor,  # [R]
    entries: ActiveEntries,
) -> Tensor:
    """[4, R] sums of p and of -p log p, over two sets.

    They are the entries of scanned tiles that are not active, then the active ones of other tiles.
    """
    implementation = native if uses_native(logits) else plain
    return implementation.dropped_mass(logits, transform, lse, entries)


def scanned_terms(
    student: Tensor,  # [R, C] raw
    teacher: Tensor,  # [R, C] raw
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,  # [R]
    teacher_lse: Tensor,  # [R]
    entries: ActiveEntries,
    options: SpanOptions,
) -> Tensor:
    """[3, R] sums over the entries of scanned tiles: c, e, and |e| of those not active."""
    implementation = native if uses_native(student) else plain
    return implementation.scanned_terms(
        student,
        teacher,
        student_transform,
        teacher_transform,
        student_lse,
        teacher_lse,
        entries,
        options,
    )


def compact_(logits: Tensor, index: Tensor) -> Tensor:
    """Move the columns `index` [A], rising, to the head of each row, and return them, [R, A]."""
    implementation = native if uses_native(logits) else plain
    return implementation.compact_(logits, index)


def mass_threshold(
    logits: Tensor, transform: LogitTransform, lse: Tensor, tolerance: float
) -> Tensor:
    """[R] scaled logits at or below which a row's entries hold at most `tolerance` of its mass."""
    implementation = native if uses_native(logits) else plain
    return implementation.mass_threshold(logits, transform, lse, tolerance)
