"""The tables of docs/verifiers.md say what the verifiers do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rosd_fast.verify import VERIFIERS

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
