"""Rows of one text and one answer: own rows, SciKnowEval and tool use as published, exercises of
reasoning_gym."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import PROMPTS, Fields

KIND_VERIFIERS = {"mcq": "choice", "tooluse": "tools"}
"""The verifier of rows that have a `kind`."""


def is_own(row: Row) -> bool:
    """Whether there is a problem and an answer."""
    return row.first(*PROMPTS) is not None and row.value("answer") is not None


def read_own(row: Row) -> Fields:
    """The columns as they are named."""
    return Fields(
        prompt=row.text(row.first(*PROMPTS) or PROMPTS[0], required=True),
        answer=row.answer("answer"),
        verifier=kind_verifier(row),
    )


def kind_verifier(row: Row) -> str | None:
    """The verifier of the row's kind; None when it has no kind that is known."""
    kind = row.value("kind")
    return KIND_VERIFIERS.get(kind) if isinstance(kind, str) else None


def is_science(row: Row) -> bool:
    """Whether it is one of SciKnowEval's multiple choice questions."""
    return is_own(row) and row.value("kind") == "mcq"


def is_tool_use(row: Row) -> bool:
    """Whether the answer is a list of calls of tools."""
    return is_own(row) and (row.value("kind") == "tooluse" or bool(calls(row)))


def read_tool_use(row: Row) -> Fields:
    """The answer stays the JSON list that it is. Raises UserError for a row of this kind whose
    answer is anything else."""
    own = read_own(row)
    if calls(row):
        return replace(own, verifier="tools")
    if own.verifier == "tools":
        raise row.error("answer", 'is not a JSON list of {"Action": ..., "Action_Input": ...}')
    return own


def calls(row: Row) -> list[Any]:
    """The calls that the answer lists; none when it is anything else."""
    value = row.value("answer")
    if isinstance(value, str):
        if '"Action"' not in value:
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    is_list = isinstance(value, list) and all(isinstance(c, dict) and "Action" in c for c in value)
    return value if is_list else []


def is_gym(row: Row) -> bool:
    """Whether it is an exercise with the name of its task."""
    return is_own(row) and isinstance(row.reach("metadata.source_dataset"), str)


def read_gym(row: Row) -> Fields:
    """The whole exercise is the answer: the task's own scorer reads it. The task is the domain."""
    name = row.first(*PROMPTS) or PROMPTS[0]
    prompt, metadata = row.text(name, required=True), row.value("metadata")
    entry = {"question": prompt, "answer": row.value("answer"), "metadata": metadata}
    return Fields(
        prompt=prompt,
        answer=json.dumps(entry, default=str),
        verifier="reasoning_gym",
        domain=row.reach("metadata.source_dataset"),
    )
