"""Each verifier on right, wrong, odd and hostile completions."""

from __future__ import annotations

import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.types import Group, Problem, Rollout
from rosd_fast.verify import VERIFIERS, is_verifiable, verify_all

BY_TEXT = tuple(name for name in VERIFIERS if name not in ("code", "reasoning_gym"))
"""The verifiers whose right answer is any text; those of programs and exercises have own tests."""


def judged(name: str, completion: str, answer: str) -> tuple[float, str | None]:
    found = VERIFIERS[name](completion, answer)
    return found.score, found.answer


def tag(text: str) -> str:
    return f"Some steps.\n<answer>{text}</answer>"


def test_exact_ignores_case_and_spacing_only() -> None:
    verify = partial(judged, "exact")
    assert verify(tag(" Nitric \n ACID"), "nitric acid")[0] == 1.0
    assert verify(tag("nitric acid."), "nitric acid")[0] == 0.0
    assert verify("nitric acid", "nitric acid") == (0.0, None)
    assert verify(tag(""), "")[0] == 0.0


@pytest.mark.parametrize(
    "found", ["**Nitric acid**", r"\boxed{\text{nitric acid}}", "`nitric acid`"]
)
def test_exact_ignores_markup_around_the_answer(found: str) -> None:
    assert judged("exact", tag(found), "nitric acid")[0] == 1.0
    assert judged("exact", found, "nitric acid")[0] == float("boxed" in found)


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        ("nitric acid or water", "nitric acid"),
        ("**nitric acid** or **water**", "nitric acid"),
        ("not nitric acid", "nitric acid"),
        ("The answer is nitric acid", "nitric acid"),
        ("init", "__init__"),
        ("B", "**B**"),
        ("3 4", "34"),
        ('"1"', "1"),
    ],
)
def test_exact_refuses_other_words(found: str, answer: str) -> None:
    assert judged("exact", tag(found), answer)[0] == 0.0


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


def test_contains_gives_the_last_line_as_the_answer() -> None:
    found = VERIFIERS["contains"]("It may be\n 13, I think \n", "12")
    assert found.answer == "13, I think" and found.reason == "the right answer does not occur in it"
    assert VERIFIERS["contains"]("", "12").answer is None


def test_contains_takes_signs_and_brackets_literally() -> None:
    assert judged("contains", "so (a+b)* it is", "(A+B)*")[0] == 1.0
    assert judged("contains", "so aab it is", "a.b")[0] == 0.0


@pytest.mark.parametrize("name", BY_TEXT)
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
        r"\boxed{" * 20_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        tag(r"\boxed{" * 20_000 + "}" * 20_000),
        tag(r"\text{" * 20_000 + "B" + "}" * 20_000),
        tag("\\" * 100_000),
        tag("**" * 50_000),
        tag("$" * 100_000),
        tag("8 " * 50_000),
        tag("8 " + "clips " * 20_000),
        tag("the answer is " * 10_000 + "8"),
        tag("answer answer " * 10_000),
        tag("(" * 40 + " " * 100_000),
        tag(r"\frac" * 30_000),
        tag("7e" + "0" * 100_000 + "1"),
        tag(r"8 \times 10^{" + "9" * 50_000 + "}"),
        "#" * 100_000,
        "#### " * 30_000,
        "\n" * 50_000 + "####" + "\n" * 50_000,
        "Action: a\n" * 10_000,
        "Action Input: {" * 10_000,
        "Action: a\nAction Input: {" * 5_000,
        "Action: a\nAction Input: " + "[" * 50_000,
        "Action: a\nAction Input: " + "9" * 50_000,
        tag("[" * 50_000),
        tag("[" + "{}," * 20_000),
    ],
    ids=range(37),
)
def test_hostile_text_is_wrong_and_fast(name: str, hostile: str) -> None:
    start = time.process_time()
    score, _ = judged(name, hostile, "7")
    assert score == 0.0
    assert time.process_time() - start < 1.0  # some ms when linear, minutes when quadratic


@given(st.sampled_from(BY_TEXT), st.text(max_size=40), st.text(max_size=10))
def test_scores_are_in_range_for_any_text(name: str, text: str, answer: str) -> None:
    for completion in (text, tag(text)):
        score, found = judged(name, completion, answer)
        assert score in (0.0, 1.0)
        assert found is None or isinstance(found, str)


@given(st.sampled_from(BY_TEXT), st.text(max_size=40), st.text(max_size=10))
def test_every_score_below_one_has_a_reason(name: str, text: str, answer: str) -> None:
    for completion in (text, tag(text)):
        found = VERIFIERS[name](completion, answer)
        assert (found.reason is None) == (found.score == 1.0)


@pytest.mark.parametrize("name", VERIFIERS)
def test_an_instruction_is_known_again_in_a_prompt(name: str) -> None:
    verifier = VERIFIERS[name]
    if verifier.instruction:
        assert not verifier.is_instructed("What is 2 + 2?")
        assert verifier.is_instructed(f"What is 2 + 2?\n\n{verifier.instruction}")
        for mark in verifier.marks:
            assert verifier.is_instructed("What is 2 + 2?", None, f"Answer like this: {mark}")


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
