"""The selection of tiles in Triton's interpreter against `sparsity.select_tiles`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels.gpu.select import BLOCK_T, select
from rosd_kernels.sparsity import TileStats, entry, mass, select_tiles
from rosd_kernels.tiles import ROW_BLOCK


def make_stats(N: int, T: int, *, scale: float, seed: int = 0) -> tuple[TileStats, Tensor]:
    """Statistics of random tiles and the rows' lse; only lse and max are meaningful."""
    generator = torch.Generator().manual_seed(seed)
    lse = 5 + scale * torch.randn(N, T, generator=generator)
    highest = lse - 4 * torch.rand(N, T, generator=generator)
    unused = torch.full_like(lse, math.nan)
    return TileStats(lse, highest, unused, unused), lse.logsumexp(1)


def both(N: int, T: int, *, scale: float) -> tuple[TileStats, TileStats, Tensor, Tensor]:
    (student, student_lse), (teacher, teacher_lse) = (
        make_stats(N, T, scale=scale, seed=seed) for seed in (0, 1)
    )
    return student, teacher, student_lse, teacher_lse


def dropped_mass(stats: TileStats, active: Tensor) -> Tensor:
    """[N] in float64."""
    share = stats.lse.double().softmax(1)
    return (share * (active.repeat_interleave(ROW_BLOCK, 0)[: len(share)] == 0)).sum(1)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((1, 1), 1), ((1, 5), 3), ((3, 1187), 5), ((ROW_BLOCK + 2, BLOCK_T + 1), 6)],
    ids=str,
)
@pytest.mark.parametrize("rule", [entry(2**-12), entry(0.1), mass(1e-3), mass(0.3)], ids=str)
def test_selects_the_same_tiles(shape, scale, rule):
    sides = both(*shape, scale=scale)
    want = select_tiles(*sides, rule)
    got = select(*sides, rule)
    assert got.dtype == torch.uint8 and torch.equal(got, want)
    if rule.rule == "mass":
        for side in sides[:2]:
            assert float(dropped_mass(side, got).max()) <= rule.bound * (1 + 1e-6)
    if shape[1] > 5:  # neither all nor none, so that the comparison is meaningful
        assert 0 < int(got.sum()) < got.numel()


def test_equal_calls_give_equal_tiles():
    sides = both(20, 40, scale=4)
    assert torch.equal(select(*sides, mass(0.01)), select(*sides, mass(0.01)))


def test_mass_of_one_row_is_used_up():
    """With a single row, the next smallest tile would exceed the tolerance on one side."""
    sides = both(1, 300, scale=2)
    active = select(*sides, mass(0.1))
    p, q = (side.lse.softmax(1)[0] for side in sides[:2])
    size = torch.maximum(p, q)
    is_dropped = active[0] == 0
    next_one = torch.where(is_dropped, math.inf, size).argmin()
    assert size[is_dropped].max() < size[next_one]
    is_dropped[next_one] = True
    assert max(float(p[is_dropped].sum()), float(q[is_dropped].sum())) > 0.1


@pytest.mark.parametrize("rule", [entry(0.01), mass(0.3)], ids=str)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_one_row_of_either_side_is_enough(rule, side):
    """Each tile is the whole mass of one row, once on the student's side, once on the teacher's."""
    N, T = ROW_BLOCK + 2, 35
    tables = torch.full((2, N, T), -40.0)
    tables[:, :, 0] = 0.0
    tables[side, ROW_BLOCK - 1, 33] = 3.0
    tables[side, ROW_BLOCK, 34] = 3.0
    stats = [TileStats(table, table, table, table) for table in tables]
    active = select(*stats, *(table.logsumexp(1) for table in tables), rule)
    assert active.nonzero().tolist() == [[0, 0], [0, 33], [1, 0], [1, 34]]


def test_threshold_itself_is_not_above_it():
    eps = 0.01
    highest = torch.full((2, 1, 3), -20.0)
    highest[0, 0, 1] = math.log(eps)
    highest[1, 0, 2] = torch.nextafter(torch.tensor(math.log(eps)), torch.tensor(0.0))
    stats = [TileStats(side, side, side, side) for side in highest]
    assert select(*stats, torch.zeros(1), torch.zeros(1), entry(eps)).tolist() == [[0, 0, 1]]


def test_equal_tiles_are_dropped_together_or_not_at_all():
    uniform = torch.zeros(1, 8)
    stats = TileStats(uniform, uniform, uniform, uniform)
    lse = uniform.logsumexp(1)
    assert select(stats, stats, lse, lse, mass(0.9)).tolist() == [[1] * 8]


@pytest.mark.parametrize("rule", [entry(1e-3), mass(1e-2)], ids=str)
def test_rows_of_stacked_statistics_and_empty_tiles(rule):
    """Student and teacher as views of wider tables; tiles without any mass."""
    student, teacher, *lse = both(9, 20, scale=3)
    wide = torch.full((4, 18, 33), math.nan)
    views = []
    for rows, side in ((slice(0, 9), student), (slice(9, 18), teacher)):
        side.lse[:, 7] = side.max[:, 7] = -math.inf
        wide[:, rows, 5:25] = torch.stack(tuple(side))
        views.append(TileStats(*wide[:, rows, 5:25]))
    got = select(*views, *lse, rule)
    assert torch.equal(got, select_tiles(student, teacher, *lse, rule))
    assert got[0, 7] == 0 and 0 < int(got.sum()) < got.numel()


@pytest.mark.parametrize("rule", [entry(0.1), mass(0.1)], ids=str)
def test_no_tokens(rule):
    empty = torch.empty(0, 5)
    stats = TileStats(empty, empty, empty, empty)
    assert select(stats, stats, empty[:, 0], empty[:, 0], rule).shape == (0, 5)
