"""Known traps of chat templates and tokenizers: each check is one sentence, or None.

What they find is allowed and rarely meant. `rosd-fast data --show` prints it, and a run notes it
once at its start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rosd_fast.text.chat import SWITCHES, USER_MARK, ChatFormat, Chats, template_errors

ANSWER_MARK = "the-answer"


def find_traps(
    chats: Chats,
    *,
    stop_token_ids: Sequence[int],
    generation_eos: Sequence[int],
    with_system: bool,
) -> list[str]:
    """What is found, each once.

    stop_token_ids: as the run uses them. generation_eos: the end-of-text ids of the model's
    generation config. with_system: whether any problem has a system turn.
    """
    tokenizer = chats.tokenizer
    roles = {
        "student": chats.student,
        "reflector": chats.reflector,
        "teacher": chats.teacher,
        "eval": chats.eval,
    }
    found = [modes_differ(chats.student, chats.teacher)]
    for role, chat in roles.items():
        found += [
            bos_twice(chat, role),
            no_system_role(chat, role, with_system=with_system),
            end_of_turn_missing(chat, role, stop_token_ids),
            *unread_kwargs(chat, role),
        ]
    found += [eos_differs(tokenizer, generation_eos), pad_is_eos(tokenizer)]
    return _once(found)


def modes_differ(student: ChatFormat, teacher: ChatFormat) -> str | None:
    """Student and teacher read the same tokens; one expects thinking there, the other does not."""
    if student.mode == teacher.mode:
        return None
    what = {
        "plain": "leaves it to the model whether it thinks",
        "open": "ends within thinking",
        "closed": "ends after thinking",
    }
    return (
        f"the student's prompt {what[student.mode]} and the teacher's {what[teacher.mode]}: give "
        "chat.student and chat.teacher the same kwargs and template"
    )


def bos_twice(chat: ChatFormat, role: str) -> str | None:
    """The template writes the beginning-of-text token, and something writes it again."""
    bos = chat.tokenizer.bos_token_id
    if bos is None or chat.render(USER_MARK)[:2] != (bos, bos):
        return None
    return f"{role}: the prompt begins with {chat.tokenizer.bos_token} twice"


def no_system_role(chat: ChatFormat, role: str, *, with_system: bool) -> str | None:
    """The template refuses system turns or leaves them out."""
    if chat.system_role or not (with_system or chat.system):
        return None
    return f"{role}: the chat template drops system turns, so their text precedes the user's"


def end_of_turn_missing(chat: ChatFormat, role: str, stop_token_ids: Sequence[int]) -> str | None:
    """The token that the template ends an answer with does not end a completion."""
    token = end_of_turn(chat)
    if token is None or token in stop_token_ids:
        return None
    name = chat.tokenizer.convert_ids_to_tokens(token)
    return (
        f"{role}: the chat template ends an answer with {name} ({token}), which is not among the "
        f"stop tokens {list(stop_token_ids)}: add it to eos_token_id in generation_config.json"
    )


def end_of_turn(chat: ChatFormat) -> int | None:
    """The first token after an answer in the template's own rendering; None: no added token."""
    turns = [("user", USER_MARK), ("assistant", ANSWER_MARK)]
    try:
        text = chat.text(turns, generation=False)
    except template_errors():  # such as a template that takes no answers
        return None
    _, mark, rest = text.rpartition(ANSWER_MARK)
    ids = chat.tokenizer.encode(rest.lstrip(), add_special_tokens=False) if mark else []
    added = set(chat.tokenizer.get_added_vocab().values())
    return ids[0] if ids and ids[0] in added else None


def unread_kwargs(chat: ChatFormat, role: str) -> list[str]:
    """Arguments that the template does not name, such as misspelled ones."""
    known = [name for name in SWITCHES if chat.reads(name)]
    hint = f"; it reads {', '.join(known)}" if known else ""
    return [
        f"{role}: the chat template does not read the argument {name}{hint}"
        for name in chat.kwargs
        if not chat.reads(name)
    ]


def eos_differs(tokenizer: Any, generation_eos: Sequence[int]) -> str | None:
    """The tokenizer's end-of-text token is none of the generation config's."""
    eos = tokenizer.eos_token_id
    if eos is None or not generation_eos or eos in generation_eos:
        return None
    return (
        f"the tokenizer's end-of-text token is {tokenizer.eos_token} ({eos}) and the generation "
        f"config's {list(generation_eos)}: each of them ends a completion"
    )


def pad_is_eos(tokenizer: Any) -> str | None:
    """The padding token is the end-of-text token: who masks padding masks the end of answers."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != tokenizer.eos_token_id:
        return None
    return (
        f"the padding token is the end-of-text token {tokenizer.eos_token}: harmless here, where "
        "nothing is padded; a trainer that masks padding would never teach the end of an answer"
    )


def _once(found: Iterable[str | None]) -> list[str]:
    """The sentences, the same one of several roles only once."""
    kept: dict[str, str] = {}
    for text in found:
        if text is not None:
            kept.setdefault(text.partition(": ")[2] or text, text)
    return list(kept.values())
