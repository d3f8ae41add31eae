"""`span_logprob`, strategy "chunked" with a sparsity: a true report, 1 + 2f units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rosd_kernels import active, entry, mass, span_logprob
from rosd_kernels.workspace import CPU_CHUNK_ROWS

V = 1300  # six tiles, the last a short one


def peaked(num_tokens: int, sharpness: float, seed: int) -> tuple[Tensor, Tensor]:
    """([N, V] logits whose mass is in 60 entries, [N] token ids of any)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, V, generator=generator)
    logits[:, torch.randperm(V, generator=generator)[:60]] += sharpness
    return logits, torch.randint(V, (num_tokens,), generator=generator)


def gradient(logits: Tensor, ids: Tensor, dtype: torch.dtype, loss: Any, **options: Any):
    """The gradient w.r.t. logits, whose head is the identity, and the output."""
    hidden = logits.to(dtype, copy=True).requires_grad_()
    eye = torch.eye(V, dtype=dtype)
    out = span_logprob(hidden, eye, ids, token_loss=loss, **options)
    return torch.autograd.grad(out.loss, hidden)[0].double(), out


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from([entry(0.3), entry(1e-2), entry(1e-4), mass(0.3), mass(0.05), mass(1e-3)]),
    slopes=st.sampled_from([(-1.0, 0.0), (0.0, -2.0), (3.0, 1.0), (0.5, -0.5)]),
    softcap=st.sampled_from([None, 6.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    num_tokens=st.sampled_from([1, 7, CPU_CHUNK_ROWS + 3]),
    sharpness=st.floats(0, 14),
    is_plain=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_report_is_true_and_the_gradient_within_its_bound(
    rule, slopes, softcap, temperature, num_tokens, sharpness, is_plain, seed
):
    logits, ids = peaked(num_tokens, sharpness, seed)
    a, b = slopes

    def loss(logprob, entropy, rows):
        return a * logprob + b * entropy

    options = {"softcap": softcap, "temperature": temperature}
    exact, truth = gradient(logits, ids, torch.float64, loss, strategy="reference", **options)
    with pytest.MonkeyPatch.context() as patch:
        if is_plain:
            patch.setattr("rosd_kernels.native.is_available", lambda: False)
        got, out = gradient(
            logits, ids, torch.float32, loss, strategy="chunked", sparsity=rule, **options
        )
    assert torch.allclose(out.logprob.double(), truth.logprob, atol=1e-4, rtol=1e-5)
    assert torch.allclose(out.entropy.double(), truth.entropy, atol=1e-4)
    assert torch.allclose(out.loss.double(), truth.loss, atol=1e-3, rtol=1e-5)

    scaled = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
    p = torch.softmax(scaled / temperature, -1)
    lost_max, num_active = 0.0, 0
    for rows in torch.arange(num_tokens).chunk(-(-num_tokens // CPU_CHUNK_ROWS)):
        is_dropped = (got[rows] == 0).all(0)
        assert not bool(is_dropped[ids[rows]].any())
        num_active += int((~is_dropped).sum()) * len(rows)
        lost_max = max(lost_max, float((p[rows] * is_dropped).sum(1).max()))
        if rule.rule == "entry":
            assert float((p[rows] * is_dropped).max()) <= rule.bound * 1.001
    assert out.stats.active_frac == pytest.approx(num_active / (num_tokens * V), rel=1e-6)
    assert out.stats.dropped_mass_max == pytest.approx(lost_max, rel=1e-4, abs=1e-6)
    if rule.rule == "mass":
        assert out.stats.dropped_mass_max <= rule.bound * (1 + 1e-5)
    error = (got - exact).abs().sum(1).max().item()
    assert error <= out.stats.grad_error_bound + 1e-5 * (1 + exact.abs().sum(1).max().item())


@pytest.mark.parametrize("of", ["logprob", "entropy"])
def test_bound_without_a_loss_is_for_a_slope_of_one(of):
    logits, ids = peaked(7, 9.0, 0)
    eye = torch.eye(V)

    def run(dtype: torch.dtype, **options: Any):
        hidden = logits.to(dtype, copy=True).requires_grad_()
        out = span_logprob(hidden, eye.to(dtype), ids, temperature=0.5, **options)
        return torch.autograd.grad(getattr(out, of).sum(), hidden)[0].double(), out.stats

    exact, _ = run(torch.float64, strategy="reference")
    got, stats = run(torch.float32, strategy="chunked", sparsity=entry(1e-3))
    error = (got - exact).abs().sum(1).max().item()
    assert stats.active_frac < 0.06
    assert 0 < error <= stats.grad_error_bound + 1e-5


@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped", None])
@pytest.mark.parametrize("rule", [entry(1e-12), mass(1e-9)], ids=["entry", "mass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_fine_rule_agrees_with_float64(
    make_logprob, logprob_agrees, monkeypatch, request, loss, rule, dtype, is_plain
):
    monkeypatch.setattr(active, "DENSE_FRAC", 2.0)
    if is_plain:
        request.getfixturevalue("without_native")
    case = make_logprob(CPU_CHUNK_ROWS + 5, 700, 9, bias=True, dtype=dtype, scale=2.0)
    options = {"softcap": 9.0, "temperature": 1.5}
    got = case.run(loss, strategy="chunked", sparsity=rule, **options)
    truth = case.run(loss, dtype=torch.float64, strategy="reference", **options)
    assert got.output.stats.dropped_mass_max < 1e-8
    logprob_agrees(got, truth, scale=2.0)


@pytest.mark.parametrize(
    ("frozen", "loss", "dense", "parts"),
    [
        ((), "clipped", 1, 2),
        (("head", "bias"), "clipped", 1, 1),
        (("hidden", "head", "bias"), "clipped", 1, 0),
        ((), "afterwards clipped", 2, 2),
        (("head", "bias"), "afterwards clipped", 2, 1),
    ],
    ids=str,
)
def test_units(make_logprob, frozen, loss, dense, parts):
    N, V, H = 2 * CPU_CHUNK_ROWS, 3000, 64
    case = make_logprob(N, V, H, scale=8.0)
    needs = tuple(name for name in ("hidden", "head", "bias") if name not in frozen)
    with FlopCounterMode(display=False) as counter:
        out = case.run(loss, strategy="chunked", sparsity=entry(0.05), needs=needs).output
    f = out.stats.active_frac
    assert 0 < f < 0.5
    assert counter.get_total_flops() / (2 * N * V * H) == pytest.approx(dense + parts * f)


def test_same_bits_again(make_logprob):
    case = make_logprob(CPU_CHUNK_ROWS + 40, 3000, 64, scale=6.0, bias=True)
    first, second = (case.run(strategy="chunked", sparsity=mass(0.02)) for _ in range(2))
    assert first.output.stats.active_frac < 0.9
    assert torch.equal(first.output.loss, second.output.loss)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])
