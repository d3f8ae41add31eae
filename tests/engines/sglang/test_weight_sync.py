"""Weights by broadcast, to fake servers that join a real process group."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rosd_fast.engines.sglang.broadcast_sync import DistributedSync, buckets
from rosd_fast.engines.sglang.client import Endpoint, Unreachable
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.weight_stream import WeightStream, WholeWeights
from rosd_fast.types import GenerationRequest, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, WATCH, FakeSglang


def make_weights(version: int) -> dict[str, Tensor]:
    """Weights of several types and odd sizes, with a tied pair, a scalar and an empty tensor."""
    tied = torch.full((3, 2), float(version))
    return {
        "half": torch.arange(5).to(torch.bfloat16) + version,
        "embed": tied,
        "head": tied,
        "bytes": torch.arange(3, dtype=torch.uint8),
        "part": torch.rand(4, 4)[:, 1],
        "scalar": torch.tensor(7.5),
        "none": torch.empty(0, 4),
        "long": torch.arange(300.0),
    }


def assert_received(fake: FakeSglang, weights: dict[str, Tensor], tag: str) -> None:
    assert fake.version == tag and not fake.updating
    assert set(fake.tensors) == set(weights) - {"head"}
    for name, tensor in fake.tensors.items():
        assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


def with_servers(
    test: Callable[[DistributedSync, list[ServerHandle]], Coroutine[Any, Any, None]],
    *fakes: FakeSglang,
    bucket_bytes: int = 64,
) -> None:
    async def run() -> None:
        for fake in fakes:
            await fake.__aenter__()
        servers = [ServerHandle(Endpoint(fake.url), name=fake.url, **WATCH) for fake in fakes]
        sync = DistributedSync(bucket_bytes=bucket_bytes)
        try:
            await asyncio.wait_for(test(sync, servers), 60)
        finally:
            await sync.close()
            for handle in servers:
                await handle.close()
            for fake in fakes:
                await fake.__aexit__()

    asyncio.run(run())


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_every_tensor_arrives(bucket_bytes: int) -> None:
    fakes = FakeSglang(), FakeSglang()

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        for version in (0, 1):
            weights = make_weights(version)
            sync.stage(WholeWeights(weights), version)
            copies = {name: tensor.clone() for name, tensor in weights.items()}
            weights["embed"].zero_()  # as the learner does
            await asyncio.gather(
                *(sync.push(handle, f"run-{version}", version) for handle in servers)
            )
            for fake in fakes:
                assert_received(fake, copies, f"run-{version}")
                assert set(fake.loaded) <= {f"run-{v}{end}" for v in (0, 1) for end in PARTS}

    with_servers(test, *fakes, bucket_bytes=bucket_bytes)
    assert all(fake.num_joins == 1 and not fake.joins for fake in fakes)  # and left the group
    assert (fakes[0].num_buckets == 2) == (bucket_bytes == 2**20)


PARTS = ("", "-partial")


def test_a_restarted_server_is_joined_again() -> None:
    fake = FakeSglang()

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        for version in (0, 1, 2):
            weights = make_weights(version)
            sync.stage(WholeWeights(weights), version)
            if version:
                fake.break_at, fake.updating = "lost", version == 2
            await sync.push(servers[0], f"run-{version}", version)
            assert_received(fake, weights, f"run-{version}")

    with_servers(test, fake)


def test_an_interrupted_update_leaves_no_version_and_the_next_one_works() -> None:
    fake = FakeSglang()

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        weights = make_weights(0)
        sync.stage(WholeWeights(weights), 0)
        for fault in ("refuse", "fail"):
            fake.break_at = fault
            with pytest.raises(Unreachable, match="did not take the weights"):
                await sync.push(servers[0], "run-0", 0)
            assert fake.version in ("default", "run-0-partial") and fake.updating
        await sync.push(servers[0], "run-0", 0)
        assert_received(fake, weights, "run-0")

    with_servers(test, fake)


def test_a_server_that_refuses_to_join_is_an_error() -> None:
    fake = FakeSglang()
    fake.refuse_joins = True

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        sync.stage(WholeWeights(make_weights(0)), 0)
        with pytest.raises(Unreachable, match=r"did not join .*no such backend"):
            await sync.push(servers[0], "run-0", 0)

    with_servers(test, fake)


def test_data_parallel_servers_are_refused() -> None:
    fake = FakeSglang()
    fake.dp_size = 2

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        sync.stage(WholeWeights(make_weights(0)), 0)
        with pytest.raises(RunFailed, match=r"dp_size 2; set engine\.sync = disk"):
            await sync.push(servers[0], "run-0", 0)

    with_servers(test, fake)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        sync.host = host
        sync.stage(WholeWeights(make_weights(0)), 0)
        with pytest.raises(
            UserError, match=r"engine\.sync_host: .* is not an address of this machine"
        ):
            await sync.push(servers[0], "run-0", 0)

    with_servers(test, FakeSglang())


def test_the_engine_samples_with_broadcast_weights() -> None:
    """Also when the only server has lost the process group in between."""
    fake = FakeSglang()
    request = GenerationRequest(
        id="a", prompt_ids=(1, 2), params=SamplingParams(max_new_tokens=8, stop_token_ids=(3,))
    )

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        options: dict[str, Any] = ENGINE | {"note": notes.append}
        engine = SglangEngine(servers, sync=sync, vocab_size=50, context_length=64, **options)
        for version in (0, 1):
            await engine.load_weights(make_weights(version), version=version)
            assert_received(
                fake, make_weights(version) | {"part": fake.tensors["part"]}, engine.tag
            )
            [generation] = await engine.generate([request])
            assert generation.policy_version == version
            fake.break_at = "lost"
        await engine.close()

    notes: list[str] = []
    with_servers(test, fake)
    assert not notes


class Counted(WeightStream):
    """Weights in buckets of two tensors; counts its passes and the buckets that were asked for."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._whole = WholeWeights(weights)
        self.specs, self.on_gpu = self._whole.specs, False
        self.passes = self.asked = 0

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        items = list(self._whole.whole().items())
        for start in range(0, len(items), 2):
            self.asked += 1
            yield dict(items[start : start + 2])

    def held(self) -> WeightStream:
        return self


def test_servers_that_wait_share_a_pass() -> None:
    """Three servers get the weights in at most two passes, of which one fails in the middle."""
    fakes = FakeSglang(), FakeSglang(), FakeSglang()
    fakes[1].break_at = "fail"
    weights = make_weights(0)
    stream = Counted(weights)

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        sync.stage(stream, 0)
        pushes = [sync.push(handle, "run-0", 0) for handle in servers]
        results = await asyncio.gather(*pushes, return_exceptions=True)
        assert [isinstance(result, Unreachable) for result in results] == [False, True, False]
        for fake in (fakes[0], fakes[2]):
            assert_received(fake, weights, "run-0")
        assert stream.passes <= 2
        before = stream.passes
        await sync.push(servers[1], "run-0", 0)
        assert_received(fakes[1], weights, "run-0")
        assert stream.passes == before + 1

    with_servers(test, *fakes)


def test_versions_are_kept_until_they_are_stale() -> None:
    """While a new version is staged, a server can still get the one before."""
    fake = FakeSglang()

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        old, new = make_weights(0), make_weights(1)
        sync.stage(WholeWeights(old), 0)
        sync.stage(WholeWeights(new), 1)
        await sync.push(servers[0], "run-0", 0)
        assert_received(fake, old, "run-0")
        await sync.push(servers[0], "run-1", 1)
        assert_received(fake, new, "run-1")
        sync.discard_stale()
        assert list(sync._staged) == [1]

    with_servers(test, fake)


def test_a_source_that_fails_ends_the_run_and_no_thread_is_left() -> None:
    class Broken(Counted):
        def buckets(self) -> Iterator[dict[str, Tensor]]:
            yield from list(super().buckets())[:1]
            raise ValueError("no more shards")

    async def test(sync: DistributedSync, servers: list[ServerHandle]) -> None:
        sync.stage(Broken(make_weights(0)), 0)
        with pytest.raises(ValueError, match="no more shards"):
            await sync.push(servers[0], "run-0", 0)

    with_servers(test, FakeSglang())
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(1, 60),
)
def test_buckets_hold_everything_in_order_and_within_the_limit(
    sizes: list[int], limit: int
) -> None:
    weights = [(str(i), torch.empty(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    parts = buckets(weights, limit)
    assert [item for bucket in parts for item in bucket] == weights
    for bucket in parts:
        assert bucket and (len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= limit)
