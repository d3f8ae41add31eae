"""Evaluation: mean@k accuracy on a split, in total and by domain.

    problems -> k rollouts each -> verdicts -> means

The caller's seed stays the same during a run and a draw depends on its request alone, so the
evaluations before and after training are paired: only the weights differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.report.metrics import EVAL_TOTALS
from rosd_fast.report.stages import Stage
from rosd_fast.rollout.sample import collect_groups
from rosd_fast.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.config import EvalConfig
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.inputs import Inputs
    from rosd_fast.report.progress import Progress
    from rosd_fast.text.chat import ChatFormat
    from rosd_fast.types import Problem
    from rosd_fast.verify import VerifierPool


async def evaluate_splits(inputs: Inputs, engines: Engines, progress: Progress) -> dict[str, float]:
    """Return the metrics of the development splits, always with the same draws."""
    config, metrics = inputs.config, {}
    with progress.stage(Stage.EVALUATE):
        for split, problems in inputs.dev_splits.items():
            metrics |= await evaluate(
                engines.student,
                problems,
                verifiers=engines.verifiers,
                split=split,
                config=config.eval,
                max_new_tokens=config.sample.max_new_tokens,
                chat=inputs.chats.eval,
                stop_token_ids=inputs.model.stop_token_ids,
                threshold=config.select.threshold,
                seed=config.seed,
                on_tokens=progress.tokens,
            )
    return metrics


async def evaluate(
    engine: RolloutEngine,
    problems: Sequence[Problem],
    *,
    verifiers: VerifierPool,
    split: str,
    config: EvalConfig,
    max_new_tokens: int,
    chat: ChatFormat,
    stop_token_ids: tuple[int, ...],
    threshold: float,
    seed: int,
    on_tokens: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return the metrics of one split, with the weights that `engine` has now.

    eval/{split}/accuracy        share of rollouts that succeed, in [0, 1]: the mean over
                                 `config.samples` rollouts per problem, one at temperature 0
    eval/{split}/{domain}        the same within a domain
    eval/{split}/truncated_frac  share of rollouts cut at `max_new_tokens`
    eval/{split}/tokens_mean     mean tokens per rollout

    Raises UserError when there is no problem, when a domain has the name of another metric, and
    when a prompt does not fit the model's context.
    """
    chosen = list(problems[: config.problems] if config.problems else problems)
    if not chosen:
        raise UserError("has no problems to evaluate on", where=f"the {split} split")
    for problem in chosen:
        if problem.domain in EVAL_TOTALS:
            raise UserError(
                f"the domain {problem.domain!r} has the name of a metric of eval/{split}",
                where=f"problem {problem.id}",
                fix="Give the domain another name.",
            )

    requests = build_eval_requests(
        chosen,
        split=split,
        config=config,
        max_new_tokens=max_new_tokens,
        chat=chat,
        stop_token_ids=stop_token_ids,
        seed=seed,
    )
    generations = await engine.generate(requests, on_tokens=on_tokens)
    groups = collect_groups(chosen, requests, generations, chat=chat)
    verdicts = await verifiers.verify(groups, threshold=threshold)

    successes: defaultdict[str, list[bool]] = defaultdict(list)  # by domain
    for group in groups:
        successes[group.problem.domain] += [verdicts[r.id].success for r in group.rollouts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {"accuracy": sum(map(sum, successes.values())) / len(rollouts)}
    metrics |= {domain: sum(hits) / len(hits) for domain, hits in sorted(successes.items())}
    metrics["truncated_frac"] = sum(r.finish_reason == "length" for r in rollouts) / len(rollouts)
    metrics["tokens_mean"] = sum(len(r.completion_ids) for r in rollouts) / len(rollouts)
    return {f"eval/{split}/{name}": value for name, value in metrics.items()}


def build_eval_requests(
    problems: Sequence[Problem],
    *,
    split: str,
    config: EvalConfig,
    max_new_tokens: int,
    chat: ChatFormat,
    stop_token_ids: tuple[int, ...],
    seed: int,
) -> list[GenerationRequest]:
    """Return one request per problem; one rollout at temperature 0, where all are equal."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop_token_ids=stop_token_ids,
    )
    return [
        GenerationRequest(
            id=f"eval/{split}/{problem.id}",
            prompt_ids=chat.render_problem(problem),
            params=params,
            n=1 if config.temperature == 0 else config.samples,
            seed=seed,
        )
        for problem in problems
    ]
