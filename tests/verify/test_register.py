"""A new verifier takes one registration and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.types import Group, Problem, Rollout
from rosd_fast.verify import VERIFIERS, register_verifier, registry, verify_all


def verify_boxed(completion: str, answer: str) -> tuple[float, str | None]:
    found = re.findall(r"\\boxed\{(\d+)\}", completion)
    return float(found[-1:] == [answer]), found[-1] if found else None


@pytest.fixture(autouse=True)
def boxed() -> Iterator[None]:
    register_verifier("boxed", verify_boxed, answers="a whole number", example=r"\boxed{{answer}}")
    yield
    del registry._REGISTERED["boxed"]


def group_of(problem: Problem, *texts: str) -> Group:
    rollouts = tuple(
        Rollout(
            id=f"{problem.id}/{index}",
            problem_id=problem.id,
            prompt_ids=(1,),
            completion_ids=(2,),
            logprobs=(-0.5,),
            text=text,
            finish_reason="stop",
            policy_version=0,
        )
        for index, text in enumerate(texts)
    )
    return Group(problem=problem, rollouts=rollouts)


def test_a_registered_verifier_can_be_named_and_judges(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2 + 2 = ?", "answer": "4"}\n')
    (problem,) = load_problems(str(data), data=DataConfig(verifier="boxed"))
    verdicts = verify_all([group_of(problem, r"so \boxed{4}", "4", r"\boxed{5}")], threshold=1.0)
    assert [verdict.success for verdict in verdicts.values()] == [True, False, False]
    assert [verdict.answer for verdict in verdicts.values()] == ["4", None, "5"]


def test_an_answer_it_cannot_match_is_refused_in_its_own_words(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2 + 2 = ?", "answer": "four", "verifier": "boxed"}\n')
    with pytest.raises(UserError, match=r"verifier boxed\. It wants a whole number"):
        load_problems(str(data))
    with pytest.raises(UserError, match=r"Did you mean boxed\? \(known are number, .*, boxed\)"):
        load_problems(str(data), data=DataConfig(verifier="bxed"))


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="there is a verifier 'number' already"):
        register_verifier("number", verify_boxed, answers="a whole number")
    assert VERIFIERS["number"]("<answer>4</answer>", "4").score == 1.0
