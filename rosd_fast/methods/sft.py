"""Rejection fine-tuning: supervised fine-tuning on the rollouts that the verifier accepts (RFT,
arXiv 2308.01825; the inner loop of STaR, arXiv 2203.14465).

    build   all tokens of each correct rollout, by their likelihood; no teacher
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.methods.base import Method, TrainingSet
from rosd_fast.methods.targets import reinforced, with_tokens

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.report.progress import Hidden, Progress
    from rosd_fast.types import Group, Reflection, Verdict


class Sft(Method):
    """Raises the likelihood of correct rollouts."""

    default_weights = (0.0, 1.0)
    needs_success = False
    reads = ()

    @classmethod
    def check_options(cls, config: Config) -> None:
        """Raise UserError where a divergence is asked for: there is no teacher to distill from."""
        super().check_options(config)
        cls.refuse_weight(config, "distill_weight")

    def build(
        self,
        groups: Sequence[Group],
        verdicts: Mapping[str, Verdict],
        annotations: Mapping[str, Reflection],
        progress: Progress | Hidden,
    ) -> TrainingSet:
        """Take the correct rollouts."""
        correct = [r for r in with_tokens(groups) if verdicts[r.id].success]
        samples = [reinforced(r, advantage=None, weight=self.policy_weight) for r in correct]
        return TrainingSet(samples=samples)
