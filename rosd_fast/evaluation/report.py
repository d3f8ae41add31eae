"""The report of an evaluation: result.json, table.md, and the tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rosd_fast.evaluation.folder import PICTURE, RESULT, TABLE, json_bytes, writing
from rosd_fast.evaluation.picture import picture
from rosd_fast.evaluation.records import Completion, Difference, Figures, Scope
from rosd_fast.evaluation.result import difference, figures, scopes, within
from rosd_fast.files import write_atomic
from rosd_fast.stats import Estimate
from rosd_fast.text.printable import shortened

WIDE = 100  # columns of a terminal that shows all intervals
LABEL, LEAST_LABEL = 26, 12  # columns of a data set's or domain's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of a model, and with another model those of both and their differences.

    name, other: of the models. rows: by scope, in the order of tables. other_rows: of the scopes
    in which both have all problems. domains: the only domain of a data set, which has no row.
    """

    name: str
    rows: Mapping[Scope, Figures]
    domains: Mapping[str, str]
    other: str | None = None
    other_rows: Mapping[Scope, Figures]
    differences: Mapping[Scope, Difference]

    @property
    def samples(self) -> int:
        """The k of mean@k."""
        return next(iter(self.rows.values())).samples

    def content(self) -> dict[str, Any]:
        """What result.json says."""
        found: dict[str, Any] = {"model": self.name, "samples": self.samples}
        single = Scope() not in self.rows  # a data set is all there is
        found |= _nested(self.rows, self.domains, single=single)
        if self.other is not None:
            found["against"] = {
                "model": self.other,
                **_nested(self.other_rows, self.domains, single=single),
                "difference": _nested(self.differences, self.domains, single=single),
            }
        return found


def make_report(
    name: str,
    completions: Sequence[Completion],
    *,
    other: str | None = None,
    other_completions: Sequence[Completion] = (),
) -> Report:
    """The report on a model's completions, compared with those of another model, if any."""
    rows, other_rows, differences = {}, {}, {}
    for scope in scopes(completions):
        own, others = within(completions, scope), within(other_completions, scope)
        rows[scope] = figures(own)
        if others and (found := difference(own, others)) is not None:
            differences[scope] = found
            if found.num_problems == rows[scope].num_problems:
                other_rows[scope] = figures(others)
    return Report(
        name=name,
        rows=rows,
        domains={
            c.split: c.domain
            for c in completions
            if Scope(split=c.split, domain=c.domain) not in rows
        },
        other=other,
        other_rows=other_rows,
        differences=differences,
    )


def write_report(report: Report, folder: Path) -> None:
    """Write result.json, table.md and accuracy.png. Raises UserError where that is not possible."""
    with writing(folder):
        write_atomic(folder / PICTURE, picture(report))
        write_atomic(folder / RESULT, json_bytes(report.content()))
        write_atomic(folder / TABLE, markdown(report).encode(errors="replace"))


def shown_draws(samples: int) -> list[int]:
    """The j whose pass@j a table shows: 2, 4, 8 and so on, and k."""
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def markdown(report: Report) -> str:
    """All figures as Markdown tables."""
    draws, k = shown_draws(report.samples), report.samples
    many = [*(f"pass@{j}" for j in draws), *([f"maj@{k}"] if draws else [])]
    head = ["", "problems", f"mean@{k}", *many, "answer found", "cut off", "tokens"]
    lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
    for scope, row in report.rows.items():
        cells = [row.accuracy, *(row.pass_at[j] for j in draws), *([row.majority] if draws else [])]
        cells += [row.answered_frac, row.truncated_frac]
        tokens = f"{row.tokens_mean.value:,.0f} [{row.tokens_mean.low:,.0f}, "
        tokens += f"{row.tokens_mean.high:,.0f}]"
        lines.append(_line([_label(scope), f"{row.num_problems:,}", *map(percent, cells), tokens]))
    text = f"**{_escaped(report.name)}**, %, with 95% intervals over problems\n\n"
    text += "\n".join(lines) + "\n"
    if report.other is None:
        return text
    names = [_escaped(shortened(name, 24)) for name in (report.other, report.name)]
    head = ["", "problems", *names, f"difference of mean@{k}", *many]
    lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
    for scope, found in report.differences.items():
        shared = [j for j in draws if j in found.pass_at]
        cells = [found.accuracy, *(found.pass_at[j] for j in shared)]
        points = list(map(signed, cells)) + ["-"] * (len(draws) - len(shared))
        points += [signed(found.majority)] if draws else []
        values = [f"{100 * found.before:.1f}", f"{100 * found.after:.1f}"]
        lines.append(_line([_label(scope), f"{found.num_problems:,}", *values, *points]))
    text += f"\n**{_escaped(report.name)}** minus **{_escaped(report.other)}**, points, paired by "
    text += "problem, with 95% intervals\n\n"
    return text + "\n".join(lines) + "\n"


def accuracy_table(report: Report, *, width: int) -> Table:
    """The terminal's table of one model: accuracy, pass@k and majority.

    width: of the terminal; a narrow one shows intervals of the accuracy alone.
    """
    show = percent if width >= WIDE else bare_percent
    k = report.samples
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("problems", f"mean@{k}", *((f"pass@{k}", f"maj@{k}") if k > 1 else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for scope, row in report.rows.items():
        others = map(show, (row.pass_at[k], row.majority)) if k > 1 else ()
        cells = [f"{row.num_problems:,}", percent(row.accuracy), *others]
        table.add_row(_styled(scope, LABEL), *cells)
    return table


def difference_table(report: Report, *, width: int) -> Table:
    """The terminal's table of the differences. width: of the terminal."""
    heads = [shortened(name, 12) for name in (report.other or "", report.name)]
    others = len("problems") + sum(map(len, heads)) + len("+12.3 [-12.3, +12.3]") + 2 + 14
    columns = min(LABEL, max(LEAST_LABEL, width - others))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("problems", *heads, "difference"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for scope, found in report.differences.items():
        table.add_row(
            _styled(scope, columns),
            f"{found.num_problems:,}",
            f"{100 * found.before:.1f}",
            f"{100 * found.after:.1f}",
            signed(found.accuracy),
        )
    return table


def print_report(report: Report, console: Console) -> None:
    """Print the tables, with answers, truncation and tokens over all problems."""
    row = list(report.rows.values())[-1 if Scope() in report.rows else 0]
    title = f"{report.name}: %, with 95% intervals over problems"
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(accuracy_table(report, width=console.width))
    console.print(
        f"answer found in {row.answered_frac.value:.1%}, {row.truncated_frac.value:.1%} cut off, "
        f"{row.tokens_mean.value:,.1f} tokens per completion"
    )
    if report.other is not None:
        title = f"\n{report.name} minus {report.other}: mean@{report.samples}, in points, paired by"
        console.print(Text(f"{title} problem", "bold"), soft_wrap=True)
        console.print(difference_table(report, width=console.width))


def percent(estimate: Estimate) -> str:
    """An estimate in [0, 1] as percent: "52.3 [48.1, 56.4]"."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def bare_percent(estimate: Estimate) -> str:
    """An estimate in [0, 1] as percent, without its interval."""
    return f"{100 * estimate.value:.1f}"


def signed(estimate: Estimate) -> str:
    """A difference in points: "+3.2 [+0.4, +6.1]"."""
    value, low, high = (100 * x + 0.0 for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _nested(
    rows: Mapping[Scope, Any], domains: Mapping[str, str], *, single: bool
) -> dict[str, Any]:
    """{"total": figures, "data": {name: {"all": figures, "domains": {name: figures}}}}.

    domains: see `Report`.
    """
    data: dict[str, Any] = {}
    total = None
    for scope, row in rows.items():
        if scope.split is None:
            total = asdict(row)
        elif scope.domain is None:
            data[scope.split] = {"all": asdict(row), "domains": {}}
        else:
            own = data.setdefault(scope.split, {"all": None, "domains": {}})
            own["domains"][scope.domain] = asdict(row)
    for name in data.keys() & domains.keys():
        data[name]["domains"] = {domains[name]: data[name]["all"]}
    if single and data:
        total = next(iter(data.values()))["all"]
    return {"total": total, "data": data}


def _label(scope: Scope) -> str:
    text = _escaped(scope.label)
    return text if scope.domain else f"**{text}**"


def _styled(scope: Scope, columns: int) -> Text:
    wide = cell_len(scope.label) > len(scope.label)  # Chinese, and other signs of two columns
    name = shortened(scope.label, columns // 2 if wide else columns)
    label = Text(name, "" if scope.domain else "bold")
    label.pad_left(2 if scope.domain else 0)
    return label


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """A name from the user's data as Markdown shows it in a cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
