"""Strategy "chunked" with a sparsity in Triton's interpreter against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from rosd_kernels import entry, mass, span_divergence
from rosd_kernels.divergences import known_total
from rosd_kernels.gpu import entries
from rosd_kernels.gpu.entries import ActiveIndex, active_index, mass_threshold, tile_stats
from rosd_kernels.gpu.gather import gather_bias, gather_head, gather_hidden
from rosd_kernels.gpu.sparse import sparse_block
from rosd_kernels.gpu.sparse_rows import scanned_sums, write_grad
from rosd_kernels.logits import LogitTransform
from rosd_kernels.records import SpanOptions
from rosd_kernels.tiles import SCAN_TILE
from rosd_kernels.vocabulary import Vocabulary
from tests.kernels.gpu.chunks import OneRankGroup, padded

BF16, FP32 = torch.bfloat16, torch.float32
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
V = 2 * SCAN_TILE + 89
NAN = math.nan


@pytest.fixture(autouse=True)
def triton_only(monkeypatch) -> None:
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")
    for name in ("sparse_block", "add_gradients"):
        monkeypatch.setattr(f"rosd_kernels.sparse_chunks.{name}", None)


def peaked(num_tokens: int, *, gap: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[N, V] logits of both sides; each row's mass is in a few entries of the first tile."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, V, generator=generator)
    student[:, torch.randperm(SCAN_TILE, generator=generator)[:9]] += 8
    return student, student + gap * torch.randn(num_tokens, V, generator=generator)


def gradient_of(student: Tensor, teacher: Tensor, dtype: torch.dtype, **options: Any):
    """(gradient w.r.t. logits, output): with the identity as head, they are hidden states."""
    hidden = student.to(dtype, copy=True).requires_grad_()
    out = span_divergence(hidden, teacher.to(dtype), torch.eye(V, dtype=dtype), **options)
    return torch.autograd.grad(out.loss, hidden)[0].double(), out


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (entry(1e-2), {}),
        (entry(1e-3), {"softcap": 12.0, "temperature": 0.8, "beta": 0.95}),
        (entry(1e-3), {"entry_clip": 0.01}),
        (mass(0.05), {}),
        (mass(0.3), {"temperature": 1.4}),
    ],
    ids=str,
)
def test_the_report_is_true_and_the_gradient_within_its_bound(divergence, rule, options):
    student, teacher = peaked(5)
    options = {"divergence": divergence} | options
    exact, truth = gradient_of(student, teacher, torch.float64, strategy="reference", **options)
    got, out = gradient_of(student, teacher, FP32, strategy="chunked", sparsity=rule, **options)
    stats = out.stats
    assert stats.strategy == "chunked"
    scale, cap = options.get("temperature", 1.0), options.get("softcap")
    both = torch.stack([student, teacher]).double()
    shares = ((both if cap is None else cap * torch.tanh(both / cap)) / scale).softmax(-1)
    if "entry_clip" not in options:  # a clipped entry that is active has no gradient either
        is_dropped = (got == 0).all(0)
        assert 0 < stats.active_frac < 0.9
        assert stats.active_frac == pytest.approx(float((~is_dropped).sum()) / V)
        lost = float((shares * is_dropped).sum(-1).max())
        assert stats.dropped_mass_max > 0
        assert stats.dropped_mass_max == pytest.approx(lost, rel=1e-4, abs=1e-6)
        if rule.rule == "entry":
            assert (shares * is_dropped).max() <= rule.bound * 1.001
        assert bool((out.per_token <= truth.per_token * (1 + 1e-5) + 1e-6).all())
        assert bool((out.per_token >= 0).all())
    if rule.rule == "mass":
        assert stats.dropped_mass_max <= rule.bound * (1 + 1e-5)
    error = (got - exact).abs().sum(1).max().item()
    assert 0 < error <= stats.grad_error_bound + 1e-5 * exact.abs().sum(1).max().item()
    assert torch.allclose(out.student_entropy.double(), truth.student_entropy, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (6, 301, 17)], ids=str)
def test_a_fine_rule_agrees_with_float64(make_case, agrees, shape, divergence, dtype):
    case = make_case(*shape, bias=True, weights=True, sampled=True, scale=2.0, dtype=dtype)
    options = {"divergence": divergence, "softcap": 5.0, "importance_clip": 2.0}
    got = case.run(strategy="chunked", sparsity=entry(1e-12), **options)
    truth = case.run(dtype=torch.float64, strategy="reference", **options)
    assert got.output.stats.dropped_mass_max < 1e-8
    agrees(got, truth, scale=2.0)


@pytest.mark.parametrize("needs", [("hidden",), ("head",), ("bias",), ()], ids=str)
def test_only_the_needed_gradients(make_case, agrees, monkeypatch, needs):
    case = make_case(3, 300, 8, bias=True, teacher_width=5)
    wanted = tuple(f"student_{name}" for name in needs)
    truth = case.run(dtype=torch.float64, strategy="reference", needs=wanted)
    if "head" not in needs:
        monkeypatch.setattr("rosd_kernels.gpu.gather.gather_head", None)
    agrees(case.run(strategy="chunked", sparsity=mass(1e-9), needs=wanted), truth)


def test_row_blocks_and_chunks_have_entries_of_their_own(monkeypatch):
    """Two row blocks with other likely entries, and then a chunk for each row."""
    monkeypatch.setattr(entries, "INDEX_ROWS", 128)
    monkeypatch.setattr("rosd_kernels.workspace.CPU_CHUNK_ROWS", 200)
    student = torch.zeros(131, V)
    student[:128, 7], student[128:, [9, 300]] = 14.0, 14.0
    teacher = student + 0.1
    teacher[:, :400] -= 0.3 * torch.arange(400) / 400
    options = {"strategy": "chunked", "sparsity": entry(0.01)}
    got, out = gradient_of(student, teacher, FP32, **options)
    exact, _ = gradient_of(student, teacher, torch.float64, strategy="reference")
    assert out.stats.active_frac == pytest.approx((128 * 1 + 3 * 2) / (131 * V))
    assert set((got[:128] != 0).any(0).nonzero().flatten().tolist()) == {7}
    assert set((got[128:] != 0).any(0).nonzero().flatten().tolist()) == {9, 300}
    error = (got - exact).abs().sum(1).max().item()
    assert error <= out.stats.grad_error_bound + 1e-6
    few = slice(126, 131)
    rows, _ = gradient_of(student[few], teacher[few], FP32, workspace_mib=1e-4, **options)
    assert torch.allclose(rows, got[few], atol=1e-7)


def test_equal_inputs_have_no_loss():
    student, _ = peaked(4)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "sparsity": entry(1e-3), "strategy": "chunked"}
        gradient, out = gradient_of(student, student, FP32, **options)
        assert bool((out.per_token >= 0).all()) and out.loss.item() < 1e-6
        assert gradient.abs().max() < 1e-6


def test_not_a_number_reaches_the_gradient():
    student, teacher = peaked(3)
    student[1, 7] = NAN
    got, out = gradient_of(student, teacher, FP32, strategy="chunked", sparsity=entry(1e-2))
    assert out.loss.isnan() and bool(got[1].isnan().all())


def test_no_tokens(make_case):
    result = make_case(0, 300, 4, bias=True).run(strategy="chunked", sparsity=entry(1e-3))
    assert result.output.loss.item() == 0
    assert all(bool((gradient == 0).all()) for gradient in result.gradients.values())
    assert result.output.stats.active_frac == 1.0


def test_equal_calls_give_equal_bits(make_case):
    case = make_case(9, 600, 24, bias=True, weights=True, sampled=True, scale=6.0)
    first, second = (case.run(strategy="chunked", sparsity=mass(0.02)) for _ in range(2))
    assert 0 < first.output.stats.active_frac < 0.9
    assert torch.equal(first.output.per_token, second.output.per_token)
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


def transforms(bias: Tensor | None = None, **options: Any):
    one = LogitTransform(bias, options.get("softcap"), options.get("temperature", 1.0))
    return one, one


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_grad_is_compacted_in_place(close, divergence, dtype):
    """G of every third entry, by more entries than a program reads at once."""
    R, width = 3, 4000
    generator = torch.Generator().manual_seed(1)
    raw = 2 * torch.randn(2, R, width, generator=generator)
    student, teacher = map(padded, raw)
    places = torch.arange(1, width, 3, dtype=torch.int32)
    listed = torch.full((1, width), -1, dtype=torch.int32)
    listed[0, : len(places)] = places
    count = torch.tensor([len(places)], dtype=torch.int32)
    index = ActiveIndex(listed, count, torch.zeros(1, width, dtype=torch.uint8), 128)
    options = SpanOptions(divergence=divergence, softcap=4.0, temperature=1.3)
    both = transforms(softcap=4.0, temperature=1.3)
    x = raw.double().requires_grad_()
    log_p, log_q = (4 * torch.tanh(x / 4) / 1.3).log_softmax(-1)
    log_q = log_q.detach()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    value = {
        "forward_kl": q * (log_q - log_p),
        "reverse_kl": p * (log_p - log_q),
        "jsd": (q * (log_q - log_m) + p * (log_p - log_m)) / 2,
    }[divergence]
    want = torch.autograd.grad(value.sum(), x)[0][0] * 1.3
    K = {
        "forward_kl": -q.sum(1),
        "reverse_kl": value.sum(1),
        "jsd": (p * (log_p - log_m)).sum(1) / 2,
    }
    assert (known_total(options) is None) == (divergence != "forward_kl")
    lse = (4 * torch.tanh(raw.double() / 4) / 1.3).logsumexp(-1).float()
    total = K[divergence].detach().float()
    G = write_grad(student, teacher, both, lse, total, index, options, dtype=dtype)
    assert G.dtype == dtype and G.data_ptr() == student.data_ptr()
    close("G", G[:, : len(places)], want[:, places.long()], 1e-5, slack=1e-8)
    assert torch.equal(teacher, raw[1])


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP32, BF16)], ids=str)
@pytest.mark.parametrize("H", [40, 129])
def test_gathered_products(close, dtypes, H):
    """Two row blocks, one without entries; NaN in what must not count; rows far from aligned."""
    R, width, of_grad, of_head = 131, 301, *dtypes
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    G = torch.full((R, width + 3), NAN, dtype=of_grad)[:, 1 : width + 1]
    index = ActiveIndex(
        torch.full((3, width), 2**30, dtype=torch.int32),
        torch.tensor([150, 0, 64], dtype=torch.int32),
        torch.zeros(3, width, dtype=torch.uint8),
        128,
    )
    # Blocks of 128 rows: 131 rows fill two of the three.
    index = index._replace(entries=index.entries[:2], counts=index.counts[[0, 2]])
    head, scale = normal(width, H + 1)[:, 1:].to(of_head), normal(R)
    hidden = normal(R, H).to(of_grad)
    dense = torch.zeros(R, width, dtype=torch.float64)
    for block, rows in enumerate((slice(0, 128), slice(128, R))):
        chosen = torch.randperm(width, generator=generator)[: index.counts[block]].sort().values
        index.entries[block, : len(chosen)] = chosen.int()
        G[rows, : len(chosen)] = normal(G[rows].shape[0], len(chosen)).to(of_grad)
        dense[rows, chosen] = G[rows, : len(chosen)].double()
    dh = torch.full((R, H), NAN)
    gather_hidden(G, head, index, scale, out=dh)
    close("dh", dh, (dense @ head.double()) * scale[:, None].double(), 1e-5)
    dW, db = normal(width, H), normal(width)
    want_dW, want_db = (
        dW.double() + dense.T @ hidden.double(),
        db.double() + dense.T @ scale.double(),
    )
    gather_head(G, hidden, index, out=dW)
    gather_bias(G, index, scale, out=db)
    close("dW", dW, want_dW, 1e-5)
    close("db", db, want_db, 1e-5)


def test_no_active_entry():
    index = ActiveIndex(
        torch.zeros(1, 20, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, 20, dtype=torch.uint8),
        128,
    )
    G, dh, dW = torch.full((2, 20), NAN), torch.full((2, 3), NAN), torch.ones(20, 3)
    gather_hidden(G, torch.ones(20, 3), index, torch.ones(2), out=dh)
    gather_head(G, torch.ones(2, 3), index, out=dW)
    assert bool((dh == 0).all()) and bool((dW == 1).all())


def test_statistics_of_tiles(close):
    raw = 3 * torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1))
    found = tile_stats(padded(raw), LogitTransform(bias, 5.0, 0.7))
    tiles = (5 * torch.tanh((raw + bias).double() / 5) / 0.7).split(SCAN_TILE, 1)
    log_p = [tile.log_softmax(1) for tile in tiles]
    wanted = (
        [tile.logsumexp(1) for tile in tiles],
        [tile.amax(1) for tile in tiles],
        [tile.amin(1) for tile in tiles],
        [-(x.exp() * x).sum(1) for x in log_p],
    )
    for name, got, want in zip(("lse", "max", "min", "entropy"), found, wanted, strict=True):
        close(name, got, torch.stack(want, 1), 1e-6, slack=1e-6)


@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-8])
def test_the_threshold_of_mass_is_the_largest_within_its_grid(tolerance):
    student, _ = peaked(4)
    lse = student.double().logsumexp(1).float()
    found = mass_threshold(student, LogitTransform(None, None, 1.0), lse, tolerance)
    p = (student.double() - lse.double()[:, None]).exp()

    def below(level: Tensor) -> Tensor:
        return (p * (student <= level[:, None])).sum(1)

    assert bool((below(found) <= tolerance).all())
    step = -math.log(tolerance / V) / 9**4 + 1e-3
    beyond = found + step
    assert bool(((below(beyond) > tolerance) | (beyond >= lse)).all())


def test_stages_of_two_shards(close):
    """Sums over two shards are those of the whole vocabulary, and so are the active entries."""
    student, teacher = peaked(4)
    whole = torch.stack([student, teacher]).logsumexp(-1)
    options = SpanOptions(divergence="reverse_kl")

    def run(columns: slice) -> tuple[Tensor, list[int]]:
        s, t = padded(student[:, columns]), padded(teacher[:, columns])
        thresholds = whole + math.log(1e-2)
        highest = torch.stack([tile_stats(x, transforms()[0])[1] for x in (s, t)])
        scanned = (highest > thresholds[:, :, None]).any(0)
        index = active_index((s, t), transforms(), thresholds, scanned)
        chosen = index.entries[0, : int(index.counts[0])] + (columns.start or 0)
        return scanned_sums(s, t, transforms(), whole, scanned, index, options), chosen.tolist()

    sums, chosen = run(slice(None))
    parts = [run(slice(0, SCAN_TILE)), run(slice(SCAN_TILE, V))]
    close("sums", sum(part for part, _ in parts), sums, 1e-6, slack=1e-7)
    assert chosen == parts[0][1] + parts[1][1] and 0 < len(chosen) < V


def test_a_block_of_a_shard():
    student, teacher = peaked(3)
    options = SpanOptions(divergence="jsd", sparsity=mass(0.05))
    found = []
    for kind in (Vocabulary, OneRankGroup):
        call = {"needs_gradient": True, "grad_dtype": FP32}
        sides = padded(student), padded(teacher)
        columns = torch.tensor([0, -1, V - 1])
        found.append(sparse_block(*sides, transforms(), columns, options, kind(V), **call))
    assert torch.equal(found[0].value, found[1].value)
    count = int(found[0].index.counts[0])
    assert torch.equal(found[0].grad[:, :count], found[1].grad[:, :count])
    log_p = student.double().log_softmax(1)
    got = found[0].student.logprob
    assert got is not None
    assert torch.allclose(got[[0, 2]].double(), log_p[[0, 2], [0, V - 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("num_rows", "want"), [(1, 128), (128, 128), (129, 256), (512, 512), (513, 384), (1767, 512)]
)
def test_row_blocks_are_of_about_equal_size(num_rows, want):
    assert entries.index_rows(num_rows) == want
