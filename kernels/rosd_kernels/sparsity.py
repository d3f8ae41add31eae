"""The rules of a sparsity, and the tiles of the vocabulary that "tiled" computes by them.

active.py has the entries that "chunked" computes by the same rules, and its own bound.

Peaked distributions have nearly all their mass in few tiles. After the sweep the mass of each tile
is known exactly, `P = exp(lse_tile - lse)` of the student and `Q` of the teacher. A rule selects a
row block's active tiles, and the mass of the others is known as well:

    exact       all tiles
    entry(eps)  tiles in which some row of the block has an entry with p or q above eps
    mass(tol)   all but the smallest tiles of each row that together hold at most tol of p and of q

A dropped tile enters the loss as one entry with probabilities P and Q, and its entries get no
gradient. As merging entries lowers a divergence, the loss is never too large, except in forward_kl
with entry_clip, some of whose entries are negative. Let `E_D` bound `sum_D |e_v|` over the dropped
entries D (see divergences.py for e and K). The gradient of a row w.r.t. its logits,
`e_v - p_v K`, is then off in L1 norm by at most

    2 E_D + P_D (|K_A| + E_D)       with K_A the sum of e over the active entries,
    E_D + P_D                       for forward_kl without entry_clip, where K = -1 is known,

    forward_kl   E_D = Q_D                          e = -q
    reverse_kl   E_D = sum_t P_t max(0, r_t) + Q_D/e    p log(q/p) <= q/e, and log(p/q) <= r_t
                                                    r_t: student's highest less teacher's lowest
    jsd          E_D = (1-b) (P_D log(1/(1-b)) + b Q_D)    p log(p/m) <= p log(1/(1-b)),
                                                    p log(m/p) <= m - p <= b q

Legend: N tokens, T tiles, B row blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.tiles import ROW_BLOCK, num_row_blocks
from rosd_kernels.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rosd_kernels.order import VocabularyOrder
    from rosd_kernels.records import SpanOptions

Rule = Literal["exact", "entry", "mass"]
BISECTIONS = 20  # halvings of the threshold of `mass`, in log mass


@dataclass(frozen=True, slots=True)
class Sparsity:
    """A rule of the table; `entry` and `mass` make one."""

    rule: Rule = "exact"
    bound: float = 0.0
    order: VocabularyOrder | None = None

    def of_shard(self, num_shards: int) -> Sparsity:
        """The rule for one of several shards, which share a row's budget of dropped mass."""
        return replace(self, bound=self.bound / num_shards) if self.rule == "mass" else self

    def permutation(self, device: torch.device) -> Tensor | None:
        """[V] int64: the head's row of each position of the vocabulary; None: its own order."""
        if self.order is None or self.order.permutation is None:
            return None
        if self.order.permutation.device != device:  # once: a copy waits for the device
            self.order.permutation = self.order.permutation.to(device)
        return self.order.permutation


def entry(eps: float, order: VocabularyOrder | None = None) -> Sparsity:
    """Compute what has p or q above `eps`, in (0, 1), in some row of a block.

    Strategy "chunked" computes those entries, "tiled" the tiles that have one. 2^-12 is the
    resolution of a bfloat16 gradient. `order`: of the tiles of "tiled", see VocabularyOrder.
    """
    return Sparsity("entry", eps, order)


def mass(tol: float, order: VocabularyOrder | None = None) -> Sparsity:
    """Drop what is least likely while each token loses at most `tol`, in (0, 1), of p and of q.

    Strategy "chunked" drops entries, "tiled" tiles. `order`: of the tiles, see VocabularyOrder.
    """
    return Sparsity("mass", tol, order)


class TileStats(NamedTuple):
    """Statistics of one side's scaled logits over the entries of each tile, [N, T] each."""

    lse: Tensor  # log sum exp
    max: Tensor
    min: Tensor
    entropy: Tensor  # of exp(s - lse), nats


class Sweep(NamedTuple):
    """What a pass over all tiles of one side returns."""

    stats: TileStats
    sampled: Tensor | None  # [N] scaled logit of the sampled token, 0 where it is another shard's


# (hidden [M, H], side: 0 student or 1 teacher, columns [M] of the sampled tokens or None) ->
# ([4, M, T] statistics, [M] logits of the sampled tokens or None)
SweepSide = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]]


def sweep_sides(
    sweep_side: SweepSide,
    hidden: tuple[Tensor, Tensor],  # [N, H] of the student, [N, Ht] of the teacher
    columns: Tensor | None,  # [N]
    rows: slice,  # the R of the N rows to sweep
    *,
    is_stacked: bool,
) -> tuple[Sweep, Sweep]:
    """Sweep the student and the teacher, in one call on [2R, H] rows where `is_stacked`.

    `is_stacked`: both sides have the same head, bias and dtype.
    """
    hidden = hidden[0][rows], hidden[1][rows]
    columns = None if columns is None else columns[rows]
    if is_stacked:
        R = hidden[0].shape[0]
        twice = None if columns is None else torch.cat([columns, columns])
        stats, sampled = sweep_side(torch.cat(hidden), 0, twice)
        found = [
            (stats[:, side], None if sampled is None else sampled[side])
            for side in (slice(0, R), slice(R, None))
        ]
    else:
        found = [sweep_side(hidden[side], side, columns) for side in (0, 1)]
    student, teacher = (Sweep(TileStats(*stats), sampled) for stats, sampled in found)
    return student, teacher


def select_tiles(
    student: TileStats, teacher: TileStats, student_lse: Tensor, teacher_lse: Tensor, rule: Sparsity
) -> Tensor:
    """[B, T] uint8: 1 where a row block computes a tile. The lse's are [N], of whole rows."""
    num_tokens, tiles = student.lse.shape
    if rule.rule == "exact":
        return student.lse.new_ones(num_row_blocks(num_tokens), tiles, dtype=torch.uint8)
    if rule.rule == "entry":
        largest = torch.maximum(
            student.max - student_lse[:, None], teacher.max - teacher_lse[:, None]
        )
        wanted = largest > math.log(rule.bound)
    else:
        log_p, log_q = student.lse - student_lse[:, None], teacher.lse - teacher_lse[:, None]
        wanted = torch.maximum(log_p, log_q) > _mass_threshold(log_p, log_q, rule.bound)[:, None]
    padded = wanted.new_zeros(num_row_blocks(num_tokens) * ROW_BLOCK, tiles)
    padded[:num_tokens] = wanted
    return padded.view(-1, ROW_BLOCK, tiles).any(1).to(torch.uint8)


def tile_error_bound(
    p: Tensor, q: Tensor, log_ratio: Tensor | None, options: SpanOptions
) -> Tensor:
    """Bound on `sum |e_v|` of tiles with the masses `p` and `q`: E_D of one tile each.

    log_ratio: r, of the same shape; read by reverse_kl only.
    """
    if options.divergence == "forward_kl":
        return q.clone()
    if options.divergence == "reverse_kl":
        assert log_ratio is not None
        # A tile without mass has none, however unlikely its entries are for the teacher.
        return torch.where(p > 0, p * log_ratio.clamp(min=0), 0) + q / math.e
    beta = options.beta
    return (1 - beta) * (p * -math.log1p(-beta) + beta * q)


def is_dropped(active: Tensor, num_tokens: int) -> Tensor:
    """[N, T] bool: the tiles that a token's row block, of [B, T] flags, does not compute."""
    return active.repeat_interleave(ROW_BLOCK, 0)[:num_tokens] == 0


def measured(active: Tensor, mass: Tensor, bound: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[3] active fraction, and the largest of the [N] dropped masses and [N] error bounds."""
    counts = torch.stack([active.sum(dtype=mass.dtype), mass.new_full((), active.numel())])
    return measured_counts(counts, mass, bound, vocabulary)


def measured_counts(counts: Tensor, mass: Tensor, bound: Tensor, vocabulary: Vocabulary) -> Tensor:
    """`measured`, from the [2] numbers of computed pairs and of all pairs of this shard."""
    num_active, num_pairs = vocabulary.sum_(counts)
    if mass.shape[0] == 0:
        return torch.cat([mass.new_ones(1), mass.new_zeros(2)])
    return torch.stack([num_active / num_pairs, mass.max(), bound.max()])


def _mass_threshold(log_p: Tensor, log_q: Tensor, tol: float) -> Tensor:
    """[N] log mass: a row's tiles at or below it together hold at most `tol` of p and of q.

    Bisection between log(tol/T), which cannot drop too much, and 0, the whole row.
    """
    p, q, larger = log_p.exp(), log_q.exp(), torch.maximum(log_p, log_q)
    low = torch.full_like(log_p[:, 0], math.log(tol / log_p.shape[1]))
    high = torch.zeros_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        dropped = larger <= middle[:, None]
        fits = torch.maximum((p * dropped).sum(1), (q * dropped).sum(1)) <= tol
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return low
