"""Can a completion be right at all? The answer to `choice` must be a letter, for example."""

from __future__ import annotations

from collections.abc import Sequence

from rosd_fast.data.fields import check_verifier, unmatchable
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, is_verifiable


class AnswerCheck:
    """Has verifiers judge their own example of a completion that is right.

    Verifiers that import other packages, and those of a user's file, do so in worker processes,
    which start when they are needed. The others are quick, and do so here.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        """limits: of the run that will verify completions; None: there is none, so code of a model
        need not be allowed."""
        self._pool = VerifierPool(limits)
        self._runs_code = limits is not None
        self._open: set[str] = set()

    def open(self, name: str, where: str) -> None:
        """Load the verifier of a user's file, and see that any other exists and can be used here.

        where: what names it. Raises UserError.
        """
        if name in self._open:
            return
        check_verifier(name, where=where)
        if name not in VERIFIERS or not VERIFIERS[name].runs_code or self._runs_code:
            self._pool.open(name, where=where)
        self._open.add(name)

    def right(self, problems: Sequence[Problem], *, every: int = 1) -> list[bool]:
        """Whether each problem's verifier accepts its example of a right completion.

        every: of the problems that worker processes judge, which take a millisecond each, only
        every so many are; True for the others.
        """
        apart = {i for i, problem in enumerate(problems) if runs_apart(problem.verifier)}
        asked = sorted(apart)[::every]
        answers = [(problems[i].verifier, problems[i].answer) for i in asked]
        judged = self._pool.check_answers(answers) if answers else []
        wrong = {i for i, judgement in zip(asked, judged, strict=True) if judgement.score < 1.0}
        return [
            i not in wrong and (i in apart or is_verifiable(problem.verifier, problem.answer))
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
