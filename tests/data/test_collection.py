"""Problems as a sequence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.collection import Problems
from rosd_fast.data.problems import load_problems


@pytest.fixture
def problems(tmp_path: Path) -> Problems:
    """Three sources of 3, 4 and 2 problems, with ids a:0, a:1, ..."""
    names = []
    for name, count in (("a", 3), ("b", 4), ("c", 2)):
        path = tmp_path / f"{name}.jsonl"
        row = {"prompt": f"Of {name}?", "answer": "1", "verifier": "number"}
        path.write_text(
            "".join(json.dumps({**row, "id": f"{name}:{i}"}) + "\n" for i in range(count))
        )
        names.append(str(path))
    text = f"{names[0]},{names[1]}@weight=2@domain=beta,{names[2]}"
    return load_problems(text, data=DataConfig(answer_instruction="Be brief."))


def ids(problems: Problems) -> str:
    return " ".join(problem.id for problem in problems)


def test_all_sources_one_after_the_other(problems: Problems) -> None:
    assert ids(problems) == "a:0 a:1 a:2 b:0 b:1 b:2 b:3 c:0 c:1"
    assert problems.sizes == [3, 4, 2]
    assert [part.source.weight for part in problems.parts] == [1.0, 2.0, 1.0]
    assert (problems[3].domain, problems[-1].id) == ("beta", "c:1")
    assert problems.where(4).endswith("b.jsonl:2")
    with pytest.raises(IndexError):
        problems[9]
    notes = problems.notes()
    assert len(notes) == 3 and notes[1].endswith(
        "b.jsonl: 4 problems, read as plain rows: a problem and its answer"
    )


def test_parts_of_it(problems: Problems) -> None:
    assert ids(problems[2:4]) == "a:2 b:0" and problems[2:4].sizes == [1, 1, 0]
    some = problems.select(np.array([0, 5, 8]))
    assert ids(some) == "a:0 b:2 c:1" and some.sizes == [1, 1, 1]
    assert ids(some[1:]) == "b:2 c:1" and some.where(1).endswith("b.jsonl:3")
    assert some.is_checked and ids(some.checked) == ids(some)
    assert len(problems[9:]) == 0


def test_instructions_are_added_to_prompts_alone(problems: Problems) -> None:
    assert problems[0].prompt == "Of a?\n\nBe brief."
    assert problems.bare(0).prompt == "Of a?"
