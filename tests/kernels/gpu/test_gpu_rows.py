"""The elementwise kernel of "chunked" in Triton's interpreter against float64 and autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels.gpu.rows import BLOCK_V, block_divergence, rows
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.vocabulary import Vocabulary
from tests.kernels.gpu.chunks import OneRankGroup

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
NAN = math.nan
CASES: list[dict[str, Any]] = [
    {"beta": 0.3},
    {"bias": True, "temperature": 1.7, "beta": 0.9},
    {"bias": True, "softcap": 3.0, "temperature": 0.8},
    {"entry_clip": 0.01},
    {"entry_clip": 0.01, "softcap": 3.0, "bias": True, "temperature": 0.8, "beta": 0.2},
]


@dataclass(frozen=True, kw_only=True)
class Truth:
    stats: Tensor  # [2, 3, R]: side; lse, entropy, sampled
    terms: Tensor  # [2, R]: value, K
    G: Tensor  # [R, V]


class Rows:
    """A call: raw logits [R, V] of both sides, in rows that are wider than V, and its options."""

    def __init__(
        self, R: int, V: int, *, scale: float = 2.0, bias: bool = False, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(R + V)
        self.logits = scale * torch.randn(2, R, V, generator=generator)
        self.biases = torch.randn(2, V, generator=generator) if bias else (None, None)
        self.columns = torch.arange(R) * 7 % V
        self.columns[-1] = V - 1
        self.columns[1::3] = -1
        self.options = SpanOptions(**options)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Fresh copies, with NaN beyond V."""
        _, R, V = self.logits.shape
        student, teacher = torch.full((2, R, V + 5), NAN)[:, :, :V].copy_(self.logits)
        return student, teacher

    @property
    def transforms(self) -> tuple[LogitTransform, LogitTransform]:
        student, teacher = (
            LogitTransform(bias, self.options.softcap, self.options.temperature)
            for bias in self.biases
        )
        return student, teacher

    def run(self, buffers: tuple[Tensor, Tensor], shard: slice = slice(None), **stage: Any):
        """Run the kernel on a part of the vocabulary."""
        columns = None if shard != slice(None) else self.columns
        biases = (None if bias is None else bias[shard].contiguous() for bias in self.biases)
        parts = (side[:, shard] for side in buffers)
        return rows(*parts, *biases, columns, self.options, **stage)

    def truth(self) -> Truth:
        options = self.options
        raw = self.logits.double().requires_grad_()
        s = raw if self.biases[0] is None else raw + self.biases.double()[:, None]
        if options.softcap is not None:
            s = options.softcap * torch.tanh(s / options.softcap)
        s = s / options.temperature
        log_p, log_q = s.log_softmax(-1)
        log_q = log_q.detach()
        log_m = torch.logaddexp(log_q + math.log(options.beta), log_p + math.log(1 - options.beta))
        of_teacher = log_q.exp() * (log_q - (log_m if options.divergence == "jsd" else log_p))
        of_student = log_p.exp() * (log_p - (log_m if options.divergence == "jsd" else log_q))
        c = {
            "forward_kl": of_teacher,
            # its bound is on entries that are never negative
            "reverse_kl": of_student
            + (0 if options.entry_clip is None else log_q.exp() - log_p.exp()),
            "jsd": options.beta * of_teacher + (1 - options.beta) * of_student,
        }[options.divergence]
        e = {
            "forward_kl": -log_q.exp(),
            "reverse_kl": of_student,
            "jsd": (1 - options.beta) * of_student,
        }[options.divergence]
        if options.entry_clip is not None:
            e = e.masked_fill(c > options.entry_clip, 0)
            c = c.clamp(max=options.entry_clip)
        (gradient,) = torch.autograd.grad(c.sum(), raw)
        with torch.no_grad():
            log_share = s.log_softmax(-1)
            entropy = -(log_share.exp() * log_share).sum(-1)
            sampled = s.gather(2, self.columns.clamp(min=0).expand(2, -1)[:, :, None])[:, :, 0]
            sampled = sampled.where(self.columns >= 0, 0.0)
            stats = torch.stack([s.logsumexp(-1), entropy, sampled], dim=1)
        terms = torch.stack([c.sum(-1), e.sum(-1)]).detach()
        return Truth(stats=stats, terms=terms, G=gradient[0] * options.temperature)


def check(case: Rows, close, *, tolerance: float = 2e-6, rounding: float = 0.0) -> None:
    """Check stage "all"; `rounding`: of large logits and their lse, which the rest inherits."""
    truth, buffers = case.truth(), case.buffers
    stats, terms = case.run(buffers)
    for name, got, want in zip(
        ("lse", "entropy", "sampled"),
        stats.transpose(0, 1),
        truth.stats.transpose(0, 1),
        strict=True,
    ):
        close(name, got, want, 1e-6, slack=1e-6 + rounding)
    for name, got, want in zip(("value", "total"), terms, truth.terms, strict=True):
        close(name, got, want, tolerance, slack=2e-7 + rounding)
    close("G", buffers[0], truth.G, tolerance, slack=1e-8 + rounding)
    assert torch.equal(buffers[1], case.logits[1]), "the teacher's logits were written"
    for side in buffers:
        assert side._base is not None and side._base[:, :, side.shape[1] :].isnan().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", CASES, ids=lambda c: " ".join(c))
def test_one_pass(close, divergence, options):
    check(Rows(4, 300, divergence=divergence, **options), close)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, BLOCK_V), (3, BLOCK_V + 1)], ids=str)
def test_shapes(close, shape):
    check(Rows(*shape, divergence="jsd"), close)


def test_blocks_of_different_heights(close):
    """A second block that outweighs the first, without making it vanish, and the reverse."""
    case = Rows(2, 2 * BLOCK_V, divergence="jsd")
    case.logits[:, 0, BLOCK_V:] += 2
    case.logits[:, 1, BLOCK_V:] -= 2
    check(case, close)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits_and_a_rising_maximum(close, divergence):
    """+-80, the highest logit of a row in its second block, or its first."""
    case = Rows(4, BLOCK_V + 9, divergence=divergence)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, case.logits.shape, generator=generator) * 2.0 - 1
    case.logits.copy_(80 * signs)
    case.logits[0, 0, :BLOCK_V] = -80
    case.logits[1, 1, BLOCK_V:] = -80
    case.logits[:, 2] = -80
    case.logits[:, 2, 17] = 80
    check(case, close, tolerance=1e-5, rounding=80 * 2.0**-24)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_sides(divergence):
    case = Rows(3, 300, divergence=divergence, scale=3.0)
    case.logits[1] = case.logits[0]
    buffers = case.buffers
    _, terms = case.run(buffers)
    assert bool((terms[0] >= 0).all()) and terms[0].max() < 1e-7
    assert buffers[0].abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", CASES[1::3], ids=lambda c: " ".join(c))
def test_stages_of_two_shards(close, divergence, options):
    """Statistics, terms and G of shards, with the sums over them in between, are those of rows."""
    case = Rows(3, 300, divergence=divergence, **options)
    truth, buffers = case.truth(), case.buffers
    shards = (slice(0, 130), slice(130, 300))
    stats = torch.stack([case.run(buffers, shard, stage="stats")[0] for shard in shards])
    lse = stats[:, :, 0].logsumexp(0)
    close("lse", lse, truth.stats[:, 0], 1e-6)
    found = [case.run(buffers, shard, stage="terms", lse=lse) for shard in shards]
    assert all(none is None for none, _ in found)
    terms = sum(part for _, part in found)
    close("terms", terms, truth.terms, 2e-6, slack=2e-7)
    assert all(map(torch.equal, buffers, case.logits)), "G is written too early"
    for shard in shards:
        assert case.run(buffers, shard, stage="grad", lse=lse, total=terms[1]) == (None, None)
    close("G", buffers[0], truth.G, 2e-6, slack=1e-8)


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("kind", [Vocabulary, OneRankGroup], ids=["whole", "sharded"])
@pytest.mark.parametrize("has_columns", [True, False])
def test_block_divergence(close, needs_gradient, kind, has_columns):
    case = Rows(4, 300, divergence="reverse_kl", bias=True, temperature=1.3)
    truth, buffers = case.truth(), case.buffers
    value, *sides = block_divergence(
        *buffers,
        case.transforms,
        case.columns if has_columns else None,
        case.options,
        kind(300),
        needs_gradient=needs_gradient,
    )
    close("value", value, truth.terms[0], 2e-6, slack=2e-7)
    for side, (lse, entropy, sampled) in zip(sides, truth.stats, strict=True):
        close("lse", side.lse, lse, 1e-6)
        close("entropy", side.entropy, entropy, 1e-6)
        if has_columns:
            close("logprob", side.logprob, sampled - lse, 1e-6)
        else:
            assert side.logprob is None
    if needs_gradient:
        close("G", buffers[0], truth.G, 2e-6, slack=1e-8)
    else:
        assert torch.equal(buffers[0], case.logits[0])


def test_no_rows():
    case = Rows(1, 9)
    case.columns = case.columns[:0]
    stats, terms = case.run(torch.empty(2, 0, 9).unbind())
    assert stats.shape == (2, 3, 0) and terms.shape == (2, 0)


def test_equal_calls_give_equal_bits():
    case = Rows(3, 500, bias=True)
    first, second = ((buffers, case.run(buffers)) for buffers in (case.buffers, case.buffers))
    assert torch.equal(first[0][0], second[0][0])
    assert all(map(torch.equal, first[1], second[1]))
