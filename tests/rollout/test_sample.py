"""The sampling stage: prompts, ids and texts of groups."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.errors import UserError
from rosd_fast.rollout.sample import collect_groups, sample_groups
from rosd_fast.text.chat import chat_format
from rosd_fast.types import Generation, GenerationRequest, Group, Problem, SamplingParams


def make_problem(index: int, *, words: int = 3) -> Problem:
    return Problem(
        id=f"sums:{index}",
        domain="sums",
        prompt=f"{index} + " + "the answer " * words,
        answer="4",
        verifier="number",
    )


PROBLEMS = [make_problem(index, words=1 + index % 3) for index in range(4)]


def sample(
    engine: LocalEngine, tokenizer: Any, problems: list[Problem], **options: Any
) -> list[Group]:
    given: dict[str, Any] = {
        "group_size": 3,
        "params": SamplingParams(max_new_tokens=20, stop_token_ids=(tokenizer.eos_token_id,)),
        "seed": 0,
        "step": 1,
        "max_prompt_tokens": 100,
    }
    chat = chat_format(tokenizer)
    return asyncio.run(sample_groups(engine, problems, chat=chat, **(given | options)))


@pytest.fixture(scope="module")
def engine(tiny_llama: Callable[..., Any], tokenizer: Any) -> LocalEngine:
    # Six more ids than the tokenizer has tokens, as models with a padded vocabulary have.
    return LocalEngine(tiny_llama(vocab_size=len(tokenizer) + 6))


def test_groups_follow_the_problems(engine: LocalEngine, tokenizer: Any) -> None:
    tokens: list[int] = []
    groups = sample(engine, tokenizer, PROBLEMS, on_tokens=tokens.append)
    assert [group.problem for group in groups] == PROBLEMS
    for group in groups:
        problem = group.problem
        assert [r.id for r in group.rollouts] == [f"{problem.id}/{index}" for index in range(3)]
        for rollout in group.rollouts:
            assert rollout.problem_id == problem.id
            assert rollout.prompt_ids == chat_format(tokenizer).render(problem.prompt)
            stopped = rollout.completion_ids[-1] == tokenizer.eos_token_id
            assert rollout.finish_reason == ("stop" if stopped else "length")
            assert len(rollout.completion_ids) == len(rollout.logprobs)
            assert not any(token in rollout.text for token in tokenizer.all_special_tokens)
    assert sum(tokens) == sum(len(r.completion_ids) for group in groups for r in group.rollouts)


def test_seed_step_and_problem_fix_the_draws(engine: LocalEngine, tokenizer: Any) -> None:
    def texts(problems: list[Problem], **options: Any) -> dict[str, tuple[int, ...]]:
        groups = sample(engine, tokenizer, problems, **options)
        return {r.id: r.completion_ids for group in groups for r in group.rollouts}

    first = texts(PROBLEMS)
    assert texts(PROBLEMS[::-1]) == first
    assert texts(PROBLEMS[2:3]).items() <= first.items()
    assert texts(PROBLEMS, step=2) != first
    assert texts(PROBLEMS, seed=1) != first


def test_ids_beyond_the_tokenizer_decode_to_nothing(tokenizer: Any) -> None:
    request = GenerationRequest(
        id="step1/p", prompt_ids=(1,), params=SamplingParams(max_new_tokens=9)
    )
    word = tokenizer.encode(" answer", add_special_tokens=False)
    ids = (*word, len(tokenizer) + 3, *word)
    generation = Generation(
        request_id="step1/p",
        index=0,
        completion_ids=ids,
        logprobs=(-1.0,) * len(ids),
        finish_reason="length",
        policy_version=4,
    )
    (group,) = collect_groups(PROBLEMS[:1], [request], [generation], chat=chat_format(tokenizer))
    (rollout,) = group.rollouts
    assert rollout.text == " answer answer"
    assert rollout.completion_ids == ids
    assert rollout.policy_version == 4
    other = GenerationRequest(id="step2/p", prompt_ids=(1,), params=request.params)
    with pytest.raises(ValueError, match="1 completions that are not, in order, the 1"):
        collect_groups(PROBLEMS[:1], [other], [generation], chat=chat_format(tokenizer))


def test_a_prompt_over_budget_names_its_problem(engine: LocalEngine, tokenizer: Any) -> None:
    problems = [*PROBLEMS, make_problem(9, words=80)]
    words = r"problem sums:9: its prompt has \d+ tokens, more than sample.max_prompt_tokens = 100"
    with pytest.raises(UserError, match=words):
        sample(engine, tokenizer, problems)
