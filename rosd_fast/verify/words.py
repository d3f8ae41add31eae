"""`exact` and `contains`: answers are compared word by word, ignoring case and spacing."""

from __future__ import annotations

import re

from rosd_fast.verify.tags import last_answer


def verify_exact(completion: str, answer: str) -> tuple[float, str | None]:
    """1.0 if the last answer tag contains the same words as `answer`, 0.0 otherwise."""
    found = last_answer(completion)
    if found is None:
        return 0.0, None
    return float(normalize(found) == normalize(answer) != ""), found


def verify_contains(completion: str, answer: str) -> tuple[float, str | None]:
    """1.0 if `answer` occurs anywhere in the completion as whole words, 0.0 otherwise.

    For quick trials only: a completion that lists every possible answer is right too.
    """
    words = normalize(answer)
    # The look-behind fails at once inside a word, so only the starts of words are compared.
    if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", normalize(completion)):
        return 1.0, answer
    return 0.0, None


def normalize(text: str) -> str:
    """`text` in lower case, with one space between words."""
    return " ".join(text.split()).casefold()
