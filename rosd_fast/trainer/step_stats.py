"""What an optimizer step reports: sums and maxima over its micro-batches, on all ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from rosd_fast.config import PolicyConfig
from rosd_fast.trainer.agreement import Agreement
from rosd_fast.trainer.loss import PolicyTokenLoss, importance_weights
from rosd_fast.types import PackedBatch, PolicyTokens
from rosd_fast.utils.transfer import on_device
from rosd_kernels import SpanDivergenceOutput, SpanLogprobOutput, SpanStats

SUMMED = frozenset({"policy/loss"})
"""Metrics that are sums over the tokens, whose weights contain the normalizer."""


class Computed(NamedTuple):
    """What was computed of a micro-batch; None where its samples have no such loss."""

    divergence: SpanDivergenceOutput | None = None
    policy: SpanLogprobOutput | None = None
    agreement: Agreement | None = None


COUNTED = ("loss", "policy")
"""The first part of the names of means over the distilled tokens, and over the other ones."""


@dataclass(slots=True)
class StepStats:
    """The numbers of one rank, or of several ranks once `merge` has added them.

    num_batches: micro-batches with trained tokens.
    sums: metric name -> sum over the tokens.
    counts: metric name -> number of tokens in its sum, where that is not the number of all trained
        tokens.
    maxima: metric name -> maximum over the micro-batches.
    per_token: rollout id -> divergence in nats of each of its distilled tokens, in their order.
    logprobs: rollout id -> the student's log-probability of each of its tokens whose loss needs no
        teacher, in their order.
    """

    num_batches: int = 0
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    maxima: dict[str, float] = field(default_factory=dict)
    per_token: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def merge(self, other: StepStats) -> None:
        """Add the numbers of another rank."""
        self.num_batches += other.num_batches
        for key, value in other.sums.items():
            self.sums[key] += value
        for key, value in other.maxima.items():
            self.update_max(key, value)
        for key, count in other.counts.items():
            self.counts[key] += count
        for rollout_id, values in other.per_token.items():
            self.per_token[rollout_id] += values
        for rollout_id, values in other.logprobs.items():
            self.logprobs[rollout_id] += values

    def update_max(self, key: str, value: float) -> None:
        """Raise the maximum of `key` to `value` if it is lower."""
        self.maxima[key] = max(self.maxima.get(key, value), value)

    def metrics(self, num_distilled: int, num_policy: int) -> dict[str, float]:
        """The finite metrics: means over the step's tokens, sums (`SUMMED`), and maxima.

        num_distilled: tokens that the means `loss/...` are taken over.
        num_policy: tokens that the means `policy/...` are taken over.

        Empty if no micro-batch has been added.
        """
        if not self.num_batches:
            return {}
        totals: dict[str, int] = dict(zip(COUNTED, (num_distilled, num_policy), strict=True))

        def mean(key: str, value: float) -> float:
            count = self.counts.get(key) or totals[key.partition("/")[0]]
            return value / max(1, count)

        means = {k: v if k in SUMMED else mean(k, v) for k, v in self.sums.items()}
        metrics = means | self.maxima | {"loss/num_micro_batches": float(self.num_batches)}
        return {key: value for key, value in metrics.items() if math.isfinite(value)}


class MicroBatchStats:
    """Collects the statistics of this rank's micro-batches as tensors.

    Nothing here waits for the device before `totals`.

    importance_clip: `loss.importance_clip`.
    policy: the options of the policy gradient.
    num_batches: micro-batches with trained tokens.
    loss: sum of the micro-batches' losses.
    sums, counts: as in `StepStats`.
    gaps: largest |student - rollout log-probability| of each micro-batch.
    rows: each micro-batch with the [N] divergences of its distilled tokens.
    logprobs: each micro-batch with the [M] log-probabilities of its other tokens.
    stats: what the kernels dropped in each micro-batch.
    """

    def __init__(self, importance_clip: float | None, policy: PolicyConfig) -> None:
        self.importance_clip = importance_clip
        self.policy = policy
        self.num_batches = 0
        self.loss: Tensor | float = 0.0
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.gaps: list[Tensor] = []
        self.rows: list[tuple[PackedBatch, Tensor]] = []
        self.logprobs: list[tuple[PackedBatch, Tensor]] = []
        self.stats: list[SpanStats] = []

    def add(self, batch: PackedBatch, computed: Computed, num_distilled: int) -> None:
        """Add a micro-batch; one without trained tokens changes nothing.

        num_distilled: distilled tokens of the step, on all ranks.
        """
        divergence, policy, agreement = computed
        if divergence is not None and batch.num_distilled:
            self._add_divergence(batch, divergence)
            self.loss += divergence.loss.detach() / num_distilled
        if policy is not None and batch.policy is not None and batch.num_policy:
            self._add_policy(batch.policy, policy)
            self.logprobs.append((batch, policy.logprob))
            self.loss += policy.loss.detach()
        if agreement is not None:
            self._add_agreement(agreement)
        self.num_batches += batch.num_distilled + batch.num_policy > 0

    @property
    def logprob_gap(self) -> float:
        """Sum of |student - rollout log-probability| over the tokens; waits for the device."""
        return float(sum(self.sums.get(f"{kind}/logprob_gap_mean", 0.0) for kind in COUNTED))

    def _add_divergence(self, batch: PackedBatch, output: SpanDivergenceOutput) -> None:
        divergence, logprob = output.per_token, output.student_logprob
        assert logprob is not None  # token_ids were given
        assert output.student_entropy is not None and output.teacher_entropy is not None
        rollout_logprobs = on_device(batch.rollout_logprobs, logprob.device).to(logprob.dtype)
        weights = on_device(batch.weights, logprob.device).to(divergence.dtype)
        importance = importance_weights(logprob, rollout_logprobs, self.importance_clip)
        self.sums["loss/divergence"] += (weights * divergence).sum()
        self.sums["loss/importance_weight_mean"] += importance.sum()
        gap = (logprob - rollout_logprobs).abs()
        self.sums["loss/logprob_gap_mean"] += gap.sum()
        self.gaps.append(gap.max())
        if self.importance_clip is not None:
            self.sums["loss/importance_clipped_frac"] += importance.eq(self.importance_clip).sum()
        self.sums["loss/student_entropy"] += output.student_entropy.sum()
        self.sums["loss/teacher_entropy"] += output.teacher_entropy.sum()
        self.rows.append((batch, divergence))
        self.stats.append(output.stats)

    def _add_policy(self, tokens: PolicyTokens, output: SpanLogprobOutput) -> None:
        logprob, config = output.logprob, self.policy
        rollout_logprobs, advantages = (
            on_device(values, logprob.device).to(logprob.dtype)
            for values in (tokens.rollout_logprobs, tokens.advantages)
        )
        delta = logprob - rollout_logprobs
        ratio = delta.exp()
        clipped = (ratio > 1 + config.clip_high) & (advantages > 0)
        clipped |= (ratio < 1 - config.clip_low) & (advantages < 0)
        # Not `output.loss`: a vocab-parallel one is the sum over all ranks.
        losses = PolicyTokenLoss(tokens, config, logprob.device)
        self.sums["policy/loss"] += losses(logprob, output.entropy, slice(None)).sum()
        self.sums["policy/ratio_mean"] += ratio.sum()
        self.sums["policy/clipped_frac"] += clipped.sum()
        self.sums["policy/entropy_mean"] += output.entropy.sum()
        self.sums["policy/logprob_mean"] += logprob.sum()
        self.sums["policy/logprob_gap_mean"] += delta.abs().sum()
        self.gaps.append(delta.abs().max())

    def _add_agreement(self, agreement: Agreement) -> None:
        for metric, values in {
            "diag/topk_overlap": agreement.overlap,
            "diag/student_mass_topk": agreement.student_mass,
            "diag/teacher_mass_topk": agreement.teacher_mass,
            "diag/divergence_before": agreement.before,
        }.items():
            if len(values):
                self.sums[metric] += values.sum()
                self.counts[metric] += len(values)

    def totals(self) -> StepStats:
        """The collected statistics as numbers; waits for the device."""
        totals = StepStats(num_batches=self.num_batches)
        for key, value in self.sums.items():
            totals.sums[key] += float(value)
        totals.counts.update(self.counts)
        for gap in self.gaps:
            totals.update_max("loss/logprob_gap_max", float(gap))
        if any(stats.measured is not None for stats in self.stats):  # else nothing was dropped
            for stats, (batch, _) in zip(self.stats, self.rows, strict=True):
                totals.sums["loss/active_frac"] += stats.active_frac * batch.num_distilled
                totals.update_max("loss/dropped_mass_max", stats.dropped_mass_max)
                totals.update_max("loss/grad_error_bound", stats.grad_error_bound)
        for batch, divergence in self.rows:
            by_rollout(totals.per_token, batch, batch.sample_index, divergence)
        for batch, logprobs in self.logprobs:
            assert batch.policy is not None
            by_rollout(totals.logprobs, batch, batch.policy.sample_index, logprobs)
        return totals


def by_rollout(
    found: dict[str, list[float]], batch: PackedBatch, sample_index: Tensor, values: Tensor
) -> None:
    """Append each token's value to the list of its rollout."""
    for sample, value in zip(sample_index.tolist(), values.tolist(), strict=True):
        found[batch.rollout_ids[sample]].append(value)
