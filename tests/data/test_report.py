"""What a data set is: counts, repetitions, bad rows by kind, lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import DataConfig
from rosd_fast.data import report
from rosd_fast.data.problems import open_problems
from rosd_fast.data.report import MAX_LISTED, Faults, histogram, summarize, trials
from rosd_fast.errors import UserError
from rosd_fast.types import Problem
from rosd_fast.verify import judge


def opened(folder: Path, *rows: Any, **options: Any) -> Any:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = DataConfig.model_validate({"verifier": "number", **options})
    return open_problems(str(folder / "rows.jsonl"), data=data)


def test_counts(tmp_path: Path) -> None:
    problems = opened(
        tmp_path,
        {"prompt": "What is 1?", "answer": 1, "domain": "a", "system": "Be brief."},
        {"prompt": "What is 2? Use <answer>.", "answer": 2, "domain": "a", "reference": "It is 2."},
        {"prompt": "Say yes.", "answer": "yes", "domain": "b", "verifier": "contains"},
        {"prompt": "What is 3?", "answer": 3, "domain": "a", "weight": 2, "feedback": "No."},
    )
    found = summarize(problems)
    assert found.groups == {("a", "number"): 3, ("b", "contains"): 1}
    assert found.with_system[("a", "number")] == 1
    assert found.fields == {"reference": 1, "weight": 1, "feedback": 1}
    sentence = "Give the final answer as a number between <answer> and </answer>."
    assert found.instructions == {sentence: 2, "": 2}
    assert found.lengths.tolist() == [len(problem.prompt) for problem in problems]
    assert found.first == {"number": [0, 1], "contains": [2]}
    assert not found.faults


def test_bad_rows_are_found_by_kind_and_the_rest_is_read(tmp_path: Path) -> None:
    problems = opened(
        tmp_path,
        {"prompt": "What is 1?", "answer": 1, "id": "same"},
        {"prompt": "What is 2?", "answer": "two or three"},
        "{oops",
        {"prompt": "What is 3?", "answer": 3, "id": "same"},
        {"prompt": "What is 4?", "answer": "four or five"},
        {"prompt": "What is 6?"},
        {"prompt": "What is 5?", "answer": 5},
    )
    found = summarize(problems)
    assert found.indices.tolist() == [0, 6]
    assert len(found.faults) == 5
    assert sorted(found.faults.counts.values()) == [1, 1, 1, 2]
    kind, count = found.faults.counts.most_common(1)[0]
    assert (kind, count) == (
        "no completion can match the answer ... under the verifier number",
        2,
    )
    where = [error.where.rpartition("/")[2] for error in found.faults.listed[kind]]
    assert where == ["rows.jsonl:2", "rows.jsonl:5"]
    places = {error.where[-1] for errors in found.faults.listed.values() for error in errors}
    assert places == {"2", "3", "4", "5", "6"}


def test_the_first_rows_of_a_kind_are_listed() -> None:
    faults = Faults()
    for i in range(MAX_LISTED + 5):
        faults.add(UserError(f"the answer '{i} \\' \"x\"' is {i}.5", where=f"a:{i}"))
    [(kind, errors)] = faults.listed.items()
    assert len(faults) == faults.counts[kind] == MAX_LISTED + 5
    assert [error.where for error in errors] == [f"a:{i}" for i in range(MAX_LISTED)]


def test_repetitions_and_contradictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    story = "Anna has 12 apples and buys 30 more at the market. How many apples are hers then?"
    problems = opened(
        tmp_path,
        "{bad",
        {"prompt": "What is 1 + 1?", "answer": 2},
        {"prompt": story, "answer": 42},
        {"prompt": "what is 1+1", "answer": 2},
        {"prompt": story.replace("Anna", "Eve"), "answer": 42},
        {"prompt": "What is 1 +1 ?", "answer": 3},
    )
    found = summarize(problems)
    assert found.repetitions.tolist() == [[3, 1], [5, 1]]
    assert found.contradictions.tolist() == [[5, 1]]
    pairs, compared = found.similar(problems)
    assert (pairs.tolist(), compared) == ([[2, 4]], 3)
    monkeypatch.setattr(report, "MAX_COMPARED", 2)
    assert found.similar(problems)[1] == 2


def test_rows_are_counted_while_they_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "AT_ONCE", 2)
    counts: list[int] = []
    problems = opened(tmp_path, *({"prompt": f"{i}?", "answer": i} for i in range(5)))
    assert len(summarize(problems, counts.append).indices) == 5
    assert counts == [2, 4, 5]


def test_trials_of_a_verifier() -> None:
    one, other = (
        Problem(id=answer, domain="d", prompt="?", answer=answer, verifier="choice")
        for answer in "AB"
    )
    tried = trials([one, other])
    assert [what for what, _ in tried] == ["right answer", "another answer", "no answer"]
    judged = [judge(one, completion) for _, completion in tried]
    assert [judgement.score for judgement in judged] == [1, 0, 0]
    assert judged[2].answer is None and judged[2].reason
    assert [what for what, _ in trials([one])] == ["right answer", "no answer"]


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=300), st.integers(2, 12))
def test_histogram_counts_every_value_once(values: list[int], num_bars: int) -> None:
    bars = histogram(values, num_bars)
    assert 1 <= len(bars) <= num_bars
    assert sum(bar.count for bar in bars) == len(values)
    for i, bar in enumerate(bars):
        if i:
            previous = bars[i - 1].high
            assert previous is not None and bar.low == previous + 1
        inside = [v for v in values if bar.low <= v and (bar.high is None or v <= bar.high)]
        assert bar.count == len(inside)
    assert bars[0].low <= min(values)
    assert bars[-1].high is None or bars[-1].high >= max(values)


def test_histogram_is_not_squeezed_by_one_long_prompt() -> None:
    bars = histogram([*range(100, 300), 100_000])
    assert len(bars) > 5
    assert bars[-1].high is None and bars[-1].name.endswith("or more")
    assert histogram([]) == []
    assert [bar.name for bar in histogram([7, 7, 8])] == ["7", "8"]
    assert histogram(np.array([1000, 2999]))[0].name == "1,000 to 1,199"
