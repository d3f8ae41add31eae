"""What `rosd-fast data` prints of a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rosd_fast.data.instruct import describe_instructions
from rosd_fast.data.notes import place_in
from rosd_fast.data.report import Faults, Summary, histogram
from rosd_fast.text.printable import one_line, printable

if TYPE_CHECKING:
    import numpy as np

    from rosd_fast.data.collection import Problems
    from rosd_fast.types import Judgement, Problem

MAX_SHOWN = 600  # characters of an example's text
MAX_ANSWER = 60  # characters of an answer in a line
MAX_PAIRS = 5  # repeated problems that are named
BAR_WIDTH = 30


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line: texts of data are no markup, and their control characters are escaped."""
    console.print(Text(printable(text, keep=""), style), soft_wrap=True)


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def busy() -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done; yields what is told it."""
    with Console(stderr=True).status("reading") as status:
        yield status.update


def print_sources(console: Console, problems: Problems, summary: Summary) -> None:
    """Print a line per source: how many rows, and as what they were read."""
    recognized, bad = problems.recognized, len(summary.faults)
    alone = len(recognized) == 1 and not bad
    for source, shape, count in recognized:
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        what = counted(count, "problem" if alone else "row")
        say(console, f"{source.text}: {what}{weight}, read as {shape.says}", "bold")
    if not alone:
        listed = f", and {counted(bad, 'bad row')}, listed below" if bad else ""
        say(console, f"{counted(len(summary.indices), 'problem')}{listed}")
    if summary.fields:
        used = [f"{name} ({count:,})" for name, count in summary.fields.most_common()]
        say(console, f"further fields in use: {', '.join(used)}")
    lines = describe_instructions(summary.instructions)
    if not lines and len(summary.indices):
        lines = ["no answer instruction is added to a prompt"]
    for line in lines:
        say(console, line)
    console.print()


def print_groups(console: Console, summary: Summary) -> None:
    """Print a row per domain and verifier."""
    table = Table()
    for name in ("domain", "verifier"):
        table.add_column(name, overflow="fold")
    for name in ("with system turn", "problems"):
        table.add_column(name, justify="right")
    for key, count in sorted(summary.groups.items()):
        domain, verifier = (Text(printable(name, keep="")) for name in key)
        table.add_row(domain, verifier, f"{summary.with_system[key]:,}", f"{count:,}")
    console.print(table)
    console.print()


def print_lengths(console: Console, problems: Problems, summary: Summary) -> None:
    """Print the distribution of the prompts' lengths in characters."""
    longest = place_in(problems)(int(summary.indices[summary.lengths.argmax()]))
    print_histogram(console, "characters per prompt", summary.lengths, longest)


def print_histogram(console: Console, what: str, values: np.ndarray, most_at: str) -> None:
    """Print a distribution as bars. most_at: the place of the largest value."""
    bars = histogram(values)
    say(console, f"{what}: median {median(values.tolist()):,.0f}, most {max(values):,} ({most_at})")
    names = [bar.name for bar in bars]
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    top = max(bar.count for bar in bars)
    for name, bar in zip(names, bars, strict=True):
        drawn = block * -(-bar.count * BAR_WIDTH // top)
        say(console, f"  {name:>{max(map(len, names))}}  {drawn} {bar.count:,}")
    console.print()


def print_repetitions(
    console: Console, problems: Problems, summary: Summary, similar: np.ndarray, compared: int
) -> None:
    """Print which problems are in the data set twice, or nearly so.

    similar: [p, 2] near-duplicates among `compared` different problems.
    """
    place = place_in(problems)
    some = compared < len(summary.indices) - len(summary.repetitions)
    among = f" among {compared:,} that were compared" if some else ""
    found = [
        print_pairs(console, "problems more than once", summary.repetitions, "=", place),
        print_pairs(console, "of these with another answer", summary.contradictions, "=", place),
        print_pairs(console, f"near-duplicates{among}", similar, "~", place),
    ]
    if not any(found):
        say(console, f"no problem twice, no near-duplicates{among}")
    console.print()


def print_pairs(
    console: Console, what: str, pairs: np.ndarray, sign: str, place: Callable[[int], str]
) -> bool:
    """Print how many pairs of problems there are, and the first by their places; whether any."""
    if not len(pairs):
        return False
    say(console, f"{what}: {len(pairs):,}")
    for i, j in pairs[:MAX_PAIRS].tolist():
        say(console, f"  {place(i)} {sign} {place(j)}")
    if len(pairs) > MAX_PAIRS:
        say(console, f"  and {len(pairs) - MAX_PAIRS:,} more")
    return True


def print_judgements(
    console: Console,
    problem: Problem,
    tried: Sequence[tuple[str, str]],
    judged: Sequence[Judgement],
) -> None:
    """Print how the verifier scores completions. tried: what each is, and its text."""
    right = one_line(problem.answer, MAX_ANSWER)
    say(console, f"verifier {problem.verifier}, for the answer {right}", "bold")
    table = Table()
    for name in ("", "completion", "score", "answer found", "reason"):
        table.add_column(name, overflow="fold")
    for (what, completion), judgement in zip(tried, judged, strict=True):
        found = "none" if judgement.answer is None else one_line(judgement.answer, MAX_ANSWER)
        reason = one_line(judgement.reason or "", 2 * MAX_ANSWER)
        shown = (what, one_line(completion, MAX_ANSWER), f"{judgement.score:g}", found, reason)
        table.add_row(*map(Text, shown))
    console.print(table)
    console.print()


def print_example(console: Console, problem: Problem) -> None:
    """Print a problem, its texts cut to a readable length."""
    rows = [("id", printable(problem.id, keep=""))]
    rows += [(turn.role, turn.content) for turn in problem.messages[:-1]]
    rows += [("prompt", problem.prompt), ("answer", problem.answer)]
    for name in ("reference", "teacher_prompt", "feedback"):
        if (text := getattr(problem, name)) is not None:
            rows.append((name.replace("_", " "), text))
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for label, text in rows:
        shown = text.strip()
        cut = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]} [...]"
        grid.add_row(Text(printable(label, keep=""), "bold"), Text(printable(cut)))
    console.print(grid)
    console.print()


def print_faults(console: Console, faults: Faults) -> None:
    """Print the first bad rows of each kind, what helps, and how many more there are."""
    for kind, count in faults.counts.most_common():
        listed = faults.listed[kind]
        fixes = {error.fix for error in listed}
        say(console, f"{counted(count, 'bad row')}: {kind}", "bold")
        for error in listed:
            say(console, f"  {error if len(fixes) > 1 else f'{error.where}: {error.what}'}")
        if count > len(listed):
            say(console, f"  and {count - len(listed):,} more")
        if len(fixes) == 1 and listed[0].fix:
            say(console, f"  {listed[0].fix}")
        console.print()
