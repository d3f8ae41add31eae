"""The problems of each step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.config import DataConfig
from rosd_fast.data.collection import Problems
from rosd_fast.data.problems import load_problems
from rosd_fast.data.stream import ProblemStream, num_draws, weighted_order
from rosd_fast.errors import RunFailed, UserError
from rosd_fast.types import Problem


def make_problems(count: int) -> list[Problem]:
    return [
        Problem(id=f"p:{i}", domain="p", prompt="x", answer="1", verifier="number")
        for i in range(count)
    ]


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 5), st.booleans())
def test_batches_hold_distinct_problems_and_depend_on_the_step_alone(
    batch_size: int, extra: int, seed: int, shuffle: bool
) -> None:
    problems = make_problems(batch_size + extra)
    stream = ProblemStream(problems, batch_size=batch_size, seed=seed, shuffle=shuffle)
    other = ProblemStream(problems, batch_size=batch_size, seed=seed, shuffle=shuffle)
    steps = list(range(1, 8))
    batches = {step: stream.batch(step) for step in steps}
    for step in reversed(steps):
        assert other.batch(step) == batches[step]
        assert len({p.id for p in batches[step]}) == batch_size


def test_an_epoch_has_each_problem_once_and_the_next_a_new_order() -> None:
    problems = make_problems(12)
    stream = ProblemStream(problems, batch_size=4, seed=0, shuffle=True)
    ids = [p.id for step in range(1, 7) for p in stream.batch(step)]
    assert sorted(ids[:12]) == sorted(ids[12:]) == sorted(p.id for p in problems)
    assert ids[:12] != ids[12:]
    other = ProblemStream(problems, batch_size=4, seed=1, shuffle=True)
    assert [p.id for step in range(1, 4) for p in other.batch(step)] != ids[:12]


def test_without_shuffling_problems_come_in_file_order() -> None:
    stream = ProblemStream(make_problems(5), batch_size=3, seed=0, shuffle=False)
    assert [p.id for p in stream.batch(2)] == ["p:3", "p:4", "p:0"]


def test_fewer_problems_than_a_batch() -> None:
    with pytest.raises(UserError, match=r"has 3 problems, fewer than the 4 of a step"):
        ProblemStream(make_problems(3), batch_size=4, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="step is 0"):
        ProblemStream(make_problems(3), batch_size=3, seed=0, shuffle=True).batch(0)


@pytest.mark.parametrize(
    ("count", "batch_size", "seed", "shuffle", "steps"),
    [
        (11, 4, 0, True, {1: [4, 6, 7, 2], 2: [0, 3, 5, 10], 3: [7, 1, 10, 3], 5: [10, 2, 1, 0]}),
        (11, 4, 7, True, {1: [4, 6, 10, 0], 4: [7, 8, 1, 3], 5: [1, 5, 3, 4]}),
        (7, 3, 0, False, {1: [0, 1, 2], 3: [6, 0, 1], 4: [2, 3, 4], 5: [5, 6, 0]}),
        (3000, 8, 0, True, {1: [1432, 2618, 562, 46, 2847, 2986, 785, 68]}),
        (3000, 8, 0, True, {376: [558, 202, 283, 2322, 1972, 2489, 1239, 1426]}),
        (3000, 8, 0, True, {1000: [233, 1454, 716, 353, 684, 2562, 1646, 1663]}),
    ],
)
def test_batches_stay_as_they_were_when_runs_began(
    count: int, batch_size: int, seed: int, shuffle: bool, steps: dict[int, list[int]]
) -> None:
    """A run of an older version resumes with the same batches."""
    problems = make_problems(count)
    stream = ProblemStream(problems, batch_size=batch_size, seed=seed, shuffle=shuffle)
    for step, indices in steps.items():
        assert [p.id for p in stream.batch(step)] == [f"p:{i}" for i in indices]


def write(folder: Path, name: str, rows: Sequence[str]) -> str:
    path = folder / name
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def good_row(name: str) -> str:
    return json.dumps({"id": name, "prompt": "x", "answer": "1", "verifier": "number"})


def read(text: str, **options: Any) -> Problems:
    return load_problems(text, data=DataConfig(**options))


def test_a_data_set_on_disk_has_the_batches_of_one_in_memory(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", [good_row(f"p:{i}") for i in range(11)])
    for options in ({}, {"check_rows": 4}):
        stream = ProblemStream(read(source, **options), batch_size=4, seed=0, shuffle=True)
        assert [p.id for p in stream.batch(1)] == [f"p:{i}" for i in (4, 6, 7, 2)]
        assert [p.id for p in stream.batch(2)] == [f"p:{i}" for i in (0, 3, 5, 10)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.75]), min_size=4, max_size=4),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_an_epoch_draws_each_source_by_its_weight(
    sizes: list[int], weights: list[float], seed: int, shuffle: bool
) -> None:
    weights = weights[: len(sizes)]
    order = weighted_order(sizes, weights, np.random.default_rng(seed), shuffle=shuffle)
    counts = np.bincount(order, minlength=sum(sizes))
    bounds = np.cumsum([0, *sizes])
    for size, weight, start, end in zip(sizes, weights, bounds, bounds[1:], strict=False):
        own = counts[start:end]
        assert own.sum() == num_draws(size, weight)
        assert abs(own.sum() - size * weight) <= 0.5 or own.sum() == 1
        assert own.min() >= int(weight) and own.max() <= int(weight) + 1


@given(st.integers(0, 5), st.booleans())
def test_copies_of_a_problem_are_spread_over_the_epoch(seed: int, shuffle: bool) -> None:
    order = weighted_order([10, 50], [4.0, 1.0], np.random.default_rng(seed), shuffle=shuffle)
    for place in range(10):
        quarters = np.flatnonzero(order == place) * 4 // len(order)
        assert np.abs(quarters - np.arange(4)).max() <= 1  # one in each, but for the bounds


def test_weights_count_in_batches_which_resume(tmp_path: Path) -> None:
    first = write(tmp_path, "a.jsonl", [good_row(f"a:{i}") for i in range(20)])
    second = write(tmp_path, "b.jsonl", [good_row(f"b:{i}") for i in range(20)])
    problems = read(f"{first}@weight=2,{second}@weight=0.5")
    stream = ProblemStream(problems, batch_size=5, seed=0, shuffle=True)
    assert stream.steps_per_epoch == 10
    batches = {step: [p.id for p in stream.batch(step)] for step in range(1, 31)}
    assert all(len(set(batch)) == 5 for batch in batches.values())
    epochs = [[n for step in range(s, s + 10) for n in batches[step]] for s in (1, 11, 21)]
    for epoch in epochs:
        assert sum(name.startswith("a:") for name in epoch) == 40
    drawn = [{name for name in epoch if name.startswith("b:")} for epoch in epochs]
    assert [len(names) for names in drawn] == [10, 10, 10] and drawn[0] != drawn[1]
    again = ProblemStream(problems, batch_size=5, seed=0, shuffle=True)
    assert [p.id for p in again.batch(23)] == batches[23]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 6])
def test_a_batch_never_has_a_problem_twice(tmp_path: Path, batch_size: int, shuffle: bool) -> None:
    """Even where a problem has more copies than the epoch has batches."""
    first = write(tmp_path, "a.jsonl", [good_row("a")])
    second = write(tmp_path, "b.jsonl", [good_row(f"b:{i}") for i in range(5)])
    problems = read(f"{first}@weight=9,{second}")
    stream = ProblemStream(problems, batch_size=batch_size, seed=0, shuffle=shuffle)
    for step in range(1, 20):
        assert len({p.id for p in stream.batch(step)}) == batch_size


def test_weights_that_leave_too_few_problems(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", [good_row(f"a:{i}") for i in range(20)])
    with pytest.raises(
        UserError, match=r"has 5 problems per epoch by its weights, fewer than the 8"
    ):
        ProblemStream(read(f"{source}@weight=0.25"), batch_size=8, seed=0, shuffle=True)


BAD_ROWS = {
    3: "{",
    4: '{"prompt": "x"}',
    8: good_row("p:7"),
    11: good_row("c").replace('"1"', '"z"'),
}


def with_bad_rows(folder: Path) -> Problems:
    """Twelve rows, of which the first and the seventh were checked; four others are bad."""
    rows = [BAD_ROWS.get(i, good_row(f"p:{i}")) for i in range(12)]
    return read(write(folder, "a.jsonl", rows), check_rows=2)


def test_the_next_good_row_takes_the_place_of_a_bad_one(tmp_path: Path) -> None:
    stream = ProblemStream(with_bad_rows(tmp_path), batch_size=4, seed=0, shuffle=False)
    first, second, third = (stream.draw(step) for step in (1, 2, 3))
    assert [p.id for p in first.problems] == ["p:0", "p:1", "p:2", "p:5"]
    assert [text.partition(": ")[0] for text in first.bad] == [
        f"{tmp_path}/a.jsonl:{n}" for n in (4, 5)
    ]
    assert "malformed JSON" in first.bad[0] and 'the field "answer" is missing' in first.bad[1]
    assert [p.id for p in second.problems] == ["p:7", "p:5", "p:6", "p:9"]
    assert second.bad[1] == f"{tmp_path}/a.jsonl:8: the id 'p:7' is in this step twice"
    assert [p.id for p in third.problems] == ["p:7", "p:9", "p:10", "p:0"]
    assert "no completion can match the answer 'z'" in third.bad[0]


def test_replacements_depend_on_the_step_alone(tmp_path: Path) -> None:
    problems = with_bad_rows(tmp_path)
    streams = [ProblemStream(problems, batch_size=3, seed=1, shuffle=True) for _ in range(2)]
    drawn = {step: streams[0].draw(step) for step in range(1, 13)}
    for step in (7, 2, 12, 1):
        assert streams[1].draw(step) == drawn[step]
    assert all(len({p.id for p in draw.problems}) == 3 for draw in drawn.values())
    assert sum(len(draw.bad) for draw in drawn.values()) >= 9  # three bad rows in three epochs


def test_a_check_of_ones_own_counts_for_rows_that_were_not_checked(tmp_path: Path) -> None:
    def check(problem: Problem) -> None:
        if problem.id in ("p:1", "p:2"):
            raise UserError("is too long", where=f"problem {problem.id}")

    source = write(tmp_path, "a.jsonl", [good_row(f"p:{i}") for i in range(6)])
    late = ProblemStream(read(source, check_rows=1), batch_size=2, seed=0, shuffle=False)
    drawn = late.with_check(check).draw(1)
    assert [p.id for p in drawn.problems] == ["p:0", "p:3"]
    assert drawn.bad == ("problem p:1: is too long", "problem p:2: is too long")
    assert [p.id for p in late.batch(1)] == ["p:0", "p:1"]
    known = ProblemStream(read(source), batch_size=2, seed=0, shuffle=False).with_check(check)
    assert [p.id for p in known.batch(1)] == ["p:0", "p:1"]


def test_too_many_bad_rows_end_the_run(tmp_path: Path) -> None:
    rows = [good_row("p:0"), *["{"] * 9]
    problems = read(write(tmp_path, "a.jsonl", rows), check_rows=1)
    stream = ProblemStream(problems, batch_size=2, seed=0, shuffle=False)
    with pytest.raises(RunFailed, match=r"no row is left for a step. .*a\.jsonl:\d+: malformed"):
        stream.draw(1)
