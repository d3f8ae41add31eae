"""Log-probabilities and entropies that are differentiable themselves.

Their loss is not known in forward, so the logits are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.autograd import Gradients, Needed, dtypes_of, refuse_second_derivative
from rosd_kernels.logprob.records import LogprobInputs, Slopes, SpanLogprobOutput, TokenValues
from rosd_kernels.records import SpanStats


class Passes(NamedTuple):
    """What a strategy does in forward and in backward.

    `forward` also returns what `backward` wants to see again, a small tensor or None.
    """

    forward: Callable[[LogprobInputs], tuple[TokenValues, SpanStats, Tensor | None]]
    backward: Callable[[LogprobInputs, TokenValues, Slopes, Tensor | None, Needed], Gradients]


def differentiable(inputs: LogprobInputs, passes: Passes) -> SpanLogprobOutput:
    """Run `passes.forward` without autograd and connect its values to the inputs."""
    with torch.no_grad():
        values, stats, extra = passes.forward(inputs)
    logprob, entropy = _Recomputed.apply(
        *inputs.leaves, inputs.token_ids, values, extra, passes.backward
    )
    return SpanLogprobOutput(loss=-logprob.sum(), logprob=logprob, entropy=entropy, stats=stats)


class _Recomputed(torch.autograd.Function):
    """Log-prob and entropy, whose backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        values: TokenValues,
        extra: Tensor | None,
        run: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, head, bias, token_ids, *values, extra)
        ctx.run = run
        return values.logprob.clone(), values.entropy.clone()

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("span_logprob")
        hidden, head, bias, token_ids, *rest, extra = ctx.saved_tensors
        values = TokenValues(*rest)
        inputs = LogprobInputs(hidden=hidden, head=head, bias=bias, token_ids=token_ids)
        slopes = Slopes(
            *(
                torch.zeros_like(values.lse) if x is None else x
                for x in (grad_logprob, grad_entropy)
            )
        )
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            gradients = ctx.run(inputs, values, slopes, extra, ctx.needs_input_grad[:3])
        dtypes = dtypes_of(inputs.leaves)
        found = (
            None if gradient is None or dtype is None else gradient.to(dtype)
            for gradient, dtype in zip(gradients, dtypes, strict=True)
        )
        return (*found, None, None, None, None)
