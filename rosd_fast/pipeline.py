"""Sampling and reflection: from a step's problems to rollouts, verdicts and reflections.

Behind a barrier, all groups are sampled before the first reflection is asked for, which suits an
engine that computes its requests together. Streamed, a group's reflections are asked for as soon as
its own rollouts are verified, while other groups still sample: the slowest rollout of a step then
holds up the reflections on its own group only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rosd_fast.reflection.reflect import reflect
from rosd_fast.rollout.sample import RolloutOptions, sample_groups, stream_groups
from rosd_fast.rollout.select import select_groups
from rosd_fast.verify import verify_all

if TYPE_CHECKING:
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.rollout.select import Selection
    from rosd_fast.run import Run
    from rosd_fast.types import Group, Reflection, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A step's rollouts and what was said of them."""

    groups: list[Group]  # in the problems' order
    verdicts: dict[str, Verdict]  # by rollout id
    selection: Selection
    reflections: dict[str, Reflection]  # by rollout id


async def sample_and_reflect(run: Run, step: int, shown: Progress | Hidden) -> Sampled:
    """The rollouts of a step's problems, and reflections on those of the groups that were kept.

    shown: `run.progress`, or nothing where another stage is under way at the same time.
    """
    streamed = run.engine.streams and run.config.engine.pipeline == "streamed"
    return await (_streamed if streamed else _behind_barrier)(run, step, shown)


async def _behind_barrier(run: Run, step: int, shown: Progress | Hidden) -> Sampled:
    with shown.stage("sample"):
        groups = await sample_groups(
            run.engine, run.stream.batch(step), on_tokens=shown.tokens, **_options(run, step)
        )
    with shown.stage("verify"):
        verdicts = verify_all(groups, threshold=run.config.select.threshold)
        selection = select_groups(groups, verdicts, run.config.select)
    with shown.stage("reflect"):
        reflections = await _reflect(run, step, selection.kept, verdicts, shown)
    return Sampled(groups=groups, verdicts=verdicts, selection=selection, reflections=reflections)


async def _streamed(run: Run, step: int, shown: Progress | Hidden) -> Sampled:
    problems = run.stream.batch(step)
    groups: dict[str, Group] = {}
    verdicts: dict[str, Verdict] = {}
    reflections: dict[str, Reflection] = {}

    async def add_reflections(kept: Sequence[Group]) -> None:
        reflections.update(await _reflect(run, step, kept, verdicts, shown))

    try:
        with shown.stage("sample"):
            async with asyncio.TaskGroup() as tasks:
                async for group in stream_groups(
                    run.engine, problems, on_tokens=shown.tokens, **_options(run, step)
                ):
                    groups[group.problem.id] = group
                    verdicts |= verify_all([group], threshold=run.config.select.threshold)
                    kept = select_groups([group], verdicts, run.config.select).kept
                    if kept:
                        tasks.create_task(add_reflections(kept))
    except BaseExceptionGroup as failed:  # one line for the user, not a tree
        raise failed.exceptions[0] from None
    ordered = [groups[problem.id] for problem in problems]
    return Sampled(
        groups=ordered,
        verdicts=verdicts,
        selection=select_groups(ordered, verdicts, run.config.select),
        reflections=reflections,
    )


def _options(run: Run, step: int) -> RolloutOptions:
    """How groups are sampled."""
    sample = run.config.sample
    return {
        "tokenizer": run.model.tokenizer,
        "group_size": sample.group_size,
        "params": run.sampling_params,
        "seed": run.config.seed,
        "step": step,
        "max_prompt_tokens": sample.max_prompt_tokens,
    }


async def _reflect(
    run: Run,
    step: int,
    kept: Sequence[Group],
    verdicts: dict[str, Verdict],
    shown: Progress | Hidden,
) -> dict[str, Reflection]:
    return await reflect(
        kept,
        verdicts,
        engine=run.reflector,
        config=run.config.reflect,
        model=run.model,
        seed=run.config.seed,
        step=step,
        on_tokens=shown.tokens,
    )
