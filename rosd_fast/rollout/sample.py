"""The sampling stage: problems -> prompts -> G completions each -> groups of rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.text.prompts import render_prompt
from rosd_fast.types import GenerationRequest, Group, Rollout, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import SampleConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.types import Generation, Problem


async def sample_groups(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    tokenizer: Any,
    group_size: int,
    params: SamplingParams,
    seed: int,
    step: int,
    max_prompt_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Group]:
    """`group_size` rollouts of each problem, in the problems' order.

    Seed, step and problem id fix the draws, where the engine's draws can be fixed. `on_tokens(k)`
    is called as k further tokens were sampled. Raises UserError, before sampling, when a prompt has
    more than `max_prompt_tokens`.
    """
    groups = {}
    async for group in stream_groups(
        engine,
        problems,
        tokenizer=tokenizer,
        group_size=group_size,
        params=params,
        seed=seed,
        step=step,
        max_prompt_tokens=max_prompt_tokens,
        on_tokens=on_tokens,
    ):
        groups[group.problem.id] = group
    return [groups[problem.id] for problem in problems]


async def stream_groups(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    tokenizer: Any,
    group_size: int,
    params: SamplingParams,
    seed: int,
    step: int,
    max_prompt_tokens: int,
    on_tokens: Callable[[int], None] | None = None,
) -> AsyncIterator[Group]:
    """As `sample_groups`, but each group as soon as it is whole, in any order."""
    requests = [
        GenerationRequest(
            id=f"step{step}/{problem.id}",
            prompt_ids=problem_prompt(problem, tokenizer, max_prompt_tokens),
            params=params,
            n=group_size,
            seed=seed,
            affinity=problem.id,
        )
        for problem in problems
    ]
    asked = {
        request.id: (problem, request) for problem, request in zip(problems, requests, strict=True)
    }
    async for generations in engine.stream(requests, on_tokens=on_tokens):
        problem, request = asked[generations[0].request_id]
        yield collect_groups([problem], [request], generations, tokenizer=tokenizer)[0]


def check_prompts(
    problems: Sequence[Problem],
    *,
    tokenizer: Any,
    max_prompt_tokens: int,
    context_length: int | None = None,
) -> None:
    """Raise UserError, naming the problem, unless all prompts are within budget and context.

    context_length: positions the model has, of which the answer needs at least one; None: no bound.
    """
    for problem in problems:
        num_tokens = len(problem_prompt(problem, tokenizer, max_prompt_tokens))
        if context_length is not None and num_tokens >= context_length:
            raise UserError(
                f"its prompt has {num_tokens} tokens and the model's context {context_length}, "
                "which leaves no room for an answer",
                where=f"problem {problem.id}",
                fix="Shorten the problem or choose a model with a longer context",
            )


def sampling_params(config: SampleConfig, stop_token_ids: Sequence[int]) -> SamplingParams:
    """Return how rollouts are sampled, as the options say."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=tuple(stop_token_ids),
    )


def problem_prompt(problem: Problem, tokenizer: Any, max_prompt_tokens: int) -> tuple[int, ...]:
    """The student's prompt. Raises UserError when it has more than `max_prompt_tokens` tokens."""
    prompt_ids = render_prompt(tokenizer, user=problem.prompt, system=problem.system)
    if len(prompt_ids) > max_prompt_tokens:
        raise UserError(
            f"its prompt has {len(prompt_ids)} tokens, more than sample.max_prompt_tokens = "
            f"{max_prompt_tokens}",
            where=f"problem {problem.id}",
            fix="Shorten the problem or raise sample.max_prompt_tokens",
        )
    return prompt_ids


def collect_groups(
    problems: Sequence[Problem],
    requests: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    *,
    tokenizer: Any,
) -> list[Group]:
    """The groups of rollouts that an engine's answer to `requests`, one a problem, stands for.

    Raises ValueError when the generations are not those of the requests, in the requests' order.
    """
    expected = [(request.id, index) for request in requests for index in range(request.n)]
    if expected != [(g.request_id, g.index) for g in generations]:
        raise ValueError(
            f"the engine gave {len(generations)} completions that are not, in order, the "
            f"{len(expected)} that {len(requests)} requests ask for"
        )
    groups, left = [], iter(generations)
    for problem, request in zip(problems, requests, strict=True):
        own = [next(left) for _ in range(request.n)]
        rollouts = tuple(_rollout(problem, request, generation, tokenizer) for generation in own)
        groups.append(Group(problem=problem, rollouts=rollouts))
    return groups


def _rollout(
    problem: Problem, request: GenerationRequest, generation: Generation, tokenizer: Any
) -> Rollout:
    return Rollout(
        id=f"{problem.id}/{generation.index}",
        problem_id=problem.id,
        prompt_ids=request.prompt_ids,
        completion_ids=generation.completion_ids,
        logprobs=generation.logprobs,
        text=tokenizer.decode(
            list(generation.completion_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,  # verifiers and quotes want the bytes as sampled
        ),
        finish_reason=generation.finish_reason,
        policy_version=generation.policy_version,
    )
