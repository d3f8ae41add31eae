"""The sweep and the sampled logits in Triton's interpreter against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels.gpu.sweep import sweep
from rosd_kernels.tiles import TILE, num_tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = ("lse", "max", "min", "entropy")


def expected(s: Tensor) -> Tensor:
    """[4, N, T] of scaled logits [N, V] in float64."""
    found = []
    for tile in s.split(TILE, dim=1):
        lse = tile.logsumexp(1)
        log_share = tile - lse[:, None]
        entropy = -(log_share.exp() * log_share).sum(1)
        found.append(torch.stack([lse, tile.amax(1), tile.amin(1), entropy]))
    return torch.stack(found, dim=2)


def check(problem, close, *, entropy_slack: float = 1e-6) -> None:
    """Check the student's side, with sampled tokens of which some are another shard's."""
    s, _, _ = problem.logits()
    N, V = s.shape
    columns = torch.arange(N) * 37 % V
    columns[1::3] = -1
    columns[0] = V - 1
    stats, sampled = sweep(problem.hs, problem.Ws, problem.transform, problem.order, columns)
    assert stats.shape == (4, N, num_tiles(V)) and stats.dtype == sampled.dtype == FP32
    for name, got, want in zip(NAMES, stats, expected(s), strict=True):
        close(name, got, want, 1e-6, slack=entropy_slack if name == "entropy" else 1e-6)
    picked = s.gather(1, columns.clamp(min=0)[:, None])[:, 0]
    close("sampled", sampled, picked.where(columns >= 0, 0.0), 1e-6, slack=1e-6)
    assert (sampled[1::3] == 0).all()


@pytest.mark.parametrize(
    "shape",
    [(1, 7, 3), (1, 1, 1), (1, 128, 16), (3, 129, 40), (130, 300, 40), (2, 1300, 72)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_shapes(make_problem, close, shape, dtype):
    check(make_problem(*shape, dtype=dtype), close)


@pytest.mark.parametrize(
    "case",
    [
        {"bias": True},
        {"ordered": True},
        {"ordered": True, "bias": True, "temperature": 0.6},
        {"softcap": 3.0, "bias": True, "temperature": 1.7},
        {"dtype": FP16},
        {"dtype": FP16, "ordered": True, "bias": True},
        {"dtype": BF16, "ordered": True, "bias": True, "softcap": 4.0},
        {"dtype": BF16, "head_dtype": FP32, "bias": True},
        {"dtype": FP32, "head_dtype": BF16},
        {"dtype": FP16, "head_dtype": BF16, "ordered": True},
    ],
    ids=lambda case: " ".join(f"{name}={value}" for name, value in case.items()),
)
def test_options(make_problem, close, case):
    check(make_problem(5, 300, 40, **case), close)


def test_several_row_blocks_in_groups(make_problem, close):
    """More row blocks than one group holds, and a short last group."""
    check(make_problem(64 * 9 + 1, 130, 8), close)


@pytest.mark.parametrize("layout", ["wide rows", "odd offset", "columns apart", "transposed"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_rows_that_are_not_contiguous(make_problem, swap, close, layout, dtype):
    def spread(x: Tensor) -> Tensor:
        rows, width = x.shape
        if layout == "transposed":
            return x.T.contiguous().T
        memory = torch.full((2 * rows, 2 * width + 8), math.nan, dtype=x.dtype)
        place = {
            "wide rows": memory[::2, :width],
            "odd offset": memory[:rows, 1 : width + 1],
            "columns apart": memory[:rows, : 2 * width : 2],
        }[layout]
        return place.copy_(x)

    problem = make_problem(5, 140, 40, dtype=dtype)
    plain, _ = sweep(problem.hs, problem.Ws, problem.transform, None, None)
    problem = swap(problem, hs=spread(problem.hs), Ws=spread(problem.Ws))
    assert not problem.hs.is_contiguous() and not problem.Ws.is_contiguous()
    check(problem, close)
    stats, sampled = sweep(problem.hs, problem.Ws, problem.transform, None, None)
    assert torch.equal(stats, plain) and sampled is None


@pytest.mark.parametrize("softcap", [None, 90.0])
def test_huge_logits(make_problem, swap, close, softcap):
    """Logits of +-80: exponentials that would overflow, and a tile that holds -80 only."""
    problem = make_problem(4, 300, 300, softcap=softcap)
    signs = torch.randint(0, 2, (4, 300), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs[0, :TILE] = -1
    problem = swap(problem, hs=signs, Ws=80 * torch.eye(300))
    check(problem, close, entropy_slack=1e-5)


def test_next_to_nothing_left_of_a_tile(make_problem, swap, close):
    """One entry 60 above all others: its entropy is far below the rounding of 1."""
    problem = swap(make_problem(1, 129, 129), hs=torch.zeros(1, 129), Ws=torch.eye(129))
    problem.hs[0, 5] = 60
    check(problem, close, entropy_slack=1e-12)


def test_no_rows(make_problem):
    problem = make_problem(0, 300, 40)
    columns = torch.empty(0, dtype=torch.int64)
    stats, sampled = sweep(problem.hs, problem.Ws, problem.transform, None, columns)
    assert stats.shape == (4, 0, 3) and sampled.shape == (0,)


def test_equal_calls_give_equal_bits(make_problem):
    problem = make_problem(70, 300, 40, dtype=BF16, bias=True)
    arguments = (problem.hs, problem.Ws, problem.transform, None, torch.arange(70))
    first, second = (sweep(*arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))
