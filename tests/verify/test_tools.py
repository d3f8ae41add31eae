"""`tools`: calls are the same or not, in every way in which they can differ."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_fast.verify import VERIFIERS, is_verifiable
from rosd_fast.verify.tools import is_equal, perfect_calls

DATA = Path(__file__).parents[3] / "shared" / "data" / "tooluse" / "test.json"
SEARCH = {"Action": "search", "Action_Input": '{"query": "solar", "page": 1, "tags": ["a", "b"]}'}
OPEN = {"Action": "open", "Action_Input": '{"id": 7, "safe": true}'}
LIST = {"Action": "list", "Action_Input": "{}"}
ANSWERS = [[SEARCH], [SEARCH, OPEN], [LIST], [OPEN, LIST, SEARCH]]

Calls = list[dict[str, Any]]
"""Calls with their arguments as objects."""


def parsed(answer: list[dict[str, str]]) -> Calls:
    return [{"name": c["Action"], "arguments": json.loads(c["Action_Input"])} for c in answer]


def written(calls: Calls) -> str:
    return "Thought: I need it.\n" + "\n".join(
        f"Action: {c['name']}\nAction Input: {json.dumps(c['arguments'])}" for c in calls
    )


def score(completion: str, answer: list[dict[str, str]]) -> float:
    return VERIFIERS["tools"](completion, json.dumps(answer)).score


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, "one more"]
    if isinstance(value, dict):
        return {**value, "one_more": 1}
    return f"{value}x"


def retyped(value: Any) -> Any:
    """The value as another JSON type: a text as a list, anything else as text."""
    return [value] if isinstance(value, str) else json.dumps(value)


def with_first_argument(change: Callable[[Any], Any]) -> Callable[[Calls], str]:
    """Change the first argument that there is, or add one."""

    def damage(calls: Calls) -> str:
        arguments = next((c["arguments"] for c in calls if c["arguments"]), None)
        if arguments is None:
            calls[0]["arguments"] = {"value": "x"}
        else:
            key = next(iter(arguments))
            arguments[key] = change(arguments[key])
        return written(calls)

    return damage


def missing_argument(calls: Calls) -> str:
    arguments = next((c["arguments"] for c in calls if c["arguments"]), None)
    if arguments is None:  # a call without arguments can only miss them all
        return f"Action: {calls[0]['name']}\nAction Input:"
    arguments.pop(next(iter(arguments)))
    return written(calls)


def swapped(calls: Calls) -> str:
    """The calls in another order; of equal calls or one call, a foreign call goes first."""
    turned = calls[::-1]
    return written(turned if turned != calls else [{"name": "x", "arguments": {}}, *calls])


DAMAGES: dict[str, Callable[[Calls], str]] = {
    "wrong name": lambda calls: written([{**calls[0], "name": calls[0]["name"] + "s"}, *calls[1:]]),
    "missing argument": missing_argument,
    "extra argument": lambda calls: written(
        [{**calls[0], "arguments": {**calls[0]["arguments"], "extra": ""}}, *calls[1:]]
    ),
    "changed value": with_first_argument(changed),
    "swapped order": swapped,
    "missing call": lambda calls: written(calls[:-1]),
    "extra call": lambda calls: written([*calls, calls[-1]]),
    "invalid JSON": lambda calls: written(calls)[:-1],
    "wrong type": with_first_argument(retyped),
    "empty": lambda calls: "",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_perfect_calls_are_accepted_in_every_form(answer: list[dict[str, str]]) -> None:
    text = json.dumps(answer)
    calls = parsed(answer)
    assert is_verifiable("tools", text)
    assert score(perfect_calls(text), answer) == score(written(calls), answer) == 1.0
    forms = [calls, answer, [{"type": "function", "function": c} for c in calls]]
    for form in forms:
        assert score(f"<answer>{json.dumps(form)}</answer>", answer) == 1.0
        assert score(f"<answer>\n```json\n{json.dumps(form)}\n```\n</answer>", answer) == 1.0
        assert is_verifiable("tools", json.dumps(form))
    assert score(f"<answer>{written(calls)}</answer>", answer) == 1.0


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_calls_are_refused(damage: str, answer: list[dict[str, str]]) -> None:
    completion = DAMAGES[damage](copy.deepcopy(parsed(answer)))
    judged = VERIFIERS["tools"](completion, json.dumps(answer))
    assert judged.score == 0.0 and judged.reason


@pytest.mark.skipif(not DATA.exists(), reason="the data set is not here")
def test_all_rows_of_the_test_set() -> None:
    """68 of 68 perfect completions are accepted, and none of 68 damaged in any of ten ways."""
    answers = [json.loads(json.loads(line)["answer"]) for line in DATA.read_text().splitlines()]
    assert len(answers) == 68 and len(DAMAGES) == 10
    for answer in answers:
        assert score(written(parsed(answer)), answer) == 1.0
        assert is_verifiable("tools", json.dumps(answer))
        for damage, apply in DAMAGES.items():
            completion = apply(copy.deepcopy(parsed(answer)))
            assert score(completion, answer) == 0.0, (damage, answer)


@pytest.mark.skipif(not DATA.exists(), reason="the data set is not here")
def test_the_prompts_of_the_test_set_say_how_to_answer() -> None:
    for line in DATA.read_text().splitlines():
        assert VERIFIERS["tools"].is_instructed(json.loads(line)["prompt"])


INPUT = '{"id": 7, "safe": true}'


@pytest.mark.parametrize(
    "completion",
    [
        f"**Action:** open\n**Action Input:** {INPUT}",
        'Action: `open`\nAction Input: `{"safe": true, "id": 7.0}`',
        'action: open\n\naction_input: {"id": 7,\n  "safe": true}\nObservation: done',
        f"Action: open Action Input: {INPUT}",
        f"Action: open\nAction Input:\n```json\n{INPUT}\n```",
        f"Action: list\nAction Input: {{}}</think>\nAction: open\nAction Input: {INPUT}",
        f"The Action: search is wrong.\nAction: open\nAction Input: {INPUT}",
        f"Action: list\nAction Input: {{}}\n<answer>Action: open\nAction Input: {INPUT}</answer>",
        f'Not {{}}: <answer>[{{"name": "open", "arguments": {INPUT}}}]</answer>',
        f'<answer>{{"name": "open", "arguments": {json.dumps(INPUT)}}}</answer>',
    ],
)
def test_forms_that_are_read(completion: str) -> None:
    assert score(completion, [OPEN]) == 1.0


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("I would open it.", "no action"),
        ("Action: open", "the action 'open' has no Action Input"),
        ("Action: open\nThought: so", "the action 'open' has no Action Input"),
        ("Action: open\nAction Input: seven", "the input of 'open' is not JSON"),
        ('Action: open\nAction Input: {"id": NaN}', "the input of 'open' is not JSON"),
        ('Action: open\nAction Input: {"id": 1e999}', "the input of 'open' is not JSON"),
        ('Action: open\nAction Input: {"id": 8, "id": 7}', "the input of 'open' is not JSON"),
        (
            'Action: open\nAction Input: {"id": 7} or {"id": 8}',
            "there is text behind the input of 'open'",
        ),
        ('Action: Open\nAction Input: {"id": 7}', "call 1, 'Open', is of another tool"),
        ('Action: open()\nAction Input: {"id": 7}', "call 1, 'open()', is of another tool"),
        (
            'Action: open\nAction Input: {"id": 8, "safe": true}',
            "call 1, 'open': the argument 'id' has another value",
        ),
        (
            'Action: open\nAction Input: {"id": "7", "safe": true}',
            "call 1, 'open': the argument 'id' has another value",
        ),
        (
            'Action: open\nAction Input: {"id": 7, "safe": 1}',
            "call 1, 'open': the argument 'safe' has another value",
        ),
        (
            'Action: open\nAction Input: {"id": 7, "x": 1}',
            "call 1, 'open': the argument 'x' is not wanted",
        ),
        ('Action: open\nAction Input: {"id": 7}', "call 1, 'open': an argument is missing"),
        ("Action: open\nAction Input: 7", "call 1, 'open': the arguments are not a JSON object"),
        ("<answer>[]</answer>", "the list of calls is empty"),
        ("<answer>[7]</answer>", "a call is not a JSON object: '7'"),
        ('<answer>[{"name": "open"}]</answer>', "a call without name and arguments: "),
        ("<answer>[{}] [{}]</answer>", "there is text behind the list of calls"),
        ("<answer>[{]</answer>", "the answer is not JSON"),
        ("<answer>7</answer>", "no action"),
    ],
)
def test_reasons(completion: str, reason: str) -> None:
    judged = VERIFIERS["tools"](completion, json.dumps([OPEN]))
    assert judged.score == 0.0 and judged.reason is not None and judged.reason.startswith(reason)


def test_the_number_of_calls() -> None:
    perfect = written(parsed([OPEN]))
    verify = VERIFIERS["tools"]
    assert verify(f"{perfect}\n{perfect}", json.dumps([OPEN])).reason == "there are too many calls"
    assert verify(perfect, json.dumps([OPEN, OPEN])).reason == "there are too few calls"


@pytest.mark.parametrize("answer", ["", "7", "[]", "{}", "[{}]", "[7]", '["x"]', "[{", "[[]]", "x"])
def test_answers_that_are_no_calls(answer: str) -> None:
    assert not is_verifiable("tools", answer)
    assert perfect_calls(answer) == ""


def test_equal_calls_have_one_notation() -> None:
    one = VERIFIERS["tools"]('Action: a\nAction Input: {"x": 1, "y": "é"}', "[]").answer
    two = VERIFIERS["tools"](
        '<answer>[{"name": "a", "arguments": {"y": "é", "x": 1}}]</answer>', "[]"
    )
    assert one == two.answer == '[{"arguments": {"x": 1, "y": "é"}, "name": "a"}]'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_values_are_equal_when_their_json_is(one: Any, two: Any) -> None:
    def canonical(value: Any) -> str:
        """JSON in one notation, with whole numbers as integers."""
        if isinstance(value, dict):
            return f"{{{sorted((key, canonical(inner)) for key, inner in value.items())}}}"
        if isinstance(value, list):
            return f"[{[canonical(inner) for inner in value]}]"
        if isinstance(value, float) and value.is_integer():
            return json.dumps(int(value))
        return json.dumps(value)

    assert is_equal(one, two) == (canonical(one) == canonical(two))
    assert is_equal(one, json.loads(json.dumps(one)))
