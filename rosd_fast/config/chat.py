"""The options of chat templates: arguments in one string, and templates in files.

A run must not change when a template file does. So before anything else `read_templates` replaces
each path by the text of the file, which the run's config.toml and the hash of its options hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rosd_fast.errors import UserError
from rosd_fast.text.chat import Chats, chat_format
from rosd_fast.text.thinking import Thinking

if TYPE_CHECKING:
    from rosd_fast.config.schema import ChatConfig, RoleChat

ROLES = ("student", "reflector", "teacher", "eval")
NAME = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
PYTHON: dict[str, Any] = {"True": True, "False": False, "None": None}  # a text would be true
RESERVED = frozenset(
    "conversation messages tools documents chat_template add_generation_prompt "
    "continue_final_message tokenize sanitize_control_tokens padding truncation max_length "
    "return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs".split()
)
"""Arguments of transformers' `apply_chat_template` itself."""


def parse_kwargs(text: str) -> dict[str, Any]:
    """The arguments in `text`. Values are JSON where they parse, or Python's True, False and None,
    and text otherwise.

    >>> parse_kwargs('enable_thinking=false,reasoning_effort=low,note="a, b"')
    {'enable_thinking': False, 'reasoning_effort': 'low', 'note': 'a, b'}

    Raises ValueError, in words that continue "chat.kwargs is ...".
    """
    found: dict[str, Any] = {}
    place = 0
    while text[place:].strip():
        named = NAME.match(text, place)
        if named is None:
            raise ValueError(f"{text!r}: arguments are written name=value, separated by commas")
        if named[1] in RESERVED:
            raise ValueError(f"{text!r}: {named[1]} is not an argument of chat templates")
        found[named[1]], place = _value(text, named.end())
    return found


def _value(text: str, start: int) -> tuple[Any, int]:
    """(the value that begins at `start`, the place after it and its comma)."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        value, end = None, start
    rest = text[end:].lstrip()
    if end > start and rest[:1] in ("", ","):
        return value, len(text) - len(rest) + 1
    word, _, _ = text[start:].partition(",")
    if word[:1] and word[0] in '{["':
        raise ValueError(f"{text!r}: {text[start:]} is not JSON, as a value that begins like it is")
    return PYTHON.get(word.strip(), word.strip()), start + len(word) + 1


def make_chats(chat: ChatConfig, tokenizer: Any) -> Chats:
    """The chat formats of all roles; `chat` has templates as texts (`read_templates`).

    Raises UserError for a template that fails or leaves out the user's text.
    """
    chat = chat.model_copy(update={"eval": _or_students(chat)})
    formats = {}
    for role in ROLES:
        own: RoleChat = getattr(chat, role)
        formats[role] = chat_format(
            tokenizer,
            kwargs=parse_kwargs(chat.kwargs) | parse_kwargs(own.kwargs or ""),
            system=own.system or None,
            template=own.template or None,
            where=f"chat.{role}.template" if own.template else "tokenizer",
        )
    return Chats(**formats, thinking=Thinking(tokenizer), shown_thinking=chat.thinking)


def _or_students(chat: ChatConfig) -> RoleChat:
    """The options of eval, each the student's where it has none of its own."""
    own = {name: value for name, value in chat.eval if value is not None}
    return chat.student.model_copy(update=own)


def wrong_kwargs(chat: ChatConfig) -> str | None:
    """What is wrong with an option of arguments, beginning with its name; None: nothing."""
    for name, text in (
        ("kwargs", chat.kwargs),
        *((f"{role}.kwargs", getattr(chat, role).kwargs) for role in ROLES),
    ):
        try:
            parse_kwargs(text or "")
        except ValueError as error:
            return f"chat.{name} is {error}"
    return None


def read_templates(chat: ChatConfig) -> ChatConfig:
    """`chat` with the text of each template in place of its path; a text stays as it is.

    Raises UserError for a file that cannot be read or has no Jinja in it.
    """
    return chat.model_copy(update={role: _read(getattr(chat, role), role) for role in ROLES})


def is_template(text: str) -> bool:
    """Whether an option `template` is a template rather than the path of one."""
    return "{{" in text or "{%" in text


def _read(chat: RoleChat, role: str) -> RoleChat:
    if not chat.template or is_template(chat.template):
        return chat
    where = f"chat.{role}.template {chat.template}"
    try:
        text = Path(chat.template).expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the text is not UTF-8", where=where) from None
    except OSError as error:
        what = "there is no such file"
        if not isinstance(error, FileNotFoundError):
            what = f"the file cannot be read ({error.strerror})"
        raise UserError(what, where=where, fix="Give the path of a Jinja file") from None
    if not is_template(text):
        raise UserError("is not a chat template: it has no {{ }} and no {% %}", where=where)
    return chat.model_copy(update={"template": text})
