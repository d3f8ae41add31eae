"""Verify the rollouts of a step, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rosd_fast.types import Group, Judgement, Problem, Verdict
from rosd_fast.verify.registry import VERIFIERS

Task = tuple[Problem, str]
"""A problem and a completion to judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker process may use.

    workers: number of worker processes; 0: one per core, at most 8.
    timeout_s: seconds per completion.
    memory_mib: memory of a worker.
    run_code: whether the verifier code may run what a model wrote.
    """

    workers: int = 0
    timeout_s: float = 10.0
    memory_mib: int = 2048
    run_code: bool = False


class VerifierPool:
    """Judges completions.

    limits: what a worker may use.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    async def judge(self, tasks: Sequence[Task]) -> list[Judgement]:
        """The judgements, in the order of the tasks."""
        return await asyncio.to_thread(
            lambda: [VERIFIERS[p.verifier](completion, p.answer) for p, completion in tasks]
        )

    async def verify(self, groups: Sequence[Group], *, threshold: float) -> dict[str, Verdict]:
        """The verdict on every rollout, by its id: a success has at least `threshold`."""
        rollouts = [(group.problem, r) for group in groups for r in group.rollouts]
        judged = await self.judge([(problem, r.text) for problem, r in rollouts])
        return {
            r.id: Verdict(
                rollout_id=r.id,
                score=j.score,
                success=j.score >= threshold,
                answer=j.answer,
                reason=j.reason,
            )
            for (_, r), j in zip(rollouts, judged, strict=True)
        }

    async def close(self) -> None:
        """End the worker processes."""
