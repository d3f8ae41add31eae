"""A teacher on a server that fails, and a server with the wrong model or options."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_fast.batch.packing import pack
from rosd_fast.config import Config
from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.engines.sglang.client import Endpoint
from rosd_fast.engines.sglang.pool import ServerHandle
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.engines.weight_check import check_teacher_server
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.layouts import hidden_states
from rosd_fast.model.load import load_model
from rosd_fast.pipeline import sample_and_annotate
from rosd_fast.run import open_run
from rosd_fast.train import start, train_on
from rosd_fast.trainer.learner import Learner
from rosd_fast.types import PackedSequences, TrainSample
from tests.engines.sglang.fake_sglang import LIMITS, FakeSglang, expected_states
from tests.teacher_folder import save_teacher

SAMPLES = [
    TrainSample(
        rollout_id=f"p{index // 2}/{index % 2}",
        problem_id=f"p{index // 2}",
        student_prompt_ids=(7, 8),
        teacher_prompt_ids=tuple(range(3, 6 + index)),
        completion_ids=tuple(range(20, 26 + index)),
        logprobs=(-1.0,) * (6 + index),
        start=index % 3,
        end=6,
    )
    for index in range(6)
]


def with_teacher(
    test: Callable[[SglangTeacher, list[str]], Coroutine[Any, Any, Any]],
    *fakes: FakeSglang,
    **options: Any,
) -> Any:
    async def run() -> Any:
        for fake in fakes:
            await fake.__aenter__()
        notes: list[str] = []
        watch = {"health_every_s": 0.05, "health_timeout_s": 0.5}
        teacher = SglangTeacher(
            [ServerHandle(Endpoint(fake.url), name=fake.url, **watch) for fake in fakes],
            **LIMITS | {"hidden_size": 5, "note": notes.append, "max_failures": 3} | options,
        )
        try:
            return await asyncio.wait_for(test(teacher, notes), 30)
        finally:
            await teacher.close()
            for fake in fakes:
                await fake.__aexit__()

    return asyncio.run(run())


def expected(batches: list[Any]) -> list[torch.Tensor]:
    """The states of each sample's sequence at the positions before its distilled tokens."""
    by_id = {sample.rollout_id: sample for sample in SAMPLES}
    states = []
    for batch in batches:
        batch_states = []
        for rollout_id in batch.rollout_ids:
            sample = by_id[rollout_id]
            assert sample.teacher_prompt_ids is not None
            ids = [*sample.teacher_prompt_ids, *sample.completion_ids]
            before = len(sample.teacher_prompt_ids) - 1
            batch_states += expected_states(ids)[before + sample.start : before + sample.end]
        states.append(torch.tensor(batch_states))
    return states


@pytest.mark.parametrize("max_tokens", [1, 60, 1000])
def test_states_are_those_of_the_distilled_tokens(max_tokens: int) -> None:
    batches = pack(SAMPLES, max_tokens=max_tokens)
    fakes = FakeSglang(), FakeSglang()
    states = with_teacher(lambda teacher, _: teacher.states(batches), *fakes)
    assert [len(received) for received in states] == [batch.num_distilled for batch in batches]
    for received, wanted in zip(states, expected(batches), strict=True):
        assert torch.equal(received, wanted)
    bodies = [body for fake in fakes for body in fake.bodies]
    assert len(bodies) == len(SAMPLES)
    for fake in fakes:  # the samples of a problem share a server
        prompts = {len(body["input_ids"]) for body in fake.bodies}
        assert all((first in prompts) == (first + 1 in prompts) for first in (8, 10, 12))


@pytest.mark.parametrize(
    "fault", ["500", "503", "reset", "truncated", "abort", "chunked", "stateless"]
)
def test_transient_faults_are_retried(fault: str) -> None:
    batches = pack(SAMPLES, max_tokens=60)
    fake = FakeSglang(faults=("", fault, fault))
    states = with_teacher(lambda teacher, _: teacher.states(batches), fake)
    assert all(torch.equal(a, b) for a, b in zip(states, expected(batches), strict=True))
    assert len(fake.bodies) == len(SAMPLES) + 2


def test_another_server_takes_over() -> None:
    batches = pack(SAMPLES, max_tokens=60)
    fakes = FakeSglang(faults=("reset",) * 50), FakeSglang()
    states = with_teacher(lambda teacher, _: teacher.states(batches), *fakes)
    assert all(torch.equal(a, b) for a, b in zip(states, expected(batches), strict=True))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("chunked", RunFailed, "states for .* --chunked-prefill-size -1"),
        ("stateless", RunFailed, "--return-hidden-states-mode full"),
        ("narrow", RunFailed, "not 5 wide: the server runs another model"),
        ("foreign", RunFailed, "weights have changed, from default to 0badcafe-7"),
        ("not finite", UserError, "states are not finite"),
        ("400", RunFailed, "refuses a sequence of 9 tokens .*teacher.max_prompt_tokens"),
        ("500", RunFailed, "scoring 9 tokens failed 3 times in a row"),
    ],
)
def test_lasting_faults_end_the_run(fault: str, error: type, words: str) -> None:
    async def test(teacher: SglangTeacher, _: list[str]) -> None:
        await teacher.score([1, 2, 3, 4], first=2)
        fake.faults.extend([fault] * 3)
        with pytest.raises(error, match=words):
            await teacher.score(list(range(9)), first=5)

    fake = FakeSglang()
    with_teacher(test, fake)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.data())
def test_any_first_token(ids: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(ids) - 1))
    states = with_teacher(lambda teacher, _: teacher.score(ids, first=first), FakeSglang())
    assert states.tolist() == expected_states(ids)[first:]


def learner_of(model: Any, **teacher: Any) -> Learner:
    return Learner(model, Config.model_validate({"teacher": teacher}))


def states_of(model: Any, ids: list[int]) -> list[list[float]]:
    packed = PackedSequences(
        input_ids=torch.tensor(ids),
        position_ids=torch.arange(len(ids)),
        cu_seqlens=(0, len(ids)),
        gather=torch.arange(len(ids)),
    )
    with torch.no_grad():
        return hidden_states(model, packed).tolist()


def test_a_step_equals_that_with_a_teacher_in_the_process(tiny_llama: Callable[..., Any]) -> None:
    """Also after the student has changed and only the teacher's head is left in the trainer."""
    start = tiny_llama()
    batches = pack(SAMPLES, max_tokens=60)
    near, far = learner_of(tiny_llama()), learner_of(tiny_llama(), backend="sglang")
    far.teacher.discard_model()
    assert far.teacher.model is far.model
    assert not any(name.startswith("teacher.") for name in far.state_dict())
    fake = FakeSglang()
    fake.states = lambda ids: states_of(start, ids)
    for _ in range(3):
        size = start.config.hidden_size
        states = with_teacher(lambda teacher, _: teacher.states(batches), fake, hidden_size=size)
        one, other = near.step(batches), far.step(batches, states)
        assert one.metrics.keys() == other.metrics.keys()
        for name, value in one.metrics.items():
            assert other.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    far.load_state_dict(far.state_dict())


def test_a_separate_teacher_of_another_width(tiny_llama: Callable[..., Any]) -> None:
    """Its head alone is left in the trainer, with more vocabulary rows than the student has."""
    rows = tiny_llama().config.vocab_size + 8
    options = Config.model_validate({"teacher": {"backend": "sglang", "model": "other"}})

    def other() -> Any:
        return tiny_llama(seed=1, hidden_size=48, num_hidden_layers=3, vocab_size=rows)

    near = Learner(tiny_llama(), options, teacher=other())
    far = Learner(tiny_llama(), options, teacher=other())
    far.teacher.discard_model()
    assert far.teacher.model is far.model
    fake, served = FakeSglang(), other()
    fake.states = lambda ids: states_of(served, ids)
    batches = pack(SAMPLES, max_tokens=60)
    for _ in range(3):
        states = with_teacher(lambda teacher, _: teacher.states(batches), fake, hidden_size=48)
        one, other_result = near.step(batches), far.step(batches, states)
        assert one.metrics["loss/divergence"] > 0
        for name, value in one.metrics.items():
            assert other_result.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("wrong", [False, True], ids=["right model", "wrong model"])
def test_a_run_compares_the_server_with_the_separate_teacher(tmp_path: Path, wrong: bool) -> None:
    """Then nothing but its head is left of it in the trainer."""
    folder = save_teacher(tmp_path / "teacher", rows=16)
    served = load_model(
        save_teacher(tmp_path / "served", rows=16, seed=2) if wrong else folder,
        dtype="float32",
        device=torch.device("cpu"),
    ).model

    async def run_with(fake: FakeSglang) -> None:
        fake.states = lambda ids: states_of(served, ids)
        options = {
            "method": "opd",
            "steps": 1,
            "out": str(tmp_path),
            "name": "run",
            "data.dev": None,
            "data.dev_ood": None,
            "sample.problems_per_step": 2,
            "sample.group_size": 2,
            "teacher.model": folder,
            "teacher.backend": "sglang",
            "teacher.url": fake.url,
        }
        with open_run(apply_args(load_preset("quickstart"), options)) as run:
            loaded = run.teacher
            assert loaded is not None and loaded.hidden_size == 48
            left = weakref.ref(loaded.model)
            del loaded
            async with run.open_engines() as engines:
                await start(run, engines)
                gc.collect()
                assert run.teacher is None and left() is None
                sampled = await sample_and_annotate(run.inputs, engines, 1, run.progress)
                assert (await train_on(run, engines, 1, sampled))["loss/divergence"] > 0

    async def test() -> None:
        async with FakeSglang() as fake:
            await run_with(fake)

    if wrong:
        with pytest.raises(RunFailed, match=r"does the server run the model that teacher.model"):
            asyncio.run(test())
    else:
        asyncio.run(test())


def test_a_server_with_another_model_is_noticed(tiny_llama: Callable[..., Any]) -> None:
    model, other = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    teacher = learner_of(model, backend="sglang").teacher
    size = model.config.hidden_size
    ids = list(range(5, 30))

    def check(served: Any, max_gap: float) -> None:
        fake = FakeSglang()
        fake.states = lambda ids: states_of(served, ids)
        with_teacher(
            lambda server, _: check_teacher_server(server, teacher.model, ids, max_gap=max_gap),
            fake,
            hidden_size=size,
        )

    check(model, 1e-4)
    with pytest.raises(
        RunFailed, match=r"log-probability -?\d.* more than teacher.max_logprob_gap"
    ):
        check(other, 1e-4)
    check(other, 100.0)
