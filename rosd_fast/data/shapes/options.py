"""Multiple choice with the options in columns of their own: MMLU, ARC."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from rosd_fast.data.fields import check_text, shorten
from rosd_fast.data.shapes.maths import as_domain
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import PROMPTS, Fields

OPTIONS = ("choices", "options")
ANSWERS = ("answerKey", "answer", "answer_idx", "label", "answer_index")
"""Columns of the right option: its letter or label, its number from 0, or its text."""


def is_options(row: Row) -> bool:
    """Whether a question comes with a column of options and one that tells the right one."""
    if question_of(row) is None:
        return False
    name = row.first(*OPTIONS)
    value = None if name is None else row.parsed_or_none(name)
    return isinstance(value, list | dict) and len(value) > 0 and row.first(*ANSWERS) is not None


def read_options(row: Row) -> Fields:
    """The options become lines "A: ..." after the question; the answer is a letter."""
    question = row.text(question_of(row) or "question", required=True)
    texts, labels = _options(row, row.first(*OPTIONS) or OPTIONS[0])
    lines = [f"{letter}: {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]
    return Fields(
        prompt="\n".join([question.rstrip(), "", *lines]),
        answer=ascii_uppercase[_right_one(row, texts, labels)],
        verifier="choice",
        domain=as_domain(row.label("subject") or row.label("category")),
    )


def question_of(row: Row) -> str | None:
    """The column of the question; SciKnowEval has another `prompt` beside it, an object."""
    return next((name for name in PROMPTS if row.has_text(name)), None)


def _options(row: Row, name: str) -> tuple[list[str], list[str]]:
    """The texts of the options, and the labels that the row has for them; without: letters."""
    value = row.parsed(name)
    labels: Any = None
    if isinstance(value, Mapping) and "text" in value:
        value, labels = value["text"], value.get("label")
    elif isinstance(value, Mapping):
        value, labels = list(value.values()), list(value)
    if not isinstance(value, list) or not all(isinstance(v, str | int | float) for v in value):
        raise row.error(name, "is not a list of texts")
    if not 2 <= len(value) <= len(ascii_uppercase):
        raise row.error(name, f"has {len(value)} options, must be 2 to {len(ascii_uppercase)}")
    texts = [check_text(str(v).strip(), row.shown(name), row.where) for v in value]
    if not all(texts):
        raise row.error(name, "has an empty option")
    if not isinstance(labels, list) or len(labels) != len(texts):
        labels = list(ascii_uppercase[: len(texts)])
    return texts, [str(label) for label in labels]


def _right_one(row: Row, texts: list[str], labels: list[str]) -> int:
    """The number of the right option, from 0."""
    name = row.first(*ANSWERS)
    if name is None:
        raise row.missing("answer")
    value = row.value(name)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise row.wrong_type(name, "a letter or the number of an option")
    if isinstance(value, int):
        if not 0 <= value < len(texts):
            raise row.error(
                name, f"is {value}, and the options are numbered from 0 to {len(texts) - 1}"
            )
        return value
    text = value.strip()
    for known in (labels, [label.lower() for label in labels], texts):
        if text in known:
            return known.index(text)
    if text.isdecimal() and len(text) < 3 and int(text) < len(texts):  # a number in a CSV file
        return int(text)
    raise row.error(name, f"is {shorten(value)}, which is none of {', '.join(labels)}")
