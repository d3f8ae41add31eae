"""The C++ operator of `span_logprob` against plain PyTorch, float64 and under torch.compile."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import native
from rosd_kernels.logits import LogitTransform
from rosd_kernels.logprob.elementwise import plain_gradient_

SHAPES = tuple(itertools.product((0, 1, 5), (1, 7, 130, 1000)))  # R, C
TRANSFORMS = ((False, None, 1.0), (True, None, 0.7), (True, 4.0, 1.0), (False, 4.0, 1.3))

built = pytest.mark.skipif(not native.is_available(), reason="built without the C++ extension")


def normal(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (std * torch.randn(shape, generator=generator)).double()


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(raw logits [R, C], sampled columns [R], factors [3, R]), which float32 can represent."""
    picks = torch.arange(rows) * 7 % (columns + 1) - 1  # -1: the token is another shard's
    return normal(rows, columns, seed=1, std=3.0), picks, normal(3, rows, seed=2)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("has_bias", "softcap", "temperature"), TRANSFORMS)
def test_gradient_of_a_row(dtype, has_bias, softcap, temperature):
    """`(a [v = y] - p (b log p + total)) (1 - tanh^2)`, in rows that are wider than C."""
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    for rows, columns in SHAPES:
        raw, picks, factors = problem(rows, columns)
        bias = normal(columns, seed=3) if has_bias else None
        s = raw if bias is None else raw + bias
        tanh = None if softcap is None else torch.tanh(s / softcap)
        s = s if softcap is None or tanh is None else softcap * tanh
        s = s / temperature
        lse = s.logsumexp(-1).to(dtype)
        log_p = s - lse.double()[:, None]
        a, b, total = factors[:, :, None]
        chosen = torch.arange(columns)[None] == picks[:, None]
        want = a * chosen - log_p.exp() * (b * log_p + total)
        want = want if tanh is None else want * (1 - tanh**2)
        transform = LogitTransform(None if bias is None else bias.to(dtype), softcap, temperature)
        for function in (native.logprob_grad_, plain_gradient_):
            wide = torch.full((rows, columns + 5), torch.nan, dtype=dtype)
            part = wide[:, 2 : columns + 2].copy_(raw)
            function(part, transform, picks, lse, factors.to(dtype))
            error = (part.double() - want).abs().max().item() if part.numel() else 0.0
            assert error <= tolerance * 10, f"{function.__name__} {rows}x{columns}: {error}"
            assert wide[:, :2].isnan().all() and wide[:, columns + 2 :].isnan().all()


@built
def test_same_bits_on_any_number_of_threads():
    raw, picks, factors = problem(64, 3001)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        logits = raw.float()
        lse = logits.logsumexp(-1)
        transform = LogitTransform(None, 8.0, 1.0)
        native.logprob_grad_(logits, transform, picks, lse, factors.float())
        results.append(logits)
    assert all(torch.equal(result, results[0]) for result in results)


def arguments(rows: int, columns: int, *, everything: bool) -> tuple[Any, ...]:
    raw, picks, factors = problem(rows, columns)
    bias = normal(columns, seed=3).float() if everything else None
    lse = raw.logsumexp(-1).float()
    return raw.float(), bias, picks, lse, factors.float(), 3.0 if everything else None, 0.7


@built
def test_opcheck():
    for rows, everything in itertools.product((0, 5), (True, False)):
        call = arguments(rows, 130, everything=everything)
        torch.library.opcheck(torch.ops.rosd.logprob_grad_.default, call)


@built
def test_compiled():
    def scaled(logits: Tensor, *rest: Any) -> Tensor:
        logits = 1 * logits
        torch.ops.rosd.logprob_grad_(logits, *rest)
        return 2 * logits

    torch.compiler.reset()
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, columns in ((5, 130), (3, 200)):
        call = arguments(rows, columns, everything=True)
        assert torch.equal(compiled(*call), scaled(*call))


@built
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.zeros(3, 4).T}, "logits: got shape .*columns side by side"),
        ({1: torch.zeros(5)}, r"bias: got .*of shape \[4\]"),
        ({2: torch.zeros(3)}, "columns: got .*ong"),
        ({3: torch.zeros(2)}, r"lse: got .*of shape \[3\]"),
        ({4: torch.zeros(2, 3)}, r"factors: got .*of shape \[9\]"),
        ({4: torch.zeros(3, 3).double()}, "factors: got .*ouble"),
    ],
    ids=str,
)
def test_the_operator_checks_what_it_gets(changes, message):
    call = dict(enumerate(arguments(3, 4, everything=False))) | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.rosd.logprob_grad_(*call.values())


@built
def test_an_unknown_divergence_is_refused():
    logits, lse = torch.zeros(2, 3, 4), torch.zeros(3)
    with pytest.raises(ValueError, match="divergence: got 3, want 0, 1 or 2"):
        torch.ops.rosd.terms_(*logits, None, None, lse, lse, 3, 0.5, None, None, 1.0)


@built
def test_a_library_of_older_sources_is_not_used(monkeypatch):
    """An editable installation whose extension was not built again works, in plain PyTorch."""
    monkeypatch.setattr(native, "OPERATORS", (*native.OPERATORS, "of_tomorrow"))
    with pytest.warns(UserWarning, match=r"\.so was built from older sources; with a C\+\+"):
        assert not native.is_available.__wrapped__()
