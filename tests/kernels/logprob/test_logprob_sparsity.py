"""`span_logprob` with skipped tiles: the report is true, the gradient error within its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rosd_kernels import VocabularyOrder, entry, mass, span_logprob
from rosd_kernels.tiles import ROW_BLOCK, TILE

V = 3 * TILE + 50


def peaked(num_tokens: int, sharpness: float, seed: int) -> tuple[Tensor, Tensor]:
    """([N, V] logits whose mass is in the first tile, [N] token ids of the first two tiles)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, V, generator=generator)
    logits[:, :TILE] += sharpness
    return logits, torch.randint(2 * TILE, (num_tokens,), generator=generator)


def gradient(logits: Tensor, ids: Tensor, dtype: torch.dtype, loss: Any, **options: Any):
    """The gradient w.r.t. logits, whose head is the identity, and the output."""
    hidden = logits.to(dtype, copy=True).requires_grad_()
    eye = torch.eye(V, dtype=dtype)
    out = span_logprob(hidden, eye, ids, token_loss=loss, **options)
    return torch.autograd.grad(out.loss, hidden)[0].double(), out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from([entry(0.3), entry(1e-2), entry(1e-4), mass(0.3), mass(0.05), mass(1e-3)]),
    slopes=st.sampled_from([(-1.0, 0.0), (0.0, -2.0), (3.0, 1.0), (0.5, -0.5)]),
    softcap=st.sampled_from([None, 6.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    num_tokens=st.sampled_from([1, 7, ROW_BLOCK + 3]),
    sharpness=st.floats(0, 12),
    seed=st.integers(0, 1000),
)
def test_report_is_true_and_the_gradient_within_its_bound(
    rule, slopes, softcap, temperature, num_tokens, sharpness, seed
):
    logits, ids = peaked(num_tokens, sharpness, seed)
    a, b = slopes

    def loss(logprob, entropy, rows):
        return a * logprob + b * entropy

    options = {"softcap": softcap, "temperature": temperature}
    exact, truth = gradient(logits, ids, torch.float64, loss, strategy="reference", **options)
    got, out = gradient(
        logits, ids, torch.float32, loss, strategy="tiled", sparsity=rule, **options
    )
    assert torch.allclose(out.logprob.double(), truth.logprob, atol=1e-4, rtol=1e-5)
    assert torch.allclose(out.entropy.double(), truth.entropy, atol=1e-4)
    assert torch.allclose(out.loss.double(), truth.loss, atol=1e-3, rtol=1e-5)

    scaled = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
    p = torch.softmax(scaled / temperature, -1)
    lost_max, num_active, num_pairs = 0.0, 0, 0
    for first in range(0, num_tokens, ROW_BLOCK):
        rows = slice(first, first + ROW_BLOCK)
        lost = torch.zeros(len(p[rows]), dtype=torch.float64)
        for start in range(0, V, TILE):
            columns = slice(start, start + TILE)
            num_pairs += 1
            if bool((got[rows, columns] != 0).any()):
                num_active += 1
            else:
                assert not bool(((ids[rows] >= start) & (ids[rows] < start + TILE)).any())
                lost += p[rows, columns].sum(1)
        lost_max = max(lost_max, float(lost.max()))
    assert out.stats.active_frac == pytest.approx(num_active / num_pairs)
    assert out.stats.dropped_mass_max == pytest.approx(lost_max, rel=1e-4, abs=1e-7)
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
    got, stats = run(torch.float32, strategy="tiled", sparsity=entry(1e-2))
    error = (got - exact).abs().sum(1).max().item()
    assert stats.active_frac == 0.5
    assert 0 < error <= stats.grad_error_bound + 1e-5


@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_order_is_learned_and_then_used(make_logprob, logprob_agrees, loss):
    """The call that learns the order and the one that uses it both agree with the reference.

    The first call settles the order before its own backward, which must not use it.
    """
    case = make_logprob(5, 300, 16, bias=True)
    order = VocabularyOrder(300, num_tokens=4)
    truth = case.run(loss, dtype=torch.float64, strategy="reference")
    for has_order in (False, True):
        assert (order.permutation is not None) == has_order
        logprob_agrees(case.run(loss, strategy="tiled", sparsity=entry(1e-30, order)), truth)
