"""The learner: teacher states, student states, fused divergence, AdamW, teacher update.

The loss is a mean over all distilled tokens of the step, so how samples are packed into
micro-batches does not change the gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.loss import importance_weights, span_loss, vocabulary_order
from rosd_fast.model.attention import head, hidden_states, packed_forward
from rosd_fast.model.teacher import Teacher
from rosd_fast.optim import Optimizer
from rosd_fast.types import PackedBatch
from rosd_kernels import SpanDivergenceOutput, SpanDivergenceStats

MAX_SKIPPED = 5


class TrainingDiverged(RunFailed):
    """Loss or gradient was not finite in several steps in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did.

    metrics: `loss/...`; those that a step without distilled tokens cannot have are absent, not
    zero. per_token: rollout id -> divergence in nats of each of its distilled tokens, in their
    order.
    """

    metrics: dict[str, float]
    per_token: dict[str, list[float]] = field(default_factory=dict)


class Tally:
    """Collects what a step reports, without waiting for the device before the end."""

    def __init__(self, is_clip: float | None) -> None:
        self.is_clip = is_clip
        self.loss: Tensor | float = 0.0
        self.sums: dict[str, Tensor | float] = defaultdict(float)
        self.gaps: list[Tensor] = []  # largest |student - rollout log-prob| of each micro-batch
        self.rows: list[tuple[PackedBatch, Tensor]] = []
        self.stats: list[SpanDivergenceStats] = []

    def add(self, batch: PackedBatch, output: SpanDivergenceOutput) -> None:
        divergence, logprob = output.per_token, output.student_logprob
        assert logprob is not None  # token_ids were given
        assert output.student_entropy is not None and output.teacher_entropy is not None
        weights = batch.weights.to(divergence)
        importance = importance_weights(logprob, batch.rollout_logprobs.to(logprob), self.is_clip)
        self.loss += output.loss.detach()
        self.sums["loss/divergence"] += (weights * divergence).sum()
        self.sums["loss/is_weight_mean"] += importance.sum()
        gap = (logprob - batch.rollout_logprobs.to(logprob)).abs()
        self.sums["loss/logprob_gap_mean"] += gap.sum()
        self.gaps.append(gap.max())
        if self.is_clip is not None:
            self.sums["loss/is_clipped_frac"] += importance.eq(self.is_clip).sum()
        self.sums["loss/student_entropy"] += output.student_entropy.sum()
        self.sums["loss/teacher_entropy"] += output.teacher_entropy.sum()
        self.rows.append((batch, divergence))
        self.stats.append(output.stats)

    def metrics(self, total: int) -> dict[str, float]:
        """Means over the step's distilled tokens."""
        return {key: float(value) / total for key, value in self.sums.items()} | {
            "loss/logprob_gap_max": max(map(float, self.gaps)),
            "loss/num_micro_batches": float(len(self.rows)),
            **self.sparsity_metrics(total),
        }

    def sparsity_metrics(self, total: int) -> dict[str, float]:
        """What the divergence left out; empty where it computed everything."""
        if all(stats.measured is None for stats in self.stats):
            return {}
        shares = (
            stats.active_frac * batch.num_distilled / total
            for stats, (batch, _) in zip(self.stats, self.rows, strict=True)
        )
        return {
            "loss/active_frac": sum(shares),
            "loss/dropped_mass_max": max(stats.dropped_mass_max for stats in self.stats),
            "loss/grad_error_bound": max(stats.grad_error_bound for stats in self.stats),
        }

    def per_token(self) -> dict[str, list[float]]:
        """Rollout id -> divergences of its distilled tokens."""
        result: dict[str, list[float]] = defaultdict(list)
        for batch, divergence in self.rows:
            for sample, value in zip(batch.sample_index.tolist(), divergence.tolist(), strict=True):
                result[batch.rollout_ids[sample]].append(value)
        return dict(result)


class Learner:
    """Owns the student's optimizer and the teacher. The student itself is trained in place.

    The model runs in eval mode: dropout would make the student differ from the policy that sampled.
    Raises UserError for options that do not fit the model.
    """

    def __init__(self, model: PreTrainedModel, config: Config) -> None:
        vocab, top_k = head(model).weight.shape[0], config.loss.top_k
        if top_k is not None and top_k > vocab:
            raise UserError(
                f"{top_k} is more than the vocabulary of {vocab} tokens", where="loss.top_k"
            )
        self.model = model.eval()
        self.config = config
        self.teacher = Teacher(model, config.teacher)
        self.optimizer = Optimizer(model.named_parameters(), config.optim)
        self.order = vocabulary_order(config.loss, vocab)
        self.num_skipped = 0  # steps in a row that were not finite

    @property
    def weights(self) -> dict[str, Tensor]:
        """The student's weights by state-dict name; they share the model's memory."""
        return self.model.state_dict()

    def step(
        self, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None = None
    ) -> StepResult:
        """One optimizer step on all micro-batches together.

        teacher_states: of each micro-batch the teacher's [N, H], None: computed here.
        Without distilled tokens nothing changes. A loss or gradient that is not finite skips the
        update (`loss/skipped` is 1). Raises TrainingDiverged after 5 such steps in a row.
        """
        states: Sequence[Tensor | None] = teacher_states or [None] * len(batches)
        given = [
            (batch, own) for batch, own in zip(batches, states, strict=True) if batch.num_distilled
        ]
        total = sum(batch.num_distilled for batch, _ in given)
        metrics = {
            "loss/num_distilled_tokens": float(total),
            "loss/lr": self.optimizer.lr,
            "loss/skipped": 0.0,
        }
        if total == 0:
            return StepResult(metrics=metrics)
        tally = Tally(self.config.loss.is_clip)
        self.optimizer.zero_grad()
        for batch, own in given:
            tally.add(batch, self._backward(batch, own, total))
        grad_norm = self._update(float(tally.loss))
        metrics |= tally.metrics(total)
        metrics |= {"loss/skipped": 1.0} if grad_norm is None else {"loss/grad_norm": grad_norm}
        return StepResult(
            metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
            per_token={} if grad_norm is None else tally.per_token(),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Optimizer, teacher and vocabulary order as a flat mapping.

        The student's weights are saved as a model.
        """
        parts = {"optimizer": self.optimizer, "teacher": self.teacher, "order": self.order}
        return {
            f"{name}.{key}": value
            for name, part in parts.items()
            if part is not None
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`. Raises KeyError or RuntimeError when it belongs to another model."""
        self.optimizer.load_state_dict(with_prefix(state, "optimizer."))
        self.teacher.load_state_dict(with_prefix(state, "teacher."))
        if self.order is not None:
            self.order.load_state_dict(with_prefix(state, "order."))

    def _backward(
        self, batch: PackedBatch, teacher_states: Tensor | None, total: int
    ) -> SpanDivergenceOutput:
        """Add a micro-batch's gradient; its graph is freed before the next one starts."""
        if teacher_states is None:
            states = self.teacher.hidden_states(batch.teacher)
            teacher_hidden = gathered(states, batch.teacher.gather)
        else:
            teacher_hidden = teacher_states.to(self.teacher.head.weight)
        with packed_forward(self.model):
            student_hidden = gathered(
                hidden_states(self.model, batch.student), batch.student.gather
            )
            output = span_loss(
                student_hidden,
                teacher_hidden,
                batch,
                student_head=head(self.model),
                teacher_head=self.teacher.head,
                config=self.config.loss,
                temperature=self.config.sample.temperature,
                order=self.order,
            )
            (output.loss / total).backward()
        self.optimizer.accumulate()
        return output

    def _update(self, loss: float) -> float | None:
        """Apply the gradients; returns their norm, or None when the step was skipped."""
        grad_norm = self.optimizer.step() if math.isfinite(loss) else math.nan
        if math.isfinite(grad_norm):
            self.num_skipped = 0
            self.teacher.update(self.optimizer.masters)
            return grad_norm
        self.optimizer.zero_grad()
        self.num_skipped += 1
        if self.num_skipped >= MAX_SKIPPED:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self.num_skipped} steps in a row; lower "
                f"optim.lr (it is {self.config.optim.lr:g}) and resume from the last checkpoint"
            )
        return None


def gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """The [N, H] states that predict the distilled tokens."""
    return hidden.index_select(0, rows.to(hidden.device))


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
