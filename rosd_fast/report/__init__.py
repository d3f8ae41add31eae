"""Reports on a run: plots, rollouts, the token page and the summary."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rosd_fast.report.rollouts import read_rollouts, rollouts_path, write_rollouts
from rosd_fast.report.summary import Change, before_after, before_after_table, summarize
from rosd_fast.report.tokens import render_tokens_html

__all__ = [
    "Change",
    "before_after",
    "before_after_table",
    "draw_plots",
    "read_rollouts",
    "render_tokens_html",
    "rollouts_path",
    "summarize",
    "write_rollouts",
]


def draw_plots(run: str | Path) -> list[Path]:
    """Draw all plots of a run folder and return their paths, as `plots.draw_plots` says.

    matplotlib is imported on the first call. A machine without it, on which a run has still
    trained, gets a line instead of plots.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed")
        return []
    from rosd_fast.report import plots

    return plots.draw_plots(run)
