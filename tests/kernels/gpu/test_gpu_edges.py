"""Inputs at the edges, on the Triton kernels in their interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from rosd_kernels import entry, span_divergence, span_logprob
from rosd_kernels.gpu.launch import float32_precision

STRATEGIES = ("tiled", "chunked")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(autouse=True)
def triton_only(monkeypatch) -> None:
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")


@pytest.fixture
def newer_setting():
    """Set torch's precision of float32 GEMMs by the interface that makes the older one raise."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


def test_either_setting_of_the_float32_precision_is_read(newer_setting):
    assert float32_precision() == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert float32_precision() == "ieee"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiled_runs_under_the_newer_setting(make_case, newer_setting, dtype):
    case = make_case(3, 140, 16, dtype=dtype)
    assert torch.isfinite(case.run(strategy="tiled").output.loss)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_scale_reaches_half_precision_head_gradients(make_case, strategy):
    """dW of weights 1e-6 is below float16's smallest number until the backward scales it."""
    case = make_case(40, 140, 8, dtype=torch.float16, scale=3.0)
    weights = torch.full((40,), 1e-6)

    def gradient(dtype: torch.dtype, name: str) -> torch.Tensor:
        x = {key: value.to(dtype, copy=True) for key, value in case.tensors.items()}
        head = x["student_head"].requires_grad_()
        out = span_divergence(
            x["student_hidden"], x["teacher_hidden"], head, weights=weights, strategy=name
        )
        (out.loss * 65536).backward()
        assert head.grad is not None
        return head.grad.double()

    want = gradient(torch.float64, "reference")
    error = (gradient(torch.float16, strategy) - want).abs().max()
    assert error <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clip", [None, 0.02], ids=str)
@pytest.mark.parametrize("beta", [1e-9, 1e-6, 0.05, 0.95, 1 - 1e-6, 1 - 1e-9])
def test_jsd_of_every_beta(make_case, strategy, beta, clip):
    case = make_case(4, 260, 8, teacher_width=6, weights=True, scale=4.0)
    truth = case.run(dtype=torch.float64, strategy="reference", beta=beta, entry_clip=clip)
    actual = case.run(strategy=strategy, beta=beta, entry_clip=clip)
    for name, want in truth.gradients.items():
        error = (actual.gradients[name].double() - want).abs().max()
        assert error <= 4e-5 * want.abs().max(), name
    want = truth.output.per_token
    assert ((actual.output.per_token.double() - want).abs() <= 2e-5 * want.max()).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_entries_masked_on_both_sides_do_not_exist(make_case, agrees, strategy, divergence):
    case = make_case(5, 300, 8, bias=True, sampled=True)
    case.tensors["token_ids"] = torch.tensor([1, 2, 3, 100, 260])
    for name in ("student_bias", "teacher_bias"):
        case.tensors[name][[0, 7, *range(128, 256), 299]] = -torch.inf
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    for rule in ("exact", entry(1e-9)):
        actual = case.run(strategy=strategy, divergence=divergence, sparsity=rule)
        agrees(actual, truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_certain_token_has_no_positive_logprob(strategy):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.full((130, 64), 3.0) + torch.randn(130, 64, generator=generator) * 1e-3
    head = torch.randn(150, 64, generator=generator) * 0.1
    head[17] = 1.0
    ids = torch.full((130,), 17)
    out = span_divergence(hidden, hidden, head, token_ids=ids, strategy=strategy)
    assert out.student_logprob is not None and (out.student_logprob <= 0).all()
    assert (span_logprob(hidden, head, ids, strategy=strategy).logprob <= 0).all()
