"""`number`: the answer tag contains a number equal to the answer; 0.5, .50 and 1/2 are equal."""

from __future__ import annotations

import re
from fractions import Fraction

from rosd_fast.verify.tags import last_answer

# Plain digits or groups of three. No exponents: 1e999999999 would fill the memory.
_DECIMAL = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+|[0-9]*)(?:\.[0-9]*)?"
_NUMBER = re.compile(rf"([+-]?) ?({_DECIMAL})(?: ?/ ?({_DECIMAL}))?")
MAX_CHARS = 100


def verify_number(completion: str, answer: str) -> tuple[float, str | None]:
    """1.0 if the last answer tag contains exactly the number `answer`, 0.0 otherwise."""
    found = last_answer(completion)
    if found is None:
        return 0.0, None
    value = parse_number(found)
    return float(value is not None and value == parse_number(answer)), found


def parse_number(text: str) -> Fraction | None:
    """The value of a decimal number or of a fraction of two; None when `text` is neither.

    Commas and spaces may group thousands, and a dot may follow: "1,234." is 1234.
    """
    text = text.strip().removesuffix(".").rstrip().replace("\u2212", "-")
    if len(text) > MAX_CHARS or not (match := _NUMBER.fullmatch(text)):
        return None
    sign, top, bottom = match.groups()
    numerator, denominator = _decimal(top), _decimal("1" if bottom is None else bottom)
    if numerator is None or not denominator:
        return None
    return (-1 if sign == "-" else 1) * numerator / denominator


def _decimal(text: str) -> Fraction | None:
    digits = text.replace(",", "").replace(" ", "")
    return Fraction(digits) if digits.strip(".") else None
