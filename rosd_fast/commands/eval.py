"""`rosd-fast eval`: how accurate a model is on data sets, and how sure that is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rosd_fast.config import (
    ChatConfig,
    Config,
    DataConfig,
    Device,
    Dtype,
    EngineConfig,
    EvalConfig,
    SampleConfig,
    Section,
    SelectConfig,
    SourceConfig,
    VerifyConfig,
    same_as,
)
from rosd_fast.config.arguments import as_flag
from rosd_fast.config.load import apply_args
from rosd_fast.config.messages import explain
from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.evaluation.evaluation import Evaluation, Watch
    from rosd_fast.evaluation.model import EvaluatedModel
    from rosd_fast.evaluation.records import Completion

POSITIONAL = ("model",)
ALIASES = {"data": "data.source", "verifier": "data.verifier", "max_rows": "engine.max_rows"}
FREE_ON_RESUME = ("resume", "against", "device", "engine.", "verify.")
"""Options, or their sections, that may differ when an evaluation goes on."""


class EngineSection(Section):
    """The engine that samples."""

    kind: Literal["local", "sglang"] = same_as(
        EngineConfig,
        "kind",
        description="Where completions are sampled.\nlocal: in this process.\nsglang: on SGLang "
        "servers.",
    )
    max_rows: int = same_as(EngineConfig, "max_rows")
    launch: Literal["local", "urls"] = same_as(
        EngineConfig,
        "launch",
        description="The SGLang servers.\nlocal: started here with the model, and stopped at the "
        "end.\nurls: running already, with the model to evaluate, at engine.urls.",
    )
    urls: str = same_as(EngineConfig, "urls")
    servers: int = same_as(EngineConfig, "servers", description="Number of servers to start.")
    gpus: str = same_as(EngineConfig, "gpus")
    python: str | None = same_as(EngineConfig, "python")
    server_args: str = same_as(EngineConfig, "server_args")
    start_timeout_s: float = same_as(EngineConfig, "start_timeout_s")
    concurrency: int = same_as(EngineConfig, "concurrency")
    request_timeout_s: float = same_as(EngineConfig, "request_timeout_s")
    health_every_s: float = same_as(EngineConfig, "health_every_s")
    health_timeout_s: float = same_as(EngineConfig, "health_timeout_s")
    max_failures: int = same_as(EngineConfig, "max_failures")


class Options(Section):
    """Sample completions of every problem and verify them: mean@k, pass@j and maj@k by data set and
    domain, with 95% intervals, as JSON, Markdown and a picture (see docs/evaluation.md). The same
    command goes on with an evaluation that was interrupted."""

    model: str = same_as(
        Config,
        "model",
        description="A run folder, which stands for its best checkpoint, a model folder, a hub id, "
        "quickstart or smollm2. `--model` may be left out. With engine.urls: the tokenizer of what "
        "is served.",
    )
    against: str | None = None
    """Another model, run or evaluation folder: the same problems are evaluated with it, and the
    paired difference is reported."""
    out: str = same_as(
        Config, "out", default="evals", description="Folder in which evaluations are stored."
    )
    name: str | None = None
    """Name of the evaluation's folder; None: made of model, data sets and settings, so that the
    same command finds it again."""
    resume: str | None = None
    """Folder of an evaluation to go on with. Only device, engine.*, verify.* and against may be
    given with it."""
    data: SourceConfig = SourceConfig(source="quickstart:test")
    problems: int = same_as(
        EvalConfig,
        "problems",
        description="Number of problems per data set, the first ones; 0: all.",
    )
    samples: int = same_as(
        EvalConfig, "samples", description="Completions per problem: the k of mean@k."
    )
    max_new_tokens: int = same_as(
        SampleConfig,
        "max_new_tokens",
        default=2048,
        description="Maximum number of tokens in a completion; it also ends at the model's context "
        "length.",
    )
    temperature: float = same_as(EvalConfig, "temperature")
    top_p: float = same_as(EvalConfig, "top_p")
    threshold: float = same_as(SelectConfig, "threshold")
    seed: int = same_as(Config, "seed", description="Seed of the samples.")
    dtype: Dtype = same_as(Config, "dtype")
    device: Device = same_as(Config, "device")
    trust_remote_code: bool = same_as(Config, "trust_remote_code")
    engine: EngineSection = EngineSection()
    verify: VerifyConfig = VerifyConfig()
    chat: ChatConfig = ChatConfig()


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Evaluate, store and print."""
    options = read_options(given)

    from rosd_fast.evaluation.folder import check_folder
    from rosd_fast.evaluation.progress import shown
    from rosd_fast.stop import interruptible

    model = named_model(options, options.model)
    evaluation = plan(options, given, model)
    folder = folder_of(options, evaluation)
    check_folder(folder, settings(options, evaluation))  # before another model is evaluated
    try:
        with interruptible(), shown(model.name) as watch:
            other, others = evaluate_other(options, evaluation, watch)
            completions = evaluate(options, evaluation, folder, watch)
    except KeyboardInterrupt:
        print(f"stopped; {how_to_go_on(options, folder)}", file=sys.stderr)
        raise
    report(evaluation, folder, completions, other, others)
    return 0


def how_to_go_on(options: Options, folder: Path) -> str:
    """What to do after an interruption."""
    from rosd_fast.evaluation.folder import is_evaluation

    if not is_evaluation(folder):  # the other model's was not finished
        return "the same command goes on with it"
    against = f" --against {options.against}" if options.against else ""
    return f"go on with: rosd-fast eval --resume {folder}{against}"


def read_options(given: Mapping[str, Any]) -> Options:
    """The options, from the folder that is resumed if there is one; paths are absolute.

    Raises UserError for options that do not go together, or cannot change.
    """
    from rosd_fast.config.chat import read_templates
    from rosd_fast.data.sources import absolute_sources
    from rosd_fast.verify.user_file import absolute_verifier

    base, given = Options(), dict(given)
    if (resumed := given.get("resume")) is not None:
        fixed = [name for name in given if not name.startswith(FREE_ON_RESUME)]
        if fixed:
            raise UserError(
                f"{as_flag(fixed[0])} cannot be changed when an evaluation goes on",
                fix="Leave it out, or start another evaluation",
            )
        base = stored_options(Path(resumed).expanduser())
    options = apply_args(base, given)
    engine = options.engine
    if (engine.launch == "urls" or engine.urls) and engine.kind != "sglang":
        raise UserError("engine.urls needs engine.kind sglang", fix="Add --engine.kind sglang")
    if engine.launch == "urls" and not engine.urls:
        raise UserError("engine.launch urls needs engine.urls", fix="Add --engine.urls http://...")
    if options.data.source is None:
        raise UserError("no data set is named", fix="Name one: --data FILE.jsonl")
    launch = "urls" if engine.urls else "local"
    places = {
        "source": absolute_sources(options.data.source),
        "verifier": absolute_verifier(options.data.verifier),
    }
    return options.model_copy(
        update={
            "engine": engine.model_copy(update={"launch": launch}),
            "data": options.data.model_copy(update=places),
            "chat": read_templates(options.chat),
        }
    )


def stored_options(folder: Path) -> Options:
    """The options of an evaluation to go on with. Raises UserError for one that is wrong."""
    from rosd_fast.evaluation.folder import SETTINGS, read_settings

    try:
        return Options.model_validate(read_settings(folder)["options"])
    except ValidationError as error:
        raise explain(
            error,
            Options,
            spell=lambda name: f"options.{name}",
            show=repr,
            where=lambda keys: str(folder / SETTINGS),
        ) from None


def named_model(options: Options, name: str) -> EvaluatedModel:
    """The model that an option names, or that servers have; says how it was found."""
    from rosd_fast.config.arguments import listed
    from rosd_fast.evaluation.engine import served_model
    from rosd_fast.evaluation.model import find_model

    urls = listed(options.engine.urls)
    model = find_model(name, weights=not urls)
    if urls:
        model = served_model(model, urls)
    if model.note:
        print(model.note)
    return model


def plan(options: Options, given: Mapping[str, Any], model: EvaluatedModel) -> Evaluation:
    """The evaluation that the options ask for; says what the data sets were read as."""
    from rosd_fast.evaluation.data import fitting_data_sets, load_data_sets
    from rosd_fast.evaluation.evaluation import Evaluation
    from rosd_fast.evaluation.provenance import seen_by_run
    from rosd_fast.evaluation.records import Sampling

    problems, notes = load_data_sets(options.data, options.verify, first=options.problems)
    assert options.data.source is not None
    config = run_config(options, given, model)
    problems, left_out = fitting_data_sets(problems, config)
    notes += [*left_out, *seen_by_run(model, options.data.source), *unlike_run(options, model)]
    for line in notes:
        print(line)
    return Evaluation(
        model=model,
        source=options.data.source,
        problems=problems,
        sampling=Sampling(**options.model_dump(include=set(Sampling.__dataclass_fields__))),
        config=config,
    )


def unlike_run(options: Options, model: EvaluatedModel) -> list[str]:
    """A line per option that decides what is right and that the model's run had otherwise."""
    run = model.run_config
    if run is None:
        return []
    found = [
        ("--data.answer-instruction", options.data.answer_instruction, run.data.answer_instruction),
        ("--threshold", options.threshold, run.select.threshold),
    ]
    return [
        f"{model.run} was trained with {name} {theirs}, and is evaluated with {own}"
        for name, own, theirs in found
        if own != theirs
    ]


def run_config(options: Options, given: Mapping[str, Any], model: EvaluatedModel) -> Config:
    """The options of a run with the same meaning. A run's checkpoint has the chat of its run."""
    own, chat = model.run_config, options.chat
    chosen = any(name.startswith("chat.") for name in given) or options.resume is not None
    if own is not None and not chosen and own.chat != chat:
        print(f"chat templates: those of {model.run}, as no chat option is given")
        chat = own.chat
    return Config(
        model=model.source,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        chat=chat,
        data=DataConfig(bad_rows=options.data.bad_rows),
        verify=options.verify,
        engine=EngineConfig(**options.engine.model_dump()),
    )


def folder_of(options: Options, evaluation: Evaluation) -> Path:
    """Where the evaluation is stored."""
    if options.resume is not None:
        return Path(options.resume).expanduser()
    return Path(options.out).expanduser() / (options.name or evaluation.default_name)


def evaluate(
    options: Options, evaluation: Evaluation, folder: Path, watch: Watch
) -> list[Completion]:
    """All completions of an evaluation, those of its folder included; writes its own report."""
    from rosd_fast.engines.factory import check_engine
    from rosd_fast.evaluation.evaluation import complete
    from rosd_fast.evaluation.report import make_report, write_report

    config = evaluation.config
    check_engine(config.engine, config.teacher, config.device)
    completions = asyncio.run(complete(evaluation, folder, settings(options, evaluation), watch))
    write_report(make_report(evaluation.model.name, completions), folder)
    return completions


def settings(options: Options, evaluation: Evaluation) -> dict[str, Any]:
    """The content of settings.json, from which the evaluation can go on."""
    from rosd_fast.evaluation.settings import settings_of

    stored = options.model_copy(
        update={
            "model": evaluation.model.source,
            "chat": evaluation.config.chat,
            "against": None,
            "resume": None,
        }
    )
    return settings_of(evaluation, stored.model_dump(mode="json"))


def evaluate_other(
    options: Options, evaluation: Evaluation, watch: Watch
) -> tuple[str | None, list[Completion]]:
    """(name, completions) of the model to compare with: read from a folder, or sampled first.

    Raises UserError for an evaluation of other problems.
    """
    from dataclasses import replace

    from rosd_fast.evaluation.folder import is_evaluation
    from rosd_fast.evaluation.stored import read_other

    if options.against is None:
        return None, []
    folder = Path(options.against).expanduser()
    if is_evaluation(folder):
        return read_other(folder, evaluation, watch.note)
    if options.engine.urls:
        raise UserError(
            "the servers serve one model",
            where=f"--against {options.against}",
            fix="Evaluate the other one by itself, and give the folder of that evaluation",
        )
    model = named_model(options, options.against)
    other = replace(
        evaluation,
        model=model,
        config=evaluation.config.model_copy(update={"model": model.source}),
    )
    where = Path(options.out).expanduser() / other.default_name
    return model.name, evaluate(options, other, where, watch)


def report(
    evaluation: Evaluation,
    folder: Path,
    completions: list[Completion],
    other: str | None,
    others: list[Completion],
) -> None:
    """Write the result, table and picture, and print them."""
    from rich.console import Console

    from rosd_fast.evaluation.report import make_report, print_report, write_report

    found = make_report(evaluation.model.name, completions, other=other, other_completions=others)
    write_report(found, folder)
    console = Console(highlight=False)
    print_report(found, console)
    console.print(f"stored in {folder}", soft_wrap=True, markup=False)
