"""Keys read from rows are those of the problems that the rows become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rosd_fast.config import DataConfig
from rosd_fast.data.keys import as_keys, problem_key
from rosd_fast.data.problems import open_problems
from rosd_fast.data.row_keys import BATCH, keys_of

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAPES: dict[str, list[dict[str, Any]]] = {
    "own": [
        {"prompt": "What is 1 + 1?", "answer": 2},
        {"question": "What is 1 + 2?", "answer": 3},
        {"prompt": "What is 1 + 3?", "question": "Other?", "answer": 4},
        {"prompt": None, "problem": "What is 1 + 4?", "answer": 5},
        {"Problem": "What is 1 + 5?", "answer": 6},
    ],
    "gsm8k": [{"question": f"What is {i}?", "answer": f"It is.\n#### {i}"} for i in range(9)],
    "math": [{"problem": f"Find {i}.", "solution": rf"\boxed{{{i}}}"} for i in range(9)],
    "messages": [
        {"messages": [*TURNS, {"role": "user", "content": f"And {i}?"}], "answer": "1"}
        for i in range(9)
    ],
    "options": [
        {"question": "Which?", "choices": [f"a{i}", "b"], "answer": 0, "subject": "x"}
        for i in range(9)
    ],
}


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_are_those_of_the_problems(shape: str, tmp_path: Path) -> None:
    problems = open_problems(
        write(tmp_path / "a.jsonl", SHAPES[shape]), data=DataConfig(verifier="exact")
    )
    bare = [problems.bare(i) for i in range(len(problems))]
    expected = as_keys(problem_key(p.prompt, p.context) for p in bare)
    assert keys_of(problems).tolist() == expected.tolist()
    assert len(set(expected.tolist())) == len(problems)


def test_a_column_map_counts(tmp_path: Path) -> None:
    rows = [{"q": f"What is {i}?", "prompt": "Say:", "answer": "1"} for i in range(5)]
    data = DataConfig.model_validate({"columns": {"prompt": "q"}, "verifier": "number"})
    keys = keys_of(open_problems(write(tmp_path / "a.jsonl", rows), data=data))
    assert keys.tolist() == [problem_key(f"What is {i}?") for i in range(5)]


def test_several_sources_and_a_selection(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "answer": i} for i in range(BATCH + 30)]
    one = write(tmp_path / "a.jsonl", rows[:10])
    other = write(tmp_path / "b.jsonl", rows[10:])
    problems = open_problems(f"{one},quickstart:dev,{other}", data=DataConfig(verifier="number"))
    keys = keys_of(problems)
    assert keys[:10].tolist() == [problem_key(row["prompt"]) for row in rows[:10]]
    assert keys[-1] == problem_key(rows[-1]["prompt"])
    some = np.array([0, 9, 10, 150, len(problems) - 1])
    assert keys_of(problems.select(some)).tolist() == keys[some].tolist()


def test_rows_that_cannot_be_read_are_nobodys_copies(tmp_path: Path) -> None:
    good = {"prompt": "What is 1?", "answer": 1}
    bad = ["{oops", "{oops", {"prompt": "", "answer": 1}, {"prompt": " ", "answer": 1}, 7, [good]]
    bad += [{"prompt": 5, "answer": 1}, {"answer": 1}, '{"prompt": "a"} {"prompt": "b"}']
    source = write(tmp_path / "a.jsonl", [good, *bad, good])
    keys = keys_of(open_problems(source, data=DataConfig(verifier="number")))
    assert keys[0] == keys[-1] == problem_key("What is 1?")
    assert len(set(keys.tolist())) == len(bad) + 1


def test_batches_of_parquet_are_the_same_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    prompts = [f"What is {i}?" for i in range(3 * BATCH)]
    table = pa.table({"prompt": prompts, "answer": ["1"] * len(prompts)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    problems = open_problems(str(tmp_path / "a.parquet"), data=DataConfig(verifier="number"))
    assert keys_of(problems).tolist() == [problem_key(prompt) for prompt in prompts]
