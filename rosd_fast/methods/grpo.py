"""GRPO, group relative policy optimization (arXiv 2402.03300).

    build   every token of a rollout gets the rollout's advantage in its group; no teacher

Options: `policy`. With `loss.distill_weight`, the divergence from the teacher under the student's
own prompt is added on all tokens: with a frozen teacher this is the penalty on leaving the initial
policy, over the full vocabulary and without sampling noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.targets import distilled, with_tokens

if TYPE_CHECKING:
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Reflection, Verdict


class Grpo(Method):
    """Reinforces each rollout by its advantage in its group."""

    default_weights = (0.0, 1.0)
    needs_success = False
    reads = ("span.thinking",)  # with loss.distill_weight

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Add the policy gradient of all rollouts."""
        rollouts = list(with_tokens(groups)) if self.needs_teacher else []
        spans = {r.id: span for r in rollouts if (span := self.distilled_span(r))}
        samples = [distilled(r, spans[r.id], r.prompt_ids) for r in rollouts if r.id in spans]
        return self.training_set(samples, spans, groups, verdicts)
