"""The update: from a mini-batch of samples to new weights, and what is measured on the way.

    samples -> normalizer -> micro-batches -> teacher states -> `Learner.step` on all ranks

`rosd_fast.train.train_on` calls `update` once per mini-batch of a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rosd_fast.background import in_background
from rosd_fast.batch.diagnosed import with_diagnosed
from rosd_fast.batch.packing import pack
from rosd_fast.batch.weights import normalized
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.methods import TrainingSet
from rosd_fast.pipeline import Sampled
from rosd_fast.report.diagnostics import position_metrics, span_metrics, token_metrics
from rosd_fast.report.stages import Stage
from rosd_fast.run import Run, is_due
from rosd_fast.trainer.learner import LogprobGapTooLarge, StepResult, TrainingDiverged
from rosd_fast.types import PackedBatch, TrainSample


async def update(
    run: Run,
    engines: Engines,
    step: int,
    samples: Sequence[TrainSample],
    located: Collection[str] = (),
) -> StepResult:
    """Do one optimizer update on a mini-batch of the step.

    located: ids of the rollouts with a located error.
    """
    progress = run.progress
    with progress.stage(Stage.BUILD):
        batches = await in_background(
            packed, run, step, samples, () if engines.teacher_server else located
        )
    teacher_states = None
    if engines.teacher_server is not None:
        with progress.stage(Stage.TEACHER):
            teacher_states = await engines.teacher_server.states(batches)
    await engines.student.release_memory()
    with progress.stage(Stage.LEARN):
        try:
            learned = await learn(run, batches, teacher_states)
        except (TrainingDiverged, LogprobGapTooLarge):
            run.write_skipped(step, samples)
            raise
        progress.tokens(sum(batch.num_tokens for batch in batches))
    if learned.metrics["loss/skipped"]:
        progress.note(f"step {step} is skipped: its loss or gradient is not finite")
        run.write_skipped(step, samples)
    return learned


def packed(
    run: Run, step: int, samples: Sequence[TrainSample], located: Collection[str]
) -> list[PackedBatch]:
    """Pack a mini-batch, with the tokens that the diagnostics of this step look at.

    located: as for `with_diagnosed`.
    """
    config = run.config
    batches = pack(
        normalized(
            samples,
            config.policy.normalize,
            max_new_tokens=config.sample.max_new_tokens,
            entropy_bonus=config.policy.entropy_weight > 0,
        ),
        max_tokens=config.pack.max_tokens,
        min_shared=config.pack.min_shared if run.inputs.shares_prefixes else 0,
        num_ranks=run.learners.world.size,
        hidden_size=run.inputs.model.hidden_size,
        padded="padded" in run.inputs.layouts,
    )
    if is_due(step, config.diagnose.every):
        return with_diagnosed(
            batches, samples, located=located, max_tokens=config.diagnose.max_tokens
        )
    return batches


async def learn(
    run: Run, batches: Sequence[PackedBatch], teacher_states: Sequence[Tensor] | None
) -> StepResult:
    """Update the weights; in a thread where requests are in flight meanwhile."""
    if not (run.config.engine.one_step_ahead or run.config.eval.overlap):
        return run.learners.step(batches, teacher_states)
    threads = torch.get_num_threads()

    def step() -> StepResult:
        torch.set_num_threads(threads)  # OpenMP's number belongs to the thread that asks for it
        return run.learners.step(batches, teacher_states)

    return await asyncio.to_thread(step)


def without_unknown_tokens(run: Run, step: int, training: TrainingSet) -> TrainingSet:
    """Leave out rollouts with a token that a separate teacher's shorter head lacks.

    Such a token is padding of the student's vocabulary, which is hardly ever sampled.
    """
    size = run.learners.learner.vocab_size
    if size == run.learners.learner.num_head_rows:
        return training
    known = [sample for sample in training.samples if max(sample.completion_ids) < size]
    if missing := len(training.samples) - len(known):
        run.progress.note(
            f"step {step}: samples left out, with a token that the teacher lacks: {missing}"
        )
    return replace(training, samples=known)


def diagnostics(
    run: Run, sampled: Sampled, training: TrainingSet, learned: StepResult
) -> dict[str, float]:
    """Return the step's `diag/...` metrics that need no model."""
    rollouts = {r.id: r for group in sampled.groups for r in group.rollouts}
    before = learned.metrics.get("diag/divergence_before")
    return {
        **position_metrics(training.samples, learned.per_token),
        **span_metrics(training.spans, learned.per_token, before=before),
        **token_metrics(
            training.samples,
            special_ids=run.inputs.special_ids,
            num_thinking=lambda rollout_id: run.inputs.chats.num_thinking(rollouts[rollout_id]),
        ),
    }
