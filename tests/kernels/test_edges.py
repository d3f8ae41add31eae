"""Inputs at the edges: extreme beta, masked entries, bounded entries, ids out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rosd_kernels import span_divergence, span_logprob
from rosd_kernels.checks import assert_ids
from rosd_kernels.vocabulary import Vocabulary

STRATEGIES = ("chunked", "tiled")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
INF = float("inf")


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("beta", [1e-9, 1e-6, 0.02, 0.9, 1 - 1e-6, 1 - 1e-9])
def test_jsd_of_every_beta(make_case, agrees, request, strategy, beta, native):
    if not native:
        request.getfixturevalue("without_native")
    case = make_case(4, 260, 8, teacher_width=6, weights=True, scale=4.0)
    truth = case.run(dtype=torch.float64, strategy="reference", beta=beta)
    actual = case.run(strategy=strategy, beta=beta)
    for name, want in truth.gradients.items():
        error = (actual.gradients[name].double() - want).abs().max()
        assert error <= 4e-5 * want.abs().max(), name
    want = truth.output.per_token
    assert ((actual.output.per_token.double() - want).abs() <= 2e-5 * want.max()).all()


def masked(case: Any, columns: list[int]) -> Any:
    for name in ("student_bias", "teacher_bias"):
        case.tensors[name][columns] = -INF
    return case


@pytest.mark.parametrize("native", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize("options", [{}, {"entry_clip": 0.05}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "reference"])
def test_entries_masked_on_both_sides_do_not_exist(
    make_case, request, strategy, divergence, options, native
):
    """A bias of -inf, here on a whole tile and more, gives what a smaller vocabulary gives."""
    if strategy == "tiled" and "top_k" in options:
        return
    if not native:
        request.getfixturevalue("without_native")
    gone = [0, 7, *range(128, 256), 299]
    kept = [v for v in range(300) if v not in gone]
    case = make_case(5, 300, 8, bias=True, dtype=torch.float64)
    case.tensors["token_ids"] = torch.tensor([kept[i] for i in (0, 3, 50, 99, 120)])
    small = make_case(5, 300, 8, bias=True, dtype=torch.float64)
    for name, x in small.tensors.items():
        if name.endswith(("head", "bias")):
            small.tensors[name] = x[kept]
    small.tensors["token_ids"] = torch.tensor([0, 3, 50, 99, 120])
    call = {"divergence": divergence, **options}
    truth = small.run(strategy="reference", **call)
    actual = masked(case, gone).run(strategy=strategy, **call)
    for name in ("per_token", "student_logprob", "student_entropy", "teacher_entropy"):
        got, want = getattr(actual.output, name), getattr(truth.output, name)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for name, want in truth.gradients.items():
        got = actual.gradients[name]
        if name != "student_hidden":
            assert (got[gone] == 0).all()
            got = got[kept]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "reference"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_bounded_entries_are_never_negative(make_case, strategy, divergence):
    case = make_case(40, 200, 8, teacher_width=6, scale=3.0)
    for clip in (1e-4, 1e-3, 1e-2):
        out = case.run(strategy=strategy, divergence=divergence, entry_clip=clip).output
        assert (out.per_token >= 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("clip", [0.05, 1e-2, 1e-3])
def test_a_bounded_gradient_still_descends(divergence, clip):
    """Its cosine with the unbounded one is positive, and a small step lowers the divergence."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 200, generator=generator, dtype=torch.float64) * 3
    teacher = logits + torch.randn(64, 200, generator=generator, dtype=torch.float64)

    def run(x: torch.Tensor, clip: float | None) -> tuple[float, torch.Tensor]:
        hidden = x.clone().requires_grad_()
        head = torch.eye(200, dtype=torch.float64)
        out = span_divergence(
            hidden, teacher, head, divergence=divergence, entry_clip=clip, strategy="reference"
        )
        out.loss.backward()
        assert hidden.grad is not None
        return out.loss.item(), hidden.grad

    before, exact = run(logits, None)
    bounded = run(logits, clip)[1]
    assert torch.cosine_similarity(bounded.flatten(), exact.flatten(), dim=0) > 0.1
    assert run(logits - 1e-3 * bounded, None)[0] < before


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_certain_token_has_no_positive_logprob(strategy):
    hidden = torch.full((130, 64), 3.0) + torch.randn(130, 64) * 1e-3
    head = torch.randn(150, 64) * 0.1
    head[17] = 1.0
    ids = torch.full((130,), 17)
    out = span_divergence(hidden, hidden, head, token_ids=ids, strategy=strategy)
    assert out.student_logprob is not None and (out.student_logprob <= 0).all()
    assert (span_logprob(hidden, head, ids, strategy=strategy).logprob <= 0).all()


@pytest.mark.parametrize("ids", [[0, 129], []], ids=str)
def test_ids_within_the_vocabulary_pass_the_devices_check(ids):
    assert_ids(torch.tensor(ids, dtype=torch.int64), Vocabulary(130))


@pytest.mark.parametrize("wrong", [-1, 130, 10**6])
def test_ids_out_of_range_stop_the_device(wrong):
    """On a GPU an assertion, without a synchronization; on a CPU the same call raises at once."""
    with pytest.raises(RuntimeError, match="0 <= id < V = 130"):
        assert_ids(torch.tensor([0, wrong, 5]), Vocabulary(130))
