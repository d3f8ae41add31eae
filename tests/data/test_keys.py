"""Keys: which texts are the same problem."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.keys import as_keys, first_seen, normal_text, problem_key, repeated
from rosd_fast.types import Message

SAME = [
    ("What is 2 + 2?", "what is 2+2 ?"),
    ("What is 2 + 2?", "WHAT  IS\n2 +\t2"),
    ("Anna has 5 apples, and Ben has 3.", "Anna has 5 apples and Ben has 3"),
    ("“Quoted” – dashed", '"quoted" - Dashed'),
    ("ｆｕｌｌ ｗｉｄｔｈ", "full width"),
    ("ros\u00e9", "rose\u0301"),
    ("no\u00a0break \u200bhere\ufeff", "no break here"),
    ("Straße", "STRASSE"),
]
DIFFERENT = [
    ("What is 2 + 2?", "What is 2 - 2?"),
    ("What is 2 + 3?", "What is 2 + 4?"),
    ("What is 10² + 1?", "What is 102 + 1?"),
    ("What is 1.5 + 1?", "What is 15 + 1?"),
    ("Sort 12 3", "Sort 1 23"),
    ("What is 2 * (3 + 4)?", "What is 2 * 3 + 4?"),
    ("What is 5! ?", "What is 5?"),
    ("What is f'(x)?", "What is f(x)?"),
    ("now here", "nowhere"),
    ("x < 3", "x > 3"),
    ("...", "???"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_problem_written_otherwise(one: str, other: str) -> None:
    assert normal_text(one) == normal_text(other)
    assert problem_key(one) == problem_key(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_problems(one: str, other: str) -> None:
    assert problem_key(one) != problem_key(other)


def test_the_turns_before_belong_to_the_problem() -> None:
    turns = (Message(role="user", content="Hello"), Message(role="assistant", content="Hi."))
    key = problem_key("And now?", turns)
    assert key != problem_key("And now?")
    assert key != problem_key("And now?", turns[:1])
    assert key != problem_key("And now?", (turns[0], Message(role="user", content="Hi.")))
    assert key == problem_key("and now", (Message(role="user", content="hello"), turns[1]))


@given(st.text(), st.sampled_from([" ", "\n", "\t\t", "\u00a0"]))
def test_space_around_and_case_never_matter(text: str, space: str) -> None:
    assert normal_text(f"{space}{text}{space}") == normal_text(text)
    ascii_text = text.encode("ascii", "ignore").decode()
    assert normal_text(ascii_text.upper()) == normal_text(ascii_text.lower())


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_has_a_key(text: str) -> None:
    assert 0 <= problem_key(text) < 2**64


@given(st.lists(st.integers(0, 6)))
def test_repeated_names_the_first(values: list[int]) -> None:
    keys = as_keys(values)
    expected = [[i, values.index(v)] for i, v in enumerate(values) if values.index(v) < i]
    assert repeated(keys).tolist() == expected
    assert first_seen(keys) == {v: values.index(v) for v in values}


def test_keys_use_all_bits() -> None:
    keys = as_keys(problem_key(f"problem {i}") for i in range(4000))
    ones = np.unpackbits(keys.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.05
