"""`rosd-fast data`: check a data set, show what is in it and the prompts that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from rosd_fast.config import (
    ChatConfig,
    Config,
    DataConfig,
    NonNegativeInt,
    Section,
    SourceConfig,
    VerifyConfig,
    same_as,
)
from rosd_fast.config.load import apply_args, load_config
from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rosd_fast.data.collection import Problems
    from rosd_fast.data.report import Summary
    from rosd_fast.text.chat import ChatFormat

POSITIONAL = ("data.source",)
ALIASES = {"source": "data.source", "data": "data.source", "verifier": "data.verifier"}
RUN_OPTIONS = ("method", "model", "trust_remote_code")  # that a run has under the same name
BAD_ROWS = 1  # exit code of a data set that has some
NO_BUDGET = "1000000"  # tokens of a prompt
MAX_TOKENIZED = 20_000  # prompts whose tokens are counted


class DataSection(SourceConfig):
    """The problems to check, and the splits that a run would make of them."""

    dev: str | None = same_as(DataConfig, "dev", default=None)
    dev_ood: str | None = same_as(DataConfig, "dev_ood")
    overlap: Literal["drop", "keep"] = same_as(DataConfig, "overlap")
    split_seed: NonNegativeInt = same_as(DataConfig, "split_seed")


class Options(Section):
    """Check every row of a data set. Print as what it was read, counts, lengths, repeated problems,
    bad rows, examples, and how the verifier scores. The exit code is 1 when rows are bad, unless
    data.bad_rows is skip."""

    data: DataSection = DataSection()
    verify: VerifyConfig = VerifyConfig()
    model: str | None = None
    """Also print the lengths of the prompts in tokens of this model, and its prompts."""
    trust_remote_code: bool = same_as(Config, "trust_remote_code")
    show: NonNegativeInt = 3
    """Number of examples, the first problems. With a model, a preset or a file: the prompts of
    every role for each of them, and the known traps of the chat template; no weights are needed.
    When the number is given: with token ids."""
    method: str | None = None
    """Method whose prompts are shown; None: that of the presets or the file, else rosd."""
    preset: tuple[str, ...] = ()
    """Presets of the run whose prompts are shown."""
    config: str | None = None
    """A TOML file with the options of that run."""
    chat: ChatConfig = ChatConfig()


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Check the data set and print what is in it."""
    options = apply_args(Options(), given)
    if options.data.source is None:
        raise UserError("no data set is named", fix="Name one: rosd-fast data FILE.jsonl")

    from contextlib import closing

    from rich.console import Console

    from rosd_fast.commands import data_view as view
    from rosd_fast.data.datasets import parse_dev
    from rosd_fast.data.problems import open_problems
    from rosd_fast.data.report import summarize

    console = Console(highlight=False)
    data = options.data.as_training()
    parse_dev(with_splits(options))  # mistakes are said before a long reading
    config = run_config(given, options) if shows_prompts(options) else None
    problems = open_problems(data.train, data=data, verify=for_reading(options))
    total = f"{len(problems):,} rows"
    with view.busy() as tell, closing(problems.answers):
        summary = summarize(problems, lambda count: tell(f"reading: {count:,} of {total}"))
        tell("looking for near-duplicates")
        similar = summary.similar(problems)
    view.print_sources(console, problems, summary)
    if len(summary.indices):
        view.print_groups(console, summary)
        view.print_lengths(console, problems, summary)
        view.print_repetitions(console, problems, summary, *similar)
        print_splits(console, options)
        print_verifiers(console, problems, summary, options)
        if config is None:
            for index in summary.indices[: options.show].tolist():
                view.print_example(console, problems[index])
        else:
            show_prompts(console, config, problems, summary, options.show, "show" in given)
    view.print_faults(console, summary.faults)
    return BAD_ROWS if summary.faults and options.data.bad_rows == "error" else 0


def print_splits(console: Console, options: Options) -> None:
    """Print what a run would hold out, leave out, and find nearly the same in two splits."""
    from rosd_fast.commands.data_view import busy, say
    from rosd_fast.data.datasets import load_datasets
    from rosd_fast.data.splits import TRAIN

    if options.data.dev is None and options.data.dev_ood is None:
        return
    with busy() as tell:
        tell("dividing the problems")
        found = load_datasets(with_splits(options), verify=for_reading(options))
    say(console, f"splits: {len(found.train):,} problems to train on", "bold")
    for name, lines in found.about.items():
        for line in lines if name != TRAIN else []:
            say(console, f"  {name}: {line}")
    for line in found.shared:
        say(console, f"  {line}")
    console.print()


def with_splits(options: Options) -> DataConfig:
    """The data of the run. Its bad rows are skipped: they are listed by then."""
    names = ("dev", "dev_ood", "overlap", "split_seed")
    own = {name: getattr(options.data, name) for name in names}
    return options.data.as_training().model_copy(update=own | {"bad_rows": "skip"})


def for_reading(options: Options) -> VerifyConfig:
    """The limits of verifiers while rows are checked, which runs nothing that a model wrote."""
    return options.verify.model_copy(update={"run_code": True})


def print_verifiers(
    console: Console, problems: Problems, summary: Summary, options: Options
) -> None:
    """Print how each verifier scores a right answer, a wrong one and none."""
    from rosd_fast.commands.data_view import print_judgements, say
    from rosd_fast.data.report import trials
    from rosd_fast.verify import VERIFIERS, Limits, VerifierPool

    with VerifierPool(Limits(**options.verify.model_dump())) as pool:
        for indices in summary.first.values():
            some = [problems[index] for index in indices]
            if VERIFIERS[some[0].verifier].runs_code and not options.verify.run_code:
                say(console, f"verifier {some[0].verifier}", "bold")
                say(console, "  It runs code: with --verify.run-code, it is shown scoring.")
                console.print()
                continue
            tried = trials(some)
            judged = pool.judge_sync([(some[0], completion) for _, completion in tried])
            print_judgements(console, some[0], tried, judged)


def show_prompts(
    console: Console,
    config: Config,
    problems: Problems,
    summary: Summary,
    count: int,
    with_ids: bool,
) -> None:
    """Print how many tokens the prompts have, each role's prompt for the first `count` problems,
    and the traps of the chat template that they step into."""
    import asyncio

    from rich.text import Text

    from rosd_fast.config.chat import make_chats, read_templates
    from rosd_fast.dry_run import print_notes, print_prompts, render_prompts
    from rosd_fast.inputs import load_inputs
    from rosd_fast.model.skeleton import load_skeleton
    from rosd_fast.text.printable import printable

    model = load_skeleton(
        config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    chats = make_chats(read_templates(config.chat), model.tokenizer)
    print_token_lengths(console, problems, summary, chats.student)
    inputs = load_inputs(config, weights=False)
    for problem in inputs.problems[:count]:
        console.rule(Text(printable(problem.id, keep="")))
        prompts = asyncio.run(render_prompts(inputs, problem))
        print_prompts(console, prompts, inputs, with_ids=with_ids)
    print_notes(console, inputs)


def shows_prompts(options: Options) -> bool:
    """Whether a run is named whose prompts are shown."""
    return bool(options.model or options.preset or options.config)


def run_config(given: Mapping[str, Any], options: Options) -> Config:
    """The options of the run on this data set: presets, file, model and chat. Raises UserError."""
    own = {name: given[name] for name in given if name.startswith("chat.") or name in RUN_OPTIONS}
    data = options.data.as_training().model_copy(update={"bad_rows": "skip"})
    own |= {f"data.{name}": value for name, value in data.model_dump().items() if name != "columns"}
    own |= {name: given[name] for name in given if name.startswith("data.columns.")}
    own["sample.problems_per_step"] = "1"  # a data set may have fewer than a step needs
    if not options.preset and options.config is None:  # no run whose budgets they could exceed
        own |= {f"{name}.max_prompt_tokens": NO_BUDGET for name in ("sample", "reflect", "teacher")}
    return load_config(own, presets=options.preset, file=options.config)


def print_token_lengths(
    console: Console, problems: Problems, summary: Summary, chat: ChatFormat
) -> None:
    """Print the lengths of the prompts in tokens."""
    import numpy as np

    from rosd_fast.commands.data_view import busy, print_histogram
    from rosd_fast.data.checks import spread
    from rosd_fast.data.notes import place_in

    count = len(summary.indices)
    some = summary.indices[spread(count, min(count, MAX_TOKENIZED))].tolist()
    with busy() as tell:
        tell("counting tokens")
        lengths = np.array([len(chat.render_problem(problems[index])) for index in some])
    among = f" of {len(some):,} problems, spread evenly" if len(some) < count else ""
    longest = place_in(problems)(some[int(lengths.argmax())])
    print_histogram(console, f"tokens per prompt{among}", lengths, longest)
