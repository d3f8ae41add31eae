"""Strategy "auto": by the arguments alone, or by what earlier calls measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rosd_kernels import auto, entry, mass, span_divergence, span_logprob
from rosd_kernels.auto import MEASURE_EVERY, MIN_ROWS, Pending
from rosd_kernels.records import SpanStats
from rosd_kernels.sparsity import Sparsity
from rosd_kernels.vocabulary import Vocabulary

V = 4000


@pytest.fixture(autouse=True)
def no_memories(monkeypatch):
    monkeypatch.setattr(auto, "_memories", {})


@pytest.mark.parametrize("num_tokens", [0, 3, 200])
def test_it_is_chunked_where_a_chunk_fits(num_tokens):
    hidden, head, ids = torch.ones(num_tokens, 3), torch.ones(V, 3), torch.zeros(num_tokens).long()
    rows = min(MIN_ROWS, num_tokens)
    for call, sides in (
        (lambda **o: span_divergence(hidden, hidden, head, **o), 2),
        (lambda **o: span_logprob(hidden, head, ids, **o), 1),
    ):
        enough = sides * rows * V * 4 / 2**20
        for sparsity in ("exact", entry(1e-3), mass(0.1)):
            assert call(sparsity=sparsity).stats.strategy == "chunked"
            if num_tokens:
                call_with = {"sparsity": sparsity, "workspace_mib": enough}
                assert call(**call_with).stats.strategy == "chunked"
                call_with["workspace_mib"] = enough * 0.99
                want = "chunked" if sparsity == "exact" else "tiled"
                assert call(**call_with).stats.strategy == want
    assert auto._memories == {}  # equal calls give equal results, whatever came before


def test_top_k_is_chunked():
    hidden, head = torch.ones(2, 3), torch.ones(V, 3)
    call = {"top_k": 3, "sparsity": entry(1e-3), "workspace_mib": 1e-3}
    assert span_divergence(hidden, hidden, head, **call).stats.strategy == "chunked"


class Device:
    """Calls of one kind on a device that has Triton's kernels and times nothing."""

    def __init__(self, rule: Sparsity, function: str = "span_divergence") -> None:
        self.rule, self.function = rule, function

    def call(self, active_frac: float, num_tokens: int = 10) -> str:
        """The chosen strategy, which measures `active_frac` if it is "tiled"."""
        name, kind = auto.choose(
            self.function,
            self.rule,
            torch.ones(num_tokens, 3),
            (torch.ones(V, 3),),
            torch.float32,
            Vocabulary(V),
            256,
        )
        measured = torch.tensor([active_frac, 0.0, 0.0]) if name == "tiled" else None
        stats = SpanStats(strategy=name, workspace_bytes=0, measured=measured)
        auto.remember(kind, stats, num_tokens, auto.start_of(kind))
        return name

    @property
    def memory(self) -> Any:
        (memory,) = (m for kind, m in auto._memories.items() if self.rule.bound in kind.sizes)
        return memory


@pytest.fixture
def all_entries(monkeypatch):
    def uses_triton(like: Tensor, dtype: torch.dtype) -> bool:
        return True

    monkeypatch.setattr(auto, "uses_triton", uses_triton)


@pytest.mark.parametrize(
    ("function", "limit"), [("span_divergence", 1 / 3), ("span_logprob", 2 / 3)]
)
def test_without_times_the_active_fraction_decides(all_entries, function, limit):
    sharp, flat = Device(entry(1e-3), function), Device(entry(1e-5), function)
    assert [sharp.call(limit - 0.01) for _ in range(2 * MEASURE_EVERY)] == ["tiled"] * 128
    assert flat.call(limit + 0.01) == "tiled"  # another rule: nothing is measured yet
    got = [flat.call(limit + 0.01) for _ in range(2 * MEASURE_EVERY + 2)]
    assert got == (["chunked"] * MEASURE_EVERY + ["tiled"]) * 2
    assert flat.call(0.1) == "chunked"
    assert flat.call(0.1, num_tokens=0) == "chunked"  # and says nothing about f


def test_times_decide_and_the_other_strategy_is_tried_again(all_entries):
    device = Device(entry(1e-3))
    device.call(0.9)
    (kind,) = auto._memories
    auto._memories[kind._replace(is_timed=True)] = memory = auto._memories.pop(kind)
    memory.seconds |= {"tiled": 1.0, "chunked": 2.0}
    timed = kind._replace(is_timed=True)
    assert auto._measured_choice(timed) == "tiled"  # whatever f is
    memory.seconds["tiled"] = 3.0
    got = [auto._measured_choice(timed) for _ in range(MEASURE_EVERY + 1)]
    assert got == ["chunked"] * (MEASURE_EVERY - 1) + ["tiled", "chunked"]


def test_what_the_device_has_not_done_yet_is_not_waited_for(all_entries):
    device = Device(entry(1e-3))
    device.call(0.1)
    is_done = False

    def store() -> None:
        device.memory.active_frac = 0.9

    device.memory.pending.append(Pending(lambda: is_done, store))
    assert [device.call(0.1), device.call(0.1)] == ["tiled", "tiled"]
    assert len(device.memory.pending) == 1
    is_done = True
    assert device.call(0.1) == "chunked" and device.memory.pending == []
