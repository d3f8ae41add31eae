"""Memory that the strategies allocate, as the allocator itself reports it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rosd_kernels import entry, mass, span_divergence, span_logprob
from rosd_kernels.head_tiles import CHUNK_TILES
from rosd_kernels.records import DIVERGENCES
from rosd_kernels.tiles import ROW_BLOCK, TILE, num_tiles


def allocations(call) -> list[int]:
    """Bytes of every allocation (> 0) and release (< 0) of the call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        kept = call()
    assert kept is not None
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def peak_of(sizes: list[int]) -> int:
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 20}, {"top_k": 900, "tail": False}, {"entry_clip": 0.01, "softcap": 5.0}],
    ids=str,
)
@pytest.mark.parametrize("V", [2000, 2001])
def test_memory_stays_within_the_workspace(make_case, dtype, options, V):
    """Peak memory = workspace + float32 gradients + less than one row of logits."""
    N, H, mib = 300, 8, 0.25
    case = make_case(N, V, H, weights=True, sampled=True, dtype=dtype)
    tensors = dict(case.tensors)
    tensors["student_hidden"].requires_grad_()
    tensors["student_head"].requires_grad_()
    sizes = allocations(
        lambda: span_divergence(**tensors, importance_clip=2.0, workspace_mib=mib, **options)
    )
    gradients, per_token, one_row = 4 * (V * H + N * H), 4 * 8 * N, 4 * V
    assert 0 < max(sizes) < 4 * N * V / 8  # no [N, V] tensor
    assert peak_of(sizes) <= mib * 2**20 + gradients + per_token + one_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sparsity": entry(1e-3)}], ids=["exact", "entry"])
@pytest.mark.parametrize("mib", [0.25, 8])
def test_tiles_need_no_more_logits_for_more_tokens(make_case, dtype, options, mib):
    """Peak memory = workspace + float32 gradients + what grows with N: values of rows, [N, H]."""
    V, H = 2000, 8
    planes = 20 if options else 12
    for N in (150, 600, 2400):
        tensors = dict(make_case(N, V, H, weights=True, sampled=True, dtype=dtype).tensors)
        tensors["student_hidden"].requires_grad_()
        tensors["student_head"].requires_grad_()
        call = {"importance_clip": 2.0, "workspace_mib": mib, "strategy": "tiled", **options}
        sizes = allocations(lambda t=tensors, c=call: span_divergence(**t, **c))
        one_tile = (4 * ROW_BLOCK + 2 * H) * TILE * 4  # logits, and a converted piece of a head
        one_block = 4 * ROW_BLOCK * planes * num_tiles(V)  # statistics of a row block's tiles
        workspace, gradients = max(mib * 2**20, one_tile + one_block), 4 * (V * H + N * H)
        growing = 4 * N * (2 * H + 30)
        part_of_head = 4 * H * TILE * CHUNK_TILES
        assert peak_of(sizes) <= workspace + gradients + growing + part_of_head, f"N = {N}"
    assert max(sizes) < 4 * N * V / 4  # no [N, V] tensor


def of_divergence(case, **options):
    tensors = dict(case.tensors)
    for name in ("student_hidden", "student_head"):
        tensors[name].requires_grad_()
    return span_divergence(**tensors, **options)


def of_logprob(case, **options):
    given = case.tensors
    hidden, head = (given[f"student_{name}"].requires_grad_() for name in ("hidden", "head"))
    return span_logprob(hidden, head, given["token_ids"], token_loss=loss_of_logprob, **options)


def loss_of_logprob(logprob, entropy, rows):
    return -logprob


@pytest.mark.parametrize("sparsity", ["exact", entry(1e-3), mass(1e-2)], ids=str)
@pytest.mark.parametrize(
    ("function", "more"),
    [*((of_divergence, {"divergence": name}) for name in DIVERGENCES), (of_logprob, {})],
    ids=[*DIVERGENCES, "logprob"],
)
def test_statistics_of_tiles_count_in_the_workspace(make_case, sparsity, function, more):
    """`workspace_bytes` is the peak without gradients and values of rows, and within the bound."""
    N, V, H, mib = 1500, 16000, 4, 4
    options = {"sparsity": sparsity, "strategy": "tiled", "workspace_mib": mib, **more}
    case = make_case(N, V, H, sampled=True, dtype=torch.float32)
    found = []
    sizes = allocations(lambda: found.append(function(case, **options)) or found)
    others = 4 * (V * H + N * H + N * (2 * H + 30) + 4 * H * TILE * CHUNK_TILES)
    statistics = 4 * 8 * N * num_tiles(V)  # of both sides for all tokens
    stated = found[0].stats.workspace_bytes
    assert stated <= mib * 2**20 < statistics
    assert 0.8 * stated <= peak_of(sizes) <= stated + others


@pytest.mark.parametrize("layout", ["bfloat16", "spread"])
def test_no_converted_copy_of_a_head(make_case, layout):
    """A head that a GEMM cannot read directly is converted tile by tile in the workspace."""
    N, V, H = 4, 500, 400
    tensors = dict(make_case(N, V, H, teacher_width=H).tensors)
    tensors["student_hidden"].requires_grad_()
    for name in ("student_head", "teacher_head"):
        head = tensors[name]
        spread = head.repeat_interleave(2, dim=1)[:, ::2]
        tensors[name] = head.bfloat16() if layout == "bfloat16" else spread
    sizes = allocations(lambda: span_divergence(**tensors, workspace_mib=0.5))
    assert 0 < max(sizes) <= 2**19 // 4 < 4 * V * H


def test_no_head_gradient_is_held_where_none_is_wanted(make_case):
    N, V, H = 4, 50, 2000
    tensors = dict(make_case(N, V, H).tensors)
    tensors["student_head"].requires_grad_()

    def quietly():
        with torch.no_grad():
            return span_divergence(**tensors)

    assert max(allocations(lambda: span_divergence(**tensors))) == 4 * V * H
    assert max(allocations(quietly)) < 4 * V * H
