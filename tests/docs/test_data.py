"""The examples of docs/data.md load, and become what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rosd_fast.config import DataConfig
from rosd_fast.config.problems import ColumnsConfig
from rosd_fast.data.problems import load_problems
from rosd_fast.data.shapes.registry import _REGISTERED
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import VERIFIERS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
SECTION = re.compile(r"^##+ (.*)$", re.MULTILINE)
EXAMPLE = re.compile(r"^```jsonl\n(.*?)^```\n\n^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    """The text of each section of the page."""
    _, *parts = SECTION.split(PAGE.read_text(encoding="utf-8"))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def example(section: str) -> tuple[str, str]:
    """(rows, what they become) of a section."""
    ((rows, shown),) = EXAMPLE.findall(sections()[section])
    return rows, shown


SHAPES = [name for name, text in sections().items() if EXAMPLE.search(text) and "read as" in text]


def write(folder: Path, rows: str) -> str:
    """A file of the rows, in a folder of the name that the page gives."""
    path = folder / "examples" / "data.jsonl"
    path.parent.mkdir()
    path.write_text(rows, encoding="utf-8")
    return str(path)


def shown(says: str, problem: Problem) -> str:
    """The problem as the page shows it: the fields that are not defaults, each on one line."""
    context = " | ".join(f"{turn.role}: {turn.content}" for turn in problem.context)
    fields: dict[str, Any] = {
        "id": problem.id if problem.id != f"{problem.domain}:1" else None,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "verifier": problem.verifier,
        "domain": problem.domain if problem.domain != "examples" else None,
        "system": problem.system,
        "context": context or None,
        "reference": problem.reference,
    }
    lines = [f"{name:<11}{escape(text)}" for name, text in fields.items() if text is not None]
    return "\n".join([f"read as {says}", *lines]) + "\n"


def escape(text: str) -> str:
    return text.replace("\n", r"\n")


@pytest.mark.parametrize("section", SHAPES)
def test_each_shape_reads_as_the_page_says(tmp_path: Path, section: str) -> None:
    rows, wanted = example(section)
    assert len(rows.splitlines()) == 3
    data = DataConfig(**options(section), answer_instruction="off")
    problems = load_problems(write(tmp_path, rows), data=data)
    ((_, shape, count),) = problems.recognized
    assert count == 3
    assert shown(shape.says, problems[0]) == wanted
    assert all(problem.verifier in VERIFIERS for problem in problems)


def options(section: str) -> dict[str, Any]:
    """The options of the command in a section about the column map."""
    command = re.search(r"^```bash\n(rosd-fast .*?)^```$", sections()[section], re.M | re.DOTALL)
    if command is None:
        return {}
    words = shlex.split(command[1])
    given = dict(zip(words[3::2], words[4::2], strict=True))
    columns = {name.rpartition(".")[2]: given[name] for name in given if ".columns." in name}
    return {
        "verifier": given["--data.verifier"],
        "columns": ColumnsConfig(**columns),
    }


def test_the_table_has_every_shape() -> None:
    table = re.findall(r"^\| \[.*?\]\(#(.*?)\)", sections()["Shapes"], re.MULTILINE)
    headings = [name.lower().replace(" ", "-") for name in sections()]
    assert set(table) <= set(headings)
    assert len(table) == len(_REGISTERED)
    assert set(SHAPES) == {
        name for name in sections() if name.lower().replace(" ", "-") in table
    } - {"reasoning_gym"} | {"Column map"}


def test_the_answer_instruction_is_added_as_the_page_says(tmp_path: Path) -> None:
    rows, wanted = example("Answer instruction")
    problems = load_problems(write(tmp_path, rows))
    assert [escape(problem.prompt) for problem in problems] == wanted.splitlines()


def test_the_error_of_the_page(tmp_path: Path) -> None:
    (wanted,) = re.findall(r"^```text\n(.*?)^```$", sections()["Bad rows"], re.M | re.DOTALL)
    (tmp_path / "quiz.jsonl").write_text(
        '{"prompt": "a?", "answer": "1", "verifier": "number"}\n{"prompt": "b?"}\n'
    )
    with pytest.raises(UserError) as caught:
        load_problems(str(tmp_path / "quiz.jsonl"))
    assert str(caught.value).replace(f"{tmp_path}/", "") == wanted.strip()
