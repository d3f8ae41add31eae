"""The user turn of a prompt: templates with placeholders, and texts cut to fit a budget.

Templates are filled in one pass, so text that a model wrote is never read as a placeholder.
`chat.py` renders turns to ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
ELLIPSIS = " [...] "  # replaces the middle of a text that was cut


def placeholders(template: str) -> set[str]:
    """The names in braces. Other braces, as in `{"a": 1}` or `{42}`, are text."""
    return set(PLACEHOLDER.findall(template))


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Replace placeholders by `values`, in one pass. Raises KeyError for an unknown name."""
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def fill_known(template: str, values: Mapping[str, str]) -> str:
    """Replace the placeholders that `values` names, in one pass; other names in braces are text.

    For templates of a data set, whose text may have braces of its own, as in `\\frac{a}{b}`.
    """
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


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
