"""The elementwise passes over logits in plain PyTorch: any device, any float dtype, more memory.

native.py has the same in C++; elementwise.py chooses between the two and documents them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rosd_kernels.divergences import entry_terms, row_value
from rosd_kernels.logits import LogitTransform, transform_
from rosd_kernels.records import SpanOptions

if TYPE_CHECKING:
    from rosd_kernels.active import ActiveEntries

BISECTIONS = 30  # halvings of the threshold of `mass`, in log probability
NUM_SCRATCH = 4  # buffers, each as large as one side's logits, that a call allocates at most


def stats(
    logits: Tensor, transform: LogitTransform, columns: Tensor | None, tile: int
) -> tuple[Tensor, Tensor | None]:
    """See elementwise.stats."""
    scaled = transform_(logits.clone(), transform)
    num_rows, num_columns = scaled.shape
    picked = None
    if columns is not None:
        picked = scaled.gather(1, columns.clamp(min=0)[:, None]).squeeze(1)
        picked.masked_fill_(columns < 0, 0)
    num_whole = num_columns // tile
    whole = scaled[:, : num_whole * tile].reshape(num_rows, num_whole, tile)
    parts = [whole, scaled[:, None, num_whole * tile :]]
    found = torch.cat([_part_stats(x) for x in parts if x.shape[1] and x.shape[2]], dim=-1)
    return found, picked


def _part_stats(scaled: Tensor) -> Tensor:
    """[4, R, T] of [R, T, tile]; overwrites it."""
    lse, highest, lowest = scaled.logsumexp(-1), scaled.amax(-1), scaled.amin(-1)
    log_p = scaled.sub_(lse[..., None])
    p = log_p.exp()
    # 0 * -inf is not 0
    entropy = log_p.clamp_(min=torch.finfo(scaled.dtype).min).mul_(p).sum(-1).neg_()
    return torch.stack([lse, highest, lowest, entropy])


def terms_(
    student: Tensor,
    teacher: Tensor,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,
    teacher_lse: Tensor,
    options: SpanOptions,
) -> Tensor:
    """See elementwise.terms_."""
    transform_(student, student_transform)
    transform_(teacher, teacher_transform)
    slope = student_transform.slope(student)
    log_p, log_q = student.sub_(student_lse[:, None]), teacher.sub_(teacher_lse[:, None])
    p, q = log_p.exp(), log_q.exp()
    c, e = entry_terms(log_p, log_q, p, q, options)
    result = torch.stack([row_value(c, options), e.sum(-1)])
    if e.data_ptr() != teacher.data_ptr():
        teacher.copy_(e)
    student.copy_(p)
    if slope is not None:
        student.mul_(slope)
        teacher.mul_(slope)
    return result


def mark_active_(
    active: Tensor,
    logits: Tensor,
    transform: LogitTransform,
    threshold: Tensor,
    scanned: Tensor,
    tile: int,
) -> None:
    """See active.py: `mark_active_`."""
    is_likely = ~(transform_(logits.clone(), transform) <= threshold[:, None])  # NaN is
    active |= is_likely.logical_and_(_of_entries(scanned, logits.shape[1], tile)).any(0)


def dropped_mass(
    logits: Tensor, transform: LogitTransform, lse: Tensor, entries: ActiveEntries
) -> Tensor:
    """See active.py: `dropped_mass`."""
    log_p = transform_(logits.clone(), transform).sub_(lse[:, None])
    p = log_p.exp()
    entropy = log_p.clamp_(min=torch.finfo(log_p.dtype).min).mul_(p).neg_()  # 0 * -inf is not 0
    scanned = _of_entries(entries.scanned, logits.shape[1], entries.tile)
    chosen = scanned * entries.is_dropped, ~scanned * (1 - entries.is_dropped)
    return torch.stack([(x * where).sum(1) for where in chosen for x in (p, entropy)])


def scanned_terms(
    student: Tensor,
    teacher: Tensor,
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,
    teacher_lse: Tensor,
    entries: ActiveEntries,
    options: SpanOptions,
) -> Tensor:
    """See active.py: `scanned_terms`."""
    log_p = transform_(student.clone(), student_transform).sub_(student_lse[:, None])
    log_q = transform_(teacher.clone(), teacher_transform).sub_(teacher_lse[:, None])
    c, e = entry_terms(log_p, log_q, log_p.exp(), log_q.exp(), options)
    unscanned = ~_of_entries(entries.scanned, student.shape[1], entries.tile)
    c.masked_fill_(unscanned, 0)
    e.masked_fill_(unscanned, 0)
    return torch.stack([c.sum(1), e.sum(1), e.abs_().mul_(entries.is_dropped).sum(1)])


def compact_(logits: Tensor, index: Tensor) -> Tensor:
    """See active.py: `compact_`."""
    return logits[:, : len(index)].copy_(logits[:, index])


def mass_threshold(
    logits: Tensor, transform: LogitTransform, lse: Tensor, tolerance: float
) -> Tensor:
    """See active.py: `mass_threshold`. Bisection from tolerance/V, which cannot drop too much."""
    log_p = transform_(logits.clone(), transform).sub_(lse[:, None])
    low = torch.full_like(lse, math.log(tolerance / logits.shape[1]))
    high = torch.zeros_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = log_p.exp().masked_fill_(log_p > middle[:, None], 0).sum(1)
        low, high = (
            torch.where(below <= tolerance, middle, low),
            torch.where(below <= tolerance, high, middle),
        )
    return low + lse - 1e-5 * (1 + lse.abs())  # more than the rounding of the sum


def _of_entries(scanned: Tensor, num_columns: int, tile: int) -> Tensor:
    """[R, C] flags of entries from the [R, T] of their tiles."""
    return scanned.repeat_interleave(tile, 1)[:, :num_columns]
