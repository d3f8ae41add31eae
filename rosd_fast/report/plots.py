"""The plots of a run, drawn from its metrics: `RUN/plots/*.png`."""

from __future__ import annotations

import io
import tomllib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rosd_fast.files import RUN_CONFIG, write_atomic
from rosd_fast.report import diagnostic_panels, panels, policy_panels
from rosd_fast.report.colours import MUTED
from rosd_fast.report.metrics import FILE_NAME, read_metrics
from rosd_fast.report.series import domains, series
from rosd_fast.report.style import RAW_ALPHA, Rows, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", Rows], None]
Grid = list[list[Panel]]
REFLECTED = ("reflect/well_formed_frac", "reflect/span_start_frac", "reflect/span_tokens")
"""Metrics of methods that reflect."""

PANEL_SIZE = (5.6, 3.5)  # inches
DPI = 130


def draw_plots(run: str | Path) -> list[Path]:
    """Draw all plots of a run folder and return their paths.

    A panel without metrics says "no data". Plots of what a run does not have are left out: of
    domains, of servers, of a teacher, of reflections, of a loss without a teacher, of diagnostics.
    Plots of an earlier call that are not drawn again stay. Raises UserError if `metrics.jsonl` is
    missing or damaged.
    """
    run = Path(run)
    rows = read_metrics(run / FILE_NAME)
    return [
        write_atomic(run / "plots" / f"{name}.png", png(_figure(grid, rows, run.resolve().name)))
        for name, grid in pictures(rows, eval_samples=_eval_samples(run)).items()
    ]


def pictures(rows: Rows, *, eval_samples: int | None = None) -> dict[str, Grid]:
    """Return the panels of each plot, by its name.

    eval_samples: the k of mean@k, if it is known.
    """
    metrics = {name for row in rows for name in row}
    has_policy = "policy/loss" in metrics
    has_teacher = "loss/divergence" in metrics or not has_policy
    has_reflections = "loss/divergence" not in metrics or not metrics.isdisjoint(REFLECTED)
    has_reflections &= has_teacher
    accuracy = partial(panels.accuracy, samples=eval_samples)
    found: dict[str, Grid] = {
        "overview": _overview(accuracy, teacher=has_teacher, reflections=has_reflections),
        "accuracy": [[accuracy]],
        "distilled": [[panels.distilled, panels.trained_tokens]],
        "time": [[panels.time_per_step, panels.time_shares, panels.throughput]],
    }
    if has_teacher:
        found["loss"] = [
            [panels.divergence, panels.grad_norm],
            [panels.entropies, panels.importance_weight],
        ]
    if has_policy:
        found["policy"] = [
            [policy_panels.policy_loss, panels.grad_norm, panels.entropies],
            [policy_panels.logprob, policy_panels.ratio, policy_panels.clipping],
        ]
    if has_reflections:
        found["spans"] = [[panels.span_start, panels.span_length, panels.reflection_quality]]
    if any(name.startswith("diag/") for name in metrics):
        found["diagnostics"] = _diagnostics(
            teacher="loss/divergence" in metrics, located="diag/divergence_error" in metrics
        )
    if domains(rows, "dev") or domains(rows, "ood"):
        in_domain = partial(panels.domain_accuracy, split="dev", title="In domain")
        out_of_domain = partial(panels.domain_accuracy, split="ood", title="Out of domain")
        found["domains"] = [[in_domain, out_of_domain]]
    if series(rows, "rollout/cached_frac"):
        found["engine"] = [[panels.cache, panels.logprob_gap]]
    return found


def _overview(accuracy: Panel, *, teacher: bool, reflections: bool) -> Grid:
    loss = panels.divergence if teacher else policy_panels.policy_loss
    first = [accuracy, loss, panels.distilled]
    if reflections:
        return [first, [panels.span_start, panels.reflection_quality, panels.time_per_step]]
    return [first, [panels.entropies, diagnostic_panels.lengths, panels.time_per_step]]


def _diagnostics(*, teacher: bool, located: bool) -> Grid:
    grid: Grid = [
        [diagnostic_panels.lengths, diagnostic_panels.truncated],
        [diagnostic_panels.token_kinds, panels.logprob_gap],
    ]
    if not teacher:
        return grid
    return [
        [
            diagnostic_panels.agreement,
            diagnostic_panels.span_contrast if located else diagnostic_panels.truncated,
            diagnostic_panels.position_map,
        ],
        [diagnostic_panels.lengths, diagnostic_panels.token_kinds, panels.logprob_gap],
    ]


def _figure(grid: Grid, rows: Rows, run_name: str) -> Figure:
    """Return a figure of the panels in a grid, with the name of the run at the top."""
    num_rows, num_columns = len(grid), len(grid[0])
    scale = 1.3 if num_rows == num_columns == 1 else 1.0
    size = (PANEL_SIZE[0] * num_columns * scale, PANEL_SIZE[1] * num_rows * scale + 0.35)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.06)  # type: ignore[union-attr]
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for i, line in enumerate(grid):
        for j, panel in enumerate(line):
            panel(axes[i][j], rows)
    figure.suptitle(_caption(figure, rows, run_name), x=0.99, ha="right", fontsize=9, color=MUTED)
    return figure


def _caption(figure: Figure, rows: Rows, run_name: str) -> str:
    """Return the name of the run, its last step, and what faint lines are if there are any."""
    parts = [plain(run_name, 60)]
    if rows:
        parts.append(f"step {max(row['step'] for row in rows)}")
    lines = [line for axes in figure.axes for line in axes.lines]
    if any(line.get_alpha() == RAW_ALPHA for line in lines):
        parts.append("faint lines: each step, behind their moving median")
    return " · ".join(parts)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks
        # Without the version of matplotlib, equal metrics give equal bytes.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _eval_samples(run: Path) -> int | None:
    """Return the k of mean@k from config.toml, or None if the file does not say."""
    try:
        config: dict[str, Any] = tomllib.loads((run / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    section = config.get("eval")
    if not isinstance(section, dict):
        return None
    samples = 1 if section.get("temperature") == 0 else section.get("samples")
    return samples if isinstance(samples, int) else None
