"""A row of a data set under its column map."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from rosd_fast.data.fields import check_text, read_answer, read_text, wrong_type
from rosd_fast.errors import UserError


class Row:
    """The columns of a row by name; an error names the row and the column.

    A name is found in any case where the row does not have it as written: AIME's `Problem`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        where: str = "",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.where = where
        self._columns = columns or {}
        self._values = map_columns(values, self._columns) if columns else values
        self._given = values

    @cached_property
    def _in_any_case(self) -> dict[str, str]:
        return {key.lower(): key for key in reversed(list(self._values)) if isinstance(key, str)}

    def key(self, name: str) -> str | None:
        """The row's own spelling of a column that it has; None: it has no such column."""
        return name if name in self._values else self._in_any_case.get(name.lower())

    def value(self, name: str) -> Any:
        """The column's value; None when it is absent or null."""
        key = self.key(name)
        return None if key is None else self._values[key]

    def reach(self, path: str) -> Any:
        """The value under a dotted name, `reward_model.ground_truth`; None when there is none."""
        first, *rest = path.split(".")
        return reach(self.value(first), rest)

    def first(self, *names: str) -> str | None:
        """The first of the columns that the row has a value for."""
        return next((name for name in names if self.value(name) is not None), None)

    def text(self, name: str, *, required: bool = False) -> str:
        """A column of text; "" when it is not required and absent, null or blank."""
        value = self.value(name)
        if value is None and required:
            raise self.missing(name)
        if value is None or (not required and isinstance(value, str) and not value.strip()):
            return ""
        return read_text(value, self.shown(name), self.where)

    def label(self, name: str) -> str:
        """A column of short text; "" for anything else, as data sets call many things `type`."""
        value = self.value(name)
        return value.strip() if isinstance(value, str) else ""

    def answer(self, name: str) -> str:
        """A column of answers as text: numbers in plain digits, lists as JSON."""
        if self.value(name) is None:
            raise self.missing(name)
        return read_answer(self.value(name), self.shown(name), self.where)

    def parsed(self, name: str) -> Any:
        """A column of lists or objects, also where a cell holds them as JSON text."""
        value = self.value(name)
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
            return value
        try:
            return json.loads(check_text(value, self.shown(name), self.where))
        except (ValueError, RecursionError) as error:
            raise self.error(name, f"has malformed JSON ({error})") from None

    def parsed_or_none(self, name: str) -> Any:
        """As `parsed`; None where the JSON text is malformed."""
        try:
            return self.parsed(name)
        except UserError:
            return None

    def has_turns(self, name: str) -> bool:
        """Whether a column is a conversation: a list of turns, each an object."""
        turns = self.parsed_or_none(name)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            return False
        return any("role" in turn or "from" in turn for turn in turns)

    def has_text(self, *names: str) -> bool:
        """Whether the first of the columns with a value is text, and not a conversation."""
        name = self.first(*names)
        return isinstance(self.value(name or ""), str) and not self.has_turns(name or "")

    def with_column(self, field: str, column: str) -> Row:
        """The row with a field that is read from another column, dotted names included."""
        return Row(self._values, where=self.where, columns={field: column})

    def shown(self, name: str) -> str:
        """The column's name as the file, or else the column map, has it."""
        return self._columns.get(name) or self.key(name) or name

    def error(self, name: str, what: str, *, fix: str = "") -> UserError:
        """The error that says `what` of a column."""
        return UserError(f'the field "{self.shown(name)}" {what}', where=self.where, fix=fix)

    def wrong_type(self, name: str, wanted: str) -> UserError:
        """The error for a column of another type than `wanted`."""
        return wrong_type(self.value(name), self.shown(name), self.where, wanted)

    def missing(self, name: str) -> UserError:
        """The error for a column without a value."""
        fix = ""
        if self._columns.get(name):
            fix = f"data.columns.{name} names it; the row has {', '.join(map(str, self._given))}"
        state = "missing" if self.key(name) is None else "null"
        return self.error(name, f"is {state}", fix=fix)


def map_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`values` with every field of the map under its own name instead of its column's.

    A column "" means that the field is not read, though the row has a column of that name.

    >>> map_columns({"q": "2 + 2?", "gold": {"text": "4"}}, {"prompt": "q", "answer": "gold.text"})
    {'gold': {'text': '4'}, 'prompt': '2 + 2?', 'answer': '4'}
    """
    taken = {*columns, *columns.values()}
    mapped = {key: value for key, value in values.items() if key not in taken}
    for field, column in columns.items():
        found = values.get(column)
        value = reach(values, column.split(".")) if found is None and column else found
        if value is not None and column:
            mapped[field] = value
    return mapped


def reach(value: Any, path: list[str]) -> Any:
    """The value that a path of names leads to in nested objects; None when there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
