"""What the passes of strategy "chunked" with a sparsity share, in Triton and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.active import Side
from rosd_kernels.divergences import entry_terms, is_never_negative, known_total
from rosd_kernels.records import SpanOptions
from rosd_kernels.rows import RowStats
from rosd_kernels.sparsity import tile_error_bound


class SparseBlock(NamedTuple):
    """What is known of a block of rows."""

    value: Tensor  # [R] divergence
    student: RowStats
    teacher: RowStats
    grad: Tensor  # [R, A] G, where it is needed
    index: Any  # whose columns: [A] int64, None for all, or an ActiveIndex of gpu/entries.py
    num_computed: Tensor | int  # pairs of a row and an active entry
    lost_mass: Tensor  # [R] the larger one of p and of q that have no gradient
    grad_error: Tensor  # [R] bound


def add_tiles(
    sides: Sequence[Side], scanned: Tensor, value: Tensor, total: Tensor, options: SpanOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """[R] value and K with the tiles that were not scanned, as one entry each, and their E_2."""
    student, teacher = sides
    lowest = torch.finfo(value.dtype).min / 4  # -inf - -inf is not 0
    log_p = (student.tiles.lse - student.rows.lse[:, None]).clamp_(min=lowest)
    log_q = (teacher.tiles.lse - teacher.rows.lse[:, None]).clamp_(min=lowest)
    p, q = log_p.exp(), log_q.exp()
    ratio = None
    if options.divergence == "reverse_kl":
        highest = student.tiles.max - student.rows.lse[:, None]
        ratio = highest - (teacher.tiles.min - teacher.rows.lse[:, None])
    bound = tile_error_bound(p, q, ratio, options).masked_fill_(scanned, 0)
    c, e = entry_terms(log_p, log_q, p, q, options)
    c.masked_fill_(scanned, 0)
    e.masked_fill_(scanned, 0)
    value, total = value + c.sum(1), total + e.sum(1)
    if is_never_negative(options):
        value = value.clamp_(min=0)
    return value, total, bound.sum(1)


def gradient_error(
    total: Tensor,
    student_mass: Tensor,
    known_error: Tensor,
    tile_error: Tensor,
    options: SpanOptions,
) -> Tensor:
    """[R] bound of active.py, from K, P_D and the two parts of the lost `sum |e|`, [R] each."""
    if known_total(options) is None:
        error = known_error + 2 * tile_error + student_mass * total.abs()
    else:
        error = known_error + tile_error + student_mass
    return error / options.temperature
