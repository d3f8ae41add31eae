"""`tools`: the calls of a completion are the right ones, in order, with the right arguments.

A completion writes calls as its prompt asks, or as a JSON list in an answer tag:

    Action: searchUser
    Action Input: {"query": "solar"}

Arguments are compared as JSON values: the order of keys is free, 1 equals 1.0, and "1" does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any, NamedTuple, NoReturn

from rosd_fast.types import Judgement
from rosd_fast.verify.tags import last_answer, quoted

TOOLS_INSTRUCTION = (
    "Write each call as two lines: Action: followed by the name of the tool, then Action Input: "
    "followed by its arguments as JSON."
)
TOOLS_MARKS = ("Action Input:", "Action Input ", "Action_Input")

END_OF_THINKING = "</think>"
_ACTION = re.compile(r"^[ \t>*#-]*action(?:\*\*)?[ \t]*:[ \t*]*", re.IGNORECASE | re.MULTILINE)
_INPUT = re.compile(r"[ \t>*#-]*action[ _]input(?:\*\*)?[ \t]*:[ \t*]*(?:`(?!`))?", re.IGNORECASE)
_FENCE = re.compile(r"\s*```(?:json)?\s*")
_REST_OF_LINE = re.compile(r"[ \t`*]*(?:\n|\Z)")
_NAMES = ("Action", "action", "name")
_INPUTS = ("Action_Input", "Action Input", "action_input", "arguments", "parameters")


class Call(NamedTuple):
    """A tool and the arguments that it is called with."""

    name: str
    arguments: Any


class Unreadable(Exception):
    """Calls that cannot be read; the text says why."""


def verify_tools(completion: str, answer: str) -> Judgement:
    """1.0 if the calls of the completion are those of `answer`, a JSON list; 0.0 otherwise."""
    try:
        found = find_calls(completion)
    except Unreadable as error:
        return Judgement(score=0.0, answer=None, reason=str(error))
    wanted = _wanted(answer)
    reason = "the right answer is no list of calls" if not wanted else _why_unequal(found, wanted)
    return Judgement(score=float(reason is None), answer=as_json(found), reason=reason)


def perfect_calls(answer: str) -> str:
    """A completion that makes the calls of `answer`; empty when it is no list of calls."""
    return "\n".join(
        f"Action: {call.name}\nAction Input: {json.dumps(call.arguments)}"
        for call in _wanted(answer)
    )


def find_calls(completion: str) -> list[Call]:
    """The calls of a completion, after its thinking: those in the last answer tag, or else all.

    Raises Unreadable for no call, or one that cannot be read.
    """
    text = completion.rpartition(END_OF_THINKING)[2]
    tagged = last_answer(text)
    if tagged is not None:
        text = tagged
        if fence := _FENCE.match(text):
            text = text[fence.end() :].removesuffix("```")
        if text.lstrip().startswith(("[", "{")):
            value, end = _read_json(text, len(text) - len(text.lstrip()), "the answer")
            if text[end:].strip():
                raise Unreadable("there is text behind the list of calls")
            return _as_calls(value if isinstance(value, list) else [value])
    return _read_actions(text)


def _read_actions(text: str) -> list[Call]:
    """The calls of lines "Action:" and "Action Input:". Stops at the first that is wrong."""
    calls, position = [], 0
    while match := _ACTION.search(text, position):
        end = text.find("\n", match.end())
        line = text[match.end() : end if end >= 0 else len(text)]
        if inline := _INPUT.search(line):
            name, position = line[: inline.start()], match.end() + inline.end()
        else:
            name, following = line, _INPUT.match(text, _skip_blank(text, match.end() + len(line)))
            if not following:
                raise Unreadable(f"the action {quoted(name.strip())} has no Action Input")
            position = following.end()
        name = name.strip(" \t`*")
        if fence := _FENCE.match(text, position):
            position = fence.end()
        value, position = _read_json(text, position, f"the input of {quoted(name)}")
        if not _REST_OF_LINE.match(text, position):
            raise Unreadable(f"there is text behind the input of {quoted(name)}")
        calls.append(Call(name, _arguments(value)))
    if not calls:
        raise Unreadable("no action")
    return calls


def _skip_blank(text: str, position: int) -> int:
    """The next position that is not whitespace."""
    match = re.compile(r"\s*").match(text, position)
    return match.end() if match else position


def _read_json(text: str, position: int, what: str) -> tuple[Any, int]:
    """The JSON value that begins at `position` of `text`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, _skip_blank(text, position))
    except (ValueError, RecursionError):
        raise Unreadable(f"{what} is not JSON") from None


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Two values of one key would be two answers."""
    pairs = list(pairs)
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)


def _as_calls(items: Sequence[Any]) -> list[Call]:
    """The calls of a JSON list; each has a name, and arguments or text that holds them."""
    calls = []
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        if not isinstance(item, dict):
            raise Unreadable(f"a call is not a JSON object: {quoted(as_text(item))}")
        names = [item[key] for key in _NAMES if key in item]
        inputs = [item[key] for key in _INPUTS if key in item]
        if len(names) != 1 or not isinstance(names[0], str) or len(inputs) != 1:
            raise Unreadable(f"a call without name and arguments: {quoted(as_text(item))}")
        calls.append(Call(names[0].strip(), _arguments(inputs[0])))
    if not calls:
        raise Unreadable("the list of calls is empty")
    return calls


def _arguments(value: Any) -> Any:
    """Arguments: a text that holds a JSON object is that object."""
    if not isinstance(value, str):
        return value
    try:
        inner = _DECODER.decode(value)
    except (ValueError, RecursionError):
        return value
    return inner if isinstance(inner, dict) else value


@lru_cache(maxsize=4096)
def _wanted(answer: str) -> tuple[Call, ...]:
    """The right calls; empty when `answer` is no JSON list of calls."""
    try:
        value, end = _read_json(answer, 0, "the answer")
        calls = _as_calls(value) if isinstance(value, list) and not answer[end:].strip() else []
    except Unreadable:
        return ()
    return tuple(calls)


def _why_unequal(found: Sequence[Call], wanted: Sequence[Call]) -> str | None:
    """Why the calls are not the right ones, without naming those; None: they are."""
    for number, (one, two) in enumerate(zip(found, wanted, strict=False), start=1):
        if one.name != two.name:
            return f"call {number}, {quoted(one.name)}, is of another tool"
        if not is_equal(one.arguments, two.arguments):
            where = f"call {number}, {quoted(one.name)}"
            return f"{where}: {_why_other_arguments(one.arguments, two.arguments)}"
    if len(found) == len(wanted):
        return None
    return "there are too many calls" if len(found) > len(wanted) else "there are too few calls"


def _why_other_arguments(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return "the arguments are not a JSON object" if isinstance(wanted, dict) else "other input"
    for key, value in found.items():
        if key not in wanted:
            return f"the argument {quoted(key)} is not wanted"
        if not is_equal(value, wanted[key]):
            return f"the argument {quoted(key)} has another value"
    return "an argument is missing"


def is_equal(one: Any, two: Any) -> bool:
    """Whether two JSON values are equal: 1 equals 1.0, but neither "1" nor true."""
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(is_equal(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(is_equal, one, two))
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    return one == two


def as_json(calls: Sequence[Call]) -> str:
    """Calls as a JSON list in one notation, so that equal calls are equal texts."""
    return as_text([{"name": call.name, "arguments": call.arguments} for call in calls])


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
