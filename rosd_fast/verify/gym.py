"""`reasoning_gym`: the task that made an exercise scores the answer to it.

The right answer is the whole exercise as JSON text, with the name of its task in the metadata,
since a task's scorer may need any of it:

    {"question": "...", "answer": "7", "metadata": {"source_dataset": "leg_counting", ...}}

Some scorers evaluate an answer as Python or sympy; `guard` keeps them from executing one.

JSON has no tuples; those of an exercise are written as {"__tuple__": [...]}. Scores are shaped: a
task may give a part of 1 for an answer in a wrong form, or for one that is nearly right.
"""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

from rosd_fast.types import Judgement
from rosd_fast.verify.guard import GUARD
from rosd_fast.verify.tags import CLOSE, OPEN, last_answer, why_no_answer


def verify_gym(completion: str, answer: str) -> Judgement:
    """The score that the task gives. Raises ValueError for an answer that is no exercise."""
    exercise = read_exercise(answer)
    if exercise is None:
        raise ValueError("the right answer is not an exercise of reasoning_gym")
    found = last_answer(completion)
    if found is None:
        return Judgement(score=0.0, answer=None, reason=why_no_answer(completion))
    name = exercise["metadata"]["source_dataset"]
    score_answer = scorer(name)
    with GUARD.up() as guard:
        score = float(score_answer(found, exercise))
    if guard.has_refused:
        return Judgement(score=0.0, answer=found, reason="the answer is code, not a value")
    if math.isnan(score):
        raise ValueError(f"the task {name} gave no score")
    return Judgement(
        score=min(max(score, 0.0), 1.0),
        answer=found,
        reason=None if score >= 1.0 else f"the task {name} gives it {score:.2g} of 1",
    )


def right_completion(answer: str) -> str:
    """A completion with the exercise's own answer; one without an answer where there is none."""
    exercise = read_exercise(answer)
    return "" if exercise is None else f"{OPEN}{exercise['answer']}{CLOSE}"


def read_exercise(answer: str) -> dict[str, Any] | None:
    """The exercise in a right answer, None: it is none."""
    try:
        value: Any = json.loads(answer, object_hook=with_tuple)
    except (ValueError, RecursionError):
        return None
    metadata = value.get("metadata") if isinstance(value, dict) else None
    named = isinstance(metadata, dict) and isinstance(metadata.get("source_dataset"), str)
    return value if named and isinstance(value.get("answer"), str) else None


def with_tuple(value: dict[str, Any]) -> Any:
    """The tuple that an object stands for, or the object."""
    return tuple(value["__tuple__"]) if value.keys() == {"__tuple__"} else value


@cache
def scorer(name: str) -> Any:
    """The scorer of a task. Raises ValueError for a name that is none."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(name)
