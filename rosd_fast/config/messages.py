"""The error for a wrong option: one line, in the same words for TOML and the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rosd_fast.config.arguments import options_of
from rosd_fast.config.suggest import nearest, suggestion
from rosd_fast.errors import UserError

MAX_SHOWN = 60  # characters of a wrong value


def explain(
    error: ValidationError,
    model: type[BaseModel],
    *,
    spell: Callable[[str], str],
    show: Callable[[Any], str],
    where: Callable[[tuple[str, ...]], str],
) -> UserError:
    """The first mistake in one line: the option, its value, and what it must be.

    spell: writes the name of an option. show: writes a value. where: the place of an option, empty
    on the command line.
    """
    first = error.errors(include_url=False)[0]
    keys = tuple(part for part in first["loc"] if isinstance(part, str))
    name = ".".join(keys)
    if first["type"] == "extra_forbidden":
        if isinstance(first["input"], Mapping):
            near = nearest(name, _tables(model))
            fix = f"Did you mean {spell(near)}?" if near else ""
        else:
            fix = suggestion(name, options_of(model), spell) or ""
        fix = fix or "rosd-fast train --help lists all options"
        return UserError(f"unknown key {name}", where=where(keys), fix=fix)
    if first["type"] == "value_error":  # a conflict of options, which it names
        text = first["msg"].removeprefix("Value error, ")
        named = re.match(r"[a-z_]+(\.[a-z_]+)*", text)
        return UserError(text, where=where(tuple(named[0].split(".")) if named else ()))
    value = show(first["input"])
    if len(value) > MAX_SHOWN:
        value = f"{value[:MAX_SHOWN]}..."
    option = options_of(model).get(name)
    none = f", or {'false' if where(keys) else 'none'}" if option and option.nullable else ""
    return UserError(f"{spell(name)} is {value}, must be {_wants(first)}{none}", where=where(keys))


def _tables(model: type[BaseModel]) -> list[str]:
    """The names of the sections, nested ones too: chat, chat.student."""
    names = {name.rpartition(".")[0] for name in options_of(model)} - {""}
    return sorted(names | {name.partition(".")[0] for name in names})


def _wants(error: Any) -> str:
    """What the input should be, in plain words instead of pydantic's."""
    kind, context = error["type"], error.get("ctx", {})
    limits = {
        "greater_than": "greater than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
        "literal_error": "{expected}",
        "too_long": "at most {max_length} values",
        "too_short": "at least {min_length} values",
    }
    if kind in limits:
        return limits[kind].format(**context)
    kinds = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "text in quotes",
        "finite": "a finite number",
        "model": "a table of options",
        "tuple": "a list",
        "missing": "a longer list",
    }
    general = str(error["msg"]).removeprefix("Input should be ")
    return kinds.get(kind.partition("_")[0], general)
