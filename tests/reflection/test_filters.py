"""Explanations that leak the answer, are empty, or are copied."""

from __future__ import annotations

import pytest

from rosd_fast.config import ReflectConfig
from rosd_fast.reflection.filters import answer_pattern, apply_filters, copied_frac
from rosd_fast.types import Reflection

SOLUTION = "First add the ones of both numbers and carry what is over nine to the tens. It is 42."


def gate(
    make_group,
    explanation: str | None,
    *,
    answer: str = "42",
    shown: str = "p0/1",
    reference: str | None = None,
    **options,
) -> Reflection:
    texts = ["It is 41.", SOLUTION]
    group, _ = make_group(texts, [0.0, 1.0], answer=answer, reference=reference)
    reflection = Reflection(
        rollout_id="p0/0",
        demonstration_id=shown,
        correct=False,
        text="",
        quote="41",
        explanation=explanation,
        well_formed=True,
        num_tokens=1,
    )
    return apply_filters({"p0/0": reflection}, [group], ReflectConfig(**options))["p0/0"]


@pytest.mark.parametrize(
    ("leak", "explanation", "refused"),
    [
        ("keep", "So it is 42.", None),
        ("redact", "So it is [...].", None),
        ("drop", None, "leak"),
    ],
)
def test_leaks(make_group, leak, explanation, refused):
    found = gate(make_group, "So it is 42.", leak=leak)
    assert (found.explanation, found.refused, found.leaks) == (explanation, refused, True)
    found = gate(make_group, "So it is 42.5 or 142.", leak=leak)
    assert (found.refused, found.leaks) == (None, False)


@pytest.mark.parametrize(
    ("answer", "text", "leaks"),
    [
        ("3", "it is 3", True),
        ("3", "it is 3.", True),
        ("3", "it is 3.5", False),
        ("3", "2.3 and 1,3", False),
        ("3", "13 30 x3", False),
        ("-3", "x = -3", True),
        ("B", "the answer is (B)", True),
        ("B", "the b is", False),
        ("Sodium Chloride", "sodium chloride.", True),
        ("a.b", "axb", False),
    ],
)
def test_an_answer_is_found_as_a_whole_word(answer, text, leaks):
    pattern = answer_pattern(answer)
    assert pattern is not None
    assert (pattern.search(text) is not None) == leaks


def test_an_empty_answer_never_leaks(make_group):
    assert answer_pattern(" ") is None
    assert not gate(make_group, "anything", answer="", leak="redact").leaks


def test_empty(make_group):
    assert gate(make_group, None).refused == "empty"
    assert gate(make_group, "...").refused == "empty"
    found = gate(make_group, "Add the ones", min_explanation_words=4)
    assert (found.explanation, found.refused) == (None, "empty")
    assert gate(make_group, "Add the ones", min_explanation_words=3).refused is None


def test_copies(make_group):
    copied = "Note: add the ones of both numbers and carry what is over."
    assert copied_frac(copied, SOLUTION) == 11 / 12
    assert copied_frac("add the ones of both numbers", SOLUTION) == 0
    assert copied_frac("", SOLUTION) == 0
    assert gate(make_group, copied).refused is None
    assert gate(make_group, copied, max_copied_frac=0.95).refused is None
    found = gate(make_group, copied, max_copied_frac=0.9)
    assert (found.explanation, found.refused) == (None, "copy")


def test_copies_of_what_replaced_the_sibling(make_group):
    copied = "Note: add the ones of both numbers and carry what is over."
    options = {"max_copied_frac": 0.9, "shown": "reference"}
    assert gate(make_group, copied, reference=SOLUTION, **options).refused == "copy"
    assert gate(make_group, copied, reference="It is 42.", **options).refused is None
    options["shown"] = "answer"
    assert gate(make_group, copied, reference=SOLUTION, **options).refused is None
