"""The two elementwise passes over logits, and the choice of their implementation.

    stats     logits -> log sum exp, max, min and entropy of each tile
    terms_    logits of both sides and their row's normalizers -> value and K (see divergences.py)

C++ (native.py) implements them on a CPU; plain PyTorch (plain.py) does on other devices and without
the extension. The Triton kernels do not use this module: see gpu/.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rosd_kernels import native, plain
from rosd_kernels.divergences import known_total
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions


def uses_native(logits_like: Tensor) -> bool:
    """Whether C++ handles tensors of this device and dtype."""
    return (
        logits_like.device.type == "cpu"
        and logits_like.dtype in native.DTYPES
        and native.is_available()
    )


def stats(
    logits: Tensor,  # [R, C] raw
    transform: LogitTransform,
    columns: Tensor | None = None,  # [R] int64
    tile: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return ([4, R, T] lse, max, min, entropy of each tile, [R] logit at `columns` or None).

    All of them are of the scaled logits s; the entropy is that of `exp(s - lse)`. Logits may be
    -inf. A column of -1 gives the logit 0. Without `tile` the whole row is one tile.
    """
    implementation = native if uses_native(logits) else plain
    return implementation.stats(logits, transform, columns, tile or logits.shape[1])


def terms_(
    student: Tensor,  # [R, C] raw logits
    teacher: Tensor,  # [R, C]
    student_transform: LogitTransform,
    teacher_transform: LogitTransform,
    student_lse: Tensor,  # [R]
    teacher_lse: Tensor,  # [R]
    options: SpanOptions,
) -> Tensor:
    """Return [2, R], the sum of c and the sum of e over the columns.

    In place, `student` becomes `p w` and `teacher` `e w` with w = ds/d(raw) * temperature, so that
    `teacher - K student` is the gradient w.r.t. the raw logits, times the temperature.
    """
    implementation = native if uses_native(student) else plain
    return implementation.terms_(
        student, teacher, student_transform, teacher_transform, student_lse, teacher_lse, options
    )


def subtract_total(p: Tensor, e: Tensor, total: Tensor, options: SpanOptions) -> None:
    """`p <- e - K p` for the [R, C] results of `terms_` and the [R] total of whole rows."""
    known = known_total(options)
    if known is None:
        torch.addcmul(e, p, total[:, None], value=-1, out=p)
    else:
        torch.sub(e, p, alpha=known, out=p)
