"""Can a completion be right at all? The answer to `choice` must be a letter, for example."""

from __future__ import annotations

from collections.abc import Sequence

from rosd_fast.data.fields import unmatchable
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, is_verifiable
from rosd_fast.verify.user_file import is_user_file


class AnswerCheck:
    """Has verifiers judge their own example of a completion that is right.

    Verifiers that import other packages, and those of a user's file, do so in worker processes,
    which start when they are needed. The others are quick, and do so here.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._pool = VerifierPool(limits)

    def open(self, name: str, where: str) -> None:
        """Load the verifier of a user's file, unless it is known. Raises UserError."""
        if is_user_file(name) and name not in VERIFIERS:
            self._pool.open(name, where=where)

    def right(self, problems: Sequence[Problem]) -> list[bool]:
        """Whether each problem's verifier accepts its example of a right completion."""
        apart = [i for i, problem in enumerate(problems) if runs_apart(problem.verifier)]
        answers = [(problems[i].verifier, problems[i].answer) for i in apart]
        judged = self._pool.check_answers(answers) if answers else []
        found = {i: judgement.score == 1.0 for i, judgement in zip(apart, judged, strict=True)}
        return [
            found[i] if i in found else is_verifiable(problem.verifier, problem.answer)
            for i, problem in enumerate(problems)
        ]

    def fault(self, problem: Problem, where: str) -> UserError | None:
        """What is wrong with the answer of a problem."""
        return None if self.right([problem])[0] else unmatchable(problem, where)

    def close(self) -> None:
        """End the worker processes; the next check starts new ones."""
        self._pool.close_sync()


def runs_apart(name: str) -> bool:
    """Whether a verifier runs in worker processes only."""
    verifier = VERIFIERS[name]
    return bool(verifier.requires) or verifier.origin is not None
