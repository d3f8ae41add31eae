"""What a run leaves to look at: pictures, rollouts, a page of tokens, and a summary."""

from __future__ import annotations

from rosd_fast.report.plots import draw_plots
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
