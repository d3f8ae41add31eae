"""Evaluation asks for the same draws each time, and counts them right."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.evaluation.records import Sampling
from rosd_fast.evaluation.sample import sample_completions
from rosd_fast.evaluation.training import check_split, split_metrics
from rosd_fast.text.chat import chat_format
from rosd_fast.types import Problem, SamplingParams
from rosd_fast.verify import VerifierPool
from tests.evaluation.recording_engine import RecordingEngine

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


SAMPLING = Sampling(samples=4, temperature=0.7, top_p=0.9, max_new_tokens=8, threshold=1.0, seed=11)


def run(engine: RolloutEngine, tokenizer: Any, **changes: Any) -> dict[str, float]:
    """The metrics of the split dev. changes: to `SAMPLING`, or `problems` or `on_tokens`."""
    problems, on_tokens = changes.pop("problems", PROBLEMS), changes.pop("on_tokens", None)
    check_split("dev", problems)
    completions = asyncio.run(
        sample_completions(
            engine,
            VerifierPool(),
            problems,
            split="dev",
            sampling=replace(SAMPLING, **changes),
            chat=chat_format(tokenizer),
            stop_token_ids=(tokenizer.eos_token_id,),
            on_tokens=on_tokens,
        )
    )
    return split_metrics("dev", completions)


def test_accuracy_is_the_mean_over_all_rollouts_and_within_domains(tokenizer: Any) -> None:
    engine, counted = RecordingEngine(tokenizer, ANSWERS), []
    metrics = run(engine, tokenizer, on_tokens=counted.append)
    low, high = metrics.pop("eval/dev/accuracy_low"), metrics.pop("eval/dev/accuracy_high")
    assert 0 <= low < 0.5 < high <= 1
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
    metrics = run(engine, tokenizer, temperature=0.0)
    assert [request.n for request in engine.requests] == [1, 1, 1]
    assert engine.requests[0].params.temperature == 0.0
    assert metrics["eval/dev/accuracy"] == 1.0


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
