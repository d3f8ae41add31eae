"""The learner: teacher states, student states, fused loss, AdamW, teacher update.

The divergence is a mean over all distilled tokens of the step, on all ranks together, and the
weights of all other tokens contain their normalizer. So neither the packing of samples into
micro-batches nor their assignment to ranks changes the gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rosd_fast.config import Config
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.model.adapters import fingerprint, merged_weights
from rosd_fast.model.blocks import prepare_blocks
from rosd_fast.model.file_frame import FileFrame
from rosd_fast.model.file_layout import file_weights
from rosd_fast.model.fsdp import shard, skeleton
from rosd_fast.model.head import Head, head
from rosd_fast.model.layouts import packed_forward
from rosd_fast.model.policy import PolicyModel
from rosd_fast.model.release import allocate_parameters, release_parameters
from rosd_fast.model.shard_files import read_shards
from rosd_fast.model.token_rows import token_rows
from rosd_fast.model.vocab_parallel import GatheredTokens, check_shardable
from rosd_fast.trainer.agreement import agreement_of, with_rows_before
from rosd_fast.trainer.loss import policy_loss, span_loss, vocabulary_order
from rosd_fast.trainer.optim import Optimizer
from rosd_fast.trainer.schedule import num_updates
from rosd_fast.trainer.separate_teacher import common_rows, local_rows, placed_head, with_rows
from rosd_fast.trainer.shards import Shards
from rosd_fast.trainer.step_stats import Computed, MicroBatchStats
from rosd_fast.trainer.teacher import Teacher, needs_copy
from rosd_fast.trainer.token_logprobs import token_logprobs
from rosd_fast.types import PackedBatch, PolicyTokens
from rosd_fast.utils.distributed import SINGLE_PROCESS, World, full
from rosd_fast.utils.transfer import on_device
from rosd_kernels import SpanDivergenceOutput, SpanLogprobOutput, VocabularyOrder

MAX_SKIPPED = 5  # steps in a row

TeacherSource = PreTrainedModel | Literal["initial"] | None
"""The teacher's weights: those of another model, of which ranks other than 0 have a skeleton; the
student's initial ones; or None where nothing is distilled."""


class TrainingDiverged(RunFailed):
    """Loss or gradient was not finite in several steps in a row."""


class LogprobGapTooLarge(RunFailed):
    """The rollouts were not sampled from the distribution that is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an optimizer update did, or the updates of a step.

    metrics: `loss/...`; a metric that is undefined for the step's tokens is absent.
    per_token: rollout id -> divergence in nats of each of its distilled tokens, in their order.
    logprobs: rollout id -> the student's log-probability of each of its tokens whose loss needs no
        teacher, in their order.
    """

    metrics: dict[str, float]
    per_token: dict[str, list[float]] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def merge(cls, results: Sequence[StepResult]) -> StepResult:
        """The result of several updates of a step.

        Counts add up, maxima are taken, the learning rate is the last one, and everything else is a
        mean over the updates' trained tokens.
        """
        if len(results) == 1:
            return results[0]
        merged: dict[str, float] = {}
        for name in dict.fromkeys(name for result in results for name in result.metrics):
            having = [result for result in results if name in result.metrics]
            values = [result.metrics[name] for result in having]
            if name.startswith("loss/num_") or name == "loss/skipped":
                merged[name] = sum(values)
            elif name.endswith(("_max", "_bound")):
                merged[name] = max(values)
            elif name == "loss/lr":
                merged[name] = values[-1]
            else:
                weights = [max(1.0, result.num_tokens) for result in having]
                merged[name] = float(np.average(values, weights=weights))
        return cls(
            metrics=merged,
            per_token={name: v for result in results for name, v in result.per_token.items()},
            logprobs={name: v for result in results for name, v in result.logprobs.items()},
        )

    @property
    def num_tokens(self) -> float:
        """Number of trained tokens."""
        distilled = self.metrics["loss/num_distilled_tokens"]
        return distilled + self.metrics.get("loss/num_policy_tokens", 0.0)


class Learner:
    """Owns the student, its optimizer and the teacher. Each rank has a learner.

    The model runs in eval mode: dropout would make the student differ from the policy that sampled.
    All methods are collectives, the properties are not. Raises UserError for options that do not
    fit the model.

    config: the run's options.
    dtype: the dtype that the layers compute in.
    world: this process among the ranks.
    full_model: rank 0's model with all weights, None elsewhere; on one process it is the student.
        It may be without memory (`keeps_full_model`).
    fingerprint: of the initial weights, on rank 0.
    teacher_fingerprint: of a separate teacher's weights, on rank 0; else empty.
    num_head_rows: number of rows of the student's output head.
    vocab_size: number of vocabulary entries that the loss sees: all rows, or those that the local
        engine samples (`token_rows`) and that a separate teacher has too.
    vocab_parallel: whether each rank keeps only some rows of the output head.
    policy: the student as this rank computes with it.
    optimizer: steps the student's trainable parameters.
    order: this rank's vocabulary order; None if the loss needs none.
    num_skipped: steps in a row that were not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        world: World = SINGLE_PROCESS,
        *,
        teacher: TeacherSource = "initial",
    ) -> None:
        """Take over `model`, whose trainable parameters `choose_trainable` has marked.

        model: the initial weights on rank 0, a skeleton elsewhere. On one process it is trained in
        place; on several ranks its weights are sharded, and `gather_weights` brings them back.
        """
        separate = teacher if isinstance(teacher, PreTrainedModel) else None
        self.num_head_rows = self.vocab_size = len(head(model).weight)
        if config.engine.kind == "local":
            self.vocab_size = token_rows(model)
        if separate is not None:
            self.vocab_size = min(self.vocab_size, common_rows(head(model), head(separate)))
        top_k = config.loss.top_k
        if top_k is not None and top_k > self.vocab_size:
            raise UserError(
                f"{top_k} is more than the vocabulary of {self.vocab_size} tokens",
                where="loss.top_k",
            )
        self.config = config
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.world = world
        self.full_model = model.eval() if world.is_rank0 else None
        self.fingerprint = fingerprint(model) if world.is_rank0 else ""
        self.teacher_fingerprint = ""
        if separate is not None and world.is_rank0:
            self.teacher_fingerprint = fingerprint(separate)
        self.vocab_parallel = world.mesh is not None and config.parallel.head == "shard"
        if self.vocab_parallel:
            check_shardable(model)
            if separate is not None:
                separate = with_rows(separate, self.num_head_rows)
        # Before the student's blocks are prepared.
        own = None if teacher is None else self._teacher_weights(model, separate)
        self.policy = self._placed(model, stored=torch.float32)
        self._teacher = None if teacher is None else Teacher(self.policy, config.teacher, own)
        if self._teacher is not None and self._teacher_on_server:
            self._teacher.discard_model(
                copied_head(self.policy.head, self.dtype)
                if separate is None
                else placed_head(separate, world, dtype=self.dtype, sharded=self.vocab_parallel)
            )
        self.optimizer = Optimizer(
            self.model.named_parameters(remove_duplicate=False),
            config.optim,
            horizon=num_updates(config),
        )
        self._num_rows = (
            local_rows(self.vocab_size, self.num_head_rows, world)
            if self.vocab_parallel
            else self.vocab_size
        )
        self.order = vocabulary_order(config.loss, self._num_rows, model.device)
        self.num_skipped = 0
        self._shards: dict[int | None, Shards] = {}  # held ones by number; None: the current ones
        if world.mesh is not None:
            named = model.named_parameters() if world.is_rank0 else ()
            dtypes = world.broadcast({name: p.dtype for name, p in named})
            self._shards[None] = Shards.of(self.model, dtypes)
        self._gathered: int | None = None  # number of updates that `full_model` has seen
        self._full_device = model.device
        self.release_weights()

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model that is trained; on several ranks its parameters are sharded."""
        return self.policy.module

    @property
    def teacher(self) -> Teacher:
        """The teacher. Raises ValueError where nothing is distilled."""
        if self._teacher is None:
            raise ValueError("nothing is distilled, so there is no teacher")
        return self._teacher

    @property
    def weights(self) -> dict[str, Tensor]:
        """Rank 0's student weights as of the last `gather_weights`.

        Keys are the state-dict names of a model without adapters. Tensors share the memory of
        `full_model` if no adapter adds to them.
        """
        assert self.full_model is not None
        return merged_weights(self.full_model)

    @property
    def keeps_full_model(self) -> bool:
        """Whether rank 0's full model stays in memory: it is trained, or samples.

        Where servers sample, it is there from `gather_weights` to `release_weights` only.
        """
        return self.world.mesh is None or self.config.engine.kind == "local"

    def release_weights(self) -> None:
        """Free the memory of rank 0's full model, unless it is needed all the time."""
        if self.keeps_full_model:
            return
        self._gathered = None
        if self.full_model is not None:
            release_parameters(self.full_model)

    @property
    def file_weights(self) -> dict[str, Tensor]:
        """`weights` by the names and in the shapes of the model's files."""
        assert self.full_model is not None
        return file_weights(self.full_model, self.weights)

    @cached_property
    def frame(self) -> FileFrame | None:
        """What the files of the student's model hold, on rank 0; None elsewhere."""
        return None if self.full_model is None else FileFrame(self.full_model)

    def gather_weights(self) -> None:
        """Update rank 0's full model to the current weights."""
        if self._gathered != self.optimizer.num_updates:
            if self.full_model is not None and self.full_model.device.type == "meta":
                allocate_parameters(self.full_model, self._full_device)
            self.policy.gather_weights(self.full_model)
            self._gathered = self.optimizer.num_updates

    def gather_parameters(
        self, names: Sequence[str], number: int | None = None
    ) -> dict[str, Tensor]:
        """Full parameters of a sharded student on rank 0, none elsewhere.

        They have the dtypes of the full model, and are in host memory unless servers get them from
        the device. number: of the shards that `hold_shards` has copied; None: the current ones.
        """
        assert self.world.mesh is not None
        found = self._shards[number].gather(
            names, self.world.shard_group, self.world.mesh.device_type
        )
        stays = self.config.engine.sync == "distributed"
        return found if stays else {name: tensor.to("cpu") for name, tensor in found.items()}

    def hold_shards(self, number: int) -> None:
        """Copy the current shards into host memory. Older copies but the newest are dropped."""
        held = [key for key in self._shards if key is not None]
        for key in held[:-1]:
            del self._shards[key]
        self._shards[number] = self._shards[None].held()

    def copied_shards(self) -> Shards | None:
        """A copy of this rank's shards in host memory; None on a single process."""
        return None if self.world.mesh is None else self._shards[None].held()

    def token_logprobs(self, ids: Sequence[int]) -> list[float]:
        """The student's log-probabilities of `ids[1:]` at temperature 1."""
        group = self.world.shard_group if self.vocab_parallel else None
        return token_logprobs(self.policy, ids, vocab_group=group)

    def gather_teacher(self, into: PreTrainedModel | None) -> None:
        """Write the teacher's current weights into `into`, which is None on ranks other than 0."""
        self.teacher.policy.gather_weights(into)

    def step(
        self, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None = None
    ) -> StepResult:
        """Run one optimizer step on the micro-batches of all ranks.

        A step without trained tokens changes nothing. A loss or gradient that is not finite skips
        the update (`loss/skipped` is 1). Rank 0 returns the result of all ranks, another rank only
        that of its own micro-batches. Raises TrainingDiverged when 5 steps in a row are skipped.

        batches: this rank's micro-batches, as many as on every other rank; some may be empty.
        teacher_states: the teacher's [N, H] states of each micro-batch; None: compute them here.
        """
        states: Sequence[Tensor | None] = teacher_states or [None] * len(batches)
        pairs = list(zip(batches, states, strict=True))
        total = int(self.world.sum(sum(batch.num_distilled for batch in batches)))
        num_policy = int(self.world.sum(sum(batch.num_policy for batch in batches)))
        metrics = {
            "loss/num_distilled_tokens": float(total),
            "loss/num_input_tokens": float(
                self.world.sum(sum(batch.num_tokens for batch in batches))
            ),
            "loss/lr": self.optimizer.lr,
            "loss/skipped": 0.0,
        }
        if num_policy:
            metrics["loss/num_policy_tokens"] = float(num_policy)
        if total + num_policy == 0:
            return StepResult(metrics=metrics)
        collected = MicroBatchStats(self.config.loss.importance_clip, self.config.policy)
        self.optimizer.zero_grad()
        for batch, server_states in pairs:
            collected.add(batch, self._backward(batch, server_states, total), total)
        self._check_logprob_gap(collected, total + num_policy)
        grad_norm = self._update(self.world.sum(float(collected.loss)))
        stats = collected.totals()
        for other in (self.world.gather(stats) or [])[1:]:
            stats.merge(other)
        metrics |= stats.metrics(total, num_policy)
        if grad_norm is None:
            return StepResult(metrics=metrics | {"loss/skipped": 1.0})
        return StepResult(
            metrics=metrics | {"loss/grad_norm": grad_norm},
            per_token=dict(stats.per_token),
            logprobs=dict(stats.logprobs),
        )

    def state_dict(self, *, portable: bool = False) -> dict[str, Tensor]:
        """What a resume needs besides the initial weights, as a flat mapping.

        It holds the trained weights, AdamW's moments, the teacher's average, and this rank's
        vocabulary order.

        portable: leave out what only a run with the same number of ranks can read.
        """
        parts: dict[str, Optimizer | Teacher | VocabularyOrder | None] = {
            "optimizer": self.optimizer,
            "teacher": self._teacher,
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
        """Take over `state`. Raises KeyError or RuntimeError if it belongs to another model."""
        self.optimizer.load_state_dict(with_prefix(state, "optimizer."))
        self._gathered = None
        if self._teacher is not None:
            self._teacher.load_state_dict(with_prefix(state, "teacher."))
        order = with_prefix(state, f"order.{self.world.rank}.")
        if self.order is not None and order:  # a portable state has none: a new order is learned
            self.order.load_state_dict(order)

    @property
    def _teacher_on_server(self) -> bool:
        """Whether the ranks keep no more of the teacher than its head.

        A single process keeps all of it until the server has been compared with it.
        """
        return self.world.mesh is not None and self.config.teacher.backend == "sglang"

    def _teacher_weights(
        self, model: PreTrainedModel, separate: PreTrainedModel | None
    ) -> PolicyModel | None:
        """The teacher's own weights, those of `separate` or a copy of the student's; None if it
        needs none or a server has them."""
        config = self.config.teacher
        if self._teacher_on_server or (separate is None and not needs_copy(model, config)):
            return None
        stored = torch.float32 if config.kind == "ema" else self.dtype
        if separate is None:
            separate = copy.deepcopy(model) if self.world.mesh is None else model
        return self._placed(separate, stored=stored, offload=config.offload)

    def _placed(
        self, model: PreTrainedModel, *, stored: torch.dtype, offload: bool = False
    ) -> PolicyModel:
        """The model as this rank computes with it: itself on one process, else its shards.

        stored: dtype that shards are kept in; on one process the model keeps its own.
        """
        if self.world.mesh is None:
            prepare_blocks(model, self.config.learner, model.device)
            return PolicyModel(module=model, device=model.device, offload=offload)
        empty = skeleton(model, stored)
        prepare_blocks(empty, self.config.learner, torch.device(self.world.mesh.device_type))
        sharded = shard(
            empty,
            self.world,
            dtype=self.dtype,
            offload=offload,
            vocab_parallel=self.vocab_parallel,
        )
        full = model if self.world.is_rank0 else None
        sharded.load_shards(full, read_shards(sharded.module, full, self.world))
        return sharded

    def _backward(self, batch: PackedBatch, server_states: Tensor | None, total: int) -> Computed:
        """Add a micro-batch's gradient; its graph is freed before the next one starts.

        total: number of distilled tokens of the step, on all ranks.
        """
        divergence = policy = agreement = None
        losses: list[Tensor] = []
        with packed_forward(self.model), ExitStack() as stack:
            scored = None
            if batch.teacher is not None:
                packed = with_rows_before(batch.teacher, batch.diagnosed)
                scored = stack.enter_context(self.teacher.scoring(packed, server_states))
            states = self.policy.hidden_states(batch.student)
            if scored is not None:
                teacher_states, teacher_head = scored
                teacher_head = teacher_head.first(self._num_rows)
                of_distilled = teacher_states[: batch.num_distilled]
                divergence = self._divergence(states, of_distilled, teacher_head, batch, total)
                losses.append(divergence.loss / max(1, total))
                if batch.diagnosed is not None:
                    agreement = agreement_of(
                        states.detach(),
                        teacher_states,
                        batch,
                        batch.diagnosed,
                        heads=(self._student_head, teacher_head),
                        config=self.config,
                        vocab_group=self.world.shard_group if self.vocab_parallel else None,
                    )
            if batch.policy is not None:
                policy = self._policy_loss(states, batch.policy)
                losses.append(policy.loss)
            # Gradients are averaged over the ranks, but each rank's loss is a part of the sum.
            (torch.stack(losses).sum() * self.world.size).backward()
        self.optimizer.accumulate()
        return Computed(divergence, policy, agreement)

    @property
    def _student_head(self) -> Head:
        """The output head of the vocabulary entries that the loss sees, or this rank's rows."""
        return self.policy.head.first(self._num_rows)

    def _divergence(
        self,
        states: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Head,
        batch: PackedBatch,
        total: int,
    ) -> SpanDivergenceOutput:
        """The divergence at the micro-batch's distilled tokens.

        Vocab-parallel, each rank holds some head rows and sees the tokens of all ranks. Per-token
        results are cut back to this rank's tokens. `loss` stays the total, so that the gradient of
        this rank's rows is complete.
        """
        student_hidden = states.index_select(0, on_device(batch.student.gather, states.device))
        gathered = self._gathered_tokens(batch.num_distilled)
        if gathered is not None:
            student_hidden = gathered.gather(student_hidden)
            teacher_hidden = gathered.gather(teacher_hidden)
            batch = gathered.batch(batch, states.device)
        output = span_loss(
            student_hidden,
            teacher_hidden,
            batch,
            student_head=self._student_head,
            teacher_head=teacher_head,
            config=self.config.loss,
            temperature=self.config.sample.temperature,
            order=self.order,
            vocab_group=self.world.shard_group if self.vocab_parallel else None,
            head_grad=self._head_sum(),
            head_grad_factor=1 / max(1, total),
        )
        return output if gathered is None else gathered.local_part(output)

    def _head_sum(self) -> Tensor | None:
        """Where the loss adds the head's gradient, of the rows that it sees.

        So no micro-batch makes a [V, H] of its own. None where autograd has to see the gradient:
        FSDP reduces it over the ranks, and the reference has no other way.
        """
        if self.world.mesh is not None or self.config.loss.strategy == "reference":
            return None
        found = self.optimizer.gradient_sum(self.policy.head.weight)
        return None if found is None else found[: self._num_rows]

    def _policy_loss(self, states: Tensor, tokens: PolicyTokens) -> SpanLogprobOutput:
        """The loss at the micro-batch's other tokens; vocab-parallel as `_divergence`."""
        hidden = states.index_select(0, on_device(tokens.gather, states.device))
        gathered = self._gathered_tokens(len(tokens.token_ids))
        if gathered is not None:
            hidden = gathered.gather(hidden)
            tokens = gathered.policy_tokens(tokens, states.device)
        output = policy_loss(
            hidden,
            tokens,
            student_head=self._student_head,
            config=self.config.loss,
            policy=self.config.policy,
            temperature=self.config.sample.temperature,
            order=self.order,
            vocab_group=self.world.shard_group if self.vocab_parallel else None,
            head_grad=self._head_sum(),
        )
        return output if gathered is None else gathered.local_part(output)

    def _gathered_tokens(self, count: int) -> GatheredTokens | None:
        """How the tokens of all ranks are gathered, of which this rank has `count`; None where the
        head is not sharded."""
        if not self.vocab_parallel:
            return None
        assert self.world.shard_group is not None
        return GatheredTokens.of(count, self.world.shard_group)

    def _check_logprob_gap(self, collected: MicroBatchStats, num_tokens: int) -> None:
        """Raise LogprobGapTooLarge on all ranks where the gap exceeds the options' limit.

        num_tokens: trained tokens on all ranks.
        """
        limit = self.config.diagnose.max_logprob_gap
        if limit is None:
            return
        gap = self.world.sum(collected.logprob_gap) / num_tokens
        if not gap <= limit:
            raise LogprobGapTooLarge(
                f"the log-probabilities of the rollouts differ from the trainer's by {gap:.3g} "
                f"nats per token, more than diagnose.max_logprob_gap = {limit:g}; the step was not "
                "trained. Compare the engine's and the trainer's dtype, sample.top_p and "
                "sample.top_k, and resume from the last checkpoint"
            )

    def _update(self, loss: float) -> float | None:
        """Apply the gradients; returns their norm, or None if the step was skipped."""
        grad_norm = self.optimizer.step() if math.isfinite(loss) else math.nan
        if math.isfinite(grad_norm):
            self.num_skipped = 0
            if self._teacher is not None:
                self._teacher.update(self.optimizer.masters)
            return grad_norm
        self.optimizer.zero_grad()
        self.num_skipped += 1
        if self.num_skipped >= MAX_SKIPPED:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self.num_skipped} steps in a row; lower "
                f"optim.lr (it is {self.config.optim.lr:g}) and resume from the last checkpoint"
            )
        return None


def copied_head(head: Head, dtype: torch.dtype) -> Head:
    """A copy of a sharded model's output head, or of this rank's rows of it. A collective."""
    weight, bias = (
        None if x is None else full(x.detach()).to(dtype, copy=True)
        for x in (head.weight, head.bias)
    )
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, with the prefix removed from their keys."""
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
