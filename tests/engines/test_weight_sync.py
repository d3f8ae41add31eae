"""Weights by broadcast, to stand-ins that join a real process group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rosd_fast.engines.fleet import Member
from rosd_fast.engines.http import Endpoint, Unreachable
from rosd_fast.engines.sglang import SglangEngine
from rosd_fast.engines.weight_sync import DistributedSync, buckets
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.types import GenerationRequest, SamplingParams
from tests.engines.fake_sglang import ENGINE, WATCH, FakeSglang


def make_weights(version: int) -> dict[str, Tensor]:
    """Of several types, with odd sizes, a tied pair, a scalar and an empty one."""
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


def with_members(
    test: Callable[[DistributedSync, list[Member]], Coroutine[Any, Any, None]],
    *fakes: FakeSglang,
    bucket_bytes: int = 64,
) -> None:
    async def run() -> None:
        for fake in fakes:
            await fake.__aenter__()
        members = [Member(Endpoint(fake.url), name=fake.url, **WATCH) for fake in fakes]
        sync = DistributedSync(bucket_bytes=bucket_bytes)
        try:
            await asyncio.wait_for(test(sync, members), 60)
        finally:
            await sync.close()
            for member in members:
                await member.close()
            for fake in fakes:
                await fake.__aexit__()

    asyncio.run(run())


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
def test_every_tensor_arrives(bucket_bytes: int) -> None:
    fakes = FakeSglang(), FakeSglang()

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        for version in (0, 1):
            weights = make_weights(version)
            sync.keep(weights, version)
            kept = {name: tensor.clone() for name, tensor in weights.items()}
            weights["embed"].zero_()  # the learner goes on
            await asyncio.gather(*(sync.hand_over(m, f"run-{version}") for m in members))
            for fake in fakes:
                assert_received(fake, kept, f"run-{version}")
                assert set(fake.loaded) <= {f"run-{v}{end}" for v in (0, 1) for end in PARTS}

    with_members(test, *fakes, bucket_bytes=bucket_bytes)
    assert all(fake.num_joins == 1 and not fake.joins for fake in fakes)  # and was left
    assert (fakes[0].num_pieces == 2) == (bucket_bytes == 2**20)


PARTS = ("", "-partial")


def test_a_server_that_was_started_again_is_joined_anew() -> None:
    fake = FakeSglang()

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        for version in (0, 1, 2):
            weights = make_weights(version)
            sync.keep(weights, version)
            if version:
                fake.break_at, fake.updating = "lost", version == 2
            await sync.hand_over(members[0], f"run-{version}")
            assert_received(fake, weights, f"run-{version}")

    with_members(test, fake)


def test_a_broken_hand_over_leaves_no_version_and_the_next_one_works() -> None:
    fake = FakeSglang()

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        weights = make_weights(0)
        sync.keep(weights, 0)
        for fault in ("refuse", "fail"):
            fake.break_at = fault
            with pytest.raises(Unreachable, match="did not take the weights"):
                await sync.hand_over(members[0], "run-0")
            assert fake.version in ("default", "run-0-partial") and fake.updating
        await sync.hand_over(members[0], "run-0")
        assert_received(fake, weights, "run-0")

    with_members(test, fake)


def test_a_server_that_does_not_join() -> None:
    fake = FakeSglang()
    fake.refuse_joins = True

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        sync.keep(make_weights(0), 0)
        with pytest.raises(Unreachable, match=r"did not join .*no such backend"):
            await sync.hand_over(members[0], "run-0")

    with_members(test, fake)


def test_data_parallel_servers_are_refused() -> None:
    fake = FakeSglang()
    fake.dp_size = 2

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        sync.keep(make_weights(0), 0)
        with pytest.raises(RunFailed, match=r"dp_size 2; set engine\.sync = disk"):
            await sync.hand_over(members[0], "run-0")

    with_members(test, fake)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    async def test(sync: DistributedSync, members: list[Member]) -> None:
        sync.host = host
        sync.keep(make_weights(0), 0)
        with pytest.raises(UserError, match=r"engine\.sync_host: .* is no address of this machine"):
            await sync.hand_over(members[0], "run-0")

    with_members(test, FakeSglang())


def test_the_engine_samples_with_them() -> None:
    """Also when the last server standing had lost the group in between."""
    fake = FakeSglang()
    request = GenerationRequest(
        id="a", prompt_ids=(1, 2), params=SamplingParams(max_new_tokens=8, stop_token_ids=(3,))
    )

    async def test(sync: DistributedSync, members: list[Member]) -> None:
        options: dict[str, Any] = ENGINE | {"note": notes.append}
        engine = SglangEngine(members, sync=sync, vocab_size=50, context_length=64, **options)
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
    with_members(test, fake)
    assert not notes


@given(
    st.lists(st.integers(0, 40), max_size=30),
    st.integers(1, 60),
)
def test_buckets_hold_everything_in_order_and_within_the_limit(
    sizes: list[int], limit: int
) -> None:
    weights = [(str(i), torch.empty(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    found = buckets(weights, limit)
    assert [item for bucket in found for item in bucket] == weights
    for bucket in found:
        assert bucket and (len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= limit)
