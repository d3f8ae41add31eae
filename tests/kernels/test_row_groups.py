"""Groups of rows of strategy "tiled": sizes, and results that do not depend on them."""

from __future__ import annotations

import pytest
import torch

from rosd_kernels import entry, mass
from rosd_kernels.row_groups import RowGroups
from rosd_kernels.tiles import ROW_BLOCK

F32 = torch.float32
ONE_BLOCK = 1e-3  # MiB: less than any row block's statistics


@pytest.mark.parametrize("num_tokens", [0, 1, ROW_BLOCK, ROW_BLOCK + 1, 1000, 5000])
@pytest.mark.parametrize("budget", [ONE_BLOCK, 1, 7, 1000])
def test_groups_cover_the_tokens_and_fit_the_budget(num_tokens, budget):
    groups = RowGroups.of(num_tokens, 30000, F32, planes=12, budget=budget)
    slices = groups.slices()
    tokens = [token for rows in slices for token in range(rows.start, rows.stop)]
    assert tokens == list(range(num_tokens)) and slices
    assert all(rows.start % ROW_BLOCK == 0 for rows in slices)
    row_bytes = 12 * 235 * 4  # 235 tiles
    longest = max(rows.stop - rows.start for rows in slices)
    assert groups.num_bytes == row_bytes * longest
    assert groups.num_bytes <= max(budget * 2**20, row_bytes * ROW_BLOCK)


def test_groups_are_nearly_equal():
    groups = RowGroups.of(9 * ROW_BLOCK, 128, F32, planes=1, budget=ROW_BLOCK * 4 * 8 / 2**20)
    assert [(rows.stop - rows.start) // ROW_BLOCK for rows in groups.slices()] == [5, 4]


@pytest.mark.parametrize(
    "sparsity", ["exact", entry(1e-3), mass(1e-2)], ids=["exact", "entry", "mass"]
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_groups_do_not_change_the_result(make_case, agrees, sparsity, divergence):
    case = make_case(300, 700, 8, bias=True, weights=True, sampled=True)
    options = {"strategy": "tiled", "sparsity": sparsity, "divergence": divergence}
    whole = case.run(**options)
    parts = case.run(**options, workspace_mib=ONE_BLOCK)
    agrees(parts, whole, tolerance=2e-6)
    got, want = parts.output.stats, whole.output.stats
    assert got.workspace_bytes < want.workspace_bytes
    assert got.active_frac == want.active_frac
    assert got.dropped_mass_max == pytest.approx(want.dropped_mass_max, rel=1e-5)
    assert got.grad_error_bound == pytest.approx(want.grad_error_bound, rel=1e-5)


@pytest.mark.parametrize("sparsity", ["exact", entry(1e-3)], ids=["exact", "entry"])
def test_groups_do_not_change_log_probs(make_logprob, logprob_agrees, sparsity):
    case = make_logprob(300, 700, 8, bias=True)
    whole = case.run(strategy="tiled", sparsity=sparsity)
    parts = case.run(strategy="tiled", sparsity=sparsity, workspace_mib=ONE_BLOCK)
    logprob_agrees(parts, whole, tolerance=2e-6)
    assert parts.output.stats.workspace_bytes < whole.output.stats.workspace_bytes
    assert parts.output.stats.active_frac == whole.output.stats.active_frac
