"""Strategy "chunked" with a sparsity: a true report, a gradient within its bound, 2 + 2f units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from rosd_kernels import active, compact, entry, mass, span_divergence
from rosd_kernels.workspace import CPU_CHUNK_ROWS
from tests.kernels.test_memory import allocations, peak_of

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
V = 1300  # six tiles, the last a short one


@pytest.fixture(params=["native", "plain"])
def backend(request):
    if request.param == "plain":
        request.getfixturevalue("without_native")


def peaked(num_tokens: int, *, sharpness: float, gap: float, seed: int, likely: int):
    """[N, V] logits of student and teacher; `likely` entries hold most of their mass."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, V, generator=generator)
    student[:, torch.randperm(V, generator=generator)[:likely]] += sharpness
    return student, student + gap * torch.randn(num_tokens, V, generator=generator)


def gradient_and_output(
    student: Any, teacher: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[torch.Tensor, Any]:
    """The gradient w.r.t. logits: with the identity as head they are the hidden states."""
    hidden = student.to(dtype, copy=True).requires_grad_()
    options = {"strategy": "chunked"} | options
    out = span_divergence(hidden, teacher.to(dtype), torch.eye(V, dtype=dtype), **options)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    return gradient.double(), out


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from([entry(0.3), entry(1e-2), entry(1e-4), mass(0.3), mass(0.05), mass(1e-3)]),
    divergence=st.sampled_from(DIVERGENCES),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    entry_clip=st.sampled_from([None, 0.01]),
    softcap=st.sampled_from([None, 6.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    num_tokens=st.sampled_from([1, 7, CPU_CHUNK_ROWS + 3]),
    sharpness=st.floats(0, 14),
    gap=st.sampled_from([0.01, 0.5, 3.0]),
    likely=st.sampled_from([5, 100]),
    is_plain=st.booleans(),
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
    likely,
    is_plain,
    seed,
):
    student, teacher = peaked(num_tokens, sharpness=sharpness, gap=gap, seed=seed, likely=likely)
    options = {"divergence": divergence, "beta": beta, "entry_clip": entry_clip}
    options |= {"softcap": softcap, "temperature": temperature}
    exact, truth = gradient_and_output(
        student, teacher, torch.float64, strategy="reference", **options
    )
    with pytest.MonkeyPatch.context() as patch:
        if is_plain:
            patch.setattr("rosd_kernels.native.is_available", lambda: False)
        got, out = gradient_and_output(student, teacher, sparsity=rule, **options)

    log_p, log_q = (
        torch.log_softmax(x / temperature, -1)
        for x in (
            x.double() if softcap is None else softcap * torch.tanh(x.double() / softcap)
            for x in (student, teacher)
        )
    )
    lost_max, num_active = 0.0, 0
    blocks = -(-num_tokens // CPU_CHUNK_ROWS)
    for rows in torch.arange(num_tokens).chunk(blocks):
        is_dropped = (got[rows] == 0).all(0)
        num_active += int((~is_dropped).sum()) * len(rows)
        for log_mass in (log_p, log_q):
            lost = (log_mass[rows].exp() * is_dropped).sum(1)
            lost_max = max(lost_max, float(lost.max()))
        if rule.rule == "entry" and entry_clip is None:  # what the rule promises
            largest = (torch.maximum(log_p, log_q)[rows].exp() * is_dropped).max()
            assert largest <= rule.bound * 1.001
    stats = out.stats
    if entry_clip is None:  # where entries are clipped, an active one may have no gradient
        assert stats.active_frac == pytest.approx(num_active / (num_tokens * V), rel=1e-6)
        assert stats.dropped_mass_max == pytest.approx(lost_max, rel=1e-4, abs=1e-6)
    if rule.rule == "mass":
        assert stats.dropped_mass_max <= rule.bound * (1 + 1e-5)

    error = (got - exact).abs().sum(1).max().item()
    assert error <= stats.grad_error_bound + 1e-5 * (1 + exact.abs().sum(1).max().item())
    if entry_clip is None:  # merging a tile can only lower the divergence
        assert bool((out.per_token <= truth.per_token * (1 + 1e-5) + 1e-6).all())
        assert bool((out.per_token >= 0).all())
    assert torch.allclose(out.student_entropy.double(), truth.student_entropy, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rule", [entry(2**-12), mass(1e-3)], ids=["entry", "mass"])
def test_peaked_distributions_need_few_entries(backend, divergence, rule):
    student, teacher = peaked(CPU_CHUNK_ROWS, sharpness=20, gap=0.3, seed=0, likely=100)
    exact, truth = gradient_and_output(
        student, teacher, torch.float64, strategy="reference", divergence=divergence
    )
    got, out = gradient_and_output(student, teacher, sparsity=rule, divergence=divergence)
    assert out.stats.strategy == "chunked"
    assert 0.05 < out.stats.active_frac <= 100 / V + 1e-6
    assert 0 < out.stats.dropped_mass_max <= 1e-3
    assert out.stats.grad_error_bound < 3e-3
    assert torch.allclose(got, exact, atol=1e-4)
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-4)


@pytest.mark.parametrize("is_own", [False, True], ids=["both", "teacher"])
def test_masked_entries_leave_reverse_kl_its_bound(backend, is_own):
    """is_own: only the teacher's entries are masked, so that the loss is infinite."""
    student, teacher = peaked(3, sharpness=20, gap=0.3, seed=0, likely=5)
    bias = torch.zeros(V)
    bias[::3] = -math.inf
    likely = student.sum(0).topk(5).indices
    bias[likely] = 0
    options: Any = {
        "divergence": "reverse_kl",
        "student_bias": None if is_own else bias,
        "teacher_bias": bias,
    }
    exact, truth = gradient_and_output(student, teacher, **options)
    got, out = gradient_and_output(student, teacher, sparsity=entry(2**-12), **options)
    assert out.stats.active_frac < 0.1
    if is_own:
        assert bool((truth.per_token == math.inf).all())
        assert bool((out.per_token == math.inf).all())
        return
    assert (got - exact).abs().sum(1).max() <= out.stats.grad_error_bound < 1e-2
    assert torch.allclose(out.per_token, truth.per_token, rtol=1e-3)


def test_nothing_dropped_is_the_exact_result(backend):
    student, teacher = peaked(5, sharpness=3, gap=1.0, seed=1, likely=9)
    want, exact = gradient_and_output(student, teacher)
    got, out = gradient_and_output(student, teacher, sparsity=entry(1e-30))
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)
    stats = out.stats
    assert (stats.active_frac, stats.dropped_mass_max, stats.grad_error_bound) == (1.0, 0.0, 0.0)


def test_equal_inputs_have_no_loss(backend):
    student, _ = peaked(40, sharpness=9, gap=0, seed=3, likely=30)
    for divergence in DIVERGENCES:
        _, out = gradient_and_output(student, student, sparsity=entry(1e-3), divergence=divergence)
        assert out.stats.active_frac < 0.1
        assert bool((out.per_token >= 0).all()) and out.loss.item() < 1e-6


SHAPES = [(1, 300, 3), (CPU_CHUNK_ROWS + 5, 2000, 17), (300, 700, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.pairwise(
    "options",
    {
        "divergence": DIVERGENCES,
        "softcap": (None, 5.0),
        "temperature": (1.0, 2.0),
        "sparsity": (entry(1e-12), mass(1e-9)),
        "importance_clip": (None, 2.0),
    },
    ids=str,
)
def test_a_fine_rule_agrees_with_float64(
    make_case, agrees, monkeypatch, backend, shape, own_head, options
):
    """All paths, with so fine a rule that what it drops is no more than rounding."""
    monkeypatch.setattr(active, "DENSE_FRAC", 2.0)
    N, V, H = shape
    case = make_case(
        N,
        V,
        H,
        teacher_width=H + 2 if own_head else None,
        bias=True,
        weights=True,
        sampled=True,
        scale=2.0,
    )
    got = case.run(strategy="chunked", **options)
    truth = case.run(dtype=torch.float64, **options | {"strategy": "reference"})
    assert got.output.stats.dropped_mass_max < 1e-8
    agrees(got, truth, scale=2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("needs", [("student_hidden",), ("student_head", "student_bias")], ids=str)
def test_dtypes_and_leaves(make_case, agrees, monkeypatch, backend, dtype, needs):
    monkeypatch.setattr(active, "DENSE_FRAC", 2.0)
    case = make_case(30, 900, 16, bias=True, weights=True, scale=3.0, dtype=dtype)
    options = {"sparsity": entry(1e-12), "workspace_mib": 0.05}
    got = case.run(needs=needs, strategy="chunked", **options)
    agrees(got, case.run(needs=needs, dtype=torch.float64, strategy="reference"), scale=3.0)


def units(inputs: dict[str, Any], needs: tuple[str, ...], **options: Any) -> tuple[float, float]:
    """(GEMM sweeps of forward and backward, active fraction), by counted FLOPs."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in needs}
    with FlopCounterMode(display=False) as counter:
        out = span_divergence(**inputs | leaves, strategy="chunked", **options)
        if leaves:
            out.loss.backward()
    N, H = inputs["student_hidden"].shape
    return counter.get_total_flops() / (
        2 * N * len(inputs["student_head"]) * H
    ), out.stats.active_frac


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_units(make_case, divergence):
    case = make_case(2 * CPU_CHUNK_ROWS, 3000, 64, scale=8.0).tensors
    options = {"divergence": divergence, "sparsity": entry(0.05)}
    hidden, head = "student_hidden", "student_head"
    for needs, parts in (((hidden, head), 2), ((hidden,), 1), ((head,), 1), ((), 0)):
        found, active_frac = units(case, needs, **options)
        assert 0 < active_frac < 0.5
        assert found == pytest.approx(2 + parts * active_frac, rel=1e-6)
        assert units(case, needs, divergence=divergence)[0] == 2 + parts


def test_a_dense_block_costs_four_units(make_case, monkeypatch):
    case = make_case(CPU_CHUNK_ROWS, 500, 32, scale=8.0).tensors
    for share, is_dense in ((0.0, True), (2.0, False)):
        monkeypatch.setattr(active, "DENSE_FRAC", share)
        found, active_frac = units(case, ("student_hidden", "student_head"), sparsity=entry(0.05))
        assert (active_frac == 1.0) == is_dense
        assert found == pytest.approx(2 + 2 * active_frac)


def test_same_bits_again_and_on_any_number_of_threads(make_case):
    case = make_case(CPU_CHUNK_ROWS + 40, 3000, 64, weights=True, scale=6.0, bias=True)
    options = {"strategy": "chunked", "sparsity": mass(0.02)}
    results = []
    for threads in (1, 1, 2, 2):
        torch.set_num_threads(threads)
        results.append(case.run(**options))
    for a, b in ((0, 1), (2, 3)):  # a GEMM on another number of threads may round differently
        assert torch.equal(results[a].output.loss, results[b].output.loss)
        for name, gradient in results[a].gradients.items():
            assert torch.equal(gradient, results[b].gradients[name])
    assert results[0].output.stats.active_frac == results[2].output.stats.active_frac < 0.9


def test_not_a_number_reaches_the_gradient(backend):
    student, teacher = peaked(9, sharpness=9, gap=0.5, seed=2, likely=20)
    student[3, 7] = torch.nan
    got, out = gradient_and_output(student, teacher, sparsity=entry(1e-2))
    assert out.loss.isnan() and bool(got[3].isnan().all())


def test_no_tokens(make_case):
    result = make_case(0, 50, 4, bias=True).run(strategy="chunked", sparsity=entry(1e-3))
    assert result.output.loss.item() == 0
    assert all(bool((gradient == 0).all()) for gradient in result.gradients.values())
    assert result.output.stats.active_frac == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [entry(0.01), entry(1e-30), mass(0.01)], ids=str)
def test_memory_stays_within_the_workspace(make_case, dtype, rule):
    """Peak memory = workspace + float32 gradients + less than two rows of logits."""
    N, V, H, mib = 300, 2000, 8, 0.25
    case = make_case(N, V, H, weights=True, sampled=True, dtype=dtype, scale=4.0)
    tensors = dict(case.tensors)
    tensors["student_hidden"].requires_grad_()
    tensors["student_head"].requires_grad_()
    options = {"strategy": "chunked", "sparsity": rule, "importance_clip": 2.0}
    sizes = allocations(lambda: span_divergence(**tensors, workspace_mib=mib, **options))
    gradients, per_token, one_row = 4 * (V * H + N * H), 4 * 10 * N, 4 * V
    assert peak_of(sizes) <= mib * 2**20 + gradients + per_token + 3 * one_row


def test_a_frozen_head_has_no_gradient_in_memory(make_case):
    N, V, H = 4, 50, 2000
    tensors = dict(make_case(N, V, H).tensors)
    tensors["student_hidden"].requires_grad_()
    call = {"strategy": "chunked", "sparsity": entry(1e-3), "workspace_mib": 0.2}
    assert max(allocations(lambda: span_divergence(**tensors, **call))) < 4 * V * H


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_heads_gradient_that_nothing_writes(make_case, monkeypatch, factor, dtype):
    """They are zeros that took no memory; a second use, and autograd's own sums, work on them."""
    monkeypatch.setattr(compact, "UNTOUCHED_BYTES", 0)
    case = make_case(40, 3000, 64, weights=True, scale=8.0, dtype=dtype)
    options = {"strategy": "chunked", "sparsity": entry(0.01), "factor": factor}
    mine = case.run(**options)
    monkeypatch.setattr(compact, "UNTOUCHED_BYTES", 2**60)
    wanted = case.run(**options)
    head = mine.gradients["student_head"]
    assert torch.equal(head, wanted.gradients["student_head"])
    assert 0 < int((head != 0).any(1).sum()) < 1500
    leaf = case.tensors["student_head"].clone().requires_grad_()
    for _ in range(2):
        tensors = case.tensors | {"student_head": leaf}
        monkeypatch.setattr(compact, "UNTOUCHED_BYTES", 0)
        (
            factor * span_divergence(**tensors, strategy="chunked", sparsity=entry(0.01)).loss
        ).backward()
    assert leaf.grad is not None and torch.allclose(leaf.grad, 2 * head, rtol=1e-2)
