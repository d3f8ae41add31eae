"""`span_divergence` on the Triton kernels, in their interpreter, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels import VocabularyOrder, entry, mass, span_divergence
from rosd_kernels.tiles import ROW_BLOCK, TILE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
STRATEGIES = ("tiled", "chunked")
SMALL = 1e-4  # a workspace_mib so small that a chunk is one row, or one tile

CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": STRATEGIES,
    "divergence": (*({"divergence": d} for d in DIVERGENCES), {"divergence": "jsd", "beta": 0.2}),
    "teacher": ({}, {"teacher_width": 8}, {"teacher_width": 5}),
    "bias": (None, "of each side", "the student's"),
    "dtype": (FP32, FP16, "narrow hidden"),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({}, {"softcap": 2.5}),
    "importance_clip": ({}, {"importance_clip": 1.5}),
    "entry_clip": ({}, {"entry_clip": 0.02}),
    "sparsity": ({}, {"sparsity": entry(1e-12)}, {"sparsity": mass(1e-9)}),
    "workspace": ({}, {"workspace_mib": SMALL}),
}
OPTIONS = (
    "divergence",
    "temperature",
    "softcap",
    "importance_clip",
    "entry_clip",
    "sparsity",
    "workspace",
)


@pytest.fixture(autouse=True)
def triton_only(monkeypatch) -> None:
    """Select the kernels, and remove the code that would do their work otherwise."""
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("rosd_kernels.gemm_tiles.GemmTiles", None)
    monkeypatch.setattr("rosd_kernels.chunked._block_divergence", None)


@pytest.mark.pairwise(
    "choice", CHOICES, ids=lambda c: f"{c['strategy']} {c['divergence']['divergence']}"
)
def test_every_pair_of_options(make_case, agrees, choice):
    dtype = BF16 if choice["dtype"] == "narrow hidden" else choice["dtype"]
    case = make_case(
        *(3, 140, 8),
        **choice["teacher"],
        bias=choice["bias"] is not None,
        weights=True,
        sampled=True,
        dtype=dtype,
    )
    if choice["bias"] == "the student's":
        case.tensors.pop("teacher_bias")
    if choice["dtype"] == "narrow hidden":
        for name, x in case.tensors.items():
            if name.endswith(("head", "bias")):
                case.tensors[name] = x.float()
    options = {name: value for part in OPTIONS for name, value in choice[part].items()}
    truth = case.run(dtype=torch.float64, strategy="reference", **options)
    actual = case.run(strategy=choice["strategy"], **options)
    agrees(actual, truth)
    assert actual.output.stats.strategy == choice["strategy"]
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == case.tensors[name].dtype


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(1, 7, 3), (1, 1, 1), (130, 300, 24)], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_shapes(make_case, agrees, strategy, divergence, shape):
    case = make_case(*shape, sampled=True, weights=True)
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    agrees(case.run(strategy=strategy, divergence=divergence), truth)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16(make_case, close, strategy, divergence):
    """Equal to float64 except for roundings to bf16 of gradients and, in "tiled", of G."""
    case = make_case(5, 300, 40, weights=True, dtype=BF16, scale=2.0)
    options = {"divergence": divergence, "temperature": 1.3}
    truth = case.run(dtype=torch.float64, strategy="reference", **options)
    actual = case.run(strategy=strategy, **options)
    close("loss", actual.output.loss.detach(), truth.output.loss.detach(), 1e-5)
    close("per_token", actual.output.per_token, truth.output.per_token, 1e-5)
    hidden, head = (case.tensors[f"student_{part}"].double() for part in ("hidden", "head"))
    G = gradient_of_logits(case, **options).abs()
    sizes = {"student_hidden": G @ head.abs(), "student_head": G.T @ hidden.abs()}
    for name, want in truth.gradients.items():
        slack = 2.0**-8 * sizes[name] if strategy == "tiled" else 0.0
        close(name, actual.gradients[name], want, 1e-5, slack=slack)
        # Roundings average out: the bound for each element is far above the usual error.
        error = (actual.gradients[name].double() - want).norm() / want.norm()
        assert error < 2.0**-8


def gradient_of_logits(case, **options) -> Tensor:
    """[N, V] gradient of the loss w.r.t. the student's logits, in float64."""
    logits = [
        case.tensors[f"{side}_hidden"].double() @ case.tensors["student_head"].double().T
        for side in ("student", "teacher")
    ]
    logits[0].requires_grad_()
    eye = torch.eye(logits[0].shape[1], dtype=torch.float64)
    weights = case.tensors["weights"]
    out = span_divergence(*logits, eye, weights=weights, strategy="reference", **options)
    return torch.autograd.grad(out.loss, logits[0])[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits(make_case, agrees, strategy, divergence):
    """Logits of +-80 whose signs differ between student and teacher: probabilities underflow."""
    generator = torch.Generator().manual_seed(3)
    case = make_case(3, 140, 140, bias=True)
    case.tensors["student_head"].copy_(80 * torch.eye(140))
    for name in ("student_hidden", "teacher_hidden"):
        signs = torch.randint(0, 2, (3, 140), generator=generator) * 2.0 - 1
        case.tensors[name].copy_(signs)
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    actual = case.run(strategy=strategy, divergence=divergence)
    agrees(actual, truth, scale=2)
    assert all(bool(g.isfinite().all()) for g in actual.gradients.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_hot_teacher(make_case, agrees, strategy, divergence):
    ids = [3, 0, 139, 3]
    case = make_case(4, 140, 140)
    case.tensors["student_head"].copy_(torch.eye(140))
    case.tensors["teacher_hidden"].copy_(300 * torch.eye(140)[ids])
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    agrees(case.run(strategy=strategy, divergence=divergence), truth)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_identical_student_and_teacher(make_case, strategy, divergence, dtype):
    case = make_case(5, 300, 16, bias=True, scale=3.0, dtype=dtype)
    case.tensors["teacher_hidden"] = case.tensors["student_hidden"].clone()
    del case.tensors["teacher_bias"]  # without a teacher head, the teacher has the student's bias
    result = case.run(strategy=strategy, divergence=divergence)
    assert bool((result.output.per_token >= 0).all())
    assert 0 <= result.output.loss.item() < 1e-6
    for gradient in result.gradients.values():
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("tiled", {}), ("tiled", {"sparsity": mass(0.1)}), ("chunked", {})],
    ids=str,
)
def test_no_tokens_backpropagates_zeros(make_case, strategy, options):
    case = make_case(0, 140, 8, bias=True, sampled=True, weights=True, dtype=BF16)
    result = case.run(strategy=strategy, importance_clip=2.0, **options)
    assert result.output.loss.item() == 0 and result.output.loss.requires_grad
    assert result.output.per_token.shape == (0,)
    for name, gradient in result.gradients.items():
        assert gradient.shape == case.tensors[name].shape
        assert gradient.abs().sum().item() == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("needs", [(), ("hidden",), ("head",), ("bias",)], ids=str)
def test_only_the_needed_gradients(make_case, agrees, strategy, needs):
    case = make_case(3, 140, 8, bias=True)
    wanted = tuple(f"student_{name}" for name in needs)
    truth = case.run(dtype=torch.float64, strategy="reference", needs=wanted)
    actual = case.run(strategy=strategy, needs=wanted)
    agrees(actual, truth)
    assert set(actual.gradients) == set(wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inputs_that_are_not_contiguous(make_case, strategy):
    case = make_case(3, 140, 8, teacher_width=12, bias=True, weights=True, sampled=True)
    want = case.run(strategy=strategy, importance_clip=2.0)
    plain = dict(case.tensors)
    for rows, columns in ((1, 3), (2, 1)):
        for name, x in plain.items():
            if x.ndim == 2:
                spread = torch.full((rows * x.shape[0], columns * x.shape[1] + 1), float("nan"))
                case.tensors[name] = spread[::rows, : columns * x.shape[1] : columns].copy_(x)
            else:
                case.tensors[name] = x.repeat_interleave(2)[::2]
            assert not case.tensors[name].is_contiguous()
        got = case.run(strategy=strategy, importance_clip=2.0)
        # The GEMM library rounds differently for other strides.
        assert torch.allclose(got.output.loss, want.output.loss, rtol=1e-6, atol=0)
        for name, gradient in want.gradients.items():
            assert torch.allclose(got.gradients[name], gradient, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_bitwise_repeatable(make_case, strategy, dtype):
    num_tokens = {"tiled": 70, "chunked": 12}[strategy]
    case = make_case(num_tokens, 140, 16, bias=True, weights=True, sampled=True, dtype=dtype)
    options = {"strategy": strategy, "importance_clip": 2.0}
    first, second = (case.run(**options) for _ in range(2))
    assert torch.equal(first.output.loss, second.output.loss)
    assert torch.equal(first.output.per_token, second.output.per_token)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chunks_do_not_change_the_result(make_case, agrees, strategy):
    case = make_case(3, 400, 8, bias=True, weights=True, sampled=True)
    whole = case.run(strategy=strategy)
    parts = case.run(strategy=strategy, workspace_mib=SMALL)
    agrees(parts, whole, tolerance=2e-6)
    assert parts.output.stats.workspace_bytes < whole.output.stats.workspace_bytes


def test_groups_of_rows_do_not_change_the_result(make_case, agrees):
    case = make_case(200, 140, 16, bias=True, weights=True, sampled=True)
    whole = case.run(strategy="tiled")
    parts = case.run(strategy="tiled", workspace_mib=1e-4)  # a row block per group
    agrees(parts, whole, tolerance=2e-6)
    assert torch.equal(parts.output.per_token, whole.output.per_token)


V = 3 * TILE + 50


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("rule", ["entry", "mass"])
@pytest.mark.parametrize("num_tokens", [7, ROW_BLOCK + 2])
def test_sparsity_reports_what_it_drops(rule, num_tokens, divergence):
    """The identity as head: hidden states are logits, and their gradient is G."""
    generator = torch.Generator().manual_seed(num_tokens)
    student = torch.randn(num_tokens, V, generator=generator)
    student[:, torch.randperm(V, generator=generator)[:TILE]] += 9
    teacher = student + torch.randn(num_tokens, V, generator=generator)
    exact, _ = gradient_and_stats(student, teacher, torch.float64, "reference", divergence)
    order = VocabularyOrder(V, num_tokens=1)
    sparsity = entry(1e-2, order) if rule == "entry" else mass(1e-3, order)
    order.mass = student.double().softmax(1).sum(0)  # as one call would have observed it
    order.num_seen = num_tokens
    order.settle()
    assert order.permutation is not None
    got, stats = gradient_and_stats(student, teacher, FP32, "tiled", divergence, sparsity=sparsity)

    lost, num_active, num_pairs = torch.zeros(2, num_tokens, dtype=torch.float64), 0, 0
    shares = torch.stack([student, teacher]).double().softmax(-1)
    for tile in order.permutation.split(TILE):
        for first in range(0, num_tokens, ROW_BLOCK):
            rows = slice(first, first + ROW_BLOCK)
            num_pairs += 1
            if bool((got[rows, tile] != 0).any()):
                num_active += 1
            else:
                lost[:, rows] += shares[:, rows][:, :, tile].sum(-1)
    assert 0 < num_active < num_pairs
    assert stats.active_frac == pytest.approx(num_active / num_pairs)
    assert stats.dropped_mass_max == pytest.approx(float(lost.max()), rel=1e-4)
    if rule == "mass":
        assert stats.dropped_mass_max <= 1e-3 * (1 + 1e-5)
    error = (got - exact).abs().sum(1).max().item()
    assert 0 < error <= stats.grad_error_bound + 1e-5 * exact.abs().sum(1).max().item()


def gradient_and_stats(
    student: Tensor,
    teacher: Tensor,
    dtype: torch.dtype,
    strategy: str,
    divergence: str,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The gradient w.r.t. logits, in float64."""
    hidden = student.to(dtype, copy=True).requires_grad_()
    options |= {"strategy": strategy, "divergence": divergence}
    out = span_divergence(hidden, teacher.to(dtype), torch.eye(V, dtype=dtype), **options)
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    return gradient.double(), out.stats


def test_order_is_learned_and_then_used(make_case, agrees):
    """The call that learns the order and the one that uses it both agree with the reference."""
    case = make_case(5, 300, 16, bias=True, sampled=True)
    order = VocabularyOrder(300, num_tokens=6)
    truth = case.run(dtype=torch.float64, strategy="reference")
    for has_order in (False, True):
        assert (order.permutation is not None) == has_order
        agrees(case.run(strategy="tiled", sparsity=entry(1e-30, order)), truth)
