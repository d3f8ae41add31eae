"""`span_logprob`, strategy "chunked" with a sparsity, in Triton's interpreter against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from rosd_kernels import entry, mass, span_logprob
from rosd_kernels.gpu import entries
from rosd_kernels.gpu.entries import ActiveIndex, active_index, tile_stats
from rosd_kernels.gpu.logprob_sparse import SparseBlock, dropped_mass, write_grad
from rosd_kernels.gpu.sparse_rows import BLOCK_C
from rosd_kernels.logits import LogitTransform
from rosd_kernels.tiles import SCAN_TILE
from rosd_kernels.vocabulary import Vocabulary
from tests.kernels.gpu.chunks import OneRankGroup, padded

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
V = 2 * SCAN_TILE + 89
NAN = math.nan
LOSSES = ("clipped", "afterwards clipped", None)


@pytest.fixture(autouse=True)
def triton_only(monkeypatch) -> None:
    """Select the kernels, and remove the code that would do their work otherwise."""
    monkeypatch.setenv("ROSD_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("rosd_kernels.logprob.sparse_chunks.SparseBlock", None)
    for name in ("stats", "native", "plain"):
        monkeypatch.setattr(f"rosd_kernels.active.{name}", None)


def peaked(num_tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """([N, V] logits whose mass is in a few entries of the first tile, [N] token ids of any)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, V, generator=generator)
    logits[:, torch.randperm(SCAN_TILE, generator=generator)[:9]] += 8
    return logits, torch.randint(V, (num_tokens,), generator=generator)


def gradient_of(logits: Tensor, ids: Tensor, dtype: torch.dtype, loss: Any, **options: Any):
    """(gradient w.r.t. logits, output): with the identity as head, they are hidden states."""
    hidden = logits.to(dtype, copy=True).requires_grad_()
    out = span_logprob(hidden, torch.eye(V, dtype=dtype), ids, token_loss=loss, **options)
    return torch.autograd.grad(out.loss, hidden)[0].double(), out


@pytest.mark.parametrize("slopes", [(-1.0, 0.0), (0.0, -2.0), (3.0, 1.0)], ids=str)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (entry(1e-2), {}),
        (entry(1e-3), {"softcap": 12.0, "temperature": 0.8}),
        (mass(0.05), {}),
        (mass(0.3), {"temperature": 1.4}),
    ],
    ids=str,
)
def test_the_report_is_true_and_the_gradient_within_its_bound(slopes, rule, options):
    logits, ids = peaked(5)
    a, b = slopes

    def loss(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return a * logprob + b * entropy

    fast = {"strategy": "chunked", "sparsity": rule} | options
    exact, truth = gradient_of(logits, ids, torch.float64, loss, strategy="reference", **options)
    got, out = gradient_of(logits, ids, FP32, loss, **fast)
    for name in ("loss", "logprob", "entropy"):
        assert torch.allclose(getattr(out, name).double(), getattr(truth, name), atol=1e-5)
    scale, cap = options.get("temperature", 1.0), options.get("softcap")
    s = logits.double() if cap is None else cap * torch.tanh(logits.double() / cap)
    p = (s / scale).softmax(1)
    is_dropped = (got == 0).all(0)
    assert not bool(is_dropped[ids].any())
    stats = out.stats
    assert stats.strategy == "chunked" and 0 < stats.active_frac < 0.9
    assert stats.active_frac == pytest.approx(float((~is_dropped).sum()) / V)
    assert stats.dropped_mass_max > 0
    lost = float((p * is_dropped).sum(1).max())
    assert stats.dropped_mass_max == pytest.approx(lost, rel=1e-4, abs=1e-6)
    if rule.rule == "entry":
        assert float((p * is_dropped).max()) <= rule.bound * 1.001
    else:
        assert stats.dropped_mass_max <= rule.bound * (1 + 1e-5)
    error = (got - exact).abs().sum(1).max().item()
    assert 0 < error <= stats.grad_error_bound + 1e-5 * exact.abs().sum(1).max().item()


@pytest.mark.parametrize("of", ["logprob", "entropy"])
def test_the_bound_without_a_loss_is_for_a_slope_of_one(of):
    logits, ids = peaked(5)

    def run(dtype: torch.dtype, **options: Any):
        hidden = logits.to(dtype, copy=True).requires_grad_()
        out = span_logprob(hidden, torch.eye(V, dtype=dtype), ids, temperature=0.5, **options)
        return torch.autograd.grad(getattr(out, of).sum(), hidden)[0].double(), out.stats

    exact, _ = run(torch.float64, strategy="reference")
    got, stats = run(FP32, strategy="chunked", sparsity=entry(1e-3))
    error = (got - exact).abs().sum(1).max().item()
    assert 0 < error <= stats.grad_error_bound + 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (6, 301, 17)], ids=str)
def test_a_fine_rule_agrees_with_float64(make_logprob, logprob_agrees, loss, dtype, shape):
    case = make_logprob(*shape, bias=True, dtype=dtype, scale=2.0)
    options = {"softcap": 9.0, "temperature": 1.5}
    got = case.run(loss, strategy="chunked", sparsity=entry(1e-12), **options)
    truth = case.run(loss, dtype=torch.float64, strategy="reference", **options)
    assert got.output.stats.dropped_mass_max < 1e-8
    logprob_agrees(got, truth, scale=2.0)


@pytest.mark.parametrize("loss", LOSSES)
def test_huge_logits(make_logprob, logprob_agrees, loss):
    """Logits of +-80: what underflows is not active, and takes part in nothing."""
    generator = torch.Generator().manual_seed(3)
    case = make_logprob(3, 300, 300)
    case.tensors["head"].copy_(80 * torch.eye(300))
    case.tensors["hidden"].copy_(torch.randint(0, 2, (3, 300), generator=generator) * 2.0 - 1)
    truth = case.run(loss, dtype=torch.float64, strategy="reference")
    got = case.run(loss, strategy="chunked", sparsity=entry(1e-9))
    assert got.output.stats.active_frac < 1
    logprob_agrees(got, truth, scale=3)


def test_a_masked_entry_is_dropped_unless_it_was_sampled(make_logprob, logprob_agrees):
    case = make_logprob(4, 300, 8, bias=True)
    case.tensors["bias"][[3, 299]] = -1e4
    case.tensors["token_ids"].copy_(torch.tensor([3, 0, 7, 7]))
    truth = case.run("cross_entropy", dtype=torch.float64, strategy="reference")
    got = case.run("cross_entropy", strategy="chunked", sparsity=entry(1e-12))
    assert got.output.stats.active_frac == pytest.approx(299 / 300)
    logprob_agrees(got, truth)


@pytest.mark.parametrize("needs", [("hidden",), ("head",), ("bias",), ()], ids=str)
def test_only_the_needed_gradients(make_logprob, logprob_agrees, monkeypatch, needs):
    case = make_logprob(3, 300, 8, bias=True)
    truth = case.run(dtype=torch.float64, strategy="reference", needs=needs)
    if "head" not in needs:
        monkeypatch.setattr("rosd_kernels.gpu.gather.gather_head", None)
    logprob_agrees(case.run(strategy="chunked", sparsity=mass(1e-9), needs=needs), truth)


def test_row_blocks_and_chunks_have_entries_of_their_own(monkeypatch):
    """Two row blocks with other likely and other sampled entries, then a chunk for each row."""
    monkeypatch.setattr(entries, "INDEX_ROWS", 128)
    monkeypatch.setattr("rosd_kernels.workspace.CPU_CHUNK_ROWS", 200)
    logits = torch.zeros(131, V)
    logits[:128, 7], logits[128:, [9, 300]] = 14.0, 14.0
    ids = torch.full((131,), 7)
    ids[5], ids[128:] = 500, 9

    def loss(logprob: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return -logprob - 0.3 * entropy

    options = {"strategy": "chunked", "sparsity": entry(0.01)}
    got, out = gradient_of(logits, ids, FP32, loss, **options)
    exact, _ = gradient_of(logits, ids, torch.float64, loss, strategy="reference")
    assert out.stats.active_frac == pytest.approx((128 * 2 + 3 * 2) / (131 * V))
    assert set((got[:128] != 0).any(0).nonzero().flatten().tolist()) == {7, 500}
    assert set((got[128:] != 0).any(0).nonzero().flatten().tolist()) == {9, 300}
    error = (got - exact).abs().sum(1).max().item()
    assert 0 < error <= out.stats.grad_error_bound + 1e-6
    few = slice(126, 131)
    alone = {"workspace_mib": 1e-4} | options
    rows, _ = gradient_of(logits[few], ids[few], FP32, loss, **alone)
    # Without the row that sampled it, entry 500 is dropped.
    assert torch.allclose(rows[:, [7, 9, 300]], got[few][:, [7, 9, 300]], atol=1e-7)
    assert bool((rows[:, 500] == 0).all())


def test_not_a_number_reaches_the_gradient():
    logits, ids = peaked(3)
    logits[1, 7] = NAN
    options = {"strategy": "chunked", "sparsity": entry(1e-2)}
    got, out = gradient_of(logits, ids, FP32, lambda logprob, entropy, rows: -logprob, **options)
    assert out.loss.isnan() and bool(got[1].isnan().all())


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tokens(make_logprob, loss):
    result = make_logprob(0, 300, 4, bias=True).run(loss, strategy="chunked", sparsity=entry(1e-3))
    assert result.output.loss.item() == 0
    assert all(bool((gradient == 0).all()) for gradient in result.gradients.values())
    assert result.output.stats.active_frac == 1.0


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_equal_calls_give_equal_bits(make_logprob, dtype, loss):
    case = make_logprob(9, 600, 24, bias=True, scale=6.0, dtype=dtype)
    first, second = (case.run(loss, strategy="chunked", sparsity=mass(0.02)) for _ in range(2))
    assert 0 < first.output.stats.active_frac < 0.9
    for name in ("loss", "logprob", "entropy"):
        assert torch.equal(getattr(first.output, name), getattr(second.output, name))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])


@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
def test_the_logits_are_the_only_dense_work(make_logprob, loss):
    """Library GEMMs are those of the logits; all others go through active entries."""
    N, H = 20, 16
    case = make_logprob(N, 600, H, scale=6.0)
    with FlopCounterMode(display=False) as counter:
        case.run(loss, strategy="chunked", sparsity=entry(0.05))
    passes = 1 if loss == "clipped" else 2
    assert counter.get_total_flops() == passes * 2 * N * 600 * H


class Waits(TorchDispatchMode):
    """Collect operations whose results are Python numbers or shapes, for which a host waits."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_mask = name in ("index", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in self.NAMES or is_mask:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("loss", ["clipped", "afterwards clipped"])
@pytest.mark.parametrize("rule", [entry(1e-3), mass(1e-2)], ids=str)
def test_no_call_waits_for_the_device(make_logprob, monkeypatch, loss, rule):
    case = make_logprob(9, 600, 8, bias=True, scale=6.0)
    # Both read on a CPU only.
    monkeypatch.setattr("rosd_kernels.logprob.api.check_ids", lambda ids, vocabulary: None)
    monkeypatch.setattr("rosd_kernels.autograd.scale_", lambda gradient, factor, dtype: gradient)
    with Waits() as waits:
        case.run(loss, strategy="chunked", sparsity=rule)
    assert waits.found == []
    with Waits() as waits:
        (torch.ones(3).nonzero(), torch.ones(2)[torch.tensor([True, False])], bool(torch.ones(1)))
    assert sorted(waits.found) == ["_local_scalar_dense", "index", "nonzero"]


# The kernels alone.


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("options", [(None, 1.0), (4.0, 1.3)], ids=str)
def test_grad_is_compacted_in_place(close, dtype, options):
    """G of every third entry, by more entries than a program reads at once."""
    R, width, (softcap, temperature) = 3, 4000, options
    generator = torch.Generator().manual_seed(1)
    raw, bias = (
        2 * torch.randn(R, width, generator=generator),
        torch.randn(width, generator=generator),
    )
    a, b = torch.randn(2, R, generator=generator)
    places = torch.arange(1, width, 3, dtype=torch.int32)
    assert len(places) > BLOCK_C
    listed = torch.full((1, width), 2**30, dtype=torch.int32)
    listed[0, : len(places)] = places
    count = torch.tensor([len(places)], dtype=torch.int32)
    index = ActiveIndex(listed, count, torch.zeros(1, width, dtype=torch.uint8), 128)
    columns = torch.tensor([4, -1, int(places[-1])])

    x = raw.double().requires_grad_()
    s = x + bias.double()
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    log_p = s.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    picked = s.gather(1, columns.clamp(min=0)[:, None])[:, 0].masked_fill(columns < 0, 0)
    logprob = picked - s.logsumexp(1)
    (want,) = torch.autograd.grad((a * logprob + b * entropy).sum(), x)

    logits, transform = padded(raw), LogitTransform(bias, softcap, temperature)
    factors = torch.stack([a, b, a + b * entropy.detach().float()]) / temperature
    lse = s.logsumexp(1).detach().float()
    G = write_grad(logits, transform, columns, lse, factors, index, dtype=dtype)
    assert G.dtype == dtype and G.data_ptr() == logits.data_ptr()
    close("G", G[:, : len(places)], want[:, places.long()], 1e-5, slack=1e-8)


@pytest.mark.parametrize("options", [(None, 1.0), (4.0, 1.3)], ids=str)
def test_sums_of_what_is_dropped(close, options):
    """Over any marks and any scanned tiles, in two row blocks; NaN is read where neither is."""
    softcap, temperature = options
    R, width = 131, 3 * SCAN_TILE + 5
    generator = torch.Generator().manual_seed(4)
    raw, bias = (
        3 * torch.randn(R, width, generator=generator),
        torch.randn(width, generator=generator),
    )
    marks = (torch.rand(2, width, generator=generator) < 0.2).to(torch.uint8)
    marks[1] = 0  # a row block without an active entry
    scanned = torch.rand(R, 4, generator=generator) < 0.5
    listed = torch.full((2, width), 2**30, dtype=torch.int32)
    counts = marks.sum(1, dtype=torch.int32)
    for block in range(2):
        listed[block, : counts[block]] = marks[block].nonzero().flatten().int()
    index = ActiveIndex(listed, counts, marks, 128)

    s = (raw + bias).double()
    s = (s if softcap is None else softcap * torch.tanh(s / softcap)) / temperature
    lse, p = s.logsumexp(1), s.softmax(1)
    h = -p * p.log()
    is_active = marks[torch.arange(R) // 128].bool()
    in_scanned = scanned.repeat_interleave(SCAN_TILE, 1)[:, :width]
    chosen = in_scanned & ~is_active, ~in_scanned & is_active
    want = torch.stack([(x * where).sum(1) for where in chosen for x in (p, h)])
    logits = padded(raw.masked_fill(~in_scanned & ~is_active, NAN))
    transform = LogitTransform(bias, softcap, temperature)
    got = dropped_mass(logits, transform, lse.float(), scanned, index)
    close("sums", got, want, 1e-5, slack=1e-8)


def test_stages_of_two_shards(close):
    """Active entries of two shards are those of the whole, and so are sums over what is not."""
    logits, ids = peaked(4)
    plain, whole = LogitTransform(None, None, 1.0), logits.logsumexp(-1)

    def run(start: int, stop: int) -> tuple[Tensor, list[int]]:
        part = padded(logits[:, start:stop])
        columns = torch.where((ids >= start) & (ids < stop), ids - start, -1)
        threshold = whole + math.log(1e-2)
        scanned = tile_stats(part, plain)[1] > threshold[:, None]
        index = active_index((part,), (plain,), threshold[None], scanned, columns)
        chosen = index.entries[0, : int(index.counts[0])] + start
        return dropped_mass(part, plain, whole, scanned, index), chosen.tolist()

    sums, chosen = run(0, V)
    parts = [run(0, SCAN_TILE), run(SCAN_TILE, V)]
    close("sums", sum(part for part, _ in parts), sums, 1e-6, slack=1e-7)
    assert chosen == parts[0][1] + parts[1][1]
    assert set(ids.tolist()) <= set(chosen) and len(chosen) < V


def test_a_block_of_a_shard():
    logits, _ = peaked(3)
    columns = torch.tensor([0, -1, V - 1])
    plain = LogitTransform(None, None, 1.0)
    blocks = [
        SparseBlock(padded(logits), plain, columns, mass(0.05), kind(V))
        for kind in (Vocabulary, OneRankGroup)
    ]
    for name in ("lse", "entropy", "logprob"):
        assert torch.equal(*(getattr(block.values, name) for block in blocks))
    assert torch.equal(*(block.lost_mass() for block in blocks))
    log_p = logits.double().log_softmax(1)
    got = blocks[0].values.logprob[[0, 2]].double()
    assert torch.allclose(got, log_p[[0, 2], [0, V - 1]], atol=1e-5)
    index = blocks[0].scan.index
    chosen = index.entries[0, : int(index.counts[0])].tolist()
    assert 0 in chosen and V - 1 in chosen
