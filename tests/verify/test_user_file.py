"""A verifier in a user's own file, and one that a user's script registers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, Limits, VerifierPool, register_verifier, registry
from rosd_fast.verify.user_file import absolute_verifier, is_user_file

FILE = """
from words import WORDS  # beside this file

INSTRUCTION = "Answer yes or no between <answer> and </answer>."
ANSWERS = "yes or no"
EXAMPLE = "So: {answer}"

def score(completion, answer):
    last = completion.split()[-1]
    return float(last == answer in WORDS), last

def plain(completion, answer):
    return 0.5

plain.instruction = "Say it."
plain.example = None
"""


@pytest.fixture
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(Limits(workers=1)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def forget_new_verifiers() -> Iterator[None]:
    before = set(VERIFIERS)
    yield
    for name in set(VERIFIERS) - before:
        del registry._REGISTERED[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "words.py").write_text('WORDS = ("yes", "no")\n')
    path = tmp_path / "my verifier.py"
    path.write_text(FILE)
    return path


def problem(verifier: str, answer: str = "yes") -> Problem:
    return Problem(id="p", domain="d", prompt="?", answer=answer, verifier=verifier)


def test_names() -> None:
    assert is_user_file("my_file.py:score") and is_user_file("/a b/c.py:Class.score")
    for name in ("number", "my_file.py", "my_file:score", "my_file.py:", "a.py:1x", "a.py:b:c"):
        assert not is_user_file(name)
    assert absolute_verifier("a.py:score") == f"{Path('a.py').absolute()}:score"
    assert absolute_verifier("~/a.py:score") == f"{Path.home()}/a.py:score"
    assert absolute_verifier("number") == "number" and absolute_verifier(None) is None


def test_what_the_file_says_counts(file: Path, pool: VerifierPool) -> None:
    name = f"{file}:score"
    verifier = pool.open(name)
    assert verifier == VERIFIERS[name] == pool.open(name)
    assert verifier.instruction.startswith("Answer yes or no") and verifier.answers == "yes or no"
    assert verifier.perfect("yes") == "So: yes"  # rosd-fast data shows it
    assert verifier.is_instructed("Use <answer></answer>.") and not verifier.is_instructed("Yes?")
    right, wrong = pool.judge_sync([(problem(name), "I say yes"), (problem(name), "I say no")])
    assert (right.score, right.answer, wrong.score, wrong.answer) == (1.0, "yes", 0.0, "no")
    checked = pool.check_answers(
        [(name, "no"), (name, "perhaps"), ("number", "4"), ("number", "x")]
    )
    assert [judgement.score for judgement in checked] == [1.0, 0.0, 1.0, 0.0]


def test_a_function_may_say_it_and_needs_no_example(file: Path, pool: VerifierPool) -> None:
    name = f"{file}:plain"
    verifier = pool.open(name)
    assert verifier.instruction == "Say it." and verifier.accepts is not None
    assert verifier.is_instructed("Now. Say it.") and not verifier.is_instructed("Now.")
    assert pool.check_answers([(name, "anything")])[0].score == 1.0
    assert pool.judge_sync([(problem(name), "a\nb")])[0].answer == "b"


def test_a_file_that_says_nothing_gets_no_instruction(tmp_path: Path, pool: VerifierPool) -> None:
    (tmp_path / "bare.py").write_text("def score(completion, answer):\n    return 1\n")
    verifier = pool.open(f"{tmp_path}/bare.py:score")
    assert not verifier.instruction and verifier.accepts is not None
    assert not verifier.is_instructed("Anything.")


def test_the_file_never_runs_in_the_trainer(file: Path, pool: VerifierPool) -> None:
    file.write_text(f"import os\nPLACE = os.getpid()\n{FILE}\nscore.answers = str(PLACE)\n")
    verifier = pool.open(f"{file}:score")
    assert verifier.answers.isdigit() and int(verifier.answers) != os.getpid()
    with pytest.raises(ValueError, match="worker processes only"):
        verifier("yes", "yes")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(c, a:\n  pass\n", r"my verifier\.py:1: is not Python: '\(' was never closed"),
        ("\nimport nothing_like_it\n", r"my verifier\.py:2: raises ModuleNotFoundError: No module"),
        (
            "x = 1\ny = 1 / 0\n",
            r"my verifier\.py:2: raises ZeroDivisionError: division by zero when",
        ),
        ("import sys\nsys.exit('bye')\n", r"my verifier\.py:2: raises SystemExit: bye when"),
        ("def scores(c, a): pass\n", r"has no function score\. Did you mean scores\?"),
        ("def other(c, a): pass\n", r"has no function score\. It has other"),
        ("", r"has no function score\. It has no function at all"),
        ("score = 3\n", r"my verifier\.py: score is not a function"),
        ("ANSWERS = 3\ndef score(c, a): pass\n", r"my verifier\.py: ANSWERS is a int, not text"),
        ("EXAMPLE = 3\ndef score(c, a): pass\n", r"my verifier\.py: EXAMPLE is a int, neither"),
        ("def score(c): pass\n", r"py:score: cannot be called .*\(too many positional arguments\)"),
        ("def score(*, c, a): pass\n", r"my verifier\.py:score: cannot be called"),
        ("async def score(c, a): pass\n", r"my verifier\.py:score: is an async function"),
        ("import os\nos._exit(4)\n", r"the verifier died \(exit code 4\) while it was imported"),
        ("\0", r"my verifier\.py:.*is not Python|raises"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line(
    file: Path, pool: VerifierPool, source: str, message: str
) -> None:
    file.write_text(source)
    with pytest.raises(UserError, match=message) as raised:
        pool.open(f"{file}:score")
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)
    assert f"{file}:score" not in VERIFIERS
    with pytest.raises(UserError, match=message):  # where nobody has opened it
        pool.judge_sync([(problem(f"{file}:score"), "yes")] * 2)


def test_a_file_that_is_broken_during_the_run_costs_no_step(file: Path, pool: VerifierPool) -> None:
    name = f"{file}:score"
    tasks = [(problem(name), "yes")] * 2
    file.write_text(FILE.replace("last = ", "completion == 'end' and exit_now(); last = "))
    file.write_text(f"{file.read_text()}\n\ndef exit_now(): __import__('os')._exit(1)\n")
    assert [j.score for j in pool.judge_sync(tasks)] == [1.0, 1.0]
    file.write_text("1 / 0")
    judged = pool.judge_sync([(problem(name), "end"), *tasks])  # the worker starts again
    assert [j.score for j in judged] == [0.0, 0.0, 0.0]
    assert all("cannot be loaded" in (j.reason or "") for j in judged)
    assert all("ZeroDivisionError" in (j.reason or "") for j in judged)
    assert pool.take_metrics()["verify/failed"] == 3


def test_a_file_that_is_not_there(tmp_path: Path, pool: VerifierPool) -> None:
    with pytest.raises(UserError, match=r"^data\.verifier: there is no such file: .*/none\.py$"):
        pool.open(f"{tmp_path}/none.py:score", where="data.verifier")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match="is not a file"):
        pool.open(f"{tmp_path}/folder.py:score")


def test_a_file_that_imports_forever(
    file: Path, pool: VerifierPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rosd_fast.verify import crew

    monkeypatch.setattr(crew, "LOAD_S", 0.5)
    file.write_text("while True: pass\n")
    with pytest.raises(UserError, match=r"timed out after 0\.5 s while it was imported"):
        pool.open(f"{file}:score")


@pytest.mark.parametrize("function", [lambda completion, answer: 1.0, textwrap.dedent])
def test_only_a_function_with_a_place_can_travel(function: Any, pool: VerifierPool) -> None:
    register_verifier("somewhere", function, answers="anything")
    tasks = [(problem("somewhere"), "x")]
    message = r"somewhere: workers cannot import .* top level"
    if function is textwrap.dedent:  # a worker finds it, and sees that it takes one argument
        message = r"textwrap\.py:dedent: cannot be called with completion and right answer"
    with pytest.raises(UserError, match=message):
        pool.judge_sync(tasks)


SCRIPT = """
from rosd_fast.types import Problem
from rosd_fast.verify import Limits, VerifierPool, register_verifier


def verify_even(completion, answer):
    return float(int(completion) % 2 == 0), completion


register_verifier("even", verify_even, answers="an even number", example="{{answer}}")


def main():
    problem = Problem(id="p", domain="d", prompt="?", answer="4", verifier="even")
    with VerifierPool(Limits(workers=1)) as pool:
        print([(j.score, j.reason) for j in pool.judge_sync([(problem, "2"), (problem, "3")])])


{start}
"""


def run_script(tmp_path: Path, start: str) -> Any:
    script = tmp_path / "train_even.py"
    script.write_text(SCRIPT.format(start=start))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, script.name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )


def test_a_script_registers_a_verifier(tmp_path: Path) -> None:
    done = run_script(tmp_path, 'if __name__ == "__main__":\n    main()')
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[(1.0, None), (0.0, None)]\n"


@pytest.mark.parametrize("call", ["pass", "train(Config())"])
def test_a_script_without_a_guard_is_told_so(tmp_path: Path, call: str) -> None:
    """Its workers import it; they neither train nor start workers of their own."""
    imports = ("from rosd_fast.config import Config", "from rosd_fast.train import train")
    if call == "pass":
        done = run_script(tmp_path, "main()")
        what = "verifies"
    else:  # the trainer itself only verifies
        lines = [*imports, "train(Config())"]
        body = textwrap.indent("\n".join(lines), "    ")
        done = run_script(tmp_path, f'if __name__ != "__main__":\n{body}\nmain()')
        what = "calls train"
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith(
        f"train_even.py: {what} when a worker imports the file to find a verifier. Put the call "
        'under if __name__ == "__main__":\n'
    )


def test_opening_in_several_threads_at_once(file: Path, pool: VerifierPool) -> None:
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(pool.open(f"{file}:score"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(verifier) for verifier in found}) == 1
