"""The tables of docs/verifiers.md say what the verifiers do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS, VerifierPool
from rosd_fast.verify.code import read_tests

PAGE = (Path(__file__).parents[2] / "docs" / "verifiers.md").read_text()
ROW = re.compile(r"^\| `(.+)` \| `(.+)` \| (right|wrong) \|$", re.MULTILINE)
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
CASES = [
    (name, *row)
    for section in SECTIONS
    for name in VERIFIERS
    if section.startswith(f"`{name}`\n")
    for row in ROW.findall(section)
]


@pytest.mark.parametrize(("name", "found", "answer", "verdict"), CASES)
def test_the_tables(name: str, found: str, answer: str, verdict: str) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    judged = VERIFIERS[name](f"Steps.\n<answer>{found}</answer>", answer)
    assert judged.score == (verdict == "right")


def test_every_table_is_read() -> None:
    assert len(CASES) == PAGE.count(" | right |") + PAGE.count(" | wrong |") > 60


def test_every_verifier_of_the_page_adds_what_the_page_says() -> None:
    table = PAGE.split("\n## ")[0]
    added = dict(re.findall(r"^\| \[`(\w+)`\].* \| (.*) \|$", table, re.MULTILINE))
    assert added.keys() == VERIFIERS.keys()
    for name, sentence in added.items():
        words = sentence.replace("`", "").removesuffix("...").strip()
        if words == "nothing":
            assert VERIFIERS[name].instruction == ""
        else:
            assert VERIFIERS[name].instruction.replace("`", "").startswith(words)


def block(section: str, language: str) -> str:
    """The block in that language of a section."""
    (text,) = [text for text in SECTIONS if text.startswith(f"{section}\n")]
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found


def test_the_file_of_the_page_is_a_verifier(tmp_path: Path) -> None:
    (tmp_path / "my_file.py").write_text(block("Your own file", "python"))
    name = f"{tmp_path}/my_file.py:score"
    problem = Problem(id="p", domain="d", prompt="?", answer="yes", verifier=name)
    with VerifierPool() as pool:
        verifier = pool.open(name)
        judged = pool.judge_sync([(problem, text) for text in ("yes", "no", "oh yes", "")])
        checked = pool.check_answers([(name, "yes"), (name, "two words")])
    assert verifier.instruction == "Write one word." and verifier.answers == "one word"
    assert [j.score for j in judged] == [1.0, 0.0, 0.0, 0.0]
    assert [j.reason for j in judged[2:]] == ["2 words", "0 words"]
    assert [j.score for j in checked] == [1.0, 0.0]


def test_the_right_answers_of_code_hold_tests() -> None:
    lines = block("`code`", "json").splitlines()
    assert len(lines) == 2 and all(read_tests(line) for line in lines)
