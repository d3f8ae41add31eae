"""Which explanations are fit to teach with.

    leak    it states the final answer: a teacher that reads it need not understand anything
    empty   it has fewer words than asked for
    copy    too many of its words are the correct solution's own, in runs of eight or more

`reflect.leak`, `reflect.min_explanation_words` and `reflect.max_copied_frac` say what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rosd_fast.config import ReflectConfig
    from rosd_fast.types import Group, Reflection

WORD = re.compile(r"\w+(?:[.,]\d+)*")
COPIED_RUN_WORDS = 8  # words: fewer in a row may be alike by chance
REDACTED = "[...]"


def apply_filters(
    reflections: Mapping[str, Reflection], groups: Sequence[Group], config: ReflectConfig
) -> dict[str, Reflection]:
    """The reflections with what was found: `leaks`, and `refused` with the explanation taken
    out."""
    answers = {rollout.id: group.problem.answer for group in groups for rollout in group.rollouts}
    texts = {rollout.id: rollout.text for group in groups for rollout in group.rollouts}
    return {
        name: _gate(
            reflection,
            answers[name],
            # A correct rollout is explained with itself in view.
            texts.get(reflection.demonstration_id or name, "")
            if config.max_copied_frac < 1
            else "",
            config,
        )
        for name, reflection in reflections.items()
    }


def _gate(reflection: Reflection, answer: str, solution: str, config: ReflectConfig) -> Reflection:
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
    """Finds `answer` where it stands by itself: not 3 in 13 or in 3.5. None for an empty one."""
    answer = answer.strip()
    if not answer:
        return None
    return re.compile(
        rf"(?<![\w])(?<!\d[.,]){re.escape(answer)}(?![\w])(?![.,]\d)",
        re.NOFLAG if len(answer) == 1 else re.IGNORECASE,
    )


def copied_frac(explanation: str, solution: str) -> float:
    """Share of the explanation's words within runs of eight that are in the solution as well."""
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
