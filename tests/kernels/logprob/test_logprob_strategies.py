"""`span_logprob`: the fast strategies against the float64 reference on the same rounded inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_kernels import entry, mass, span_logprob

ONE_ROW = 1e-4  # a workspace_mib so small that a chunk is one row
LOSSES = ("clipped", "cross_entropy", "afterwards clipped", "afterwards cross_entropy", None)
FAST = ("chunked", "tiled")
TENSOR_CHOICES: dict[str, tuple[Any, ...]] = {
    "bias": (False, True),
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
OPTION_CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": tuple({"strategy": name} for name in (*FAST, "auto")),
    "temperature": ({}, {"temperature": 0.7}),
    "softcap": ({}, {"softcap": 2.5}),
    "sparsity": ({}, {"sparsity": entry(1e-12)}, {"sparsity": mass(1e-9)}),
    "workspace_mib": ({}, {"workspace_mib": ONE_ROW}, {"workspace_mib": 0.004}),
}
CHOICES = TENSOR_CHOICES | OPTION_CHOICES | {"loss": LOSSES}
each = pytest.mark.parametrize("strategy", FAST)


def split(combination: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (keywords of make_logprob, options of span_logprob)."""
    options = {n: value for name in OPTION_CHOICES for n, value in combination[name].items()}
    return {name: combination[name] for name in TENSOR_CHOICES}, options


@pytest.mark.parametrize("backend", ["native", "plain"])
@pytest.mark.pairwise("combination", CHOICES, ids=lambda c: str(c["loss"]))
def test_every_pair_of_options(make_logprob, logprob_agrees, combination, backend, request):
    if backend == "plain":
        request.getfixturevalue("without_native")
    tensors, options = split(combination)
    case = make_logprob(11, 29, 5, seed=1, **tensors)
    loss = combination["loss"]
    truth = case.run(loss, dtype=torch.float64, **options | {"strategy": "reference"})
    actual = case.run(loss, **options)
    logprob_agrees(actual, truth)
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == case.tensors[name].dtype
    wide = torch.float64 if tensors["dtype"] == torch.float64 else torch.float32
    assert actual.output.logprob.dtype == actual.output.entropy.dtype == wide
    assert actual.output.logprob.requires_grad == (loss is None or loss.startswith("afterwards"))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 6)),
    combination=st.fixed_dictionaries({n: st.sampled_from(v) for n, v in CHOICES.items()}),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(make_logprob, logprob_agrees, shape, combination, scale, seed):
    tensors, options = split(combination)
    loss = combination["loss"]
    case = make_logprob(*shape, scale=scale, seed=seed, **tensors)
    truth = case.run(loss, dtype=torch.float64, **options | {"strategy": "reference"})
    logprob_agrees(case.run(loss, **options), truth, scale=max(1, scale))


@each
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.8}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 129, 3), (130, 300, 9), (257, 2500, 17)])
@pytest.mark.parametrize("workspace_mib", [256, 0.05])
def test_ragged_shapes(make_logprob, logprob_agrees, strategy, loss, options, shape, workspace_mib):
    case = make_logprob(*shape, bias=True)
    truth = case.run(loss, dtype=torch.float64, strategy="reference", **options)
    actual = case.run(loss, strategy=strategy, workspace_mib=workspace_mib, **options)
    logprob_agrees(actual, truth)


@pytest.mark.parametrize("strategy", [*FAST, "reference"])
@pytest.mark.parametrize("loss", LOSSES[:-1])
def test_no_tokens_backpropagates_zeros(make_logprob, strategy, loss):
    case = make_logprob(0, 7, 3, bias=True, dtype=torch.bfloat16)
    result = case.run(loss, strategy=strategy, softcap=5.0)
    assert result.output.logprob.shape == result.output.entropy.shape == (0,)
    assert result.output.loss.item() == 0 and result.output.loss.requires_grad
    for name, gradient in result.gradients.items():
        assert gradient.shape == case.tensors[name].shape
        assert gradient.abs().sum().item() == 0


@each
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
@pytest.mark.parametrize("needs", [n for k in range(4) for n in itertools.combinations("hwb", k)])
def test_only_the_needed_gradients(make_logprob, logprob_agrees, strategy, loss, needs):
    names = {"h": "hidden", "w": "head", "b": "bias"}
    case = make_logprob(6, 19, 5, bias=True)
    wanted = tuple(names[letter] for letter in needs)
    truth = case.run(loss, dtype=torch.float64, strategy="reference", needs=wanted)
    actual = case.run(loss, strategy=strategy, needs=wanted)
    logprob_agrees(actual, truth)
    assert set(actual.gradients) == set(wanted)


@each
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_huge_logits(make_logprob, logprob_agrees, strategy, loss):
    """Logits of +-80: most probabilities underflow, some log-probs are -160."""
    generator = torch.Generator().manual_seed(3)
    case = make_logprob(6, 33, 33, bias=True)
    case.tensors["head"].copy_(80 * torch.eye(33))
    case.tensors["hidden"].copy_(torch.randint(0, 2, (6, 33), generator=generator) * 2.0 - 1)
    truth = case.run(loss, dtype=torch.float64, strategy="reference")
    actual = case.run(loss, strategy=strategy)
    logprob_agrees(actual, truth, scale=3)
    assert truth.output.logprob.min() < -100
    assert all(bool(g.isfinite().all()) for g in actual.gradients.values())


@each
def test_a_certain_token(make_logprob, logprob_agrees, strategy):
    """A token of probability one has neither a loss nor a gradient."""
    case = make_logprob(4, 21, 21)
    case.tensors["head"].copy_(torch.eye(21))
    case.tensors["hidden"].copy_(300 * torch.eye(21)[case.tensors["token_ids"]])
    result = case.run("cross_entropy", strategy=strategy)
    assert result.output.loss.item() == 0 and not result.output.entropy.any()
    assert all(not gradient.any() for gradient in result.gradients.values())


@each
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_inputs_that_are_not_contiguous(make_logprob, logprob_agrees, strategy, loss):
    case = make_logprob(10, 23, 6, bias=True)
    want = case.run(loss, strategy=strategy)
    for name, x in case.tensors.items():
        if x.ndim == 2:  # neither dimension has stride 1
            spread = torch.full((2 * x.shape[0], 3 * x.shape[1]), float("nan"))
            spread[::2, ::3] = x
            case.tensors[name] = spread[::2, ::3]
        else:
            case.tensors[name] = x.repeat_interleave(2)[::2]
    logprob_agrees(case.run(loss, strategy=strategy), want)
    case.tensors["head"] = case.tensors["head"].T.contiguous().T
    logprob_agrees(case.run(loss, strategy=strategy), want)


@each
def test_mixed_dtypes(make_logprob, logprob_agrees, strategy):
    """A bfloat16 backbone under a float32 head; each gradient has its own input's dtype."""
    case = make_logprob(10, 23, 6, bias=True)
    case.tensors["hidden"] = case.tensors["hidden"].bfloat16()
    for loss in ("clipped", "afterwards clipped"):
        result = case.run(loss, strategy=strategy)
        logprob_agrees(result, case.run(loss, dtype=torch.float64, strategy="reference"))
        assert result.gradients["hidden"].dtype == torch.bfloat16
        assert result.gradients["head"].dtype == torch.float32


@each
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"workspace_mib": 0.05, "softcap": 4.0}], ids=str)
def test_bitwise_repeatable_with_poisoned_memory(make_logprob, strategy, loss, dtype, options):
    """PyTorch's deterministic mode fills new buffers with NaN and refuses unordered operations."""
    case = make_logprob(70, 301, 16, bias=True, dtype=dtype)
    torch.set_num_threads(2)
    want = case.run(loss, strategy=strategy, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = case.run(loss, strategy=strategy, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("logprob", "entropy"):
        assert torch.equal(getattr(got.output, name), getattr(want.output, name))
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient)


@each
def test_chunks_do_not_change_the_result(make_logprob, logprob_agrees, strategy):
    case = make_logprob(37, 50, 8, bias=True)
    whole = case.run(strategy=strategy)
    sizes = {whole.output.stats.workspace_bytes}
    for workspace_mib in (ONE_ROW, 0.003):
        parts = case.run(strategy=strategy, workspace_mib=workspace_mib)
        logprob_agrees(parts, whole, tolerance=2e-6)
        sizes.add(parts.output.stats.workspace_bytes)
    assert len(sizes) == (3 if strategy == "chunked" else 1)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_scaling_the_loss_scales_the_gradients(make_logprob, strategy, dtype, loss):
    case = make_logprob(12, 31, 5, bias=True, dtype=dtype)
    once = case.run(loss, strategy=strategy)
    twice = case.run(loss, strategy=strategy, factor=2.0)
    for name, gradient in once.gradients.items():
        assert torch.equal(2 * gradient, twice.gradients[name])


@each
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_autocast_does_not_lower_the_precision(make_logprob, strategy, loss):
    case = make_logprob(6, 40, 8, scale=4.0)
    want = case.run(loss, strategy=strategy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(loss, strategy=strategy)
    assert torch.equal(got.output.logprob, want.output.logprob)
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient)


@each
def test_under_compile(make_logprob, strategy):
    tensors = dict(make_logprob(6, 11, 4).tensors)
    tensors["hidden"].requires_grad_()

    def loss(hidden, head, token_ids):
        out = span_logprob(hidden, 2 * head, token_ids, token_loss=minus, strategy=strategy)
        return out.loss

    def minus(logprob, entropy, rows):
        return -logprob

    want = loss(**tensors)
    (of_want,) = torch.autograd.grad(want, tensors["hidden"])
    got = torch.compile(loss, backend="eager")(**tensors)
    (of_got,) = torch.autograd.grad(got, tensors["hidden"])
    assert torch.equal(got, want) and torch.equal(of_got, of_want)
