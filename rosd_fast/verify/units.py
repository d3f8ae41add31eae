"""The unit beside a number: "clips", "%", "m/s", "square feet".

A unit is one or two words, with a third after "per" or "/". Words that change the number are none:
"3 million", "5 squared", "12 or more".
"""

from __future__ import annotations

import re

PERCENT = "%"
CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9"

_NAMES = {
    "percent": PERCENT,
    "percentage": PERCENT,
    "pct": PERCENT,
    PERCENT: PERCENT,
    "\u00b0": "degree",
    "\u00b0C": "degree C",
    "\u00b0F": "degree F",
    "dollar": "$",
    "usd": "$",
    "euro": "\u20ac",
    "eur": "\u20ac",
}
_ATTACHED = frozenset("mm cm km mg kg ml ft lb lbs mph kwh".split())
"""Units that may follow the number without a space; 5m and 5k could be millions and thousands."""
_LETTERS = frozenset("m g s h l L J N W V".split())
"""Units of one letter; any other letter is a variable, or stands for a large number."""
_NOT_UNITS = frozenset(
    """
    hundred thousand million billion trillion dozen score gross pair half halve third quarter
    fourth fifth sixth seventh eighth ninth tenth eleventh twelfth hundredth thousandth millionth
    one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty
    seventy eighty ninety double triple twice point
    plus minus time multiplied over divided by mod modulo root squared cubed factorial power pi tau
    sqrt negative positive below under above less more fewer than least most exactly
    or and to not no nor but of if then else either maybe around about approximately roughly nearly
    am pm bc bce ad ce mil mio mln bn debt loss from off without ago
    """.split()
)
_WORD = r"[^\W\d_]+(?:\^?[23]|[\u00b2\u00b3])?"
_UNIT = re.compile(rf"({_WORD})(?: ({_WORD}))?(?: ?(?:/| per ) ?({_WORD}))?")
_POWERS = str.maketrans({"\u00b2": "2", "\u00b3": "3", "^": ""})


def parse_unit(text: str, *, currency: str = "") -> str | None:
    """What follows a number, in the form that units are compared in; None: it is no unit.

    currency: the sign that stands before the number.
    """
    is_attached = text[:1] not in ("", " ", "\n")
    text = " ".join(text.split())
    if not text or (text in CURRENCIES and not currency):
        return text or currency
    if text == PERCENT or text.startswith("\u00b0"):
        return None if currency else _NAMES.get(text.replace(" ", ""))
    if is_attached and text.casefold() not in _ATTACHED:
        return None
    match = _UNIT.fullmatch(text.replace(" ^", "^"))
    if not match:
        return None
    first, second, per = (_singular(word or "") for word in match.groups())
    if not all(_may_be_unit(word) for word in (first, second, per) if word):
        return None
    return " ".join(word for word in (currency, first, second, per and f"per {per}") if word)


def _singular(word: str) -> str:
    """A word of a unit in the form that is compared: "Clips" and "clip" are one."""
    word = word.translate(_POWERS)
    if len(word) > 1:
        word = word.casefold()
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return _NAMES.get(word, word)


def _may_be_unit(word: str) -> bool:
    letters = word.rstrip("23")
    if len(letters) == 1 and letters not in PERCENT + CURRENCIES:
        return letters in _LETTERS
    return word not in _NOT_UNITS
