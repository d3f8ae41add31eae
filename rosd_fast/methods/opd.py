"""On-policy distillation from another model (GKD, arXiv 2306.13649; MiniLLM, arXiv 2306.08543).

    build   all tokens of every rollout; the teacher reads the student's own prompt

Options: `teacher.model`, the model to learn from, and `loss.divergence`. Right and wrong rollouts
are treated the same: the verifier only measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.targets import distilled, with_tokens

if TYPE_CHECKING:
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Reflection, Verdict


class Opd(Method):
    """Distills every token of every rollout from a separate teacher."""

    needs_success = False

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
