"""From text to prompt ids: the chat template of each role.

A prompt is a user turn, after a system turn if there is one, rendered by a chat template up to the
generation prompt, which opens the answer. `chat_format` tries a template once: whether it shows the
user's text, whether it has a system role, and whether its generation prompt opens thinking.

A special token that is spelled out in a text is encoded as text, if transformers supports that.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from rosd_fast.errors import UserError
from rosd_fast.text.decode import decode
from rosd_fast.text.thinking import FAMILIES, Tags, Thinking

if TYPE_CHECKING:
    from rosd_fast.types import Group, Message, Problem, Rollout

Mode = Literal["plain", "open", "closed"]
Turns = Sequence[tuple[str, str]]  # (role, text)
PART = re.compile(r"['\"]type['\"]")  # of a part of a content, written out
USER_MARK, SYSTEM_MARK = "the-user-turn", "the-system-turn"
PROBE = 'It\'s <b>2 & 3</b>,\n"Ä"  of 日本: ' + "Read on. " * 4000 + "The End"
"""A text that a template shows as it is, unless it cuts, escapes or folds what it is given."""
SANITIZE = "sanitize_control_tokens"  # option of apply_chat_template
SWITCHES = ("enable_thinking", "thinking")  # arguments that turn thinking on or off in templates


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How the prompts of one role are rendered. `chat_format` makes one.

    tokenizer: encodes the rendered text.
    kwargs: arguments of the chat template.
    system: the system turn of problems that have none; None: no system turn.
    template: replaces the tokenizer's own template; None: the tokenizer's.
    lists: the roles, user and system, whose content the template wants as a list of parts.
    system_role: whether the template renders system turns.
    generation_prompt: the text that opens an answer.
    prefix: text that every answer begins with, after the generation prompt.
    where: names the template in errors: tokenizer, or the option that holds it.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    template: str | None = None
    lists: tuple[str, ...] = ()
    system_role: bool = True
    generation_prompt: str = ""
    prefix: str = ""
    where: str = "tokenizer"

    def render_problem(
        self, problem: Problem, user: str | None = None, *, opening: str = ""
    ) -> tuple[int, ...]:
        """The ids of a problem's prompt, after its system turn and the turns before it.

        user: replaces the problem's own user turn. Otherwise as `render`.
        """
        return self.render(
            problem.prompt if user is None else user,
            system=problem.system,
            context=problem.context,
            opening=opening,
        )

    def render(
        self,
        user: str,
        *,
        system: str | None = None,
        context: Sequence[Message] = (),
        opening: str = "",
    ) -> tuple[int, ...]:
        """The ids of a prompt: chat template, generation prompt, and the answer's `opening`.

        system: the problem's own system turn, which replaces the role's. If the template has no
        system role, the system text precedes the first user text. context: the turns between the
        system turn and the user turn. Raises UserError when the template fails.
        """
        system = self.system if system is None else system
        turns = [*((turn.role, turn.content) for turn in context), ("user", user)]
        if system is not None and self.system_role:
            turns = [("system", system), *turns]
        elif system is not None:
            first = next(at for at, (role, _) in enumerate(turns) if role == "user")
            turns[first] = ("user", f"{system}\n\n{turns[first][1]}")
        options = _sanitize(self.tokenizer, *(text for _, text in turns))
        if opening := self.prefix + opening:
            # As part of the template it is encoded together with the text before it. Jinja drops a
            # line break at the end of a template, and one that follows a block.
            written = f"{{{{ {json.dumps(opening)} }}}}"
            options["chat_template"] = self.source.removesuffix("\n") + written
        elif self.template is not None:
            options["chat_template"] = self.template
        try:
            ids = self.tokenizer.apply_chat_template(
                self._messages(turns),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},  # the callers check lengths
                **options,
                **self.kwargs,
            )
        except template_errors() as error:
            raise _failed(error) from error
        return tuple(map(int, ids))

    def check_roles(self, roles: Sequence[str]) -> None:
        """Raise UserError unless the template renders earlier turns of these roles, in order."""
        turns = [(role, f"Turn {at}. {PROBE}") for at, role in enumerate([*roles, "user"])]
        option = "chat.student.template" if self.where == "tokenizer" else self.where
        fix = f"Leave these turns out, or give another template with --{option}"
        try:
            text = self.text(turns)
        except template_errors() as error:
            raise UserError(
                f"the chat template fails on turns of the roles {', '.join(roles)} and user "
                f"({error})",
                where=self.where,
                fix=fix,
            ) from error
        lost = sorted({role for role, mark in turns if mark not in text})
        if lost:
            raise UserError(
                f"the chat template leaves out or changes earlier turns of the role {lost[0]}",
                where=self.where,
                fix=fix,
            )

    def text(self, turns: Turns, *, generation: bool = True) -> str:
        """The text of turns as the template renders them. Raises `template_errors`."""
        return self.tokenizer.apply_chat_template(
            self._messages(turns),
            add_generation_prompt=generation,
            tokenize=False,
            chat_template=self.source,
            **self.kwargs,
        )

    @property
    def source(self) -> str:
        """The text of the template."""
        return self.template or self.tokenizer.get_chat_template()

    @property
    def mode(self) -> Mode:
        """Whether the generation prompt opens thinking.

        plain: it has no thinking tag, so the model decides.
        open: it ends within thinking.
        closed: it ends after thinking, which is over before the answer begins.
        """
        return self._thinking[0]

    @property
    def opens(self) -> Tags | None:
        """The tags of the thinking that the generation prompt ends in; None: it ends in none."""
        mode, tags = self._thinking
        return tags if mode == "open" else None

    def reads(self, name: str) -> bool:
        """Whether the template names the argument `name`."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def without_thinking(self) -> ChatFormat:
        """The format whose generation prompt does not end within thinking.

        If the template has an argument that turns thinking off, it is used; otherwise each answer
        begins with the rest of an empty block of thinking.
        """
        if (tags := self.opens) is None:
            return self
        if (switched := self._switched(False)).mode != "open":
            return switched
        written = self.generation_prompt[self.generation_prompt.rindex(tags.opening) :]
        rest = tags.empty[_num_shared(tags.empty, written) :]
        return replace(self, prefix=rest)

    def with_thinking(self) -> ChatFormat:
        """The format whose generation prompt does not end after thinking, where there is one."""
        if self.mode != "closed":
            return self
        switched = self._switched(True)
        return self if switched.mode == "closed" else switched

    def _switched(self, on: bool) -> ChatFormat:
        """The format with the template's own argument for thinking; unchanged if it has none."""
        for name in SWITCHES:
            if self.reads(name):
                changed = replace(self, kwargs={**self.kwargs, name: on})
                changed = replace(changed, generation_prompt=_generation_prompt(changed))
                if changed.mode != self.mode:
                    return changed
        return self

    @property
    def _thinking(self) -> tuple[Mode, Tags | None]:
        text = self.generation_prompt + self.prefix
        for tags in FAMILIES:
            opening, closing = text.rfind(tags.opening), text.rfind(tags.closing)
            if max(opening, closing) >= 0:
                return ("open" if opening > closing else "closed"), tags
        return "plain", None

    def _messages(self, turns: Turns) -> list[dict[str, Any]]:
        parts = {"assistant"} | set(self.lists) if "user" in self.lists else set(self.lists)
        return [
            {"role": role, "content": [{"type": "text", "text": text}] if role in parts else text}
            for role, text in turns
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chats:
    """The chat formats of all roles, and what prompts show of a rollout's thinking."""

    student: ChatFormat
    reflector: ChatFormat
    teacher: ChatFormat
    eval: ChatFormat
    thinking: Thinking
    shown_thinking: str = "keep"  # as the option chat.thinking

    def num_thinking(self, rollout: Rollout) -> int:
        """The number of first tokens of a rollout that are thinking."""
        return self.thinking.num_tokens(rollout.completion_ids, opened=self.student.opens)

    def thinking_lengths(self, groups: Sequence[Group]) -> dict[str, int]:
        """`num_thinking` of each rollout that thinks, by rollout id."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        lengths = {rollout.id: self.num_thinking(rollout) for rollout in rollouts}
        return {name: length for name, length in lengths.items() if length}

    def shown(self, rollout: Rollout) -> tuple[str, int]:
        """(the text of a rollout that prompts show, the token at which it begins).

        It is the end of the rollout, from the beginning, the answer, or the last paragraph of the
        thinking on.
        """
        if self.shown_thinking == "keep" or not (start := self.num_thinking(rollout)):
            return rollout.text, 0
        ids = rollout.completion_ids
        if self.shown_thinking == "last":
            start = self.thinking.last_paragraph(ids, start)
        return decode(self.tokenizer, ids[start:]).lstrip(), start

    def shows(self, rollout: Rollout) -> bool:
        """Whether prompts show anything of a rollout; one that only thinks may have nothing."""
        text, start = self.shown(rollout)
        return bool(text) or not start

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of all roles."""
        return self.student.tokenizer


def chat_format(
    tokenizer: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
    template: str | None = None,
    where: str = "tokenizer",
) -> ChatFormat:
    """Try a chat template, and return how to render with it.

    where: names the template in errors. Raises UserError when the template fails on a user turn,
    and when it leaves out the text of one, as a string and as a list of parts, or changes it.
    """
    plain = ChatFormat(
        tokenizer=tokenizer, kwargs=kwargs or {}, system=system, template=template, where=where
    )
    errors = []
    for lists in ((), ("user",)):
        chat = replace(plain, lists=lists)
        try:
            if _shows(chat.text(_turns(USER_MARK)), USER_MARK, lists):
                break
        except template_errors() as error:
            errors.append(error)
    else:
        if errors:
            raise _failed(errors[0], where) from errors[0]
        raise UserError(
            "the chat template leaves out the text of the user turn, as a string and as a list of "
            "parts",
            where=where,
            fix=_advice(where),
        )
    chat = _with_system_role(chat)
    _check_text(chat)
    return replace(chat, generation_prompt=_generation_prompt(chat))


def _check_text(chat: ChatFormat) -> None:
    """Raise UserError unless the template shows a long user turn as it is, to its end."""
    for system in (None, SYSTEM_MARK) if chat.system_role else (None,):
        if PROBE not in chat.text(_turns(PROBE, system)):
            raise UserError(
                "the chat template changes the text of the user turn, or shows only a part of it",
                where=chat.where,
                fix=_advice(chat.where),
            )


def _with_system_role(chat: ChatFormat) -> ChatFormat:
    """The format with the form of its system turns found, or with `system_role` False."""
    for lists in (chat.lists, (*chat.lists, "system")):
        tried = replace(chat, lists=lists)
        try:
            text = tried.text(_turns(USER_MARK, SYSTEM_MARK), generation=False)
        except template_errors():
            continue
        if _shows(text, SYSTEM_MARK, lists) and USER_MARK in text:
            return tried
    return replace(chat, system_role=False)


def _turns(user: str, system: str | None = None) -> Turns:
    return [("user", user)] if system is None else [("system", system), ("user", user)]


def _shows(text: str, mark: str, lists: Sequence[str]) -> bool:
    """Whether a rendered text has the content `mark`, and no list of parts written out."""
    return mark in text and not (lists and PART.search(text))


def _generation_prompt(chat: ChatFormat) -> str:
    """What the template adds after the user's turn to open the answer."""
    text, without = (chat.text(_turns(USER_MARK), generation=on) for on in (True, False))
    shared = _num_shared(text, without)
    if shared == len(text):  # it always opens an answer, or never
        return text[text.rindex(USER_MARK) + len(USER_MARK) :]
    return text[shared:]


def _num_shared(text: str, other: str) -> int:
    """The number of first characters in which two texts agree."""
    pairs = zip(text, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def template_errors() -> tuple[type[Exception], ...]:
    """What a template raises: its own errors, and Python's for contents that it does not expect."""
    from jinja2 import TemplateError

    return TemplateError, TypeError, ValueError, LookupError, AttributeError


def _failed(error: Exception, where: str = "tokenizer") -> UserError:
    return UserError(
        f"the chat template fails on a user turn ({error})", where=where, fix=_advice(where)
    )


def _advice(where: str) -> str:
    """What to do about a template: the tokenizer's, or that of the option `where`."""
    if where != "tokenizer":
        return f"Fix the template, or leave out --{where}"
    return (
        "Fix chat_template in tokenizer_config.json, or give another template with "
        "--chat.student.template"
    )


def _sanitize(tokenizer: Any, *texts: str) -> dict[str, Any]:
    """The option that encodes special tokens in the texts as text; older transformers lack it."""
    if not _has_option(type(tokenizer), SANITIZE):
        return {}
    written = any(token in text for token in tokenizer.all_special_tokens for text in texts)
    return {SANITIZE: True} if written else {}


@lru_cache
def _has_option(tokenizer_type: type, name: str) -> bool:
    """Whether chat templates of these tokenizers are applied with an option of that name."""
    return name in inspect.signature(tokenizer_type.apply_chat_template).parameters
