"""The loop: one pass through `run_steps` is one optimizer step.

    sample -> verify -> select -> annotate -> build and pack -> learn -> sync -> log

Each stage is a module of its own; the records of `rosd_fast.types` pass between them. What a method
needs of the rollouts (`annotate`) and what it trains (`build`) is in `rosd_fast.methods`, packing
and learning in `rosd_fast.update`.
`rosd_fast.run` opens the run: it loads model and data and checks everything before the first step.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from rosd_fast.background import in_background
from rosd_fast.batch.weights import micro_batch_mean, mini_batches, with_problem_weights
from rosd_fast.config import Config
from rosd_fast.engines.lifecycle import Engines
from rosd_fast.errors import RunFailed
from rosd_fast.evaluation.training import evaluate_splits
from rosd_fast.pipeline import Sampled, sample_and_annotate
from rosd_fast.report.advice import describe_unanswered
from rosd_fast.report.diagnostics import located_errors
from rosd_fast.report.metrics import rollout_metrics
from rosd_fast.report.progress import Hidden
from rosd_fast.report.stages import Stage
from rosd_fast.run import Run, is_due, open_run
from rosd_fast.trainer.learner import StepResult
from rosd_fast.trainer.ranks import run_worker
from rosd_fast.update import diagnostics, update, without_unknown_tokens
from rosd_fast.utils.distributed import open_world
from rosd_fast.verify.here import refuse_in_worker


def train(config: Config, *, resume: Path | None = None) -> Path:
    """Run `config.steps` optimizer steps, or those left of `resume`, and return the run folder.

    Under torchrun only rank 0 knows the run folder; the other ranks return `config.out`. Ctrl-C and
    SIGTERM end the run after the current step, with a checkpoint. Raises UserError for everything
    that the user can fix, and RunFailed for a run that cannot go on, or learns nothing from it.
    """
    refuse_in_worker("calls train")
    with open_world(config.parallel, config.device) as world:
        if not world.is_rank0:
            run_worker(world)
            return Path(config.out).expanduser()
        with open_run(config, resume=resume, world=world) as run:
            asyncio.run(run_steps(run))
    if run.failure is not None:
        raise RunFailed(run.failure)
    return run.folder


async def run_steps(run: Run) -> None:
    """Evaluate, then step, evaluate and save as often as the options say."""
    config, inputs, progress = run.config, run.inputs, run.progress
    ahead: asyncio.Task[Sampled] | None = None
    async with run.open_engines() as engines:
        try:
            await start(run, engines)
            await evaluate_first(run, engines)
            for step in range(run.first_step, config.steps + 1):
                sampled = await (ahead or sample_and_annotate(inputs, engines, step, progress))
                if config.engine.one_step_ahead and step < config.steps:
                    ahead = asyncio.create_task(
                        sample_and_annotate(inputs, engines, step + 1, Hidden())
                    )
                metrics = await train_on(run, engines, step, sampled)
                unanswered = describe_unanswered(sampled.groups, sampled.verdicts)
                run.failure = run.silent.see(metrics, unanswered)
                due = step == config.steps or is_due(step, config.eval.every)
                # Asked to stop, a run saves first: it may be killed before an evaluation ends.
                waits = config.eval.overlap or run.stop.requested
                if evaluated := due and not waits and run.failure is None:
                    metrics |= await evaluate_splits(inputs, engines, progress)
                # The row before the checkpoint: killed in between, a resumed run repeats the step.
                run.finish_step(step, metrics, unanswered)
                last = step == config.steps or run.stop.requested or run.failure is not None
                if last or is_due(step, config.checkpoint.every):
                    with progress.stage(Stage.CHECKPOINT):
                        run.save(step, metrics)
                if (due or last) and not evaluated and run.failure is None:
                    begin_evaluation(run, engines, step)
                if last:
                    break
            await finish_evaluation(run, alone=True)
        finally:
            for task in (ahead, run.evaluating):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)


async def evaluate_first(run: Run, engines: Engines) -> None:
    """Evaluate the initial weights, or those of a checkpoint whose evaluation was cut off."""
    overlap = run.config.eval.overlap
    if run.first_step == 1 and not overlap:
        run.finish_step(0, await evaluate_splits(run.inputs, engines, run.progress))
    elif run.lacks_evaluation:
        begin_evaluation(run, engines, run.first_step - 1)
        if not overlap:
            await finish_evaluation(run, alone=True)


def begin_evaluation(run: Run, engines: Engines, step: int) -> None:
    """Start the evaluation of a step, of whose weights the engine then needs to keep hold.

    It may overlap with the next step up to the point where new weights are sent to the engine:
    `finish_evaluation` comes before that.
    """
    if not run.inputs.dev_splits:
        return

    async def evaluate() -> tuple[int, dict[str, float]]:
        return step, await evaluate_splits(run.inputs, engines, Hidden())

    run.evaluating = asyncio.create_task(evaluate())


async def finish_evaluation(run: Run, *, alone: bool = False) -> None:
    """Wait for the evaluation that runs, if any, and write its row.

    alone: nothing else runs, so that the time belongs to the evaluation's row.
    """
    if run.evaluating is None:
        return
    with run.progress.stage(Stage.EVALUATE):
        step, metrics = await run.evaluating
    run.evaluating = None
    run.add_evaluation(step, metrics | (run.progress.clock.metrics() if alone else {}))


async def start(run: Run, engines: Engines) -> None:
    """Load the run's initial weights into the servers, and compare them with the trainer."""
    if engines.teacher_server is not None:
        await run.check_teacher_server(engines.teacher_server)
    await run.sync_weights(engines, run.first_step - 1)


async def train_on(run: Run, engines: Engines, step: int, sampled: Sampled) -> dict[str, float]:
    """Do the step's optimizer updates on what was sampled; return the step's metrics."""
    progress, method = run.progress, run.inputs.method
    verdicts, selection = sampled.verdicts, sampled.selection
    # In a thread, as requests may be in flight: those of the next step, or of an evaluation.
    training = await in_background(
        method.build, selection.kept, verdicts, sampled.annotations, progress
    )
    weighted = with_problem_weights(training.samples, selection.kept)
    training = replace(training, samples=weighted)
    training = without_unknown_tokens(run, step, training)
    measured = await method.measure(step, training, selection.kept, verdicts, engines, progress)
    if not any(sample.has_effect for sample in training.samples):
        progress.note(f"step {step}: nothing to train on ({selection.describe()})")
    samples = training.samples
    if size := run.config.compat.micro_batch_rollouts:
        ids = [rollout.id for group in sampled.groups for rollout in group.rollouts]
        samples = micro_batch_mean(samples, ids, size)
    updates = mini_batches(samples, run.config.optim.updates_per_step)
    located = located_errors(training.spans)
    learned = StepResult.merge(
        [await update(run, engines, step, part, located) for part in updates]
    )
    await finish_evaluation(run)  # while the servers still have the weights of its step
    with progress.stage(Stage.SYNC):
        await run.sync_weights(engines, step)
    run.write_rollouts(step, sampled, training, learned)
    return {
        **training.metrics,
        **measured,
        **learned.metrics,
        **diagnostics(run, sampled, training, learned),
        **rollout_metrics(sampled.groups, verdicts, training.samples, selection, step - 1),
        **selection.metrics(),
        **engines.student.take_metrics(),
        **run.bad_row_metrics(sampled.bad_rows),
        **engines.verifiers.take_metrics(),
    }
