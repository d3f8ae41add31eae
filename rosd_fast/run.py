"""Opening a run: everything is loaded and checked before the first file is written.

A run folder holds config.toml, metrics.jsonl, rollouts/, checkpoints/ and plots/. Every random draw
is keyed by seed, step and problem, so a resumed run needs no generator state: the step number is
enough.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rosd_fast.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
)
from rosd_fast.config import Config
from rosd_fast.data import ProblemStream
from rosd_fast.engines.base import RolloutEngine
from rosd_fast.engines.constraint import GrammarCompiler
from rosd_fast.engines.local import LocalEngine
from rosd_fast.engines.open import check_engine, open_engine, open_scorer
from rosd_fast.engines.scorer import SglangScorer
from rosd_fast.errors import UserError
from rosd_fast.files import write_atomic
from rosd_fast.inputs import check_budgets, load_data, with_absolute_paths
from rosd_fast.learner import Learner
from rosd_fast.metrics import MetricsLog
from rosd_fast.model.attention import head
from rosd_fast.model.load import LoadedModel, load_model
from rosd_fast.progress import Progress, progress
from rosd_fast.reflect import check_templates
from rosd_fast.report import draw_plots, render_tokens_html, summarize
from rosd_fast.rollout import check_prompts, problem_prompt
from rosd_fast.settings import config_hash, to_toml
from rosd_fast.spans import TokenBytes
from rosd_fast.types import Problem, SamplingParams

CONFIG_FILE = "config.toml"
PROBE_TOKENS = 64


class StopRequest:
    """Set by Ctrl-C or SIGTERM; the loop looks at it after each step. A second Ctrl-C ends at
    once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self, progress: Progress) -> Iterator[None]:
        def handle(number: int, _frame: FrameType | None) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = True
            progress.note("stopping after this step with a checkpoint; Ctrl-C again stops at once")

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass(slots=True)
class Run:
    """Everything the loop works with."""

    config: Config
    folder: Path
    model: LoadedModel
    stream: ProblemStream
    dev_splits: dict[str, list[Problem]]  # "dev" and "ood", those that were given
    engine: RolloutEngine
    reflector: RolloutEngine
    teacher_engine: RolloutEngine | None  # None: the teacher only scores, on a server
    scorer: SglangScorer | None  # of a teacher on a server
    learner: Learner
    token_bytes: TokenBytes
    probe_ids: tuple[int, ...]  # a prompt on which servers are compared with the trainer
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

    def finish_step(self, step: int, metrics: dict[str, float]) -> None:
        """Add the stages' times, write the row, show it."""
        metrics = metrics | self.progress.clock.metrics()
        self.log.write(step, metrics)
        self.progress.step_done(step, metrics)
        self.last_step = step

    def save(self, step: int) -> None:
        """Write a checkpoint of this step and drop those beyond `keep_last`."""
        save_checkpoint(
            self.folder,
            step=step,
            learner=self.learner,
            tokenizer=self.model.tokenizer,
            config_hash=config_hash(self.config),
        )
        prune(self.folder, self.config.checkpoint.keep_last)


@contextmanager
def open_run(config: Config, *, resume: Path | None = None) -> Iterator[Run]:
    """Load and check all that `config` names, make or reopen the run folder, and close it with a
    report."""
    config = with_absolute_paths(config)
    check_templates(config.reflect, config.teacher)
    problems, dev_splits = load_data(config)
    stream = ProblemStream(
        problems,
        batch_size=config.sample.problems_per_step,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    model = load_model(config)
    check_prompts(
        [*problems, *(problem for split in dev_splits.values() for problem in split)],
        tokenizer=model.tokenizer,
        max_prompt_tokens=config.sample.max_prompt_tokens,
        context_length=model.context_length,
    )
    check_budgets(config, model, max(problems, key=lambda problem: len(problem.prompt)))
    learner = Learner(model.model, config)
    teacher_engine = None
    if config.teacher.where == "trainer":
        teacher_engine = LocalEngine(
            learner.teacher.model, max_rows=config.engine.max_rows, tokenizer=model.tokenizer
        )
    token_bytes = TokenBytes(model.tokenizer)
    if config.reflect.mode != "free":
        GrammarCompiler(model.tokenizer, head(model.model).weight.shape[0]).check(
            model.stop_token_ids
        )
    check_engine(config, model)
    if resume is None:
        folder, first_step = make_folder(config, model), 1
    else:
        folder, first_step = resume, restore(resume, config, learner)
        write_atomic(folder / CONFIG_FILE, to_toml(config).encode())  # steps may have changed
    log = MetricsLog(folder / "metrics.jsonl")
    log.truncate_after(first_step - 1)
    stop = StopRequest()
    probe_ids = problem_prompt(problems[0], model.tokenizer, config.sample.max_prompt_tokens)
    probe_ids = probe_ids[:PROBE_TOKENS]
    with progress(config.steps, first_step) as shown, stop.listening(shown):
        engine = open_engine(config, model, folder, probe_ids=probe_ids, note=shown.note)
        reflector = engine if config.reflect.weights == "student" else teacher_engine
        assert reflector is not None  # Config has checked it
        run = Run(
            config=config,
            folder=folder,
            model=model,
            stream=stream,
            dev_splits=dev_splits,
            engine=engine,
            reflector=reflector,
            teacher_engine=teacher_engine,
            scorer=open_scorer(config, model, folder, note=shown.note),
            learner=learner,
            token_bytes=token_bytes,
            probe_ids=probe_ids,
            log=log,
            progress=shown,
            stop=stop,
            first_step=first_step,
        )
        yield run
    finish(run)


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


def restore(folder: Path, config: Config, learner: Learner) -> int:
    """Load the newest whole checkpoint of the run; returns the first step to run.

    Raises UserError when there is none, when it was made with other options, or when no step is
    left.
    """
    checkpoint = latest_checkpoint(folder, warn=lambda text: print(text, file=sys.stderr))
    if checkpoint is None:
        raise UserError(
            "has no checkpoint to resume from", where=str(folder), fix="Start a new run instead"
        )
    if read_state(checkpoint)["config_hash"] != config_hash(config):
        raise UserError(
            "config.toml is not the one that this checkpoint was made with",
            where=str(checkpoint),
            fix="Put the old options back, or start a new run with --model set to this folder",
        )
    step = load_checkpoint(checkpoint, learner)
    if step >= config.steps:
        raise UserError(
            f"all {config.steps} steps are done",
            where=str(folder),
            fix=f"To go on give more of them, for example --steps {step + config.steps}",
        )
    return step + 1


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
