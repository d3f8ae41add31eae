"""What an optimizer step reports: sums and maxima over its micro-batches, on all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from rosd_fast.trainer.loss import importance_weights
from rosd_fast.types import PackedBatch
from rosd_kernels import SpanDivergenceOutput, SpanDivergenceStats


@dataclass(slots=True)
class StepStats:
    """The numbers of one rank, or of several ranks once `merge` has added them.

    num_batches: micro-batches with distilled tokens.
    sums: metric name -> sum over the distilled tokens.
    maxima: metric name -> maximum over the micro-batches.
    per_token: rollout id -> divergence in nats of each of its distilled tokens, in their order.
    """

    num_batches: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def merge(self, other: StepStats) -> None:
        """Add the numbers of another rank."""
        self.num_batches += other.num_batches
        for key, value in other.sums.items():
            self.sums[key] += value
        for key, value in other.maxima.items():
            self.update_max(key, value)
        for rollout_id, values in other.per_token.items():
            self.per_token[rollout_id] += values

    def update_max(self, key: str, value: float) -> None:
        """Raise the maximum of `key` to `value` if it is lower."""
        self.maxima[key] = max(self.maxima.get(key, value), value)

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """The finite metrics: means over the step's `num_tokens` distilled tokens, and maxima.

        Empty if no micro-batch has been added.
        """
        if not self.num_batches:
            return {}
        means = {key: value / num_tokens for key, value in self.sums.items()}
        metrics = means | self.maxima | {"loss/num_micro_batches": float(self.num_batches)}
        return {key: value for key, value in metrics.items() if math.isfinite(value)}


class MicroBatchStats:
    """Collects the statistics of this rank's micro-batches as tensors.

    Nothing here waits for the device before `totals`.

    importance_clip: `loss.importance_clip`.
    loss: sum of the micro-batches' losses.
    sums: metric name -> sum over the distilled tokens.
    gaps: largest |student - rollout log-probability| of each micro-batch.
    rows: each micro-batch with the [N] divergences of its distilled tokens.
    stats: what the kernels dropped in each micro-batch.
    """

    def __init__(self, importance_clip: float | None) -> None:
        self.importance_clip = importance_clip
        self.loss: Tensor | float = 0.0
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.gaps: list[Tensor] = []
        self.rows: list[tuple[PackedBatch, Tensor]] = []
        self.stats: list[SpanDivergenceStats] = []

    def add(self, batch: PackedBatch, output: SpanDivergenceOutput) -> None:
        """Add a micro-batch; one without distilled tokens changes nothing."""
        if not batch.num_distilled:
            return
        divergence, logprob = output.per_token, output.student_logprob
        assert logprob is not None  # token_ids were given
        assert output.student_entropy is not None and output.teacher_entropy is not None
        weights = batch.weights.to(divergence)
        importance = importance_weights(
            logprob, batch.rollout_logprobs.to(logprob), self.importance_clip
        )
        self.loss += output.loss.detach()
        self.sums["loss/divergence"] += (weights * divergence).sum()
        self.sums["loss/importance_weight_mean"] += importance.sum()
        gap = (logprob - batch.rollout_logprobs.to(logprob)).abs()
        self.sums["loss/logprob_gap_mean"] += gap.sum()
        self.gaps.append(gap.max())
        if self.importance_clip is not None:
            self.sums["loss/importance_clipped_frac"] += importance.eq(self.importance_clip).sum()
        self.sums["loss/student_entropy"] += output.student_entropy.sum()
        self.sums["loss/teacher_entropy"] += output.teacher_entropy.sum()
        self.rows.append((batch, divergence))
        self.stats.append(output.stats)

    def totals(self) -> StepStats:
        """The collected statistics as numbers; waits for the device."""
        totals = StepStats(num_batches=len(self.rows))
        for key, value in self.sums.items():
            totals.sums[key] += float(value)
        for gap in self.gaps:
            totals.update_max("loss/logprob_gap_max", float(gap))
        if any(stats.measured is not None for stats in self.stats):  # else nothing was dropped
            for stats, (batch, _) in zip(self.stats, self.rows, strict=True):
                totals.sums["loss/active_frac"] += stats.active_frac * batch.num_distilled
                totals.update_max("loss/dropped_mass_max", stats.dropped_mass_max)
                totals.update_max("loss/grad_error_bound", stats.grad_error_bound)
        for batch, divergence in self.rows:
            for sample, value in zip(batch.sample_index.tolist(), divergence.tolist(), strict=True):
                totals.per_token[batch.rollout_ids[sample]].append(value)
        return totals
