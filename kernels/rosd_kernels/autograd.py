"""Autograd glue for strategies that compute loss and gradients in one forward pass.

Forward computes the gradients, while the logits are in memory. Backward multiplies them by the
gradient of the loss, in place where possible, and returns them: a second copy of the head's
gradient would be the largest tensor of all. Gradients that nobody needs are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.records import HeadSum, SpanDivergenceOutput, SpanInputs, SpanStats
from rosd_kernels.workspace import CAST_BYTES

Needed = tuple[bool, bool, bool]  # which gradients: hidden states, head, bias
Leaves = tuple[Tensor, Tensor, Tensor | None]  # hidden states, head, bias


class TokenResults(NamedTuple):
    """Detached results per token, [N] each; field names are those of SpanDivergenceOutput."""

    per_token: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


class Gradients(NamedTuple):
    """Gradients of the loss; None where not needed."""

    hidden: Tensor | None  # [N, H]
    head: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


class Computed(NamedTuple):
    """What a strategy computes in one pass."""

    loss: Tensor
    results: TokenResults
    gradients: Gradients
    stats: SpanStats


def differentiable(
    inputs: SpanInputs, compute: Callable[[Needed], Computed]
) -> SpanDivergenceOutput:
    """Run `compute` without autograd and connect its loss to the student's tensors."""
    needed = needed_of(inputs.students)
    with torch.no_grad():
        computed = compute(needed)
    students, gradients, head_sum = inputs.students, computed.gradients, inputs.head_sum
    of_head = gradients.head
    if head_sum is not None and of_head is not None and of_head is not head_sum.buffer:
        head_sum.buffer.add_(of_head)  # "tiled" on a GPU forms dW in memory of its own
    loss = precomputed("span_divergence", students, computed.loss, gradients, head_sum)
    return SpanDivergenceOutput(loss=loss, **computed.results._asdict(), stats=computed.stats)


def needed_of(leaves: Leaves) -> Needed:
    """Which gradients a call has to provide; none under torch.no_grad."""
    # ctx.needs_input_grad would stay true there.
    hidden, head, bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in leaves
    )
    return hidden, head, bias


def zero_gradients(
    leaves: Leaves, needed: Needed, dtype: torch.dtype, head_sum: HeadSum | None = None
) -> Gradients:
    """Zeros in the dtype in which the parts of a gradient are summed; of the head, the sum so far.

    head_sum: where the call adds the head's gradient, see `HeadSum`.
    """
    hidden, head, bias = (
        tensor.new_zeros(tensor.shape, dtype=dtype)
        if need and tensor is not None and not (head_sum is not None and tensor is leaves[1])
        else None
        for tensor, need in zip(leaves, needed, strict=True)
    )
    if head_sum is not None and needed[1]:
        head = head_sum.buffer
    return Gradients(hidden, head, bias)


def precomputed(
    function: str,
    leaves: Leaves,
    loss: Tensor,
    gradients: Gradients,
    head_sum: HeadSum | None = None,
) -> Tensor:
    """The loss, connected to the leaves by gradients that exist already.

    function: the public function, for error messages.
    """
    factor = 1.0
    if head_sum is not None:
        gradients, factor = gradients._replace(head=None), head_sum.factor
    return _Precomputed.apply(*leaves, loss, gradients, factor, function)


class _Precomputed(torch.autograd.Function):
    """The loss, with gradients that were computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        loss: Tensor,
        gradients: Gradients,
        factor: float,
        function: str,
    ) -> Tensor:
        ctx.gradients, ctx.factor, ctx.function = gradients, factor, function
        ctx.dtypes = dtypes_of((hidden, head, bias))
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.function)
        if ctx.gradients is None:
            raise RuntimeError(
                f"{ctx.function}: backward() was called twice on one loss, whose gradients were "
                f"released by the first call; call {ctx.function} again, or use "
                "strategy='reference'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if ctx.factor != 1:
            grad_loss = grad_loss / ctx.factor
        scaled = (
            None if gradient is None else scale_(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


def dtypes_of(leaves: Leaves) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in leaves)


def refuse_second_derivative(function: str) -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: create_graph=True is supported only with strategy='reference'"
        )


def scale_(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor * gradient`, rounded once to `dtype`: in place, or else part by part."""
    if gradient.dtype == dtype:
        # The factor of loss.backward(). Reading it on a GPU would wait for the device.
        is_one = factor.device.type == "cpu" and bool(factor == 1)
        return gradient if is_one else gradient.mul_(factor)
    result = gradient.new_empty(gradient.shape, dtype=dtype)
    step = max(1, CAST_BYTES // max(1, gradient[:1].nbytes))
    for start, stop in ranges(gradient.shape[0], step):
        result[start:stop] = gradient[start:stop] * factor
    return result


def ranges(stop: int, step: int) -> list[tuple[int, int]]:
    """Consecutive half-open ranges of at most `step` that cover 0..stop."""
    return [(first, min(first + step, stop)) for first in range(0, stop, max(1, step))]
