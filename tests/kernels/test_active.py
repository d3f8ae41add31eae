"""The passes over active entries, in C++ and in plain PyTorch, against their definitions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import native, plain
from rosd_kernels.active import ActiveEntries, Side, lost_mass, select_entries
from rosd_kernels.divergences import entry_terms
from rosd_kernels.logits import LogitTransform, transform_
from rosd_kernels.records import SpanOptions
from rosd_kernels.sparsity import entry, mass
from rosd_kernels.tiles import SCAN_TILE
from rosd_kernels.vocabulary import Vocabulary

built = pytest.mark.skipif(not native.is_available(), reason="needs the C++ extension")
MODULES = [plain, pytest.param(native, marks=built)]
DTYPES = (torch.float32, torch.float64)
TRANSFORMS = [(False, None, 1.0), (True, None, 0.6), (True, 4.0, 1.0), (False, 30.0, 2.0)]
TILE = 16


def case(rows: int, columns: int, dtype: torch.dtype, has_bias: bool, softcap: Any, tau: float):
    """(raw logits, transform, float64 log p, [R] lse, entries) of random choices."""
    generator = torch.Generator().manual_seed(rows + columns)
    raw = torch.randn(rows, columns, generator=generator).mul(3).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype) if has_bias else None
    scaled = transform_(
        raw.double().clone(), LogitTransform(None if bias is None else bias.double(), softcap, tau)
    )
    lse = scaled.logsumexp(1)
    active = torch.rand(columns, generator=generator) < 0.3
    scanned = torch.rand(rows, -(-columns // TILE), generator=generator) < 0.5
    entries = ActiveEntries(
        index=active.nonzero().squeeze(1),
        is_dropped=(~active).to(dtype),
        scanned=scanned,
        tile=TILE,
    )
    return raw, LogitTransform(bias, softcap, tau), scaled - lse[:, None], lse.to(dtype), entries


def of_entries(entries: ActiveEntries) -> Tensor:
    return entries.scanned.repeat_interleave(TILE, 1)[:, : len(entries.is_dropped)]


def cases() -> list[tuple[Any, ...]]:
    shapes = [(1, 1), (3, 16), (5, 40), (4, 1030)]
    return [
        case(rows, columns, dtype, *transform)
        for (rows, columns), dtype, transform in itertools.product(shapes, DTYPES, TRANSFORMS)
    ]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    bound = 2e-5 if dtype == torch.float32 else 1e-12
    return torch.allclose(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("module", MODULES)
def test_mark_active(module):
    for raw, transform, log_p, lse, entries in cases():
        threshold = (log_p + lse[:, None].double()).median(1).values.to(raw.dtype) + 0.01
        wanted = (log_p + lse[:, None].double() > threshold[:, None].double()) & of_entries(entries)
        active = torch.zeros(raw.shape[1], dtype=torch.bool)
        active[0] = True  # marks of another side stay
        before = raw.clone()
        module.mark_active_(active, raw, transform, threshold, entries.scanned, TILE)
        want = wanted.any(0)
        want[0] = True
        assert torch.equal(active, want) and torch.equal(raw, before)


@pytest.mark.parametrize("module", MODULES)
def test_dropped_mass(module):
    for raw, transform, log_p, lse, entries in cases():
        before = raw.clone()
        got = module.dropped_mass(raw, transform, lse, entries)
        scanned, is_dropped = of_entries(entries), entries.is_dropped.bool()
        p = log_p.exp()
        want = [
            (x * chosen).sum(1)
            for chosen in (scanned & is_dropped, ~scanned & ~is_dropped)
            for x in (p, -p * log_p)
        ]
        assert got.dtype == raw.dtype and torch.equal(raw, before)
        assert close(got, torch.stack(want), raw.dtype)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("entry_clip", [None, 0.01])
def test_scanned_terms(module, divergence, entry_clip):
    for raw, transform, log_p, lse, entries in cases():
        options = SpanOptions(
            divergence=divergence,
            beta=0.3,
            entry_clip=entry_clip,
            softcap=transform.softcap,
            temperature=transform.temperature,
        )
        teacher = raw.flip(1).contiguous()
        bias = None if transform.bias is None else transform.bias.flip(0).contiguous()
        arguments = transform, transform._replace(bias=bias), lse, lse, entries, options
        got = module.scanned_terms(raw, teacher, *arguments)
        log_q = log_p.flip(1)
        c, e = entry_terms(log_p.clone(), log_q.clone(), log_p.exp(), log_q.exp(), options)
        of_scanned = of_entries(entries)
        want = [(c * of_scanned).sum(1), (e * of_scanned).sum(1)]
        want.append((e.abs() * of_scanned * entries.is_dropped).sum(1))
        assert close(got, torch.stack(want), raw.dtype)


@pytest.mark.parametrize("module", MODULES)
def test_compact(module):
    for raw, _, _, _, entries in cases():
        before = raw.clone()
        got = module.compact_(raw, entries.index)
        assert torch.equal(got, before[:, entries.index])
        assert got.numel() == 0 or got.data_ptr() == raw.data_ptr()  # in place


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-3, 1e-9])
def test_mass_threshold(module, tolerance):
    """No more than the tolerance is at or below it, and an entry a bit more likely is above."""
    for raw, transform, log_p, lse, _ in cases():
        threshold = module.mass_threshold(raw, transform, lse, tolerance).double()
        below = log_p + lse.double()[:, None] <= threshold[:, None]
        p = log_p.exp()
        assert bool(((p * below).sum(1) <= tolerance).all())
        # All entries of up to a quarter of an octave (one bin) more would be too much.
        scaled = log_p + lse.double()[:, None]
        wider = scaled <= threshold[:, None] + math.log(2) / 4 + 1e-4
        assert bool(((p * wider).sum(1) > tolerance * (1 - 1e-6)).all())


@built
@pytest.mark.parametrize(
    "name", ["mark_active_", "dropped_mass", "scanned_terms", "compact_", "mass_threshold"]
)
def test_opcheck(name):
    raw, transform, _, lse, entries = case(5, 40, torch.float32, True, 4.0, 0.7)
    scales = transform.softcap, transform.temperature
    flags = torch.zeros(40, dtype=torch.bool)
    chosen = entries.scanned, entries.is_dropped
    arguments: dict[str, tuple[Any, ...]] = {
        "mark_active_": (flags, raw, transform.bias, lse - 3, entries.scanned, *scales, TILE),
        "dropped_mass": (raw, None, lse, *chosen, entries.index, None, 0.7, TILE),
        "scanned_terms": (
            *(raw, raw + 1, None, transform.bias, lse, lse, *chosen),
            *(2, 0.5, None, *scales, TILE),
        ),
        "compact_": (raw, entries.index),
        "mass_threshold": (raw, transform.bias, lse, 0.1, *scales),
    }
    torch.library.opcheck(getattr(torch.ops.rosd, name).default, arguments[name])


@built
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([3, 40])}, r"index: got entries up to 40, want 0 to 39"),
        ({"index": torch.tensor([-1, 4])}, r"index: got entries from -1"),
        ({"scanned": torch.zeros(5, 2, dtype=torch.bool)}, r"scanned: got .*want .*\[5, 3\]"),
        ({"is_dropped": torch.zeros(39)}, r"is_dropped: got .*\[40\]"),
    ],
)
def test_operators_check_what_they_get(change, message):
    raw, transform, _, lse, entries = case(5, 40, torch.float32, False, None, 1.0)
    tensors = {"index": entries.index, "scanned": entries.scanned, "is_dropped": entries.is_dropped}
    with pytest.raises(ValueError, match=message):
        native.dropped_mass(raw, transform, lse, ActiveEntries(**tensors | change, tile=TILE))


@pytest.mark.parametrize("rule", [entry(1e-3), mass(0.05)], ids=["entry", "mass"])
def test_selection_and_what_it_loses(rule):
    """Of both sides: the active entries by definition, the lost mass and its entropy."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = 6, 3 * SCAN_TILE + 9
    logits = torch.randn(2, rows, columns, generator=generator) * 4
    transform = LogitTransform(None, None, 1.0)
    vocabulary = Vocabulary(columns)
    sides = [Side.of(x, transform, None, vocabulary) for x in logits]
    always = torch.tensor([0, -1, 5, -1, 7, 7])
    entries = select_entries(sides, rule, always)
    active = entries.is_dropped == 0
    assert torch.equal(active.nonzero().squeeze(1), entries.index)
    assert bool(active[[0, 5, 7]].all())
    p = logits.double().softmax(-1)
    if rule.rule == "entry":
        want = (p > rule.bound).any(1).any(0)
        want[[0, 5, 7]] = True
        assert torch.equal(active, want)
    for side, of_side in zip(sides, p, strict=True):
        lost = of_side * ~active
        mass_lost, entropy_lost = lost_mass(side, entries).double()
        assert torch.allclose(mass_lost, lost.sum(1), rtol=1e-4, atol=1e-6)
        want_entropy = torch.special.entr(lost).sum(1)
        assert torch.allclose(entropy_lost, want_entropy, rtol=1e-4, atol=1e-5)
        if rule.rule == "mass":
            assert bool((mass_lost <= rule.bound).all())
