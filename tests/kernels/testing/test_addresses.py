"""The check of large heads, on small ones: it passes right results and fails wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rosd_kernels import span_divergence
from rosd_kernels.testing import addresses
from rosd_kernels.testing.checking import Shape

CPU = torch.device("cpu")
SHAPE = Shape(9, 5000, 24)


@pytest.mark.parametrize("strategy", ["chunked", "tiled"])
def test_right_results_pass(strategy):
    check = addresses.check_addresses(CPU, strategy, SHAPE)
    assert check.ok, check.text


def test_the_truth_is_the_definition():
    generator = torch.Generator().manual_seed(1)
    student, teacher, head = (
        torch.randn(*shape, generator=generator).double() for shape in ((5, 7), (5, 7), (300, 7))
    )
    leaves = student.clone().requires_grad_(), head.clone().requires_grad_()
    out = span_divergence(leaves[0], teacher, leaves[1], strategy="reference")
    dh, dW = torch.autograd.grad(out.loss, leaves)
    loss, wanted_dh, (first, last) = addresses.truth(student, teacher, head)
    torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(dh, wanted_dh, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dW[: addresses.ROWS], first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dW[-addresses.ROWS :], last, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("row", "name"), [(0, "first dW"), (-1, "last dW")])
def test_a_row_that_is_written_elsewhere_fails(monkeypatch, row, name):
    """As an offset that overflows would: one row of dW has another's gradient."""

    def wrong(student, teacher, head, **options):
        out = span_divergence(student, teacher, head, **options)
        return replace(out, loss=out.loss + (head[row] - head[row].detach()).sum().float())

    monkeypatch.setattr(addresses, "span_divergence", wrong)
    check = addresses.check_addresses(CPU, "chunked", SHAPE)
    assert not check.ok and name in check.text


def test_the_large_head_needs_more_than_32_bits():
    shape = addresses.LARGE
    assert shape.V * shape.H > 2**31
    bytes_of_head = 2 * shape.V * shape.H
    assert 4 * bytes_of_head < addresses.NEEDED_GIB * 2**30
