"""What a terminal shows while an evaluation works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from rosd_fast.evaluation.evaluation import Watch


@contextmanager
def shown(name: str) -> Iterator[Watch]:
    """Show a line with the numbers of problems and tokens, if stderr is a terminal.

    name: of the model. Notes are printed above it.
    """
    console = Console(stderr=True, highlight=False)
    num_tokens, done, total = 0, 0, 0
    with console.status(Text(f"loading {name}")) as status:

        def show() -> None:
            status.update(Text(f"{done:,} of {total:,} problems, {num_tokens:,} tokens"))

        def tokens(count: int) -> None:
            nonlocal num_tokens
            num_tokens += count
            show()

        def problems(now: int, of: int) -> None:
            nonlocal done, total
            done, total = now, of
            show()

        yield Watch(
            note=lambda text: console.print(Text(text), soft_wrap=True),
            tokens=tokens,
            problems=problems,
        )
