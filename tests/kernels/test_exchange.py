"""Numbers of ranks that are read once: with the reads of device memory counted."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from rosd_kernels import exchange, span_divergence, span_logprob
from rosd_kernels.sparsity import measured
from rosd_kernels.vocabulary import Vocabulary

READS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal")
SENT = "aten::lift_fresh"  # of torch.tensor and new_tensor: numbers that are copied to a device


class Reads(TorchDispatchMode):
    """Counts the operators that give the host a value, or those that `names` are."""

    def __init__(self, names: tuple[str, ...] = READS) -> None:
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in self.names
        return func(*args, **(kwargs or {}))


@pytest.fixture
def group(tmp_path):
    """A group of one rank, on a device that is treated as one whose memory the host waits for."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path}/rendezvous",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=30),
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def remembers(monkeypatch):
    monkeypatch.setattr(exchange, "HOST_DEVICES", ())


def counted(call) -> int:
    with Reads() as reads:
        call()
    return reads.count


def test_a_host_device_is_always_read(group):
    assert [counted(lambda: Vocabulary(7, group)) for _ in range(3)] == [1, 1, 1]


def test_sizes_are_read_once_per_group_size_and_head(group, remembers):
    def sizes(size: int, address: int) -> int:
        vocabulary = None

        def call():
            nonlocal vocabulary
            vocabulary = Vocabulary(size, group, torch.device("cpu"), address)

        count = counted(call)
        assert vocabulary is not None
        assert (vocabulary.size, vocabulary.largest, vocabulary.offset) == (size, size, 0)
        return count

    assert [sizes(*head) for head in ((7, 0), (7, 0), (8, 0), (7, 0), (7, 64))] == [1, 0, 1, 0, 1]


def test_changed_peers_are_found_on_the_device(group, remembers, monkeypatch):
    cpu = torch.device("cpu")
    assert exchange.exchanged((5, 2), group, cpu, 0) == [(5, 2)]

    def of_others(parts, sent, group):
        for part in parts:
            part.copy_(sent + 1)

    monkeypatch.setattr(dist, "all_gather", of_others)
    with pytest.raises(RuntimeError, match="another rank's head has changed"):
        exchange.exchanged((5, 2), group, cpu, 0)


def test_few_exchanges_are_remembered(group, remembers):
    cpu = torch.device("cpu")
    for address in range(3 * exchange.MOST_KNOWN):
        exchange.exchanged((1,), group, cpu, address)
    assert len(exchange._KNOWN[group]) == exchange.MOST_KNOWN


@pytest.mark.parametrize("function", [span_divergence, span_logprob])
def test_a_second_call_with_a_group_reads_nothing_more(group, remembers, function):
    """`chunked`: what it reads on a CPU is the range of the ids and the loss's factor."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator)
    head = torch.randn(9, 4, generator=generator).requires_grad_()
    ids = torch.arange(6)

    def call(vocab_group):
        options = {"token_ids": ids, "strategy": "chunked", "vocab_group": vocab_group}
        if function is span_divergence:
            return function(hidden, hidden.flip(0), head, **options)
        return function(hidden, head, **options)

    alone = counted(lambda: call(None))
    first, second, third = (counted(lambda: call(group)) for _ in range(3))
    assert first > second == third == alone


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_what_was_dropped_is_measured_without_a_copy_of_numbers(num_tokens):
    active, rows = torch.ones(1, 3, dtype=torch.uint8), torch.arange(float(num_tokens))
    with Reads((*READS, SENT)) as reads:
        found = measured(active, rows, 2 * rows, Vocabulary(300))
    assert reads.count == 0
    assert found.tolist() == ([1.0, 4.0, 8.0] if num_tokens else [1.0, 0.0, 0.0])
    with Reads((*READS, SENT)) as reads:
        rows.new_tensor([1.0])
    assert reads.count == 1
