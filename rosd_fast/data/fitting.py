"""Check that the prompts of problems fit a model, and leave out those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rosd_fast.errors import UserError

if TYPE_CHECKING:
    from rosd_fast.data.collection import Problems
    from rosd_fast.text.chat import ChatFormat
    from rosd_fast.types import Problem

MAX_RENDERED = 2000
"""Prompts of a large data set that are rendered before a run; others are when they are drawn."""


def fitting(
    problems: Problems,
    *,
    chat: ChatFormat,
    skip: bool,
    max_prompt_tokens: int | None = None,
    context_length: int | None = None,
) -> tuple[Problems, list[str]]:
    """(the problems whose prompts fit, lines on the others).

    Of a large data set some prompts are looked at. The limits: see `too_long`. Raises UserError for
    a prompt that is too long unless `skip`, and when all of them are.
    """
    known = problems.checked
    if not problems.is_checked:
        known = known[:: max(1, len(known) // MAX_RENDERED)]
    over, fault = too_long(
        known, chat=chat, max_prompt_tokens=max_prompt_tokens, context_length=context_length
    )
    if fault is None:
        return problems, []
    if not skip or len(over) == len(known):
        raise fault
    left = problems.without(np.asarray(known.rows)[over])
    return left, [f"left out {len(over):,} of {len(known):,} problems. {fault.where}: {fault.what}"]


def check_prompts(
    problems: Sequence[Problem],
    *,
    chat: ChatFormat,
    max_prompt_tokens: int | None = None,
    context_length: int | None = None,
) -> None:
    """Raise UserError unless every prompt fits budget and context, and the chat template shows the
    turns before it. The limits and the error: see `too_long`."""
    _, fault = too_long(
        problems, chat=chat, max_prompt_tokens=max_prompt_tokens, context_length=context_length
    )
    if fault is not None:
        raise fault


def check_context(problems: Sequence[Problem], chats: Sequence[ChatFormat]) -> None:
    """Raise UserError unless each chat template shows the turns before the prompts."""
    for roles in {tuple(turn.role for turn in problem.context) for problem in problems} - {()}:
        for chat in chats:
            chat.check_roles(roles)


def too_long(
    problems: Sequence[Problem],
    *,
    chat: ChatFormat,
    max_prompt_tokens: int | None,
    context_length: int | None,
) -> tuple[list[int], UserError | None]:
    """(indices of the prompts that do not fit budget and context, the error for them).

    The error names the longest prompt, or where none fits the shortest: that says what would help.

    max_prompt_tokens: None: the context is the only limit.
    context_length: tokens a sequence may have, of which the answer needs at least one; None: no
        limit.

    Raises UserError when the chat template does not show the turns before a prompt.
    """
    check_context(problems, [chat])
    limits = [max_prompt_tokens, None if context_length is None else context_length - 1]
    longest = min((limit for limit in limits if limit is not None), default=None)
    if longest is None:
        return [], None
    lengths = [len(chat.render_problem(problem)) for problem in problems]
    over = [index for index, length in enumerate(lengths) if length > longest]
    if not over:
        return [], None
    some_fit = len(over) < len(problems)
    named = (max if some_fit else min)(over, key=lengths.__getitem__)
    length, ways = lengths[named], []
    if context_length is not None and length >= context_length:
        what = f"and the model's context has {context_length}, which leaves no room for an answer"
        ways.append("choose a model with a longer context")
    else:
        what = f"more than sample.max_prompt_tokens = {max_prompt_tokens}"
        ways.append("raise sample.max_prompt_tokens")
    if some_fit:
        ways.append("leave such problems out with data.bad_rows=skip")
        among = f"; {len(over):,} of {len(problems):,} prompts are too long"
    else:
        among = f"; it is the shortest of {len(problems):,}, and the longest has {max(lengths)}"
    return over, UserError(
        f"its prompt has {length} tokens, {what}" + (among if len(over) > 1 else ""),
        where=f"problem {problems[named].id}",
        fix=", or ".join(ways).capitalize(),
    )
