"""The SGLang engine against a fake server that fails in every way a server is known to fail."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rosd_fast.engines.sglang.cache_stats import num_shareable
from rosd_fast.engines.sglang.client import Endpoint, message
from rosd_fast.engines.sglang.engine import SglangEngine
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.weight_folder import WeightFolder
from rosd_fast.engines.sglang.weight_sync import DiskSync
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.weight_stream import WholeWeights
from rosd_fast.types import Generation, GenerationRequest, SamplingParams
from tests.engines.sglang.fake_sglang import ENGINE, FakeSglang, expected_ids

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2)}
TRANSIENT = ["500", "502", "503", "reset", "truncated", "stale", "abort", "incomplete", "fewer"]


def make_request(index: int, *, n: int = 2, affinity: str = "", **params: Any) -> GenerationRequest:
    options = {"max_new_tokens": 8, "stop_token_ids": (3,)} | params
    return GenerationRequest(
        id=f"step1/p{index}",
        prompt_ids=tuple(range(1, 6 + index)),
        params=SamplingParams(**options),
        n=n,
        affinity=affinity,
    )


class Setting:
    """Fake servers and an engine that uses them."""

    def __init__(self, tmp_path: Path, fakes: Sequence[FakeSglang], **options: Any) -> None:
        model_folder = tmp_path / "model"
        model_folder.mkdir(exist_ok=True)
        (model_folder / "config.json").write_text("{}")
        (model_folder / "model.safetensors").write_text("old weights")
        self.notes: list[str] = []
        self.fakes = list(fakes)
        watch = {"health_every_s": 0.05, "health_timeout_s": 0.5}
        self.engine = SglangEngine(
            [ServerHandle(Endpoint(fake.url), name=fake.url, **watch) for fake in fakes],
            **ENGINE
            | {
                "sync": DiskSync(tmp_path / "weights", model_folder),
                "vocab_size": 50,
                "context_length": 64,
                "note": self.notes.append,
            }
            | options,
        )


def with_fakes(
    tmp_path: Path,
    test: Callable[[Setting], Coroutine[Any, Any, Any]],
    *fakes: FakeSglang,
    **options: Any,
) -> Any:
    """Run `test` with an engine that has loaded weights of version 0."""

    async def run() -> Any:
        for fake in fakes:
            await fake.__aenter__()
        setting = Setting(tmp_path, fakes, **options)
        try:
            await setting.engine.load_weights(WEIGHTS, version=0)
            return await asyncio.wait_for(test(setting), 30)
        finally:
            await setting.engine.close()
            for fake in fakes:
                await fake.__aexit__()

    return asyncio.run(run())


def assert_right(requests: Sequence[GenerationRequest], generations: list[Generation]) -> None:
    """Assert that all completions are there, in order, and belong to their prompts."""
    expected = [(request, index) for request in requests for index in range(request.n)]
    assert len(generations) == len(expected)
    for (request, index), generation in zip(expected, generations, strict=True):
        assert (generation.request_id, generation.index) == (request.id, index)
        assert generation.completion_ids == expected_ids(request.prompt_ids, index, 3)
        assert generation.logprobs == (-0.5 - index,) * 3
        assert generation.finish_reason == "stop"


def test_requests_and_answers(tmp_path: Path) -> None:
    requests = [
        make_request(0, n=3),
        make_request(1, n=1, temperature=0.0, top_k=4, top_p=0.9, max_new_tokens=500),
    ]

    async def test(setting: Setting) -> None:
        engine = setting.engine
        counted: list[int] = []
        assert_right(requests, await engine.generate(requests, on_tokens=counted.append))
        assert sorted(counted) == [3, 9]
        bodies = sorted(setting.fakes[0].bodies, key=lambda body: body["input_ids"])
        assert bodies[0]["sampling_params"] == {
            "n": 3,
            "max_new_tokens": 8,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "stop_token_ids": [3],
        }
        assert bodies[1]["sampling_params"]["top_k"] == 4
        assert bodies[1]["sampling_params"]["max_new_tokens"] == 64 - 6  # the rest of the context
        assert bodies[0]["return_logprob"] is True
        assert bodies[0]["rid"].endswith("/step1/p0#1")
        metrics = engine.take_metrics()
        assert metrics["rollout/cached_frac"] == pytest.approx(8 / 21)
        assert metrics["rollout/shareable_frac"] == pytest.approx((2 * 4 + 5) / 21)
        assert metrics["rollout/num_retries"] == 0
        assert "rollout/cached_frac" not in engine.take_metrics()

    with_fakes(tmp_path, test, FakeSglang())


def test_a_grammar_is_sent(tmp_path: Path) -> None:
    request = make_request(0)
    constrained = GenerationRequest(
        id="r", prompt_ids=request.prompt_ids, params=request.params, grammar='start: "a"'
    )

    async def test(setting: Setting) -> None:
        await setting.engine.generate([constrained])
        assert setting.fakes[0].bodies[0]["sampling_params"]["ebnf"] == 'start: "a"'

    with_fakes(tmp_path, test, FakeSglang())


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_lose_no_completion(tmp_path: Path, fault: str) -> None:
    requests = [make_request(index) for index in range(4)]

    async def test(setting: Setting) -> None:
        assert_right(requests, await setting.engine.generate(requests))
        assert setting.engine.take_metrics()["rollout/num_retries"] == 2
        assert len(setting.fakes[0].bodies) == 6

    with_fakes(tmp_path, test, FakeSglang(faults=(fault, "", fault)))


@pytest.mark.parametrize("fault", ["500", "reset", "incomplete"])
def test_repeated_failures_end_the_run(tmp_path: Path, fault: str) -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(RunFailed, match="failed 3 times in a row") as failed:
            await setting.engine.generate([make_request(0)])
        assert setting.fakes[0].url in str(failed.value) and "\n" not in str(failed.value)
        assert len(setting.fakes[0].bodies) == 3

    with_fakes(tmp_path, test, FakeSglang(faults=(fault,) * 9), max_failures=3)


def test_a_full_queue_is_retried(tmp_path: Path) -> None:
    """More often than `max_failures`, since a busy server does not count as a failure."""

    async def test(setting: Setting) -> None:
        requests = [make_request(0)]
        assert_right(requests, await setting.engine.generate(requests))
        assert not setting.notes

    with_fakes(tmp_path, test, FakeSglang(faults=("503",) * 3), max_failures=2)


def test_an_invalid_request_is_not_retried(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(ValueError, match=r"request step1/p0: .*400 \(queue full\)"):
            await setting.engine.generate([make_request(0)])
        assert len(setting.fakes[0].bodies) == 1

    with_fakes(tmp_path, test, FakeSglang(faults=("400", "400")))


@pytest.mark.parametrize("bad", [-1, 50])
def test_ids_outside_the_vocabulary_are_never_sent(tmp_path: Path, bad: int) -> None:
    good = make_request(0)
    wrong = GenerationRequest(id="wrong", prompt_ids=(1, bad), params=good.params)

    async def test(setting: Setting) -> None:
        with pytest.raises(ValueError, match=r"request wrong: a prompt id is outside \[0, 50\)"):
            await setting.engine.generate([good, wrong])
        assert not setting.fakes[0].bodies

    with_fakes(tmp_path, test, FakeSglang())


def test_completions_cut_by_a_small_cache_are_an_error(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(UserError, match=r"cut a completion at 3 of 8 .*--max-total-tokens"):
            await setting.engine.generate([make_request(0)])

    with_fakes(tmp_path, test, FakeSglang(faults=("short",)))


def test_a_log_probability_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(UserError, match=r"step1/p0.*logits are not finite"):
            await setting.engine.generate([make_request(0)])

    with_fakes(tmp_path, test, FakeSglang(faults=("not finite",)))


def test_all_requests_of_a_problem_go_to_one_server(tmp_path: Path) -> None:
    requests = [make_request(index, affinity=f"problem {index % 5}") for index in range(20)]

    async def test(setting: Setting) -> None:
        assert_right(requests, await setting.engine.generate(requests))
        homes: dict[str, set[int]] = {}
        affinity = {request.prompt_ids: request.affinity for request in requests}
        for index, fake in enumerate(setting.fakes):
            assert fake.bodies
            for body in fake.bodies:
                homes.setdefault(affinity[tuple(body["input_ids"])], set()).add(index)
        assert all(len(servers) == 1 for servers in homes.values())

    with_fakes(tmp_path, test, FakeSglang(), FakeSglang())


def test_another_server_takes_over(tmp_path: Path) -> None:
    requests = [make_request(index) for index in range(8)]

    async def test(setting: Setting) -> None:
        await setting.fakes[0].__aexit__()
        assert_right(requests, await setting.engine.generate(requests))
        await setting.engine.load_weights(WEIGHTS, version=1)
        assert_right(requests, await setting.engine.generate(requests))
        assert setting.fakes[1].loaded[-1].endswith("-1")
        assert any(setting.fakes[0].url in note for note in setting.notes)

    with_fakes(tmp_path, test, FakeSglang(), FakeSglang())


def test_a_server_that_hangs_is_left_out(tmp_path: Path) -> None:
    requests = [make_request(index) for index in range(8)]

    async def test(setting: Setting) -> None:
        assert_right(requests, await setting.engine.generate(requests))
        assert any("hangs" in note for note in setting.notes)

    with_fakes(tmp_path, test, FakeSglang(faults=("hang",) * 8), FakeSglang())


def test_weights_are_never_mixed(tmp_path: Path) -> None:
    """A server that fails to load new weights gets no request until it has loaded them."""
    requests = [make_request(index) for index in range(8)]

    async def test(setting: Setting) -> None:
        setting.fakes[0].refuse_weights = 1
        await setting.engine.load_weights(WEIGHTS, version=1)
        generations = await setting.engine.generate(requests)
        assert_right(requests, generations)
        assert {generation.policy_version for generation in generations} == {1}
        for fake in setting.fakes:
            assert fake.version == setting.engine.tag or not fake.bodies

    with_fakes(tmp_path, test, FakeSglang(), FakeSglang())


def test_a_server_that_lost_the_weights_gets_them_again(tmp_path: Path) -> None:
    requests = [make_request(0)]

    async def test(setting: Setting) -> None:
        setting.fakes[0].version = "default"  # as after a restart
        assert_right(requests, await setting.engine.generate(requests))
        assert len(setting.fakes[0].loaded) == 2

    with_fakes(tmp_path, test, FakeSglang())


def test_weights_that_no_server_loads_end_the_run(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        setting.fakes[0].refuse_weights = 9
        with pytest.raises(RunFailed, match=r"new weights: .*400 \(no such file\)"):
            await setting.engine.load_weights(WEIGHTS, version=1)

    with_fakes(tmp_path, test, FakeSglang())


def test_two_trainers_on_one_server_are_noticed(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        with pytest.raises(RunFailed, match="another trainer has loaded its weights"):
            await setting.engine.generate([make_request(0)])

    with_fakes(tmp_path, test, FakeSglang(faults=("foreign",)))


def test_weight_check_compares_server_and_trainer(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_check_ids": (1, 2, 3), "max_logprob_gap": 0.01}
    with_fakes(
        tmp_path, nothing, FakeSglang(), expected_logprobs=lambda ids: [-1.005] * 2, **options
    )
    with pytest.raises(RunFailed, match=r"log-probability -1\.0000 and the trainer -1\.2000"):
        with_fakes(
            tmp_path, nothing, FakeSglang(), expected_logprobs=lambda ids: [-1.0, -1.2], **options
        )
    with pytest.raises(RunFailed, match="max_logprob_gap"):
        with_fakes(
            tmp_path,
            nothing,
            FakeSglang(),
            expected_logprobs=lambda ids: [float("nan")] * 2,
            **options,
        )


async def nothing(_setting: Setting) -> None:
    """Do nothing beyond loading the weights."""


def test_a_colocated_server_releases_its_memory_while_the_learner_works(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        await setting.engine.release_memory()
        await setting.engine.load_weights(WEIGHTS, version=1)
        assert_right([make_request(0)], await setting.engine.generate([make_request(0)]))
        kinds = [name if name in ("release", "resume") else "load" for name in fake.loaded]
        assert kinds == ["load", "release", "resume", "load"]

    fake = FakeSglang()
    with_fakes(tmp_path, test, fake, colocated=True)


def test_completions_are_yielded_as_they_are_done(tmp_path: Path) -> None:
    requests = [make_request(index) for index in range(3)]

    async def test(setting: Setting) -> None:
        setting.fakes[0].delay_s = {"step1/p0": 0.6, "step1/p1": 0.0, "step1/p2": 0.3}
        seen = [done[0].request_id async for done in setting.engine.stream(requests)]
        assert seen == ["step1/p1", "step1/p2", "step1/p0"]

    with_fakes(tmp_path, test, FakeSglang())


def test_concurrency_is_limited(tmp_path: Path) -> None:
    requests = [make_request(index) for index in range(9)]

    async def test(setting: Setting) -> None:
        setting.fakes[0].delay_s = {request.id: 0.02 for request in requests}
        assert_right(requests, await setting.engine.generate(requests))
        assert setting.fakes[0].most_running == 2

    with_fakes(tmp_path, test, FakeSglang(), concurrency=2)


def test_new_weights_wait_for_requests_in_flight(tmp_path: Path) -> None:
    async def test(setting: Setting) -> None:
        setting.fakes[0].delay_s = {"step1/p0": 0.3}
        in_flight = asyncio.create_task(setting.engine.generate([make_request(0)]))
        await asyncio.sleep(0.1)
        await setting.engine.load_weights(WEIGHTS, version=1)
        assert in_flight.done()
        assert {item.policy_version for item in await in_flight} == {0}

    with_fakes(tmp_path, test, FakeSglang())


def test_new_weights_are_written_while_requests_run_and_a_restart_gets_the_old_ones(
    tmp_path: Path,
) -> None:
    """A server that lost its weights meanwhile loads the version that is sampled with."""
    fake = FakeSglang()

    async def test(setting: Setting) -> None:
        engine = setting.engine
        fake.delay_s = {"step1/p0": 0.6}
        in_flight = asyncio.create_task(engine.generate([make_request(0)]))
        await asyncio.sleep(0.1)
        loading = asyncio.create_task(engine.load_weights(WEIGHTS, version=1))
        while not (tmp_path / "weights" / "v000001").exists():
            await asyncio.sleep(0.01)
        assert not in_flight.done() and engine.policy_version == 0
        engine.servers[0].tag = None  # as after a restart
        [one, _] = await engine.generate([make_request(1)])
        assert one.policy_version == 0 and not loading.done()
        assert [Path(folder).name for folder in fake.folders] == ["v000000", "v000000"]
        await loading
        assert {item.policy_version for item in await in_flight} == {0}
        assert Path(fake.folders[-1]).name == "v000001" and engine.policy_version == 1
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["v000001"]

    with_fakes(tmp_path, test, fake)


def test_weight_folder_holds_the_complete_newest_version(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model-00001-of-00002.safetensors").write_text("old")
    (model / "model.safetensors.index.json").write_text("{}")
    folder = WeightFolder(tmp_path / "weights", model)
    tied = torch.rand(3, 2)
    weights = {"embed": tied, "head": tied, "part": torch.rand(4, 4)[:, 1]}
    first = folder.write(WholeWeights(weights), 1)
    second = folder.write(WholeWeights(weights), 2)
    assert sorted(path.name for path in second.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_file(second / "model.safetensors")
    assert set(loaded) == {"embed", "part"}
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)
    (folder.folder / ".tmp-v000000-killed").mkdir()
    folder.drop_all_but(2)
    assert list(folder.folder.iterdir()) == [second] and not first.exists()
    folder.drop_all_but(None)
    assert not list(folder.folder.iterdir())


def test_a_full_disk_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = WeightFolder(tmp_path / "weights", tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written .*engine\.sync_folder"):
            folder.write(WholeWeights({"big": torch.zeros(4096)}), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(folder.folder.iterdir())


def test_a_folder_that_cannot_be_written_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("")
    folder = WeightFolder(tmp_path / "file" / "weights", tmp_path / "model")
    with pytest.raises(UserError, match=r"cannot be written .*engine\.sync_folder"):
        folder.write(WholeWeights(WEIGHTS), 1)


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8)


@given(PROMPTS)
def test_shareable_tokens_are_those_a_prefix_tree_saves(prompts: list[list[int]]) -> None:
    nodes = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    saved = sum(map(len, prompts)) - len(nodes)
    # Except for the last token of a prompt that is a prefix of another.
    ordered = sorted(map(tuple, prompts))
    whole = sum(a[: len(b)] == b for a, b in pairwise(ordered))
    assert num_shareable(prompts) == saved - whole


@pytest.mark.parametrize(
    "body",
    ['{"error": {"message": "bad id"}}', '{"error": "bad id"}', '{"message": "bad id"}', "bad id"],
)
def test_each_shape_of_error_is_read(body: str) -> None:
    assert message(body.encode()) == "bad id"
