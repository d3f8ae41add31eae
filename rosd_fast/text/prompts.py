"""From text to prompt ids, the same way for student, reflector and teacher.

A prompt is a user turn, after a system turn if the problem has one, rendered by the tokenizer's own
chat template up to the tag that opens the answer. Prompt templates are filled in one pass, so text
that a model wrote is never read as a placeholder. A special token that is spelled out in a text is
encoded as text, if transformers supports that.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rosd_fast.errors import UserError

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
ELLIPSIS = " [...] "  # replaces the middle of a text that was cut
SYSTEM_MARK = "the-system-turn"


class TextModel(Protocol):
    """A tokenizer, and the ids that end a completion, as a `LoadedModel` holds them."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...


def render_prompt(
    tokenizer: Any, *, user: str, system: str | None = None, opening: str = ""
) -> tuple[int, ...]:
    """The ids of a prompt: chat template, generation prompt, and the answer's `opening`.

    If the template refuses or ignores the system role, the system text precedes the user text.
    `opening` must not have braces, which Jinja would read. Raises UserError when the template fails
    on a user turn.
    """
    if system is not None and not has_system_role(tokenizer):
        system, user = None, f"{system}\n\n{user}"
    turns = [{"role": "user", "content": user}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    options: dict[str, Any] = _sanitize(tokenizer, user, system or "")
    if opening:
        # As part of the template it is encoded together with the text before it. Jinja drops a line
        # break at the end of a template.
        options["chat_template"] = tokenizer.get_chat_template().removesuffix("\n") + opening
    from jinja2 import TemplateError

    try:
        ids = tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # the callers check lengths
            **options,
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template fails on a user turn ({error})",
            where="tokenizer",
            fix="Fix chat_template in tokenizer_config.json",
        ) from error
    return tuple(int(token) for token in ids)


def has_system_role(tokenizer: Any) -> bool:
    """Whether the template renders a system turn: some raise on it, others leave it out."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": SYSTEM_MARK}, {"role": "user", "content": "x"}]
    try:
        return SYSTEM_MARK in tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False


def _sanitize(tokenizer: Any, *texts: str) -> dict[str, bool]:
    """The option that encodes special tokens in the texts as text; older transformers lack it."""
    name = "sanitize_control_tokens"
    if name not in inspect.signature(tokenizer.apply_chat_template).parameters:
        return {}
    written = any(token in text for token in tokenizer.all_special_tokens for text in texts)
    return {name: True} if written else {}


def placeholders(template: str) -> set[str]:
    """The names in braces. Other braces, as in `{"a": 1}` or `{42}`, are text."""
    return set(PLACEHOLDER.findall(template))


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Replace placeholders by `values`, in one pass. Raises KeyError for an unknown name."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def cut_middle(text: str, keep: int) -> str:
    """The first and last characters of `text`, `keep` in total, around an ellipsis."""
    if len(text) <= keep:
        return text
    tail = keep // 2
    return text[: keep - tail] + ELLIPSIS + text[len(text) - tail :]


def fit_prompt(
    render: Callable[[int], tuple[int, ...]], *, longest: int, max_tokens: int
) -> tuple[int, tuple[int, ...]] | None:
    """(characters kept, ids) of the prompt with the longest texts that fit `max_tokens`.

    `render(keep)` is the prompt with its texts cut to `keep` characters each; `longest` is the
    length of the longest text, so `render(longest)` cuts nothing. None when not even one character
    fits.
    """
    ids = render(longest)
    if len(ids) <= max_tokens:
        return longest, ids
    if longest <= 1 or len(best := render(1)) > max_tokens:
        return None
    low, high = 1, longest  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        ids = render(middle)
        if len(ids) <= max_tokens:
            low, best = middle, ids
        else:
            high = middle
    return low, best
