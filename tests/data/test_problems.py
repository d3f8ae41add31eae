"""Loading problems, and the errors for rows that are not problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.collection import Problems
from rosd_fast.data.problems import load_problems
from rosd_fast.errors import UserError
from rosd_fast.types import Problem

ROW: dict[str, Any] = {"prompt": "2 + 2 = ?", "answer": "4", "verifier": "number"}
SCIENCE: dict[str, Any] = {
    "idx": 489,
    "kind": "mcq",
    "dataset": "sciknoweval",
    "answer": "A",
    "elo": 1500,
    "prompt": "Which?\n\nA: 0.8\nB: 1.4",
    "description": "Which?",
    "tests": "-",
    "embedding": [],
    "system": "Reply with <answer>.",
}


def write(folder: Path, *rows: Any, name: str = "train.jsonl") -> str:
    """A file with one line per row; a row that is a string is written as it is."""
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def load(source: str, **options: Any) -> Problems:
    """Problems without an answer instruction."""
    return load_problems(source, data=DataConfig(**{"answer_instruction": "off", **options}))


def error_of(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_full_row(tmp_path: Path) -> None:
    row = {**ROW, "system": "Be brief.", "domain": "sums", "id": "first"}
    assert list(load(write(tmp_path, row))) == [
        Problem(
            id="first",
            domain="sums",
            prompt="2 + 2 = ?",
            answer="4",
            verifier="number",
            system="Be brief.",
        )
    ]


def test_defaults_of_missing_fields(tmp_path: Path) -> None:
    (tmp_path / "sums").mkdir()
    source = write(
        tmp_path / "sums",
        {"problem": "1 + 1?", "answer": 2},
        "",
        {"question": "1 / 2?", "answer": 0.5, "system": None, "id": 7},
        {"question": "6 / 2?", "answer": "3", "system": " ", "idx": "c"},
    )
    problems = load(source, verifier="number")
    assert [p.id for p in problems] == ["sums:1", "sums:7", "c"]
    assert [p.answer for p in problems] == ["2", "0.5", "3"]
    assert {(p.domain, p.verifier, p.system) for p in problems} == {("sums", "number", None)}


def test_published_science_rows_load_without_conversion(tmp_path: Path) -> None:
    for domain in ("biology", "chemistry"):
        folder = tmp_path / domain
        folder.mkdir()
        source = write(folder, SCIENCE, {**SCIENCE, "idx": 3, "system": None}, name="train.json")
        first, second = load(source)
        assert (first.id, first.domain, first.verifier) == (f"{domain}:489", domain, "choice")
        assert (first.answer, first.system) == ("A", "Reply with <answer>.")
        assert (second.id, second.system) == (f"{domain}:3", None)


def test_a_given_verifier_takes_precedence_over_the_kind(tmp_path: Path) -> None:
    source = write(tmp_path, SCIENCE, {**ROW, "verifier": "number"})
    assert [p.verifier for p in load(source, verifier="contains")] == [
        "contains",
        "number",
    ]


def test_one_json_list(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text("\ufeff" + json.dumps([ROW, {**ROW, "id": "b"}], indent=1), encoding="utf-8")
    assert [p.id for p in load(str(path))] == [f"{tmp_path.name}:1", "b"]
    path.write_text(json.dumps([ROW, {"prompt": "x"}]))
    assert f"{path}, item 2 of the list: " in error_of(str(path))
    path.write_text('[{"prompt": "x"},\n{"prompt": ]')
    assert error_of(str(path)).startswith(f"{path}:2: malformed JSON")


def test_line_separators_in_strings_do_not_end_a_line(tmp_path: Path) -> None:
    row = json.dumps({**ROW, "prompt": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert load(write(tmp_path, row))[0].prompt == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "x"', "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "malformed JSON"),
        ('"text"', "is a JSON string, not an object"),
        ("null", "is a JSON null, not an object"),
        ({"answer": "4", "verifier": "number"}, 'the field "prompt" is missing'),
        ({**ROW, "prompt": None}, 'the field "prompt" is null'),
        ({**ROW, "prompt": 5}, 'the field "prompt" is a JSON number, not a string'),
        ({**ROW, "prompt": " \n"}, 'the field "prompt" is empty'),
        ('{"prompt": "\\ud800", "answer": "4", "verifier": "number"}', "surrogate"),
        ({"prompt": "x", "verifier": "number"}, 'the field "answer" is missing'),
        ({**ROW, "answer": True}, 'the field "answer" is a JSON boolean'),
        ({**ROW, "answer": "four"}, "no completion can match the answer 'four'"),
        ({**SCIENCE, "answer": "E or F"}, "It wants one letter"),
        ({**ROW, "system": ["x"]}, 'the field "system" is a JSON list'),
        ({**ROW, "domain": 3}, 'the field "domain" is a JSON number'),
        ({**ROW, "id": {}}, 'the field "id" is a JSON object'),
        ({**ROW, "verifier": "numbr"}, "there is no verifier 'numbr'. Did you mean number?"),
        ({**ROW, "verifier": "magic"}, "Known are number, choice, exact, contains"),
        ({"prompt": "x", "answer": "4"}, "names no verifier"),
        (
            {"prompt": "x", "answer": "[]", "kind": "tooluse"},
            'is not a JSON list of {"Action"',
        ),
        (
            {"prompt": "x", "answer": ["a"]},
            "none for an answer that is a list",
        ),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    source = write(tmp_path, {**ROW, "id": "good"}, bad)
    text = error_of(source)
    assert text.startswith(f"{source}:2: ")
    assert message in text


def test_a_list_is_compared_as_json_when_a_verifier_is_given(tmp_path: Path) -> None:
    source = write(tmp_path, {"prompt": "x", "answer": [{"Action": "a"}]})
    assert load(source, verifier="exact")[0].answer == '[{"Action": "a"}]'


def test_an_id_is_used_once(tmp_path: Path) -> None:
    source = write(tmp_path, {**ROW, "id": 1}, ROW, {**ROW, "id": 1})
    text = error_of(source)
    assert text.startswith(f"{source}:3: the id '{tmp_path.name}:1' was used before, at {source}:1")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.jsonl")
    assert error_of(missing).startswith(f"{missing}: there is no such file")
    assert "has no problems" in error_of(write(tmp_path, "", " ", name="empty.jsonl"))
    assert "has no problems" in error_of(write(tmp_path, "[]", name="empty.json"))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xe9"}\n')
    assert "latin.jsonl:2: the text is not UTF-8" in error_of(str(tmp_path / "latin.jsonl"))


def test_the_verifier_given_for_all_is_checked_first(tmp_path: Path) -> None:
    text = error_of(str(tmp_path / "no.jsonl"), verifier="choise")
    assert text.startswith("data.verifier: there is no verifier 'choise'. Did you mean choice?")


def test_shipped_problems() -> None:
    problems = load("quickstart:dev")
    assert len({p.id for p in problems}) == len(problems) >= 100
    assert {p.verifier for p in problems} == {"number"}
    text = error_of("quickstart:development")
    assert "there is no such split" in text and "dev_ood" in text
