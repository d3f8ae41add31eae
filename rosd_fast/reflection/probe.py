"""Do reflections help? The teacher answers with one in its prompt; that is compared with what the
plain prompt gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.types import GenerationRequest, SamplingParams
from rosd_fast.verify import score

if TYPE_CHECKING:
    from rosd_fast.engines.base import RolloutEngine
    from rosd_fast.types import DistillSample, Group, Verdict


async def teacher_helps(
    engine: RolloutEngine,
    samples: Sequence[DistillSample],
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    *,
    tokenizer: Any,
    params: SamplingParams,
    seed: int,
    step: int,
) -> tuple[float, float] | None:
    """(mean score of the samples' groups, mean score of one answer to each teacher prompt).

    None without samples. `engine` has the teacher's weights.
    """
    if not samples:
        return None
    home = {rollout.id: group for group in groups for rollout in group.rollouts}
    requests = [
        GenerationRequest(
            id=f"step{step}/teach/{sample.rollout_id}",
            prompt_ids=sample.teacher_prompt_ids,
            params=params,
            seed=seed,
            affinity=home[sample.rollout_id].problem.id,
        )
        for sample in samples
    ]
    before = after = 0.0
    generations = await engine.generate(requests)
    for sample, generation in zip(samples, generations, strict=True):
        group = home[sample.rollout_id]
        problem = group.problem
        text = tokenizer.decode(
            list(generation.completion_ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        after += score(problem, text)[0]
        scores = [verdicts[rollout.id].score for rollout in group.rollouts]
        before += sum(scores) / len(scores)
    return before / len(samples), after / len(samples)


def wrong_samples(
    samples: Sequence[DistillSample], verdicts: Mapping[str, Verdict], limit: int
) -> list[DistillSample]:
    """The first sample of a wrong rollout of each problem, of at most `limit` problems."""
    chosen: dict[str, DistillSample] = {}
    for sample in samples:
        problem = sample.rollout_id.rpartition("/")[0]
        if not verdicts[sample.rollout_id].success:
            chosen.setdefault(problem, sample)
    return list(chosen.values())[:limit]


def probe_metrics(helped: tuple[float, float] | None) -> dict[str, float]:
    """`reflect/plain_score` and `reflect/teacher_score`, where there was something to look at."""
    if helped is None:
        return {}
    return {"reflect/plain_score": helped[0], "reflect/teacher_score": helped[1]}
