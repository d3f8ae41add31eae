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
from rosd_fast.files import STATE_JSON, STEP_NAME
from rosd_fast.report.metrics import FILE_NAME, read_metrics
from rosd_fast.report.series import domains, series
from rosd_fast.report.warnings import warnings

Rows = Sequence[Mapping[str, Any]]

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
            changes.append(
                Change(
                    split=split,
                    domain=domain,
                    first_step=values.steps[0],
                    last_step=values.steps[-1],
                    before=values.values[0],
                    after=None if once else values.values[-1],
                )
            )
    return changes


def before_after_table(rows: Rows) -> Table:
    """Return the accuracy before and after, by split and domain, with the change in points."""
    changes = before_after(rows)
    table = Table(title="Accuracy", title_justify="left", title_style="bold")
    first = min((change.first_step for change in changes), default=0)
    last = max((change.last_step for change in changes), default=0)
    table.add_column("split")
    table.add_column(f"step {first}", justify="right")
    if last > first:
        table.add_column(f"step {last}", justify="right")
        table.add_column("change, points", justify="right")
    for i, change in enumerate(changes):
        if i and change.domain is None:
            table.add_section()
        # Text, as the name of a domain may look like markup.
        label = Text(SPLITS[change.split], "bold") if change.domain is None else Text(change.domain)
        label.pad_left(0 if change.domain is None else 2)
        cells = [label, Text(f"{change.before:.1%}")]
        if last > first:
            cells += [_percent(change.after), _points(change.points)]
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
    if arms := _control_arms(run / "config.toml"):
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
        ("config", run / "config.toml"),
        ("metrics", run / FILE_NAME),
        ("plots", run / "plots"),
        ("rollouts", run / "rollouts"),
        ("checkpoint", checkpoints[-1] if checkpoints else run / "checkpoints"),
    ]
    return [(label, path) for label, path in found if path.exists()]


def _percent(value: float | None) -> Text:
    return Text("-" if value is None else f"{value:.1%}")


def _points(value: float | None) -> Text:
    if value is None:
        return Text("-")
    shown = round(value, 1)
    if shown == 0:
        return Text("0.0")
    return Text(f"{shown:+.1f}", "green" if shown > 0 else "red")
