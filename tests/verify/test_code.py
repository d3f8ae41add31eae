"""The verifier `code`: code blocks, tests, scores, and where it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import DataConfig, VerifyConfig
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.types import Judgement, Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, is_verifiable
from rosd_fast.verify.code import Suite, last_code, lines_of, read_tests

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="needs bubblewrap: apt-get install bubblewrap"
)
ASSERTS = json.dumps({"tests": ["assert f(1) == 2", "assert f(2) == 3"], "setup": "import math"})
CASES = json.dumps(
    {"cases": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "4 5\n", "stdout": "9"}]}
)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(Limits(workers=1, timeout_s=5, run_code=True)) as opened:
        yield opened


def judge(pool: VerifierPool, code: str, answer: str) -> Judgement:
    problem = Problem(id="p", domain="d", prompt="?", answer=answer, verifier="code")
    (found,) = pool.judge_sync([(problem, f"So:\n```python\n{code}\n```\n")])
    return found


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```\nbetter:\n```py\nx = 2\n```\nDone.", "x = 2\n"),
        ("~~~\nx = 1\n~~~", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("```python\n```", ""),
        ("```python\nx\n``` and more\ny\n```", "x\n``` and more\ny\n"),
        ("````python\nx\n```\ny\n`````", "x\n```\ny\n"),
        ("```x\n" * 100_000, None),
        ("```\n" * 100_000 + "x", ""),
        ("```\na\r\nb\n```\r\n", "a\r\nb\n"),
        ("", None),
    ],
)
def test_last_code(completion: str, code: str | None) -> None:
    assert last_code(completion) == code


@given(st.text(alphabet="`~ \nab", max_size=60))
def test_what_stands_between_fences_is_found_after_any_text_without(text: str) -> None:
    """Unless the text leaves a block of its own open."""
    code = last_code(text)
    assert code is None or code in text
    if "```" not in text and "~~~" not in text:
        assert code is None
        assert last_code(f"{text}\n```\nx = 1\n```") == "x = 1\n"


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        (ASSERTS, Suite(setup="import math", asserts=("assert f(1) == 2", "assert f(2) == 3"))),
        (CASES, Suite(setup="", stdins=("1 2\n", "4 5\n"), stdouts=("3\n", "9"))),
        ('{"cases": [{"stdout": "3"}]}', Suite(setup="", stdins=("",), stdouts=("3",))),
        ('{"tests": []}', None),
        ('{"tests": "assert f(1)"}', None),
        ('{"tests": [1]}', None),
        ('{"tests": ["pass"], "setup": 3}', None),
        ('{"tests": ["pass"], "cases": [{"stdout": "3"}]}', None),
        ('{"cases": [{"stdin": "3"}]}', None),
        ('{"cases": ["3"]}', None),
        ("[1]", None),
        ("42", None),
        ("", None),
    ],
)
def test_read_tests(answer: str, tests: Suite | None) -> None:
    assert read_tests(answer) == tests
    assert is_verifiable("code", answer) == (tests is not None)


def test_outputs_are_equal_up_to_space_at_ends() -> None:
    assert lines_of("a \nb\n\n") == lines_of("a\nb") != lines_of("a\n\nb")
    assert lines_of(" a") != lines_of("a")


@needs_bubblewrap
def test_the_score_is_the_share_of_tests(pool: VerifierPool) -> None:
    right = judge(pool, "def f(x): return x + 1", ASSERTS)
    assert (right.score, right.reason) == (1.0, None)
    assert right.answer == "def f(x): return x + 1\n"
    half = judge(pool, "def f(x): return 2", ASSERTS)
    assert (half.score, half.reason) == (0.5, "1 of 2 tests passed; test 2: AssertionError")
    none = judge(pool, "def f(x) return", ASSERTS)
    assert none.score == 0 and "test 1: SyntaxError" in (none.reason or "")
    assert judge(pool, "print(sum(map(int, input().split())))", CASES).score == 1.0
    wrong = judge(pool, "print(3)", CASES)
    assert (wrong.score, wrong.reason) == (0.5, "1 of 2 tests passed; test 2: wrong output")


@needs_bubblewrap
def test_what_cannot_be_run_gives_a_reason(pool: VerifierPool) -> None:
    problem = Problem(id="p", domain="d", prompt="?", answer=ASSERTS, verifier="code")
    killed = "```\nimport os, time; os.kill(os.getppid(), 9); time.sleep(9)\n```"
    texts = ["no code", killed, "```\nwhile True: pass\n```", "```\nx = '\ud800\n```"]
    judged = pool.judge_sync([(problem, text) for text in texts])
    assert [j.score for j in judged] == [0.0] * 4
    assert [j.reason for j in judged[:3]] == [
        "no code block",
        "the sandbox failed: it ended before all tests had run",
        "0 of 2 tests passed; test 1: timed out",
    ]
    assert pool.take_metrics() == {"verify/timed_out": 0, "verify/died": 0, "verify/failed": 0}


def test_it_runs_in_a_worker_that_may_and_nowhere_else() -> None:
    with pytest.raises(ValueError, match=r"verify\.run_code only"):
        VERIFIERS["code"]("```\npass\n```", ASSERTS)
    with VerifierPool(Limits(workers=1)) as pool:
        assert "verify.run_code only" in (judge(pool, "pass", ASSERTS).reason or "")


def write(tmp_path: Path, answer: str = ASSERTS) -> str:
    path = tmp_path / "code.jsonl"
    row = {"prompt": "Write f.", "answer": answer, "verifier": "code"}
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_a_data_set_of_code_is_refused_where_it_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path)
    with pytest.raises(UserError, match=r"code\.jsonl:1: the verifier code runs code that the mod"):
        load_problems(data, verify=VerifyConfig())
    monkeypatch.setattr("rosd_fast.verify.pool.unavailable", lambda: "bubblewrap is not installed")
    allowed = VerifyConfig(run_code=True)
    with pytest.raises(UserError, match=r"cannot run code: bubblewrap is not installed\. Install"):
        load_problems(data, verify=allowed)
    assert len(load_problems(data)) == 1  # to look at it needs neither
    monkeypatch.setattr("rosd_fast.verify.pool.unavailable", lambda: None)
    assert len(load_problems(data, verify=allowed)) == 1
    with pytest.raises(UserError, match="no completion can match the answer"):
        load_problems(write(tmp_path, '{"tests": [3]}'), data=DataConfig(), verify=allowed)
