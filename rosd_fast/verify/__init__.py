"""Verifiers: is the answer that a completion gives the right one?

    registry  the verifiers by name: `register_verifier`
    pool      worker processes that run them: `VerifierPool`

`register_verifier` adds one, here or in a script of your own before it calls `train`:

    def verify_even(completion: str, answer: str) -> tuple[float, str | None]: ...

    register_verifier("even", verify_even, answers="an even number")
"""

from __future__ import annotations

from collections.abc import Sequence

from rosd_fast.types import Group, Judgement, Problem, Verdict
from rosd_fast.verify import code, gym
from rosd_fast.verify.choice import verify_choice
from rosd_fast.verify.math import MATH_INSTRUCTION, MATH_MARKS, verify_math
from rosd_fast.verify.number import verify_number
from rosd_fast.verify.pool import VerifierPool, verdict
from rosd_fast.verify.protocol import Limits
from rosd_fast.verify.registry import (
    VERIFIERS,
    Verifier,
    VerifierFunction,
    as_judgement,
    register_verifier,
)
from rosd_fast.verify.tags import CLOSE, OPEN, TAG_MARKS
from rosd_fast.verify.tools import (
    TOOLS_INSTRUCTION,
    TOOLS_MARKS,
    perfect_calls,
    verify_tools,
)
from rosd_fast.verify.words import verify_contains, verify_exact

__all__ = [
    "VERIFIERS",
    "Judgement",
    "Limits",
    "Verifier",
    "VerifierFunction",
    "VerifierPool",
    "as_judgement",
    "is_verifiable",
    "judge",
    "register_verifier",
    "verify_all",
]

register_verifier(
    "number",
    verify_number,
    answers="a number: a decimal or a fraction, with or without a unit",
    instruction=f"Give the final answer as a number between {OPEN} and {CLOSE}.",
    marks=TAG_MARKS,
)
register_verifier(
    "choice",
    verify_choice,
    answers="one letter",
    instruction=f"Give the letter of the right option between {OPEN} and {CLOSE}.",
    marks=TAG_MARKS,
)
register_verifier("exact", verify_exact, answers="words", marks=TAG_MARKS)
register_verifier("contains", verify_contains, answers="words", instruction="")
register_verifier(
    "code",
    code.verify_code,
    answers='tests as JSON: {"tests": ["assert f(1) == 2"]} or {"cases": [{"stdin": "1", ...}]}',
    instruction=code.INSTRUCTION,
    marks=code.MARKS,
    accepts=code.is_tests,
    runs_code=True,
)
register_verifier(
    "reasoning_gym",
    gym.verify_gym,
    answers="an exercise of reasoning_gym, as JSON",
    example=gym.right_completion,
    marks=(OPEN,),
    requires=("reasoning_gym",),
    extra="gym",
)
register_verifier(
    "math",
    verify_math,
    answers="a mathematical expression",
    example=r"\boxed{{answer}}",
    instruction=MATH_INSTRUCTION,
    marks=MATH_MARKS,
    requires=("math_verify",),
    extra="math",
)
register_verifier(
    "tools",
    verify_tools,
    answers='a JSON list of calls such as {"Action": "search", "Action_Input": {"query": "x"}}',
    example=perfect_calls,
    instruction=TOOLS_INSTRUCTION,
    marks=TOOLS_MARKS,
)


def verify_all(groups: Sequence[Group], *, threshold: float) -> dict[str, Verdict]:
    """The verdict on every rollout, by its id, in this process and without limits.

    Success means a score of at least `threshold`. A run uses a `VerifierPool` instead.
    """
    verdicts = {}
    for group in groups:
        for rollout in group.rollouts:
            found = judge(group.problem, rollout.text)
            verdicts[rollout.id] = verdict(rollout.id, found, threshold)
    return verdicts


def judge(problem: Problem, completion: str) -> Judgement:
    """What the problem's verifier says about a completion, in this process and without limits.

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
    if chosen.accepts is not None:
        return chosen.accepts(answer)
    return chosen(chosen.perfect(answer), answer).score == 1.0
