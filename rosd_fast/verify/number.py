r"""`number`: the answer is a number equal to the right one; 0.5, .50, 1/2 and \frac12 are equal."""

from __future__ import annotations

from functools import lru_cache

from rosd_fast.types import WRONG, Judgement
from rosd_fast.verify.quantity import Quantity, parse_quantity
from rosd_fast.verify.tags import find_answer, quoted, why_no_answer


def verify_number(completion: str, answer: str) -> Judgement:
    """1.0 if the completion answers exactly with the number `answer`, 0.0 otherwise."""
    found = find_answer(completion)
    if found is None:
        return Judgement(score=0.0, answer=None, reason=why_no_answer(completion))
    value, wanted = parse_quantity(found), _wanted(answer)
    if value is not None and wanted is not None and value.equals(wanted):
        return Judgement(score=1.0, answer=found)
    return Judgement(score=0.0, answer=found, reason=_why_wrong(found, value, wanted))


@lru_cache(maxsize=4096)
def _wanted(answer: str) -> Quantity | None:
    """The right answer, which the rollouts of a group share."""
    return parse_quantity(answer)


def _why_wrong(found: str, value: Quantity | None, wanted: Quantity | None) -> str:
    if value is None:
        return f"not a number: {quoted(found)}"
    if wanted is None:
        return "the right answer is not a number"
    return WRONG if value.has_unit_of(wanted) else f"the unit {value.unit} is not the one asked for"
