"""On-policy distillation from another model (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).

    build   all tokens of every rollout; the teacher reads the student's own prompt

Options: `teacher.model`, the model to learn from, and `loss.divergence`. Right and wrong rollouts
are treated the same: the verifier only measures. With `loss.policy_weight`, the student's initial
weights may be the teacher: a penalty on leaving them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.targets import distilled, with_tokens

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Reflection, Verdict


class Opd(Method):
    """Distills every token of every rollout from a separate teacher."""

    needs_success = False
    tells_apart = False

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
        rollouts = list(with_tokens(groups))
        spans = {r.id: span for r in rollouts if (span := self.distilled_span(r))}
        samples = [distilled(r, spans[r.id], r.prompt_ids) for r in rollouts if r.id in spans]
        return self.training_set(samples, spans, groups, verdicts)
