"""`span_logprob`: the definition by hand, units of work, memory, and how it composes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rosd_kernels import entry, span_logprob
from rosd_kernels.head_tiles import CHUNK_TILES
from rosd_kernels.tiles import TILE

FAST = ("chunked", "tiled")
each = pytest.mark.parametrize("strategy", FAST)
every = pytest.mark.parametrize("strategy", [*FAST, "reference"])
P = [0.5, 0.3, 0.15, 0.05]


def minus_logprob(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    return -logprob


def with_entropy(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
    return -2 * logprob - 3 * entropy


@every
def test_values_and_gradients_by_hand(strategy):
    """One token with probabilities P: hidden states are log-probs, and the head is the identity."""
    hidden = torch.tensor([P], dtype=torch.float64).log().requires_grad_()
    eye, ids = torch.eye(4, dtype=torch.float64), torch.tensor([2])
    options: dict[str, Any] = {"token_loss": with_entropy, "strategy": strategy}
    out = span_logprob(hidden, eye, ids, **options)
    entropy = -sum(p * math.log(p) for p in P)
    assert out.logprob.item() == pytest.approx(math.log(0.15), rel=1e-12)
    assert out.entropy.item() == pytest.approx(entropy, rel=1e-12)
    assert out.loss.item() == pytest.approx(-2 * math.log(0.15) - 3 * entropy, rel=1e-12)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    want = [2 * (p - (v == 2)) + 3 * p * (math.log(p) + entropy) for v, p in enumerate(P)]
    assert gradient[0].tolist() == pytest.approx(want, rel=1e-10)


@every
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "softcap": 3.0}], ids=str)
def test_gradcheck(make_logprob, strategy, options):
    """Finite differences in float64, of both outputs and of a loss."""
    case = make_logprob(3, 7, 3, bias=True, dtype=torch.float64)
    ids = case.tensors["token_ids"]
    leaves = [case.tensors[name].requires_grad_() for name in ("hidden", "head", "bias")]

    def values(hidden, head, bias):
        out = span_logprob(hidden, head, ids, bias=bias, strategy=strategy, **options)
        return out.logprob, out.entropy

    def loss(hidden, head, bias):
        call = {"bias": bias, "strategy": strategy, "token_loss": case.clipped, **options}
        return span_logprob(hidden, head, ids, **call).loss

    assert torch.autograd.gradcheck(values, leaves)
    if strategy == "reference":  # gradcheck calls backward many times
        assert torch.autograd.gradcheck(loss, leaves)
        return
    got = torch.autograd.grad(loss(*leaves), leaves)
    for leaf, gradient in zip(leaves, got, strict=True):
        flat, slopes = leaf.detach().view(-1), []
        for i in range(len(flat)):
            sides = []
            for step in (1e-6, -2e-6, 1e-6):  # there, back beyond, and to where it was
                sides.append(loss(*leaves).item())
                flat[i] += step
            slopes.append((sides[1] - sides[2]) / 2e-6)
        assert torch.allclose(gradient.view(-1), gradient.new_tensor(slopes), atol=1e-7)


@every
def test_cross_entropy_is_torchs(make_logprob, strategy):
    case = make_logprob(12, 31, 5)
    hidden, head = (case.tensors[name].requires_grad_() for name in ("hidden", "head"))
    ids = case.tensors["token_ids"]
    want = torch.nn.functional.cross_entropy(hidden @ head.T, ids, reduction="sum")
    got = span_logprob(hidden, head, ids, token_loss=minus_logprob, strategy=strategy).loss
    assert torch.allclose(got, want, rtol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, head)),
        torch.autograd.grad(want, (hidden, head)),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def units(run: Any, N: int, V: int, H: int) -> float:
    """GEMM FLOPs of a call, in sweeps of the head's GEMM."""

    def in_place(_: Any, a: Any, b: Any, **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    mapping = {torch.ops.aten.addmm_: in_place}  # which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops() / (2 * N * V * H)


@each
@pytest.mark.parametrize(
    ("frozen", "afterwards", "want"),
    [
        ((), False, 3),  # logits, dh, dW
        (("head", "bias"), False, 2),
        (("hidden", "bias"), False, 2),
        (("hidden", "head"), False, 1),  # db is a sum, no GEMM
        (("hidden", "head", "bias"), False, 1),
        ((), True, 4),  # the logits once more
        (("head", "bias"), True, 3),
    ],
    ids=str,
)
def test_units(make_logprob, strategy, frozen, afterwards, want):
    N, V, H = 256, 512, 16
    case = make_logprob(N, V, H, bias=True)
    needs = tuple(name for name in ("hidden", "head", "bias") if name not in frozen)
    loss = "afterwards clipped" if afterwards else "clipped"
    # "tiled" computes the logits of active tiles for any gradient.
    want += strategy == "tiled" and not afterwards and bool(needs)
    run = lambda: case.run(loss, strategy=strategy, needs=needs)  # noqa: E731
    assert units(run, N, V, H) == pytest.approx(want)


def test_units_of_sparse_tiles(make_logprob):
    """1 + 3f, with f the active fraction that `stats` reports."""
    N, V, H = 256, 1024, 16
    case = make_logprob(N, V, H)
    case.tensors["head"][TILE:] *= 1e-3
    case.tensors["head"][:TILE, 0] = 5.0
    case.tensors["hidden"][:, 0] = 5.0
    case.tensors["token_ids"] %= 2 * TILE
    stats = case.run(strategy="tiled", sparsity=entry(1e-3)).output.stats
    assert stats.active_frac == 0.25
    run = lambda: case.run(strategy="tiled", sparsity=entry(1e-3))  # noqa: E731
    assert units(run, N, V, H) == pytest.approx(1 + 3 * 0.25)


def peak_bytes(call: Any) -> tuple[int, int]:
    """(largest allocation, peak of all allocations) of a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        kept = call()
    assert kept is not None
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return max(sizes), peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=str)
def test_chunks_stay_within_the_workspace(make_logprob, dtype, options):
    """Peak memory = workspace + float32 gradients + less than one row of logits, and [N]s."""
    N, V, H, mib = 300, 2000, 8, 0.25
    case = make_logprob(N, V, H, dtype=dtype)
    call = {"token_loss": case.clipped, "workspace_mib": mib, "strategy": "chunked", **options}
    for name in ("hidden", "head"):
        case.tensors[name].requires_grad_()
    largest, peak = peak_bytes(lambda: span_logprob(**case.tensors, **call))
    assert 0 < largest < 4 * N * V / 8  # no [N, V] tensor
    assert peak <= mib * 2**20 + 4 * (V * H + N * H) + 4 * 12 * N + 4 * V


@pytest.mark.parametrize("sparsity", ["exact", entry(1e-3)], ids=["exact", "entry"])
def test_tiles_need_no_more_logits_for_more_tokens(make_logprob, sparsity):
    """What grows with N is statistics of tiles (4 planes and temporaries), and some [N, H]."""
    V, H, mib = 2000, 8, 2.0
    for N in (150, 600, 2400):
        case = make_logprob(N, V, H)
        call = {"workspace_mib": mib, "strategy": "tiled", "sparsity": sparsity}
        for name in ("hidden", "head"):
            case.tensors[name].requires_grad_()
        largest, peak = peak_bytes(
            lambda c=case, o=call: span_logprob(**c.tensors, token_loss=c.clipped, **o)
        )
        planes = 12 * N * -(-V // TILE)
        growing = 4 * (planes + N * (2 * H + 24)) + 4 * H * TILE * CHUNK_TILES
        assert peak <= mib * 2**20 + 4 * (V * H + N * H) + growing, f"N = {N}"
    assert largest < 4 * N * V / 4  # no [N, V] tensor


@each
def test_a_frozen_heads_gradient_is_not_held(make_logprob, strategy):
    N, V, H = 4, 50, 2000
    case = make_logprob(N, V, H)
    case.tensors["hidden"].requires_grad_()
    call = {"token_loss": case.clipped, "strategy": strategy, "workspace_mib": 0.1}
    largest, _ = peak_bytes(lambda: span_logprob(**case.tensors, **call))
    assert largest < 4 * V * H
    case.tensors["head"].requires_grad_()
    largest, _ = peak_bytes(lambda: span_logprob(**case.tensors, **call))
    assert largest >= 4 * V * H


@each
def test_rows_say_which_tokens_they_are(make_logprob, strategy):
    """A loss that reads its tokens' numbers by `rows` sees each token once."""
    case = make_logprob(70, 40, 6)
    seen = torch.zeros(70)

    def token_loss(logprob, entropy, rows):
        seen[rows] += 1
        assert logprob.shape == entropy.shape == seen[rows].shape
        return -case.weights[rows] * logprob

    call: dict[str, Any] = {"strategy": strategy, "workspace_mib": 0.002}
    out = span_logprob(**case.tensors, token_loss=token_loss, **call)
    assert torch.equal(seen, torch.ones(70))
    want = case.run("cross_entropy", strategy="reference").output.loss
    assert torch.allclose(out.loss, want, rtol=1e-5)


@each
def test_a_constant_loss_has_no_gradient(make_logprob, strategy):
    def ones(logprob, entropy, rows):
        return torch.ones_like(logprob)

    tensors = make_logprob(5, 9, 3).tensors
    hidden = tensors["hidden"].requires_grad_()
    out = span_logprob(**tensors, token_loss=ones, strategy=strategy)
    assert out.loss.item() == 5
    assert not torch.autograd.grad(out.loss, hidden)[0].any()


@each
def test_composes_with_other_losses(make_logprob, strategy):
    """Backward into .grad of tied leaves, together with another loss, in two micro-batches."""
    case = make_logprob(12, 31, 5)
    hidden, head = (case.tensors[name].requires_grad_() for name in ("hidden", "head"))

    def loss_of(rows: slice, strategy: Any) -> Tensor:
        features = torch.tanh(hidden[rows])
        ids = case.tensors["token_ids"][rows]
        call: dict[str, Any] = {"strategy": strategy}
        out = span_logprob(features, 0.5 * head, ids, token_loss=with_entropy, **call)
        values = span_logprob(features, 0.5 * head, ids, **call)
        return 3 * out.loss + (features @ head.T).square().mean() + values.logprob.exp().sum()

    totals = {}
    for name in (strategy, "reference"):
        hidden.grad = head.grad = None
        for rows in (slice(0, 5), slice(5, 12)):
            loss_of(rows, name).backward()
        totals[name] = (hidden.grad, head.grad)
    for got, want in zip(totals[strategy], totals["reference"], strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@each
def test_backward_twice(make_logprob, strategy):
    """Gradients of a loss are released; those of log-probs are computed once more."""
    tensors = make_logprob(6, 11, 4).tensors
    head = tensors["head"].requires_grad_()
    loss = span_logprob(**tensors, token_loss=minus_logprob, strategy=strategy).loss
    loss.backward(retain_graph=True)
    first = head.grad.clone()
    with pytest.raises(RuntimeError, match="call span_logprob again"):
        loss.backward()
    logprob = span_logprob(**tensors, strategy=strategy).logprob
    for _ in range(2):
        head.grad = None
        (-logprob).sum().backward(retain_graph=True)
        assert head.grad is not None
        assert torch.allclose(head.grad, first, rtol=1e-5, atol=1e-6)


@each
def test_a_head_that_changed_before_backward_is_refused(make_logprob, strategy):
    tensors = make_logprob(6, 11, 4).tensors
    tensors["hidden"].requires_grad_()
    logprob = span_logprob(**tensors, strategy=strategy).logprob
    tensors["head"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


@each
def test_second_derivative_is_refused(make_logprob, strategy):
    tensors = make_logprob(6, 11, 4).tensors
    hidden = tensors["hidden"].requires_grad_()
    out = span_logprob(**tensors, token_loss=minus_logprob, strategy=strategy)
    for value in (out.loss, span_logprob(**tensors, strategy=strategy).logprob.sum()):
        with pytest.raises(RuntimeError, match="span_logprob: create_graph"):
            torch.autograd.grad(value, hidden, create_graph=True)
    out = span_logprob(**tensors, token_loss=minus_logprob, strategy="reference")
    (gradient,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    gradient.square().sum().backward()
    assert hidden.grad is not None


@every
def test_what_has_a_gradient(make_logprob, strategy):
    tensors = make_logprob(6, 11, 4).tensors
    tensors["head"].requires_grad_()
    call: dict[str, Any] = {"strategy": strategy}
    out = span_logprob(**tensors, token_loss=minus_logprob, **call)
    values = span_logprob(**tensors, **call)
    assert out.loss.requires_grad
    assert not out.logprob.requires_grad and not out.entropy.requires_grad
    assert values.logprob.requires_grad and values.entropy.requires_grad
    with torch.no_grad():
        quiet = span_logprob(**tensors, token_loss=minus_logprob, **call)
        quiet_values = span_logprob(**tensors, **call)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, out.loss.detach())
    assert not quiet_values.logprob.requires_grad
    with torch.inference_mode():
        assert torch.equal(span_logprob(**tensors, **call).logprob, values.logprob)


def test_agrees_with_span_divergence(make_logprob):
    """Both report the same log-probs and entropies."""
    from rosd_kernels import span_divergence

    case = make_logprob(9, 40, 6, bias=True)
    hidden, head, bias, ids = (case.tensors[n] for n in ("hidden", "head", "bias", "token_ids"))
    options: dict[str, Any] = {"temperature": 0.7, "softcap": 4.0}
    want = span_divergence(hidden, hidden, head, student_bias=bias, token_ids=ids, **options)
    got = span_logprob(hidden, head, ids, bias=bias, **options)
    assert want.student_logprob is not None and want.student_entropy is not None
    assert torch.allclose(got.logprob, want.student_logprob, atol=1e-6)
    assert torch.allclose(got.entropy, want.student_entropy, atol=1e-6)
