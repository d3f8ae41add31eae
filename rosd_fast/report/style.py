"""The look of every panel: lines, axes, legends.

Only matplotlib's object interface is used, neither pyplot nor global state, so that a training
process can draw too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from rosd_fast.report.colours import FAINT, GREEN, INK, MUTED
from rosd_fast.report.series import Series, series, smoothing_window
from rosd_fast.text.printable import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

MARKERS_UP_TO = 40  # values; more markers would overlap
RAW_ALPHA = 0.35  # of values drawn behind their moving median
LEGEND_COLUMNS = 5


def line(
    ax: Axes,
    shown: Series,
    colour: str,
    label: str | None = None,
    *,
    width: float = 1.8,
    marker: str = "o",
    markers: bool | None = None,
) -> None:
    """Draw a series that has a value. `markers` None draws markers unless they would overlap."""
    if not shown:
        return
    if markers is None:
        markers = len(shown.steps) <= MARKERS_UP_TO
    ax.plot(
        shown.steps,
        shown.values,
        color=colour,
        label=label,
        linewidth=width,
        marker=marker if markers or len(shown.steps) == 1 else None,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        solid_joinstyle="round",
        clip_on=False,  # whole markers at 0% and 100%
        zorder=3,
    )


def trend(
    ax: Axes, shown: Series, colour: str, label: str | None = None, *, width: float = 1.8
) -> None:
    """Draw a series; the values of a long one are faint, behind their moving median."""
    window = smoothing_window(len(shown.steps))
    if window > 1 and shown:
        ax.plot(shown.steps, shown.values, color=colour, linewidth=0.9, alpha=RAW_ALPHA)
        shown = shown.smoothed(window)
    line(ax, shown, colour, label, width=width, markers=False if window > 1 else None)


def name_ends(ax: Axes, shown: Series, colour: str, *, beside: Series) -> None:
    """Write the first and the last value next to their points, clear of those of `beside`."""
    last = len(shown.steps) - 1
    for i in sorted({0, last}) if shown else []:
        side, shift = ("left", -4) if i == 0 else ("right", 4)
        below = bool(beside) and shown.values[i] < beside.values[0 if i == 0 else -1]
        ax.annotate(
            f"{shown.values[i]:.1%}",
            (shown.steps[i], shown.values[i]),
            xytext=(shift if last else 0, -8 if below else 8),
            textcoords="offset points",
            ha=side if last else "center",
            va="top" if below else "bottom",
            color=colour,
            fontsize=9.5,
            fontweight="bold",
            zorder=4,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # readable on top of lines
        )


def finish(
    ax: Axes,
    rows: Rows,
    title: str,
    y_label: str,
    *,
    note: str = "",
    steps: bool = True,
    from_zero: bool = False,
    log: bool = False,
) -> None:
    """Add the title, labels, ticks, grid and legend, the same in every panel.

    note: text under the title of a panel without a legend.
    steps: whether x is the step.
    from_zero: whether y starts at 0.
    log: whether y is logarithmic when the values span a wide range.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=MUTED, labelsize=9, length=3)
    ax.grid(color="#E9E9E9", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set_ylabel(y_label, color=MUTED, fontsize=9.5)
    _heading(ax, title, note)
    if not ax.lines and not ax.patches and not ax.collections:
        ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", va="center", color=MUTED)
        ax.set_xticks([])
        ax.set_yticks([])
        return
    if steps:
        ax.yaxis.set_major_formatter("{x:g}")  # the default's power of ten would cover the legend
        _step_axis(ax, [row["step"] for row in rows])
    if log:
        _log_if_wide(ax)
    if from_zero:
        ax.set_ylim(bottom=0)


def _heading(ax: Axes, title: str, note: str) -> None:
    """Add the title, and the legend or the note between title and axes, clear of the data."""
    handles, labels = ax.get_legend_handles_labels()
    num_lines = max(1, math.ceil(len(labels) / LEGEND_COLUMNS))
    pad = 9 + 15 * num_lines
    ax.set_title(title, loc="left", color=INK, fontsize=11.5, fontweight="bold", pad=pad)
    if not labels:
        ax.annotate(note, (0, 1), (1, 6), "axes fraction", "offset points", color=MUTED, fontsize=9)
        return
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=LEGEND_COLUMNS,
        borderaxespad=0.4,
        borderpad=0,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=1.0,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def near_one(ax: Axes, rows: Rows, metric: str, title: str, label: str) -> None:
    """Draw a ratio of the trained policy to the one that sampled, which is nearly always 1."""
    trend(ax, series(rows, metric), GREEN)
    note = "probability of the sampled token, student / rollout engine"
    finish(ax, rows, title, label, note=note)
    if ax.lines:  # rounding errors must not look like a signal
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.99), max(high, 1.01))


def percent(ax: Axes, values: Sequence[float] = (), *, least_range: float = 1.0) -> None:
    """Make y a percent axis around `values`, at least `least_range` wide; 0 to 100% by default."""
    if not ax.lines and not ax.collections:
        return
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.04 + max(0.0, least_range - (high - low)) / 2
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    ax.set_ylim(min(low, max(0.0, high - least_range)), max(high, min(1.0, low + least_range)))


def plain(text: str, limit: int = 24) -> str:
    """Return a name from the user's data that matplotlib shows verbatim, of `limit` characters.

    In matplotlib "$" starts a formula, and a leading "_" keeps a line out of the legend.
    """
    short = shortened(text, limit)
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")


def _step_axis(ax: Axes, steps: Sequence[int]) -> None:
    ax.set_xlabel("step", color=MUTED, fontsize=9.5)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    first, last = min(steps), max(steps)
    margin = max(0.6, 0.025 * (last - first))
    ax.set_xlim(first - margin, last + margin)


def _log_if_wide(ax: Axes) -> None:
    """Make y logarithmic if values span over a factor of 50: a spike must not flatten the rest."""
    drawn = [float(v) for shown in ax.lines for v in np.asarray(shown.get_ydata(), dtype=float)]
    values = [value for value in drawn if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 50 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif values and min(values) >= 0:
        ax.set_ylim(bottom=0)
