"""Each verifier on right, wrong, odd and hostile completions."""

from __future__ import annotations

import time
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.types import Group, Problem, Rollout
from rosd_fast.verify import VERIFIERS, is_verifiable, verify_all
from rosd_fast.verify.number import parse_number
from rosd_fast.verify.tags import last_answer


def judged(name: str, completion: str, answer: str) -> tuple[float, str | None]:
    found = VERIFIERS[name](completion, answer)
    return found.score, found.answer


def tag(text: str) -> str:
    return f"Some steps.\n<answer>{text}</answer>"


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
    ("found", "answer"),
    [
        ("42", "42"),
        (" 42. ", "42"),
        ("+42", "42.0"),
        ("- 7", "-7"),
        ("\u22127", "-7"),
        ("1,234,567", "1234567"),
        ("1 234", "1234"),
        ("1,234.50", "1234.5"),
        (".5", "1/2"),
        ("0.5", " 2 / 4"),
        ("-3/4", "-0.75"),
        ("-0", "0"),
    ],
)
def test_equal_numbers(found: str, answer: str) -> None:
    assert judged("number", tag(found), answer) == (1.0, found.strip())


@pytest.mark.parametrize(
    "found",
    [
        "",
        ".",
        "41",
        "42 coins",
        "4 2",
        "4,2",
        "42e0",
        "1/0",
        "0x2a",
        "six",
        "42/",
        "/42",
        "\u0664\u0662",
    ],
)
def test_other_texts_are_wrong(found: str) -> None:
    assert judged("number", tag(found), "42") == (0.0, found)


def test_a_number_outside_of_the_tag_does_not_count() -> None:
    assert judged("number", "The answer is 42", "42") == (0.0, None)


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_compared_exactly(top: int, bottom: int) -> None:
    assert parse_number(f"{top}/{bottom}") == Fraction(top, bottom)
    assert parse_number(f"{top:,}.") == top
    assert judged("number", tag(f"{top}"), f"{top + 1}")[0] == 0.0


@pytest.mark.parametrize("found", ["B", "b", "(B)", "(b)", "B.", "B)", "\nB\n", "( B )"])
def test_the_right_letter(found: str) -> None:
    assert judged("choice", tag(found), "B") == (1.0, "B")
    assert judged("choice", tag(found), "A") == (0.0, "B")


@pytest.mark.parametrize("found", ["", "B: 1.4", "AB", "A or B", "option B", "1.4", "?"])
def test_anything_but_a_letter_is_wrong(found: str) -> None:
    assert judged("choice", tag(found), "B") == (0.0, found)


def test_exact_ignores_case_and_spacing_only() -> None:
    verify = partial(judged, "exact")
    assert verify(tag(" Nitric \n ACID"), "nitric acid")[0] == 1.0
    assert verify(tag("nitric acid."), "nitric acid")[0] == 0.0
    assert verify("nitric acid", "nitric acid") == (0.0, None)
    assert verify(tag(""), "")[0] == 0.0


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("It is 12, I think", 1.0),
        ("It is 123", 0.0),
        ("It is a12", 0.0),
        ("12", 1.0),
        ("", 0.0),
    ],
)
def test_contains_matches_whole_words(completion: str, score: float) -> None:
    assert judged("contains", completion, "12")[0] == score


def test_contains_takes_signs_and_brackets_literally() -> None:
    assert judged("contains", "so (a+b)* it is", "(A+B)*")[0] == 1.0
    assert judged("contains", "so aab it is", "a.b")[0] == 0.0


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize(
    "hostile",
    [
        "<answer>" * 20_000,
        "</answer>" * 20_000,
        "<answer>" * 10_000 + "</answer>" * 10_000,
        tag("9" * 100_000),
        tag("1/" * 50_000),
        tag("1,111" * 20_000),
        tag("1e999999999"),
        tag("(" * 100_000),
        tag(" " * 100_000 + "x" + " " * 100_000),
        "a" * 100_000,
        "a " * 50_000,
        "\ud800\x00" * 50_000,
    ],
    ids=range(12),
)
def test_hostile_text_is_wrong_and_fast(name: str, hostile: str) -> None:
    start = time.process_time()
    score, _ = judged(name, hostile, "7")
    assert score == 0.0
    assert time.process_time() - start < 1.0  # some ms when linear, minutes when quadratic


@given(st.sampled_from(sorted(VERIFIERS)), st.text(max_size=40), st.text(max_size=10))
def test_scores_are_in_range_for_any_text(name: str, text: str, answer: str) -> None:
    for completion in (text, tag(text)):
        score, found = judged(name, completion, answer)
        assert score in (0.0, 1.0)
        assert found is None or isinstance(found, str)


def test_is_verifiable() -> None:
    assert is_verifiable("number", "1,000") and not is_verifiable("number", "ten")
    assert is_verifiable("choice", "c") and not is_verifiable("choice", "42")
    assert is_verifiable("exact", "ten") and not is_verifiable("exact", " ")


def make_group(verifier: str, texts: list[str]) -> Group:
    problem = Problem(id="p:1", domain="p", prompt="2 + 2 = ?", answer="4", verifier=verifier)
    rollouts = tuple(
        Rollout(
            id=f"p:1/{index}",
            problem_id="p:1",
            prompt_ids=(1,),
            completion_ids=(2,),
            logprobs=(-0.5,),
            text=text,
            finish_reason="stop",
            policy_version=0,
        )
        for index, text in enumerate(texts)
    )
    return Group(problem=problem, rollouts=rollouts)


def test_verify_all_gives_one_verdict_per_rollout() -> None:
    verdicts = verify_all([make_group("number", [tag("4"), tag("5"), "none"])], threshold=1.0)
    assert list(verdicts) == ["p:1/0", "p:1/1", "p:1/2"]
    assert [v.success for v in verdicts.values()] == [True, False, False]
    assert [v.answer for v in verdicts.values()] == ["4", "5", None]
    assert all(verdicts[name].rollout_id == name for name in verdicts)


def test_verify_all_refuses_an_unknown_verifier() -> None:
    with pytest.raises(ValueError, match=r"verifier is 'magic', must be one of number, choice"):
        verify_all([make_group("magic", ["4"])], threshold=1.0)
