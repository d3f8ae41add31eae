"""The learner: teacher states, student states, fused divergence, AdamW, teacher update.

The loss is a mean over all distilled tokens of the step, on all ranks together, so neither how
samples are packed into micro-batches nor how these are dealt to ranks changes the gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.adapters import fingerprint, whole_weights
from rosd_fast.model.attention import hidden_states, packed_forward
from rosd_fast.model.blocks import prepare_blocks
from rosd_fast.model.fsdp import collect, fill, shard, skeleton
from rosd_fast.model.head import Head, head
from rosd_fast.model.vocab_parallel import GatheredTokens, check_shardable
from rosd_fast.trainer.loss import span_loss, vocabulary_order
from rosd_fast.trainer.optim import Optimizer
from rosd_fast.trainer.step_stats import MicroBatchStats
from rosd_fast.trainer.teacher import Teacher, needs_copy
from rosd_fast.types import PackedBatch
from rosd_fast.utils.distributed import SINGLE_PROCESS, World, full
from rosd_kernels import SpanDivergenceOutput, VocabularyOrder

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


class Learner:
    """Owns the student's optimizer and the teacher; of several ranks each has one.

    model: what is trained, with its initial weights. Alone, it is trained in place. Of several
    ranks, rank 0 gives the model and the others its skeleton: the weights are spread over the
    ranks, and `gather_weights` puts them back into rank 0's. Which parameters are trained is settled
    (`choose_trainable`).

    The model runs in eval mode: dropout would make the student differ from the policy that sampled.
    All methods but the properties are collectives. Raises UserError for options that do not fit the
    model.
    """

    def __init__(
        self, model: PreTrainedModel, config: Config, world: World = SINGLE_PROCESS
    ) -> None:
        vocab, top_k = head(model).weight.shape[0], config.loss.top_k
        if top_k is not None and top_k > vocab:
            raise UserError(
                f"{top_k} is more than the vocabulary of {vocab} tokens", where="loss.top_k"
            )
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.world = world
        self.whole = model.eval() if world.is_rank0 else None
        self.fingerprint = fingerprint(model) if world.is_rank0 else ""
        self.shards_head = world.size > 1 and config.parallel.head == "shard"
        if self.shards_head:
            check_shardable(model)
        frozen = self._copied(model)
        self.model = model if world.size == 1 else self._spread(model, torch.float32)
        self.teacher = Teacher(self.model, config.teacher, frozen)
        if world.size == 1:
            prepare_blocks(model, config.learner, model.device)
        elif config.teacher.backend == "sglang":
            self.teacher.keep_head_only(copied_head(self.model, self.dtype))
        self.optimizer = Optimizer(self.model.named_parameters(), config.optim)
        rows = self.teacher.head.weight.shape[0] if self.shards_head else vocab
        self.order = vocabulary_order(config.loss, rows)
        self.num_skipped = 0  # steps in a row that were not finite
        self._gathered: int | None = None  # the number of updates that rank 0's model is of

    @property
    def weights(self) -> dict[str, Tensor]:
        """On rank 0 the student's weights, as of the last `gather_weights`, by the state-dict names of a
        model without adapters; they share memory with it where they can."""
        assert self.whole is not None
        return whole_weights(self.whole)

    def gather_weights(self) -> None:
        """Update rank 0's full model to the current weights. A collective."""
        if self.world.size > 1 and self._gathered != self.optimizer.num_updates:
            collect(self.model, self.whole)
            self._gathered = self.optimizer.num_updates

    def gather_teacher(self, into: PreTrainedModel | None) -> None:
        """Write the teacher's current weights into `into`, None on other ranks. A collective."""
        self.teacher.collect(into)

    def step(
        self, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None = None
    ) -> StepResult:
        """One optimizer step on all micro-batches of all ranks together.

        batches: this rank's, as many as every other rank has; some may be empty.
        teacher_states: of each micro-batch the teacher's [N, H], None: computed here.
        Without distilled tokens nothing changes. A loss or gradient that is not finite skips the
        update (`loss/skipped` is 1). The result is rank 0's; of another rank it is its own part.
        Raises TrainingDiverged after 5 such steps in a row.
        """
        states: Sequence[Tensor | None] = teacher_states or [None] * len(batches)
        pairs = list(zip(batches, states, strict=True))
        total = int(self.world.sum(sum(batch.num_distilled for batch in batches)))
        metrics = {
            "loss/num_distilled_tokens": float(total),
            "loss/lr": self.optimizer.lr,
            "loss/skipped": 0.0,
        }
        if total == 0:
            return StepResult(metrics=metrics)
        collected = MicroBatchStats(self.config.loss.importance_clip)
        self.optimizer.zero_grad()
        for batch, states in pairs:
            collected.add(batch, self._backward(batch, states, total))
        grad_norm = self._update(self.world.sum(float(collected.loss)))
        stats = collected.totals()
        for other in (self.world.gather(stats) or [])[1:]:
            stats.merge(other)
        metrics |= stats.metrics(total)
        if grad_norm is None:
            return StepResult(metrics=metrics | {"loss/skipped": 1.0})
        return StepResult(
            metrics=metrics | {"loss/grad_norm": grad_norm}, per_token=dict(stats.per_token)
        )

    def state_dict(self, *, portable: bool = False) -> dict[str, Tensor]:
        """What a resume needs besides the initial weights, as a flat mapping.

        It holds the trained weights, AdamW's moments, the teacher's average, and this rank's
        vocabulary order.

        portable: leave out what only a run with the same number of ranks can read.
        """
        parts: dict[str, Optimizer | Teacher | VocabularyOrder | None] = {
            "optimizer": self.optimizer,
            "teacher": self.teacher,
        }
        if not portable:
            parts[f"order.{self.world.rank}"] = self.order
        return {
            f"{name}.{key}": value
            for name, part in parts.items()
            if part is not None
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over `state`. Raises KeyError or RuntimeError when it belongs to another model."""
        self.optimizer.load_state_dict(with_prefix(state, "optimizer."))
        self._gathered = None
        self.teacher.load_state_dict(with_prefix(state, "teacher."))
        order = with_prefix(state, f"order.{self.world.rank}.")
        if self.order is not None and order:  # a portable state has none: a new order is learned
            self.order.load_state_dict(order)

    def _copied(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """A second set of the weights, for the teacher; None where it needs none, or a server has
        it."""
        config = self.config.teacher
        if not needs_copy(model, config):
            return None
        if self.world.size == 1:
            own = copy.deepcopy(model)
            prepare_blocks(own, self.config.learner, model.device)
            return own
        if config.backend == "sglang":
            return None
        kept = torch.float32 if config.kind == "ema" else self.dtype
        return self._spread(model, kept, offload=config.offload)

    def _spread(
        self, model: PreTrainedModel, kept: torch.dtype, *, offload: bool = False
    ) -> PreTrainedModel:
        """Rank 0's model, each rank's share of it kept in `kept`."""
        assert self.world.mesh is not None
        spread = skeleton(model, kept)
        prepare_blocks(spread, self.config.learner, torch.device(self.world.mesh.device_type))
        shard(
            spread,
            self.world,
            dtype=self.dtype,
            offload=offload,
            head_rows=self.shards_head,
        )
        fill(spread, model if self.world.is_rank0 else None)
        return spread

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
            if self.shards_head:
                output = self._vocab_parallel_loss(student_hidden, teacher_hidden, batch)
            else:
                output = self._loss(student_hidden, teacher_hidden, batch)
            self.teacher.release()
            # Gradients are averaged over the ranks, but each rank's loss is a part of the sum.
            (output.loss * self.world.size / total).backward()
        self.optimizer.accumulate()
        return output

    def _vocab_parallel_loss(
        self, student_hidden: Tensor, teacher_hidden: Tensor, batch: PackedBatch
    ) -> SpanDivergenceOutput:
        """With this rank's rows of the head, on the tokens of all ranks; the result is of its own,
        but for the loss, whose gradient with respect to the rows is that of all."""
        group, device = self.world.shard_group, student_hidden.device
        assert group is not None
        everyone = GatheredTokens.of(batch, group, device)
        output = self._loss(
            everyone.gather(student_hidden),
            everyone.gather(teacher_hidden),
            everyone.batch(batch, device),
        )
        return everyone.part(output)

    def _loss(
        self, student_hidden: Tensor, teacher_hidden: Tensor, batch: PackedBatch
    ) -> SpanDivergenceOutput:
        return span_loss(
            student_hidden,
            teacher_hidden,
            batch,
            student_head=head(self.model),
            teacher_head=self.teacher.head,
            config=self.config.loss,
            temperature=self.config.sample.temperature,
            order=self.order,
            vocab_group=self.world.shard_group if self.shards_head else None,
        )

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


def copied_head(model: PreTrainedModel, dtype: torch.dtype) -> Head:
    """A copy of the output head of a model that is spread over ranks, or of this rank's rows of it.
    A collective."""
    layer = head(model)
    weight, bias = (
        None if x is None else full(x.detach()).to(dtype, copy=True)
        for x in (layer.weight, layer.bias)
    )
    assert weight is not None
    return replace(layer, weight=weight, bias=bias)


def gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """The [N, H] states that predict the distilled tokens."""
    return hidden.index_select(0, rows.to(hidden.device))


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
