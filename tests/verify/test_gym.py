"""The verifier `reasoning_gym`: the tasks' own scores, without executing an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.data.gym import with_answer
from rosd_fast.errors import UserError
from rosd_fast.types import Judgement, Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, pool
from rosd_fast.verify.gym import read_exercise, right_completion, verify_gym

gym: Any = pytest.importorskip("reasoning_gym")


def exercise(task: str, seed: int = 3, **options: Any) -> str:
    """The right answer of the first exercise of a task, as a data set has it."""
    made = gym.create_dataset(task, size=1, seed=seed, **options)[0]
    row = with_answer(task, made, task)
    return json.dumps({name: row[name] for name in ("question", "answer", "metadata")}, default=str)


def score(answer: str, text: str) -> Judgement:
    return verify_gym(f"So <answer>{text}</answer>.", answer)


@pytest.mark.parametrize(
    "task",
    ["leg_counting", "countdown", "n_queens", "simple_integration", "graph_color", "rubiks_cube",
     "spiral_matrix", "string_insertion", "polynomial_multiplication", "mini_sudoku", "maze"],
)  # fmt: skip
def test_the_right_answer_is_accepted(task: str) -> None:
    answer = exercise(task)
    found = verify_gym(right_completion(answer), answer)
    assert (found.score, found.reason) == (1.0, None)


def test_a_wrong_answer_and_none_say_so() -> None:
    answer = exercise("leg_counting")
    wrong = score(answer, "-1")
    assert 0 <= wrong.score < 1 and wrong.answer == "-1"
    assert re.fullmatch(r"the task leg_counting gives it 0(\.\d+)? of 1", wrong.reason or "")
    assert verify_gym("It is 4.", answer) == Judgement(score=0, answer=None, reason="no answer tag")
    assert verify_gym("<answer>4", answer).reason == "the answer tag is not closed"


def test_scores_are_shaped() -> None:
    answer = exercise("string_insertion")
    right = json.loads(answer)["answer"]
    listed = score(answer, repr([*right]))  # right, but in another form
    assert listed.score == 0.1 and listed.reason == "the task string_insertion gives it 0.1 of 1"


@pytest.mark.parametrize(
    "task", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown",
             "puzzle24", "simple_integration", "intermediate_integration",
             "polynomial_multiplication"],
)  # fmt: skip
def test_an_answer_is_never_executed(task: str, tmp_path: Path) -> None:
    """These tasks pass an answer to eval or to sympy's parse_expr."""
    file = tmp_path / "made"
    call = f"open({str(file)!r}, 'w')"
    characters = "+".join(f"chr({ord(c)})" for c in call)
    for attack in (call, f"[{call}]", f"eval({characters})", f"[str({call})]"):
        found = score(exercise(task), attack)
        assert not file.exists()
        assert (found.score, found.reason) == (0.0, "the answer is code, not a value")


def test_no_other_task_executes_an_answer() -> None:
    """A new version of the package may; the guard holds for it too, but it should be known."""
    folder = Path(gym.__file__).parent
    calls = re.compile(
        r"\b(?:eval|exec|parse_expr|sympify)\((?:\w+\.)*(?:answer|user_\w+|expr\w*)\b"
    )
    found = {file.stem for file in folder.rglob("*.py") if calls.search(file.read_text())}
    assert found - {"propositional_logic"} <= {  # which parses on its own
        *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown"),
        *("puzzle24", "simple_integration", "intermediate_integration"),
        *("polynomial_multiplication",),
    }


@pytest.mark.parametrize(
    "answer",
    ["42", "[]", '{"answer": "3"}', '{"answer": 3, "metadata": {"source_dataset": "maze"}}', ""],
)
def test_what_is_no_exercise(answer: str) -> None:
    assert read_exercise(answer) is None
    assert right_completion(answer) == ""
    with pytest.raises(ValueError, match="not an exercise"):
        verify_gym("<answer>1</answer>", answer)


def test_tuples_come_back() -> None:
    value = {"answer": "1", "metadata": {"source_dataset": "maze", "at": {"__tuple__": [1, [2]]}}}
    found = read_exercise(json.dumps(value))
    assert found is not None and found["metadata"]["at"] == (1, [2])


def test_in_the_pool_and_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = exercise("leg_counting")
    problem = Problem(id="p", domain="d", prompt="?", answer=answer, verifier="reasoning_gym")
    with VerifierPool(Limits(workers=1)) as workers:
        assert workers.open("reasoning_gym") is VERIFIERS["reasoning_gym"]
        judged = workers.judge_sync([(problem, right_completion(answer)), (problem, "4")])
        checked = workers.check_answers([("reasoning_gym", answer), ("reasoning_gym", "42")])
        assert [j.score for j in judged] == [j.score for j in checked] == [1.0, 0.0]
        monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r'needs the package reasoning-gym.*"rosd-fast\[gym\]"'):
            workers.open("reasoning_gym")
