"""The problems of each step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.stream import ProblemStream
from rosd_fast.errors import UserError
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
