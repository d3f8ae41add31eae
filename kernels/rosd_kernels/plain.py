"""The elementwise passes over logits in plain PyTorch: any device, any float dtype, more memory.

What native.py has in C++. Both serve elementwise.py, which says what they do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels.divergences import entry_terms, row_value
from rosd_kernels.order import finish_
from rosd_kernels.records import Form, SpanOptions

NUM_SCRATCH = 4  # buffers of the size of one side's logits that a call allocates, at most


def stats(
    logits: Tensor, form: Form, columns: Tensor | None, tile: int
) -> tuple[Tensor, Tensor | None]:
    """See elementwise.stats."""
    finished = finish_(logits.clone(), form.bias, form.softcap, form.temperature)
    num_rows, num_columns = finished.shape
    picked = None
    if columns is not None:
        picked = finished.gather(1, columns.clamp(min=0)[:, None]).squeeze(1)
        picked.masked_fill_(columns < 0, 0)
    num_whole = num_columns // tile
    whole = finished[:, : num_whole * tile].reshape(num_rows, num_whole, tile)
    parts = [whole, finished[:, None, num_whole * tile :]]
    found = torch.cat([_part_stats(x) for x in parts if x.shape[1] and x.shape[2]], dim=-1)
    return found, picked


def _part_stats(finished: Tensor) -> Tensor:
    """[4, R, T] of [R, T, tile]; overwrites it."""
    lse, highest, lowest = finished.logsumexp(-1), finished.amax(-1), finished.amin(-1)
    log_share = finished.sub_(lse[..., None])
    share = log_share.exp()
    # 0 * -inf is no 0
    entropy = log_share.clamp_(min=torch.finfo(finished.dtype).min).mul_(share).sum(-1).neg_()
    return torch.stack([lse, highest, lowest, entropy])


def terms_(
    student: Tensor,
    teacher: Tensor,
    student_form: Form,
    teacher_form: Form,
    student_lse: Tensor,
    teacher_lse: Tensor,
    options: SpanOptions,
) -> Tensor:
    """See elementwise.terms_."""
    for logits, form in ((student, student_form), (teacher, teacher_form)):
        finish_(logits, form.bias, form.softcap, form.temperature)
    slope = None
    if options.softcap is not None:
        tanh = student * (options.temperature / options.softcap)
        slope = tanh.square_().neg_().add_(1)
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
