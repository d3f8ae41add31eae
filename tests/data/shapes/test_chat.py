"""Conversations: what is the problem, what its context, and where the answer comes from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.types import Message
from tests.data.shapes.reading import error_of, read_one


def turns(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """A conversation that user and assistant take turns in."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}
ROW: dict[str, Any] = {"messages": turns("2 + 3?"), "answer": "5", "verifier": "number"}


def test_the_last_user_turn_is_the_problem_and_the_reply_the_reference() -> None:
    messages = [SYSTEM, *turns("Hello", "Hi", "2 + 3?", "2 + 3 = 5")]
    name, problem = read_one({**ROW, "messages": messages})
    assert (name, problem.prompt, problem.answer) == ("messages", "2 + 3?", "5")
    assert (problem.system, problem.reference) == ("Be brief.", "2 + 3 = 5")
    assert problem.context == (
        Message(role="user", content="Hello"),
        Message(role="assistant", content="Hi"),
    )
    assert [turn.content for turn in problem.messages] == ["Be brief.", "Hello", "Hi", "2 + 3?"]


@given(st.lists(st.sampled_from(["a", "b\n", " c"]), min_size=1, max_size=6), st.booleans())
def test_nothing_of_a_conversation_is_lost(texts: list[str], has_system: bool) -> None:
    messages = [*([SYSTEM] if has_system else []), *turns(*texts)]
    _, problem = read_one({**ROW, "messages": messages})
    shown = [turn.content for turn in problem.messages] + [problem.reference or ""]
    assert "".join(shown) == "".join(turn["content"] for turn in messages)


def test_a_column_goes_before_the_conversation() -> None:
    row = {**ROW, "messages": [SYSTEM, *turns("2 + 3?", "5")], "system": "Be kind."}
    assert read_one(row)[1].system == "Be kind."
    assert read_one({**row, "reference": "2 + 3 = 5"})[1].reference == "2 + 3 = 5"


def test_sharegpt_and_json_text() -> None:
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2 + 3?"},
        {"from": "gpt", "value": "5"},
    ]
    for value in (said, json.dumps(said)):
        name, problem = read_one({"conversations": value, "answer": 5}, verifier="number")
        assert (name, problem.system, problem.prompt) == ("messages", "Be brief.", "2 + 3?")
        assert (problem.answer, problem.reference) == ("5", "5")


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 3?"}]
    row = {**ROW, "messages": [{"role": "user", "content": parts}]}
    assert read_one(row)[1].prompt == "2 + 3?"


@pytest.mark.parametrize(
    ("reply", "answer", "verifier"),
    [
        ("2 + 3 = 5\n#### 5", "5", "number"),
        (r"It is \boxed{5}.", "5", "math"),
        ("<answer>five</answer>", "five", "exact"),
    ],
)
def test_without_a_column_the_reply_ends_in_the_answer(
    reply: str, answer: str, verifier: str
) -> None:
    option = verifier if verifier == "exact" else None
    _, problem = read_one({"messages": turns("2 + 3?", reply)}, verifier=option)
    assert (problem.answer, problem.verifier, problem.reference) == (answer, verifier, reply)


@pytest.mark.parametrize(
    ("columns", "answer", "verifier", "reference"),
    [
        ({"solution": "$x^2$"}, "$x^2$", "math", None),
        ({"solution": r"So \boxed{x}."}, "x", "math", r"So \boxed{x}."),
        ({"answer": "1 + 1 = <<1+1=2>>2\n#### 2"}, "2", "number", "1 + 1 = 2"),
        ({"ground_truth": "7", "verifier": "number"}, "7", "number", None),
    ],
)
def test_chat_lists_of_trl(
    columns: dict[str, Any], answer: str, verifier: str, reference: str | None
) -> None:
    name, problem = read_one({"prompt": [SYSTEM, *turns("2 + 3?")], **columns})
    assert (name, problem.prompt, problem.system) == ("chat", "2 + 3?", "Be brief.")
    assert (problem.answer, problem.verifier, problem.reference) == (answer, verifier, reference)


def verl(source: str, truth: Any, **columns: Any) -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": turns("2 + 3?"),
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 0},
        **columns,
    }


@pytest.mark.parametrize(
    ("row", "answer", "verifier"),
    [
        (verl("openai/gsm8k", "72"), "72", "number"),
        (verl("DigitalLearningGmbH/MATH-lighteval", r"\frac12"), r"\frac12", "math"),
        (verl("aime2024", 33), "33", "math"),
        (verl("own", "x", ability="math"), "x", "math"),
        (verl("own", "x", verifier="exact"), "x", "exact"),
        (verl("openai/gsm8k", "72", answer="73"), "73", "number"),
    ],
)
def test_rows_of_verl(row: dict[str, Any], answer: str, verifier: str) -> None:
    name, problem = read_one(row)
    assert (name, problem.answer, problem.verifier) == ("verl", answer, verifier)
    assert problem.domain == ("math" if "ability" in row else "here")


def test_code_of_verl() -> None:
    truth = json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})
    _, problem = read_one(verl("codecontests", truth))
    assert problem.verifier == "code"
    assert json.loads(problem.answer) == {"cases": [{"stdin": "1\n", "stdout": "2\n"}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "is a JSON list, not a list of turns"),
        ([SYSTEM], "has no user turn"),
        ([{"role": "assistant", "content": "5"}], "has no user turn"),
        ([{"role": "user", "content": " "}], "has an empty turn (user, turn 1)"),
        ([SYSTEM, *turns("a", "")], "has an empty turn (assistant, turn 3)"),
        ([{"role": "user", "content": 5}], "has number where turn 1 (user) needs text"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "", "content": "x"}], "has a turn without a role (turn 1)"),
        ([{"content": "x"}, *turns("a")], "has a turn without a role (turn 1)"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "is no text in turn 1 ('image_u"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "no text in turn 1"),
        ([{"role": "user", "content": [5]}], "no text in turn 1 ('number')"),
        (
            [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [1]}],
            "has calls of tools and no text where turn 2 (assistant) needs text",
        ),
        (
            [*turns("a", "b"), {"role": "tool", "content": "c"}],
            "goes on after its last user turn with assistant, tool",
        ),
    ],
)
def test_conversations_that_are_no_problem(messages: Any, message: str) -> None:
    text = error_of(ROW, ROW, {**ROW, "messages": messages})
    assert text.startswith('data.jsonl:3: the field "messages" ') and message in text


def test_an_answer_that_is_nowhere() -> None:
    text = error_of({"messages": turns("2 + 3?")})
    assert "has no reply" in text and "data.columns.answer=COLUMN" in text
    assert "has no ####" in error_of({"messages": turns("2 + 3?", "five")})
    assert "names no verifier" in error_of({"messages": turns("2 + 3?"), "answer": "5"})


def test_turns_as_text_are_a_conversation_under_every_column() -> None:
    said = json.dumps([SYSTEM, *turns("2 + 3?")])
    name, problem = read_one({"prompt": said, "answer": "2 + 3 = 5\n#### 5"})
    assert (name, problem.prompt, problem.system) == ("chat", "2 + 3?", "Be brief.")
    assert (problem.answer, problem.reference) == ("5", "2 + 3 = 5")


def test_the_solution_of_a_verl_row_is_the_reference() -> None:
    row = verl("openai/gsm8k", "5", extra_info={"answer": "2 + 3 = <<2+3=5>>5\n#### 5"})
    assert read_one(row)[1].reference == "2 + 3 = 5"


def test_a_mapped_conversation_goes_before_messages() -> None:
    row = {**ROW, "chat": turns("4 + 4?"), "answer": "8"}
    name, problem = read_one(row, columns={"prompt": "chat"})
    assert (name, problem.prompt, problem.answer) == ("messages", "4 + 4?", "8")


def test_the_completion_of_trl_is_the_reply() -> None:
    turns = [{"role": "user", "content": "2 + 3?"}]
    said = [{"role": "assistant", "content": r"It is \boxed{5}."}]
    for completion in (said, said[0]["content"]):
        name, problem = read_one({"prompt": turns, "completion": completion})
        assert (name, problem.answer, problem.verifier) == ("chat", "5", "math")
        assert problem.reference == said[0]["content"] and problem.context == ()
    text = error_of({"prompt": turns, "completion": [*said, *said]})
    assert text.startswith('data.jsonl:1: the field "completion" is not one assistant turn')
    row = {"prompt": turns, "completion": said, "answer": "6", "verifier": "number"}
    assert read_one(row)[1].answer == "6"


def test_verl_may_list_inputs_and_outputs() -> None:
    case = {"input": "1\n", "output": "2\n", "testtype": "stdin"}
    row = {
        "data_source": "lcb",
        "prompt": [{"role": "user", "content": "Add one."}],
        "ability": "MATH",
        "reward_model": {"ground_truth": json.dumps([case])},
    }
    problem = read_one(row)[1]
    assert problem.verifier == "code"
    assert json.loads(problem.answer) == {"cases": [{"stdin": "1\n", "stdout": "2\n"}]}
    case["testtype"] = "functional"
    text = error_of({**row, "reward_model": {"ground_truth": json.dumps([case])}})
    assert "calls a function by its name" in text
    assert read_one({**row, "reward_model": {"ground_truth": "5"}})[1].verifier == "math"
