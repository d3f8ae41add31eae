"""Strategy "tiled": logits of one tile at a time, and in the gradient only of tiles that matter.

    sweep     log sum exp, max, min and entropy of each tile of 128 entries        1 unit
    select    lse of the rows; a row block's active tiles (sparsity.py)
    loss      slopes of each token's loss: no pass over the vocabulary
    gradient  G of the active tiles, then dh = G W and dW = G^T h                  3f units

A unit is one sweep of the head's GEMM over all tokens, f the active fraction. Log-probs and
entropies come from the sweep over all tiles. So an active tile's G is exact, and the gradient lacks
just the entries of dropped tiles D. With their mass `P_D` and the slopes a and b of
logprob/elementwise.py, a row's error is at most, in L1 norm w.r.t. its scaled logits,

    |a| P_D + |b| sum_D p_v |log p_v + entropy|
        <= |a| P_D + |b| (sum_t P_t (entropy_t - log P_t) + entropy P_D)    with t in D.

The tile of a sampled token is active in any case: its entry has most of the gradient.

Sweep and selection go over groups of rows, so that the statistics of their tiles take at most half
of the workspace (row_groups.py).

Where the vocabulary is sharded, each rank selects among its own tiles; normalizers, entropies and
dh are summed over the ranks. Sums have a fixed sequence and there are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rosd_kernels.autograd import Gradients, Needed, needed_of, precomputed
from rosd_kernels.backends import uses_triton
from rosd_kernels.logprob.autograd import Passes, differentiable
from rosd_kernels.logprob.elementwise import row_factors
from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    Slopes,
    SpanLogprobOutput,
    TokenLoss,
    TokenValues,
)
from rosd_kernels.logprob.token_loss import evaluate
from rosd_kernels.order import positions
from rosd_kernels.records import SpanStats
from rosd_kernels.row_groups import RowGroups
from rosd_kernels.rows import RowStats, entropy_terms, row_stats
from rosd_kernels.sparsity import Sparsity, Sweep, TileStats, is_dropped, measured
from rosd_kernels.tiles import ROW_BLOCK, TILE
from rosd_kernels.vocabulary import Vocabulary

ALL_ROWS = slice(None)
# Statistics of a row and tile that are held at once: four, and temporary ones.
EXACT_PLANES = 8
SPARSE_PLANES = 12


class Tiles(Protocol):
    """The dense work of one call of `span_logprob` on one device."""

    sweep_bytes: int  # logit-sized buffers held beside the statistics of a sweep
    workspace_bytes: int  # those held in the gradients, at once

    def sweep(self, columns: Tensor, rows: slice = ALL_ROWS) -> Sweep:
        """Statistics of all tiles, for some rows.

        `columns` [N]: positions of the sampled tokens, of all rows.
        """
        ...

    def select(self, stats: TileStats, lse: Tensor, rule: Sparsity) -> Tensor:
        """[B, T] uint8: 1 where a row block computes a tile; see sparsity.py."""
        ...

    def gradients(
        self,
        active: Tensor,  # [B, T] uint8
        columns: Tensor,  # [N] positions of the sampled tokens
        lse: Tensor,  # [N]
        factors: Tensor,  # [3, N], see `row_factors`
        needed: Needed,
    ) -> Gradients:
        """Gradients from the active tiles."""
        ...


class Selection(NamedTuple):
    """The tiles that the gradient computes, and what the others hold, over all shards."""

    active: Tensor  # [B, T] uint8
    mass: Tensor | None  # [N] P_D; None: all tiles are active
    entropy_error: Tensor | None  # [N] the second bracket of the module's docstring

    @classmethod
    def joined(cls, parts: Sequence[Selection]) -> Selection:
        """The selection of consecutive groups of rows."""
        if len(parts) == 1:
            return parts[0]
        active, *rest = zip(*parts, strict=True)
        mass, error = (None if of[0] is None else torch.cat(of) for of in rest)
        return cls(torch.cat(active), mass, error)


def run_tiled(
    inputs: LogprobInputs,
    options: LogprobOptions,
    vocabulary: Vocabulary,
    token_loss: TokenLoss | None,
) -> SpanLogprobOutput:
    """Compute log-probs and entropies tile by tile; `options.sparsity` says which tiles."""
    # Forward may settle the order; backward goes by the permutation that forward had.
    permutation = options.sparsity.permutation(inputs.hidden.device)

    def forward(inputs: LogprobInputs) -> tuple[TokenValues, SpanStats, Tensor]:
        call = Call(inputs, options, vocabulary, permutation)
        values, selection = call.forward()
        return values, call.stats(selection, None), selection.active

    def backward(
        inputs: LogprobInputs,
        values: TokenValues,
        slopes: Slopes,
        active: Tensor | None,
        needed: Needed,
    ) -> Gradients:
        assert active is not None
        call = Call(inputs, options, vocabulary, permutation)
        return call.gradients(active, values, slopes, needed)

    if token_loss is None:
        return differentiable(inputs, Passes(forward, backward))
    needed = needed_of(inputs.leaves)
    with torch.no_grad():
        call = Call(inputs, options, vocabulary, permutation)
        values, selection = call.forward()
        losses, slopes = evaluate(token_loss, values, slice(0, inputs.num_tokens), any(needed))
        gradients = Gradients(None, None, None)
        if slopes is not None:
            gradients = call.gradients(selection.active, values, slopes, needed)
    return SpanLogprobOutput(
        loss=precomputed("span_logprob", inputs.leaves, losses.sum(), gradients, inputs.head_sum),
        logprob=values.logprob,
        entropy=values.entropy,
        stats=call.stats(selection, slopes),
    )


class Call:
    """The passes of one call."""

    def __init__(
        self,
        inputs: LogprobInputs,
        options: LogprobOptions,
        vocabulary: Vocabulary,
        permutation: Tensor | None,
    ) -> None:
        self.inputs, self.options, self.vocabulary = inputs, options, vocabulary
        columns = positions(vocabulary.columns(inputs.token_ids), permutation)
        assert columns is not None
        self.columns = columns
        self.tiles = make_tiles(inputs, options, permutation)
        self.groups = RowGroups.of(
            inputs.num_tokens,
            vocabulary.largest,
            inputs.compute_dtype,
            planes=EXACT_PLANES if options.sparsity.rule == "exact" else SPARSE_PLANES,
            budget=options.workspace_mib / 2,
        )

    def forward(self) -> tuple[TokenValues, Selection]:
        """The sweep: the values of all tokens, and the tiles for the gradient."""
        sparsity, options = self.options.sparsity, self.options
        parts = [self._group(rows) for rows in self.groups.slices()]
        rows = RowStats.joined([of_rows for of_rows, _ in parts])
        if sparsity.order is not None:
            sparsity.order.observe(
                self.inputs.hidden.detach(),
                self.inputs.head.detach(),
                self.inputs.transform(options).bias,
                rows.lse,
                softcap=options.softcap,
                temperature=options.temperature,
            )
            sparsity.order.settle()
        return TokenValues.of(rows), Selection.joined([selection for _, selection in parts])

    def _group(self, rows: slice) -> tuple[RowStats, Selection]:
        """Sweep a group of rows and select its tiles."""
        tiles, sampled = self.tiles.sweep(self.columns, rows)
        of_rows = row_stats(tiles.lse, tiles.entropy, sampled, self.vocabulary)
        return of_rows, self._select(tiles, of_rows, self.columns[rows])

    def _select(self, tiles: TileStats, values: RowStats, columns: Tensor) -> Selection:
        sparsity = self.options.sparsity
        rule = sparsity.of_shard(self.vocabulary.num_shards)
        active = with_sampled(self.tiles.select(tiles, values.lse, rule), columns)
        if sparsity.rule == "exact":
            return Selection(active, None, None)
        log_mass = tiles.lse - values.lse[:, None]
        lost = is_dropped(active, len(log_mass))
        terms = log_mass.exp(), entropy_terms(tiles.entropy, log_mass)
        lost = torch.stack([(term * lost).sum(1) for term in terms])
        lost_mass, lost_entropy = self.vocabulary.sum_(lost)
        return Selection(active, lost_mass, lost_entropy + values.entropy * lost_mass)

    def stats(self, selection: Selection, slopes: Slopes | None) -> SpanStats:
        """What was skipped. Without slopes the bound is for a slope of one."""
        found = None
        active, mass, entropy_error = selection
        if mass is not None and entropy_error is not None:
            bound = torch.maximum(mass, entropy_error)
            if slopes is not None:
                bound = slopes.logprob.abs() * mass + slopes.entropy.abs() * entropy_error
            found = measured(active, mass, bound / self.options.temperature, self.vocabulary)
        num_bytes = max(self.tiles.sweep_bytes + self.groups.num_bytes, self.tiles.workspace_bytes)
        return SpanStats(strategy="tiled", workspace_bytes=num_bytes, measured=found)

    def gradients(
        self, active: Tensor, values: TokenValues, slopes: Slopes, needed: Needed
    ) -> Gradients:
        """The gradients, given the slopes of all tokens."""
        factors = row_factors(values, slopes, self.inputs.scale(self.options))
        gradients = self.tiles.gradients(active, self.columns, values.lse, factors, needed)
        if gradients.hidden is not None:
            self.vocabulary.sum_(gradients.hidden)
        return gradients


def with_sampled(active: Tensor, columns: Tensor) -> Tensor:
    """[B, T] flags, also 1 where the tile holds the sampled token of one of the block's rows."""
    tiles = torch.where(columns >= 0, columns // TILE, active.shape[1])  # a spare one for -1
    blocks = torch.arange(len(columns), device=columns.device) // ROW_BLOCK
    flags = pad(active, (0, 1))
    flags[blocks, tiles] = 1
    return flags[:, :-1].contiguous()


def make_tiles(inputs: LogprobInputs, options: LogprobOptions, permutation: Tensor | None) -> Tiles:
    """The dense work of a call: Triton on CUDA, library GEMMs elsewhere."""
    if uses_triton(inputs.hidden, inputs.compute_dtype):
        from rosd_kernels.gpu.logprob_tiles import TritonLogprobTiles

        return TritonLogprobTiles(inputs, options, permutation)
    from rosd_kernels.logprob.gemm_tiles import GemmLogprobTiles

    return GemmLogprobTiles(inputs, options, permutation)
