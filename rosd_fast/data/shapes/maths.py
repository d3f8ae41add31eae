"""Rows whose answer ends a worked solution: GSM8K, MATH, AIME."""

from __future__ import annotations

import re
from typing import Any

from rosd_fast.data.shapes.answers import after_hashes, before_hashes, last_boxed
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import PROMPTS, Fields

_WHOLE = re.compile(r"[0-9]{1,3}")
LABELS = ("verifier", "kind", "level", "type", "subject")
"""Columns that the rows of AIME do not have."""


def is_gsm8k(row: Row) -> bool:
    """Whether the answer is a solution that ends in `#### 42`."""
    answer = row.value("answer")
    return row.has_text(*PROMPTS) and isinstance(answer, str) and after_hashes(answer) is not None


def read_gsm8k(row: Row) -> Fields:
    """The answer is what follows `####`; the solution before it is the reference."""
    text = row.text("answer", required=True)
    answer = after_hashes(text)
    if answer is None:
        raise row.error("answer", "has no ####")
    return Fields(
        prompt=row.text(row.first(*PROMPTS) or "question", required=True),
        answer=answer,
        verifier="number",
        reference=before_hashes(text) or None,
    )


def is_math(row: Row) -> bool:
    r"""Whether solution or answer ends in `\boxed{}`."""
    texts = (row.value("solution"), row.value("answer"))
    return row.has_text(*PROMPTS) and any(isinstance(t, str) and last_boxed(t) for t in texts)


def is_solved(row: Row) -> bool:
    """Whether a `problem` has a solution, which may be empty, and an answer.

    DeepScaleR and NuminaMath are such: few of their solutions end in a box.
    """
    answer = row.value("answer")
    has_columns = row.has_text("problem") and row.key("solution") is not None
    has_labels = row.first("verifier", "kind") is not None
    return has_columns and not has_labels and isinstance(answer, str | int | float)


def is_aime(row: Row) -> bool:
    """Whether the answer to a `problem` is a whole number from 0 to 999."""
    has_labels = row.first(*LABELS) is not None
    return row.has_text("problem") and not has_labels and _whole(row.value("answer"))


def read_math(row: Row) -> Fields:
    r"""The answer is its column, or else the content of the solution's last `\boxed{}`."""
    solution, answer = row.text("solution"), None
    if row.value("answer") is not None:
        text = row.answer("answer")
        answer = last_boxed(text) or text
        solution = solution or (text if answer != text else "")
    elif row.value("solution") is None:
        raise row.missing("solution")
    else:
        answer = last_boxed(row.text("solution", required=True))
        if answer is None:
            raise row.error("solution", r"has no \boxed{} that is closed")
    return Fields(
        prompt=row.text(row.first(*PROMPTS) or "problem", required=True),
        answer=str(int(answer)) if _WHOLE.fullmatch(answer) else answer,  # AIME's 033 is 33
        verifier="math",
        domain=as_domain(row.label("type") or row.label("subject")),
        id=row.label("unique_id") or None,
        reference=solution or None,
    )


def as_domain(name: str) -> str | None:
    """A published label as the name of a domain: "Counting & Probability" is
    counting_probability."""
    return re.sub(r"\W+", "_", name).strip("_").lower() or None


def _whole(value: Any) -> bool:
    if isinstance(value, str):
        return _WHOLE.fullmatch(value.strip()) is not None
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 999
