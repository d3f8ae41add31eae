"""The measurement of whether reflections help, on known answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rosd_fast.reflection.probe import probe_metrics, teacher_helps, wrong_samples
from rosd_fast.types import Generation, SamplingParams, TrainSample
from rosd_fast.verify import VerifierPool


class Answers:
    """An engine with a fixed text per rollout id."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, texts

    async def generate(self, requests, *, on_tokens=None):
        assert [request.prompt_ids for request in requests] == [(3, 4)] * len(requests)
        found = []
        for request in requests:
            text = self.texts[request.id.removeprefix("step7/teach/")]
            ids = tuple(self.tokenizer.encode(text))
            found.append(
                Generation(
                    request_id=request.id,
                    index=0,
                    completion_ids=ids,
                    logprobs=(0.0,) * len(ids),
                    finish_reason="stop",
                    policy_version=0,
                )
            )
        return found


def make_sample(problem_id: str, index: int) -> TrainSample:
    return TrainSample(
        rollout_id=f"{problem_id}/{index}",
        problem_id=problem_id,
        student_prompt_ids=(1, 2),
        teacher_prompt_ids=(3, 4),
        completion_ids=(5,),
        logprobs=(0.0,),
        start=0,
        end=1,
    )


def test_before_and_after(tokenizer, make_group):
    verifiers = VerifierPool()
    one, verdicts = make_group(["5", "6", "4", "4"], [0.0, 0.0, 1.0, 1.0], id="set:1")
    two, more = make_group(["7", "4", "4", "4"], [0.0, 1.0, 1.0, 1.0], id="set:2")
    verdicts |= more
    places = [("set:1", 2), ("set:1", 0), ("set:1", 1), ("set:2", 0), ("set:2", 3)]
    samples = [make_sample(problem_id, index) for problem_id, index in places]
    chosen = wrong_samples(samples, verdicts, 9)
    assert [sample.rollout_id for sample in chosen] == ["set:1/0", "set:2/0"]
    assert wrong_samples(samples, verdicts, 1) == chosen[:1]
    texts = {"set:1/0": "<answer>4</answer>", "set:2/0": "<answer>5</answer>"}

    def helped(samples: Any) -> Any:
        engine: Any = Answers(tokenizer, texts)
        return asyncio.run(
            teacher_helps(
                engine,
                samples,
                [one, two],
                verdicts,
                verifiers=verifiers,
                tokenizer=tokenizer,
                params=SamplingParams(max_new_tokens=9),
                seed=0,
                step=7,
            )
        )

    found = helped(chosen)
    assert found == pytest.approx(((0.5 + 0.75) / 2, 0.5))
    assert probe_metrics(found) == {
        "reflect/plain_score": found[0],
        "reflect/teacher_score": found[1],
    }
    assert helped([]) is None
    assert probe_metrics(None) == {}
