"""Baselines for `span_divergence` and `span_logprob`, and states to compare on.

They run on any device, but for `liger_cross_entropy`; Liger's need the package liger-kernel, TRL's
the package trl.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def eager_jsd(student: Tensor, teacher: Tensor, head: Tensor, *, beta: float) -> Tensor:
    """The textbook JSD with full logits, summed over the tokens.

    student, teacher: [N, H]. head: [V, H], shared by both. Gradients reach `student` and `head`.
    """
    log_p = (student @ head.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher @ head.T).float().log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(beta), log_p + math.log1p(-beta)]), dim=0)
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    of_student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (beta * of_teacher + (1 - beta) * of_student).sum()


def liger_jsd(student: Tensor, teacher: Tensor, head: Tensor, *, beta: float) -> Tensor:
    """Liger's chunked JSD, a mean over the tokens, not a sum; arguments as for `eager_jsd`."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
    )
    labels = torch.zeros(student.shape[0], dtype=torch.long, device=student.device)
    return loss(student, head, teacher, head.detach(), labels)


def trl_divergence(
    student: Tensor,
    teacher: Tensor,
    head: Tensor,
    *,
    beta: float,
    softcap: float | None = None,
    chunk_rows: int = 256,
) -> Tensor:
    """TRL's chunked divergence, summed over the tokens; arguments as for `eager_jsd`.

    beta: 0 is the forward KL, 1 the reverse one. chunk_rows: tokens whose logits of a part of the
    vocabulary are in memory (TRL's default is 4096).
    """
    from trl.kernels import chunked_divergence as trl

    trl.TOKEN_CHUNK_SIZE = chunk_rows
    cap = softcap
    divergence, _ = trl.ChunkedDivergenceFunction.apply(
        *(student, head, None, teacher, head.detach(), None, beta, 1.0, 1.0, cap, 1.0, cap)
    )
    return divergence.sum()


def minus_logprob(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    """Cross entropy, as `span_logprob`'s `token_loss`."""
    return -logprob


def eager_cross_entropy(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """The textbook cross entropy with full logits, summed over the tokens."""
    return torch.nn.functional.cross_entropy((hidden @ head.T).float(), ids, reduction="sum")


def liger_cross_entropy(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, summed over the tokens; Triton, so for GPUs only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, hidden, ids)


def liger_grpo(hidden: Tensor, head: Tensor, ids: Tensor, *, sequence: int = 128) -> Tensor:
    """Liger's GRPO loss, a mean over the tokens, in sequences of that many; without torch.compile.

    With advantages of 1 and ratios of 1 its gradient is that of the mean cross entropy.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)
    length = min(sequence, hidden.shape[0])
    shaped = ids.view(-1, length)
    ones = torch.ones(shaped.shape, device=ids.device)
    return loss(hidden.view(*shaped.shape, -1), head, shaped, ones, ones[:, 0])[0]


def gemm_floor(
    student: Tensor,
    teacher: Tensor | None,
    head: Tensor,
    *,
    chunk_rows: int = 128,
    is_frozen: bool = False,
) -> Callable[[], None]:
    """Return a function that does the GEMM sweeps of dense gradients and nothing else.

    The sweeps are the logits (of the teacher too, unless None), dh and, unless `is_frozen`, dW, in
    chunks of tokens: 2 to 4. The buffers, one of [chunk_rows, V] and the gradients, are allocated
    here.
    """
    student, head = student.detach(), head.detach()
    logits = student.new_zeros(min(chunk_rows, student.shape[0]), head.shape[0])
    dh, dW = torch.zeros_like(student), torch.zeros_like(head)

    def run() -> None:
        for start in range(0, student.shape[0], chunk_rows):
            rows = slice(start, min(start + chunk_rows, student.shape[0]))
            part = logits[: rows.stop - start]
            if teacher is not None:
                torch.mm(teacher[rows], head.T, out=part)
            torch.mm(student[rows], head.T, out=part)
            torch.mm(part, head, out=dh[rows])
            if not is_frozen:
                torch.addmm(dW, part.T, student[rows], out=dW)

    return run


def peaked_states(
    num_tokens: int, vocab_size: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (student [N, H], teacher [N, H], head [V, H]), float32, with peaked logits.

    Like a language model's they have little entropy: each state is a mixture of eight rows of a
    random head, drawn by Zipf's law.
    """
    device = generator.device
    head = torch.randn(vocab_size, width, generator=generator, device=device)
    head /= head.norm(dim=1, keepdim=True)
    names = torch.randperm(vocab_size, generator=generator, device=device)
    frequency = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64, device=device)
    drawn = torch.multinomial(frequency, num_tokens * 8, True, generator=generator)
    ids = names[drawn].view(num_tokens, 8)
    height = 18 - 8 * torch.rand(num_tokens, 8, generator=generator, device=device)
    height[:, 0] = 18
    noise = torch.randn(num_tokens, 8, generator=generator, device=device)
    student, teacher = (
        torch.einsum("nk,nkh->nh", value, head[ids]) for value in (height, height + noise)
    )
    return student, teacher, head
