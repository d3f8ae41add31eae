"""The shapes by name, and which of them the rows of a source have."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rosd_fast.data.shapes.row import Row, reach
from rosd_fast.data.shapes.shape import PROMPTS, Fields, Shape
from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.data.sources import Source

MAX_NAMED = 12  # columns that an error names

_REGISTERED: dict[str, Shape] = {}


def register_shape(
    name: str,
    read: Callable[[Row], Fields],
    *,
    says: str,
    columns: Sequence[str] = (),
    matches: Callable[[Row], bool] | None = None,
    needs_all: bool = False,
) -> None:
    """Make rows of a new shape readable. Shapes are tried from the last registered to the first.

    read: the fields of a row, which raises UserError where it does not fit.
    says: what such rows are, as in "GSM8K: answer after ####".
    columns: columns that every such row has a value for. matches: what else tells them from others.
    needs_all: every row of a sample must match; otherwise half of them.

    Raises ValueError when the name is taken, or nothing tells such rows from others.
    """
    if name in _REGISTERED:
        raise ValueError(f"there is a shape {name!r} already")
    if not columns and matches is None:
        raise ValueError(f"shape {name!r}: name its columns, or give `matches`")

    def is_match(row: Row) -> bool:
        if any(row.value(column) is None for column in columns):
            return False
        return matches is None or matches(row)

    _REGISTERED[name] = Shape(
        name=name, says=says, matches=is_match, read=read, needs_all=needs_all
    )


def recognize(sample: Sequence[Any], source: Source, *, where: str = "") -> Shape:
    """The shape of the rows of a source, by some of them.

    where: names the source in errors; its text if empty. Raises UserError for rows that have no
    known shape: it names their columns, and says how to map them.
    """
    where = where or source.text
    objects = [row for row in sample if isinstance(row, Mapping)]
    if not objects:  # reading the first row says what it is instead
        return _REGISTERED["own"]
    check_columns(objects, source.columns, where)
    rows = [Row(row, columns=source.columns) for row in objects]
    for shape in reversed(_REGISTERED.values()):
        matching = sum(shape.matches(row) for row in rows)
        if matching == len(rows) or (2 * matching >= len(rows) and not shape.needs_all):
            return shape
    raise unknown_shape(objects, rows, where)


def check_columns(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], where: str
) -> None:
    """Raise UserError for a mapped column that none of the rows has."""
    for field, column in columns.items():
        if not column or any(column in r or reach(r, column.split(".")) is not None for r in rows):
            continue
        names = column_names(rows)
        near = difflib.get_close_matches(column, names, n=1)
        raise UserError(
            f"no row has the column {column!r}, which the {field} is to be read from",
            where=where,
            fix=(f"Did you mean {near[0]}? " if near else "") + f"Columns are {listed(names)}",
        )


def unknown_shape(objects: Sequence[Mapping[str, Any]], rows: list[Row], where: str) -> UserError:
    """The error for rows of no known shape."""
    names = column_names(objects)
    prompt = next((name for row in rows if (name := row.first(*PROMPTS))), None)
    if prompt is None:
        what, missing = "no column is known as the problem", ["prompt", "answer"]
    else:
        what = f"the problem is in {rows[0].shown(prompt)}, but no column is known as its answer"
        missing = ["answer"]
    if any(row.value("answer") is not None for row in rows):
        missing = [field for field in missing if field != "answer"] or ["prompt", "answer"]
    options = " ".join(f"data.columns.{field}=COLUMN" for field in missing)
    settings = "".join(f"@{field}=COLUMN" for field in missing)
    name = "Name them" if len(missing) > 1 else "Name it"
    return UserError(
        f"{what}; columns are {listed(names)}",
        where=where,
        fix=f"{name}: {options}, or FILE{settings} for one file (dots reach into objects)",
    )


def column_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of the rows, in order."""
    return [str(name) for name in dict.fromkeys(name for row in rows for name in row)]


def listed(names: Sequence[str]) -> str:
    """The names with commas, the first ones where there are many."""
    more = len(names) - MAX_NAMED
    shown = ", ".join(name[:40] for name in names[:MAX_NAMED])
    return f"{shown} and {more} more" if more > 0 else shown or "none"
