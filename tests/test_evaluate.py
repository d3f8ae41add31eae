"""Evaluation asks for the same draws each time, and counts them right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from rosd_fast.config import EvalConfig
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.evaluate import evaluate
from rosd_fast.text.chat import chat_format
from rosd_fast.types import Generation, GenerationRequest, Problem, SamplingParams
from rosd_fast.verify import VerifierPool


class RecordingEngine(RolloutEngine):
    """Gives the completions of a table, and keeps what it was asked."""

    def __init__(self, tokenizer: Any, answers: Mapping[str, Sequence[str]]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.requests: list[GenerationRequest] = []

    async def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        self.requests += requests
        made = []
        for request in requests:
            for index in range(request.n):
                text = self.answers[request.id][index]
                ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
                cut = len(ids) >= request.params.max_new_tokens
                ids = (
                    ids[: request.params.max_new_tokens]
                    if cut
                    else (*ids, self.tokenizer.eos_token_id)
                )
                made.append(
                    Generation(
                        request_id=request.id,
                        index=index,
                        completion_ids=ids,
                        logprobs=(0.0,) * len(ids),
                        finish_reason="length" if cut else "stop",
                        policy_version=5,
                    )
                )
                if on_tokens is not None:
                    on_tokens(len(ids))
        return made

    async def load_weights(self, weights: Mapping[str, Any], *, version: int) -> None:
        self.policy_version = version

    async def close(self) -> None:
        self.requests = []


PROBLEMS = [
    Problem(id="a", domain="shop", prompt="1 + 1?", answer="2", verifier="contains", system="Add."),
    Problem(id="b", domain="ages", prompt="1 + 2?", answer="3", verifier="contains"),
    Problem(id="c", domain="shop", prompt="2 + 2?", answer="4", verifier="contains"),
]
LONG = "9 and a long, long, long answer that is cut before it comes to 4"
ANSWERS = {
    "eval/dev/a": ["2", "2", "2", "9"],
    "eval/dev/b": ["3", "9", "9", "9"],
    "eval/dev/c": ["4", "4", LONG, "9"],
}


def run(engine: RolloutEngine, tokenizer: Any, **changes: Any) -> dict[str, float]:
    config = changes.pop("config", EvalConfig(samples=4, temperature=0.7, top_p=0.9))
    problems = changes.pop("problems", PROBLEMS)
    options: dict[str, Any] = {
        "split": "dev",
        "max_new_tokens": 8,
        "threshold": 1.0,
        "seed": 11,
    } | changes
    options |= {
        "chat": chat_format(tokenizer),
        "stop_token_ids": (tokenizer.eos_token_id,),
        "verifiers": VerifierPool(),
    }
    return asyncio.run(evaluate(engine, problems, config=config, **options))


def test_accuracy_is_the_mean_over_all_rollouts_and_within_domains(tokenizer: Any) -> None:
    engine, counted = RecordingEngine(tokenizer, ANSWERS), []
    metrics = run(engine, tokenizer, on_tokens=counted.append)
    assert metrics == pytest.approx(
        {
            "eval/dev/accuracy": 6 / 12,
            "eval/dev/ages": 1 / 4,
            "eval/dev/shop": 5 / 8,
            "eval/dev/truncated_frac": 1 / 12,
            "eval/dev/tokens_mean": (11 * 2 + 8) / 12,
        }
    )
    assert sum(counted) == 11 * 2 + 8


def test_the_same_requests_at_every_evaluation(tokenizer: Any) -> None:
    first, second = RecordingEngine(tokenizer, ANSWERS), RecordingEngine(tokenizer, ANSWERS)
    run(first, tokenizer)
    second.policy_version = 9
    run(second, tokenizer)
    assert first.requests == second.requests
    request = first.requests[0]
    assert (request.id, request.n, request.seed) == ("eval/dev/a", 4, 11)
    assert request.params == SamplingParams(
        max_new_tokens=8, temperature=0.7, top_p=0.9, stop_token_ids=(tokenizer.eos_token_id,)
    )
    assert tokenizer.decode(list(request.prompt_ids)) == (
        "<|system|>Add.<|end|><|user|>1 + 1?<|end|><|assistant|>"
    )


def test_greedy_needs_one_rollout(tokenizer: Any) -> None:
    engine = RecordingEngine(tokenizer, ANSWERS)
    metrics = run(engine, tokenizer, config=EvalConfig(samples=4, temperature=0.0))
    assert [request.n for request in engine.requests] == [1, 1, 1]
    assert engine.requests[0].params.temperature == 0.0
    assert metrics["eval/dev/accuracy"] == 1.0


def test_only_the_first_problems(tokenizer: Any) -> None:
    engine = RecordingEngine(tokenizer, ANSWERS)
    metrics = run(engine, tokenizer, config=EvalConfig(samples=4, problems=1))
    assert [request.id for request in engine.requests] == ["eval/dev/a"]
    assert metrics["eval/dev/accuracy"] == 0.75
    assert "eval/dev/ages" not in metrics


def test_mistakes_are_named(tokenizer: Any) -> None:
    engine = RecordingEngine(tokenizer, {})
    with pytest.raises(UserError, match="dev split: has no problems"):
        run(engine, tokenizer, problems=[])
    bad = Problem(id="x", domain="accuracy", prompt="?", answer="1", verifier="exact")
    with pytest.raises(UserError, match="'accuracy' has the name of a metric"):
        run(engine, tokenizer, problems=[bad])
    assert engine.requests == []


def test_evaluations_with_a_real_engine_are_paired(tokenizer: Any, tiny_llama: Any) -> None:
    """The same weights give the same figures again, whatever was sampled in between."""
    problems = [
        Problem(id=f"p{i}", domain="any", prompt=f"{i}?", answer="e", verifier="contains")
        for i in range(6)
    ]
    engine = LocalEngine(tiny_llama(), max_rows=5)

    def measure(seed: int = 11) -> dict[str, float]:
        return run(engine, tokenizer, problems=problems, max_new_tokens=24, seed=seed)

    first, other_seed, again = measure(), measure(seed=12), measure()
    assert first == again
    assert first != other_seed
    asyncio.run(engine.load_weights(dict(tiny_llama(seed=5).named_parameters()), version=1))
    assert measure() != first
    assert 0 <= first["eval/dev/accuracy"] == first["eval/dev/any"] <= 1
    assert 0 < first["eval/dev/tokens_mean"] <= 24
