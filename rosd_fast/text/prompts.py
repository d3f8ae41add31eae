"""The user turn of a prompt: templates with placeholders, and texts cut to fit a budget.

Templates are filled in one pass, so text that a model wrote is never read as a placeholder.
`chat.py` renders turns to ids.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
ELLIPSIS = " [...] "  # replaces the middle of a text that was cut
SLACK = 512  # a cut prompt may be 1/512 shorter than the longest that fits
MARGIN = 64  # tokens by which a size may be wrong about a prompt that is nearly short enough
MAX_GUESSES = 6  # cuts chosen by their size, before the rest is bisected


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
    render: Callable[[int], tuple[int, ...]],
    *,
    longest: int,
    max_tokens: int,
    size: Callable[[int], int],
) -> tuple[int, tuple[int, ...]] | None:
    """(characters kept, ids) of the prompt with the longest texts that fit `max_tokens`.

    `size` only chooses which prompt to render; its ids decide whether it fits. A prompt that fits
    whole is never cut, and a cut one is at most `max_tokens` // 512 tokens shorter than the longest
    that fits. None when not even one character fits.

    render: the prompt with its texts cut to so many characters each.
    longest: the length of the longest text, so `render(longest)` cuts nothing.
    size: about how many tokens the texts have when they are cut to so many characters each, plus
        or minus a number that all cuts have in common; it may not fall.
    """
    tolerance, margin = max_tokens // SLACK, max_tokens // SLACK + MARGIN
    best, fixed = None, 0  # fixed: tokens besides the texts
    if longest > 1 and size(longest) > max_tokens // 2:
        best = render(1)
        fixed = len(best) - size(1)
    untried = fixed + size(longest) > max_tokens + margin
    if not untried:
        ids = render(longest)
        if len(ids) <= max_tokens:
            return longest, ids
    if longest <= 1:
        return None
    best = best or render(1)
    if len(best) > max_tokens:
        return None
    low, high = 1, longest + untried  # low fits; high does not, or cuts nothing more
    fixed, tries = len(best) - size(1), 0
    while high - low > 1 and len(best) < max_tokens - tolerance:
        keep = (low + high) // 2
        if tries < MAX_GUESSES:
            room = max_tokens - tolerance // 2 - fixed
            keep = low + max(1, bisect_right(range(low + 1, high), room, key=size))
        ids = render(keep)
        fixed = len(ids) - size(keep)
        tries += 1
        if len(ids) <= max_tokens:
            low, best = keep, ids
        else:
            high = keep
    if low < longest < high and fixed + size(longest) <= max_tokens + margin:
        ids = render(longest)
        if len(ids) <= max_tokens:
            return longest, ids
    return low, best
