"""Random cases for span_divergence, and the comparison that every numeric test makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import SpanDivergenceOutput, native, span_divergence
from tests.kernels import logprob_cases

STUDENTS = ("student_hidden", "student_head", "student_bias")


@dataclass(frozen=True, kw_only=True)
class Result:
    output: SpanDivergenceOutput
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The tensors of a call; `run` makes fresh leaves of them, so that it never modifies a case."""

    tensors: dict[str, Tensor]

    def run(
        self,
        *,
        dtype: torch.dtype | None = None,
        needs: tuple[str, ...] = STUDENTS,
        factor: float = 1.0,
        **options: Any,
    ) -> Result:
        """Return the output and the gradients of `factor * loss`; dtype: of all floats."""
        tensors = {name: x.detach() for name, x in self.tensors.items()}
        if dtype is not None:
            tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
        leaves = {}
        for name in needs:
            if name in tensors:
                tensors[name] = leaves[name] = tensors[name].requires_grad_()
        output = span_divergence(**tensors, **options)
        gradients: tuple[Tensor, ...] = ()
        if leaves:
            gradients = torch.autograd.grad(factor * output.loss, list(leaves.values()))
        return Result(output=output, gradients=dict(zip(leaves, gradients, strict=True)))


def make(
    N: int,
    V: int,
    H: int,
    *,
    teacher_width: int | None = None,
    bias: bool = False,
    weights: bool = False,
    sampled: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """`scale` is about the standard deviation of the logits; `sampled` adds ids and log-probs.

    teacher_width: None shares the head.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * std

    student_hidden = normal(N, H)
    tensors = {"student_hidden": student_hidden, "student_head": normal(V, H, std=scale / H**0.5)}
    if teacher_width is None:
        tensors["teacher_hidden"] = student_hidden + normal(N, H, std=0.7)
    else:
        tensors["teacher_hidden"] = normal(N, teacher_width)
        tensors["teacher_head"] = normal(V, teacher_width, std=scale / teacher_width**0.5)
    if bias:
        tensors["student_bias"], tensors["teacher_bias"] = normal(V), normal(V)
    if weights:
        tensors["weights"] = torch.rand(N, generator=generator)
    if sampled:
        tensors["rollout_logprobs"] = -3 * torch.rand(N, generator=generator)
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    if sampled:
        tensors["token_ids"] = torch.randint(V, (N,), generator=generator)
    return Case(tensors=tensors)


def assert_agrees(
    actual: Result,
    truth: Result,
    *,
    tolerance: float = 1e-5,
    scale: float = 1,
    is_clipped: bool = False,
) -> None:
    """Loss to `tolerance` relative; per-token values and gradients to `tolerance` of their max.

    A gradient in a narrow dtype may be off by that dtype's one rounding on top. `slack` is the
    rounding of float32 log-probabilities, which counts where they, or the divergences, are next to
    nothing. It is taken out of divergences, but for those with `entry_clip` (`is_clipped`). With a
    few logits of standard deviation `scale`, all of it is that many times larger.
    """
    expected = truth.output
    eps = torch.finfo(torch.float32).eps
    value_slack, loss_slack = (2e-7, 2e-6) if is_clipped else (eps, eps)
    slacks = {"loss": loss_slack, "per_token": value_slack}
    slacks |= dict.fromkeys(("student_logprob", "teacher_logprob"), 1e-6)
    slacks |= dict.fromkeys(("student_entropy", "teacher_entropy"), 1e-6)
    for name, slack in slacks.items():
        got, want = getattr(actual.output, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert_close(name, got, want, tolerance * scale, slack=slack * scale)
    assert actual.gradients.keys() == truth.gradients.keys()
    for name, want in truth.gradients.items():
        got = actual.gradients[name]
        assert_close(f"gradient of {name}", got, want, tolerance * scale, slack=3e-8 * scale)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float, *, slack: float) -> None:
    assert got.shape == want.shape, f"{name}: shape {got.shape}, want {want.shape}"
    if want.numel() == 0:
        return
    rounding = 0.0 if got.dtype in (torch.float32, torch.float64) else torch.finfo(got.dtype).eps
    error = (got.double() - want.double()).abs()
    bound = tolerance * want.double().abs().max() + rounding / 2 * want.double().abs() + slack
    excess = (error - bound).flatten()
    worst = int(excess.argmax())
    assert bool((error <= bound).all()), (
        f"{name}: element {worst} is {got.flatten()[worst].item()}, "
        f"want {want.flatten()[worst].item()}, error {error.flatten()[worst].item():.2e}"
    )


def pairwise(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A few combinations in which any two choices of two options meet (greedy)."""
    indices = {name: range(len(values)) for name, values in choices.items()}
    pairs = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(choices, 2)
        for i in indices[a]
        for j in indices[b]
    }
    picks = []
    while pairs:
        pick: dict[str, int] = dict(sorted(min(pairs, key=sorted)))
        for name in choices:
            if name not in pick:
                pick[name] = max(
                    indices[name],
                    key=lambda i, name=name, pick=pick: sum(
                        frozenset({(name, i), other}) in pairs for other in pick.items()
                    ),
                )
        pairs -= {frozenset(pair) for pair in itertools.combinations(pick.items(), 2)}
        picks.append({name: choices[name][i] for name, i in pick.items()})
    return picks


def pytest_configure(config: pytest.Config) -> None:
    line = "pairwise(name, choices, ids): parametrize with `pairwise(choices)` of tests/kernels"
    config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for marker in metafunc.definition.iter_markers("pairwise"):
        name, choices = marker.args
        metafunc.parametrize(name, pairwise(choices), **marker.kwargs)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return make


@pytest.fixture(scope="session")
def agrees() -> Callable[..., None]:
    return assert_agrees


@pytest.fixture(scope="session")
def make_logprob() -> Callable[..., logprob_cases.Case]:
    return logprob_cases.make


@pytest.fixture(scope="session")
def logprob_agrees() -> Callable[..., None]:
    return logprob_cases.assert_agrees


@pytest.fixture
def without_native(monkeypatch):
    """Act like an installation without the C++ extension."""
    monkeypatch.setattr(native, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: on small tensors a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
