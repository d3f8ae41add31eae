"""`head_grad` of `span_logprob`: the head's gradient is added to the caller's memory in forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import entry, mass, span_logprob

FACTOR = 0.37
LEAVES = ("hidden", "head", "bias")


def run(
    case: Any, dtype: torch.dtype, head_grad: Tensor | None, **options: Any
) -> tuple[Any, dict[str, Tensor | None]]:
    """The output, and the gradients after a backward of FACTOR times the loss."""
    x = {
        name: value.to(dtype, copy=True) if value.is_floating_point() else value
        for name, value in case.tensors.items()
    }
    leaves = [name for name in LEAVES if name in x]
    for name in leaves:
        x[name].requires_grad_()
    if head_grad is not None:
        options |= {"head_grad": head_grad, "head_grad_factor": FACTOR}
    output = span_logprob(**x, token_loss=case.clipped, **options)
    (output.loss * FACTOR).backward()
    return output, {name: x[name].grad for name in leaves}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "chunked", "workspace_mib": 0.02},
        {"strategy": "chunked", "temperature": 0.7, "softcap": 5.0},
        {"strategy": "chunked", "sparsity": entry(1e-2)},
        {"strategy": "tiled", "sparsity": mass(0.3)},
        {"strategy": "tiled", "temperature": 0.7},
    ],
    ids=str,
)
def test_two_micro_batches_add_up_in_one_buffer(make_logprob, monkeypatch, options, dtype, backend):
    """What was in the buffer stays; values, statistics and the other gradients are the same."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", backend)
    cases = [make_logprob(6, 140, 8, bias=True, seed=seed) for seed in (0, 1)]
    cases[1].tensors["head"] = cases[0].tensors["head"]
    buffer = torch.ones(140, 8)
    want = torch.ones(140, 8, dtype=torch.float64)
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5  # G is rounded after the factor
    for case in cases:
        without, alone = run(case, dtype, None, **options)
        output, found = run(case, dtype, buffer, **options)
        assert found["head"] is None
        assert output.loss == without.loss
        assert output.stats.grad_error_bound == without.stats.grad_error_bound
        head = alone.pop("head")
        assert head is not None
        want += head.double()
        for name, gradient in alone.items():
            got = found[name]
            assert got is not None and gradient is not None
            assert (got - gradient).abs().max() <= rounding * gradient.abs().max(), name
    assert (want - 1).abs().max() > 0.01
    assert (buffer.double() - want).abs().max() <= rounding * (want - 1).abs().max() + 2e-7


@pytest.mark.parametrize("sparsity", ["exact", entry(1e-3)], ids=str)
def test_no_gradient_of_the_head_is_made_beside_the_buffer(make_logprob, monkeypatch, sparsity):
    """No tensor as large as the head is made where the call has a buffer."""
    case = make_logprob(4, 1024, 64)
    sizes: list[int] = []
    for name in ("new_zeros", "new_empty"):
        make = getattr(Tensor, name)

        def counted(self, *args, make=make, **kwargs):
            made = make(self, *args, **kwargs)
            sizes.append(made.numel())
            return made

        monkeypatch.setattr(Tensor, name, counted)
    options: dict[str, Any] = {"strategy": "chunked", "sparsity": sparsity}
    run(case, torch.float32, torch.zeros(1024, 64), **options)
    assert max(sizes) < 1024 * 64
    run(case, torch.float32, None, **options)
    assert max(sizes) >= 1024 * 64


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_a_frozen_head_adds_nothing(make_logprob, strategy):
    case = make_logprob(4, 140, 8)
    buffer = torch.zeros(140, 8)
    hidden = case.tensors["hidden"].requires_grad_()
    span_logprob(
        **case.tensors, token_loss=case.clipped, head_grad=buffer, strategy=strategy
    ).loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    assert (buffer == 0).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_grad": torch.zeros(140, 7)}, r"want contiguous torch.float32 of shape \[V, H\]"),
        ({"head_grad": torch.zeros(140, 8).double()}, "head_grad: got torch.float64"),
        ({"head_grad": torch.zeros(140, 8), "head_grad_factor": 0.0}, "head_grad_factor"),
        ({"head_grad": torch.zeros(140, 8), "strategy": "reference"}, "'reference'"),
        ({"head_grad": torch.zeros(140, 8), "token_loss": None}, "without token_loss"),
        (
            {"head_grad": torch.zeros(140, 8, device="meta")},
            "head_grad: is on meta, want cpu, where head is",
        ),
    ],
    ids=str,
)
def test_a_wrong_buffer_is_refused(make_logprob, options, text):
    case = make_logprob(4, 140, 8)
    with pytest.raises(ValueError, match=text):
        span_logprob(**case.tensors, **({"token_loss": case.clipped} | options))
