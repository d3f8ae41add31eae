"""OPSD, on-policy self-distillation: the teacher has read the data set's reference solution.

    build   all tokens of every rollout; the teacher's prompt shows `Problem.reference`

Options: `teacher`. The published setting has `loss.divergence` forward_kl and `loss.entry_clip`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.methods.solution import SolutionMethod
from rosd_fast.text.prompts import placeholders

if TYPE_CHECKING:
    from rosd_fast.types import Group, Problem, Rollout, Verdict


class Opsd(SolutionMethod):
    """Distills whole rollouts from a teacher that has read the reference solution."""

    needs_success = False
    tells_apart = False
    reads = ("span.thinking", "teacher.solution_template", "teacher.show_feedback")

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raise UserError for a problem without a reference solution."""
        super().check_problems(problems)
        missing = [
            problem
            for problem in problems
            if not problem.reference and "demonstration" in placeholders(self.template_of(problem))
        ]
        if missing:
            raise UserError(
                f"has no reference solution, which the method opsd shows the teacher "
                f"({len(missing)} of {len(problems)} problems have none)",
                where=f"problem {missing[0].id}",
                fix='Give each row a "reference", or choose another method',
            )

    def solution(
        self, group: Group, rollout: Rollout, verdicts: Mapping[str, Verdict]
    ) -> str | None:
        """The reference solution of the problem."""
        return group.problem.reference
