"""The tile formula of chunked divergences, as a peer: tiles of 4096 rows and 32768 entries.

Logits exist for one tile at a time, so that they are computed again for every pass:

    statistics   max and sum of exponentials of both sides, folded in tile by tile     2 units
    value        sum over the tiles of the entries' divergence, and K                   2 units
    gradient     G = e - p K of a tile, dh += G W, dW += G^T h                          4 units

That is 8 units for the JSD, in plain PyTorch, so without fused elementwise passes: a library that
fuses them is as fast as this or faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS, COLUMNS = 4096, 32768


def tile_jsd(
    student: Tensor,  # [N, H]
    teacher: Tensor,  # [N, H]
    head: Tensor,  # [V, H], shared by both
    *,
    beta: float,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [] float32, summed over the tokens, dh [N, H], dW [V, H]); float32 sums."""
    student, teacher, head = student.detach(), teacher.detach(), head.detach()
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    loss = student.new_zeros((), dtype=wide)
    dh = torch.zeros_like(student, dtype=wide)
    dW = torch.zeros_like(head, dtype=wide)
    log_beta, log_rest = math.log(beta), math.log1p(-beta)
    spans = [slice(v, min(v + columns, len(head))) for v in range(0, len(head), columns)]
    for first in range(0, len(student), rows):
        chunk = slice(first, min(first + rows, len(student)))
        s, t = student[chunk], teacher[chunk]
        lse_s, lse_t = (_lse(x, head, spans, wide) for x in (s, t))
        total = torch.zeros_like(lse_s)

        def log_probs(
            span: slice,
            sides: tuple[Tensor, ...] = (s, t, lse_s, lse_t),
        ) -> tuple[Tensor, Tensor, Tensor]:
            """log p, log q and log m of a tile."""
            of_s, of_t, norm_s, norm_t = sides
            log_p = (of_s @ head[span].T).to(wide) - norm_s
            log_q = (of_t @ head[span].T).to(wide) - norm_t
            return log_p, log_q, torch.logaddexp(log_q + log_beta, log_p + log_rest)

        for span in spans:
            log_p, log_q, log_m = log_probs(span)
            of_student = log_p.exp().mul_(log_p - log_m)
            total += of_student.sum(-1, keepdim=True)
            loss += beta * log_q.exp().mul_(log_q - log_m).sum()
        loss += (1 - beta) * total.sum()
        for span in spans:
            log_p, _, log_m = log_probs(span)
            G = (1 - beta) * log_p.exp() * (log_p - log_m - total)
            G = G.to(student.dtype)
            dh[chunk] += (G @ head[span]).to(wide)
            dW[span] += (G.T @ s).to(wide)
    return loss, dh, dW


def _lse(hidden: Tensor, head: Tensor, spans: list[slice], wide: torch.dtype) -> Tensor:
    """[R, 1] log of the sum of exponentials of all logits, folded in tile by tile."""
    found = hidden.new_full((len(hidden), 1), -math.inf, dtype=wide)
    for span in spans:
        logits = (hidden @ head[span].T).to(wide)
        found = torch.logaddexp(found, logits.logsumexp(-1, keepdim=True))
    return found
