"""Properties that hold for every student and teacher, with every strategy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_kernels import span_divergence

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 5))
quick = settings(max_examples=30, deadline=None, derandomize=True)
both = pytest.mark.parametrize("strategy", ["chunked", "reference"])
each = pytest.mark.parametrize("divergence", DIVERGENCES)


@both
@quick
@given(shape=shapes, seed=seeds, beta=st.floats(0.01, 0.99), scale=st.floats(0, 100))
def test_jsd_is_bounded(make_case, strategy, shape, seed, beta, scale):
    """JSD_beta <= entropy of (beta, 1 - beta) <= log 2."""
    case = make_case(*shape, seed=seed, scale=scale, teacher_width=3)
    per_token = case.run(strategy=strategy, beta=beta).output.per_token
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert bool((per_token >= 0).all()) and bool((per_token <= bound + 1e-6).all())
    assert bound <= math.log(2) + 1e-12


@both
@each
@quick
@given(shape=shapes, seed=seeds, shift=st.floats(-30, 30))
def test_shift_invariance(make_case, strategy, divergence, shape, seed, shift):
    """Adding a constant to all logits of one side changes nothing."""
    case = make_case(*shape, seed=seed, bias=True, teacher_width=3, sampled=True)
    moved = type(case)(tensors=dict(case.tensors))
    moved.tensors["student_bias"] = case.tensors["student_bias"] + shift
    moved.tensors["teacher_bias"] = case.tensors["teacher_bias"] - 2 * shift
    options = {"strategy": strategy, "divergence": divergence}
    want, got = case.run(**options), moved.run(**options)
    assert torch.allclose(got.output.per_token, want.output.per_token, rtol=1e-3, atol=2e-5)
    assert torch.allclose(
        got.output.student_logprob, want.output.student_logprob, rtol=1e-4, atol=2e-5
    )
    for name, gradient in want.gradients.items():
        assert torch.allclose(got.gradients[name], gradient, rtol=1e-3, atol=1e-4), name


@both
@each
@quick
@given(shape=shapes, seed=seeds, top_k=st.sampled_from([None, 1]), tail=st.booleans())
def test_order_of_the_vocabulary_does_not_matter(
    make_case, strategy, divergence, shape, seed, top_k, tail
):
    case = make_case(*shape, seed=seed, bias=True, teacher_width=3)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    mixed = type(case)(tensors=dict(case.tensors))
    for name in ("student_head", "teacher_head", "student_bias", "teacher_bias"):
        mixed.tensors[name] = case.tensors[name][order]
    options = {"strategy": strategy, "divergence": divergence, "top_k": top_k, "tail": tail}
    want, got = case.run(**options), mixed.run(**options)
    assert torch.allclose(got.output.per_token, want.output.per_token, rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        got.gradients["student_head"], want.gradients["student_head"][order], rtol=1e-4, atol=1e-5
    )


@both
@quick
@given(shape=shapes, seed=seeds, beta=st.floats(0.05, 0.95))
def test_jsd_is_symmetric_under_swapping_the_sides(make_case, strategy, shape, seed, beta):
    case = make_case(*shape, seed=seed)
    swapped = type(case)(tensors=dict(case.tensors))
    swapped.tensors["student_hidden"] = case.tensors["teacher_hidden"]
    swapped.tensors["teacher_hidden"] = case.tensors["student_hidden"]
    want = case.run(strategy=strategy, beta=beta).output
    got = swapped.run(strategy=strategy, beta=1 - beta).output
    assert torch.allclose(got.per_token, want.per_token, rtol=1e-4, atol=1e-6)
    assert torch.allclose(got.student_entropy, want.teacher_entropy, rtol=1e-5, atol=1e-6)


@both
@each
@quick
@given(shape=shapes, seed=seeds)
def test_swapping_sides_swaps_the_kls_and_merging_never_adds(
    make_case, strategy, divergence, shape, seed
):
    """KL(q, p) is KL(p, q) of swapped sides; merging the tail cannot raise a divergence."""
    case = make_case(*shape, seed=seed)
    whole = case.run(strategy=strategy, divergence=divergence).output.per_token
    merged = case.run(strategy=strategy, divergence=divergence, top_k=1).output.per_token
    assert bool((merged <= whole * (1 + 1e-4) + 1e-6).all())
    if divergence == "forward_kl":
        swapped = type(case)(tensors=dict(case.tensors))
        swapped.tensors["student_hidden"] = case.tensors["teacher_hidden"]
        swapped.tensors["teacher_hidden"] = case.tensors["student_hidden"]
        back = swapped.run(strategy=strategy, divergence="reverse_kl").output.per_token
        assert torch.allclose(whole, back, rtol=1e-4, atol=1e-6)


@both
@quick
@given(shape=shapes, seed=seeds, cut=st.integers(0, 6))
def test_tokens_do_not_see_each_other(make_case, strategy, shape, seed, cut):
    """The loss of a batch is the sum over its parts, so micro-batches may be split anywhere."""
    case = make_case(*shape, seed=seed, weights=True)
    cut = min(cut, shape[0])
    whole = case.run(strategy=strategy)
    rows = ("student_hidden", "teacher_hidden", "weights")
    parts = []
    for part in (slice(0, cut), slice(cut, None)):
        tensors = {n: x[part] if n in rows else x for n, x in case.tensors.items()}
        parts.append(type(case)(tensors=tensors).run(strategy=strategy))
    total = sum(part.output.loss.item() for part in parts)
    assert whole.output.loss.item() == pytest.approx(total, rel=1e-5, abs=1e-6)
    head = parts[0].gradients["student_head"] + parts[1].gradients["student_head"]
    assert torch.allclose(whole.gradients["student_head"], head, rtol=1e-4, atol=1e-6)


def test_zero_weight_removes_a_token(make_case):
    case = make_case(5, 17, 4, weights=True)
    case.tensors["weights"][2] = 0
    kept = [0, 1, 3, 4]
    rows = ("student_hidden", "teacher_hidden", "weights")
    fewer = type(case)(tensors={n: x[kept] if n in rows else x for n, x in case.tensors.items()})
    got, want = case.run(), fewer.run()
    assert got.gradients["student_hidden"][2].abs().sum().item() == 0
    assert torch.allclose(got.gradients["student_head"], want.gradients["student_head"], atol=1e-6)


def test_descent_brings_the_student_to_the_teacher():
    """Each divergence is minimized where the distributions agree."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 6, generator=generator)
    head = torch.eye(6)
    for divergence in DIVERGENCES:
        student = torch.zeros(3, 6, requires_grad=True)
        for _ in range(400):
            out = span_divergence(student, teacher, head, divergence=divergence)
            (gradient,) = torch.autograd.grad(out.loss, student)
            student = (student - 2 * gradient).detach().requires_grad_()
        assert out.loss.item() < 1e-4, divergence
