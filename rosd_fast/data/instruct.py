"""The answer instruction: the sentence at the end of a prompt that says how to answer.

A verifier finds an answer only where the model was told to put it. `data.answer_instruction` is
`auto` (the verifier's own sentence, unless the prompt says it already), `off`, or a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS

AUTO, OFF = "auto", "off"


def instruction_of(problem: Problem, setting: str) -> str:
    """What `setting`, of data.answer_instruction, adds to the problem's prompt; "" for nothing."""
    if setting == OFF:
        return ""
    texts = (problem.prompt, problem.system, *(turn.content for turn in problem.context))
    if setting != AUTO:
        given = setting.strip()
        return "" if any(given in text for text in texts if text) else given
    verifier = VERIFIERS.get(problem.verifier)
    if verifier is None or verifier.is_instructed(*texts):
        return ""
    return verifier.instruction


def instructed(problem: Problem, setting: str) -> Problem:
    """The problem with the answer instruction after its prompt, or as it is."""
    sentence = instruction_of(problem, setting)
    if not sentence:
        return problem
    return replace(problem, prompt=f"{problem.prompt.rstrip()}\n\n{sentence}")


def describe_instructions(counts: Mapping[str, int]) -> list[str]:
    """Lines that say how many prompts got which sentence, by counts of `instruction_of`.

    >>> describe_instructions({"Answer in <answer></answer>.": 90, "": 10})
    ['90 of 100 prompts end with: Answer in <answer></answer>.']
    """
    total = sum(counts.values())
    return [
        f"{count:,} of {total:,} prompts end with: {' '.join(sentence.split())}"
        for sentence, count in counts.items()
        if sentence and count
    ]
