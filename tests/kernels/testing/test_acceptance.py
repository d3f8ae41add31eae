"""The acceptance run, small and on the CPU: it passes right results and fails wrong ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rosd_kernels import span_divergence
from rosd_kernels.testing import acceptance
from rosd_kernels.testing.acceptance import Shape

SHAPES = (Shape(9, 300, 20), Shape(130, 512, 16))
SMALL = (Shape(1, 7, 3), Shape(0, 30, 8))
CPU = torch.device("cpu")


def test_what_is_right_passes():
    found = list(acceptance.checks(CPU, SHAPES, SMALL))
    assert [check for check in found if not check.ok] == []
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == {"chunked", "tiled", "sparsity"}


def wrong_gradient(**arguments):
    out = span_divergence(**arguments)
    head = arguments["student_head"]
    return replace(out, loss=out.loss + 1e-3 * (head - head.detach()).sum())


def wrong_entropy(**arguments):
    out = span_divergence(**arguments)
    assert out.student_entropy is not None
    return replace(out, student_entropy=out.student_entropy * 1.01)


COUNT = itertools.count()


def not_repeatable(**arguments):
    out = span_divergence(**arguments)
    return replace(out, per_token=out.per_token * (1 + 1e-6 * next(COUNT)))


def reads_fresh_memory(**arguments):
    out = span_divergence(**arguments)
    return replace(out, per_token=out.per_token + 0 * torch.empty_like(out.per_token))


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (wrong_gradient, "student_head"),
        (wrong_entropy, "student_entropy"),
        (not_repeatable, "other bits"),
        (reads_fresh_memory, "per_token"),
    ],
)
def test_what_is_wrong_fails(monkeypatch, broken, text):
    def only_fast(**arguments):
        fast = arguments["strategy"] != "reference"
        return (broken if fast else span_divergence)(**arguments)

    monkeypatch.setattr(acceptance, "span_divergence", only_fast)
    case = acceptance.Case(strategy="tiled", shape=SHAPES[0], dtype=torch.float32)
    check = acceptance.check(case, CPU)
    assert not check.ok
    assert text in check.text


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_sparsity_that_is_off_by_more_than_it_says_fails(monkeypatch, strategy):
    def half_the_gradient(*args, sparsity, **options):
        out = span_divergence(*args, sparsity=sparsity, **options)
        return out if sparsity == "exact" else replace(out, loss=out.loss / 2)

    monkeypatch.setattr(acceptance, "span_divergence", half_the_gradient)
    rule = acceptance.entry(1e-3)
    check = acceptance.check_sparsity(CPU, strategy, "jsd", "entry", rule, SHAPES[1])
    assert not check.ok


def test_timings_name_every_candidate():
    found = list(acceptance.timings(CPU, Shape(16, 300, 32), torch.float32, repeats=2))
    assert [timing.name for timing in found] == [
        "chunked",
        "chunked, entry 2^-12",
        "tiled",
        "tiled, entry 2^-12",
        "eager",
        "liger",
        "4 GEMM sweeps",
    ]
    for timing in found:
        assert timing.median_s is not None and timing.median_s > 0, timing
        assert timing.peak_bytes is None


@pytest.mark.parametrize(
    ("error", "text"),
    [(torch.OutOfMemoryError("no"), "memory"), (ImportError(name="liger_kernel"), "liger_kernel")],
    ids=["memory", "import"],
)
def test_a_candidate_that_cannot_run_says_why(error, text):
    def step():
        raise error

    timing = acceptance.measure("eager", step, CPU, 3)
    assert timing.median_s is None
    assert text in timing.text


def test_settings_are_left_as_they_were():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        list(acceptance.checks(CPU, SHAPES[:1], ()))
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_float32_matmul_precision(before)
