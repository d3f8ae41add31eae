"""The loop: one pass through `run_steps` is one optimizer step of ROSD (arXiv 2605.28014).

    sample -> verify -> select -> reflect -> locate -> build and pack -> learn -> sync -> log

Each stage is a module of its own; what passes between them are the records of `rosd_fast.types`.
`rosd_fast.run` opens the run: it loads model and data and checks everything before the first step.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from rosd_fast.batch.packing import pack
from rosd_fast.batch.samples import build_samples, sample_metrics
from rosd_fast.config import Config
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.engines.weight_check import allowed_gap, check_teacher_server
from rosd_fast.evaluate import evaluate_splits
from rosd_fast.pipeline import Sampled, sample_and_reflect
from rosd_fast.reflection.locate import locate_errors
from rosd_fast.reflection.probe import probe_metrics, teacher_helps, wrong_samples
from rosd_fast.reflection.reflect import reflection_metrics
from rosd_fast.report import rollouts_path, write_rollouts
from rosd_fast.report.metrics import rollout_metrics
from rosd_fast.report.progress import Hidden
from rosd_fast.run import Run, open_run
from rosd_fast.trainer.ranks import run_worker
from rosd_fast.utils.distributed import open_world


def train(config: Config, *, resume: Path | None = None) -> Path:
    """Run `config.steps` optimizer steps, or those that are left of `resume`; returns the run
    folder. Ranks of torchrun's beside rank 0, which do not know it, return `config.out`.

    Raises UserError for anything the user can mend. Ctrl-C and SIGTERM end it after the current
    step, with a checkpoint.
    """
    with open_world(config.parallel, config.device) as world:
        if not world.is_rank0:
            run_worker(world)
            return Path(config.out)
        with open_run(config, resume=resume, world=world) as run:
            asyncio.run(run_steps(run))
    return run.folder


async def run_steps(run: Run) -> None:
    """Evaluate, then step, evaluate and save as often as the options say."""
    config = run.config
    ahead: asyncio.Task[Sampled] | None = None
    try:
        await start(run)
        if run.first_step == 1:
            run.finish_step(0, await evaluate_splits(run))
        for step in range(run.first_step, config.steps + 1):
            sampled = await (ahead or sample_and_reflect(run, step, run.progress))
            if config.engine.one_step_ahead and step < config.steps:
                ahead = asyncio.create_task(sample_and_reflect(run, step + 1, Hidden()))
            metrics = await learn(run, step, sampled)
            last = step == config.steps or run.stop.requested
            if last or is_due(step, config.eval.every):
                metrics |= await evaluate_splits(run)
            # The row before the checkpoint: killed in between, a resumed run does the step again.
            run.finish_step(step, metrics)
            if last or is_due(step, config.checkpoint.every):
                with run.progress.stage("checkpoint"):
                    run.save(step, metrics)
            if last:
                break
    finally:
        if ahead is not None:
            ahead.cancel()
            await asyncio.wait({ahead})
        await run.engine.close()
        if run.teacher_server is not None:
            await run.teacher_server.close()


async def start(run: Run) -> None:
    """Bring servers to the weights that the run begins with, and compare them with the trainer."""
    if run.teacher_server is not None:
        await check_teacher(run, run.teacher_server)
    await run.sync_weights(run.first_step - 1)


async def check_teacher(run: Run, server: SglangTeacher) -> None:
    """Compare the teacher server with the initial weights, then free these on a single rank.

    On several ranks a resumed run no longer has the initial weights and skips the check, which was
    made when the run began. Raises RunFailed when they differ.
    """
    teacher, single = run.learners.learner.teacher, run.learners.world.size == 1
    if single or run.first_step == 1:
        await check_teacher_server(
            server,
            teacher.model if single else run.model.model,
            run.weight_check_ids,
            max_gap=allowed_gap(run.config.teacher.max_logprob_gap, run.config.dtype),
        )
    if single:
        teacher.keep_head_only()


async def learn(run: Run, step: int, sampled: Sampled) -> dict[str, float]:
    """One optimizer step on what was sampled; returns the step's metrics."""
    config, progress, tokenizer = run.config, run.progress, run.model.tokenizer
    groups, verdicts, selection = sampled.groups, sampled.verdicts, sampled.selection
    with progress.stage("locate"):
        located = locate_errors(
            selection.kept,
            verdicts,
            sampled.reflections,
            token_bytes=run.token_bytes,
            config=config.span,
        )
    with progress.stage("build"):
        samples = build_samples(
            selection.kept,
            sampled.reflections,
            located.spans,
            tokenizer=tokenizer,
            config=config.teacher,
        )
        batches = pack(
            samples,
            max_tokens=config.pack.max_tokens,
            min_shared=config.pack.min_shared,
            num_ranks=run.learners.world.size,
            hidden_size=run.model.hidden_size,
        )
    helped = None
    if run.teacher_engine is not None and is_due(step, config.reflect.probe_every):
        with progress.stage("probe"):
            helped = await teacher_helps(
                run.teacher_engine,
                wrong_samples(samples, verdicts, config.reflect.probe_problems),
                selection.kept,
                verdicts,
                tokenizer=tokenizer,
                params=run.sampling_params,
                seed=config.seed,
                step=step,
            )
    if not batches:
        progress.note(f"step {step}: nothing to distil ({selection.describe()})")
    teacher_states = None
    if run.teacher_server is not None:
        with progress.stage("teacher"):
            teacher_states = await run.teacher_server.states(batches)
    await run.engine.release_memory()
    with progress.stage("learn"):
        learned = await run.learn(step, samples, batches, teacher_states)
        progress.tokens(sum(batch.num_tokens for batch in batches))
    with progress.stage("sync"):
        await run.sync_weights(step)
    if config.dump_rollouts:
        write_rollouts(
            rollouts_path(run.folder, step),
            step=step,
            groups=groups,
            verdicts=verdicts,
            reflections=sampled.reflections,
            spans=located.spans,
            per_token=learned.per_token,
            token_bytes=run.token_bytes,
            kept=selection.kept,
        )
    return {
        **learned.metrics,
        **rollout_metrics(groups, verdicts, len(samples), selection, step - 1),
        **run.engine.take_metrics(),
        **reflection_metrics(sampled.reflections),
        **sample_metrics(samples),
        **located.metrics(),
        **probe_metrics(helped),
    }


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
