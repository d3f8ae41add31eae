"""Near-duplicates: found when reworded, never when a number or the answer differs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.data.similar import CHUNK, figures, similar_pairs

STORY = (
    "Anna has 12 apples. She buys 30 more at the market on Monday, and then gives a third of all "
    "her apples to her neighbours. How many apples are left for Anna to bake a cake with?"
)
REWORDED = [
    STORY.replace("Anna", "Ben").replace("She", "He").replace("her ", "his "),
    STORY + " Please answer with a number.",
    STORY.replace("at the market on Monday", "on Monday at the market"),
]
OTHERS = [
    STORY.replace("12", "15"),
    STORY.replace("30", "40"),
    STORY.replace("a third", "a half"),
    STORY.replace("12", "30").replace("buys 30", "buys 12"),
    "What is 12 plus 30, less a third of it?",
]


@pytest.mark.parametrize("text", REWORDED)
def test_reworded_problems_are_found(text: str) -> None:
    texts = [("Something else?", "28"), (STORY, "28"), (text, "28")]
    assert similar_pairs(texts).tolist() == [[1, 2]]


@pytest.mark.parametrize("text", OTHERS)
def test_other_figures_make_another_problem(text: str) -> None:
    assert similar_pairs([(STORY, "28"), (text, "28")]).tolist() == []


def test_another_answer_makes_another_problem() -> None:
    assert similar_pairs([(STORY, "28"), (REWORDED[0], "27")]).tolist() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "Solve the equation for the unknown: x + 3 = 5",
            "Solve the equation for the unknown: x - 3 = 5",
        ),
        (
            "Name the compound with the formula NaCl, please",
            "Name the compound with the formula KCl, please",
        ),
        (
            "Give the mass of the molecule c1ccccc1 in grams",
            "Give the mass of the molecule C1CCCCC1 in grams",
        ),
        (
            "Differentiate this function with respect to y now",
            "Differentiate this function with respect to x now",
        ),
    ],
)
def test_formulas_names_and_variables_are_figures(one: str, other: str) -> None:
    assert similar_pairs([(one, "B"), (other, "B")]).tolist() == []


def test_a_hyphen_is_no_minus() -> None:
    assert figures("a well-known man, 3 - 1 and x-1, a-b") == ["3", "-", "1", "x", "-", "1", "a-b"]


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["pens", "books", "stamps"]))
def test_a_template_with_another_number_is_never_similar(a: int, b: int, what: str) -> None:
    template = "Eva has {} pens in a box, and finds 10 of them. How many {} has Eva now?"
    pairs = similar_pairs([(template.format(a, what), "5"), (template.format(b, what), "5")])
    assert pairs.tolist() == ([[0, 1]] if a == b else [])


@given(st.permutations(range(12)))
def test_the_order_of_the_texts_does_not_matter(order: list[int]) -> None:
    texts = [(t, "28") for t in (STORY, *REWORDED, *OTHERS)] + [
        (f"Other {i}?", "1") for i in (1, 2, 3)
    ]
    found = similar_pairs([texts[i] for i in order])
    named = {order[i] for pair in found.tolist() for i in pair}
    assert named == {0, 1, 2, 3}


def test_many_texts_of_one_template() -> None:
    texts = [(f"{STORY} Her street has the number {i}.", "28") for i in range(CHUNK + 50)]
    assert len(similar_pairs(texts)) == 0
    words = "red blue green white black brown grey pink".split()
    colours = [f"{a} {b} {c}" for a in words for b in words for c in words]
    same = [(f"{STORY} The flags are {colour}.", "28") for colour in colours]
    pairs = similar_pairs(same)
    assert set(np.unique(pairs).tolist()) == set(range(len(same)))
    assert (pairs[:, 0] < pairs[:, 1]).all()


def test_nothing_to_compare() -> None:
    assert similar_pairs([]).shape == (0, 2)
    assert similar_pairs([("", ""), ("?", ""), ("a", "")]).shape[1] == 2
