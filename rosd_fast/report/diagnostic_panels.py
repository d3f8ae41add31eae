"""The panels of the diagnostics; docs/diagnostics.md says how to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm

from rosd_fast.report.colours import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, VERMILLION
from rosd_fast.report.diagnostics import POSITIONS
from rosd_fast.report.series import series
from rosd_fast.report.style import Rows, finish, percent, trend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 120  # of the map; more steps are averaged
HEAT = LinearSegmentedColormap.from_list("heat", ["#FFFFFF", "#F3C49B", VERMILLION, "#5E2A00"])


def agreement(ax: Axes, rows: Rows) -> None:
    """Draw how far student and teacher agree on the most likely tokens."""
    shown = {
        name: series(rows, f"diag/{name}")
        for name in ("teacher_mass_topk", "student_mass_topk", "topk_overlap")
    }
    trend(ax, shown["topk_overlap"], BLUE, "shared tokens")
    trend(ax, shown["teacher_mass_topk"], ORANGE, "teacher's mass")
    trend(ax, shown["student_mass_topk"], GREY, "student's mass")
    finish(ax, rows, "Agreement on the student's top k", "share")
    percent(ax, [value for each in shown.values() for value in each.values], least_range=0.3)


def span_contrast(ax: Axes, rows: Rows) -> None:
    """Draw the divergence at located errors, before them and after them."""
    trend(ax, series(rows, "diag/divergence_error"), VERMILLION, "in the error")
    trend(ax, series(rows, "diag/divergence_after"), ORANGE, "after it")
    trend(ax, series(rows, "diag/divergence_before"), BLUE, "before it (not trained)")
    finish(ax, rows, "Divergence around the located error", "nats / token", log=True)


def position_map(ax: Axes, rows: Rows) -> None:
    """Draw the divergence by step and by position in the rollout, as a map."""
    title, label = "Divergence by position", "position in the rollout"
    steps = sorted({row["step"] for row in rows if any(name in row for name in POSITIONS)})
    if not steps:
        finish(ax, rows, title, label)
        return
    column = {step: place for place, step in enumerate(steps)}
    grid = np.full((len(POSITIONS), len(steps)), np.nan)
    for tenth, name in enumerate(POSITIONS):
        shown = series(rows, name)
        for step, value in zip(shown.steps, shown.values, strict=True):
            grid[tenth, column[step]] = value
    grid, edges = _averaged(grid, steps)
    finite = grid[np.isfinite(grid)]
    top = float(np.quantile(finite, 0.98)) if finite.size else 0.0
    # The square root, as most divergences are near 0.
    norm = PowerNorm(0.5, vmin=0.0, vmax=top or 1.0)
    heights = np.linspace(0, 1, len(POSITIONS) + 1)
    mesh = ax.pcolormesh(edges, heights, np.ma.masked_invalid(grid), cmap=HEAT, norm=norm)
    finish(ax, rows, title, label, note="nats / token; rollouts end at 100%")
    ax.grid(visible=False)
    percent(ax)
    ax.set_ylim(0, 1)
    assert ax.figure is not None
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, aspect=30, extend="max")
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=2)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _averaged(grid: np.ndarray, steps: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the grid with at most `MAX_COLUMNS` columns, and the steps at their edges."""
    per_column = -(-len(steps) // MAX_COLUMNS)
    firsts = list(range(0, len(steps), per_column))
    columns = []
    for first in firsts:
        part = grid[:, first : first + per_column]
        known = np.isfinite(part)
        sums = np.where(known, part, 0.0).sum(axis=1)
        counts = known.sum(axis=1)
        columns.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
    edges = [steps[first] - 0.5 for first in firsts] + [steps[-1] + 0.5]
    return np.stack(columns, axis=1), np.array(edges)


def token_kinds(ax: Axes, rows: Rows) -> None:
    """Draw the share of trained tokens that are no step of a solution."""
    special, thinking = (series(rows, f"diag/{name}_frac") for name in ("special", "thinking"))
    trend(ax, special, PURPLE, "special tokens")
    trend(ax, thinking, GREEN, "thinking")
    finish(ax, rows, "Kinds of trained tokens", "share of trained tokens")
    percent(ax, [0.0, *special.values, *thinking.values], least_range=0.1)


def lengths(ax: Axes, rows: Rows) -> None:
    """Draw the length of rollouts."""
    trend(ax, series(rows, "rollout/tokens_mean"), BLUE)
    finish(ax, rows, "Length of rollouts", "tokens", from_zero=True, note="mean over all rollouts")


def truncated(ax: Axes, rows: Rows) -> None:
    """Draw the share of rollouts that reach the limit."""
    shown = series(rows, "rollout/truncated_frac")
    trend(ax, shown, VERMILLION)
    finish(ax, rows, "Truncated rollouts", "share", note="they reach sample.max_new_tokens")
    percent(ax, [0.0, *shown.values], least_range=0.1)
