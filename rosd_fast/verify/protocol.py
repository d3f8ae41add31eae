"""What the pool and a worker say to each other: one JSON object per line, through pipes.

    to the worker    load    a verifier's name and address, before the first task that needs it
                     task    a completion and the right answer; completion null: the verifier's own
                             example of an answer that is right; answer null: nothing to judge
    from the worker  ready   it has started
                     begun   it is importing a verifier, which may take longer than a task
                     loaded  what the verifier's file says
                     broken  what is wrong with the verifier's file
                     done    a task's judgement, in the order of the tasks; last: the worker ends

Lines are ASCII: JSON escapes everything else, half surrogate pairs too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rosd_fast.types import Judgement
from rosd_fast.verify.origin import Origin

Failure = Literal["timed_out", "died", "failed"]
FAILURES: tuple[Failure, ...] = ("timed_out", "died", "failed")

MAX_TEXT = 2000  # characters of an answer
MAX_REASON = 500  # characters of a reason
MAX_LINE = 1 << 20  # bytes of a worker's line


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker process may use.

    workers: number of worker processes; 0: one per core, at most 8.
    timeout_s: seconds per completion.
    memory_mib: memory of a worker, beyond what its imports take.
    run_code: whether the verifier code may run what a model wrote.
    """

    workers: int = 0
    timeout_s: float = 10.0
    memory_mib: int = 2048
    run_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a user's file says of its verifier.

    answers, instruction: as for `register_verifier`; empty: it says nothing.
    has_example: whether it gives an example of a right completion. example: its text; empty where
    it is a function of the answer, which only workers can call.
    """

    answers: str = ""
    instruction: str = ""
    has_example: bool = False
    example: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a task.

    failure: how the verifier failed, None: it judged. A failure's score is 0.
    """

    judgement: Judgement
    failure: Failure | None = None


def failed(failure: Failure, reason: str) -> Outcome:
    """The outcome of a task whose verifier did not judge."""
    judgement = Judgement(score=0.0, answer=None, reason=reason[:MAX_REASON])
    return Outcome(judgement=judgement, failure=failure)


def line(kind: str, **fields: Any) -> bytes:
    """A message as a line."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


def load_line(name: str, origin: Origin, requires: Sequence[str]) -> bytes:
    """requires: the packages to import with it."""
    return line("load", name=name, origin=asdict(origin), requires=[*requires])


def task_line(name: str, completion: str | None, answer: str | None) -> bytes:
    return line("task", name=name, completion=completion, answer=answer)


def done_line(outcome: Outcome, *, last: bool = False) -> bytes:
    """last: whether the worker ends with it."""
    judged = outcome.judgement
    return line(
        "done",
        score=judged.score,
        answer=None if judged.answer is None else judged.answer[:MAX_TEXT],
        reason=None if judged.reason is None else judged.reason[:MAX_REASON],
        failure=outcome.failure,
        last=last,
    )


def read_outcome(message: dict[str, Any]) -> Outcome:
    """The outcome in a `done` message."""
    judgement = Judgement(
        score=message["score"],
        answer=encodable(message["answer"]),
        reason=encodable(message["reason"]),
    )
    return Outcome(judgement=judgement, failure=message["failure"])


def encodable(text: str | None) -> str | None:
    """The text with "?" for halves of surrogate pairs, which no file and no tokenizer takes."""
    return None if text is None else text.encode(errors="replace").decode()
