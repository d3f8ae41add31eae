r"""Compare math answers without algebra: equal notation, numbers, words, letters, lists of numbers.

This decides most answers in microseconds; the others need a parser (`rosd_fast.verify.math`).
"""

from __future__ import annotations

import re
from functools import lru_cache

from rosd_fast.verify.markup import WORDS, unwrap
from rosd_fast.verify.quantity import Quantity, parse_quantity
from rosd_fast.verify.units import parse_unit

_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|bigg?|Bigg?)(?=\\?[^a-zA-Z])", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(frac|sqrt) ?(\\pi(?![a-zA-Z]))", r"\\\1{\2}"),
        (r"\\frac ?([0-9])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\}) ?(\\pi(?![a-zA-Z])|[0-9a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt ?([0-9a-z])(?![0-9a-z])", r"\\sqrt{\1}"),
        (r"\^\{([0-9a-z])\}", r"^\1"),
        (r"(?<!\\)\\[,;:! ]|\\q?quad|(?<=\S)~", " "),
        (r"\\([$%])", r"\1"),
        ("\u2212", "-"),
    )
)
_SPACES = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")
_PHRASE = re.compile(r"[^\W\d_]{3,}(?:[ ,;'-]+[^\W\d_]+)*|no", re.IGNORECASE)
_BASE = re.compile(r"[0-9A-Za-z]+_\{?([0-9]+)\}?")
_UNIT = re.compile(WORDS + r"(\^\{?[23]\}?)?$")
_OPTION = re.compile(r"\(?([A-Z])\)?")
_BRACKETS = (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"))
_NO_BRACES = str.maketrans("", "", "{}")
MIN_ROUNDED_PLACES = 6
MAX_ROUNDING = 1e-5  # relative


@lru_cache(maxsize=8192)
def simplify(text: str) -> str:
    r"""`text` in one notation of several that mean the same: \dfrac12 is \frac{1}{2}.

    A space between two letters or digits stays: "3 4" is not 34.
    """
    text = unwrap(text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return _SPACES.sub("", " ".join(text.split())).removesuffix(".")


def compare_notation(found: str, wanted: str) -> bool | None:
    """Whether two answers are equal; None where only algebra could tell."""
    if simplify(found) == simplify(wanted) != "":
        return True
    one, two = _quantity(found), _quantity(wanted)
    if one is not None and two is not None:
        return one.equals(two) or is_rounded(one, two)
    phrase = as_phrase(wanted)
    if phrase is not None:
        return as_phrase(found) == phrase
    letters = [_OPTION.fullmatch(re.sub(WORDS, r"\1", unwrap(text))) for text in (found, wanted)]
    if letters[0] and letters[1]:
        return letters[0][1] == letters[1][1]
    if _is_contradiction(found) or _have_other_units(found, wanted):
        return False
    return _compare_lists(found, wanted)


@lru_cache(maxsize=8192)
def _quantity(text: str) -> Quantity | None:
    return parse_quantity(text)


def _is_contradiction(text: str) -> bool:
    """Whether it says that two numbers are equal which are not: "13 = 12"."""
    sides = [_quantity(side) for side in text.split("=")]
    numbers = [side.value for side in sides if side is not None]
    return 1 < len(sides) == len(numbers) != numbers.count(numbers[0])


def _have_other_units(found: str, wanted: str) -> bool:
    r"""Whether both have a unit, and not the same: \sqrt{2}\text{ m} and \sqrt{2}\text{ cm}.

    The same holds for the base of a number, which is ten where only the right answer has none.
    """
    bases = [_BASE.fullmatch(simplify(text)) for text in (found, wanted)]
    if bases[0]:
        return (bases[1][1] if bases[1] else "10") != bases[0][1]
    units = [
        parse_unit(" " + match[1] + (match[2] or "").translate(_NO_BRACES)) if match else None
        for match in (_UNIT.search(unwrap(text)) for text in (found, wanted))
    ]
    return bool(units[0] and units[1]) and units[0] != units[1]


def is_rounded(one: Quantity, two: Quantity) -> bool:
    """Whether one is the other rounded to six decimals or more: 0.333333 for 1/3."""
    places = [each.places for each in (one, two) if each.places is not None]
    if not places or min(places) < MIN_ROUNDED_PLACES or one.unit != two.unit:
        return False
    gap = abs(one.value - two.value)
    return gap * 2 * 10 ** min(places) <= 1 and gap <= MAX_ROUNDING * abs(two.value)


def as_phrase(text: str) -> str | None:
    r"""The words that `text` is, in lower case: of \text{}, or three letters and more; else None.

    Algebra would read them as products, in which "seat" equals "east".
    """
    plain = unwrap(re.sub(WORDS, r"\1", unwrap(text))).removesuffix(".")
    return " ".join(plain.split()).casefold() if _PHRASE.fullmatch(plain) else None


def _compare_lists(found: str, wanted: str) -> bool | None:
    """Compare two lists of numbers; None: they are none, or only one has brackets."""
    one, two = _split(simplify(found)), _split(simplify(wanted))
    if one is None or two is None or bool(one[0]) != bool(two[0]):
        return None
    if one[0] != two[0]:  # an interval without its ends, a point that is a set
        return False
    brackets, values = one[0], [_values(one[1]), _values(two[1])]
    if values[0] is None or values[1] is None:
        return None
    if brackets == "\\{\\}":
        return set(values[0]) == set(values[1])
    if not brackets:  # as in "x = 1, 2": solutions have no order
        return sorted(values[0]) == sorted(values[1])
    return values[0] == values[1]


def _split(text: str) -> tuple[str, list[str]] | None:
    """(brackets, items) of a list that has no brackets within; None: `text` is no list."""
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            brackets, inner = opening + closing, text[len(opening) : -len(closing)]
            break
    else:
        brackets, inner = "", text
    if re.search(r"[()\[\]]", inner):
        return None
    items = inner.split(",")
    return (brackets, items) if len(items) > 1 or brackets == "\\{\\}" else None


def _values(items: list[str]) -> list[float] | None:
    """The numbers, exact fractions or infinite; None when an item is none, or has a unit."""
    values = []
    for item in items:
        quantity = _quantity(item)
        if item in ("\\infty", "+\\infty", "-\\infty"):
            values.append(float(item.replace("\\infty", "inf")))
        elif quantity is None or quantity.unit or quantity.name:
            return None
        else:
            values.append(quantity.value)
    return values
