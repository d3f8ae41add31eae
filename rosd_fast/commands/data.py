"""`rosd-fast data`: check a data set, show what is in it and the prompts that it becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rosd_fast.config import ChatConfig, Config, DataConfig, NonNegativeInt, Section, same_as
from rosd_fast.config.load import apply_args, load_config
from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rosd_fast.types import Problem

POSITIONAL = ("source",)
RUN_OPTIONS = ("method", "model", "trust_remote_code")  # that a run has under the same name
MAX_SHOWN = 600  # characters of the example's prompt


class Options(Section):
    """Check every row of a data set and print counts, domains, verifiers and one example."""

    source: str | None = None
    """The data set: a .jsonl file or quickstart:SPLIT. `--source` may be left out."""
    verifier: str | None = same_as(DataConfig, "verifier")
    model: str | None = None
    """Also print the lengths of the prompts in tokens of this model."""
    trust_remote_code: bool = same_as(Config, "trust_remote_code")
    show: NonNegativeInt = 0
    """Print the prompts of every role for this many problems, the first ones, with token ids, and
    the known traps of the chat template. Needs --model, a preset or a file; no weights."""
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
    if options.source is None:
        raise UserError("no data set is named", fix="Name one: rosd-fast data FILE.jsonl")

    from rich.console import Console
    from rich.text import Text

    from rosd_fast.data.problems import load_problems

    problems = load_problems(options.source, data=DataConfig(verifier=options.verifier))
    console = Console(highlight=False)
    console.print(Text(f"{options.source}: {len(problems):,} problems"), soft_wrap=True)
    print_domains(console, problems)
    print_example(console, problems[0])
    if options.model is not None and not options.show:
        lengths = prompt_lengths(problems, options)
        console.print(
            f"prompt tokens: median {median(lengths):,.0f}, most {max(lengths):,} "
            f"({problems[lengths.index(max(lengths))].id})",
            markup=False,
            soft_wrap=True,
        )
    if options.show:
        show_prompts(given, options)
    return 0


def run_config(given: Mapping[str, Any], options: Options) -> Config:
    """The options of the run on this data set: presets, file, model and chat. Raises UserError."""
    if not (options.model or options.preset or options.config):
        raise UserError("--show needs a tokenizer", fix="Name the model, as in --model quickstart")
    own = {name: given[name] for name in given if name.startswith("chat.") or name in RUN_OPTIONS}
    own |= {"data.train": options.source, "data.dev": None, "data.dev_ood": None}
    own["sample.problems_per_step"] = "1"  # a data set may have fewer than a step needs
    if options.verifier is not None:
        own["data.verifier"] = options.verifier
    return load_config(own, presets=options.preset, file=options.config)


def show_prompts(given: Mapping[str, Any], options: Options) -> None:
    """Print each role's prompt for the first problems, and the traps that they step into."""
    import asyncio

    from rich.console import Console

    from rosd_fast.dry_run import print_notes, print_prompts, render_prompts
    from rosd_fast.inputs import load_inputs

    inputs = load_inputs(run_config(given, options), weights=False)
    console = Console(highlight=False, soft_wrap=True)
    for problem in inputs.problems[: options.show]:
        console.rule(problem.id)
        prompts = asyncio.run(render_prompts(inputs, problem))
        print_prompts(console, prompts, inputs, with_ids=True)
    print_notes(console, inputs)


def print_domains(console: Console, problems: Sequence[Problem]) -> None:
    """Print a row per domain and verifier."""
    from rich.table import Table
    from rich.text import Text

    table = Table("domain", "verifier", "with system turn")
    table.columns[2].justify = "right"
    table.add_column("problems", justify="right")
    counts = Counter((p.domain, p.verifier) for p in problems)
    systems = Counter((p.domain, p.verifier) for p in problems if p.system)
    for key, count in sorted(counts.items()):
        table.add_row(Text(key[0]), key[1], f"{systems[key]:,}", f"{count:,}")
    console.print(table)


def print_example(console: Console, problem: Problem) -> None:
    """Print a problem, its texts cut to a readable length."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for label in ("id", "system", "prompt", "answer"):
        text = getattr(problem, label)
        if text is not None:
            shown = text.strip()
            cut = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} [...]"
            grid.add_row(Text(label, "bold"), Text(cut))
    console.print(grid)


def prompt_lengths(problems: Sequence[Problem], options: Options) -> list[int]:
    """The number of tokens of each problem's prompt under the model's chat template."""
    from rosd_fast.model.load import find, load_tokenizer
    from rosd_fast.text.chat import chat_format

    assert options.model is not None
    tokenizer = load_tokenizer(find(options.model), trust_remote_code=options.trust_remote_code)
    chat = chat_format(tokenizer)
    return [len(chat.render_problem(problem)) for problem in problems]
