"""Can a completion be right at all? The answer to `choice` must be a letter, for example."""

from __future__ import annotations

from collections.abc import Sequence

from rosd_fast.data.fields import unmatchable
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, is_verifiable


def can_be_right(problems: Sequence[Problem]) -> list[bool]:
    """Whether each problem's verifier accepts a perfect completion."""
    return [p.verifier not in VERIFIERS or is_verifiable(p.verifier, p.answer) for p in problems]


def check_verifiable(problem: Problem, where: str) -> None:
    """Raise UserError if no completion can be right."""
    if not can_be_right([problem])[0]:
        raise unmatchable(problem, where)
