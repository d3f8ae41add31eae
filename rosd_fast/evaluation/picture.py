"""The picture of an evaluation: accuracy by data set and domain, with its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rosd_fast.evaluation.records import Figures, Scope
from rosd_fast.report.colours import BLUE, FAINT, INK, MUTED, ORANGE
from rosd_fast.report.plots import DPI, png
from rosd_fast.report.style import plain

if TYPE_CHECKING:
    from rosd_fast.evaluation.report import Report

ROW, MARGIN, WIDTH = 0.42, 1.15, 7.6  # inches
MAX_ROWS = 80  # more would not be readable: then data sets are drawn without their domains
OFFSET = 0.17  # of a row, between two models


def picture(report: Report) -> bytes:
    """A PNG file with a point and its interval per data set and domain."""
    return png(figure(report))


def figure(report: Report) -> Figure:
    """The figure of a report; with another model, that one's points are beside."""
    chosen = list(report.rows)
    if len(chosen) > MAX_ROWS:
        chosen = [scope for scope in chosen if scope.domain is None][:MAX_ROWS]
    drawn = Figure(
        figsize=(WIDTH, MARGIN + ROW * len(chosen)),
        dpi=DPI,
        layout="constrained",
        facecolor="white",
    )
    axes = drawn.subplots()
    both = report.other is not None
    if both:
        _points(axes, chosen, report.other_rows, ORANGE, report.other or "", -OFFSET)
    _points(axes, chosen, report.rows, BLUE, report.name, OFFSET if both else 0.0)
    _finish(axes, chosen, report)
    return drawn


def _points(
    axes: Any,
    chosen: list[Scope],
    rows: Mapping[Scope, Figures],
    colour: str,
    name: str,
    offset: float,
) -> None:
    """Draw one model's accuracy in each row that it has."""
    places = [i for i, scope in enumerate(chosen) if scope in rows]
    found = [rows[chosen[i]].accuracy for i in places]
    values = [estimate.value for estimate in found]
    axes.errorbar(
        values,
        [i + offset for i in places],
        xerr=[
            [e.value - e.low for e in found],
            [e.high - e.value for e in found],
        ],
        fmt="o",
        color=colour,
        label=plain(name, 60),
        markersize=6,
        capsize=3,
        elinewidth=1.8,
        clip_on=False,
        zorder=3,
    )
    for estimate, place in zip(found, places, strict=True):
        axes.annotate(
            f"{estimate.value:.1%}",
            (1.0, place + offset),
            xycoords=axes.get_yaxis_transform(),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )


def _finish(axes: Any, chosen: list[Scope], report: Report) -> None:
    """Add names, axes and title."""
    axes.set_yticks(range(len(chosen)))
    axes.set_yticklabels(
        [f"{plain(scope.label, 40)} ({report.rows[scope].num_problems:,})" for scope in chosen]
    )
    for scope, label in zip(chosen, axes.get_yticklabels(), strict=True):
        label.set_fontweight("normal" if scope.domain else "bold")
        label.set_color(MUTED if scope.domain else INK)
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.tick_params(axis="both", length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="x", color="#E9E9E9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("accuracy, with its 95% interval over problems", color=MUTED, fontsize=9.5)
    title = f"mean@{report.samples}"
    if report.other is None:
        title = f"{plain(report.name, 60)}: {title}"
    axes.set_title(
        title,
        loc="left",
        color=INK,
        fontsize=11.5,
        fontweight="bold",
        pad=26 if report.other else 10,
    )
    if report.other is not None:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1],
            labels[::-1],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2,
            frameon=False,
            fontsize=9,
            borderaxespad=0.2,
        )
