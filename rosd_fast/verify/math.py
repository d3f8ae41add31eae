r"""`math`: the last `\boxed{}` or answer tag equals the right answer as mathematics.

Equal notation, numbers, words, lists of numbers and simple expressions are compared here. The rest
goes to math-verify, without its time limits: they use signals, and a worker process has its own.
That package parses LaTeX with a grammar; nothing that a model wrote is executed.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from math import log10
from typing import Any

from rosd_fast.types import WRONG, Judgement
from rosd_fast.verify.latex import MAX_ROUNDING, compare_notation, simplify
from rosd_fast.verify.tags import BOXED, OPEN, final_answer, quoted
from rosd_fast.verify.values import compare_values

MAX_CHARS = 200
MAX_DEPTH = 8
MAX_DIGITS = 5000.0
"""Decimal digits of a number that is compared: 9^{9^{9}} would take hours."""

MATH_INSTRUCTION = r"Put the final answer within \boxed{}."
MATH_MARKS = (BOXED, OPEN)


def verify_math(completion: str, answer: str) -> Judgement:
    r"""1.0 if the last `\boxed{}`, answer tag or line #### equals `answer`, 0.0 otherwise."""
    found = final_answer(completion)
    if found is None:
        is_open = BOXED in completion or OPEN in completion
        reason = "the answer is not closed" if is_open else "no \\boxed{} and no answer tag"
        return Judgement(score=0.0, answer=None, reason=reason)
    reason = why_unequal(found, answer)
    return Judgement(score=float(reason is None), answer=found, reason=reason)


@lru_cache(maxsize=8192)
def why_unequal(found: str, wanted: str) -> str | None:
    """Why two answers are not equal; None: they are. The rollouts of a group repeat answers."""
    if not found:
        return "the answer is empty"
    if len(found) > 4 * MAX_CHARS:
        return f"an answer of {len(found)} characters cannot be compared"
    is_equal = compare_notation(found, wanted)
    if is_equal is None:
        is_equal = compare_values(simplify(found), simplify(wanted))
    if is_equal is None:
        one, two = parse(simplify(found)), parse(simplify(wanted))
        if one is None:
            return f"not read as mathematics: {quoted(found)}"
        is_equal = two is not None and _are_equal(one, two)
    return None if is_equal else WRONG


@lru_cache(maxsize=4096)
def parse(latex: str) -> Any:
    """What math-verify reads, a sympy object; None: nothing, or too much to compute with."""
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit
    if not latex or len(latex) > MAX_CHARS or _depth(latex) > MAX_DEPTH or _is_huge(latex):
        return None
    config = [LatexExtractionConfig()]
    read = parse(f"\\boxed{{{latex}}}", config, fallback_mode="no_fallback", parsing_timeout=0)
    return read[0] if read and _num_digits(read[0]) <= MAX_DIGITS else None


def _are_equal(found: Any, wanted: Any) -> bool:
    """Whether math-verify says so, and it is no matter of rounding a small number to 0."""
    from math_verify import verify

    gap = _relative_gap(found, wanted)
    if gap is not None and gap > MAX_ROUNDING:
        return False
    return verify(wanted, found, allow_set_relation_comp=True, timeout_seconds=0)


def _relative_gap(found: Any, wanted: Any) -> float | None:
    """|found - wanted| / |wanted| of two numbers; None when they are none, or one is 0."""
    if not (getattr(found, "is_number", False) and getattr(wanted, "is_number", False)):
        return None
    try:
        one, two = complex(found), complex(wanted)
    except (TypeError, ValueError, OverflowError):
        return None
    return abs(one - two) / abs(two) if one and two else None


def _depth(latex: str) -> int:
    """Greatest number of brackets within each other: the parser's time grows with its square."""
    depth = deepest = 0
    for bracket in re.findall(r"[()\[\]{}]", latex):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _is_huge(latex: str) -> bool:
    """Whether the parser itself would compute a binomial coefficient of large numbers."""
    return "binom" in latex and re.search("[0-9]{4}", latex) is not None


def _num_digits(expression: Any) -> float:
    """A bound on the decimal digits of the numbers that computing with the expression makes."""
    name = type(expression).__name__
    if getattr(expression, "is_Rational", False):
        return 1 + max(log10(abs(expression.p) or 1), log10(expression.q))
    parts = [_num_digits(part) for part in getattr(expression, "args", ())]
    if name in ("Pow", "factorial") and parts:
        last = expression.args[-1]
        is_plain = getattr(last, "is_Rational", False)
        exponent = abs(last.p / last.q) if is_plain else 10 ** min(parts[-1], 9.0)
        return parts[0] * max(exponent, 1.0)
    return max(sum(parts), 1.0) if name == "Mul" else max(parts, default=1.0)
