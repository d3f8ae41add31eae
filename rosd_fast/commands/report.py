"""`rosd-fast report`: redraw a run's plots, show a step token by token, print the outcome."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rosd_fast.config import PositiveInt, Section
from rosd_fast.config.load import apply_args
from rosd_fast.errors import UserError

POSITIONAL = ("run",)


class Options(Section):
    """Redraw the plots of a run and print its accuracy before and after training."""

    run: str | None = None
    """The run folder. `--run` may be left out."""
    step: PositiveInt | None = None
    """Also write the page that shows this step's rollouts token by token."""


def defaults(given: Mapping[str, Any]) -> Options:
    return Options()


def run(given: Mapping[str, Any]) -> int:
    """Draw the plots and print the summary."""
    options = apply_args(Options(), given)
    if options.run is None:
        raise UserError("no run is named", fix="Name its folder: rosd-fast report runs/NAME")
    folder = Path(options.run).expanduser()
    if not folder.is_dir():
        raise UserError("there is no such run folder", where=options.run)

    from rosd_fast.report import draw_plots, render_tokens_html, summarize

    failed: OSError | None = None
    try:
        draw_plots(folder)
        if options.step is not None:
            print(f"tokens of step {options.step}: {render_tokens_html(folder, options.step)}")
    except OSError as error:  # as in a folder of somebody else, which can still be read
        failed = error
    summarize(folder)
    if failed is not None:
        raise UserError(f"the report cannot be written ({failed.strerror})", where=str(folder))
    return 0
