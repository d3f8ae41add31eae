"""Strategy "reference": the definition in plain PyTorch, on whole [N, V] logits.

The ground truth of the tests, written to be read: autograd computes the gradient, and float64
inputs are computed in float64.
"""

from __future__ import annotations

from rosd_kernels.logprob.records import (
    LogprobInputs,
    LogprobOptions,
    SpanLogprobOutput,
    TokenLoss,
)
from rosd_kernels.logprob.token_loss import checked
from rosd_kernels.records import SpanStats
from rosd_kernels.reference import log_probs
from rosd_kernels.vocabulary import Vocabulary


def run_reference(
    inputs: LogprobInputs,
    options: LogprobOptions,
    vocabulary: Vocabulary,
    token_loss: TokenLoss | None,
) -> SpanLogprobOutput:
    """Compute log-probs and entropies with [N, V] logits in memory; one rank has all of them."""
    log_p = log_probs(
        inputs.hidden,
        inputs.head,
        inputs.bias,
        softcap=options.softcap,
        temperature=options.temperature,
        dtype=inputs.compute_dtype,
    )
    logprob = log_p.gather(-1, inputs.token_ids[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    stats = SpanStats(strategy="reference", workspace_bytes=0)
    if token_loss is None:
        loss = -logprob.sum()
        return SpanLogprobOutput(loss=loss, logprob=logprob, entropy=entropy, stats=stats)
    rows = slice(0, inputs.num_tokens)
    losses = checked(token_loss(logprob, entropy, rows), inputs.num_tokens)
    return SpanLogprobOutput(
        loss=losses.to(inputs.compute_dtype).sum(),
        logprob=logprob.detach(),
        entropy=entropy.detach(),
        stats=stats,
    )
