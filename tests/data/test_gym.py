"""Exercises of reasoning_gym as rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from rosd_fast.data.gym import GymRows, mark_tuples
from rosd_fast.data.shapes import recognize
from rosd_fast.data.sources import parse_sources
from rosd_fast.errors import UserError
from rosd_fast.types import Problem


def open_one(text: str) -> GymRows:
    (source,) = parse_sources(text)
    return GymRows(source)


def error_of(text: str) -> str:
    with pytest.raises(UserError) as caught:
        open_one(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def problems_of(text: str) -> list[Problem]:
    (source,) = parse_sources(text)
    rows = GymRows(source)
    shape = recognize([rows[0]], source)
    assert shape.name == "reasoning_gym"
    return [
        shape.problem(rows[i], where=rows.where(i), source=source, folder=rows.folder, number=i + 1)
        for i in range(len(rows))
    ]


def unmarked(text: str) -> Any:
    """The exercise of an answer, with the tuples that its scorer was written for."""

    def restore(value: dict[str, Any]) -> Any:
        return tuple(value["__tuple__"]) if value.keys() == {"__tuple__"} else value

    return json.loads(text, object_hook=restore)


def test_exercises_are_made_by_index_and_equal_each_time() -> None:
    rows = open_one("reasoning_gym:leg_counting@size=5@seed=3")
    assert len(rows) == 5 and rows.where(4) == "reasoning_gym:leg_counting, exercise 5"
    backwards = [rows[i] for i in reversed(range(5))]
    again = open_one("reasoning_gym:leg_counting@size=9@seed=3")
    assert backwards == [again[i] for i in reversed(range(5))]
    assert len({row["question"] for row in backwards}) == 5
    with pytest.raises(IndexError):
        rows[5]


def test_seeds_of_two_splits_must_lie_apart() -> None:
    first, next_one = (open_one(f"reasoning_gym:chain_sum@size=5@seed={seed}") for seed in (0, 1))
    assert first[1]["question"] == next_one[0]["question"]


def test_options_have_the_types_of_the_task() -> None:
    rows = open_one("reasoning_gym:basic_arithmetic@size=20@operators=+@max_digits=2")
    assert all(set(rows[i]["question"]) <= set("Calculate 0123456789+().-") for i in range(20))
    assert len(open_one("reasoning_gym:leg_counting")) == 1000


@pytest.mark.parametrize(
    "task",
    ["leg_counting", "graph_color", "propositional_logic", "rubiks_cube", "arc_agi", "rearc"],
)
def test_the_right_answer_of_an_exercise_scores_1(task: str) -> None:
    from reasoning_gym import create_dataset

    scorer = create_dataset(task)
    for problem in problems_of(f"reasoning_gym:{task}@size=3"):
        assert (problem.domain, problem.verifier) == (task, "reasoning_gym")
        entry = unmarked(problem.answer)
        assert scorer.score_answer(entry["answer"], entry) == 1.0
        assert scorer.score_answer("?", entry) < 1.0


def test_tuples_survive_json() -> None:
    value = {"a": [(1, (2, "x"))], "b": {"c": ()}}
    assert unmarked(json.dumps(mark_tuples(value))) == value


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("reasoning_gym:leg_countin", ["has no task 'leg_countin'", "mean leg_counting"]),
        ("reasoning_gym:", ["names no task", "Tasks are ab, acre,", "zebra_puzzles"]),
        ("reasoning_gym:chain_sum@sizes=5", ["has no option sizes", "mean size?", "min_terms=2"]),
        ("reasoning_gym:chain_sum@size=x", ["the option size is 'x'"]),
        ("reasoning_gym:chain_sum@size=0", ["size is below 1"]),
        ("reasoning_gym:leg_counting@min_animals=20", ["refuses its options", "max_animals=10"]),
        ("reasoning_gym:rush_hour", ["come without a right answer"]),
    ],
)
def test_what_does_not_exist_is_named(text: str, parts: list[str]) -> None:
    message = error_of(text)
    assert message.startswith(text.partition("@")[0] + ": ")
    for part in parts:
        assert part in message
