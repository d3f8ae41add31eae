"""Opening a run: everything is loaded and checked before the first file is written.

A run folder holds config.toml, metrics.jsonl, rollouts/, checkpoints/ and plots/. Every random draw
is keyed by seed, step and problem, so a resumed run needs no generator state: the step number is
enough.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

from rosd_fast.batch.samples import write_skipped
from rosd_fast.config import Config, uses_teacher_weights
from rosd_fast.config.load import config_hash, to_toml
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.factory import open_engine, open_sglang_teacher
from rosd_fast.engines.local.engine import LocalEngine
from rosd_fast.engines.sglang.teacher import SglangTeacher
from rosd_fast.errors import UserError
from rosd_fast.files import write_atomic
from rosd_fast.inputs import Inputs, load_inputs
from rosd_fast.model.blocks import describe
from rosd_fast.model.load import LoadedModel
from rosd_fast.report import draw_plots, render_tokens_html, summarize
from rosd_fast.report.metrics import MetricsLog
from rosd_fast.report.progress import Progress, progress
from rosd_fast.rollout.sample import problem_prompt
from rosd_fast.run_lock import RunLock
from rosd_fast.stop import StopRequest
from rosd_fast.trainer.checkpoint import latest_checkpoint, read_state
from rosd_fast.trainer.learner import StepResult, TrainingDiverged
from rosd_fast.trainer.ranks import LearnerGroup
from rosd_fast.types import DistillSample, PackedBatch, SamplingParams
from rosd_fast.utils.distributed import SINGLE_PROCESS, World

CONFIG_FILE = "config.toml"
WEIGHT_CHECK_TOKENS = 64


@dataclass(slots=True, kw_only=True)
class Run(Inputs):
    """Everything the loop works with."""

    folder: Path
    engine: RolloutEngine
    reflector: RolloutEngine
    teacher_engine: LocalEngine | None  # of the teacher's weights, None: it only scores
    teacher_server: SglangTeacher | None  # of a teacher on a server
    learners: LearnerGroup  # the learners of all ranks
    weight_check_ids: tuple[int, ...]  # a prompt on which servers are compared with the trainer
    log: MetricsLog
    progress: Progress
    stop: StopRequest
    first_step: int
    last_step: int = 0  # the last one that is done

    @property
    def sampling_params(self) -> SamplingParams:
        sample = self.config.sample
        return SamplingParams(
            max_new_tokens=sample.max_new_tokens,
            temperature=sample.temperature,
            top_p=sample.top_p,
            top_k=sample.top_k,
            stop_token_ids=self.model.stop_token_ids,
        )

    async def learn(
        self,
        step: int,
        samples: Sequence[DistillSample],
        batches: Sequence[PackedBatch],
        teacher_states: Sequence[Tensor] | None,
    ) -> StepResult:
        """One optimizer step; the samples of one that is skipped are written to RUN/skipped/.

        Raises TrainingDiverged after several in a row.
        """
        try:
            if self.config.engine.one_step_ahead:  # requests of the next step are under way
                learned = await asyncio.to_thread(self.learners.step, batches, teacher_states)
            else:
                learned = self.learners.step(batches, teacher_states)
        except TrainingDiverged:
            write_skipped(self.folder, step, samples)
            raise
        if learned.metrics["loss/skipped"]:
            self.progress.note(f"step {step} is skipped: its loss or gradient is not finite")
            write_skipped(self.folder, step, samples)
        return learned

    async def sync_weights(self, version: int) -> None:
        """Weights go to all who sample."""
        self.learners.collect()
        weights = {} if self.engine.shares_learner_weights else self.learners.learner.weights
        await self.engine.load_weights(weights, version=version)
        if self.teacher_engine is not None and self.learners.world.size > 1:
            self.learners.collect_teacher(self.teacher_engine.model)

    def finish_step(self, step: int, metrics: dict[str, float]) -> None:
        """Add the stages' times, write the row, show it."""
        metrics = metrics | self.progress.clock.metrics()
        self.log.write(step, metrics)
        self.progress.step_done(step, metrics)
        self.last_step = step

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Begin to write a checkpoint of this step, whose metrics tell how good it is."""
        self.learners.save(self.folder, step, metrics.get("eval/dev/accuracy"))


@contextmanager
def open_run(
    config: Config, *, resume: Path | None = None, world: World = SINGLE_PROCESS
) -> Iterator[Run]:
    """Load and check all that `config` names, make or reopen the run folder, and close it with a
    report. Rank 0's. The folder is locked against other processes until the end."""
    with closing(RunLock()) as lock:
        with opened(config, resume, world, lock) as run:
            yield run
        finish(run)


@contextmanager
def opened(config: Config, resume: Path | None, world: World, lock: RunLock) -> Iterator[Run]:
    """The run of `open_run`, whose folder `lock` takes, without the report."""
    with world.shutdown_workers_on_error():
        if resume is not None:  # before a model is loaded, whose memory a running run may need
            lock.take(resume)
        inputs = load_inputs(config)
        config, model, problems = inputs.config, inputs.model, inputs.problems
    with closing(LearnerGroup.create(model.model, config, world, model.tokenizer)) as learners:
        if resume is None:
            folder, first_step = make_folder(config, model), 1
            lock.take(folder)
        else:
            folder, first_step = resume, restore(resume, config, learners)
            write_atomic(folder / CONFIG_FILE, to_toml(config).encode())  # steps may have changed
        log = MetricsLog(folder / "metrics.jsonl")
        log.truncate_after(first_step - 1)
        stop = StopRequest()
        weight_check_ids = problem_prompt(
            problems[0], model.tokenizer, config.sample.max_prompt_tokens
        )
        weight_check_ids = weight_check_ids[:WEIGHT_CHECK_TOKENS]
        with (
            progress(config.steps, first_step) as shown,
            stop.listening(shown, learners.finish_save),
        ):
            shown.note(f"learner: {describe(model.model, config, world.size)}")
            engine = open_engine(
                config, model, folder, weight_check_ids=weight_check_ids, note=shown.note
            )
            teacher_engine = open_teacher_engine(config, model, learners)
            reflector = engine if config.reflect.weights == "student" else teacher_engine
            assert reflector is not None  # Config has checked it
            run = Run(
                **{field.name: getattr(inputs, field.name) for field in fields(inputs)},
                folder=folder,
                engine=engine,
                reflector=reflector,
                teacher_engine=teacher_engine,
                teacher_server=open_sglang_teacher(config, model, folder, note=shown.note),
                learners=learners,
                weight_check_ids=weight_check_ids,
                log=log,
                progress=shown,
                stop=stop,
                first_step=first_step,
            )
            yield run


def open_teacher_engine(
    config: Config, model: LoadedModel, learners: LearnerGroup
) -> LocalEngine | None:
    """Of the teacher's weights, None where nothing is written with them.

    On several ranks it has a whole copy, which `LearnerGroup.collect_teacher` brings up to date.
    """
    if not uses_teacher_weights(config):
        return None
    own = learners.learner.teacher.model if learners.world.size == 1 else copy.deepcopy(model.model)
    return LocalEngine(own, max_rows=config.engine.max_rows, tokenizer=model.tokenizer)


def make_folder(config: Config, model: LoadedModel) -> Path:
    """A new run folder with its resolved config.toml."""
    name = config.name or f"{model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.out) / name
    try:
        folder.mkdir(parents=True)
        write_atomic(
            folder / CONFIG_FILE, to_toml(config.model_copy(update={"name": name})).encode()
        )
    except FileExistsError:
        raise UserError(
            "the run folder exists already",
            where=str(folder),
            fix=f"Choose another --name, or go on with: rosd-fast train --resume {folder}",
        ) from None
    except OSError as error:
        raise UserError(
            f"the run folder cannot be written ({error.strerror})",
            where=str(folder),
            fix="Choose another folder with --out",
        ) from None
    return folder


def restore(folder: Path, config: Config, learners: LearnerGroup) -> int:
    """Load the newest whole checkpoint of the run; returns the first step to run.

    Raises UserError when there is none, when it was made with other options, or when no step is
    left.
    """
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
    if step >= config.steps:
        raise UserError(
            f"all {config.steps} steps are done",
            where=str(folder),
            fix=f"To go on give more of them, for example --steps {step + config.steps}",
        )
    return learners.load(checkpoint) + 1


def finish(run: Run) -> None:
    """Draw the plots and the token page of the last step, and say what the run came to."""
    draw_plots(run.folder)
    if run.config.dump_rollouts and run.last_step:
        render_tokens_html(run.folder, run.last_step)
    summarize(run.folder)
    if run.last_step < run.config.steps:
        print(
            f"stopped after step {run.last_step} of {run.config.steps}; "
            f"go on with: rosd-fast train --resume {run.folder}"
        )
