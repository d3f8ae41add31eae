r"""Read a number with its unit, as people and models write it: "$1,234", "\frac12", "72 clips".

Numbers are exact fractions. What could mean two numbers is not read at all: "12 or 13", "5-7",
"1,23", "1 1/2". docs/verifiers.md lists the forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rosd_fast.verify.markup import WORDS, unwrap
from rosd_fast.verify.units import CURRENCIES, PERCENT, parse_unit

MAX_CHARS = 200

# Plain digits or groups of three. 0,123 is no group: it is a decimal comma.
_DECIMAL = (
    r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[1-9][0-9]{0,2}(?: [0-9]{3})+|[0-9]*)(?:\.(?P<{0}>[0-9]*))?"
)
# Three digits at most: 1e999999999 would fill the memory.
_EXPONENT = r"[eE](?P<exponent>[+-]?0*[0-9]{1,3})"


def _decimal_named(name: str) -> str:
    return f"(?P<{name}>{_DECIMAL.replace('{0}', name + '_places')})"


_QUANTITY = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>[{CURRENCIES}]?) ?(?P<second_sign>[+-]?) ?"
    rf"(?:\((?P<top_sign>[+-]?){_decimal_named('top')}\)/\({_decimal_named('bottom')}\)"
    rf"|{_decimal_named('number')}(?:{_EXPONENT}| ?/ ?{_decimal_named('divisor')})?)"
    r"(?P<unit>.*)",
    re.DOTALL,
)
_STATED = re.compile(
    r"(?:(?:the )?(?:(?:final|correct|right) )?answer(?: is ?:?|:| =)|([a-z]) ?=|=)\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("\u2212", "-"),
        (r"\\[dtc]?frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))", r"(\1\2)/(\3\4)"),
        (
            r" ?(?:\\times|\\cdot|[*\u00d7\u00b7]) ?10 ?\^ ?(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))",
            r"e\1\2",
        ),
        (WORDS, r" \1 "),
        (r"\\!|\{,\}(?=[0-9]{3})", lambda match: "," if match[0] == "{,}" else ""),
        (r"\\[,;: ]|(?<=\S)~|[\u00a0\u2009\u202f]", " "),
        (r"\^ ?(?:\\circ|\{ ?\\circ ?\})", "\u00b0"),
        (r"\\([$%])", r"\1"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A number, the unit written beside it, and the variable that it was said to be.

    unit: in the form that units are compared in; empty: none.
    places: digits after the decimal point; None for a fraction, or with an exponent.
    name: as in "x = 4"; empty: none.
    """

    value: Fraction
    unit: str = ""
    places: int | None = None
    name: str = ""

    def has_unit_of(self, other: Quantity) -> bool:
        """Whether the units agree: one may be left out."""
        return not self.unit or not other.unit or self.unit == other.unit

    def equals(self, other: Quantity) -> bool:
        """Whether both are the same quantity.

        A bare number beside a percentage is a share if it is at most 1, and else in percent: 50%
        equals 0.5 and 50, and 0.5% equals 0.005 but not 0.5.
        """
        if not self.has_unit_of(other) or (self.name and other.name and self.name != other.name):
            return False
        one, two = (
            each.value * 100
            if not each.unit and PERCENT in (self.unit, other.unit) and abs(each.value) <= 1
            else each.value
            for each in (self, other)
        )
        return one == two


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that `text` is; None when it is none, or could be two. Takes linear time."""
    if len(text) > 4 * MAX_CHARS:
        return None
    text = unwrap(text)
    if stated := _STATED.fullmatch(text):
        text = unwrap(stated[2].rstrip(". "))
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = unwrap(text).removesuffix(".").rstrip()
    if len(text) > MAX_CHARS or not (match := _QUANTITY.fullmatch(text)):
        return None
    unit = parse_unit(match["unit"], currency=match["currency"])
    value = _value(match)
    if unit is None or value is None:
        return None
    is_decimal = match["number"] is not None and not (match["divisor"] or match["exponent"])
    places = len(match["number_places"] or "") if is_decimal else None
    name = stated[1] or "" if stated else ""
    return Quantity(value=value, unit=unit, places=places, name=name)


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of a match of _QUANTITY; None for no digits, two signs or a division by 0."""
    signs = [s for s in (match["sign"], match["second_sign"]) if s]
    if len(signs) > 1:
        return None
    top, bottom = match["top"], match["bottom"]
    if top is None:
        top, bottom = match["number"], match["divisor"]
    numerator, denominator = _decimal(top), _decimal("1" if bottom is None else bottom)
    if numerator is None or not denominator:
        return None
    if match["top_sign"]:
        signs.append(match["top_sign"])
    value = numerator / denominator * Fraction(10) ** int(match["exponent"] or 0)
    return -value if signs.count("-") % 2 else value


def _decimal(text: str) -> Fraction | None:
    digits = text.replace(",", "").replace(" ", "")
    return Fraction(digits) if digits.strip(".") else None
