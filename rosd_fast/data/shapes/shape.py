"""Shapes of rows: which columns a data set has, and what they mean.

    rows of a file -> recognize -> Shape;  Shape.problem: a row -> Problem

`register_shape` adds a shape: a function that reads the `Fields` of a row, and what tells its rows
from others. Columns that every shape may have are read here: `id`, `domain`,
`verifier`, `system`, `reference`, `teacher_prompt`, `feedback` and `weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rosd_fast.data.fields import (
    check_verifier,
    read_id,
    read_weight,
    shorten,
    type_name,
    wrong_type,
)
from rosd_fast.data.shapes.row import Row
from rosd_fast.errors import UserError
from rosd_fast.types import Message, Problem
from rosd_fast.verify import VERIFIERS

if TYPE_CHECKING:
    from rosd_fast.data.sources import Source

PROMPTS = ("prompt", "problem", "question")
"""Columns that a problem's text is read from, the first that a row has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """What a shape reads from a row. A column of the same name goes before all but the first two.

    verifier: the one that such rows are scored by, unless the user names another.
    id: a string, or a number that is unique in its domain.
    """

    prompt: str
    answer: str
    verifier: str | None = None
    domain: str | None = None
    id: str | int | None = None
    system: str | None = None
    context: tuple[Message, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A shape of rows.

    says: what its rows are and how they are read, as in "GSM8K: answer after ####".
    matches: whether a row has this shape. It sees any row, and must not raise.
    read: the fields of a row. Raises UserError for a row that does not fit.
    needs_all: whether every row of a sample must match, not only half of them.
    """

    name: str
    says: str
    matches: Callable[[Row], bool]
    read: Callable[[Row], Fields]
    needs_all: bool = False

    def problem(self, row: Any, *, where: str, source: Source, folder: str, number: int) -> Problem:
        """The problem that row `number` of a source describes.

        folder: the domain of problems that name none. Whether an answer can be verified is not
        checked, and no answer instruction is added. Raises UserError, which names row and column.
        """
        if not isinstance(row, Mapping):
            raise UserError(
                f"is a JSON {type_name(row)}, not an object",
                where=where,
                fix='Each row must look like {"prompt": ..., "answer": ...}',
            )
        try:
            return self._problem(
                Row(row, where=where, columns=source.columns), source, folder, number
            )
        except UserError as error:
            if error.fix:
                raise
            fix = f"Correct the row ({self.says}), or set data.bad_rows=skip"
            raise UserError(error.what, where=error.where, fix=fix) from None

    def _problem(self, row: Row, source: Source, folder: str, number: int) -> Problem:
        check_no_image(row)
        fields = self.read(row)
        domain = source.domain or extra(row, "domain") or fields.domain or folder or "problems"
        return Problem(
            id=id_of(row, fields, domain, number),
            domain=domain,
            prompt=fields.prompt,
            answer=fields.answer,
            verifier=pick_verifier(row, fields, source.verifier),
            system=extra(row, "system") or fields.system,
            context=fields.context,
            reference=extra(row, "reference") or fields.reference,
            teacher_prompt=extra(row, "teacher_prompt"),
            feedback=extra(row, "feedback"),
            weight=weight_of(row),
        )


def extra(row: Row, name: str) -> str | None:
    """A column of text that any shape may have; None when it is absent, null or blank."""
    value = row.value(name)
    if value is not None and not isinstance(value, str):
        raise wrong_type(value, row.shown(name), row.where, "a string", fix=ignore(name))
    return row.text(name) or None


def weight_of(row: Row) -> float:
    """The factor of the problem's loss; 1 where the row has none, and where its cell is blank."""
    value = row.value("weight")
    if value is None or value == "":
        return 1.0
    return read_weight(value, row.shown("weight"), row.where, fix=ignore("weight"))


def ignore(name: str) -> str:
    """How to leave out a column that a data set has for another purpose."""
    return f"Correct it, or ignore the column: data.columns.{name}=''"


def id_of(row: Row, fields: Fields, domain: str, number: int) -> str:
    """The row's id: of its column `id` or `idx`, or the shape's, or else its number."""
    name = row.first("id", "idx")
    value, shown = (fields.id, "id") if name is None else (row.value(name), row.shown(name))
    value = number if value is None else value
    return read_id(value, shown, row.where, domain, fix=ignore("id"))


def pick_verifier(row: Row, fields: Fields, default: str | None) -> str:
    """The row's own verifier, or else `default`, or else the shape's. Raises UserError for none.

    A row cannot name a file: whoever reads a data set would run code by it.
    """
    named = row.text("verifier")
    if named and ".py:" in named and named not in (default, *VERIFIERS):
        raise row.error(
            "verifier",
            f"names a file of code ({shorten(named)})",
            fix="Name it yourself, if you trust it: data.verifier, or FILE@verifier=",
        )
    if named:
        return check_verifier(named, where=row.where)
    if default or fields.verifier:
        return default or fields.verifier or ""
    kind, what = row.value("kind"), "names no verifier"
    if isinstance(kind, str):
        what += f", and there is none for its kind {kind!r}"
    elif isinstance(row.value("answer"), list):
        what += ", and there is none for an answer that is a list"
    raise UserError(
        what,
        where=row.where,
        fix='Add a field "verifier", or the option --data.verifier: one of '
        f"{', '.join(VERIFIERS)}, or FILE.py:FUNCTION",
    )


def check_no_image(row: Row) -> None:
    """Raise UserError for a row with an image: problems are text."""
    for name in ("image", "images"):
        if row.value(name):
            raise row.error(name, "has an image", fix="Problems are text: leave such rows out")
