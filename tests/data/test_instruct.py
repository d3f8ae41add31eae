"""The sentence at the end of a prompt that says how to answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.instruct import describe_instructions, instructed, instruction_of
from rosd_fast.types import Message, Problem
from rosd_fast.verify import VERIFIERS


def make(prompt: str = "2 + 3?", verifier: str = "number", **fields: object) -> Problem:
    fields = {"id": "p", "domain": "d", "answer": "5", **fields}
    return Problem(prompt=prompt, verifier=verifier, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("verifier", ["number", "choice", "exact"])
def test_the_verifiers_own_sentence_follows_the_prompt(verifier: str) -> None:
    sentence = VERIFIERS[verifier].instruction
    assert "<answer>" in sentence
    problem = instructed(make("2 + 3?\n", verifier), "auto")
    assert problem.prompt == f"2 + 3?\n\n{sentence}"
    assert instructed(problem, "auto") is problem


@pytest.mark.parametrize(
    "problem",
    [
        make("Answer in <answer> tags: 2 + 3?"),
        make(system="Reply in <answer> tags."),
        make(context=(Message(role="user", content="Always use <answer>."),)),
        make(verifier="contains"),
        make(verifier="score.py:judge"),
    ],
)
def test_nothing_is_added_where_it_is_said_or_not_known(problem: Problem) -> None:
    assert instructed(problem, "auto") is problem


def test_off_and_own_texts() -> None:
    assert instructed(make(), "off") == make()
    own = instructed(make(verifier="contains"), "Answer in one word. ")
    assert own.prompt == "2 + 3?\n\nAnswer in one word."
    assert instructed(own, "Answer in one word.") is own
    assert instructed(make(), " ") == make()


@given(st.text(max_size=20), st.sampled_from(["auto", "off", "In one word."]))
def test_an_instruction_is_added_once_and_only_at_the_end(prompt: str, setting: str) -> None:
    problem = make(prompt)
    once = instructed(problem, setting)
    assert instructed(once, setting) == once
    assert once.prompt.startswith(prompt.rstrip())
    assert (once == problem) == (instruction_of(problem, setting) == "")


def test_counts_are_described() -> None:
    assert describe_instructions({"Use\ntags.": 1900, "": 100, "In \\boxed{}.": 1}) == [
        "1,900 of 2,001 prompts end with: Use tags.",
        "1 of 2,001 prompts end with: In \\boxed{}.",
    ]
    assert describe_instructions({"": 3}) == []
