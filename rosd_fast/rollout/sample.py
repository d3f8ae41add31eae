"""The sampling stage: problems -> prompts -> G completions each -> groups of rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, TypedDict, Unpack

from rosd_fast.background import in_background
from rosd_fast.errors import UserError
from rosd_fast.text.decode import decode
from rosd_fast.types import GenerationRequest, Group, Rollout, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import SampleConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.text.chat import ChatFormat
    from rosd_fast.types import Generation, Problem


class RolloutOptions(TypedDict):
    """How the groups of a step are sampled: the keyword arguments of `stream_groups`."""

    chat: ChatFormat  # of the student
    group_size: int  # rollouts per problem
    params: SamplingParams
    seed: int  # with step and problem id it fixes the draws, where the engine allows that
    step: int
    max_prompt_tokens: int  # a longer prompt is a UserError, raised before any sampling


async def sample_groups(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    on_tokens: Callable[[int], None] | None = None,
    **options: Unpack[RolloutOptions],
) -> list[Group]:
    """The groups of `stream_groups`, in the problems' order."""
    groups = {}
    async for group in stream_groups(engine, problems, on_tokens=on_tokens, **options):
        groups[group.problem.id] = group
    return [groups[problem.id] for problem in problems]


async def stream_groups(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    on_tokens: Callable[[int], None] | None = None,
    **options: Unpack[RolloutOptions],
) -> AsyncIterator[Group]:
    """Sample `group_size` rollouts per problem; yield each group once it is whole, in any order.

    `on_tokens(k)` is called after k more tokens were sampled. Raises UserError, before sampling,
    when a prompt has more than `max_prompt_tokens` tokens.
    """
    chat = options["chat"]
    requests = [
        GenerationRequest(
            id=f"step{options['step']}/{problem.id}",
            prompt_ids=problem_prompt(problem, chat, options["max_prompt_tokens"]),
            params=options["params"],
            n=options["group_size"],
            seed=options["seed"],
            affinity=problem.id,
        )
        for problem in problems
    ]
    asked = {
        request.id: (problem, request) for problem, request in zip(problems, requests, strict=True)
    }
    async for generations in engine.stream(requests, on_tokens=on_tokens):
        problem, request = asked[generations[0].request_id]
        (group,) = await in_background(collect_groups, [problem], [request], generations, chat=chat)
        yield group


def sampling_params(config: SampleConfig, stop_token_ids: Sequence[int]) -> SamplingParams:
    """Return how rollouts are sampled, as the options say."""
    return SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=tuple(stop_token_ids),
    )


def problem_prompt(problem: Problem, chat: ChatFormat, max_prompt_tokens: int) -> tuple[int, ...]:
    """A problem's own prompt. Raises UserError when it is longer than `max_prompt_tokens`."""
    prompt_ids = chat.render_problem(problem)
    if len(prompt_ids) > max_prompt_tokens:
        raise UserError(
            f"its prompt has {len(prompt_ids)} tokens, more than sample.max_prompt_tokens = "
            f"{max_prompt_tokens}",
            where=f"problem {problem.id}",
            fix="Shorten the problem, or raise sample.max_prompt_tokens",
        )
    return prompt_ids


def collect_groups(
    problems: Sequence[Problem],
    requests: Sequence[GenerationRequest],
    generations: Sequence[Generation],
    *,
    chat: ChatFormat,
) -> list[Group]:
    """The groups that an engine's generations make up, given `requests`, one per problem.

    Raises ValueError when the generations are not those of the requests, in the requests' order.
    """
    expected = [(request.id, index) for request in requests for index in range(request.n)]
    if expected != [(g.request_id, g.index) for g in generations]:
        raise ValueError(
            f"the engine returned {len(generations)} completions that are not, in order, the "
            f"{len(expected)} of {len(requests)} requests"
        )
    groups, left = [], iter(generations)
    for problem, request in zip(problems, requests, strict=True):
        rollouts = tuple(_rollout(problem, request, next(left), chat) for _ in range(request.n))
        groups.append(Group(problem=problem, rollouts=rollouts))
    return groups


def _rollout(
    problem: Problem, request: GenerationRequest, generation: Generation, chat: ChatFormat
) -> Rollout:
    return Rollout(
        id=f"{problem.id}/{generation.index}",
        problem_id=problem.id,
        prompt_ids=request.prompt_ids,
        completion_ids=generation.completion_ids,
        logprobs=generation.logprobs,
        text=decode(chat.tokenizer, generation.completion_ids),
        finish_reason=generation.finish_reason,
        policy_version=generation.policy_version,
    )
