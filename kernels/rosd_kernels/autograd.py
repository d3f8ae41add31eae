"""Autograd glue for strategies that compute loss and gradients in one forward pass.

Forward computes the gradients, while the logits are in memory. Backward multiplies them by the
gradient of the loss, in place where possible, and returns them: a second copy of the head's
gradient would be the largest tensor of all. Gradients that nobody needs are not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rosd_kernels.records import HeadSum, SpanDivergenceOutput, SpanInputs, SpanStats
from rosd_kernels.workspace import CAST_BYTES

FACTOR_TOLERANCE = 1e-2  # relative, of `head_grad_factor`: a loss scale may be rounded to bfloat16
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
    loss = precomputed(
        "span_divergence", inputs.students, computed.loss, computed.gradients, inputs.head_sum
    )
    return SpanDivergenceOutput(loss=loss, **computed.results._asdict(), stats=computed.stats)


def needed_of(leaves: Leaves) -> Needed:
    """Which gradients a call has to provide; none under torch.no_grad."""
    # ctx.needs_input_grad would stay true there.
    hidden, head, bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in leaves
    )
    return hidden, head, bias


def zero_gradients(
    leaves: Leaves,
    needed: Needed,
    dtype: torch.dtype,
    head_sum: HeadSum | None = None,
    *,
    head_is_written: bool = False,
) -> Gradients:
    """Zeros in the dtype in which the parts of a gradient are summed; of the head, the sum so far.

    head_sum: where the call adds the head's gradient, see `HeadSum`. head_is_written: the first
    part overwrites the head's gradient, which is left as it is found in memory: zeros would be
    written and read for nothing, and it is the largest tensor of a call.
    """
    hidden, head, bias = (
        tensor.new_zeros(tensor.shape, dtype=dtype)
        if need
        and tensor is not None
        and not ((head_sum is not None or head_is_written) and tensor is leaves[1])
        else None
        for tensor, need in zip(leaves, needed, strict=True)
    )
    if head_is_written and needed[1] and head_sum is None:
        head = leaves[1].new_empty(leaves[1].shape, dtype=dtype)
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
    factor, of_head = 1.0, gradients.head
    adds_head = head_sum is not None and of_head is not None
    if head_sum is not None:
        if of_head is not None and of_head is not head_sum.buffer:
            head_sum.buffer.add_(of_head)  # "tiled" on a GPU forms dW in memory of its own
        gradients, factor = gradients._replace(head=None), head_sum.factor
    return _Precomputed.apply(*leaves, loss, gradients, factor, adds_head, function)


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
        has_head_sum: bool,
        function: str,
    ) -> Tensor:
        ctx.gradients, ctx.factor, ctx.function = gradients, factor, function
        ctx.dtypes, ctx.has_head_sum = dtypes_of((hidden, head, bias)), has_head_sum
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
        if ctx.has_head_sum:
            refuse_other_factor(ctx.function, grad_loss, ctx.factor)
        if ctx.factor != 1:
            grad_loss = grad_loss / ctx.factor
        scaled = (
            None if gradient is None else scale_(gradient, grad_loss, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)


def dtypes_of(leaves: Leaves) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in leaves)


def refuse_second_derivative(function: str) -> None:
    """Raise RuntimeError in a backward that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: create_graph=True is supported only with strategy='reference'"
        )


def refuse_other_factor(function: str, grad_loss: Tensor, factor: float) -> None:
    """Raise RuntimeError where the loss was not multiplied by the factor that forward was told.

    The head's gradient is already added with it. A factor that is not finite passes: it shows in
    the other gradients. Reading `grad_loss` on a GPU would wait for it.
    """
    if grad_loss.device.type != "cpu":
        return
    given = float(grad_loss)
    if math.isfinite(given) and not math.isclose(given, factor, rel_tol=FACTOR_TOLERANCE):
        raise RuntimeError(
            f"{function}: head_grad_factor is {factor:g}, but the loss was multiplied by "
            f"{given:g} before backward; want the same number"
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
