"""`head_grad`: the head's gradient is added to memory of the caller, in forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import entry, span_divergence
from rosd_kernels.workspace import MIB, default_workspace_mib, gpu_workspace_mib

FACTOR = 0.37


def run(
    case: Any, dtype: torch.dtype, head_grad: Tensor | None, **options: Any
) -> dict[str, Tensor | None]:
    """Gradients after a backward of FACTOR times the loss."""
    x = {
        name: value.to(dtype, copy=True) if value.is_floating_point() else value
        for name, value in case.tensors.items()
    }
    leaves = [name for name in ("student_hidden", "student_head", "student_bias") if name in x]
    for name in leaves:
        x[name].requires_grad_()
    if head_grad is not None:
        options |= {"head_grad": head_grad, "head_grad_factor": FACTOR}
    (span_divergence(**x, **options).loss * FACTOR).backward()
    return {name: x[name].grad for name in leaves}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "chunked", "workspace_mib": 0.02},
        {"strategy": "chunked", "top_k": 5},
        {"strategy": "chunked", "sparsity": entry(1e-3)},
        {"strategy": "tiled", "sparsity": entry(1e-3)},
        {"strategy": "tiled", "divergence": "forward_kl"},
    ],
    ids=str,
)
def test_two_micro_batches_add_up_in_one_buffer(make_case, monkeypatch, options, dtype, backend):
    """What was in the buffer stays; the other gradients are what autograd gives without it."""
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", backend)
    cases = [make_case(6, 140, 8, bias=True, weights=True, seed=seed) for seed in (0, 1)]
    cases[1].tensors["student_head"] = cases[0].tensors["student_head"]
    buffer = torch.ones(140, 8)
    want = torch.ones(140, 8, dtype=torch.float64)
    for case in cases:
        alone = run(case, dtype, None, **options)
        found = run(case, dtype, buffer, **options)
        assert found["student_head"] is None
        head = alone.pop("student_head")
        assert head is not None
        want += head.double()
        for name, gradient in alone.items():
            got = found[name]
            assert got is not None and gradient is not None
            # In bfloat16 G is rounded after the factor instead of before.
            bound = (2e-2 if dtype == torch.bfloat16 else 1e-5) * gradient.abs().max()
            assert (got - gradient).abs().max() <= bound, name
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (buffer.double() - want).abs().max() <= rounding * (want - 1).abs().max() + 2e-7


def test_no_gradient_of_the_head_is_made_beside_the_buffer(make_case, monkeypatch):
    """The largest tensor of a call with a buffer is smaller than the head."""
    case = make_case(4, 4096, 64)
    sizes: list[int] = []
    new_zeros = Tensor.new_zeros
    monkeypatch.setattr(
        Tensor,
        "new_zeros",
        lambda self, *args, **kwargs: (
            sizes.append((t := new_zeros(self, *args, **kwargs)).numel()) or t
        ),
    )
    run(case, torch.float32, torch.zeros(4096, 64), strategy="chunked")
    assert max(sizes) < 4096 * 64
    run(case, torch.float32, None, strategy="chunked")
    assert max(sizes) == 4096 * 64


def test_a_frozen_head_adds_nothing(make_case):
    case = make_case(4, 140, 8)
    buffer = torch.zeros(140, 8)
    hidden = case.tensors["student_hidden"].requires_grad_()
    out = span_divergence(
        hidden, case.tensors["teacher_hidden"], case.tensors["student_head"], head_grad=buffer
    )
    out.loss.backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    assert (buffer == 0).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head_grad": torch.zeros(140, 7)}, r"want contiguous torch.float32 of shape \[V, H\]"),
        ({"head_grad": torch.zeros(8, 140).T}, "contiguous"),
        ({"head_grad": torch.zeros(140, 8).double()}, "head_grad: got torch.float64"),
        ({"head_grad": torch.zeros(140, 8), "head_grad_factor": 0.0}, "head_grad_factor"),
        ({"head_grad": torch.zeros(140, 8), "strategy": "reference"}, "'reference'"),
    ],
    ids=str,
)
def test_a_wrong_buffer_is_refused(make_case, options, text):
    case = make_case(4, 140, 8)
    with pytest.raises(ValueError, match=text):
        span_divergence(**case.tensors, **options)


@pytest.mark.parametrize(("gib", "mib"), [(6, 256), (24, 768), (80, 2048), (141, 2048)])
def test_the_default_workspace_follows_the_device(gib, mib):
    assert gpu_workspace_mib(gib * 1024 * MIB) == mib
    assert default_workspace_mib(torch.device("cpu")) == 256
