"""Verifiers: is the answer that a completion gives the right one?

A verifier is a function (completion text, right answer) -> (score in [0, 1], answer found or None).
It sees text that a model wrote, so it executes nothing and takes time linear in its length.

`register_verifier` adds one, here or in a script of your own before it calls `train`:

    def verify_even(completion: str, answer: str) -> tuple[float, str | None]: ...

    register_verifier("even", verify_even, answers="an even number")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rosd_fast.types import Group, Problem, Verdict
from rosd_fast.verify.choice import verify_choice
from rosd_fast.verify.number import verify_number
from rosd_fast.verify.tags import CLOSE, OPEN
from rosd_fast.verify.words import verify_contains, verify_exact

VerifierFunction = Callable[[str, str], tuple[float, str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A verifier as it was registered; calling it calls `function`."""

    function: VerifierFunction
    answers: str  # the answers it can match, as an error message names them: "one letter"
    example: str  # a completion that is right, with {answer} for the answer

    def __call__(self, completion: str, answer: str) -> tuple[float, str | None]:
        return self.function(completion, answer)


_REGISTERED: dict[str, Verifier] = {}
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(_REGISTERED)
"""The verifiers by name; `register_verifier` adds to them."""


def register_verifier(
    name: str,
    function: VerifierFunction,
    *,
    answers: str,
    example: str = f"{OPEN}{{answer}}{CLOSE}",
) -> None:
    """Make `function` the verifier `name` of data sets and of the option data.verifier.

    answers: the right answers that it can match, for error messages, as in "one letter".
    example: a completion that it accepts, with {answer} for the right answer. A problem is refused
    when its answer, put into the example, is not accepted.

    Raises ValueError when the name is taken.
    """
    if name in _REGISTERED:
        raise ValueError(f"there is a verifier {name!r} already")
    _REGISTERED[name] = Verifier(function=function, answers=answers, example=example)


register_verifier("number", verify_number, answers="a decimal number or a fraction")
register_verifier("choice", verify_choice, answers="one letter")
register_verifier("exact", verify_exact, answers="words")
register_verifier("contains", verify_contains, answers="words")


def verify_all(groups: Sequence[Group], *, threshold: float) -> dict[str, Verdict]:
    """The verdict on every rollout, by its id; success means a score of at least `threshold`."""
    return {
        rollout.id: verify(rollout.id, rollout.text, group, threshold)
        for group in groups
        for rollout in group.rollouts
    }


def verify(rollout_id: str, text: str, group: Group, threshold: float) -> Verdict:
    """The verdict on one completion of the group's problem. Raises ValueError as `score` does."""
    value, answer = score(group.problem, text)
    return Verdict(rollout_id=rollout_id, score=value, success=value >= threshold, answer=answer)


def score(problem: Problem, completion: str) -> tuple[float, str | None]:
    """(score in [0, 1], answer found or None) of a completion, by the problem's verifier.

    Raises ValueError for a verifier that does not exist; `load_problems` never lets one pass.
    """
    if problem.verifier not in VERIFIERS:
        raise ValueError(
            f"problem {problem.id}: verifier is {problem.verifier!r}, must be one of "
            f"{', '.join(VERIFIERS)}"
        )
    return VERIFIERS[problem.verifier](completion, problem.answer)


def is_verifiable(verifier: str, answer: str) -> bool:
    """Whether a completion can be right at all: the answer to `choice` must be a letter."""
    chosen = VERIFIERS[verifier]
    return chosen(chosen.example.replace("{answer}", answer), answer)[0] == 1.0
