"""The acceptance run of `span_logprob`, small and on the CPU: right passes, and wrong fails."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rosd_kernels import span_logprob
from rosd_kernels.testing import logprob_acceptance as acceptance
from rosd_kernels.testing.checking import Shape

SHAPES = (Shape(9, 300, 20), Shape(130, 512, 16))
SMALL = (Shape(1, 7, 3), Shape(0, 30, 8))
CPU = torch.device("cpu")


def test_what_is_right_passes():
    found = list(acceptance.checks(CPU, SHAPES, SMALL))
    assert [check for check in found if not check.ok] == []
    names = [check.name for check in found]
    assert len(set(names)) == len(names)
    assert {name.split()[1] for name in names} == {"chunked", "tiled", "sparsity"}


def wrong_gradient(**arguments):
    out = span_logprob(**arguments)
    head = arguments["head"]
    return replace(out, loss=out.loss + 1e-3 * (head - head.detach()).sum())


def wrong_entropy(**arguments):
    out = span_logprob(**arguments)
    return replace(out, entropy=out.entropy * 1.01)


COUNT = itertools.count()


def not_repeatable(**arguments):
    out = span_logprob(**arguments)
    return replace(out, logprob=out.logprob * (1 + 1e-6 * next(COUNT)))


def reads_fresh_memory(**arguments):
    out = span_logprob(**arguments)
    return replace(out, logprob=out.logprob + 0 * torch.empty_like(out.logprob))


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (wrong_gradient, "head"),
        (wrong_entropy, "entropy"),
        (not_repeatable, "other bits"),
        (reads_fresh_memory, "logprob"),
    ],
)
def test_what_is_wrong_fails(monkeypatch, broken, text):
    def only_fast(**arguments):
        fast = arguments["strategy"] != "reference"
        return (broken if fast else span_logprob)(**arguments)

    monkeypatch.setattr(acceptance, "span_logprob", only_fast)
    case = acceptance.Case(strategy="tiled", shape=SHAPES[0], dtype=torch.float32)
    check = acceptance.check(case, CPU)
    assert not check.ok
    assert text in check.text


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_sparsity_that_is_off_by_more_than_it_says_fails(monkeypatch, strategy):
    def half_the_gradient(*args, sparsity, **options):
        out = span_logprob(*args, sparsity=sparsity, **options)
        return out if sparsity == "exact" else replace(out, loss=out.loss / 2)

    monkeypatch.setattr(acceptance, "span_logprob", half_the_gradient)
    check = acceptance.check_sparsity(CPU, strategy, "entry", acceptance.entry(1e-3), SHAPES[1])
    assert not check.ok


def test_a_sparsity_that_drops_too_much_fails(monkeypatch):
    monkeypatch.setattr(acceptance, "FINE", acceptance.mass(0.3))
    case = acceptance.Case(strategy="chunked", shape=SHAPES[0], dtype=torch.float32, sparse=True)
    assert not acceptance.check(case, CPU).ok


def test_timings_name_every_candidate():
    found = list(acceptance.timings(CPU, Shape(16, 300, 32), torch.float32, repeats=2))
    names = [timing.name for timing in found if timing.median_s is not None]
    assert names == [
        "chunked",
        "chunked, frozen head",
        "chunked, entry 2^-12",
        "tiled",
        "tiled, entry 2^-12",
        "eager",
        *(["liger"] if len(found) == len(names) else []),  # its Triton kernels need a GPU
        "3 GEMM sweeps",
    ]
    assert all(timing.median_s is None or timing.median_s > 0 for timing in found)
