"""Checks of single fields of a row; an error names the row, the column and the way out."""

from __future__ import annotations

import difflib
import json
import math
from decimal import Decimal
from typing import Any

from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS

MAX_WEIGHT = 1000.0
"""With far larger weights no loss is finite, and every step would be skipped."""
MAX_DECIMAL_CHARS = 40
"""A float is written without exponent up to this length: 1e-05 is 0.00001, 1e+300 stays."""


def check_verifier(name: str, *, where: str) -> str:
    """`name`, if it is a verifier's or has the form FILE.py:FUNCTION. Raises UserError otherwise.

    Whether the file has the function is known where it is loaded.
    """
    if name in VERIFIERS or ".py:" in name:
        return name
    near = difflib.get_close_matches(name, VERIFIERS, n=1)
    known = f"known are {', '.join(VERIFIERS)}"
    raise UserError(
        f"there is no verifier {shorten(name)}",
        where=where,
        fix=f"Did you mean {near[0]}? ({known})" if near else known.capitalize(),
    )


def unmatchable(problem: Problem, where: str) -> UserError:
    """The error for an answer that no completion can match."""
    verifier = VERIFIERS.get(problem.verifier)
    return UserError(
        f"no completion can match the answer {shorten(problem.answer)} under the verifier "
        f"{problem.verifier}",
        where=where,
        fix=f"It wants {verifier.answers}" if verifier is not None else "Correct the answer",
    )


def read_answer(value: Any, name: str, where: str) -> str:
    """An answer as text: a number in plain digits, a list as JSON."""
    if isinstance(value, bool | dict):
        raise wrong_type(value, name, where, "a string or number")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        return _decimal(value, name, where)
    if isinstance(value, list):
        return json.dumps(value, default=str)
    return read_text(value, name, where)


def _decimal(value: float | Decimal, name: str, where: str) -> str:
    if not math.isfinite(value):
        raise UserError(
            f'the field "{name}" is {value}, not a number', where=where, fix="Correct the answer"
        )
    plain = format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    return plain if len(plain) <= MAX_DECIMAL_CHARS else str(value)


def read_text(value: Any, name: str, where: str) -> str:
    """A text that is not blank. Raises UserError for anything else."""
    if not isinstance(value, str):
        raise wrong_type(value, name, where, "a string")
    if not value.strip():
        raise UserError(f'the field "{name}" is empty', where=where)
    return check_text(value, name, where)


def read_id(value: Any, name: str, where: str, domain: str, *, fix: str = "") -> str:
    """An id: a string as it is, a number after the domain."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wrong_type(value, name, where, "a string or number", fix=fix)
    return f"{domain}:{value}" if isinstance(value, int) else read_text(value, name, where)


def read_weight(value: Any, name: str, where: str, *, fix: str = "") -> float:
    """A factor of the loss: a number from 0 to MAX_WEIGHT, also as text, as CSV has it."""
    try:
        weight = float(value) if isinstance(value, str | int | float | Decimal) else None
    except (ValueError, OverflowError):
        weight = None
    if weight is None or isinstance(value, bool):
        what = shorten(value) if isinstance(value, str) else f"a JSON {type_name(value)}"
        raise UserError(f'the field "{name}" is {what}, not a number', where=where, fix=fix)
    if not 0 <= weight <= MAX_WEIGHT:  # NaN neither
        raise UserError(
            f'the field "{name}" is {weight:g}',
            where=where,
            fix=f"It multiplies the loss of the problem: give a number from 0 to {MAX_WEIGHT:g}",
        )
    return weight


def check_text(value: str, name: str, where: str) -> str:
    """`value`, if it can be written to a file: JSON can contain half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f'the field "{name}" has half of a surrogate pair', where=where, fix="Remove it"
        ) from None
    return value


def wrong_type(value: Any, name: str, where: str, wanted: str, *, fix: str = "") -> UserError:
    """The error for a field of another type, as in `is a JSON list, not a string`."""
    what = f'the field "{name}" is a JSON {type_name(value)}, not {wanted}'
    return UserError(what, where=where, fix=fix)


def type_name(value: Any) -> str:
    """JSON's name of a value's type; Python's, for a value that JSON does not have."""
    names = {
        type(None): "null",
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "list",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)


def shorten(text: str, limit: int = 60) -> str:
    """The text in quotes, cut to `limit` characters."""
    return repr(text if len(text) <= limit else f"{text[:limit]}...")
