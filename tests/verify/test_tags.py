"""Where an answer is looked for, and what markup around it means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.verify.markup import unwrap
from rosd_fast.verify.tags import find_answer, last_answer, last_boxed, last_hashes, last_line


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("no tag: 4", None),
        ("<answer>4</answer>", "4"),
        ("<answer>\n4\n</answer> bye", "4"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>4</answer> and then <answer>5", "4"),
        ("<answer>4</answer> stray </answer>", "4"),
        ("<answer><answer>4</answer></answer>", "4"),
        ("</answer>4<answer>", None),
        ("<answer></answer>", ""),
    ],
)
def test_last_answer(completion: str, answer: str | None) -> None:
    assert last_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("no box", None),
        (r"\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\frac{1}{2}} or so", r"\frac{1}{2}"),
        (r"\boxed{4}, no: \boxed{5}.", "5"),
        (r"\boxed{4} and then \boxed{5", "4"),
        (r"{ \boxed{4}", "4"),
        (r"} \boxed{4}", "4"),
        (r"\boxed{\boxed{4}}", r"\boxed{4}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{", None),
        (r"\boxed", None),
        (r"\boxed{}", ""),
        ("boxed{4}", None),
    ],
)
def test_last_boxed(completion: str, answer: str | None) -> None:
    assert last_boxed(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so\n#### 42", "42"),
        ("so\n####42\n\n", "42"),
        ("#### 42\nand so on", None),
        ("so #### 42", None),
        ("### 42", None),
        ("", None),
    ],
)
def test_last_hashes(completion: str, answer: str | None) -> None:
    assert last_hashes(completion) == answer


def test_the_tag_comes_before_the_box_and_the_box_before_the_hashes() -> None:
    assert find_answer("<answer>1</answer> \\boxed{2}\n#### 3") == "1"
    assert find_answer("\\boxed{2}\n#### 3") == "2"
    assert find_answer("<answer>1 \\boxed{2}\n#### 3") == "2"
    assert find_answer("so\n#### 3") == "3"
    assert find_answer("The answer is 3") is None


def test_last_line() -> None:
    assert last_line("a\n b \n\n") == "b"
    assert last_line(" \n") is None


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("**B**", "B"),
        (r" **\boxed{ \text{B} }** ", "B"),
        ("$$x$$", "x"),
        (r"\[x\]", "x"),
        (r"\(x\)", "x"),
        ("**1** or **2**", "**1** or **2**"),
        ("$1$ or $2$", "$1$ or $2$"),
        (r"\text{1} or \text{2}", r"\text{1} or \text{2}"),
        (r"\text{1\} or \text{2}", r"\text{1\} or \text{2}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("$5", "$5"),
        ("$", "$"),
        ("$$", "$$"),
        ("****", "****"),
        (r"\text{}", ""),
        ("__init__", "__init__"),
    ],
)
def test_unwrap(text: str, inner: str) -> None:
    assert unwrap(text) == inner


LAYERS = ("**{}**", "`{}`", "${}$", r"\({}\)", r"\boxed{{{}}}", r" \text{{{}}} ")


@given(
    st.text("ab 1,.", min_size=1, max_size=8).filter(str.strip),
    st.lists(
        st.sampled_from(["**{}**", "`{}`", "${}$", r"\({}\)", r"\boxed{{{}}}", r" \text{{{}}} "])
    ),
)
def test_markup_around_a_text_goes(text: str, layers: list[str]) -> None:
    wrapped = text
    for layer in dict.fromkeys(layers):  # each once: "****x****" is no markup
        wrapped = layer.format(wrapped)
    assert unwrap(wrapped) == text.strip()


@given(st.text("a{}\\$*` ", max_size=30), st.text("ab <>/#\n", max_size=30))
def test_an_answer_is_part_of_the_completion(one: str, two: str) -> None:
    for text in (one, two, f"{one}\\boxed{{{two}", f"\\boxed{{{one}}} {two}"):
        found = find_answer(text)
        assert found is None or found in text
