"""Top-k with a tail bucket against the formula of SDPO's public code, which ROSD's uses as well.

With the student's k most likely ids, the teacher read at the same ids, and

    s     = log of the mass of the k ids, at most -1e-7
    tail  = log(1 - exp(s))                                            (on both sides)
    m     = logsumexp(log p + log(1 - alpha), log q + log(alpha))
    loss  = alpha KL(q, m) + (1 - alpha) KL(p, m)                      (k + 1 entries)

ours takes the tail as logsumexp over the other ids. The two are equal in exact arithmetic where
more than 1e-7 is left; `docs/methods.md` says what differs elsewhere.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rosd_kernels import span_divergence

K, VOCAB = 100, 605


def public_sdpo(student: Tensor, teacher: Tensor, alpha: float, clamp: float = -1e-7) -> Tensor:
    """[N] divergences of [N, V] logits."""
    ids = student.detach().topk(K).indices
    sides = []
    for logits in (student, teacher):
        kept = logits.log_softmax(-1).gather(-1, ids)
        mass = kept.logsumexp(-1, keepdim=True).clamp(max=clamp)
        sides.append(torch.cat([kept, torch.log1p(-mass.exp())], dim=-1))
    log_p, log_q = sides
    log_m = torch.logaddexp(log_p + math.log(1 - alpha), log_q + math.log(alpha))
    entries = alpha * log_q.exp() * (log_q - log_m) + (1 - alpha) * log_p.exp() * (log_p - log_m)
    return entries.sum(-1)


def ours(student: Tensor, teacher: Tensor, alpha: float, strategy: str = "chunked") -> Tensor:
    """The sum of the divergences of [N, V] logits, by our kernels."""
    head = torch.eye(VOCAB, dtype=student.dtype)
    output = span_divergence(
        student,
        teacher,
        head,
        head,
        beta=alpha,
        top_k=K,
        tail=True,
        strategy=strategy,  # type: ignore[arg-type]
    )
    assert output.loss is not None
    return output.loss


def logits(
    tail: float, teacher_tail: float | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """[N, V] logits of student and teacher, who leave about `tail` outside the student's top k.

    teacher_tail: what the teacher leaves; None: as much.
    """
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 16, VOCAB, generator=g, dtype=torch.float64)
    ids = student.topk(K).indices
    for side, mass in ((student, tail), (teacher, teacher_tail or tail)):
        rest = torch.ones_like(side, dtype=torch.bool).scatter(1, ids, False)
        now = side.softmax(-1).masked_fill(~rest, 0).sum(-1, keepdim=True)
        side += torch.where(rest, math.log(mass) - now.log() + (1 - now).log(), 0.0)
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


@pytest.mark.parametrize("strategy", ["chunked", "reference"])
@pytest.mark.parametrize("alpha", [0.5, 0.1])
@pytest.mark.parametrize("tail", [0.3, 1e-2, 1e-4])
def test_equal_where_a_tail_is_left(tail: float, alpha: float, strategy: str) -> None:
    student, teacher = logits(tail)
    public = public_sdpo(student, teacher, alpha).sum()
    own = ours(student, teacher, alpha, strategy)
    torch.testing.assert_close(own, public, rtol=1e-9, atol=0)
    (theirs,) = torch.autograd.grad(public, student)
    (gradient,) = torch.autograd.grad(own, student)
    torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


def test_trl_has_the_same_formula() -> None:
    from tests.methods.proof.trl_losses import compute_topk_self_distillation_loss

    student, teacher = logits(1e-3)
    theirs = compute_topk_self_distillation_loss(
        student,
        teacher,
        distillation_topk=K,
        distillation_alpha=0.3,
        distillation_add_tail=True,
    )
    torch.testing.assert_close(theirs, public_sdpo(student, teacher, 0.3), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(ours(student, teacher, 0.3), theirs.sum(), rtol=1e-9, atol=0)


def tail_gradient(loss: Tensor, student: Tensor) -> Tensor:
    """[N] the gradient with respect to the logits of all ids outside the student's top k."""
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient.scatter(1, student.detach().topk(K).indices, 0.0).sum(-1)


def test_below_the_clamp_the_public_tail_is_a_constant() -> None:
    """The student leaves 1e-9 and the teacher 1e-3. The public code counts 1e-7 for the student,
    and no gradient pulls the student's tail up."""
    student, teacher = logits(1e-9, 1e-3)
    exact = public_sdpo(student, teacher, 0.5, clamp=0.0).sum()
    public = public_sdpo(student, teacher, 0.5).sum()
    own = ours(student, teacher, 0.5)
    torch.testing.assert_close(own, exact, rtol=1e-9, atol=0)
    assert public < own
    kept, clamped = (tail_gradient(loss, student) for loss in (own, public))
    assert (kept < 0).all() and (clamped.abs() < 0.2 * kept.abs()).all()


@pytest.mark.parametrize(("tail", "lost"), [(1e-3, 1e-4), (1e-5, 1e-2)])
def test_in_float32_the_public_tail_loses_digits(tail: float, lost: float) -> None:
    """1 - mass is off by up to 6e-8, which is a share of 6e-8 / tail; ours keeps its digits."""
    wide, narrow = logits(tail), logits(tail, dtype=torch.float32)
    truth = tail_gradient(ours(*wide, 0.5), wide[0])

    def error(loss: Tensor) -> float:
        """Of the tail's gradient, at the worst token, relative to the largest."""
        difference = tail_gradient(loss, narrow[0]).double() - truth
        return float(difference.abs().max() / truth.abs().max())

    own, public = error(ours(*narrow, 0.5)), error(public_sdpo(*narrow, 0.5).sum())
    assert own < 1e-5 < lost < public
