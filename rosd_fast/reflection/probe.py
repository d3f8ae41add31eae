"""Measure whether reflections help.

The teacher answers problems with a reflection in its prompt; its score is compared with that of the
plain prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.text.decode import decode
from rosd_fast.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.types import Group, TrainSample, Verdict
    from rosd_fast.verify import VerifierPool


async def teacher_helps(
    engine: RolloutEngine,
    samples: Sequence[TrainSample],
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    verifiers: VerifierPool,
    tokenizer: Any,
    params: SamplingParams,
    seed: int,
    step: int,
) -> tuple[float, float] | None:
    """(mean score of the samples' groups, mean score of one answer per teacher prompt).

    `engine` has the teacher's weights. None without samples.
    """
    if not samples:
        return None
    group_of = {rollout.id: group for group in groups for rollout in group.rollouts}
    requests = [
        GenerationRequest(
            id=f"step{step}/teach/{sample.rollout_id}",
            prompt_ids=sample.teacher_prompt_ids or (),
            params=params,
            seed=seed,
            affinity=group_of[sample.rollout_id].problem.id,
        )
        for sample in samples
    ]
    generations = await engine.generate(requests)
    judged = await verifiers.judge(
        [
            (group_of[sample.rollout_id].problem, decode(tokenizer, generation.completion_ids))
            for sample, generation in zip(samples, generations, strict=True)
        ]
    )
    before = 0.0
    for sample in samples:
        scores = [verdicts[rollout.id].score for rollout in group_of[sample.rollout_id].rollouts]
        before += sum(scores) / len(scores)
    return before / len(samples), sum(found.score for found in judged) / len(samples)


def wrong_samples(
    samples: Sequence[TrainSample], verdicts: Mapping[str, Verdict], limit: int
) -> list[TrainSample]:
    """One distilled sample of a wrong rollout per problem, the first, for at most `limit`
    problems."""
    chosen: dict[str, TrainSample] = {}
    for sample in samples:
        if sample.is_distilled and not verdicts[sample.rollout_id].success:
            chosen.setdefault(sample.problem_id, sample)
    return list(chosen.values())[:limit]


def probe_metrics(helped: tuple[float, float] | None) -> dict[str, float]:
    """`reflect/plain_score` and `reflect/teacher_score`; none when nothing was measured."""
    if helped is None:
        return {}
    return {"reflect/plain_score": helped[0], "reflect/teacher_score": helped[1]}
