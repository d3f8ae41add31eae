"""The Markdown page of a first day, from the results of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from day_one.registry import BY_NAME, STAGES
from day_one.results import STATES, Result, Row


def is_column(name: str) -> bool:
    """Whether a key of a row is shown as a column; those that begin with "_" are for the JSON."""
    return name not in ("table", "ok") and not name.startswith("_")


def page(
    results: Sequence[Result], facts: Mapping[str, str], packages: Mapping[str, Mapping[str, str]]
) -> str:
    """The whole page: where it ran, what became of each stage, and each stage's tables."""
    lines = [f"# A first day on {facts.get('machine', 'a machine')}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if name != "machine"]
    lines += [
        f"- {name}: {', '.join(f'{key} {value}'.strip() for key, value in of.items())}"
        for name, of in packages.items()
        if of
    ]
    by_name = {result.stage: result for result in results}
    lines += ["", "| stage | what became of it | seconds | limit | items | failed |", ALIGN_STAGES]
    for entry in STAGES:
        found = by_name.get(entry.name)
        if found is None:
            lines.append(f"| {entry.title} | not run | | | | |")
            continue
        cells = [entry.title, STATES[found.state], f"{found.seconds:.0f}", f"{found.limit_s:.0f}"]
        cells += [str(len(found.items)), str(found.num_failed)]
        lines.append(f"| {' | '.join(cells)} |")
    for found in results:
        lines += ["", *section(found, facts)]
    return "\n".join(lines) + "\n"


ALIGN_STAGES = "|---|---|---:|---:|---:|---:|"


def section(result: Result, facts: Mapping[str, str]) -> list[str]:
    """A stage's heading, its failures, and its tables."""
    lines = [f"## {BY_NAME[result.stage].title}"]
    if result.identity != facts:
        was = ", ".join(f"{k} {v}" for k, v in result.identity.items() if v != facts.get(k))
        lines += ["", f"Measured before, with {was}."]
    if result.error:
        lines += ["", f"The stage {result.state}: {text(result.error)}"]
    if result.left:
        lines += ["", f"Not tried, for want of time: {', '.join(result.left)}"]
    errors = {key: item.error for key, item in result.items.items() if item.error}
    if errors:
        lines += ["", *(f"- **{key}**: {text(error)}" for key, error in errors.items())]
    tables: dict[str, list[Row]] = {}
    for row in result.rows:
        if not any(map(is_column, row)):
            continue
        tables.setdefault(str(row.get("table", "Results")), []).append(row)
    for title, rows in tables.items():
        lines += ["", f"### {title}", "", *table(shown(rows))]
    return lines


def shown(rows: list[Row]) -> list[Row]:
    """The rows of a table; of many checks that all passed, one line that counts them."""
    if len(rows) < MANY or any("ok" not in row for row in rows):
        return rows
    failed = [row for row in rows if row["ok"] is False]
    passed = len(rows) - len(failed)
    return [*failed, {"check": f"{passed} of {len(rows)} passed", "text": "", "ok": True}]


MANY = 20  # checks beyond which only the failed ones are listed


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown lines of rows, which may have different columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row if is_column(name)))
    checked = any("ok" in row for row in rows)
    numeric = {name: any(is_number(row.get(name)) for row in rows) for name in columns}
    head = [*columns, *(["ok"] if checked else [])]
    align = ["---:" if numeric.get(name) else "---" for name in head]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(align)}|"]
    for row in rows:
        cells = [cell(row.get(name)) for name in columns]
        if checked:
            cells.append({True: "yes", False: "**no**"}.get(row.get("ok"), ""))  # type: ignore[arg-type]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: Any) -> str:
    """A value as text: floats with four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text(str(value))


def text(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
