"""Whether a completion can be right at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rosd_fast.data.verifiable import AnswerCheck
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, registry


def problem(verifier: str, answer: str) -> Problem:
    return Problem(id="p", domain="d", prompt="x", answer=answer, verifier=verifier)


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[str]:
    """A verifier in a user's file that can match short answers."""
    file = tmp_path / "mine.py"
    file.write_text(
        'EXAMPLE = "{answer}"\ndef score(completion, answer):\n    return float(len(answer) < 3)\n'
    )
    before = set(VERIFIERS)
    yield f"{file}:score"
    for name in set(VERIFIERS) - before:
        del registry._REGISTERED[name]


def test_answers_are_judged_here_and_in_workers(mine: str) -> None:
    check = AnswerCheck()
    check.open(mine, "here")
    asked = [problem("number", "4"), problem(mine, "long"), problem(mine, "ab")]
    asked += [problem("choice", "four"), problem(mine, "long")]
    assert check.right(asked) == [True, False, True, False, False]
    assert check.right(asked, every=2) == [True, False, True, False, False]
    assert check.right(asked[2:], every=2) == [True, False, True]
    check.close()
    fault = check.fault(asked[1], "a.jsonl:3")  # starts workers again
    assert fault is not None and "a.jsonl:3: no completion can match the answer 'long'" in str(
        fault
    )
    assert check.fault(asked[2], "a.jsonl:4") is None
    check.close()


def test_a_verifier_that_does_not_exist(tmp_path: Path) -> None:
    check = AnswerCheck()
    check.open("number", "here")
    with pytest.raises(UserError, match=r"here: there is no verifier 'numbr'. Did you mean number"):
        check.open("numbr", "here")
    with pytest.raises(UserError, match="there is no such file"):
        check.open(f"{tmp_path}/no.py:score", "here")
