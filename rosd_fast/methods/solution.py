"""Methods whose teacher reads a correct solution of the problem: SDPO and OPSD.

build   all tokens of a rollout; the teacher's prompt is `teacher.solution_template`
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.batch.samples import sample_metrics, teacher_prompt, teacher_template
from rosd_fast.config.templates import check_solution_template
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.budgets import check_budgets
from rosd_fast.methods.targets import NO_DEMONSTRATION, distilled
from rosd_fast.report.stages import Stage
from rosd_fast.text.prompts import placeholders

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import ErrorSpan, Group, Problem, Reflection, Rollout, TrainSample, Verdict


class SolutionMethod(Method):
    """Distills whole rollouts from a teacher that has read a solution."""

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError for a template with a wrong or a missing placeholder."""
        super().check_options(config)
        check_solution_template(config.teacher)

    def check_problem(self, problem: Problem) -> None:
        """Raise UserError when the problem fills the template's budget."""
        check_budgets(self.config, self.chats, problem, [("teacher", "solution_template")])

    def check_problems(self, problems: Sequence[Problem]) -> None:
        """Raise UserError when the longest problem fills the template's budget."""
        self.check_problem(max(problems, key=lambda problem: len(problem.prompt)))

    @abstractmethod
    def solution(
        self, group: Group, rollout: Rollout, verdicts: Mapping[str, Verdict]
    ) -> str | None:
        """The solution that the teacher reads for this rollout; None: the rollout is left out."""

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Put the teacher's prompt with a solution before each rollout that has one."""
        samples: list[TrainSample] = []
        spans: dict[str, ErrorSpan] = {}
        num_missing = 0
        with progress.stage(Stage.BUILD):
            for group in groups:
                template = self.template_of(group.problem)
                wanted = "demonstration" in placeholders(template)
                prompts: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = {}  # most are alike
                for rollout in group.rollouts:
                    solution = self.solution(group, rollout, verdicts) if wanted else None
                    span = self.distilled_span(rollout)
                    num_missing += wanted and not solution
                    if span is None or (wanted and not solution):
                        continue
                    spans[rollout.id] = span
                    texts = self._texts(group.problem, solution or "", verdicts[rollout.id])
                    if texts not in prompts:
                        prompts[texts] = self._prompt(group.problem, *texts)
                    prompt_ids, cut = prompts[texts]
                    samples.append(distilled(rollout, span, prompt_ids, cut=cut))
        metrics = {**sample_metrics(samples), NO_DEMONSTRATION: float(num_missing)}
        return self.training_set(samples, spans, groups, verdicts, metrics)

    def template_of(self, problem: Problem) -> str:
        """The user turn of the teacher: the problem's own, else `teacher.solution_template`."""
        return teacher_template(problem, self.config.teacher.solution_template)

    def _texts(self, problem: Problem, solution: str, verdict: Verdict) -> tuple[str, str]:
        """The solution and the feedback that the teacher reads."""
        shown = self.config.teacher.show_feedback
        return solution, problem.feedback_on(verdict) if shown else ""

    def _prompt(
        self, problem: Problem, solution: str, feedback: str
    ) -> tuple[tuple[int, ...], bool]:
        """The teacher's prompt, and whether a text in it was cut to fit."""
        template = self.template_of(problem)
        texts = {"demonstration": solution, "feedback": feedback}
        return teacher_prompt(
            problem,
            template,
            {name: text for name, text in texts.items() if name in placeholders(template)},
            chat=self.chats.teacher,
            max_tokens=self.config.teacher.max_prompt_tokens,
        )
