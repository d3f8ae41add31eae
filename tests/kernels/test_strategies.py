"""The fast strategies against the float64 reference on the same rounded inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_kernels import entry, mass, span_divergence

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
ONE_ROW = 1e-4  # a workspace_mib so small that a chunk is one row

TENSOR_CHOICES: dict[str, tuple[Any, ...]] = {
    "teacher_width": (None, 5, 9),
    "bias": (False, True),
    "weights": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
OPTION_CHOICES: dict[str, tuple[Any, ...]] = {
    "divergence": ({"divergence": "jsd", "beta": 0.2}, *({"divergence": d} for d in DIVERGENCES)),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({}, {"softcap": 2.5}),
    "importance_clip": ({}, {"importance_clip": 1.5}),
    "top_k": ({}, {"top_k": 4}, {"top_k": 4, "tail": False}, {"top_k": 29}),
    "strategy": ({"strategy": "chunked"}, {"strategy": "tiled"}, {"strategy": "auto"}),
    "sparsity": ({}, {"sparsity": entry(1e-12)}, {"sparsity": mass(1e-9)}),
    "entry_clip": ({}, {"entry_clip": 0.02}),
    "workspace_mib": ({}, {"workspace_mib": ONE_ROW}, {"workspace_mib": 0.004}),
}
CHOICES = TENSOR_CHOICES | OPTION_CHOICES


def is_legal(options: dict[str, Any], vocab_size: int) -> bool:
    """Whether the options can be combined: only "tiled" and top-k cannot."""
    return not (options["strategy"] == "tiled" and options.get("top_k", vocab_size) != vocab_size)


def legal(*choices: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every strategy with every choice that it supports."""
    strategies = ("chunked", "tiled", "reference")
    return [(s, o) for s in strategies for o in choices if s != "tiled" or "top_k" not in o]


def split(combination: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (keywords of make_case, options of span_divergence)."""
    options: dict[str, Any] = {}
    for name in OPTION_CHOICES:
        options |= combination[name]
    return {name: combination[name] for name in TENSOR_CHOICES}, options


@pytest.mark.parametrize("backend", ["native", "plain"])
@pytest.mark.pairwise("combination", CHOICES, ids=lambda c: c["divergence"]["divergence"])
def test_every_pair_of_options(make_case, agrees, combination, backend, request):
    """Legal combinations agree; the others raise a ValueError that says what to do."""
    if backend == "plain":
        request.getfixturevalue("without_native")
    tensors, options = split(combination)
    case = make_case(11, 29, 5, sampled=True, seed=1, **tensors)
    if not is_legal(options, 29):
        with pytest.raises(ValueError, match=r"^top_k: got 4 with strategy 'tiled', .*; want"):
            case.run(**options)
        options["strategy"] = "chunked"
    truth = case.run(dtype=torch.float64, **options | {"strategy": "reference"})
    actual = case.run(**options)
    agrees(actual, truth)
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == case.tensors[name].dtype
    wide = torch.float64 if tensors["dtype"] == torch.float64 else torch.float32
    assert actual.output.loss.dtype == actual.output.per_token.dtype == wide


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(4, 40), st.integers(1, 6)),
    combination=st.fixed_dictionaries({n: st.sampled_from(v) for n, v in CHOICES.items()}),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(make_case, agrees, shape, combination, scale, seed):
    tensors, options = split(combination)
    options["top_k"] = options.get("top_k") and min(options["top_k"], shape[1])
    if not is_legal(options, shape[1]) and options["top_k"] is not None:
        options["top_k"] = None
    case = make_case(*shape, sampled=True, scale=scale, seed=seed, **tensors)
    truth = case.run(dtype=torch.float64, **options | {"strategy": "reference"})
    agrees(case.run(**options), truth, scale=max(1, scale), is_clipped="entry_clip" in options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", [{}, {"entry_clip": 0.02}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("shape", [(1, 129, 3), (130, 300, 9), (257, 2500, 17)])
@pytest.mark.parametrize("workspace_mib", [256, 1e-3])
def test_tiles_of_every_shape(make_case, agrees, divergence, options, shape, workspace_mib):
    """Several row blocks and tiles, the last ones short; kept logits and computed ones."""
    case = make_case(*shape, teacher_width=4, bias=True, sampled=True, weights=True)
    options = {"divergence": divergence, "temperature": 0.8, **options}
    truth = case.run(dtype=torch.float64, strategy="reference", **options)
    agrees(case.run(strategy="tiled", workspace_mib=workspace_mib, **options), truth)


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(1, 7, 3), (0, 7, 3), (13, 7, 3), (5, 1, 3), (257, 301, 17)])
def test_ragged_shapes(make_case, strategy, agrees, divergence, shape):
    case = make_case(*shape, sampled=True, weights=True)
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    agrees(case.run(strategy=strategy, divergence=divergence), truth)


@pytest.mark.parametrize(
    ("strategy", "options"),
    legal({}, {"top_k": 3}, {"entry_clip": 0.1, "softcap": 5.0}, {"sparsity": entry(0.1)}),
)
def test_no_tokens_backpropagates_zeros(make_case, strategy, options):
    case = make_case(0, 7, 3, bias=True, sampled=True, weights=True, dtype=torch.bfloat16)
    result = case.run(strategy=strategy, importance_clip=2.0, **options)
    assert result.output.loss.item() == 0 and result.output.loss.requires_grad
    assert result.output.per_token.shape == (0,)
    for name, gradient in result.gradients.items():
        assert gradient.shape == case.tensors[name].shape
        assert gradient.abs().sum().item() == 0


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("needs", [n for k in range(4) for n in itertools.combinations("hwb", k)])
def test_only_the_needed_gradients(make_case, strategy, agrees, needs):
    names = {"h": "student_hidden", "w": "student_head", "b": "student_bias"}
    case = make_case(6, 19, 5, bias=True)
    wanted = tuple(names[letter] for letter in needs)
    truth = case.run(dtype=torch.float64, strategy="reference", needs=wanted)
    actual = case.run(strategy=strategy, needs=wanted)
    agrees(actual, truth)
    assert set(actual.gradients) == set(wanted)
    assert actual.output.loss.requires_grad == bool(wanted)


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_k": 4, "tail": False}], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits(make_case, agrees, divergence, options):
    """Logits of +-80 whose signs differ between student and teacher: probabilities underflow."""
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, (6, 33), generator=generator) * 2.0 - 1
    other = torch.randint(0, 2, (6, 33), generator=generator) * 2.0 - 1
    case = make_case(6, 33, 33, bias=True)
    case.tensors["student_head"].copy_(80 * torch.eye(33))
    case.tensors["student_hidden"].copy_(signs)
    case.tensors["teacher_hidden"].copy_(other)
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence, **options)
    actual = case.run(divergence=divergence, **options)
    agrees(actual, truth)
    assert all(bool(g.isfinite().all()) for g in actual.gradients.values())


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_hot_teacher(make_case, strategy, agrees, divergence):
    case = make_case(4, 21, 21)
    case.tensors["student_head"].copy_(torch.eye(21))
    case.tensors["teacher_hidden"].copy_(300 * torch.eye(21)[[3, 0, 20, 3]])
    truth = case.run(dtype=torch.float64, strategy="reference", divergence=divergence)
    actual = case.run(strategy=strategy, divergence=divergence)
    agrees(actual, truth)
    if divergence == "forward_kl":  # the divergence is then the token's cross-entropy
        logits = case.tensors["student_hidden"]
        want = torch.nn.functional.cross_entropy(
            logits, torch.tensor([3, 0, 20, 3]), reduction="none"
        )
        assert torch.allclose(actual.output.per_token, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "options"), legal({}, {"top_k": 20}, {"top_k": 20, "tail": False})
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_student_and_teacher(make_case, strategy, divergence, options, dtype):
    case = make_case(9, 501, 16, bias=True, scale=3.0, dtype=dtype)
    case.tensors["teacher_hidden"] = case.tensors["student_hidden"].clone()
    del case.tensors["teacher_bias"]  # without a teacher head, the teacher has the student's bias
    result = case.run(strategy=strategy, divergence=divergence, **options)
    assert bool((result.output.per_token >= 0).all())
    assert 0 <= result.output.loss.item() < 1e-6
    for gradient in result.gradients.values():
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_k": 50, "tail": False}], ids=str)
def test_value_keeps_its_digits_where_the_two_nearly_agree(make_case, divergence, options):
    """Means over 64 tokens; plain float32 sums of the KLs are off by 5e-3 here."""
    case = make_case(64, 2000, 16, scale=3.0)
    drift = 3e-3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    case.tensors["teacher_hidden"] = case.tensors["student_hidden"] + drift
    options = {"divergence": divergence, **options}
    truth = case.run(dtype=torch.float64, strategy="reference", **options).output.per_token
    assert truth.mean() < 6e-5
    error = (case.run(**options).output.per_token.double() - truth).abs() / truth
    assert error.mean() < (1e-4 if divergence == "jsd" else 1.5e-3)


@pytest.mark.parametrize("strategy", ["chunked", "tiled", "reference"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_negative(make_case, strategy, divergence):
    """Where rounding outweighs the divergence, about half of the plain sums are below zero."""
    case = make_case(64, 300, 16, scale=3.0)
    case.tensors["teacher_hidden"] = case.tensors["student_hidden"] * (1 + 2e-6)
    per_token = case.run(strategy=strategy, divergence=divergence).output.per_token
    assert bool((per_token >= 0).all()) and per_token.max() < 1e-6


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_inputs_that_are_not_contiguous(make_case, strategy, agrees):
    case = make_case(10, 23, 6, teacher_width=8, bias=True, weights=True, sampled=True)
    want = case.run(strategy=strategy, importance_clip=2.0)
    for name, x in case.tensors.items():
        if x.ndim == 2:  # neither dimension has stride 1
            spread = torch.full((2 * x.shape[0], 3 * x.shape[1]), float("nan"))
            spread[::2, ::3] = x
            case.tensors[name] = spread[::2, ::3]
        else:
            case.tensors[name] = x.repeat_interleave(2)[::2]
    agrees(case.run(strategy=strategy, importance_clip=2.0), want)
    for name in ("student_head", "teacher_head"):
        case.tensors[name] = case.tensors[name].T.contiguous().T
    agrees(case.run(strategy=strategy, importance_clip=2.0), want)


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_mixed_dtypes(make_case, strategy, agrees):
    """A bfloat16 backbone under a float32 head; each gradient has its own input's dtype."""
    case = make_case(10, 23, 6, bias=True)
    for name in ("student_hidden", "teacher_hidden"):
        case.tensors[name] = case.tensors[name].bfloat16()
    result = case.run(strategy=strategy)
    agrees(result, case.run(dtype=torch.float64, strategy="reference"))
    assert result.gradients["student_hidden"].dtype == torch.bfloat16
    assert result.gradients["student_head"].dtype == torch.float32


def test_bf16_head_gradient_is_accumulated_in_fp32(make_case, agrees):
    """300 one-row chunks: sums in bfloat16 would be off by far more than one rounding."""
    case = make_case(300, 9, 4, dtype=torch.bfloat16)
    truth = case.run(dtype=torch.float64, strategy="reference")
    result = case.run(strategy="chunked", workspace_mib=ONE_ROW, factor=0.3)
    scaled = {name: 0.3 * gradient for name, gradient in truth.gradients.items()}
    agrees(result, type(truth)(output=truth.output, gradients=scaled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"top_k": 10}, {"workspace_mib": 0.05}], ids=str)
def test_bitwise_repeatable(make_case, dtype, options):
    case = make_case(70, 301, 16, bias=True, weights=True, sampled=True, dtype=dtype)
    torch.set_num_threads(2)
    first, second = (case.run(importance_clip=2.0, **options) for _ in range(2))
    assert torch.equal(first.output.loss, second.output.loss)
    assert torch.equal(first.output.per_token, second.output.per_token)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


@pytest.mark.parametrize("options", [{}, {"top_k": 10}, {"top_k": 10, "tail": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poisoned_buffers_and_deterministic_mode(make_case, dtype, options):
    """PyTorch's deterministic mode fills new buffers with NaN and refuses unordered operations."""
    case = make_case(33, 101, 8, bias=True, sampled=True, dtype=dtype)
    options = {
        "importance_clip": 2.0,
        "softcap": 4.0,
        "entry_clip": 0.05,
        "workspace_mib": 0.02,
        **options,
    }
    want = case.run(**options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = case.run(**options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got.output.loss, want.output.loss)
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient)


@pytest.mark.parametrize("options", [{}, {"top_k": 6, "softcap": 4.0}], ids=str)
def test_chunks_do_not_change_the_result(make_case, agrees, options):
    case = make_case(37, 50, 8, bias=True, weights=True, sampled=True)
    whole = case.run(strategy="chunked", importance_clip=2.0, **options)
    sizes = {whole.output.stats.workspace_bytes}
    for workspace_mib in (ONE_ROW, 0.003, 0.01):
        parts = case.run(
            strategy="chunked", importance_clip=2.0, workspace_mib=workspace_mib, **options
        )
        agrees(parts, whole, tolerance=2e-6)
        sizes.add(parts.output.stats.workspace_bytes)
    assert len(sizes) == 4


def test_auto_is_chunked_and_reports_its_workspace(make_case):
    stats = make_case(8, 30, 4).run().output.stats
    assert (stats.strategy, stats.active_frac, stats.dropped_mass_max) == ("chunked", 1.0, 0.0)
    assert 0 < stats.workspace_bytes <= 256 << 20


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaling_the_loss_scales_the_gradients(make_case, strategy, dtype):
    case = make_case(12, 31, 5, bias=True, dtype=dtype)
    once, twice = case.run(strategy=strategy), case.run(strategy=strategy, factor=2.0)
    for name, gradient in once.gradients.items():
        assert torch.equal(2 * gradient, twice.gradients[name])


def test_composes_with_other_losses(make_case):
    """Backward into .grad of tied leaves, together with another loss, in two micro-batches."""
    case = make_case(12, 31, 5)
    tensors = {name: x.clone() for name, x in case.tensors.items()}
    hidden = tensors["student_hidden"].requires_grad_()
    head = tensors["student_head"].requires_grad_()

    def loss_of(rows: slice, strategy: Any) -> torch.Tensor:
        features = torch.tanh(hidden[rows])
        out = span_divergence(
            features, tensors["teacher_hidden"][rows], 0.5 * head, strategy=strategy
        )
        return 3 * out.loss + (features @ head.T).square().mean()

    totals = {}
    for strategy in ("chunked", "reference"):
        hidden.grad = head.grad = None
        for rows in (slice(0, 5), slice(5, 12)):
            loss_of(rows, strategy).backward()
        totals[strategy] = (hidden.grad, head.grad)
    for got, want in zip(totals["chunked"], totals["reference"], strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_backward_twice_is_refused(make_case):
    """Backward returns the gradients without a copy."""
    tensors = dict(make_case(6, 11, 4).tensors)
    head = tensors["student_head"].requires_grad_()
    loss = span_divergence(**tensors).loss
    loss.backward(retain_graph=True)
    first = head.grad.clone()
    with pytest.raises(RuntimeError, match="call span_divergence again"):
        loss.backward()
    assert torch.equal(head.grad, first)


def test_gradients_of_two_losses_add_up(make_case):
    tensors = dict(make_case(6, 11, 4).tensors)
    head = tensors["student_head"].requires_grad_()
    span_divergence(**tensors).loss.backward()
    once = head.grad.clone()
    (3 * span_divergence(**tensors).loss).backward()
    assert torch.allclose(head.grad, 4 * once)


def test_no_gradient_under_no_grad_and_none_through_metrics(make_case):
    tensors = dict(make_case(6, 11, 4, sampled=True).tensors)
    tensors["student_head"].requires_grad_()
    out = span_divergence(**tensors)
    for name in ("per_token", "student_logprob", "student_entropy", "teacher_entropy"):
        assert not getattr(out, name).requires_grad
    with torch.no_grad():
        quiet = span_divergence(**tensors)
    assert not quiet.loss.requires_grad
    assert torch.equal(quiet.loss, out.loss.detach())


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_second_derivative_is_refused(make_case, strategy):
    tensors = dict(make_case(6, 11, 4).tensors)
    hidden = tensors["student_hidden"].requires_grad_()
    loss = span_divergence(**tensors, strategy=strategy).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss = span_divergence(**tensors, strategy="reference").loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    gradient.square().sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("strategy", ["chunked", "tiled", "reference"])
def test_autocast_does_not_lower_the_precision(make_case, strategy):
    case = make_case(6, 40, 8, scale=4.0)
    want = case.run(strategy=strategy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(strategy=strategy)
    assert torch.equal(got.output.loss, want.output.loss)
