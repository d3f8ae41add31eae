"""Prompts that are too long for a model are refused, or left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.collection import Problems
from rosd_fast.data.fitting import check_prompts, fitting
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.text.chat import ChatFormat, chat_format

WORDS = (1, 40, 2, 80, 3)


@pytest.fixture
def chat(tokenizer: Any) -> ChatFormat:
    return chat_format(tokenizer)


def load(folder: Path, **options: Any) -> Problems:
    """A problem per entry of WORDS, p:1 and on, whose prompt has so many words."""
    rows = [{"id": f"p:{i}", "prompt": "answer " * n} for i, n in enumerate(WORDS, start=1)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    given: dict[str, Any] = {"verifier": "number", "answer_instruction": "off"} | options
    return load_problems(str(path), data=DataConfig(**given))


def ids(problems: Problems) -> str:
    return " ".join(problem.id for problem in problems)


def test_the_longest_prompt_is_named(tmp_path: Path, chat: ChatFormat) -> None:
    problems = load(tmp_path)
    longest = max(len(chat.render_problem(problem)) for problem in problems)
    check_prompts(problems, chat=chat, max_prompt_tokens=longest, context_length=longest + 1)
    check_prompts(problems, chat=chat)
    words = (
        rf"problem p:4: its prompt has {longest} tokens, more than sample.max_prompt_tokens = 30; "
        "2 of 5 prompts are too long. Raise sample.max_prompt_tokens, or leave such problems out"
    )
    with pytest.raises(UserError, match=words):
        check_prompts(problems, chat=chat, max_prompt_tokens=30)
    words = rf"has {longest} tokens, and the model's context has {longest}, .*no room .* Choose"
    with pytest.raises(UserError, match=words):  # a larger budget would not help
        check_prompts(problems, chat=chat, max_prompt_tokens=30, context_length=longest)


def test_problems_are_left_out(tmp_path: Path, chat: ChatFormat) -> None:
    problems = load(tmp_path)
    left, lines = fitting(problems, chat=chat, skip=True, max_prompt_tokens=30)
    assert ids(left) == "p:1 p:3 p:5" and left.is_checked
    assert len(lines) == 1 and lines[0].startswith("left out 2 of 5 problems. problem p:4: its ")
    assert fitting(problems, chat=chat, skip=True, context_length=1000) == (problems, [])
    left, _ = fitting(problems.select([1, 2]), chat=chat, skip=True, max_prompt_tokens=30)
    assert ids(left) == "p:3"
    with pytest.raises(UserError, match=r"more than sample\.max_prompt_tokens = 30"):
        fitting(problems, chat=chat, skip=False, max_prompt_tokens=30)


def test_no_prompt_fits(tmp_path: Path, chat: ChatFormat) -> None:
    problems = load(tmp_path)
    lengths = [len(chat.render_problem(problem)) for problem in problems]
    words = rf"problem p:1: .*shortest of 5, and the longest has {max(lengths)}\. Choose a model"
    with pytest.raises(UserError, match=words) as found:
        fitting(problems, chat=chat, skip=True, context_length=3)
    assert "bad_rows" not in str(found.value)
    with pytest.raises(UserError, match=r"problem p:1: .* Raise sample\.max_prompt_tokens$"):
        fitting(problems, chat=chat, skip=True, max_prompt_tokens=3, context_length=max(lengths))


def test_a_part_of_a_large_data_set_is_looked_at(tmp_path: Path, chat: ChatFormat) -> None:
    problems = load(tmp_path, check_rows=2)  # rows 1 and 3: the others are judged when drawn
    assert ids(problems.checked) == "p:1 p:3"
    left, lines = fitting(problems, chat=chat, skip=True, max_prompt_tokens=30)
    assert len(left) == 5 and lines == []
    shortest = len(chat.render_problem(problems[0]))
    left, lines = fitting(problems, chat=chat, skip=True, max_prompt_tokens=shortest)
    assert ids(left[:2]) == "p:1 p:2" and len(left) == 4 and "left out 1 of 2" in lines[0]
