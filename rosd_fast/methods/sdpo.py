"""SDPO, self-distillation policy optimization: the teacher has read a correct sibling.

    build   all tokens of each rollout; the teacher's prompt shows a correct rollout of the same
            problem, and with `teacher.show_feedback` what the verifier says about this one

The rollout itself is never shown: a correct rollout without a correct sibling is left out. Options:
`teacher`, `reflect.demonstration`. The published setting has `teacher.kind` ema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rosd_fast.methods.solution import SolutionMethod
from rosd_fast.rollout.siblings import choose_demonstration

if TYPE_CHECKING:
    from rosd_fast.types import Group, Rollout, Verdict


class Sdpo(SolutionMethod):
    """Distills whole rollouts from a teacher that has read a correct sibling."""

    def solution(
        self, group: Group, rollout: Rollout, verdicts: Mapping[str, Verdict]
    ) -> str | None:
        """The text of a correct sibling."""
        sibling = choose_demonstration(
            group,
            verdicts,
            self.config.reflect.demonstration,
            key=f"{self.config.seed}/{rollout.policy_version}/{rollout.id}",
            exclude=rollout.id,
            chats=self.chats,
        )
        return None if sibling is None else self.chats.shown(sibling)[0]
