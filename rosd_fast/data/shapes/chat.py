"""Rows whose problem is a conversation: `messages`, ShareGPT's `conversations`, TRL's and verl's
lists of turns in `prompt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rosd_fast.data.fields import check_text, shorten, type_name
from rosd_fast.data.shapes.answers import after_hashes, before_hashes, last_boxed
from rosd_fast.data.shapes.code import cases_of, is_cases
from rosd_fast.data.shapes.maths import as_domain
from rosd_fast.data.shapes.row import Row
from rosd_fast.data.shapes.shape import Fields
from rosd_fast.types import Message
from rosd_fast.verify.tags import last_answer

TURNS = ("prompt", "messages", "conversations")
"""Columns of turns."""
ANSWERS = ("answer", "ground_truth", "solution")
ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}
NUMBER_SOURCES = ("gsm8k",)
MATH_SOURCES = ("math", "aime", "amc", "olympiad", "numina")
"""Parts of verl's `data_source` whose answers are numbers, or formulas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The parts of a conversation: what comes before the last user turn, that turn, its reply."""

    system: str | None
    context: tuple[Message, ...]
    prompt: str
    reply: str | None  # the assistant turn at the end; None: the user's turn is the last


def is_messages(row: Row) -> bool:
    """Whether there is a column of turns by the name of `messages` or `conversations`."""
    return turns_column(row, "messages", "conversations") is not None


def is_chat_prompt(row: Row) -> bool:
    """Whether `prompt` is a list of turns."""
    return turns_column(row, "prompt") is not None


def is_verl(row: Row) -> bool:
    """Whether `prompt` is a list of turns, and the answer is in `reward_model`."""
    return is_chat_prompt(row) and row.reach("reward_model.ground_truth") is not None


def turns_column(row: Row, *names: str) -> str | None:
    """The first of the columns that holds turns; None: none of them does."""
    return next((name for name in names if row.has_turns(name)), None)


def read_messages(row: Row) -> Fields:
    """The last user turn is the problem, the reply to it the reference.

    The answer has a column of its own, or the reply ends in it.
    """
    talk = read_turns(row, turns_column(row, *TURNS) or row.first(*TURNS) or TURNS[0])
    name = row.first(*ANSWERS)
    if name is None and talk.reply is None:
        talk = replace(talk, reply=_completion(row))
    if name is None and talk.reply is None:
        raise row.error(
            "answer",
            "is missing, and the conversation has no reply",
            fix="Name the answer's column: data.columns.answer=COLUMN, or FILE@answer=COLUMN",
        )
    if name is None:
        answer, verifier = _final_answer(row, talk.reply or "")
        return _fields(talk, answer=answer, verifier=verifier)
    text = row.answer(name)
    answer, verifier = split_solution(text)
    if verifier is None and name == "solution":  # TRL's accuracy reward compares it as mathematics
        verifier = "math"
    worked = None if answer == text else _without_hashes(text)
    return _fields(talk, answer=answer, verifier=verifier, reference=talk.reply or worked)


def read_verl(row: Row) -> Fields:
    """The answer is `reward_model.ground_truth`; `data_source` says how it is compared."""
    talk = read_turns(row, "prompt")
    source = row.label("data_source").lower()
    if row.value("answer") is None:
        row = row.with_column("answer", "reward_model.ground_truth")
    if is_cases(row.value("answer")):
        answer, verifier = cases_of(row, "answer", row.value("answer")), "code"
    else:
        answer, verifier = split_solution(row.answer("answer"))
        if any(part in source for part in NUMBER_SOURCES):
            verifier = verifier or "number"
        elif row.label("ability").lower() == "math" or any(part in source for part in MATH_SOURCES):
            verifier = verifier or "math"
    solution = row.reach("extra_info.answer")
    return _fields(
        talk,
        answer=answer,
        verifier=verifier,
        domain=as_domain(row.label("ability")),
        reference=_without_hashes(solution) if isinstance(solution, str) else None,
    )


def _fields(talk: Conversation, *, reference: str | None = None, **values: Any) -> Fields:
    return Fields(
        prompt=talk.prompt,
        system=talk.system,
        context=talk.context,
        reference=reference or talk.reply,
        **values,
    )


def split_solution(text: str) -> tuple[str, str | None]:
    r"""(answer, its verifier) of a text that may be a solution: after `####`, in `\boxed{}`, or the
    text itself, whose verifier is None."""
    if (number := after_hashes(text)) is not None:
        return number, "number"
    if (formula := last_boxed(text)) is not None:
        return formula, "math"
    return text, None


def _completion(row: Row) -> str | None:
    """The reply in TRL's `completion`, a list of one assistant turn or its text; None: none."""
    if isinstance(row.value("completion"), str):
        return row.text("completion") or None
    if not row.has_turns("completion"):
        return None
    turns = [_turn(row, "completion", i, t) for i, t in enumerate(row.parsed("completion"), 1)]
    if [turn.role for turn in turns] != ["assistant"] or not turns[0].content.strip():
        raise row.error("completion", "is not one assistant turn with text")
    return turns[0].content


def _final_answer(row: Row, reply: str) -> tuple[str, str | None]:
    answer, verifier = split_solution(reply)
    if verifier is not None:
        return answer, verifier
    tagged = last_answer(reply)
    if not tagged:
        raise row.error(
            "answer",
            r"is missing, and the last turn has no ####, \boxed{} or <answer>",
            fix="Name the answer's column: data.columns.answer=COLUMN, or FILE@answer=COLUMN",
        )
    return tagged, None


def _without_hashes(text: str) -> str:
    return before_hashes(text) if after_hashes(text) is not None else text


def read_turns(row: Row, name: str) -> Conversation:
    """The parts of the conversation in a column. Raises UserError for one without a user turn."""
    if not row.has_turns(name):
        raise row.wrong_type(name, "a list of turns")
    value = enumerate(row.parsed(name), start=1)
    turns = [_turn(row, name, number, turn) for number, turn in value]
    system, turns = (turns[0].content, turns[1:]) if turns[0].role == "system" else (None, turns)
    last = max((at for at, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        raise row.error(name, "has no user turn")
    replies = turns[last + 1 :]
    if [turn.role for turn in replies] not in ([], ["assistant"]):
        roles = ", ".join(turn.role for turn in replies)
        raise row.error(
            name,
            f"goes on after its last user turn with {roles}",
            fix="One assistant turn may follow it: cut the conversation there",
        )
    for number, turn in enumerate(turns, start=1 if system is None else 2):
        if not turn.content.strip():
            raise row.error(name, f"has an empty turn ({turn.role}, turn {number})")
    return Conversation(
        system=system if system and system.strip() else None,
        context=tuple(turns[:last]),
        prompt=turns[last].content,
        reply=replies[0].content if replies else None,
    )


def _turn(row: Row, name: str, number: int, turn: Mapping[str, Any]) -> Message:
    """One turn, by the keys of OpenAI (role, content) or of ShareGPT (from, value)."""
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or not role:
        raise row.error(name, f"has a turn without a role (turn {number})")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(row, name, number, part) for part in content)
    if not isinstance(content, str):
        what = "calls of tools and no text" if turn.get("tool_calls") else type_name(content)
        raise row.error(name, f"has {what} where turn {number} ({role}) needs text")
    check_text(content, row.shown(name), row.where)
    return Message(role=ROLES.get(role, role), content=content)


def _part(row: Row, name: str, number: int, part: Any) -> str:
    """The text of a part of a turn."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str) or kind not in ("text", "input_text", "output_text", None):
        raise row.error(
            name,
            f"has a part that is no text in turn {number} ({shorten(str(kind))})",
            fix="Problems are text: leave such rows out, or set data.bad_rows=skip",
        )
    return text
