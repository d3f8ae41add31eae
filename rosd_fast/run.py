"""A run: its folder, opened or resumed, with everything that the loop keeps across steps.

    RUN/  config.toml  metrics.jsonl  rollouts/  checkpoints/  plots/  run.lock

Every random draw is keyed by seed, step and problem, so a resumed run needs no generator state: the
step number is enough.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_fast.config import Config, control_arms
from rosd_fast.config.load import apply_toml, config_hash, to_toml
from rosd_fast.engines.lifecycle import Engines, open_engines
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.engines.weight_check import allowed_gap, check_teacher_server
from rosd_fast.errors import UserError
from rosd_fast.files import RUN_CONFIG, write_atomic
from rosd_fast.inputs import Inputs, load_inputs
from rosd_fast.model.blocks import describe
from rosd_fast.model.load import LoadedModel
from rosd_fast.model.run_folder import run_model
from rosd_fast.narrow import about_bfloat16
from rosd_fast.report import (
    draw_plots,
    render_tokens_html,
    rollouts_path,
    summarize,
)
from rosd_fast.report.advice import AnswerWatch, LearningWatch
from rosd_fast.report.metrics import FILE_NAME, MetricsLog, read_metrics
from rosd_fast.report.progress import Progress, describe_metrics, progress
from rosd_fast.report.rollout_writer import RolloutWriter
from rosd_fast.report.rollouts import write_skipped
from rosd_fast.report.stages import STEP_TIME
from rosd_fast.report.warnings import Watch
from rosd_fast.rollout.sample import problem_prompt
from rosd_fast.run_lock import RunLock
from rosd_fast.stop import StopRequest
from rosd_fast.threads import ThreadWatch, watch_threads
from rosd_fast.trainer.checkpoint import checkpoint_folder, latest_checkpoint, read_state
from rosd_fast.trainer.learner import TeacherSource
from rosd_fast.trainer.ranks import LearnerGroup
from rosd_fast.trainer.schedule import describe_change, num_updates
from rosd_fast.utils.distributed import SINGLE_PROCESS, World, pick_device

if TYPE_CHECKING:
    from rosd_fast.methods import TrainingSet
    from rosd_fast.pipeline import Sampled
    from rosd_fast.trainer.learner import StepResult
    from rosd_fast.types import TrainSample

WEIGHT_CHECK_TOKENS = 64


@dataclass(slots=True, kw_only=True)
class Run:
    """What the loop works with.

    inputs: model, data and method.
    folder: the run folder, locked by this process.
    learners: the learners of all ranks.
    log: `metrics.jsonl`.
    rollouts: writes `rollouts/`.
    progress: what the terminal shows.
    stop: whether Ctrl-C or SIGTERM asked for an end after the current step.
    watch: which signs of collapse the metrics have shown.
    idle: whether the last steps had anything to learn from.
    silent: whether the last steps had any answer. A resumed run counts from its first step.
    threads: chooses the number of threads on a CPU.
    failure: why the run ends before its last step; None: it does not.
    teacher: a separate teacher's full model, as long as something besides the learner needs it.
    first_step: the first step that this process runs; 1 unless it resumes.
    last_step: the last step that is done; 0 before the first.
    noted_rows: bad rows of the data set that were noted.
    lacks_evaluation: whether the step before the first is still to be evaluated: before training,
        and where a process was killed after the checkpoint and before the evaluation's row.
    evaluating: the evaluation that runs; returns its step and its metrics.
    """

    inputs: Inputs
    folder: Path
    learners: LearnerGroup
    log: MetricsLog
    rollouts: RolloutWriter
    progress: Progress
    stop: StopRequest
    watch: Watch
    idle: LearningWatch
    silent: AnswerWatch
    threads: ThreadWatch
    first_step: int
    teacher: LoadedModel | None = None
    last_step: int = 0
    noted_rows: set[str] = field(default_factory=set)
    failure: str | None = None
    lacks_evaluation: bool = True
    evaluating: asyncio.Task[tuple[int, dict[str, float]]] | None = None

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def weight_check_ids(self) -> tuple[int, ...]:
        """The prompt on which servers are compared with the trainer: a training problem's."""
        return problem_prompt(
            self.inputs.problems[0],
            self.inputs.chats.student,
            self.config.sample.max_prompt_tokens,
        )[:WEIGHT_CHECK_TOKENS]

    def open_engines(self) -> AbstractAsyncContextManager[Engines]:
        """Open the engines of the run for the duration of a block.

        With several ranks, an engine of the teacher's weights has a whole copy, which
        `sync_weights` brings up to date unless it is a separate teacher's.
        """
        model, teacher_model = self.inputs.model, None
        self.learners.gather_weights()
        if self.inputs.method.needs_teacher_engine:
            if self.learners.world.size == 1:
                teacher_model = self.learners.learner.teacher.model
            else:
                teacher_model = self.teacher.model if self.teacher else copy.deepcopy(model.model)
        return open_engines(
            self.config,
            model,
            self.folder,
            teacher_model=teacher_model,
            served_teacher=self.teacher or model,
            weight_check_ids=self.weight_check_ids,
            expected_logprobs=self.learners.token_logprobs,
            note=self.progress.note,
        )

    async def check_teacher_server(self, server: SglangTeacher) -> None:
        """Compare the teacher's server with the teacher's weights here, which are then freed.

        A run that resumes on several ranks no longer has the student's initial weights; if these
        are the teacher's, it skips the check, which was made when the run began. Raises RunFailed
        when they differ.
        """
        teacher, single = self.learners.learner.teacher, self.learners.world.size == 1
        if single or self.teacher is not None or self.first_step == 1:
            await check_teacher_server(
                server,
                teacher.model if single else (self.teacher or self.inputs.model).model,
                self.weight_check_ids,
                max_gap=allowed_gap(self.config.teacher.max_logprob_gap, self.config.dtype),
            )
        if single:
            teacher.discard_model()
        self.teacher = None

    async def sync_weights(self, engines: Engines, version: int) -> None:
        """Give the current weights to every engine that samples with them."""
        if engines.student.shares_learner_weights:
            self.learners.gather_weights()
            await engines.student.load_weights({}, version=version)
        elif self.config.engine.sync == "adapter":
            await engines.student.load_weights(self.learners.adapter_weights(), version=version)
        else:
            await engines.student.load_weights(self.learners.stream(), version=version)
        self.learners.release_weights()
        moves = self.config.teacher.model is None and self.learners.world.size > 1
        if engines.teacher is not None and moves:
            self.learners.gather_teacher(engines.teacher.model)

    def bad_row_metrics(self, bad_rows: Sequence[str]) -> dict[str, float]:
        """`data/num_bad_rows` of a step, of a data set that is checked as it is drawn.

        Each bad row is noted once.
        """
        if self.inputs.problems.is_checked:
            return {}
        for text in bad_rows:
            if text not in self.noted_rows:
                self.noted_rows.add(text)
                self.progress.note(f"left out: {text}")
        return {"data/num_bad_rows": float(len(bad_rows))}

    def write_rollouts(
        self,
        step: int,
        sampled: Sampled,
        training: TrainingSet,
        learned: StepResult,
    ) -> None:
        """Start writing the step's rollouts, if the options ask for it."""
        if self.config.dump_rollouts:
            self.rollouts.write(
                rollouts_path(self.folder, step),
                step=step,
                groups=sampled.groups,
                verdicts=sampled.verdicts,
                reflections=sampled.annotations,
                spans=training.spans,
                per_token=learned.per_token,
                samples=training.samples,
                logprobs=learned.logprobs,
                token_bytes=self.inputs.token_bytes,
                kept=sampled.selection.kept,
            )

    def write_skipped(self, step: int, samples: Sequence[TrainSample]) -> None:
        """Write the samples of a step that was skipped to RUN/skipped/."""
        write_skipped(self.folder, step, samples)

    def finish_step(self, step: int, metrics: Mapping[str, float], unanswered: str = "") -> None:
        """Add the stages' times to the metrics, write the row, show it, and warn of a collapse.

        unanswered: what `describe_unanswered` says about the step.
        """
        row = {**metrics, **self.progress.clock.metrics()}
        self.log.write(step, row)
        self.progress.step_done(step, row)
        for warned in self.watch.add({"step": step, **row}):
            self.progress.note(f"warning: step {step}: {warned.text}")
        if (advice := self.idle.see(row, unanswered)) is not None:
            self.progress.note(advice)
        if changed := self.threads.step_done(row[STEP_TIME]):
            self.progress.note(changed)
        self.last_step = step

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the row of an evaluation that has ended after its step, and rate its checkpoint."""
        self.log.write(step, metrics)
        self.progress.note(f"step {step}: {describe_metrics(metrics)}")
        self.learners.rate(self.folder, step, metrics.get("eval/dev/accuracy"))

    def save(self, step: int, metrics: Mapping[str, float]) -> None:
        """Start to write a checkpoint of this step, whose metrics say how good it is.

        The rollouts up to this step are then on disk: a resumed run does not sample them again.
        """
        self.rollouts.wait()
        self.learners.save(self.folder, step, metrics.get("eval/dev/accuracy"))


@contextmanager
def open_run(
    config: Config, *, resume: Path | None = None, world: World = SINGLE_PROCESS
) -> Iterator[Run]:
    """Load and check everything, make or reopen the run folder, and end with a report.

    Runs on rank 0. The folder is locked against other processes until the end. Raises UserError.
    """
    with closing(RunLock()) as lock:
        with opened(config, resume, world, lock) as run:
            yield run
        finish(run)


@contextmanager
def opened(config: Config, resume: Path | None, world: World, lock: RunLock) -> Iterator[Run]:
    """Yield the run of `open_run`, whose folder `lock` takes; without the report."""
    with world.shutdown_workers_on_error():
        if resume is not None:  # before a model is loaded, whose memory a running run may need
            lock.take(resume)
        of_runs = [found for found in map(run_model, (config.model, config.teacher.model)) if found]
        inputs, epochs = load_inputs(config), config.epochs
        config, model = inputs.config, inputs.model
    group = LearnerGroup.create(
        model.model, config, world, model.tokenizer, teacher=teacher_source(inputs)
    )
    about_teacher = None if inputs.teacher is None else inputs.teacher.describe()
    inputs, teacher = without_teacher(inputs)
    with closing(group) as learners:
        changed = None
        if resume is None:
            folder, first_step = make_folder(config, model), 1
            lock.take(folder)
        else:
            folder, first_step = resume, restore(resume, inputs, learners)
            changed = schedule_change(folder, config, learners.learner.optimizer.num_updates)
            write_atomic(folder / RUN_CONFIG, to_toml(config).encode())  # steps may have changed
        log = MetricsLog(folder / FILE_NAME)
        log.truncate_after(first_step - 1)
        evaluated = bool(read_evaluation(folder, first_step - 1))
        threads = watch_threads(
            on_cpu=pick_device(config.device).type == "cpu", num_ranks=world.size
        )
        contended = threads.begin(recorded_threads(folder, first_step - 1))
        stop, rollouts = StopRequest(), RolloutWriter()

        def finish_writing() -> None:
            try:
                rollouts.wait()
            finally:
                learners.finish_save()

        with (
            progress(config.steps, first_step) as shown,
            stop.listening(shown, finish_writing),
        ):
            learner = describe(
                model.model,
                config.learner,
                dtype=config.dtype,
                device=pick_device(config.device),
                num_ranks=world.size,
            )
            shown.note(f"learner: {learner}")
            if config.dtype == "bfloat16" and pick_device(config.device).type == "cpu":
                shown.note(f"bfloat16 on this CPU: {about_bfloat16()}")
            for found in of_runs:
                shown.note(f"model {found.describe()}")
            if arms := control_arms(config):
                shown.note(f"control arm: {', '.join(arms)}")
            if about_teacher is not None:
                shown.note(f"teacher: {about_teacher}")
            if epochs is not None:
                shown.note(f"epochs: {epochs:g} are {config.steps} steps")
            if changed is not None:
                shown.note(changed)
            if contended:
                shown.note(contended)
            for text in (*inputs.model_notes, *inputs.data_notes):
                shown.note(text)
            for text in inputs.chat_notes():
                shown.note(f"chat template: {text}")
            run = Run(
                inputs=inputs,
                folder=folder,
                learners=learners,
                log=log,
                rollouts=rollouts,
                progress=shown,
                stop=stop,
                watch=Watch(read_metrics(log.path)),
                idle=LearningWatch(config.select.warn_after_steps, read_metrics(log.path)),
                silent=AnswerWatch(
                    config.select.stop_after_steps if inputs.method.needs_verdicts else 0
                ),
                threads=threads,
                first_step=first_step,
                last_step=first_step - 1,
                lacks_evaluation=not evaluated and evaluation_is_due(inputs, first_step - 1),
                teacher=teacher,
            )
            del teacher  # the run frees it once a server has been compared with it
            yield run


def teacher_source(inputs: Inputs) -> TeacherSource:
    """The weights that the learner's teacher begins with."""
    if not inputs.method.needs_teacher:
        return None
    return "initial" if inputs.teacher is None else inputs.teacher.model.model


def without_teacher(inputs: Inputs) -> tuple[Inputs, LoadedModel | None]:
    """Drop a separate teacher from the inputs once the learners have it, to free its memory.

    Also returns it where an engine or the check of a server needs it on rank 0.
    """
    teacher, config = inputs.teacher, inputs.config.teacher
    needed = config.backend == "sglang" or inputs.method.needs_teacher_engine
    kept = teacher.model if teacher is not None and needed else None
    return replace(inputs, teacher=None), kept


def make_folder(config: Config, model: LoadedModel) -> Path:
    """Make the run folder, with its resolved config.toml. Raises UserError."""
    name = config.name or f"{model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.out).expanduser() / name
    try:
        folder.mkdir(parents=True)
        write_atomic(
            folder / RUN_CONFIG, to_toml(config.model_copy(update={"name": name})).encode()
        )
    except FileExistsError:
        raise UserError(
            "the run folder exists already",
            where=str(folder),
            fix=f"Choose another --name, or resume it: rosd-fast train --resume {folder}",
        ) from None
    except OSError as error:
        raise UserError(
            f"the run folder cannot be written ({error.strerror})",
            where=str(folder),
            fix="Choose another folder with --out",
        ) from None
    return folder


def restore(folder: Path, inputs: Inputs, learners: LearnerGroup) -> int:
    """Load the newest whole checkpoint of the run, and return the first step to run.

    Raises UserError when there is none, when it was made with other options, or when no
    step and no evaluation is left.
    """
    config = inputs.config
    checkpoint = latest_checkpoint(folder, warn=lambda text: print(text, file=sys.stderr))
    if checkpoint is None:
        raise UserError(
            "has no checkpoint to resume from", where=str(folder), fix="Start a new run instead"
        )
    about = read_state(checkpoint)
    if about["config_hash"] != config_hash(config):
        raise UserError(
            "config.toml is not the one that this checkpoint was made with",
            where=str(checkpoint),
            fix="Put the old options back, or start a new run with --model set to this folder",
        )
    step = about["step"]
    evaluation = read_evaluation(folder, step)
    # A process may have been killed between the evaluation's row and this.
    learners.rate(folder, step, evaluation.get("eval/dev/accuracy"))
    evaluated = bool(evaluation) or not evaluation_is_due(inputs, step)
    if step > config.steps or (step == config.steps and evaluated):
        raise UserError(
            f"all {config.steps} steps are done",
            where=str(folder),
            fix=f"Give more steps to train on, for example --steps {step + config.steps}",
        )
    return learners.load(checkpoint) + 1


def recorded_threads(folder: Path, step: int) -> int | None:
    """The number of threads that the checkpoint of a step was made with; None: there is no such
    checkpoint, or it does not say."""
    path = checkpoint_folder(folder, step)
    return read_state(path).get("threads") if path.exists() else None


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0: never."""
    return every > 0 and step % every == 0


def evaluation_is_due(inputs: Inputs, step: int) -> bool:
    """Whether the options ask for an evaluation with the weights after `step`; 0: the initial."""
    wanted = step in (0, inputs.config.steps) or is_due(step, inputs.config.eval.every)
    return wanted and bool(inputs.dev_splits)


def read_evaluation(folder: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation of `step` in the run's metrics.jsonl; empty: there is none."""
    path = folder / FILE_NAME
    rows = read_metrics(path) if path.exists() else []
    found = [row.items() for row in rows if row["step"] == step]
    return {name: value for row in found for name, value in row if name.startswith("eval/")}


def schedule_change(folder: Path, config: Config, updates: int) -> str | None:
    """One line on what a changed number of steps does to the learning rate; None: nothing.

    folder: the run folder, whose config.toml has the old number. updates: number of updates so far.
    """
    before = apply_toml(Config(), folder / RUN_CONFIG, accept_old_names=True)
    return describe_change(updates, num_updates(before), num_updates(config), config.optim)


def finish(run: Run) -> None:
    """Draw the plots and the token page of the last step, and print the summary."""
    draw_plots(run.folder)
    if run.config.dump_rollouts and run.last_step:
        render_tokens_html(run.folder, run.last_step)
    summarize(run.folder)
    if run.last_step < run.config.steps:
        print(
            f"stopped after step {run.last_step} of {run.config.steps}; "
            f"resume with: rosd-fast train --resume {run.folder}"
        )
