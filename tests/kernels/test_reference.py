"""The reference strategy against formulas written out by hand, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from rosd_kernels import span_divergence

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def by_hand(p: list[float], q: list[float], divergence: str, beta: float) -> list[float]:
    """Contribution of each entry, from the definitions, in plain Python."""
    if divergence == "forward_kl":
        return [b * math.log(b / a) for a, b in zip(p, q, strict=True)]
    if divergence == "reverse_kl":
        return [a * math.log(a / b) for a, b in zip(p, q, strict=True)]
    m = [beta * b + (1 - beta) * a for a, b in zip(p, q, strict=True)]
    return [
        beta * b * math.log(b / c) + (1 - beta) * a * math.log(a / c)
        for a, b, c in zip(p, q, m, strict=True)
    ]


P, Q = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]


def run(p: list[float], q: list[float], **options):
    """One token with student and teacher probabilities p and q: hidden = log-probs, head = I."""
    hidden = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([q], dtype=torch.float64).log()
    head = torch.eye(len(p), dtype=torch.float64)
    return hidden, span_divergence(hidden, teacher, head, strategy="reference", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_is_the_definition(divergence):
    _, out = run(P, Q, divergence=divergence, beta=0.3)
    want = sum(by_hand(P, Q, divergence, 0.3))
    assert out.per_token.item() == pytest.approx(want, rel=1e-12)
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    assert out.loss.dtype == torch.float64
    assert out.stats.strategy == "reference"


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_is_the_published_formula(divergence):
    beta = 0.3
    hidden, out = run(P, Q, divergence=divergence, beta=beta)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    m = [beta * b + (1 - beta) * a for a, b in zip(P, Q, strict=True)]
    kl = {
        "forward_kl": 0.0,
        "reverse_kl": sum(a * math.log(a / b) for a, b in zip(P, Q, strict=True)),
        "jsd": sum(a * math.log(a / c) for a, c in zip(P, m, strict=True)),
    }[divergence]
    want = {
        "forward_kl": [a - b for a, b in zip(P, Q, strict=True)],
        "reverse_kl": [a * (math.log(a / b) - kl) for a, b in zip(P, Q, strict=True)],
        "jsd": [(1 - beta) * a * (math.log(a / c) - kl) for a, c in zip(P, m, strict=True)],
    }[divergence]
    assert gradient[0].tolist() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_takes_the_students_ids(divergence):
    _, out = run(P, Q, divergence=divergence, beta=0.3, top_k=2)
    want = sum(by_hand([0.5, 0.3, 0.2], [0.1, 0.2, 0.7], divergence, 0.3))
    assert out.per_token.item() == pytest.approx(want, rel=1e-12)
    _, out = run(P, Q, divergence=divergence, beta=0.3, top_k=2, tail=False)
    want = sum(by_hand([5 / 8, 3 / 8], [1 / 3, 2 / 3], divergence, 0.3))
    assert out.per_token.item() == pytest.approx(want, rel=1e-12)
    _, whole = run(P, Q, divergence=divergence, beta=0.3)
    for tail in (True, False):
        _, out = run(P, Q, divergence=divergence, beta=0.3, top_k=4, tail=tail)
        assert out.per_token.item() == pytest.approx(whole.per_token.item(), rel=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_entry_clip_bounds_each_contribution_from_above(divergence):
    entries = by_hand(P, Q, divergence, 0.3)
    if divergence == "reverse_kl":  # as a sum over the vocabulary the same, but never negative
        entries = [entry - p + q for entry, p, q in zip(entries, P, Q, strict=True)]
    clip = sorted(entries)[2] * 0.9  # clips two of the four
    _, out = run(P, Q, divergence=divergence, beta=0.3, entry_clip=clip)
    want = sum(min(entry, clip) for entry in entries)
    assert out.per_token.item() == pytest.approx(want, rel=1e-12)


def test_entry_clip_has_no_gradient_where_clipped():
    # forward KL of the last entry only is above 0.5; the rest is cross-entropy over three entries.
    hidden, out = run(P, Q, divergence="forward_kl", entry_clip=0.5)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    kept = [0.1, 0.2, 0.3, 0.0]
    want = [a * sum(kept) - b for a, b in zip(P, kept, strict=True)]
    assert gradient[0].tolist() == pytest.approx(want, rel=1e-10)


def test_temperature_softcap_and_bias():
    hidden = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    head = torch.tensor([[1.0, 0.5], [0.2, -1.0], [3.0, 1.0]], dtype=torch.float64)
    bias = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)
    ids = torch.tensor([2])
    out = span_divergence(
        hidden,
        hidden,
        head,
        head,
        student_bias=bias,
        temperature=0.5,
        softcap=2.0,
        token_ids=ids,
        strategy="reference",
    )

    def logprobs(biases: list[float]) -> list[float]:
        raw = [0.0 + biases[0], 2.2 + biases[1], 1.0 + biases[2]]
        logits = [2 * math.tanh(x / 2) / 0.5 for x in raw]
        total = math.log(sum(map(math.exp, logits)))
        return [x - total for x in logits]

    student, teacher = logprobs([0.1, 0.2, -0.3]), logprobs([0.0, 0.0, 0.0])
    assert out.student_logprob is not None and out.teacher_logprob is not None
    assert out.student_entropy is not None and out.teacher_entropy is not None
    assert out.student_logprob.item() == pytest.approx(student[2], rel=1e-12)
    assert out.teacher_logprob.item() == pytest.approx(teacher[2], rel=1e-12)
    assert out.student_entropy.item() == pytest.approx(-sum(math.exp(x) * x for x in student))
    assert out.teacher_entropy.item() == pytest.approx(-sum(math.exp(x) * x for x in teacher))


def test_importance_clip_multiplies_the_weights():
    hidden = torch.tensor([P, P], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([Q, Q], dtype=torch.float64).log()
    out = span_divergence(
        hidden,
        teacher,
        torch.eye(4, dtype=torch.float64),
        weights=torch.tensor([2.0, 3.0]),
        token_ids=torch.tensor([0, 1]),
        rollout_logprobs=torch.tensor([math.log(0.05), math.log(0.4)], dtype=torch.float64),
        importance_clip=2.0,
        strategy="reference",
    )
    one = sum(by_hand(P, Q, "jsd", 0.5))  # ratios: 0.5 / 0.05 = 10, clipped to 2, and 0.3 / 0.4
    assert out.loss.item() == pytest.approx(2 * 2 * one + 3 * 0.75 * one, rel=1e-6)
    assert out.per_token.tolist() == pytest.approx([one, one])
    (gradient,) = torch.autograd.grad(out.loss, hidden)  # the ratio is a constant
    single, alone = run(P, Q)
    (want,) = torch.autograd.grad(alone.loss, single)
    assert torch.allclose(gradient, want * torch.tensor([[4.0], [2.25]]), rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6, "softcap": 3.0},
        {"top_k": 3},
        {"top_k": 3, "tail": False},
        {"entry_clip": 0.03},
        {"top_k": 3, "entry_clip": 0.03},
    ],
    ids=str,
)
def test_gradcheck(make_case, divergence, options):
    case = make_case(3, 7, 3, teacher_width=4, bias=True, weights=True, dtype=torch.float64, seed=2)
    fixed = dict(case.tensors)
    students = [
        fixed.pop(f"student_{name}").requires_grad_() for name in ("hidden", "head", "bias")
    ]

    def loss(student_hidden, student_head, student_bias):
        return span_divergence(
            student_hidden=student_hidden,
            student_head=student_head,
            student_bias=student_bias,
            **fixed,
            divergence=divergence,
            beta=0.3,
            strategy="reference",
            **options,
        ).loss

    assert torch.autograd.gradcheck(loss, students)
