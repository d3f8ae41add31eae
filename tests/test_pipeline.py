"""Streamed and behind a barrier: the same rollouts and reflections, in another order of events."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config.load import apply_args, load_preset
from rosd_fast.data.stream import ProblemStream
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.inputs import load_inputs
from rosd_fast.pipeline import Sampled, sample_and_annotate
from rosd_fast.report.progress import Hidden
from rosd_fast.types import Generation, GenerationRequest
from rosd_fast.verify import Limits, VerifierPool


class StreamingEngine(LocalEngine):
    """Gives each request's completions at once, the last request's first, and keeps a diary."""

    streams = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.diary: list[str] = []
        self.fail_at = ""
        self.asked: Callable[[list[str]], None] = lambda diary: None

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        for request in requests:
            self.diary.append(request.id)
            self.asked(self.diary)
            if self.fail_at and self.fail_at in request.id:
                raise UserError("is not wanted", where=request.id)
        return await super().generate(requests, on_tokens=on_tokens)

    async def stream(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> AsyncIterator[list[Generation]]:
        for request in reversed(requests):
            yield await self.generate([request], on_tokens=on_tokens)
            await asyncio.sleep(0)  # lets reflections be asked for


def sampled(
    tmp_path: Path,
    pipeline: str,
    fail_at: str = "",
    stuck: str = "",
    asked: Callable[[list[str]], None] = lambda diary: None,
) -> Any:
    """What a step sampled, and the engine's diary.

    stuck: the verifier of the problem whose rollouts are sampled first; asked: see the engine.
    """
    options = {
        "steps": 1,
        "out": str(tmp_path),
        "name": pipeline,
        "sample.problems_per_step": 4,
        "sample.group_size": 4,
        "data.dev": None,
        "data.dev_ood": None,
        # The validator lets `pipeline` be; only an engine that streams looks at it.
        "engine.pipeline": pipeline,
    }
    inputs = load_inputs(apply_args(load_preset("quickstart"), options))
    engine = StreamingEngine(inputs.model.model, tokenizer=inputs.model.tokenizer)
    engine.fail_at, engine.asked = fail_at, asked
    if stuck:
        *problems, first = inputs.stream.batch(1)
        problems.append(dataclasses.replace(first, verifier=stuck))
        stream = ProblemStream(problems, batch_size=4, seed=0, shuffle=False)
        inputs = dataclasses.replace(inputs, stream=stream)
    engines = Engines(student=engine, verifiers=VerifierPool(Limits(timeout_s=60)))
    found = asyncio.run(sample_and_annotate(inputs, engines, 1, Hidden()))
    return found, engine.diary


def test_both_pipelines_give_the_same(tmp_path: Path) -> None:
    streamed, diary = sampled(tmp_path, "streamed")
    barrier, barrier_diary = sampled(tmp_path, "barrier")
    assert isinstance(streamed, Sampled) and isinstance(barrier, Sampled)
    assert streamed.annotations and streamed.annotations == barrier.annotations
    assert streamed.selection == barrier.selection and streamed.verdicts == barrier.verdicts
    for ours, theirs in zip(streamed.groups, barrier.groups, strict=True):
        assert ours.problem == theirs.problem
        assert [r.completion_ids for r in ours.rollouts] == [
            r.completion_ids for r in theirs.rollouts
        ]
    assert sorted(diary) == sorted(barrier_diary)
    assert first_reflection(barrier_diary) == 4
    assert first_reflection(diary) < 4  # while others still sample


def first_reflection(diary: list[str]) -> int:
    return next(place for place, name in enumerate(diary) if "/reflect/" in name)


STUCK = """
import os, time
from rosd_fast.verify.number import verify_number

def score(completion, answer):
    found = verify_number(completion, answer)
    while os.path.exists({gate!r}):
        time.sleep(0.01)
    return found
"""


def test_a_verifier_that_hangs_delays_its_own_group_only(tmp_path: Path) -> None:
    """It hangs until the other groups' reflections are asked for, or times out."""
    free, _ = sampled(tmp_path, "streamed")
    gate, file = tmp_path / "gate", tmp_path / "stuck.py"
    gate.touch()
    file.write_text(STUCK.format(gate=str(gate)))
    others = {group.problem.id for group in free.groups[:-1]}
    wanted = {name for name in free.annotations if name.rpartition("/")[0] in others}
    assert wanted and len(wanted) < len(free.annotations)

    def asked(diary: list[str]) -> None:
        if wanted <= {name.partition("/reflect/")[2] for name in diary}:
            gate.unlink(missing_ok=True)

    found, diary = sampled(tmp_path, "streamed", stuck=f"{file}:score", asked=asked)
    assert not gate.exists()
    assert found.verdicts == free.verdicts and found.annotations == free.annotations
    last = {name.partition("/reflect/")[2] for name in diary if "/reflect/" in name} - wanted
    assert last == set(free.annotations) - wanted


def test_an_error_in_a_reflection_is_the_one_that_is_seen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step1/reflect/.* is not wanted"):
        sampled(tmp_path, "streamed", fail_at="/reflect/")
