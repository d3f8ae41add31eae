"""Refuse explanations that should not teach.

    leak    the explanation states the final answer, which the teacher could simply repeat
    empty   it has too few words
    copy    too many of its words are copied from the correct solution, in runs of eight or more

The options are `reflect.leak`, `reflect.min_explanation_words` and `reflect.max_copied_frac`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rosd_fast.rollout.siblings import REFERENCE

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig
    from rosd_fast.types import Group, Reflection

WORD = re.compile(r"\w+(?:[.,]\d+)*")
COPIED_RUN_WORDS = 8  # shorter runs may agree by chance
REDACTED = "[...]"


def apply_filters(
    reflections: Mapping[str, Reflection], groups: Sequence[Group], config: ReflectConfig
) -> dict[str, Reflection]:
    """The reflections with `leaks` and `refused` set; a refused explanation is removed."""
    answers = {rollout.id: group.problem.answer for group in groups for rollout in group.rollouts}
    texts = {rollout.id: rollout.text for group in groups for rollout in group.rollouts}
    references = {r.id: group.problem.reference or "" for group in groups for r in group.rollouts}

    def shown(reflection: Reflection) -> str:
        """The solution in the reflector's prompt; for a correct rollout, that rollout."""
        if reflection.demonstration_id == REFERENCE:
            return references[reflection.rollout_id]
        return texts.get(reflection.demonstration_id or reflection.rollout_id, "")

    return {
        name: _check(
            reflection,
            answers[name],
            shown(reflection) if config.max_copied_frac < 1 else "",
            config,
        )
        for name, reflection in reflections.items()
    }


def _check(reflection: Reflection, answer: str, solution: str, config: ReflectConfig) -> Reflection:
    explanation = reflection.explanation or ""
    place = answer_pattern(answer)
    leaks = place is not None and place.search(explanation) is not None
    refused = None
    if len(WORD.findall(explanation)) < config.min_explanation_words:
        refused = "empty"
    elif leaks and config.leak == "drop":
        refused = "leak"
    elif copied_frac(explanation, solution) > config.max_copied_frac:
        refused = "copy"
    if refused is not None:
        explanation = ""
    elif leaks and config.leak == "redact":
        assert place is not None
        explanation = place.sub(REDACTED, explanation)
    return replace(reflection, explanation=explanation or None, leaks=leaks, refused=refused)


def answer_pattern(answer: str) -> re.Pattern[str] | None:
    """A pattern that finds `answer` as a whole word, not 3 in 13 or in 3.5; None if it is empty."""
    answer = answer.strip()
    if not answer:
        return None
    return re.compile(
        rf"(?<![\w])(?<!\d[.,]){re.escape(answer)}(?![\w])(?![.,]\d)",
        re.NOFLAG if len(answer) == 1 else re.IGNORECASE,
    )


def copied_frac(explanation: str, solution: str) -> float:
    """The share of the explanation's words in runs of eight that occur in the solution too."""
    words, source = WORD.findall(explanation), WORD.findall(solution)
    if not words:
        return 0.0
    runs = {
        tuple(source[i : i + COPIED_RUN_WORDS]) for i in range(len(source) - COPIED_RUN_WORDS + 1)
    }
    copied = [False] * len(words)
    for i in range(len(words) - COPIED_RUN_WORDS + 1):
        if tuple(words[i : i + COPIED_RUN_WORDS]) in runs:
            copied[i : i + COPIED_RUN_WORDS] = [True] * COPIED_RUN_WORDS
    return sum(copied) / len(words)
