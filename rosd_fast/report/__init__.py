"""Reports on a run: plots, rollouts, the token page and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rosd_fast.report.rollouts import read_rollouts, rollouts_path, write_rollouts
from rosd_fast.report.summary import Change, before_after, before_after_table, summarize
from rosd_fast.report.tokens import render_tokens_html

if TYPE_CHECKING:
    from rosd_fast.report.plots import draw_plots

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


def __getattr__(name: str) -> Any:
    """Import `draw_plots` on first use, as only plots need matplotlib."""
    if name != "draw_plots":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rosd_fast.report.plots import draw_plots

    return draw_plots
