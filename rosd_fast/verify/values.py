r"""Compare expressions by their values at fixed points, where no computer algebra is needed.

The grammar is small: whole numbers, one-letter variables, \pi, \frac, \sqrt, + - * / ^, brackets,
and products without a sign. Whatever could be read in two ways is not read: 1/2x, 1\frac{1}{2},
x2, f(x), e, i.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import pi

POINTS = (1.3707, -0.8343, 2.1129)
"""Values of the variable A; those of the other letters follow from them."""
EQUAL, UNEQUAL = 1e-12, 1e-6  # relative distance of all values, of any value
TINY = 1e-6  # below, a value may be 0 but for rounding
MAX_DISTANCE = 1e-6  # of equal values, so that whole numbers are never equal by rounding
LARGE = 1e12  # above, whole numbers are rounded
MAX_CHARS = 200

_TOKEN = re.compile(r"\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z])\s*|[0-9]+|[a-zA-Z]|[-+*/^(){}\[\]]")
_TIMES = ("*", "\\cdot", "\\times")
_AMBIGUOUS = frozenset("eifgh")
"""Letters that are no variables everywhere: constants, and names of functions."""


class Unreadable(Exception):
    """An expression of another grammar, or with two readings."""


def compare_values(found: str, wanted: str) -> bool | None:
    """Whether two expressions are equal; None when one is not read, or too little to tell.

    Expressions of other letters are not told apart: the letters may be a unit.
    """
    one, two = values(found), values(wanted)
    if one is None or two is None:
        return None
    sizes = [max(abs(a), abs(b)) for a, b in zip(one, two, strict=True)]
    distances = [abs(a - b) for a, b in zip(one, two, strict=True)]
    if not min(sizes) > TINY:
        return None
    gap = max(distance / size for distance, size in zip(distances, sizes, strict=True))
    if gap <= EQUAL and max(distances) <= MAX_DISTANCE and max(sizes) < LARGE:
        return True
    return False if gap > UNEQUAL and _letters(found) == _letters(wanted) else None


def _letters(latex: str) -> set[str]:
    return {token for token in _TOKEN.findall(latex) if token.isalpha()}


@lru_cache(maxsize=8192)
def values(latex: str) -> tuple[complex, ...] | None:
    """The values of an expression at the points; None when it is not read or has no value."""
    tokens = [token.strip() for token in _TOKEN.findall(latex)]
    if not tokens or len(latex) > MAX_CHARS or _TOKEN.sub("", latex):
        return None
    try:
        return tuple(_Reader(tokens, point).read() for point in POINTS)
    except (Unreadable, ArithmeticError, ValueError, RecursionError):
        return None


class _Reader:
    """Evaluates tokens from left to right, by recursive descent, with A at `point`."""

    def __init__(self, tokens: list[str], point: float) -> None:
        self.tokens, self.point, self.position = [*tokens, ""], point, 0

    def read(self) -> complex:
        value = self.sum()
        if self.next:
            raise Unreadable
        return value

    @property
    def next(self) -> str:
        """The token to be read; empty at the end."""
        return self.tokens[self.position]

    def take(self, token: str | None = None) -> str:
        """Read the next token, which must be `token` if that is given."""
        taken = self.next
        if not taken or (token is not None and taken != token):
            raise Unreadable
        self.position += 1
        return taken

    def sum(self) -> complex:
        sign = self.take() if self.next in ("+", "-") else "+"
        value = self.product() if sign == "+" else -self.product()
        while self.next in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> complex:
        last, is_divided = self.next, False
        value = self.power()
        while self.next not in ("", "+", "-", ")", "}", "]"):
            if self.next in _TIMES:
                self.take()
                last = self.next
                value *= self.power()
            elif self.next == "/":
                self.take()
                last, is_divided = self.next, True
                value /= self.power()
            else:
                is_mixed = self.next.isdigit() or (last.isdigit() and self.next == "\\frac")
                if is_divided or is_mixed:
                    raise Unreadable
                last = self.next
                value *= self.power()
        return value

    def power(self) -> complex:
        base = self.base()
        if self.next != "^":
            return base
        self.take()
        if self.next.isdigit() and len(self.next) > 1:  # x^23 is x^2 times 3
            raise Unreadable
        exponent = self.group() if self.next == "{" else self.base()
        if self.next == "^":
            raise Unreadable
        is_whole = exponent.imag == 0 and exponent.real == int(exponent.real)
        if not is_whole and not (base.imag == 0 and base.real > 0):
            raise Unreadable
        return base ** (int(exponent.real) if is_whole else exponent)

    def base(self) -> complex:
        token = self.take()
        if token.isdigit():
            return complex(int(token))
        if token == "\\pi":
            return complex(pi)
        if token == "\\frac":
            return self.group() / self.group()
        if token == "\\sqrt":
            return self.root()
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if not token.isalpha() or token in _AMBIGUOUS:
            raise Unreadable
        away_from_0 = 0.1713 * (ord(token) - ord("A")) * (1 if self.point > 0 else -1)
        return complex(self.point + away_from_0)

    def group(self) -> complex:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def root(self) -> complex:
        """A square root, or one whose degree stands in square brackets; of positive numbers."""
        degree = 2
        if self.next == "[":
            self.take()
            degree = int(self.take())
            self.take("]")
        value = self.group()
        if value.imag or value.real < 0:
            raise Unreadable
        return value ** (1 / degree)
