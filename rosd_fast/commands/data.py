"""`rosd-fast data`: check a data set and show what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from rosd_fast.config import Config, DataConfig, Section, same_as
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.types import Problem

POSITIONAL = ("source",)
MAX_SHOWN = 600  # characters of the example's prompt


class Options(Section):
    """Check every row of a data set and print counts, domains, verifiers and one example."""

    source: str | None = None
    """The data set: a .jsonl file or quickstart:SPLIT. `--source` may be left out."""
    verifier: str | None = same_as(DataConfig, "verifier")
    model: str | None = None
    """Also print the lengths of the prompts in tokens of this model."""
    trust_remote_code: bool = same_as(Config, "trust_remote_code")


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

    problems = load_problems(options.source, verifier=options.verifier)
    console = Console(highlight=False)
    console.print(Text(f"{options.source}: {len(problems):,} problems"), soft_wrap=True)
    print_domains(console, problems)
    print_example(console, problems[0])
    if options.model is not None:
        lengths = prompt_lengths(problems, options)
        console.print(
            f"prompt tokens: median {median(lengths):,.0f}, most {max(lengths):,} "
            f"({problems[lengths.index(max(lengths))].id})",
            markup=False,
            soft_wrap=True,
        )
    return 0


def print_domains(console: Any, problems: Sequence[Problem]) -> None:
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


def print_example(console: Any, problem: Problem) -> None:
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
    return [len(chat.render(problem.prompt, system=problem.system)) for problem in problems]
