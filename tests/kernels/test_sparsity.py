"""Skipped tiles: the report is true, and the gradient error stays within its bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_kernels import VocabularyOrder, entry, mass, span_divergence
from rosd_kernels.tiles import ROW_BLOCK, TILE

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
V = 3 * TILE + 50


def peaked(num_tokens: int, *, sharpness: float, gap: float, seed: int, spread: bool):
    """[N, V] logits of student and teacher that hold most of their mass in one tile.

    spread: likely entries lie all over the vocabulary instead.
    """
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, V, generator=generator)
    student[:, :TILE] += sharpness
    if spread:
        student = student[:, torch.randperm(V, generator=generator)]
    return student, student + gap * torch.randn(num_tokens, V, generator=generator)


def gradient_and_output(
    student: Any, teacher: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[torch.Tensor, Any]:
    """The gradient w.r.t. logits: with the identity as head they are the hidden states."""
    hidden = student.to(dtype, copy=True).requires_grad_()
    out = span_divergence(hidden, teacher.to(dtype), torch.eye(V, dtype=dtype), **options)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    return gradient.double(), out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from([entry(0.3), entry(1e-2), entry(1e-4), mass(0.3), mass(0.05), mass(1e-3)]),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    entry_clip=st.sampled_from([None, 0.01]),
    softcap=st.sampled_from([None, 6.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    num_tokens=st.sampled_from([1, 7, ROW_BLOCK + 3]),
    sharpness=st.floats(0, 12),
    gap=st.sampled_from([0.01, 0.5, 3.0]),
    spread=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_report_is_true_and_the_gradient_within_its_bound(
    rule,
    divergence,
    beta,
    entry_clip,
    softcap,
    temperature,
    num_tokens,
    sharpness,
    gap,
    spread,
    seed,
):
    student, teacher = peaked(num_tokens, sharpness=sharpness, gap=gap, seed=seed, spread=spread)
    options = {"divergence": divergence, "beta": beta, "entry_clip": entry_clip}
    options |= {"softcap": softcap, "temperature": temperature}
    exact, truth = gradient_and_output(
        student, teacher, torch.float64, strategy="reference", **options
    )
    got, out = gradient_and_output(student, teacher, strategy="tiled", sparsity=rule, **options)

    # Which tiles were dropped, from the definition.
    log_p, log_q = (
        torch.log_softmax(x / temperature, -1)
        for x in (
            x.double() if softcap is None else softcap * torch.tanh(x.double() / softcap)
            for x in (student, teacher)
        )
    )
    lost_max, num_active, num_pairs = 0.0, 0, 0
    for first in range(0, num_tokens, ROW_BLOCK):
        rows = slice(first, first + ROW_BLOCK)
        lost_p, lost_q = 0.0, 0.0
        for start in range(0, V, TILE):
            columns = slice(start, start + TILE)
            num_pairs += 1
            if bool((got[rows, columns] != 0).any()):
                num_active += 1
            else:
                lost_p = lost_p + log_p[rows, columns].exp().sum(1)
                lost_q = lost_q + log_q[rows, columns].exp().sum(1)
        if isinstance(lost_p, torch.Tensor) and isinstance(lost_q, torch.Tensor):
            lost_max = max(lost_max, float(lost_p.max()), float(lost_q.max()))
    if entry_clip is None:  # where entries are clipped, an active tile may have no gradient
        assert out.stats.active_frac == pytest.approx(num_active / num_pairs)
        assert out.stats.dropped_mass_max == pytest.approx(lost_max, rel=1e-4, abs=1e-7)
    if rule.rule == "mass":
        assert out.stats.dropped_mass_max <= rule.bound * (1 + 1e-5)

    error = (got - exact).abs().sum(1).max().item()
    assert error <= out.stats.grad_error_bound + 1e-5 * (1 + exact.abs().sum(1).max().item())
    if entry_clip is None:  # merging a tile can only lower the divergence
        assert bool((out.per_token <= truth.per_token * (1 + 1e-5) + 1e-6).all())
    assert torch.allclose(out.student_entropy.double(), truth.student_entropy, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_peaked_distributions_need_few_tiles(divergence):
    student, teacher = peaked(ROW_BLOCK, sharpness=20, gap=0.3, seed=0, spread=False)
    exact, truth = gradient_and_output(
        student, teacher, torch.float64, strategy="reference", divergence=divergence
    )
    for rule in (entry(2**-12), mass(1e-3)):
        got, out = gradient_and_output(
            student, teacher, strategy="tiled", sparsity=rule, divergence=divergence
        )
        assert out.stats.active_frac == 0.25
        assert 0 < out.stats.dropped_mass_max < 1e-5
        assert out.stats.grad_error_bound < 1e-3
        assert torch.allclose(got, exact, atol=1e-6)
        assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-4)


def test_nothing_dropped_is_the_exact_result():
    student, teacher = peaked(5, sharpness=3, gap=1.0, seed=1, spread=True)
    want, exact = gradient_and_output(student, teacher, strategy="tiled")
    got, out = gradient_and_output(student, teacher, strategy="tiled", sparsity=entry(1e-30))
    assert torch.equal(got, want) and torch.equal(out.loss, exact.loss)
    stats = out.stats
    assert (stats.active_frac, stats.dropped_mass_max, stats.grad_error_bound) == (1.0, 0.0, 0.0)


def test_order_gathers_the_likely_entries():
    """Spread over all tiles in natural order, the same entries fill one tile in learned order."""
    likely = torch.randperm(V, generator=torch.Generator().manual_seed(5))[:TILE]
    logits = torch.randn(200, V, generator=torch.Generator().manual_seed(6))
    logits[:, likely] += 15
    teacher = logits + 0.5 * torch.randn(200, V, generator=torch.Generator().manual_seed(7))
    order = VocabularyOrder(V, num_tokens=300)
    options = {"strategy": "tiled", "token_ids": torch.arange(200)}
    natural, first = gradient_and_output(logits, teacher, sparsity=entry(1e-3, order), **options)
    assert first.stats.active_frac == 1.0
    assert order.permutation is not None
    assert set(order.permutation[:TILE].tolist()) == set(likely.tolist())
    assert sorted(order.permutation.tolist()) == list(range(V))
    got, then = gradient_and_output(logits, teacher, sparsity=entry(1e-3, order), **options)
    assert then.stats.active_frac == 0.25
    assert torch.allclose(got, natural, atol=1e-4)
    assert torch.allclose(then.student_logprob, first.student_logprob, atol=1e-5)
    assert torch.allclose(then.teacher_entropy, first.teacher_entropy, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"entry_clip": 0.01}], ids=str)
def test_order_changes_nothing_where_all_is_computed(make_case, agrees, options):
    case = make_case(140, 300, 9, teacher_width=6, bias=True, weights=True, sampled=True)
    order = VocabularyOrder(300, num_tokens=1)
    options = {
        "importance_clip": 2.0,
        "strategy": "tiled",
        "sparsity": entry(1e-30, order),
        **options,
    }
    case.run(**options)
    assert order.permutation is not None
    truth = case.run(dtype=torch.float64, **options | {"strategy": "reference"})
    agrees(case.run(**options), truth)


def test_order_resumes_where_it_was():
    logits = torch.randn(60, V, generator=torch.Generator().manual_seed(0))
    order = VocabularyOrder(V, num_tokens=200)
    rule = entry(0.1, order)
    gradient_and_output(logits, logits + 1, strategy="tiled", sparsity=rule)
    assert order.permutation is None and order.num_seen == 120
    resumed: Any = VocabularyOrder(V, num_tokens=200)
    resumed.load_state_dict(order.state_dict())
    for each in (order, resumed):
        gradient_and_output(logits, logits, strategy="tiled", sparsity=entry(0.1, each))
    assert order.permutation is not None and torch.equal(order.permutation, resumed.permutation)
    again: Any = VocabularyOrder(V, num_tokens=200)
    again.load_state_dict(order.state_dict())
    assert torch.equal(again.permutation, order.permutation)
    with pytest.raises(ValueError, match=r"^mass: got shape \[434\], want \[V\] = \[9\]"):
        VocabularyOrder(9).load_state_dict(order.state_dict())


def test_bound_of_a_dropped_teacher_that_is_far_off():
    """reverse_kl: log(p/q) of a dropped entry may be huge, and the bound accounts for it."""
    student = torch.zeros(1, V)
    student[:, 0] = 15.0
    teacher = student.clone()
    teacher[:, 2 * TILE] = -60.0
    _, out = gradient_and_output(
        student, teacher, strategy="tiled", sparsity=entry(1e-2), divergence="reverse_kl"
    )
    exact, _ = gradient_and_output(
        student, teacher, torch.float64, strategy="reference", divergence="reverse_kl"
    )
    dropped = exact[:, TILE:].abs().sum().item()
    assert out.stats.active_frac == 0.25
    assert dropped <= out.stats.grad_error_bound
    assert math.isfinite(out.stats.grad_error_bound)
