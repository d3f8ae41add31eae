"""64-bit addresses: matrices whose last rows are more than 2^31 elements after the first.

They are narrow views of one huge allocation, of which only the pages that are touched become
resident.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels.gpu.gradient import grad_head, grad_hidden, grad_logits
from rosd_kernels.gpu.loss import loss
from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.tiles import TILE, num_tiles

BF16 = torch.bfloat16
ROWS, WIDTH = 260, 8
STRIDE = 8_400_000  # 64 bytes times a whole number


@pytest.fixture
def memory(monkeypatch) -> Tensor:
    """[ROWS, STRIDE] bf16, uninitialized."""
    assert (ROWS - 1) * STRIDE > 2**31
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        untouched = torch.empty(ROWS, STRIDE, dtype=BF16)
    except RuntimeError as error:
        pytest.skip(f"the system grants no memory of this size: {error}")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    return untouched


@pytest.mark.parametrize("way", ["descriptors", "pointers", "ordered"])
def test_rows_far_apart(make_problem, make_flags, swap, close, memory, way):
    problem = make_problem(ROWS, ROWS, WIDTH, Ht=WIDTH, dtype=BF16, ordered=way == "ordered")
    start = 1 if way == "pointers" else 0  # not aligned for descriptors
    places = [memory[:, first : first + WIDTH] for first in range(start, start + 160, 32)]
    names = ("hs", "ht", "Ws", "Wt")
    dense = problem
    problem = swap(
        problem,
        **{
            name: place.copy_(getattr(problem, name))
            for name, place in zip(names, places, strict=False)
        },
    )
    assert problem.hs.stride() == problem.Ws.stride() == (STRIDE, 1)

    columns = torch.arange(ROWS).flip(0)
    stats, sampled = sweep(problem.hs, problem.Ws, problem.transform, problem.order, columns)
    s, _, _ = dense.logits()
    lse = torch.stack([tile.logsumexp(1) for tile in s.split(TILE, dim=1)], dim=1)
    close("lse", stats[0], lse, 1e-6, slack=1e-6)
    close("sampled", sampled, s.gather(1, columns[:, None])[:, 0], 1e-6, slack=1e-6)

    active = make_flags(ROWS, ROWS)
    truth = dense.truth(active)
    lse = truth.lse_s.float(), truth.lse_t.float()
    value, _ = loss(problem.pair, *lse, active)
    close("value", value, truth.value, 1e-5, slack=1e-7)
    G = memory[:, 512 : 512 + num_tiles(ROWS) * TILE]
    rows = truth.total.float(), truth.scale.float()
    grad_logits(problem.pair, *lse, active, *rows, first_tile=0, out=G)
    close("G", G[:, :ROWS], truth.G, 1e-5, slack=1e-8)

    # Expected values from the kernel's own G, so that the rounding of G does not count.
    want_dh, want_dW, want_db = dense.gradients(G[:, :ROWS].double())
    dh, dW, db = torch.zeros(ROWS, WIDTH), places[4].fill_(math.nan), torch.empty(ROWS)
    grad_hidden(G, problem.Ws, problem.order, active, first_tile=0, out=dh)
    head = {"out": dW, "out_bias": db, "vocab_size": ROWS}
    grad_head(G, problem.hs, problem.order, active, first_tile=0, **head)
    close("dh", dh, want_dh, 1e-5)
    close("dW", dW, want_dW, 1e-5)
    close("db", db, want_db, 1e-5)
