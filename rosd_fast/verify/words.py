"""`exact` and `contains`: answers are compared word by word, ignoring case and spacing."""

from __future__ import annotations

import re

from rosd_fast.types import WRONG, Judgement
from rosd_fast.verify.markup import unwrap
from rosd_fast.verify.tags import find_answer, last_line, why_no_answer


def verify_exact(completion: str, answer: str) -> Judgement:
    """1.0 if the completion answers with the same words as `answer`, 0.0 otherwise.

    Markup around the answer found does not count, but markup of `answer` itself does.
    """
    found = find_answer(completion)
    if found is None:
        return Judgement(score=0.0, answer=None, reason=why_no_answer(completion))
    wanted = normalize(answer)
    if wanted and wanted in (normalize(found), normalize(unwrap(found))):
        return Judgement(score=1.0, answer=found)
    reason = WRONG if found else "the answer is empty"
    return Judgement(score=0.0, answer=found, reason=reason)


def verify_contains(completion: str, answer: str) -> Judgement:
    """1.0 if `answer` occurs anywhere in the completion as whole words, 0.0 otherwise.

    For quick trials only: a completion that lists every possible answer is right too.
    """
    words = normalize(answer)
    # The look-behind fails at once inside a word, so only the starts of words are compared.
    if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", normalize(completion)):
        return Judgement(score=1.0, answer=answer)
    reason = "the right answer does not occur in it"
    return Judgement(score=0.0, answer=last_line(completion), reason=reason)


def normalize(text: str) -> str:
    """`text` in lower case, with one space between words."""
    return " ".join(text.split()).casefold()
