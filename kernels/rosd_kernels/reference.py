"""Strategy "reference": the definition in plain PyTorch, on whole [N, V] logits.

The ground truth of the tests, written to be read: autograd computes the gradient, and float64
inputs are computed in float64. With log-probabilities `log_p` of the student and `log_q` of the
teacher,

    forward_kl   sum_v q_v (log q_v - log p_v)
    reverse_kl   sum_v p_v (log p_v - log q_v)
    jsd          sum_v beta q_v (log q_v - log m_v) + (1-beta) p_v (log p_v - log m_v),
                 m = beta q + (1-beta) p

Top-k keeps the student's k most likely ids. With a tail, entry k+1 is the logarithm of the
remaining mass, `logsumexp` over the other ids (`log(1 - sum)` would lose all digits of a small
tail); without, both sides are renormalized over the k ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rosd_kernels.divergences import is_never_negative
from rosd_kernels.records import (
    SpanDivergenceOutput,
    SpanInputs,
    SpanOptions,
    SpanStats,
)
from rosd_kernels.vocabulary import Vocabulary


def run_reference(
    inputs: SpanInputs, options: SpanOptions, vocabulary: Vocabulary
) -> SpanDivergenceOutput:
    """Compute the divergence with [N, V] logits in memory; the vocabulary is not sharded."""
    dtype = inputs.compute_dtype
    student = (inputs.student_hidden, inputs.student_head, inputs.student_bias)
    teacher = (inputs.teacher_hidden, inputs.teacher_head, inputs.teacher_bias)
    scaling = {"softcap": options.softcap, "temperature": options.temperature}
    log_p = log_probs(*student, **scaling, dtype=dtype)  # [N, V]
    log_q = log_probs(*teacher, **scaling, dtype=dtype)  # [N, V]
    student_logprob, student_entropy = describe(log_p.detach(), inputs.token_ids)
    teacher_logprob, teacher_entropy = describe(log_q, inputs.token_ids)

    if options.top_k is not None and options.top_k < inputs.vocab_size:
        ids = log_p.detach().topk(options.top_k, dim=-1).indices
        log_p, log_q = (restrict(x, ids, tail=options.tail) for x in (log_p, log_q))
    entries = contributions(log_p, log_q, options)
    if options.entry_clip is not None and options.divergence == "reverse_kl":
        entries = entries + (log_q.exp() - log_p.exp())  # sums to 0; each entry is then >= 0
    if options.entry_clip is not None:
        entries = entries.clamp(max=options.entry_clip)
    per_token = entries.sum(-1)
    if is_never_negative(options):  # a divergence is never negative, but its rounded sum may be
        per_token = per_token - per_token.detach().clamp(max=0)
    loss = (inputs.token_weights(student_logprob, options) * per_token).sum()
    return SpanDivergenceOutput(
        loss=loss,
        per_token=per_token.detach(),
        student_logprob=student_logprob,
        teacher_logprob=teacher_logprob,
        student_entropy=student_entropy,
        teacher_entropy=teacher_entropy,
        stats=SpanStats(strategy="reference", workspace_bytes=0),
    )


def log_probs(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    """[N, V] `log_softmax(softcap(hidden head^T + bias) / temperature)`."""
    logits = hidden.to(dtype) @ head.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def describe(log_p: Tensor, token_ids: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return ([N] log-prob of the token or None, [N] entropy) for [N, V] log-probabilities."""
    entropy = torch.special.entr(log_p.exp()).sum(-1)  # 0 where p is
    if token_ids is None:
        return None, entropy
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1), entropy


def restrict(log_p: Tensor, ids: Tensor, *, tail: bool) -> Tensor:
    """Keep k of [N, V] log-probs: [N, k+1] with the tail's last, or [N, k] renormalized."""
    kept = log_p.gather(-1, ids)
    if not tail:
        return kept - kept.logsumexp(-1, keepdim=True)
    rest = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], dim=-1)


def contributions(log_p: Tensor, log_q: Tensor, options: SpanOptions) -> Tensor:
    """What each entry contributes to the divergence; same shape as `log_p`."""
    masked = (log_p == -math.inf) & (log_q == -math.inf)  # by biases; such an entry contributes 0
    log_p, log_q = log_p.masked_fill(masked, 0), log_q.masked_fill(masked, 0)
    return _contributions(log_p, log_q, options).masked_fill(masked, 0)


def _contributions(log_p: Tensor, log_q: Tensor, options: SpanOptions) -> Tensor:
    if options.divergence == "forward_kl":
        return log_q.exp() * (log_q - log_p)
    if options.divergence == "reverse_kl":
        return log_p.exp() * (log_p - log_q)
    beta = options.beta
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    of_teacher = log_q.exp() * (log_q - log_m)
    of_student = log_p.exp() * (log_p - log_m)
    return beta * of_teacher + (1 - beta) * of_student
