"""What `rosd-fast data` prints of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rosd_fast.text.printable import one_line, printable

if TYPE_CHECKING:
    import numpy as np

    from rosd_fast.data.problems import Problems
    from rosd_fast.data.report import Bar, Faults, Summary
    from rosd_fast.types import Judgement, Problem

MAX_SHOWN = 600  # characters of an example's text
MAX_ANSWER = 60  # characters of an answer in a sentence
MAX_PAIRS = 5  # repeated problems that are named
BAR_WIDTH = 30


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line as it is: texts of data are no markup, and their control characters escaped."""
    console.print(Text(printable(text), style), soft_wrap=True)


def print_sources(console: Console, problems: Problems, *, faults: int) -> None:
    """Print a line per source: how many problems, and as what its rows were read."""
    for source, shape, count in problems.recognized:
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        say(console, f"{source.text}: {count:,} rows{weight}, read as {shape.says}", "bold")
    good = len(problems) - faults
    say(console, f"{good:,} problems" + (f", {faults:,} bad rows" if faults else ""))


def print_groups(console: Console, summary: Summary) -> None:
    """Print a row per domain and verifier."""
    table = Table("domain", "verifier")
    for name in ("system turn", "problems"):
        table.add_column(name, justify="right")
    for key, count in sorted(summary.groups.items()):
        domain, verifier = (Text(printable(name)) for name in key)
        table.add_row(domain, verifier, f"{summary.with_system[key]:,}", f"{count:,}")
    console.print(table)
    if summary.fields:
        fields = [f"{name} ({count:,})" for name, count in summary.fields.most_common()]
        say(console, f"further fields in use: {', '.join(fields)}")


def print_instructions(console: Console, summary: Summary, lines: Sequence[str]) -> None:
    """Print how many prompts end with an answer instruction. lines: of those that do."""
    for line in lines:
        say(console, line)
    silent = summary.instructions[""]
    if not lines and silent:
        say(console, "no answer instruction is added to any prompt")


def print_lengths(
    console: Console, lengths: np.ndarray, bars: Sequence[Bar], *, unit: str, longest: str
) -> None:
    """Print the distribution of prompt lengths, and where the longest prompt is."""
    middle, most = median(lengths.tolist()), int(lengths.max())
    say(console, f"prompt {unit}: median {middle:,.0f}, most {most:,} ({longest})")
    names = [f"{b.low:,} and more" if b.high is None else f"{b.low:,} to {b.high:,}" for b in bars]
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    top = max(bar.count for bar in bars)
    for name, bar in zip(names, bars, strict=True):
        drawn = block * -(-bar.count * BAR_WIDTH // top)
        say(console, f"  {name:>{max(map(len, names))}}  {drawn} {bar.count:,}".rstrip())


def print_pairs(
    console: Console,
    what: str,
    pairs: np.ndarray,
    name: Callable[[int], str],
    sign: str,
    other: Callable[[int], str] | None = None,
) -> None:
    """Print how many pairs of problems there are, and the first ones by their places."""
    if not len(pairs):
        return
    shown = [f"{name(i)} {sign} {(other or name)(j)}" for i, j in pairs[:MAX_PAIRS].tolist()]
    more = [f"and {len(pairs) - MAX_PAIRS:,} more"] if len(pairs) > MAX_PAIRS else []
    say(console, f"{what}: {len(pairs):,}")
    for line in (*shown, *more):
        say(console, f"  {line}")


def print_faults(console: Console, faults: Faults) -> None:
    """Print the first bad rows of each kind, and how many more there are."""
    for kind, count in faults.counts.most_common():
        listed = faults.listed[kind]
        say(console, f"{count:,} bad {'row' if count == 1 else 'rows'}: {kind}", "bold")
        for line in listed:
            say(console, f"  {line}")
        if count > len(listed):
            say(console, f"  and {count - len(listed):,} more")


def print_example(console: Console, problem: Problem) -> None:
    """Print a problem, its texts cut to a readable length."""
    grid = Table.grid(padding=(0, 2))
    rows = [("id", problem.id)]
    rows += [(turn.role, turn.content) for turn in problem.messages[:-1]]
    rows += [("prompt", problem.prompt), ("answer", problem.answer)]
    rows += [
        (name.replace("_", " "), text)
        for name in ("reference", "teacher_prompt", "feedback")
        if (text := getattr(problem, name)) is not None
    ]
    for label, text in rows:
        shown = text.strip()
        cut = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} [...]"
        grid.add_row(Text(printable(label), "bold"), Text(printable(cut)))
    console.print(grid)
    console.print()


def print_judgements(
    console: Console, problem: Problem, judged: Iterable[tuple[str, str, Judgement]]
) -> None:
    """Print how a verifier scores completions. judged: what each is, its text, the judgement."""
    answer = one_line(problem.answer, MAX_ANSWER)
    say(console, f"verifier {problem.verifier}, where the answer is {answer}:", "bold")
    grid = Table.grid(padding=(0, 2))
    for what, completion, judgement in judged:
        found = judgement.answer
        answer = "no answer" if found is None else f"answer {one_line(found, MAX_ANSWER)}"
        reason = f": {one_line(judgement.reason, 2 * MAX_ANSWER)}" if judgement.reason else ""
        verdict = f"score {judgement.score:g}, {answer}{reason}"
        grid.add_row(f"  {what}", Text(one_line(completion, MAX_ANSWER)), Text(verdict))
    console.print(grid)
