"""On-policy distillation from another model (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).

    build   all tokens of every rollout; the teacher reads the student's own prompt, or the
            problem's `teacher_prompt`

Options: `teacher.model`, the model to learn from, and `loss.divergence`. Right and wrong rollouts
are treated the same: the verifier only measures. With `loss.policy_weight`, the student's initial
weights may be the teacher: a penalty on leaving them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.batch.samples import teacher_prompt
from rosd_fast.errors import UserError
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.targets import distilled, with_tokens

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import ErrorSpan, Group, Reflection, TrainSample, Verdict


class Opd(Method):
    """Distills every token of every rollout from a separate teacher."""

    needs_success = False
    tells_apart = False
    reads = ("span.thinking",)

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError if the student would have nothing to learn from but its own past."""
        super().check_options(config)
        if config.teacher.model is None and not cls.weights(config)[1]:
            raise UserError(
                "the method opd learns from another model, and the student's own weights under "
                "the student's own prompt teach nothing",
                where="teacher.model",
                fix="Name a larger or better trained model of the same tokenizer",
            )

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Put the student's prompt before the rollout on both sides."""
        spans: dict[str, ErrorSpan] = {}
        samples: list[TrainSample] = []
        for group in groups:
            privileged = None
            if group.problem.teacher_prompt:
                privileged, _ = teacher_prompt(
                    group.problem,
                    group.problem.teacher_prompt,
                    {},
                    chat=self.chats.teacher,
                    max_tokens=self.config.teacher.max_prompt_tokens,
                )
            for rollout in with_tokens([group]):
                if (span := self.distilled_span(rollout)) is not None:
                    spans[rollout.id] = span
                    prompt_ids = privileged or rollout.prompt_ids
                    samples.append(distilled(rollout, span, prompt_ids))
        return self.training_set(samples, spans, groups, verdicts)
