"""`span_logprob` on the Triton kernels, in their interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rosd_kernels import VocabularyOrder, entry, mass
from rosd_kernels.gpu.logprob import logprob_grad, logprob_stats
from rosd_kernels.gpu.rows import BLOCK_V
from rosd_kernels.logits import LogitTransform
from rosd_kernels.logprob import elementwise
from rosd_kernels.tiles import ROW_BLOCK, TILE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STRATEGIES = ("tiled", "chunked")
SMALL = 1e-4  # a workspace_mib so small that a chunk is one row, or one tile
LOSSES = ("clipped", "cross_entropy", "afterwards clipped")

CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": STRATEGIES,
    "loss": LOSSES,
    "bias": (False, True),
    "dtype": (FP32, FP16, "narrow hidden"),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({}, {"softcap": 2.5}),
    "sparsity": ({}, {"sparsity": entry(1e-12)}, {"sparsity": mass(1e-9)}),
    "workspace": ({}, {"workspace_mib": SMALL}),
}
OPTIONS = ("temperature", "softcap", "sparsity", "workspace")
both = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.fixture(autouse=True)
def triton_only(monkeypatch) -> None:
    """Select the kernels, and remove the code that would do their work otherwise."""
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("rosd_kernels.logprob.gemm_tiles.GemmLogprobTiles", None)
    monkeypatch.setattr(elementwise, "stats", None)
    monkeypatch.setattr(elementwise, "plain_gradient_", None)
    monkeypatch.setattr("rosd_kernels.native.logprob_grad_", None)


@pytest.mark.pairwise("choice", CHOICES, ids=lambda c: f"{c['strategy']} {c['loss']}")
def test_every_pair_of_options(make_logprob, logprob_agrees, choice):
    dtype = BF16 if choice["dtype"] == "narrow hidden" else choice["dtype"]
    case = make_logprob(3, 140, 8, bias=choice["bias"], dtype=dtype)
    if choice["dtype"] == "narrow hidden":
        for name in ("head", "bias"):
            if name in case.tensors:
                case.tensors[name] = case.tensors[name].float()
    options = {name: value for part in OPTIONS for name, value in choice[part].items()}
    truth = case.run(choice["loss"], dtype=torch.float64, strategy="reference", **options)
    actual = case.run(choice["loss"], strategy=choice["strategy"], **options)
    logprob_agrees(actual, truth)
    assert actual.output.stats.strategy == choice["strategy"]
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == case.tensors[name].dtype


@both
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(1, 7, 3), (1, 1, 1), (130, 300, 24), (0, 140, 8)], ids=str)
def test_shapes(make_logprob, logprob_agrees, strategy, loss, shape):
    case = make_logprob(*shape, bias=True)
    truth = case.run(loss, dtype=torch.float64, strategy="reference")
    logprob_agrees(case.run(loss, strategy=strategy), truth)


@both
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16(make_logprob, logprob_agrees, strategy, loss):
    """Equal to float64 except for roundings to bf16 of gradients and, in "tiled", of G."""
    case = make_logprob(5, 300, 40, dtype=BF16, scale=2.0)
    truth = case.run(loss, dtype=torch.float64, strategy="reference", temperature=1.3)
    actual = case.run(loss, strategy=strategy, temperature=1.3)
    logprob_agrees(actual, truth, tolerance=2.0**-8 if strategy == "tiled" else 1e-5)
    for name, want in truth.gradients.items():  # roundings average out
        assert (actual.gradients[name].double() - want).norm() / want.norm() < 2.0**-8


@both
@pytest.mark.parametrize("loss", LOSSES)
def test_huge_logits(make_logprob, logprob_agrees, strategy, loss):
    """Logits of +-80: most probabilities underflow."""
    generator = torch.Generator().manual_seed(3)
    case = make_logprob(3, 140, 140, bias=True)
    case.tensors["head"].copy_(80 * torch.eye(140))
    case.tensors["hidden"].copy_(torch.randint(0, 2, (3, 140), generator=generator) * 2.0 - 1)
    truth = case.run(loss, dtype=torch.float64, strategy="reference")
    actual = case.run(loss, strategy=strategy)
    logprob_agrees(actual, truth, scale=3)
    assert all(bool(g.isfinite().all()) for g in actual.gradients.values())


@both
@pytest.mark.parametrize("needs", [(), ("hidden",), ("head",), ("bias",)], ids=str)
def test_only_the_needed_gradients(make_logprob, logprob_agrees, strategy, needs):
    case = make_logprob(3, 140, 8, bias=True)
    truth = case.run(dtype=torch.float64, strategy="reference", needs=needs)
    actual = case.run(strategy=strategy, needs=needs)
    logprob_agrees(actual, truth)
    assert set(actual.gradients) == set(needs)


@both
def test_inputs_that_are_not_contiguous(make_logprob, logprob_agrees, strategy):
    case = make_logprob(3, 140, 8, bias=True)
    want = case.run(strategy=strategy)
    for name, x in case.tensors.items():
        if x.ndim == 2:
            spread = torch.full((2 * x.shape[0], 3 * x.shape[1] + 1), float("nan"))
            case.tensors[name] = spread[::2, : 3 * x.shape[1] : 3].copy_(x)
        else:
            case.tensors[name] = x.repeat_interleave(2)[::2]
        assert not case.tensors[name].is_contiguous()
    logprob_agrees(case.run(strategy=strategy), want)


@both
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_bitwise_repeatable(make_logprob, strategy, dtype):
    """With the fixture `poisoned`, fresh memory is full of NaN."""
    num_tokens = {"tiled": 70, "chunked": 12}[strategy]
    case = make_logprob(num_tokens, 140, 16, bias=True, dtype=dtype)
    first, second = (case.run(strategy=strategy) for _ in range(2))
    assert torch.equal(first.output.logprob, second.output.logprob)
    assert torch.equal(first.output.entropy, second.output.entropy)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


@pytest.mark.parametrize("rule", ["entry", "mass"])
@pytest.mark.parametrize("num_tokens", [7, ROW_BLOCK + 2])
def test_sparsity_with_an_order(make_logprob, rule, num_tokens):
    """The identity as head: hidden states are logits, and their gradient is G."""
    V = 3 * TILE + 50
    case = make_logprob(num_tokens, V, V)
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, V, generator=generator)
    logits[:, torch.randperm(V, generator=generator)[:TILE]] += 9
    case.tensors["hidden"], case.tensors["head"] = logits, torch.eye(V)
    order = VocabularyOrder(V, num_tokens=1)
    order.mass = logits.double().softmax(1).sum(0)  # as one call would have observed it
    order.num_seen = num_tokens
    order.settle()
    assert order.permutation is not None
    if num_tokens < ROW_BLOCK:  # few enough for some tiles to have no sampled token
        case.tensors["token_ids"][:] = order.permutation[-1]
    exact = case.run(dtype=torch.float64, strategy="reference", needs=("hidden",))
    sparsity = entry(1e-2, order) if rule == "entry" else mass(1e-3, order)
    got = case.run(strategy="tiled", needs=("hidden",), sparsity=sparsity)
    stats, wanted = got.output.stats, exact.gradients["hidden"]
    error = (got.gradients["hidden"] - wanted).abs().sum(1).max().item()
    rounding = 1e-5 * wanted.abs().sum(1).max().item()
    if num_tokens < ROW_BLOCK:
        assert stats.active_frac == 0.5  # the likely tile, and that of the sampled token
        assert rounding < error <= stats.grad_error_bound + rounding
    else:
        assert error <= stats.grad_error_bound + rounding


@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (2, BLOCK_V), (3, BLOCK_V + 1)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [(False, None, 1.0), (True, 3.0, 0.8)], ids=str)
def test_passes_over_logits(close, shape, dtype, options):
    """Rows wider than V with NaN beyond it; G in place, or in narrower memory."""
    (R, V), (has_bias, softcap, temperature) = shape, options
    generator = torch.Generator().manual_seed(R + V)
    buffer = torch.full((R, V + 5), float("nan"))
    raw = buffer[:, :V].copy_(2 * torch.randn(R, V, generator=generator))
    bias = torch.randn(V, generator=generator) if has_bias else None
    columns = torch.arange(R) * 7 % V
    columns[1::3] = -1
    a, b = torch.randn(2, R, generator=generator)
    transform = LogitTransform(bias, softcap, temperature)

    wide = raw.double().requires_grad_()
    s = wide if bias is None else wide + bias.double()
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s / temperature
    log_p = s.log_softmax(-1)
    picked = s.gather(1, columns.clamp(min=0)[:, None])[:, 0].masked_fill(columns < 0, 0)
    entropy, lse = -(log_p.exp() * log_p).sum(-1), s.logsumexp(-1)
    logprob = torch.where(columns < 0, 0, picked) - lse  # of another shard's token: just -lse
    (want,) = torch.autograd.grad((a * logprob + b * entropy).sum(), wide)

    got = logprob_stats(raw, transform, columns)
    for name, found, wish in zip(
        ("lse", "entropy", "sampled"), got, (lse[:, None], entropy[:, None], picked), strict=True
    ):
        close(name, found, wish.detach(), 1e-6, slack=1e-6)
    factors = torch.stack([a, b, a + b * entropy.detach().float()]) / temperature
    out = raw if dtype == FP32 else torch.full((R, V + 3), float("nan"), dtype=dtype)[:, :V]
    logprob_grad(raw, transform, columns, lse.detach().float(), factors, out=out)
    close("G", out, want, 2e-6, slack=2e-7)
    assert buffer[:, V:].isnan().all()
