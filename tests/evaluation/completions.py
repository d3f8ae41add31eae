"""Completions for tests of figures and files."""

from __future__ import annotations

from typing import Any

from rosd_fast.evaluation.records import Completion


def make(problem: str, *marks: str, split: str = "test", **fields: Any) -> list[Completion]:
    """The completions of one problem: "4" is a right answer 4, "-5" a wrong 5, "" none at all."""
    made = []
    for index, mark in enumerate(marks):
        right = bool(mark) and not mark.startswith("-")
        given: dict[str, Any] = {
            "split": split,
            "problem_id": problem,
            "domain": "sums",
            "index": index,
            "score": float(right),
            "success": right,
            "answer": mark.removeprefix("-") or None,
            "reason": None if right else "the answer is wrong",
            "text": f"It is {mark}.",
            "num_tokens": 4,
            "finish_reason": "stop" if mark else "length",
        }
        made.append(Completion(**(given | fields)))
    return made
