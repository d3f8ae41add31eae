"""The elementwise passes over logits in plain PyTorch: any device, any float dtype, more memory.

native.py has the same in C++; elementwise.py chooses between the two and documents them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.divergences import entry_terms, row_value
from rosd_kernels.logits import LogitTransform, transform_
from rosd_kernels.records import SpanOptions

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
