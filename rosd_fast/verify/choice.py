r"""`choice`: the answer is the letter of the right option: B, (b), **B**, \text{B}, "B. 1.69"."""

from __future__ import annotations

import re

from rosd_fast.types import WRONG, Judgement
from rosd_fast.verify.markup import WORDS, unwrap
from rosd_fast.verify.tags import find_answer, quoted, why_no_answer

MAX_CHARS = 2000

_STATED = re.compile(
    r"(?:(?:the )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)(?: is ?:?|:)?\s+)+",
    re.IGNORECASE,
)
_LETTER = re.compile(r"(?:\(\s?([A-Za-z])\s?\)|([A-Za-z])\s?\)?)\.?")
# A colon or a bracket ends the letter; after a dot or a dash comes a space, so that "e.g." is none.
_LETTER_AND_TEXT = re.compile(
    r"(?:\(([A-Za-z])\)[.:]?\s*|([A-Za-z])(?:[:)]\s*|\.\s+|\s+[-\u2013\u2014]\s+))(?P<text>.+)",
    re.DOTALL,
)
# Another option: a capital letter on its own, or any before a bracket or a colon. "N" within the
# formula CC(N)C is none.
_OTHER_OPTION = re.compile(r"(?:^|\s)\(?(?:[A-Z](?=[\s.,;/]|$)|[A-Za-z][):])")
_RETRACTED = re.compile(
    r"(?:or|and|nor|not|but|is|isn't|was|cannot|can't|maybe|unless|if)\b"
    r"|(?:no|false|wrong|incorrect|excluded|eliminated|ruled out)(?:[,.;:!]|\W*$)",
    re.IGNORECASE,
)


def verify_choice(completion: str, answer: str) -> Judgement:
    """1.0 if the completion answers with the letter `answer`; the text of an option may follow."""
    found = find_answer(completion)
    if found is None:
        return Judgement(score=0.0, answer=None, reason=why_no_answer(completion))
    letter = parse_letter(found)
    if letter is None:
        return Judgement(score=0.0, answer=found, reason=f"not one letter: {quoted(found)}")
    is_right = letter == parse_letter(answer)
    return Judgement(score=float(is_right), answer=letter, reason=None if is_right else WRONG)


def parse_letter(text: str) -> str | None:
    """The letter that `text` chooses, in upper case; None when it chooses none, or several."""
    if len(text) > MAX_CHARS:
        return None
    text = unwrap(re.sub(WORDS, r"\1", unwrap(text)).replace("**", ""))
    text = unwrap(text[match.end() :] if (match := _STATED.match(text)) else text)
    match = _LETTER.fullmatch(text)
    if match is None:
        match = _LETTER_AND_TEXT.fullmatch(text)
        if match is None or _OTHER_OPTION.search(match["text"]) or _RETRACTED.match(match["text"]):
            return None
    return (match[1] or match[2]).upper()
