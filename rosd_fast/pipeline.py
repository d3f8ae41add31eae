"""Sampling: from a step's problems to rollouts, verdicts and the method's annotations.

    problems -> groups -> verdicts -> selection -> annotations (`Method.annotate`)

Behind a barrier, all groups are sampled before the first annotation is generated, which suits an
engine that computes its requests together. Streamed, a group is annotated as soon as its own
rollouts are verified, while other groups still sample: the slowest rollout of a step, or a verifier
that hangs on one, then delays the annotations of its own group only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rosd_fast.report.stages import Stage
from rosd_fast.rollout.sample import RolloutOptions, sample_groups, sampling_params, stream_groups
from rosd_fast.rollout.select import select_groups

if TYPE_CHECKING:
    from rosd_fast.engines.lifecycle import Engines
    from rosd_fast.inputs import Inputs
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.rollout.select import Selection
    from rosd_fast.types import Group, Reflection, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a step sampled.

    groups: all groups, in the problems' order.
    verdicts: by rollout id.
    selection: the groups that are kept, and how many were dropped and why.
    annotations: what the method generated on the kept groups, by rollout id.
    bad_rows: what is wrong with rows of the data set that other rows replaced.
    """

    groups: list[Group]
    verdicts: dict[str, Verdict]
    selection: Selection
    annotations: dict[str, Reflection]
    bad_rows: tuple[str, ...] = ()


async def sample_and_annotate(
    inputs: Inputs, engines: Engines, step: int, progress: Progress | Hidden
) -> Sampled:
    """Sample a step's problems, verify, select, and annotate the groups that are kept.

    progress: `Hidden` where another stage runs at the same time.
    """
    streamed = engines.student.streams and inputs.config.engine.pipeline == "streamed"
    return await (_streamed if streamed else _behind_barrier)(inputs, engines, step, progress)


async def _behind_barrier(
    inputs: Inputs, engines: Engines, step: int, progress: Progress | Hidden
) -> Sampled:
    config, method = inputs.config, inputs.method
    drawn = inputs.stream.draw(step)
    with progress.stage(Stage.SAMPLE):
        groups = await sample_groups(
            engines.student, drawn.problems, on_tokens=progress.tokens, **_options(inputs, step)
        )
    with progress.stage(Stage.VERIFY):
        verdicts = await engines.verifiers.verify(groups, threshold=config.select.threshold)
        selection = _select(inputs, groups, verdicts)
    with progress.stage(method.annotate_stage):
        annotations = await method.annotate(step, selection.kept, verdicts, engines, progress)
    return Sampled(
        groups=groups,
        verdicts=verdicts,
        selection=selection,
        annotations=annotations,
        bad_rows=drawn.bad,
    )


async def _streamed(
    inputs: Inputs, engines: Engines, step: int, progress: Progress | Hidden
) -> Sampled:
    config = inputs.config
    drawn = inputs.stream.draw(step)
    groups: dict[str, Group] = {}
    verdicts: dict[str, Verdict] = {}
    annotations: dict[str, Reflection] = {}

    async def follow(group: Group) -> None:
        """Verify and annotate a group while others still sample."""
        verdicts.update(await engines.verifiers.verify([group], threshold=config.select.threshold))
        if kept := _select(inputs, [group], verdicts).kept:
            annotations.update(
                await inputs.method.annotate(step, kept, verdicts, engines, progress)
            )

    try:
        with progress.stage(Stage.SAMPLE):
            async with asyncio.TaskGroup() as tasks:
                async for group in stream_groups(
                    engines.student,
                    drawn.problems,
                    on_tokens=progress.tokens,
                    **_options(inputs, step),
                ):
                    groups[group.problem.id] = group
                    tasks.create_task(follow(group))
    except BaseExceptionGroup as failed:  # one line for the user, not a tree
        raise failed.exceptions[0] from None
    ordered = [groups[problem.id] for problem in drawn.problems]
    return Sampled(
        groups=ordered,
        verdicts=verdicts,
        selection=_select(inputs, ordered, verdicts),
        annotations=annotations,
        bad_rows=drawn.bad,
    )


def _select(inputs: Inputs, groups: Sequence[Group], verdicts: Mapping[str, Verdict]) -> Selection:
    """The groups that the options and the method keep."""
    return select_groups(
        groups, verdicts, inputs.config.select, needs_success=inputs.method.needs_success
    )


def _options(inputs: Inputs, step: int) -> RolloutOptions:
    """How groups are sampled."""
    config, model = inputs.config, inputs.model
    return {
        "chat": inputs.chats.student,
        "group_size": config.sample.group_size,
        "params": sampling_params(config.sample, model.stop_token_ids),
        "seed": config.seed,
        "step": step,
        "max_prompt_tokens": config.sample.max_prompt_tokens,
    }
