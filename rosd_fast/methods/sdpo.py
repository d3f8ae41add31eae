"""SDPO, self-distillation policy optimization: the teacher has read a correct sibling.

    build   all tokens of each rollout; the teacher's prompt shows a correct rollout of the same
            problem, and with `teacher.show_feedback` what the verifier says about this one

The rollout itself is not shown: a correct rollout without a correct sibling is left out, unless
`select.on_lone_success` says otherwise. Options: `teacher`, `reflect.demonstration`, `select`. The
published setting has `teacher.kind` ema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.methods.budgets import check_references
from rosd_fast.methods.solution import SolutionMethod
from rosd_fast.rollout.siblings import demonstrate

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.types import Group, Problem, Rollout, Verdict


class Sdpo(SolutionMethod):
    """Distills whole rollouts from a teacher that has read a correct sibling."""

    reads = (
        "reflect.demonstration",
        "span.thinking",
        "select.on_*",
        "teacher.solution_template",
        "teacher.show_feedback",
    )

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError where groups without a success would be kept with nothing to show."""
        super().check_options(config)
        if config.select.on_no_success == "answer":
            raise UserError(
                "answer: the method sdpo has no reflector to show an answer to",
                where="select.on_no_success",
                fix="Choose skip or reference",
            )

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raise UserError also when reference solutions are asked for and there are none."""
        super().check_problems(problems)
        check_references(self.config, problems)

    def solution(
        self, group: Group, rollout: Rollout, verdicts: Mapping[str, Verdict]
    ) -> str | None:
        """The text of a correct sibling, or of what replaces one (`select`)."""
        shown = demonstrate(
            group,
            rollout,
            verdicts,
            self.config.select,
            self.config.reflect.demonstration,
            key=f"{self.config.seed}/{rollout.policy_version}/{rollout.id}",
            chats=self.chats,
        )
        return None if shown is None else shown.text
