"""The tile formula gives the loss and the gradients of the definition."""

from __future__ import annotations

import pytest
import torch

from rosd_kernels import span_divergence
from rosd_kernels.testing.tile_peer import tile_jsd


@pytest.mark.parametrize(("rows", "columns"), [(4096, 32768), (3, 16), (7, 33)])
@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_against_the_reference(rows: int, columns: int, beta: float):
    generator = torch.Generator().manual_seed(0)
    student, teacher, head = (
        3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 5), (7, 5), (33, 5))
    )
    leaves = student.clone().requires_grad_(), head.clone().requires_grad_()
    out = span_divergence(leaves[0], teacher, leaves[1], beta=beta, strategy="reference")
    wanted = torch.autograd.grad(out.loss, leaves)
    loss, *found = tile_jsd(student, teacher, head, beta=beta, rows=rows, columns=columns)
    torch.testing.assert_close(loss, out.loss.detach().to(loss.dtype), rtol=1e-6, atol=1e-9)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
