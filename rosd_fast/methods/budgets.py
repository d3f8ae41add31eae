"""Checks of the problems: room in the prompts that a method renders, and reference solutions; and
the longest sequence that a run can have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rosd_fast.errors import UserError
from rosd_fast.text.prompts import fill_template, placeholders

if TYPE_CHECKING:
    from rosd_fast.config import Config
    from rosd_fast.methods.base import Method
    from rosd_fast.text.chat import Chats
    from rosd_fast.types import Problem


def check_references(config: Config, problems: Iterable[Problem]) -> None:
    """Raise UserError when an option asks for reference solutions and no problem has one."""
    select = config.select
    options = {"on_no_success": select.on_no_success, "on_lone_success": select.on_lone_success}
    asked = [name for name, value in options.items() if value == "reference"]
    if asked and not any(problem.reference for problem in problems):
        raise UserError(
            "reference: no problem has a reference solution",
            where=f"select.{asked[0]}",
            fix='Give rows a "reference", or choose another value',
        )


def check_budgets(
    config: Config, chats: Chats, problem: Problem, templates: Iterable[tuple[str, str]]
) -> None:
    """Raise UserError when a template leaves no room once `problem` is filled in.

    problem: the longest one. templates: the (section, option) of each user turn that is rendered.
    """
    for section, name in templates:
        options = getattr(config, section)
        template = getattr(options, name)
        texts = {**dict.fromkeys(placeholders(template), ""), "problem": problem.prompt}
        user = fill_template(template, texts)
        chat = chats.teacher if section == "teacher" else chats.reflector
        length = len(chat.render_problem(problem, user))
        if length >= options.max_prompt_tokens:
            raise UserError(
                f"{section}.{name} and the problem have {length} tokens together, and "
                f"{section}.max_prompt_tokens is {options.max_prompt_tokens}",
                where=f"problem {problem.id}",
                fix=f"Raise {section}.max_prompt_tokens, or leave the problem out",
            )


def longest_sequence(method: Method, context_length: int) -> int:
    """The number of tokens that the longest sequence of a run can have, by its options.

    context_length: the student's, which limits what is generated; a teacher's prompt may exceed it.
    """
    config = method.config
    generates = (config.sample, config.reflect) if method.annotates else (config.sample,)
    longest = min(
        context_length,
        max(options.max_prompt_tokens + options.max_new_tokens for options in generates),
    )
    if not method.needs_teacher:
        return longest
    answer = min(config.sample.max_new_tokens, context_length)
    return max(longest, config.teacher.max_prompt_tokens + answer)
