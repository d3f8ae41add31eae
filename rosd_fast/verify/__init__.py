"""Verifiers: is the answer that a completion gives the right one?

A verifier is a function (completion text, right answer) -> (score in [0, 1], answer found or None).
It sees text that a model wrote, so it executes nothing and takes time linear in its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rosd_fast.types import Group, Verdict
from rosd_fast.verify.choice import verify_choice
from rosd_fast.verify.number import verify_number
from rosd_fast.verify.words import verify_contains, verify_exact

Verifier = Callable[[str, str], tuple[float, str | None]]

VERIFIERS: Mapping[str, Verifier] = MappingProxyType(
    {
        "number": verify_number,
        "choice": verify_choice,
        "exact": verify_exact,
        "contains": verify_contains,
    }
)


def verify_all(groups: Sequence[Group], *, threshold: float) -> dict[str, Verdict]:
    """The verdict on every rollout, by its id; success means a score of at least `threshold`."""
    return {
        rollout.id: verify(rollout.id, rollout.text, group, threshold)
        for group in groups
        for rollout in group.rollouts
    }


def verify(rollout_id: str, text: str, group: Group, threshold: float) -> Verdict:
    """The verdict on one completion of the group's problem.

    Raises ValueError for a verifier that does not exist; `load_problems` never lets one pass.
    """
    problem = group.problem
    if problem.verifier not in VERIFIERS:
        raise ValueError(
            f"problem {problem.id}: verifier is {problem.verifier!r}, must be one of "
            f"{', '.join(VERIFIERS)}"
        )
    score, answer = VERIFIERS[problem.verifier](text, problem.answer)
    return Verdict(rollout_id=rollout_id, score=score, success=score >= threshold, answer=answer)


def is_verifiable(verifier: str, answer: str) -> bool:
    """Whether a completion can be right at all: the answer to `choice` must be a letter."""
    score, _ = VERIFIERS[verifier](f"<answer>{answer}</answer>", answer)
    return score == 1.0
