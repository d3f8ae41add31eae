"""Parse a reflection: its quote, its explanation, and how it departs from the format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

QUOTE = re.compile(r"<error_quote>(.*?)</error_quote>", re.IGNORECASE | re.DOTALL)
SENTENCE = re.compile(r"<error_sentence>\s*(\d{1,9})\s*</error_sentence>", re.IGNORECASE)
EXPLANATION = re.compile(r"<explanation>(.*?)(</explanation>|\Z)", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"</?(?:error_quote|error_sentence|explanation)>", re.IGNORECASE)
CLOSING = "</explanation>"
CUT_TAG = re.compile(  # a closing tag that was cut by the length limit
    f"({'|'.join(CLOSING[:length] for length in range(len(CLOSING) - 1, 1, -1))})\\Z", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """The parts of a reflection's text."""

    quote: str | None
    explanation: str | None
    sentence: int | None
    well_formed: bool  # every tag is present, in order, and nothing is empty
    tolerated: tuple[str, ...]  # departures from the format: "cut", "case", "unclosed"


def parse_reflection(text: str, *, correct: bool, sentences: Sequence[str] | None = None) -> Parsed:
    """Parse the text of a reflection. `sentences`: the rollout's sentences, in mode sentence.

    Whitespace around quote and explanation is dropped; an empty one is None. Three departures are
    tolerated and reported:

        case       tags in another case
        unclosed   an explanation without its closing tag; it runs to the end of the text
        cut        a quote that ends within a character, because its tokens ran out

    For a correct rollout no quote is read.
    """
    named = None if correct else (QUOTE if sentences is None else SENTENCE).search(text)
    # An explanation after the quote is preferred to one before it.
    explained = EXPLANATION.search(text, named.end() if named else 0)
    in_order = explained is not None and (correct or named is not None)
    if explained is None and named is not None:
        explained = EXPLANATION.search(text[: named.start()])
    quoted, number = named[1].strip() if named else "", None
    quote = quoted.rstrip("\ufffd").rstrip()
    if sentences is not None and named is not None:
        number = int(quote)
        quote = sentences[number - 1] if 1 <= number <= len(sentences) else ""
        number = number if quote else None
    explanation = closing = ""
    if explained is not None:
        closing = explained[2]
        explanation = (explained[1] if closing else CUT_TAG.sub("", explained[1])).strip()
    tolerated = ["cut"] if sentences is None and quote != quoted else []
    if any(tag != tag.lower() for tag in TAG.findall(text)):
        tolerated.append("case")
    if explanation and not closing:
        tolerated.append("unclosed")
    return Parsed(
        quote=quote or None,
        explanation=explanation or None,
        sentence=number,
        well_formed=bool(in_order and closing and explanation and (correct or quote)),
        tolerated=tuple(tolerated),
    )
