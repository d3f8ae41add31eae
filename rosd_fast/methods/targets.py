"""The samples that methods build: what is learned from a rollout, and on which of its tokens."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rosd_fast.batch.samples import sample_of
from rosd_fast.types import ErrorSpan, TrainSample

if TYPE_CHECKING:
    from rosd_fast.config import PolicyConfig
    from rosd_fast.types import Group, Rollout, Verdict

STD_EPS = 1e-6  # added to a group's standard deviation, as verl does
NO_DEMONSTRATION = "select/num_no_demonstration"
"""Metric: rollouts of kept groups for which there is no solution that the teacher could read."""


def whole(rollout: Rollout, start: int = 0) -> ErrorSpan:
    """The span of all tokens from `start` on. Raises ValueError when there are none."""
    end = len(rollout.completion_ids)
    return ErrorSpan(rollout_id=rollout.id, start=start, end=end, source="full")


def distilled(
    rollout: Rollout,
    span: ErrorSpan,
    teacher_prompt_ids: tuple[int, ...],
    *,
    weight: float = 1.0,
    cut: bool = False,
) -> TrainSample:
    """The sample that moves the student to the teacher on the tokens of the span.

    cut: whether a text of the teacher's prompt had to be cut to fit.
    """
    return sample_of(
        rollout, span, teacher_prompt_ids=teacher_prompt_ids, weight=weight, reflection_cut=cut
    )


def reinforced(
    rollout: Rollout, *, advantage: float | None, weight: float, span: ErrorSpan | None = None
) -> TrainSample:
    """The sample whose loss needs no teacher: policy gradient, or likelihood without an advantage.

    span: the tokens; None: all.
    """
    return sample_of(rollout, span or whole(rollout), advantage=advantage, weight=weight)


def with_tokens(groups: Sequence[Group]) -> Iterator[Rollout]:
    """The rollouts of the groups that have any token, in order."""
    for group in groups:
        yield from (rollout for rollout in group.rollouts if rollout.completion_ids)


def policy_samples(
    groups: Sequence[Group],
    verdicts: Mapping[str, Verdict],
    config: PolicyConfig,
    *,
    weight: float,
) -> list[TrainSample]:
    """One sample per rollout with its group-normalized advantage (GRPO, arXiv 2402.03300).

    weight: that of the policy gradient in the loss. Rollouts that `config.mask_truncated` leaves
    out still count in their group's mean.
    """
    samples = []
    for group in groups:
        scores = [verdicts[rollout.id].score for rollout in group.rollouts]
        for rollout, advantage in zip(
            group.rollouts, advantages(scores, config.advantage), strict=True
        ):
            masked = config.mask_truncated and rollout.finish_reason == "length"
            if rollout.completion_ids and not masked:
                samples.append(reinforced(rollout, advantage=advantage, weight=weight))
    return samples


def advantages(scores: Sequence[float], kind: str) -> list[float]:
    """The advantages of a group's rollouts, given their scores.

        group_std    (score - mean) / (standard deviation + 1e-6), with G - 1 degrees of freedom
        group_mean   score - mean                                (Dr. GRPO, arXiv 2503.20783)

    All zero where the scores are equal.

    >>> advantages([1.0, 0.0, 0.0, 1.0], "group_mean")
    [0.5, -0.5, -0.5, 0.5]
    """
    if len(set(scores)) <= 1:
        return [0.0] * len(scores)
    mean = statistics.fmean(scores)
    scale = statistics.stdev(scores, mean) + STD_EPS if kind == "group_std" else 1.0
    return [(score - mean) / scale for score in scores]
