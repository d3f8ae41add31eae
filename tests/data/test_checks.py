"""Which rows are checked before a run, and what becomes of bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import DataConfig
from rosd_fast.data import checks
from rosd_fast.data.checks import examine, spread
from rosd_fast.data.collection import Problems
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.verify import VERIFIERS, registry


def row(name: str | None = None, **fields: Any) -> str:
    own = {} if name is None else {"id": name}
    return json.dumps({"prompt": "x", "answer": "1", "verifier": "number", **own, **fields})


def write(folder: Path, *rows: str, name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(f"{each}\n" for each in rows))
    return str(path)


def load(text: str, *, first: int = 0, **options: Any) -> Problems:
    return load_problems(text, data=DataConfig(**options), first=first)


def ids(problems: Problems) -> list[str]:
    return [problem.id for problem in problems]


@given(st.integers(1, 500), st.integers(1, 500))
def test_checked_rows_are_spread_evenly(total: int, count: int) -> None:
    count = min(total, count)
    rows = spread(total, count)
    gaps = {b - a for a, b in zip(rows, [*rows[1:], total], strict=True)}
    assert len(rows) == count and rows[0] == 0
    assert gaps <= {total // count, -(-total // count)}


def test_some_rows_of_a_large_data_set_are_checked(tmp_path: Path) -> None:
    source = write(tmp_path, *[row(f"p:{i}") for i in range(10)])
    assert load(source).is_checked and load(source, check_rows=10).is_checked
    problems = load(source, check_rows=4)
    assert len(problems) == 10 and not problems.is_checked
    assert ids(problems.checked) == ["p:0", "p:2", "p:5", "p:7"] and problems.checked.is_checked
    assert any("4 of 10 rows were checked" in note for note in problems.notes())
    assert load(source, check_rows=0).is_checked


def test_a_bad_row_is_an_error_or_left_out(tmp_path: Path) -> None:
    rows = [row("a"), "{", row("b"), row("c", answer="x"), row("a")]
    source = write(tmp_path, *rows)
    for check_rows in (0, 4):
        with pytest.raises(UserError, match=r"a\.jsonl:2: malformed JSON"):
            load(source, check_rows=check_rows)
    problems = load(source, bad_rows="skip")
    assert ids(problems) == ["a", "b"] and problems.is_checked
    assert problems.check.num_bad == 3
    faults = [fault.removeprefix(f"{source}:") for fault in problems.check.faults]
    assert [fault[:20] for fault in faults] == [
        "2: malformed JSON (E",
        "4: no completion can",
        "5: the id 'a' was us",
    ]
    assert any("left out 3 bad rows" in note for note in problems.notes())
    with pytest.raises(UserError, match=r"no row is a problem. The first: .*:1: malformed JSON"):
        load(write(tmp_path, "{", "}"), bad_rows="skip")


def test_bad_rows_of_the_rest_are_found_when_asked_for(tmp_path: Path) -> None:
    rows = [row(f"p:{i}") for i in range(10)]
    rows[3], rows[8] = "{", row("c", answer="x")
    problems = load(write(tmp_path, *rows), check_rows=2)
    every = examine(problems, range(len(problems)))
    found = [(index, each) for index, each in every if isinstance(each, UserError)]
    assert [index for index, _ in found] == [3, 8]
    assert "malformed JSON" in str(found[0][1]) and "no completion can" in str(found[1][1])
    with pytest.raises(UserError, match="malformed JSON"):
        problems[3]
    assert problems[8].answer == "x"
    with pytest.raises(UserError, match="no completion can match"):
        problems.verified(8)


def test_the_first_problems_are_all_checked(tmp_path: Path) -> None:
    source = write(tmp_path, row("a"), "{", row("b"), row("c"), "}")
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        load(source, first=2)
    problems = load(source, first=2, bad_rows="skip", check_rows=1)
    assert ids(problems) == ["a", "b"] and problems.is_checked


def test_a_small_data_set_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, row("a"), row("b"))
    problems = load(source)
    assert problems[0] is problems[0] and problems[1:][0] is problems[1]
    monkeypatch.setattr(checks, "MAX_KEPT", 1)
    problems = load(source)
    assert problems[0] is not problems[0] and problems[0] == problems[0]


def test_ids_are_unique_over_all_sources(tmp_path: Path) -> None:
    """Rows without ids are numbered in each file, and both files lie in one folder."""
    first = write(tmp_path, row(), row("x"), name="a.jsonl")
    second = write(tmp_path, row(), row("y"), name="b.jsonl")
    third = write(tmp_path, row("z"), name="c.jsonl")
    problems = load(f"{first},{second},{third}")
    name = tmp_path.name
    assert ids(problems) == [f"{name}:1", "x", f"b:{name}:1", "b:y", "z"]
    assert ids(load(f"{first},{second},{third}", check_rows=3)) == ids(problems)
    (tmp_path / "d").mkdir()
    same = write(tmp_path / "d", row("x"), name="a.jsonl")
    assert ids(load(f"{first},{same}")) == [f"{name}:1", "x", "a-2:x"]
    with pytest.raises(UserError, match=r"b\.jsonl:2: the id 'x' was used before, at .*b\.jsonl:1"):
        load(f"{first},{write(tmp_path, row('x'), row('x'), name='b.jsonl')}")


@pytest.fixture
def forget_verifiers() -> Iterator[None]:
    """The verifiers that a test adds are gone after it."""
    before = set(VERIFIERS)
    yield
    for name in set(VERIFIERS) - before:
        del registry._REGISTERED[name]


@pytest.mark.usefixtures("forget_verifiers")
def test_answers_of_a_verifier_in_a_file_are_checked_apart(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        'EXAMPLE = "{answer}!"\nINSTRUCTION = "Shout."\n'
        "def score(completion, answer):\n    return float(answer != 'quiet')\n"
    )
    good = json.dumps({"prompt": "x", "answer": "loud"})
    bad = json.dumps({"prompt": "y", "answer": "quiet"})
    source = f"{write(tmp_path, good, bad)}@verifier={file}:score"
    with pytest.raises(UserError, match=r"a\.jsonl:2: no completion can match the answer 'quiet'"):
        load(source)
    assert [p.prompt for p in load(source, bad_rows="skip")] == ["x\n\nShout."]
    with pytest.raises(UserError, match=r"has no function scor. Did you mean score"):
        load(source.removesuffix("e"))
