"""The summary of a run: accuracy before and after, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rosd_fast.config import Config, control_arms
from rosd_fast.config.load import apply_toml
from rosd_fast.errors import UserError
from rosd_fast.files import RUN_CONFIG, STATE_JSON, STEP_NAME
from rosd_fast.report.metrics import FILE_NAME, read_metrics
from rosd_fast.report.series import domains, series
from rosd_fast.report.warnings import warnings

Rows = Sequence[Mapping[str, Any]]
Interval = tuple[float, float]  # low, high

LOSSES = (
    ("divergence", "loss/divergence", "nats / token"),
    ("policy loss", "policy/loss", ""),
)
SPLITS = {"dev": "in domain (dev)", "ood": "out of domain (ood)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The accuracy of a split or of one of its domains, in the first and the last evaluation."""

    split: str
    domain: str | None  # None: the whole split
    first_step: int
    last_step: int
    before: float  # in [0, 1]
    after: float | None  # in [0, 1]; None: evaluated only once
    before_interval: Interval | None = None  # 95% interval of `before`; None: not measured
    after_interval: Interval | None = None

    @property
    def points(self) -> float | None:
        """The change in percentage points; None after a single evaluation."""
        return None if self.after is None else 100 * (self.after - self.before)


def before_after(rows: Rows) -> list[Change]:
    """Return the changes in accuracy: each split, followed by its domains in order of name."""
    changes = []
    for split in SPLITS:
        for domain in [None, *domains(rows, split)]:
            values = series(rows, f"eval/{split}/{domain or 'accuracy'}").finite()
            if not values:
                continue
            once = len(values.steps) == 1
            limits = {} if domain else intervals(rows, split)
            changes.append(
                Change(
                    split=split,
                    domain=domain,
                    first_step=values.steps[0],
                    last_step=values.steps[-1],
                    before=values.values[0],
                    after=None if once else values.values[-1],
                    before_interval=limits.get(values.steps[0]),
                    after_interval=None if once else limits.get(values.steps[-1]),
                )
            )
    return changes


def intervals(rows: Rows, split: str) -> dict[int, Interval]:
    """Return the 95% interval of a split's accuracy by step, where it was measured."""
    low, high = (series(rows, f"eval/{split}/accuracy_{end}").finite() for end in ("low", "high"))
    upper = dict(zip(high.steps, high.values, strict=True))
    return {
        step: (value, upper[step])
        for step, value in zip(low.steps, low.values, strict=True)
        if step in upper
    }


def before_after_table(rows: Rows) -> Table:
    """Return the accuracy before and after, by split and domain, with the change in points.

    Intervals have columns of their own, if there are any.
    """
    changes = before_after(rows)
    measured = any(change.before_interval for change in changes)
    table = Table(title="Accuracy", title_justify="left", title_style="bold")
    first = min((change.first_step for change in changes), default=0)
    last = max((change.last_step for change in changes), default=0)
    table.add_column("split", no_wrap=True)
    for step in sorted({first, last}):
        table.add_column(f"step {step}", justify="right")
        if measured:
            table.add_column("95%", justify="right", no_wrap=True)
    if last > first:
        table.add_column("change, points", justify="right")
    for i, change in enumerate(changes):
        if i and change.domain is None:
            table.add_section()
        # Text, as the name of a domain may look like markup.
        label = Text(SPLITS[change.split], "bold") if change.domain is None else Text(change.domain)
        label.pad_left(0 if change.domain is None else 2)
        cells = [label, *_accuracy(change.before, change.before_interval, measured)]
        if last > first:
            cells += _accuracy(change.after, change.after_interval, measured)
            cells.append(_points(change.points))
        table.add_row(*cells)
    if not changes:
        table.add_row(Text("no evaluation yet (it needs data.dev)"))
    return table


def summarize(run: str | Path, console: Console | None = None) -> None:
    """Print accuracy, losses, warnings, control arms and the paths of the files that exist.

    Raises UserError if `metrics.jsonl` is missing or damaged.
    """
    run = Path(run)
    console = console or Console()
    rows = read_metrics(run / FILE_NAME)
    console.print(before_after_table(rows))
    if arms := _control_arms(run / RUN_CONFIG):
        console.print(Text(f"control arm: {', '.join(arms)}"))
    listing = Table.grid(padding=(0, 2))
    for label, text in losses(rows):
        listing.add_row(Text(label), Text(text))
    for label, path in _outputs(run):
        listing.add_row(Text(label), Text(str(path), overflow="fold"))
    console.print(listing)
    for found in warnings(rows):
        console.print(Text(f"warning: step {found.step}: {found.text}"), soft_wrap=True)


def losses(rows: Rows) -> list[tuple[str, str]]:
    """Return the label of each loss of the run, with its first and last value as text."""
    shown = []
    for label, metric, unit in LOSSES:
        values = series(rows, metric).finite().values
        if values:
            shown.append((label, f"{values[0]:.4g} -> {values[-1]:.4g} {unit}".rstrip()))
    return shown


def _control_arms(path: Path) -> list[str]:
    """Return the control arms that the run was in, as its config.toml says; none without one."""
    try:
        return control_arms(apply_toml(Config(), path, accept_old_names=True))
    except UserError:
        return []


def _outputs(run: Path) -> list[tuple[str, Path]]:
    """Return the label and path of each output that exists; of checkpoints, the last whole one."""
    checkpoints = sorted(
        (
            path
            for path in (run / "checkpoints").glob("step_*")
            if STEP_NAME.fullmatch(path.name) and (path / STATE_JSON).is_file()
        ),
        key=lambda path: int(path.name.removeprefix("step_")),
    )
    found = [
        ("config", run / RUN_CONFIG),
        ("metrics", run / FILE_NAME),
        ("plots", run / "plots"),
        ("rollouts", run / "rollouts"),
        ("checkpoint", checkpoints[-1] if checkpoints else run / "checkpoints"),
    ]
    return [(label, path) for label, path in found if path.exists()]


def _accuracy(value: float | None, interval: Interval | None, measured: bool) -> list[Text]:
    """The cells of an accuracy and, where any interval is `measured`, of its interval."""
    cells = [Text("-" if value is None else f"{value:.1%}")]
    if measured:
        cells.append(
            Text("" if interval is None else f"{100 * interval[0]:.0f} to {interval[1]:.0%}")
        )
    return cells


def _points(value: float | None) -> Text:
    if value is None:
        return Text("-")
    shown = round(value, 1)
    if shown == 0:
        return Text("0.0")
    return Text(f"{shown:+.1f}", "green" if shown > 0 else "red")
