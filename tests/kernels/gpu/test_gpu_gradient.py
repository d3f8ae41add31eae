"""Loss and gradient kernels in Triton's interpreter against float64."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from rosd_kernels.gpu.gradient import grad_dtype, grad_head, grad_hidden, grad_logits
from rosd_kernels.gpu.loss import loss
from rosd_kernels.tiles import TILE, num_tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = math.nan


def run(problem, active, truth):
    """Run all kernels on the whole vocabulary, with poisoned buffers."""
    (N, H), V = problem.hs.shape, problem.Ws.shape[0]
    lse = truth.lse_s.float(), truth.lse_t.float()
    value, total = loss(problem.pair, *lse, active)
    G = torch.full((N, num_tiles(V) * TILE), NAN, dtype=grad_dtype(problem.hs, problem.Ws))
    rows = (truth.total.float(), truth.scale.float())
    grad_logits(problem.pair, *lse, active, *rows, first_tile=0, out=G)
    dh = torch.zeros(N, H)
    grad_hidden(G, problem.Ws, problem.order, active, first_tile=0, out=dh)
    dW, db = torch.full_like(problem.Ws, NAN), torch.full((V,), NAN)
    out = {"out": dW, "out_bias": db, "vocab_size": V}
    grad_head(G, problem.hs, problem.order, active, first_tile=0, **out)
    return value, total, G, dh, dW, db


def check(problem, active, close):
    truth = problem.truth(active)
    value, total, G, dh, dW, db = run(problem, active, truth)
    # Each entry of G is rounded once to bf16, by up to 2^-8 of itself; the errors of a sum add up.
    narrow = 2.0**-8 if G.dtype == BF16 else 0.0
    close("value", value, truth.value, 1e-5, slack=1e-7)
    close("total", total, truth.total, 1e-5, slack=1e-7)
    V = truth.G.shape[1]
    written = active.repeat_interleave(128, 0)[: G.shape[0]].repeat_interleave(TILE, 1).bool()
    assert G[~written].isnan().all(), "an inactive tile was written"
    assert (G[:, V:][written[:, V:]] == 0).all(), "columns beyond V are not 0"
    close("G", G[:, :V].masked_fill(~written[:, :V], 0), truth.G, 1e-5, slack=1e-8)
    for name, got, want, sizes in zip(
        ("dh", "dW", "db"),
        (dh, dW, db),
        (truth.dh, truth.dW, truth.db),
        problem.gradients(truth.G.abs(), absolute=True),
        strict=True,
    ):
        close(name, got, want, 1e-5, slack=narrow * sizes + 1e-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    "shape", [(1, 7, 3), (5, 300, 40), (130, 300, 40)], ids=lambda s: "x".join(map(str, s))
)
def test_shapes(make_problem, make_flags, close, divergence, shape):
    N, V, _ = shape
    check(make_problem(*shape, divergence=divergence), make_flags(N, V), close)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    "case",
    [
        {"ordered": True, "bias": True, "temperature": 1.7},
        {"softcap": 5.0, "bias": True, "temperature": 0.8, "Ht": 24},
        {"entry_clip": 0.02, "Ht": 24, "ordered": True},
        {"dtype": BF16},
        {"dtype": BF16, "ordered": True, "bias": True, "softcap": 4.0},
    ],
    ids=["ordered", "softcap", "clip", "bf16", "bf16 all"],
)
def test_options(make_problem, make_flags, close, divergence, case):
    problem = make_problem(130, 300, 40, divergence=divergence, **case)
    check(problem, make_flags(130, 300, share=0.7, seed=2), close)
