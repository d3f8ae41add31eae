"""The verifiers by name. One registration is all that a verifier needs.

A verifier is a function of a completion and the right answer, both text. It returns a `Judgement`,
or what `as_judgement` makes one of: a score, or (score, answer found), or (score, answer found,
reason).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsFloat

from rosd_fast.types import Judgement
from rosd_fast.verify.origin import Origin
from rosd_fast.verify.tags import CLOSE, OPEN

VerifierFunction = Callable[[str, str], Any]

INSTRUCTION = f"Give the final answer between {OPEN} and {CLOSE}."
MAX_ANSWER_CHARS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """A verifier as it was registered; calling it calls `function`.

    answers: the answers that it can match, as an error message names them: "one letter".
    example: a completion that is right, with {answer} for the answer; a function of the answer
        where that is not enough.
    instruction: what tells a model how to answer; empty: nothing is said.
    marks: texts of which a prompt has at least one if it says how to answer already.
    requires: packages that it imports, and that may be absent.
    extra: the extra of this package that installs them.
    origin: where workers find the function, None: where it was defined.
    accepts: whether an answer can be matched, for a verifier of which no example shows it.
    runs_code: whether it runs what a model wrote.
    """

    name: str
    function: VerifierFunction
    answers: str
    example: str | Callable[[str], str]
    instruction: str
    marks: tuple[str, ...]
    requires: tuple[str, ...] = ()
    extra: str = ""
    origin: Origin | None = None
    accepts: Callable[[str], bool] | None = None
    runs_code: bool = False

    def __call__(self, completion: str, answer: str) -> Judgement:
        return as_judgement(self.function(completion, answer), completion)

    def perfect(self, answer: str) -> str:
        """A completion that is right."""
        if callable(self.example):
            return self.example(answer)
        return self.example.replace("{answer}", answer)

    def is_instructed(self, *texts: str | None) -> bool:
        """Whether one of the texts of a prompt says how to answer."""
        return any(mark in text for mark in self.marks for text in texts if text)


_REGISTERED: dict[str, Verifier] = {}
VERIFIERS: Mapping[str, Verifier] = MappingProxyType(_REGISTERED)
"""The verifiers by name; `register_verifier` adds to them."""


def register_verifier(
    name: str,
    function: VerifierFunction,
    *,
    answers: str,
    example: str | Callable[[str], str] = f"{OPEN}{{answer}}{CLOSE}",
    instruction: str = INSTRUCTION,
    marks: tuple[str, ...] = (OPEN,),
    requires: tuple[str, ...] = (),
    extra: str = "",
    accepts: Callable[[str], bool] | None = None,
    runs_code: bool = False,
) -> None:
    """Make `function` the verifier `name` of data sets and of the option data.verifier.

    answers: the right answers that it can match, for error messages, as in "one letter".
    example: a completion that it accepts, with {answer} for the right answer, or a function of the
    right answer. A problem is refused when the example of its answer is not accepted.
    instruction: the sentence that is added to a prompt which has none of `marks`; empty: none.
    requires: packages that it imports when it is called, as in "math_verify"; without them it is
    refused before the run starts. extra: the extra of rosd-fast that installs them.
    accepts: takes the place of the example in the check of answers. runs_code: whether it runs what
    a model wrote: it is then refused unless verify.run_code allows it and a sandbox is there.

    Worker processes import the function from its module or file, so it must stand at the top level
    of one. A script that registers a verifier must keep its own start under
    `if __name__ == "__main__":`, since workers import the script.

    Raises ValueError when the name is taken.
    """
    add_verifier(
        Verifier(
            name=name,
            function=function,
            answers=answers,
            example=example,
            instruction=instruction,
            marks=marks,
            requires=requires,
            extra=extra,
            accepts=accepts,
            runs_code=runs_code,
        )
    )


def add_verifier(verifier: Verifier) -> None:
    """Add to `VERIFIERS`. Raises ValueError when the name is taken."""
    if verifier.name in _REGISTERED:
        raise ValueError(f"there is a verifier {verifier.name!r} already")
    _REGISTERED[verifier.name] = verifier


def as_judgement(value: Any, completion: str = "") -> Judgement:
    """The judgement that a verifier's return value stands for.

    A verifier that returns a score alone names no answer; then the last line of the completion
    counts as the answer. Raises TypeError, ValueError or OverflowError for anything else.
    """
    if isinstance(value, Judgement):
        return value
    if isinstance(value, SupportsFloat):  # numbers of NumPy too
        lines = completion.strip().rsplit("\n", 1)
        return Judgement(score=float(value), answer=lines[-1][:MAX_ANSWER_CHARS] or None)
    if not isinstance(value, tuple) or len(value) not in (2, 3):
        raise TypeError(
            f"a verifier returned {type(value).__name__}, not a score, (score, answer) or "
            "(score, answer, reason)"
        )
    score, answer, *reason = value
    return Judgement(
        score=float(score),
        answer=None if answer is None else str(answer)[:MAX_ANSWER_CHARS],
        reason=str(reason[0]) if reason and reason[0] is not None else None,
    )
