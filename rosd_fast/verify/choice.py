"""`choice`: the answer tag contains the letter of the right option and nothing else."""

from __future__ import annotations

import re

from rosd_fast.verify.tags import last_answer

_LETTER = re.compile(r"\(?\s?([A-Za-z])\s?\)?\.?")


def verify_choice(completion: str, answer: str) -> tuple[float, str | None]:
    """1.0 if the last answer tag contains the letter `answer`; A, a, (a), A. and A) are equal."""
    found = last_answer(completion)
    if found is None:
        return 0.0, None
    letter = parse_letter(found)
    return float(letter is not None and letter == parse_letter(answer)), letter or found


def parse_letter(text: str) -> str | None:
    """The letter that `text` is, in upper case; None when `text` is not a single letter."""
    match = _LETTER.fullmatch(text.strip())
    return match[1].upper() if match else None
