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

from rosd_fast.files import write_atomic
from rosd_fast.report import panels
from rosd_fast.report.colours import MUTED
from rosd_fast.report.metrics import FILE_NAME, read_metrics
from rosd_fast.report.series import domains, series
from rosd_fast.report.style import RAW_ALPHA, Rows, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes", Rows], None]
PANEL_SIZE = (5.6, 3.5)  # inches
DPI = 130


def draw_plots(run: str | Path) -> list[Path]:
    """Draw all plots of a run folder and return their paths.

    A panel without metrics says "no data". The plot by domain needs domains, and the plot of the
    engine needs servers. Raises UserError if `metrics.jsonl` is missing or damaged.
    """
    run = Path(run)
    rows = read_metrics(run / FILE_NAME)
    accuracy = partial(panels.accuracy, samples=_eval_samples(run))
    in_domain = partial(panels.domain_accuracy, split="dev", title="In domain")
    out_of_domain = partial(panels.domain_accuracy, split="ood", title="Out of domain")
    pictures: dict[str, list[list[Panel]]] = {
        "overview": [
            [accuracy, panels.divergence, panels.distilled],
            [panels.span_start, panels.reflection_quality, panels.time_per_step],
        ],
        "accuracy": [[accuracy]],
        "loss": [
            [panels.divergence, panels.grad_norm],
            [panels.entropies, panels.importance_weight],
        ],
        "distilled": [[panels.distilled, panels.distilled_tokens]],
        "spans": [[panels.span_start, panels.span_length, panels.reflection_quality]],
        "time": [[panels.time_per_step, panels.time_shares, panels.throughput]],
    }
    if domains(rows, "dev") or domains(rows, "ood"):
        pictures["domains"] = [[in_domain, out_of_domain]]
    if series(rows, "rollout/cached_frac"):
        pictures["engine"] = [[panels.cache, panels.logprob_gap]]
    return [
        write_atomic(run / "plots" / f"{name}.png", _png(_figure(grid, rows, run.resolve().name)))
        for name, grid in pictures.items()
    ]


def _figure(grid: list[list[Panel]], rows: Rows, run_name: str) -> Figure:
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a script that the font lacks
        # Without the version of matplotlib, equal metrics give equal bytes.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _eval_samples(run: Path) -> int | None:
    """Return the k of mean@k from config.toml, or None if the file does not say."""
    try:
        config: dict[str, Any] = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    section = config.get("eval")
    if not isinstance(section, dict):
        return None
    samples = 1 if section.get("temperature") == 0 else section.get("samples")
    return samples if isinstance(samples, int) else None
