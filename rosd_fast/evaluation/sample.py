"""Problems -> completions, verified: the same code in training and in `rosd-fast eval`.

    problems -> requests -> engine -> a problem's completions -> verifiers

A problem's completions are verified while others are still sampled. A draw depends on its request
alone, so that evaluations with one seed are paired: only the weights differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rosd_fast.evaluation.records import Completion, Sampling
from rosd_fast.rollout.sample import collect_groups
from rosd_fast.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.text.chat import ChatFormat
    from rosd_fast.types import Generation, Problem
    from rosd_fast.verify import VerifierPool


async def sample_completions(
    engine: RolloutEngine,
    verifiers: VerifierPool,
    problems: Sequence[Problem],
    *,
    split: str,
    sampling: Sampling,
    chat: ChatFormat,
    stop_token_ids: Sequence[int],
    background: bool = False,
    on_tokens: Callable[[int], None] | None = None,
    on_problem: Callable[[Sequence[Completion]], None] | None = None,
) -> list[Completion]:
    """Sample and judge completions with the weights that `engine` has now, in the problems' order.

    background: other requests to the engine go first.
    on_tokens: called with k after k more tokens were sampled.
    on_problem: called with all completions of a problem as soon as they are judged, in any order.

    Raises UserError when a prompt does not fit the model's context.
    """
    requests = build_requests(
        problems, split=split, sampling=sampling, chat=chat, stop_token_ids=stop_token_ids
    )
    if background:
        requests = [replace(request, background=True) for request in requests]
    asked = {request.id: i for i, request in enumerate(requests)}
    done: dict[int, list[Completion]] = {}

    async def judge(index: int, generations: Sequence[Generation]) -> None:
        problem = problems[index]
        groups = collect_groups([problem], [requests[index]], generations, chat=chat)
        verdicts = await verifiers.verify(groups, threshold=sampling.threshold)
        done[index] = [
            Completion(
                split=split,
                problem_id=problem.id,
                domain=problem.domain,
                index=i,
                score=verdicts[rollout.id].score,
                success=verdicts[rollout.id].success,
                answer=verdicts[rollout.id].answer,
                reason=verdicts[rollout.id].reason,
                text=rollout.text,
                num_tokens=len(rollout.completion_ids),
                finish_reason=rollout.finish_reason,
            )
            for i, rollout in enumerate(groups[0].rollouts)
        ]
        if on_problem is not None:
            on_problem(done[index])

    try:
        async with asyncio.TaskGroup() as tasks:
            async for generations in engine.stream(requests, on_tokens=on_tokens):
                tasks.create_task(judge(asked[generations[0].request_id], generations))
    except BaseExceptionGroup as failed:  # one line for the user, not a tree
        raise failed.exceptions[0] from None
    return [completion for index in range(len(problems)) for completion in done[index]]


def build_requests(
    problems: Sequence[Problem],
    *,
    split: str,
    sampling: Sampling,
    chat: ChatFormat,
    stop_token_ids: Sequence[int],
) -> list[GenerationRequest]:
    """Return one request per problem."""
    params = SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop_token_ids=tuple(stop_token_ids),
    )
    return [
        GenerationRequest(
            id=f"eval/{split}/{problem.id}",
            prompt_ids=chat.render_problem(problem),
            params=params,
            n=sampling.per_problem,
            seed=sampling.seed,
        )
        for problem in problems
    ]
